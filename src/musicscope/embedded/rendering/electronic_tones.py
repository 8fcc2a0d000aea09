"""Organs and synthesisers: drawbars, pipes, and subtractive sources on the sustained engine."""

from __future__ import annotations

import numpy as np

from musicscope.embedded.rendering.sustained_tones import Voice, sustained
from musicscope.embedded.rendering.tones import (
    Finish,
    Instrument,
    Stem,
    delayed,
    hertz,
    loudest,
    lowpass,
    resonant,
    saturate,
    seconds_axis,
)

DRAWBARS = np.array([1, 3, 2, 4, 6, 8, 10, 12, 16])
"""Harmonics of 16', 5 1/3', 8', 4', 2 2/3', 2', 1 3/5', 1 1/3', 1', above a note at 16'."""


def organ(program: int, stem: Stem) -> Instrument:
    """Drawbar, percussive, rock, or church organ (programs 16 to 19)."""
    u, rng = stem.rng.uniform, stem.rng
    church = program == 19
    gains = np.zeros(64)  # harmonics of half the note's frequency
    if church:  # ranks of pipes at 8', 4', 2', and sometimes a mixture
        slope = u(1.5, 2.6)
        mixture = u(0.2, 0.7) * (rng.random() < 0.7)
        for foot, level in ((2, 1.0), (4, u(0.5, 1.1)), (8, u(0.3, 0.9)), (6, mixture)):
            for k in range(1, 64 // foot):
                gains[foot * k - 1] += level * k**-slope
    else:
        drawn = rng.integers(0, 9, 9).astype(float)
        drawn[2] = 8.0
        drawn[:2] = np.minimum(drawn[:2], 5.0)
        if program == 17:
            drawn[4:] *= 0.3
        gains[DRAWBARS - 1] = np.where(drawn > 0, 10 ** ((drawn - 8.0) * 3.0 / 20), 0.0)
    click, leak = u(0.05, 0.3), u(0.0, 0.01)

    def spectrum(k: np.ndarray, f: np.ndarray, level: np.ndarray) -> np.ndarray:
        padded = np.zeros(len(k))
        padded[: min(64, len(k))] = gains[: len(k)]
        if not padded.any():
            padded[min(1, len(k) - 1)] = 1.0
        return ((padded + leak * lowpass(k, 24.0)) * lowpass(f, 7000.0, 1.0))[None]

    voice = Voice(
        spectrum,
        attack=u(0.03, 0.09) if church else u(0.004, 0.012),
        release=u(0.5, 1.4) if church else u(0.02, 0.06),
        voices=3 if church else 1,
        spread=u(1.5, 4.0),
        drift=0.5,
        breath=u(0.005, 0.03) if church else 0.0,
        chiff=u(0.0, 0.12) if church else click,
        chiff_band=(1000.0, 6000.0),
        dynamic=False,
        scattered=True,
    )
    if church:
        return _an_octave_down(sustained(voice, stem, touch=0.3))
    speed = u(5.5, 7.2) if rng.random() < 0.5 else u(0.6, 1.2)
    drive = u(0.4, 1.2) if program == 18 else u(0.1, 0.4)
    played = _an_octave_down(sustained(voice, stem, 0.3, _leslie(speed, u(0.4, 1.0), drive, stem)))
    if program != 17:
        return played
    ratio, fall, strength = float(rng.integers(2, 4)), u(8.0, 20.0), np.float32(u(0.6, 1.5))

    def tone(pitch: float, loudness: float, samples: int) -> np.ndarray:
        out = played.tone(pitch, loudness, samples)
        time = seconds_axis(samples, stem.rate)
        f0 = min(hertz(pitch) * ratio, 0.45 * stem.rate)
        ping = np.sin(2 * np.pi * ((f0 * np.arange(samples) / stem.rate) % 1.0), dtype=np.float64)
        return out + strength * np.exp(np.float32(-fall) * time) * ping.astype(np.float32)

    return Instrument(tone, played.release, touch=played.touch, finish=played.finish)


def _an_octave_down(instrument: Instrument) -> Instrument:
    """Tables of an organ begin at 16', so the note is read an octave lower."""

    def tone(pitch: float, loudness: float, samples: int) -> np.ndarray:
        return instrument.tone(pitch - 12, loudness, samples)

    return Instrument(tone, instrument.release, touch=instrument.touch, finish=instrument.finish)


def _leslie(speed: float, depth: float, drive: float, stem: Stem) -> Finish:
    """Valve amplifier and rotating horn: the delay and the level turn together."""
    start = stem.rng.uniform(0, 2 * np.pi)

    def finish(audio: np.ndarray) -> np.ndarray:
        level = loudest(audio, stem.rate)
        if level == 0.0:
            return audio
        hot = saturate(audio / np.float32(level), drive) * np.float32(level / np.tanh(drive))
        angle = np.float32(2 * np.pi * speed) * seconds_axis(len(audio), stem.rate)
        swing = np.sin(angle + np.float32(start))
        lag = np.float32(stem.rate * 0.0004 * depth) * (np.float32(1.0) + swing)
        near = np.float32(1.0) + np.float32(0.25 * depth) * np.cos(angle + np.float32(start))
        return delayed(hot, lag) * near

    return finish


def synth(program: int, stem: Stem) -> Instrument:
    """Square lead, saw lead, pad, or polysynth pad (programs 80, 81, 88, 90)."""
    u, rng = stem.rng.uniform, stem.rng
    pad = program in (88, 90)
    saw = program != 80 and not (pad and rng.random() < 0.5)
    width = u(0.4, 0.5) if program == 80 else u(0.1, 0.5)
    quality = u(0.7, 4.0)
    dark, top = u(200, 500), u(1500, 4500) if program == 88 else u(3500, 12000)
    octave = u(0.0, 0.8) * (rng.random() < 0.5)

    def spectrum(k: np.ndarray, f: np.ndarray, level: np.ndarray) -> np.ndarray:
        gains = 1.0 / k if saw else np.sin(np.pi * k * width) / k
        gains = gains + octave * np.where(k % 2 == 0, 2.0 / k, 0.0)
        return gains * resonant(f, np.maximum(dark * (top / dark) ** level, f[0]), quality)

    return sustained(
        Voice(
            spectrum,
            attack=u(0.15, 0.6) if program == 88 else u(0.003, 0.06) if pad else u(0.002, 0.015),
            release=u(0.4, 1.2) if pad else u(0.03, 0.2),
            voices=int(rng.integers(3, 6)) if pad else int(rng.integers(1, 8)),
            spread=u(6.0, 20.0),
            vibrato=0.0 if pad or rng.random() < 0.5 else u(5.0, 25.0),
            speed=u(0.5, 7.0) if pad else u(4.5, 7.0),
            delay=0.0 if pad else u(0.1, 0.4),
            tremolo=u(0.0, 0.25) if pad else 0.0,
            drift=u(0.0, 2.0),
            dull=u(0.6, 0.9),
            swell=u(0.2, 0.7) if pad else 0.0,
            settle=u(0.8, 1.0),
            fall=u(0.2, 0.8),
            filter_fall=u(0.3, 1.5) if pad else u(0.1, 0.8),
            filter_rest=u(0.5, 0.95) if pad else u(0.7, 1.0),
            sweep=u(0.2, 0.8) if pad else 0.0,
            breath=u(0.02, 0.15) if pad else 0.0,
            scattered=pad,
        ),
        stem,
        touch=u(0.4, 1.4),
        finish=_echo(u(0.16, 0.45), u(0.1, 0.35), stem) if rng.random() < 0.7 else None,
    )


def _echo(seconds: float, feedback: float, stem: Stem) -> Finish:
    """Delay with feedback, four echoes."""
    step = int(seconds * stem.rate)

    def finish(audio: np.ndarray) -> np.ndarray:
        out = audio.copy()
        for number in range(1, 5):
            if number * step < len(audio):
                gain = np.float32(feedback**number)
                out[number * step :] += gain * audio[: len(audio) - number * step]
        return out

    return finish


def synth_bass(stem: Stem) -> Instrument:
    """Subtractive bass: saw or pulse through a falling resonant filter."""
    u, rng = stem.rng.uniform, stem.rng
    saw, width = rng.random() < 0.6, u(0.25, 0.5)
    quality, dark, top = u(0.8, 5.0), u(120, 300), u(900, 4000)

    def spectrum(k: np.ndarray, f: np.ndarray, level: np.ndarray) -> np.ndarray:
        gains = 1.0 / k if saw else np.sin(np.pi * k * width) / k
        return gains * resonant(f, np.maximum(dark * (top / dark) ** level, 1.2 * f[0]), quality)

    return sustained(
        Voice(
            spectrum,
            attack=u(0.003, 0.015),
            release=u(0.03, 0.12),
            voices=int(rng.integers(1, 3)),
            spread=u(2.0, 7.0),
            drift=0.0,
            dull=u(0.3, 0.6),
            settle=u(0.4, 0.9),
            fall=u(0.2, 0.6),
            filter_fall=u(0.08, 0.5),
            filter_rest=u(0.1, 0.6),
        ),
        stem,
    )
