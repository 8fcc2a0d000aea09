"""Logic of the studio without its page; needs no Gradio.

Bad input raises ValueError or FileNotFoundError with a text for the user; `Cancelled` ends a job.
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
from musicscope.steering.edit import ConceptEdit, Edit, Steering
from musicscope.steering.recipes import load_recipe, load_steering, recipe_folder, sae_folder
from musicscope.steering.session import (
    KINDS,
    Scores,
    Session,
    Sound,
    TextInput,
    Tick,
    check_requests,
    judge,
    known_concepts,
    known_models,
    score_rows,
)

LONGEST = 30.0
"""Maximum seconds per sound."""
SLOT = "top1"


class Cancelled(Exception):
    """The user has cancelled the job."""


def ticking(report: Tick, cancelled: Callable[[], bool]) -> Tick:
    """Pass the share to `report`; raise `Cancelled` once `cancelled()` is true."""

    def tick(share: float) -> None:
        if cancelled():
            raise Cancelled
        report(share)

    return tick


# --- models and concepts ----------------------------------------------------------------------


def models_with_sae(slot: str = SLOT) -> list[str]:
    """List models under data/models that have an SAE; models with concepts come first."""
    models = (m for m in known_models() if (sae_folder(m, slot) / "config.json").is_file())
    return sorted(models, key=lambda model: not known_concepts(model))


def all_concepts(models: Sequence[str]) -> list[str]:
    """List the concepts that any of the models can be steered with."""
    return list(dict.fromkeys(c for m in models for c in known_concepts(m)))


def sae_of(model: str, slot: str = SLOT, device: str = "cpu") -> tuple[str, TopKSAE]:
    """Load hook point and SAE of a slot."""
    folder = sae_folder(model, slot)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is missing: run dvc repro train_sae, or dvc pull it")
    layer = read_json(folder / "config.json").get("trainer", {}).get("layer")
    if not isinstance(layer, str):
        raise ValueError(f"{folder}/config.json names no hook point as trainer.layer: retrain it")
    return layer, TopKSAE.load(folder, device)


open_session = lru_cache(maxsize=1)(Session.open)
"""One model at a time stays in memory."""
open_judges = lru_cache(maxsize=1)(load_judges)


# --- requests ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureEdit:
    """One operation on one feature."""

    feature: int
    op: str
    """One of `musicscope.steering.edit.TARGETS`."""
    value: float
    """Multiple of the usual activation, the mean over frames where it fires; scale: the factor."""


def input_of(prompt: Any, seconds: Any, seed: Any, guidance: Any) -> TextInput:
    """Check the fields of the page; empty guidance is the model's own."""
    for name, value in (("seconds", seconds), ("seed", seed)):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name}: give a number")
    if seed != int(seed):
        raise ValueError(f"seed {seed:g}: give a whole number")
    if seconds > LONGEST:
        raise ValueError(f"{seconds:g} seconds: up to {LONGEST:g} here")
    return TextInput(str(prompt or "").strip(), float(seconds), int(seed), guidance)


def feature_of(feature: Any, op: str, value: Any) -> FeatureEdit | None:
    """Check one row of the page; None if it names no feature."""
    if feature is None or feature == "":
        return None
    if not isinstance(feature, int | float) or feature != int(feature) or feature < 0:
        raise ValueError(f"feature {feature}: give a whole number from 0")
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"feature {int(feature)}: give a value")
    return FeatureEdit(int(feature), op, float(value))


def plan(
    model: str, requests: Mapping[str, tuple[str, float]], features: Sequence[FeatureEdit] = (),
    branch: str | None = None, device: str = "cpu",
) -> tuple[str, Steering]:  # fmt: skip
    """Make hook point and edits from {"guitar": ("off", 1.0)} and single features, at one layer.

    A strength is a multiple of the strength chosen on validation prompts.
    """
    directions = {concept: direction for concept, (direction, _) in requests.items()}
    if not directions and not features:
        raise ValueError("switch a concept off or on, or name a feature")
    check_requests(model, directions)
    if directions:
        layer, steering = load_steering(model, directions, branch=branch, device=device)
        strengths = [strength for _, strength in requests.values()]
        concepts = tuple(
            replace(c, strength=c.strength * s)
            for c, s in zip(steering.concepts, strengths, strict=True)
        )
        steering = replace(steering, concepts=concepts)
    else:
        recipe = load_recipe(recipe_folder(model), next(iter(known_concepts(model))))
        sae = TopKSAE.load(sae_folder(model, recipe.slot), device)
        layer, steering = recipe.layer, Steering(sae, (), branch or "conditional")
    single = tuple(_single_edit(edit, usual_values(model)) for edit in features)
    return layer, replace(steering, concepts=steering.concepts + single)


