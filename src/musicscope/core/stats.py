"""Statistics over groups: bootstrap intervals, AUROC, average precision, permutation tests.

Clips of one composition are not independent, so every interval here resamples whole groups
(compositions), never rows. A resample is a row of integer weights: how often each item's group
was drawn. A statistic is a function of such weights, which makes all resamples one vectorised
call and makes differences between two probes *paired* (same weights, both scores)::

    low, high = bootstrap_groups(values, groups, n=1000, seed=1)                  # of the mean
    low, high = bootstrap_groups(auroc_of(scores, labels), groups, n=1000, seed=1)
    best = estimate(auroc_of(scores, labels), groups, n=1000, seed=1, unit="AUROC")  # `Estimate`
    gap = lambda w: auroc_of(a, labels)(w) - auroc_of(b, labels)(w)
    low, high = bootstrap_groups(gap, groups, n=1000, seed=1)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]
"""Weights [resamples, items] -> one value per resample [resamples, ...]; NaN where undefined."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; NaN where unknown."""

    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0
    """Groups, such as compositions, that the interval resamples"""
    unit: str = ""
    """Unit of the value, such as AUROC, share or features"""

    @classmethod
    def from_resamples(cls, value: float, resampled: np.ndarray, n: int, unit: str) -> Estimate:
        """Take the 95 % percentile interval of `resampled` [resamples]."""
        return cls(value, *percentile_interval(resampled), n, unit)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Estimate:
        """Read what `as_dict` gave; ValueError for other keys."""
        if set(entry) != FIELDS:
            raise ValueError(
                f"an estimate has the keys {sorted(FIELDS)}, got {sorted(entry)}: rerun the stage "
                "that wrote this metrics file"
            )
        held: dict[str, Any] = {k: math.nan if v is None else v for k, v in entry.items()}
        return cls(**held)

    @classmethod
    def read(cls, entry: Mapping[str, Any] | float | None) -> Estimate:
        """Read an entry of a metrics file: an estimate, or a number without an interval."""
        if isinstance(entry, Mapping):
            return cls.from_dict(entry)
        return cls(math.nan if entry is None else entry)

    @property
    def has_interval(self) -> bool:
        """Whether both limits are known."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def as_dict(self) -> dict[str, Any]:
        """Give the five fields by name, for JSON."""
        return asdict(self)

    def text(self, digits: int = 3) -> str:
        """Write ``value [low, high]`` with `digits` decimals; n/a where unknown."""
        value, *ends = (
            f"{number:.{digits}f}" if math.isfinite(number) else "n/a"
            for number in (self.value, self.low, self.high)
        )
        return f"{value} [{', '.join(ends)}]" if self.has_interval else value


FIELDS = {field.name for field in fields(Estimate)}


def columns(record: Mapping[str, Any]) -> dict[str, Any]:
    """Spread each entry x of a record that `Estimate.as_dict` gave over x, x_low and x_high."""
    row: dict[str, Any] = {}
    for name, entry in record.items():
        if isinstance(entry, Mapping) and set(entry) == FIELDS:
            row |= {name: entry["value"]} | {f"{name}_{end}": entry[end] for end in ("low", "high")}
        else:
            row[name] = entry
    return row


def resample_weights(groups: Sequence | np.ndarray, n: int, seed: int) -> np.ndarray:
    """Draw weights [n, items]: how often each item's group occurs in `n` resamples of the groups.

    Each resample draws as many groups as there are, with replacement (Efron's bootstrap with the
    group as the unit, the "cluster bootstrap").
    """
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"bootstrap needs at least 2 groups, got {len(names)}: add compositions")
    draws = np.random.default_rng(seed).multinomial(len(names), [1 / len(names)] * len(names), n)
    return draws[:, member].astype(np.float64)


def percentile_interval(values: np.ndarray, level: float = 0.95) -> tuple:
    """Compute the percentile interval over axis 0, without undefined resamples (NaN).

    Two floats for values [resamples]; two arrays for values [resamples, ...].
    """
    tail = 50 * (1 - level)
    low, high = np.nanpercentile(values, [tail, 100 - tail], axis=0)
    return (float(low), float(high)) if np.ndim(low) == 0 else (low, high)


def bootstrap_groups(
    statistic: Statistic | np.ndarray | Sequence[float],
    groups: Sequence | np.ndarray,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple:
    """Compute the percentile bootstrap interval (low, high) with whole groups resampled.

    `statistic`: per-item values [items, ...], whose mean over items is the statistic (one interval
    for each trailing entry), or a `Statistic` such as ``auroc_of(scores, labels)``. `groups`
    [items] names the group of each item. Same seed and groups: same resamples, so intervals of
    differences are paired. Percentile intervals of few groups (< 20) are somewhat too narrow.
    """
    function = statistic if callable(statistic) else mean_of(np.asarray(statistic))
    return percentile_interval(np.asarray(function(resample_weights(groups, n, seed))), level)


def estimate(
    statistic: Statistic, groups: Sequence | np.ndarray, n: int, seed: int, unit: str
) -> Estimate:
    """Evaluate a statistic on the items as they are, with its interval over groups [items]."""
    value = statistic(np.ones((1, len(groups))))[0]
    interval = bootstrap_groups(statistic, groups, n, seed)
    return Estimate(float(value), *interval, len(np.unique(groups)), unit)


def mean_of(values: np.ndarray) -> Statistic:
    """Make the mean of per-item `values` [items, ...] a `Statistic`."""
    values = np.asarray(values, dtype=np.float64)

    def statistic(weights: np.ndarray) -> np.ndarray:
        total = np.tensordot(weights, values, axes=(1, 0))
        return total / weights.sum(1).reshape(-1, *[1] * (values.ndim - 1))

    return statistic


def ratio_of(numerator: np.ndarray, denominator: np.ndarray) -> Statistic:
    """Make the ratio of sums of per-item terms [items] a `Statistic`, such as 1 - FVU."""
    numerator, denominator = (np.asarray(v, dtype=np.float64) for v in (numerator, denominator))
    return lambda weights: (weights @ numerator) / (weights @ denominator)


def _ordered(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Order from the highest score down, labels in it, and the last position of each tie block."""
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels).astype(bool)
    if scores.shape != labels.shape or scores.ndim != 1:
        raise ValueError(
            f"scores {scores.shape} and labels {labels.shape} must be equal-length 1-d"
        )
    if not np.isfinite(scores).all():
        raise ValueError("scores hold NaN or infinity")
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    return order, labels[order], ends


