"""Feature cards from data/features, data/clips and the searched inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from musicscope.data.clips import ClipStore
from musicscope.features import moments
from musicscope.features.moments import Feature, Pick
from musicscope.features.selection import LEVEL
from musicscope.report.elements import Card, Moment, Table
from musicscope.report.metrics import Sources, plain, short
from musicscope.report.searched import Searched, searched
from musicscope.report.snippets import Line, excerpt

SETS = {
    "shared": "fires for all", "specific": "fires mostly for {}",
    "concept": "best for a concept, {}", "common": "common, {}", "own": "own to {}",
}  # fmt: skip
"""Label of each set of features.moments, with the model for {}."""

PAGES = "../feature_pages/index.html"

Described = tuple[dict[str, float | None], list[tuple[str, str]], list[tuple[str, str]]]
"""Numbers to sort by, facts, and matches (text, anchor)."""


def anchor(kind: str, model: str, number: int) -> str:
    """A card's place on the page."""
    return f"usae-{number}" if kind == "usae" else f"sae-{model}-{number}"


def number_of(value: float | None) -> float | None:
    """None for the codes of a missing number in features.parquet."""
    return float(value) if value is not None and np.isfinite(value) and value != -1 else None


def concept_text(row: pd.Series | Mapping[str, Any]) -> str:
    """The best-aligned concept with AUROC and corrected p, or that none is significant."""
    if not isinstance(row["concept"], str) or not row["concept"]:
        return "not tested: silent or constant"
    name = row["concept"].replace("_", " ")
    auroc = f"AUROC {plain(number_of(row['concept_auroc']))}"
    if (held := number_of(row.get("concept_heldout_auroc"))) is not None:
        auroc += f" (held-out soundfont {plain(held)})"
    p = number_of(row["concept_p"])
    text = f"{name}, {auroc}, corrected p {plain(p)}"
    return text if p is not None and p <= LEVEL else f"none; closest is {text}"


def _sae(row: pd.Series) -> Described:
    numbers = {
        "energy": number_of(row["energy"]), "firing_rate": number_of(row["firing_rate"]),
        "match": number_of(row["best_correlation"]), "number": float(row["feature"]),
        "concept_auroc": number_of(row["concept_auroc"]),
    }  # fmt: skip
    facts = [
        ("energy", short(numbers["energy"])),
        ("firing rate", short(numbers["firing_rate"])),
        ("set", row["set"] or "none"),
        ("found by seed 1 (correlation)", plain(number_of(row["seed_correlation"]), 2)),
        ("in other seeds (decoder cosine)", plain(number_of(row["seed_cosine"]), 2)),
        ("concept", concept_text(row)),
    ]
    matches = []
    partner, best = ((row[f"{name}_model"], row[name]) for name in ("partner", "best"))
    for other, key, what in (
        (partner, "partner_correlation", "paired"),
        (best, "best_correlation", "most similar"),
    ):
        if other[1] >= 0 and (other is partner or other != partner):
            value = plain(number_of(row[key]), 2)
            text = f"{other[0]} SAE feature {other[1]}: correlation {value}, {what}"
            matches.append((text, anchor("sae", *other)))
    if row["counterpart"] >= 0:
        value = plain(number_of(row["counterpart_cosine"]), 2)
        text = f"Shared feature {row['counterpart']}: decoder cosine {value}"
        matches.append((text, anchor("usae", "", row["counterpart"])))
    return numbers, facts, matches


def _usae(rows: pd.DataFrame) -> Described:
    first = rows.iloc[0]
    strongest = rows.sort_values("concept_auroc", ascending=False, kind="stable").iloc[0]
    numbers = {
        "energy": number_of(rows["energy"].mean()),
        "firing_rate": number_of(rows["firing_rate"].mean()),
        "firing_entropy": number_of(first["firing_entropy"]),
        "cofires": number_of(first["cofires"]),
        "match": number_of(rows["counterpart_cosine"].max()), "number": float(first["feature"]),
        "concept_auroc": number_of(strongest["concept_auroc"]),
    }  # fmt: skip
    facts = [
        ("firing entropy", plain(numbers["firing_entropy"], 3)),
        ("co-fires (frames)", plain(int(first["cofires"]))),
        ("concept", f"{concept_text(strongest)} (through {strongest['model']})"),
    ]
    matches = []
    for _, row in rows.iterrows():
        if row["counterpart"] >= 0:
            value = plain(number_of(row["counterpart_cosine"]), 2)
            text = f"{row['model']} SAE feature {row['counterpart']}: decoder cosine {value}"
            matches.append((text, anchor("sae", row["model"], row["counterpart"])))
    return numbers, facts, matches


