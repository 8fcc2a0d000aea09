"""Latent Scaling tells a latent that one model has alone from one whose decoder row shrank."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from musicscope.dictionaries import latent_scaling
from musicscope.dictionaries.core import ModelWeights, UniversalSAE

GROUPS, FRAMES, WIDTHS = 8, 400, (8, 10)
SHARED, OWN, HIDDEN, IDLE = range(4)
"""Latents: in both models; in the first alone; in both but without a decoder row in the second;
never active."""


def clips(seed: int) -> list[list[np.ndarray]]:
    """Feature f is dimension f of a model; HIDDEN is half as strong in the second. Mean 0."""
    rng = np.random.default_rng(seed)
    strengths = (np.array([1, 1, 1, 0]), np.array([1, 0, 0.5, 0]))
    found = []
    for _ in range(GROUPS):
        f = (rng.random((FRAMES, 4)) < 0.2) * rng.uniform(1, 2, (FRAMES, 4))
        f -= f.mean(0)
        f[:, IDLE] = 0
        pair = []
        for width, strength in zip(WIDTHS, strengths, strict=True):
            x = 0.3 * rng.standard_normal((FRAMES, width))
            x[:, :4] += f * strength
            pair.append(x.astype(np.float32))
        found.append(pair)
    return found


@pytest.fixture(scope="module")
def crosscoder() -> UniversalSAE:
    rows = (torch.eye(4, WIDTHS[0]), torch.zeros(4, WIDTHS[1]))
    rows[1][SHARED, SHARED] = 1.0
    sides = []
    for rows_of, width, reads in zip(rows, WIDTHS, (1.0, 0.0), strict=True):
        bias = torch.full((4,), -0.5 * reads)
        bias[IDLE] = -9.0
        zero, one = torch.zeros(width), torch.tensor(1.0)
        sides.append(ModelWeights(reads * rows_of, bias, rows_of, zero, zero, one))
    return UniversalSAE(("a", "b"), "top1", "crosscoder", 4, tuple(sides))


def test_nu_is_that_of_the_planted_features(crosscoder):
    groups = np.array([f"g{i}" for i in range(GROUPS)])
    found, unrelated = latent_scaling.scale_latents(
        crosscoder, clips(0), clips(1), groups, np.arange(4)
    )
    error, activation = found.nu(0)
    for nu in (error, activation):
        assert nu[SHARED] == pytest.approx(1, abs=0.1)
        assert nu[OWN] < latent_scaling.NU_ERROR
        assert nu[HIDDEN] == pytest.approx(0.5, abs=0.1)
        assert np.isnan(nu[IDLE])
    null = unrelated.nu(0)
    assert null[0][[SHARED, OWN, HIDDEN]].max() < 0.3
    chosen, _ = latent_scaling.scale_latents(
        crosscoder, clips(0), clips(1), groups, np.array([HIDDEN])
    )
    np.testing.assert_allclose(chosen.nu(0)[0], error[[HIDDEN]], rtol=1e-5)
    summary = latent_scaling.summarise((error, activation), null, 20, 0)
    assert (summary["latents"], summary["scored"]) == (4, 3)
    assert summary["genuine"]["value"] == pytest.approx(1 / 3)
    assert summary["nu_error_median"] == pytest.approx(0.5, abs=0.1)


def test_activations_hold_what_errors_no_longer_do(crosscoder):
    """A feature that other latents reconstruct in full leaves nothing in the second's errors."""
    groups = np.array([f"g{i}" for i in range(GROUPS)])
    W = crosscoder.weights[1].W_dec.clone()
    W[OWN] = 0.5 * torch.eye(4, WIDTHS[1])[HIDDEN]  # stands in wherever OWN copies HIDDEN
    a, b = crosscoder.weights
    sides = (a, ModelWeights(b.W_enc, b.b_enc, W, b.b_dec, b.mean, b.scale))
    stand_in = UniversalSAE(("a", "b"), "top1", "crosscoder", 4, sides)
    copied = clips(0)
    for x, _ in copied:
        x[:, OWN] = x[:, HIDDEN]
    latents = np.array([HIDDEN])
    found, _ = latent_scaling.scale_latents(stand_in, copied, copied, groups, latents)
    error, activation = found.nu(0)
    assert error[0] < 0.2
    assert activation[0] == pytest.approx(0.5 / 2**0.5, abs=0.05)  # the first model has it twice


def test_sets_by_share():
    shares = np.array([[0.95, 0.5, 0.05, np.nan, 0.8], [0.05, 0.5, 0.95, np.nan, 0.2]])
    sets = latent_scaling.exclusive_sets(shares, 0.9, 0.6, 0)
    assert {name: found.tolist() for name, found in sets.items()} == {
        "own_0": [0], "own_1": [2], "shared": [1]
    }  # fmt: skip
    many = latent_scaling.exclusive_sets(np.full((2, 2000), 0.5), 0.9, 0.6, 0)["shared"]
    assert len(many) == latent_scaling.MOST_LATENTS == len(set(many))
