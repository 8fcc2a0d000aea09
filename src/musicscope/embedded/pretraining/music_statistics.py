"""Measure rhythm, dynamics, tonality, repetition and modulation of audio, with controls.

No measure is learned and none depends on the gain of a clip. All take mono float audio
[clips, samples] at 16 kHz. Cost on one core: about 1 s per 64 clips of 10 s for all measures.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.fft import dct, fft, ifft, irfft, next_fast_len, rfft
from scipy.ndimage import uniform_filter1d
from scipy.signal import find_peaks
from scipy.stats import kurtosis, skew

from musicscope.core.audio import mel_filterbank, power_spectrogram
from musicscope.judges.musicnn import SILENCE_RMS, check_audio

SAMPLE_RATE = 16_000
HOP = 160
"""10 ms: the grid of onsets and of mel envelopes."""
FRAME_RATE = SAMPLE_RATE / HOP
N_FFT, BANDS = 512, 40
FLOOR_DB = 60.0
"""Mel power is floored this far below the clip's loudest value."""
FLUX_FRAMES = 2
"""An onset is a rise within 20 ms."""
ONSET_PROMINENCE_DB = 1.5
"""Smallest prominence of an onset: a rise in dB, averaged over mel bands."""
FLAT_DB = 0.05
"""Onset strength of a smaller standard deviation is that of a steady tone: it has no beat."""
BEAT_LAGS = (0.25, 1.5)
"""Seconds: 240 to 40 beats per minute."""
REPEAT_LAGS = (1.0, 5.0)
"""Seconds: from one beat to two bars; longer lags need clips of more than 10 s."""
CHROMA_FFT, CHROMA_HOP = 4096, 1600
CHROMA_HERTZ = (100.0, 4000.0)
TIMBRE_COEFFICIENTS = 12
RATES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Modulation frequencies in Hz."""
SPREAD = 0.4
"""Width of a modulation filter: standard deviation over centre frequency."""
RATIO_FLOOR = 1e-3
GRAIN_SECONDS = 0.2


@dataclass(frozen=True)
class Spectra:
    """Spectra of clips that several measures share."""

    mel: np.ndarray
    """[clips, bands, frames] mel power at `FRAME_RATE`, floored `FLOOR_DB` below its maximum."""
    chroma: np.ndarray
    """[clips, 12, frames] share of each pitch class, one frame per 0.1 s; zeros where silent."""
    weight: np.ndarray
    """[clips, frames] magnitude of each chroma frame."""


# --- spectra ----------------------------------------------------------------------------------


def spectra(audio: np.ndarray) -> Spectra:
    """Compute mel power and chroma of clips [n, samples].

    Raises:
        ValueError: audio of another rank, empty, with NaN or infinity, or under two seconds.
    """
    audio = check_audio(audio)
    if audio.shape[1] < 2 * SAMPLE_RATE:
        raise ValueError(f"clips must last 2 s or more, not {audio.shape[1] / SAMPLE_RATE:.2f} s")
    basis = mel_filterbank(SAMPLE_RATE, N_FFT, BANDS)
    mels, chromas, weights = [], [], []
    for clip in audio:  # one clip fits the cache of a core
        power = np.einsum("fb,ft->bt", basis, power_spectrogram(clip, N_FFT, HOP)[0], optimize=True)
        peak = power.max()
        mels.append(np.maximum(power, peak * 10 ** (-FLOOR_DB / 10)) if peak > 0 else power + 1.0)
        chroma, weight = _chroma(clip)
        chromas.append(chroma)
        weights.append(weight)
    return Spectra(np.stack(mels), np.stack(chromas), np.stack(weights))


def _chroma(clip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares [12, frames] of pitch classes in the magnitude of spectral peaks, and magnitudes.

    Only local maxima over frequency count, because the sides of a peak lie in other classes.
    """
    magnitude = np.sqrt(power_spectrogram(clip, CHROMA_FFT, CHROMA_HOP)[0])
    hertz = np.arange(len(magnitude)) * SAMPLE_RATE / CHROMA_FFT
    inside = np.flatnonzero((hertz >= CHROMA_HERTZ[0]) & (hertz <= CHROMA_HERTZ[1]))
    middle = magnitude[inside]
    peak = (middle > magnitude[inside - 1]) & (middle >= magnitude[inside + 1])
    classes = np.round(12 * np.log2(hertz[inside] / 440.0)).astype(int) % 12
    sums = np.eye(12, dtype=np.float64)[classes].T @ np.where(peak, middle, 0.0)
    weight = sums.sum(0)
    loud = weight > 1e-3 * max(weight.max(), 1e-9)
    return np.where(loud, sums / np.maximum(weight, 1e-12), 0.0), np.where(loud, weight, 0.0)


