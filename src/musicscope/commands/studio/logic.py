"""Logic of the studio without its page; needs no Gradio.

Bad input raises ValueError or FileNotFoundError with a text for the user; `Cancelled` ends a job.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from musicscope.commands.generate import JUDGES
from musicscope.core.io import read_json
from musicscope.finder.run import RankedSound, find_concept, rank_sound
from musicscope.judges.pair import load_judges
from musicscope.report.snippets import data_uri, mp3, spectrogram_levels
from musicscope.steering.edit import ConceptEdit, Edit, Steering
from musicscope.steering.found import FoundConcept, FoundLatent, latents_of, sae_digest
from musicscope.steering.recipes import (
    FULL_FOLDER,
    GROUNDED,
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
from musicscope.steering.subjects import edit_prompt

LONGEST = 30.0
"""Maximum seconds per sound."""
SLOT = "top1"
LEAST_FILES, MOST_FILES = 2, 200
"""Recordings per side."""
AUDIBLE, MOMENTS = 16, 3
"""Number of best features that can be steered; moments per feature."""
PLAYED = 4
"""Best features whose moments can be heard."""
RANGE = 2.0
"""Ends of a concept's slider: this many times the chosen strength, off and on."""
EMPTY_PROMPT = (
    "No prompt: the model plays without a caption, so guidance has no effect and nothing says that "
    "a concept is in the music. Name what is to be switched off."
)


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


# --- what is known of a concept -----------------------------------------------------------------


def standing(model: str) -> dict[str, str]:
    """Say of each concept how far its slider can be trusted: grounding, and monotone prompts.

    Grounding is in the recipes; the share of prompts whose gain rises with the strength is in the
    metrics of the same stage, where they are there and of this model.
    """
    folder, texts = recipe_folder(model), {}
    stage = "steer_full" if folder.parts[:2] == Path(FULL_FOLDER).parts else "steer"
    path = Path("metrics") / stage / f"{model}.json"
    measured = read_json(path).get("concepts", {}) if path.is_file() else {}
    for concept, directions in known_concepts(model).items():
        grounding, parts = load_recipe(folder, concept).grounding, []
        if grounding is not None:
            doubt = "" if grounding >= GROUNDED else ", the model hardly plays it on request"
            parts.append(f"{'⚠ ' if doubt else ''}grounding {grounding:.2f}{doubt}")
        shares = {}
        for direction in directions:
            curve = measured.get(concept, {}).get(direction, {}).get("curves", {}).get("sae", {})
            if curve.get("monotone_share") is not None:
                shares[direction] = f"{direction} {100 * curve['monotone_share']:.0f} %"
        if shares:
            parts.append(f"monotone prompts: {', '.join(shares.values())}")
        texts[concept] = " · ".join(parts)
    return texts


def request_of(value: float | None) -> tuple[str, float] | None:
    """Read a slider from off (below 0) to on (above 0): direction and strength; 0 is neither."""
    if not value:
        return None
    return ("off" if value < 0 else "on"), abs(_number("strength", value))


def slider_range(directions: Sequence[str]) -> tuple[float, float]:
    """Ends of the slider of a concept with these directions."""
    return (-RANGE if "off" in directions else 0.0), (RANGE if "on" in directions else 0.0)


def names(prompt: str, concept: str) -> bool:
    """Whether a prompt names a concept, other than as "no guitar"."""
    word = re.escape(concept.replace("_", " "))
    return bool(re.search(rf"(?<!no )(?<!without )\b{word}s?\b", prompt, re.IGNORECASE))


def with_named(prompt: str | None, off: Sequence[str]) -> str:
    """Add concepts that are switched off to a prompt that lacks them; an empty one stays empty."""
    prompt = prompt or ""
    missing = {concept: "on" for concept in off if not names(prompt, concept)}
    return edit_prompt(prompt, missing) + "." if prompt.strip() and missing else prompt


def prompt_notes(prompt: str, requests: Mapping[str, str]) -> list[str]:
    """Explain an empty prompt, and one that lacks what is switched off."""
    if not prompt:
        return [EMPTY_PROMPT]
    off = [c for c, direction in requests.items() if direction == "off" and not names(prompt, c)]
    return [
        f"The prompt does not name {c.replace('_', ' ')}, which is switched off: it may be in "
        "neither sound." for c in off
    ]  # fmt: skip


def time_left(seconds: float, share: float) -> str:
    """Say how long a job still takes, from the time that it has taken for a share of it."""
    if share < 0.02:
        return "working"
    left = seconds * (1 - share) / share
    return f"{left:.0f} s left" if left < 90 else f"{left / 60:.0f} min left"


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
    steered: Sound | None
    """None: not yet there."""
    scores: Scores | None
    requests: Mapping[str, str]
    notes: tuple[str, ...]


def perform(
    model: str, source: TextInput, layer: str, steering: Steering, requests: Mapping[str, str],
    tick: Tick, device: str = "cpu",
) -> Iterator[Outcome]:  # fmt: skip
    """Draw both sounds and judge them: yield the plain one, then both, then all with scores.

    `tick` gets the share that is done.
    """
    session, known = open_session(model, device), known_concepts(model)
    notes = prompt_notes(source.prompt, requests)
    notes += doubts(recipe_folder(model), [c for c in requests if c in known])
    asked = dict(requests)
    plain = session.plain(source, layer, lambda share: tick(0.45 * share))
    yield Outcome(plain, None, None, asked, tuple(notes))
    pair = (plain, session.draw(source, layer, steering, lambda share: tick(0.45 * (1 + share))))
    yield Outcome(*pair, None, asked, tuple(notes))
    if pair[0].same_as(pair[1]):
        notes.append("The edit changed nothing: both sounds are the same.")
    tick(0.9)
    try:
        scores = judge(open_judges(JUDGES), pair)
    except FileNotFoundError as error:
        scores = None
        notes.append(f"No scores: {error} (or fetch it: dvc pull {JUDGES}).")
    tick(1.0)
    yield Outcome(*pair, scores, asked, tuple(notes))


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
class Found:
    """Features of a concept in recordings, ready to steer with."""

    concept: FoundConcept
    text: str
    page: str
    """HTML: the best features, with excerpts to hear"""


