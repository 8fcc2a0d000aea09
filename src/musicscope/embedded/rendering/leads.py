"""Melodies on bars of three or four beats, and the styles that fit them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from musicscope.embedded.rendering.styles import STYLES, TRAIN_STYLES, Style
from musicscope.embedded.rendering.tunes import Tune


@dataclass(frozen=True)
class Lead:
    """A melody on the grid of a style's beats."""

    beats: int
    """Beats per bar, 3 or 4."""
    triplets: bool
    """Whether a beat divides in three."""
    bars: int
    start: np.ndarray
    """Onsets [notes] in beats, 0 at the first bar; a pickup is negative."""
    duration: np.ndarray
    pitch: np.ndarray


def lead_of(tune: Tune) -> Lead:
    """Put a melody on bars of three or four beats.

    Bars of two beats are taken in pairs. A bar of short notes counts as more beats, so that a beat
    has at most about three notes.
    """
    melody = tune.voice == 0
    start, duration, pitch = tune.start[melody], tune.duration[melody], tune.pitch[melody]
    per_quarter = len(start) / max(float(start[-1] - start[0]), 1.0)
    upper, lower = tune.meter
    compound = upper in (6, 9, 12)
    # Quarter notes per beat.
    unit = 12.0 / lower if compound else 4.0 / lower if lower == 8 else 1.0
    if not compound and per_quarter * unit > 2.5:
        unit /= 2.0
    per_bar = round(tune.bar / unit)
    beats = 3 if per_bar % 3 == 0 else 4
    bars = int(np.ceil(tune.bars * per_bar / beats))
    return Lead(beats, compound, bars, start / unit, duration / unit, pitch)


def fits(style: Style, lead: Lead) -> bool:
    """Whether a style's bars fit a melody's; melodies of even beats fit styles with triplets."""
    return style.beats == lead.beats and (style.division == 3 or not lead.triplets)


def styles_for(tune: Tune, names: tuple[str, ...] = TRAIN_STYLES) -> tuple[str, ...]:
    """The styles among `names` that fit the meter of `tune`, in their order."""
    lead = lead_of(tune)
    return tuple(name for name in names if fits(STYLES[name], lead))
