"""Instrument judges of audio, never used to choose features."""