def gather(paths: Sequence[str] | None, folder: Path, what: str, least: int) -> Path:
    """Copy uploaded files under numbered names; ValueError for too few or too many."""
    paths = paths or ()
    if not least <= len(paths) <= MOST_FILES:
        raise ValueError(
            f"{len(paths)} recordings {what}: {least} to {MOST_FILES} are needed, ten to "
            "find anything"
        )
    folder.mkdir()
    for i, path in enumerate(paths):
        shutil.copyfile(path, folder / f"{i:03d}-{Path(path).name}")
    return folder


def find(
    model: str, with_: Sequence[str] | None, without: Sequence[str] | None, tick: Tick,
    seconds: float = 10.0, device: str = "cpu", slot: str = SLOT,
) -> Found:  # fmt: skip
    """Find features that separate two lists of recordings; see `finder.run.find_concept`.

    Without recordings of the second kind, rank the features of the first; see `rank_sound`.
    """
    layer, sae = load_sae(model, slot, device)
    digest = sae_digest(sae_folder(model, slot))
    with TemporaryDirectory(prefix="musicscope-") as root:
        least = LEAST_FILES if without else 1
        folder = gather(with_, Path(root) / "with", "with the concept", least)
        session = open_session(model, device)
        options: dict[str, Any] = {
            "seconds": seconds, "audible": AUDIBLE, "moments": MOMENTS, "tick": tick,
        }  # fmt: skip
        try:
            if without:
                other = gather(without, Path(root) / "without", "without it", least)
                report = find_concept(session.model, sae, folder, other, layer, **options)
                latents = latents_of(report.table, report.usual["sae"], report.q)
                discoveries, text = len(report.discoveries()), report.text(rows=10)
            else:
                means = _training_means(model)
                report = rank_sound(session.model, sae, folder, layer, *means, **options)
                latents = tuple(
                    FoundLatent(f, 1, float(report.usual[f]), math.nan, math.nan)
                    for f in report.table["feature"].head(AUDIBLE).tolist()
                )
                discoveries, text = 0, _sound_text(report, len(with_ or ()))
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(str(error).replace(f"{root}/", "")) from error
    concept = FoundConcept("found", model, layer, slot, "", digest, discoveries, latents)
    page = excerpts_html(report.table, report.moments, report.excerpts, session.model.sample_rate)
    return Found(concept, text.replace(f"{root}/", ""), page)


def _training_means(model: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean [F] of each feature on the training clips, over all frames and where it fires."""
    try:
        statistics = _any_recipe(model).statistics
    except StopIteration:
        raise ValueError(
            f"{model} has no recipes, whose clips a single sound is compared with: add recordings "
            "without it, or run dvc repro steer"
        ) from None
    typical = (statistics["mean_with"].numpy() + statistics["mean_without"].numpy()) / 2
    return typical, usual_values(model)


def _sound_text(report: RankedSound, files: int) -> str:
    lines = [
        f"{files} recordings, and none without the concept: features by how far they are above "
        "their mean on the training clips. This is no test: add ten recordings with it and ten "
        "without it to learn which features carry the concept."
    ]
    lines += [f"left out: {p.name}: {p.reason} {p.detail}".rstrip() for p in report.problems]
    return "\n".join([*lines, report.table.head(10).to_string(index=False, float_format="%.3g")])


def excerpts_html(
    table: pd.DataFrame, moments: pd.DataFrame, excerpts: Mapping[str, np.ndarray], rate: int
) -> str:
    """Format the best features with a player per top moment."""
    rows = []
    measure = "auroc" if "auroc" in table else "excess"
    for feature, value in zip(table["feature"].head(PLAYED), table[measure], strict=False):
        files = moments.loc[moments["feature"] == feature, "file"]
        sounds = (data_uri("audio/mpeg", mp3(excerpts[file], rate)) for file in files)
        players = "".join(f'<audio controls preload="none" src="{uri}"></audio>' for uri in sounds)
        rows.append(
            f'<tr><th scope="row">{int(feature)}</th><td>{value:.2f}</td><td>{players}</td></tr>'
        )
    return (
        '<table class="scores excerpts"><caption>Best features: where they are highest</caption>'
        f'<thead><tr><th scope="col">feature</th><th scope="col">{measure}</th>'
        f'<th scope="col">excerpts</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def plan_found(
    found: Found | None, direction: str, n: float, strength: float,
    branch: str = "conditional", device: str = "cpu",
) -> tuple[str, Steering]:  # fmt: skip
    """Make hook point and edit of the best `n` features: ablated, or raised to usual values.

    Strength 1 reaches these values, 0 changes nothing.
    """
    if found is None:
        raise ValueError("find a concept first")
    concept = found.concept
    if not concept.latents:
        raise ValueError("no feature fires in these recordings: nothing to steer with")
    edit = concept.edit(direction, float(strength), int(n))
    return concept.layer, Steering(concept.load_sae(device), (edit,), branch)
