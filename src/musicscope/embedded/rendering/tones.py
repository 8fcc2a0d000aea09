"""Building blocks of the synthesised instruments: damped modes, wavetables, noise, resonances.

Two kernels make every tone. `modal` sums exponentially damped sinusoids as one matrix product:
exp(s (a + b)) = exp(s a) exp(s b), so that samples = [blocks, modes] @ [modes, block]. `scan` reads
one period of a band-limited waveform from a table with a 32-bit phase.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft
from scipy.signal import firwin, sosfilt, upfirdn

HIGHEST = 0.45
"""Highest partial, as a share of the sample rate."""
INAUDIBLE = 1e-4
"""A mode below this share of the strongest mode's initial amplitude is not rendered."""
MAX_HARMONICS = 160
T60 = 6.9078
"""Nepers of a decay by 60 dB."""
_CYCLE = 2**32

Finish = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Stem:
    """What an instrument needs to know of the stem that it plays."""

    rng: np.random.Generator
    rate: int
    longest: int
    """Samples of the longest tone that will be asked for."""


@dataclass(frozen=True)
class Instrument:
    """One instrument whose parameters are drawn: it renders tones, and `play` places them."""

    tone: Callable[[float, float, int], np.ndarray]
    """(pitch, loudness 0..1, samples) -> float32 [at most samples]."""
    release: float
    """Seconds until a note that ended is silent."""
    rings: bool = False
    """Whether a note sounds on after its end, as a drum does."""
    strum: float = 0.0
    """Seconds between the notes of one chord, from low to high."""
    touch: float = 1.6
    """Exponent of gain as a function of velocity."""
    finish: Finish | None = None
    """Processing of the whole stem, for example an amplifier."""
    levels: Callable[[int], float] | None = None
    """Gain per pitch; None plays all pitches equally loud."""
    choked: frozenset[int] = frozenset()
    """Pitches of which each onset silences the others."""


def hertz(pitch: float) -> float:
    """Frequency of a MIDI pitch in equal temperament, A4 = 440 Hz."""
    return 440.0 * 2.0 ** ((pitch - 69.0) / 12.0)


def cents(value: np.ndarray | float) -> np.ndarray | float:
    """Frequency ratio of an interval in cents."""
    return 2.0 ** (np.asarray(value) / 1200.0)


# --- spectra: gains at given frequencies ------------------------------------------------------


def lowpass(frequency: np.ndarray, cutoff: float, order: float = 2.0) -> np.ndarray:
    """Magnitude of a Butterworth low-pass at `frequency` (Hz)."""
    return 1.0 / np.sqrt(1.0 + (frequency / cutoff) ** (2.0 * order))


def resonant(frequency: np.ndarray, cutoff: float, quality: float) -> np.ndarray:
    """Magnitude of a two-pole low-pass with resonance: a pickup or a synthesiser's filter."""
    ratio = frequency / cutoff
    return 1.0 / np.sqrt((1.0 - ratio**2) ** 2 + (ratio / quality) ** 2)


def peaks(frequency: np.ndarray, resonances: np.ndarray, floor: float = 1.0) -> np.ndarray:
    """Magnitude of parallel resonances: `floor` plus one peak per row (Hz, quality, gain)."""
    gain = np.full(len(frequency), floor)
    for centre, quality, height in resonances:
        detune = quality * (frequency / centre - centre / np.maximum(frequency, 1e-3))
        gain += height / np.sqrt(1.0 + detune**2)
    return gain


def drawn_peaks(
    rng: np.random.Generator, rows: tuple[tuple[float, float, float], ...], spread: float = 0.12
) -> np.ndarray:
    """Resonances [n, 3] near `rows` (Hz, quality, gain), each number moved at random."""
    return np.asarray(rows) * np.exp(spread * rng.standard_normal((len(rows), 3)))


