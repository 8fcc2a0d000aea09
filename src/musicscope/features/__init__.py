"""Features matched over models, their concepts and their table."""
