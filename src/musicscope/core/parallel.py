"""Run the same function in several processes, each with one torch thread.

Two torch threads slow each other down many times over as soon as anything else runs, and their
split of a sum shows in the last bits; processes do neither, so results are the same for any number.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection

import torch

Run = Callable[[Callable, Iterable], Iterator]
"""``run(function, jobs)`` yields function(job) in the order of the jobs."""


@contextlib.contextmanager
def workers(processes: int) -> Generator[Run]:
    """Give a `map` over that many processes, which stay (with what they have loaded) to the end.

    ``run(function, jobs)`` yields function(job) in the order of the jobs. With more than one
    process, function, jobs and results are pickled, and the calling script needs an
    ``if __name__ == "__main__"``. An error in a job is raised where its result is asked for.
    """
    if processes <= 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield map
        finally:
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")  # forking after torch has run is unsafe
    pool = ProcessPoolExecutor(processes, context, _start)
    try:
        yield pool.map
    except KeyboardInterrupt:
        for process in list(pool._processes.values()):  # else it waits for jobs of minutes
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start() -> None:
    follow_parent()
    torch.set_num_threads(1)


def follow_parent() -> None:
    """Make this worker exit when its parent is killed, else it waits for ever; ignore Ctrl-C.

    The terminal sends Ctrl-C to workers too, each of which would print a traceback.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow(sentinel: int) -> None:
        connection.wait([sentinel])
        os._exit(1)

    if parent is not None:
        threading.Thread(target=follow, args=(parent.sentinel,), daemon=True).start()
