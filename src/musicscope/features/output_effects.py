"""Output effects: what a latent does at the logits, which what makes it fire does not tell.

An effect is of the edit x' = x + v d_f at every frame: d_f is the latent's decoder row, v its mean
value where it fires. Music is teacher-forced. Columns of the table, one row per latent:

* value: v, over train frames; 0 for a latent that never fires there.
* kl: KL(model || edited model) in nats per code; kl_per_unit: kl / v.
* confidence: change of the probability of the most likely code, mean over codes;
  confidence_per_unit: confidence / v. (Output scores: arXiv 2505.20063, 2510.03659.)
* toward_<concept>: change of log p of the codes of clips with the concept, minus that of clips
  without it, in nats per code and unit of activation.

First order: with the Fisher information M = E[g g'] of a shift of all frames, KL = v^2 d' M d / 2;
the other columns are gradients times d. M comes from codes that the model draws: its cost depends
neither on the width nor on the number of latents, and kl has a relative error of
sqrt(2 / (clips x draws)). `first_order` counts as exact enough where its ranks agree with those of
true edits on a sample of latents; otherwise every latent is edited in turn.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor

from musicscope.core.io import Metrics, atomic_file
from musicscope.dictionaries.codes import Codes
from musicscope.dictionaries.core import TopKSAE
from musicscope.models.interface import Batch, LanguageModel, on_frames

AGREES = 0.9
"""Least rank correlation of first-order KL and the KL of true edits."""
TOWARD = "toward_"
FEWEST = 2
"""Fewest clips with and without a concept for its column."""


def usual_values(codes: Codes) -> np.ndarray:
    """Mean value [F] over frames where a latent fires; 0 if it never does."""
    return codes.mean * codes.matrix.shape[0] / np.maximum(codes.fired, 1)


def shifted(model: LanguageModel, layer: str, batch: Batch, shift: Tensor) -> Tensor:
    """Logits [B, K, T, card] with `shift` [d] or [B, d] added at every frame of `layer`.

    They carry gradients where `shift` does.
    """
    shift = shift if shift.ndim == 1 else shift[:, None]
    hook = on_frames(lambda x, positions: x + shift.to(x.dtype), last=batch.frames)
    return model.differentiable(batch, {layer: hook}).float()


@dataclass(frozen=True)
class FirstOrder:
    """Derivatives at the logits with respect to one shift of all frames of a layer."""

    fisher: Tensor
    """[d, d] float64, mean over codes"""
    confidence: Tensor
    """[d] float64: gradient of the mean probability of the most likely code"""


def _pulled(probability: Tensor, codes: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Gradient of log p(codes) with respect to the logits, times `weight`: like `probability`."""
    gradient = -probability
    gradient.scatter_add_(
        -1, codes[..., None], torch.ones_like(codes[..., None], dtype=torch.float)
    )
    return gradient * weight


def first_order(
    model: LanguageModel, layer: str, batches: Iterable[Batch], draws: int, seed: int
) -> FirstOrder:
    """Compute the derivatives from `draws` sets of codes that the model draws per clip."""
    fisher, confidence, clips = None, None, 0
    for batch in batches:
        width = model.capture(batch, [layer])[layer].shape[-1]
        shift = torch.zeros(len(batch), width, device=model.device, requires_grad=True)
        logits = shifted(model, layer, batch, shift)
        probability = logits.detach().softmax(-1)
        count = batch.codes[0].numel()
        top, best = probability.max(-1)
        (slope,) = torch.autograd.grad(
            logits, shift, _pulled(probability, best, top[..., None] / count), retain_graph=True
        )
        generator = torch.Generator(model.device).manual_seed(seed + clips)
        found = torch.zeros(width, width, dtype=torch.float64, device=model.device)
        for _ in range(draws):
            drawn = torch.multinomial(probability.flatten(0, -2), 1, generator=generator)
            (g,) = torch.autograd.grad(
                logits, shift, _pulled(probability, drawn.view(best.shape)), retain_graph=True
            )
            found += g.double().T @ g.double() / (draws * count)
        fisher = found if fisher is None else fisher + found
        total = slope.double().sum(0)
        confidence = total if confidence is None else confidence + total
        clips += len(batch)
    if fisher is None or confidence is None:
        raise ValueError("no clips to measure output effects on")
    return FirstOrder(fisher / clips, confidence / clips)


def likelihood_gradients(model: LanguageModel, layer: str, batches: Iterable[Batch]) -> Tensor:
    """Gradient per clip of its mean log p per code with respect to a shift: [clips, d] float64."""
    found = []
    for batch in batches:
        width = model.capture(batch, [layer])[layer].shape[-1]
        shift = torch.zeros(len(batch), width, device=model.device, requires_grad=True)
        logits = shifted(model, layer, batch, shift)
        pull = _pulled(logits.detach().softmax(-1), batch.codes, 1 / batch.codes[0].numel())
        found.append(torch.autograd.grad(logits, shift, pull)[0].double())
    return torch.cat(found)


