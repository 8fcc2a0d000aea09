"""Compare sets of clips by their embeddings, with estimators that do not depend on n.

The distance is the squared MMD of `musicscope.core.mmd`. Two quantities result:

* `population`: the MMD^2 of the distributions. It is 0 on average for equal distributions,
  whatever the number of clips, so nothing can be divided by it.
* `distance`: the expected MMD^2 of two finite sets of N clips, each from a composition of its own.
  N is a constant, not the number of clips at hand: self-pairs, which bias the usual estimate, enter
  with weight 1/N. Real against real is then 2 (1 - d) / N, where d is the mean kernel of two
  compositions. It is above 0, so ratios to it are defined.

What a ratio of N = 32 means, in the scattering and the musicnn embedding of 64 rendered clips:
noise at 30 dB SNR 1.1 and 1.6, another soundfont 1.8 and 1.5, a low-pass at 6 kHz 4.2 and 1.5,
grains of 0.2 s in random order 3.7 and 6.2. Scattering does not notice reversed time.

Split halves of compositions, the other candidate for real against real, are no use as a divisor:
rendered compositions with random instruments differ too little (0.0008 in musicnn's embedding for
two sets of 10 compositions, interval -0.003 to 0.005).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from musicscope.core.mmd import Embedded, GaussianKernel, mean_kernel
from musicscope.core.seeding import seed_for
from musicscope.core.stats import Estimate, percentile_interval, resample_weights
from musicscope.judges.pair import frechet_distance

RATIO = "times real against real"


@dataclass(frozen=True)
class Comparison:
    """Distances of a set from real clips, beside real clips from real clips."""

    population: Estimate
    """MMD^2 of the distributions: 0 where they are equal."""
    distance: Estimate
    """Expected MMD^2 of N clips of the set and N real clips."""
    real: Estimate
    """The same of N real clips and N others."""
    ratio: Estimate
    """`distance` / `real`; NaN where the interval of `real` contains 0."""


def compare(
    kernel: GaussianKernel, real: Embedded, other: Embedded, size: int, bootstrap: int, seed: int
) -> Comparison:
    """Compare `other` with `real` clips in sets of `size` clips; intervals resample compositions.

    Clips of `other` take the group of the composition that they were encoded or captioned from, or
    groups of their own. `distance` - `real` differs from `population` by the difference in
    diversity over N. Intervals are paired. They are conservative (up to 1.7 times too wide) where
    `population` is 0: the bootstrap of a degenerate U-statistic adds a linear term.
    """
    own = np.setdiff1d(other.groups, real.groups)
    names = np.concatenate([np.unique(real.groups), own])
    rr, oo, ro = (
        mean_kernel(kernel, a, b, names) for a, b in ((real, real), (other, other), (real, other))
    )

    def values(weights: np.ndarray) -> np.ndarray:
        reals, others, cross = (mean(weights) for mean in (rr, oo, ro))
        free = reals + others - 2 * cross
        # A clip is as similar to itself as can be: k(x, x) = 1.
        alone = (2 - reals - others) / size
        return np.stack([free, free + alone, 2 * (1 - reals) / size], 1)

    # Compositions of real clips and groups that only `other` has are two strata.
    draws = [resample_weights(names[: len(names) - len(own)], bootstrap, seed_for(seed, "real"))]
    if len(own):
        draws.append(
            resample_weights(own, bootstrap, seed_for(seed, "other"))
            if len(own) > 1
            else np.ones((bootstrap, 1))
        )
    whole, drawn = values(np.ones((1, len(names))))[0], values(np.concatenate(draws, 1))
    population, distance, same = (
        Estimate.from_resamples(float(v), d, len(names), "MMD^2")
        for v, d in zip(whole, drawn.T, strict=True)
    )
    ratio = Estimate(np.nan, n=len(names), unit=RATIO)
    if not same.low <= 0 <= same.high:
        draws = drawn[:, 1] / drawn[:, 2]
        ratio = Estimate.from_resamples(float(whole[1] / whole[2]), draws, len(names), RATIO)
    return Comparison(population, distance, same, ratio)


def frechet_infinity(
    a: np.ndarray, b: np.ndarray, rng: np.random.Generator, sizes: int = 8, draws: int = 4
) -> tuple[float, float]:
    """Frechet distance extrapolated to infinitely many clips, and R^2 of the fit.

    A line through the distances of random subsets against 1/n (Chong & Forsyth 2020, 1911.07023),
    from a third of the clips to all. R^2 is low where the distance hardly depends on n, and where
    the clips are too few. Rows with NaN are left out.
    """
    a, b = (x[np.isfinite(x).all(1)] for x in (np.asarray(a), np.asarray(b)))
    most = min(len(a), len(b))
    inverse, found = [], []
    for n in np.unique(np.linspace(max(2, most // 3), most, sizes).round().astype(int)):
        for _ in range(draws):
            one, two = (x[rng.permutation(len(x))[:n]] for x in (a, b))
            inverse.append(1 / n)
            found.append(frechet_distance(one, two))
    slope, intercept = np.polyfit(inverse, found, 1)
    left = np.square(found - (intercept + slope * np.array(inverse))).sum()
    total = np.square(found - np.mean(found)).sum()
    return float(intercept), float(1 - left / total) if total > 0 else 1.0


# --- classifier -------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOutScores:
    """Scores that a classifier gave to clips of compositions outside its training folds."""

    scores: np.ndarray
    labels: np.ndarray
    folds: np.ndarray
    groups: np.ndarray

    def auroc(self, weights: np.ndarray | None = None) -> np.ndarray:
        """AUROC within folds, for weights [resamples, clips]: pairs of one fold are compared.

        Scores of two folds come from two classifiers, whose offsets would bias a joint AUROC.
        """
        weights = np.ones((1, len(self.scores))) if weights is None else weights
        wins = pairs = np.zeros(len(weights))
        for fold in np.unique(self.folds):
            one, zero = (np.flatnonzero((self.folds == fold) & (self.labels == v)) for v in (1, 0))
            gap = self.scores[one][:, None] - self.scores[zero]
            won = (gap > 0) + 0.5 * (gap == 0)
            wins = wins + ((weights[:, one] @ won) * weights[:, zero]).sum(1)
            pairs = pairs + weights[:, one].sum(1) * weights[:, zero].sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return wins / pairs

    def estimate(self, bootstrap: int, seed: int) -> Estimate:
        """AUROC with an interval over groups."""
        draws = self.auroc(resample_weights(self.groups, bootstrap, seed))
        n = len(np.unique(self.groups))
        return Estimate.from_resamples(float(self.auroc()[0]), draws, n, "AUROC")


def classify(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray, seed: int, folds: int = 5,
    strength: float = 0.03,
) -> HeldOutScores:  # fmt: skip
    """Score clips [n, d] by logistic regression cross-validated over groups.

    `strength` is scikit-learn's C on standardised features.

    Raises:
        ValueError: a class with fewer than two groups.
    """
    labels, groups = np.asarray(labels).astype(int), np.asarray(groups)
    fewest = min(len(np.unique(groups[labels == v])) for v in (0, 1))
    if fewest < 2:
        raise ValueError("each class needs clips of 2 groups or more")
    split = StratifiedGroupKFold(min(folds, fewest), shuffle=True, random_state=seed % 2**32)
    scores, member = np.zeros(len(labels)), np.zeros(len(labels), int)
    for fold, (train, test) in enumerate(split.split(features, labels, groups)):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
        model.fit(features[train], labels[train])
        scores[test], member[test] = model.decision_function(features[test]), fold
    return HeldOutScores(scores, labels, member, groups)


def null_auroc(
    features: np.ndarray, groups: np.ndarray, seed: int, draws: int = 20
) -> tuple[float, float, float]:
    """Mean and central 95 % of the AUROC between two random halves of the groups of one set."""
    rng = np.random.default_rng(seed)
    names = np.unique(groups)
    found = []
    for draw in range(draws):
        half = rng.permutation(names)[: len(names) // 2]
        scored = classify(features, np.isin(groups, half), groups, seed_for(seed, draw))
        found.append(float(scored.auroc()[0]))
    return float(np.nanmean(found)), *percentile_interval(np.array(found))
