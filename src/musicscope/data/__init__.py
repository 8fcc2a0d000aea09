"""Clips and their labels, splits, and the sources that they are made from."""
