"""Activations of whole clip collections: every chosen layer in one pass, one shard at a time.

A run is fixed by its `Plan` before it starts: which clips share a shard, and which clips of a
shard share a batch. Floats therefore depend neither on the number of processes (each computes
with one thread) nor on where an earlier run was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from musicscope.activations import token_cache as codes
from musicscope.activations.store import CLIP_COLUMNS, ActivationStore, storage
from musicscope.activations.writer import StoreWriter, shard_spans
from musicscope.core import io as artifacts
from musicscope.core.distributed import ALONE, Ranks
from musicscope.core.parallel import workers

Sources = Callable[[], tuple[Any, Any]]
"""Opens (model, clip store). Picklable and cached, for it is called for every task."""


@dataclass(frozen=True)
class Plan:
    """All that decides the bytes of the stores of one model."""

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
    """Whether the model is given each clip's caption, or runs unconditionally."""
    config: dict[str, Any]
    """What else identifies the run: model, model_sha256, clips_sha256; its frame_rate in Hz and
    the sample_rate that it heard."""

    def writer(self, slot: str, folder: Path) -> StoreWriter:
        """The writer of one slot's store."""
        choices = {"captions": self.captions, "batch_clips": self.batch_clips}
        return StoreWriter(
            folder,
            width=self.widths[slot],
            dtype=self.dtype,
            clips=self.clips,
            spans=self.spans,
            config={**self.config, **choices, "layer": self.layers[slot]},
        )

    def identity(self) -> dict[str, Any]:
        """All fields as JSON values: two plans with equal identities write equal bytes."""
        return {**self.__dict__, "stage": "extract", "clips": self.clips.to_dict("list")}

    def nbytes(self, slot: str) -> int:
        """Size of one slot's shards in bytes."""
        return int(self.clips["frames"].sum()) * self.widths[slot] * storage(self.dtype).itemsize

    def describe(self) -> str:
        """The size of the run, one line a slot, to be printed before it starts."""
        frames, total = int(self.clips["frames"].sum()), 0
        lines = [f"{len(self.clips):,} clips, {frames:,} frames, {len(self.spans)} shards a slot"]
        for slot, layer in self.layers.items():
            total += self.nbytes(slot)
            size = f"{self.nbytes(slot) / 1e9:.3f} GB"
            lines.append(f"  {slot}: {layer}, {self.widths[slot]} x {self.dtype}, {size}")
        return "\n".join([*lines, f"  in all {total / 1e9:.3f} GB"])


def plan(
    model: Any,
    clips: Any,
    layers: dict[str, str],
    *,
    dtype: str,
    shard_mb: float,
    batch_clips: int,
    captions: bool,
    model_sha256: str,
    clips_sha256: str,
) -> Plan:
    """Decide shards and sizes for a MusicModel and a ClipStore; nothing is run.

    `shard_mb` bounds the widest slot. Slots may share a layer. ValueError for an unknown hook
    point or for clips at another sample rate than the model's.
    """
    widths = {point.name: point.width for point in model.hook_points}
    if unknown := sorted(set(layers.values()) - set(widths)):
        raise ValueError(f"{model.name} has no {unknown}; its hook points are {list(widths)}")
    if not layers or batch_clips < 1:
        raise ValueError(f"need slots and batch_clips >= 1, got {layers} and {batch_clips}")
    if clips.sample_rate != model.sample_rate:
        raise ValueError(
            f"clips are at {clips.sample_rate} Hz, {model.name} works at {model.sample_rate} Hz; "
            "read them through resampling.at_rate"
        )
    table = clips.rows[list(CLIP_COLUMNS[:-1])].reset_index(drop=True)
    samples = clips.audio([0]).shape[1]
    # EnCodec pads the last frame; the tolerance keeps 8000 * 50 / 16000 from becoming 26.
    frames = math.ceil(samples * model.frame_rate / model.sample_rate - 1e-6)
    table["frames"] = np.full(len(table), frames)
    widest = max(widths[layer] for layer in layers.values())
    return Plan(
        layers=dict(layers),
        widths={slot: widths[layer] for slot, layer in layers.items()},
        clips=table,
        spans=shard_spans(table["frames"].tolist(), widest, dtype, shard_mb),
        dtype=dtype,
        batch_clips=batch_clips,
        captions=captions,
        config={
            "model": model.name,
            "frame_rate": float(model.frame_rate),
            "sample_rate": int(model.sample_rate),
            "model_sha256": model_sha256,
            "clips_sha256": clips_sha256,
        },
    )


