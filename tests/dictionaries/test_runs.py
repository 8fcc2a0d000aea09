"""The stage from end to end on a tiny model, and its independence of the number of processes."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from musicscope.activations.store import ActivationStore
from musicscope.core.seeding import seed_for
from musicscope.core.stats import Estimate
from musicscope.data.clips import ClipStore
from musicscope.data.sources.build import write_recordings
from musicscope.dictionaries import runs, stability, step, tables
from musicscope.dictionaries.core import TopKSAE, UniversalSAE, open_saes
from tests.support.dictionaries import (
    ROOT,
    make_workspace,
    sae_section,
    usae_section,
    write_embedded,
    write_store,
)
from tests.support.source_archives import configured, encoded, tone

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


def write_folder(folder: Path) -> None:
    """Recordings from a folder: guitar is known of two in three, organ of seven, no other label."""
    mine, rng = folder.parents[1] / "mine", np.random.default_rng(1)
    mine.mkdir()
    table = ["path,split,group,guitar,organ"]
    for i in range(36):
        split = "train" if i < 18 else ("validation", "test")[i >= 27]
        guitar, organ = ("1", "0", "")[i % 3], str(i % 2) if i < 7 else ""
        table.append(f"{i:02d}.wav,{split},g{i},{guitar},{organ}")
        pitch = 300 + 100 * (i % 3) + 2 * i  # each its own, or they would be copies
        audio = (tone(pitch, 1.0) + 0.1 * rng.standard_normal(8000)) / 2
        (mine / f"{i:02d}.wav").write_bytes(encoded(audio))
    (mine / "labels.csv").write_text("\n".join(table))
    config = configured("folder", mine)
    config = replace(config, seconds=1.0, recordings=replace(config.recordings, sample_rate=3200))
    write_recordings(folder, config, seed=0)


@pytest.fixture(scope="module")
def workspace(tiny_musicgen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"), tiny_musicgen, write_embedded)


def run_stage(workspace: Path, monkeypatch, name: str = "train_sae", *arguments: str) -> None:
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("DVC_ROOT", str(workspace))
    monkeypatch.setattr(sys, "argv", [name, *(arguments or ("tiny", "top1"))])
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
    assert found["explained_variance"]["value"] < 1
    assert "explained_variance_heldout_font" not in found
    found = json.loads((root / "metrics/probe/tiny-top1.json").read_text())
    assert found["clips"] == {
        "train": 18, "validation": 9, "test": 9, "heldout_source": 0, "heldout_font": 0,
        "pairs_mixed": 0, "pairs_fluidr3mono": 0,
    }  # fmt: skip
    assert set(found["concepts"]) == {"guitar"}
    assert found["skipped"]["organ"] == found["skipped"]["piano"] == 0
    guitar = found["concepts"]["guitar"]
    assert found["unknown"]["guitar"] == {"train": 6, "validation": 3, "test": 3}
    assert (guitar["positives"]["train"], guitar["positives"]["test"]) == (6, 3)
    assert guitar["dense"]["test"].keys() == guitar["sae"]["test"].keys()
    assert not {"heldout_font", "pairs_mixed"} & set(guitar["sae"])
    for end in (".csv", "-features.csv"):
        assert (root / f"plots/probe/tiny-top1{end}").is_file()


def test_stage_writes_saes_metrics_and_plots_and_repeats_to_the_byte(workspace, monkeypatch):
    run_stage(workspace, monkeypatch)
    made = [p for f in ("data/sae", "metrics", "plots") for p in (workspace / f).rglob("*.*")]
    first = {path: path.read_bytes() for path in made if path.is_file()}
    stem = "plots/train_sae/tiny-top1"
    for name in (
        "metrics/train_sae/tiny-top1.json", f"{stem}-loss.csv",
        f"{stem}-density.csv", f"{stem}-live/seed-1/metrics.json",
        f"{stem}-live/seed-0/plots/metrics/loss.tsv", "data/sae/tiny/top1/seed-1/ae.pt",
    ):  # fmt: skip
        assert workspace / name in first, name
    found = json.loads(first[workspace / "metrics/train_sae/tiny-top1.json"])
    assert found["layer"] == "layers.1"
    assert (found["n_latents"], found["l0"], found["ce_clips"]) == (96, 4.0, 4)
    explained = found["explained_variance"]
    assert 0 < explained["value"] < 1
    assert explained["value"] == found["seeds"]["seed-0"]["explained_variance"]
    rows = ClipStore.open(workspace / "data/clips").rows
    test = (rows["split"] == "test") & (rows["font"] == "mixed")
    assert explained["n"] == rows.loc[test, "group"].nunique()
    assert found["explained_variance_heldout_font"] < 1
    assert {"ce_clean", "ce_ablated", "ce_sae", "ce_recovered", "stability"} <= set(found)
    returning = stability.read(workspace / "data/sae/tiny/top1")["returns"]
    assert found["returning"]["share"] == pytest.approx(returning.mean(), abs=1e-6)
    assert len(returning) == 96
    assert 0 < found["decoder_cosine"] < 1
    assert found["subspaces"]["used"]["latents"] >= 2
    sae = TopKSAE.load(workspace / "data/sae/tiny/top1/seed-0")
    store = ActivationStore.open(workspace / "data/activations/tiny/top1")
    assert sae.width == store.width
    left = [p for p in (workspace / ".dvc/tmp/partial").rglob("*") if p.suffix != ".lock"]
    assert left == []
    run_stage(workspace, monkeypatch)
    for path, content in first.items():
        assert path.read_bytes() == content, path


def test_baselines_are_trained_named_saved_and_evaluated_beside_the_seeds(
    workspace: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(workspace)
    section = sae_section(expansion=2, k=3, samples=40 * 64, batch_size=64, seeds=2)
    rows, groups = [10, 11, 12, 13], ["a", "a", "b", "b"]
    found, saes, saved = {}, {}, {}
    for baselines in ((), tuple(step.FREEZES)):
        live, folder = str(tmp_path / f"live-{len(baselines)}"), tmp_path / f"{len(baselines)}"
        plan = runs.sae_plan(
            replace(section, baselines=baselines), "tiny", "top1", 20, "cpu", live, rows, groups
        )
        outcomes = runs.run_all(plan, folder, 1)
        assert [o.name for o in outcomes] == ["seed-0", "seed-1", *baselines]
        found[baselines] = plan.report(outcomes)
        tables.write_sae(folder / "plots", outcomes)
        saved[baselines] = [
            (folder / f"plots-{end}.csv").read_bytes() for end in ("loss", "density")
        ]
        saes = open_saes(folder / "out", baselines)
        assert list(saes) == ["sae", *baselines]
        for name in baselines:
            config = json.loads((folder / "out" / name / "config.json").read_text())["trainer"]
            assert config["baseline"] == name
            assert "seed" not in config
    without, with_ = found.values()
    entries = with_.pop("baselines")
    assert with_ == without  # the seeds do not depend on baselines
    assert len(set(map(str, saved.values()))) == 1
    starts = {}
    for name, entry in entries.items():
        seed = seed_for(plan.seed_of(name), "initial")
        starts[name] = step.initial_state(96, (48,), seed, "cpu").weights[0]
        assert entry["explained_variance"].keys() == with_["explained_variance"].keys()
        assert entry["ce_clean"] == with_["ce_clean"]
        assert entry["ce_sae"] != with_["ce_sae"]
        assert {"l0", "dead_fraction", "ce_recovered", "stability_null"} <= entry.keys()
        assert 0 < entry["stability"] < 1
    assert torch.equal(saes["frozen_decoder"].W_dec, starts["frozen_decoder"].W_dec)
    assert torch.equal(saes["frozen_encoder"].W_enc, starts["frozen_encoder"].W_enc)
    assert not torch.equal(saes["sae"].W_dec, starts["frozen_decoder"].W_dec)


@pytest.mark.slow
def test_two_processes_give_the_same_bytes_as_one(workspace: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(workspace)
    section = sae_section(expansion=2, k=3, samples=40 * 64, batch_size=64, seeds=2)
    for processes in (1, 2):
        live = str(tmp_path / f"live-{processes}")
        plan = runs.sae_plan(section, "tiny", "top1", 20, "cpu", live)
        outcomes = runs.run_all(plan, tmp_path / f"{processes}", processes)
        found = plan.report(outcomes)
        assert "ce_recovered" not in found
        tables.write_sae(tmp_path / f"plots-{processes}" / "m-top1", outcomes)
        assert found["l0"] == pytest.approx(3)
        assert found["stability"] > found["stability_null"]
        explained = found["explained_variance"]
        assert explained["value"] > found["explained_variance_random"]
        assert explained["low"] <= explained["value"] <= explained["high"]
    for name in ("1/out", "live-1", "plots-1"):
        files = [p for p in (tmp_path / name).rglob("*.*") if p.is_file()]
        assert len(files) >= 2
        for path in files:
            other = tmp_path / name.replace("1", "2") / path.relative_to(tmp_path / name)
            assert path.read_bytes() == other.read_bytes(), path


# --- several models ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paired_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models' stores over the same 24 train and 8 test clips, their SAEs, small params."""
    root = tmp_path_factory.mktemp("workspace")
    n, T = 32, 40
    rng = np.random.default_rng(0)
    shared = [rng.standard_normal((T, 6)) for _ in range(n)]
    ids, split = [f"c{i}" for i in range(n)], ["train"] * 24 + ["test"] * 8
    groups = [f"g{i // 2}" for i in range(n)]
    for model, d in (("a", 12), ("b", 16)):
        mix = rng.standard_normal((6, d))
        clips = [(s @ mix + 0.3 * rng.standard_normal((T, d))).astype(np.float32) for s in shared]
        folder = root / f"data/activations/{model}/top1"
        write_store(folder, clips, ids, split=split, group=groups)
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
    params["train_usae"]["control_clips"] = 0  # there are no models
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    return root


