"""Audio and clips at another sample rate."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.signal import firwin, resample_poly


@functools.lru_cache(maxsize=8)
def _lowpass(up: int, down: int) -> np.ndarray:
    """Kaiser-windowed sinc: passes 0.9, stops (80 dB) 1.0 of the lower of the two Nyquist rates."""
    widest = max(up, down)
    return firwin(96 * widest + 1, 0.95 / widest, window=("kaiser", 7.86))


def resample(audio: np.ndarray, rate: int, to: int) -> np.ndarray:
    """Audio [..., n] at `rate` Hz to `to` Hz, zero phase: float32 [..., ceil(n * to / rate)]."""
    if rate == to:
        return np.asarray(audio, np.float32)
    common = math.gcd(rate, to)
    up, down = to // common, rate // common
    return resample_poly(audio, up, down, axis=-1, window=_lowpass(up, down)).astype(np.float32)


@dataclass(frozen=True)
class ResampledClips:
    """A ClipStore as if its audio had been stored at `sample_rate`."""

    clips: Any
    sample_rate: int

    @property
    def rows(self) -> pd.DataFrame:
        return self.clips.rows

    @property
    def samples(self) -> int:
        """Samples a clip."""
        return math.ceil(self.clips.samples * self.sample_rate / self.clips.sample_rate)

    def __len__(self) -> int:
        return len(self.clips.rows)

    def audio(self, rows: Sequence[int]) -> np.ndarray:
        """float32 [n, samples] of the given row numbers."""
        return resample(self.clips.audio(rows), self.clips.sample_rate, self.sample_rate)


def at_rate(clips: Any, sample_rate: int) -> Any:
    """The clips themselves if they are at that rate, else resampled as they are read."""
    return clips if clips.sample_rate == sample_rate else ResampledClips(clips, sample_rate)
