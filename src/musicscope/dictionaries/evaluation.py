"""How good an SAE is, on activations it was not trained on, and against what controls.

explained_variance is 1 - (sum of squared errors) / (sum of squares about the per-dimension mean
of the same frames), both sums over all frames: predicting that mean gives exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from musicscope.core.stats import bootstrap_groups, ratio_of
from musicscope.dictionaries.core import TopKSAE
from musicscope.models.interface import Batch, Hook, MusicModel

CE, SPECTRAL = "ce", "spectral"
"""What a model loses is measured in: cross-entropy, or an audio model's spectral distance."""
DENSITY_EDGES = np.linspace(-6, 0, 25)  # log10 of the share of frames on which a latent fires


@dataclass(frozen=True)
class Evaluation:
    """Sums over clips; the properties are the metrics."""

    frames: np.ndarray
    """[clips]"""
    squared_error: np.ndarray
    """[clips] sum over frames and dimensions"""
    squares: np.ndarray
    """[clips] the same for deviations from the mean over all clips"""
    active: np.ndarray
    """[clips] active latents, summed over frames"""
    fired: np.ndarray
    """[F] frames on which each latent is active"""

    @property
    def explained_variance(self) -> float:
        return float(1 - self.squared_error.sum() / self.squares.sum())

    @property
    def l0(self) -> float:
        """Mean number of active latents a frame."""
        return float(self.active.sum() / self.frames.sum())

    @property
    def density(self) -> np.ndarray:
        """[F] share of frames on which each latent is active."""
        return self.fired / self.frames.sum()

    @property
    def dead_fraction(self) -> float:
        """Share of latents active on none of the frames evaluated."""
        return float((self.fired == 0).mean())

    def interval(self, groups: Sequence[str], n: int, seed: int) -> tuple[float, float]:
        """95 % bootstrap interval of explained_variance, resampling groups of clips."""
        unexplained = ratio_of(self.squared_error, self.squares)
        low, high = bootstrap_groups(lambda w: 1 - unexplained(w), groups, n, seed)
        return low, high


@torch.no_grad()
def evaluate(sae: TopKSAE, clips: Iterable[np.ndarray]) -> Evaluation:
    """One pass over clips of activations [T, d]; sums in float64, memory of one clip."""
    origin = sae.b_dec.double()  # near the mean: squares about it lose no digits
    fired = torch.zeros(sae.n_latents, dtype=torch.int64, device=origin.device)
    rows, sums = [], []
    for clip in clips:
        x = torch.from_numpy(np.asarray(clip, dtype=np.float32)).to(origin.device)
        values, indices = sae.encode(x)
        error = (x - sae.decode(values, indices)).double()
        deviation = x.double() - origin
        active = indices[values > 0]
        fired += torch.bincount(active, minlength=sae.n_latents)
        sums.append(deviation.sum(0))
        square = deviation.square().sum().item()
        rows.append((len(x), error.square().sum().item(), square, active.numel()))
    if not rows:
        raise ValueError("no clips to evaluate the SAE on: check split, font and kind")
    frames, squared_error, about_origin, active = np.array(rows, dtype=np.float64).T
    totals = torch.stack(sums).cpu().numpy()
    shift = totals.sum(0) / frames.sum()
    # sum |x - m|^2 = sum |x - o|^2 - 2 (m - o) . sum (x - o) + T |m - o|^2, clip by clip
    squares = about_origin - 2 * totals @ shift + frames * (shift @ shift)
    return Evaluation(frames, squared_error, squares, active, fired.cpu().numpy())


def density_histogram(density: np.ndarray) -> list[dict[str, float]]:
    """Rows of log10(density) bins [low, high) with their number of latents; dead ones first."""
    alive = np.log10(np.clip(density[density > 0], 10 ** DENSITY_EDGES[0], None))
    counts, _ = np.histogram(alive, DENSITY_EDGES)
    low, high = DENSITY_EDGES[:-1], DENSITY_EDGES[1:]
    rows = [{"log10_low": "", "log10_high": "", "latents": int((density == 0).sum())}]
    for a, b, count in zip(low, high, counts, strict=True):
        rows.append({"log10_low": float(a), "log10_high": float(b), "latents": int(count)})
    return rows


def matched_cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Mean cosine of the rows of two dictionaries [F, d] under the best one-to-one matching.

    Hungarian assignment on signed cosines: 1 for the same dictionary in any order.
    """
    a, b = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in (first, second))
    cosine = a @ b.T
    return float(cosine[linear_sum_assignment(cosine, maximize=True)].mean())


def random_like(dictionary: np.ndarray, seed: int) -> np.ndarray:
    """Gaussian rows [F, d] of the dictionary's mean and covariance: the null for stability."""
    rng = np.random.default_rng(seed)
    covariance = np.cov(dictionary.T.astype(np.float64))
    return rng.multivariate_normal(dictionary.mean(0), covariance, len(dictionary), method="eigh")