Counts = tuple[np.ndarray, np.ndarray]
"""Weight of positives and of negatives at or above each threshold, [resamples, thresholds] each."""


def counts_of(scores: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], Counts]:
    """Make a function of weights that gives `Counts` at the distinct scores, highest first."""
    order, positive, ends = _ordered(scores, labels)

    def counts(weights: np.ndarray) -> Counts:
        sorted_weights = weights[:, order]
        hits = np.cumsum(sorted_weights * positive, axis=1)[:, ends]
        return hits, np.cumsum(sorted_weights, axis=1)[:, ends] - hits

    return counts


def auroc_from(hits: np.ndarray, false: np.ndarray) -> np.ndarray:
    """Compute AUROC = P(positive > negative) + P(tie) / 2 (Mann-Whitney U) from `Counts`."""
    hits, false = (np.pad(c, ((0, 0), (1, 0))) for c in (hits, false))
    area = (np.diff(false, axis=1) * (hits[:, 1:] + hits[:, :-1]) / 2).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return area / (hits[:, -1] * false[:, -1])


def average_precision_from(hits: np.ndarray, false: np.ndarray) -> np.ndarray:
    """Sum recall step x precision over thresholds; tied scores are one threshold."""
    steps = np.diff(np.pad(hits, ((0, 0), (1, 0))), axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(hits + false > 0, hits / (hits + false), 0.0)
        return (steps * precision).sum(1) / hits[:, -1]


def auroc_of(scores: np.ndarray, labels: np.ndarray) -> Statistic:
    """Make AUROC of scores [items] for boolean labels [items] a `Statistic`."""
    counts = counts_of(scores, labels)
    return lambda weights: auroc_from(*counts(weights))


def average_precision_of(scores: np.ndarray, labels: np.ndarray) -> Statistic:
    """Make average precision of scores [items] for boolean labels [items] a `Statistic`."""
    counts = counts_of(scores, labels)
    return lambda weights: average_precision_from(*counts(weights))


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Compute AUROC of scores [items] for boolean labels [items]; NaN if a class is empty."""
    return float(auroc_of(scores, labels)(np.ones((1, len(scores))))[0])


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Compute average precision of scores [items]; NaN without positives."""
    return float(average_precision_of(scores, labels)(np.ones((1, len(scores))))[0])


def auroc_columns(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute AUROC per column: scores [items, columns], labels [items] or [items, columns].

    Uses mid-ranks, so ties count half. NaN for columns in which a class is empty.
    """
    from scipy.stats import rankdata

    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels).astype(bool)
    positive = np.broadcast_to(labels[:, None] if labels.ndim == 1 else labels, scores.shape)
    hits = positive.sum(0)
    misses = len(scores) - hits
    rank_sum = (rankdata(scores, axis=0) * positive).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (rank_sum - hits * (hits + 1) / 2) / (hits * misses)


def pair_wins(
    scores: np.ndarray,
    labels: np.ndarray,
    pairs: Sequence[str] | np.ndarray,
    groups: Sequence[str] | np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Compare the clips of matched pairs: 1 if the positive scores higher, 0.5 on a tie, else 0.

    `pairs` [items] names the pair of each item; each pair must hold one positive and one negative.
    Returns wins [pairs] and groups [pairs], in order of first appearance.
    """
    members: dict[str, dict[bool, int]] = {}
    for item, (pair, label) in enumerate(zip(pairs, labels, strict=True)):
        if bool(label) in members.setdefault(pair, {}):
            raise ValueError(f"pair {pair!r} has two clips with label {bool(label)}; expected one")
        members[pair][bool(label)] = item
    lone = [pair for pair, both in members.items() if len(both) != 2]
    if lone:
        raise ValueError(f"pair {lone[0]!r} has one clip; expected one with and one without")
    with_, without = (np.array([both[side] for both in members.values()]) for side in (True, False))
    gap = np.asarray(scores)[with_] - np.asarray(scores)[without]
    return 0.5 * (1 + np.sign(gap)), np.asarray(groups)[with_]


def permute_labels(labels: np.ndarray, groups: Sequence | np.ndarray, seed: int) -> np.ndarray:
    """Permute labels [items, ...] between groups, each group's block of labels in one piece.

    The null of a group-wise experiment: the number of positives and the order of labels inside a
    block stay, the link between a clip and its label goes. Blocks of unequal size are laid end to
    end. Whole rows move, so several concepts keep their co-occurrence.
    """
    labels, groups = np.asarray(labels), np.asarray(groups)
    rng = np.random.default_rng(seed)
    names = np.unique(groups)
    rows = [np.flatnonzero(groups == name) for name in names]
    # Rotating each block by a random amount breaks the link even where a group gets its own block.
    source = [np.roll(rows[g], rng.integers(len(rows[g]))) for g in rng.permutation(len(names))]
    permuted = np.empty_like(labels)
    permuted[np.concatenate(rows)] = labels[np.concatenate(source)]
    return permuted


SLACK = 1e-4
"""Subtracted from an observed z before it is compared with permutations: float32 sums in another
order differ by less. It can only raise p."""


def standard_ranks(scores: np.ndarray) -> np.ndarray:
    """Standardise the mid-ranks of each column [n, F]: mean 0, variance 1, float32.

    A constant column is 0. The sum over n1 of n rows, divided by sqrt(n1 (n - n1) / n), is the
    tie-corrected z of Mann and Whitney: mean 0 and variance 1 under random labels.
    """
    from scipy.stats import rankdata

    ranks = rankdata(scores, axis=0) - (len(scores) + 1) / 2
    deviation = ranks.std(0, ddof=1)
    return np.divide(ranks, deviation, np.zeros_like(ranks), where=deviation > 0).astype(np.float32)


def rank_z(ranks: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute z [m, F] of Mann and Whitney from `standard_ranks` [n, F] and labels [n, m]."""
    n1 = labels.sum(0, dtype=np.float64)
    spread = np.sqrt(n1 * (len(labels) - n1) / len(labels))
    return (labels.T.astype(np.float32) @ ranks) / spread[:, None].astype(np.float32)


def permutation_null(
    ranks: Sequence[np.ndarray],
    permuted: Callable[[int], np.ndarray],
    n: int,
    block: int,
    observed: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the largest z over all columns of all `ranks` and all labels, per permutation.

    Args:
        ranks: `standard_ranks` [items, F] of each dictionary and pooling.
        permuted: number of the permutation -> its labels, bool [items, m].
        block: permutations multiplied at once.
        observed: z [F], less `SLACK`, for one array of ranks and m = 1.

    Returns:
        Maxima [n], and how many permutations reach `observed` [F].
    """
    maxima, exceeded = np.empty(n), np.zeros(0 if observed is None else len(observed))
    for start in range(0, n, block):
        draws = range(start, min(n, start + block))
        labels, highest = np.concatenate([permuted(i) for i in draws], 1), []
        for array in ranks:
            z = rank_z(array, labels)
            highest.append(z.max(1))
            if observed is not None:
                exceeded += (z >= observed).sum(0)
        maxima[start : draws.stop] = np.max(highest, 0).reshape(len(draws), -1).max(1)
    return maxima, exceeded


def corrected_p(z: np.ndarray, maxima: np.ndarray) -> np.ndarray:
    """Compute p of each z, less `SLACK`, corrected for all tests (Westfall & Young 1993).

    `maxima` [n] as from `permutation_null`; the smallest p is 1 / (n + 1).
    """
    n = len(maxima)
    return (1 + n - np.searchsorted(np.sort(maxima), z)) / (1 + n)
