"""Find clips that are the same recording, whatever their names, so that splits do not share it.

Two clips are identical if their samples are. They are near-identical if they last at least a second
and their waveforms below 4 kHz correlate by at least SAME in absolute value, after a shift of at
most a quarter of the clip; by STEADY if another shift gives nearly as much, as for a note that is
held or a loop. This holds under other levels, rates and lossy codecs, not under other
pitch or tempo: for augmented copies the data set's own rule counts. Only pairs with similar log-mel
statistics are correlated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft

from musicscope.core.audio import log_mel, resample
from musicscope.core.progress import Bar
from musicscope.data.clips import PEAK, Clips

RATE = 8000
"""Hz at which clips are compared."""
BANDS = 128
RANGE = 9.0
"""Natural log of power below the maximum that counts (40 dB): noise and codecs change the rest."""
ALIKE = 0.35
"""Largest RMS difference of the statistics (natural log of power) of pairs to correlate."""
SAME = 0.85
"""Least correlation of near-identical clips."""
STEADY = 0.98
"""Least correlation where a shift by more than ELSEWHERE gives at least RIVAL of it."""
RIVAL, ELSEWHERE = 0.9, 0.025
SHIFT = 0.25
"""Largest shift, as a share of the clip."""
LEAST_SECONDS = 1.0
"""Tones of nearly one frequency correlate where they last less."""
BLOCK = 1024


@dataclass(frozen=True)
class Copy:
    """Two rows of a clip table with the same sound."""

    first: int
    second: int
    identical: bool


def comparable(audio: np.ndarray, rate: int) -> np.ndarray:
    """Audio [n] at RATE at most, zero mean and unit RMS."""
    audio = resample(audio, rate, RATE) if rate > RATE else audio
    audio = audio - audio.mean()
    return audio / max(float(np.sqrt(np.mean(np.square(audio)))), 1e-9)


def statistics(audio: np.ndarray, rate: int) -> np.ndarray:
    """Mean and standard deviation over time of log-mel bands: float32 [2 * BANDS]."""
    mel = log_mel(audio, rate, BANDS, 2048, 1024)[0]
    mel = np.maximum(mel, mel.max() - RANGE)
    return np.concatenate([mel.mean(1), mel.std(1)])


def correlation(one: np.ndarray, other: np.ndarray, rate: int = RATE) -> tuple[float, float]:
    """Compute the largest absolute correlation of two waveforms [n] over shifts up to SHIFT.

    The second value is the largest at other shifts: further away than ELSEWHERE, in seconds.

    Each shift is normalised by the energy of the samples that overlap, at least half of it.
    """
    n, most = len(one), int(SHIFT * len(one))
    size = next_fast_len(n + most, real=True)
    cross = irfft(rfft(one, size) * rfft(other, size).conj(), size)
    energy = [np.concatenate([[0.0], np.cumsum(np.square(x, dtype=np.float64))])
              for x in (one, other)]  # fmt: skip
    shift = np.arange(-most, most + 1)
    first, last = np.maximum(shift, 0), np.minimum(n, n + shift)  # of `one` that overlap
    overlap = [e[last - d] - e[first - d] for e, d in zip(energy, (0, shift), strict=True)]
    scale = np.sqrt(overlap[0] * overlap[1])
    enough = scale >= 0.5 * np.sqrt(energy[0][-1] * energy[1][-1])  # else only silence overlaps
    if not enough.any():
        return 0.0, 0.0
    at, found = shift[enough], np.abs(cross[shift[enough]]) / np.maximum(scale[enough], 1e-9)
    far = np.abs(at - at[found.argmax()]) > ELSEWHERE * rate
    return float(found.max()), float(found[far].max(initial=0.0))


def _similar(table: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield pairs i < j of rows [n, d] whose RMS difference is at most ALIKE."""
    squares, limit = (table**2).sum(1), table.shape[1] * ALIKE**2
    for start in range(0, len(table), BLOCK):
        part = slice(start, start + BLOCK)
        distance = squares[part, None] + squares - 2 * table[part] @ table.T
        for i, j in np.argwhere(distance <= limit):
            if start + i < j:
                yield int(start + i), int(j)


def find_copies(clips: Clips, groups: Sequence[str]) -> list[Copy]:
    """Find the pairs of clips with the same sound in different groups.

    A pair whose groups other pairs have joined already is left out.
    """
    joined = Groups(groups)
    found: list[Copy] = []
    first: dict[bytes, int] = {}
    rate = clips.sample_rate
    table = np.empty((len(groups), 2 * BANDS), np.float32)
    for row in Bar(range(len(groups)), desc="comparing", unit="clips"):
        audio = clips.audio([row])[0]
        samples = np.round(audio * PEAK).astype(np.int16)
        earlier = first.setdefault(hashlib.sha256(samples.tobytes()).digest(), row)
        if joined.join(groups[earlier], groups[row]):
            found.append(Copy(earlier, row, True))
        table[row] = statistics(comparable(audio, rate), min(rate, RATE))
    for i, j in _similar(table) if clips.samples >= LEAST_SECONDS * rate else ():
        if joined.of(groups[i]) == joined.of(groups[j]):
            continue
        one, other = (comparable(audio, rate) for audio in clips.audio([i, j]))
        best, rival = correlation(one, other, min(rate, RATE))
        if best >= (STEADY if rival >= RIVAL * best else SAME):
            joined.join(groups[i], groups[j])
            found.append(Copy(i, j, False))
    return found


def count_copies(clips: Clips) -> dict[str, int]:
    """Count pairs of groups with the same sound, and groups in several splits, for metrics."""
    groups = clips.rows["group"].tolist()
    found = find_copies(clips, groups)
    splits = clips.rows.groupby("group")["split"].nunique().to_numpy()
    return {
        "identical": sum(c.identical for c in found),
        "near_identical": sum(not c.identical for c in found),
        "leaks": int((splits > 1).sum()),
    }


def joined_groups(copies: Sequence[Copy], groups: Sequence[str]) -> list[str]:
    """Name per clip of its group, after groups with the same sound are joined."""
    joined = Groups(groups)
    for copy in copies:
        joined.join(groups[copy.first], groups[copy.second])
    return [joined.of(group) for group in groups]


class Groups:
    """Names of groups that can be joined; a joined group has the first of its names."""

    def __init__(self, names: Sequence[str]) -> None:
        self.parent = {name: name for name in names}

    def of(self, name: str) -> str:
        """Name of the joined group."""
        while (parent := self.parent[name]) != name:
            name = parent
        return name

    def join(self, one: str, other: str) -> bool:
        """Join two groups; False if they are one already."""
        low, high = sorted((self.of(one), self.of(other)))
        self.parent[high] = low
        return low != high