def usual_values(model: str) -> np.ndarray:
    """Mean activation [F] of each feature where it fires, on the training clips of the recipes."""
    recipe = load_recipe(recipe_folder(model), next(iter(known_concepts(model))))
    sides = (recipe.statistics[f"active_{side}"] for side in ("with", "without"))
    return np.maximum(*(side.numpy() for side in sides))


def _single_edit(edit: FeatureEdit, usual: np.ndarray) -> ConceptEdit:
    if edit.feature >= len(usual):
        raise ValueError(f"feature {edit.feature}: the SAE has 0 to {len(usual) - 1}")
    value = edit.value * (1.0 if edit.op == "scale" else float(usual[edit.feature]))
    values = () if edit.op == "ablate" else (value,)
    return ConceptEdit(f"feature {edit.feature}", (Edit((edit.feature,), edit.op, values),))


# --- plain and steered ------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Result of one job."""

    plain: Sound
    steered: Sound
    scores: Scores | None
    requests: Mapping[str, str]
    notes: tuple[str, ...]


def perform(
    model: str, source: TextInput, layer: str, steering: Steering, requests: Mapping[str, str],
    tick: Tick, device: str = "cpu",
) -> Outcome:  # fmt: skip
    """Draw both sounds and judge them; `tick` gets the share that is done."""
    session, notes = open_session(model, device), []
    pair = session.draw_pair(source, layer, steering, lambda share: tick(0.9 * share))
    if pair[0].same_as(pair[1]):
        notes.append("The edit changed nothing: both sounds are the same.")
    tick(0.9)
    try:
        scores = judge(open_judges(JUDGES), pair)
    except FileNotFoundError as error:
        scores = None
        notes.append(f"No scores: {error} (or fetch it: dvc pull {JUDGES}).")
    tick(1.0)
    return Outcome(*pair, scores, dict(requests), tuple(notes))


def int16(sound: Sound) -> tuple[int, np.ndarray]:
    """Convert to (rate, int16 [samples]) for players."""
    return sound.rate, np.round(32767 * np.clip(sound.audio, -1, 1)).astype(np.int16)


def picture(sound: Sound) -> np.ndarray:
    """Draw a mel spectrogram in grey, uint8 [288, 640, 3]: 0 to 8 kHz upwards, dark is loud.

    The range is 43 dB from the loudest point, so that noise of the codec is not visible.
    """
    levels = spectrogram_levels(sound.audio, sound.rate)
    grey = 255 - levels[::-1].astype(np.uint16) * 17
    (height, width), (rows, columns) = (288, 640), grey.shape
    at = np.ix_(np.arange(height) * rows // height, np.arange(width) * columns // width)
    return np.repeat(grey.astype(np.uint8)[at][..., None], 3, 2)


def scores_html(outcome: Outcome) -> str:
    """Format both judges' scores as a table, with the notes; all names are escaped."""
    notes = "".join(f"<p>{escape(note)}</p>" for note in outcome.notes)
    if outcome.scores is None:
        return notes
    judges = [name.replace("_", " ") for name in outcome.scores]
    head = "".join(f'<th scope="col">{escape(j)}, {k}</th>' for j in judges for k in KINDS)
    rows = "".join(
        f'<tr><th scope="row">{escape(label.replace("_", " "))}</th>'
        + "".join(f"<td>{'–' if v is None else f'{v:.2f}'}</td>" for v in values)
        + "</tr>"
        for label, values in score_rows(outcome.scores, outcome.requests)
    )
    return (
        f'<table class="scores"><caption>Judges: probability of each family</caption><thead><tr>'
        f'<th scope="col">family</th>{head}</tr></thead><tbody>{rows}</tbody></table>'
        "<p>Requested families, then the most probable others. Scores of one sound are rough.</p>"
        f"{notes}"
    )
