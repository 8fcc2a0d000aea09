"""Trackers get the curves of training: with stand-ins, and with the packages where they are."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from musicscope.dictionaries import runs, tracking
from tests.support.dictionaries import make_workspace, sae_section, write_embedded

ROWS = [{"step": 0, "samples": 64, "loss": 0.5}, {"step": 7, "samples": 512, "loss": 0.25}]


class StandIns:
    """Records what the calls of wandb and of TensorBoard's writer would log."""

    def __init__(self, monkeypatch) -> None:
        self.started, self.logged, self.ended = [], [], []
        wandb, board = ModuleType("wandb"), ModuleType("torch.utils.tensorboard")
        wandb.Settings = lambda **settings: settings
        wandb.init = self.init
        board.SummaryWriter = self.writer
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)

    def init(self, **settings):
        self.started.append(f"wandb {settings['name']}")
        return SimpleNamespace(
            log=lambda numbers, step: self.logged.append(("wandb", step, numbers)),
            finish=lambda: self.ended.append("wandb"),
        )

    def writer(self, folder):
        self.started.append(f"tensorboard {folder}")
        return SimpleNamespace(
            add_scalar=lambda key, value, step: self.logged.append((key, step, value)),
            flush=lambda: None, close=lambda: self.ended.append("tensorboard"),
        )  # fmt: skip


def test_both_trackers_get_every_row_and_are_closed(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = StandIns(monkeypatch)

    def fail() -> None:
        with tracking.track(("wandb", "tensorboard"), "sae/m-top1", "seed-0") as log:
            log(ROWS[0])
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fail()
    assert seen.started == [
        "wandb sae/m-top1/seed-0",
        "tensorboard runs/tensorboard/sae/m-top1/seed-0",
    ]
    assert seen.logged == [
        ("wandb", 0, {"samples": 64.0, "loss": 0.5}), ("samples", 0, 64.0), ("loss", 0, 0.5),
    ]  # fmt: skip
    assert sorted(seen.ended) == ["tensorboard", "wandb"]


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    tracking.check(())
    with pytest.raises(ValueError, match=r"has wandb.*pip install '\.\[wandb\]'"):
        tracking.check(("wandb",))


def test_training_is_tracked_and_the_same(tiny_musicgen, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(make_workspace(tmp_path / "workspace", tiny_musicgen, write_embedded))
    seen = StandIns(monkeypatch)
    section = sae_section(expansion=2, k=3, samples=10 * 64, batch_size=64, seeds=1)
    files = {}
    for trackers in ((), ("tensorboard",)):
        plan = runs.sae_plan(section, "tiny", "top1", 20, "cpu", str(tmp_path / "live"))
        folder = tmp_path / f"{len(trackers)}"
        runs.run_all(plan, folder, 1, trackers=trackers)
        files[trackers] = (folder / "out/seed-0/sae.safetensors").read_bytes()
    assert len(set(files.values())) == 1
    assert [s.rsplit("/", 1)[1] for s in seen.started] == ["seed-0"]
    losses = [(step, value) for key, step, value in seen.logged if key == "loss"]
    assert losses
    assert [step for step, _ in losses] == sorted({step for step, _ in losses})


def test_tensorboard_reads_the_curve(tmp_path: Path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    with tracking.track(("tensorboard",), "sae/m-top1", "seed-0") as log:
        for row in ROWS:
            log(row)
    found = EventAccumulator("runs/tensorboard/sae/m-top1/seed-0").Reload().Scalars("loss")
    assert [(e.step, e.value) for e in found] == [(0, 0.5), (7, 0.25)]


def test_wandb_keeps_the_curve_offline(tmp_path: Path, monkeypatch):
    pytest.importorskip("wandb.sdk")  # a folder wandb/ would pass for the package
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with tracking.track(("wandb",), "sae/m-top1", "seed-0") as log:
        for row in ROWS:
            log(row)
    (kept,) = Path("runs/wandb").rglob("*.wandb")
    assert b"loss" in kept.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"runs"}
