"""Which features are worth maximising: most universal, most a model's own, best for a concept.

Reads the table of match_features through `read_features`, the only place that knows its columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

LEAST_RATE = 1e-3  # of frames: entropies of features that fire more rarely rest on a few frames
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
    """Why it was chosen: universal, specific, concept; direction and mismatched are nulls."""
    concept: str | None = None
    """Best-aligned concept, where one is known."""

    @property
    def name(self) -> str:
        """Such as usae-00012; with numbers joined by "+" where models differ."""
        numbers = dict.fromkeys(self.features)
        return f"{self.kind}-{'+'.join(f'{number:05d}' for number in numbers)}"

    @property
    def is_null(self) -> bool:
        return self.role in ("direction", "mismatched")


def read_features(path: str | Path) -> pd.DataFrame:
    """The table of match_features with `COLUMNS`: one row a (kind, model, feature).

    Rows of kind usae repeat for every model: energy, firing_rate and cofire_proportion are those
    through that model's encoder; firing_entropy (1: as often through each) is the same in all.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run dvc repro match_features")
    table = pd.read_parquet(path)
    if missing := [column for column in COLUMNS if column not in table]:
        raise ValueError(f"{path} lacks the columns {missing}: run dvc repro -f match_features")
    return table[list(COLUMNS)]


def _concept_of(rows: pd.DataFrame) -> str | None:
    """The concept of a feature's rows (one a model) that stands up to correction and has the
    highest AUROC."""
    rows = rows[(rows["concept"] != "") & (rows["concept_p"] <= LEVEL)]
    return None if rows.empty else str(rows["concept"].loc[rows["concept_auroc"].idxmax()])


def _usae(table: pd.DataFrame, models: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of the USAE through `models`; and its live features, one row each.

    Columns of the latter: energy, firing_entropy and cofire_proportion (means over the models;
    unknown counts as 0), rate (the highest), dominant (the model through which it is reached).
    """
    rows = table[(table["kind"] == "usae") & table["model"].isin(models)]
    columns = ["energy", "firing_entropy", "cofire_proportion"]
    found = rows.groupby("feature")[columns].mean().fillna(0.0)
    rates = rows.pivot(index="feature", columns="model", values="firing_rate").fillna(0.0)
    found["rate"], found["dominant"] = rates.max(axis=1), rates.idxmax(axis=1)
    return rows, found[(found["rate"] >= LEAST_RATE) & (found["energy"] > 0)]


def _best(score: pd.Series, count: int, rows: pd.DataFrame, role: str, run: int) -> list[Latent]:
    """The `count` features with the highest score (equal ones: the lower number first)."""
    best = score.sort_values(ascending=False, kind="stable").head(count).index
    return [
        Latent("usae", (int(f),) * run, role, _concept_of(rows[rows["feature"] == f])) for f in best
    ]


def universal(table: pd.DataFrame, models: Sequence[str], count: int, run: int) -> list[Latent]:
    """The USAE features with the largest firing entropy x co-fire proportion x rank of energy.

    The rank is 0..1 over live features. `run`: how many models the search runs on at once.
    """
    rows, found = _usae(table, models)
    rank = found["energy"].rank(pct=True)
    score = found["firing_entropy"] * found["cofire_proportion"] * rank
    return _best(score, count, rows, "universal", run)


def specific(table: pd.DataFrame, models: Sequence[str], model: str, count: int) -> list[Latent]:
    """The USAE features of `model` alone: among those that fire most through it, the largest
    (1 - firing entropy) x rank of the energy that they have there."""
    rows, found = _usae(table, models)
    found = found[found["dominant"] == model]
    mine = rows[rows["model"] == model].set_index("feature")["energy"].reindex(found.index)
    score = (1 - found["firing_entropy"]) * mine.rank(pct=True)
    return _best(score, count, rows, "specific", 1)


def per_concept(table: pd.DataFrame, model: str, count: int) -> list[Latent]:
    """The best SAE feature of each concept, `count` concepts with the highest AUROC.

    Only features whose corrected p is at most `LEVEL`.
    """
    rows = table[(table["kind"] == "sae") & (table["model"] == model)]
    rows = rows[(rows["concept"] != "") & (rows["concept_p"] <= LEVEL)]
    rows = rows.sort_values(["concept_auroc", "feature"], ascending=[False, True], kind="stable")
    rows = rows.drop_duplicates("concept").head(count)
    chosen = zip(rows["feature"], rows["concept"], strict=True)
    return [Latent("sae", (int(feature),), "concept", str(concept)) for feature, concept in chosen]


def choose(
    table: pd.DataFrame, models: Sequence[str], model: str, counts: tuple[int, int, int]
) -> list[Latent]:
    """For one model: `counts` of universal and specific USAE features and of concepts, no feature
    twice. Fewer where the table has no more that qualify."""
    chosen = universal(table, models, counts[0], 1)
    for latent in [
        *specific(table, models, model, counts[1]),
        *per_concept(table, model, counts[2]),
    ]:
        if latent.name not in {other.name for other in chosen}:
            chosen.append(latent)
    return chosen


def mismatched(latents: Sequence[Latent], run: int) -> list[Latent]:
    """The null of a coordinated search: in model i feature number j + i of the list, so that two
    models are asked for two unrelated features at once. None for one model or one feature."""
    if run < 2 or len(latents) < 2:
        return []
    numbers = [latent.features[0] for latent in latents]
    return [
        Latent("usae", tuple(numbers[(j + i) % len(numbers)] for i in range(run)), "mismatched")
        for j in range(len(numbers))
    ]
