"""Phases of a training run: their share of the time, checkpoints, and lines of progress."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

CHECKPOINT_SECONDS = 300.0
REPORT_SECONDS = 10.0
MOST_BAD = 10


class Phase:
    """Clock and checkpoint of one phase; time spent in earlier runs counts."""

    def __init__(self, name: str, work: Path, minutes: float):
        self.name, self.path = name, work / f"{name}.pt"
        self.seconds = 60 * minutes
        self.state = torch.load(self.path, weights_only=True) if self.path.exists() else None
        self.before = self.state["seconds"] if self.state else 0.0
        self.begin = self.saved = self.reported = time.monotonic()
        self.bad = 0

    @property
    def used(self) -> float:
        """Seconds spent, earlier runs included."""
        return self.before + time.monotonic() - self.begin

    @property
    def progress(self) -> float:
        """Share of the budget that is used; 1 ends the phase."""
        return min(self.used / self.seconds, 1.0) if self.seconds else 1.0

    def save(self, state: dict[str, object], force: bool = False) -> None:
        """Write a checkpoint if CHECKPOINT_SECONDS have passed since the last."""
        now = time.monotonic()
        if force or now - self.saved >= CHECKPOINT_SECONDS:
            temporary = self.path.with_suffix(".tmp")
            torch.save({**state, "seconds": self.used}, temporary)
            temporary.replace(self.path)
            self.saved = now

    def check(self, losses: list[float], step: int) -> bool:
        """Whether the losses are finite; MOST_BAD looks in a row that are not end the run.

        Raises:
            FloatingPointError: training has diverged.
        """
        self.bad = 0 if np.isfinite(losses).all() else self.bad + 1
        if self.bad >= MOST_BAD:
            raise FloatingPointError(f"{self.name}: losses {losses} at step {step}; lower its rate")
        return self.bad == 0

    def due(self) -> bool:
        """Whether it is time for a line of progress."""
        if time.monotonic() - self.reported < REPORT_SECONDS:
            return False
        self.reported = time.monotonic()
        return True


class Log:
    """Progress on standard error and, as JSON lines, in the output folder."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.stream = path.open("a", encoding="utf-8")
        self.begin = time.monotonic()

    def __call__(self, phase: str, **values: object) -> None:
        plain = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
        line = {"phase": phase, "second": round(time.monotonic() - self.begin), **plain}
        print(json.dumps(line), file=sys.stderr, flush=True)
        self.stream.write(json.dumps(line) + "\n")
        self.stream.flush()
