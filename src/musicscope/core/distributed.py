"""Spread the work of a stage by `compute.engine`: processes of one machine, torchrun, or Ray.

processes: `core.parallel.workers` of one process.

torchrun: the same program runs in several processes at once, the ranks. The launcher (torchrun or
accelerate launch) tells each rank its number and the meeting place through the environment: RANK,
WORLD_SIZE, LOCAL_RANK.

ray (the extra `ray`): the jobs of one process run on a cluster, and those of a killed worker run
again. RAY_ADDRESS names the cluster; without it, one is started on this machine for the stage.

All machines must see the same files under the same paths. No engine changes results of extraction:
shard i depends on the configuration and on i only.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from musicscope.core import command_line, io, parallel

RANK_TIMEOUT = timedelta(days=14)
"""Longest wait of a rank for the others, which may have more work or wait for a lock."""
TORCHRUN_RESTARTS = 3
"""How often torchrun restarts all ranks after one died; they resume from their checkpoints."""
RAY_RETRIES = 5
"""How often a job runs again after its worker or node died. An error in the job is raised."""
RAY_ENVIRONMENT = ("DVC_ROOT", "HF_HUB_OFFLINE")
"""Variables that workers of Ray get from this process."""

J = TypeVar("J")
R = TypeVar("R")

Workers = Callable[[int], contextlib.AbstractContextManager[parallel.Run]]
"""Opens a `map` over a number of processes, as `parallel.workers` does."""


@dataclass(frozen=True)
class Ranks:
    """One of `size` equal processes. All ranks must call the methods that communicate."""

    rank: int = 0
    size: int = 1
    local: int = 0
    """Number of this process on its machine: its GPU."""

    @property
    def leads(self) -> bool:
        """Whether this rank writes results that exist once, such as metrics."""
        return self.rank == 0

    def mine(self, numbers: Iterable[int]) -> list[int]:
        """Select this rank's jobs by their own number, so that finished jobs shift no others."""
        return [number for number in numbers if number % self.size == self.rank]

    def rows(self, batch: int) -> slice:
        """Select this rank's rows of a global batch; ValueError if it does not divide evenly."""
        if batch % self.size:
            raise ValueError(
                f"a batch of {batch} frames does not divide among {self.size} ranks; choose a "
                f"batch_size that is a multiple of {self.size}, or another number of processes"
            )
        part = batch // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def any(self, value: bool) -> bool:
        """Say whether `value` is true on any rank, after all ranks have called."""
        if self.size == 1:
            return value
        found = torch.tensor([int(value)])
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def wait(self) -> None:
        """Wait until all ranks have called."""
        self.any(False)

    def average_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its mean over all ranks."""
        for tensor in tensors if self.size > 1 else ():
            dist.all_reduce(tensor)
            tensor /= self.size

    def minimum_(self, tensor: Tensor) -> None:
        """Replace each entry by its minimum over all ranks."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MIN)

    def squares(self, x: Tensor) -> Tensor:
        """Sum squares of all ranks' rows [n, d] about their column means, over the rank count.

        A loss divided by it averages over ranks to the loss that one process computes.
        """
        mean = x.mean(0)
        self.average_(mean)
        total = (x - mean).square_().sum()
        self.average_(total)
        return total


ALONE = Ranks()


@contextlib.contextmanager
def scratch_of(key: object, ranks: Ranks) -> Generator[Path]:
    """Give all ranks the scratch folder of `io.scratch_dir`; the first holds the lock for all."""
    folder = (
        contextlib.nullcontext(io.scratch_path(key)) if not ranks.leads else io.scratch_dir(key)
    )
    with folder as scratch:
        ranks.wait()
        yield scratch
        ranks.wait()


