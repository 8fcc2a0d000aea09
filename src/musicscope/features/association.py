"""Which latents are aligned with which concept, and could that be chance?

Three rankings of latents by labels, each with the statistic that its users need:

`rank_by_difference`  |difference of class means|, for probes on few latents
`rank_by_auroc`       one concept, one-sided, with p values, effect size and stability
`align`               the best of many concepts for every latent of several dictionaries

The last two correct p over *all* tests of a family by the permutation distribution of their
maximum (Westfall & Young 1993; `stats.permutation_null`). Reasons: (1) neighbouring latents,
poolings and concepts are highly dependent, and the maximum uses that dependence; (2) clips of one
composition are not exchangeable, which rules out the normal approximation of Mann-Whitney; (3) a
permutation p is at least 1 / (permutations + 1), so correcting single p-values over some 10^5 tests
(Benjamini-Yekutieli) would need millions of permutations. The statistic is the rank sum
standardised by its variance under random labels, ties included, so that rare concepts do not
dominate the maximum and no single loud clip decides.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from musicscope.core import stats
from musicscope.core.seeding import seed_for
from musicscope.core.stats import corrected_p, permutation_null, rank_z, standard_ranks
from musicscope.data.splits import label_blocks, smaller_class
from musicscope.features.logistic import Standardiser

Scores = dict[str, np.ndarray]
"""Pooling ("mean", "max") -> one row per clip, one column per latent."""
ALIGN_BLOCK = 50
"""Permutations multiplied at once: 50 x 14 concepts x 3072 columns are 9 MB."""
RANK_BLOCK = 256

LEAST_SHARE = 0.1
LEAST_RECORDINGS = 3
"""`rank_by_auroc` tests a feature that fires in at least this share and number of recordings."""
BEST = 20
"""Stability: how often a feature is among this many best ones in resamples of the recordings."""
CANDIDATES = 100
"""Best features whose stability is measured; it is 0 for others."""
COLUMNS = (
    "feature", "effect_size", "auroc", "p", "q", "stability", "mean_with", "mean_without", "fires",
)  # fmt: skip


def rank_by_difference(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rank columns [n, F] by |difference of class means| in units of their standard deviation.

    Returns the order, without constant columns, and the signed differences [F] (0 for a constant
    column). Give training rows only.
    """
    standardise = Standardiser.fit(features)
    z = standardise(features)
    difference = np.zeros(features.shape[1])
    difference[standardise.columns] = z[labels].mean(0) - z[~labels].mean(0)
    order = np.argsort(-np.abs(difference), kind="stable")
    return order[: len(standardise.columns)], difference


def smallest_p(labels: np.ndarray) -> float:
    """Give the p of a perfect feature: one over the number of ways to permute the labels."""
    return 1 / math.comb(len(labels), int(np.sum(labels)))


