"""Scenes: windows of pieces whose parts are given random instruments and rendered stem by stem.

Instruments are drawn independently of the piece, of its style and of one another, in a register
drawn the same way for all families. So no instrument is tied to a tune, a style, a register, drums
or bass. Stems stay apart: `musicscope.embedded.rendering.mixing` makes many clips from one scene.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from scipy.signal import upfirdn

from musicscope.data.taxonomy import BASS_NAMES, PITCHED_FAMILIES, PROGRAM_NAMES
from musicscope.embedded.rendering.captions import VOCALS, estimate_key
from musicscope.embedded.rendering.compositions import MIN_NOTES, Composition, Part
from musicscope.embedded.rendering.pieces import Pieces
from musicscope.embedded.rendering.soundfonts import DECIMATOR, OVERSAMPLE, SAMPLE_RATE, Synth, rms
from musicscope.embedded.rendering.synthesis import play
from musicscope.embedded.rendering.timbre import apply_timbre, draw_timbre
from musicscope.embedded.rendering.voices import Bank, sing

SYNTHESIS = "synthesis"
STEM_RMS = 0.1
GUITAR_SHARE = 0.45
"""Share of scenes in which one pitched part is a guitar."""
VOCAL_SHARE = 0.45
TIMBRE_SHARE = 0.6
MOST_PITCHED = 4
REGISTER = 60.0  # median MIDI pitch of a part before its random octave
ATTEMPTS = 20
MOST_DRAWS = 50
"""A fault in a sound must end the run, not repeat for ever."""


@dataclass(frozen=True)
class Stem:
    """One part of a scene with its sound."""

    concept: str
    """One of `captions.CONCEPTS`."""
    program: int
    source: str
    """Soundfont, `synthesis`, or the singer's name."""
    part: int
    """Index into ``Composition.parts``."""
    shift: int
    """Semitones added to every pitch."""
    seed: int
    """Of the stem's synthesis and timbre."""
    singer: str = ""
    """`male` or `female` for vocals."""
    notes: int = 0
    """Onsets in the window."""

    @property
    def family(self) -> str:
        """What a soundfont is asked for."""
        return self.concept


