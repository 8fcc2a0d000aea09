"""Size and time of a configuration before anything runs."""
