"""Stems of the embedded data set from soundfonts, through tinysoundfont."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Protocol

import numpy as np
import tinysoundfont
from scipy.signal import firwin

from musicscope.data import wheel_assets as assets
from musicscope.embedded.rendering.compositions import Composition

SAMPLE_RATE = 16_000
OVERSAMPLE = 2  # the synth interpolates linearly; at twice the rate what it folds is inaudible
PRE_ROLL = 1.0  # seconds rendered before the clip, so that held notes have settled
DRUM_BANK = 128
FONTS = ("timgm6mb", "fluidr3mono")
FLUIDR3MONO = Path(__file__).parents[4] / "assets" / "soundfonts" / "FluidR3Mono_GM.sf3"

DECIMATOR = firwin(63, 0.46, window=("kaiser", 8.0)).astype(np.float32)


class Window(Protocol):
    """Which seconds of a piece are played, and how fast."""

    @property
    def start(self) -> float: ...  # noqa: D102
    @property
    def stretch(self) -> float: ...  # noqa: D102


class Voice(Protocol):
    """Which part is played, on what, and how many semitones higher."""

    @property
    def part(self) -> int: ...  # noqa: D102
    @property
    def family(self) -> str: ...  # noqa: D102
    @property
    def program(self) -> int: ...  # noqa: D102
    @property
    def shift(self) -> int: ...  # noqa: D102


def soundfont(font: str) -> Path:
    """Path of a soundfont: FluidR3Mono from this repository, TimGM6mb from pretty_midi's wheel."""
    if font == "fluidr3mono":
        return FLUIDR3MONO
    wheel = assets.fetch(assets.PRETTY_MIDI)
    path = assets.cache_dir() / "soundfonts" / "TimGM6mb.sf2"
    with zipfile.ZipFile(wheel) as archive:
        assets.extract_once(archive, "pretty_midi/TimGM6mb.sf2", path)
    return path


class Synth:
    """A soundfont held in memory. Rendering leaves no state behind: order does not matter."""

    def __init__(self, font: str | Path):
        self._synth = tinysoundfont.Synth(gain=0.0, samplerate=SAMPLE_RATE * OVERSAMPLE)
        if not Path(font).is_file():
            raise FileNotFoundError(f"{font}: no such soundfont; run `make setup`")
        self._font = self._synth.sfload(str(font))

    def stem(self, piece: Composition, window: Window, voice: Voice, seconds: float) -> np.ndarray:
        """One voice alone, float32 [samples] at SAMPLE_RATE x OVERSAMPLE, without gain."""
        rate = SAMPLE_RATE * OVERSAMPLE
        part = piece.parts[voice.part].window(window.start, seconds * window.stretch)
        total = int(round((seconds + PRE_ROLL) * rate))
        on = np.round((part.start / window.stretch + PRE_ROLL) * rate).astype(int)
        off = np.round((part.end / window.stretch + PRE_ROLL) * rate).astype(int)
        # Note-offs first at equal times, or a repeated note would be cut as it begins.
        events = sorted(
            [(t, 1, p, v) for t, p, v in zip(on, part.pitch, part.velocity, strict=True)]
            + [(t, 0, p, 0) for t, p in zip(np.maximum(off, on + 1), part.pitch, strict=True)]
        )
        synth, drums = self._synth, voice.family == "drums"
        channel = 9 if drums else 0
        synth.sounds_off()
        synth.generate(rate // 50)  # lets the voices that were cut fade to nothing
        bank = DRUM_BANK if drums else 0
        synth.program_select(channel, self._font, bank, voice.program, drums)
        out = np.zeros(total, np.float32)
        now = 0
        for time, is_on, pitch, velocity in events:
            time = min(int(time), total)
            if time > now:
                out[now:time] = self._mono(time - now)
                now = time
            key = int(pitch) + voice.shift
            if 0 <= key <= 127:
                if is_on:
                    synth.noteon(channel, key, int(max(velocity, 1)))
                else:
                    synth.noteoff(channel, key)
        if total > now:
            out[now:] = self._mono(total - now)
        return out[int(PRE_ROLL * rate) :]

    def _mono(self, samples: int) -> np.ndarray:
        stereo = np.frombuffer(bytes(self._synth.generate(samples)), np.float32)
        return (stereo[::2] + stereo[1::2]) * np.float32(0.5)


def rms(audio: np.ndarray) -> float:
    """Root mean square of a float array, full scale = 1."""
    return float(np.sqrt(np.mean(np.square(audio, dtype=np.float64))))
