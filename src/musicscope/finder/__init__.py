"""From recordings with and without a concept to the features responsible."""
