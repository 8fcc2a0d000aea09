"""The judge by centroids: finds a planted family, keeps quiet on silence, survives its file."""

from __future__ import annotations

import numpy as np
import pytest

from musicscope.core.stats import auroc
from musicscope.judges.embedding_distance import EmbeddingJudge, load_embedding_judge


def planted(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings whose dimension 0 tells family 0; family 1 is unrelated, family 2 never there."""
    rng = np.random.default_rng(seed)
    labels = rng.random((n, 3)) < 0.5
    labels[:, 2] = False
    values = rng.standard_normal((n, 6)) * np.array([1, 1, 1, 1, 50, 0])
    values[:, 0] += 2.5 * labels[:, 0]
    return values, labels


def test_it_finds_what_was_planted_in_unseen_clips_and_no_more(tmp_path):
    values, labels = planted(200, 0)
    values[3] = np.nan
    judge = EmbeddingJudge.fit(values, labels)
    fresh, truth = planted(300, 1)
    found = judge.predict(fresh)
    assert auroc(found[:, 0], truth[:, 0]) > 0.9
    assert 0.4 < auroc(found[:, 1], truth[:, 1]) < 0.6
    assert np.isnan(found[:, 2]).all()
    assert (found[truth[:, 0], 0].mean() > 0.6) & (found[~truth[:, 0], 0].mean() < 0.4)
    assert np.isnan(judge.predict(np.full((1, 6), np.nan))).all()
    judge.save(tmp_path / "judge.safetensors")
    again = load_embedding_judge(tmp_path / "judge.safetensors", "abc")
    np.testing.assert_array_equal(again.predict(fresh), found)
    with pytest.raises(ValueError, match="rerun train_judge"):
        load_embedding_judge(tmp_path / "judge.safetensors", "ab")
    with pytest.raises(FileNotFoundError, match="train_judge"):
        load_embedding_judge(tmp_path / "none", "abc")
    with pytest.raises(ValueError, match="1 of 2 clips sound"):
        EmbeddingJudge.fit(np.array([[1.0], [np.nan]]), np.ones((2, 1), bool))
