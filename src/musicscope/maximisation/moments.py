"""Values of features on clips and tokens, the best moments of real clips, and excerpts of them.

A feature's *value* at a frame is its sparse code there (0 where TopK excludes it), in the unit of
its dictionary. A random direction's value is the projection on it above the mean, or 0. The value
of an excerpt is its highest mean over a window of frames.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from musicscope.activations import token_cache
from musicscope.activations.store import ActivationStore
from musicscope.core.seeding import seed_for
from musicscope.data.clips import Clips, Rows
from musicscope.dictionaries.codes import by_batch
from musicscope.dictionaries.core import SparseDictionary, TopKSAE, UniversalSAE
from musicscope.features.selection import Latent
from musicscope.maximisation.search import BATCH, Target, window_means
from musicscope.models.interface import LanguageModel, Model, language_model
from musicscope.models.registry import load_model

SPLITS = ("train", "test")
"""Splits with moments: compositions that dictionaries were trained on, and held-out ones."""


@dataclass(frozen=True)
class StudiedModel:
    """One model with the dictionaries that read one of its layers."""

    name: str
    model: Model
    """Searches need a `LanguageModel`, moments need hooks only."""
    layer: str
    """Hook point."""
    sae: TopKSAE | None
    usae: UniversalSAE | None
    index: int
    """The model's number in `usae`."""
    mean: Tensor
    """[d] mean activation over train."""
    seed: int
    """Seed of the random directions."""

    @property
    def tokens(self) -> LanguageModel:
        """The model of a search; `run.unsearchable` has refused others."""
        return language_model(self.model)

    def dictionary(self, kind: str) -> tuple[SparseDictionary, int]:
        """The dictionary of a kind of latents, and the number of the model in it."""
        own = self.usae if kind == "usae" else self.sae
        if own is None:
            raise ValueError(f"{self.name} was opened without its {kind}")
        return own, self.index if kind == "usae" else 0


@functools.cache
def open_models(
    names: tuple[str, ...], device: str, seed: int, with_sae: bool
) -> tuple[StudiedModel, ...]:
    """Open models of data/models with data/usae/seed-0 and, `with_sae`, the SAEs of its slot.

    Opens them once per process. ValueError where the USAE was not trained on a model.
    """
    folder = "data/usae/seed-0"
    usae = UniversalSAE.load(folder, device)
    models = []
    for name in names:
        if name not in usae.names:
            raise ValueError(f"{folder} knows {usae.names}, not {name}: run dvc repro train_usae")
        model = load_model(f"data/models/{name}", device)
        store = ActivationStore.open(f"data/activations/{name}/{usae.slot}")
        sae = TopKSAE.load(f"data/sae/{name}/{usae.slot}/seed-0", device) if with_sae else None
        mean = torch.as_tensor(store.mean, dtype=torch.float32, device=device)
        index = usae.names.index(name)
        models.append(
            StudiedModel(name, model, store.config["layer"], sae, usae, index, mean, seed)
        )
    return tuple(models)


# --- values -----------------------------------------------------------------------------------


def direction(studied: StudiedModel, number: int) -> Tensor:
    """Draw a random unit vector [d] of the activation space, a function of (model, number)."""
    seed = seed_for(studied.seed, "maximize", "direction", studied.name, number)
    drawn = np.random.default_rng(seed).standard_normal(len(studied.mean))
    drawn /= np.linalg.norm(drawn)
    return torch.as_tensor(drawn, dtype=torch.float32, device=studied.mean.device)


def pre_activation(studied: StudiedModel, latent: Latent, place: int) -> tuple[Tensor, float]:
    """Return the latent before TopK and ReLU as an affine map (weight [d], bias) of activations.

    `place` is the model's number in the run, which indexes `latent.features`.
    """
    number = latent.features[place]
    if latent.kind == "direction":
        weight = direction(studied, number)
        return weight, -float(weight @ studied.mean)
    point = studied.mean[None].clone().requires_grad_()
    with torch.enable_grad():
        own, index = studied.dictionary(latent.kind)
        value = own.pre_activations(point, index)[0, number]
        (weight,) = torch.autograd.grad(value, point)
    # In double precision: the bias is the small difference of two numbers.
    bias = float(value.detach().double() - weight[0].double() @ studied.mean.double())
    return weight[0], bias


def target(studied: StudiedModel, latent: Latent, place: int, scale: float, usual: float) -> Target:
    """Return the latent in one model as the target of a search."""
    weight, bias = pre_activation(studied, latent, place)
    return Target(studied.tokens, studied.layer, weight, bias, scale, usual)


@torch.no_grad()
def frame_values(studied: StudiedModel, latents: Sequence[Latent], place: int, x: Tensor) -> Tensor:
    """Compute values [N, latents] >= 0 of activations x [N, d]; each dictionary encodes once."""
    out = x.new_zeros((len(x), len(latents)), dtype=torch.float32)
    codes = {}
    for kind in {latent.kind for latent in latents} - {"direction"}:
        own, index = studied.dictionary(kind)
        codes[kind] = own.encode(x, index)
    for column, latent in enumerate(latents):
        number = latent.features[place]
        if latent.kind == "direction":
            out[:, column] = ((x - studied.mean) @ direction(studied, number)).relu()
        else:
            values, indices = codes[latent.kind]
            out[:, column] = (values * (indices == number)).sum(1)
    return out


def highest(curves: np.ndarray, window: int) -> np.ndarray:
    """Compute the highest window mean: [clips, frames, latents] to [clips, latents]."""
    return window_means(torch.from_numpy(curves).transpose(1, 2), window).amax(-1).numpy()


