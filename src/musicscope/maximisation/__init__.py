"""Activation maximisation: a search over audio tokens under the model's own prior."""
