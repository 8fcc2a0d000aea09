"""The shared code itself: encode, decode, files; then training on planted shared factors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from musicscope.activations.store import ActivationStore, StoreError
from musicscope.activations.writer import StoreWriter
from musicscope.dictionaries import usae_data, usae_metrics
from musicscope.dictionaries.runs import TEST, TRAIN
from musicscope.dictionaries.training import SAEConfig
from musicscope.dictionaries.usae import ModelWeights, UniversalSAE
from musicscope.dictionaries.usae_training import normalisation, train

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

WIDTHS, SHARED, OWN, T = (24, 16, 32), 12, 6, 120


def make(kind="usae", widths=WIDTHS, F=96, k=5, seed=0) -> UniversalSAE:
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


def dense(values, indices, F=96):
    return torch.zeros(len(values), F).scatter_add_(1, indices, values)


def formula(usae, parts):
    """Dense codes of the summed pre-activations of {model: x}."""
    z = sum(
        ((x - s.mean) / s.scale - s.b_dec) @ s.W_enc.T + s.b_enc
        for s, x in ((usae.weights[i], x) for i, x in parts.items())
    )
    best = z.topk(usae.k).indices
    return torch.zeros_like(z).scatter(1, best, z.gather(1, best).relu())


def test_codes_and_decodes_equal_the_dense_formula(monkeypatch):
    monkeypatch.setattr("musicscope.dictionaries.usae.CHUNK", 16)
    usae = make()
    xs = rows(usae)
    for i, x in enumerate(xs):
        values, indices = usae.encode(i, x)
        assert values.shape == indices.shape == (50, 5)
        assert indices.dtype == torch.int64
        codes = formula(usae, {i: x})
        torch.testing.assert_close(dense(values, indices), codes, rtol=1e-4, atol=1e-4)
        for j, side in enumerate(usae.weights):
            expected = side.mean + side.scale * (codes @ side.W_dec + side.b_dec)
            torch.testing.assert_close(usae.decode(j, values, indices), expected)
    cross = make("crosscoder")
    codes = formula(cross, dict(enumerate(xs)))
    torch.testing.assert_close(dense(*cross.encode_all(xs)), codes, rtol=1e-4, atol=1e-4)
    assert usae.encode(0, xs[0][:0])[0].shape == (0, 5)


def test_values_carry_gradients_to_the_activations():
    usae = make()
    x = rows(usae)[1].requires_grad_()
    values, indices = usae.encode(1, x)
    values[0, 0].backward()
    side = usae.weights[1]
    expected = side.W_enc[indices[0, 0]] / side.scale
    torch.testing.assert_close(x.grad[0], expected)
    assert not x.grad[1:].any()


@pytest.mark.parametrize("kind", ["usae", "crosscoder"])
def test_files_round_trip_and_repeat_to_the_byte(tmp_path: Path, kind):
    usae = make(kind)
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


def test_errors_say_what_is_wrong(tmp_path: Path):
    usae, cross = make(), make("crosscoder")
    xs = rows(usae)
    with pytest.raises(ValueError, match="encode_all"):
        cross.encode(0, xs[0])
    with pytest.raises(ValueError, match="one model at a time"):
        usae.encode_all(xs)
    with pytest.raises(ValueError, match="as many rows from each of m0, m1, m2"):
        cross.encode_all([xs[0][1:], *xs[1:]])
    with pytest.raises(ValueError, match=r"\(50, 24\), m1 takes \[N, 16\]"):
        usae.encode(1, xs[0])
    bad = xs[0].clone()
    bad[3, 2] = torch.nan
    with pytest.raises(ValueError, match="m0 hold NaN"):
        usae.encode(0, bad)
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


def planted(n_clips: int, model: int, seed: int) -> list[np.ndarray]:
    """Clips [T, d] of one model: 2 of SHARED factors, which all models get alike, and 1 of its own.

    The factors' strengths come from (seed, clip), each model's directions from (99, model).
    """
    d = WIDTHS[model]
    directions = np.random.default_rng([99, model]).standard_normal((SHARED + OWN, d))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    clips = []
    for clip in range(n_clips):
        codes = np.zeros((T, SHARED + OWN))
        for rng, low, high, active in (
            (np.random.default_rng([seed, clip]), 0, SHARED, 2),
            (np.random.default_rng([seed, clip, model]), SHARED, SHARED + OWN, 1),
        ):
            chosen = low + rng.random((T, high - low)).argsort(1)[:, :active]
            np.put_along_axis(codes, chosen, rng.uniform(1, 2, chosen.shape), 1)
        clips.append((5 * codes @ directions + np.linspace(-9, 9, d)).astype(np.float32))
    return clips


def write_store(
    folder: Path, clips: list[np.ndarray], ids: list[str], **columns
) -> ActivationStore:
    table = {"id": ids, "split": "train", "font": "timgm6mb", "kind": "clip", **columns}
    table = pd.DataFrame({**table, "frames": [len(c) for c in clips]})
    config = {"layer": "layers.1", "captions": False}
    writer = StoreWriter(
        folder, width=clips[0].shape[1], dtype="float16", clips=table, spans=[(0, len(clips))],
        config=config,
    )  # fmt: skip
    writer.write(0, clips)
    return writer.finish()


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[ActivationStore, ...]:
    """Three models of different widths over 48 clips, 40 of them train; the last in other order."""
    root, n = tmp_path_factory.mktemp("stores"), 48
    names = [f"c{i}" for i in range(n)]
    columns = {
        "split": ["train"] * 40 + ["test"] * 8,
        "group": [f"g{i // 2}" for i in range(n)],
    }
    found = []
    for model in range(3):
        order = list(range(n)) if model < 2 else list(range(n))[::-1]
        clips = planted(n, model, seed=0)
        found.append(
            write_store(
                root / f"m{model}",
                [clips[i] for i in order],
                [names[i] for i in order],
                **{key: [column[i] for i in order] for key, column in columns.items()},
            )  # fmt: skip
        )
    return tuple(found)


def config(**changes) -> SAEConfig:
    settings = {"n_latents": 48, "k": 3, "samples": 40 * 128, "batch_size": 128}
    settings |= {"learning_rate": 1e-2, "decay_fraction": 0.4, "dead_after_samples": 10_000}
    return SAEConfig(**{**settings, **changes})


def fit(paired, method="paper", seed=0, names=None, **changes):
    names = names or [f"m{j}" for j in range(len(paired.stores))]
    return train(paired, config(**changes), method, seed, names, "top1")


def test_pairs_meet_by_id_whatever_their_order(stores):
    paired = usae_data.pair(stores, TEST)
    assert len(paired) == 8
    for n in range(8):
        ids = {s.ids[i] for s, i in zip(stores, paired.members[n], strict=True)}
        assert ids == {f"c{40 + n}"}
    clip = paired.clip(3)
    np.testing.assert_array_equal(clip[2], stores[2].clip(stores[2].ids.index("c43")))
    assert [x.shape for x in clip] == [(T, d) for d in WIDTHS]


def test_stores_that_do_not_pair_raise(stores, tmp_path: Path):
    clips = planted(4, 0, seed=0)
    write = lambda name, ids, clips=clips, **kw: write_store(  # noqa: E731
        tmp_path / name, clips, ids, **{"group": list("aabb"), **kw}
    )
    good = write("good", ["p", "q", "r", "s"])
    with pytest.raises(StoreError, match=r"1 clips of .*good are not in .*other \(first: s\)"):
        usae_data.pair((good, write("other", ["p", "q", "r", "t"])), TRAIN)
    short = [*clips[:3], clips[3][:-1]]
    with pytest.raises(StoreError, match="clip s has frames 120 in .* and 119 in .*short"):
        usae_data.pair((good, write("short", ["p", "q", "r", "s"], short)), TRAIN)
    with pytest.raises(StoreError, match="clip q has group a in .* and b in"):
        usae_data.pair((good, write("groups", ["p", "q", "r", "s"], group=list("abbb"))), TRAIN)
    with pytest.raises(StoreError, match="no clips"):
        usae_data.pair((good,), "none")


def test_mispaired_clips_are_of_different_compositions_and_all_used(stores):
    paired = usae_data.pair(stores, TRAIN)
    for seed in range(5):
        crossed = usae_data.mispair(paired, seed)
        for j in range(3):
            assert sorted(crossed.members[:, j]) == sorted(paired.members[:, j])
        groups = [s.rows["group"].to_numpy()[crossed.members[:, j]] for j, s in enumerate(stores)]
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert (groups[a] != groups[b]).all()
    few = usae_data.Paired(stores, paired.members[:4], paired.frames[:4], paired.groups[:4])
    with pytest.raises(StoreError, match="cannot be mispaired over 3 models"):
        usae_data.mispair(few, 0)


def test_batches_are_a_paired_permutation_and_start_anywhere(stores):
    paired = usae_data.pair(stores, TRAIN)
    n = int(paired.frames.sum())
    whole = [np.concatenate(x) for x in zip(*paired.clips(), strict=True)]
    for buffer_mb in (512.0, 0.05):
        make_stream = lambda start=0, mb=buffer_mb: usae_data.batches(  # noqa: E731
            paired, 100, 7, 3 * n, start_step=start, buffer_mb=mb
        )
        stream = list(make_stream())
        assert len(stream) == 3 * n // 100
        seen = [np.concatenate(x)[:n] for x in zip(*stream, strict=True)]
        joined, expected = np.concatenate(seen, 1), np.concatenate(whole, 1)
        order, base = np.lexsort(joined.T), np.lexsort(expected.T)
        np.testing.assert_array_equal(joined[order], expected[base])  # each frame once, in pairs
        assert not np.array_equal(joined, expected)
        for late, ours in zip(make_stream(60), stream[60:], strict=True):
            for a, b in zip(late, ours, strict=True):
                np.testing.assert_array_equal(a, b)


def test_normalised_models_have_the_same_mean_square(stores):
    paired = usae_data.pair(stores, TRAIN)
    means, scales = normalisation(paired)
    for j, (mean, scale) in enumerate(zip(means, scales, strict=True)):
        x = np.concatenate([clip[j] for clip in paired.clips()])
        assert np.square((x - mean) / scale).sum(1).mean() == pytest.approx(sum(WIDTHS) / 3, 1e-4)


@pytest.fixture(scope="module")
def trained(stores):
    """Two models, paired and mispaired, by the paper's rule, evaluated on paired test clips."""
    pairing, test = usae_data.pair(stores[:2], TRAIN), usae_data.pair(stores[:2], TEST)
    found = {}
    for name, paired in (("paired", pairing), ("mispaired", usae_data.mispair(pairing, 1))):
        usae = fit(paired, samples=900 * 128).usae
        found[name] = usae, usae_metrics.evaluate(usae, test.clips(), test.groups, tau=0.5)
    return found


