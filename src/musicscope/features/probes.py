"""Does a representation know that there is a guitar? Concept probes with their controls.

For every concept and representation: an L2 logistic probe on pooled features, standardised on
train, with pooling and C chosen by validation AUROC alone; k-sparse probes on SAE codes (the k
latents with the largest |difference of class means| of standardised pooled codes: SAE-Probes,
arXiv 2502.16681; SAEBench); and a null whose training labels are dealt to other compositions.
Reported on test clips of unheard compositions, on the held-out soundfont, and on matched pairs,
with bootstrap intervals over compositions.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from musicscope.core import stats
from musicscope.core.seeding import seed_for
from musicscope.data.splits import (
    CLASS_SETS,
    MAIN,
    PAIR_SETS,
    clip_sets,
    known_blocks,
    label_matrix,
    select_concepts,
)
from musicscope.dictionaries.codes import Pools
from musicscope.features.logistic import Standardiser, fit_logistic


@dataclass(frozen=True)
class Chosen:
    """The probe that validation chose, one a column of labels."""

    scores: np.ndarray
    """Logits of every clip, float64 [clips, m]."""
    pooling: list[str]
    c: np.ndarray
    validation: np.ndarray
    """AUROC on validation [m], by which it was chosen."""


def choose(
    pools: Pools,
    train_labels: np.ndarray,
    validation_labels: np.ndarray,
    train: np.ndarray,
    validation: np.ndarray,
    c_grid: Sequence[float],
) -> Chosen:
    """Fit every pooling x C on train and keep, for each column, the best on validation.

    Args:
        pools: features of all clips. `train` and `validation` are positions in them.
        train_labels: bool [train, m]; `validation_labels`: bool [validation, m].
    Ties go to the earlier pooling and the smaller C. No other clip's label is seen.
    """
    grid = np.sort(np.asarray(c_grid, dtype=np.float64))
    m = train_labels.shape[1]
    best = np.full(m, -1.0)
    pooling, c = [""] * m, np.zeros(m)
    scores = np.zeros((len(next(iter(pools.values()))), m))
    for name, features in pools.items():
        standardise = Standardiser.fit(features[train])
        weights, intercepts = fit_logistic(
            standardise(features[train]), np.repeat(train_labels, len(grid), 1), np.tile(grid, m)
        )
        # Clips with the same features must tie, whatever the order of summation did to them.
        logits = np.round(standardise(features) @ weights + intercepts, 5)
        quality = stats.auroc_columns(
            logits[validation], np.repeat(validation_labels, len(grid), 1)
        )
        quality = np.nan_to_num(quality, nan=0.0).reshape(m, len(grid))
        pick = quality.argmax(1)
        for j in np.flatnonzero(quality.max(1) > best):
            best[j], pooling[j], c[j] = quality[j, pick[j]], name, grid[pick[j]]
            scores[:, j] = logits[:, j * len(grid) + pick[j]]
    return Chosen(scores, pooling, c, best)


def rank_features(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns by falling |difference of class means| in units of their standard deviation, and
    the signed differences [columns] (0 for a constant column). Give training rows only."""
    standardise = Standardiser.fit(features)
    z = standardise(features)
    difference = np.zeros(features.shape[1])
    difference[standardise.columns] = z[labels].mean(0) - z[~labels].mean(0)
    order = np.argsort(-np.abs(difference), kind="stable")
    return order[: len(standardise.columns)], difference


def choose_sparse(
    pools: Pools, labels: np.ndarray, sets: dict[str, np.ndarray], k: Sequence[int], c_grid
) -> dict[int, Chosen]:
    """k-sparse probes of one concept: labels bool [clips] of all clips, k -> `Chosen`."""
    train, validation = sets["train"], sets["validation"]
    orders = {name: rank_features(x[train], labels[train])[0] for name, x in pools.items()}
    return {
        size: choose(
            {name: x[:, np.sort(orders[name][:size])] for name, x in pools.items()},
            labels[train, None],
            labels[validation, None],
            train,
            validation,
            c_grid,
        )
        for size in k
    }


def _entry(values: np.ndarray, name: str) -> dict[str, float]:
    """A statistic and its interval, from its values with weights 1 and in the resamples."""
    low, high = stats.percentile_interval(values[1:])
    prefix = "" if name in ("auroc", "accuracy", "difference") else f"{name}_"
    return {name: float(values[0]), f"{prefix}ci_low": low, f"{prefix}ci_high": high}


