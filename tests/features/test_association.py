"""p-values against all permutations and under nulls; planted concepts are found."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy.stats import mannwhitneyu

from musicscope.core import stats
from musicscope.features.association import align, rank_by_auroc, usable_concepts


def aligned(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray, seed=0, permutations=99):
    """Alignment where validation is the same as test, one pooling."""
    C = labels.shape[1]
    return align(
        {"x": {"validation": {"mean": scores}, "test": {"mean": scores}}},
        {"validation": labels, "test": labels}, groups, [f"c{i}" for i in range(C)],
        permutations, seed,
    )["x"]  # fmt: skip


def test_a_planted_concept_is_found_with_the_smallest_p():
    rng = np.random.default_rng(0)
    labels, scores = rng.random((120, 5)) < 0.4, rng.uniform(0, 1, (120, 30))
    scores[:, 7] += 0.8 * labels[:, 2]
    scores[:, 9] = 0.0
    groups = np.repeat(np.arange(12), 10)
    found = aligned(scores, labels, groups)
    assert found.concept[7] == "c2"
    assert found.auroc[7] == pytest.approx(stats.auroc(scores[:, 7], labels[:, 2]))
    assert found.p[7] == 1 / 100
    others = np.delete(np.arange(30), [7, 9])
    assert (found.p[others] > 0.05).all()
    assert (found.concept[9], found.pooling[9]) == ("", "")
    assert np.isnan(found.p[9])
    assert np.isnan(found.auroc[9])
    assert np.isnan(found.heldout_auroc).all()


def test_corrected_p_holds_its_level_over_all_latents_and_concepts():
    """Without any effect, few of 60 families of 5 x 30 tests have a single p <= .05."""
    hits = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        labels, scores = rng.random((80, 5)) < 0.4, rng.standard_normal((80, 30))
        hits += bool((aligned(scores, labels, np.repeat(np.arange(10), 8), seed).p <= 0.05).any())
    assert hits <= 8  # binomial(60, .05) is above 8 with probability .002


def test_compositions_are_the_unit_and_not_clips():
    """A label that belongs to whole compositions, and scores that do too, by chance alone: Mann and
    Whitney over clips calls many significant, the permutation of compositions none."""
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(8), 20)
    labels = (np.arange(8) % 2 == 0)[groups][:, None]
    scores = rng.standard_normal((8, 40))[groups] + 0.1 * rng.standard_normal((160, 40))
    naive = [mannwhitneyu(s[labels[:, 0]], s[~labels[:, 0]]).pvalue * 40 for s in scores.T]
    assert (np.array(naive) < 0.05).sum() > 10
    found = aligned(scores, labels, groups)
    assert not (found.p <= 0.05).any()


def test_concept_and_pooling_are_chosen_on_validation():
    rng = np.random.default_rng(0)
    labels = {k: rng.random((90, 2)) < 0.5 for k in ("validation", "test", "heldout_font")}
    noise = {k: {p: rng.uniform(0, 1, (90, 3)) for p in ("mean", "max")} for k in labels}
    noise["validation"]["max"][:, 0] += labels["validation"][:, 1]
    noise["test"]["mean"][:, 0] += labels["test"][:, 0]  # better on test, but not to be looked at
    found = align({"x": noise}, labels, np.repeat(np.arange(9), 10), ["u", "v"], 99, 0)
    found = found["x"]
    assert (found.concept[0], found.pooling[0]) == ("v", "max")
    for values, name in ((found.auroc, "test"), (found.heldout_auroc, "heldout_font")):
        expected = stats.auroc(noise[name]["max"][:, 0], labels[name][:, 1])
        assert values[0] == pytest.approx(expected)
    assert found.p[0] > 0.05


def test_clips_without_a_label_are_left_out_concept_by_concept():
    """A concept's z, AUROC and choice are those on its labelled clips alone."""
    rng = np.random.default_rng(3)
    labels, scores = rng.random((120, 3)) < 0.4, rng.uniform(0, 1, (120, 12))
    scores[:, 5] += 0.8 * labels[:, 1]
    labelled = np.ones((120, 3), bool)
    labelled[:, 1] = rng.random(120) < 0.7
    scores[~labelled[:, 1] & labels[:, 1], 5] = -9.0  # would spoil it if these were looked at
    sets, groups = ("validation", "test", "heldout_font"), np.repeat(np.arange(12), 10)
    names = ["u", "v", "w"]

    def aligned_to(labels, labelled):
        return align(
            {"x": {s: {"mean": scores} for s in sets}}, dict.fromkeys(sets, labels), groups, names,
            99, 0, dict.fromkeys(sets, labelled),
        )["x"]  # fmt: skip

    found = aligned_to(labels, labelled)
    assert (found.concept[5], found.p[5]) == ("v", 1 / 100)
    at = labelled[:, 1]
    expected = stats.auroc(scores[at, 5], labels[at, 1])
    assert found.auroc[5] == found.heldout_auroc[5] == pytest.approx(expected)
    other = aligned_to(labels & labelled, labelled)  # labels of other clips change nothing
    for name in ("concept", "auroc", "heldout_auroc", "p"):
        np.testing.assert_array_equal(getattr(found, name), getattr(other, name))
    rows = pd.DataFrame(labels, columns=[f"has_{c}" for c in names]).astype("boolean")
    rows.loc[~at, "has_v"] = pd.NA
    sizes = [int(min(labels[k, j].sum(), (~labels[k, j]).sum())) for j, k in enumerate(labelled.T)]
    every = [np.arange(120)] * 2
    assert usable_concepts(rows, every, names, sizes[1]) == (names, {})
    assert usable_concepts(rows, every, names, sizes[1] + 1)[1] == {"v": sizes[1]}


