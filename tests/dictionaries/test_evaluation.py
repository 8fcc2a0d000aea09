"""Metrics against closed cases and independent formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from musicscope.dictionaries import evaluation as metrics
from musicscope.dictionaries.core import TopKSAE


def lossless(d: int, mean: np.ndarray | None = None) -> TopKSAE:
    """x = relu(x) - relu(-x): 2d latents, all kept, reconstruct any input."""
    W = torch.cat([torch.eye(d), -torch.eye(d)])
    b_dec = torch.zeros(d) if mean is None else torch.tensor(mean, dtype=torch.float32)
    return TopKSAE(W, torch.zeros(2 * d), W, b_dec, k=2 * d)


def blind(d: int, mean: np.ndarray) -> TopKSAE:
    """Whatever the input, answers with `mean`."""
    return replace(lossless(d, mean), W_dec=torch.zeros(2 * d, d))


def clips(n=6, T=40, d=5, seed=0) -> list[np.ndarray]:
    """Clips of different means and scales, with one heavy dimension far from 0."""
    rng = np.random.default_rng(seed)
    scale = np.r_[30.0, np.ones(d - 1)]
    return [
        ((rng.standard_normal((T + i, d)) + rng.standard_normal(d)) * scale + 100 * scale).astype(
            np.float32
        )
        for i in range(n)
    ]


def test_explained_variance_is_0_for_the_mean_and_1_for_the_input():
    data = clips()
    mean = np.concatenate(data).astype(np.float64).mean(0)
    assert metrics.evaluate(blind(5, mean), data).explained_variance == pytest.approx(0, abs=1e-6)
    assert metrics.evaluate(lossless(5, mean), data).explained_variance == pytest.approx(1)


def test_explained_variance_equals_the_formula_on_all_frames_at_once():
    data = clips()
    x = np.concatenate(data).astype(np.float64)
    sae = replace(lossless(5, x.mean(0) + 3), k=2)
    error = x - sae.reconstruct(torch.from_numpy(np.concatenate(data))).double().numpy()
    expected = 1 - np.square(error).sum() / np.square(x - x.mean(0)).sum()
    found = metrics.evaluate(sae, data)
    assert found.explained_variance == pytest.approx(expected, rel=1e-6)
    low, high = found.interval([f"g{i}" for i in range(6)], 200, seed=0)
    assert low < found.explained_variance < high
    again = metrics.explained_variance(
        lambda f: sae.reconstruct(torch.from_numpy(f).float()).double().numpy(), data
    )
    assert again == pytest.approx(expected, rel=1e-5)


def test_density_l0_and_dead():
    """Latent i fires on x_i > 0, latent d + i on x_i < 0."""
    data = [np.array([[1.0, -1.0], [2.0, -1.0], [3.0, 0.0], [4.0, 0.0]], np.float32)]
    found = metrics.evaluate(lossless(2), data)
    assert found.density.tolist() == [1.0, 0.0, 0.0, 0.5]
    assert found.dead_fraction == 0.5
    assert found.l0 == 1.5
    rows = metrics.density_histogram(np.array([1.0, 0.0, 0.0, 0.5, 1e-9]))
    assert rows[0]["latents"] == 2
    assert sum(row["latents"] for row in rows) == 5
    assert (
        rows[-1]["latents"] == 1
    )  # density 1 belongs to the last bin; .5 = 10^-.30 to the one before
    assert rows[1]["latents"] == 1  # rarer than the first edge is counted there, not lost


def test_no_clips_is_an_error():
    with pytest.raises(ValueError, match="no clips"):
        metrics.evaluate(lossless(3), [])


def test_matched_cosine_sees_through_order_and_scale_but_not_sign():
    rng = np.random.default_rng(0)
    dictionary = rng.standard_normal((30, 8))
    shuffled = dictionary[rng.permutation(30)] * rng.uniform(1, 3, (30, 1))
    assert metrics.matched_cosine(dictionary, shuffled) == pytest.approx(1)
    assert metrics.matched_cosine(dictionary[:1], -dictionary[:1]) == pytest.approx(-1)


def test_stability_null_has_the_dictionarys_statistics_and_lies_below():
    rng = np.random.default_rng(0)
    base = rng.standard_normal((400, 6)) * np.arange(1, 7) + 2
    null = metrics.random_like(base, seed=1)
    np.testing.assert_allclose(np.cov(null.T), np.cov(base.T), atol=6)
    np.testing.assert_allclose(null.mean(0), base.mean(0), atol=1)
    found = metrics.stability([base, base + 0.1 * rng.standard_normal(base.shape)], seed=0)
    assert found["stability"] > 0.98 > found["stability_null"]
    assert metrics.stability([base], seed=0) == {"stability": None, "stability_null": None}


def test_principal_components_recover_what_has_their_rank():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 3)) @ rng.standard_normal((3, 10)) + 7
    assert metrics.explained_variance(metrics.principal_components(x, 3), [x]) == pytest.approx(1)
    two = metrics.explained_variance(metrics.principal_components(x, 2), [x])
    values = np.linalg.eigvalsh(np.cov(x.T))
    assert two == pytest.approx(values[-2:].sum() / values.sum())


def test_random_dictionary_has_the_best_gain():
    x = np.random.default_rng(0).standard_normal((500, 6)).astype(np.float32) + 4
    sae = replace(lossless(6, x.mean(0)), k=3)
    control = metrics.random_dictionary(sae, x, seed=0)
    assert control.k == 3
    assert control.W_enc.norm(dim=1).sub(1).abs().max() < 1e-5
    found = metrics.evaluate(control, [x]).explained_variance
    assert 0 < found < 1
    for factor in (0.9, 1.1):
        other = replace(control, W_dec=control.W_dec * factor)
        assert metrics.evaluate(other, [x]).explained_variance < found


def test_hook_replaces_the_frames_only():
    hidden = torch.randn(2, 7, 3)
    out = metrics.replace_frames(torch.zeros_like, frames=4)(hidden, torch.arange(7))
    assert (out[:, 1:5] == 0).all()
    assert torch.equal(out[:, [0, 5, 6]], hidden[:, [0, 5, 6]])
    assert hidden[:, 1:5].abs().min() > 0


def test_ce_recovered_is_1_for_a_lossless_and_0_for_a_blind_sae(tiny_musicgen: Path):
    from musicscope.models.registry import load_model

    model = load_model(tiny_musicgen)
    audio = 0.3 * torch.randn(4, 3200, generator=torch.Generator().manual_seed(0))
    batch = model.encode(audio, ["flute", None, "flute", "brass and bass"])
    layer = model.hook_points[1].name
    with torch.no_grad():
        mean = model.capture(batch, [layer])[layer].mean((0, 1))
    found = {}
    for name, sae in (("lossless", lossless(48)), ("blind", blind(48, mean.numpy()))):
        losses = metrics.cross_entropies(model, layer, sae, mean, [batch])
        assert losses["clean"].shape == (4,)
        # Which of them is lower in a random model is chance; swapped, the ratio is the same.
        if losses["ablated"].sum() < losses["clean"].sum():
            losses = {k: -v for k, v in losses.items()}
        found[name] = metrics.ce_recovered(losses, ["a", "a", "b", "c"], 100, seed=0)
    assert found["lossless"]["ce_recovered"] == pytest.approx(1, abs=1e-4)
    assert found["blind"]["ce_recovered"] == pytest.approx(0, abs=1e-4)
    assert found["blind"]["ce_clean"] != pytest.approx(found["blind"]["ce_ablated"], abs=1e-4)


def test_ce_recovered_is_undefined_where_ablation_does_not_hurt():
    losses = {n: np.array(v) for n, v in {"clean": [2.0], "ablated": [1.9], "sae": [2.0]}.items()}
    found = metrics.ce_recovered(losses, ["a"], 10, seed=0)
    assert found["ce_recovered"] is None
    assert found["ce_clean"] == 2.0
