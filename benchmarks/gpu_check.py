"""Checks and measurements on a GPU: tests, ceilings, codes, dictionaries' steps, full-size models.

    PYTHONPATH=src:. python -m benchmarks.gpu_check --out FOLDER --device cuda

Needs no network; docs/performance.md lists the packages. Each part is a process with a share of the
time that is left; it is killed when that is used up. Its results so far are in
FOLDER/parts/<part>.json all the same, and all parts' in FOLDER/gpu-<card>.json. Last, a table.

* tests: the tests that run on any device (`pytest -m device`).
* a: versions; measured ceilings: a large copy, a large matrix product in bfloat16, TF32, float32.
* b: share of equal codes of the codec on CPU and device, batch 1 and 8, TF32 on and off.
* d: gradients against float64, then training steps: the project's SAE and universal SAE, dense
  autograd, and sparsify and dictionary_learning where they can be imported.
* c: MusicGen small and medium with random weights: extraction, peak memory, generation, ablation.
* e: the nano models' training, for `--minutes` beyond `--seconds`; left out without them.

`--tiny --device cpu` runs all of it in seconds at sizes that say nothing about speed.
"""

from __future__ import annotations

import argparse
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from musicscope.core.command_line import Parser, number, run_program
from musicscope.core.io import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = {"tests": 90.0, "a": 15.0, "b": 35.0, "d": 90.0, "c": 170.0}
"""Part, in the order of runs -> its share of the time that is left: seconds of the default."""
TRAINING = "e"
"""The part that `--minutes` is for."""
LOST = 3
"""Exit status of a part whose CUDA context was lost: it is run again without what failed."""
MARGIN = 1.0
"""Seconds before its end at which a part should stop of itself."""


def command_of(part: str, file: Path, device: str, tiny: bool) -> list[str]:
    """The command of one part's process."""
    command = [sys.executable, "-m", "benchmarks.gpu_parts", part, str(file), "--device", device]
    return [*command, *(["--tiny"] if tiny else [])]


class Child:
    """The process of one part: loads at once, measures when it is told its deadline."""

    def __init__(self, command: list[str], alone: bool) -> None:
        """`alone`: one thread for torch, as on a CPU that others use too."""
        paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env | ({"OMP_NUM_THREADS": "1"} if alone else {}),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, bufsize=0,
        )  # fmt: skip

    def ready(self, seconds: float) -> bool:
        """Whether it has loaded, within so many seconds."""
        found, _, _ = select.select([self.process.stdout], [], [], max(0.0, seconds))
        return bool(found) and self.process.stdout.readline().strip() == b"ready"

    def measure(self, deadline: float) -> int | None:
        """Its exit status; None if it had to be killed at the deadline (of time.monotonic())."""
        try:
            self.process.stdin.write(f"{deadline - MARGIN}\n".encode())
            return self.process.wait(max(0.1, deadline - time.monotonic()))
        except BrokenPipeError:  # it ended before it was asked
            return self.process.wait()
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def kill(self) -> None:
        """End it, if it still runs."""
        self.process.kill()
        self.process.wait()

    def said(self) -> str:
        """The end of what it wrote to stderr."""
        self.errors.seek(0)
        return self.errors.read()[-3000:].decode(errors="replace")


