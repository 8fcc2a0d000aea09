"""Does a representation know that there is a guitar? Concept probes with their controls.

For every concept and representation: an L2 logistic probe on pooled features, standardised on
train, with pooling and C chosen by validation AUROC alone; k-sparse probes on SAE codes (the k
latents with the largest |difference of class means| of standardised pooled codes: SAE-Probes,
arXiv 2502.16681; SAEBench); and a null whose training and validation labels are permuted between
compositions, so that pooling and C are chosen on permuted labels too. Reported on test clips of
unseen compositions, on those of unseen sources and of the held-out soundfont, and on matched pairs,
with bootstrap intervals over compositions; `musicscope.features.transfer` leaves out whole families
of sounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd

from musicscope.config.analysis import Probe
from musicscope.core import stats
from musicscope.core.io import Metrics
from musicscope.core.seeding import seed_for
from musicscope.core.stats import Estimate
from musicscope.data.splits import (
    CLASS_SETS,
    MAIN,
    PAIR_SETS,
    clip_sets,
    label_blocks,
    label_matrix,
    select_concepts,
)
from musicscope.dictionaries.codes import Pools
from musicscope.features import transfer
from musicscope.features.association import rank_by_difference
from musicscope.features.logistic import Standardiser, fit_logistic

UNITS = {
    "auroc": "AUROC",
    "difference": "AUROC",
    "average_precision": "average precision",
    "accuracy": "share",
}


BASELINE_SPARSE = 16
"""Largest k of the k-sparse probes on the codes of baselines."""


@dataclass(frozen=True)
class Chosen:
    """Probes chosen on validation, one per column of labels."""

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
    kept: np.ndarray | None = None,
) -> Chosen:
    """Fit every pooling x C on train and keep, for each column of labels, the best on validation.

    Ties go to the earlier pooling and the smaller C. Labels of other clips are not used.

    Args:
        pools: features of all clips; `train` and `validation` are positions in them.
        train_labels: bool [train, m]; `validation_labels`: bool [validation, m].
        kept: bool [clips, m], clips that a column is fitted and chosen on; all by default.
    """
    grid = np.sort(np.asarray(c_grid, dtype=np.float64))
    m = train_labels.shape[1]
    best = np.full(m, -1.0)
    pooling, c = [""] * m, np.zeros(m)
    scores = np.zeros((len(next(iter(pools.values()))), m))
    fitted = None if kept is None else np.repeat(kept[train], len(grid), 1)
    for name, features in pools.items():
        standardise = Standardiser.fit(features[train])
        weights, intercepts = fit_logistic(
            standardise(features[train]), np.repeat(train_labels, len(grid), 1), np.tile(grid, m),
            kept=fitted,
        )  # fmt: skip
        # Clips with the same features must tie, whatever the order of summation did to them.
        logits = np.round(standardise(features) @ weights + intercepts, 5)
        quality = _quality(
            logits[validation], validation_labels, None if kept is None else kept[validation]
        )
        pick = quality.argmax(1)
        for j in np.flatnonzero(quality.max(1) > best):
            best[j], pooling[j], c[j] = quality[j, pick[j]], name, grid[pick[j]]
            scores[:, j] = logits[:, j * len(grid) + pick[j]]
    return Chosen(scores, pooling, c, best)


def _quality(logits: np.ndarray, labels: np.ndarray, kept: np.ndarray | None) -> np.ndarray:
    """AUROC [m, C] of logits [n, m * C] for labels [n, m] over the kept rows; 0 where undefined."""
    n, m = labels.shape
    if kept is None:
        auroc = stats.auroc_columns(logits, np.repeat(labels, logits.shape[1] // m, 1))
        return np.nan_to_num(auroc, nan=0.0).reshape(m, -1)
    columns = logits.reshape(n, m, -1)
    of = [stats.auroc_columns(columns[kept[:, j], j], labels[kept[:, j], j]) for j in range(m)]
    return np.nan_to_num(np.stack(of), nan=0.0)


def choose_sparse(
    pools: Pools, labels: np.ndarray, sets: dict[str, np.ndarray], section: Probe
) -> dict[int, Chosen]:
    """Choose the k-sparse probes of one concept, by k; labels bool [clips] of all clips."""
    train, validation = sets["train"], sets["validation"]
    orders = {name: rank_by_difference(x[train], labels[train])[0] for name, x in pools.items()}
    result = {}
    for k in section.k_sparse:
        chosen = {name: x[:, np.sort(orders[name][:k])] for name, x in pools.items()}
        targets = (labels[train, None], labels[validation, None])
        result[k] = choose(chosen, *targets, train, validation, section.c_grid)
    return result


class Evaluator:
    """Evaluates scores on test labels, with the same resamples of compositions for every probe."""

    def __init__(self, rows: pd.DataFrame, sets: dict[str, np.ndarray], n: int, seed: int) -> None:
        self.sets, self.groups = sets, rows["group"].to_numpy(str)
        self.pairs = rows["pair_id"].to_numpy(str)
        self.n, self.seed = n, seed_for(seed, "probe", "bootstrap")
        self.weights = {s: self.resample(self.groups[sets[s]]) for s in CLASS_SETS if len(sets[s])}

    def resample(self, groups: np.ndarray) -> np.ndarray:
        """Weights [1 + n, items]: all ones (the clips as they are), then the resamples."""
        resamples = stats.resample_weights(groups, self.n, self.seed)
        return np.concatenate([np.ones((1, len(groups))), resamples])

    def _entry(self, values: np.ndarray, name: str, clip_set: str) -> Metrics:
        """A statistic with its interval, from its values [1 + n] under `resample`."""
        n = len(np.unique(self.groups[self.sets[clip_set]]))
        return {name: Estimate.from_resamples(values[0], values[1:], n, UNITS[name]).as_dict()}

    def classes(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, Metrics]:
        """Compute {set: AUROC and average precision with intervals}.

        Scores [clips], or [clips, seeds] for the mean of the statistics over seeds.
        """
        columns, result = scores.reshape(len(scores), -1), {}
        for name, weights in self.weights.items():
            at = self.sets[name]
            counts = [stats.counts_of(column, labels[at])(weights) for column in columns[at].T]
            area = np.mean([stats.auroc_from(*c) for c in counts], 0)
            precision = np.mean([stats.average_precision_from(*c) for c in counts], 0)
            result[name] = self._entry(area, "auroc", name)
            result[name] |= self._entry(precision, "average_precision", name)
        return result

    def difference(self, a: np.ndarray, b: np.ndarray, labels: np.ndarray) -> dict[str, Metrics]:
        """Compute {set: AUROC of scores a minus AUROC of scores b}, paired by resample."""
        result = {}
        for name, weights in self.weights.items():
            at = self.sets[name]
            first, second = (stats.auroc_of(of[at], labels[at])(weights) for of in (a, b))
            result[name] = self._entry(first - second, "difference", name)
        return result

    def pair_accuracy(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, Metrics]:
        """Compute {pair set: share of pairs whose clip with the concept scores higher}."""
        result = {}
        for name in PAIR_SETS:
            if len(at := self.sets[name]):
                pairs, groups = self.pairs[at], self.groups[at]
                wins, groups = stats.pair_wins(scores[at], labels[at], pairs, groups)
                values = stats.mean_of(wins)(self.resample(groups))
                result[name] = self._entry(values, "accuracy", name)
        return result


def run_probes(
    rows: pd.DataFrame,
    representations: dict[str, Pools],
    concepts: Sequence[str],
    section: Probe,
    seed: int,
    workers: int = 1,
    baselines: Sequence[str] = (),
) -> Metrics:
    """Probe every concept: {"clips", "skipped", "concepts": {concept: {representation: numbers}}}.

    A concept's entry also has "shuffled" (SAE probes on permuted labels, mean over null_seeds),
    "k_sparse" and, for each other representation, "sae_minus_<representation>". Its numbers are of
    the labelled clips; where some have no label, "unknown" has {concept: {set: clips left out}}.
    If all concepts have labels on the same clips, "mean" has the means over them, and "transfer",
    where it is known which sound plays each concept, what `transfer.leave_one_out` gives.

    Args:
        rows: clip table.
        representations: pools of these clips by name; "sae" and "dense" are required.
        workers: threads that share the concepts; the numbers do not depend on it.
        baselines: representations that are codes too; they have "k_sparse" up to BASELINE_SPARSE.
    """
    sets = clip_sets(rows)
    concepts, skipped = select_concepts(rows, sets, concepts, section.min_positive)
    has, labelled = label_matrix(rows, concepts)
    tables, unknown, carried = {}, {}, {}
    blocks = label_blocks(labelled)
    for _, columns in blocks:
        names = [concepts[j] for j in columns]
        usable = {name: at[labelled[at, columns[0]]] for name, at in sets.items()}
        evaluate = Evaluator(rows, usable, section.bootstrap, seed)
        block, fits, sparse = _probe_labelled(
            evaluate, representations, names, has[:, columns], section, seed, workers, baselines
        )
        tables |= block
        if len(blocks) == 1:
            carried["mean"] = transfer.mean_over_concepts(evaluate, fits | sparse, has[:, columns])
            sounds = transfer.sounds_of(rows, names)
            if sounds is not None:
                compared = {k: v for k, v in representations.items() if k not in baselines}
                carried["transfer"] = transfer.leave_one_out(
                    evaluate, partial(_choose_kept, evaluate.sets, has[:, columns], section),
                    compared, fits, names, has[:, columns], sounds, section.min_positive,
                )  # fmt: skip
        left_out = {s: len(at) - len(usable[s]) for s, at in sets.items()}
        if any(left_out.values()):
            unknown |= dict.fromkeys(names, {s: n for s, n in left_out.items() if n})
    result = {
        "clips": {name: len(at) for name, at in sets.items()},
        "skipped": skipped,
        "concepts": {concept: tables[concept] for concept in concepts},
        **carried,
    }
    return result | (
        {"unknown": {c: unknown[c] for c in concepts if c in unknown}} if unknown else {}
    )


def _choose_kept(
    sets: dict[str, np.ndarray], labels: np.ndarray, section: Probe, pools: Pools, kept: np.ndarray
) -> np.ndarray:
    """Logits of probes for labels [clips, m] on the `kept` clips alone, both [clips, n * m]."""
    train, validation = sets["train"], sets["validation"]
    labels = np.tile(labels, (1, kept.shape[1] // labels.shape[1]))
    return choose(
        pools, labels[train], labels[validation], train, validation, section.c_grid, kept
    ).scores


def _probe_labelled(
    evaluate: Evaluator,
    representations: dict[str, Pools],
    concepts: Sequence[str],
    labels: np.ndarray,
    section: Probe,
    seed: int,
    workers: int,
    baselines: Sequence[str] = (),
) -> tuple[dict[str, Metrics], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """{concept: entry} of concepts that all clips of `evaluate.sets` have labels [clips, m] for.

    Also returns the logits [clips, m] of the probes by representation, and of those on the best
    BASELINE_SPARSE latents or fewer.
    """
    sets = evaluate.sets
    train, validation = sets["train"], sets["validation"]

    def dealt(at: np.ndarray, null: bool) -> np.ndarray:
        """Labels of clips, and in the null's columns those permuted between their compositions."""
        groups, parts = evaluate.groups[at], [labels[at]]
        for i in range(section.null_seeds if null else 0):
            stream = seed_for(seed, "probe", "null", i)
            parts.append(stats.permute_labels(labels[at], groups, stream))
        return np.concatenate(parts, 1)

    few = replace(section, k_sparse=[k for k in section.k_sparse if k <= BASELINE_SPARSE])
    m, fits = len(concepts), {}
    for name, pools in representations.items():
        # The null is one more set of labels for the same inputs: cheap in the same call.
        fitted, chosen = (dealt(at, name == "sae") for at in (train, validation))
        fits[name] = choose(pools, fitted, chosen, train, validation, section.c_grid)

    def numbers(fit: Chosen, j: int, has: np.ndarray, concept: str) -> Metrics:
        result: Metrics = evaluate.classes(fit.scores[:, j], has)
        result |= {"pooling": fit.pooling[j], "c": fit.c[j]}
        result["validation_auroc"] = fit.validation[j]
        return result | (evaluate.pair_accuracy(fit.scores[:, j], has) if concept == MAIN else {})

    sparse = {
        f"{name}_k{n:03d}": np.empty(labels.shape)
        for name in ("sae", *baselines)
        for n in few.k_sparse
    }

    def table(j: int) -> Metrics:
        has, concept = labels[:, j], concepts[j]
        entry: Metrics = {name: numbers(f, j, has, concept) for name, f in fits.items()}
        entry["shuffled"] = evaluate.classes(fits["sae"].scores[:, m + j :: m], has)
        for name in ("sae", *baselines):
            chosen = choose_sparse(
                representations[name], has, sets, section if name == "sae" else few
            )
            of = entry if name == "sae" else entry[name]
            of["k_sparse"] = {f"{n:03d}": numbers(f, 0, has, concept) for n, f in chosen.items()}
            for n in few.k_sparse:
                sparse[f"{name}_k{n:03d}"][:, j] = chosen[n].scores[:, 0]
        for name in [name for name in fits if name != "sae"]:
            scores = (fits[other].scores[:, j] for other in ("sae", name))
            entry[f"sae_minus_{name}"] = evaluate.difference(*scores, has)
        entry["positives"] = {s: int(has[at].sum()) for s, at in sets.items()}
        return entry

    with ThreadPoolExecutor(workers) as pool:
        tables = dict(zip(concepts, pool.map(table, range(m)), strict=True))
    return tables, {name: fit.scores[:, :m] for name, fit in fits.items()}, sparse
