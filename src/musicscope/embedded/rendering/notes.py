"""Notes of a part as arrays, before and after they become a `Part` in seconds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from musicscope.embedded.rendering.scores import Part

VELOCITIES = (30, 120)
SHORTEST = 0.04  # seconds


@dataclass(frozen=True)
class Notes:
    """Notes of a part before they are humanised. Times are in beats."""

    start: np.ndarray
    end: np.ndarray
    pitch: np.ndarray
    weight: np.ndarray
    """Relative loudness."""
    delay: np.ndarray
    """Seconds after the beat, as for the strings of a strum."""

    def where(self, keep: np.ndarray) -> Notes:
        """Notes selected by a mask or by indices."""
        return Notes(
            *(x[keep] for x in (self.start, self.end, self.pitch, self.weight, self.delay))
        )


def notes_of(
    start: np.ndarray, end: np.ndarray, pitch: np.ndarray, weight: np.ndarray | float = 1.0,
    delay: np.ndarray | float = 0.0,
) -> Notes:  # fmt: skip
    """Broadcast all columns to the same length."""
    columns = np.broadcast_arrays(start, end, pitch, weight, delay)
    return Notes(*(column.ravel() for column in columns))


def join(*many: Notes) -> Notes:
    """Concatenate notes."""
    columns = zip(*((n.start, n.end, n.pitch, n.weight, n.delay) for n in many), strict=True)
    return Notes(*(np.concatenate(column) for column in columns))


def swung(beats: np.ndarray, unit: float, ratio: float) -> np.ndarray:
    """Move the middle of every `unit` of beats to `ratio` of it, linearly on both sides."""
    whole = np.floor(beats / unit + 1e-9)
    inside = beats / unit - whole
    bent = np.where(
        inside < 0.5, inside * 2.0 * ratio, ratio + (inside - 0.5) * 2.0 * (1.0 - ratio)
    )
    return (whole + bent) * unit


def make_part(
    program: int, is_drum: bool, start: np.ndarray, end: np.ndarray, pitch: np.ndarray,
    velocity: np.ndarray,
) -> Part:  # fmt: skip
    """Sort notes, keep velocities within VELOCITIES, and end a note before its pitch repeats."""
    start = np.maximum(start, 0.0)
    end = np.maximum(end, start + SHORTEST)
    order = np.lexsort((start, pitch))
    start, end, pitch, velocity = start[order], end[order], pitch[order], velocity[order]
    following = np.append(start[1:], np.inf)
    repeated = np.append(pitch[1:] == pitch[:-1], False)
    keep = ~(repeated & (following - start < SHORTEST / 2))  # the later of two at once stays
    end = np.where(repeated, np.minimum(end, np.maximum(following - 0.005, start + 0.01)), end)
    start, end, pitch, velocity = (x[keep] for x in (start, end, pitch, velocity))
    order = np.lexsort((pitch, start))
    loudness = np.clip(np.round(velocity[order]), *VELOCITIES).astype(np.int64)
    return Part(program, is_drum, start[order], end[order], pitch[order].astype(np.int64), loudness)