def clip_values(
    studied: StudiedModel, store: ActivationStore, latents: Sequence[Latent], place: int,
    clips: Rows, window: int | None = None, workers: int = 1,
) -> np.ndarray:  # fmt: skip
    """Compute values of stored clips of equal length, float32 [clips, frames, latents].

    With a `window`: the highest window mean per clip, float32 [clips, latents].
    """
    device = studied.mean.device

    def batch(rows: list[int]) -> np.ndarray:
        x = torch.from_numpy(store.clips(rows))
        values = frame_values(studied, latents, place, x.flatten(0, 1).to(device))
        curves = values.view(*x.shape[:2], len(latents)).cpu().numpy()
        return curves if window is None else highest(curves, window)

    return np.concatenate(by_batch(batch, clips, workers))


@dataclass(frozen=True)
class Measured:
    """Values of clips or token sequences."""

    values: np.ndarray
    """[B, latents] highest window mean"""
    curves: np.ndarray = field(default_factory=lambda: np.empty(0))
    """[B, T, latents] values; of token sequences only, else empty."""
    log_prob: np.ndarray = field(default_factory=lambda: np.empty(0))
    """[B] the model's log p per code in nats; of token sequences only, else empty."""


@torch.no_grad()
def measure(
    studied: StudiedModel, latents: Sequence[Latent], place: int, codes: Tensor, window: int
) -> Measured:
    """Measure codes [B, K, T] by teacher forcing from the start column, without a caption."""
    model, curves, log_prob = studied.tokens, [], []
    for part in codes.split(BATCH):
        streams: list[Tensor] = []

        def read(stream: Tensor, _: Tensor, streams: list[Tensor] = streams) -> Tensor:
            streams.append(stream)
            return stream

        batch = model.with_captions(part, [None] * len(part))
        loss = model.cross_entropy(batch, {studied.layer: read})
        x = model.at_frames(streams[0], batch.frames)
        values = frame_values(studied, latents, place, x.flatten(0, 1))
        curves.append(values.view(*x.shape[:2], len(latents)).cpu().numpy())
        log_prob.append(-loss.mean((1, 2)).cpu().numpy())
    joined = np.concatenate(curves)
    return Measured(highest(joined, window), joined, np.concatenate(log_prob))


# --- moments ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """A window of a real clip in which a feature is strongly active."""

    clip: int
    """Row of the clip table."""
    split: str
    frame: int
    """First frame of the window."""
    values: tuple[float, ...]
    """Window mean per model, in the context of the whole clip."""
    curves: np.ndarray
    """[models, frames] of the whole clip."""


def best_moments(
    models: Sequence[StudiedModel], stores: Sequence[ActivationStore], rows: pd.DataFrame,
    latent: Latent, scores: np.ndarray, scales: np.ndarray, clips: np.ndarray, window: int,
    count: int,
) -> list[Moment]:  # fmt: skip
    """Find `count` moments per split of different compositions, the strongest first.

    `rows` is the clip table; `scores` [models, clips] the highest window mean in each of `clips`
    (its rows), `scales` [models] the unit of each model. Curves are computed for the 3 x `count`
    clips with the highest mean score. A moment is the window with the highest mean over models, in
    units of the scales. Clips in which the feature never fires have no moment.
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
            clip_values(studied, store, [latent], place, chosen)[..., 0]
            for place, (studied, store) in enumerate(zip(models, stores, strict=True))
        ])  # fmt: skip
        joint = torch.from_numpy((curves / scales[:, None, None]).mean(0))
        best, at = window_means(joint, window).max(-1)
        each = window_means(torch.from_numpy(curves), window)
        for i in torch.argsort(best, descending=True, stable=True)[:count].tolist():
            values = tuple(float(v) for v in each[:, i, at[i]])
            moments.append(Moment(int(chosen[i]), split, int(at[i]), values, curves[:, i]))
    return moments


# --- excerpts ---------------------------------------------------------------------------------


def excerpt_start(frame: int, window: int, length: int, total: int) -> int:
    """Return the first frame of an excerpt of `length` frames around a window of a clip.

    The window of `window` frames at `frame` is centred, unless a clip of `total` frames ends there.
    """
    return int(np.clip(frame + window // 2 - length // 2, 0, max(0, total - length)))


def clip_tokens(model: Model, clips: Clips, clips_sha256: str, rows: Rows) -> Tensor:
    """Read codec tokens [n, K, T] of clips from the token cache, filling its gaps.

    `rows` may repeat. ValueError for a model without a codec.
    """
    folder = token_cache.codes_dir(model, clips_sha256)
    if folder is None:
        raise ValueError(f"{model.name} has no codec: there are no tokens to search over")
    for chunk in sorted({int(row) // token_cache.CHUNK for row in rows}):
        try:
            token_cache.read_codes(folder, [chunk * token_cache.CHUNK])
        except ValueError:  # absent or damaged
            token_cache.write_chunk(lambda: (model, clips), folder, chunk)
    return token_cache.read_codes(folder, [int(row) for row in rows])


def excerpts(tokens: Tensor, starts: Rows, frames: int) -> Tensor:
    """Cut tokens [n, K, frames] from tokens [n, K, T], beginning at frame starts[i]."""
    if tokens.shape[-1] < frames:
        raise ValueError(
            f"clips have {tokens.shape[-1]} frames, excerpts of {frames} were asked for: lower "
            "maximize_activation.seconds"
        )
    pairs = zip(tokens, starts, strict=True)
    return torch.stack([code[:, int(start) : int(start) + frames] for code, start in pairs])