class Evaluator:
    """Scores against test labels, with the same resamples of compositions for every probe."""

    def __init__(self, rows: pd.DataFrame, sets: dict[str, np.ndarray], n: int, seed: int) -> None:
        self.sets, self.groups = sets, rows["group"].to_numpy(str)
        self.pairs = rows["pair_id"].to_numpy(str)
        self.names = [s for s in CLASS_SETS if len(sets[s])]
        self.n, self.seed = n, seed_for(seed, "probe", "bootstrap")
        self.weights = {s: self._weights(self.groups[sets[s]]) for s in self.names}

    def _weights(self, groups: np.ndarray) -> np.ndarray:
        """Weights [1 + n, items]: all ones (the clips as they are), then the resamples."""
        resamples = stats.resample_weights(groups, self.n, self.seed)
        return np.concatenate([np.ones((1, len(groups))), resamples])

    def classes(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, dict[str, float]]:
        """{set: AUROC and average precision with intervals}; scores [clips] or a list of seeds,
        scores [clips, seeds], whose statistics are averaged."""
        columns = scores if scores.ndim == 2 else scores[:, None]
        result = {}
        for name in self.names:
            at, weights = self.sets[name], self.weights[name]
            counts = [stats.counts_of(column, labels[at])(weights) for column in columns[at].T]
            result[name] = {}
            for key, value in (
                ("auroc", stats.auroc_from),
                ("average_precision", stats.average_precision_from),
            ):
                result[name] |= _entry(np.mean([value(*c) for c in counts], axis=0), key)
        return result

    def difference(self, a: np.ndarray, b: np.ndarray, labels: np.ndarray) -> dict[str, dict]:
        """{set: AUROC of scores a minus that of scores b}, paired: same resamples for both."""
        result = {}
        for name in self.names:
            at = self.sets[name]
            first, second = (
                stats.auroc_of(scores[at], labels[at])(self.weights[name]) for scores in (a, b)
            )
            result[name] = _entry(first - second, "difference")
        return result

    def pair_accuracy(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, dict[str, float]]:
        """{pair set: share of pairs whose clip with the concept scores higher}."""
        result = {}
        for name in PAIR_SETS:
            if len(at := self.sets[name]):
                wins, groups = stats.pair_wins(
                    scores[at], labels[at], self.pairs[at], self.groups[at]
                )
                result[name] = _entry(stats.mean_of(wins)(self._weights(groups)), "accuracy")
        return result


def run_probes(
    rows: pd.DataFrame,
    representations: dict[str, Pools],
    concepts: Sequence[str],
    k: Sequence[int],
    c_grid: Sequence[float],
    min_positive: int,
    null_seeds: int,
    n_bootstrap: int,
    seed: int,
    workers: int = 1,
) -> dict[str, Any]:
    """The whole table: {"clips", "skipped", "concepts": {concept: {representation: numbers}}}.

    `representations` must hold "sae" and "dense"; their rows are those of `rows`. A concept's
    entry also has "shuffled" (SAE probes of `null_seeds` label shuffles, averaged), "k_sparse"
    and, for each other representation, "sae_minus_<representation>". `workers` threads share the
    concepts; the numbers do not depend on how many. A concept's numbers are of the clips whose
    label is known; where some are not, "unknown" has {concept: {set: clips left out}}.
    """
    sets = clip_sets(rows)
    concepts, skipped = select_concepts(rows, sets, concepts, min_positive)
    has, known = label_matrix(rows, concepts)
    tables, unknown = {}, {}
    for _, columns in known_blocks(known):
        names = [concepts[j] for j in columns]
        told = {name: at[known[at, columns[0]]] for name, at in sets.items()}
        evaluate = Evaluator(rows, told, n_bootstrap, seed)
        tables |= _probe_known(
            evaluate, representations, names, has[:, columns], k, c_grid, null_seeds, seed, workers
        )
        if left := {s: len(at) - len(told[s]) for s, at in sets.items() if len(at) > len(told[s])}:
            unknown |= dict.fromkeys(names, left)
    result = {
        "clips": {name: len(at) for name, at in sets.items()},
        "skipped": skipped,
        "concepts": {concept: tables[concept] for concept in concepts},
    }
    return result | (
        {"unknown": {c: unknown[c] for c in concepts if c in unknown}} if unknown else {}
    )


def _probe_known(
    evaluate: Evaluator,
    representations: dict[str, Pools],
    concepts: Sequence[str],
    labels: np.ndarray,
    k: Sequence[int],
    c_grid: Sequence[float],
    null_seeds: int,
    seed: int,
    workers: int,
) -> dict[str, Any]:
    """{concept: entry} of concepts whose labels [clips, concepts] are known in all the sets."""
    sets = evaluate.sets
    train, validation = sets["train"], sets["validation"]
    groups = evaluate.groups[train]
    shuffles = [
        stats.permute_labels(labels[train], groups, seed_for(seed, "probe", "null", i))
        for i in range(null_seeds)
    ]
    m, fits = len(concepts), {}
    for name, pools in representations.items():
        # The null is one more set of labels for the same inputs: cheap in the same call.
        targets = [labels[train], *(shuffles if name == "sae" else [])]
        fits[name] = choose(
            pools,
            np.concatenate(targets, 1),
            np.tile(labels[validation], (1, len(targets))),
            train,
            validation,
            c_grid,
        )

    def numbers(fit: Chosen, j: int, has: np.ndarray, concept: str) -> dict[str, Any]:
        result: dict[str, Any] = evaluate.classes(fit.scores[:, j], has)
        result |= {"pooling": fit.pooling[j], "c": fit.c[j]}
        result["validation_auroc"] = fit.validation[j]
        return result | (evaluate.pair_accuracy(fit.scores[:, j], has) if concept == MAIN else {})

    def table(j: int) -> dict[str, Any]:
        has, concept = labels[:, j], concepts[j]
        entry: dict[str, Any] = {name: numbers(f, j, has, concept) for name, f in fits.items()}
        entry["shuffled"] = evaluate.classes(fits["sae"].scores[:, m + j :: m], has)
        sparse = choose_sparse(representations["sae"], has, sets, k, c_grid)
        entry["k_sparse"] = {f"{n:03d}": numbers(f, 0, has, concept) for n, f in sparse.items()}
        for name in [name for name in fits if name != "sae"]:
            scores = (fits[other].scores[:, j] for other in ("sae", name))
            entry[f"sae_minus_{name}"] = evaluate.difference(*scores, has)
        entry["positives"] = {s: int(has[at].sum()) for s, at in sets.items()}
        return entry

    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(concepts, pool.map(table, range(m)), strict=True))
