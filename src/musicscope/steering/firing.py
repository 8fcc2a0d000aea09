"""Which of some latents fire, and how much, without the code of all others."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from musicscope.dictionaries.core import TopKSAE

GROUP = 8
"""Columns a group in the search for the k-th largest pre-activation."""


def kth_largest(z: Tensor, k: int) -> Tensor:
    """The k-th largest value of each row of z [N, F], as [N, 1]; exact.

    As `sae.largest_k`, the k largest are looked for among the groups of columns with the largest
    maxima, but in five numpy calls, which is what counts for the few rows of a step.
    """
    N, F = z.shape
    if z.is_cuda or z.dtype != torch.float32 or F % GROUP or k >= F // GROUP:
        return z.topk(k).values[:, -1:]
    groups = z.numpy().reshape(N, GROUP, F // GROUP)
    best = np.argpartition(groups.max(1), -k, axis=1)[:, None, -k:]
    candidates = np.take_along_axis(groups, best, 2).reshape(N, GROUP * k)
    return torch.from_numpy(np.partition(candidates, -k, axis=1)[:, -k, None])


def firing(sae: TopKSAE, x: Tensor, features: Tensor) -> Tensor:
    """Values [N, n] of some latents in the code of x [N, d]: `encode`'s, 0 where they are not."""
    if sae.activation == "batchtopk":
        if sae.threshold < 0:
            raise ValueError("this batchtopk SAE has no threshold: calibrate_threshold() first")
        centred = x.to(sae.W_enc.dtype) - sae.b_dec
        own = torch.addmm(sae.b_enc[features], centred, sae.W_enc[features].T)
        return own.masked_fill(own <= sae.threshold, 0.0).relu_()
    z = sae.pre_activations(x)
    own = z[:, features]
    return own.masked_fill_(own < kth_largest(z, sae.k), 0.0).relu_()
