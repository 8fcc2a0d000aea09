"""Estimators of the distance of two sets, and the classifier, against planted truth."""

from __future__ import annotations

import numpy as np
import pytest

from musicscope.core.mmd import Embedded, GaussianKernel
from musicscope.embedded.pretraining.set_distance import (
    classify,
    compare,
    frechet_infinity,
    null_auroc,
)
from musicscope.judges.pair import frechet_distance

DIMENSIONS = 4
SIZE = 5
KERNEL = GaussianKernel(np.ones(DIMENSIONS), 2.0)


def population_kernel(shift: np.ndarray, variance: float) -> float:
    """E k(x, y) for x - y ~ N(shift, variance I), in closed form."""
    wide = KERNEL.bandwidth**2 + variance
    return float(
        (KERNEL.bandwidth**2 / wide) ** (DIMENSIONS / 2) * np.exp(-(shift**2).sum() / (2 * wide))
    )


def draw(rng, groups: int, clips: int, mean: float, between: float, name: str = "g") -> Embedded:
    """Clips N(centre of the group, 1), centres N(mean, between)."""
    centres = mean + np.sqrt(between) * rng.standard_normal((groups, 1, DIMENSIONS))
    values = centres + rng.standard_normal((groups, clips, DIMENSIONS))
    names = np.repeat([f"{name}{i}" for i in range(groups)], clips)
    return Embedded.of(values.reshape(-1, DIMENSIONS), names)


def both(rng, groups: int, clips: int, between: float, mean: float, bootstrap: int = 2):
    real = draw(rng, groups, clips, 0.0, between)
    other = draw(rng, groups, clips, mean, between, "other")
    return compare(KERNEL, real, other, SIZE, bootstrap, 0)


@pytest.mark.parametrize("groups", [4, 24])
def test_distances_are_unbiased_for_few_and_for_many_compositions(groups):
    """Mean over draws equals the closed form at every n; that of the biased estimate does not."""
    rng, between, mean = np.random.default_rng(groups), 1.0, 0.5
    runs = 800 if groups == 4 else 150
    found = [both(rng, groups, 3, between, mean) for _ in range(runs)]
    alike = population_kernel(np.zeros(DIMENSIONS), 2 + 2 * between)
    shifted = population_kernel(np.full(DIMENSIONS, mean), 2 + 2 * between)
    population = 2 * alike - 2 * shifted
    base = 2 * (1 - alike) / SIZE
    truths = {"population": population, "real": base, "distance": population + base}
    for name, truth in truths.items():
        values = np.array([getattr(f, name).value for f in found])
        error = values.std() / np.sqrt(runs)
        assert abs(values.mean() - truth) < 4 * error, name
        assert error < 0.25 * truth, name

    def biased(a: np.ndarray, b: np.ndarray) -> float:
        return KERNEL(a, a).mean() + KERNEL(b, b).mean() - 2 * KERNEL(a, b).mean()

    values = [
        biased(draw(rng, groups, 3, 0, between).values, draw(rng, groups, 3, mean, between).values)
        for _ in range(200)
    ]
    assert np.mean(values) - population > 4 * np.std(values) / np.sqrt(200)


def test_real_against_real_equals_the_mean_over_drawn_sets():
    """The closed form stands for drawing two sets of N clips, one per composition, many times."""
    rng = np.random.default_rng(1)
    real = draw(rng, 10, 4, 0.0, 1.0)
    other = draw(rng, 10, 4, 0.3, 1.0)
    found = compare(KERNEL, real, other, SIZE, 2, 0)

    def biased(a: np.ndarray, b: np.ndarray) -> float:
        return KERNEL(a, a).mean() + KERNEL(b, b).mean() - 2 * KERNEL(a, b).mean()

    real_real, other_real = [], []
    for _ in range(4000):
        clips = 4 * rng.permutation(10) + rng.integers(0, 4, 10)
        real_real.append(biased(real.values[clips[:5]], real.values[clips[5:]]))
        other_real.append(biased(other.values[clips[:5]], real.values[clips[5:]]))
    for estimate, drawn in ((found.real, real_real), (found.distance, other_real)):
        assert abs(estimate.value - np.mean(drawn)) < 4 * np.std(drawn) / np.sqrt(4000)
    assert found.ratio.value == pytest.approx(found.distance.value / found.real.value)


def test_intervals_cover_zero_for_one_distribution_and_not_for_two():
    rng = np.random.default_rng(2)
    same = [both(rng, 12, 3, 1.0, 0.0, 200).population for _ in range(60)]
    assert np.mean([e.low <= 0 <= e.high for e in same]) > 0.93
    other = [both(rng, 12, 3, 1.0, 2.0, 200).population for _ in range(10)]
    assert all(e.low > 0 for e in other)


def test_a_ratio_to_nothing_is_refused():
    """Clips that are all the same leave no distance of real from real to divide by."""
    rng = np.random.default_rng(4)
    other = draw(rng, 12, 3, 0.0, 1.0)
    same = Embedded.of(np.ones((36, DIMENSIONS)), other.groups)
    assert np.isnan(compare(KERNEL, same, other, SIZE, 50, 0).ratio.value)
    assert compare(KERNEL, other, same, SIZE, 50, 0).ratio.low > 1


def test_silent_clips_are_left_out_and_lone_compositions_refused():
    values = np.zeros((4, 2))
    values[1] = np.nan
    found = Embedded.of(values, np.array(["a", "a", "b", "b"]))
    assert len(found.values) == 3
    assert found.silent == 1
    with pytest.raises(ValueError, match="2 compositions"):
        Embedded.of(values, np.array(["a"] * 4))


def test_frechet_extrapolates_to_its_value_for_many_clips():
    """Of one distribution: 0. With 120 clips in 60 dimensions the plain estimate is far off."""
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((2, 120, 60))
    value, fit = frechet_infinity(a, b, rng)
    assert frechet_distance(a, b) > 12
    assert abs(value) < 0.25 * frechet_distance(a, b)
    assert fit > 0.9
    shifted, _ = frechet_infinity(a, b + 1.0, rng)
    assert shifted - value == pytest.approx(60, rel=0.15)


def test_classifier_tells_distributions_apart_and_not_halves_of_one():
    rng = np.random.default_rng(6)
    groups = np.repeat(np.arange(16), 4)
    centres = rng.standard_normal((16, 1, 6))
    real = (centres + rng.standard_normal((16, 4, 6))).reshape(-1, 6)
    null, low, high = null_auroc(real, groups, 0, draws=30)
    assert abs(null - 0.5) < 0.1
    assert low < 0.5 < high
    shifted = real + 3.0 * np.eye(6)[0]
    labels, both_groups = np.repeat([1, 0], 64), np.tile(groups, 2)
    found = classify(np.concatenate([shifted, real]), labels, both_groups, 0)
    estimate = found.estimate(200, 0)
    assert estimate.value > 0.9
    assert estimate.low > high
    again = classify(np.concatenate([shifted, real]), labels, both_groups, 0)
    np.testing.assert_array_equal(found.scores, again.scores)


def test_classifier_never_scores_a_group_that_it_learned_from():
    """Features that only name the group tell nothing of a held-out group."""
    groups = np.repeat(np.arange(20), 3)
    labels = groups % 2
    features = np.eye(20)[groups]
    assert float(classify(features, labels, groups, 0).auroc()[0]) == pytest.approx(0.5, abs=0.01)
