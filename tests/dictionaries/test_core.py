"""Dictionaries: exact selection, sparse codes against dense ones, files others can read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from musicscope.dictionaries.core import (
    ModelWeights,
    TopKSAE,
    UniversalSAE,
    _by_topk,
    in_two_stages,
    largest_k,
)


def make(F=96, d=12, k=5, activation="topk", threshold=-1.0, seed=0) -> TopKSAE:
    g = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(F, d, generator=g), dim=1)
    W_enc, b_enc = torch.randn(F, d, generator=g), 0.2 * torch.randn(F, generator=g)
    b_dec = 50 + torch.randn(d, generator=g)
    return TopKSAE(W_enc, b_enc, W_dec, b_dec, k, activation, threshold)


THRESHOLDS = torch.linspace(0.5, 4, 96)


def frames(n=300, d=12, seed=1) -> torch.Tensor:
    return 50 + torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def dense(values, indices, F):
    return torch.zeros(len(values), F).scatter_add_(1, indices, values)


@settings(max_examples=60, deadline=None)
@given(
    F=st.integers(1, 40).map(lambda n: 8 * n) | st.integers(1, 200),
    share=st.floats(0, 1),
    levels=st.sampled_from([2, 5, 10**6]),
    seed=st.integers(0, 99),
)
def test_largest_k_equals_a_full_sort(F, share, levels, seed):
    """Few levels make ties everywhere; the values chosen must be the k largest all the same."""
    k = max(1, round(share * F))
    rng = np.random.default_rng(seed)
    z = torch.from_numpy(rng.integers(-levels, levels, (7, F)).astype(np.float32) / levels)
    expected = z.sort(1, descending=True).values[:, :k]
    for indices in (largest_k(z, k), in_two_stages(z, k, _by_topk)):  # the second as on a GPU
        assert all(len(set(row)) == k for row in indices.tolist())
        assert torch.equal(z.gather(1, indices).sort(1, descending=True).values, expected)


def test_codes_equal_the_dense_formula():
    sae, x = make(), frames()
    values, indices = sae.encode(x)
    z = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
    best = z.topk(5).indices
    expected = torch.zeros_like(z).scatter(1, best, z.gather(1, best))
    assert values.shape == indices.shape == (300, 5)
    torch.testing.assert_close(dense(values, indices, 96), expected)
    torch.testing.assert_close(sae.decode(values, indices), expected @ sae.W_dec + sae.b_dec)
    torch.testing.assert_close(sae.reconstruct(x.view(3, 100, 12)).view(300, 12), sae.decode(
        values, indices))  # fmt: skip


def test_batchtopk_inference_keeps_what_exceeds_the_threshold(monkeypatch):
    monkeypatch.setattr(
        "musicscope.dictionaries.core.CHUNK", 64
    )  # chunks of different widths must be padded
    sae, x = make(activation="batchtopk", threshold=4.0), frames()
    values, indices = sae.encode(x)
    z = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    torch.testing.assert_close(dense(values, indices, 96), torch.where(z > 4.0, z, 0.0))
    assert values.shape[1] == (z > 4.0).sum(1).max()
    with pytest.raises(ValueError, match="calibrate_threshold"):
        make(activation="batchtopk").encode(x)


def test_jumprelu_has_a_threshold_per_latent():
    sae, x = make(activation="jumprelu", threshold=THRESHOLDS), frames()
    z = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    torch.testing.assert_close(dense(*sae.encode(x), 96), torch.where(z > THRESHOLDS, z, 0.0))
    for threshold, message in ((1.0, r"is \(\), expected \(96,\)"), (THRESHOLDS[1:], r"\(95,\)")):
        with pytest.raises(ValueError, match=message):
            make(activation="jumprelu", threshold=threshold)
    with pytest.raises(ValueError, match="below 0"):
        make(activation="jumprelu", threshold=-THRESHOLDS)


def test_no_frames_give_no_codes():
    values, indices = make().encode(torch.empty(0, 12))
    assert values.shape == indices.shape == (0, 5)


@pytest.mark.parametrize(
    ("activation", "threshold"), [("topk", 2.0), ("batchtopk", 2.0), ("jumprelu", THRESHOLDS)]
)
def test_folding_moves_the_same_sae_to_raw_activations(activation, threshold):
    sae = replace(make(activation=activation, threshold=threshold), b_dec=torch.linspace(-1, 1, 12))
    mean, scale, x = torch.linspace(10, 60, 12), 7.0, frames()
    values, indices = sae.encode((x - mean) / scale)
    folded = sae.fold(mean, scale)
    raw_values, raw_indices = folded.encode(x)
    torch.testing.assert_close(
        dense(raw_values, raw_indices, 96), scale * dense(values, indices, 96), rtol=1e-4, atol=1e-4
    )
    expected = mean + scale * sae.decode(values, indices)
    torch.testing.assert_close(folded.reconstruct(x), expected, rtol=1e-5, atol=3e-4)
    assert torch.equal(folded.W_dec, sae.W_dec)


@pytest.mark.parametrize(
    ("activation", "threshold"), [("topk", -1.0), ("batchtopk", 3.5), ("jumprelu", THRESHOLDS)]
)
def test_dictionary_learning_loads_it_and_computes_the_same(tmp_path: Path, activation, threshold):
    from dictionary_learning.utils import load_dictionary

    sae, x = make(activation=activation, threshold=threshold), frames()
    sae.save(tmp_path, {"lr": 1e-3, "seed": 0, "lm_name": "nano"})
    theirs, config = load_dictionary(str(tmp_path), device="cpu")
    assert config["trainer"]["lm_name"] == "nano"
    out, codes = theirs(x, output_features=True)
    own = {"rtol": 1e-4, "atol": 1e-4} if activation == "jumprelu" else {}  # b_dec is folded in
    torch.testing.assert_close(codes, dense(*sae.encode(x), 96), **own)
    torch.testing.assert_close(out, sae.reconstruct(x), **own)


def test_a_jumprelu_sae_comes_back_from_either_file(tmp_path: Path):
    sae = make(activation="jumprelu", threshold=THRESHOLDS)
    sae.save(tmp_path)
    first = TopKSAE.load(tmp_path)
    (tmp_path / "sae.safetensors").unlink()
    second = TopKSAE.load(tmp_path)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
        assert torch.equal(getattr(first, name), getattr(sae, name))
        torch.testing.assert_close(getattr(second, name), getattr(sae, name), rtol=1e-4, atol=1e-4)
    assert (first.k, second.k, second.activation) == (5, 5, "jumprelu")


def test_files_round_trip_and_do_not_change_from_one_save_to_the_next(tmp_path: Path):
    sae = make(activation="batchtopk", threshold=1.25)
    for name in ("a", "b"):
        sae.save(tmp_path / name)
    for file in ("ae.pt", "sae.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    (tmp_path / "b" / "sae.safetensors").unlink()  # an SAE of dictionary_learning has ae.pt only
    for name in ("a", "b"):
        loaded = TopKSAE.load(tmp_path / name)
        assert (loaded.k, loaded.activation, loaded.threshold) == (5, "batchtopk", 1.25)
        for weight in ("W_enc", "b_enc", "W_dec", "b_dec"):
            assert torch.equal(getattr(loaded, weight), getattr(sae, weight))


def test_errors_name_the_weight_the_file_and_the_shape(tmp_path: Path):
    sae = make()
    with pytest.raises(ValueError, match=r"b_enc is \(95,\), expected \(96,\)"):
        replace(sae, b_enc=sae.b_enc[1:])
    with pytest.raises(ValueError, match="W_dec holds NaN"):
        replace(sae, W_dec=sae.W_dec * torch.nan)
    with pytest.raises(ValueError, match="k = 97"):
        replace(sae, k=97)
    with pytest.raises(ValueError, match=r"\(300, 11\).*\[N, 12\]"):
        sae.encode(frames(d=11))
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        TopKSAE.load(tmp_path)
    sae.save(tmp_path)
    state = sae.state_dict()
    state["b_dec"][0] = torch.inf
    torch.save(state, tmp_path / "ae.pt")
    (tmp_path / "sae.safetensors").unlink()
    with pytest.raises(ValueError, match=r"ae\.pt: SAE weight b_dec holds NaN or infinity"):
        TopKSAE.load(tmp_path)


# --- several models ---------------------------------------------------------------------------

WIDTHS = (24, 16, 32)


def make_shared(kind="usae", widths=WIDTHS, F=96, k=5, seed=0) -> UniversalSAE:
    g = torch.Generator().manual_seed(seed)
    sides = []
    for d in widths:
        W_dec = torch.nn.functional.normalize(torch.randn(F, d, generator=g), dim=1)
        draws = torch.randn(F, d, generator=g), 0.2 * torch.randn(F, generator=g), W_dec
        centre = 0.1 * torch.randn(d, generator=g), 50 + torch.randn(d, generator=g)
        sides.append(ModelWeights(*draws, *centre, torch.tensor(float(d) / 10)))
    names = tuple(f"m{j}" for j in range(len(widths)))
    return UniversalSAE(names, "top1", kind, k, tuple(sides))


def rows(usae: UniversalSAE, n=50, seed=1) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [50 + 3 * torch.randn(n, d, generator=g) for d in usae.widths]


def formula(usae, parts):
    """Dense codes of the summed pre-activations of {model: x}."""
    z = sum(
        ((x - s.mean) / s.scale - s.b_dec) @ s.W_enc.T + s.b_enc
        for s, x in ((usae.weights[i], x) for i, x in parts.items())
    )
    best = z.topk(usae.k).indices
    return torch.zeros_like(z).scatter(1, best, z.gather(1, best).relu())


def test_shared_codes_and_decodes_equal_the_dense_formula(monkeypatch):
    monkeypatch.setattr("musicscope.dictionaries.core.CHUNK", 16)
    usae = make_shared()
    xs = rows(usae)
    for i, x in enumerate(xs):
        values, indices = usae.encode(x, i)
        assert values.shape == indices.shape == (50, 5)
        assert indices.dtype == torch.int64
        codes = formula(usae, {i: x})
        torch.testing.assert_close(dense(values, indices, 96), codes, rtol=1e-4, atol=1e-4)
        for j, side in enumerate(usae.weights):
            expected = side.mean + side.scale * (codes @ side.W_dec + side.b_dec)
            torch.testing.assert_close(usae.decode(values, indices, j), expected)
    cross = make_shared("crosscoder")
    codes = formula(cross, dict(enumerate(xs)))
    torch.testing.assert_close(dense(*cross.encode_all(xs), 96), codes, rtol=1e-4, atol=1e-4)
    assert usae.encode(xs[0][:0])[0].shape == (0, 5)


def test_values_carry_gradients_to_the_activations():
    usae = make_shared()
    x = rows(usae)[1].requires_grad_()
    values, indices = usae.encode(x, 1)
    values[0, 0].backward()
    side = usae.weights[1]
    expected = side.W_enc[indices[0, 0]] / side.scale
    torch.testing.assert_close(x.grad[0], expected)
    assert not x.grad[1:].any()


@pytest.mark.parametrize("kind", ["usae", "crosscoder"])
def test_shared_files_round_trip_and_repeat_to_the_byte(tmp_path: Path, kind):
    usae = make_shared(kind)
    for name in "ab":
        usae.save(tmp_path / name, {"seed": 0})
    for file in ("usae.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    loaded = UniversalSAE.load(tmp_path / "a")
    for field in ("names", "slot", "kind", "k", "n_latents", "widths"):
        assert getattr(loaded, field) == getattr(usae, field), field
    for ours, theirs in zip(usae.weights, loaded.weights, strict=True):
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", "mean", "scale"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert torch.equal(loaded.decoder(2), usae.weights[2].W_dec)


def test_errors_of_a_shared_code_say_what_is_wrong(tmp_path: Path):
    usae, cross = make_shared(), make_shared("crosscoder")
    xs = rows(usae)
    with pytest.raises(ValueError, match="encode_all"):
        cross.encode(xs[0])
    with pytest.raises(ValueError, match="one model at a time"):
        usae.encode_all(xs)
    with pytest.raises(ValueError, match="as many rows from each of m0, m1, m2"):
        cross.encode_all([xs[0][1:], *xs[1:]])
    with pytest.raises(ValueError, match=r"\(50, 24\), m1 takes \[N, 16\]"):
        usae.encode(xs[0], 1)
    bad = xs[0].clone()
    bad[3, 2] = torch.nan
    with pytest.raises(ValueError, match="m0 hold NaN"):
        usae.encode(bad)
    side = usae.weights[1]
    for change, message in (
        ({"W_dec": side.W_dec * torch.nan}, "m1: W_dec holds NaN"),
        ({"b_enc": side.b_enc[1:]}, r"m1: b_enc is \(95,\), expected \(96,\)"),
        ({"scale": torch.tensor(0.0)}, "m1: scale is 0"),
    ):
        weights = (usae.weights[0], replace(side, **change), usae.weights[2])
        with pytest.raises(ValueError, match=message):
            replace(usae, weights=weights)
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing.*train_usae"):
        UniversalSAE.load(tmp_path)
