"""Feature cards: which features get one, and what stands on it.

Reads data/features (columns: feature_table.py), the dictionaries and activations behind it, and
the index.json of data/maximize_activation/<model> and data/maximize_shared (columns:
maximization_audio.py) where they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from musicscope.core.io import read_json
from musicscope.features import selection as feature_choice
from musicscope.report.moments import (
    Bench,
    Feature,
    Line,
    clip_moment,
    control_remarks,
    feature_curves,
    maximised_moments,
)
from musicscope.report.parts import Card, Moment, Table, plain, short

LEVEL = 0.05
SORT_KEYS = (
    ("energy", "energy", True), ("firing_rate", "firing rate", True),
    ("firing_entropy", "firing entropy", True), ("cofires", "co-fires", True),
    ("match", "best match", True), ("concept_auroc", "concept AUROC", True),
    ("number", "number", False),
)  # fmt: skip


@dataclass(frozen=True)
class Pick:
    """A feature that gets a card; model is "" for the USAE, whose features are all models'."""

    kind: str
    model: str
    number: int
    sets: tuple[tuple[str, str], ...]
    """(key, label)"""

    @property
    def key(self) -> str:
        return anchor(self.kind, self.model, self.number)


def anchor(kind: str, model: str, number: int) -> str:
    """A card's place on the page."""
    return f"usae-{number}" if kind == "usae" else f"sae-{model}-{number}"


def pick(table: pd.DataFrame, models: Sequence[str], count: int) -> list[Pick]:
    """At most `count` features of each set, those with the clearest numbers; none twice.

    Sets: USAE features shared by all models and those of one model; the best SAE feature of each
    concept; SAE features that are common, and each model's own.
    """
    sets: dict[tuple[str, str, int], list[tuple[str, str]]] = defaultdict(list)

    def add(kind: str, model: str, numbers: Sequence[int], key: str, label: str) -> None:
        for number in numbers:
            sets[kind, model, int(number)].append((key, label))

    def latents(found: Sequence[feature_choice.Latent]) -> list[int]:
        return [latent.features[0] for latent in found]

    choice = feature_choice
    add("usae", "", latents(choice.universal(table, models, count, 1)), "shared", "fires for all")
    for model in models:
        found = latents(choice.specific(table, models, model, count))
        add("usae", "", found, f"specific-{model}", f"fires mostly for {model}")
    for model in models:
        rows = table[(table["kind"] == "sae") & (table["model"] == model)]
        found = latents(choice.per_concept(table, model, count))
        add("sae", model, found, f"concept-{model}", f"best for a concept, {model}")
        for name, order in (("common", "partner_correlation"), ("own", "energy")):
            best = rows[rows["set"] == name].sort_values(
                [order, "feature"], ascending=[False, True]
            )["feature"]
            label = f"common, {model}" if name == "common" else f"own to {model}"
            add("sae", model, best.head(count), f"{name}-{model}", label)
    return [Pick(*where, tuple(of)) for where, of in sets.items()]


def _number(value: Any) -> float | None:
    return float(value) if value is not None and np.isfinite(value) and value != -1 else None


def concept_text(row: pd.Series) -> str:
    """The best-aligned concept with AUROC and corrected p, or that none stands up."""
    if not isinstance(row["concept"], str) or not row["concept"]:
        return "not tested: silent or constant"
    name = row["concept"].replace("_", " ")
    auroc = f"AUROC {plain(_number(row['concept_auroc']))}"
    if (held := _number(row.get("concept_heldout_auroc"))) is not None:
        auroc += f" (held-out soundfont {plain(held)})"
    p = _number(row["concept_p"])
    text = f"{name}, {auroc}, corrected p {plain(p)}"
    return text if p is not None and p <= LEVEL else f"none; closest is {text}"


Described = tuple[dict[str, float | None], list[tuple[str, str]], list[tuple[str, str]]]
"""Numbers to sort by, facts, and matches (text, anchor)."""


def _sae_card(row: pd.Series) -> Described:
    numbers = {
        "energy": _number(row["energy"]), "firing_rate": _number(row["firing_rate"]),
        "match": _number(row["best_correlation"]), "number": float(row["feature"]),
        "concept_auroc": _number(row["concept_auroc"]),
    }  # fmt: skip
    facts = [
        ("energy", short(numbers["energy"])),
        ("firing rate", short(numbers["firing_rate"])),
        ("set", row["set"] or "none"),
        ("found by seed 1 (correlation)", plain(_number(row["seed_correlation"]), 2)),
        ("concept", concept_text(row)),
    ]
    matches = []
    if row["partner"] >= 0:
        value = plain(_number(row["partner_correlation"]), 2)
        text = f"{row['partner_model']} SAE feature {row['partner']}: correlation {value}, paired"
        matches.append((text, anchor("sae", row["partner_model"], row["partner"])))
    other = (row["best_model"], row["best"])
    if row["best"] >= 0 and other != (row["partner_model"], row["partner"]):
        value = plain(_number(row["best_correlation"]), 2)
        text = f"{row['best_model']} SAE feature {row['best']}: correlation {value}, most similar"
        matches.append((text, anchor("sae", *other)))
    if row["counterpart"] >= 0:
        value = plain(_number(row["counterpart_cosine"]), 2)
        text = f"Shared feature {row['counterpart']}: decoder cosine {value}"
        matches.append((text, anchor("usae", "", row["counterpart"])))
    return numbers, facts, matches


def _by_model(rows: pd.DataFrame) -> Table:
    """What differs by model of a USAE feature, from one row a model."""
    return Table(
        "By model",
        ("through", "energy", "firing rate", "co-fires / fires"),
        tuple(
            (row["model"], *(short(_number(row[key])) for key in
                             ("energy", "firing_rate", "cofire_proportion")))
            for _, row in rows.iterrows()
        ),
    )  # fmt: skip


