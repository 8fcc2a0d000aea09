"""Part e of benchmarks.gpu_check: the nano models' training for some minutes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


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
