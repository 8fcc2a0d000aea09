"""The same program in several processes at once (torchrun, accelerate launch): who does what.

The launcher says in the environment which process this is (RANK, WORLD_SIZE, LOCAL_RANK) and where
they meet. All ranks see the same files: on several machines a shared file system.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

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