@torch.no_grad()
def true_edits(
    model: LanguageModel, layer: str, batches: Sequence[Batch], shifts: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """KL and change of confidence of edits by `shifts` [n, d]: two arrays [n]."""
    kl, confidence = np.zeros(len(shifts)), np.zeros(len(shifts))
    clips = sum(map(len, batches))
    for batch in batches:
        before = shifted(model, layer, batch, torch.zeros_like(shifts[0])).log_softmax(-1)
        probability = before.exp()
        for i, shift in enumerate(shifts):
            after = shifted(model, layer, batch, shift).log_softmax(-1)
            share = len(batch) / clips
            kl[i] += share * float((probability * (before - after)).sum(-1).double().mean())
            gain = after.amax(-1).exp() - probability.amax(-1)
            confidence[i] += share * float(gain.double().mean())
    return kl, confidence


def measure(
    model: LanguageModel, layer: str, sae: TopKSAE, values: np.ndarray,
    batches: Sequence[Batch], labelled: Iterable[Batch], labels: Mapping[str, np.ndarray],
    draws: int, checked: int, seed: int,
) -> tuple[pd.DataFrame, Metrics]:  # fmt: skip
    """Measure every latent: the table, and how exact it is.

    `values` [F] as `usual_values`; `batches`: clips for kl and confidence; `labelled`: clips for
    toward_*, in the order of `labels` (concept -> [clips], 1, 0 or NaN: not known); `checked`:
    latents of the sample.
    """
    rows = sae.W_dec.detach().to(model.device, torch.float64)
    slopes = first_order(model, layer, batches, draws, seed)
    kl = (0.5 * values**2) * ((rows @ slopes.fisher) * rows).sum(1).cpu().numpy()
    confidence = values * (rows @ slopes.confidence).cpu().numpy()

    edits = torch.from_numpy(values).to(rows)[:, None] * rows
    live = np.flatnonzero(values > 0)
    sample = np.sort(np.random.default_rng(seed).permutation(live)[:checked])
    true = functools.partial(true_edits, model, layer, batches)
    true_kl, true_confidence = true(edits[sample].float())
    with np.errstate(divide="ignore", invalid="ignore"):
        quality = {
            "kl_rank_correlation": _ranks(kl[sample], true_kl),
            "kl_ratio": float(np.median(kl[sample] / true_kl)),
            "confidence_rank_correlation": _ranks(confidence[sample], true_confidence),
        }
    # NaN, of too few latents, does not agree.
    exact = quality["kl_rank_correlation"] >= AGREES
    if not exact:
        kl[live], confidence[live] = true(edits[live].float())

    def per_unit(column: np.ndarray) -> np.ndarray:
        return np.divide(column, values, out=np.zeros_like(column), where=values > 0)

    columns = {"feature": np.arange(len(values)), "value": values, "kl": kl,
               "kl_per_unit": per_unit(kl), "confidence": confidence,
               "confidence_per_unit": per_unit(confidence)}  # fmt: skip
    gradients = likelihood_gradients(model, layer, labelled)
    for concept, has in labels.items():
        sides = [np.flatnonzero(has == side) for side in (1, 0)]
        if min(map(len, sides)) >= FEWEST:
            difference = gradients[sides[0]].mean(0) - gradients[sides[1]].mean(0)
            columns[TOWARD + concept] = (rows @ difference).cpu().numpy()
    metrics: Metrics = {
        "latents": len(values), "live": len(live), "checked": len(sample), **quality,
        "method": "first order" if exact else "true edits",
        "kl": _spread(kl[live]), "confidence": _spread(np.abs(confidence[live])),
    }  # fmt: skip
    return pd.DataFrame(columns), metrics


def _spread(values: np.ndarray) -> dict[str, float]:
    """Quartiles, the 95th percentile, and the share of the sum that the top tenth has."""
    if not len(values):
        return {}
    low, median, high, top = np.quantile(values, [0.25, 0.5, 0.75, 0.95])
    tenth = np.sort(values)[::-1][: max(1, len(values) // 10)].sum() / max(values.sum(), 1e-12)
    return {"q25": float(low), "median": float(median), "q75": float(high), "q95": float(top),
            "top_tenth_share": float(tenth)}  # fmt: skip


def _ranks(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman correlation; NaN for fewer than three."""
    return float(spearmanr(first, second).statistic) if len(first) > 2 else float("nan")


def write(path: str | Path, table: pd.DataFrame) -> None:
    """Write the table as parquet, atomically."""
    with atomic_file(path) as temporary:
        table.to_parquet(temporary, index=False)


def path_of(model: str, slot: str) -> Path:
    """Table of a model and slot."""
    return Path("data/effects") / model / f"{slot}.parquet"


def read(model: str, slot: str) -> pd.DataFrame:
    """Read the table of a model and slot; FileNotFoundError names the stage to run."""
    path = path_of(model, slot)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run dvc repro measure_effects")
    return pd.read_parquet(path)