def decibels(mel: np.ndarray) -> np.ndarray:
    """Mel power in dB."""
    return 10 * np.log10(mel)


# --- rhythm -----------------------------------------------------------------------------------


def onset_strength(mel: np.ndarray) -> np.ndarray:
    """Rise of mel power over 20 ms in dB, averaged over bands: [clips, frames].

    Half-wave rectified per band (spectral flux; Bello et al. 2005), smoothed over 50 ms so that
    onsets between two frames align at every period.
    """
    level = decibels(mel)
    rise = np.maximum(0.0, level[..., FLUX_FRAMES:] - level[..., :-FLUX_FRAMES]).mean(1)
    # The padding of the first and last frames would look like onsets.
    edge = N_FFT // HOP
    rise[:, :edge] = rise[:, -edge:] = np.median(rise, axis=1, keepdims=True)
    kernel = np.hanning(7)[1:-1]
    smooth = np.apply_along_axis(np.convolve, 1, rise, kernel / kernel.sum(), "same")
    return np.pad(smooth, ((0, 0), (FLUX_FRAMES, 0)), mode="edge")


def lagged_correlation(x: np.ndarray, first: int, last: int) -> np.ndarray:
    """Correlation of x [n, dims, frames] with itself at lags first..last frames: [n, lags].

    Each lag is normalised by the energy of the two overlapping parts, so a periodic sequence
    gives 1 at its period whatever the length. Zero where a part has no energy.
    """
    frames = x.shape[-1]
    size = next_fast_len(2 * frames)
    products = irfft(np.abs(rfft(x, size)) ** 2, size).sum(1)[:, first : last + 1]
    energy = np.pad(np.cumsum((x**2).sum(1), axis=-1), ((0, 0), (1, 0)))
    lags = np.arange(first, last + 1)
    head, tail = energy[:, frames - lags], energy[:, -1:] - energy[:, lags]
    scale = np.sqrt(head * tail)
    defined = scale > 1e-9 * np.maximum(energy[:, -1:], 1e-9)
    return np.where(defined, products / np.where(defined, scale, 1.0), 0.0)