@contextlib.contextmanager
def join() -> Generator[Ranks]:
    """Connect to the other ranks until the block ends; ALONE if no launcher started several.

    CPU tensors are exchanged through gloo, CUDA tensors through NCCL.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, size = next(dist.rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun keeps one store over restarts: without this, ranks find the dead ones' addresses.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=RANK_TIMEOUT)
    try:
        yield Ranks(rank, size, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        dist.destroy_process_group()


class ComputeSettings(Protocol):
    """The section `compute` of params.yaml."""

    @property
    def device(self) -> str: ...
    @property
    def processes(self) -> int: ...
    @property
    def engine(self) -> str: ...
    @property
    def trackers(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Engine:
    """How the work of a stage is spread."""

    ranks: Ranks
    """This process among the processes that run the same stage."""
    workers: Workers
    """Opens a `map` over processes, or over a cluster."""
    processes: int
    """Processes for `workers`: one if the ranks are the processes."""
    device: str
    """Device of the models in this process."""
    trackers: tuple[str, ...] = ()
    """Where curves of training go, beside DVCLive."""


@contextlib.contextmanager
def start(compute: ComputeSettings) -> Generator[Engine]:
    """Start the engine of `compute`, at the beginning of a stage's main.

    For torchrun this process becomes the launcher of `compute.processes` ranks, each of which runs
    main again. A stage that torchrun or accelerate launched (RANK is set) is a rank at once,
    whatever `compute.engine` says.
    """
    launched = "RANK" in os.environ
    if compute.engine == "torchrun" and not launched:
        _become_torchrun(compute.processes)
    with join() as ranks:
        device = resolve_device(compute.device, ranks)
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)
        workers: Workers = parallel.workers
        if compute.engine == "ray" and not launched:
            workers = functools.partial(ray_workers, device=device)
        processes = 1 if launched else compute.processes
        yield Engine(ranks, workers, processes, device, compute.trackers)


def resolve_device(wanted: str, ranks: Ranks = ALONE) -> str:
    """Resolve "auto" to cuda if available, else cpu; each of several ranks takes its own GPU.

    Raises:
        ValueError: this machine has no such device.
    """
    try:
        found = command_line.device(wanted)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"params.yaml: compute.device = {error}") from None
    if found == "cuda" and ranks.size > 1:
        found = f"cuda:{ranks.local % torch.cuda.device_count()}"
    return found


def _become_torchrun(processes: int) -> None:
    """Replace this process by torchrun of the stage, with its arguments; does not return.

    On several machines, start torchrun on each by hand instead, with -m stages.<stage>.
    """
    spec = sys.modules["__main__"].__spec__
    if spec is None:
        raise RuntimeError("start the stage as a module: python -m stages.<stage>")
    options = ["--standalone", f"--nproc-per-node={processes}"]
    options += [f"--max-restarts={TORCHRUN_RESTARTS}", "-m", spec.name]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "torch.distributed.run", *options]
    os.execv(sys.executable, [*command, *sys.argv[1:]])


@contextlib.contextmanager
def ray_workers(processes: int, device: str = "cpu") -> Generator[parallel.Run]:
    """Give a `map` over a Ray cluster; ``run(function, jobs)`` yields in the order of the jobs.

    `processes` is the size of a cluster that is started here; a running cluster decides itself. As
    in parallel.workers each worker computes with one thread, keeps what it has loaded, and
    function, jobs and results are pickled. ImportError with the remedy if Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            "compute.engine is ray, which is an extra: pip install '.[ray]', or set "
            "compute.engine to processes"
        ) from error
    address = os.environ.get("RAY_ADDRESS")
    fresh = not ray.is_initialized()
    if fresh:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports to its makers otherwise
        variables = {name: os.environ[name] for name in RAY_ENVIRONMENT if name in os.environ}
        variables["PYTHONPATH"] = os.pathsep.join(os.path.abspath(p) for p in sys.path if p)
        variables["OMP_NUM_THREADS"] = "1"
        local = {} if address else {"num_cpus": processes, "include_dashboard": False}
        ray.init(address=address, runtime_env={"env_vars": variables}, **local)
    gpus = 1 if device.startswith("cuda") else 0
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RAY_RETRIES)(_ray_job)

    def run(function: Callable, jobs: Iterable) -> Iterator:
        shared, folder = ray.put(function), os.getcwd()
        yield from map(ray.get, [task.remote(folder, shared, job) for job in jobs])

    try:
        yield run
    finally:
        if fresh:
            ray.shutdown()


def _ray_job(folder: str, function: Callable[[J], R], job: J) -> R:
    """Run one job in a worker."""
    os.chdir(folder)
    torch.set_num_threads(1)
    return function(job)
