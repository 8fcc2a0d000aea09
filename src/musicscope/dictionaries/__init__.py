"""TopK SAEs, universal SAEs and crosscoders: the step, training, metrics."""