def rank_by_auroc(
    means: np.ndarray,
    labels: Sequence[bool] | np.ndarray,
    permutations: int,
    draws: int,
    seed: int,
    groups: np.ndarray | None = None,
) -> pd.DataFrame:
    """Rank the features that are higher with the concept, best first, with `COLUMNS`.

    Which features are tested is decided without the labels: they fire in enough recordings and are
    not constant. effect_size: difference of the means over the pooled standard deviation (Cohen's
    d); q: p corrected for all tested features; fires: share of recordings in which the feature
    fires at all.

    Args:
        means: [recordings, F] mean value of every feature, >= 0.
        labels: [recordings] whether it has the concept.
        permutations: of the labels, for p and q.
        draws: bootstrap resamples of the recordings, for the stability.
        groups: [recordings] of dependent recordings, such as excerpts of one composition, which
            are permuted and resampled together.

    Raises:
        ValueError: fewer than two recordings with or without the concept.
    """
    labels = np.asarray(labels).astype(bool)
    if min(labels.sum(), (~labels).sum()) < 2:
        raise ValueError(
            f"{labels.sum()} recordings with and {(~labels).sum()} without the concept: two of "
            "each are needed, ten of each to find anything"
        )
    fires = (means > 0).sum(0)
    enough = fires >= max(LEAST_RECORDINGS, LEAST_SHARE * len(means))
    tested = np.flatnonzero(enough & (np.ptp(means, axis=0) > 0))
    if not len(tested):
        return pd.DataFrame({name: pd.Series(dtype=float) for name in COLUMNS}).astype(
            {"feature": int}
        )
    x = np.asarray(means, np.float64)[:, tested]
    ranks = standard_ranks(x)
    z = rank_z(ranks, labels[:, None])[0] - stats.SLACK
    permuted = label_permutations(labels, groups, permutations, seed_for(seed, "permutations"))
    maxima, exceeded = permutation_null(
        [ranks], lambda i: permuted[:, [i]], permutations, RANK_BLOCK, z
    )
    sides = [x[labels], x[~labels]]
    freedom = [len(side) - 1 for side in sides]
    variance = sum(f * s.var(0, ddof=1) for f, s in zip(freedom, sides, strict=True)) / sum(freedom)
    gap = sides[0].mean(0) - sides[1].mean(0)
    effect = np.divide(gap, np.sqrt(variance), np.full(len(tested), np.nan), where=variance > 0)
    order = np.lexsort((tested, -gap, -z))  # ties by the difference, then by number
    candidates, stability = order[:CANDIDATES], np.zeros(len(tested))
    stability[candidates] = _stability(
        x[:, candidates], labels, groups, draws, seed_for(seed, "stability")
    )
    table = pd.DataFrame(
        {
            "feature": tested, "effect_size": effect, "auroc": stats.auroc_columns(x, labels),
            "p": (1 + exceeded) / (1 + permutations), "q": corrected_p(z, maxima),
            "stability": stability,
            "mean_with": sides[0].mean(0), "mean_without": sides[1].mean(0),
            "fires": (x > 0).mean(0),
        }
    )  # fmt: skip
    return table.iloc[order].reset_index(drop=True)


def label_permutations(
    labels: np.ndarray, groups: np.ndarray | None, n: int, seed: int
) -> np.ndarray:
    """Permute labels [items] `n` times, bool [items, n]; with groups, block by block."""
    if groups is None or len(np.unique(groups)) == len(groups):
        rng = np.random.default_rng(seed)
        return rng.permuted(np.tile(labels, (n, 1)), axis=1).T
    return np.stack([stats.permute_labels(labels, groups, seed_for(seed, i)) for i in range(n)], 1)


def _stability(
    means: np.ndarray, labels: np.ndarray, groups: np.ndarray | None, draws: int, seed: int
) -> np.ndarray:
    """[F] share of bootstrap resamples in which a column of means is among the `BEST` by AUROC."""
    units = np.arange(len(labels)) if groups is None else groups
    counts = np.zeros(means.shape[1])
    done = 0
    for weights in stats.resample_weights(units, draws, seed).astype(int):
        rows = np.repeat(np.arange(len(labels)), weights)
        if len(np.unique(labels[rows])) < 2:
            continue
        auroc = stats.auroc_columns(means[rows], labels[rows])
        counts[np.argsort(-auroc, kind="stable")[:BEST]] += 1
        done += 1
    return counts / max(1, done)


@dataclass(frozen=True)
class Alignment:
    """One entry per latent; "" and NaN for latents that do not vary over the validation clips."""

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
    """Select concepts with at least `least` clips of either class in every set.

    Returns them, and the size of the smallest class of each other concept. Clips without a label
    count for neither class.
    """
    smallest = {c: min(smaller_class(rows, c, at) for at in sets) for c in concepts}
    skipped = {c: n for c, n in smallest.items() if n < least}
    if len(skipped) == len(smallest):
        most = max(smallest, key=smallest.__getitem__)
        raise ValueError(
            f"no concept has {least} clips with and {least} without it in validation and test (at "
            f"most {smallest[most]}, of {most}): "
            "lower match_features.min_clips or raise prepare_data.clips (rendered clips) "
            "or prepare_data.recordings.limits (recordings)"
        )
    return [c for c in smallest if c not in skipped], skipped


