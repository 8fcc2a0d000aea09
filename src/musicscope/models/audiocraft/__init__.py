"""MusicGen in audiocraft, and conversion between the layouts of audiocraft and transformers."""
