"""Concepts as questions to the clip store, and what the finder's answers are worth on test clips.

A concept is found on train clips. Test clips of unheard compositions then say whether the features
that were found agree with the labels; draws of few recordings say what a user's folder of ten can
show, and draws from clips without the concept on both sides say how often the finder is fooled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from musicscope.core import stats
from musicscope.core.seeding import seed_for
from musicscope.data.clips import HELD_OUT_FONT
from musicscope.data.taxonomy import FAMILIES
from musicscope.finder.statistics import rank_features

PREFIX = "clips:"
TERM = re.compile(r"(?P<no>not )?has_(?P<family>\w+)|(?P<column>\w+)=(?P<value>.+)")
COLUMNS = ("split", "kind", "font", "target_family", "key", "source", "group", "artist")
TOP = 10


def is_query(text: str) -> bool:
    """Whether a concept's side is a question to data/clips rather than a folder."""
    return text.startswith(PREFIX)


def select_query(rows: pd.DataFrame, query: str, split: str, font: str | None = None) -> np.ndarray:
    """Row numbers that a query such as ``clips:has_guitar and not has_drums`` names, ascending.

    `split` applies unless the query has one; so do kind = clip and, with `font`, that soundfont,
    without it any but the held-out one. Clips with an unknown label are neither with nor without.

    Raises:
        ValueError: a term, a family or a column that is not known.
    """
    given, keep = {}, np.ones(len(rows), bool)
    for term in query.removeprefix(PREFIX).split(" and "):
        found = TERM.fullmatch(term.strip())
        if not found or (found["family"] or FAMILIES[0]) not in FAMILIES:
            raise ValueError(
                f"{query!r}: {term.strip()!r} is no term; allowed are has_<family> and not "
                f"has_<family> with {', '.join(FAMILIES)}, and <column>=<value>"
            )
        if found["family"]:
            has = rows[f"has_{found['family']}"]
            keep &= (has == (not found["no"])).fillna(False).to_numpy(bool)
        else:
            given[found["column"]] = found["value"].strip()
    defaults = {"split": split, "kind": "clip", **({"font": font} if font else {})}
    for column, value in {**defaults, **given}.items():
        if column not in COLUMNS or column not in rows:
            raise ValueError(f"{query!r}: no column {column!r}; known: {', '.join(COLUMNS)}")
        keep &= (rows[column].astype(str) == value).to_numpy()
    if font is None and "font" not in given:
        keep &= (rows["font"] != HELD_OUT_FONT).to_numpy()
    return np.flatnonzero(keep)


@dataclass(frozen=True)
class Sets:
    """Clips of one concept, as positions in the clip table."""

    train: np.ndarray
    labels: np.ndarray
    """[train] bool"""
    tests: Mapping[str, tuple[np.ndarray, np.ndarray]]
    """"test" and "heldout_font" -> positions and labels; only those with both kinds of clips"""


def concept_sets(rows: pd.DataFrame, positive: str, negative: str) -> Sets:
    """Train, test and held-out-font clips of a concept given by two queries.

    ValueError where a train clip is on both sides, or a side has fewer than two.
    """

    def sides(*which: str) -> tuple[np.ndarray, np.ndarray]:
        with_, without = (select_query(rows, query, *which) for query in (positive, negative))
        if both := np.intersect1d(with_, without).tolist():
            raise ValueError(f"{positive!r} and {negative!r} share {len(both)} clips")
        return np.concatenate([with_, without]), np.arange(len(with_) + len(without)) < len(with_)

    train, labels = sides("train")
    if min(labels.sum(), (~labels).sum()) < 2:
        raise ValueError(
            f"{positive!r} has {labels.sum()} train clips, {negative!r} {(~labels).sum()}: at "
            "least two of each are needed; change the query, or raise "
            "prepare_data.timgm6mb_clips.train"
        )
    tests = {"test": sides("test"), "heldout_font": sides("test", HELD_OUT_FONT)}
    fixed = any("split=" in query for query in (positive, negative))
    return Sets(
        train, labels,
        {
            name: (at, has) for name, (at, has) in tests.items()
            if not fixed and 0 < has.sum() < len(has)
        },
    )  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Section find_concept of params.yaml, as far as it is about clips."""

    q: float
    permutations: int
    draws: int
    few: int
    few_draws: int
    bootstrap: int
    seed: int


def examine(
    means: np.ndarray, groups: np.ndarray, sets: Sets, options: Options, *name: str
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The table of a concept's features, and its numbers for the metrics.

    `means` [clips, F] and `groups` [clips] are of all clips, in the order of the clip table; those
    that no set names are not read.
    """
    seed = seed_for(options.seed, "find_concept", *name)
    x, labels = means[sets.train], sets.labels
    table = rank_features(x, labels, options.permutations, options.draws, seed, groups[sets.train])
    found = table["q"] <= options.q
    metrics: dict[str, Any] = {
        "with": int(labels.sum()), "without": int((~labels).sum()), "tested": len(table),
        "discoveries": int(found.sum()),
    }  # fmt: skip
    if len(table):
        best = table.iloc[0]
        metrics["best"] = {k: best[k] for k in ("effect_size", "auroc", "q", "stability")}
        metrics["best"]["feature"] = int(best["feature"])
    on_test: dict[str, np.ndarray] = {}
    for test, (at, has) in sets.tests.items():
        auroc = stats.auroc_columns(means[at][:, table["feature"]], has)
        on_test[test] = auroc
        table[f"{test}_auroc"] = auroc
        metrics[test] = _agreement(
            means[at][:, table["feature"].head(TOP)], has, groups[at], auroc, found.to_numpy(),
            options, seed,
        )  # fmt: skip
    metrics["few"] = few_recordings(x, labels, table, on_test.get("test"), options, seed)
    metrics["null"] = nothing_to_find(x[~labels], groups[sets.train][~labels], options, seed)
    return table, metrics