def factor_latents(usae: UniversalSAE) -> np.ndarray:
    """[M, SHARED] the latent whose decoder row is nearest to each planted direction."""
    best = []
    for j in range(2):
        directions = np.random.default_rng([99, j]).standard_normal((SHARED + OWN, WIDTHS[j]))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        best.append((directions[:SHARED] @ usae.decoder(j).numpy().T).argmax(1))
    return np.array(best)


def test_paired_training_finds_the_shared_factors_and_mispaired_does_not(trained):
    same = {name: np.equal(*factor_latents(usae)).mean() for name, (usae, _) in trained.items()}
    assert same["paired"] > 0.8
    assert same["mispaired"] < 0.3
    numbers = {name: usae_metrics.numbers(found) for name, (_, found) in trained.items()}
    for i in (0, 1):
        assert numbers["paired"][f"r2_{i}_{i}"] > 0.7
        assert numbers["mispaired"][f"r2_{i}_{i}"] > 0.5
        assert numbers["paired"][f"cofire_proportion_{i}"] > 0.5
        assert numbers["mispaired"][f"cofire_proportion_{i}"] < 0.25
    for i, j in ((0, 1), (1, 0)):
        assert numbers["paired"][f"r2_{i}_{j}"] > 0.4
        assert numbers["mispaired"][f"r2_{i}_{j}"] < 0.05
    usae, found = trained["paired"]
    shared = factor_latents(usae)[0]
    fires, cofires = found.fires.sum(0), found.cofires.sum(0)
    assert np.median(usae_metrics.firing_entropy(fires)[shared]) > 0.9
    assert np.median(usae_metrics.cofire_proportion(cofires, fires)[:, shared]) > 0.6