def biquad(
    shape: str, frequency: float, rate: int, quality: float = 0.7071, gain_db: float = 0.0
) -> np.ndarray:
    """Second-order section [6] of a filter from the Audio EQ Cookbook (Bristow-Johnson).

    Args:
        shape: "lowpass", "highpass", "peak", "lowshelf", or "highshelf".
        frequency: corner or centre, Hz; moved below 0.49 of the rate.
        rate: samples per second.
        quality: resonance, or the narrowness of a peak.
        gain_db: of peaks and shelves.
    """
    angle = 2 * np.pi * min(frequency, 0.49 * rate) / rate
    c, alpha, a = np.cos(angle), np.sin(angle) / (2 * quality), 10 ** (gain_db / 40)
    if shape == "lowpass":
        b = ((1 - c) / 2, 1 - c, (1 - c) / 2)
        d = (1 + alpha, -2 * c, 1 - alpha)
    elif shape == "highpass":
        b = ((1 + c) / 2, -1 - c, (1 + c) / 2)
        d = (1 + alpha, -2 * c, 1 - alpha)
    elif shape == "peak":
        b = (1 + alpha * a, -2 * c, 1 - alpha * a)
        d = (1 + alpha / a, -2 * c, 1 - alpha / a)
    elif shape in ("lowshelf", "highshelf"):
        s = -1.0 if shape == "highshelf" else 1.0  # the two shelves are mirrored in frequency
        root = 2 * np.sqrt(a) * alpha
        b = (a * (a + 1 - s * (a - 1) * c + root), s * 2 * a * (a - 1 - s * (a + 1) * c),
             a * (a + 1 - s * (a - 1) * c - root))  # fmt: skip
        d = (a + 1 + s * (a - 1) * c + root, -s * 2 * (a - 1 + s * (a + 1) * c),
             a + 1 + s * (a - 1) * c - root)  # fmt: skip
    else:
        raise ValueError(f"unknown filter shape {shape!r}")
    return (np.array([*b, *d]) / d[0]).astype(np.float32)


# --- damped modes -----------------------------------------------------------------------------


def modal(
    frequency: np.ndarray, decay: np.ndarray, amplitude: np.ndarray, samples: int, rate: int
) -> np.ndarray:
    """Sum damped sine waves: float32 [samples].

    Args:
        frequency: [modes], Hz; modes above HIGHEST are left out.
        decay: [modes], nepers per second.
        amplitude: [modes], real (sine phase) or complex.
        samples: length; 0 is allowed.
        rate: samples per second.
    """
    out = np.zeros(samples, np.float32)
    kept = (frequency < HIGHEST * rate) & (np.abs(amplitude) > 0.0)
    if samples == 0 or not kept.any():
        return out
    frequency, decay, amplitude = frequency[kept], decay[kept], amplitude[kept]
    strength = np.abs(amplitude) / np.abs(amplitude).max()
    life = np.log(np.maximum(strength / INAUDIBLE, 1.0)) / np.maximum(decay, 1e-6) * rate
    # Each group of modes is rendered only as long as it is audible.
    bounds = (0.0, samples / 16, samples / 4, np.inf)
    for shortest, longest in zip(bounds[:-1], bounds[1:], strict=True):
        group = (life > shortest) & (life <= longest)
        if group.any():
            length = min(samples, int(np.ceil(min(longest, life[group].max()))))
            out[:length] += _modes(frequency[group], decay[group], amplitude[group], length, rate)
    return out


