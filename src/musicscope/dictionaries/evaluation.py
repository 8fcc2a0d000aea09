"""Evaluate dictionaries on activations they were not trained on, with the controls.

explained_variance (r2 per model in a shared code) is 1 - (sum of squared errors) / (sum of squares
about the per-dimension mean of the same frames), both sums over all frames: predicting that mean
gives exactly 0.

Shared codes: after Thasarathan et al. 2025 (arXiv 2502.03714, 3.3-4.3), with three departures. R2
is taken about the *per-dimension* mean (their code takes the mean of the whole tensor, which
flatters streams with massive dimensions). Energy is the squared norm of their eq. 9 (their code
takes the norm). Every number has a null. No number stands alone: latents that both models use for
unrelated things have firing entropy 1, so read it beside the co-fires, and those beside chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from musicscope.core.stats import Estimate, estimate, ratio_of, resample_weights
from musicscope.dictionaries.core import ModelWeights, TopKSAE, UniversalSAE

DENSITY_EDGES = np.linspace(-6, 0, 25)  # log10 of the share of frames on which a latent fires
TOP = 100  # latents of highest energy whose mean co-fire proportion is given apart
SHARED_NORM, OWN_NORM = 0.6, 0.9
UNITS = {
    "r2": "R2",
    "firing_entropy": "share of the maximum",
    "cofire_proportion": "share of firings",
    "firing_concentration": "share of latents",
    "energy_cofire_correlation": "Pearson r",
}
"""Units by the start of the keys of `headline` that have an interval."""


# --- one model ---------------------------------------------------------------------------------


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
        """Mean number of active latents per frame."""
        return float(self.active.sum() / self.frames.sum())

    @property
    def density(self) -> np.ndarray:
        """[F] share of frames on which each latent is active."""
        return self.fired / self.frames.sum()

    @property
    def dead_fraction(self) -> float:
        """Share of latents active on none of the frames evaluated."""
        return float((self.fired == 0).mean())

    def estimate(self, groups: Sequence[str] | np.ndarray, n: int, seed: int) -> Estimate:
        """Compute explained_variance with its interval over groups [clips]."""
        unexplained = ratio_of(self.squared_error, self.squares)
        return estimate(lambda w: 1 - unexplained(w), groups, n, seed, "share")


@torch.no_grad()
def evaluate(sae: TopKSAE, clips: Iterable[np.ndarray]) -> Evaluation:
    """Evaluate an SAE in one pass over clips [T, d]; sums in float64, memory of one clip."""
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
    squares = about_origin + _shift_squares(totals, frames)
    return Evaluation(frames, squared_error, squares, active, fired.cpu().numpy())


def _shift_squares(totals: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Return the change [n] of sums of squares when taken about the mean m, not an origin o.

    sum |x - m|^2 = sum |x - o|^2 - 2 (m - o) . sum (x - o) + T |m - o|^2 for each row: `totals`
    [n, d] are the sums of x - o over `frames` [n].
    """
    shift = totals.sum(0) / frames.sum()
    return frames * (shift @ shift) - 2 * totals @ shift


def density_histogram(density: np.ndarray) -> list[dict[str, float | str]]:
    """Count latents in bins [low, high) of log10(density); the first row counts the dead."""
    alive = np.log10(np.clip(density[density > 0], 10 ** DENSITY_EDGES[0], None))
    counts, _ = np.histogram(alive, DENSITY_EDGES)
    low, high = DENSITY_EDGES[:-1], DENSITY_EDGES[1:]
    rows: list[dict[str, float | str]] = [
        {"log10_low": "", "log10_high": "", "latents": int((density == 0).sum())}
    ]
    for a, b, count in zip(low, high, counts, strict=True):
        rows.append({"log10_low": float(a), "log10_high": float(b), "latents": int(count)})
    return rows


def matched_cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Average the cosine of the rows of two dictionaries [F, d] under the best matching.

    One-to-one Hungarian assignment on signed cosines: 1 for the same dictionary in any order.
    """
    a, b = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in (first, second))
    cosine = a @ b.T
    return float(cosine[linear_sum_assignment(cosine, maximize=True)].mean())


def random_like(dictionary: np.ndarray, seed: int) -> np.ndarray:
    """Draw Gaussian rows [F, d] of the dictionary's mean and covariance: a null."""
    rng = np.random.default_rng(seed)
    covariance = np.cov(dictionary.T.astype(np.float64))
    return rng.multivariate_normal(dictionary.mean(0), covariance, len(dictionary), method="eigh")


def stability(
    dictionaries: Sequence[np.ndarray], seed: int, other: np.ndarray | None = None
) -> dict[str, float | None]:
    """Average `matched_cosine` over all pairs of seeds, and against `random_like` (the null).

    With `other` [F, d]: over the pairs of it with each seed.
    """
    pairs = [(a, b) for i, a in enumerate(dictionaries) for b in dictionaries[:i]]
    if other is not None:
        pairs = [(other, b) for b in dictionaries]
    cosines = [matched_cosine(a, b) for a, b in pairs]
    null = [matched_cosine(a, random_like(b, seed)) for a, b in pairs]
    if not pairs:
        return {"stability": None, "stability_null": None}
    return {"stability": float(np.mean(cosines)), "stability_null": float(np.mean(null))}


