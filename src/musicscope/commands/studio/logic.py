"""Logic of the studio without its page; needs no Gradio.

Bad input raises ValueError or FileNotFoundError with a text for the user; `Cancelled` ends a job.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import pandas as pd

from musicscope.commands.generate import JUDGES
from musicscope.finder.run import find_concept
from musicscope.judges.pair import load_judges
from musicscope.report.snippets import spectrogram_levels
from musicscope.steering.edit import ConceptEdit, Edit, Steering
from musicscope.steering.recipes import (
    Recipe,
    doubts,
    load_recipe,
    load_sae,
    load_steering,
    recipe_folder,
    sae_folder,
)
from musicscope.steering.session import (
    Scores,
    Session,
    Sound,
    TextInput,
    Tick,
    check_requests,
    judge,
    known_concepts,
    known_models,
    score_table,
)

LONGEST = 30.0
"""Maximum seconds per sound."""
SLOT = "top1"
LEAST_FILES, MOST_FILES = 2, 200
"""Recordings per side."""
AUDIBLE, MOMENTS = 16, 3
"""Number of best features that can be steered; moments per feature that give its peak."""


class Cancelled(Exception):
    """The user has cancelled the job."""


def ticking(report: Tick, cancelled: Callable[[], bool]) -> Tick:
    """Pass the share to `report`; raise `Cancelled` once `cancelled()` is true."""

    def tick(share: float) -> None:
        if cancelled():
            raise Cancelled
        report(share)

    return tick


open_session = lru_cache(maxsize=1)(Session.open)
"""One model at a time stays in memory."""
open_judges = lru_cache(maxsize=1)(load_judges)


def models_with_sae(slot: str = SLOT) -> list[str]:
    """List models under data/models that have an SAE; models with concepts come first."""
    models = (m for m in known_models() if (sae_folder(m, slot) / "config.json").is_file())
    return sorted(models, key=lambda model: not known_concepts(model))


def all_concepts(models: Sequence[str]) -> list[str]:
    """List the concepts that any of the models can be steered with."""
    return list(dict.fromkeys(c for m in models for c in known_concepts(m)))


def asked(query: Mapping[str, str], models: Sequence[str]) -> tuple[str | None, int | None]:
    """Model and single feature in the page's address, ?model=NAME&feature=NUMBER.

    None for each part that is absent or of no use, such as the feature of an unknown model.
    """
    model, feature = query.get("model"), query.get("feature", "")
    if model is not None and model not in models:
        return None, None
    return model, int(feature) if feature.isascii() and feature.isdigit() else None


# --- requests ---------------------------------------------------------------------------------


class FeatureEdit(NamedTuple):
    """One operation on one feature."""

    feature: int
    op: str
    """One of `musicscope.steering.edit.TARGETS`."""
    value: float
    """Multiple of the usual activation, the mean over frames where it fires; scale: the factor."""


def _number(name: str, value: float | None, whole: bool = False) -> float:
    """Check a field of the page, which is None where it is empty."""
    if value is None or not math.isfinite(value):
        raise ValueError(f"{name}: give a number")
    if whole and value != int(value):
        raise ValueError(f"{name} {value:g}: give a whole number")
    return float(value)


def input_of(
    prompt: str | None, seconds: float | None, seed: float | None, guidance: float | None
) -> TextInput:
    """Check the fields of the page; empty guidance is the model's own."""
    if (length := _number("seconds", seconds)) > LONGEST:
        raise ValueError(f"{length:g} seconds: up to {LONGEST:g} here")
    return TextInput((prompt or "").strip(), length, int(_number("seed", seed, True)), guidance)


def feature_of(feature: float | None, op: str, value: float | None) -> FeatureEdit | None:
    """Check one row of the page; None if it names no feature."""
    if feature is None:
        return None
    if (number := int(_number("feature", feature, True))) < 0:
        raise ValueError(f"feature {number}: give a whole number from 0")
    return FeatureEdit(number, op, _number(f"value of feature {number}", value))


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
        strengths = {concept: strength for concept, (_, strength) in requests.items()}
        layer, steering = load_steering(model, directions, strengths, branch=branch, device=device)
    else:
        layer, sae = load_sae(model, _any_recipe(model).slot, device)
        steering = Steering(sae, (), branch or "conditional")
    single = tuple(_single_edit(edit, usual_values(model)) for edit in features)
    return layer, replace(steering, concepts=steering.concepts + single)


