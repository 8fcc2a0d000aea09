"""A run of activation maximisation from features to all its outs, whatever the models can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from musicscope.activations.alignment import common_frames, frame_rate
from musicscope.activations.store import ActivationStore
from musicscope.core.io import folder_sha256
from musicscope.data.clips import ClipStore, at_rate
from musicscope.features.selection import Latent
from musicscope.maximisation import moments_only
from musicscope.maximisation import report as maximization_report
from musicscope.maximisation import run as maximization_run
from musicscope.maximisation.jobs import Open, make_plan


def maximize(
    name: str, section: Any, latents: Sequence[Latent], open_run: Open,
    variants: tuple[str, ...], seed: int, processes: int,
) -> None:  # fmt: skip
    """Moments and searches for `latents` on data/clips: data/<name>, metrics and plots/<name>.

    Only moments where no tokens can be searched for (`moments_only.unsearchable`); the models'
    activations then come in common frames, and clips at the first model's sample rate.
    """
    instruments = open_run()
    slot = instruments[0].usae.slot
    folders = common_frames([f"data/activations/{i.name}/{slot}" for i in instruments])
    stores = [ActivationStore.open(folder) for folder in folders]
    model = instruments[0].model
    clips = at_rate(ClipStore.open("data/clips"), model.sample_rate)
    if reason := moments_only.unsearchable(instruments):
        rate = frame_rate(stores[0])
        plan = make_plan(section, latents, instruments, (), seed, rate)
        result = moments_only.run(plan, instruments, stores, clips, reason, processes)
        moments_only.write(result, name, clips, rate)
        return
    plan = make_plan(section, latents, instruments, variants, seed)
    sha256 = folder_sha256("data/clips")
    found = maximization_run.run(plan, open_run, stores, clips, sha256, processes)
    maximization_report.write(found, name, clips, model, section.bootstrap)
