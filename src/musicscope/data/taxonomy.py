"""Instrument families, the General MIDI programs that belong to them, and names of keys."""

from __future__ import annotations

from musicscope.config.concepts import FAMILIES

__all__ = ["BASS_NAMES", "FAMILIES", "KEYS", "PITCHED_FAMILIES", "PROGRAM_NAMES"]

PROGRAM_NAMES = {
    "guitar": {
        24: "nylon-string guitar", 25: "steel-string acoustic guitar", 26: "jazz guitar",
        27: "clean electric guitar", 28: "muted electric guitar", 29: "overdriven guitar",
        30: "distorted guitar",
    },
    "piano": {0: "grand piano", 1: "bright piano", 3: "honky-tonk piano"},
    "electric_piano": {4: "electric piano", 5: "FM electric piano"},
    "mallets": {9: "glockenspiel", 11: "vibraphone", 12: "marimba", 13: "xylophone"},
    "organ": {16: "drawbar organ", 17: "percussive organ", 18: "rock organ", 19: "church organ"},
    "strings": {40: "violin", 42: "cello", 48: "string ensemble", 49: "slow strings"},
    "choir": {52: "choir aahs", 53: "voice oohs"},
    "brass": {56: "trumpet", 57: "trombone", 60: "french horn", 61: "brass section"},
    "reed": {65: "alto saxophone", 66: "tenor saxophone", 68: "oboe", 71: "clarinet"},
    "flute": {73: "flute", 74: "recorder", 75: "pan flute"},
    "synth": {80: "square lead synth", 81: "saw lead synth", 88: "synth pad", 90: "polysynth pad"},
    "plucked": {46: "harp", 104: "sitar", 105: "banjo", 107: "koto"},
}  # fmt: skip
BASS_NAMES = {
    32: "acoustic bass",
    33: "fingered electric bass",
    34: "picked bass",
    38: "synth bass",
}
PITCHED_FAMILIES = tuple(PROGRAM_NAMES)
"""`FAMILIES` but bass and drums."""
KEYS = ("C", "C sharp", "D", "E flat", "E", "F", "F sharp", "G", "A flat", "A", "B flat", "B")
