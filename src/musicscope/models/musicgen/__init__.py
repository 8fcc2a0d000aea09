"""MusicGen in transformers."""

from musicscope.models.torchaudio_guard import install_guard

install_guard()  # before any module of this package imports transformers' audio models
