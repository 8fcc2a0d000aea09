"""Metrics against closed cases and golden values, and the stages from end to end."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from musicscope.activations.writer import StoreWriter
from musicscope.dictionaries import usae_metrics as metrics
from musicscope.dictionaries import usae_plots
from musicscope.dictionaries.core import TopKSAE
from musicscope.dictionaries.usae import ModelWeights, UniversalSAE

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

ROOT = Path(__file__).resolve().parents[2]


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


def lossless(widths=(3, 4), origin=0.0) -> UniversalSAE:
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


def test_r2_is_0_for_the_mean_and_1_for_the_input():
    clips, groups = paired_clips()
    found = metrics.numbers(metrics.evaluate(lossless(origin=30.0), clips, groups, 0.1))
    assert found["r2_0_0"] == pytest.approx(1)
    assert found["r2_1_0"] == pytest.approx(1)  # the wider model knows all that the other has
    usae = lossless()
    blind = []
    for j, side in enumerate(usae.weights):
        mean = np.concatenate([clip[j] for clip in clips]).astype(np.float64).mean(0)
        centre = torch.from_numpy(mean).float()
        blind.append(replace(side, W_dec=torch.zeros_like(side.W_dec), mean=centre))
    found = metrics.numbers(
        metrics.evaluate(replace(usae, weights=tuple(blind)), clips, groups, 0.1)
    )
    for key in ("r2_0_0", "r2_0_1", "r2_1_0", "r2_1_1"):
        assert found[key] == pytest.approx(0, abs=1e-5), key


def test_r2_matrix_and_counts_equal_the_formula_on_all_frames():
    clips, groups = paired_clips()
    usae = replace(lossless(origin=29.5), k=3)
    tau, F = 0.25, usae.n_latents
    found = metrics.evaluate(usae, clips, groups, tau)
    xs = [torch.from_numpy(np.concatenate(x)) for x in zip(*clips, strict=True)]
    codes = [usae.encode(i, x) for i, x in enumerate(xs)]
    dense = torch.stack([torch.zeros(len(v), F).scatter_(1, i, v) for v, i in codes]).numpy()
    numbers = metrics.numbers(found)
    for i in range(2):
        for j in range(2):
            x = xs[j].double().numpy()
            error = x - usae.decode(j, *codes[i]).double().numpy()
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
    found = metrics.evaluate(replace(lossless(origin=29.5), k=3), clips, groups, 0.25)
    numbers, bounds = metrics.numbers(found), metrics.intervals(found, 200, seed=0)
    assert set(numbers) - set(bounds) == {"dead_fraction", "l0_0", "l0_1"}
    for key, (low, high) in bounds.items():
        assert low <= numbers[key] + 1e-9, key
        assert high >= numbers[key] - 1e-9, key
    assert bounds["r2_0_1"][0] < bounds["r2_0_1"][1]
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
def test_random_dictionary_has_the_best_gain_and_the_same_statistics(kind):
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
    control = metrics.random_dictionary(usae, sample, seed=0)
    xs = [torch.from_numpy(x) for x in sample]
    for j, (side, x) in enumerate(zip(control.weights, xs, strict=True)):
        assert not torch.equal(side.W_enc, usae.weights[j].W_enc)
        row, own = side.W_enc.mean(0), usae.decoder(j).mean(0)
        torch.testing.assert_close(row, own, atol=0.12, rtol=0)
        code = control.encode_all(xs) if kind == "crosscoder" else control.encode(j, x)
        error = (x - control.decode(j, *code)).square().sum()
        for factor in (0.95, 1.05):
            assert error < (x - factor * control.decode(j, *code)).square().sum()


def test_histogram_counts_the_ends_and_leaves_out_what_never_fires():
    table = usae_plots.histogram({"x": np.array([0.0, 0.04, 1.0, 0.999, np.nan, 0.5])})
    assert table["x"].sum() == 5
    assert table["x"].iloc[0] == table["x"].iloc[-1] == 2
    assert table["x"].iloc[10] == 1


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models' stores over the same 24 train and 8 test clips, their SAEs, small params."""
    root = tmp_path_factory.mktemp("workspace")
    n, T = 32, 40
    rng = np.random.default_rng(0)
    shared = [rng.standard_normal((T, 6)) for _ in range(n)]
    table = {
        "id": [f"c{i}" for i in range(n)], "split": ["train"] * 24 + ["test"] * 8,
        "font": "timgm6mb", "kind": "clip", "group": [f"g{i // 2}" for i in range(n)], "frames": T,
    }  # fmt: skip
    for model, d in (("a", 12), ("b", 16)):
        mix = rng.standard_normal((6, d))
        clips = [(s @ mix + 0.3 * rng.standard_normal((T, d))).astype(np.float32) for s in shared]
        writer = StoreWriter(
            root / f"data/activations/{model}/top1", width=d, dtype="float16",
            clips=pd.DataFrame(table), spans=[(0, n)], config={"layer": "layers.1"},
        )  # fmt: skip
        writer.write(0, clips)
        writer.finish()
        W = torch.nn.functional.normalize(torch.randn(2 * d, d), dim=1)
        sae = TopKSAE(W, torch.zeros(2 * d), W, torch.zeros(d), 3)
        sae.save(root / f"data/sae/{model}/top1/seed-0")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["models"] = ["a", "b"]
    params["compute"] |= {"device": "cpu", "threads": 1, "processes": 1}
    small = {"k": 6, "expansion": 2, "batch_size": 64, "samples": 64 * 150, "seeds": 3}
    small |= {"null_seeds": 2, "bootstrap": 30, "learning_rate": 0.01}
    for section in ("train_usae", "train_crosscoder"):
        params[section] |= small
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    return root


