"""Randomise the timbre of stems without changing what they play.

`apply_timbre` puts one stem through equaliser, formant shift, dynamics, drive, chorus, and room. It
keeps length and RMS. The strengths are bounded so that an instrument stays recognisable.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.fft import irfft, rfft
from scipy.signal import lfilter, oaconvolve, sosfilt

from musicscope.embedded.rendering.tones import (
    biquad,
    delayed,
    loudest,
    saturate,
    seconds_axis,
    white,
)

CONTROL = 64
"""Samples between two values of the dynamics' gain."""
QUIETEST_DB = -70.0
"""Levels are floored here, relative to the loudest."""
FRAME = 1024
CEPSTRUM = 28
"""Cepstral coefficients of the spectral envelope that the formant shift moves."""
MOST_FORMANT_DB = 9.0


@dataclass(frozen=True)
class Timbre:
    """Settings of one stem's effects; the defaults change nothing."""

    eq: tuple[tuple[str, float, float, float], ...] = ()
    """Sections of the equaliser: shape (of `biquad`), Hz, quality, dB."""
    formant: float = 1.0
    """Factor by which the stem's mean spectral envelope moves up in frequency."""
    punch: float = 0.0
    """dB of gain per dB by which an onset stands out; negative softens attacks."""
    tail: float = 0.0
    """dB of gain per dB by which a decay has fallen; negative shortens releases."""
    threshold_db: float = 0.0
    """Compressor's threshold relative to the loudest level."""
    ratio: float = 1.0
    """Compressor's ratio; 1 for none."""
    reaction: float = 0.003
    """Compressor's attack, seconds."""
    recovery: float = 150.0
    """Compressor's release, dB per second."""
    tremolo_db: float = 0.0
    """Depth, each way."""
    tremolo_hertz: float = 5.0
    drive: float = 0.0
    """Gain before the saturation, relative to the loudest 20 ms; 0 for none."""
    bias: float = 0.0
    """Offset before the saturation, for even harmonics."""
    chorus: float = 0.0
    """Level of a copy with moving delay: a doubled, detuned stem."""
    chorus_ms: float = 12.0
    chorus_cents: float = 8.0
    """Greatest detune of the copy."""
    chorus_hertz: float = 0.7
    slap: float = 0.0
    """Level of a single echo."""
    slap_ms: float = 90.0
    room: float = 0.0
    """RMS of the reverberation relative to the dry stem."""
    room_seconds: float = 0.3
    """Time of decay by 60 dB."""
    room_seed: int = 0


# --- one stem ---------------------------------------------------------------------------------


def draw_timbre(rng: np.random.Generator, family: str) -> Timbre:
    """Draw the effects of one stem of `family`; drums and bass get ranges of their own."""
    u = rng.uniform
    drums, bass = family == "drums", family == "bass"
    # One number for each effect, drawn whether it is used or not: fields stay independent.
    use = dict(zip(
        ("eq", "formant", "shape", "compress", "tremolo", "drive", "chorus", "slap", "room"),
        rng.random(9), strict=True,
    ))  # fmt: skip
    settings: dict[str, object] = {}
    if use["eq"] < 0.85:
        settings["eq"] = _draw_eq(rng, bass)
    if use["formant"] < (0.15 if drums or bass else 0.35):
        reach = 0.06 if drums or bass else 0.14
        settings["formant"] = float(np.exp(u(-reach, reach)))
    if use["shape"] < 0.4:
        # Soft attacks would turn drums into something else.
        settings |= {"punch": u(-0.15, 0.6) if drums else u(-0.5, 0.4), "tail": u(-0.35, 0.3)}
    if use["compress"] < (0.6 if drums or bass else 0.4):
        settings |= {"threshold_db": u(-24.0, -6.0), "ratio": u(1.5, 6.0),
                     "reaction": u(0.001, 0.015), "recovery": u(60.0, 400.0)}  # fmt: skip
    if use["tremolo"] < 0.08 and not (drums or bass):
        settings |= {"tremolo_db": u(0.5, 3.0), "tremolo_hertz": u(2.5, 7.5)}
    if use["drive"] < 0.3:
        settings |= {"drive": u(0.2, 0.9), "bias": u(0.0, 0.3)}
    if use["chorus"] < (0.0 if drums else 0.08 if bass else 0.2):
        settings |= {"chorus": u(0.2, 0.8), "chorus_ms": u(7.0, 25.0),
                     "chorus_cents": u(3.0, 12.0), "chorus_hertz": u(0.2, 1.5)}  # fmt: skip
    if use["slap"] < (0.0 if bass else 0.12):
        settings |= {"slap": u(0.1, 0.35), "slap_ms": u(50.0, 150.0)}
    if use["room"] < (0.15 if bass else 0.45):
        settings |= {"room": u(0.05, 0.4), "room_seconds": u(0.12, 0.7)}
    return Timbre(**settings, room_seed=int(rng.integers(2**31)))


