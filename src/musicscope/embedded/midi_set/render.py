"""Plans to audio: one stem a voice through tinysoundfont, mixed at exact levels, 16 kHz mono."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tinysoundfont
from scipy.signal import fftconvolve, firwin, upfirdn

from musicscope.embedded.midi_set.compositions import Composition
from musicscope.embedded.midi_set.orchestration import Plan, Voice

SAMPLE_RATE = 16_000
OVERSAMPLE = 2  # the synth interpolates linearly; at twice the rate what it folds is inaudible
PRE_ROLL = 1.0  # seconds rendered before the clip, so that held notes have settled
REVERB_SECONDS = 0.35
DRUM_BANK = 128

_DECIMATOR = firwin(63, 0.46, window=("kaiser", 8.0)).astype(np.float32)


class Synth:
    """A soundfont held in memory. Rendering leaves no state behind: order does not matter."""

    def __init__(self, font: str | Path):
        self._synth = tinysoundfont.Synth(gain=0.0, samplerate=SAMPLE_RATE * OVERSAMPLE)
        if not Path(font).is_file():
            raise FileNotFoundError(f"{font}: no such soundfont; run `make setup`")
        self._font = self._synth.sfload(str(font))

    def stem(self, piece: Composition, plan: Plan, voice: Voice, seconds: float) -> np.ndarray:
        """One voice alone, float32 [samples] at SAMPLE_RATE x OVERSAMPLE, without gain."""
        rate = SAMPLE_RATE * OVERSAMPLE
        part = piece.parts[voice.part].window(plan.start, seconds * plan.stretch)
        total = int(round((seconds + PRE_ROLL) * rate))
        on = np.round((part.start / plan.stretch + PRE_ROLL) * rate).astype(int)
        off = np.round((part.end / plan.stretch + PRE_ROLL) * rate).astype(int)
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


def mix(stems: list[np.ndarray], plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Mix stems at the plan's levels with a noise-decay reverb.

    Returns:
        audio: float32 [samples] at SAMPLE_RATE, RMS at the plan's level, peak below 1.
        energy: float64 [voices], each stem's share of the dry energy.

    Raises:
        ValueError: the target's stem is silent (the font lacks the program, or no note sounds).
    """
    target = rms(stems[0])
    if target < 1e-4:
        raise ValueError(f"{plan.group} at {plan.start:.1f} s: the target's stem is silent")
    dry = np.zeros_like(stems[0])
    energy = np.zeros(len(stems))
    for i, (stem, voice) in enumerate(zip(stems, plan.voices, strict=True)):
        level = rms(stem)
        if level > 1e-4:
            scaled = stem * np.float32(10 ** (voice.gain_db / 20) / level)
            energy[i] = np.mean(np.square(scaled, dtype=np.float64))
            dry += scaled
    rate = SAMPLE_RATE * OVERSAMPLE
    tail = np.random.default_rng(plan.reverb_seed).standard_normal(int(REVERB_SECONDS * rate))
    tail *= np.exp(-np.arange(len(tail)) / (0.25 * len(tail)))
    tail /= np.sqrt(np.sum(tail**2))
    wet = fftconvolve(dry, tail.astype(np.float32))[: len(dry)]
    mixed = dry + np.float32(plan.reverb_wet) * wet.astype(np.float32)
    audio = upfirdn(_DECIMATOR, mixed, down=OVERSAMPLE)[len(_DECIMATOR) // (2 * OVERSAMPLE) :]
    audio = audio[: len(mixed) // OVERSAMPLE].astype(np.float32)
    audio *= np.float32(10 ** (plan.level_db / 20) / max(rms(audio), 1e-9))
    peak = float(np.abs(audio).max())
    return audio * np.float32(min(1.0, 0.99 / peak)), energy / energy.sum()


def render(synth: Synth, piece: Composition, plan: Plan, seconds: float = 10.0):
    """Render one plan: (audio float32 [samples], energy share of each voice)."""
    return mix([synth.stem(piece, plan, voice, seconds) for voice in plan.voices], plan)
