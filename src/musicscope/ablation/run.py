"""Ablate one model, from clips to numbers: the same steps for language and audio models."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import ModuleType

import numpy as np
import pandas as pd
from torch import Tensor

from musicscope.ablation import audio, language, patching
from musicscope.ablation.scores import (
    Scores,
    Sums,
    ablation_metrics,
    ablation_table,
    join,
)
from musicscope.config.analysis import Ablate
from musicscope.core.parallel import Run, workers
from musicscope.core.progress import Bar
from musicscope.core.seeding import seed_for
from musicscope.data.clips import known_labels, main_clips
from musicscope.models.interface import (
    AudioModel,
    Batch,
    MusicModel,
    language_model,
    points_of,
)
from musicscope.models.registry import Sources, open_sources

BATCH = 4  # the logits of a batch, 4 x 4 x 500 x 1024 floats, are held three times


def method(model: MusicModel) -> ModuleType:
    """The module with KINDS, sums, ablate and summary for a kind of model."""
    return audio if isinstance(model, AudioModel) else language


def work(
    sources: Sources, kinds: Sequence[str], means: Mapping[str, Tensor] | None, rows: np.ndarray
) -> Sums | Scores:
    """Run one batch: sums for the means without `means`, else scores."""
    model, clips = sources()
    batch = model.encode(clips.audio(rows), clips.rows["caption"].iloc[rows].tolist())
    how = method(model)
    return how.sums(model, batch) if means is None else how.ablate(model, batch, kinds, means)


def usable_kinds(model: MusicModel, kinds: Sequence[str]) -> tuple[str, ...]:
    """Select the kinds that the model has. ValueError if none is left.

    An audio model's layers cannot be skipped, since they change width and rate.
    """
    known = method(model).KINDS
    if not (kept := tuple(kind for kind in kinds if kind in known)):
        raise ValueError(
            f"ablate.kinds = {list(kinds)}: {model.name} is an audio model and has only "
            f"{list(known)}"
        )
    return kept


def spread_clips(rows: pd.DataFrame, split: str, count: int, seed: int) -> np.ndarray:
    """Draw positions in `rows` of `count` single clips of a split, as evenly over groups as can be.

    Of each composition a random clip in turn, so that intervals over compositions are as narrow
    as the budget allows. Only clips that features are found on (`clips.main_clips`). ValueError
    for more clips than there are.
    """
    positions = main_clips(rows, split)
    if len(positions) < count:
        raise ValueError(
            f"{count} clips wanted but split {split} has {len(positions)}: lower ablate.clips or "
            f"raise prepare_data.clips.{split} (rendered clips) or "
            "prepare_data.recordings.limits (recordings)"
        )
    shuffled = np.random.default_rng(seed).permutation(positions)
    turn = rows["group"].iloc[shuffled].groupby(rows["group"].iloc[shuffled]).cumcount()
    return np.sort(shuffled[np.argsort(turn.to_numpy(), kind="stable")[:count]])


def localise(
    name: str, section: Ablate, seed: int, device: str, processes: int
) -> dict[str, object]:
    """Find the layers that carry each of `section.concepts`: {concept: `patching.localisation`}.

    Clips of `section.split` whose labels lack the concept and its control. {} for a model without
    cross-attention; a concept with too few clips is left out with a count of them.
    """
    sources = functools.partial(open_sources, f"data/models/{name}", "data/clips", device)
    model, clips = sources()
    if not points_of(model).keys() - {point.name for point in model.hook_points}:
        return {}
    found: dict[str, object] = {}
    with workers(processes) as run_each:
        for concept in section.concepts:
            control = patching.control_of(concept, section.concepts)
            at = main_clips(clips.rows, section.split)
            for absent in (concept, control):
                if f"has_{absent}" in clips.rows:
                    at, has = known_labels(clips.rows, absent, at)
                    at = at[~has]
                else:
                    at = at[:0]
            groups = clips.rows["group"]
            if groups.iloc[at].nunique() < 2:
                found[concept] = {"clips": len(at)}
                continue
            rng = np.random.default_rng(seed_for(seed, "ablate", "patches", concept))
            at = rng.permutation(at)
            turn = groups.iloc[at].groupby(groups.iloc[at]).cumcount().to_numpy()
            at = np.sort(at[np.argsort(turn, kind="stable")[: section.concept_clips]])
            batches = [at[start : start + BATCH] for start in range(0, len(at), BATCH)]
            job = functools.partial(patch_batch, sources, concept, control, section.concept_seconds)
            own, other = zip(*run_each(job, batches), strict=True)
            found[concept] = {"control": control} | patching.localisation(
                functools.reduce(patching.Patches.__add__, own),
                functools.reduce(patching.Patches.__add__, other),
                groups.iloc[at].tolist(), section.bootstrap,
                seed_for(seed, "ablate", "patches", "bootstrap"),
            )  # fmt: skip
    return found


def patch_batch(
    sources: Sources, concept: str, control: str, seconds: float, rows: np.ndarray
) -> tuple[patching.Patches, patching.Patches]:
    """Patch one batch of clips, for the concept and for its control."""
    model, clips = sources()
    model = language_model(model)
    samples = round(seconds * model.sample_rate)
    captions = patching.caption_pairs(clips.rows.iloc[rows], concept, control)
    encoded = model.encode(clips.audio(rows)[:, :samples], [None] * len(rows))
    count, three = len(rows), encoded.codes.repeat(3, 1, 1)
    # One batch of all captions, so that padding is the same for each.
    text = model.with_captions(three, [c for part in captions for c in part])
    parts = (text.codes.split(count), text.text.split(count), text.text_mask.split(count))
    without, with_, other = (
        Batch(*each, tuple(own)) for *each, own in zip(*parts, captions, strict=True)
    )
    return patching.patch(model, without, with_), patching.patch(model, without, other)


def run(
    name: str, section: Ablate, seed: int, device: str, processes: int
) -> tuple[dict[str, object], pd.DataFrame]:
    """Give metrics and table of the model data/models/`name` on data/clips.

    Kinds that an audio model does not have are left out, and counted in the metrics under
    ``kinds_left_out`` (number of hook points not ablated).
    """
    sources = functools.partial(open_sources, f"data/models/{name}", "data/clips", device)
    model, clips = sources()
    kinds = usable_kinds(model, section.kinds)
    train, scored = (
        spread_clips(clips.rows, split, section.clips, seed_for(seed, "ablate", "clips", split))
        for split in ("train", section.split)
    )

    def each_batch(
        run_each: Run,
        rows: np.ndarray,
        means: Mapping[str, Tensor] | None,
        what: str,
    ) -> list:
        batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
        results = run_each(functools.partial(work, sources, kinds, means), batches)
        return list(Bar(results, f"{name}: {what}", len(batches), unit="batches"))

    with workers(processes) as run_each:
        sums = each_batch(run_each, train, None, "means")
        means = functools.reduce(Sums.__add__, sums).means
        scores = join(each_batch(run_each, scored, means, "ablations"))

    groups = clips.rows["group"].iloc[scored].tolist()
    table = ablation_table(scores, groups, section.bootstrap, seed_for(seed, "ablate", "bootstrap"))
    metrics = ablation_metrics(scores, table, groups) | method(model).summary(scores)
    if left_out := [kind for kind in section.kinds if kind not in kinds]:
        metrics["kinds_left_out"] = {kind: len(model.hook_points) for kind in left_out}
    return metrics, table