def stability(dictionaries: Sequence[np.ndarray], seed: int) -> dict[str, float | None]:
    """Mean matched cosine over all pairs of seeds, and of each dictionary's random likeness."""
    pairs = [(i, j) for i in range(len(dictionaries)) for j in range(i)]
    found = [matched_cosine(dictionaries[i], dictionaries[j]) for i, j in pairs]
    null = [matched_cosine(dictionaries[i], random_like(dictionaries[j], seed)) for i, j in pairs]
    if not pairs:
        return {"stability": None, "stability_null": None}
    return {"stability": float(np.mean(found)), "stability_null": float(np.mean(null))}


def random_dictionary(sae: TopKSAE, sample: np.ndarray, seed: int) -> TopKSAE:
    """Control: random unit directions, same k and b_dec, one gain fitted to `sample` [N, d]."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(sae.W_dec.shape, generator=generator)
    W = W / torch.linalg.vector_norm(W, dim=1, keepdim=True)
    control = TopKSAE(W, torch.zeros(len(W)), W, sae.b_dec.cpu(), sae.k)
    x = torch.from_numpy(np.asarray(sample, dtype=np.float32)) - control.b_dec
    guess = control.reconstruct(x + control.b_dec) - control.b_dec
    gain = float((x * guess).sum() / guess.square().sum())
    return TopKSAE(W, control.b_enc, gain * W, control.b_dec, sae.k)


def principal_components(sample: np.ndarray, k: int) -> Callable[[np.ndarray], np.ndarray]:
    """Control: the reconstruction x -> x' from k principal components of `sample` [N, d]."""
    mean = sample.mean(0, dtype=np.float64)
    _, vectors = np.linalg.eigh(np.cov((sample - mean).T))
    basis = vectors[:, -k:]
    return lambda x: (x - mean) @ basis @ basis.T + mean


def explained_variance(
    reconstruct: Callable[[np.ndarray], np.ndarray], clips: Iterable[np.ndarray]
) -> float:
    """Explained variance of any reconstruction of clips [T, d]; the clips are held in memory."""
    frames = np.concatenate([np.asarray(clip, dtype=np.float64) for clip in clips])
    error = np.square(frames - reconstruct(frames)).sum()
    return float(1 - error / np.square(frames - frames.mean(0)).sum())


def replace_frames(replacement: Callable[[Tensor], Tensor], frames: int) -> Hook:
    """Hook that replaces the activations of the frames and leaves the other positions as they are.

    Frame t is position t + 1. The start column (position 0) and the tail of the delay pattern are
    in no store, so no SAE has seen them; they stay untouched under every replacement compared.
    """

    def hook(hidden: Tensor, positions: Tensor) -> Tensor:
        inside = (positions >= 1) & (positions <= frames)
        out = hidden.clone()
        out[:, inside] = replacement(hidden[:, inside]).to(hidden.dtype)
        return out

    return hook


@torch.no_grad()
def cross_entropies(
    model: MusicModel, layer: str, sae: TopKSAE, mean: Tensor, batches: Iterable[Batch]
) -> dict[str, np.ndarray]:
    """Cross-entropy [clips] in nats a token: clean, with `layer` at its mean [d], with x' for x."""
    found: dict[str, list[Tensor]] = {"clean": [], "ablated": [], "sae": []}
    for batch in batches:
        kinds = {"ablated": lambda x: mean.expand_as(x), "sae": sae.reconstruct}
        hooks: dict[str, Any] = {
            name: {layer: replace_frames(kind, batch.frames)} for name, kind in kinds.items()
        }
        for name, values in found.items():
            losses = model.cross_entropy(batch, hooks=hooks.get(name))
            values.append(losses.double().mean((1, 2)).cpu())
    return {name: torch.cat(values).numpy() for name, values in found.items()}


def ce_recovered(
    losses: dict[str, np.ndarray], groups: Sequence[str], n: int, seed: int, measure: str = CE
) -> dict[str, float | None]:
    """(CE ablated - CE with the SAE) / (CE ablated - CE clean), 0 = mean ablation, 1 = lossless.

    A ratio of sums over clips, with a 95 % bootstrap interval over groups. None, with a note in
    the numbers beside it, where ablation does not hurt: the share of nothing is undefined. With
    another `measure` (SPECTRAL, of sae_losses.spectral_distances) its name stands in the keys,
    and ce_recovered is None: there is no cross-entropy.
    """
    ablated, clean, ours = (losses[name] for name in ("ablated", "clean", "sae"))
    result: dict[str, float | None] = {
        f"{name}_recovered{end}": None for name in {CE, measure} for end in ("", "_low", "_high")
    }
    result |= {f"{measure}_{name}": float(values.mean()) for name, values in losses.items()}
    if ablated.sum() > clean.sum():
        ratio = ratio_of(ablated - ours, ablated - clean)
        low, high = bootstrap_groups(ratio, groups, n, seed)
        result[f"{measure}_recovered"] = float(ratio(np.ones((1, len(clean))))[0])
        result |= {f"{measure}_recovered_low": low, f"{measure}_recovered_high": high}
    return result
