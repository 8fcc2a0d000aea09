"""Training: finds planted features, resumes to the bit, revives the dead, refuses NaN."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from musicscope.activations.store import ActivationStore
from musicscope.activations.writer import StoreWriter
from musicscope.dictionaries.evaluation import evaluate
from musicscope.dictionaries.step import initial_state, step
from musicscope.dictionaries.training import SAEConfig, live_logger, train

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

WIDTH, FEATURES = 24, 40


def planted(n: int, seed: int, active: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Frames [n, d] made of `active` of the rows of a dictionary [FEATURES, d], far from 0."""
    dictionary = np.random.default_rng(99).standard_normal((FEATURES, WIDTH))
    dictionary /= np.linalg.norm(dictionary, axis=1, keepdims=True)
    rng = np.random.default_rng(seed)
    chosen = rng.random((n, FEATURES)).argsort(1)[:, :active]
    codes = np.zeros((n, FEATURES))
    np.put_along_axis(codes, chosen, rng.uniform(1, 2, chosen.shape), 1)
    return 3 * codes @ dictionary + np.linspace(-20, 20, WIDTH), dictionary


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """40 train and 10 test clips of 250 frames of planted activations."""
    n = 50
    rows = pd.DataFrame(
        {
            "id": [f"c{i}" for i in range(n)],
            "split": ["train"] * 40 + ["test"] * 10,
            "font": "timgm6mb",
            "kind": "clip",
            "group": [f"g{i // 2}" for i in range(n)],
            "frames": 250,
        }
    )
    writer = StoreWriter(
        tmp_path_factory.mktemp("store"), width=WIDTH, dtype="float16", clips=rows,
        spans=[(0, 20), (20, 50)], config={"layer": "layers.1", "captions": False},
    )  # fmt: skip
    for shard, (first, stop) in enumerate(writer.spans):
        clips = [planted(250, seed=i)[0].astype(np.float32) for i in range(first, stop)]
        writer.write(shard, clips)
    return writer.finish()


def config(**changes) -> SAEConfig:
    settings = {"n_latents": 64, "k": 3, "samples": 40 * 128, "batch_size": 128}
    return SAEConfig(**{**settings, "learning_rate": 5e-3, **changes})


def weights(sae) -> list[torch.Tensor]:
    return [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]


def test_recovers_a_planted_dictionary(store: ActivationStore):
    result = train(store, config(samples=600 * 256, batch_size=256, learning_rate=1e-2), seed=3)
    dictionary = planted(1, 0)[1]
    best = (torch.from_numpy(dictionary).float() @ result.sae.W_dec.T).amax(1)
    assert (best > 0.97).float().mean() > 0.9
    test = evaluate(result.sae, (store.clip(i) for i in np.flatnonzero(store.split == "test")))
    assert test.explained_variance > 0.9
    assert test.l0 == pytest.approx(3, abs=0.01)
    assert result.history[-1]["loss"] < 0.1 < result.history[0]["loss"]


def test_saved_decoder_has_unit_norm_and_bias_is_in_activation_units(store: ActivationStore):
    sae = train(store, config(samples=128, learning_rate=1e-6), seed=0).sae
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    np.testing.assert_allclose(sae.b_dec.numpy(), store.mean, atol=1e-4)


