"""Which concept is a latent aligned with, and could that be chance?

A latent's clip scores (mean or maximum over the frames) are set against has_<family> labels by
AUROC, one-sided: it is higher where the concept is. Which concept and which pooling a latent is
credited with is chosen on validation clips; AUROC and p are of test clips.

p is corrected over *all* latents x concepts x poolings of all dictionaries by the permutation
distribution of their maximum (Westfall & Young 1993): labels are dealt to other compositions,
whole rows at a time. Reasons: (1) neighbouring latents, poolings and concepts are highly
dependent, and the maximum uses that dependence; (2) exchangeability holds between compositions
only, which rules out the normal approximation of Mann-Whitney; (3) a permutation p is at least
1 / (permutations + 1), so correcting single p-values over some 10^5 tests (Benjamini-Yekutieli)
would need millions of permutations. The statistic is the rank sum standardised by its variance
under random labels, ties included, so that rare concepts do not rule the maximum.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from musicscope.core import stats
from musicscope.core.seeding import seed_for
from musicscope.data.splits import known_blocks, smaller_class

BLOCK = 50  # permutations multiplied at once: 50 x 14 concepts x 3072 columns are 9 MB
Scores = dict[str, np.ndarray]
"""Pooling ("mean", "max") -> one row a clip, one column a latent."""


@dataclass(frozen=True)
class Alignment:
    """One entry a latent; "" and NaN for those that do not vary over the validation clips."""

    concept: np.ndarray
    pooling: np.ndarray
    """mean or max"""
    auroc: np.ndarray
    """[F] on test"""
    heldout_auroc: np.ndarray
    """[F] on the held-out soundfont; NaN where there are no such clips"""
    p: np.ndarray
    """[F] on test, corrected over latents x concepts x poolings"""


def usable_concepts(
    rows: pd.DataFrame, sets: Sequence[np.ndarray], concepts: Sequence[str], least: int
) -> tuple[list[str], dict[str, int]]:
    """Concepts with at least `least` clips of either class in every set; the others with their
    smallest class. Clips whose label is unknown count for neither."""
    smallest = {c: min(smaller_class(rows, c, at) for at in sets) for c in concepts}
    skipped = {c: n for c, n in smallest.items() if n < least}
    if len(skipped) == len(smallest):
        raise ValueError(
            f"no concept has {least} clips with and {least} without it in validation and test: "
            "lower match_features.min_clips or raise prepare_data.timgm6mb_clips (rendered clips) "
            "or prepare_data.recordings.limits (recordings)"
        )
    return [c for c in smallest if c not in skipped], skipped


def standard_ranks(scores: np.ndarray) -> np.ndarray:
    """Mid-ranks of each column [n, F] less their mean, over their standard deviation, float32.

    A constant column is 0. The sum over n1 of n rows, divided by sqrt(n1 (n - n1) / n), is the
    tie-corrected z of Mann and Whitney: mean 0 and variance 1 under random labels.
    """
    ranks = rankdata(scores, axis=0) - (len(scores) + 1) / 2
    deviation = ranks.std(0, ddof=1)
    return np.divide(ranks, deviation, np.zeros_like(ranks), where=deviation > 0).astype(np.float32)


def rank_z(ranks: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """z [concepts, F] from `standard_ranks` [n, F] and labels [n, concepts]."""
    n1 = labels.sum(0, dtype=np.float64)
    spread = np.sqrt(n1 * (len(labels) - n1) / len(labels))
    return (labels.T.astype(np.float32) @ ranks) / spread[:, None].astype(np.float32)


def null_maxima(
    ranks: Sequence[np.ndarray], labels: np.ndarray, groups: np.ndarray, n: int, seed: int
) -> np.ndarray:
    """Largest z over all columns of all `ranks` [clips, F] and all concepts in `n` permutations.

    Labels [clips, concepts] are dealt to other compositions by `stats.permute_labels`.
    """
    maxima = np.empty(n)
    for start in range(0, n, BLOCK):
        block = range(start, min(n, start + BLOCK))
        dealt = [
            stats.permute_labels(labels, groups, seed_for(seed, "match_features", "permutation", i))
            for i in block
        ]
        z = np.stack([rank_z(r, np.concatenate(dealt, 1)).max(1) for r in ranks])
        maxima[start : block.stop] = z.max(0).reshape(len(block), -1).max(1)
    return maxima


def align(
    dictionaries: dict[Hashable, dict[str, Scores]],
    labels: dict[str, np.ndarray],
    groups: np.ndarray,
    concepts: Sequence[str],
    permutations: int,
    seed: int,
    known: dict[str, np.ndarray] | None = None,
) -> dict[Hashable, Alignment]:
    """The best-aligned concept of every latent of every dictionary.

    Args:
        dictionaries: {name: {set: scores}} with sets "validation", "test" and, if there are such
            clips, "heldout_font". All names form one family of tests.
        labels: {set: bool [clips, concepts]}.
        groups: composition of each test clip.
        known: as `labels`, where these are known (default: everywhere). A concept is compared on
            its known clips alone, and dealt to other compositions among them.
    """
    known = known or {name: np.ones_like(of, bool) for name, of in labels.items()}
    best, positive, found = {}, {}, {}
    for name, sets in dictionaries.items():
        poolings = list(sets["validation"])
        z = [
            _all_z(x, labels["validation"], known["validation"])
            for x in sets["validation"].values()
        ]
        chosen = np.stack(z).reshape(len(poolings) * len(concepts), -1)
        best[name], positive[name] = chosen.argmax(0), chosen.max(0) > 0
        empty = np.full((3, chosen.shape[1]), np.nan)
        found[name] = dict(zip(("z", "auroc", "heldout"), empty, strict=True))
    null = np.full(permutations, -np.inf)
    for rows, columns in known_blocks(known["test"]):
        ranks = {
            name: {pooling: standard_ranks(x[rows]) for pooling, x in sets["test"].items()}
            for name, sets in dictionaries.items()
        }
        maxima = null_maxima(
            [r for pools in ranks.values() for r in pools.values()],
            labels["test"][np.ix_(rows, columns)], groups[rows], permutations, seed,
        )  # fmt: skip
        null = np.maximum(null, maxima)
        for name, sets in dictionaries.items():
            poolings = list(sets["validation"])
            for pick in np.unique(best[name][positive[name]]):
                pooling, j = poolings[pick // len(concepts)], pick % len(concepts)
                if j not in columns:
                    continue
                at, label = positive[name] & (best[name] == pick), labels["test"][rows][:, [j]]
                found[name]["z"][at] = rank_z(ranks[name][pooling][:, at], label)[0]
                scores = sets["test"][pooling][rows][:, at]
                found[name]["auroc"][at] = stats.auroc_columns(scores, label[:, 0])
                if "heldout_font" in sets and (told := known["heldout_font"][:, j]).any():
                    found[name]["heldout"][at] = stats.auroc_columns(
                        sets["heldout_font"][pooling][told][:, at], labels["heldout_font"][told, j]
                    )
    null.sort()
    return {
        name: _alignment(best[name], positive[name], list(sets["validation"]), concepts, null, **of)
        for (name, sets), of in zip(dictionaries.items(), found.values(), strict=True)
    }


def _all_z(scores: np.ndarray, labels: np.ndarray, known: np.ndarray) -> np.ndarray:
    """z [concepts, F] of scores [n, F], each concept over the clips where it is known."""
    z = np.empty((labels.shape[1], scores.shape[1]), np.float32)
    for rows, columns in known_blocks(known):
        z[columns] = rank_z(standard_ranks(scores[rows]), labels[np.ix_(rows, columns)])
    return z


def _alignment(
    best: np.ndarray, positive: np.ndarray, poolings: Sequence[str], concepts: Sequence[str],
    null: np.ndarray, z: np.ndarray, auroc: np.ndarray, heldout: np.ndarray,
) -> Alignment:  # fmt: skip
    """From the chosen pooling x concept of each latent [F] and its z, and the sorted null."""
    # The slack covers float32 sums in another order; it can only raise p.
    above = len(null) - np.searchsorted(null, z - 1e-4)
    return Alignment(
        np.where(positive, np.array(concepts)[best % len(concepts)], ""),
        np.where(positive, np.array(poolings)[best // len(concepts)], ""),
        auroc,
        heldout,
        np.where(positive, (1 + above) / (1 + len(null)), np.nan),
    )