def _any_recipe(model: str) -> Recipe:
    return load_recipe(recipe_folder(model), next(iter(known_concepts(model))))


def usual_values(model: str) -> np.ndarray:
    """Mean activation [F] of each feature where it fires, on the training clips of the recipes."""
    statistics = _any_recipe(model).statistics
    return np.maximum(*(statistics[f"active_{side}"].numpy() for side in ("with", "without")))


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
    session, known = open_session(model, device), known_concepts(model)
    notes = doubts(recipe_folder(model), [c for c in requests if c in known])
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
    heads, rows = score_table(outcome.scores, outcome.requests)
    body = "".join(
        f'<tr><th scope="row">{escape(label.replace("_", " "))}</th>'
        + "".join(f"<td>{'–' if v is None else f'{v:.2f}'}</td>" for v in values)
        + "</tr>"
        for label, values in rows
    )
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("family", *heads))
    return (
        '<table class="scores"><caption>Judges: probability of each family</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        "<p>Requested families, then the most probable others. Scores of one sound are rough.</p>"
        f"{notes}"
    )


# --- concepts in uploaded recordings ----------------------------------------------------------


@dataclass(frozen=True)
class FoundConcept:
    """Features of a concept in recordings, ready to steer with."""

    model: str
    slot: str
    table: pd.DataFrame
    """`association.COLUMNS`, best first"""
    peaks: Mapping[int, float]
    """Feature -> mean of its highest values in recordings with the concept"""
    text: str


def gather(paths: Sequence[str] | None, folder: Path, what: str) -> Path:
    """Copy uploaded files under numbered names; ValueError for too few or too many."""
    paths = paths or ()
    if not LEAST_FILES <= len(paths) <= MOST_FILES:
        raise ValueError(
            f"{len(paths)} recordings {what}: {LEAST_FILES} to {MOST_FILES} are needed, ten to "
            "find anything"
        )
    folder.mkdir()
    for i, path in enumerate(paths):
        shutil.copyfile(path, folder / f"{i:03d}-{Path(path).name}")
    return folder


def find(
    model: str, with_: Sequence[str] | None, without: Sequence[str] | None, tick: Tick,
    seconds: float = 10.0, device: str = "cpu", slot: str = SLOT,
) -> FoundConcept:  # fmt: skip
    """Find features that separate two lists of recordings; see `finder.run.find_concept`."""
    layer, sae = load_sae(model, slot, device)
    with TemporaryDirectory(prefix="musicscope-") as root:
        sides = (
            gather(with_, Path(root) / "with", "with the concept"),
            gather(without, Path(root) / "without", "without it"),
        )
        try:
            report = find_concept(
                open_session(model, device).model, sae, *sides, layer, seconds=seconds,
                audible=AUDIBLE, moments=MOMENTS, tick=tick,
            )  # fmt: skip
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(str(error).replace(f"{root}/", "")) from error
    moments = report.moments[report.moments["dictionary"] == "sae"]
    peaks = {int(f): float(rows["value"].mean()) for f, rows in moments.groupby("feature")}
    text = report.text(rows=10).replace(f"{root}/", "")
    return FoundConcept(model, slot, report.table, peaks, text)


def plan_found(
    found: FoundConcept | None, direction: str, n: float, strength: float,
    branch: str = "conditional", device: str = "cpu",
) -> tuple[str, Steering]:  # fmt: skip
    """Make hook point and edit: the best `n` features ablated (off), or raised to their peaks (on).

    Strength 1 reaches these values, 0 changes nothing.
    """
    if found is None:
        raise ValueError("find a concept first")
    chosen = [int(f) for f in found.table["feature"].head(int(n)) if int(f) in found.peaks]
    if not chosen:
        raise ValueError("no feature fires in these recordings: nothing to steer with")
    layer, sae = load_sae(found.model, found.slot, device)
    edits = {
        "off": Edit(tuple(chosen), "ablate"),
        "on": Edit(tuple(chosen), "clamp_min", tuple(found.peaks[f] for f in chosen)),
    }
    concept = ConceptEdit(f"found {direction}", (edits[direction],), float(strength))
    return layer, Steering(sae, (concept,), branch)