@dataclass(frozen=True)
class Scene:
    """All choices behind one set of stems."""

    group: str
    start: float
    """Seconds into the piece."""
    stretch: float
    """Playing speed: 1.1 plays ten per cent faster."""
    stems: tuple[Stem, ...]
    tempo_bpm: float
    key: str
    style: str

    def to_json(self) -> dict[str, object]:
        """Plain values; `from_json` is its inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict) -> Scene:
        """A scene from `to_json`."""
        return cls(**{**value, "stems": tuple(Stem(**stem) for stem in value["stems"])})


@dataclass(frozen=True)
class Sounds:
    """Where stems come from; loaded once per process."""

    fonts: dict[str, Synth]
    bank: Bank | None
    singers: tuple[str, ...] = ()
    """Names in the bank that may be used."""
    synthesis: bool = True

    @property
    def sources(self) -> tuple[str, ...]:
        """Sources of instruments."""
        return (*self.fonts, *((SYNTHESIS,) if self.synthesis else ()))


def draw_scene(
    piece: Composition, sounds: Sounds, rng: np.random.Generator, seconds: float
) -> Scene:
    """Draw a window, its tempo and key, and an instrument per part.

    Raises:
        ValueError: no window with a pitched part was found in ATTEMPTS draws.
    """
    stretch = float(rng.uniform(0.85, 1.2))
    span = seconds * stretch
    for _ in range(ATTEMPTS):
        start = float(rng.uniform(0.0, max(piece.seconds - span, 0.0)))
        parts = [p.window(start, span) for p in piece.parts]
        playing = [i for i, p in enumerate(parts) if (p.start >= 0).sum() >= MIN_NOTES]
        pitched = [i for i in playing if not parts[i].is_drum and not parts[i].is_bass]
        if pitched:
            break
    else:
        raise ValueError(f"{piece.group}: no window of {span:.1f} s has a pitched part playing")
    key_shift = int(rng.integers(-5, 6))
    chosen = [int(i) for i in rng.permutation(pitched)[:MOST_PITCHED]]
    families = [str(f) for f in rng.permutation([f for f in PITCHED_FAMILIES if f != "guitar"])]
    if rng.random() < GUITAR_SHARE:
        families.insert(int(rng.integers(len(chosen))), "guitar")
    stems = []
    for index, family in zip(chosen, families, strict=False):
        program = int(rng.choice(list(PROGRAM_NAMES[family])))
        stems.append(_stem(family, program, index, parts, _shift(parts[index], key_shift, rng),
                           sounds, rng))  # fmt: skip
    if sounds.singers and rng.random() < VOCAL_SHARE:
        # The part with the fewest notes at once is the easiest to sing.
        index = min(chosen, key=lambda i: _polyphony(parts[i]))
        name = str(rng.choice(sounds.singers))
        stem = _stem(VOCALS, 0, index, parts, key_shift, sounds, rng)
        stems.append(replace(stem, source=name, singer=sounds.bank.singer(name).sex))
    basses = [i for i in playing if parts[i].is_bass]
    drums = [i for i in playing if parts[i].is_drum]
    if basses:
        program = int(rng.choice(list(BASS_NAMES)))
        stems.append(_stem("bass", program, basses[0], parts, key_shift, sounds, rng))
    if drums:
        stems.append(_stem("drums", 0, drums[0], parts, 0, sounds, rng))
    at = max(int(np.searchsorted(piece.tempo_times, start, "right")) - 1, 0)
    return Scene(
        piece.group, start, stretch, tuple(stems), float(piece.tempo_bpm[at] * stretch),
        _key([(parts[s.part], s.shift) for s in stems if s.concept != "drums"]),
        getattr(piece, "style", ""),
    )  # fmt: skip


def _stem(
    concept: str, program: int, index: int, parts: list[Part], shift: int, sounds: Sounds,
    rng: np.random.Generator,
) -> Stem:  # fmt: skip
    source = sounds.sources[rng.integers(len(sounds.sources))]
    notes = int((parts[index].start >= 0).sum())
    return Stem(concept, program, source, index, shift, int(rng.integers(2**31)), notes=notes)


def _shift(part: Part, key_shift: int, rng: np.random.Generator) -> int:
    """Key change plus octaves that bring the part into a register drawn for it."""
    octave = 12 * round((REGISTER - float(np.median(part.pitch))) / 12.0)
    return key_shift + octave + 12 * int(rng.choice((-1, 0, 1), p=(0.2, 0.55, 0.25)))


def _polyphony(part: Part) -> float:
    """Mean number of notes that sound while at least one does."""
    return float((part.end - part.start).sum() / max(np.ptp([part.start.min(), part.end.max()]), 1))


def _key(parts: list[tuple[Part, int]]) -> str:
    classes = np.zeros(12)
    for part, shift in parts:
        np.add.at(classes, (part.pitch + shift) % 12, part.end - np.maximum(part.start, 0.0))
    return estimate_key(classes)


def render_stem(
    piece: Composition, scene: Scene, stem: Stem, sounds: Sounds, seconds: float
) -> np.ndarray:
    """Render one stem, float32 [samples] at 16 kHz, RMS STEM_RMS; all zero if it is silent."""
    rng = np.random.default_rng(stem.seed)
    rate = SAMPLE_RATE * OVERSAMPLE
    if stem.source in sounds.fonts:
        audio = sounds.fonts[stem.source].stem(piece, scene, stem, seconds)
    else:
        part = piece.parts[stem.part].window(scene.start, seconds * scene.stretch)
        notes = replace(
            part, start=part.start / scene.stretch, end=part.end / scene.stretch,
            pitch=part.pitch + stem.shift,
        )  # fmt: skip
        if stem.concept == VOCALS:
            audio = sing(sounds.bank, stem.source, notes, rng, seconds, rate)
        else:
            audio = play(stem.concept, stem.program, notes, rng, seconds, rate)
    if rms(audio) < 1e-4:
        return np.zeros(round(seconds * SAMPLE_RATE), np.float32)
    if rng.random() < TIMBRE_SHARE:
        audio = apply_timbre(audio, draw_timbre(rng, stem.concept), rate)
    out = upfirdn(DECIMATOR, audio, down=OVERSAMPLE)[len(DECIMATOR) // (2 * OVERSAMPLE) :]
    out = out[: round(seconds * SAMPLE_RATE)].astype(np.float32)
    return out * np.float32(STEM_RMS / max(rms(out), 1e-9))


def render_scene(
    piece: Composition, scene: Scene, sounds: Sounds, seconds: float
) -> tuple[Scene, np.ndarray]:
    """Render all stems; the scene without its silent stems, and float16 [stems, samples]."""
    kept, audio = [], []
    for stem in scene.stems:
        rendered = render_stem(piece, scene, stem, sounds, seconds)
        if rendered.any():
            kept.append(stem)
            audio.append(rendered.astype(np.float16))
    if not any(s.concept in PITCHED_FAMILIES for s in kept):
        raise ValueError(f"{scene.group} at {scene.start:.1f} s: every pitched stem is silent")
    return replace(scene, stems=tuple(kept)), np.stack(audio)


def draw_rendered(
    pieces: Pieces, sounds: Sounds, rng: np.random.Generator, seconds: float, concept: str = ""
) -> tuple[Composition, Scene, np.ndarray]:
    """Draw scenes until one renders, with an audible stem of `concept` if that is given.

    Returns:
        The piece, its scene and float16 [stems, samples].

    Raises:
        ValueError: MOST_DRAWS draws had no notes, silent stems alone, or not the concept.
    """
    for draw in range(MOST_DRAWS):
        piece = pieces.draw(rng)
        try:
            scene = draw_scene(piece, sounds, rng, seconds)
            if concept and concept not in (stem.concept for stem in scene.stems):
                continue
            scene, audio = render_scene(piece, scene, sounds, seconds)
        except ValueError:
            if draw == MOST_DRAWS - 1:
                raise
            continue
        if not concept or concept in (stem.concept for stem in scene.stems):
            return piece, scene, audio
    raise ValueError(f"no scene with {concept} in {MOST_DRAWS} draws")


def soundfonts(folder_of: dict[str, Path]) -> dict[str, Synth]:
    """Load soundfonts by name."""
    return {name: Synth(path) for name, path in folder_of.items()}
