"""Metrics against closed cases and independent formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from musicscope.dictionaries import evaluation as metrics
from musicscope.dictionaries import fidelity, tables
from musicscope.dictionaries.core import ModelWeights, TopKSAE, UniversalSAE


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
    estimate = found.estimate([f"g{i}" for i in range(6)], 200, seed=0)
    assert estimate.value == pytest.approx(found.explained_variance, rel=1e-12)
    assert estimate.low < found.explained_variance < estimate.high
    assert (estimate.n, estimate.unit) == (6, "share")
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
    control = metrics.random_sae(sae, x, seed=0)
    assert control.k == 3
    assert control.W_enc.norm(dim=1).sub(1).abs().max() < 1e-5
    found = metrics.evaluate(control, [x]).explained_variance
    assert 0 < found < 1
    for factor in (0.9, 1.1):
        other = replace(control, W_dec=control.W_dec * factor)
        assert metrics.evaluate(other, [x]).explained_variance < found


def test_hook_replaces_the_frames_only():
    hidden = torch.randn(2, 7, 3)
    out = fidelity.replace_frames(torch.zeros_like, frames=4)(hidden, torch.arange(7))
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
        losses = fidelity.cross_entropies(model, layer, sae, mean, [batch])
        assert losses["clean"].shape == (4,)
        # Which of them is lower in a random model is chance; swapped, the ratio is the same.
        if losses["ablated"].sum() < losses["clean"].sum():
            losses = {k: -v for k, v in losses.items()}
        found[name] = fidelity.ce_recovered(losses, ["a", "a", "b", "c"], 100, seed=0)
    assert found["lossless"]["ce_recovered"]["value"] == pytest.approx(1, abs=1e-4)
    assert found["blind"]["ce_recovered"]["value"] == pytest.approx(0, abs=1e-4)
    assert found["blind"]["ce_recovered"]["n"] == 3
    assert found["blind"]["ce_clean"] != pytest.approx(found["blind"]["ce_ablated"], abs=1e-4)


def test_ce_recovered_is_undefined_where_ablation_does_not_hurt():
    losses = {n: np.array(v) for n, v in {"clean": [2.0], "ablated": [1.9], "sae": [2.0]}.items()}
    found = fidelity.ce_recovered(losses, ["a"], 10, seed=0)
    assert found["ce_recovered"] is None
    assert found["ce_clean"] == 2.0


# --- a code that models share ------------------------------------------------------------------


def test_firing_entropy_golden_values():
    fires = np.array([[5, 4, 7, 0, 3, 1], [5, 0, 7, 0, 1, 1], [5, 0, 0, 0, 0, 2]])
    expected = [1, 0, np.log(2) / np.log(3), np.nan, np.nan, 1.5 * np.log(2) / np.log(3)]
    p = np.array([3, 1]) / 4
    expected[4] = -(p * np.log(p)).sum() / np.log(3)
    np.testing.assert_allclose(metrics.firing_entropy(fires), expected, atol=1e-12)
    assert metrics.firing_entropy(np.array([[2], [2]])).tolist() == [1.0]
    with pytest.raises(ValueError, match="at least 2"):
        metrics.firing_entropy(np.ones((1, 4)))


def test_cofire_proportion_energy_and_correlation():
    share = metrics.cofire_proportion(np.array([2, 0, 0]), np.array([[4, 3, 0], [2, 0, 0]]))
    np.testing.assert_array_equal(share, [[0.5, 0, np.nan], [1, np.nan, np.nan]])
    codes, norms = np.array([[1.0, 2.0], [3.0, 0.0]]), np.array([[1.0, 2.0], [2.0, 5.0]])
    np.testing.assert_allclose(metrics.energy(codes, norms), [1 + 36, 16])
    rng = np.random.default_rng(0)
    power, cofires = rng.lognormal(size=50), rng.integers(0, 90, 50)
    keep = cofires > 0
    expected = np.corrcoef(np.log(power[keep]), np.log(cofires[keep]))[0, 1]
    assert metrics.log_correlation(power, cofires) == pytest.approx(expected)
    assert np.isnan(metrics.log_correlation(power[:2], np.array([4, 5])))


def lossless_shared(widths=(3, 4), origin=0.0) -> UniversalSAE:
    """2 max(d) latents, all kept; x_j = relu(x_j) - relu(-x_j) for every model, from its own code.

    Latents k and D + k stand for coordinate k in every model.
    """
    D, sides = max(widths), []
    for d in widths:
        W = torch.cat([torch.eye(D, d), -torch.eye(D, d)])
        mean = torch.full((d,), origin)
        sides.append(
            ModelWeights(W, torch.zeros(2 * D), W, torch.zeros(d), mean, torch.tensor(2.0))
        )
    names = tuple(f"m{j}" for j in range(len(widths)))
    return UniversalSAE(names, "top1", "usae", 2 * D, tuple(sides))


def paired_clips(widths=(3, 4), n=6, seed=0):
    """Clips whose first coordinates are the same in all models, far from 0."""
    rng = np.random.default_rng(seed)
    clips = []
    for i in range(n):
        x = 30 + rng.standard_normal((20 + i, max(widths))) * rng.uniform(0.5, 2, max(widths))
        clips.append([x[:, :d].astype(np.float32) for d in widths])
    return clips, [f"g{i // 2}" for i in range(n)]


def test_shared_r2_is_0_for_the_mean_and_1_for_the_input():
    clips, groups = paired_clips()
    found = metrics.numbers(
        metrics.evaluate_shared(lossless_shared(origin=30.0), clips, groups, 0.1)
    )
    assert found["r2_0_0"] == pytest.approx(1)
    assert found["r2_1_0"] == pytest.approx(1)  # the wider model knows all that the other has
    usae = lossless_shared()
    blind = []
    for j, side in enumerate(usae.weights):
        mean = np.concatenate([clip[j] for clip in clips]).astype(np.float64).mean(0)
        centre = torch.from_numpy(mean).float()
        blind.append(replace(side, W_dec=torch.zeros_like(side.W_dec), mean=centre))
    found = metrics.numbers(
        metrics.evaluate_shared(replace(usae, weights=tuple(blind)), clips, groups, 0.1)
    )
    for key in ("r2_0_0", "r2_0_1", "r2_1_0", "r2_1_1"):
        assert found[key] == pytest.approx(0, abs=1e-5), key


def test_r2_matrix_and_counts_equal_the_formula_on_all_frames():
    clips, groups = paired_clips()
    usae = replace(lossless_shared(origin=29.5), k=3)
    tau, F = 0.25, usae.n_latents
    found = metrics.evaluate_shared(usae, clips, groups, tau)
    xs = [torch.from_numpy(np.concatenate(x)) for x in zip(*clips, strict=True)]
    codes = [usae.encode(x, i) for i, x in enumerate(xs)]
    dense = torch.stack([torch.zeros(len(v), F).scatter_(1, i, v) for v, i in codes]).numpy()
    numbers = metrics.numbers(found)
    for i in range(2):
        for j in range(2):
            x = xs[j].double().numpy()
            error = x - usae.decode(*codes[i], j).double().numpy()
            expected = 1 - np.square(error).sum() / np.square(x - x.mean(0)).sum()
            assert numbers[f"r2_{i}_{j}"] == pytest.approx(expected, rel=1e-5)
    fires = (dense > tau).sum(1)
    np.testing.assert_array_equal(found.fires.sum(0), fires)
    cofires = (dense > tau).all(0).sum(0)
    np.testing.assert_array_equal(found.cofires.sum(0), cofires)
    np.testing.assert_allclose(found.values.sum(0), dense.sum(1), rtol=1e-5)
    assert numbers["l0_0"] == pytest.approx((dense[0] > 0).sum(1).mean())
    assert numbers["cofire_proportion_1"] == pytest.approx(cofires.sum() / fires[1].sum())
    alive = fires[1] > 0
    expected = (cofires[alive] / fires[1][alive]).mean()
    assert numbers["cofire_proportion_mean_1"] == pytest.approx(expected)
    assert numbers["cofire_proportion_top_1"] == pytest.approx(expected)  # fewer than 100 latents
    entropy = metrics.firing_entropy(fires)
    assert numbers["firing_entropy_median"] == pytest.approx(np.nanmedian(entropy))
    assert numbers["dead_fraction"] == (fires.sum(0) == 0).mean()
    power = metrics.energy(dense.mean(1), found.norms)
    expected = metrics.log_correlation(power, cofires)
    assert numbers["energy_cofire_correlation"] == pytest.approx(expected, rel=1e-4)


def test_intervals_resample_compositions():
    clips, groups = paired_clips(n=12)
    found = metrics.evaluate_shared(replace(lossless_shared(origin=29.5), k=3), clips, groups, 0.25)
    numbers, estimates = metrics.numbers(found), metrics.estimates(found, 200, seed=0)
    medians = {f"cofire_proportion_median_{i}" for i in (0, 1)}
    assert set(numbers) - set(estimates) == {"dead_fraction", "l0_0", "l0_1"} | medians
    for key, estimate in estimates.items():
        assert estimate.value == numbers[key]
        assert estimate.low <= numbers[key] + 1e-9, key
        assert estimate.high >= numbers[key] - 1e-9, key
        assert estimate.n == len(found.groups) == 6
        assert estimate.unit
    assert estimates["r2_0_1"].low < estimates["r2_0_1"].high
    weights = np.zeros((1, 6))
    weights[0, 2] = 6.0  # a resample of one composition alone is that composition's own count
    one = metrics.headline(found, weights)["cofire_proportion_0"][0]
    assert one == pytest.approx(found.cofires[2].sum() / found.fires[2, 0].sum())


def test_relative_norms_and_their_shares():
    norms = np.array([[1.0, 0.0, 3.0, 1.0], [1.0, 2.0, 1.0, 0.0]])
    np.testing.assert_allclose(metrics.relative_norms(norms)[1], [0.5, 1, 0.25, 0])
    found = metrics.norm_numbers(norms, np.array([True, True, True, False]))
    assert found["norm_shared"] == pytest.approx(1 / 3)
    assert found["norm_own_1"] == pytest.approx(1 / 3)
    assert found["norm_own_0"] == 0
    assert found["norm_spread"] == pytest.approx((0 + 0.5 + 0.25) / 3)


@pytest.mark.parametrize("kind", ["usae", "crosscoder"])
def test_random_shared_dictionary_has_the_best_gain_and_the_same_statistics(kind):
    g = torch.Generator().manual_seed(0)
    sides = []
    for d in (6, 9):
        W = torch.nn.functional.normalize(torch.randn(400, d, generator=g) + 0.5, dim=1)
        sides.append(
            ModelWeights(W, torch.zeros(400), W, torch.zeros(d), torch.zeros(d), torch.tensor(1.0))
        )
    usae = UniversalSAE(("a", "b"), "top1", kind, 4, tuple(sides))
    rng = np.random.default_rng(0)
    sample = [rng.standard_normal((500, d)).astype(np.float32) for d in (6, 9)]
    control = metrics.random_shared(usae, sample, seed=0)
    xs = [torch.from_numpy(x) for x in sample]
    for j, (side, x) in enumerate(zip(control.weights, xs, strict=True)):
        assert not torch.equal(side.W_enc, usae.weights[j].W_enc)
        row, own = side.W_enc.mean(0), usae.decoder(j).mean(0)
        torch.testing.assert_close(row, own, atol=0.12, rtol=0)
        code = control.encode_all(xs) if kind == "crosscoder" else control.encode(x, j)
        error = (x - control.decode(*code, j)).square().sum()
        for factor in (0.95, 1.05):
            assert error < (x - factor * control.decode(*code, j)).square().sum()


def test_histogram_counts_the_ends_and_leaves_out_what_never_fires():
    table = tables.histogram({"x": np.array([0.0, 0.04, 1.0, 0.999, np.nan, 0.5])})
    assert table["x"].sum() == 5
    assert table["x"].iloc[0] == table["x"].iloc[-1] == 2
    assert table["x"].iloc[10] == 1


def test_concentration_is_the_share_of_latents_that_hold_most_firings():
    fires = np.array([[90.0, 5, 3, 2, 0], [20, 20, 20, 20, 20]])
    np.testing.assert_allclose(metrics.concentration(fires), [0.2, 1.0])
    np.testing.assert_allclose(metrics.concentration(fires, 0.95), [0.4, 1.0])