def beat(onsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Periodicity in -1..1 and period in seconds of onset strength [clips, frames].

    Periodicity is the largest correlation at lags of 0.25 to 1.5 s. The period is the shortest lag
    at which a local maximum comes within 10 % of it. Both are 0 below `FLAT_DB` of variation.
    """
    first, last = (round(lag * FRAME_RATE) for lag in BEAT_LAGS)
    centred = onsets - uniform_filter1d(onsets, round(FRAME_RATE), axis=1, mode="reflect")
    centred[centred.std(1) < FLAT_DB] = 0.0
    found = lagged_correlation(centred[:, None], first - 1, last + 1)
    inner = found[:, 1:-1]
    best = inner.max(1)
    summit = (inner >= found[:, :-2]) & (inner >= found[:, 2:]) & (inner >= 0.9 * best[:, None])
    at = np.where(summit.any(1), summit.argmax(1), inner.argmax(1))
    period = np.where(best > 0, (first + at) / FRAME_RATE, 0.0)
    return best, period


def onset_times(onsets: np.ndarray) -> list[np.ndarray]:
    """Frames of the onsets of each clip: peaks of `ONSET_PROMINENCE_DB`, 50 ms apart or more."""
    return [find_peaks(x, prominence=ONSET_PROMINENCE_DB, distance=5)[0] for x in onsets]


# --- level ------------------------------------------------------------------------------------


def short_time_rms(audio: np.ndarray) -> np.ndarray:
    """RMS over windows of 50 ms without overlap: [clips, windows]."""
    window = SAMPLE_RATE // 20
    blocks = audio[:, : audio.shape[1] // window * window].reshape(len(audio), -1, window)
    return np.sqrt((blocks.astype(np.float64) ** 2).mean(-1))


def silence_share(rms: np.ndarray) -> np.ndarray:
    """Share of windows below -60 dBFS or 40 dB below the loudest window of their clip."""
    return (rms < np.maximum(SILENCE_RMS, 0.01 * rms.max(1, keepdims=True))).mean(1)


def dynamic_range(rms: np.ndarray) -> np.ndarray:
    """Difference in dB of the 95th and 10th percentile of short-time RMS, floored at -60 dB."""
    peak = np.maximum(rms.max(1, keepdims=True), 1e-9)
    level = 20 * np.log10(np.maximum(rms, 1e-3 * peak))
    return np.percentile(level, 95, axis=1) - np.percentile(level, 10, axis=1)


# --- tonality and repetition ------------------------------------------------------------------


def tonal_clarity(found: Spectra) -> np.ndarray:
    """Concentration of chroma: 1 - entropy / ln 12, averaged over frames by magnitude.

    1 for one pitch class, 0.56 for three of equal strength, about 0 for noise and for silence.
    """
    share = np.maximum(found.chroma, 1e-12)
    clarity = 1 + (share * np.log(share)).sum(1) / np.log(12)
    total = found.weight.sum(1)
    return (clarity * found.weight).sum(1) / np.maximum(total, 1e-12)


def timbre(mel: np.ndarray, frames: int) -> np.ndarray:
    """Cepstral coefficients 1..12 of mel power, averaged over 0.1 s: [clips, 12, frames]."""
    level = uniform_filter1d(decibels(mel), CHROMA_HOP // HOP, axis=-1)
    step = CHROMA_HOP // HOP
    return dct(level, axis=1, norm="ortho")[:, 1 : 1 + TIMBRE_COEFFICIENTS, ::step][..., :frames]


def repetition(found: Spectra) -> np.ndarray:
    """Similarity of a clip with its own past: largest value over lags of 1 to 5 s.

    The mean of two correlations, of chroma and of timbre over time, each less its mean over the
    clip. 1 for a loop, about 0 for noise.
    """
    frames = found.chroma.shape[-1]
    lags = [round(lag * SAMPLE_RATE / CHROMA_HOP) for lag in REPEAT_LAGS]
    last = min(lags[1], frames // 2)
    parts = []
    for x in (found.chroma, timbre(found.mel, frames)):
        centred = x - x.mean(-1, keepdims=True)
        parts.append(lagged_correlation(centred, lags[0], last))
    return np.mean(parts, axis=0).max(1)


def music_measures(audio: np.ndarray) -> dict[str, np.ndarray]:
    """Compute every scalar measure of clips [n, samples]: name -> [n]; units in `UNITS`."""
    audio = check_audio(audio)
    found = spectra(audio)
    onsets, rms = onset_strength(found.mel), short_time_rms(audio)
    seconds = audio.shape[1] / SAMPLE_RATE
    return {
        "beat_periodicity": beat(onsets)[0],
        "onset_rate": np.array([len(times) / seconds for times in onset_times(onsets)]),
        "silence_share": silence_share(rms),
        "dynamic_range": dynamic_range(rms),
        "tonal_clarity": tonal_clarity(found),
        "repetition": repetition(found),
    }


UNITS = {
    "beat_periodicity": "correlation",
    "onset_rate": "onsets per second",
    "silence_share": "share",
    "dynamic_range": "dB",
    "tonal_clarity": "share",
    "repetition": "correlation",
}


# --- modulation -------------------------------------------------------------------------------


def scattering(mel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Time scattering of mel envelopes: first [clips, bands], second order [clips, bands, rates].

    First order: log mean magnitude, less its mean over bands, so that gain does not count. Second
    order: log of the mean modulus of the envelope's wavelet transform at `RATES`, over the mean
    magnitude (Anden & Mallat 2014, 1304.6763, with mel bands for the first filter bank).
    """
    envelope = np.sqrt(mel)
    mean = envelope.mean(-1)
    frames = envelope.shape[-1]
    # Mirrored at the end, so that the transform sees no jump.
    padded = np.concatenate([envelope, envelope[..., ::-1]], axis=-1) - mean[..., None]
    spectrum = fft(padded, axis=-1)
    hertz = np.fft.fftfreq(padded.shape[-1], 1 / FRAME_RATE)
    second = []
    for rate in RATES:
        window = np.exp(-((hertz - rate) ** 2) / (2 * (SPREAD * rate) ** 2))
        window[hertz <= 0] = 0.0
        second.append(np.abs(ifft(spectrum * window, axis=-1))[..., :frames].mean(-1))
    first = np.log(mean)
    ratio = np.log(np.stack(second, -1) / mean[..., None] + RATIO_FLOOR)
    return first - first.mean(1, keepdims=True), ratio


def scattering_embedding(audio: np.ndarray) -> np.ndarray:
    """Both orders of `scattering` of clips [n, samples]: [n, bands * (1 + rates)]; NaN if silent.

    An embedding that is defined without learning, for distances between sets of clips.
    """
    audio = check_audio(audio)
    first, second = scattering(spectra(audio).mel)
    found = np.concatenate([first, second.reshape(len(second), -1)], axis=1)
    found[short_time_rms(audio).max(1) < SILENCE_RMS] = np.nan
    return found


def modulation_statistics(audio: np.ndarray) -> np.ndarray:
    """Features [clips, 79] of modulation and onsets, blind to level and to the mean spectrum.

    Second-order scattering averaged over ten groups of four bands (70), and of onset strength:
    mean, standard deviation, skewness, kurtosis, periodicity, period, onset rate, and mean and
    variation of the intervals between onsets.
    """
    found = spectra(audio)
    onsets = onset_strength(found.mel)
    second = scattering(found.mel)[1]
    grouped = second.reshape(len(second), BANDS // 4, 4, len(RATES)).mean(2)
    periodicity, period = beat(onsets)
    seconds = onsets.shape[1] / FRAME_RATE
    rows = []
    for x, times in zip(onsets, onset_times(onsets), strict=True):
        gaps = np.diff(times) / FRAME_RATE if len(times) > 2 else np.array([seconds])
        flat = x.std() < 1e-6
        shape = (0.0, 0.0) if flat else (float(skew(x)), float(kurtosis(x)))
        rows.append([x.mean(), x.std(), *shape, len(times) / seconds, gaps.mean(), gaps.std()])
    return np.concatenate(
        [grouped.reshape(len(grouped), -1), periodicity[:, None], period[:, None], np.array(rows)],
        axis=1,
    )


# --- controls ---------------------------------------------------------------------------------


def white_noise(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise with the shape and the RMS of each clip of `audio` [n, samples]."""
    level = np.sqrt((audio.astype(np.float64) ** 2).mean(1, keepdims=True))
    return (rng.standard_normal(audio.shape) * level).astype(np.float32)


def shuffle_frames(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Put grains of 0.2 s of each clip [n, samples] in random order.

    Grains overlap by half under a Hann window: spectrum and level stay, order in time is lost.
    """
    half = round(GRAIN_SECONDS * SAMPLE_RATE / 2)
    window = np.sin(np.pi * (np.arange(2 * half) + 0.5) / (2 * half)) ** 2
    out = np.zeros_like(audio, dtype=np.float32)
    starts = np.arange(0, audio.shape[1] - 2 * half + 1, half)
    for clip, target in zip(audio, out, strict=True):
        for start, source in zip(starts, rng.permutation(starts), strict=True):
            target[start : start + 2 * half] += window * clip[source : source + 2 * half]
    return out
