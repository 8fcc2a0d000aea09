"""Captions of rendered clips, in several phrasings, from what is known exactly about them."""

from __future__ import annotations

import numpy as np

from musicscope.data.taxonomy import KEYS
from musicscope.embedded.midi_set.orchestration import Plan, instrument_name

# Krumhansl & Kessler (1982) probe-tone profiles.
MAJOR = np.array([6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88])
MINOR = np.array([6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17])


def estimate_key(pitch_class_seconds: np.ndarray) -> str:
    """Key whose profile correlates best with the durations of the twelve pitch classes."""
    if not np.ptp(pitch_class_seconds):
        return "unknown"
    scores = {}
    for tonic in range(12):
        rotated = np.roll(pitch_class_seconds, -tonic)
        for profile, mode in ((MAJOR, "major"), (MINOR, "minor")):
            scores[f"{KEYS[tonic]} {mode}"] = np.corrcoef(rotated, profile)[0, 1]
    return max(scores, key=scores.__getitem__)


def tempo_word(bpm: float) -> str:
    """slow below 90, fast above 135 beats a minute."""
    return "slow" if bpm < 90 else "fast" if bpm > 135 else "mid-tempo"


def density_word(notes_per_second: float) -> str:
    """sparse below 6, busy above 14 notes a second."""
    return "sparse" if notes_per_second < 6 else "busy" if notes_per_second > 14 else "steady"


def _join(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def write_caption(
    plan: Plan, bpm: float, density: float, key: str, rng: np.random.Generator
) -> str:
    """One caption. The target is always named, by its family or by its program."""
    names = []
    for voice in plan.voices:
        family = voice.family.replace("_", " ")
        names.append(family if rng.random() < 0.5 else instrument_name(voice))
    lead, rest = names[0], names[1:]
    every = _join(list(dict.fromkeys(names)))
    tempo, dense = tempo_word(bpm), density_word(density)
    forms = [
        lead,
        f"{lead} music",
        f"a {lead} melody",
        every,
        f"{every}, {tempo}, {dense}",
        f"A {tempo}, {dense} instrumental in {key} with {every}.",
        f"{every} play a {dense} piece in {key} at about {round(bpm / 5) * 5} BPM.",
        f"{lead} leads a {tempo} tune" + (f" with {_join(rest)}." if rest else "."),
        f"{dense} {tempo} music featuring {lead}" + (f", backed by {_join(rest)}" if rest else ""),
    ]
    weights = np.array([1, 1, 1, 2, 2, 2, 2, 2, 2], float)
    return forms[rng.choice(len(forms), p=weights / weights.sum())]
