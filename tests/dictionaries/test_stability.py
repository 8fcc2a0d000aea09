"""Which latents return in other seeds, and which subspaces do, on planted dictionaries."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from musicscope.dictionaries import stability


def planted(seeds: int = 3, kept: int = 30, own: int = 50, d: int = 16) -> list[np.ndarray]:
    """Dictionaries that share `kept` directions, up to noise and order, and differ in the rest."""
    rng = np.random.default_rng(0)
    shared = rng.standard_normal((kept, d))
    found = []
    for _ in range(seeds):
        rows = shared + 0.05 * rng.standard_normal(shared.shape)
        found.append(np.concatenate([rows, rng.standard_normal((own, d))]))
    return [found[0], *(rng.permutation(rows) for rows in found[1:])]


def test_the_planted_latents_return_and_the_others_do_not():
    table = stability.per_latent(planted(), threshold=0.7, seed=0)
    assert table["returns"].tolist() == [True] * 30 + [False] * 50
    assert table["seed_cosine"].head(30).min() > 0.95
    assert (table["seed_cosine"].tail(50) - table["null_cosine"].tail(50)).abs().mean() < 0.2


def test_a_latent_must_return_in_every_seed_and_with_its_sign():
    first, second, third = planted()
    rows = first @ third.T
    third[rows[0].argmax()] *= -1  # latent 0 comes back reversed in one seed
    table = stability.per_latent([first, second, third], threshold=0.9, seed=0)
    assert not table["returns"][0]
    assert table["returns"].head(30).sum() == 29


def test_rows_no_better_than_the_null_do_not_return_whatever_the_threshold():
    rng = np.random.default_rng(1)
    unrelated = [rng.standard_normal((400, 3)) for _ in range(2)]  # 3 dimensions: all look alike
    table = stability.per_latent(unrelated, threshold=0.0, seed=0)
    assert table["seed_cosine"].mean() > 0.9
    assert table["returns"].mean() < 0.05


def test_one_seed_says_nothing(tmp_path):
    table = stability.per_latent(planted(seeds=1), threshold=0.7, seed=0)
    assert table["seed_cosine"].isna().all()
    assert not table["returns"].any()
    found, _ = stability.metrics(planted(seeds=1), [np.ones(80)], 0.7, 0)
    assert "returning" not in found
    assert [of["overlap"] for of in found["subspaces"].values()] == [None, None]


def test_the_table_survives_the_disk_and_its_lack_names_the_stage(tmp_path):
    table = stability.per_latent(planted(), threshold=0.7, seed=0)
    stability.write(tmp_path, table)
    pd.testing.assert_frame_equal(stability.read(tmp_path), table)
    with pytest.raises(FileNotFoundError, match="run dvc repro train_sae"):
        stability.read(tmp_path / "other")


def test_decoder_cosine_is_the_mean_of_all_pairs():
    eye = np.eye(4)
    assert stability.decoder_cosine(eye) == pytest.approx(0)
    assert stability.decoder_cosine(np.array([[1.0, 0], [-3, 0], [0, 1]])) == pytest.approx(1 / 3)


def test_overlap_is_1_for_the_same_span_and_n_over_d_for_random_ones():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((4, 40))
    assert stability.overlap(rows, rng.standard_normal((4, 4)) @ rows) == pytest.approx(1)
    assert stability.overlap(np.eye(40)[:4], np.eye(40)[2:6]) == pytest.approx(0.5)
    random = [stability.overlap(rows, rng.standard_normal((4, 40))) for _ in range(50)]
    assert np.mean(random) == pytest.approx(4 / 40, abs=0.02)


def test_unstable_latents_may_span_a_stable_subspace():
    """Each seed has other rows, but all within the same 4 of 16 dimensions."""
    rng = np.random.default_rng(0)
    wide = [rng.standard_normal((60, 16)) for _ in range(2)]
    narrow = [0.02 * rng.standard_normal((12, 16)) for _ in range(2)]
    for rows in narrow:
        rows[:, :4] += rng.standard_normal((12, 4))
    both = [np.concatenate([a, b]) for a, b in zip(narrow, wide, strict=True)]
    fired = [np.concatenate([np.full(12, 9), np.ones(60)])] * 2
    found = stability.subspaces(both, fired, threshold=0.999, seed=0)
    for name in ("used", "unstable"):
        assert found[name]["latents"] == 4
        assert float(found[name]["overlap"] or 0) > 0.9
        assert float(found[name]["null"] or 1) < 0.5
    few, _ = stability.metrics(planted(), [np.ones(80)] * 3, 0.7, 0)
    assert few["returning"]["share"] == pytest.approx(30 / 80)
    assert few["returning"]["share_of_firings"] == pytest.approx(30 / 80)
    assert few["returning"]["null_share"] <= 0.01