def random_sae(sae: TopKSAE, sample: np.ndarray, seed: int) -> TopKSAE:
    """Draw the control: random unit directions, same k and b_dec, one gain fitted to [N, d]."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(sae.W_dec.shape, generator=generator)
    W = W / torch.linalg.vector_norm(W, dim=1, keepdim=True)
    control = TopKSAE(W, torch.zeros(len(W)), W, sae.b_dec.cpu(), sae.k)
    x = torch.from_numpy(np.asarray(sample, dtype=np.float32)) - control.b_dec
    guess = control.reconstruct(x + control.b_dec) - control.b_dec
    gain = float((x * guess).sum() / guess.square().sum())
    return TopKSAE(W, control.b_enc, gain * W, control.b_dec, sae.k)


def principal_components(sample: np.ndarray, k: int) -> Callable[[np.ndarray], np.ndarray]:
    """Fit the control: the reconstruction x -> x' from k principal components of [N, d]."""
    mean = sample.mean(0, dtype=np.float64)
    _, vectors = np.linalg.eigh(np.cov((sample - mean).T))
    basis = vectors[:, -k:]
    return lambda x: (x - mean) @ basis @ basis.T + mean


def explained_variance(
    reconstruct: Callable[[np.ndarray], np.ndarray], clips: Iterable[np.ndarray]
) -> float:
    """Compute it for any reconstruction of clips [T, d]; the clips are held in memory."""
    frames = np.concatenate([np.asarray(clip, dtype=np.float64) for clip in clips])
    error = np.square(frames - reconstruct(frames)).sum()
    return float(1 - error / np.square(frames - frames.mean(0)).sum())


# --- a code that models share ------------------------------------------------------------------


@dataclass(frozen=True)
class SharedEvaluation:
    """Sums over the frames of each group: the clips of one composition, the bootstrap's unit.

    C codes: one per model (usae), or 1 (crosscoder).
    """

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
    """Return sorted keys frame * F + latent of the entries [N, n] above tau."""
    rows = torch.arange(len(values), device=values.device).unsqueeze(1) * n_latents
    return np.sort((rows + indices)[values > tau].cpu().numpy())


@torch.no_grad()
def evaluate_shared(
    usae: UniversalSAE,
    clips: Iterable[Sequence[np.ndarray]],
    groups: Sequence[str] | np.ndarray,
    tau: float,
) -> SharedEvaluation:
    """Evaluate a shared code in one pass over paired clips, [T, d_j] per model.

    `groups` [clips] are their compositions. A latent fires where its value, in the shared
    normalised unit, exceeds `tau`. Sums in float64; memory of one
    clip and of [groups, models, latents] counts.
    """
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    joint, M, F, G = usae.joint, len(usae.names), usae.n_latents, len(names)
    C = 1 if joint else M
    device = usae.weights[0].mean.device
    found = SharedEvaluation(
        names, np.zeros(G), np.zeros((G, C, M)), np.zeros((G, M)), np.zeros((G, C)),
        np.zeros((G, C, F), np.int32), np.zeros((G, F), np.int32), np.zeros((G, C, F), np.float32),
        np.stack([usae.decoder(j).norm(dim=1).cpu().numpy() for j in range(M)]),
    )  # fmt: skip
    totals = [np.zeros((G, width)) for width in usae.widths]
    seen = 0
    for g, clip in zip(member, clips, strict=True):
        seen += 1
        xs = [torch.from_numpy(np.asarray(x, dtype=np.float32)).to(device) for x in clip]
        codes = [usae.encode_all(xs)] if joint else [usae.encode(x, i) for i, x in enumerate(xs)]
        found.frames[g] += len(xs[0])
        for j, x in enumerate(xs):
            # About the train mean, which is near: squares about it lose no digits.
            deviation = (x - usae.weights[j].mean).double()
            totals[j][g] += deviation.sum(0).cpu().numpy()
            found.squares[g, j] += deviation.square().sum().item()
            for c, code in enumerate(codes):
                error = (x - usae.decode(*code, j)).double()
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
        found.squares[:, j] += _shift_squares(total, found.frames)
    return found


def firing_entropy(fires: np.ndarray) -> np.ndarray:
    """Compute firing entropy [..., F] from counts [..., M, F]: 0 one model, 1 all equally often.

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
    """Compute the share [..., M, F] of model i's firings on which all models fire.

    From co-fires [..., F] and fires [..., M, F]. NaN for a latent that does not fire in model i.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(cofires, dtype=np.float64)[..., None, :] / fires


def concentration(fires: np.ndarray, held: float = 0.9) -> np.ndarray:
    """Compute the smallest share of latents that hold `held` of the firings [..., F]."""
    falling = np.sort(fires, -1)[..., ::-1].cumsum(-1)
    few = (falling < held * falling[..., -1:]).sum(-1) + 1
    return few / fires.shape[-1]


