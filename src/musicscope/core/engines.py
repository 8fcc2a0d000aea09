"""How a stage's work is spread, by `compute.engine`: processes of one machine, torchrun, or Ray.

None of them changes what extraction writes: shard i depends on the configuration and on i only.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from musicscope.core import parallel, ranks
from musicscope.core.ranks import Ranks

RESTARTS = 3
"""How often torchrun starts all ranks again after one died; they go on where they stopped."""


@dataclass(frozen=True)
class Engine:
    """What a stage needs to know to spread its work."""

    ranks: Ranks
    """This process among those that run the same stage."""
    workers: Callable[[int], Any]
    """Opens a `map` over so many processes, as parallel.workers does."""
    processes: int
    """For `workers`: one where the ranks are the processes already."""
    device: str


@contextlib.contextmanager
def start(compute: Any) -> Iterator[Engine]:
    """The engine of the section `compute` of params.yaml, from a stage's main.

    With torchrun this process becomes the launcher of `compute.processes` ranks, which come here
    again; a stage that was started under torchrun or accelerate (RANK is set) is a rank at once,
    whatever the section says.
    """
    launched = "RANK" in os.environ
    if compute.engine == "torchrun" and not launched:
        _launch(compute.processes)
    with ranks.join() as mine:
        device = _device(compute.device, mine)
        if compute.engine == "ray" and not launched:
            from musicscope.core import ray_engine

            opened, processes = ray_engine.opener(device), compute.processes
        else:
            opened, processes = parallel.workers, 1 if launched else compute.processes
        yield Engine(mine, opened, processes, device)


def _device(wanted: str, mine: Ranks) -> str:
    """`auto` resolved; among several ranks of a machine each takes a GPU of its own."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and mine.size > 1:
        wanted = f"cuda:{mine.local % torch.cuda.device_count()}"
    if wanted.startswith("cuda:"):
        torch.cuda.set_device(wanted)
    return wanted


def _launch(processes: int) -> None:
    """Become `torchrun` of the module that runs, with its arguments; does not return.

    Several machines: start torchrun on each by hand instead, with -m stages.<stage>.
    """
    spec = sys.modules["__main__"].__spec__
    if spec is None:
        raise RuntimeError("start the stage as a module: python -m stages.<stage>")
    options = ["--standalone", f"--nproc-per-node={processes}", f"--max-restarts={RESTARTS}"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", spec.name]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.execv(sys.executable, [*command, *sys.argv[1:]])
