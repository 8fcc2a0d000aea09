"""Which hook points of an audio model matter: what its reconstruction loses without each.

An autoencoder predicts no codes, so cross-entropy and KL (`ablation`) do not exist for
it. Their places are taken by a spectral distance D between waveforms:

* ``change`` = D(reconstruction, ablated reconstruction), as KL(original || ablated): how far the
  output moves.
* ``rise`` = D(clip, ablated reconstruction) - D(clip, reconstruction), as dCE: how much worse the
  clip is told.

Ablations replace a hook point's output: ``zero`` by 0, ``mean`` by its per-channel mean over
training clips. There is no ``skip``: convolutions change width and rate. The noise of a clip's pass
is the same with and without ablation, so the distance shows the ablation alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from musicscope.core import plots
from musicscope.core.audio import spectra, spectral_distance
from musicscope.core.stats import bootstrap_groups
from musicscope.models.interface import AudioBatch, AudioModel, Hook

KINDS = ("zero", "mean")
COUNTERPARTS = {"kl": "change", "dce": "rise"}
"""Which score stands where a setting names one of `musicscope.ablation.language`'s."""


@dataclass(frozen=True)
class ChannelSums:
    """Running sums for the mean of every hook point; `+` joins those of two sets of clips."""

    sums: dict[str, Tensor]
    """Hook point to [d] float64."""
    counts: dict[str, int]
    """Hook point to frames."""

    def __add__(self, other: ChannelSums) -> ChannelSums:
        return ChannelSums(
            {name: value + other.sums[name] for name, value in self.sums.items()},
            {name: count + other.counts[name] for name, count in self.counts.items()},
        )

    @property
    def means(self) -> dict[str, Tensor]:
        """Hook point to its mean [d], float32."""
        return {name: (self.sums[name] / n).float() for name, n in self.counts.items()}


def channel_sums(model: AudioModel, batch: AudioBatch) -> ChannelSums:
    """Sums of every hook point's frames over one batch."""
    names = [point.name for point in model.hook_points]
    found = model.capture(batch, names)
    return ChannelSums(
        {name: values.double().sum((0, 1)).cpu() for name, values in found.items()},
        {name: values.shape[0] * values.shape[1] for name, values in found.items()},
    )


def replacing(kind: str, mean: Tensor | None = None) -> Hook:
    """The hook of an ablation; `mean` [d] is needed for "mean" alone."""
    if kind not in KINDS:
        raise ValueError(f"unknown ablation {kind!r} for an audio model; known: {list(KINDS)}")
    if kind == "mean" and mean is None:
        raise ValueError('the kind "mean" needs the means of training clips, see channel_sums')

    def replace(activations: Tensor, positions: Tensor) -> Tensor:
        if kind == "zero":
            return torch.zeros_like(activations)
        return mean.to(activations).expand_as(activations)

    return replace


@dataclass(frozen=True)
class AudioAblationScores:
    """Scores of each clip."""

    kinds: tuple[str, ...]
    points: tuple[str, ...]
    """Names of the hook points."""
    distance: np.ndarray
    """[clips] D(clip, reconstruction) of the model as it is."""
    change: np.ndarray
    """[kinds, points, clips]"""
    rise: np.ndarray
    """[kinds, points, clips]"""


def ablate(
    model: Any,
    batch: AudioBatch,
    kinds: Sequence[str] = KINDS,
    means: dict[str, Tensor] | None = None,
) -> AudioAblationScores:
    """Score every hook point under every kind on one batch.

    A point costs one reconstruction of the batch; one in the decoder starts from kept latents.
    `means` is `ChannelSums.means` of training clips, needed for the kind "mean".
    """
    points = [point.name for point in model.hook_points]
    hooks = {(k, p): replacing(k, (means or {}).get(p)) for k in kinds for p in points}
    latents = model.latents(batch)
    clips = [spectra(audio) for audio in batch.audio.cpu().numpy()]
    original = [spectra(audio) for audio in model.decode(latents, batch).cpu().numpy()]
    distance = np.array([spectral_distance(a, b) for a, b in zip(clips, original, strict=True)])
    change = np.empty((len(kinds), len(points), len(clips)))
    rise = np.empty_like(change)
    for j, kind in enumerate(kinds):
        for i, point in enumerate(points):
            hook = {point: hooks[kind, point]}
            if point in model.survey.encoding:
                ablated = model.reconstruct(batch, hook)
            else:
                ablated = model.decode(latents, batch, hook)
            for c, audio in enumerate(ablated.cpu().numpy()):
                found = spectra(audio)
                change[j, i, c] = spectral_distance(original[c], found)
                rise[j, i, c] = spectral_distance(clips[c], found) - distance[c]
    return AudioAblationScores(tuple(kinds), tuple(points), distance, change, rise)