def _draw_eq(rng: np.random.Generator, bass: bool) -> tuple[tuple[str, float, float, float], ...]:
    """Two or three sections: each a shelf or a peak, weaker at the bottom of a bass."""
    sections = []
    for _ in range(int(rng.integers(2, 4))):
        shape = ("lowshelf", "peak", "peak", "highshelf")[rng.integers(4)]
        low, high = {"lowshelf": (90, 350), "peak": (200, 5000), "highshelf": (1500, 6000)}[shape]
        hertz = float(np.exp(rng.uniform(np.log(low), np.log(high))))
        strength = 3.0 if bass and hertz < 400.0 else 6.0
        gain = float(np.clip(rng.normal(0.0, 0.6), -1.2, 1.2) * strength)
        sections.append((shape, hertz, float(rng.uniform(0.5, 1.6)), gain))
    return tuple(sections)


def apply_timbre(stem: np.ndarray, timbre: Timbre, rate: int) -> np.ndarray:
    """Apply the effects to a stem float32 [samples]: same length and RMS; silence stays silent."""
    stem = np.asarray(stem, np.float32)
    wanted = _rms(stem)
    if wanted == 0.0:
        return stem.copy()
    out = stem
    if timbre.eq:
        sections = [biquad(s, f, rate, q, db) for s, f, q, db in timbre.eq]
        out = sosfilt(np.stack(sections), out)
    if timbre.formant != 1.0:
        out = _shift_formants(out, timbre.formant)
    if timbre.punch or timbre.tail or timbre.ratio != 1.0 or timbre.tremolo_db:
        out = out * _gain(out, timbre, rate)
    if timbre.drive:
        level = np.float32(max(loudest(out, rate), 1e-9))
        out = saturate(out / level, timbre.drive, timbre.bias)
    if timbre.chorus:
        swing = timbre.chorus_cents * np.log(2) / 1200 / (2 * np.pi * timbre.chorus_hertz) * rate
        angle = np.float32(2 * np.pi * timbre.chorus_hertz) * seconds_axis(len(out), rate)
        lag = timbre.chorus_ms * rate / 1000 + np.float32(swing) * (1 + np.sin(angle))
        out = out + np.float32(timbre.chorus) * delayed(out, lag)
    if timbre.slap or timbre.room:
        out = oaconvolve(out, _room(timbre, rate))[: len(out)]
    return _at_rms(out, wanted)


def _rms(audio: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(audio, dtype=np.float64)))) if len(audio) else 0.0


def _at_rms(audio: np.ndarray, wanted: float) -> np.ndarray:
    """The audio without offset at an RMS, float32."""
    audio = audio - audio.mean()
    return (audio * np.float32(wanted / max(_rms(audio), 1e-12))).astype(np.float32)