def extract(
    plan: Plan,
    sources: Sources,
    folders: dict[str, str | Path],
    processes: int = 1,
    ranks: Ranks = ALONE,
    workers: Callable[[int], Any] = workers,
) -> dict[str, ActivationStore]:
    """Run the plan: one store for each slot at `folders[slot]`.

    First the codec tokens of all clips (`codes`: a second model with the same codec
    finds them there), then the shards, are collected in scratch folders named by the inputs
    (artifacts.partial_dir), so that a run killed at any point goes on with what it had finished;
    whole stores are moved to their place at the end. A shard whose hash is wrong is computed again.

    Several `ranks` call this with the same plan: shard i falls to rank i modulo their number.
    Within each, `workers` opens the `processes` (see engines.Engine).
    """
    model, clips = sources()
    tokens = codes.codes_dir(model, plan.config["clips_sha256"])
    with _sole_user(artifacts.partial_dir(plan.identity()), ranks):
        scratch = artifacts.partial_dir(plan.identity())
        mine = ranks.mine(range(len(plan.spans)))
        pending = [i for i in mine if _pending(plan, scratch, i)]
        wanted = tokens and ranks.any(bool(pending))  # another rank's shards may need my chunks
        chunks = ranks.mine(codes.missing(tokens, len(clips.rows))) if wanted else []
        with workers(min(processes, max(len(pending), len(chunks), 1))) as run:
            if chunks:
                encode = functools.partial(codes.write_chunk, sources, tokens)
                _follow("codec", run(encode, chunks), plan, len(chunks) * codes.CHUNK, ranks)
            ranks.wait()
            write = functools.partial(_write_shard, plan, sources, scratch, tokens)
            left = sum(plan.spans[i][1] - plan.spans[i][0] for i in pending)
            _follow("activations", run(write, pending), plan, left, ranks)
        ranks.wait()
        if ranks.leads:
            for slot in plan.layers:
                plan.writer(slot, scratch / slot).finish()
            for slot in plan.layers:
                artifacts.publish_dir(scratch / slot, folders[slot])
            shutil.rmtree(scratch, ignore_errors=True)
        ranks.wait()
    return {slot: ActivationStore.open(folders[slot]) for slot in plan.layers}


@contextlib.contextmanager
def _sole_user(scratch: Path, ranks: Ranks = ALONE) -> Iterator[None]:
    """Wait while another run uses `scratch`: a killed `dvc` leaves its stage running, and that one
    would move the folder away under the next. The lock goes with its process, the first rank."""
    if not ranks.leads:
        ranks.wait()
        yield
        return
    with open(scratch.with_name(f"{scratch.name}.lock"), "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another run of this extraction ({stream.name})", file=sys.stderr)
            fcntl.flock(stream, fcntl.LOCK_EX)
        ranks.wait()
        yield


def _pending(plan: Plan, scratch: Path, shard: int) -> dict[str, StoreWriter]:
    """The writers, by slot, that lack this shard."""
    writers = {slot: plan.writer(slot, scratch / slot) for slot in plan.layers}
    return {slot: writer for slot, writer in writers.items() if not writer.has(shard)}


def _follow(name: str, finished: Iterable[int], plan: Plan, left: int, ranks: Ranks) -> None:
    """Wait for all tasks, each of which gives its number of clips, with a bar and the time left."""
    interval = 0.2 if sys.stderr.isatty() else 10.0  # of a log, one line every ten seconds
    total = max(len(plan.clips) // ranks.size, left)
    with tqdm(
        total=total, initial=total - left, desc=name, unit="clip", mininterval=interval,
        disable=not ranks.leads,
    ) as bar:  # fmt: skip
        for clips in finished:
            bar.update(clips)


def _write_shard(
    plan: Plan, sources: Sources, scratch: Path, tokens: Path | None, shard: int
) -> int:
    """Compute one shard for every slot that lacks it; the number of its clips."""
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
                    batch = model.with_captions(codes.read_codes(tokens, rows), captions)
                found = model.capture(batch, names)
        except Exception as error:
            error.add_note(f"while extracting the clips {plan.clips['id'].iloc[rows].tolist()}")
            raise
        for name in names:
            values[name].extend(found[name].float().cpu().numpy())
    for slot, writer in writers.items():
        writer.write(shard, values[plan.layers[slot]])
    return stop - first


def summary(plan: Plan, stores: dict[str, ActivationStore]) -> dict[str, Any]:
    """Numbers for metrics/extract_activations/<model>.json.

    `gamma` is |mean| / standard deviation of a dimension over train: large values foretell dead
    latents unless the SAE centres its input (arXiv 2605.31518). Dimensions that never change are
    counted and left out of it.
    """
    slots = {}
    for slot, store in stores.items():
        varies = store.std > 0
        gamma = np.abs(store.mean[varies]) / store.std[varies]
        slots[slot] = {
            "layer": plan.layers[slot],
            "width": store.width,
            "bytes": store.nbytes,
            "train_frames": store.train_frames,
            "mean_norm": store.manifest["train"]["mean_norm"],
            "constant_dimensions": int((~varies).sum()),
            "gamma_median": float(np.median(gamma)) if varies.any() else None,
            "gamma_max": float(gamma.max()) if varies.any() else None,
        }
    extracted = {len(store) for store in stores.values()}
    return {
        "clips": plan.clips["split"].value_counts().to_dict(),
        "skipped_clips": len(plan.clips) - min(extracted),
        "frames": int(plan.clips["frames"].sum()),
        "bytes": sum(store.nbytes for store in stores.values()),
        "slots": slots,
    }
