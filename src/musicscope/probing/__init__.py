"""Concept classifiers in SAE space against every baseline."""
