"""What the parts of benchmarks.gpu_check share, the first part, and the process of one part.

    python -m benchmarks.gpu_parts a FILE --device cuda      # then a line "<deadline>" on stdin

A part prepares itself (imports, work on the CPU), prints "ready" and waits for its deadline, in
seconds of time.monotonic(). So several parts load at once and measure one after another. Results
are in FILE after each measurement; a second run with the same FILE measures only what is missing.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.gpu_check import LOST  # noqa: E402
from musicscope.core.command_line import Parser, run_program
from musicscope.core.io import read_json, write_json  # noqa: E402
from musicscope.core.precision import tf32  # noqa: E402

T = TypeVar("T")
PARTS = {
    "tests": "benchmarks.gpu_tests:device_tests",
    "a": "benchmarks.gpu_parts:ceilings",
    "b": "benchmarks.gpu_models:codes",
    "d": "benchmarks.gpu_dictionaries:dictionaries",
    "c": "benchmarks.gpu_models:full_size",
    "e": "benchmarks.gpu_training:training",
}
"""Part -> module:function; function(device, tiny) -> measure(record)."""
PRECISIONS = ("float32", "tf32", "bfloat16")
PACKAGES = ("numpy", "transformers", "triton", "eai-sparsify", "dictionary-learning")


class Record:
    """Results of one part by flat names ("sae/ours tf32"), on disk after each addition."""

    def __init__(self, path: Path, deadline: float) -> None:
        """`deadline`: of time.monotonic(). What FILE holds already is kept."""
        self.path, self.deadline = path, deadline
        self.found: dict[str, Any] = read_json(path) if path.is_file() else {}

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def add(self, name: str, value: Any) -> None:
        """Put a result, or replace it, and write the file."""
        self.found[name] = value
        write_json(self.path, self.found)

    def guard(self, name: str, run: Callable[[], T], needs: float = 0.0) -> T | None:
        """run(); None after an exception, whose text becomes the result, and if time is short.

        `needs` is the time in seconds below which `run` is not started. The process ends with
        LOST if the exception left CUDA unusable.
        """
        if name in self.found:
            return None
        if self.left() < needs:
            self.add(name, {"skipped": f"{self.left():.1f} s left, {needs:g} s needed"})
            return None
        try:
            return run()
        except Exception as error:
            trace = traceback.format_tb(error.__traceback__)[-3:]
            self.add(name, {"error": f"{type(error).__name__}: {error}"[:1500], "trace": trace})
        if torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except Exception:
                raise SystemExit(LOST) from None
        return None

    def attempt(self, name: str, run: Callable[[], Any], needs: float = 0.0) -> Any:
        """The result of `run` under guard, recorded."""
        if name in self.found:
            return self.found[name]
        value = self.guard(name, run, needs)
        if value is not None:
            self.add(name, value)
        return value


@contextlib.contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """float32, tf32, or bfloat16 (autocast, TF32 off for what it leaves in float32).

    Autocast keeps no copies: several steps run in one context, and weights change between them.
    Elsewhere it is not entered at all, since an outer context would keep a library's copies alive.
    """
    narrow = name == "bfloat16"
    autocast = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
    with tf32(name == "tf32", name == "tf32"), autocast if narrow else contextlib.nullcontext():
        yield


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def times_ms(run: Callable[[int], Any], device: torch.device, count: int) -> list[float]:
    """Milliseconds of run(0), run(1) ...: between consecutive CUDA events, idle gaps included."""
    wait(device)
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for number in range(count):
            run(number)
            marks.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for number in range(count):
        run(number)
        events[number + 1].record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def spread(times: list[float]) -> dict[str, Any]:
    """Median, least and most of times in milliseconds."""
    middle = statistics.median(times)
    return {"ms": middle, "ms_min": min(times), "ms_max": max(times), "runs": len(times)}


def relative_error(out: Tensor, reference: Tensor) -> float:
    """|out - reference| / |reference| in float64; NaN in `out` makes it NaN."""
    out, reference = out.to(reference.device, torch.float64), reference.double()
    return float(torch.linalg.vector_norm(out - reference) / torch.linalg.vector_norm(reference))


# ---- part a


def ceilings(device: torch.device, tiny: bool) -> Callable[[Record], None]:
    """Versions, and what the card moves and multiplies at most."""

    def measure(record: Record) -> None:
        record.attempt("machine", lambda: machine(device))
        side = 64 if tiny else 8192
        for name in PRECISIONS:  # the slow one first: it also brings the clocks up
            record.attempt(
                f"product/{name}", lambda name=name: product_rate(device, (side,) * 3, name)
            )
        record.attempt("copy", lambda: copy_rate(device, 2**12 if tiny else 2**30))

    return measure


def machine(device: torch.device) -> dict[str, Any]:
    """Versions of software and properties of the device."""
    installed = {d.metadata["Name"].lower() for d in metadata.distributions()}
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cpus": os.cpu_count(),
        "packages": {n: metadata.version(n) if n in installed else None for n in PACKAGES},
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {
            "card": card.name,
            "memory_bytes": card.total_memory,
            "multiprocessors": card.multi_processor_count,
            "l2_bytes": getattr(card, "L2_cache_size", None),
            "capability": f"{card.major}.{card.minor}",
            "cudnn": torch.backends.cudnn.version(),
            "tf32_at_start": {
                "products": torch.backends.cuda.matmul.allow_tf32,
                "cudnn": torch.backends.cudnn.allow_tf32,
            },
            "nvidia_smi": nvidia_smi(),
        }
    return found


def nvidia_smi() -> str | None:
    """Driver and clocks as nvidia-smi prints them; None where it does not answer."""
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def copy_rate(device: torch.device, count: int) -> dict[str, Any]:
    """Copying `count` float32 from one buffer to another; bytes read and written are counted."""
    source = torch.randn(count, device=device)
    target = torch.full_like(source, torch.nan)
    times = times_ms(lambda _: target.copy_(source), device, 13)[3:]
    if not torch.equal(source, target):
        raise AssertionError("the copy differs from its source")
    found = spread(times)
    return found | {"gb_per_s": 2 * source.nbytes / found["ms"] / 1e6, "bytes": source.nbytes}


def operands(shape: tuple[int, int, int], name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random x [rows, inner] and w [columns, inner] for x w^T, in the storage of a precision."""
    rows, inner, columns = shape
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    return (
        torch.randn(rows, inner, device=device).to(dtype),
        torch.randn(columns, inner, device=device).to(dtype),
    )


