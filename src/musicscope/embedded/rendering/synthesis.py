"""Play a part on a synthesised instrument whose parameters are drawn at random.

`musicscope.data.taxonomy` names the families and programs. Every stem draws a new
instrument, so that its family is the only thing that stems of one family share. This package needs
only NumPy and SciPy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from scipy.signal import lfilter

from musicscope.embedded.rendering import (
    decaying_tones,
    drum_tones,
    electronic_tones,
    sustained_tones,
)
from musicscope.embedded.rendering.tones import Instrument, Stem, loudest

LEVEL = 0.12
"""RMS of the loudest 20 ms of a note at velocity 127."""
SOFTEST = 0.03
"""Gain of velocity 0, as a share of that of velocity 127."""
LOUDNESS_STEPS = 5
"""Steps of brightness over velocity; the gain has no steps."""
EARLIEST = -1.0
"""Seconds; a note that began before is played from here."""
SHORTEST = 0.02
"""Seconds that any note is held."""
LOWEST_PEAK, HIGHEST_PEAK = 1e-3, 4.0
MAX_STRUM = 0.08
TUNING = 3.0
"""Cents by which whole stems are out of tune (standard deviation, at most twice it)."""
LONGEST_RELEASE = 2.0
"""Seconds; no instrument's release is longer."""


class Notes(Protocol):
    """Notes sorted by start: arrays [notes]; seconds, MIDI pitch, and velocity 1..127."""

    start: np.ndarray
    end: np.ndarray
    pitch: np.ndarray
    velocity: np.ndarray


def _bass(program: int, stem: Stem) -> Instrument:
    if program != 38:
        return decaying_tones.bass_guitar(program, stem)
    if stem.rng.random() < 0.4:
        return decaying_tones.fm_bass(stem)
    return electronic_tones.synth_bass(stem)


INSTRUMENTS: dict[str, Callable[[int, Stem], Instrument]] = {
    "guitar": decaying_tones.guitar,
    "piano": decaying_tones.piano,
    "electric_piano": decaying_tones.electric_piano,
    "mallets": decaying_tones.mallets,
    "organ": electronic_tones.organ,
    "strings": sustained_tones.strings,
    "choir": sustained_tones.choir,
    "brass": sustained_tones.brass,
    "reed": sustained_tones.reed,
    "flute": sustained_tones.flute,
    "synth": electronic_tones.synth,
    "plucked": decaying_tones.plucked,
    "bass": _bass,
    "drums": drum_tones.drums,
}


