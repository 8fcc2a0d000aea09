"""How many clips fit into a memory limit: measured on small batches, not guessed from shapes.

The batch decides the last bits of floating-point results, so a run that must give the same bytes
everywhere fixes its batch in params.yaml; this is for finding the number.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from musicscope.models.interface import Batch

T = TypeVar("T")
HEADROOM = 0.1  # of the limit: allocators round up and fragment


@dataclass(frozen=True)
class Footprint:
    """Memory of a step that is linear in the number of clips."""

    fixed: int
    """Bytes whatever the batch: weights and what one step needs besides its clips."""
    per_clip: int
    """Bytes each clip adds at the peak."""


def footprint(first: tuple[int, int], second: tuple[int, int], resident: int) -> Footprint:
    """The line through two measurements (clips, peak bytes), plus `resident` bytes of weights."""
    (few, low), (many, high) = sorted((first, second))
    if few < 1 or few == many:
        raise ValueError(f"need two different batch sizes of at least 1, got {few} and {many}")
    per_clip = -(-max(high - low, 0) // (many - few))
    return Footprint(resident + max(low - few * per_clip, 0), per_clip)


def largest_batch(cost: Footprint, limit: int, most: int, headroom: float = HEADROOM) -> int:
    """Clips (1 to `most`) whose peak stays below `limit` bytes less the headroom.

    ValueError with the bytes needed if not even one fits.
    """
    usable = int(limit * (1 - headroom))
    if cost.fixed + cost.per_clip > usable:
        raise ValueError(
            f"one clip needs {(cost.fixed + cost.per_clip) / 1e9:.3f} GB ({cost.fixed / 1e9:.3f} "
            f"for weights), more than {usable / 1e9:.3f} GB; raise the limit, take shorter clips, "
            "a smaller dtype or a device map"
        )
    return max(1, min(most, (usable - cost.fixed) // max(cost.per_clip, 1)))


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Most bytes of tensors that were alive at once during `run`, above those before it.

    By the allocator's own count: on CUDA its statistics, on a CPU the events of torch's profiler
    (the memory of a process would include what earlier work left in its heap).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    alive = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        alive += change
        peak = max(peak, alive)
    return peak


def fit_batch(
    model: Any,
    frames: int,
    limit: int,
    work: Callable[[Batch], Any] | None = None,
    caption: str | None = None,
    most: int = 64,
) -> int:
    """Clips of `frames` frames for which `work` (default: cross-entropy) stays below `limit` bytes.

    Runs it on one clip and on three, and takes the line through both peaks. `limit` counts the
    weights too. A batch that runs out of memory all the same: see `halving`.
    """
    run = model.cross_entropy if work is None else work

    def peak(clips: int) -> tuple[int, int]:
        codes = torch.zeros(clips, model.num_codebooks, frames, dtype=torch.int64)
        batch = model.with_captions(codes, [caption] * clips)
        run(batch)  # the first call also allocates what stays, such as tables and workspaces
        return clips, peak_bytes(lambda: run(batch), model.device)

    cost = footprint(peak(1), peak(3), model.weight_bytes)
    return largest_batch(cost, limit, most)


def halving(run: Callable[[int], T], batch: int) -> tuple[T, int]:
    """(`run(batch)`, batch), with half the batch again after each time that memory runs out.

    What `run` got done before is its own affair: it must be safe to call again. The error goes
    through once one clip does not fit.
    """
    while True:
        try:
            return run(batch), batch
        except (MemoryError, RuntimeError) as error:
            if batch <= 1 or not out_of_memory(error):
                raise
        # Outside the handler: the error's traceback would keep the failed step's tensors alive.
        batch //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on an accelerator or (by its message) in torch's CPU allocator."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)