def _by_model(rows: pd.DataFrame) -> Table:
    """Numbers of a USAE feature that differ by model, from one row per model."""
    keys = ("energy", "firing_rate", "cofire_proportion")
    return Table(
        "By model",
        ("through", "energy", "firing rate", "co-fires / fires"),
        tuple(
            (row["model"], *(short(number_of(row[key])) for key in keys))
            for _, row in rows.iterrows()
        ),
    )


def _clip_row(clips: ClipStore, clip: str) -> int:
    """Row of a clip id in the clip table."""
    found = np.flatnonzero((clips.rows["id"] == clip).to_numpy())
    if len(found) != 1:
        raise ValueError(f"data/clips has {len(found)} clips {clip}: run dvc repro")
    return int(found[0])


def _clip_moment(
    clips: ClipStore, clip: str, lines: Sequence[Line], frame_rate: float, frame: int,
    seconds: float, number: int,
) -> Moment:  # fmt: skip
    """The excerpt of a clip around a frame; `number` counts a card's moments from 1."""
    row = _clip_row(clips, clip)
    peaks = [(line.name, short(float(line.values.max()))) for line in lines]
    peak = ", ".join(f"{value} ({name})" for name, value in peaks) if peaks[1:] else peaks[0][1]
    return excerpt(
        clips.audio([row])[0], clips.sample_rate, frame_rate, frame, seconds, lines,
        str(clips.rows["caption"].iloc[row] or clip),
        lambda start, end: f"{clip}, {start:.2f} to {end:.2f} s, peak {peak}", f"moment {number}",
    )  # fmt: skip


def page_of(slot: str, kind: str, model: str, number: int) -> str:
    """Address of a feature's page, from the report."""
    return f"{PAGES}#{'-'.join(filter(None, (kind, model, slot)))}/{number}"


def cards(sources: Sources, count: int, clips_shown: int, seconds: float) -> list[Card]:
    """All cards, in the order of `moments.pick`.

    Args:
        count: most cards per set of features.
        clips_shown: real clips per card.
        seconds: length of each excerpt.

    Raises:
        ValueError: data/features/moments.parquet has no curve of a feature that is to be shown.
    """
    folder, models = sources.root / "data/features", sources.models
    table = pd.read_parquet(folder / "features.parquet")
    top = pd.read_parquet(folder / "top_clips.parquet")
    curves, frame_rate = moments.read(folder / "moments.parquet")
    tops = top.groupby(["kind", "model", "feature"])["value"].max().to_dict()
    clips, picks = ClipStore.open(sources.root / "data/clips"), moments.pick(table, models, count)
    keys = {(p.kind, p.model, p.number): anchor(p.kind, p.model, p.number) for p in picks}
    found = searched(sources, keys, seconds)
    slot = (sources.metrics("match_features") or {}).get("slot", sources.slots[0])

    def line(one: Pick, trace: Feature, clip: str) -> Line:
        kind, model, number = trace
        if (values := curves.get((trace, clip))) is None:
            raise ValueError(
                f"data/features/moments.parquet has no {kind} feature {number} of {model} in {clip}"
                f": set report.cards to at most {moments.MOST} and report.moments to at most "
                "match_features.top_clips"
            )
        name = model if one.kind == "usae" else f"{model} {number}"
        highest = max(tops.get(trace, 0.0), float(values.max()))
        return Line(name, values, highest, models.index(model))

    made = []
    for one in picks:
        key, rows, traces = keys[one.kind, one.model, one.number], one.rows(table), one.traces(
            table, models
        )  # fmt: skip
        numbers, facts, matches = _usae(rows) if one.kind == "usae" else _sae(rows.iloc[0])
        excerpts = [
            _clip_moment(
                clips, clip, [line(one, t, clip) for t in traces], frame_rate, frame, seconds, n
            )
            for n, (clip, _, frame) in enumerate(
                one.best_clips(table, top, models, clips_shown), start=1
            )
        ]
        of = found.get(key, Searched([], [], []))
        owner = "Shared" if one.kind == "usae" else f"{one.model} SAE"
        made.append(
            Card(
                key, f"{owner} feature {one.number}",
                tuple((f"{s}-{m}" if m else s, SETS[s].format(m)) for s, m in one.sets),
                numbers, tuple(facts), _by_model(rows) if one.kind == "usae" else None,
                tuple(matches), tuple(excerpts), tuple(of.best), tuple(of.others),
                tuple(of.remarks), page_of(slot, one.kind, one.model, one.number),
            )
        )  # fmt: skip
    return made