def product_rate(device: torch.device, shape: tuple[int, int, int], name: str) -> dict[str, Any]:
    """x w^T of random matrices (rows, inner, columns): TFLOP/s, and its error against float64."""
    sets = [operands(shape, name, device) for _ in range(3)]
    out = sets[0][0].new_full((shape[0], shape[2]), torch.nan)
    count = 24
    with tf32(name == "tf32", False):
        run = lambda i: torch.mm(sets[i % 3][0], sets[i % 3][1].T, out=out)  # noqa: E731
        times = times_ms(run, device, count)[4:]
    x, w = sets[(count - 1) % 3]
    some = torch.randint(shape[0], (32,), device=device)
    error = relative_error(out[some], x[some].double() @ w.T.double())
    if not torch.isfinite(out).all():
        raise AssertionError("the product left entries unwritten")
    found = spread(times)
    flop = 2 * math.prod(shape)
    return found | {"tflops": flop / found["ms"] / 1e9, "error": error, "shape": list(shape)}


# ---- the process of one part


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("file", type=Path, help="results; what it holds is not measured again")
    parser.add_device()
    parser.add_argument("--tiny", action="store_true", help="almost nothing, to try the program")
    options = parser.parse_args()
    said, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not fill the pipe
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    module, name = PARTS[options.part].split(":")
    measure = getattr(importlib.import_module(module), name)(device, options.tiny)
    print("ready", file=said, flush=True)
    record = Record(options.file, float(sys.stdin.readline()))
    record.add("device", str(device))
    if device.type == "cuda":
        record.add("device", torch.cuda.get_device_name(device))
    start = time.monotonic()
    measure(record)
    record.add("seconds", record.found.get("seconds", 0.0) + time.monotonic() - start)


if __name__ == "__main__":
    run_program(main)
