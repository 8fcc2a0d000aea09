"""The stage from end to end on a tiny model, and its independence of the number of processes."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from musicscope.activations.store import ActivationStore
from musicscope.activations.writer import StoreWriter
from musicscope.data.clips import ClipStore, write_clips
from musicscope.data.sources.build import write_recordings
from musicscope.dictionaries import runs as sae_runs
from musicscope.dictionaries.core import TopKSAE
from musicscope.dictionaries.training import SAEConfig
from musicscope.models.registry import load_model
from tests.support.source_archives import configured, encoded, tone

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

ROOT = Path(__file__).resolve().parents[2]
FONTS = ("timgm6mb", "fluidr3mono")


def write_embedded(folder: Path) -> None:
    """Noise as in the embedded set: two soundfonts, no unknown label."""
    rng = np.random.default_rng(0)
    places = [("train", FONTS[0])] * 10 + [("test", FONTS[0])] * 4 + [("test", FONTS[1])] * 2
    rows = [
        {"id": f"c{i}", "group": f"g{i // 2}", "split": split, "font": font, "kind": "clip",
         "caption": "flute"}
        for i, (split, font) in enumerate(places)
    ]  # fmt: skip
    folder.mkdir(parents=True)
    write_clips(folder, ((0.3 * rng.standard_normal(3200), r) for r in rows), 3200, 3200)


def write_folder(folder: Path) -> None:
    """Recordings from a folder: guitar is known of two in three, organ of seven, no other label."""
    mine, rng = folder.parents[1] / "mine", np.random.default_rng(1)
    mine.mkdir()
    table = ["path,split,group,guitar,organ"]
    for i in range(36):
        split = "train" if i < 18 else ("validation", "test")[i >= 27]
        guitar, organ = ("1", "0", "")[i % 3], str(i % 2) if i < 7 else ""
        table.append(f"{i:02d}.wav,{split},g{i},{guitar},{organ}")
        audio = (tone(300 + 100 * (i % 3), 1.0) + 0.1 * rng.standard_normal(8000)) / 2
        (mine / f"{i:02d}.wav").write_bytes(encoded(audio))
    (mine / "labels.csv").write_text("\n".join(table))
    config = configured("folder", mine)
    config = replace(config, seconds=1.0, recordings=replace(config.recordings, sample_rate=3200))
    write_recordings(folder, config, seed=0)


def make_workspace(root: Path, tiny_musicgen: Path, write: Callable[[Path], None]) -> Path:
    """A checkout with clips, a tiny model, its activations and a small params.yaml."""
    (root / "data/models").mkdir(parents=True)
    (root / "data/models/tiny").symlink_to(tiny_musicgen)
    write(root / "data/clips")
    clips, model = ClipStore.open(root / "data/clips"), load_model(tiny_musicgen)
    with torch.no_grad():
        batch = model.encode(clips.audio(range(len(clips))), [None] * len(clips))
        activations = model.capture(batch, ["layers.1"])["layers.1"].numpy()
    writer = StoreWriter(
        root / "data/activations/tiny/top1", width=48, dtype="float16", spans=[(0, len(clips))],
        clips=clips.rows.assign(frames=activations.shape[1]),
        config={"layer": "layers.1", "captions": False},
    )  # fmt: skip
    writer.write(0, list(activations))
    writer.finish()
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["models"] = ["tiny"]
    params["compute"] |= {"device": "cpu", "threads": 1, "processes": 1}
    params["train_sae"] |= {
        "k": 4, "expansion": 2, "batch_size": 64, "samples": 64 * 60, "seeds": 2, "ce_clips": 4
    }  # fmt: skip
    params["probe"] |= {
        "k_sparse": [1, 4], "c_grid": [0.01], "min_positive": 3, "null_seeds": 1, "bootstrap": 40
    }  # fmt: skip
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    return root


@pytest.fixture(scope="module")
def workspace(tiny_musicgen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"), tiny_musicgen, write_embedded)


def run_stage(workspace: Path, monkeypatch, name: str = "train_sae") -> None:
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("DVC_ROOT", str(workspace))
    monkeypatch.setattr(sys, "argv", [name, "tiny", "top1"])
    importlib.import_module(f"stages.{name}").main()


def test_recordings_without_held_out_font_pairs_and_some_labels(
    tiny_musicgen: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    root = make_workspace(tmp_path, tiny_musicgen, write_folder)
    run_stage(root, monkeypatch)
    run_stage(root, monkeypatch, "probe")
    rows = ClipStore.open(root / "data/clips").rows
    assert rows["has_guitar"].isna().sum() == 12
    assert set(rows["font"]) == {"recording"}
    found = json.loads((root / "metrics/train_sae/tiny-top1.json").read_text())
    frames = ActivationStore.open(root / "data/activations/tiny/top1").frames
    assert (found["train_frames"], found["test_frames"]) == (18 * frames[0], 9 * frames[0])
    assert found["explained_variance"] < 1
    assert "explained_variance_heldout_font" not in found
    found = json.loads((root / "metrics/probe/tiny-top1.json").read_text())
    assert found["clips"] == {
        "train": 18, "validation": 9, "test": 9, "heldout_font": 0, "pairs_timgm6mb": 0,
        "pairs_fluidr3mono": 0,
    }  # fmt: skip
    assert set(found["concepts"]) == {"guitar"}
    assert found["skipped"]["organ"] == found["skipped"]["piano"] == 0
    guitar = found["concepts"]["guitar"]
    assert found["unknown"]["guitar"] == {"train": 6, "validation": 3, "test": 3}
    assert (guitar["positives"]["train"], guitar["positives"]["test"]) == (6, 3)
    assert guitar["dense"]["test"].keys() == guitar["sae"]["test"].keys()
    assert not {"heldout_font", "pairs_timgm6mb"} & set(guitar["sae"])
    for end in (".csv", ".png", "-features.csv"):
        assert (root / f"plots/probe/tiny-top1{end}").is_file()


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
