"""Audio arrays: resampling, spectrograms, level and brightness, spectral distance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.lib.stride_tricks import sliding_window_view
from scipy.fft import rfft
from scipy.signal import firwin, get_window, resample_poly

TRIVIAL_CUES = ("rms", "centroid", "bandwidth", "rolloff", "flatness", "zero_crossings", "crest")


def _mel(hertz: np.ndarray) -> np.ndarray:
    """Slaney's mel scale: linear to 1 kHz, logarithmic above (Auditory Toolbox, 1998)."""
    hertz = np.asarray(hertz, float)
    log = 15 + np.log(np.maximum(hertz, 1e-9) / 1000) / (np.log(6.4) / 27)
    return np.where(hertz < 1000, hertz * 3 / 200, log)


def _hertz(mel: np.ndarray) -> np.ndarray:
    mel = np.asarray(mel, float)
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))


@lru_cache
def mel_filterbank(rate: int, n_fft: int, bands: int) -> np.ndarray:
    """Triangular Slaney filters of unit area, float32 [n_fft // 2 + 1, bands]."""
    edges = _hertz(np.linspace(_mel(0), _mel(rate / 2), bands + 2))
    bins = np.linspace(0, rate / 2, n_fft // 2 + 1)
    rising = (bins[:, None] - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - bins[:, None]) / np.diff(edges)[1:]
    triangles = np.maximum(0, np.minimum(rising, falling))
    return (triangles * 2 / (edges[2:] - edges[:-2])).astype(np.float32)


def power_spectrogram(audio: np.ndarray, n_fft: int = 1024, hop: int = 320) -> np.ndarray:
    """|STFT|^2 with a Hann window, centred frames; float32 [n, n_fft // 2 + 1, frames]."""
    audio = np.atleast_2d(np.asarray(audio, np.float32))
    padded = np.pad(audio, ((0, 0), (n_fft // 2, n_fft // 2)))
    frames = sliding_window_view(padded, n_fft, axis=-1)[:, ::hop]
    spectrum = rfft(frames * get_window("hann", n_fft).astype(np.float32), axis=-1)
    return (spectrum.real**2 + spectrum.imag**2).astype(np.float32).transpose(0, 2, 1)


def log_mel(
    audio: np.ndarray, rate: int, bands: int = 64, n_fft: int = 1024, hop: int = 320
) -> np.ndarray:
    """Natural log of mel power, floored at 1e-6; float32 [n, bands, frames]."""
    power = power_spectrogram(audio, n_fft, hop)
    mel = np.einsum("fm,nft->nmt", mel_filterbank(rate, n_fft, bands), power, optimize=True)
    return np.log(np.maximum(mel, 1e-6))


def trivial_cues(audio: np.ndarray, rate: int) -> np.ndarray:
    """Seven numbers a clip that say nothing of timbre beyond level and brightness.

    Returns:
        float64 [n, 7] in the order of TRIVIAL_CUES; spectral measures in Hz, from the mean
        power spectrum, roll-off at 85 % of the power.
    """
    audio = np.atleast_2d(np.asarray(audio, np.float64))
    power = np.stack([power_spectrogram(a)[0].mean(-1) for a in audio]).astype(float)
    bins = np.linspace(0, rate / 2, power.shape[1])
    share = power / np.maximum(power.sum(1, keepdims=True), 1e-12)
    centroid = share @ bins
    bandwidth = np.sqrt((share * (bins - centroid[:, None]) ** 2).sum(1))
    rolloff = bins[np.minimum((np.cumsum(share, 1) < 0.85).sum(1), len(bins) - 1)]
    flatness = np.exp(np.log(power + 1e-12).mean(1)) / (power.mean(1) + 1e-12)
    level = np.sqrt((audio**2).mean(1))
    crossings = (np.signbit(audio[:, 1:]) != np.signbit(audio[:, :-1])).mean(1)
    crest = np.abs(audio).max(1) / np.maximum(level, 1e-9)
    return np.stack([level, centroid, bandwidth, rolloff, flatness, crossings, crest], 1)


# --- distance ---------------------------------------------------------------------------------

SCALES = (2048, 512, 128)
FLOOR = 1e-2  # of magnitudes: 94 dB below a full-scale sine at n_fft 2048


def spectra(audio: np.ndarray) -> list[np.ndarray]:
    """STFT magnitudes of a waveform [n] at every scale (hop n_fft / 4), floored at FLOOR."""
    return [
        np.maximum(np.sqrt(power_spectrogram(audio, n_fft, n_fft // 4)[0]), FLOOR)
        for n_fft in SCALES
    ]


def spectral_distance(reference: list[np.ndarray], other: list[np.ndarray]) -> float:
    """Multi-resolution STFT distance between `spectra` of two waveforms; 0 for equal ones.

    Mean over SCALES of the spectral convergence ||A - B||_F / ||A||_F plus the mean |ln A - ln B|
    (Yamamoto et al. 2020, Parallel WaveGAN; RAVE itself is trained with the like).
    """
    terms = [
        np.linalg.norm(a - b) / np.linalg.norm(a) + np.abs(np.log(a / b)).mean()
        for a, b in zip(reference, other, strict=True)
    ]
    return float(np.mean(terms))


# --- sample rate ------------------------------------------------------------------------------


@lru_cache(maxsize=8)
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
