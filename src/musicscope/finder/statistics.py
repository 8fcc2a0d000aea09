"""Which features tell two sets of recordings apart, and could that be chance?

The unit is the recording: one number a feature, its mean over windows of equal length and number,
so that a long recording counts no more than a short one. Features are compared by rank sums
(Mann-Whitney, one-sided: higher with the concept), which no single loud recording can rule.

q is corrected for the number of features by the permutation distribution of the largest statistic
(Westfall & Young 1993): the probability that, were there nothing to find, any feature at all would
look as good. It holds for dependent features and small numbers of recordings alike. Which features
are tested is settled without the labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from musicscope.core import stats
from musicscope.core.seeding import seed_for
from musicscope.features.association import rank_z, standard_ranks

LEAST_SHARE = 0.1
LEAST_RECORDINGS = 3
"""A feature is tested if it fires in that share of all recordings, and in so many."""
BEST = 20
"""stability: how often a feature is among so many best ones when recordings are drawn anew."""
CANDIDATES = 100
"""How many of the best features take part in that."""
BLOCK = 256
COLUMNS = (
    "feature", "effect_size", "auroc", "p", "q", "stability", "mean_with", "mean_without", "fires",
)  # fmt: skip


def dealt_labels(labels: np.ndarray, groups: np.ndarray | None, n: int, seed: int) -> np.ndarray:
    """Labels [items] dealt `n` times, bool [items, n]; with groups, block by block."""
    if groups is None or len(np.unique(groups)) == len(groups):
        rng = np.random.default_rng(seed)
        return rng.permuted(np.tile(labels, (n, 1)), axis=1).T
    return np.stack([stats.permute_labels(labels, groups, seed_for(seed, i)) for i in range(n)], 1)


def smallest_p(labels: np.ndarray) -> float:
    """What a perfect feature could reach at best: one over the ways to deal the labels."""
    return 1 / math.comb(len(labels), int(np.sum(labels)))


def tested_features(means: np.ndarray) -> np.ndarray:
    """Columns of means [n, F] that fire in enough recordings and are not constant."""
    fires = (means > 0).sum(0)
    enough = fires >= max(LEAST_RECORDINGS, LEAST_SHARE * len(means))
    return np.flatnonzero(enough & (np.ptp(means, axis=0) > 0))


def permutation_p(
    means: np.ndarray, labels: np.ndarray, groups: np.ndarray | None, n: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """z, p and q [F] of means [items, F], from `n` permutations; the smallest is 1 / (n + 1)."""
    ranks = standard_ranks(means)
    # The slack covers float32 sums in another order; it can only raise p and q.
    z = rank_z(ranks, labels[:, None])[0] - 1e-4
    dealt = dealt_labels(labels, groups, n, seed)
    above, highest = np.zeros(len(z)), np.empty(n)
    for start in range(0, n, BLOCK):
        found = rank_z(ranks, dealt[:, start : start + BLOCK])
        above += (found >= z).sum(0)
        highest[start : start + BLOCK] = found.max(1)
    highest.sort()
    return z, (1 + above) / (1 + n), (1 + n - np.searchsorted(highest, z)) / (1 + n)


def stability_of(
    means: np.ndarray, labels: np.ndarray, groups: np.ndarray | None, draws: int, seed: int
) -> np.ndarray:
    """[F] share of bootstrap draws in which each column of means is among the `BEST` by AUROC."""
    own = np.arange(len(labels)) if groups is None else groups
    counts = np.zeros(means.shape[1])
    done = 0
    for weights in stats.resample_weights(own, draws, seed).astype(int):
        rows = np.repeat(np.arange(len(labels)), weights)
        if len(np.unique(labels[rows])) < 2:
            continue
        auroc = stats.auroc_columns(means[rows], labels[rows])
        counts[np.argsort(-auroc, kind="stable")[:BEST]] += 1
        done += 1
    return counts / max(1, done)


def rank_features(
    means: np.ndarray, labels: Sequence[bool] | np.ndarray, permutations: int, draws: int,
    seed: int, groups: np.ndarray | None = None,
) -> pd.DataFrame:  # fmt: skip
    """The table of all tested features, best first, with `COLUMNS`.

    Args:
        means: [recordings, F] mean value of every feature, >= 0.
        labels: [recordings] whether it is one with the concept.
        groups: [recordings] which of them are not independent, such as excerpts of one piece.
    effect_size: difference of the means over the pooled standard deviation (Cohen's d). fires:
    share of recordings in which the feature fires at all. ValueError: fewer than two recordings on
    a side.
    """
    labels = np.asarray(labels).astype(bool)
    if min(labels.sum(), (~labels).sum()) < 2:
        raise ValueError(
            f"{labels.sum()} recordings with and {(~labels).sum()} without the concept: two of "
            "each are needed, ten of each to find anything"
        )
    at = tested_features(means)
    if not len(at):
        return pd.DataFrame({name: pd.Series(dtype=float) for name in COLUMNS}).astype(
            {"feature": int}
        )
    x = np.asarray(means, np.float64)[:, at]
    z, p, q = permutation_p(x, labels, groups, permutations, seed_for(seed, "permutations"))
    sides = [x[labels], x[~labels]]
    freedom = [len(side) - 1 for side in sides]
    variance = sum(f * s.var(0, ddof=1) for f, s in zip(freedom, sides, strict=True)) / sum(freedom)
    gap = sides[0].mean(0) - sides[1].mean(0)
    effect = np.divide(gap, np.sqrt(variance), np.full(len(at), np.nan), where=variance > 0)
    order = np.lexsort((at, -gap, -z))  # ties by the difference, then by number
    stability = np.zeros(len(at))
    candidates = order[:CANDIDATES]
    stability[candidates] = stability_of(
        x[:, candidates], labels, groups, draws, seed_for(seed, "stability")
    )
    table = pd.DataFrame(
        {
            "feature": at, "effect_size": effect, "auroc": stats.auroc_columns(x, labels), "p": p,
            "q": q, "stability": stability, "mean_with": sides[0].mean(0),
            "mean_without": sides[1].mean(0), "fires": (x > 0).mean(0),
        }
    )  # fmt: skip
    return table.iloc[order].reset_index(drop=True)
