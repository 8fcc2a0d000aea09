"""The stage from end to end on a tiny model, and its independence of the number of processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from musicscope import sae_runs
from musicscope.clips import ClipStore, write_clips
from musicscope.models import load_model
from musicscope.sae import TopKSAE
from musicscope.sae_training import SAEConfig
from musicscope.store import ActivationStore
from musicscope.store_writer import StoreWriter

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

ROOT = Path(__file__).resolve().parents[1]
FONTS = ("timgm6mb", "fluidr3mono")


@pytest.fixture(scope="module")
def workspace(tiny_musicgen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with clips, a tiny model, its activations and a small params.yaml."""
    root = tmp_path_factory.mktemp("workspace")
    folders = {name: root / "data" / name for name in ("clips", "models")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    (folders["models"] / "tiny").symlink_to(tiny_musicgen)
    rng = np.random.default_rng(0)
    places = [("train", FONTS[0])] * 10 + [("test", FONTS[0])] * 4 + [("test", FONTS[1])] * 2
    rows = [
        {"id": f"c{i}", "group": f"g{i // 2}", "split": split, "font": font, "kind": "clip",
         "caption": "flute"}
        for i, (split, font) in enumerate(places)
    ]  # fmt: skip
    write_clips(folders["clips"], ((0.3 * rng.standard_normal(3200), r) for r in rows), 3200, 3200)
    clips, model = ClipStore.open(folders["clips"]), load_model(tiny_musicgen)
    with torch.no_grad():
        batch = model.encode(clips.audio(range(16)), [None] * 16)
        activations = model.capture(batch, ["layers.1"])["layers.1"].numpy()
    writer = StoreWriter(
        root / "data/activations/tiny/top1", width=48, dtype="float16", spans=[(0, 16)],
        clips=clips.rows.assign(frames=activations.shape[1]),
        config={"layer": "layers.1", "captions": False},
    )  # fmt: skip
    writer.write(0, list(activations))
    writer.finish()
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["models"], params["compute"] = ["tiny"], {"device": "cpu", "threads": 1, "processes": 1}
    params["train_sae"] |= {
        "k": 4, "expansion": 2, "batch_size": 64, "samples": 64 * 60, "seeds": 2, "ce_clips": 4
    }  # fmt: skip
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    return root


def run_stage(workspace: Path, monkeypatch) -> None:
    from stages import train_sae

    monkeypatch.chdir(workspace)
    monkeypatch.setenv("DVC_ROOT", str(workspace))
    monkeypatch.setattr(sys, "argv", ["train_sae", "tiny", "top1"])
    train_sae.main()


def test_stage_writes_saes_metrics_and_plots_and_repeats_to_the_byte(workspace, monkeypatch):
    run_stage(workspace, monkeypatch)
    made = [p for f in ("data/sae", "metrics", "plots") for p in (workspace / f).rglob("*.*")]
    first = {path: path.read_bytes() for path in made if path.is_file()}
    stem = "plots/train_sae/tiny-top1"
    for name in (
        "metrics/train_sae/tiny-top1.json", f"{stem}-loss.csv", f"{stem}-loss.png",
        f"{stem}-density.csv", f"{stem}-density.png", f"{stem}-live/seed-1/metrics.json",
        f"{stem}-live/seed-0/plots/metrics/loss.tsv", "data/sae/tiny/top1/seed-1/ae.pt",
    ):  # fmt: skip
        assert workspace / name in first, name
    found = json.loads(first[workspace / "metrics/train_sae/tiny-top1.json"])
    assert found["layer"] == "layers.1"
    assert (found["n_latents"], found["l0"], found["ce_clips"]) == (96, 4.0, 4)
    assert 0 < found["explained_variance"] < 1
    assert found["explained_variance_heldout_font"] < 1
    assert {"ce_clean", "ce_ablated", "ce_sae", "ce_recovered", "stability"} <= set(found)
    sae = TopKSAE.load(workspace / "data/sae/tiny/top1/seed-0")
    store = ActivationStore.open(workspace / "data/activations/tiny/top1")
    assert sae.width == store.width
    left = [p for p in (workspace / ".dvc/tmp/partial").rglob("*") if p.suffix != ".lock"]
    assert left == []
    run_stage(workspace, monkeypatch)
    for path, content in first.items():
        assert path.read_bytes() == content, path


@pytest.mark.slow
def test_two_processes_give_the_same_bytes_as_one(workspace: Path, tmp_path: Path):
    store = ActivationStore.open(workspace / "data/activations/tiny/top1")
    config = SAEConfig(n_latents=64, k=3, samples=40 * 64, batch_size=64)
    for processes in (1, 2):
        jobs = sae_runs.seed_jobs(
            str(store.folder), config, [11, 12], tmp_path / f"{processes}",
            str(tmp_path / f"live-{processes}"), "cpu", "nano",
        )  # fmt: skip
        outcomes = sae_runs.run_all(jobs, processes)
        found = sae_runs.report(store, outcomes, [], seed=20)
        assert "ce_recovered" not in found
        sae_runs.write_plots(tmp_path / f"plots-{processes}" / "m-top1", outcomes)
        assert found["l0"] == pytest.approx(3)
        assert found["stability"] > found["stability_null"]
        assert found["explained_variance"] > found["explained_variance_random"]
        assert found["explained_variance_low"] <= found["explained_variance"]
    for name in ("1/sae", "live-1", "plots-1"):
        files = [p for p in (tmp_path / name).rglob("*.*") if p.is_file()]
        assert len(files) >= 4
        for path in files:
            other = tmp_path / name.replace("1", "2") / path.relative_to(tmp_path / name)
            assert path.read_bytes() == other.read_bytes(), path
