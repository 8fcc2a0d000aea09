"""models/musicgen"""
