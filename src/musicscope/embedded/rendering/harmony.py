"""Chords for a melody: key-aware choice by dynamic programming, and their voicings."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from musicscope.embedded.rendering.tunes import MODES

# Cost of a triad by its root above the tonic: how rare it is as accompaniment. Roots that a mode
# lacks do not occur.
_ROOT_COSTS = {
    "major": {0: 0.0, 5: 0.12, 7: 0.08, 9: 0.25, 2: 0.3, 4: 0.5},
    "minor": {0: 0.0, 5: 0.15, 7: 0.3, 8: 0.2, 3: 0.2, 10: 0.15},
    "dorian": {0: 0.0, 5: 0.15, 7: 0.3, 2: 0.5, 3: 0.25, 10: 0.08},
    "mixolydian": {0: 0.0, 5: 0.12, 10: 0.1, 7: 0.25, 9: 0.4, 2: 0.4},
    "lydian": {0: 0.0, 2: 0.15, 7: 0.1, 9: 0.3, 4: 0.4, 11: 0.5},
    "phrygian": {0: 0.0, 1: 0.15, 10: 0.2, 3: 0.25, 8: 0.25, 5: 0.3},
}
_CADENCE_ROOTS = {"phrygian": (0, 1), "dorian": (0, 10, 7), "mixolydian": (0, 10, 7)}
CHANGE_COST = 0.12  # of a new chord within a bar
STAY_COSTS = (0.02, 0.25)  # of the same chord over a bar line: plain and colourful harmony
FIFTH_GAIN = 0.12  # of a root that falls by a fifth
PHRASE_COST = 0.25  # of a phrase that ends on neither tonic nor dominant
FINAL_COST = 1.0  # of a tune that ends on another chord than the tonic
JITTER = 0.06  # standard deviation of random changes to the costs, so that settings differ


@dataclass(frozen=True)
class Chords:
    """One chord per slot."""

    root: np.ndarray
    """Pitch classes [slots]."""
    tones: np.ndarray
    """Semitones above the root [slots, 4]: root, third, fifth and seventh."""

    def take(self, slots: np.ndarray) -> Chords:
        """The chords at the given slots, in that order."""
        return Chords(self.root[slots], self.tones[slots])


@cache
def _vocabulary(mode: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Chords of a mode, relative to the tonic.

    Returns:
        roots: [chords].
        tones: [chords, 4].
        fit: [chords, 12], what one beat of a pitch class adds to a chord's score.
        costs: [chords].
        transitions: [chords, chords], gain of going from row to column.
    """
    scale = set(MODES[mode])
    costs = _ROOT_COSTS[mode]
    rows = []
    for root, cost in costs.items():
        third = 4 if (root + 4) % 12 in scale else 3
        seventh = 10 if (root + 10) % 12 in scale else 11
        fifth = 7 if (root + 7) % 12 in scale else 6
        rows.append((root, (0, third, fifth, seventh), cost))
    if mode == "minor":  # the dominant with the leading note
        rows.append((7, (0, 4, 7, 10), 0.12))
    roots = np.array([r for r, _, _ in rows])
    tones = np.array([t for _, t, _ in rows])
    fit = np.full((len(rows), 12), -0.6)
    fit[:, list(scale)] = -0.3
    for i, (root, chord, _) in enumerate(rows):
        fit[i, (root + np.array(chord)) % 12] = (1.0, 0.95, 0.85, 0.1)
    moves = (roots[None, :] - roots[:, None]) % 12
    transitions = np.where(moves == 5, FIFTH_GAIN, 0.0) - np.where(moves == 6, 0.15, 0.0)
    return roots, tones, fit, np.array([c for _, _, c in rows]), transitions