def run_parts(
    parts: list[str], folder: Path, seconds: float, device: str, tiny: bool, minutes: float = 0.0
) -> Path:
    """Run `parts` in turn within `seconds`, TRAINING for `minutes` more; give the merged file."""
    end = time.monotonic() + seconds
    files = {part: folder / "parts" / f"{part}.json" for part in parts}
    for file in files.values():
        file.parent.mkdir(parents=True, exist_ok=True)
    alone = device == "cpu"
    commands = {part: command_of(part, files[part], device, tiny) for part in parts}
    children = {part: Child(commands[part], alone) for part in parts}
    status: dict[str, dict[str, Any]] = {}
    try:
        for number, part in enumerate(parts):
            child, begin = children[part], time.monotonic()
            if part == TRAINING:
                end = begin + 60 * minutes
            loaded = child.ready((end - begin) / 2)
            left = end - time.monotonic()
            later = sum(WEIGHTS[p] for p in parts[number + 1 :] if p != TRAINING)
            share = 1.0 if part == TRAINING else WEIGHTS[part] / (WEIGHTS[part] + later)
            deadline = time.monotonic() + share * left
            code = child.measure(deadline) if loaded else None
            if code == LOST:
                child = children[part] = Child(commands[part], alone)
                code = child.measure(deadline)
            child.kill()
            status[part] = {
                "end": {None: "killed: time was up" if loaded else "did not load", 0: "whole"}.get(
                    code, f"exit status {code}"
                ),
                "waited_seconds": end - left - begin,
                "seconds": time.monotonic() - end + left,
            }
            if code != 0:
                status[part]["stderr"] = child.said()
            print(f"{part}: {status[part]['end']}", file=sys.stderr, flush=True)
            merged = merge(files, status)
            path = folder / f"gpu-{slug(merged['device'])}.json"
            write_json(path, merged)
    finally:
        for child in children.values():
            child.kill()
    return path


def slug(name: str) -> str:
    """A card's name for a file: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """{"a/b": 1, "a/c": 2} as {"a": {"b": 1, "c": 2}}."""
    found: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split("/")
        inner = found
        for step in path:
            inner = inner.setdefault(step, {})
        inner[last] = value
    return found


def merge(files: dict[str, Path], status: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All parts' results; steps get their share of the card's own product rate (part a)."""
    found = {part: nested(read_json(file)) for part, file in files.items() if file.is_file()}
    devices = [part["device"] for part in found.values() if "device" in part]
    rates = {
        name: rate["tflops"]
        for name, rate in found.get("a", {}).get("product", {}).items()
        if "tflops" in rate
    }
    for race in found.get("d", {}).get("steps", {}).values():
        for method in race.values():
            if "tflops" in method and method["precision"] in rates:
                method["share_of_ceiling"] = method["tflops"] / rates[method["precision"]]
    return {"device": devices[0] if devices else "unknown", "status": status, "parts": found}


def shown(value: Any, digits: int = 4) -> str:
    """A number of a table, or a dash."""
    return "-" if value is None else f"{value:.{digits}g}"


def trouble(entry: Any) -> str | None:
    """Why there is no result, if there is none."""
    if isinstance(entry, dict) and ("error" in entry or "skipped" in entry):
        if isinstance(entry.get("error"), float):  # a measured error
            return None
        return str(entry.get("error") or f"skipped: {entry['skipped']}").splitlines()[0][:100]
    return None


