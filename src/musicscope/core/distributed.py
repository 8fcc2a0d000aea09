"""Spread a stage's work, by `compute.engine`: processes of one machine, torchrun ranks, or Ray.

Ranks: the same program in several processes at once (torchrun, accelerate launch). The launcher
says in the environment which process this is (RANK, WORLD_SIZE, LOCAL_RANK) and where they meet.
All ranks see the same files: on several machines a shared file system.

Ray (the extra `ray`) works job by job; the jobs of a killed worker run again. RAY_ADDRESS names the
cluster; without it one is started on this machine for as long as needed. All nodes see the same
files, under the same path.

No engine changes what extraction writes: shard i depends on the configuration and on i only.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from musicscope.core import parallel

PATIENCE = timedelta(days=14)
"""How long a rank waits for the others: one may have an hour's more work, or wait for a lock."""


@dataclass(frozen=True)
class Ranks:
    """One of `size` equal processes; methods that speak of "all" are to be called by all."""

    rank: int = 0
    size: int = 1
    local: int = 0
    """Number of this process on its machine: its GPU."""

    @property
    def leads(self) -> bool:
        """True for the one that writes what is there once, such as metrics."""
        return self.rank == 0

    def mine(self, numbers: Iterable[int]) -> list[int]:
        """The pieces of work that fall to this rank: by their own number, not by what is left."""
        return [number for number in numbers if number % self.size == self.rank]

    def rows(self, batch: int) -> slice:
        """This rank's rows of a global batch. ValueError unless it divides evenly."""
        if batch % self.size:
            raise ValueError(
                f"a batch of {batch} frames does not divide among {self.size} ranks; choose a "
                f"batch_size that is a multiple of {self.size}, or another number of processes"
            )
        part = batch // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def any(self, value: bool) -> bool:
        """Whether it is true on any of all ranks; none goes on before all have asked."""
        if self.size == 1:
            return value
        found = torch.tensor([int(value)])
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def wait(self) -> None:
        """Until all are here."""
        self.any(False)

    def average_(self, *tensors: Tensor) -> None:
        """Put the mean over all ranks in the place of each tensor."""
        for tensor in tensors if self.size > 1 else ():
            dist.all_reduce(tensor)
            tensor /= self.size

    def minimum_(self, tensor: Tensor) -> None:
        """Put the least value over all ranks in the place of every entry."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MIN)

    def squares(self, x: Tensor) -> Tensor:
        """Sum of squares about the column means of the rows [n, d] of all ranks, over their number.

        So a loss that is divided by it averages over ranks to what one process finds.
        """
        mean = x.mean(0)
        self.average_(mean)
        total = (x - mean).square_().sum()
        self.average_(total)
        return total


ALONE = Ranks()


@contextlib.contextmanager
def join() -> Iterator[Ranks]:
    """Meet the other ranks, and part at the end; ALONE where nothing launched several.

    CPU tensors go through gloo, those on a GPU through NCCL.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, size = next(dist.rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun keeps one store over restarts: without this, ranks find the dead ones' addresses.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield Ranks(rank, size, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        dist.destroy_process_group()


# --- engine ------------------------------------------------------------------------------------

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
    with join() as mine:
        device = _device(compute.device, mine)
        if compute.engine == "ray" and not launched:
            opened, processes = functools.partial(ray_workers, device=device), compute.processes
        else:
            opened, processes = parallel.workers, 1 if launched else compute.processes
        yield Engine(mine, opened, processes, device)


def resolve_device(wanted: str) -> str:
    """`wanted`, or for "auto" `cuda` where there is a GPU, else `cpu`."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


def _device(wanted: str, mine: Ranks) -> str:
    """Resolve `auto`; among several ranks of a machine each takes a GPU of its own."""
    wanted = resolve_device(wanted)
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


# --- Ray ---------------------------------------------------------------------------------------

RAY_RETRIES = 5
"""Of a job whose worker or node died. An error in the job itself is raised, not tried again."""
RAY_SHIPPED = ("DVC_ROOT", "HF_HUB_OFFLINE")


@contextlib.contextmanager
def ray_workers(
    processes: int, device: str = "cpu"
) -> Iterator[Callable[[Callable, Iterable], Iterator]]:
    """Give a `map` over the cluster; ``run(function, jobs)`` yields in the order of the jobs.

    `processes` is the size of a cluster that is started here; a running one decides itself. As in
    parallel.workers each worker computes with one thread, keeps what it has loaded, and function,
    jobs and results are pickled. ImportError with the remedy where Ray is not installed.
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
        local = {} if address else {"num_cpus": processes, "include_dashboard": False}
        ray.init(address=address, runtime_env={"env_vars": _ray_environment()}, **local)
    gpus = 1 if device.startswith("cuda") else 0
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RAY_RETRIES)(_ray_call)

    def run(function: Callable, jobs: Iterable) -> Iterator[Any]:
        shared, root = ray.put(function), os.getcwd()
        yield from map(ray.get, [task.remote(root, shared, job) for job in jobs])

    try:
        yield run
    finally:
        if fresh:
            ray.shutdown()


def _ray_environment() -> dict[str, str]:
    """What workers need to import and find the same things as this process."""
    kept = {name: os.environ[name] for name in RAY_SHIPPED if name in os.environ}
    path = os.pathsep.join(os.path.abspath(p) for p in sys.path if p)
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def _ray_call(root: str, function: Callable, job: Any) -> Any:
    """One job, in a worker."""
    os.chdir(root)
    torch.set_num_threads(1)
    return function(job)
