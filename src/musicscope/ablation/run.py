"""Ablation of one model from clips to numbers, for text-to-music and for audio models alike."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

from musicscope.ablation import audio as rave_ablation
from musicscope.ablation import language as ablation
from musicscope.core.parallel import workers
from musicscope.core.seeding import seed_for
from musicscope.models.interface import is_audio_model
from musicscope.models.registry import open_sources

BATCH = 4  # the logits of a batch, 4 x 4 x 500 x 1024 floats, are held three times
Sources = Callable[[], tuple[Any, Any]]


def work(sources: Sources, kinds: tuple[str, ...], means: Any, rows: np.ndarray) -> Any:
    """One batch: sums for the means as long as there are no `means`, then scores."""
    model, clips = sources()
    batch = model.encode(clips.audio(rows), clips.rows["caption"].iloc[rows].tolist())
    if is_audio_model(model):
        if means is None:
            return rave_ablation.channel_sums(model, batch)
        return rave_ablation.ablate(model, batch, kinds, means)
    if means is None:
        return ablation.update_sums(model, batch)
    return ablation.ablate(model, batch, kinds, means)


def usable_kinds(model: Any, kinds: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `kinds` that the model has: an audio model's layers cannot be skipped, since they
    change width and rate. ValueError if none is left."""
    if not is_audio_model(model):
        return kinds
    if not (kept := tuple(kind for kind in kinds if kind in rave_ablation.KINDS)):
        raise ValueError(
            f"ablate.kinds = {list(kinds)}: {model.name} is an audio model and has only "
            f"{list(rave_ablation.KINDS)}"
        )
    return kept


def run(
    name: str, section: Any, seed: int, device: str, processes: int
) -> tuple[dict[str, Any], pd.DataFrame, Figure]:
    """Metrics, table and figure of the model data/models/`name` on data/clips.

    `section` is `ablate` of params.yaml. Kinds that an audio model does not have are left out, and
    counted in the metrics under ``kinds_left_out`` (hook points that were not ablated so).
    """
    sources = functools.partial(open_sources, f"data/models/{name}", "data/clips", device)
    model, clips = sources()
    kinds = usable_kinds(model, section.kinds)
    train, scored = (
        ablation.spread_clips(
            clips.rows, split, section.clips, seed_for(seed, "ablate", "clips", split)
        )
        for split in ("train", section.split)
    )

    def each_batch(run_each: Any, rows: np.ndarray, means: Any, what: str) -> list:
        batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
        results = run_each(functools.partial(work, sources, kinds, means), batches)
        return list(tqdm(results, f"{name}: {what}", len(batches), unit="batch", mininterval=1))

    how = rave_ablation if is_audio_model(model) else ablation
    with workers(processes) as run_each:
        sums = each_batch(run_each, train, None, "means")
        means = functools.reduce(type(sums[0]).__add__, sums).means
        scores = how.join(each_batch(run_each, scored, means, "ablations"))

    groups = clips.rows["group"].iloc[scored].tolist()
    table = how.ablation_table(
        scores, groups, section.bootstrap, seed_for(seed, "ablate", "bootstrap")
    )
    metrics = how.ablation_metrics(scores, table, groups)
    if left_out := [kind for kind in section.kinds if kind not in kinds]:
        metrics["kinds_left_out"] = {kind: len(model.hook_points) for kind in left_out}
    return metrics, table, how.ablation_figure(table, name)
