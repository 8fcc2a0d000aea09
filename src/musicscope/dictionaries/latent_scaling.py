"""Test whether a latent that looks exclusive to one model is: Latent Scaling (arXiv 2504.02922).

A sparse code can show a direction as one model's own though the other model has it too: its
decoder row shrank, or other latents stand in for it. So each model's activations, and its
reconstruction errors with the latent's own contribution added back, are regressed on the latent's
values f. The paper scales one decoder row, since its two models share their dimensions. Models of
different widths do not, so the direction v = sum(f y) / sum(f^2) is fitted in each model's own
space, with f about its mean in each clip. Its squared norm is taken as the product of the fits on
two halves of the compositions, whose noise is independent: it is unbiased, and 0 on average where
y has nothing to do with f.

nu is the root of the ratio of the other model's squared norm (of several models: the largest) to
that of the model that the latent belongs to; 0: the other model lacks it, 1: it has as much of it.
Activations are in normalised units, in which models have one mean squared norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from musicscope.core.io import Metrics
from musicscope.core.stats import estimate, mean_of
from musicscope.dictionaries.core import UniversalSAE

NU_ERROR, NU_ACTIVATION = 0.2, 0.5
"""The paper's limits, below which both a latent counts as one model's own."""
MOST_LATENTS = 512
"""Latents examined per set, at most; they are drawn where there are more."""


@dataclass(frozen=True)
class Scaling:
    """Products of the fits on two halves, for n latents of one code and M models."""

    error: np.ndarray
    """[n, M] squared norm of what errors hold of the latent"""
    activation: np.ndarray
    """[n, M] the same of the activations"""

    def nu(self, owner: int) -> tuple[np.ndarray, np.ndarray]:
        """Compute nu of errors and of activations [n]; NaN where the owner's own norm is 0."""
        found = []
        for squares in (self.error, self.activation):
            others = np.delete(squares, owner, axis=1).max(1)
            own = squares[:, owner]
            with np.errstate(invalid="ignore", divide="ignore"):
                found.append(np.where(own > 0, np.sqrt(np.maximum(others, 0.0) / own), np.nan))
        return found[0], found[1]


@torch.no_grad()
def scale_latents(
    usae: UniversalSAE,
    clips: Iterable[Sequence[np.ndarray]],
    others: Iterable[Sequence[np.ndarray]],
    groups: Sequence[str] | np.ndarray,
    latents: np.ndarray,
    model: int = 0,
) -> tuple[Scaling, Scaling]:
    """Regress every model's errors and activations on latents [n], in one pass over paired clips.

    The code is of `model` (usae) or joint (crosscoder). The second result is the null: all models
    but `model` take activations and errors from `others`, paired clips of other compositions.
    """
    device = usae.weights[0].mean.device
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    chosen = torch.from_numpy(np.asarray(latents)).to(device)
    place = torch.full((usae.n_latents,), len(latents), device=device)
    place[chosen] = torch.arange(len(latents), device=device)

    def read(clip: Sequence[np.ndarray]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Values [T, n] of the latents; errors and activations of each model, normalised."""
        xs = [torch.from_numpy(np.asarray(x, dtype=np.float32)).to(device) for x in clip]
        values, indices = usae.encode_all(xs) if usae.joint else usae.encode(xs[model], model)
        f = values.new_zeros(len(values), len(latents) + 1)
        f.scatter_add_(1, place[indices], values)
        ys = [
            ((x - usae.decode(values, indices, j)) / side.scale, (x - side.mean) / side.scale)
            for j, (x, side) in enumerate(zip(xs, usae.weights, strict=True))
        ]
        return f[:, :-1], ys

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(2, *shape, dtype=torch.float64, device=device)

    squares = zeros(len(latents))
    # Of real and null: latents times their values where y is from; latents times errors and y.
    products = [[zeros(len(latents)) for _ in usae.names] for _ in range(2)]
    sums = [[zeros(2, len(latents), width) for width in usae.widths] for _ in range(2)]
    for g, clip, other in zip(member, clips, others, strict=True):
        own, apart = read(clip), read(other)
        half = int(g) % 2
        f = own[0] - own[0].mean(0)  # about each clip's mean: levels of whole clips do not count
        squares[half] += f.square().sum(0).double()
        for kind, source in enumerate((own, apart)):
            for j in range(len(usae.names)):
                theirs, ys = own if j == model else source
                frames = min(len(f), len(theirs))
                products[kind][j][half] += (f[:frames] * theirs[:frames]).sum(0).double()
                for n, y in enumerate(ys[j]):
                    sums[kind][j][half, n] += (f[:frames].T @ y[:frames]).double()
    found = []
    for product, total in zip(products, sums, strict=True):
        norms = []
        for side, p, t in zip(usae.weights, product, total, strict=True):
            own_part = p.unsqueeze(-1) * side.W_dec[chosen].double()
            t[:, 0] += own_part  # which is no error
            fits = t / squares.clamp(min=1e-12)[:, None, :, None]
            norms.append((fits[0] * fits[1]).sum(-1).cpu().numpy())
        error, activation = np.stack(norms, axis=-1)
        found.append(Scaling(error, activation))
    return found[0], found[1]


def exclusive_sets(
    shares: np.ndarray, own: float, shared: float, seed: int
) -> dict[str, np.ndarray]:
    """Draw latents of own_<i> (model i's share [M, F] is above `own`), and of shared.

    Shared: every model's share is at least `shared` / M. NaN is in no set; at most MOST_LATENTS.
    """
    rng, M = np.random.default_rng(seed), len(shares)
    sets = {f"own_{i}": np.flatnonzero(shares[i] > own) for i in range(M)}
    sets["shared"] = np.flatnonzero(shares.min(0) * M >= shared)
    return {name: np.sort(rng.permutation(found)[:MOST_LATENTS]) for name, found in sets.items()}


def summarise(
    found: tuple[np.ndarray, np.ndarray], null: tuple[np.ndarray, np.ndarray], n: int, seed: int
) -> Metrics:
    """Summarise nu of a set's latents beside its null; `genuine` has an interval over latents."""
    keep = np.isfinite(found[0]) & np.isfinite(found[1])
    out: Metrics = {"latents": len(keep), "scored": int(keep.sum())}
    if keep.sum() < 2:
        return out
    for prefix, (error, activation) in (("", found), ("null_", null)):
        scored = np.isfinite(error) & np.isfinite(activation)
        error, activation = error[scored], activation[scored]
        out[f"{prefix}nu_error_median"] = float(np.median(error)) if len(error) else None
        out[f"{prefix}nu_activation_median"] = float(np.median(activation)) if len(error) else None
        own = ((error < NU_ERROR) & (activation < NU_ACTIVATION)).astype(float)
        if prefix:
            out["null_genuine"] = float(own.mean()) if len(own) else None
        else:
            share = estimate(mean_of(own), np.arange(len(own)), n, seed, "share of latents")
            out["genuine"] = share.as_dict()
    return out