def run_shared(kind: str, workspace: Path, monkeypatch) -> dict[Path, bytes]:
    """Every file that the stage made."""
    run_stage(workspace, monkeypatch, "train_usae", kind)
    name = f"train_{kind}"
    places = [workspace / f for f in (f"data/{kind}", f"plots/{name}", f"metrics/{name}.json")]
    files = [p for place in places for p in (place, *place.rglob("*")) if p.is_file()]
    return {path.relative_to(workspace): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("kind", "plot", "keys"),
    [
        (
            "usae",
            "firing_entropy",
            ("r2_0_1", "firing_entropy_median", "cofire_proportion_1"),
        ),
        ("crosscoder", "relative_norm", ("r2_0", "norm_shared", "norm_own_1")),
    ],
)
def test_shared_stage_writes_all_and_repeats(paired_workspace, monkeypatch, kind, plot, keys):
    workspace, name = paired_workspace, f"train_{kind}"
    first = run_shared(kind, workspace, monkeypatch)
    found = json.loads(first[Path(f"metrics/{name}.json")])
    assert found["models"] == {"0": "a", "1": "b"}
    assert set(found["seeds"]) == {"seed-0", "seed-1", "seed-2"}
    for key in keys:
        entry, over_seeds = found["headline"][key], found["over_seeds"][key]
        assert Estimate.read(entry).value == found["seeds"]["seed-0"][key]
        over = [seed[key] for seed in found["seeds"].values()]
        assert over_seeds["mean"] == pytest.approx(np.mean(over), rel=1e-3, abs=1e-5)
        assert over_seeds["sd"] == pytest.approx(np.std(over, ddof=1), rel=1e-3, abs=1e-5)
        nulls = [found["null_seeds"][f"mispaired-{i}"][key] for i in range(2)]
        assert found["null"]["mispaired"][key] == pytest.approx(np.mean(nulls), rel=1e-4)
        assert key in found["null"]["random"]
    first_key = found["headline"][keys[0]]
    assert first_key["low"] < first_key["value"] < first_key["high"]
    assert (first_key["n"], first_key["unit"]) == (found["test_compositions"], "R2")
    assert found["independent_r2"]["1"] < 1
    assert Path(f"plots/{name}/{plot}.csv") in first
    loaded = UniversalSAE.load(workspace / f"data/{kind}/seed-0")
    assert (loaded.names, loaded.slot, loaded.widths) == (("a", "b"), "top1", (12, 16))
    assert (workspace / f"data/{kind}/mispaired-1").is_dir()
    assert [p for p in (workspace / ".dvc/tmp/partial").rglob("*") if p.suffix != ".lock"] == []
    assert run_shared(kind, workspace, monkeypatch) == first


