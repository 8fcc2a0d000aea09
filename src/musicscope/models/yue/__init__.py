"""YuE stage 1."""
