"""Score of every layer by ablation, and hooks by name."""