def join(parts: Sequence[AudioAblationScores]) -> AudioAblationScores:
    """Scores of several batches as those of all their clips, in order."""
    return AudioAblationScores(
        parts[0].kinds,
        parts[0].points,
        np.concatenate([part.distance for part in parts]),
        np.concatenate([part.change for part in parts], -1),
        np.concatenate([part.rise for part in parts], -1),
    )


def ablation_table(
    scores: AudioAblationScores, groups: Sequence[str], bootstrap: int, seed: int
) -> pd.DataFrame:
    """One row for each hook point and kind: estimate and 95% interval of change and rise.

    Columns: layer (number of the hook point), hook_point, kind, change, change_low, change_high,
    rise, rise_low, rise_high. Intervals resample `groups` [clips], in one common draw.
    """
    if len(groups) != scores.change.shape[2]:
        raise ValueError(f"{len(groups)} groups for {scores.change.shape[2]} clips")
    values = np.stack([scores.change, scores.rise])  # [scores, kinds, points, clips]
    lows, highs = bootstrap_groups(np.moveaxis(values, -1, 0), groups, n=bootstrap, seed=seed)
    estimates = values.mean(-1)
    rows = []
    for i, point in enumerate(scores.points):
        for j, kind in enumerate(scores.kinds):
            row: dict[str, object] = {"layer": i, "hook_point": point, "kind": kind}
            for s, name in enumerate(COUNTERPARTS.values()):
                row[name] = estimates[s, j, i]
                row[f"{name}_low"], row[f"{name}_high"] = lows[s, j, i], highs[s, j, i]
            rows.append(row)
    return pd.DataFrame(rows)


def ablation_metrics(
    scores: AudioAblationScores, table: pd.DataFrame, groups: Sequence[str]
) -> dict:
    """Numbers as `ablation.ablation_metrics` gives them: `ablation.select_layers` reads them.

    layers.<i>.<kind>.{change, change_low, ..., rise_high}; i counts `hook_points`; `counterparts`
    says which score stands for which of a text-to-music model's.
    """
    shown = [f"{name}{end}" for name in COUNTERPARTS.values() for end in ("", "_low", "_high")]
    layers: dict[str, dict] = {}
    for row in table.to_dict("records"):
        layers.setdefault(str(row["layer"]), {})[row["kind"]] = {key: row[key] for key in shown}
    return {
        "clips": len(groups),
        "groups": len(set(groups)),
        "distance": scores.distance.mean(),
        "hook_points": {str(i): point for i, point in enumerate(scores.points)},
        "counterparts": COUNTERPARTS,
        "layers": layers,
    }


def ablation_figure(table: pd.DataFrame, name: str) -> Figure:
    """Score against hook point, one line a kind, with intervals."""
    titles = {"change": "D(reconstruction, ablated)", "rise": "rise in D to the clip"}
    figure, axes = plots.new_figure(1, 2, size=(9.0, 4.6), sharex=True)
    for axis, (score, title) in zip(axes[0], titles.items(), strict=True):
        for series, (kind, rows) in enumerate(table.groupby("kind", sort=False)):
            low, high = rows[f"{score}_low"], rows[f"{score}_high"]
            plots.interval_curve(axis, rows["layer"], rows[score], low, high, kind, series)
        points = table.drop_duplicates("layer")
        axis.set(title=f"{name}: {title}", ylabel="spectral distance")
        axis.set_xticks(points["layer"], points["hook_point"], rotation=90, fontsize=6)
    axes[0, 0].legend()
    return figure
