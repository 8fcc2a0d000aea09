"""SAEs and features for other tools: the command, the model card, the feature tables."""
