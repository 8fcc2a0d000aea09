"""What several models share through one code, on compositions that nothing was trained on.

After Thasarathan et al. 2025 (arXiv 2502.03714, 3.3-4.3), with three departures: R2 is taken about
the *per-dimension* mean (their code takes the mean of the whole tensor, which flatters streams with
massive dimensions), energy is the squared norm of their eq. 9 (their code takes the norm), and
every number has a null. No number stands alone: latents that both models use for unrelated things
have firing entropy 1, so read it beside the co-fires, and those beside what chance gives.

Everything is summed over clips of one composition ("group"), the unit of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musicscope.core.stats import percentile_interval, resample_weights
from musicscope.dictionaries.evaluation import random_like
from musicscope.dictionaries.usae import ModelWeights, UniversalSAE

TOP = 100  # latents of highest energy whose mean co-fire proportion is given apart
SHARED_NORM, OWN_NORM = 0.6, 0.9


@dataclass(frozen=True)
class Evaluation:
    """Sums over the frames of each group. C codes: one a model (usae), or 1 (crosscoder)."""

    groups: np.ndarray
    """[G] names"""
    frames: np.ndarray
    """[G]"""
    squared_error: np.ndarray
    """[G, C, M] of model j's activations decoded from code c, in activation units"""
    squares: np.ndarray
    """[G, M] about the per-dimension mean of all frames evaluated"""
    active: np.ndarray
    """[G, C] latents above 0, summed over frames"""
    fires: np.ndarray
    """[G, C, F] frames on which the code of c at latent k exceeds tau"""
    cofires: np.ndarray
    """[G, F] frames on which all C codes do"""
    values: np.ndarray
    """[G, C, F] sum of the codes over frames"""
    norms: np.ndarray
    """[M, F] decoder norms"""


def firings(values: Tensor, indices: Tensor, n_latents: int, tau: float) -> np.ndarray:
    """Sorted keys frame * F + latent of the entries [N, n] above tau (each latent once a row)."""
    rows = torch.arange(len(values), device=values.device).unsqueeze(1) * n_latents
    return np.sort((rows + indices)[values > tau].cpu().numpy())


@torch.no_grad()
def evaluate(
    usae: UniversalSAE,
    clips: Iterable[Sequence[np.ndarray]],
    groups: Sequence[str],
    tau: float,
) -> Evaluation:
    """One pass over paired clips, [T, d_j] a model each, of the compositions `groups` [clips].

    `tau`: a latent fires where its value, in the shared normalised unit, exceeds it. Sums in
    float64; memory of one clip and of [groups, models, latents] counts.
    """
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    joint, M, F, G = usae.kind == "crosscoder", len(usae.names), usae.n_latents, len(names)
    C = 1 if joint else M
    device = usae.weights[0].mean.device
    found = Evaluation(
        names, np.zeros(G), np.zeros((G, C, M)), np.zeros((G, M)), np.zeros((G, C)),
        np.zeros((G, C, F), np.int32), np.zeros((G, F), np.int32), np.zeros((G, C, F), np.float32),
        np.stack([usae.decoder(j).norm(dim=1).cpu().numpy() for j in range(M)]),
    )  # fmt: skip
    totals = [np.zeros((G, width)) for width in usae.widths]
    seen = 0
    for g, clip in zip(member, clips, strict=True):
        seen += 1
        xs = [torch.from_numpy(np.asarray(x, dtype=np.float32)).to(device) for x in clip]
        codes = [usae.encode_all(xs)] if joint else [usae.encode(i, x) for i, x in enumerate(xs)]
        found.frames[g] += len(xs[0])
        for j, x in enumerate(xs):
            # About the train mean, which is near: squares about it lose no digits.
            deviation = (x - usae.weights[j].mean).double()
            totals[j][g] += deviation.sum(0).cpu().numpy()
            found.squares[g, j] += deviation.square().sum().item()
            for c, code in enumerate(codes):
                error = (x - usae.decode(j, *code)).double()
                found.squared_error[g, c, j] += error.square().sum().item()
        keys = []
        for c, (values, indices) in enumerate(codes):
            keys.append(firings(values, indices, F, tau))
            found.fires[g, c] += np.bincount(keys[-1] % F, minlength=F).astype(np.int32)
            found.active[g, c] += (values > 0).sum().item()
            latents, sizes = (t.flatten().cpu().numpy() for t in (indices, values))
            found.values[g, c] += np.bincount(latents, sizes, F).astype(np.float32)
        both = keys[0]
        for other in keys[1:]:
            both = np.intersect1d(both, other, assume_unique=True)
        found.cofires[g] += np.bincount(both % F, minlength=F).astype(np.int32)
    if not seen:
        raise ValueError("no clips to evaluate on: check split, font and kind")
    for j, total in enumerate(totals):
        shift = total.sum(0) / found.frames.sum()
        # sum |x - m|^2 = sum |x - o|^2 - 2 (m - o) . sum (x - o) + T |m - o|^2, group by group
        found.squares[:, j] += found.frames * (shift @ shift) - 2 * total @ shift
    return found


