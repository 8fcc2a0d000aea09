"""SAEs on every layer: the experiment on a tiny model, its sums, and the committed table."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from experiments import all_layers
from musicscope.core.io import read_json, write_json
from musicscope.core.stats import Estimate
from tests.dictionaries.test_runs import run_stage, write_folder
from tests.support.dictionaries import ROOT, make_workspace
from tests.support.steered import StubJudges

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


def test_the_committed_table_holds_every_layer_and_agrees_with_the_pipeline():
    table = pd.DataFrame(all_layers.read().values()).set_index("layer")
    assert list(table.index) == list(range(6))
    assert set(table["model"]) == {"nano-small"}
    assert (table["explained_variance"] > table["explained_variance_random"]).all()
    assert (table["stability"] > table["stability_null"]).all()
    layers = yaml.safe_load((ROOT / "metrics/layers/nano-small.yaml").read_text())
    for slot, layer in layers.items():
        trained = read_json(ROOT / f"metrics/train_sae/nano-small-{slot}.json")
        assert table.loc[layer, "seeds"] == len(trained["seeds"])
        expected = Estimate.read(trained["ce_recovered"]).value
        assert table.loc[layer, "ce_recovered"] == pytest.approx(expected, rel=1e-3)
    assert (ROOT / all_layers.PICTURE).read_bytes()[:4] == b"\x89PNG"
    assert (ROOT / all_layers.PICTURE).stat().st_size < 100_000


def test_changes_are_paired_and_silent_prompts_left_out():
    requests = [("guitar", "off"), ("guitar", "on")]
    ours = [np.array([0.5, np.nan]), np.array([0.1, 0.3])]
    control = [np.array([0.1, 0.9]), np.array([0.1, 0.1])]
    costs = {"steering": [np.full(2, 0.4)] * 2, "steering_random": [np.full(2, 0.2)] * 2}
    changes = {"steering": ours, "steering_random": control}
    row = all_layers.summarise(requests, changes, costs, 200, 0)
    assert row["steering_prompts"] == 3
    assert row["steering"] == pytest.approx(0.3)
    assert row["steering_minus"] == pytest.approx(0.2)
    assert row["steering_minus_off"] == pytest.approx(0.4)
    assert row["steering_minus_on"] == pytest.approx(0.1)
    assert (row["steering_ce_cost"], row["steering_random_ce_cost"]) == pytest.approx((0.4, 0.2))
    # Intervals are over requests: they reach from one request's mean to the other's.
    assert (row["steering_minus_low"], row["steering_minus_high"]) == pytest.approx((0.1, 0.4))
    silent = {key: [np.full(2, np.nan)] * 2 for key in changes}
    assert all_layers.summarise(requests, silent, costs, 200, 0) == {"steering_prompts": 0}


@pytest.fixture(scope="module")
def workspace(tiny_musicgen: Path, tmp_path_factory) -> Path:
    root = make_workspace(tmp_path_factory.mktemp("layers"), tiny_musicgen, write_folder)
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["slots"] = ["top1"]
    params["extract_activations"] |= {"dtype": "float16"}
    params["train_sae"] |= {"samples": 64 * 20, "baselines": []}
    params["steer"] |= {"concepts": ["guitar"], "pairs": [], "seconds": 0.2}
    params["steer_full"].pop("pairs", None)
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    (root / "data/judge").mkdir()
    (root / "data/judge/none").write_text("the judges are StubJudges")
    entry = {"mean": {"kl": Estimate(0.5).as_dict()}}
    write_json(root / "metrics/ablate/tiny.json", {"layers": {str(i): entry for i in range(4)}})
    return root


def run(workspace: Path, monkeypatch, *words: str) -> pd.DataFrame:
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("DVC_ROOT", str(workspace))
    monkeypatch.setattr(all_layers, "load_judges", lambda folder: StubJudges())
    monkeypatch.setattr(all_layers, "LATENTS", 3)
    monkeypatch.setattr(all_layers, "STRENGTH", 50.0)  # so that it changes a random model's codes
    command = ["all_layers", "--model", "tiny", "--prompts", "2", "--work", "work", *words]
    monkeypatch.setattr(sys, "argv", command)
    all_layers.main()
    return pd.DataFrame(all_layers.read().values())


def test_layers_are_measured_steered_kept_and_drawn(workspace, monkeypatch):
    first = run(workspace, monkeypatch, "--run", "2")
    assert first["layer"].tolist() == [2]
    assert first["seeds"].tolist() == [2]
    assert first["explained_variance"].between(0, 1).all()
    assert first["steering_prompts"].tolist() == [4]
    assert np.isfinite(first[["guitar", "guitar_null", "stability_null", "mean"]]).all(axis=None)
    cost, control = first.loc[0, ["steering_ce_cost", "steering_random_ce_cost"]]
    assert 0 != cost != control != 0
    kept = (workspace / all_layers.RESULT).read_bytes()
    run(workspace, monkeypatch, "--run", "2", "--draw")
    assert (workspace / all_layers.RESULT).read_bytes() == kept
    assert (workspace / all_layers.PICTURE).is_file()
    (workspace / all_layers.RESULT).unlink()
    run(workspace, monkeypatch, "--run", "2")
    assert (workspace / all_layers.RESULT).read_bytes() == kept
    with pytest.raises(SystemExit):
        run(workspace, monkeypatch, "--run", "4")


def test_a_layer_that_a_slot_holds_keeps_the_numbers_of_the_pipeline(workspace, monkeypatch):
    for stage in ("train_sae", "probe"):
        run_stage(workspace, monkeypatch, stage)
    monkeypatch.setattr(all_layers, "measure", None)  # nothing is trained
    table = run(workspace, monkeypatch, "--run", "1").set_index("layer")
    trained = read_json(workspace / "metrics/train_sae/tiny-top1.json")
    expected = Estimate.read(trained["explained_variance"]).value
    assert table.loc[1, "explained_variance"] == pytest.approx(expected, rel=1e-3)
    assert np.isfinite(table.loc[1, "steering"])