def _shift_formants(stem: np.ndarray, factor: float) -> np.ndarray:
    """Filter the stem so that its mean spectral envelope E(f) becomes E(f / factor).

    The envelope is the cepstrally smoothed mean power; the filter has linear phase and its delay is
    removed.
    """
    frames = stem[: len(stem) // FRAME * FRAME].reshape(-1, FRAME)
    if len(frames) == 0:
        return stem
    power = (np.abs(rfft(frames * np.hanning(FRAME).astype(np.float32), axis=1)) ** 2).mean(0)
    cepstrum = irfft(np.log(power + 1e-7 * power.max() + 1e-20))
    cepstrum[CEPSTRUM : -CEPSTRUM + 1] = 0.0
    envelope = rfft(cepstrum).real
    bins = np.arange(len(envelope))
    moved = np.interp(bins / factor, bins, envelope)
    limit = MOST_FORMANT_DB * np.log(10) / 10
    response = np.exp(0.5 * np.clip(moved - envelope, -limit, limit))
    taps = np.roll(irfft(response), FRAME // 2)[FRAME // 4 : -FRAME // 4]
    taps = (taps * np.hanning(len(taps))).astype(np.float32)
    return oaconvolve(stem, taps)[FRAME // 4 : FRAME // 4 + len(stem)]


def _held(level: np.ndarray, fall: float) -> np.ndarray:
    """Envelope in dB that rises at once and falls by at most `fall` dB per value."""
    slope = fall * np.arange(len(level))
    return np.maximum.accumulate(level + slope) - slope


def _smoothed(curve: np.ndarray, values: float) -> np.ndarray:
    """One-pole mean over about `values` values, settled at the first."""
    pole = np.exp(-1.0 / values)
    return lfilter([1 - pole], [1, -pole], curve, zi=[pole * curve[0]])[0]


def _gain(stem: np.ndarray, timbre: Timbre, rate: int) -> np.ndarray:
    """Gain of transient shaper, compressor, and tremolo, float32 [samples]."""
    count = -(-len(stem) // CONTROL)
    padded = np.pad(stem, (0, count * CONTROL - len(stem))).reshape(count, CONTROL)
    level = 10 * np.log10(np.einsum("bs,bs->b", padded, padded) / CONTROL + 1e-20)
    top = level.max()
    level = np.maximum(level, top + QUIETEST_DB)
    step = CONTROL / rate
    fast = _held(level, 700.0 * step)
    gain = np.zeros(count)
    if timbre.punch:
        gain += timbre.punch * np.clip(fast - _smoothed(fast, 0.04 / step), 0.0, 12.0)
    if timbre.tail:
        gain += timbre.tail * np.clip(_held(level, 50.0 * step) - fast, 0.0, 24.0)
    if timbre.ratio != 1.0:
        over = np.maximum(_held(level, timbre.recovery * step) - top - timbre.threshold_db, 0.0)
        gain -= _smoothed(over, timbre.reaction / step) * (1.0 - 1.0 / timbre.ratio)
    if timbre.tremolo_db:
        gain += timbre.tremolo_db * np.sin(
            2 * np.pi * timbre.tremolo_hertz * step * np.arange(count)
        )
    linear = (10 ** (gain / 20)).astype(np.float32)
    following = np.append(linear[1:], linear[-1])
    ramp = np.arange(CONTROL, dtype=np.float32) / CONTROL
    return (linear[:, None] + ramp * (following - linear)[:, None]).reshape(-1)[: len(stem)]


def _room(timbre: Timbre, rate: int) -> np.ndarray:
    """Impulse response: the dry sound, one echo, early reflections, and a decaying noise."""
    rng = np.random.default_rng(timbre.room_seed)
    echo = int(timbre.slap_ms * rate / 1000)
    length = int((timbre.room_seconds if timbre.room else 0.0) * rate) + 1
    out = np.zeros(max(length, echo + 33 if timbre.slap else 0), np.float32)
    if timbre.room:
        tail = white(rng, length) * np.exp(np.float32(-6.9) * np.linspace(0, 1, length, dtype="f4"))
        tail = lfilter([0.5, 0.5], [1.0], tail)  # walls absorb more at high frequencies
        tail[: int(0.004 * rate)] = 0.0
        for place in rng.uniform(0.003, 0.04, 8):
            at = int(place * rate)
            if at < length:
                tail[at] += rng.normal() * 4.0
        out[:length] += timbre.room * tail / max(np.sqrt(np.sum(tail**2)), 1e-9)
    if timbre.slap:
        out[echo : echo + 16] += np.float32(timbre.slap) * np.hanning(16).astype("f4") / 7.5
    out[0] = 1.0
    return out
