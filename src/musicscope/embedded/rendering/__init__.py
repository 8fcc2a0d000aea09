"""Scores, arrangements and sounds that the embedded models are trained on."""
