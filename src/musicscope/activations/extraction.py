"""Extract activations of whole clip collections: every chosen layer in one pass, shard by shard.

A run is fixed by its plans before it starts: which clips share a shard, and which clips of a shard
share a batch. Floats therefore depend neither on the number of processes (each computes with one
thread) nor on where an earlier run was killed. A language model has one frame rate, so one plan.
Hook points of an audio model differ in rate: one plan, and one pass over the clips, per rate.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from musicscope.activations import token_cache
from musicscope.activations.store import (
    CLIP_COLUMNS,
    ActivationStore,
    StoreConfig,
    StoreWriter,
    shard_spans,
    storage,
)
from musicscope.core.distributed import ALONE, Ranks, Workers, scratch_of
from musicscope.core.io import publish_dir
from musicscope.core.parallel import workers
from musicscope.core.progress import Bar
from musicscope.data.clips import Clips
from musicscope.models.interface import AudioModel, MusicModel, language_model, points_of
from musicscope.models.language_model import CROSS
from musicscope.models.registry import Sources


@dataclass(frozen=True)
class Plan:
    """All that decides the bytes of the stores of one model at one frame rate."""

    layers: dict[str, str]
    """Slot to hook point, such as {"top1": "layers.3"}."""
    widths: dict[str, int]
    """Slot to number of dimensions."""
    clips: pd.DataFrame
    """The clip table (store.CLIP_COLUMNS), in order of extraction."""
    spans: list[tuple[int, int]]
    """Clips of each shard, the same for all slots."""
    dtype: str
    batch_clips: int
    captions: bool
    """Whether the model gets each clip's caption, or runs unconditionally."""
    config: StoreConfig
    """Rest of the run's identity: model, model_sha256, clips_sha256, frame_rate and sample_rate in
    Hz."""

    def writer(self, slot: str, folder: Path) -> StoreWriter:
        """Make the writer of one slot's store."""
        choices = {"captions": self.captions, "batch_clips": self.batch_clips}
        return StoreWriter(
            folder,
            width=self.widths[slot],
            dtype=self.dtype,
            clips=self.clips,
            spans=self.spans,
            config={**self.config, **choices, "layer": self.layers[slot]},
        )

    def identity(self) -> dict[str, object]:
        """Give all fields as JSON values: plans with equal identities write equal bytes."""
        return {**self.__dict__, "stage": "extract", "clips": self.clips.to_dict("list")}

    def nbytes(self, slot: str) -> int:
        """Size of one slot's shards in bytes."""
        return int(self.clips["frames"].sum()) * self.widths[slot] * storage(self.dtype).itemsize

    def describe(self) -> str:
        """Describe the size of the run, one line per slot, for the log before it starts."""
        frames, total = int(self.clips["frames"].sum()), 0
        lines = [f"{len(self.clips):,} clips, {frames:,} frames, {len(self.spans)} shards a slot"]
        for slot, layer in self.layers.items():
            total += self.nbytes(slot)
            size = f"{self.nbytes(slot) / 1e9:.3f} GB"
            lines.append(f"  {slot}: {layer}, {self.widths[slot]} x {self.dtype}, {size}")
        return "\n".join([*lines, f"  in all {total / 1e9:.3f} GB"])


def hook_names(model: MusicModel, chosen: Mapping[str, int | str]) -> dict[str, str]:
    """Turn slot -> number or name of a hook point (metrics/layers) into slot -> its name.

    ValueError for a number that the model does not have; `plan` refuses unknown names.
    """
    names = [point.name for point in model.hook_points]
    named = {slot: i for slot, i in chosen.items() if isinstance(i, str)}
    chosen = {slot: i for slot, i in chosen.items() if slot not in named}
    if wrong := {slot: i for slot, i in chosen.items() if not 0 <= int(i) < len(names)}:
        raise ValueError(
            f"{model.name} has hook points 0 to {len(names) - 1}, not {wrong}: run dvc repro "
            "select_layers"
        )
    return {slot: names[int(i)] for slot, i in chosen.items()} | named


