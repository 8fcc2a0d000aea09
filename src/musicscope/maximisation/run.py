"""A run of activation maximisation: best moments of real clips, searches over tokens, controls.

Every searched feature is measured on excerpts of the same length that start at frame 0: the result
of each search (variant), its start, the result after decoding and encoding, the feature's best
moments, random real excerpts, the models' own samples, and random tokens.

Token search needs tokens and, over several models, one codec. RAVE has no tokens, and MusicGen's
mean nothing to YuE. Such runs make no searches: their control is every test clip.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from musicscope.activations import token_cache
from musicscope.activations.store import ActivationStore
from musicscope.config import MaximizeActivation
from musicscope.core.parallel import workers
from musicscope.core.progress import Bar
from musicscope.core.seeding import seed_for
from musicscope.data.clips import Clips, main_clips
from musicscope.features.selection import Latent
from musicscope.maximisation import moments as mx
from musicscope.maximisation.moments import Measured, Moment, StudiedModel
from musicscope.maximisation.search import Codec, Objective, best_start, measure_survival, search
from musicscope.models.interface import LanguageModel

NULL_VARIANTS = ("prior", "heard")
SOUND = ("heard", "alone")
"""Variants that are judged by their sound."""
RANDOM_TOKENS = 16  # sequences of uniform codes: their log p and values hardly vary
CODEC_PROBE = 50  # frames on which codecs are compared


@dataclass(frozen=True)
class Plan:
    """Latents to maximise, models, variants of the search and its cost."""

    section: MaximizeActivation
    latents: tuple[Latent, ...]
    names: tuple[str, ...]
    """Models of the run; coordinated searches are over all of them."""
    variants: tuple[str, ...]
    """prior: under the model's own prior, from its samples; clip: the same, from the best real
    moments; free: without the prior; heard: as prior, judged by the tokens of the audio; alone:
    as heard, each model for itself, named alone-<model>. Nulls run `NULL_VARIANTS` of these."""
    frame_rate: float
    """Of the activations, in Hz."""
    seed: int
    not_searched: str = ""
    """The reason, in a run without searches."""

    @property
    def frames(self) -> int:
        """Length of searched sequences and excerpts in frames."""
        return max(1, round(self.section.seconds * self.frame_rate))

    @property
    def window(self) -> int:
        """Length of the averaging window in frames."""
        return max(1, round(self.section.window_seconds * self.frame_rate))


@dataclass(frozen=True)
class Job:
    """One search; its result depends on these fields, the models and the dictionaries."""

    plan: Plan
    latent: Latent
    variant: str
    on: tuple[int, ...]
    """Models of the objective."""
    naturalness: float
    starts: np.ndarray
    """[n, K, T]: the search starts from the best of them."""
    scales: tuple[float, ...]
    """Per model of the run: value of the best real clip."""
    usual: tuple[float, ...]
    """Per model of the run: `Target.usual`."""
    survival: tuple[float, ...] | None
    """`Codec.survival` where the sound is judged, else None."""
    seed: int


@dataclass(frozen=True)
class Search:
    """A finished search."""

    latent: Latent
    variant: str
    codes: np.ndarray
    """[K, T]"""
    start: np.ndarray
    """[K, T]"""
    objective: tuple[float, ...]


@dataclass(frozen=True)
class Result:
    """Moments, controls and searches; values in the unit of the dictionary.

    Lists of `Measured` hold one per model. A run without searches leaves the defaults.
    """

    plan: Plan
    """With the latents that some real clip activates in every model."""
    skipped: tuple[Latent, ...]
    """Latents that no real clip activates in some model of the run."""
    best: dict[str, np.ndarray]
    """Split -> [models, latents] highest window mean of a clip, in the context of the clip."""
    moments: tuple[tuple[Moment, ...], ...]
    """Per latent, of both splits; none for nulls."""
    controls: dict[str, list[Measured]] = field(default_factory=dict)
    """clips, samples, random_tokens; without searches whole_clips."""
    moment_values: list[Measured] = field(default_factory=list)
    """Excerpts around all moments, latent by latent, without the clip before them."""
    searches: tuple[Search, ...] = ()
    optimised: list[Measured] = field(default_factory=list)
    """Results of the searches, in their order, as are `start` and `again`."""
    start: list[Measured] = field(default_factory=list)
    again: list[Measured] = field(default_factory=list)
    """After decoding to audio and encoding that."""
    audio: np.ndarray = field(default_factory=lambda: np.empty(0))
    """[searches, samples]"""

    @property
    def scale(self) -> np.ndarray:
        """[models, latents] value of the best real clip of both splits."""
        return np.maximum(*self.best.values())


OpenModels = Callable[[], tuple[StudiedModel, ...]]
"""Opens the models of the run. Picklable and cached: every job calls it."""


# --- what can be searched ---------------------------------------------------------------------


def unsearchable(models: Sequence[StudiedModel]) -> str:
    """Explain why these models share no tokens to search over; "" if they do."""
    by_name: dict[str, LanguageModel] = {}
    for studied in models:
        if not isinstance(studied.model, LanguageModel):
            return (
                f"{studied.name} is a {type(studied.model).__name__}: token search needs "
                "gradients through the embeddings of tokens, which MusicGen and YuE have"
            )
        by_name[studied.name] = studied.model
    if not _one_codec(list(by_name.values())):
        names = ", ".join(by_name)
        return f"{names} have different codecs: tokens of one mean nothing to the other"
    return ""


def _one_codec(models: Sequence[LanguageModel]) -> bool:
    """Test whether the same tokens are the same sound to all models.

    Compares weights, or, where two implementations name these differently, the audio of random
    tokens and its tokens.
    """
    if len({token_cache.codec_sha256(model) for model in models}) == 1:
        return True
    if len({(m.sample_rate, m.frame_rate, m.num_codebooks, m.card) for m in models}) > 1:
        return False
    first, *others = models
    shape = (1, first.num_codebooks, CODEC_PROBE)
    tokens = torch.randint(first.card, shape, generator=torch.Generator().manual_seed(0))
    sound = first.decode(tokens).cpu()
    codes = first.encode(sound, [None]).codes.cpu()
    for model in others:
        difference = (model.decode(tokens).cpu() - sound).abs().max()
        same = model.encode(sound, [None]).codes.cpu() == codes
        # Rounding may decide a tie differently; another codec shares hardly a token.
        if difference > 1e-3 * sound.std() or same.float().mean() < 0.99:
            return False
    return True


# --- searches ---------------------------------------------------------------------------------


def jobs_of(
    plan: Plan, scales: np.ndarray, usual: Sequence[float], survival: Sequence[float],
    samples: np.ndarray, excerpts: Sequence[np.ndarray],
) -> list[Job]:  # fmt: skip
    """List the searches of every latent.

    `scales` [models, latents], `usual` per model, `survival` per codebook, `samples` [n, K, T],
    `excerpts` per latent [n, K, T].
    """
    everywhere = tuple(range(len(plan.names)))
    jobs = []
    for column, latent in enumerate(plan.latents):
        for variant in plan.variants:
            if latent.is_null and variant not in NULL_VARIANTS:
                continue
            named = {variant: everywhere}
            if variant == "alone":
                named = {f"alone-{plan.names[i]}": (i,) for i in everywhere}
            jobs += [
                Job(
                    plan=plan,
                    latent=latent,
                    variant=name,
                    on=on,
                    naturalness=0.0 if variant == "free" else plan.section.naturalness,
                    starts=excerpts[column] if variant == "clip" else samples,
                    scales=tuple(scales[:, column].tolist()),
                    usual=tuple(usual),
                    survival=tuple(survival) if variant in SOUND else None,
                    seed=seed_for(plan.seed, "maximize", *plan.names, latent.name, name),
                )
                for name, on in named.items()
            ]
    return jobs


def run_job(open_models: OpenModels, job: Job) -> Search:
    """Run one search; its result does not depend on the process that runs it."""
    models, section = open_models(), job.plan.section
    targets = (mx.target(models[i], job.latent, i, job.scales[i], job.usual[i]) for i in job.on)
    objective = Objective(tuple(targets), job.plan.window, job.naturalness)
    start = best_start(objective, torch.from_numpy(job.starts).to(models[0].mean.device))
    codec = None if job.survival is None else _codec(models, torch.tensor(job.survival))
    best = search(
        objective, start, job.seed, codec,
        steps=section.steps, proposals=section.proposals, kept=section.kept,
    )  # fmt: skip
    codes = best.codes.cpu().numpy()
    return Search(job.latent, job.variant, codes, start.cpu().numpy(), best.objective)


def _codec(models: Sequence[StudiedModel], survival: Tensor) -> Codec:
    model = models[0].tokens
    return Codec(model, survival, model.first_encoded)


# --- the run ----------------------------------------------------------------------------------


def control_tokens(
    plan: Plan, models: Sequence[StudiedModel], clips: Clips, clips_sha256: str
) -> dict[str, Tensor]:
    """Make tokens of random test excerpts, of all models' samples, and random ones, [n, K, T]."""
    first, section = models[0].tokens, plan.section
    seed = functools.partial(seed_for, plan.seed, "maximize")
    rng = np.random.default_rng(seed("clips"))
    test = main_clips(clips.rows, "test")
    rows = np.sort(rng.choice(test, min(section.random_clips, len(test)), replace=False))
    tokens = mx.clip_tokens(first, clips, clips_sha256, rows)
    starts = rng.integers(0, max(1, tokens.shape[-1] - plan.frames + 1), len(rows))
    # Unconditional, as the activations that dictionaries are trained on, and without truncation:
    # samples follow the probabilities that the search is scored by.
    captions = [None] * section.samples
    samples = [
        s.tokens.generate(
            captions, plan.frames / first.frame_rate, seed("samples", s.name),
            **s.tokens.plain_sampling,  # ty: ignore[invalid-argument-type]  options by name
        )
        for s in models
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(seed("random tokens"))
    shape = (RANDOM_TOKENS, first.num_codebooks, plan.frames)
    return {
        "clips": mx.excerpts(tokens, starts, plan.frames).to(first.device),
        "samples": torch.cat([codes for _, codes in samples]),
        "random_tokens": torch.randint(first.card, shape, generator=generator).to(first.device),
    }


def find_moments(
    plan: Plan, models: Sequence[StudiedModel], stores: Sequence[ActivationStore],
    rows: pd.DataFrame, processes: int,
) -> Result:  # fmt: skip
    """Find the best moments of the plan's latents; `stores`, one per model, have the same frames.

    ValueError where the stores hold other clips, or where no real clip activates any latent.
    """
    for store in stores:
        if store.ids != rows["id"].tolist():
            raise ValueError(f"{store.folder} holds other clips than the clip store: run dvc repro")
    used = np.sort(np.concatenate([main_clips(rows, name) for name in mx.SPLITS]))
    split = rows["split"].to_numpy()[used]
    scores = np.stack([
        mx.clip_values(studied, store, plan.latents, place, used, plan.window, processes)
        for place, (studied, store) in enumerate(zip(models, stores, strict=True))
    ])  # fmt: skip
    # A latent that never fires in some model has no scale there.
    alive = (scores.max(1) > 0).all(0)
    active, skipped = (
        tuple(latent for latent, a in zip(plan.latents, alive, strict=True) if a == wanted)
        for wanted in (True, False)
    )
    if all(latent.is_null for latent in active):
        raise ValueError(f"no real clip activates any of {[latent.name for latent in skipped]}")
    scores = scores[:, :, alive]
    moments = tuple(
        tuple(
            mx.best_moments(
                models, stores, rows, latent, scores[:, :, column], scores[:, :, column].max(1),
                used, plan.window, 0 if latent.is_null else plan.section.examples,
            )
        )
        for column, latent in enumerate(active)
    )  # fmt: skip
    best = {name: scores[:, split == name].max(1) for name in mx.SPLITS}
    return Result(replace(plan, latents=active), skipped, best, moments)


def run(
    plan: Plan, open_models: OpenModels, stores: Sequence[ActivationStore], clips: Clips,
    clips_sha256: str, processes: int = 1,
) -> Result:  # fmt: skip
    """Find moments, then search and measure controls. Numbers do not depend on `processes`."""
    models = open_models()
    result = find_moments(plan, models, stores, clips.rows, processes)
    plan = result.plan
    if plan.not_searched:
        test = main_clips(clips.rows, "test")
        values = [
            mx.clip_values(studied, store, plan.latents, place, test, plan.window, processes)
            for place, (studied, store) in enumerate(zip(models, stores, strict=True))
        ]
        return replace(result, controls={"whole_clips": [Measured(v) for v in values]})

    def measure(codes: Tensor) -> list[Measured]:
        return [
            mx.measure(studied, plan.latents, place, codes, plan.window)
            for place, studied in enumerate(models)
        ]

    model, device = models[0].tokens, models[0].mean.device
    flat = [moment for of_latent in result.moments for moment in of_latent]
    whole = mx.clip_tokens(model, clips, clips_sha256, [m.clip for m in flat])
    length = whole.shape[-1]
    starts = [mx.excerpt_start(m.frame, plan.window, plan.frames, length) for m in flat]
    excerpts = mx.excerpts(whole, starts, plan.frames)
    bounds = np.cumsum([len(of_latent) for of_latent in result.moments])[:-1]
    tokens = control_tokens(plan, models, clips, clips_sha256)
    controls = {name: measure(codes) for name, codes in tokens.items()}
    moment_values = measure(excerpts.to(device))

    jobs = jobs_of(
        plan,
        result.scale,
        usual=[float(np.median(measured.log_prob)) for measured in controls["clips"]],
        survival=measure_survival(_codec(models, torch.ones(0)), tokens["samples"]).tolist(),
        samples=tokens["samples"].cpu().numpy(),
        excerpts=np.split(excerpts.numpy(), bounds),
    )
    with workers(min(processes, len(jobs))) as each:
        finished = each(functools.partial(run_job, open_models), jobs)
        searches = tuple(Bar(finished, "searches", len(jobs), unit="searches"))
    codes, starts = (
        torch.from_numpy(np.stack([getattr(s, name) for s in searches])).to(device)
        for name in ("codes", "start")
    )
    audio = torch.cat([model.decode(code[None]) for code in codes])
    again = model.encode(audio, [None] * len(audio)).codes[..., : plan.frames]
    return replace(
        result, controls=controls, moment_values=moment_values, searches=searches,
        optimised=measure(codes), start=measure(starts), again=measure(again),
        audio=audio.cpu().numpy(),
    )  # fmt: skip
