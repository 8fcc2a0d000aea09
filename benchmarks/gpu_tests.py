"""Part "tests" of benchmarks.gpu_check: the tests that run on any device, on this one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.gpu_check import ROOT
from benchmarks.gpu_parts import Record

FILES = (
    "tests/dictionaries/test_step.py",
    "tests/models/test_musicgen.py",
    "tests/activations/test_extraction.py",
    "tests/ablation/test_ablation.py",
)
"""Those with tests that use the fixture `device`; they need pytest, but no plugin of it."""


class Outcomes:
    """A plugin of pytest that records each test as it ends."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            name = report.nodeid.rsplit("/", 1)[-1].replace("/", ".")
            said = str(report.longrepr).splitlines()[-1:] if report.failed else []
            self.record.add(f"tests/{name}", " ".join([report.outcome, *said])[:300])


def device_tests(device: torch.device, tiny: bool) -> Callable[[Record], None]:
    """Run `pytest -m device`; they are small enough for `tiny` too."""

    def measure(record: Record) -> None:
        os.environ["MUSICSCOPE_TEST_DEVICE"] = str(device)
        files = [str(ROOT / name) for name in FILES]
        # Without the project's settings, which name a plugin that may be absent.
        options = ["-q", "-m", "device", "-c", os.devnull, f"--rootdir={ROOT}", "--capture=sys"]
        options += ["-p", "no:cacheprovider"]
        record.add("exit", int(pytest.main([*options, *files], [Outcomes(record)])))

    return measure
