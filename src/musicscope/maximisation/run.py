"""Searches for a list of features and everything that their results are to be held against.

What is computed for every feature, all on excerpts of the same length that start at frame 0:
the result of each search (variant), its start, the result after its audio has been encoded again,
the feature's best real moments, random real excerpts, the models' own samples, random tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from musicscope.activations.store import ActivationStore
from musicscope.core.parallel import workers
from musicscope.core.seeding import seed_for
from musicscope.data.clips import main_clips
from musicscope.features.selection import Latent
from musicscope.maximisation import moments as mx
from musicscope.maximisation.excerpts import clip_tokens, cut, excerpts, random_excerpts
from musicscope.maximisation.jobs import Open, Plan, Search, jobs_of, run_job
from musicscope.maximisation.search import Codec, survived

RANDOM_TOKENS = 16  # sequences of uniform codes: their log p and values hardly vary
Moments = tuple[tuple[mx.Moment, ...], ...]


@dataclass(frozen=True)
class Found:
    """The best moments of real clips."""

    plan: Plan
    """With the latents that answer to some clip."""
    skipped: tuple[Latent, ...]
    """Latents that no real clip activates in some model of the run."""
    best: dict[str, np.ndarray]
    """Split -> [models, latents] highest window mean of a clip, in the context of the clip."""
    moments: Moments
    """By latent, of both splits; none for nulls."""

    @property
    def scale(self) -> np.ndarray:
        """[models, latents] value of the best real clip of both splits."""
        return np.maximum(*self.best.values())


@dataclass(frozen=True)
class Result:
    """All values are in units of the dictionary; `Measured` lists are by model of the run."""

    plan: Plan
    """With the latents that were run."""
    skipped: tuple[Latent, ...]
    """Latents that no real clip activates in some model of the run."""
    best: dict[str, np.ndarray]
    """Split -> [models, latents] highest window mean of a clip, in the context of the clip."""
    moments: Moments
    """By latent, of both splits; none for nulls."""
    excerpts: tuple[np.ndarray, ...]
    """By latent: tokens [moments, K, T] around each."""
    controls: dict[str, list[mx.Measured]]
    """clips, samples, random_tokens"""
    moment_values: list[mx.Measured]
    """Of all excerpts, latent by latent, each as a piece of its own."""
    searches: tuple[Search, ...]
    found: list[mx.Measured]
    """Of the searches, in their order, as are:"""
    start: list[mx.Measured]
    again: list[mx.Measured]
    """After decoding to audio and encoding that."""
    audio: np.ndarray
    """[searches, samples]"""

    @property
    def scale(self) -> np.ndarray:
        """[models, latents] value of the best real clip of both splits."""
        return np.maximum(*self.best.values())


def control_tokens(
    plan: Plan, instruments: Sequence[mx.Instrument], clips: Any, clips_sha256: str
) -> dict[str, Tensor]:
    """Tokens of random test excerpts, of all models' samples, and random ones, [n, K, T] each."""
    first = instruments[0].model
    seconds = plan.frames / first.frame_rate
    seed = functools.partial(seed_for, plan.seed, "maximize")
    # Unconditional as the activations that the features were learnt on, and with all codes allowed:
    # the samples follow the very probabilities that the search is held to.
    captions = [None] * plan.samples
    samples = [
        i.model.generate(captions, seconds, seed("samples", i.name), **i.model.plain_sampling)
        for i in instruments
    ]
    generator = torch.Generator().manual_seed(seed("random tokens"))
    shape = (RANDOM_TOKENS, first.num_codebooks, plan.frames)
    return {
        "clips": random_excerpts(
            first, clips, clips_sha256, main_clips(clips.rows, "test"), plan.random_clips,
            plan.frames, seed("clips"),
        ).to(first.device),
        "samples": torch.cat([codes for _, codes in samples]),
        "random_tokens": torch.randint(first.card, shape, generator=generator).to(first.device),
    }  # fmt: skip


def _measure_all(
    plan: Plan, instruments: Sequence[mx.Instrument], codes: Tensor
) -> list[mx.Measured]:
    return [
        mx.measure(instrument, plan.latents, place, codes, plan.window)
        for place, instrument in enumerate(instruments)
    ]


