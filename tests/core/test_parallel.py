"""Work in processes: same results, same order, errors come through, nothing is left behind."""

from __future__ import annotations

import multiprocessing
import os

import pytest
import torch

from musicscope.core.parallel import workers


def report(job: int) -> tuple[int, int, int]:
    if job == 13:
        raise ValueError("unlucky")
    return job * job, torch.get_num_threads(), os.getpid()


def test_order_threads_and_processes():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with workers(1) as run:
        here = list(run(report, range(4)))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert here == [(i * i, 1, os.getpid()) for i in range(4)]
    with workers(2) as run:
        there = list(run(report, range(4)))
        assert [r[:2] for r in there] == [r[:2] for r in here]
        assert os.getpid() not in {r[2] for r in there}
        with pytest.raises(ValueError, match="unlucky"):
            list(run(report, [1, 13, 2]))
    assert not multiprocessing.active_children()
