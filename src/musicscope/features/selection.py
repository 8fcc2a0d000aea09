"""Select features to maximise: the most universal, a model's own, the best for each concept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

LEAST_RATE = 1e-3
"""Least share of frames; the entropy of a rarer feature is estimated from too few frames."""
LEVEL = 0.05
COLUMNS = (
    "kind", "model", "feature", "energy", "firing_rate", "firing_entropy", "cofire_proportion",
    "concept", "concept_auroc", "concept_p",
)  # fmt: skip


@dataclass(frozen=True)
class Latent:
    """A feature to maximise, in one model or in several at once."""

    kind: str
    """sae, usae, or direction: a random one, the null."""
    features: tuple[int, ...]
    """Its number in each model of the run."""
    role: str
    """Why it was selected: universal, specific, concept; direction and mismatched are nulls."""
    concept: str | None = None
    """Best-aligned concept, if any."""

    @property
    def name(self) -> str:
        """Such as usae-00012; with numbers joined by "+" where models differ."""
        numbers = dict.fromkeys(self.features)
        return f"{self.kind}-{'+'.join(f'{number:05d}' for number in numbers)}"

    @property
    def is_null(self) -> bool:
        return self.role in ("direction", "mismatched")


def read_features(path: str | Path) -> pd.DataFrame:
    """Read `COLUMNS` of the table of match_features: one row per (kind, model, feature).

    Rows of kind usae repeat for every model: energy, firing_rate and cofire_proportion are through
    that model's encoder; firing_entropy (1: as often through each) is the same in all.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run dvc repro match_features")
    table = pd.read_parquet(path)
    if missing := [column for column in COLUMNS if column not in table]:
        raise ValueError(f"{path} lacks the columns {missing}: run dvc repro -f match_features")
    return table[list(COLUMNS)]


def _significant(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with a concept at corrected p <= `LEVEL`, the highest AUROC first."""
    rows = rows[(rows["concept"] != "") & (rows["concept_p"] <= LEVEL)]
    return rows.sort_values(["concept_auroc", "feature"], ascending=[False, True], kind="stable")


def _usae(table: pd.DataFrame, models: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of the USAE through `models`; and its live features, one row each.

    Columns of the latter: energy, firing_entropy and cofire_proportion (means over the models;
    missing counts as 0), rate (the highest), dominant (the model of that rate).
    """
    rows = table[(table["kind"] == "usae") & table["model"].isin(models)]
    columns = ["energy", "firing_entropy", "cofire_proportion"]
    live = rows.groupby("feature")[columns].mean().fillna(0.0)
    rates = rows.pivot(index="feature", columns="model", values="firing_rate").fillna(0.0)
    live["rate"], live["dominant"] = rates.max(axis=1), rates.idxmax(axis=1)
    return rows, live[(live["rate"] >= LEAST_RATE) & (live["energy"] > 0)]


def _best(score: pd.Series, count: int, rows: pd.DataFrame, role: str, run: int) -> list[Latent]:
    """The `count` features with the highest score (equal ones: the lower number first)."""
    latents = []
    for feature in score.sort_values(ascending=False, kind="stable").head(count).index:
        concepts = _significant(rows[rows["feature"] == feature])["concept"]
        concept = None if concepts.empty else str(concepts.iloc[0])
        latents.append(Latent("usae", (int(feature),) * run, role, concept))
    return latents


def universal(table: pd.DataFrame, models: Sequence[str], count: int, run: int) -> list[Latent]:
    """Select USAE features by firing entropy x co-fire proportion x rank of energy, highest first.

    The rank is 0..1 over live features. `run`: how many models the search runs on at once.
    """
    rows, live = _usae(table, models)
    rank = live["energy"].rank(pct=True)
    score = live["firing_entropy"] * live["cofire_proportion"] * rank
    return _best(score, count, rows, "universal", run)


def specific(table: pd.DataFrame, models: Sequence[str], model: str, count: int) -> list[Latent]:
    """Select USAE features of `model` by (1 - firing entropy) x rank of energy, highest first.

    Only features that fire most often through `model`.
    """
    rows, live = _usae(table, models)
    live = live[live["dominant"] == model]
    energy = rows[rows["model"] == model].set_index("feature")["energy"].reindex(live.index)
    score = (1 - live["firing_entropy"]) * energy.rank(pct=True)
    return _best(score, count, rows, "specific", 1)


def per_concept(table: pd.DataFrame, model: str, count: int) -> list[Latent]:
    """Select the best SAE feature of each concept, for the `count` concepts of highest AUROC.

    Only features whose corrected p is at most `LEVEL`.
    """
    rows = _significant(table[(table["kind"] == "sae") & (table["model"] == model)])
    rows = rows.drop_duplicates("concept").head(count)
    pairs = zip(rows["feature"], rows["concept"], strict=True)
    return [Latent("sae", (int(feature),), "concept", str(concept)) for feature, concept in pairs]


def choose(
    table: pd.DataFrame, models: Sequence[str], model: str, counts: tuple[int, int, int]
) -> list[Latent]:
    """Select `counts` of universal and specific USAE features and of concepts for one model.

    No feature twice; fewer if the table has no more that qualify.
    """
    selected: dict[str, Latent] = {}
    for latent in [
        *universal(table, models, counts[0], 1),
        *specific(table, models, model, counts[1]),
        *per_concept(table, model, counts[2]),
    ]:
        selected.setdefault(latent.name, latent)
    return list(selected.values())


def mismatched(latents: Sequence[Latent], run: int) -> list[Latent]:
    """Make the null of a coordinated search: in model i feature number j + i of the list.

    Two models are thus asked for two unrelated features at once. Empty for one model or feature.
    """
    if run < 2 or len(latents) < 2:
        return []
    numbers = [latent.features[0] for latent in latents]
    return [
        Latent("usae", tuple(numbers[(j + i) % len(numbers)] for i in range(run)), "mismatched")
        for j in range(len(numbers))
    ]