def run_stage(name: str, workspace: Path, monkeypatch) -> dict[Path, bytes]:
    """Every file that the stage made."""
    stage = __import__(f"stages.{name}", fromlist=["main"])
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("DVC_ROOT", str(workspace))
    monkeypatch.setattr(sys, "argv", [name])
    stage.main()
    out = "data/usae" if name == "train_usae" else "data/crosscoder"
    places = [workspace / f for f in (out, f"plots/{name}", f"metrics/{name}.json")]
    files = [p for place in places for p in (place, *place.rglob("*")) if p.is_file()]
    return {path.relative_to(workspace): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("name", "plot", "keys"),
    [
        (
            "train_usae",
            "firing_entropy",
            ("r2_0_1", "firing_entropy_median", "cofire_proportion_1"),
        ),
        ("train_crosscoder", "relative_norm", ("r2_0", "norm_shared", "norm_own_1")),
    ],
)
def test_stage_writes_all_and_repeats_to_the_byte(workspace, monkeypatch, name, plot, keys):
    first = run_stage(name, workspace, monkeypatch)
    found = json.loads(first[Path(f"metrics/{name}.json")])
    assert found["models"] == {"0": "a", "1": "b"}
    assert set(found["seeds"]) == {"seed-0", "seed-1", "seed-2"}
    flat = metrics.summary_keys(found)
    for key in keys:
        assert flat[key] == found["seeds"]["seed-0"][key]
        over = [seed[key] for seed in found["seeds"].values()]
        assert flat[f"{key}_sd_of_seeds"] == pytest.approx(np.std(over, ddof=1), rel=1e-3, abs=1e-5)
        nulls = [found["null_seeds"][f"mispaired-{i}"][key] for i in range(2)]
        assert flat[f"null_mispaired_{key}"] == pytest.approx(np.mean(nulls), rel=1e-4)
        assert f"null_random_{key}" in flat
    assert flat[f"{keys[0]}_ci_low"] < flat[keys[0]] < flat[f"{keys[0]}_ci_high"]
    assert flat["independent_r2_1"] < 1
    assert not any(isinstance(value, dict | list) for value in flat.values())
    for suffix in ("csv", "png"):
        assert Path(f"plots/{name}/{plot}.{suffix}") in first
    folder = "data/usae" if name == "train_usae" else "data/crosscoder"
    loaded = UniversalSAE.load(workspace / folder / "seed-0")
    assert (loaded.names, loaded.slot, loaded.widths) == (("a", "b"), "top1", (12, 16))
    assert (workspace / folder / "mispaired-1").is_dir()
    assert [p for p in (workspace / ".dvc/tmp/partial").rglob("*") if p.suffix != ".lock"] == []
    again = run_stage(name, workspace, monkeypatch)
    assert first == again


def test_shared_structure_shows_against_every_null(workspace, monkeypatch):
    """The two models are linear maps of the same 6 numbers: cross R2 far above the nulls."""
    first = run_stage("train_usae", workspace, monkeypatch)
    flat = metrics.summary_keys(json.loads(first[Path("metrics/train_usae.json")]))
    assert flat["r2_0_1"] > 0.3
    for null in ("mispaired", "shuffled", "random"):
        assert flat["r2_0_1"] > flat[f"null_{null}_r2_0_1"] + 0.2
    assert flat["cofire_proportion_0"] > flat["null_shuffled_cofire_proportion_0"] + 0.1
    assert flat["cofire_proportion_0"] > flat["null_mispaired_cofire_proportion_0"] + 0.1


def test_one_model_alone_is_an_error(workspace, monkeypatch):
    from musicscope.config import load_params
    from musicscope.dictionaries import usae_runs

    monkeypatch.chdir(workspace)
    with pytest.raises(ValueError, match="compares models"):
        usae_runs.plan_of(load_params().train_usae, "paper", ["a"], "top1", 0, "cpu")


@pytest.mark.slow
def test_two_processes_give_the_same_bytes_as_one(workspace, monkeypatch):
    one = run_stage("train_usae", workspace, monkeypatch)
    params = workspace / "params.yaml"
    before = params.read_text()
    params.write_text(before.replace("processes: 1", "processes: 2"))
    try:
        assert run_stage("train_usae", workspace, monkeypatch) == one
    finally:
        params.write_text(before)
