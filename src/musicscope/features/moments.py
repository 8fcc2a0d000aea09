"""Activations over time in the clips where a feature is highest: data/features/moments.parquet.

One row per curve, of the features that the report may show (`pick`) and of the features that are
drawn beside them (`traces`), in their best test clips (`best_clips`):

kind, model, feature, clip   as in features.parquet and top_clips.parquet
frame_rate                   frames per second
frames                       frames of the clip
at, values                   frames on which the feature is active, and its value there
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

from musicscope.core.io import atomic_file
from musicscope.features import selection

MOST = 64
"""Features per set that get curves, the upper limit of report.cards in params.yaml."""
Feature = tuple[str, str, int]
"""kind ("sae" or "usae"), model, number"""
Curves = dict[tuple[Feature, str], np.ndarray]
"""(feature, clip id): activation [frames], 0 where the code leaves the feature out"""


class ClipCodes(Protocol):
    """The part of dictionaries.codes.Codes that curves are cut from."""

    @property
    def matrix(self) -> csr_array:
        """[frames of all clips, F]"""

    @property
    def frames(self) -> np.ndarray:
        """[clips] frames of each clip"""


@dataclass(frozen=True)
class Pick:
    """A feature to show; `model` is "" for the USAE, whose features belong to all models."""

    kind: str
    model: str
    number: int
    sets: tuple[tuple[str, str], ...]
    """(shared, specific, concept, common or own; model or "")"""

    def rows(self, table: pd.DataFrame) -> pd.DataFrame:
        """Rows of the feature in features.parquet: one, or one per model for the USAE."""
        at = (table["kind"] == self.kind) & (table["feature"] == self.number)
        return table[at & (self.kind == "usae" or table["model"] == self.model)]

    def traces(self, table: pd.DataFrame, models: Sequence[str]) -> list[Feature]:
        """Features to draw: this one first; an SAE feature of a common set with its partner."""
        if self.kind == "usae":
            return [("usae", model, self.number) for model in models]
        row, found = self.rows(table).iloc[0], [("sae", self.model, self.number)]
        if row["set"] in ("common", "partial"):
            found.append(("sae", str(row["partner_model"]), int(row["partner"])))
        return found

    def best_clips(
        self, table: pd.DataFrame, top: pd.DataFrame, models: Sequence[str], count: int
    ) -> list[tuple[str, str, int]]:
        """(clip, model, frame) of the best clips, over all models for the USAE."""
        traces = self.traces(table, models)
        return best_clips(top, traces if self.kind == "usae" else traces[:1], count)


def pick(table: pd.DataFrame, models: Sequence[str], count: int) -> list[Pick]:
    """Choose at most `count` features per set, with the clearest numbers; no feature twice.

    Sets: USAE features shared by all models and specific to one model; the best SAE feature per
    concept; SAE features that are common, and those found in one model only (own).
    """
    sets: dict[tuple[str, str, int], list[tuple[str, str]]] = defaultdict(list)

    def add(kind: str, model: str, found: Iterable[int], name: str, of: str) -> None:
        for number in found:
            sets[kind, model, int(number)].append((name, of))

    def numbers(found: Sequence[selection.Latent]) -> list[int]:
        return [latent.features[0] for latent in found]

    add("usae", "", numbers(selection.universal(table, models, count, 1)), "shared", "")
    for model in models:
        found = numbers(selection.specific(table, models, model, count))
        add("usae", "", found, "specific", model)
    for model in models:
        rows = table[(table["kind"] == "sae") & (table["model"] == model)]
        add("sae", model, numbers(selection.per_concept(table, model, count)), "concept", model)
        for name, order in (("common", "partner_correlation"), ("own", "energy")):
            best = rows[rows["set"] == name].sort_values(
                [order, "feature"], ascending=[False, True]
            )["feature"]
            add("sae", model, best.head(count), name, model)
    return [Pick(*where, tuple(of)) for where, of in sets.items()]


def best_clips(
    top: pd.DataFrame, features: Sequence[Feature], count: int
) -> list[tuple[str, str, int]]:
    """(clip, model, frame) of the best clips of one feature, or of one USAE feature in all models.

    Clips are ranked by the mean over models of value / the model's highest value; a clip that is
    not among a model's best counts 0 there. The frame is that of the model with the larger share.
    """
    found: dict[str, list[tuple[float, str, int]]] = defaultdict(list)
    for kind, model, number in features:
        at = (top["kind"] == kind) & (top["model"] == model) & (top["feature"] == number)
        rows = top[at].sort_values("rank")
        for row in rows.itertuples():
            found[row.clip].append((row.value / rows["value"].max(), model, int(row.frame)))
    order = sorted(found.items(), key=lambda item: (-sum(s for s, *_ in item[1]), item[0]))
    return [(clip, *max(entries, key=lambda e: e[0])[1:]) for clip, entries in order[:count]]


def wanted(
    table: pd.DataFrame, top: pd.DataFrame, models: Sequence[str], clips: int
) -> list[tuple[Feature, str]]:
    """(feature, clip id) of every curve that the report may draw, `clips` clips per feature."""
    found: dict[tuple[Feature, str], None] = {}
    for one in pick(table, models, MOST):
        traces, best = one.traces(table, models), one.best_clips(table, top, models, clips)
        found |= {(trace, clip): None for clip, *_ in best for trace in traces}
    return list(found)


def cut(
    codes: Mapping[tuple[str, str], ClipCodes],
    clips: Sequence[str],
    wanted: Iterable[tuple[Feature, str]],
) -> Curves:
    """Cut curves out of codes.

    Args:
        codes: {(model, kind): codes of `clips`}.
        clips: clip ids in the order of the codes.
        wanted: (feature, clip id) of each curve.
    """
    place = {clip: i for i, clip in enumerate(clips)}
    by_clip: dict[tuple[str, str, str], set[int]] = defaultdict(set)
    for (kind, model, number), clip in wanted:
        by_clip[kind, model, clip].add(number)
    curves: Curves = {}
    for (kind, model, clip), numbers in sorted(by_clip.items()):
        of, i, columns = codes[model, kind], place[clip], sorted(numbers)
        end = int(of.frames[: i + 1].sum())
        dense = of.matrix[end - int(of.frames[i]) : end][:, columns].toarray()
        for number, values in zip(columns, dense.T, strict=True):
            curves[(kind, model, number), clip] = values
    return curves


def write(path: str | Path, curves: Curves, frame_rate: float) -> None:
    """Write curves as Parquet, the frames of value 0 left out."""
    rows = [
        (*feature, clip, frame_rate, len(values), np.flatnonzero(values), values[values != 0])
        for (feature, clip), values in curves.items()
    ]
    columns = ["kind", "model", "feature", "clip", "frame_rate", "frames", "at", "values"]
    with atomic_file(path) as temporary:
        pd.DataFrame(rows, columns=columns).to_parquet(temporary, index=False)


def read(path: str | Path) -> tuple[Curves, float]:
    """Curves and their frame rate (frames per second).

    Raises:
        FileNotFoundError: the file is missing; the message names the stage that writes it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing: run dvc repro match_features")
    table, curves = pd.read_parquet(path), {}
    columns = ["kind", "model", "feature", "clip", "frames", "at", "values"]
    for *latent, clip, frames, at, fired in table[columns].itertuples(index=False):
        values = np.zeros(frames, np.float32)
        values[at] = fired
        curves[tuple(latent), clip] = values
    return curves, float(table["frame_rate"].iloc[0]) if len(table) else 1.0