def _modes(
    frequency: np.ndarray, decay: np.ndarray, amplitude: np.ndarray, samples: int, rate: int
) -> np.ndarray:
    block = 2 ** max(4, round(np.log2(samples) / 2))
    blocks = -(-samples // block)
    exponent = (2j * np.pi * frequency - decay) / rate
    inner = _powers(exponent, block)
    outer = _powers(exponent * block, blocks) * amplitude[:, None].astype(np.complex64)
    # The imaginary part of outer * inner, as one real product.
    left = np.concatenate([outer.real, outer.imag])
    right = np.concatenate([inner.imag, inner.real])
    return (left.T @ right).reshape(-1)[:samples]


def _powers(exponent: np.ndarray, count: int) -> np.ndarray:
    """exp(exponent * 0 .. count - 1), complex64 [modes, count], by repeated doubling."""
    out = np.empty((len(exponent), count), np.complex64)
    out[:, 0] = 1.0
    step, done = np.exp(exponent)[:, None], 1
    while done < count:
        more = min(done, count - done)
        np.multiply(out[:, :more], step.astype(np.complex64), out=out[:, done : done + more])
        step, done = step * step, done + more
    return out


# --- wavetables -------------------------------------------------------------------------------


def harmonics(f0: float, rate: int, margin: float = 1.03) -> np.ndarray:
    """Numbers 1, 2, ... of the harmonics of `f0` that stay below HIGHEST under vibrato."""
    count = int(HIGHEST * rate / (f0 * margin))
    return np.arange(1.0, 1.0 + min(max(count, 1), MAX_HARMONICS))


def tables(amplitudes: np.ndarray, phases: np.ndarray | None = None) -> np.ndarray:
    """Waveforms of one period, unit RMS: [rows, harmonics] -> float32 [rows, size].

    Sine phases without `phases` (radians [harmonics]). The size keeps the error of reading the
    nearest sample 31 dB below the highest harmonic.
    """
    rows, count = amplitudes.shape
    size = int(2 ** np.ceil(np.log2(max(64 * count, 1024))))
    turn = -1j if phases is None else -1j * np.exp(1j * phases)
    power = np.sqrt(np.maximum((amplitudes**2).sum(1, keepdims=True), 1e-20) / 2.0)
    spectrum = np.zeros((rows, size // 2 + 1), np.complex64)
    spectrum[:, 1 : count + 1] = amplitudes / power * turn * (size / 2)
    return irfft(spectrum, axis=1)


@lru_cache(maxsize=2)
def _counter(samples: int) -> np.ndarray:
    return np.arange(samples, dtype=np.uint32)


def phase(f0: float, samples: int, rate: int, warp: np.ndarray | None = None) -> np.ndarray:
    """Phase of an oscillator, uint32 [samples] with 2**32 per cycle.

    Args:
        f0: Hz.
        samples: length.
        rate: samples per second.
        warp: seconds by which the oscillator is ahead [at least samples], for vibrato.
    """
    turned = _counter(max(samples, 1 << 19))[:samples] * np.uint32(round(f0 / rate * _CYCLE))
    if warp is not None:
        turned += (warp[:samples] * np.float32(f0 * _CYCLE)).astype(np.int64).astype(np.uint32)
    return turned


def scan(table: np.ndarray, phases: list[np.ndarray], row: np.ndarray | float = 0.0) -> np.ndarray:
    """Read tables [rows, size] at each phase [samples], and sum over phases.

    `row` may lie between two rows, and may move over the samples.
    """
    rows, size = table.shape
    shift = np.uint32(32 - size.bit_length() + 1)
    if np.ndim(row) == 0:
        low = min(int(row), max(rows - 2, 0))
        mixed = table[low]
        if rows > 1:
            mixed = mixed + np.float32(row - low) * (table[low + 1] - mixed)
        return sum(mixed.take((turned >> shift).astype(np.intp)) for turned in phases)
    low = np.minimum(row.astype(np.intp), rows - 2)
    share = (row - low).astype(np.float32)
    low *= size
    flat = table.reshape(-1)
    below, above = np.zeros(len(low), np.float32), np.zeros(len(low), np.float32)
    for turned in phases:
        index = (turned >> shift).astype(np.intp)
        index += low
        below += flat.take(index)
        index += size
        above += flat.take(index)
    above -= below
    above *= share
    return below + above


SINE = np.sin(2 * np.pi * np.arange(8192) / 8192).astype(np.float32)


def sine(turned: np.ndarray) -> np.ndarray:
    """Sine of a uint32 phase, float32."""
    return SINE.take((turned >> np.uint32(19)).astype(np.intp))


# --- envelopes and noise ----------------------------------------------------------------------


def seconds_axis(samples: int, rate: int) -> np.ndarray:
    """Times of `samples` samples, float32 seconds."""
    return np.arange(samples, dtype=np.float32) * np.float32(1.0 / rate)


def onset(time: np.ndarray, attack: float) -> np.ndarray:
    """Smooth rise from 0 to 1 over `attack` seconds."""
    x = np.minimum(time * np.float32(1.0 / max(attack, 1e-4)), np.float32(1.0))
    return x * x * (np.float32(3.0) - np.float32(2.0) * x)


def faded_in(tone: np.ndarray, attack: float, rate: int) -> np.ndarray:
    """The tone with its first `attack` seconds raised from 0, in place."""
    length = min(len(tone), int(attack * rate) + 1)
    tone[:length] *= onset(seconds_axis(length, rate), attack)
    return tone


def wander(rng: np.random.Generator, time: np.ndarray, low: float, high: float) -> np.ndarray:
    """Slow random curve of unit RMS: four sine waves between `low` and `high` Hz."""
    speeds, starts = rng.uniform(low, high, 4), rng.uniform(0, 2 * np.pi, 4)
    waves = (np.sin(np.float32(2 * np.pi * s) * time + np.float32(p))
             for s, p in zip(speeds, starts, strict=True))  # fmt: skip
    return sum(waves) * np.float32(np.sqrt(0.5))


def white(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Gaussian noise, float32 [samples]."""
    return rng.standard_normal(samples, dtype=np.float32)


def band_noise(
    rng: np.random.Generator, samples: int, gain: Callable[[np.ndarray], np.ndarray], rate: int
) -> np.ndarray:
    """Noise of unit RMS whose spectrum follows `gain` (of Hz), float32 [samples]."""
    size = next_fast_len(max(samples, 256), real=True)
    spectrum = rfft(white(rng, size))
    spectrum *= gain(np.linspace(0.0, rate / 2, len(spectrum))).astype(np.float32)
    out = irfft(spectrum, size)[:samples]
    return out / np.float32(max(np.sqrt(np.mean(out**2)), 1e-12)) if samples else out


def burst(
    rng: np.random.Generator, samples: int, low: float, high: float, decay: float, rate: int
) -> np.ndarray:
    """Noise between `low` and `high` Hz that falls by 60 dB in `decay` seconds, about unit RMS."""
    length = min(samples, int(decay * rate) + 1)
    top = min(high, 0.45 * rate)
    bottom = min(low, 0.8 * top)
    shape = np.stack([biquad("highpass", bottom, rate), biquad("lowpass", top, rate)])
    noise = sosfilt(shape, white(rng, length))
    noise *= np.float32(np.sqrt(rate / 2 / (top - bottom)))
    noise *= np.exp(np.float32(-T60 / decay) * seconds_axis(length, rate))
    out = np.zeros(samples, np.float32)
    out[:length] = faded_in(noise, 0.0004, rate)
    return out


# --- stem processing --------------------------------------------------------------------------

_HALFBAND = firwin(31, 0.5, window=("kaiser", 6.0)).astype(np.float32)


def loudest(audio: np.ndarray, rate: int) -> float:
    """RMS of the loudest 20 ms; 0 for no samples."""
    block = min(rate // 50, len(audio))
    if block == 0:
        return 0.0
    blocks = audio[: len(audio) // block * block].reshape(-1, block)
    return float(np.sqrt(np.einsum("bs,bs->b", blocks, blocks).max() / block))


def saturate(stem: np.ndarray, drive: float, bias: float = 0.0) -> np.ndarray:
    """tanh of the stem at twice the rate, so that few harmonics fold back.

    Args:
        stem: [samples], about unit level.
        drive: gain before the tanh.
        bias: offset before the tanh; makes even harmonics.
    """
    up = upfirdn(2 * _HALFBAND, stem, up=2)
    up = np.tanh(np.float32(drive) * up + np.float32(bias)) - np.float32(np.tanh(bias))
    return upfirdn(_HALFBAND, up, down=2)[15 : 15 + len(stem)]


def delayed(stem: np.ndarray, lag: np.ndarray) -> np.ndarray:
    """The stem read `lag` samples late [samples], with linear interpolation; zeros before it."""
    place = np.arange(len(stem), dtype=np.float64) - lag
    low = np.floor(place).astype(np.intp)
    share = (place - low).astype(np.float32)
    np.clip(low, -1, len(stem) - 2, out=low)
    padded = np.concatenate([np.zeros(1, np.float32), stem])
    first = padded.take(low + 1)
    return first + share * (padded.take(low + 2) - first)
