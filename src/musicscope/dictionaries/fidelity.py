"""Measure what a model loses when an SAE stands in for a layer: cross-entropy, or sound."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from musicscope.activations.store import ActivationStore
from musicscope.core.audio import spectra, spectral_distance
from musicscope.core.io import Metrics
from musicscope.core.stats import estimate, ratio_of
from musicscope.dictionaries.core import TopKSAE
from musicscope.models.interface import (
    AudioBatch,
    AudioModel,
    Batch,
    Hook,
    Hooks,
    LanguageModel,
)
from musicscope.models.registry import open_sources

CE, SPECTRAL = "ce", "spectral"
"""Measures of a loss: cross-entropy, or for an audio model the spectral distance."""
VARIANTS = ("clean", "ablated", "sae")
"""The layer as it is, at its mean, and reconstructed by the SAE."""
Losses = dict[str, np.ndarray]
"""Variant -> loss of each clip, [clips]."""


def replace_frames(replacement: Callable[[Tensor], Tensor], frames: int) -> Hook:
    """Return a hook that replaces the activations of the frames and keeps all other positions.

    Frame t is position t + 1. The start column (position 0) and the tail of the delay pattern are
    in no store, so no SAE was trained on them; they stay untouched under every replacement.
    """

    def hook(hidden: Tensor, positions: Tensor) -> Tensor:
        inside = (positions >= 1) & (positions <= frames)
        out = hidden.clone()
        out[:, inside] = replacement(hidden[:, inside]).to(hidden.dtype)
        return out

    return hook


@torch.no_grad()
def cross_entropies(
    model: LanguageModel, layer: str, sae: TopKSAE, mean: Tensor, batches: Iterable[Batch],
    variants: Sequence[str] = VARIANTS,
) -> Losses:  # fmt: skip
    """Measure cross-entropy in nats per token: VARIANTS of `layer`, whose mean is [d]."""
    losses: dict[str, list[Tensor]] = {name: [] for name in variants}
    for batch in batches:
        kinds = {"ablated": lambda x: mean.expand_as(x), "sae": sae.reconstruct}
        hooks: dict[str, Hooks] = {
            name: {layer: replace_frames(kind, batch.frames)} for name, kind in kinds.items()
        }
        for name, values in losses.items():
            nats = model.cross_entropy(batch, hooks=hooks.get(name))
            values.append(nats.double().mean((1, 2)).cpu())
    return {name: torch.cat(values).numpy() for name, values in losses.items()}


@torch.no_grad()
def spectral_distances(
    model: AudioModel, layer: str, sae: TopKSAE, mean: Tensor, batches: Iterable[AudioBatch],
    variants: Sequence[str] = VARIANTS,
) -> Losses:  # fmt: skip
    """Measure the `spectral_distance` of each clip to its reconstruction by an audio model."""
    distances: dict[str, list[float]] = {name: [] for name in variants}
    hooks: dict[str, Hooks] = {
        "ablated": {layer: lambda x, _: mean.to(x).expand_as(x)},
        "sae": {layer: lambda x, _: sae.reconstruct(x)},
    }
    for batch in batches:
        clips = [spectra(audio) for audio in batch.audio.cpu().numpy()]
        for name, values in distances.items():
            audios = model.reconstruct(batch, hooks.get(name)).cpu().numpy()
            values += [
                spectral_distance(clip, spectra(audio))
                for clip, audio in zip(clips, audios, strict=True)
            ]
    return {name: np.array(values) for name, values in distances.items()}


def measure_losses(
    model_folder: str,
    clips_folder: str,
    rows: Sequence[int],
    store: ActivationStore,
    sae: TopKSAE,
    device: str,
    batch_clips: int = 8,
    variants: Sequence[str] = VARIANTS,
) -> tuple[Losses, str]:
    """Measure `cross_entropies` (CE), or `spectral_distances` (SPECTRAL) of an audio model.

    `rows` are rows of the clip store. Captions are given if they were given for the store.
    """
    model, clips = open_sources(model_folder, clips_folder, device)
    mean = torch.tensor(store.mean, dtype=torch.float32, device=device)

    def batches() -> Iterator:
        for start in range(0, len(rows), batch_clips):
            part = list(rows[start : start + batch_clips])
            captions = clips.rows["caption"].iloc[part].tolist()
            if not store.config["captions"]:
                captions = [None] * len(part)
            yield model.encode(clips.audio(part), captions)

    layer = store.config["layer"]
    if isinstance(model, AudioModel):
        return spectral_distances(model, layer, sae, mean, batches(), variants), SPECTRAL
    with torch.no_grad():
        return cross_entropies(model, layer, sae, mean, batches(), variants), CE


def ce_recovered(
    losses: Losses, groups: Sequence[str], n: int, seed: int, measure: str = CE
) -> Metrics:
    """Compute (CE ablated - CE with the SAE) / (CE ablated - CE clean): 1 is lossless.

    A ratio of sums over clips, as an estimate over groups. None where ablation does
    not hurt: the share of nothing is undefined. With another `measure` (SPECTRAL) its name stands
    in the keys, and ce_recovered is None: there is no cross-entropy.
    """
    clean, ablated, ours = (losses[name] for name in VARIANTS)
    result: Metrics = {f"{name}_recovered": None for name in {CE, measure}}
    result |= {f"{measure}_{name}": float(values.mean()) for name, values in losses.items()}
    if ablated.sum() > clean.sum():
        ratio = ratio_of(ablated - ours, ablated - clean)
        result[f"{measure}_recovered"] = estimate(ratio, groups, n, seed, "share").as_dict()
    return result
