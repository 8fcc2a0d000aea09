"""Rank statistics against sklearn and counting; intervals and permutations against the truth."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, norm
from sklearn.metrics import average_precision_score, roc_auc_score

from musicscope.core import stats
from musicscope.core.io import read_json, write_json

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


def test_rank_z_is_mann_and_whitneys_with_ties():
    rng = np.random.default_rng(3)
    scores = np.maximum(rng.standard_normal((60, 4)), 0.0)  # half are ties at 0
    scores[:, 3] = 1.0
    labels = rng.random((60, 2)) < 0.3
    z = stats.rank_z(stats.standard_ranks(scores), labels)
    for c in range(2):
        for f in range(3):
            result = mannwhitneyu(
                scores[labels[:, c], f], scores[~labels[:, c], f], alternative="greater",
                method="asymptotic", use_continuity=False,
            )  # fmt: skip
            assert norm.sf(z[c, f]) == pytest.approx(result.pvalue, rel=1e-4)
    assert not z[:, 3].any()


def test_permutation_null_equals_counting_in_any_blocks():
    """Maxima over arrays and labels per permutation; p values are shares of permutations."""
    rng = np.random.default_rng(6)
    ranks = [stats.standard_ranks(rng.random((20, F))) for F in (3, 5)]
    labels = [rng.random((20, 2)) < 0.4 for _ in range(7)]
    expected = [max(stats.rank_z(r, of).max() for r in ranks) for of in labels]
    for block in (1, 3, 7):
        maxima, _ = stats.permutation_null(ranks, labels.__getitem__, 7, block)
        np.testing.assert_allclose(maxima, expected, rtol=1e-6)
    z = np.array([np.max(expected) + 1, np.median(expected), -9.0])
    assert stats.corrected_p(z, maxima).tolist() == [1 / 8, 5 / 8, 1.0]
    one = [of[:, :1] for of in labels]
    observed = stats.rank_z(ranks[0], one[0])[0] - stats.SLACK
    maxima, exceeded = stats.permutation_null(ranks[:1], one.__getitem__, 7, 2, observed)
    counted = sum(stats.rank_z(ranks[0], of)[0] >= observed for of in one)
    assert exceeded.tolist() == counted.tolist()
    assert ((1 + exceeded) / 8 <= stats.corrected_p(observed, maxima)).all()


def test_estimate_is_the_statistic_with_its_group_interval():
    rng = np.random.default_rng(7)
    scores, labels, groups = rng.normal(size=40), rng.random(40) < 0.5, np.repeat(np.arange(8), 5)
    statistic = stats.auroc_of(scores, labels)
    estimate = stats.estimate(statistic, groups, 200, 1, "AUROC")
    assert estimate.value == stats.auroc(scores, labels)
    assert (estimate.low, estimate.high) == stats.bootstrap_groups(statistic, groups, 200, 1)
    assert (estimate.n, estimate.unit) == (8, "AUROC")
    resampled = np.array([np.nan, 1.0, 1.0])  # an undefined resample is left out
    found = stats.Estimate.from_resamples(2.0, resampled, 3, "clip")
    assert found == stats.Estimate(2.0, 1.0, 1.0, 3, "clip")


NUMBERS = st.floats(allow_infinity=False, width=16)  # six digits hold them
ESTIMATES = st.builds(stats.Estimate, NUMBERS, NUMBERS, NUMBERS, st.integers(0, 999), st.text())


@settings(max_examples=50, deadline=None)
@given(ESTIMATES)
def test_an_estimate_survives_its_file_and_nan_is_null_there(estimate):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.json"
        write_json(path, {"x": estimate.as_dict(), "plain": estimate.value})
        stored = read_json(path)
    assert set(stored["x"]) == {"value", "low", "high", "n", "unit"}
    again, plain = (stats.Estimate.read(stored[key]) for key in ("x", "plain"))
    for key in ("value", "low", "high"):
        assert (stored["x"][key] is None) == np.isnan(getattr(estimate, key))
        np.testing.assert_allclose(getattr(again, key), getattr(estimate, key), rtol=1e-5)
    assert (again.n, again.unit) == (estimate.n, estimate.unit)
    assert again.has_interval == np.isfinite([estimate.low, estimate.high]).all()
    assert repr(plain) == repr(stats.Estimate(again.value))  # NaN equals itself there
    assert not plain.has_interval
    spread = stats.columns({"x": stored["x"], "name": "b", "judge": {"value": 1.0}})
    assert spread == {
        "x": stored["x"]["value"], "x_low": stored["x"]["low"], "x_high": stored["x"]["high"],
        "name": "b", "judge": {"value": 1.0},
    }  # fmt: skip


def test_an_estimate_as_text_and_other_keys_are_refused():
    estimate = stats.Estimate(0.5, 0.25, 0.75, 9, "share")
    assert estimate.text() == "0.500 [0.250, 0.750]"
    assert estimate.text(1) == "0.5 [0.2, 0.8]"
    assert stats.Estimate(130).text(0) == "130"
    assert stats.Estimate(0.5, np.nan, 0.75).text(2) == "0.50"
    assert stats.Estimate.read(None).text() == "n/a"
    for other in ({}, {"value": 0.5}, estimate.as_dict() | {"mean": 0.5}):
        with pytest.raises(ValueError, match="rerun the stage"):
            stats.Estimate.read(other)
