"""Planted confounds are named, and clean folders give no warning."""

import numpy as np
import pandas as pd
import pytest

from musicscope.finder.confounding import TOGETHER, known_cues, measure
from musicscope.finder.evaluation import draw_clips, without_concept
from tests.support.planted import find_concept_section

N = 24
LABELS = np.arange(N) < N // 2


def cues(seed, **shift):
    """Cues at random; `shift` moves the named ones up with the concept."""
    rng = np.random.default_rng(seed)
    names = ("loudness", "centroid", "length")
    return pd.DataFrame({n: rng.normal(size=N) + shift.get(n, 0) * LABELS for n in names})


def test_a_confound_is_named_with_its_number():
    for shift in (6, -6):  # quieter is a confound as well
        found = measure(cues(0, loudness=shift), LABELS, 0.99, 1)
        assert found.warns
        assert found.worst == "loudness"
        assert found.separation["loudness"] == 1.0
        assert "loudness separates the two sides as well as the best feature" in found.text()
        assert "AUROC 1.00 against 0.99" in found.text()


def test_a_cue_below_the_best_feature_is_no_warning():
    found = measure(cues(0, loudness=1.8), LABELS, 1.0, 1)
    assert found.p["loudness"] <= 0.01
    assert 0.8 < found.separation["loudness"] < 0.97
    assert not found.warns
    assert found.text() == ""


def test_clean_folders_give_no_warning():
    """Not even beside a poor feature: a cue must be beyond chance first."""
    warned = [measure(cues(seed), LABELS, 0.7, seed).warns for seed in range(100, 140)]
    assert np.mean(warned) <= 0.05


def test_cues_that_separate_only_together_are_found():
    rng = np.random.default_rng(3)
    common = 2 * rng.normal(size=N)
    pair = pd.DataFrame({"a": common + LABELS, "b": common - LABELS})
    found = measure(pair, LABELS, 0.9, 0)
    assert max(found.separation["a"], found.separation["b"]) < 0.75
    assert found.worst == TOGETHER
    assert found.warns


def test_dependent_recordings_are_permuted_together():
    """Six compositions of four clips: the clips of one are not four pieces of evidence."""
    groups = np.arange(N) // 4
    table = pd.DataFrame({"tempo": np.repeat(np.random.default_rng(1).normal(size=6), 4)})
    labels = groups < 3
    table["tempo"] += 2.5 * labels
    alone, together = (measure(table, labels, 0.5, 0, of) for of in (None, groups))
    assert alone.p["tempo"] == 1 / 100
    assert together.p["tempo"] > 0.05


def test_no_cues_or_constant_ones():
    for table in (pd.DataFrame(index=range(N)), pd.DataFrame({"a": np.ones(N)})):
        found = measure(table, LABELS, 0.8, 0)
        assert not found.warns
        assert found.worst is None
        assert found.as_metrics()["separation"] is None


def test_labels_of_clips_are_cues():
    rows = pd.DataFrame({"style": ["waltz"] * 5 + ["reel"] * 4 + ["jig"] * 2 + [""] * 3})
    rows["tempo_bpm"] = [float("nan"), *range(13)]
    table = known_cues(rows)
    assert list(table) == ["style=reel", "style=waltz"]
    assert table["style=waltz"].sum() == 5


def test_draws_have_one_clip_per_composition():
    groups = np.repeat(np.arange(30), 4).astype(str)
    sides = np.tile([True, False, False, False], 30)
    for seed in range(20):
        at = draw_clips(np.random.default_rng(seed), groups, sides, 10)
        assert len(set(groups[at])) == len(at) == 20
        assert sides[at].sum() == 10


@pytest.fixture(scope="module")
def null():
    """Feature 5 follows loudness, and no feature follows anything else."""
    rng = np.random.default_rng(7)
    groups = np.repeat(np.arange(40), 3).astype(str)
    table = pd.DataFrame({n: rng.normal(size=120) for n in ("rms", "centroid")})
    x = rng.exponential(size=(120, 50))
    x[:, 5] = np.exp(table["rms"])
    section = find_concept_section(permutations=499, few_draws=20)
    return without_concept(x, groups, table, section, 0)


def test_confounded_sides_are_found_and_warned_of(null):
    loud = null["confounded"]["rms"]
    assert loud["any_discovery"] == loud["warned"] == 1.0
    assert loud["missed"] == null["confounded"]["centroid"]["missed"] == 0.0


def test_exchangeable_sides_find_and_warn_of_nothing(null):
    assert null["recordings"] == 10
    assert null["any_discovery"] <= 0.2
    assert null["warned"] <= 0.2
