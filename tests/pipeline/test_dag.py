"""`dvc repro` of the whole DAG on real formats: MusicGen on MusicBench, YuE, RAVE on own files.

Each runs in a temporary copy of this repository with the models as folders that were put there or
fetched, every stage of dvc.yaml on as little as it takes, and its results are looked into.
"""

from __future__ import annotations

import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from musicscope.activations.store import ActivationStore
from musicscope.config import load_params
from musicscope.core.io import read_json
from musicscope.data.clips import ClipStore
from musicscope.models.registry import load_model
from tests.support import dag_inputs as inputs
from tools import smoke

NULLS = ("ce_recovered", "best_auroc", ".steer.", "rave.maximise.")
"""Parts of summary keys that may be null. With random models it is chance whether an ablation does
harm, a feature is found, or a prompt gives music with the concept to switch off. RAVE has no tokens
to search for."""


def run_dag(root: Path, over: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Run everything in `root`/repo with `over` on top of small params; summary and stages."""
    folder, env = root / "repo", smoke.environment()
    params = smoke.merged(inputs.PARAMS, over)
    smoke.make_copy(folder, env, params)
    (root / "models").mkdir(exist_ok=True)
    for name in sorted((root / "models").iterdir()):
        (folder / "data/models").mkdir(parents=True, exist_ok=True)
        name.rename(folder / "data/models" / name.name)
    if (root / "recordings").is_dir():
        (root / "recordings").rename(folder / "data/recordings")
    smoke.repro(folder, env)
    return read_json(folder / "metrics/summary.json"), every_stage_ran(folder, env)


def every_stage_ran(folder: Path, env: dict[str, str]) -> list[str]:
    """Names of all stages that dvc.yaml has under these params, all of which must be locked."""
    listed = subprocess.run(
        ["dvc", "stage", "list", "--name-only"], cwd=folder, env=env, check=True,
        capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    locked = yaml.safe_load((folder / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    assert not set(listed) - set(locked)
    status = subprocess.run(
        ["dvc", "status", "-q"], cwd=folder, env=env, capture_output=True, text=True
    )
    assert status.returncode == 0, status.stdout + status.stderr
    return listed


def maximised(name: str) -> dict[str, Any]:
    """Headline numbers of a model's maximised features, or of those in all models ("shared")."""
    file = "maximize_shared" if name == "shared" else f"maximize_activation/{name}"
    return read_json(f"metrics/{file}.json")["headline"]


def check_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, audio_models: tuple[str, ...] = ()
) -> None:
    """What every run must give: valid layers, stores of the right size, numbers that are ones."""
    monkeypatch.chdir(folder)
    params, clips = load_params(), ClipStore.open()
    for name in params.models:
        model = load_model(name)
        layers = yaml.safe_load(Path(f"metrics/layers/{name}.yaml").read_text(encoding="utf-8"))
        assert set(layers) == set(params.slots)
        for slot, number in layers.items():
            assert 0 < number < len(model.hook_points) - 1  # neither the first nor the last
            store = ActivationStore.open(f"data/activations/{name}/{slot}")
            store.verify()
            point = model.hook_points[number]
            assert (store.config["layer"], store.width) == (point.name, point.width)
            assert store.ids == clips.rows["id"].tolist()
            rate = getattr(model, "frame_rates", {}).get(point.name, model.frame_rate)
            assert store.config["frame_rate"] == pytest.approx(rate)
            assert (store.frames == math.ceil(inputs.SECONDS * rate - 1e-6)).all()
            found = read_json(f"metrics/train_sae/{name}-{slot}.json")
            assert found["explained_variance"]["value"] > found["explained_variance_random"]
            measure = "spectral" if name in audio_models else "ce"
            losses = [found[f"{measure}_{what}"] for what in ("clean", "ablated", "sae")]
            assert np.isfinite(losses).all()
            # In a random model it is chance whether a layer's mean does harm.
            assert (found[f"{measure}_recovered"] is None) == (losses[1] <= losses[0])
            assert name not in audio_models or found["ce_recovered"] is None
            probe = read_json(f"metrics/probe/{name}-{slot}.json")["concepts"]["guitar"]
            for representation in ("sae", "dense", "codec", "logmel", "shuffled"):
                assert 0 <= probe[representation]["test"]["auroc"]["value"] <= 1
    summary = read_json("metrics/summary.json")
    absent = {key for key, value in summary.items() if value is None}
    allowed = {k for k in absent if any(part in k for part in NULLS)}
    assert not absent - allowed
    page = Path("data/report/report.html").read_text(encoding="utf-8")
    assert all(name in page for name in params.models)
    assert "No feature is active enough for a card" not in page
    table = pd.read_parquet("data/features/features.parquet")
    assert set(table["model"]) == set(params.models)
    assert set(table["kind"]) == {"sae", "usae"}


