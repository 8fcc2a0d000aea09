"""Ablate the hook points of an audio model and score the change of its reconstruction.

An autoencoder predicts no codes, so a spectral distance D between waveforms takes the place of KL
and cross-entropy (`ablation.language`):

* ``change`` = D(reconstruction, ablated reconstruction), as KL(original || ablated): how far the
  output moves.
* ``rise`` = D(clip, ablated reconstruction) - D(clip, reconstruction), as dCE: how much worse the
  reconstruction becomes.

Ablations replace a hook point's output: ``zero`` by 0, ``mean`` by its per-channel mean over
training clips. There is no ``skip``: convolutions change width and rate. The noise of a clip's pass
is the same with and without ablation, so the distance shows the ablation alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from musicscope.ablation.scores import Scores, Sums
from musicscope.core.audio import spectra, spectral_distance
from musicscope.models.interface import AudioBatch, AudioModel, Hook

KINDS = ("zero", "mean")
COUNTERPARTS = {"kl": "change", "dce": "rise"}
"""Score of `musicscope.ablation.language` to its counterpart here."""


def sums(model: AudioModel, batch: AudioBatch) -> Sums:
    """Sum every hook point's frames over one batch."""
    found = model.capture(batch, [point.name for point in model.hook_points])
    return Sums(
        {name: values.double().sum((0, 1)).cpu()[None] for name, values in found.items()},
        {name: torch.tensor([values[..., 0].numel()]) for name, values in found.items()},
    )


def replacing(kind: str, mean: Tensor | None = None) -> Hook:
    """Make the hook of an ablation; "mean" needs `mean` [1, d]. ValueError for other kinds."""
    if kind not in KINDS:
        raise ValueError(f"unknown ablation {kind!r} for an audio model; known: {list(KINDS)}")
    if kind == "mean" and mean is None:
        raise ValueError('the kind "mean" needs the means of training clips, see audio.sums')

    def replace(activations: Tensor, positions: Tensor) -> Tensor:
        if mean is None or kind == "zero":
            return torch.zeros_like(activations)
        return mean[0].to(activations).expand_as(activations)

    return replace


def ablate(
    model: AudioModel,
    batch: AudioBatch,
    kinds: Sequence[str] = KINDS,
    means: Mapping[str, Tensor] | None = None,
) -> Scores:
    """Score every hook point under every kind on one batch.

    A point costs one reconstruction of the batch; one in the decoder starts from kept latents.
    `means` is `Sums.means` of training clips, needed for the kind "mean".
    """
    points = tuple(point.name for point in model.hook_points)
    hooks = {(k, p): replacing(k, (means or {}).get(p)) for k in kinds for p in points}
    latents = model.latents(batch)
    clips = [spectra(audio) for audio in batch.audio.cpu().numpy()]
    plain = model.reconstruct(batch, latents=latents)
    original = [spectra(audio) for audio in plain.cpu().numpy()]
    distance = np.array([spectral_distance(a, b) for a, b in zip(clips, original, strict=True)])
    change = np.empty((len(kinds), len(points), len(clips), 1))
    rise = np.empty_like(change)
    for j, kind in enumerate(kinds):
        for i, point in enumerate(points):
            ablated = model.reconstruct(batch, {point: hooks[kind, point]}, latents)
            for c, audio in enumerate(ablated.cpu().numpy()):
                found = spectra(audio)
                change[j, i, c] = spectral_distance(original[c], found)
                rise[j, i, c] = spectral_distance(clips[c], found) - distance[c]
    values = {"change": change, "rise": rise}
    return Scores(
        tuple(kinds), points, distance[:, None], values, numbered=False, unit="spectral distance"
    )


def summary(scores: Scores) -> dict[str, object]:
    """Numbers beside the hook points': distance, names, and each score's counterpart."""
    return {
        "distance": scores.loss.mean(),
        "hook_points": {str(i): point for i, point in enumerate(scores.points)},
        "counterparts": COUNTERPARTS,
    }