def test_shared_structure_shows_against_every_null(paired_workspace, monkeypatch):
    """The two models are linear maps of the same 6 numbers: cross R2 far above the nulls."""
    first = run_shared("usae", paired_workspace, monkeypatch)
    found = json.loads(first[Path("metrics/train_usae.json")])
    null = found["null"]
    r2 = found["headline"]["r2_0_1"]["value"]
    assert r2 > 0.3
    for name in ("mispaired", "shuffled", "random"):
        assert r2 > null[name]["r2_0_1"] + 0.2
    cofire = found["headline"]["cofire_proportion_0"]["value"]
    assert cofire > null["shuffled"]["cofire_proportion_0"] + 0.1
    assert cofire > null["mispaired"]["cofire_proportion_0"] + 0.1
    scaled = found["latent_scaling"]["shared"]
    assert scaled["nu_error_median"] > 2 * scaled["null_nu_error_median"]


def test_dedicated_crosscoder_stands_beside_its_nulls(paired_workspace, monkeypatch):
    """Two thirds of each model are noise of its own."""
    first = run_shared("crosscoder", paired_workspace, monkeypatch)
    found = json.loads(first[Path("metrics/train_crosscoder.json")])["dedicated"]
    assert found["latents"] == {"shared": 28, "own_0": 2, "own_1": 2}
    head, null = found["headline"], found["null"]
    assert set(null) == {"mispaired", "random"}
    for key in ("r2_0", "r2_shared_1", "active_own_0", "energy_own_1"):
        assert head[key]["low"] <= head[key]["value"] <= head[key]["high"]
        assert key in null["mispaired"]
    assert head["r2_shared_0"]["value"] <= head["r2_0"]["value"]
    assert set(found["latent_scaling"]) == {"own_0", "own_1", "shared"}
    assert found["latent_scaling"]["own_0"]["latents"] <= 2
    loaded = UniversalSAE.load(paired_workspace / "data/crosscoder/dedicated")
    assert (loaded.owners == -1).sum() == 28
    assert (UniversalSAE.load(paired_workspace / "data/crosscoder/seed-0").owners == -1).all()


def test_one_model_alone_and_too_large_a_k_are_errors(paired_workspace, monkeypatch):
    monkeypatch.chdir(paired_workspace)
    with pytest.raises(ValueError, match="compares models"):
        runs.shared_plan(usae_section(), "paper", ["a"], 0, "cpu")
    with pytest.raises(ValueError, match="k = 17 is out of range: allowed is at most 16"):
        runs.shared_plan(usae_section(k=17, expansion=1), "paper", ["a", "b"], 0, "cpu")


@pytest.mark.slow
def test_two_processes_train_the_shared_code_of_one(paired_workspace, monkeypatch):
    workspace = paired_workspace
    one = run_shared("usae", workspace, monkeypatch)
    params = workspace / "params.yaml"
    before = params.read_text()
    params.write_text(before.replace("processes: 1", "processes: 2"))
    try:
        assert run_shared("usae", workspace, monkeypatch) == one
    finally:
        params.write_text(before)
