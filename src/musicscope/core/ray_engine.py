"""Work on a Ray cluster (the extra `ray`), job by job: the jobs of a killed worker run again.

RAY_ADDRESS names the cluster; without it one is started on this machine for as long as needed. All
nodes see the same files, under the same path.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

RETRIES = 5
"""Of a job whose worker or node died. An error in the job itself is raised, not tried again."""
SHIPPED = ("DVC_ROOT", "HF_HUB_OFFLINE")


def opener(device: str) -> Callable[[int], AbstractContextManager]:
    """Like parallel.workers, for jobs on `device`: each takes a CPU, and a GPU if it needs one."""
    return functools.partial(workers, device=device)


@contextlib.contextmanager
def workers(
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
        ray.init(address=address, runtime_env={"env_vars": _environment()}, **local)
    gpus = 1 if device.startswith("cuda") else 0
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_call)

    def run(function: Callable, jobs: Iterable) -> Iterator[Any]:
        shared, root = ray.put(function), os.getcwd()
        yield from map(ray.get, [task.remote(root, shared, job) for job in jobs])

    try:
        yield run
    finally:
        if fresh:
            ray.shutdown()


def _environment() -> dict[str, str]:
    """What workers need to import and find the same things as this process."""
    kept = {name: os.environ[name] for name in SHIPPED if name in os.environ}
    path = os.pathsep.join(os.path.abspath(p) for p in sys.path if p)
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def _call(root: str, function: Callable, job: Any) -> Any:
    """One job, in a worker."""
    os.chdir(root)
    torch.set_num_threads(1)
    return function(job)
