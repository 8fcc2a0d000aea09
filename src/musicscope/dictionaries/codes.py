"""Sparse codes of whole clips: one CSR matrix [frames, latents] per dictionary, and its pools.

Nothing here is [frames, latents] and dense. A matrix takes 8 bytes per nonzero: 31 MB for 240 clips
of 500 frames with 32 active latents each, whatever the size of the dictionary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from scipy.sparse import csr_array, vstack

from musicscope.activations.store import ActivationStore
from musicscope.data.clips import Rows
from musicscope.dictionaries.core import SparseCode, TopKSAE

T = TypeVar("T")
Encode = Callable[[torch.Tensor], SparseCode]
"""Activations [N, d] -> values [N, k] >= 0 and latent indices [N, k]."""
Pools = dict[str, np.ndarray]
"""Pooling ("mean", "max", ...) -> one row per clip, float32 [clips, dimensions]."""


@dataclass(frozen=True)
class Codes:
    """Codes of clips, laid end to end."""

    matrix: csr_array
    """[frames of all clips, F], float32, only values above 0 stored, indices sorted"""
    frames: np.ndarray
    """[clips] frames of each clip"""

    def __post_init__(self) -> None:
        if self.frames.sum() != self.matrix.shape[0]:
            raise ValueError(
                f"codes of {self.matrix.shape[0]} frames for clips of {self.frames.sum()} in all"
            )

    @property
    def n_latents(self) -> int:
        """Latents F."""
        return self.matrix.shape[1]

    @property
    def owner(self) -> np.ndarray:
        """[frames] the clip of each frame."""
        return np.repeat(np.arange(len(self.frames)), self.frames)

    @property
    def fired(self) -> np.ndarray:
        """[F] frames on which each latent is active."""
        return np.bincount(self.matrix.indices, minlength=self.n_latents)

    @property
    def mean(self) -> np.ndarray:
        """[F] mean value over all frames, summed in float64."""
        m = self.matrix
        return np.bincount(m.indices, m.data, self.n_latents) / max(1, m.shape[0])


def to_csr(values: torch.Tensor, indices: torch.Tensor, latents: int) -> csr_array:
    """Convert codes (values [N, k] >= 0, indices [N, k]) to a matrix [N, latents]."""
    data, columns = values.float().cpu().numpy(), indices.cpu().numpy()
    active = data > 0  # TopK pads with zeros where fewer than k pre-activations are positive
    starts = np.append(0, np.cumsum(active.sum(1)))
    shape = (len(data), latents)
    matrix = csr_array((data[active], columns[active].astype(np.int32), starts), shape=shape)
    matrix.sort_indices()
    return matrix


def by_batch(
    function: Callable[[list[int]], T], rows: Rows, workers: int, batch: int = 8
) -> list[T]:
    """Return `function(rows of a batch)` for all batches, in order, `workers` threads at once.

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


def encode_clips(
    store: ActivationStore,
    clips: Rows,
    encode: Encode,
    latents: int,
    workers: int,
    device: str,
) -> Codes:
    """Encode the named clips (positions in the store), in that order.

    `encode` belongs to a dictionary of `latents` latents on `device`; `workers` threads share the
    clips, and the result does not depend on their number.
    """

    @torch.no_grad()
    def batch(rows: list[int]) -> csr_array:
        frames = np.concatenate([store.clip(row) for row in rows])
        return to_csr(*encode(torch.from_numpy(frames).to(device)), latents)

    if not len(clips):
        raise ValueError(f"no clips of {store.folder} to encode: check split, font and kind")
    parts = by_batch(batch, clips, workers)
    return Codes(vstack(parts, format="csr"), np.asarray(store.frames)[np.asarray(clips)])


@dataclass(frozen=True)
class ClipPools:
    """One row per clip, one column per latent."""

    mean: np.ndarray
    """[clips, F] float32, over all frames of the clip"""
    highest: np.ndarray
    """[clips, F] float32, 0 where the latent never fires in the clip"""
    frame: np.ndarray
    """[clips, F] int32, the first frame at which `highest` is reached; -1 where it is 0"""


def pool_clips(codes: Codes) -> ClipPools:
    """Compute mean, maximum and the exact frame of the maximum per latent and clip."""
    clips, F = len(codes.frames), codes.n_latents
    per_frame = np.diff(codes.matrix.indptr)
    starts = np.cumsum(codes.frames) - codes.frames
    within = np.arange(codes.matrix.shape[0]) - np.repeat(starts, codes.frames)
    key = np.repeat(codes.owner, per_frame) * F + codes.matrix.indices
    data = codes.matrix.data
    total = np.bincount(key, data, clips * F).reshape(clips, F)
    highest = np.zeros(clips * F, np.float32)
    np.maximum.at(highest, key, data)
    at_top = data == highest[key]
    none = np.iinfo(np.int32).max
    frame = np.full(clips * F, none, np.int32)
    np.minimum.at(frame, key[at_top], np.repeat(within, per_frame)[at_top].astype(np.int32))
    frame[frame == none] = -1
    mean = total / np.maximum(codes.frames, 1)[:, None]
    shape = (clips, F)
    return ClipPools(mean.astype(np.float32), highest.reshape(shape), frame.reshape(shape))


def pool_store(
    store: ActivationStore,
    clips: Rows,
    saes: Mapping[str, TopKSAE],
    workers: int = 1,
    device: str = "cpu",
) -> dict[str, Pools]:
    """Pool the named clips (positions in the store), read once: "dense", and the codes of `saes`.

    `workers` threads each hold the frames of 8 clips and their codes. `device` is the SAEs'.
    """
    for name, sae in saes.items():
        if sae.width != store.width:
            raise ValueError(
                f"{store.folder} is {store.width} wide, SAE {name} {sae.width}: rerun train_sae"
            )

    @torch.no_grad()
    def pool_batch(rows: list[int]) -> list[np.ndarray]:
        frames = [store.clip(row) for row in rows]
        mean = np.stack([f.mean(0, dtype=np.float64) for f in frames]).astype(np.float32)
        x = torch.from_numpy(np.concatenate(frames)).to(device)
        lengths = np.array([len(f) for f in frames])
        found = [mean, np.stack([f.max(0) for f in frames])]
        for sae in saes.values():
            pools = pool_clips(Codes(to_csr(*sae.encode(x), sae.n_latents), lengths))
            found += [pools.mean, pools.highest]
        return found

    parts = zip(*by_batch(pool_batch, clips, workers), strict=True)
    pooled = list(map(np.concatenate, parts))
    return {
        name: {"mean": pooled[2 * i], "max": pooled[2 * i + 1]}
        for i, name in enumerate(("dense", *saes))
    }
