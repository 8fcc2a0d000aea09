"""One vector a clip out of its frames: mean and max over time of activations and of SAE codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar("T")
Pools = dict[str, np.ndarray]
"""Pooling ("mean", "max", ...) -> one row a clip, float32 [clips, dimensions]."""


def pool_codes(
    values: torch.Tensor, indices: torch.Tensor, clip: torch.Tensor, clips: int, latents: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and max of sparse codes over the frames of each clip, float32 [clips, latents] each.

    `values` >= 0 and `indices` [frames, k] are the active latents of each frame, `clip` [frames]
    the clip it belongs to. Latents that are not listed are 0 there. No [frames, latents] array is
    made.
    """
    flat = (clip[:, None] * latents + indices).flatten()
    size = clips * latents
    # bincount adds in double and in order: the same sum on every run.
    total = torch.bincount(flat, weights=values.flatten().double(), minlength=size)
    frames = torch.bincount(clip, minlength=clips).clamp(min=1)
    highest = torch.zeros(size, dtype=torch.float32)
    highest.scatter_reduce_(0, flat, values.flatten().float(), "amax")
    mean = total.view(clips, latents) / frames[:, None]
    return mean.float(), highest.view(clips, latents)


def by_batch(
    function: Callable[[list[int]], T], rows: Sequence[int], workers: int, batch: int = 8
) -> list[T]:
    """`function(rows of a batch)` for all batches, in order, `workers` threads at once.

    Batches do not depend on the number of workers, and each computes with one torch thread, so
    neither does the result.
    """
    batches = [[int(r) for r in rows[i : i + batch]] for i in range(0, len(rows), batch)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(function, batches))
    finally:
        torch.set_num_threads(threads)


def pool_store(
    store: Any, clips: Sequence[int], sae: Any, workers: int = 1, device: str = "cpu"
) -> dict[str, Pools]:
    """{"dense": pools, "sae": pools} of the named clips of an ActivationStore, read once.

    Args:
        store: an `ActivationStore`; `clips` are positions in it.
        sae: a `TopKSAE` over the same layer.
        workers: threads; each holds the frames of 8 clips and their codes.
        device: where the SAE is.
    """
    if sae.width != store.width:
        raise ValueError(
            f"{store.folder} is {store.width} wide, the SAE {sae.width}: rerun train_sae for it"
        )

    @torch.no_grad()
    def pool_batch(rows: list[int]) -> list[np.ndarray]:
        frames = [store.clip(row) for row in rows]
        mean = np.stack([f.mean(0, dtype=np.float64) for f in frames]).astype(np.float32)
        owner = torch.repeat_interleave(torch.tensor([len(f) for f in frames]))
        values, indices = sae.encode(torch.from_numpy(np.concatenate(frames)).to(device))
        codes = pool_codes(values.cpu(), indices.cpu(), owner, len(frames), sae.n_latents)
        return [mean, np.stack([f.max(0) for f in frames]), *(c.numpy() for c in codes)]

    parts = zip(*by_batch(pool_batch, clips, workers), strict=True)
    mean, highest, code_mean, code_max = map(np.concatenate, parts)
    return {
        "dense": {"mean": mean, "max": highest},
        "sae": {"mean": code_mean, "max": code_max},
    }
