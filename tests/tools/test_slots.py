"""Slots from a rule: what experiments.slots writes and refuses, and presets that have a rule."""

from __future__ import annotations

import shutil
import sys

import pytest
import yaml

from experiments import preset, slots
from musicscope.config import load_params
from musicscope.core.io import write_json
from tests.conftest import ROOT

DEPTHS = {"small": 6, "medium": 8}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with the committed params.yaml and configs of the models."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    for name in ("nano-small", "nano-medium"):
        folder = tmp_path / "data/models" / name
        folder.mkdir(parents=True)
        (folder / "config.json").symlink_to(ROOT / "data/models" / name / "config.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["experiments.slots", *words])
    slots.main()


def test_rules_become_lists():
    assert slots.expand(["all"], DEPTHS) == [f"layer{i}" for i in range(6)]
    assert slots.expand(["top", "3"], DEPTHS) == ["top1", "top2", "top3"]
    assert slots.expand(["layer4", "cross2", "top1"], DEPTHS) == ["layer4", "cross2", "top1"]
    assert slots.left_out(["layer0", "layer1"], {"a": 3, "b": 2, "c": None}) == {"a": [2]}
    assert slots.left_out(["top1", "layer1"], DEPTHS) == {}
    for words in (["top"], ["top", "many"], ["top", "0"], ["top", "1", "2"]):
        with pytest.raises(ValueError, match="just slots top 3"):
            slots.expand(words, DEPTHS)
    with pytest.raises(ValueError, match=r"number of layers of rave .*dvc repro ablate"):
        slots.expand(["all"], DEPTHS | {"rave": None})


def test_the_depth_is_that_of_the_files_or_of_the_ablation(checkout):
    assert [slots.depth(m) for m in ("nano-small", "nano-medium", "musicgen-large")] == [6, 8, 48]
    assert slots.depth("rave") is slots.depth("mine") is None
    write_json(checkout / "metrics/ablate/rave.json", {"layers": {str(i): {} for i in range(5)}})
    assert slots.depth("rave") == 5


def test_all_writes_the_common_layers_and_names_the_rest(checkout, monkeypatch, capsys):
    before = (checkout / "params.yaml").read_text()
    run(monkeypatch, "all", "--single", "layer3")
    params = load_params()
    assert params.slots == tuple(f"layer{i}" for i in range(6))
    assert {getattr(params, s).slot for s in (*slots.SINGLE, "train_crosscoder", "steer_full")} == {
        "layer3"
    }
    said = capsys.readouterr()
    assert "slots layer0 layer1" in said.out
    assert "steer layer3" in said.out
    assert "left out of nano-medium: layers 6, 7" in said.err
    after = (checkout / "params.yaml").read_text()
    changed = [line for line in after.splitlines() if line not in before.splitlines()]
    assert all("layer" in line for line in changed)  # comments and all else stay
    run(monkeypatch, "all", "--models", "nano-medium", "--single", "layer7")
    params = load_params()
    assert (params.models, len(params.slots)) == (("nano-medium",), 8)
    run(monkeypatch, "top", "2", "--single", "top1")
    assert load_params().slots == ("top1", "top2")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["all"], r"match_features\.slot = 'top1' is not among slots .*--single"),
        (["top1", "layer6"], r"slots has layer6, but nano-small has layer0 to layer5: .*--models"),
        (["top1", "top5"], r"slots has top5, but 4 of nano-small's 6 layers .*skip_last"),
        (["top1", "cross2"], r"cross2: .* set extract_activations\.captions to true"),
        (["top1", "best"], r"slots\[1\] = 'best' .*layer<i> or cross<i>"),
        (["top1", "top1"], "has an entry twice"),
        (["all", "--single", "layer9"], r"match_features\.slot = 'layer9' is not among slots"),
    ],
)
def test_wrong_slots_are_refused_and_nothing_is_written(checkout, monkeypatch, words, message):
    before = (checkout / "params.yaml").read_bytes()
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, *words)
    assert (checkout / "params.yaml").read_bytes() == before


def test_without_a_rule_params_are_checked(checkout, monkeypatch):
    run(monkeypatch)
    path = checkout / "params.yaml"
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(content | {"slots": ["top1", "layer7"]}))
    with pytest.raises(ValueError, match="slots has layer7, but nano-small"):
        run(monkeypatch)
    path.write_text(yaml.safe_dump(content | {"slots": "all"}))
    with pytest.raises(ValueError, match="slots = 'all' is a rule, and DVC needs a list: `just"):
        run(monkeypatch)
    run(monkeypatch, "all", "--single", "layer1")  # repairs it
    assert len(load_params().slots) == 6
    with pytest.raises(SystemExit):
        run(monkeypatch, "--single", "layer1")


def test_a_preset_may_have_a_rule(checkout):
    values = preset.presets()["musicgen-layers"]
    assert f"slots=[{','.join(f'layer{i}' for i in range(24))}]" in values
    command = preset.command("musicgen-layers", ["train_sae", "-S", "slots=top 3"])
    assert command[-1] == "slots=[top1,top2,top3]"
    assert command[:3] == ["dvc", "exp", "run"]


def test_a_preset_with_a_slot_that_a_model_lacks_is_refused_before_dvc_starts(
    checkout, monkeypatch
):
    own = checkout / "experiments"
    own.mkdir()
    (own / "deep.yaml").write_text("slots: [top1, layer6]\n")
    monkeypatch.setattr(preset, "FOLDER", own)
    with pytest.raises(ValueError, match="slots has layer6, but nano-small"):
        preset.command("deep", [])
