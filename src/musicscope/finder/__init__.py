"""Find the features of a concept from recordings with and without it."""
