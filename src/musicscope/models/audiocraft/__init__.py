"""models/audiocraft"""