def firing_entropy(fires: np.ndarray) -> np.ndarray:
    """Firing counts [..., M, F] to entropies [..., F]: 0 one model only, 1 all equally often.

    -(1 / log M) sum_i p_i log p_i with p_i the share of a latent's firings that are model i's; NaN
    for a latent that never fires.
    """
    fires = np.asarray(fires, dtype=np.float64)
    if fires.shape[-2] < 2:
        raise ValueError("firing entropy compares models: it needs at least 2")
    with np.errstate(invalid="ignore", divide="ignore"):
        p = fires / fires.sum(-2, keepdims=True)
        terms = np.where(p > 0, p * np.log(p), p)  # 0 log 0 = 0, NaN stays
    return np.clip(-terms.sum(-2) / np.log(fires.shape[-2]), 0, 1)


def cofire_proportion(cofires: np.ndarray, fires: np.ndarray) -> np.ndarray:
    """[..., F] and [..., M, F] to the share of model i's firings that all models share [..., M, F].

    NaN for a latent that does not fire in model i.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(cofires, dtype=np.float64)[..., None, :] / fires


def energy(mean_codes: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """||E[Z_k] D_k||^2, summed over models, [..., F]: mean codes [..., M, F], norms [M, F]."""
    return np.square(mean_codes * norms).sum(-2)


def log_correlation(energies: np.ndarray, cofires: np.ndarray) -> np.ndarray:
    """Pearson correlation [...] of log energy and log co-fires [..., F], over latents with both."""
    keep = (energies > 0) & (cofires > 0)
    a, b = (np.log(np.where(keep, v, 1.0)) for v in (energies, np.asarray(cofires, np.float64)))
    n = keep.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        a, b = (np.where(keep, v - v.sum(-1, keepdims=True) / n[..., None], 0.0) for v in (a, b))
        r = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.where(n > 2, r, np.nan)


def _means(values: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Mean of values [..., F] where `keep`; NaN where nothing is kept."""
    with np.errstate(invalid="ignore"):
        return np.where(keep, values, 0.0).sum(-1) / keep.sum(-1)


