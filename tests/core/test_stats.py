"""Rank statistics against sklearn and counting; bootstrap intervals against planted truth."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from musicscope.core import stats

scored = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40).filter(
    lambda items: len({label for _, label in items}) == 2
)


@settings(max_examples=150, deadline=None)
@given(scored)
def test_rank_statistics_equal_counting_and_sklearn_with_ties(items):
    scores, labels = (np.array(column) for column in zip(*items, strict=True))
    gaps = scores[labels][:, None] - scores[~labels][None, :]
    counted = ((gaps > 0) + 0.5 * (gaps == 0)).mean()
    assert stats.auroc(scores, labels) == pytest.approx(counted)
    assert stats.auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))
    assert stats.auroc_columns(scores[:, None], labels)[0] == pytest.approx(counted)
    expected = average_precision_score(labels, scores)
    assert stats.average_precision(scores, labels) == pytest.approx(expected)


@settings(max_examples=50, deadline=None)
@given(scored, st.integers(0, 2**32))
def test_weights_mean_repeated_rows(items, seed):
    """A weight of w is the same as the row written w times: what makes the bootstrap exact."""
    scores, labels = (np.array(column) for column in zip(*items, strict=True))
    weights = np.random.default_rng(seed).integers(0, 4, len(scores))
    weights[[np.argmax(labels), np.argmin(labels)]] = 2
    rows = np.repeat(np.arange(len(scores)), weights)
    for statistic, reference in (
        (stats.auroc_of, roc_auc_score),
        (stats.average_precision_of, average_precision_score),
    ):
        value = statistic(scores, labels)(weights[None].astype(float))[0]
        assert value == pytest.approx(reference(labels[rows], scores[rows]))


def test_empty_class_is_nan_and_bad_input_is_an_error():
    assert np.isnan(stats.auroc([1.0, 2.0], [True, True]))
    assert np.isnan(stats.average_precision([1.0, 2.0], [False, False]))
    assert np.isnan(stats.auroc_columns(np.ones((2, 1)), np.array([True, True]))[0])
    with pytest.raises(ValueError, match="equal-length"):
        stats.auroc([1.0], [True, False])
    with pytest.raises(ValueError, match="NaN"):
        stats.auroc([np.nan, 1.0], [True, False])
    with pytest.raises(ValueError, match="at least 2 groups"):
        stats.bootstrap_groups([1.0, 2.0], ["a", "a"], 10, 0)


def test_bootstrap_covers_the_true_mean_of_grouped_data():
    """Items share their group's effect; a 95% interval over groups must cover at near 95%."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 6)
    by_group = by_row = 0
    for trial in range(200):
        values = 1.5 + rng.normal(size=40)[groups] + 0.3 * rng.normal(size=len(groups))
        low, high = stats.bootstrap_groups(values, groups, 300, trial)
        by_group += low <= 1.5 <= high
        low, high = stats.bootstrap_groups(values, np.arange(len(groups)), 300, trial)
        by_row += low <= 1.5 <= high
    assert 0.88 <= by_group / 200 <= 0.98
    assert by_row / 200 < 0.75  # resampling rows would claim far too much


def test_repeating_rows_does_not_narrow_a_group_interval():
    rng = np.random.default_rng(1)
    scores, labels = rng.normal(size=60), np.arange(60) % 2 == 0
    groups = np.repeat(np.arange(12), 5)
    repeated = np.tile(np.arange(60), 8)
    once = stats.bootstrap_groups(stats.auroc_of(scores, labels), groups, 500, 3)
    statistic = stats.auroc_of(scores[repeated], labels[repeated])
    assert stats.bootstrap_groups(statistic, groups[repeated], 500, 3) == pytest.approx(once)
    low, high = stats.bootstrap_groups(statistic, np.arange(480), 500, 3)
    assert high - low < 0.6 * (once[1] - once[0])


def test_bootstrap_of_columns_ratios_and_pairs_of_scores():
    rng = np.random.default_rng(2)
    values, groups = rng.normal(size=(50, 2, 3)), rng.integers(0, 10, 50)
    low, high = stats.bootstrap_groups(values, groups, 200, 5)
    assert low.shape == high.shape == (2, 3)
    assert (low[1, 2], high[1, 2]) == pytest.approx(
        stats.bootstrap_groups(values[:, 1, 2], groups, 200, 5)
    )
    low, high = stats.bootstrap_groups(stats.ratio_of(3 * np.ones(50), np.ones(50)), groups, 50, 5)
    assert low == high == pytest.approx(3)
    scores, labels = rng.normal(size=50), rng.random(50) < 0.5

    def gap(weights):  # paired: the same score against itself differs by nothing in any resample
        return stats.auroc_of(scores, labels)(weights) - stats.auroc_of(2 * scores, labels)(weights)

    assert stats.bootstrap_groups(gap, groups, 100, 0) == (0.0, 0.0)


def test_pairs():
    labels = [True, False, False, True, True, False]
    pairs, groups = ["a", "a", "b", "b", "c", "c"], ["x", "x", "y", "y", "z", "z"]
    scores = [2.0, 1.0, 5.0, 4.0, 3.0, 3.0]
    wins, of = stats.pair_wins(scores, labels, pairs, groups)
    assert wins.tolist() == [1.0, 0.0, 0.5]
    assert of.tolist() == ["x", "y", "z"]
    assert stats.paired_accuracy(scores, labels, pairs) == 0.5
    with pytest.raises(ValueError, match="'c' has one clip"):
        stats.pair_wins(scores[:5], labels[:5], pairs[:5], groups[:5])
    with pytest.raises(ValueError, match="two clips"):
        stats.pair_wins(scores, [True] * 6, pairs, groups)


def test_permuted_labels_keep_counts_and_rows_and_lose_the_tie():
    rng = np.random.default_rng(4)
    groups = rng.integers(0, 9, 120)
    labels = np.stack([rng.random(120) < 0.3, np.arange(120) % 2 == 0], axis=1)
    shuffled = stats.permute_labels(labels, groups, 7)
    assert (shuffled == stats.permute_labels(labels, groups, 7)).all()
    assert sorted(map(tuple, shuffled)) == sorted(map(tuple, labels))
    agreement = [
        np.corrcoef(labels[:, 1], stats.permute_labels(labels, groups, s)[:, 1])[0, 1]
        for s in range(200)
    ]
    assert abs(np.mean(agreement)) < 0.03


def test_sign_flip():
    groups = np.repeat(np.arange(30), 3)
    rng = np.random.default_rng(5)
    assert stats.sign_flip_p(np.ones(90), groups, 500, 0) == pytest.approx(1 / 501)
    null = [stats.sign_flip_p(rng.normal(size=30)[groups], groups, 200, s) for s in range(200)]
    assert 0.01 <= np.mean(np.array(null) <= 0.05) <= 0.1
