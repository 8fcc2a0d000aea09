"""What the studio does, without its page: runs, and is tested, without Gradio.

Bad input is a ValueError or FileNotFoundError whose text is for the user; `Cancelled` ends a job.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from html import escape
from typing import Any

import numpy as np

from musicscope.commands.generate import JUDGES
from musicscope.core.io import read_json
from musicscope.dictionaries.core import TopKSAE
from musicscope.judges.pair import load_judges
from musicscope.report.snippets import spectrogram_levels
from musicscope.steering import pieces
from musicscope.steering.edit import ConceptEdit, Edit, Steering
from musicscope.steering.pieces import Order, Piece, Scores, Tick
from musicscope.steering.ready import load_steering, recipe_folder, sae_folder
from musicscope.steering.recipes import load_recipe

LONGEST = 30.0
"""Seconds of a piece."""
SLOT = "top1"


class Cancelled(Exception):
    """The user does not want the result any more."""


def ticking(told: Tick, cancelled: Callable[[], bool]) -> Tick:
    """Pass the share on to `told`; `Cancelled` once `cancelled()` is true."""

    def tick(share: float) -> None:
        if cancelled():
            raise Cancelled
        told(share)

    return tick


# --- what there is ----------------------------------------------------------------------------


def models_with_sae(slot: str = SLOT) -> list[str]:
    """Models under data/models that have an SAE to look into; first those with concepts."""
    found = (m for m in pieces.known_models() if (sae_folder(m, slot) / "config.json").is_file())
    return sorted(found, key=lambda model: not pieces.known_concepts(model))


def all_concepts(models: Sequence[str]) -> list[str]:
    """Concepts that any of the models can be steered with."""
    return list(dict.fromkeys(c for m in models for c in pieces.known_concepts(m)))


def sae_of(model: str, slot: str = SLOT, device: str = "cpu") -> tuple[str, TopKSAE]:
    """Hook point and SAE of a slot."""
    folder = sae_folder(model, slot)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is missing: run dvc repro train_sae, or dvc pull it")
    layer = read_json(folder / "config.json").get("trainer", {}).get("layer")
    if not isinstance(layer, str):
        raise ValueError(f"{folder}/config.json names no hook point as trainer.layer: retrain it")
    return layer, TopKSAE.load(folder, device)


open_model = lru_cache(maxsize=1)(pieces.open_model)
"""One model at a time stays in memory."""
open_judges = lru_cache(maxsize=1)(load_judges)


# --- what is asked for ------------------------------------------------------------------------


@dataclass(frozen=True)
class Knob:
    """One operation on one feature."""

    feature: int
    op: str
    """One of `musicscope.steering.edit.TARGETS`."""
    value: float
    """Times the feature's usual activation, the mean where it fires; of scale: the factor."""


def order_of(prompt: Any, seconds: Any, seed: Any, guidance: Any) -> Order:
    """What the fields say, checked; empty guidance is the model's own."""
    for name, value in (("seconds", seconds), ("seed", seed)):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name}: give a number")
    if seed != int(seed):
        raise ValueError(f"seed {seed:g}: give a whole number")
    if seconds > LONGEST:
        raise ValueError(f"{seconds:g} seconds: up to {LONGEST:g} here")
    return Order(str(prompt or "").strip(), float(seconds), int(seed), guidance)


def knob_of(feature: Any, op: str, value: Any) -> Knob | None:
    """One row of the page; None if it names no feature."""
    if feature is None or feature == "":
        return None
    if not isinstance(feature, int | float) or feature != int(feature) or feature < 0:
        raise ValueError(f"feature {feature}: give a whole number from 0")
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"feature {int(feature)}: give a value")
    return Knob(int(feature), op, float(value))


def plan(
    model: str, wishes: Mapping[str, tuple[str, float]], knobs: Sequence[Knob] = (),
    branch: str | None = None, device: str = "cpu",
) -> tuple[str, Steering]:  # fmt: skip
    """Hook point and edits of {"guitar": ("off", 1.0)} and single features, at one layer.

    A strength is in units of what was chosen on validation prompts.
    """
    directions = {concept: direction for concept, (direction, _) in wishes.items()}
    if not directions and not knobs:
        raise ValueError("switch a concept off or on, or name a feature")
    pieces.check_wishes(model, directions)
    if directions:
        layer, steering = load_steering(model, directions, branch=branch, device=device)
        strengths = [strength for _, strength in wishes.values()]
        concepts = tuple(
            replace(c, strength=c.strength * s)
            for c, s in zip(steering.concepts, strengths, strict=True)
        )
        steering = replace(steering, concepts=concepts)
    else:
        recipe = load_recipe(recipe_folder(model), next(iter(pieces.known_concepts(model))))
        sae = TopKSAE.load(sae_folder(model, recipe.slot), device)
        layer, steering = recipe.layer, Steering(sae, (), branch or "conditional")
    single = tuple(_knob_edit(knob, usual_values(model)) for knob in knobs)
    return layer, replace(steering, concepts=steering.concepts + single)