def headline(found: Evaluation, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The numbers of an evaluation, [resamples] each, under `weights` [resamples, G] (default 1).

    r2_<i>_<j>: model j's activations from model i's code (r2_<j> for a crosscoder). l0_<i>.
    dead_fraction: latents that fire in no code. And for a usae: firing_entropy_median and _mean
    over latents that fire, _weighted by firings; cofire_proportion_<i>: share of all firings of
    model i that are co-fires; _mean_<i>: the mean over its latents of their own share; _top_<i>:
    the same over the 100 latents of highest energy; energy_cofire_correlation.
    """
    if weights is None:
        weights = np.ones((1, len(found.groups)))
    (_, C, M), F = found.squared_error.shape, found.cofires.shape[-1]
    squares = weights @ found.squares
    out: dict[str, np.ndarray] = {}
    for c in range(C):
        r2 = 1 - np.einsum("rg,gm->rm", weights, found.squared_error[:, c]) / squares
        out |= {f"r2_{c}_{j}" if C > 1 else f"r2_{j}": r2[:, j] for j in range(M)}
        out[f"l0_{c}" if C > 1 else "l0"] = weights @ found.active[:, c] / (weights @ found.frames)
    rows = [_rows(found, part, C, F) for part in np.array_split(weights, -(-len(weights) // 50))]
    return out | {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}


def _rows(found: Evaluation, weights: np.ndarray, C: int, F: int) -> dict[str, np.ndarray]:
    """The numbers that come from counts, of a few resamples at a time."""
    G = len(found.groups)
    fires, values = (
        (weights @ counts.reshape(G, C * F)).reshape(-1, C, F)
        for counts in (found.fires, found.values)
    )
    out = {"dead_fraction": (fires.sum(1) == 0).mean(-1)}
    if C == 1:
        return out
    cofires, total = weights @ found.cofires, fires.sum(1)
    entropy = firing_entropy(fires)
    out["firing_entropy_median"] = np.nanmedian(entropy, -1)
    out["firing_entropy_mean"] = np.nanmean(entropy, -1)
    out["firing_entropy_weighted"] = np.nansum(entropy * total, -1) / total.sum(-1)
    power = energy(values / (weights @ found.frames)[:, None, None], found.norms)
    top = np.zeros(power.shape, bool)
    np.put_along_axis(top, np.argsort(-power, -1, kind="stable")[:, :TOP], True, -1)
    proportion = cofire_proportion(cofires, fires)
    for i in range(C):
        alive = fires[:, i] > 0
        out[f"cofire_proportion_{i}"] = cofires.sum(-1) / fires[:, i].sum(-1)
        out[f"cofire_proportion_mean_{i}"] = _means(proportion[:, i], alive)
        out[f"cofire_proportion_top_{i}"] = _means(proportion[:, i], alive & top)
    out["energy_cofire_correlation"] = log_correlation(power, cofires)
    return out


def numbers(found: Evaluation) -> dict[str, float]:
    """`headline` of all frames as floats."""
    return {key: float(value[0]) for key, value in headline(found).items()}


def intervals(found: Evaluation, n: int, seed: int) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals of `headline`, resampling compositions, about the full sample.

    Resamples are shifted by the mean distance of theirs from the full sample's number before the
    percentiles are taken: a resample leaves compositions out, so rare latents always seem rarer
    in it, and plain percentiles of an entropy or a share would lie below the number itself. None
    for dead_fraction and l0, where that shift is all there is.
    """
    drawn, whole = headline(found, resample_weights(found.groups, n, seed)), numbers(found)
    keys = [key for key in drawn if not key.startswith(("dead", "l0"))]
    return {k: percentile_interval(whole[k] + drawn[k] - np.nanmean(drawn[k])) for k in keys}


def relative_norms(norms: np.ndarray) -> np.ndarray:
    """Decoder norms [M, F] to each model's share [M, F]: 1/M alike in all, 1 this model's own."""
    return norms / np.maximum(norms.sum(0), np.finfo(np.float64).tiny)


def norm_numbers(norms: np.ndarray, alive: np.ndarray) -> dict[str, float]:
    """Relative decoder norms of the latents that fire: norm_shared and norm_own_<i>.

    norm_shared: every model's share is at least 0.6 / M (0.3 to 0.7 with two models); norm_own_<i>:
    model i's share exceeds 0.9. norm_spread: mean distance of the largest share from 1/M.
    """
    shares = relative_norms(norms)[:, alive]
    if not alive.any():
        return {"norm_shared": np.nan, "norm_spread": np.nan}
    M = len(shares)
    out = {"norm_shared": float((shares.min(0) * M >= SHARED_NORM).mean())}
    out["norm_spread"] = float((shares.max(0) - 1 / M).mean())
    return out | {f"norm_own_{i}": float((shares[i] > OWN_NORM).mean()) for i in range(M)}


def random_dictionary(usae: UniversalSAE, sample: Sequence[np.ndarray], seed: int) -> UniversalSAE:
    """The control: Gaussian rows of each decoder's mean and covariance, as encoder and decoder.

    For a crosscoder rows are drawn over all models at once, so that norms keep their relation
    between models. Biases stay; one gain a model is fitted to paired `sample` [N, d_j].
    """
    joint = usae.kind == "crosscoder"
    dictionaries = [usae.decoder(j).double().cpu().numpy() for j in range(len(usae.names))]
    if joint:
        drawn = random_like(np.concatenate(dictionaries, 1), seed)
        rows = np.split(drawn, np.cumsum(usae.widths)[:-1], axis=1)
    else:
        rows = [random_like(d, seed + j) for j, d in enumerate(dictionaries)]
        rows = [r / np.linalg.norm(r, axis=1, keepdims=True) for r in rows]
    weights = []
    for side, row in zip(usae.weights, rows, strict=True):
        W = torch.from_numpy(row).to(side.W_dec)
        weights.append(replace(side, W_enc=W, b_enc=torch.zeros_like(side.b_enc), W_dec=W))
    control = replace(usae, weights=tuple(weights))
    xs = [torch.from_numpy(x).to(usae.weights[0].mean) for x in sample]
    fitted: list[ModelWeights] = []
    for j, side in enumerate(weights):
        code = control.encode_all(xs) if joint else control.encode(j, xs[j])
        origin = side.mean + side.scale * side.b_dec
        guess, target = control.decode(j, *code) - origin, xs[j] - origin
        gain = (target * guess).sum() / guess.square().sum()
        fitted.append(replace(side, W_dec=gain * side.W_dec))
    return replace(control, weights=tuple(fitted))


def summary_keys(metrics: dict[str, Any]) -> dict[str, Any]:
    """Flat keys for summary.json, without prefix, from metrics/train_usae.json or _crosscoder.json.

    <key>, <key>_ci_low, <key>_ci_high of seed 0; <key>_mean_of_seeds, <key>_sd_of_seeds;
    null_<null>_<key> for the nulls mispaired, shuffled and random; independent_r2_<i>. Indices
    are those of metrics["models"].
    """
    out: dict[str, Any] = {}
    for key, entry in metrics["headline"].items():
        out[key] = entry["value"]
        for ours, theirs in (
            ("ci_low", "low"), ("ci_high", "high"), ("mean_of_seeds", "mean"),
            ("sd_of_seeds", "sd"),
        ):  # fmt: skip
            if theirs in entry:
                out[f"{key}_{ours}"] = entry[theirs]
    for null, entries in metrics["null"].items():
        out |= {f"null_{null}_{key}": value for key, value in entries.items()}
    return out | {f"independent_r2_{i}": v for i, v in metrics["independent_r2"].items()}