def plan(
    model: MusicModel,
    clips: Clips,
    layers: Mapping[str, str],
    *,
    dtype: str,
    shard_mb: float,
    batch_clips: int,
    model_sha256: str,
    clips_sha256: str,
    captions: bool = False,
) -> list[Plan]:
    """Decide shards and sizes, one plan per frame rate of `layers`, slowest first; run nothing.

    `layers` names a hook point per slot; slots may share one. `shard_mb` bounds the widest slot.
    `captions` mean nothing to an audio model. ValueError for an unknown hook point or for clips at
    another sample rate than the model's.
    """
    points = points_of(model)
    if unknown := sorted(set(layers.values()) - set(points)):
        raise ValueError(f"{model.name} has no {unknown}; its hook points are {list(points)}")
    if not captions and (silent := [name for name in layers.values() if name.endswith(CROSS)]):
        raise ValueError(
            f"{silent} add nothing without captions: set extract_activations.captions to true"
        )
    if not layers or batch_clips < 1:
        raise ValueError(f"need slots and batch_clips >= 1, got {layers} and {batch_clips}")
    if clips.sample_rate != model.sample_rate:
        raise ValueError(
            f"clips are at {clips.sample_rate} Hz, {model.name} works at {model.sample_rate} Hz; "
            "read them through core.audio.at_rate"
        )
    samples, plans = clips.audio([0]).shape[1], []
    for rate in sorted({points[layer].rate for layer in layers.values()}):
        own = {slot: layer for slot, layer in layers.items() if points[layer].rate == rate}
        widths = {slot: points[layer].width for slot, layer in own.items()}
        table = clips.rows[list(CLIP_COLUMNS[:-1])].reset_index(drop=True)
        # EnCodec pads the last frame; the tolerance keeps 8000 * 50 / 16000 from becoming 26.
        table["frames"] = math.ceil(samples * rate / model.sample_rate - 1e-6)
        spans = shard_spans(table["frames"].tolist(), max(widths.values()), dtype, shard_mb)
        plans.append(
            Plan(
                layers=own,
                widths=widths,
                clips=table,
                spans=spans,
                dtype=dtype,
                batch_clips=batch_clips,
                captions=captions and not isinstance(model, AudioModel),
                config={
                    "model": model.name,
                    "frame_rate": float(rate),
                    "sample_rate": int(model.sample_rate),
                    "model_sha256": model_sha256,
                    "clips_sha256": clips_sha256,
                },
            )
        )
    return plans


def extract(
    plans: Sequence[Plan],
    sources: Sources,
    folders: Mapping[str, str | Path],
    processes: int = 1,
    ranks: Ranks = ALONE,
    workers: Workers = workers,
) -> dict[str, ActivationStore]:
    """Run the plans: one store per slot at `folders[slot]`.

    First the codec tokens of all clips (`token_cache`: a second model with the same codec finds
    them there), then the shards, are collected in scratch folders named by the inputs
    (`core.io.scratch_dir`), so that a run killed at any point goes on from its finished parts.
    Whole stores are moved to their place at the end. A shard with a wrong hash is computed again.

    Several `ranks` call this with the same plans: shard i falls to rank i modulo their number.
    Within each, `workers` opens the `processes` (see `core.distributed.Engine`).
    """
    for each in plans:
        _run(each, sources, folders, processes, ranks, workers)
    return {
        slot: ActivationStore.open(folder)
        for slot, folder in folders.items()
        if any(slot in each.layers for each in plans)
    }


def _run(
    plan: Plan,
    sources: Sources,
    folders: Mapping[str, str | Path],
    processes: int,
    ranks: Ranks,
    workers: Workers,
) -> None:
    model, clips = sources()
    tokens = token_cache.codes_dir(model, plan.config["clips_sha256"])
    with scratch_of(plan.identity(), ranks) as scratch:
        mine = ranks.mine(range(len(plan.spans)))
        pending = [i for i in mine if _pending(plan, scratch, i)]
        wanted = tokens and ranks.any(bool(pending))  # another rank's shards may need my chunks
        chunks = ranks.mine(token_cache.missing(tokens, len(clips.rows))) if wanted else []
        with workers(min(processes, max(len(pending), len(chunks), 1))) as run:
            if tokens and chunks:
                encode = functools.partial(token_cache.write_chunk, sources, tokens)
                left = len(chunks) * token_cache.CHUNK
                _follow("codec", run(encode, chunks), plan, left, ranks)
            ranks.wait()
            write = functools.partial(_write_shard, plan, sources, scratch, tokens)
            left = sum(plan.spans[i][1] - plan.spans[i][0] for i in pending)
            _follow("activations", run(write, pending), plan, left, ranks)
        ranks.wait()
        if ranks.leads:
            for slot in plan.layers:
                plan.writer(slot, scratch / slot).finish()
            for slot in plan.layers:
                publish_dir(scratch / slot, folders[slot])
            shutil.rmtree(scratch, ignore_errors=True)