def table(merged: dict[str, Any]) -> list[str]:
    """The results in short lines."""
    parts, lines = merged["parts"], [f"device: {merged['device']}"]
    for part, status in merged["status"].items():
        lines.append(f"part {part}: {status['end']}, {status['seconds']:.1f} s")
        if "stderr" in status and (said := status["stderr"].strip()):
            lines.append(f"    {said.splitlines()[-1][:140]}")
    if found := parts.get("tests", {}).get("tests"):
        passed = sum(entry == "passed" for entry in found.values())
        lines.append(f"tests  {passed} of {len(found)} passed")
        lines += [f"tests  {name}: {entry}" for name, entry in found.items()
                  if entry not in ("passed", "skipped")]  # fmt: skip
    a = parts.get("a", {})
    if "gb_per_s" in a.get("copy", {}):
        lines.append(f"a  copy {shown(a['copy']['gb_per_s'])} GB/s")
    for name, entry in a.get("product", {}).items():
        why = trouble(entry)
        what = why or f"{shown(entry['tflops'])} TFLOP/s, error {shown(entry['error'], 2)}"
        lines.append(f"a  product {name:9} {what}")
    for codec, found in parts.get("b", {}).get("codec", {}).items():
        for name, entry in sorted(found.items()):
            what = trouble(entry) or (
                f"equal codes {shown(entry['equal_codes'], 6)}, whole frames "
                f"{shown(entry['equal_frames'], 6)}"
            )
            lines.append(f"b  {codec}, {name}: {what}")
    d = parts.get("d", {})
    for name, entry in d.get("check", {}).items():
        what = trouble(entry) or (
            f"z {shown(entry['z_error'], 2)}, worst gradient {_worst(entry['gradient_errors'])}, "
            f"equal codes {shown(entry['equal_codes'], 6)}"
        )
        lines.append(f"d  check {name}: {what}")
    for race, methods in d.get("steps", {}).items():
        for name, entry in methods.items():
            what = trouble(entry) or (
                f"{entry['ms']:8.2f} ms {shown(entry['per_s'])}/s, x product "
                f"{shown(entry.get('x_product'), 3)}, of ceiling "
                f"{shown(entry.get('share_of_ceiling'), 3)}"
            )
            lines.append(f"d  {race} | {name:26} {what}")
    for name, entry in d.get("pieces", {}).items():
        lines.append(f"d  piece {name:28} {trouble(entry) or format(entry['ms'], '8.3f') + ' ms'}")
    for name, entry in d.get("waits", {}).items():
        what = trouble(entry) or f"{entry['count']} waits for the device: {entry['places']}"
        lines.append(f"d  {name}: {what}")
    for name, found in parts.get("c", {}).get("model", {}).items():
        for key, entry in found.items():
            lines.append(f"c  {name} | {key}: {trouble(entry) or _of_model(entry)}")
    for phase, found in parts.get("e", {}).get("training", {}).items():
        what = ", ".join(f"{key} {shown(value)}" for key, value in found.items())
        lines.append(f"e  {phase}: {what}")
    return lines


def _worst(errors: dict[str, float | None]) -> str:
    """The largest; NaN, which JSON holds as null, before all."""
    return "NaN" if None in errors.values() else shown(max(errors.values()), 2)


def _of_model(entry: dict[str, Any]) -> str:
    if "s_per_clip" in entry:
        return f"{shown(entry['s_per_clip'])} s a clip, {entry['layers']} layers of all kinds"
    if "clips_per_s" in entry:
        return (
            f"{shown(entry['clips_per_s'])} clips/s (codec {shown(entry['codec_ms'])} ms, pass "
            f"{shown(entry['pass_ms'])} ms a clip), peak {shown(entry['peak_gb'])} GB"
        )
    return (
        f"{shown(entry['ms_per_step'])} ms a step, decode {shown(entry['decode_ms'])} ms, "
        f"real-time factor {shown(entry['real_time_factor'])}"
    )


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="new folder for the results")
    parser.add_argument(
        "--seconds", type=number(above=0), default=400.0, help="for all parts but e together"
    )
    parser.add_argument(
        "--minutes", type=number(above=0), help="then train the nano models for so long (part e)"
    )
    parser.add_device()
    parser.add_argument("--parts", default=",".join(WEIGHTS), help="such as a,b,d; run in order")
    parser.add_argument("--tiny", action="store_true", help="almost nothing, to try the program")
    options = parser.parse_args()
    parts = options.parts.split(",") if options.parts else []
    if unknown := set(parts) - set(WEIGHTS):
        parser.error(f"unknown parts {sorted(unknown)}; known: {', '.join(WEIGHTS)}")
    out = options.out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"--out {options.out} is not an empty folder: name a new one")
    parts += [TRAINING] if options.minutes else []
    path = run_parts(
        parts, out, options.seconds, options.device, options.tiny, options.minutes or 0.0
    )
    print("\n".join(table(read_json(path))))
    print(f"written to {path}")


if __name__ == "__main__":
    run_program(main)