def align(
    dictionaries: dict[Hashable, dict[str, Scores]],
    labels: dict[str, np.ndarray],
    groups: np.ndarray,
    concepts: Sequence[str],
    permutations: int,
    seed: int,
    labelled: dict[str, np.ndarray] | None = None,
) -> dict[Hashable, Alignment]:
    """Find the best-aligned concept of every latent of every dictionary.

    Concept and pooling of a latent are chosen on validation clips by z, one-sided: higher where the
    concept is. AUROC and p are of test clips; p is corrected over all latents, concepts and
    poolings of all dictionaries.

    Args:
        dictionaries: {name: {set: scores}} with sets "validation", "test" and, if there are such
            clips, "heldout_font".
        labels: {set: bool [clips, concepts]}.
        groups: composition of each test clip; labels are permuted between compositions.
        labelled: as `labels`, which clips have a label (default: all). A concept is compared, and
            permuted, on its labelled clips alone.
    """
    labelled = labelled or {name: np.ones_like(of, bool) for name, of in labels.items()}
    best, positive, test = {}, {}, {}
    for name, sets in dictionaries.items():
        z = np.stack(
            [
                _z_of_labelled(x, labels["validation"], labelled["validation"])
                for x in sets["validation"].values()
            ]
        ).reshape(len(sets["validation"]) * len(concepts), -1)
        best[name], positive[name] = z.argmax(0), z.max(0) > 0
        test[name] = {key: np.full(z.shape[1], np.nan) for key in ("z", "auroc", "heldout_auroc")}
    maxima = np.full(permutations, -np.inf)
    for rows, columns in label_blocks(labelled["test"]):
        ranks = {
            name: {pooling: standard_ranks(x[rows]) for pooling, x in sets["test"].items()}
            for name, sets in dictionaries.items()
        }
        block = labels["test"][np.ix_(rows, columns)]

        def permuted(i: int, block: np.ndarray = block, rows: np.ndarray = rows) -> np.ndarray:
            stream = seed_for(seed, "match_features", "permutation", i)
            return stats.permute_labels(block, groups[rows], stream)

        arrays = [r for pools in ranks.values() for r in pools.values()]
        block_maxima, _ = permutation_null(arrays, permuted, permutations, ALIGN_BLOCK)
        maxima = np.maximum(maxima, block_maxima)
        for name, sets in dictionaries.items():
            poolings = list(sets["validation"])
            for pick in np.unique(best[name][positive[name]]):
                pooling, j = poolings[pick // len(concepts)], pick % len(concepts)
                if j not in columns:
                    continue
                at, label = positive[name] & (best[name] == pick), labels["test"][rows][:, [j]]
                test[name]["z"][at] = rank_z(ranks[name][pooling][:, at], label)[0]
                scores = sets["test"][pooling][rows][:, at]
                test[name]["auroc"][at] = stats.auroc_columns(scores, label[:, 0])
                if "heldout_font" in sets and (clips := labelled["heldout_font"][:, j]).any():
                    test[name]["heldout_auroc"][at] = stats.auroc_columns(
                        sets["heldout_font"][pooling][clips][:, at],
                        labels["heldout_font"][clips, j],
                    )
    result = {}
    for name, sets in dictionaries.items():
        chosen, poolings = positive[name], np.array(list(sets["validation"]))
        z = test[name].pop("z")
        result[name] = Alignment(
            np.where(chosen, np.array(concepts)[best[name] % len(concepts)], ""),
            np.where(chosen, poolings[best[name] // len(concepts)], ""),
            **test[name],
            p=np.where(chosen, corrected_p(z - stats.SLACK, maxima), np.nan),
        )
    return result


def _z_of_labelled(scores: np.ndarray, labels: np.ndarray, labelled: np.ndarray) -> np.ndarray:
    """z [concepts, F] of scores [n, F], each concept over its labelled clips."""
    z = np.empty((labels.shape[1], scores.shape[1]), np.float32)
    for rows, columns in label_blocks(labelled):
        z[columns] = rank_z(standard_ranks(scores[rows]), labels[np.ix_(rows, columns)])
    return z