def test_a_trained_dictionary_has_unit_rows_and_biases_near_the_mean(trained):
    usae, _ = trained["paired"]
    for j in range(2):
        torch.testing.assert_close(usae.decoder(j).norm(dim=1), torch.ones(48))


def test_crosscoder_tells_shared_from_own_factors(stores):
    paired = usae_data.pair(stores[:2], TRAIN)
    usae = fit(paired, "crosscoder", samples=700 * 128, k=4).usae
    test = usae_data.pair(stores[:2], TEST)
    found = usae_metrics.evaluate(usae, test.clips(), test.groups, tau=0.1)
    numbers = usae_metrics.numbers(found)
    assert min(numbers["r2_0"], numbers["r2_1"]) > 0.8
    assert set(numbers) == {"r2_0", "r2_1", "l0", "dead_fraction"}
    shares = usae_metrics.relative_norms(found.norms)
    np.testing.assert_allclose(shares.sum(0), 1)
    assert np.square(found.norms).sum(0) == pytest.approx(np.ones(48), abs=1e-4)
    # Each planted direction's nearest latent: both models' for shared factors, one's for its own.
    for j in range(2):
        directions = np.random.default_rng([99, j]).standard_normal((SHARED + OWN, WIDTHS[j]))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        best = (directions @ usae.decoder(j).numpy().T).argmax(1)
        assert np.median(shares[j, best[:SHARED]]) < 0.75
        assert np.median(shares[j, best[SHARED:]]) > 0.85


