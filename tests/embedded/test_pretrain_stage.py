"""The stage pretrain: arguments of the run, published models with cards, tables of evidence."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from musicscope.config import load_params
from musicscope.core.io import read_json, write_json
from musicscope.embedded.pretraining.codec import CodecConfig
from musicscope.embedded.pretraining.decoder import SIZES
from musicscope.embedded.pretraining.evidence_rows import Row, Table
from stages import pretrain
from tools.import_closure import ROOT


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Run the stage with stand-ins for training and measuring; gives the runs' arguments."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    runs = []

    def train(arguments, log):
        runs.append(arguments)
        for name in SIZES:
            write_json(arguments.work / "models" / name / "config.json", {"name": name})
        log("text", loss=0.1)

    def evidence(folders, work, material, count, bootstrap, seed):
        for folder in folders:
            row = Row("codec.si_sdr", 9.0, 8.5, 9.5, count, "dB", 8.0, "at_least")
            yield folder.name, Table([row], {"codec": 1.0})

    monkeypatch.setattr(pretrain.run, "train", train)
    monkeypatch.setattr(pretrain.measure, "evidence", evidence)
    monkeypatch.setattr(pretrain, "scores_file", lambda processes: Path("scores.npz"))
    monkeypatch.setattr(pretrain, "resolve_device", lambda device: "cpu")
    monkeypatch.setattr(pretrain, "soundfont", lambda name: Path(name))
    return runs


def run_stage(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["pretrain", *options])
    pretrain.main()


def test_models_are_trained_as_params_say_published_and_measured(ran, monkeypatch):
    run_stage(monkeypatch, "--minutes", "3")
    (arguments,) = ran
    config = load_params().pretrain
    assert arguments.minutes == 3
    wanted = {"codec": 0.51, "tokens": 0.07, "nano-small": 0.16, "nano-medium": 0.26}
    assert arguments.shares == wanted
    assert arguments.codec["learning_rate"] == config.codec.learning_rate
    replace(CodecConfig(), **arguments.codec)  # every key is one of its fields
    assert (arguments.scenes, arguments.clips) == (config.scenes, config.clips)
    assert (arguments.codec_batch, arguments.decoder_batch) == (8, 4)
    assert not (arguments.work / "models" / "nano-small").exists()
    for name in SIZES:
        assert read_json(f"data/models/{name}/config.json") == {"name": name}
        card = Path(f"data/models/{name}/README.md").read_text()
        assert f"# {name}\n" in card
        assert "**Training.** 3 minutes on `cpu`, 1,500 scenes." in card
        row = read_json(f"metrics/pretrain/{name}.json")["rows"]["codec.si_sdr"]
        assert (row["estimate"]["n"], row["verdict"]) == (config.evidence_clips, True)


def test_measuring_alone_trains_nothing(ran, monkeypatch):
    run_stage(monkeypatch, "--measure")
    assert not ran
    assert not Path("data/models").exists()
    assert Path("metrics/pretrain/nano-small.json").is_file()
