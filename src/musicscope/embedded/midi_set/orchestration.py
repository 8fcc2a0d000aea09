"""Random orchestration of real pieces: who plays what, how loud, in which key and tempo.

The instrument of every part is drawn at random, independently of the piece, of drums and of bass,
and every family plays in the same register. So guitar is not confounded with genre, loudness,
brightness, tempo or density, as it is in the pieces as composed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from musicscope.data.taxonomy import BASS_NAMES, FAMILIES, PITCHED_FAMILIES, PROGRAM_NAMES
from musicscope.embedded.midi_set.compositions import MIN_NOTES, Composition, Part, playable_windows

GUITAR_SHARE = 0.4
REGISTER = 60.0  # every part is moved by octaves so that its median pitch is within 6 of this


@dataclass(frozen=True)
class Voice:
    """One part of the piece as it will be played."""

    part: int
    """Index into ``Composition.parts``."""
    family: str
    program: int
    shift: int
    """Semitones added to every pitch (key change and octave)."""
    gain_db: float
    """Level of this stem's RMS relative to the target's."""


@dataclass(frozen=True)
class Plan:
    """All choices that make one clip; the same plan gives the same samples."""

    group: str
    start: float
    """Seconds into the piece."""
    stretch: float
    """Playing speed: 1.1 plays ten per cent faster."""
    voices: tuple[Voice, ...]
    """The target first."""
    font: str
    level_db: float
    """RMS of the clip, dB of full scale."""
    reverb_seed: int
    reverb_wet: float

    @property
    def target(self) -> Voice:
        """The prominent voice."""
        return self.voices[0]

    @property
    def families(self) -> tuple[str, ...]:
        """Families that play, each once, in the order of FAMILIES."""
        playing = {v.family for v in self.voices}
        return tuple(f for f in FAMILIES if f in playing)


def draw_target_family(rng: np.random.Generator) -> str:
    """Guitar in GUITAR_SHARE of the clips, the other families equally often."""
    if rng.random() < GUITAR_SHARE:
        return "guitar"
    others = [f for f in PITCHED_FAMILIES if f != "guitar"]
    return others[rng.integers(len(others))]


def draw_plan(
    piece: Composition, font: str, rng: np.random.Generator, seconds: float = 10.0,
    target_family: str | None = None,
) -> Plan:  # fmt: skip
    """Draw a clip from `piece`: a window, one prominent part, at most two others, drums and bass.

    Raises:
        ValueError: the piece has no window of `seconds` with two pitched parts.
    """
    stretch = float(rng.uniform(0.85, 1.2))
    span = seconds * stretch
    windows = playable_windows(piece, span, hop=0.5)
    if not windows:
        raise ValueError(f"{piece.group}: no window of {span:.1f} s has two pitched parts playing")
    start = windows[rng.integers(len(windows))]
    parts = [p.window(start, span) for p in piece.parts]
    playing = [i for i, p in enumerate(parts) if len(p.pitch) >= MIN_NOTES]
    pitched = [i for i in playing if not parts[i].is_drum and not parts[i].is_bass]
    basses = [i for i in playing if parts[i].is_bass]
    drums = [i for i in playing if parts[i].is_drum]
    if not pitched:  # a window in which only basses play: treat them as melody
        pitched, basses = basses, []
    family = target_family or draw_target_family(rng)
    key_shift = int(rng.integers(-3, 4))
    order = rng.permutation(pitched)
    others = order[1 : 1 + rng.integers(0, 3)]
    families = rng.permutation([f for f in PITCHED_FAMILIES if f not in (family, "guitar")])
    voices = [_voice(int(order[0]), family, parts[order[0]], key_shift, 0.0, rng)]
    for index, other in zip(others, families, strict=False):
        gain = float(-5.0 + rng.uniform(-2.0, 2.0))
        voices.append(_voice(int(index), str(other), parts[index], key_shift, gain, rng))
    if basses and rng.random() < 0.7:
        program = int(rng.choice(list(BASS_NAMES)))
        voices.append(
            Voice(basses[0], "bass", program, key_shift, float(-4.0 + rng.uniform(-2.0, 2.0)))
        )
    if drums and rng.random() < 0.65:
        voices.append(Voice(drums[0], "drums", 0, 0, float(-5.0 + rng.uniform(-2.0, 2.0))))
    return Plan(
        piece.group, start, stretch, tuple(voices), font,
        float(rng.uniform(-22.0, -17.0)), int(rng.integers(2**31)), float(rng.uniform(0.05, 0.2)),
    )  # fmt: skip


def _voice(
    index: int, family: str, part: Part, key_shift: int, gain_db: float, rng: np.random.Generator
) -> Voice:
    """Give the part a random program of `family` and move it by octaves into the register."""
    program = int(rng.choice(list(PROGRAM_NAMES[family])))
    octave = 12 * round((REGISTER - float(np.median(part.pitch))) / 12.0)
    return Voice(index, family, program, key_shift + octave, gain_db)


def with_target(plan: Plan, family: str, program: int) -> Plan:
    """The same clip with only the target's instrument changed (a matched pair)."""
    target = replace(plan.target, family=family, program=program)
    return replace(plan, voices=(target, *plan.voices[1:]))


def instrument_name(voice: Voice) -> str:
    """The name of the voice's program, as captions use it."""
    if voice.family == "drums":
        return "drums"
    if voice.family == "bass":
        return BASS_NAMES[voice.program]
    return PROGRAM_NAMES[voice.family][voice.program]