def energy(mean_codes: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """Compute ||E[Z_k] D_k||^2 summed over models, [..., F]: codes [..., M, F], norms [M, F]."""
    return np.square(mean_codes * norms).sum(-2)


def log_correlation(energies: np.ndarray, cofires: np.ndarray) -> np.ndarray:
    """Correlate log energy and log co-fires [..., F] (Pearson, [...]) over latents with both."""
    keep = (energies > 0) & (cofires > 0)
    a, b = (np.log(np.where(keep, v, 1.0)) for v in (energies, np.asarray(cofires, np.float64)))
    n = keep.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        a, b = (np.where(keep, v - v.sum(-1, keepdims=True) / n[..., None], 0.0) for v in (a, b))
        r = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.where(n > 2, r, np.nan)


def _means(values: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Average values [..., F] where `keep`; NaN where nothing is kept."""
    with np.errstate(invalid="ignore"):
        return np.where(keep, values, 0.0).sum(-1) / keep.sum(-1)


def headline(found: SharedEvaluation, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Compute the metrics, [resamples] each, under `weights` [resamples, G] (default 1).

    r2_<i>_<j>: model j's activations from model i's code (r2_<j> for a crosscoder). l0_<i>.
    dead_fraction: latents that fire in no code. And for a usae: firing_entropy_median and _mean
    over latents that fire, _weighted by firings; cofire_proportion_mean_<i>: the mean over the
    latents of model i of the share of their firings that are co-fires; _median_<i>: the median;
    _top_<i>: the mean over the 100 latents of highest energy; cofire_proportion_<i>: the share of
    all firings, which few latents may decide; firing_concentration_<i>: share of latents that hold
    90 % of the firings; energy_cofire_correlation.
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


def _rows(found: SharedEvaluation, weights: np.ndarray, C: int, F: int) -> dict[str, np.ndarray]:
    """Compute the metrics that come from counts, for a few resamples at a time."""
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
        out[f"cofire_proportion_median_{i}"] = np.nanmedian(proportion[:, i], -1)
        out[f"firing_concentration_{i}"] = concentration(fires[:, i])
        out[f"cofire_proportion_top_{i}"] = _means(proportion[:, i], alive & top)
    out["energy_cofire_correlation"] = log_correlation(power, cofires)
    return out


def numbers(found: SharedEvaluation) -> dict[str, float]:
    """Compute `headline` of all frames as floats."""
    return {key: float(value[0]) for key, value in headline(found).items()}


def estimates(found: SharedEvaluation, n: int, seed: int) -> dict[str, Estimate]:
    """Compute `headline` with 95 % intervals over compositions, about the full sample.

    Resamples are shifted by their mean distance from the full sample's number before the
    percentiles are taken. A resample leaves compositions out, so rare latents always seem rarer
    in it; plain percentiles of an entropy or a share would lie below the number itself. There is
    no interval for dead_fraction and l0, where that shift is all there is, nor for the median of
    co-fires, which it would carry below 0.
    """
    drawn, whole = headline(found, resample_weights(found.groups, n, seed)), numbers(found)
    return {
        key: Estimate.from_resamples(
            whole[key], whole[key] + drawn[key] - np.nanmean(drawn[key]), len(found.groups), unit
        )
        for key in drawn
        for prefix, unit in UNITS.items()
        if key.startswith(prefix) and not key.startswith("cofire_proportion_median")
    }


def relative_norms(norms: np.ndarray) -> np.ndarray:
    """Compute each model's share [M, F] of decoder norms [M, F]: 1/M equal, 1 its own latent."""
    return norms / np.maximum(norms.sum(0), np.finfo(np.float64).tiny)


def norm_numbers(norms: np.ndarray, alive: np.ndarray) -> dict[str, float]:
    """Summarise relative decoder norms of the latents that fire: norm_shared, norm_own_<i>.

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


def random_shared(usae: UniversalSAE, sample: Sequence[np.ndarray], seed: int) -> UniversalSAE:
    """Draw the control: Gaussian rows of each decoder's mean and covariance, on both sides.

    For a crosscoder rows are drawn over all models at once, so that norms keep their relation
    between models. Biases stay; one gain per model is fitted to paired `sample` [N, d_j].
    """
    joint = usae.joint
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
    if joint:  # a row that is 0 belongs to the other model
        kept = [torch.from_numpy(d.any(1)).to(usae.weights[0].W_dec)[:, None] for d in dictionaries]
        weights = [
            replace(side, W_enc=side.W_enc * keep, W_dec=side.W_dec * keep)
            for side, keep in zip(weights, kept, strict=True)
        ]
    control = replace(usae, weights=tuple(weights))
    xs = [torch.from_numpy(x).to(usae.weights[0].mean) for x in sample]
    fitted: list[ModelWeights] = []
    for j, side in enumerate(weights):
        code = control.encode_all(xs) if joint else control.encode(xs[j], j)
        origin = side.mean + side.scale * side.b_dec
        guess, target = control.decode(*code, j) - origin, xs[j] - origin
        gain = (target * guess).sum() / guess.square().sum()
        fitted.append(replace(side, W_dec=gain * side.W_dec))
    return replace(control, weights=tuple(fitted))
