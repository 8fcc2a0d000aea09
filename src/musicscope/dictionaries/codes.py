"""Sparse codes of whole clips: one CSR matrix [frames, latents] a dictionary, and its pools.

Nothing here is [frames, latents] and dense. A matrix takes 8 bytes a nonzero: 31 MB for 240 clips
of 500 frames with 32 active latents each, whatever the size of the dictionary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array, vstack

from musicscope.dictionaries.pooling import by_batch

Encode = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Activations [N, d] -> values [N, k] >= 0 and latent indices [N, k]."""


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
    """Codes (values [N, k] >= 0, indices [N, k]) as a matrix [N, latents] of what is active."""
    data, columns = values.float().cpu().numpy(), indices.cpu().numpy()
    active = data > 0  # TopK pads with zeros where fewer than k pre-activations are positive
    starts = np.append(0, np.cumsum(active.sum(1)))
    shape = (len(data), latents)
    matrix = csr_array((data[active], columns[active].astype(np.int32), starts), shape=shape)
    matrix.sort_indices()
    return matrix


def encode_clips(
    store: Any, clips: Sequence[int], encode: Encode, latents: int, workers: int, device: str
) -> Codes:
    """Codes of the named clips (positions in an ActivationStore), in that order.

    `encode` belongs to a dictionary of `latents` latents on `device`; `workers` threads share the
    clips, and the result does not depend on how many.
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
    """One row a clip, one column a latent."""

    mean: np.ndarray
    """[clips, F] float32, over all frames of the clip"""
    highest: np.ndarray
    """[clips, F] float32, 0 where the latent never fires in the clip"""
    frame: np.ndarray
    """[clips, F] int32, the first frame at which `highest` is reached; -1 where it is 0"""


def pool_clips(codes: Codes) -> ClipPools:
    """Mean, maximum and the exact frame of the maximum of every latent in every clip."""
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