def test_rare_concepts_are_left_out_and_counted():
    rows = pd.DataFrame({"has_a": [True] * 5 + [False] * 5, "has_b": [True] + [False] * 9})
    halves = [np.arange(0, 10, 2), np.arange(1, 10, 2)]
    assert usable_concepts(rows, halves, ["a", "b"], 2) == (["a"], {"b": 0})
    with pytest.raises(ValueError, match="min_clips"):
        usable_concepts(rows, halves, ["a", "b"], 4)


def test_p_and_q_are_those_of_all_permutations():
    rng = np.random.default_rng(0)
    x = rng.random((8, 6)) + np.array([0.5, 0, 0, 0, 0, 0]) * (np.arange(8) < 4)[:, None]
    labels = np.arange(8) < 4
    table = rank_by_auroc(x, labels, 20_000, 5, 3).set_index("feature")

    def statistic(truth):
        return np.array([mannwhitneyu(x[truth, j], x[~truth, j]).statistic for j in range(6)])

    permuted = [np.isin(np.arange(8), c) for c in itertools.combinations(range(8), 4)]
    null = np.stack([statistic(truth) for truth in permuted])
    seen = statistic(labels)
    for j in range(6):
        row = table.loc[j]
        assert row["auroc"] == pytest.approx(seen[j] / 16)
        assert row["p"] == pytest.approx((null[:, j] >= seen[j]).mean(), abs=0.02)
        assert row["q"] == pytest.approx((null.max(1) >= seen[j]).mean(), abs=0.02)


def test_q_holds_its_level_without_any_effect():
    """q promises at most 5 % of draws with any discovery; 60 draws of 300 skewed features."""
    hits = 0
    for draw in range(60):
        rng = np.random.default_rng(draw)
        shared = rng.exponential(size=(20, 1))
        x = rng.exponential(size=(20, 300)) ** 2 * (rng.random((20, 300)) < 0.5) * shared
        hits += (rank_by_auroc(x, np.arange(20) < 10, 199, 1, draw)["q"] <= 0.05).any()
    assert hits <= 8  # binomial(60, .05) exceeds it once in a thousand


def test_planted_features_are_found_from_ten_recordings():
    rng = np.random.default_rng(1)
    labels = np.arange(20) < 10
    x = rng.exponential(size=(20, 500))
    x[:, :5] += 6 * labels[:, None]
    table = rank_by_auroc(x, labels, 999, 20, 0)
    assert set(table.index[table["q"] <= 0.05]) == set(range(5))
    assert set(table["feature"].head(5)) == set(range(5))
    assert (table["effect_size"].head(5) > 2).all()
    assert (table["stability"].head(5) > 0.9).all()
    assert table["stability"].iloc[100:].max() == 0


def test_groups_are_permuted_together():
    """Ten excerpts a piece, and features that know pieces: as single clips they would count."""
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(8), 10)
    labels = groups < 4
    x = rng.random((8, 40))[groups] + 0.05 * rng.random((80, 40))
    assert (rank_by_auroc(x, labels, 199, 1, 0)["q"] <= 0.05).any()
    grouped = rank_by_auroc(x, labels, 199, 1, 0, groups)
    assert not (grouped["q"] <= 0.05).any()


def test_rare_and_constant_features_are_not_tested():
    x = np.random.default_rng(3).random((20, 4))
    x[:, 1] = 0
    x[2:, 2] = 0
    x[:, 3] = 0.5
    assert rank_by_auroc(x, np.arange(20) < 10, 19, 1, 0)["feature"].tolist() == [0]
    none = rank_by_auroc(x[:, 1:], np.arange(20) < 10, 19, 1, 0)
    assert len(none) == 0
    with pytest.raises(ValueError, match="1 recordings with"):
        rank_by_auroc(x, np.arange(20) < 1, 19, 1, 0)