@pytest.mark.slow
def test_musicgen_and_audiocraft_on_musicbench(tmp_path, monkeypatch):
    entries = inputs.build_musicgens(tmp_path / "hub")
    names = list(entries)
    wanted = inputs.write_musicbench(tmp_path / "recordings/musicbench")
    over = inputs.recordings("musicbench", "data/recordings/musicbench")
    summary, stages = run_dag(tmp_path, over | {"models": names, "download_model": entries})
    check_line(tmp_path / "repo", monkeypatch)
    assert {f"download_model@{name}" for name in names} <= set(stages)
    systems = {"musicgen-small": "musicgen", "musicgen-medium": "audiocraft"}
    for name, system in systems.items():
        fetched = read_json(f"metrics/download_model/{name}.json")
        files = [p for p in Path("data/models", name).rglob("*") if p.is_file()]
        assert (fetched["system"], fetched["files"]) == (system, len(files))
        assert read_json(f"data/model_code/{name}.json")["system"] == system
    assert fetched["files"] == 2 + len(list((tmp_path / "hub/t5-base").iterdir()))
    data, rows = read_json("metrics/prepare_data.json"), ClipStore.open().rows
    split = rows["split"].value_counts()
    assert split["train"] + split["validation"] == wanted["learn"]
    assert split["test"] == wanted["test"]
    assert data["skipped"] == wanted["skipped"]
    assert rows["has_guitar"].sum() == len(rows) // 2
    # One codec, in two formats: tokens are searched for, also in both models at once.
    for name in names:
        assert summary[f"{name}.maximise.sound"] > 0
    assert maximised("shared")["heard_reached"]["value"] > 0
    usae = read_json("metrics/train_usae.json")
    assert usae["frame_rate"] == 50.0
    assert usae["test_frames"] == wanted["test"] * 50 * inputs.SECONDS


@pytest.mark.slow
def test_two_yues_on_musicbench(tmp_path, monkeypatch):
    names = inputs.build_yues(tmp_path / "models")
    wanted = inputs.write_musicbench(tmp_path / "recordings/musicbench")
    over = inputs.recordings("musicbench", "data/recordings/musicbench")
    summary, stages = run_dag(tmp_path, over | {"models": list(names)})
    check_line(tmp_path / "repo", monkeypatch)
    assert not any(stage.startswith("download_model") for stage in stages)
    usae = read_json("metrics/train_usae.json")
    assert usae["widths"] == {"0": 16, "1": 24}
    assert usae["test_frames"] == wanted["test"] * 50 * inputs.SECONDS
    # One codec: tokens are searched for as in MusicGen, also in both models at once.
    for name in (*names, "shared"):
        numbers = maximised(name)
        assert "not_searched" not in numbers
        assert numbers["features"] > 0
        assert np.isfinite(numbers["heard_reached"]["value"])
    for name in names:
        assert summary[f"{name}.maximise.sound"] == maximised(name)["heard_reached"]["value"]
        assert np.isfinite(maximised(name)["prior_reached"]["value"])
        folder = Path("data/maximize_activation", name)
        for feature in read_json(folder / "index.json")["features"]:
            found = {entry["variant"]: entry["file"] for entry in feature["maximised"]}
            assert set(found) == {"prior", "clip", "free", "heard"}
            assert all((folder / file).is_file() for file in found.values())


@pytest.mark.slow
def test_rave_and_musicgen_on_a_folder_of_recordings(tmp_path, monkeypatch):
    names = inputs.build_rave_and_musicgen(tmp_path / "models")
    wanted = inputs.write_folder(tmp_path / "recordings/mine")
    over = inputs.recordings("folder", "data/recordings/mine")
    summary, _ = run_dag(tmp_path, over | {"models": list(names)})
    check_line(tmp_path / "repo", monkeypatch, audio_models=("rave",))
    rows = ClipStore.open().rows
    assert rows["split"].value_counts().to_dict() == wanted
    ablated = read_json("metrics/ablate/rave.json")
    assert ablated["counterparts"] == {"kl": "change", "dce": "rise"}
    assert ablated["kinds_left_out"] == {"skip": len(load_model("rave").hook_points)}
    # The universal SAE learnt on the frames of the slower of the two.
    stores = [ActivationStore.open(f"data/activations/{name}/top1") for name in names]
    slow = min(stores, key=lambda store: store.config["frame_rate"])
    usae = read_json("metrics/train_usae.json")
    assert usae["frame_rate"] == slow.config["frame_rate"]
    assert usae["test_frames"] == wanted["test"] * slow.frames[0]
    assert maximised("rave")["not_searched"] > 0
    assert summary["rave.maximise.sound"] is None
    assert summary["musicgen-small.maximise.sound"] > 0
    assert maximised("shared")["not_searched"] > 0
    # The export is steered on its own test clips, a generator on prompts.
    steered = read_json("metrics/steer/rave.json")
    halves = (wanted["validation"] // 2, wanted["test"] // 2)
    for direction in ("off", "on"):
        used = steered["clips"][f"guitar {direction}"]
        assert used == {"validation": min(2, halves[0]), "test": min(2, halves[1])}
        methods = steered["concepts"]["guitar"][direction]["methods"]
        assert "prompt_edit" not in methods
        for method in ("sae", "diff_means", "random_feature", "original"):
            numbers = methods[method]
            # By judges that detect guitar on codec output; these hardly trained ones may not.
            assert (numbers["success"]["value"] is None) == numbers["not_judged"]
            chance = methods["reseed"]["family_judge"]["wanted"]
            gained = numbers["family_judge"]["wanted"] - chance
            assert numbers["success_choosing"]["value"] == pytest.approx(gained, abs=1e-5)
            assert numbers["ce_cost"]["value"] is None
            assert np.isfinite(
                [numbers["change"]["value"], numbers["spectral_cost"]["value"]]
            ).all()
        assert methods["sae"]["spectral_cost"]["value"] > 0
    assert steered["skipped"] == 0
    examples = read_json("data/steering/rave/examples/index.json")["examples"]
    assert {e["prompt"].split()[0] for e in examples} <= {"clip"}
    index = read_json("data/maximize_activation/rave/index.json")
    moments = [m for feature in index["features"] for m in feature["moments"]]
    assert moments
    assert all(Path("data/maximize_activation/rave", m["file"]).is_file() for m in moments)