@pytest.mark.parametrize("method", ["paper", "all_decoders", "crosscoder"])
def test_three_widths_train_and_resume_to_the_bit(stores, tmp_path: Path, method):
    paired = usae_data.pair(stores, TRAIN)
    settings = config(dead_after_samples=1000)
    names = ["a", "b", "c"]
    whole = train(paired, settings, method, 5, names, "top1")
    assert whole.usae.widths == WIDTHS

    def kill(row):
        if row["step"] >= 27:
            raise InterruptedError

    file = tmp_path / "c.pt"
    with pytest.raises(InterruptedError):
        train(paired, settings, method, 5, names, "top1", "cpu", file, 10, kill)
    resumed = train(paired, settings, method, 5, names, "top1", "cpu", file, 10)
    finished = train(paired, settings, method, 5, names, "top1", "cpu", file)
    for other in (resumed, finished):
        assert other.history == whole.history
        assert other.dead_fraction == whole.dead_fraction
        for a, b in zip(other.usae.weights, whole.usae.weights, strict=True):
            assert all(torch.equal(getattr(a, n), getattr(b, n)) for n in vars(a))
    if method != "crosscoder":
        assert {row["drawn"] for row in whole.history} == {0, 1, 2}


def test_nan_activations_stop_training(stores, monkeypatch):
    """A store refuses to hold NaN, so this takes a stand-in for one damaged on disk."""
    paired = usae_data.pair(stores, TRAIN)

    def damaged(*_, **__):
        xs = [np.zeros((128, d), np.float32) for d in WIDTHS]
        xs[1][2, 3] = np.nan
        return iter([xs])

    monkeypatch.setattr("musicscope.dictionaries.usae_training.batches", damaged)
    with pytest.raises(FloatingPointError, match=r"step 0 on .*m1.*NaN"):
        fit(paired, samples=128)


def test_a_constant_layer_and_an_unknown_method_are_errors(stores):
    paired = usae_data.pair(stores, TRAIN)
    with pytest.raises(ValueError, match="'naive'"):
        fit(paired, "naive")
    flat = SimpleNamespace(width=4, std=np.zeros(4), mean=np.zeros(4), folder="data/flat")
    with pytest.raises(ValueError, match="data/flat: all train activations are equal"):
        normalisation(replace(paired, stores=(flat, stores[0])))
