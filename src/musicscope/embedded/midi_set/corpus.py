"""Rendered clips with exact labels: one deterministic clip an index, for any split and font."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from musicscope.core.seeding import seed_for
from musicscope.data.taxonomy import FAMILIES
from musicscope.embedded.midi_set.captions import estimate_key, write_caption
from musicscope.embedded.midi_set.compositions import Composition
from musicscope.embedded.midi_set.orchestration import Plan, draw_plan
from musicscope.embedded.midi_set.render import Synth, render

ATTEMPTS = 20


@dataclass(frozen=True)
class Clip:
    """One rendered clip: audio [samples] at 16 kHz, and what is known about it."""

    audio: np.ndarray
    plan: Plan
    energy: np.ndarray
    caption: str
    tempo_bpm: float
    density: float
    """Notes a second, drums included."""
    key: str

    def labels(self) -> dict[str, object]:
        """Columns of clips.parquet that describe the music."""
        shares = dict.fromkeys(FAMILIES, 0.0)
        for voice, share in zip(self.plan.voices, self.energy, strict=True):
            shares[voice.family] += float(share)
        playing = set(self.plan.families)
        return {
            "group": self.plan.group,
            "font": self.plan.font,
            "caption": self.caption,
            "target_family": self.plan.target.family,
            "families": list(self.plan.families),
            "programs": [v.program for v in self.plan.voices],
            "tempo_bpm": self.tempo_bpm,
            "density": self.density,
            "key": self.key,
            **{f"has_{f}": f in playing for f in FAMILIES},
            **{f"energy_{f}": round(shares[f], 6) for f in FAMILIES},
        }


def describe(
    piece: Composition, plan: Plan, audio: np.ndarray, energy: np.ndarray, seconds: float,
    rng: np.random.Generator,
) -> Clip:  # fmt: skip
    """Measure tempo, density and key of a planned clip and write its caption."""
    span = seconds * plan.stretch
    classes, notes = np.zeros(12), 0
    for voice in plan.voices:
        part = piece.parts[voice.part].window(plan.start, span)
        notes += int((part.start >= 0).sum())
        if not part.is_drum:
            held = (part.end - np.maximum(part.start, 0.0)) / plan.stretch
            np.add.at(classes, (part.pitch + voice.shift) % 12, held)
    tempo = piece.tempo_bpm[max(np.searchsorted(piece.tempo_times, plan.start, "right") - 1, 0)]
    bpm, density = float(tempo * plan.stretch), notes / seconds
    key = estimate_key(classes)
    return Clip(audio, plan, energy, write_caption(plan, bpm, density, key, rng), bpm, density, key)


def make_clip(
    pieces: list[Composition], synths: dict[str, Synth], font: str, seed: int, *name: object,
    seconds: float = 10.0, target_family: str | None = None,
) -> Clip:  # fmt: skip
    """Draw, render and describe the clip called `name`; equal arguments give equal bytes.

    A window whose target turns out silent is drawn again; after ATTEMPTS the error is raised.
    """
    rng = np.random.default_rng(seed_for(seed, "clip", font, *name))
    for attempt in range(ATTEMPTS):
        piece = pieces[rng.integers(len(pieces))]
        try:
            plan = draw_plan(piece, font, rng, seconds, target_family)
            audio, energy = render(synths[font], piece, plan, seconds)
        except ValueError:
            if attempt == ATTEMPTS - 1:
                raise
            continue
        return describe(piece, plan, audio, energy, seconds, rng)
    raise AssertionError("unreachable")