def _agreement(
    best: np.ndarray, labels: np.ndarray, groups: np.ndarray, auroc: np.ndarray,
    found: np.ndarray, options: Options, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Do test clips agree? AUROC of the best feature with its interval, mean of the best `TOP` and
    of all tested features (the control), and of the discoveries and the share above 1/2."""
    result: dict[str, Any] = {"clips": len(labels), "tested_auroc": np.nanmean(auroc)}
    if best.shape[1]:
        low, high = stats.bootstrap_groups(
            stats.auroc_of(best[:, 0], labels), groups, options.bootstrap, seed_for(seed, "test")
        )
        result |= {"best_auroc": auroc[0], "best_ci_low": low, "best_ci_high": high}
        result["top_auroc"] = np.nanmean(auroc[:TOP])
    if found.any():
        result["found_auroc"] = np.nanmean(auroc[found])
        result["found_above_half"] = np.mean(auroc[found] > 0.5)
    return result


def few_recordings(
    x: np.ndarray, labels: np.ndarray, table: pd.DataFrame, test_auroc: np.ndarray | None,
    options: Options, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """What draws of `options.few` clips a side show of the table made from all of them.

    any_discovery: share of draws in which something is found; discoveries: their mean number;
    agree: share of these that all clips find as well; top_agree: share of the best `TOP` of a draw
    that are among the best 10 % of all; chance is 0.1; top_test_auroc: their mean on test clips.
    """
    sides = [np.flatnonzero(labels), np.flatnonzero(~labels)]
    n = min(options.few, *map(len, sides))
    whole = set(table["feature"][table["q"] <= options.q])
    upper = set(table["feature"].head(max(TOP, len(table) // 10)))
    of_test = None if test_auroc is None else dict(zip(table["feature"], test_auroc, strict=True))
    counts, agree, top, scores = [], [], [], []
    for draw in range(options.few_draws):
        rng = np.random.default_rng(seed_for(seed, "few", draw))
        at = np.concatenate([rng.choice(side, n, replace=False) for side in sides])
        own = rank_features(x[at], labels[at], options.permutations, 1, seed_for(seed, "p", draw))
        found = own["feature"][own["q"] <= options.q]
        counts.append(len(found))
        agree += [f in whole for f in found]
        best = own["feature"].head(TOP)
        top += [f in upper for f in best]
        if of_test is not None:
            scores += [of_test[f] for f in best if f in of_test]
    return {
        "recordings": n, "draws": options.few_draws, "any_discovery": np.mean(np.array(counts) > 0),
        "discoveries": np.mean(counts), "agree": np.mean(agree) if agree else None,
        "top_agree": np.mean(top) if top else None,
        "top_test_auroc": np.nanmean(scores) if scores else None,
    }  # fmt: skip


def nothing_to_find(
    x: np.ndarray, groups: np.ndarray, options: Options, seed: int
) -> dict[str, Any]:
    """The finder on two sets of clips that both lack the concept.

    any_discovery: share of draws of `options.few` a side in which anything is found; at most q is
    promised. discoveries: found between all clips of a random half of the compositions and all of
    the others.
    """
    n = min(options.few, len(x) // 2)
    counts = []
    for draw in range(options.few_draws if n >= 2 else 0):
        rng = np.random.default_rng(seed_for(seed, "null", draw))
        at = rng.choice(len(x), 2 * n, replace=False)
        own = rank_features(
            x[at], np.arange(2 * n) < n, options.permutations, 1, seed_for(seed, "null p", draw)
        )
        counts.append(int((own["q"] <= options.q).sum()))
    names = np.unique(groups)
    half = np.random.default_rng(seed_for(seed, "null", "all")).permutation(names)[::2]
    labels = np.isin(groups, half)
    whole = None
    if min(labels.sum(), (~labels).sum()) >= 2:
        # Whole compositions change sides, so they are what is dealt.
        own = rank_features(
            _by_group(x, groups), np.isin(names, half), options.permutations, 1, seed
        )
        whole = int((own["q"] <= options.q).sum())
    return {
        "recordings": n, "draws": len(counts), "discoveries": whole,
        "any_discovery": np.mean(np.array(counts) > 0) if counts else None,
    }  # fmt: skip


def _by_group(x: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Mean of x [items, F] over the items of each group, groups sorted by name."""
    names, member = np.unique(groups, return_inverse=True)
    total = np.zeros((len(names), x.shape[1]))
    np.add.at(total, member, x)
    return total / np.bincount(member)[:, None]