def usual_values(model: str) -> np.ndarray:
    """[F] mean activation of each feature where it fires, by the recipes' training clips."""
    recipe = load_recipe(recipe_folder(model), next(iter(pieces.known_concepts(model))))
    sides = (recipe.statistics[f"active_{side}"] for side in ("with", "without"))
    return np.maximum(*(side.numpy() for side in sides))


def _knob_edit(knob: Knob, usual: np.ndarray) -> ConceptEdit:
    if knob.feature >= len(usual):
        raise ValueError(f"feature {knob.feature}: the SAE has 0 to {len(usual) - 1}")
    value = knob.value * (1.0 if knob.op == "scale" else float(usual[knob.feature]))
    values = () if knob.op == "ablate" else (value,)
    return ConceptEdit(f"feature {knob.feature}", (Edit((knob.feature,), knob.op, values),))


# --- plain and steered ------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What one press of the button gave."""

    plain: Piece
    steered: Piece
    scores: Scores | None
    wishes: Mapping[str, str]
    notes: tuple[str, ...]


_last_plain: dict[tuple, Piece] = {}
"""The plain piece of the last order: most presses change the edit alone."""


def perform(
    model: str, order: Order, layer: str, steering: Steering, wishes: Mapping[str, str],
    tick: Tick, device: str = "cpu",
) -> Outcome:  # fmt: skip
    """Draw both pieces and ask the judges; `tick` is told the share of the whole."""
    of, notes = open_model(model, device), []
    key = (model, device, order)
    if key not in _last_plain:
        plain = pieces.draw(of, order, layer, tick=lambda share: tick(0.45 * share))
        _last_plain.clear()
        _last_plain[key] = plain
    plain = _last_plain[key]
    steered = pieces.draw(of, order, layer, steering, lambda share: tick(0.45 + 0.45 * share))
    if np.array_equal(plain.audio, steered.audio):
        notes.append("The edit changed nothing: both pieces are the same.")
    tick(0.9)
    try:
        scores = pieces.judge(open_judges(JUDGES), (plain, steered))
    except FileNotFoundError as error:
        scores = None
        notes.append(f"No scores: {error} (or fetch it: dvc pull {JUDGES}).")
    tick(1.0)
    return Outcome(plain, steered, scores, dict(wishes), tuple(notes))


def int16(piece: Piece) -> tuple[int, np.ndarray]:
    """(rate, int16 [samples]), as players take it."""
    return piece.rate, np.round(32767 * np.clip(piece.audio, -1, 1)).astype(np.int16)


def picture(piece: Piece) -> np.ndarray:
    """Mel spectrogram as grey uint8 [288, 640, 3]: 0 to 8 kHz from bottom to top, dark is loud.

    Noise of the codec alone is not drawn: 43 dB from the loudest point down.
    """
    levels = spectrogram_levels(piece.audio, piece.rate)
    grey = 255 - levels[::-1].astype(np.uint16) * 17
    (height, width), (rows, columns) = (288, 640), grey.shape
    at = np.ix_(np.arange(height) * rows // height, np.arange(width) * columns // width)
    return np.repeat(grey.astype(np.uint8)[at][..., None], 3, 2)


def scores_html(outcome: Outcome) -> str:
    """Both judges' scores as a table, with the notes; all names escaped."""
    notes = "".join(f"<p>{escape(note)}</p>" for note in outcome.notes)
    if outcome.scores is None:
        return notes
    judges = [name.replace("_", " ") for name in outcome.scores]
    head = "".join(f'<th scope="col">{escape(j)}, {k}</th>' for j in judges for k in pieces.KINDS)
    rows = "".join(
        f'<tr><th scope="row">{escape(label.replace("_", " "))}</th>'
        + "".join(f"<td>{'–' if v is None else f'{v:.2f}'}</td>" for v in values)
        + "</tr>"
        for label, values in pieces.score_rows(outcome.scores, outcome.wishes)
    )
    return (
        f'<table class="scores"><caption>Judges: probability of each family</caption><thead><tr>'
        f'<th scope="col">family</th>{head}</tr></thead><tbody>{rows}</tbody></table>'
        "<p>What was asked for, then the likeliest others. One piece's scores are rough.</p>"
        f"{notes}"
    )
