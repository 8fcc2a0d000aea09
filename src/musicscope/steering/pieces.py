"""One prompt, plain and steered, and what the judges say: what `generate` and the studio share.

Both pieces are drawn with one seed, which fixes the noise of every draw, so they differ by the
edit alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from musicscope.core.io import read_json
from musicscope.models.hooks import chain
from musicscope.models.interface import Hook, MusicModel, is_audio_model
from musicscope.models.registry import load_model
from musicscope.steering.conditions import to_judges
from musicscope.steering.edit import Steering, steering_hook
from musicscope.steering.ready import recipe_folder
from musicscope.steering.recipes import DIRECTIONS

MODELS = "data/models"
MAX_SECONDS = 120.0
MAX_PROMPT = 2_000
KINDS = ("plain", "steered")
Tick = Callable[[float], None]
"""Told the share of a piece that is drawn, 0..1, before each step; may raise to stop it."""


@dataclass(frozen=True)
class Order:
    """What to draw; ValueError says what is wrong with it."""

    prompt: str
    """Empty: no caption."""
    seconds: float
    seed: int
    guidance: float | None = None
    """Scale of classifier-free guidance; None: the model's own."""

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= MAX_SECONDS:
            raise ValueError(f"{self.seconds:g} seconds: above 0 and up to {MAX_SECONDS:g}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed}: 0 to 2^63 - 1")
        if len(self.prompt) > MAX_PROMPT:
            raise ValueError(f"a prompt of {len(self.prompt)} letters: up to {MAX_PROMPT}")
        if self.guidance is not None and not 1 <= self.guidance <= 20:
            raise ValueError(f"guidance {self.guidance:g}: 1 to 20")


@dataclass(frozen=True)
class Piece:
    """One piece of music."""

    audio: np.ndarray
    """float32 [samples]"""
    rate: int
    codes: Tensor | None
    """[K, T]; None of an audio model"""


# --- what there is ----------------------------------------------------------------------------


def known_models(models: str | Path = MODELS) -> list[str]:
    """Names under data/models."""
    root = Path(models)
    folders = sorted(root.iterdir()) if root.is_dir() else []
    return [p.name for p in folders if p.is_dir() and not p.name.startswith(".")]


def known_concepts(model: str) -> dict[str, tuple[str, ...]]:
    """Concept -> directions ("off", "on") that the stage `steer` chose settings for."""
    chosen = {
        path.stem: read_json(path).get("chosen", {})
        for path in sorted(recipe_folder(model).glob("*.json"))
    }
    return {c: tuple(d for d in DIRECTIONS if d in found) for c, found in chosen.items()}


def check_model(model: str) -> None:
    """ValueError naming the known ones if `model` is neither a folder nor a name."""
    if not Path(model).is_dir() and model not in known_models():
        known = ", ".join(known_models()) or f"none: {MODELS} is empty, git checkout {MODELS}"
        raise ValueError(f"no model {model!r}; known: {known}")


def check_wishes(model: str, wishes: Mapping[str, str]) -> None:
    """Say in one line what is missing, or which concepts are known.

    Raises:
        FileNotFoundError: nothing was learnt for the model.
        ValueError: no such concept, or nothing chosen for that direction.
    """
    folder, known = recipe_folder(model), known_concepts(model)
    if not known:
        raise FileNotFoundError(
            f"{folder} has no recipes: run dvc repro steer, or fetch it (dvc pull {folder})"
        )
    for concept, direction in wishes.items():
        if concept not in known:
            raise ValueError(f"no concept {concept!r} of {model}; known: {', '.join(known)}")
        if direction not in known[concept]:
            raise ValueError(
                f"{concept} cannot be switched {direction!r} in {model}; chosen on validation "
                f"prompts: {', '.join(known[concept]) or 'nothing'}"
            )


def open_model(name: str, device: str = "cpu") -> MusicModel:
    """`load_model` of a model that generates; ValueError of one that does not (RAVE)."""
    model: Any = load_model(name, device)
    if is_audio_model(model):
        raise ValueError(
            f"{name} turns audio into audio and generates nothing from a prompt: musicscope "
            "generate --audio FILE edits a recording with it"
        )
    return model


# --- playing ----------------------------------------------------------------------------------


def _ticking(tick: Tick, frames: float) -> Hook:
    """A hook that changes nothing and says how far the generation is."""

    def hook(activations: Tensor, positions: Tensor) -> Tensor:
        tick(min(1.0, max(0, int(positions[-1])) / frames))
        return activations

    return hook


def draw(
    model: MusicModel, order: Order, layer: str, steering: Steering | None = None,
    tick: Tick | None = None,
) -> Piece:  # fmt: skip
    """One piece, steered at `layer` if `steering` is given.

    Raises:
        ValueError: the model has no such layer, or the SAE is of another width.
    """
    width = {point.name: point.width for point in model.hook_points}.get(layer)
    if width is None:
        raise ValueError(f"{model.name} has no {layer}; it has {model.hook_points[0].name} ...")
    hooks: list[Hook] = []
    if tick is not None:
        hooks.append(_ticking(tick, order.seconds * model.frame_rate))
    if steering is not None:
        if steering.sae.width != width:
            raise ValueError(
                f"the SAE has width {steering.sae.width}, {layer} of {model.name} {width}: they "
                "are not of one model; run dvc repro steer"
            )
        hooks.append(steering_hook(model, steering))
    scale = {} if order.guidance is None else {"guidance_scale": order.guidance}
    audio, codes = model.generate(
        [order.prompt or None], order.seconds, order.seed,
        {layer: chain(*hooks)} if hooks else None, **scale,
    )  # fmt: skip
    return Piece(audio[0].float().cpu().numpy(), model.sample_rate, codes[0].cpu())


# --- judging ----------------------------------------------------------------------------------

Scores = Mapping[str, Mapping[str, tuple[float | None, ...]]]
"""Judge -> family -> probability in each piece; None where a judge has no word for it, or where
the piece is silent."""


def judge(judges: Any, pieces: tuple[Piece, ...]) -> Scores:
    """Both judges' probabilities of all families; `judges` as `judging.load_judges` gives."""
    heard = to_judges(np.stack([p.audio for p in pieces]), pieces[0].rate)
    return {
        name: {
            family: tuple(float(v) if math.isfinite(v) else None for v in found[:, i])
            for i, family in enumerate(judges.families)
        }
        for name, found in judges.predict(heard).items()
    }


def telling_families(scores: Scores, asked: Mapping[str, str], most: int = 3) -> list[str]:
    """The families asked for, then the `most` others of the highest probability in any piece."""
    first = next(iter(scores.values()))
    others = [f for f in first if f not in asked]
    others.sort(key=lambda f: -max((v for v in first[f] if v is not None), default=0.0))
    return [*(f for f in asked if f in first), *others[:most]]


def score_rows(
    scores: Scores, asked: Mapping[str, str], most: int = 3
) -> list[tuple[str, list[float | None]]]:
    """Rows (family, with its wish if asked for; plain and steered by each judge in turn)."""
    return [
        (f"{family} {asked[family]}" if family in asked else family,
         [value for by_family in scores.values() for value in by_family[family]])
        for family in telling_families(scores, asked, most)
    ]  # fmt: skip
