"""Helpers without a domain: files, seeds, processes, statistics, audio arrays, plots."""