def harmonise(
    start: np.ndarray, duration: np.ndarray, pitch: np.ndarray, tonic: int, mode: str,
    bar: int, slots_per_bar: int, bars: int, rng: np.random.Generator,
) -> Chords:  # fmt: skip
    """Choose the chords that fit a melody best, given how chords follow one another.

    A slot's chord scores by the melody notes that sound in it, by how common it is in the mode, by
    the step from the chord before, and by cadences every four bars and at the end.

    Args:
        start: onsets [notes] in beats, 0 at the first bar.
        duration: beats [notes].
        pitch: MIDI numbers [notes].
        tonic: pitch class.
        mode: a key of MODES.
        bar: beats per bar.
        slots_per_bar: chords per bar, a divisor of `bar` or 1.
        bars: number of bars.
        rng: draws small changes to the costs.

    Returns:
        Chords [bars * slots_per_bar].
    """
    roots, tones, fit, costs, transitions = _vocabulary(mode)
    slot = bar / slots_per_bar
    count = bars * slots_per_bar
    # A note that is held over a chord change counts in both slots.
    first = np.floor(start / slot + 1e-6).astype(int)
    inside = np.minimum(duration, (first + 1) * slot - start)
    over = duration - inside
    strong = 1.0 + 0.6 * (np.abs(start / slot - first) < 1e-3) + 0.2 * (np.abs(start % 1.0) < 1e-3)
    weights = np.zeros((count + 1, 12))
    classes = (pitch - tonic) % 12
    here = (first >= 0) & (first < count)
    np.add.at(weights, (first[here], classes[here]), (inside * strong)[here])
    held = here & (over > 1e-6)
    np.add.at(weights, (first[held] + 1, classes[held]), np.minimum(over, slot)[held])
    weights = weights[:count]
    weights /= np.maximum(weights.sum(1, keepdims=True), 0.5 * slot)
    colour = rng.random()  # colourful harmony uses rare chords and changes often
    gains = weights @ fit.T - (1.1 - 0.8 * colour) * costs - rng.normal(0.0, JITTER, len(roots))
    gains += rng.normal(0.0, JITTER, gains.shape)
    cadence = np.isin(roots, _CADENCE_ROOTS.get(mode, (0, 7)))
    ends = np.arange(4 * slots_per_bar - 1, count, 4 * slots_per_bar)
    gains[ends] -= PHRASE_COST * ~cadence
    gains[-1] -= FINAL_COST * (roots != 0)
    gains[0] -= 0.4 * (roots != 0)
    same = np.eye(len(roots), dtype=bool)
    step_inside = transitions - CHANGE_COST * ~same
    step_over = transitions - np.interp(colour, (0.0, 1.0), STAY_COSTS) * same
    best, back = gains[0], np.zeros((count, len(roots)), int)
    for i in range(1, count):
        paths = best[:, None] + (step_over if i % slots_per_bar == 0 else step_inside)
        back[i] = paths.argmax(0)
        best = paths.max(0) + gains[i]
    path = np.zeros(count, int)
    path[-1] = best.argmax()
    for i in range(count - 1, 0, -1):
        path[i - 1] = back[i, path[i]]
    return Chords((roots[path] + tonic) % 12, tones[path])


def close_voicing(chords: Chords, center: float, size: int) -> np.ndarray:
    """Voice chords within an octave around `center`, so that voices move by small steps.

    Args:
        chords: chords [slots].
        center: MIDI number.
        size: tones per chord: 2 (root and fifth), 3 (triad) or 4 (with the seventh).

    Returns:
        MIDI numbers [slots, size], ascending.
    """
    chosen = chords.tones[:, [0, 2]] if size == 2 else chords.tones[:, :size]
    low = round(center) - 6
    return np.sort(low + (chords.root[:, None] + chosen - low) % 12, axis=1)


def strummed_voicing(chords: Chords, size: int) -> np.ndarray:
    """Voice chords wide, like six strings: a low root under a close chord and its doublings.

    Returns:
        MIDI numbers [slots, size + 3], ascending.
    """
    root = 41 + (chords.root - 41) % 12
    middle = close_voicing(chords, 57.0, size)
    return np.sort(np.concatenate([root[:, None], middle, middle[:, :2] + 12], axis=1), axis=1)
