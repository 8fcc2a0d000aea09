"""The searches of a run: what each depends on, as jobs that any process can do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from musicscope.core.seeding import seed_for
from musicscope.features.selection import Latent
from musicscope.maximisation import moments as mx
from musicscope.maximisation.objective import Objective
from musicscope.maximisation.search import Codec, Settings, best_start, search

NULL_VARIANTS = ("prior", "heard")
SOUND = ("heard", "alone")
"""Variants that are judged by their sound."""


@dataclass(frozen=True)
class Plan:
    """What to search for and how long."""

    latents: tuple[Latent, ...]
    names: tuple[str, ...]
    """Models of the run; coordinated searches are over all of them."""
    variants: tuple[str, ...]
    """prior: under the model's own prior, from its samples; clip: the same, from the best real
    moments; free: without the prior; heard: as prior, judged by the tokens of the audio; alone:
    as heard, each model for itself, named alone-<model>. Nulls run `NULL_VARIANTS` of these."""
    frames: int
    window: int
    naturalness: float
    search: Settings
    samples: int
    """Unoptimised samples of each model."""
    random_clips: int
    examples: int
    """Real moments of each split."""
    seed: int


@dataclass(frozen=True)
class Job:
    """One search; all that its result depends on but the models and dictionaries."""

    latent: Latent
    variant: str
    on: tuple[int, ...]
    """Models of the objective."""
    naturalness: float
    window: int
    starts: np.ndarray
    """[n, K, T]: the search starts from the best of them."""
    scales: tuple[float, ...]
    """By model of the run, as are:"""
    usual: tuple[float, ...]
    settings: Settings
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


Open = Callable[[], tuple[mx.Instrument, ...]]
"""Gives the instruments of the run. Picklable and cached: it is called for every job."""


def run_job(open_run: Open, job: Job) -> Search:
    """Run one search; what it gives does not depend on which process it runs in."""
    instruments = open_run()
    objective = Objective(
        tuple(
            mx.target(instruments[i], job.latent, i, job.scales[i], job.usual[i]) for i in job.on
        ),
        job.window,
        job.naturalness,
    )
    device = instruments[0].mean.device
    start = best_start(objective, torch.from_numpy(job.starts).to(device))
    codec = None
    if job.survival is not None:
        model = instruments[0].model
        codec = Codec(model, torch.tensor(job.survival), model.first_encoded)
    found = search(objective, start, job.settings, job.seed, codec)
    return Search(
        job.latent, job.variant, found.codes.cpu().numpy(), start.cpu().numpy(), found.objective
    )


def make_plan(
    section: Any, latents: Sequence[Latent], instruments: Sequence[mx.Instrument],
    variants: tuple[str, ...], seed: int, rate: float | None = None,
) -> Plan:  # fmt: skip
    """The plan that the section maximize_activation of params.yaml asks for.

    `rate`: frames a second of the activations, if they are not those of the first model.
    """
    rate = instruments[0].model.frame_rate if rate is None else rate
    return Plan(
        latents=tuple(latents),
        names=tuple(instrument.name for instrument in instruments),
        variants=variants,
        frames=max(1, round(section.seconds * rate)),
        window=max(1, round(section.window_seconds * rate)),
        naturalness=section.naturalness,
        search=Settings(section.steps, section.proposals, section.kept),
        samples=section.samples,
        random_clips=section.random_clips,
        examples=section.examples,
        seed=seed,
    )


def jobs_of(
    plan: Plan, scales: np.ndarray, usual: Sequence[float], survived: Sequence[float],
    samples: np.ndarray, excerpts: Sequence[np.ndarray],
) -> list[Job]:  # fmt: skip
    """The searches of every latent.

    `scales` [models, latents], `usual` by model, `survived` by codebook, `samples` [n, K, T],
    `excerpts` by latent [n, K, T].
    """
    everywhere = tuple(range(len(plan.names)))
    jobs = []

    def add(column: int, variant: str, name: str, on: tuple[int, ...]) -> None:
        latent = plan.latents[column]
        starts = excerpts[column] if variant == "clip" else samples
        jobs.append(
            Job(
                latent=latent,
                variant=name,
                on=on,
                naturalness=0.0 if variant == "free" else plan.naturalness,
                window=plan.window,
                starts=starts,
                scales=tuple(scales[:, column].tolist()),
                usual=tuple(usual),
                settings=plan.search,
                survival=tuple(survived) if variant in SOUND else None,
                seed=seed_for(plan.seed, "maximize", *plan.names, latent.name, name),
            )
        )

    for column, latent in enumerate(plan.latents):
        for variant in plan.variants:
            if latent.is_null and variant not in NULL_VARIANTS:
                continue
            if variant == "alone":
                for i in everywhere:
                    add(column, variant, f"alone-{plan.names[i]}", (i,))
            else:
                add(column, variant, variant, everywhere)
    return jobs