def find_moments(
    plan: Plan, instruments: Sequence[mx.Instrument], stores: Sequence[ActivationStore],
    rows: Any, processes: int,
) -> Found:  # fmt: skip
    """The best moments of the plan's latents; `stores`, one a model, have the same frames."""
    for store in stores:
        if store.ids != rows["id"].tolist():
            raise ValueError(f"{store.folder} holds other clips than the clip store: run dvc repro")
    used = np.sort(np.concatenate([main_clips(rows, name) for name in mx.SPLITS]))
    split = rows["split"].to_numpy()[used]
    scores = np.stack([
        mx.scan(instrument, store, plan.latents, place, used, plan.window, processes)
        for place, (instrument, store) in enumerate(zip(instruments, stores, strict=True))
    ])  # fmt: skip
    # A latent that is silent in some model has no scale there, and nothing could be said of it.
    alive = (scores.max(1) > 0).all(0)
    kept, skipped = (
        tuple(latent for latent, a in zip(plan.latents, alive, strict=True) if a == wanted)
        for wanted in (True, False)
    )
    if all(latent.is_null for latent in kept):
        raise ValueError(f"no real clip activates any of {[latent.name for latent in skipped]}")
    plan, scores = replace(plan, latents=kept), scores[:, :, alive]
    scales = scores.max(1)
    moments = tuple(
        tuple(
            mx.best_moments(
                instruments, stores, rows, kept, column, scores[:, :, column], scales[:, column],
                used, plan.window, 0 if latent.is_null else plan.examples,
            )
        )
        for column, latent in enumerate(kept)
    )  # fmt: skip
    return Found(plan, skipped, {n: scores[:, split == n].max(1) for n in mx.SPLITS}, moments)


def run(
    plan: Plan, open_run: Open, stores: Sequence[ActivationStore], clips: Any, clips_sha256: str,
    processes: int = 1,
) -> Result:  # fmt: skip
    """Moments, controls and searches of the plan. Numbers do not depend on `processes`."""
    instruments = open_run()
    real = find_moments(plan, instruments, stores, clips.rows, processes)
    plan, moments, scales = real.plan, real.moments, real.scale
    flat = [moment for found in moments for moment in found]
    cuts = clip_tokens(instruments[0].model, clips, clips_sha256, [m.clip for m in flat])
    starts = [cut(m.frame, plan.window, plan.frames, cuts.shape[-1]) for m in flat]
    pieces = excerpts(cuts, starts, plan.frames)
    bounds = np.cumsum([len(found) for found in moments])[:-1]
    by_latent = tuple(np.split(pieces.numpy(), bounds))
    tokens = control_tokens(plan, instruments, clips, clips_sha256)
    controls = {name: _measure_all(plan, instruments, codes) for name, codes in tokens.items()}
    device = instruments[0].mean.device
    moment_values = _measure_all(plan, instruments, pieces.to(device))

    usual = [float(np.median(measured.log_prob)) for measured in controls["clips"]]
    model = instruments[0].model
    codec = Codec(model, torch.ones(0), model.first_encoded)
    survival = survived(codec, tokens["samples"]).tolist()
    samples = tokens["samples"].cpu().numpy()
    jobs = jobs_of(plan, scales, usual, survival, samples, by_latent)
    with workers(min(processes, len(jobs))) as each:
        finished = each(functools.partial(run_job, open_run), jobs)
        searches = tuple(tqdm(finished, "searches", len(jobs), unit="search", mininterval=1))
    codes = torch.from_numpy(np.stack([s.codes for s in searches])).to(device)
    starts = torch.from_numpy(np.stack([s.start for s in searches])).to(device)
    audio = torch.cat([model.decode(code[None]) for code in codes])
    again = model.encode(audio, [None] * len(audio)).codes[..., : plan.frames]
    return Result(
        plan, real.skipped, real.best, moments, by_latent, controls, moment_values, searches,
        _measure_all(plan, instruments, codes), _measure_all(plan, instruments, starts),
        _measure_all(plan, instruments, again), audio.cpu().numpy(),
    )  # fmt: skip
