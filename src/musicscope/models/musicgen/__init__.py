"""MusicGen in transformers."""