def _pending(plan: Plan, scratch: Path, shard: int) -> dict[str, StoreWriter]:
    """Writers, by slot, that lack this shard."""
    writers = {slot: plan.writer(slot, scratch / slot) for slot in plan.layers}
    return {slot: writer for slot, writer in writers.items() if not writer.has(shard)}


def _follow(name: str, finished: Iterable[int], plan: Plan, left: int, ranks: Ranks) -> None:
    """Wait for all tasks, which yield their numbers of clips, with a bar and the time left."""
    total = max(len(plan.clips) // ranks.size, left)
    with Bar(
        total=total, initial=total - left, desc=name, unit="clips",
        disable=not ranks.leads,
    ) as bar:  # fmt: skip
        for clips in finished:
            bar.update(clips)


def _write_shard(
    plan: Plan, sources: Sources, scratch: Path, tokens: Path | None, shard: int
) -> int:
    """Compute one shard for every slot that lacks it; return its number of clips."""
    model, clips = sources()
    writers = _pending(plan, scratch, shard)
    names = sorted({plan.layers[slot] for slot in writers})
    values: dict[str, list[np.ndarray]] = {name: [] for name in names}
    first, stop = plan.spans[shard]
    for start in range(first, stop, plan.batch_clips):
        rows = list(range(start, min(start + plan.batch_clips, stop)))
        captions = (
            clips.rows["caption"].iloc[rows].tolist() if plan.captions else [None] * len(rows)
        )
        try:
            with torch.no_grad():
                if tokens is None:
                    batch = model.encode(clips.audio(rows), captions)
                else:
                    codes = token_cache.read_codes(tokens, rows)
                    batch = language_model(model).with_captions(codes, captions)
                found = model.capture(batch, names)  # ty: ignore[invalid-argument-type]  its own
        except Exception as error:
            error.add_note(f"while extracting the clips {plan.clips['id'].iloc[rows].tolist()}")
            raise
        for name in names:
            values[name].extend(found[name].float().cpu().numpy())
    for slot, writer in writers.items():
        writer.write(shard, values[plan.layers[slot]])
    return stop - first


def summary(plans: Sequence[Plan], stores: Mapping[str, ActivationStore]) -> dict[str, object]:
    """Sum up an extraction for metrics/extract_activations/<model>.json.

    `gamma` is |mean| / standard deviation of a dimension over train: large values predict dead
    latents unless the SAE centres its input (arXiv 2605.31518). Dimensions that never change are
    counted and left out of it.
    """
    slots = {}
    for plan, slot in ((each, slot) for each in plans for slot in each.layers):
        store = stores[slot]
        varies = store.std > 0
        gamma = np.abs(store.mean[varies]) / store.std[varies]
        slots[slot] = {
            "layer": plan.layers[slot],
            "frame_rate": plan.config["frame_rate"],
            "width": store.width,
            "bytes": store.nbytes,
            "train_frames": store.train_frames,
            "mean_norm": store.manifest["train"]["mean_norm"],
            "constant_dimensions": int((~varies).sum()),
            "gamma_median": float(np.median(gamma)) if varies.any() else None,
            "gamma_max": float(gamma.max()) if varies.any() else None,
        }
    clips = plans[0].clips
    return {
        "clips": clips["split"].value_counts().to_dict(),
        "skipped_clips": len(clips) - min(len(store) for store in stores.values()),
        "frames": sum(int(plan.clips["frames"].sum()) for plan in plans),
        "bytes": sum(store.nbytes for store in stores.values()),
        "slots": slots,
    }