def _usae_card(rows: pd.DataFrame) -> Described:
    first = rows.iloc[0]
    strongest = rows.sort_values("concept_auroc", ascending=False, kind="stable").iloc[0]
    numbers = {
        "energy": _number(rows["energy"].mean()),
        "firing_rate": _number(rows["firing_rate"].mean()),
        "firing_entropy": _number(first["firing_entropy"]), "cofires": _number(first["cofires"]),
        "match": _number(rows["counterpart_cosine"].max()), "number": float(first["feature"]),
        "concept_auroc": _number(strongest["concept_auroc"]),
    }  # fmt: skip
    facts = [
        ("firing entropy", plain(numbers["firing_entropy"], 3)),
        ("co-fires (frames)", plain(int(first["cofires"]))),
    ]
    matches = []
    for _, row in rows.iterrows():
        if row["counterpart"] >= 0:
            value = plain(_number(row["counterpart_cosine"]), 2)
            text = f"{row['model']} SAE feature {row['counterpart']}: decoder cosine {value}"
            matches.append((text, anchor("sae", row["model"], row["counterpart"])))
    facts.append(("concept", f"{concept_text(strongest)} (through {strongest['model']})"))
    return numbers, facts, matches


def best_clips(top: pd.DataFrame, features: Sequence[Feature], count: int) -> list[tuple]:
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
    best = [(clip, *max(entries, key=lambda e: e[0])[1:]) for clip, entries in order[:count]]
    return best


def _traces(one: Pick, rows: pd.DataFrame, models: Sequence[str]) -> list[tuple[str, Feature]]:
    """(name, feature) of the curves of a card: the feature itself first; an SAE feature of a
    common set beside its partner."""
    if one.kind == "usae":
        return [(model, ("usae", model, one.number)) for model in models]
    row = rows.iloc[0]
    traces = [(f"{one.model} {one.number}", ("sae", one.model, one.number))]
    if row["set"] in ("common", "partial"):
        name = f"{row['partner_model']} {row['partner']}"
        traces.append((name, ("sae", row["partner_model"], int(row["partner"]))))
    return traces


def cards(
    root: Path, models: Sequence[str], count: int, moments: int, seconds: float
) -> list[Card]:
    """All cards, in the order of `pick`."""
    table = pd.read_parquet(root / "data/features/features.parquet")
    top = pd.read_parquet(root / "data/features/top_clips.parquet")
    picks, bench = pick(table, models, count), Bench.open(root, models)
    rows_of = {}
    for one in picks:
        at = (table["kind"] == one.kind) & (table["feature"] == one.number)
        rows_of[one.key] = table[at & (one.kind == "usae" or table["model"] == one.model)]
    traces = {one.key: _traces(one, rows_of[one.key], models) for one in picks}
    best = {
        one.key: best_clips(
            top, [f for _, f in (traces[one.key] if one.kind == "usae" else traces[one.key][:1])],
            moments,
        )
        for one in picks
    }  # fmt: skip
    curves = feature_curves(
        bench,
        [(f, clip) for key, of in traces.items() for _, f in of for clip, *_ in best[key]],
    )
    tops = top.groupby(["kind", "model", "feature"])["value"].max().to_dict()
    maximised = maximised_of(root, models, {one.key for one in picks}, seconds)

    def moments_of(one: Pick) -> tuple[Moment, ...]:
        found = []
        for number, (clip, model, frame) in enumerate(best[one.key], start=1):
            lines = [
                Line(name, values := curves[f, clip],
                     max(tops.get(f, 0.0), float(values.max())), models.index(f[1]))
                for name, f in traces[one.key]
            ]  # fmt: skip
            found.append(clip_moment(bench, clip, frame, model, lines, seconds, number))
        return tuple(found)

    made = []
    for one in picks:
        rows = rows_of[one.key]
        described = _usae_card(rows) if one.kind == "usae" else _sae_card(rows.iloc[0])
        numbers, facts, matches = described
        shared = one.kind == "usae"
        owner = "Shared" if shared else f"{one.model} SAE"
        shown, others, remarks = maximised.get(one.key, ([], [], []))
        made.append(
            Card(
                one.key, f"{owner} feature {one.number}", one.sets, numbers, tuple(facts),
                _by_model(rows) if shared else None, tuple(matches), moments_of(one),
                tuple(shown), tuple(others), tuple(remarks),
            )
        )  # fmt: skip
    return made


Searched = tuple[list[Moment], list[Moment], list[str]]
"""The best searched input of each run, the others, and remarks on controls."""


def maximised_of(
    root: Path, models: Sequence[str], wanted: set[str], seconds: float
) -> dict[str, Searched]:
    """Searched inputs and remarks on their controls, by card; only runs that are there."""
    found: dict[str, Searched] = {}
    for name in (*(f"maximize_activation/{model}" for model in models), "maximize_shared"):
        folder, path = root / "data" / name, root / "metrics" / f"{name}.json"
        if not (folder / "index.json").is_file():
            continue
        index = read_json(folder / "index.json")
        metrics = read_json(path) if path.is_file() else {}
        for entry in index["features"]:
            model, number = next(iter(entry["numbers"].items()))
            if (key := anchor(entry["kind"], model, number)) not in wanted:
                continue
            best, others, remarks = found.setdefault(key, ([], [], []))
            pieces = maximised_moments(folder, index, entry, models, seconds)
            best += pieces[:1]
            others += pieces[1:]
            numbers = metrics.get("features", {}).get(entry["name"], {})
            remarks += control_remarks(index["models"], numbers, metrics.get("headline", {}))
    return {key: (a, b, list(dict.fromkeys(texts))) for key, (a, b, texts) in found.items()}
