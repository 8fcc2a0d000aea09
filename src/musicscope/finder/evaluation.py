"""Evaluate the finder on clips: do test labels agree, do ten recordings suffice, is it fooled?

Features are found on train clips. Test clips of other compositions then show whether these features
agree with the labels. Draws of a few recordings show what a user's folder of ten can give. Draws of
clips that all lack the concept show how often the finder reports a feature where there is none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from musicscope.config.concepts import FindConcept
from musicscope.core import stats
from musicscope.core.io import Metrics
from musicscope.core.seeding import seed_for
from musicscope.data.clips import HELD_OUT_FONT
from musicscope.data.taxonomy import FAMILIES
from musicscope.features.association import rank_by_auroc

PREFIX = "clips:"
TERM = re.compile(r"(?P<no>not )?has_(?P<family>\w+)|(?P<column>\w+)=(?P<value>.+)")
COLUMNS = ("split", "kind", "font", "target_family", "key", "source", "group", "artist")


def is_query(text: str) -> bool:
    """Tell whether one side of a concept is a query to data/clips rather than a folder."""
    return text.startswith(PREFIX)


def select_query(rows: pd.DataFrame, query: str, split: str, font: str | None = None) -> np.ndarray:
    """Select row numbers, ascending, by a query such as ``clips:has_guitar and not has_drums``.

    Defaults, unless the query names the column: `split`, kind = clip, and the soundfont `font`
    (None: any but the held-out one). Clips without a label match neither has_ nor not has_.

    Raises:
        ValueError: an unknown term, family or column.
    """
    conditions, keep = {}, np.ones(len(rows), bool)
    for term in query.removeprefix(PREFIX).split(" and "):
        parts = TERM.fullmatch(term.strip())
        if not parts or (parts["family"] or FAMILIES[0]) not in FAMILIES:
            raise ValueError(
                f"{query!r}: {term.strip()!r} is no term; allowed are has_<family> and not "
                f"has_<family> with {', '.join(FAMILIES)}, and <column>=<value>"
            )
        if parts["family"]:
            has = rows[f"has_{parts['family']}"]
            keep &= (has == (not parts["no"])).fillna(False).to_numpy(bool)
        else:
            conditions[parts["column"]] = parts["value"].strip()
    defaults = {"split": split, "kind": "clip", **({"font": font} if font else {})}
    for column, value in {**defaults, **conditions}.items():
        if column not in COLUMNS or column not in rows:
            raise ValueError(f"{query!r}: no column {column!r}; allowed: {', '.join(COLUMNS)}")
        keep &= (rows[column].astype(str) == value).to_numpy()
    if font is None and "font" not in conditions:
        keep &= (rows["font"] != HELD_OUT_FONT).to_numpy()
    return np.flatnonzero(keep)


@dataclass(frozen=True)
class Sets:
    """Clips of one concept, as positions in the clip table."""

    train: np.ndarray
    labels: np.ndarray
    """[train] bool"""
    tests: Mapping[str, tuple[np.ndarray, np.ndarray]]
    """"test" and "heldout_font" -> positions and labels; only sets with both kinds of clips"""

    @property
    def used(self) -> np.ndarray:
        """Positions of all these clips, ascending."""
        return np.unique(np.concatenate([self.train, *(at for at, _ in self.tests.values())]))


def concept_sets(rows: pd.DataFrame, positive: str, negative: str) -> Sets:
    """Select train, test and held-out-font clips of a concept given by two queries.

    ValueError if a clip is on both sides, or a side has fewer than two train clips.
    """

    def sides(split: str, font: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        with_, without = (select_query(rows, query, split, font) for query in (positive, negative))
        if both := np.intersect1d(with_, without).tolist():
            raise ValueError(f"{positive!r} and {negative!r} share {len(both)} clips")
        return np.concatenate([with_, without]), np.arange(len(with_) + len(without)) < len(with_)

    train, labels = sides("train")
    if min(labels.sum(), (~labels).sum()) < 2:
        raise ValueError(
            f"{positive!r} has {labels.sum()} train clips, {negative!r} {(~labels).sum()}: at "
            "least two of each are needed; change the query, or raise "
            "prepare_data.clips.train"
        )
    if any("split=" in query for query in (positive, negative)):
        return Sets(train, labels, {})
    tests = {"test": sides("test"), "heldout_font": sides("test", HELD_OUT_FONT)}
    both = {name: (at, has) for name, (at, has) in tests.items() if 0 < has.sum() < len(has)}
    return Sets(train, labels, both)


# --- concepts as queries to the clip table ------------------------------------------------------

TOP = 10


def examine(
    means: np.ndarray, groups: np.ndarray, sets: Sets, section: FindConcept, seed: int, *name: str
) -> tuple[pd.DataFrame, Metrics]:
    """Rank a concept's features and evaluate them: the table, and the numbers for the metrics.

    `means` [clips, F] and `groups` [clips] are of all clips, in the order of the clip table; clips
    in no set are not read. `name` makes the seed differ between concepts.
    """
    seed = seed_for(seed, "find_concept", *name)
    x, labels, train_groups = means[sets.train], sets.labels, groups[sets.train]
    table = rank_by_auroc(
        x, labels, section.permutations, section.stability_draws, seed, train_groups
    )
    significant = (table["q"] <= section.q).to_numpy()
    metrics: Metrics = {
        "with": int(labels.sum()), "without": int((~labels).sum()), "tested": len(table),
        "discoveries": int(significant.sum()),
    }  # fmt: skip
    if len(table):
        best = table.iloc[0]
        metrics["best"] = {k: best[k] for k in ("effect_size", "auroc", "q", "stability")}
        metrics["best"]["feature"] = int(best["feature"])
    aurocs: dict[str, np.ndarray] = {}
    for test, (at, has) in sets.tests.items():
        scores = means[at][:, table["feature"]]
        auroc = aurocs[test] = table[f"{test}_auroc"] = stats.auroc_columns(scores, has)
        metrics[test] = {"clips": len(has), "tested_auroc": np.nanmean(auroc)}
        if len(table):
            best_auroc = stats.estimate(
                stats.auroc_of(scores[:, 0], has), groups[at], section.bootstrap,
                seed_for(seed, "test"), "AUROC",
            )  # fmt: skip
            metrics[test]["best_auroc"] = best_auroc.as_dict()
            metrics[test]["top_auroc"] = np.nanmean(auroc[:TOP])
        if significant.any():
            metrics[test]["found_auroc"] = np.nanmean(auroc[significant])
            metrics[test]["found_above_half"] = np.mean(auroc[significant] > 0.5)
    metrics["few"] = few_recordings(x, labels, table, aurocs.get("test"), section, seed)
    metrics["null"] = without_concept(x[~labels], train_groups[~labels], section, seed)
    return table, metrics


def few_recordings(
    x: np.ndarray,
    labels: np.ndarray,
    table: pd.DataFrame,
    test_auroc: np.ndarray | None,
    section: FindConcept,
    seed: int,
) -> dict[str, object]:
    """Compare draws of `section.few` clips per side with the table made from all clips.

    any_discovery: share of draws with any discovery; discoveries: their mean number; agree: share
    of these that are discoveries on all clips as well; top_agree: share of the best `TOP` of a draw
    that are among the best 10 % of all (chance: 0.1); top_test_auroc: their mean on test clips.
    """
    sides = [np.flatnonzero(labels), np.flatnonzero(~labels)]
    n = min(section.few, *map(len, sides))
    whole = set(table["feature"][table["q"] <= section.q])
    upper = set(table["feature"].head(max(TOP, len(table) // 10)))
    auroc = {} if test_auroc is None else dict(zip(table["feature"], test_auroc, strict=True))
    counts, agree, top, scores = [], [], [], []
    for draw in range(section.few_draws):
        rng = np.random.default_rng(seed_for(seed, "few", draw))
        at = np.concatenate([rng.choice(side, n, replace=False) for side in sides])
        few = rank_by_auroc(x[at], labels[at], section.permutations, 1, seed_for(seed, "p", draw))
        significant, best = few["feature"][few["q"] <= section.q], few["feature"].head(TOP)
        counts.append(len(significant))
        agree += [f in whole for f in significant]
        top += [f in upper for f in best]
        scores += [auroc[f] for f in best if f in auroc]
    return {
        "recordings": n, "draws": section.few_draws,
        "any_discovery": np.mean(np.array(counts) > 0) if counts else None,
        "discoveries": np.mean(counts) if counts else None,
        "agree": np.mean(agree) if agree else None,
        "top_agree": np.mean(top) if top else None,
        "top_test_auroc": np.nanmean(scores) if scores else None,
    }  # fmt: skip


def without_concept(
    x: np.ndarray, groups: np.ndarray, section: FindConcept, seed: int
) -> dict[str, object]:
    """Run the finder on two sets of clips that both lack the concept: the null.

    any_discovery: share of draws of `section.few` clips per side with any discovery, at most q if
    the test holds its level. discoveries: their number between all clips of a random half of the
    compositions and all others.
    """
    n = min(section.few, len(x) // 2)

    def discoveries(means: np.ndarray, labels: np.ndarray, stream: int) -> int:
        table = rank_by_auroc(means, labels, section.permutations, 1, stream)
        return int((table["q"] <= section.q).sum())

    counts = []
    for draw in range(section.few_draws if n >= 2 else 0):
        rng = np.random.default_rng(seed_for(seed, "null", draw))
        at = rng.choice(len(x), 2 * n, replace=False)
        counts.append(discoveries(x[at], np.arange(2 * n) < n, seed_for(seed, "null p", draw)))
    names, member = np.unique(groups, return_inverse=True)
    half = np.random.default_rng(seed_for(seed, "null", "all")).permutation(names)[::2]
    labels, whole = np.isin(groups, half), None
    if min(labels.sum(), (~labels).sum()) >= 2:
        # Whole compositions change sides, so compositions are what is permuted.
        total = np.zeros((len(names), x.shape[1]))
        np.add.at(total, member, x)
        means = total / np.bincount(member)[:, None]
        whole = discoveries(means, np.isin(names, half), seed)
    return {
        "recordings": n, "draws": len(counts), "discoveries": whole,
        "any_discovery": np.mean(np.array(counts) > 0) if counts else None,
    }  # fmt: skip
