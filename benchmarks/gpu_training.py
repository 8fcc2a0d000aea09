"""Part e of benchmarks.gpu_check: the nano models' training for some minutes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check import ROOT
from benchmarks.gpu_parts import Record

LOADING = 45.0
"""Seconds beside the minutes of a training: imports, the first scenes, saving."""
ENDING = 2.0
"""Seconds before the deadline at which a training is stopped."""
SIZES = ("--scenes", "2500", "--clips", "8000", "--codec-batch", "64", "--decoder-batch", "64")
TINY = ("--scenes", "20", "--first-scenes", "20", "--clips", "4", "--codec-batch", "1",
        "--decoder-batch", "1", "--models", "nano-small")  # fmt: skip


def command(minutes: float, device: torch.device, tiny: bool, folder: Path) -> list[str]:
    """Command of a training in `folder`, whose log is in work/models/log.jsonl."""
    name = "musicscope.embedded.pretraining.run"
    places = ["--out", str(folder / "out"), "--work", str(folder / "work")]
    options = ["--minutes", f"{minutes:.3f}", "--device", str(device), *(TINY if tiny else SIZES)]
    return [sys.executable, "-m", name, *places, *options]


def training(device: torch.device, tiny: bool) -> Callable[[Record], None]:
    """Train until the deadline; rates are recorded every five seconds."""

    def measure(record: Record) -> None:
        minutes = max(record.left() - LOADING, 0.2 * record.left()) / 60
        with tempfile.TemporaryDirectory() as name, tempfile.TemporaryFile() as errors:
            log = Path(name) / "work/models/log.jsonl"
            process = subprocess.Popen(
                command(minutes, device, tiny, Path(name)), cwd=ROOT, stderr=errors,
                stdout=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            try:
                while process.poll() is None and record.left() > ENDING:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(min(5.0, max(0.1, record.left() - ENDING)))
                    if log.is_file():
                        whole = [line for line in log.read_text().splitlines(True) if "}\n" in line]
                        record.add("training", summary(map(json.loads, whole)))
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # its renderers too
                process.wait()
            if process.returncode:
                errors.seek(0)
                record.add("stderr", errors.read()[-1500:].decode(errors="replace"))
            record.add("exit", process.returncode)

    return measure


def summary(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Reduce the log of a training to rates per phase: steps/s between its first and last row.

    The first row comes after the kernels are compiled and the CUDA graph is captured.
    """
    phases: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        phases.setdefault(row["phase"], []).append(row)
    found: dict[str, dict[str, Any]] = {}
    for phase, entries in phases.items():
        steps = [row for row in entries if "step" in row]
        if len(steps) > 1 and steps[-1]["second"] > steps[0]["second"]:
            took = steps[-1]["second"] - steps[0]["second"]
            rate = (steps[-1]["step"] - steps[0]["step"]) / took
            found[phase] = {"steps": steps[-1]["step"], "steps_per_s": rate}
        if phase == "tokens":
            last = max(entries, key=lambda row: row["clips"])
            found[phase] = {"clips": last["clips"], "clips_per_s": last["clips"] / last["took"]}
        for row in entries:
            if "held_out_ce" in row:
                found.setdefault(phase, {})["held_out_ce"] = row["held_out_ce"]
    return found