def play(
    family: str, program: int, notes: Notes, rng: np.random.Generator, seconds: float, rate: int
) -> np.ndarray:
    """Render one stem with an instrument of `family` that is drawn from `rng`.

    Args:
        family: a name of `orchestration.FAMILIES`.
        program: General MIDI program of that family; drums ignore it.
        notes: the part; times relative to the clip, which begins at 0.
        rng: source of the instrument's parameters; the same state gives the same samples.
        seconds: length of the clip.
        rate: samples per second; the models are tuned for 32,000.

    Returns:
        float32 [samples], peak within LOWEST_PEAK..HIGHEST_PEAK, or zeros if nothing sounds.

    Raises:
        ValueError: the family or the program is unknown.
    """
    if family not in INSTRUMENTS:
        raise ValueError(f"unknown family {family!r}; known: {', '.join(INSTRUMENTS)}")
    total = round(seconds * rate)
    start = np.maximum(np.asarray(notes.start, float), EARLIEST)
    held = np.maximum(np.asarray(notes.end, float) - start, SHORTEST)
    pitch, velocity = np.asarray(notes.pitch, int), np.asarray(notes.velocity, float)
    on = np.round(start * rate).astype(int)
    longest = total - min(int(on.min(initial=0)), 0)
    most = min(longest, int((held.max(initial=0.0) + LONGEST_RELEASE) * rate))
    instrument = _draw(family, program, Stem(rng, rate, max(most, 1)))
    tuning = 0.0 if family == "drums" else float(np.clip(rng.normal(), -2, 2) * TUNING) / 100
    if instrument.strum:
        on = on + np.round(_strum(start, pitch, instrument.strum) * rate).astype(int)
    gate = np.round(held * rate).astype(int)
    if instrument.rings:
        gate = _until_choked(on, pitch, instrument.choked, longest)
    out = np.zeros(total, np.float32)
    sounding = np.flatnonzero((on < total) & (np.asarray(notes.end, float) > EARLIEST))
    release = max(int(instrument.release * rate), rate // 200)
    fade = _release_curve(release)
    step = np.clip((velocity / 127.0 * LOUDNESS_STEPS).astype(int), 0, LOUDNESS_STEPS - 1)
    gain = SOFTEST + (1.0 - SOFTEST) * (np.clip(velocity, 0, 127) / 127.0) ** instrument.touch
    # Each distinct pitch and brightness is rendered once, as long as its longest note.
    distinct, which = np.unique(np.stack([pitch, step])[:, sounding], axis=1, return_inverse=True)
    for number, (key, level) in enumerate(distinct.T):
        group = sounding[which == number]
        needed = min(int((gate[group] + release).max()), int((total - on[group]).max()))
        tone = instrument.tone(float(key) + tuning, (level + 0.5) / LOUDNESS_STEPS, needed)
        strength = loudest(tone, rate)
        if strength == 0.0:
            continue
        tone *= np.float32(LEVEL / strength)
        if instrument.levels:
            tone *= np.float32(instrument.levels(int(key)))
        for i in group:
            _place(out, tone, int(on[i]), int(gate[i]), fade, np.float32(gain[i]))
    if instrument.finish:
        out = instrument.finish(out)
    return _bounded(out, rate)


def _draw(family: str, program: int, stem: Stem) -> Instrument:
    try:
        return INSTRUMENTS[family](program, stem)
    except KeyError as error:
        raise ValueError(f"{family} has no program {program}") from error


def _place(
    out: np.ndarray, tone: np.ndarray, on: int, gate: int, fade: np.ndarray, gain: np.float32
) -> None:
    """Add `gain * tone` at sample `on`: `gate` samples as they are, then faded by `fade`."""
    first, last = max(0, -on), min(len(tone), gate, len(out) - on)
    if last > first:
        out[on + first : on + last] += gain * tone[first:last]
    first, last = max(gate, -on), min(len(tone), gate + len(fade), len(out) - on)
    if last > first:
        out[on + first : on + last] += gain * tone[first:last] * fade[first - gate : last - gate]


def _release_curve(samples: int) -> np.ndarray:
    """Fall from 1 to 0, exponential with a linear end, float32 [samples]."""
    x = np.linspace(0.0, 1.0, samples, dtype=np.float32)
    return np.exp(np.float32(-4.0) * x) * (np.float32(1.0) - x)


def _strum(start: np.ndarray, pitch: np.ndarray, step: float) -> np.ndarray:
    """Seconds by which each note of a chord is late, from low to high."""
    late = np.zeros(len(start))
    order = np.lexsort((pitch, start))
    rank = 0
    for before, now in zip(order[:-1], order[1:], strict=True):
        rank = rank + 1 if start[now] - start[before] < 1e-3 else 0
        late[now] = min(rank * step, MAX_STRUM)
    return late


def _until_choked(
    on: np.ndarray, pitch: np.ndarray, choked: frozenset[int], longest: int
) -> np.ndarray:
    """Samples that each note rings: to the end, or to the next onset of its choke group."""
    gate = np.full(len(on), longest)
    group = np.flatnonzero(np.isin(pitch, list(choked)))
    onsets = np.unique(on[group])
    following = np.searchsorted(onsets, on[group], side="right")
    more = following < len(onsets)
    gate[group[more]] = onsets[following[more]] - on[group[more]]
    return gate


def _bounded(stem: np.ndarray, rate: int) -> np.ndarray:
    """The stem without offset, its peak brought within the limits by one gain."""
    pole = np.exp(-2 * np.pi * 12.0 / rate)
    stem = lfilter(np.float32([1, -1]), np.float32([1, -pole]), stem)
    peak = float(np.abs(stem).max(initial=0.0))
    if peak == 0.0:
        return stem
    return stem * np.float32(np.clip(peak, LOWEST_PEAK, HIGHEST_PEAK) / peak)
