"""Layer scores by ablation, and the choice of layers."""