def test_batchtopk_threshold_keeps_k_on_average(store: ActivationStore):
    settings = config(activation="batchtopk", samples=200 * 256, batch_size=256)
    sae = train(store, settings, seed=0).sae
    clips = [store.clip(i) for i in np.flatnonzero(store.split == "test")]
    found = evaluate(sae, clips)
    assert sae.threshold > 0
    assert found.l0 == pytest.approx(3, rel=0.05)
    counts = (sae.encode(torch.from_numpy(clips[0]))[0] > 0).sum(1)
    assert counts.unique().numel() > 1  # not k in every frame: the point of BatchTopK


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_resumed_equals_unbroken_bit_for_bit(store, tmp_path: Path, activation):
    settings = config(activation=activation, samples=100 * 128, dead_after_samples=1000)
    whole = train(store, settings, seed=5, on_log=live_logger(tmp_path / "whole"))

    class Killed(Exception):
        pass

    def kill_at_61(row):
        if row["step"] >= 61:
            raise Killed

    checkpoint = tmp_path / "c.pt"
    with pytest.raises(Killed):
        train(store, settings, 5, checkpoint=checkpoint, checkpoint_every=25, on_log=kill_at_61)
    log = live_logger(tmp_path / "resumed")
    resumed = train(store, settings, 5, checkpoint=checkpoint, checkpoint_every=25, on_log=log)
    finished = train(store, settings, 5, checkpoint=checkpoint)  # nothing left to do
    for other in (resumed, finished):
        assert other.history == whole.history
        assert other.dead_fraction == whole.dead_fraction
        assert other.sae.threshold == whole.sae.threshold
        assert all(map(torch.equal, weights(other.sae), weights(whole.sae)))
    files = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*.*"))
    assert Path("plots/metrics/loss.tsv") in files
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (
            tmp_path / "resumed" / name
        ).read_bytes()
    text = (tmp_path / "whole/plots/metrics/loss.tsv").read_text()
    assert text.splitlines()[0] == "step\tloss"


def test_seeds_differ(store: ActivationStore):
    first, second = (train(store, config(samples=256), seed=s).sae for s in (0, 1))
    assert not torch.equal(first.W_dec, second.W_dec)


def test_checkpoint_of_another_sae_is_refused(store: ActivationStore, tmp_path: Path):
    train(store, config(samples=256), seed=0, checkpoint=tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt is of another SAE"):
        train(store, config(samples=256, n_latents=72), seed=0, checkpoint=tmp_path / "c.pt")


def test_nan_activations_stop_training():
    """A store refuses to hold NaN, so this takes a stand-in for one damaged on disk."""
    bad = np.zeros((16, WIDTH), np.float32)
    bad[2, 3] = np.nan
    stand_in = SimpleNamespace(
        width=WIDTH, mean=np.zeros(WIDTH), std=np.ones(WIDTH), folder="data/activations/m/top1",
        train_batches=lambda *_, **__: iter([bad]),
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match=r"step 0 on data/activations/m/top1.*NaN"):
        train(stand_in, config(samples=128), seed=0)


def test_learning_rate_warms_up_and_decays():
    c = config(samples=100 * 128, learning_rate=1.0, warmup_fraction=0.1, decay_fraction=0.2)
    rates = [c.rate(i) for i in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:81] == [1.0] * 72
    assert rates[99] == pytest.approx(0.05)
    assert sorted(rates[80:], reverse=True) == rates[80:]


def test_aux_revives_dead_latents():
    """Weak encoder rows are never among the k largest: only AuxK gives them a gradient.

    Half as many latents are left as there are features, so that the revived have work to do.
    """
    data = torch.from_numpy(planted(128 * 50, seed=0)[0] - np.linspace(-20, 20, WIDTH)).float()
    left = {}
    for weight in (0.0, 1 / 32):
        state = initial_state(60, WIDTH, seed=0, device="cpu")
        state.weights.W_enc[:40] *= 0.02
        for i in range(300):
            x = data[128 * (i % 50) :][:128]
            step(state, x, 3e-3, k=3, aux_k=12, aux_weight=weight, dead_after=128 * 20)
        left[weight] = (state.unfired[:40] >= 128 * 20).double().mean().item()
    assert left[0.0] > 0.9
    assert left[1 / 32] < 0.3


def test_dvclive_leaves_a_repository_without_commits_alone(tmp_path: Path, monkeypatch):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.chdir(tmp_path)
    row = {"samples": 1, "learning_rate": 0.1, "loss": 0.5, "aux_loss": 0.0, "dead_fraction": 0.0}
    log = live_logger("plots/live")
    log({"step": 0, **row})
    log({"step": 7, **row, "loss": 0.25})
    assert Path("plots/live/plots/metrics/loss.tsv").read_text() == "step\tloss\n0\t0.5\n7\t0.25\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".git", "plots"]
    assert not (tmp_path / ".git/index").exists()
