"""Audio arrays: resampling, spectra and their distance, mel bands, level and brightness."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy.fft import rfft
from scipy.signal import firwin, get_window, resample_poly


@lru_cache(maxsize=8)
def _lowpass(up: int, down: int) -> np.ndarray:
    """Kaiser-windowed sinc: passes 0.9, stops (80 dB) 1.0 of the lower of the two Nyquist rates."""
    widest = max(up, down)
    return firwin(96 * widest + 1, 0.95 / widest, window=("kaiser", 7.86))


def resample(audio: np.ndarray, rate: int, to: int) -> np.ndarray:
    """Resample audio [..., n] from `rate` to `to` Hz with zero phase.

    Returns:
        float32 [..., ceil(n * to / rate)].
    """
    if rate == to:
        return np.asarray(audio, np.float32)
    common = math.gcd(rate, to)
    up, down = to // common, rate // common
    return resample_poly(audio, up, down, axis=-1, window=_lowpass(up, down)).astype(np.float32)


def power_spectrogram(audio: np.ndarray, n_fft: int = 1024, hop: int = 320) -> np.ndarray:
    """Compute |STFT|^2 with a Hann window and centred frames.

    Args:
        audio: [samples] or [n, samples].

    Returns:
        float32 [n, n_fft // 2 + 1, frames].
    """
    audio = np.atleast_2d(np.asarray(audio, np.float32))
    padded = np.pad(audio, ((0, 0), (n_fft // 2, n_fft // 2)))
    frames = sliding_window_view(padded, n_fft, axis=-1)[:, ::hop]
    spectrum = rfft(frames * get_window("hann", n_fft).astype(np.float32), axis=-1)
    return (spectrum.real**2 + spectrum.imag**2).astype(np.float32).transpose(0, 2, 1)


SCALES = (2048, 512, 128)
"""FFT sizes of the spectral distance."""
FLOOR = 1e-2
"""Least magnitude in it: 94 dB below a full-scale sine at n_fft 2048."""


def spectra(audio: np.ndarray) -> list[np.ndarray]:
    """Compute STFT magnitudes of a waveform [n] per scale (hop n_fft / 4), at least FLOOR."""
    return [
        np.maximum(np.sqrt(power_spectrogram(audio, n_fft, n_fft // 4)[0]), FLOOR)
        for n_fft in SCALES
    ]


def spectral_distance(reference: list[np.ndarray], other: list[np.ndarray]) -> float:
    """Compute the multi-resolution STFT distance between two waveforms' `spectra`.

    Mean over SCALES of the spectral convergence ||A - B||_F / ||A||_F plus the mean |ln A - ln B|
    (Yamamoto et al. 2020, Parallel WaveGAN; RAVE is trained with a similar loss). 0 if equal.
    """
    terms = [
        np.linalg.norm(a - b) / np.linalg.norm(a) + np.abs(np.log(a / b)).mean()
        for a, b in zip(reference, other, strict=True)
    ]
    return float(np.mean(terms))


def _mel(hertz: np.ndarray | float) -> np.ndarray:
    """Slaney's mel scale: linear to 1 kHz, logarithmic above (Auditory Toolbox, 1998)."""
    hertz = np.asarray(hertz, float)
    log = 15 + np.log(np.maximum(hertz, 1e-9) / 1000) / (np.log(6.4) / 27)
    return np.where(hertz < 1000, hertz * 3 / 200, log)


def _hertz(mel: np.ndarray) -> np.ndarray:
    mel = np.asarray(mel, float)
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))


@lru_cache
def mel_filterbank(rate: int, n_fft: int, bands: int) -> np.ndarray:
    """Make triangular Slaney filters of unit area, float32 [n_fft // 2 + 1, bands]."""
    edges = _hertz(np.linspace(_mel(0), _mel(rate / 2), bands + 2))
    bins = np.linspace(0, rate / 2, n_fft // 2 + 1)
    rising = (bins[:, None] - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - bins[:, None]) / np.diff(edges)[1:]
    triangles = np.maximum(0, np.minimum(rising, falling))
    return (triangles * 2 / (edges[2:] - edges[:-2])).astype(np.float32)


def log_mel(
    audio: np.ndarray, rate: int, bands: int = 64, n_fft: int = 1024, hop: int = 320
) -> np.ndarray:
    """Compute the natural log of mel power, at least 1e-6; float32 [n, bands, frames]."""
    power = power_spectrogram(audio, n_fft, hop)
    mel = np.einsum("fm,nft->nmt", mel_filterbank(rate, n_fft, bands), power, optimize=True)
    return np.log(np.maximum(mel, 1e-6))


TRIVIAL_CUES = ("rms", "centroid", "bandwidth", "rolloff", "flatness", "zero_crossings", "crest")


def trivial_cues(audio: np.ndarray, rate: int) -> np.ndarray:
    """Compute seven measures of level and brightness per clip, which ignore all other timbre.

    Returns:
        float64 [n, 7], columns as in TRIVIAL_CUES; spectral measures in Hz, from the mean power
        spectrum, roll-off at 85 % of the power.
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
