"""What makes a feature answer: its best moments in real clips, and its value on any tokens.

A feature's *value* at a frame is its sparse code there (0 where TopK left it out), in the unit of
its dictionary; for a random direction it is what projects on it above the mean, or 0. An excerpt's
value is the highest mean over a window of frames. Searches are in `maximization_run`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from musicscope.activations.store import ActivationStore
from musicscope.core.seeding import seed_for
from musicscope.dictionaries.codes import by_batch
from musicscope.dictionaries.core import TopKSAE
from musicscope.features.selection import Latent
from musicscope.maximisation.objective import BATCH, Target, gradient_of, window_means
from musicscope.models.registry import load_model

SPLITS = ("train", "test")
"""Where moments are looked for: what dictionaries learnt from, and compositions nothing heard."""


@dataclass(frozen=True)
class Instrument:
    """One model with the dictionaries that read one of its layers."""

    name: str
    model: Any
    """Searches need tokens (`token_objective.gradient_of`), `moments_only` any with hooks."""
    layer: str
    """Hook point."""
    sae: TopKSAE | None
    usae: Any
    """`UniversalSAE`, or None."""
    index: int
    """The model's number in `usae`."""
    mean: Tensor
    """[d] mean activation over train."""
    seed: int
    """Of the random directions."""


@functools.cache
def open_instruments(
    names: tuple[str, ...], device: str, seed: int, with_sae: bool
) -> tuple[Instrument, ...]:
    """Models of data/models with data/usae/seed-0 and, if asked for, the SAEs of its slot.

    Once a process. ValueError where a model is not one of the USAE's.
    """
    from musicscope.dictionaries.core import UniversalSAE

    folder = "data/usae/seed-0"
    usae = UniversalSAE.load(folder, device)
    found = []
    for name in names:
        if name not in usae.names:
            raise ValueError(f"{folder} knows {usae.names}, not {name}: run dvc repro train_usae")
        model = load_model(f"data/models/{name}", device)
        store = ActivationStore.open(f"data/activations/{name}/{usae.slot}")
        sae = TopKSAE.load(f"data/sae/{name}/{usae.slot}/seed-0", device) if with_sae else None
        mean = torch.as_tensor(store.mean, dtype=torch.float32, device=device)
        index = usae.names.index(name)
        found.append(Instrument(name, model, store.config["layer"], sae, usae, index, mean, seed))
    return tuple(found)


def direction(instrument: Instrument, number: int) -> Tensor:
    """A random unit vector [d] of the activation space, always the same for (model, number)."""
    seed = seed_for(instrument.seed, "maximize", "direction", instrument.name, number)
    drawn = np.random.default_rng(seed).standard_normal(len(instrument.mean))
    drawn /= np.linalg.norm(drawn)
    return torch.as_tensor(drawn, dtype=torch.float32, device=instrument.mean.device)


def pre_activation(instrument: Instrument, latent: Latent, place: int) -> tuple[Tensor, float]:
    """The latent before TopK and ReLU as an affine map (weight [d], bias) of activations.

    `place` is the instrument's number in the run, that is in `latent.features`.
    """
    number = latent.features[place]
    if latent.kind == "direction":
        weight = direction(instrument, number)
        return weight, -float(weight @ instrument.mean)
    point = instrument.mean[None].clone().requires_grad_()
    with torch.enable_grad():
        if latent.kind == "usae":
            value = instrument.usae.pre_activations(point, instrument.index)[0, number]
        else:
            value = instrument.sae.pre_activations(point)[0, number]
        (weight,) = torch.autograd.grad(value, point)
    # In double: the bias is what is left of two numbers that may be far larger.
    bias = float(value.detach().double() - weight[0].double() @ instrument.mean.double())
    return weight[0], bias


@torch.no_grad()
def frame_values(
    instrument: Instrument, latents: Sequence[Latent], place: int, x: Tensor
) -> Tensor:
    """Values [N, latents] >= 0 of activations x [N, d]; each dictionary encodes once."""
    out = x.new_zeros((len(x), len(latents)), dtype=torch.float32)
    wanted = {latent.kind for latent in latents}
    codes = {}
    if "usae" in wanted:
        codes["usae"] = instrument.usae.encode(x, instrument.index)
    if "sae" in wanted:
        codes["sae"] = instrument.sae.encode(x)
    for column, latent in enumerate(latents):
        number = latent.features[place]
        if latent.kind == "direction":
            out[:, column] = ((x - instrument.mean) @ direction(instrument, number)).relu()
        else:
            values, indices = codes[latent.kind]
            out[:, column] = (values * (indices == number)).sum(1)
    return out


def clip_curves(
    instrument: Instrument, store: ActivationStore, latents: Sequence[Latent], place: int,
    clips: Sequence[int], workers: int = 1,
) -> np.ndarray:  # fmt: skip
    """Values of stored clips of equal length, float32 [clips, frames, latents]."""
    device = instrument.mean.device

    def batch(rows: list[int]) -> np.ndarray:
        x = torch.from_numpy(store.clips(rows))
        found = frame_values(instrument, latents, place, x.flatten(0, 1).to(device))
        return found.view(*x.shape[:2], len(latents)).cpu().numpy()

    return np.concatenate(by_batch(batch, clips, workers))


