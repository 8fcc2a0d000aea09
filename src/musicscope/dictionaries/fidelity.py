"""What a model loses where an SAE stands in for a layer: cross-entropy, or sound."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musicscope.activations.store import ActivationStore
from musicscope.core.audio import spectra, spectral_distance
from musicscope.dictionaries import evaluation as metrics
from musicscope.dictionaries.core import TopKSAE
from musicscope.models.interface import AudioBatch, AudioModel, is_audio_model
from musicscope.models.registry import open_sources


@dataclass(frozen=True)
class LossJob:
    """Cross-entropies of the model with its layer clean, ablated and replaced by an SAE; of an
    audio model spectral distances."""

    model: str
    clips: str
    rows: list[int]
    """Of the clip store."""
    store: str
    sae: str
    device: str
    batch_clips: int = 8


def run_losses(job: LossJob) -> tuple[dict[str, np.ndarray], str]:
    """sae_metrics.cross_entropies or, of an audio model, `spectral_distances`, and which it was;
    the captions are given if they were for the store."""
    store = ActivationStore.open(job.store)
    model, clips = open_sources(job.model, job.clips, job.device)
    mean = torch.tensor(store.mean, dtype=torch.float32, device=job.device)

    def batches() -> Iterator:
        for start in range(0, len(job.rows), job.batch_clips):
            rows = job.rows[start : start + job.batch_clips]
            captions = clips.rows["caption"].iloc[rows].tolist()
            if not store.config["captions"]:
                captions = [None] * len(rows)
            yield model.encode(clips.audio(rows), captions)

    sae = TopKSAE.load(job.sae, job.device)
    layer = store.config["layer"]
    if is_audio_model(model):
        return spectral_distances(model, layer, sae, mean, batches()), metrics.SPECTRAL
    with torch.no_grad():
        return metrics.cross_entropies(model, layer, sae, mean, batches()), metrics.CE


@torch.no_grad()
def spectral_distances(
    model: AudioModel, layer: str, sae: TopKSAE, mean: Tensor, batches: Iterable[AudioBatch]
) -> dict[str, np.ndarray]:
    """As `cross_entropies` for a model that predicts no codes: distance of each clip to its
    reconstruction (`spectral_distance`), clean, with `layer` at its mean, with x' for x."""
    found: dict[str, list[float]] = {"clean": [], "ablated": [], "sae": []}
    hooks: dict[str, Any] = {
        "ablated": {layer: lambda x, _: mean.to(x).expand_as(x)},
        "sae": {layer: lambda x, _: sae.reconstruct(x)},
    }
    for batch in batches:
        clips = [spectra(audio) for audio in batch.audio.cpu().numpy()]
        for name, values in found.items():
            heard = model.reconstruct(batch, hooks.get(name)).cpu().numpy()
            values += [
                spectral_distance(clip, spectra(audio))
                for clip, audio in zip(clips, heard, strict=True)
            ]
    return {name: np.array(values) for name, values in found.items()}
