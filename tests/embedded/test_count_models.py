"""Count models on sequences of known entropy, with controls."""

from __future__ import annotations

import numpy as np
import pytest

from musicscope.embedded.pretraining.count_models import (
    COARSER,
    PREVIOUS,
    TRIGRAM,
    UNIGRAM,
    count_cross_entropy,
)

CARD = 8


def entropy(p: np.ndarray) -> float:
    return float(-(p * np.log(p)).sum())


def planted(seed: int, clips: int) -> np.ndarray:
    """Codebook 0: the code before plus noise; 1: from the two codes before; 2: from codebook 1."""
    rng = np.random.default_rng(seed)
    codes = np.zeros((clips, 3, 200), np.int64)
    codes[..., :2] = rng.integers(0, CARD, (clips, 3, 2))
    steps = rng.choice(CARD, (clips, 3, 200), p=NOISE)
    for t in range(2, 200):
        codes[:, 0, t] = (codes[:, 0, t - 1] + steps[:, 0, t]) % CARD
        codes[:, 1, t] = (codes[:, 1, t - 1] + codes[:, 1, t - 2] + steps[:, 1, t]) % CARD
    codes[:, 2] = (3 * codes[:, 1] + steps[:, 2]) % CARD
    return codes


NOISE = np.array([0.6, 0.2, 0.1, 0.02, 0.02, 0.02, 0.02, 0.02])
TRAIN, VALIDATION, TEST = (planted(seed, n) for seed, n in ((0, 200), (1, 10), (2, 20)))


def loss(*chains) -> np.ndarray:
    return count_cross_entropy(TRAIN, VALIDATION, TEST, CARD, chains).mean(0)


def test_each_model_reaches_the_entropy_of_what_it_can_see():
    truth, uniform = entropy(NOISE), np.log(CARD)
    np.testing.assert_allclose(loss(UNIGRAM), uniform, atol=0.02)
    np.testing.assert_allclose(loss(PREVIOUS), [truth, uniform, uniform], atol=0.04)
    trigram = loss(TRIGRAM)
    np.testing.assert_allclose(trigram[:2], truth, atol=0.04)
    assert trigram[2] > truth + 0.2
    both = loss(TRIGRAM, COARSER)
    np.testing.assert_allclose(both, truth, atol=0.06)


def test_a_finer_codebook_is_never_seen():
    """Codebook 1 is a function of codebook 2, which the delay pattern predicts later."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, CARD, (40, 2, 100))
    codes[:, 0] = codes[:, 1]
    found = count_cross_entropy(codes[:30], codes[30:35], codes[35:], CARD, (TRIGRAM, COARSER))
    assert found[:, 0].mean() > np.log(CARD) - 0.05
    assert found[:, 1].mean() < 0.1
    for later in ((-1, 0), (0, 0)):
        with pytest.raises(ValueError, match="not known"):
            count_cross_entropy(TRAIN, VALIDATION, TEST, CARD, (((), (later,)),))


def test_unseen_contexts_fall_back_and_probabilities_sum_to_one():
    """Of every code in turn at one frame: the probabilities of all codes sum to 1."""
    train, validation = TRAIN[:3], VALIDATION[:2]
    total = np.zeros((1, 3))
    for code in range(CARD):
        test = np.array([[[code]]] * 3).reshape(1, 3, 1)
        # One frame: codebook 0 has no context; the others see codebook 0, which is `code` too.
        found = count_cross_entropy(train, validation, test, CARD, (UNIGRAM, PREVIOUS, TRIGRAM))
        assert np.isfinite(found).all()
        total += np.exp(-found)
    np.testing.assert_allclose(total, 1.0, atol=1e-9)


def test_training_clips_among_the_others_are_refused():
    """Strengths chosen on training clips would leave counts unsmoothed: a weak baseline."""
    for validation, test in ((TRAIN[:2], TEST), (VALIDATION, TRAIN[-1:])):
        with pytest.raises(ValueError, match="training clip"):
            count_cross_entropy(TRAIN, validation, test, CARD, (PREVIOUS,))


def test_codes_outside_the_codebook_are_refused():
    with pytest.raises(ValueError, match=r"0\.\.3"):
        count_cross_entropy(TRAIN, TRAIN, TRAIN, 4, (UNIGRAM,))