def highest(curves: np.ndarray, window: int) -> np.ndarray:
    """Highest window mean: [clips, frames, latents] to [clips, latents]."""
    return window_means(torch.from_numpy(curves).transpose(1, 2), window).amax(-1).numpy()


def scan(
    instrument: Instrument, store: ActivationStore, latents: Sequence[Latent], place: int,
    clips: Sequence[int], window: int, workers: int = 1,
) -> np.ndarray:  # fmt: skip
    """Highest window mean of every latent in every named clip, float32 [clips, latents]."""
    device = instrument.mean.device

    def batch(rows: list[int]) -> np.ndarray:
        x = torch.from_numpy(store.clips(rows))
        found = frame_values(instrument, latents, place, x.flatten(0, 1).to(device)).cpu()
        return highest(found.view(*x.shape[:2], len(latents)).numpy(), window)

    return np.concatenate(by_batch(batch, clips, workers))


@dataclass(frozen=True)
class Moment:
    """A window of a real clip in which a feature answers strongly."""

    clip: int
    """Row of the clip table."""
    split: str
    frame: int
    """First frame of the window."""
    values: tuple[float, ...]
    """Window mean in each model, in the context of the whole clip."""
    curves: np.ndarray
    """[models, frames] of the whole clip."""


def best_moments(
    instruments: Sequence[Instrument], stores: Sequence[ActivationStore], rows: pd.DataFrame,
    latents: Sequence[Latent], column: int, scores: np.ndarray, scales: np.ndarray,
    clips: np.ndarray, window: int, count: int,
) -> list[Moment]:  # fmt: skip
    """`count` moments of each split, the strongest first, of compositions that differ.

    `rows` is the clip table; `scores` [models, clips] the highest window mean in each of `clips`
    (its rows), `scales` [models] what counts as 1. Of three times as many clips with the highest
    mean score the curves are computed; a moment is the window where their mean over models, in
    units of the scales, is highest. Clips in which the feature never fires are no moments.
    """
    mean = (scores / scales[:, None]).mean(0)
    moments = []
    for split in SPLITS:
        inside = np.flatnonzero((rows["split"].iloc[clips] == split).to_numpy() & (mean > 0))
        inside = inside[np.argsort(-mean[inside], kind="stable")]
        groups = rows["group"].iloc[clips[inside]].to_numpy()
        inside = inside[~pd.Series(groups).duplicated().to_numpy()][: 3 * count]
        if not len(inside):
            continue
        chosen = clips[inside]
        curves = np.stack([
            clip_curves(instrument, store, latents[column : column + 1], place, chosen)[..., 0]
            for place, (instrument, store) in enumerate(zip(instruments, stores, strict=True))
        ])  # fmt: skip
        joint = torch.from_numpy((curves / scales[:, None, None]).mean(0))
        best, at = window_means(joint, window).max(-1)
        each = window_means(torch.from_numpy(curves), window)
        for i in torch.argsort(best, descending=True, stable=True)[:count].tolist():
            values = tuple(float(v) for v in each[:, i, at[i]])
            moments.append(Moment(int(chosen[i]), split, int(at[i]), values, curves[:, i]))
    return moments


@dataclass(frozen=True)
class Measured:
    """Token sequences, each as a piece of its own: from the start column, without a caption."""

    curves: np.ndarray
    """[B, T, latents] values"""
    values: np.ndarray
    """[B, latents] highest window mean"""
    log_prob: np.ndarray
    """[B] the model's log p per code in nats"""


@torch.no_grad()
def measure(
    instrument: Instrument, latents: Sequence[Latent], place: int, codes: Tensor, window: int
) -> Measured:
    """Values and log p of codes [B, K, T], by teacher forcing of the whole model."""
    curves, log_prob = [], []
    for part in codes.split(BATCH):
        seen: list[Tensor] = []

        def read(stream: Tensor, _: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(stream)
            return stream

        batch = instrument.model.with_captions(part, [None] * len(part))
        loss = instrument.model.cross_entropy(batch, {instrument.layer: read})
        x = gradient_of(instrument.model).at_frames(seen[0], batch.frames)
        found = frame_values(instrument, latents, place, x.flatten(0, 1))
        curves.append(found.view(*x.shape[:2], len(latents)).cpu().numpy())
        log_prob.append(-loss.mean((1, 2)).cpu().numpy())
    joined = np.concatenate(curves)
    return Measured(joined, highest(joined, window), np.concatenate(log_prob))


def target(
    instrument: Instrument, latent: Latent, place: int, scale: float, usual: float
) -> Target:
    """The latent in one model as the search sees it."""
    weight, bias = pre_activation(instrument, latent, place)
    return Target(instrument.model, instrument.layer, weight, bias, scale, usual)
