"""Concepts switched off and on in what a model generates."""
