"""Pair activations of models with different frame rates by time in seconds.

Frame t of a model with frame rate r covers the seconds t / r to (t + 1) / r. The faster model's
frames are averaged inside each frame of the slower one, weighted by how long they overlap: the
mean of the faster stream, taken as constant within a frame, over the slower frame. An aligned
store has the slower store's clips, order and frame counts, so that pairing by (clip id, frame) then
works as for two models of one rate.

Index pairing would be wrong by 28.5 frames of MusicGen (50 Hz) after one second of RAVE (21.5 Hz).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from musicscope.activations.store import (
    CLIP_COLUMNS,
    ActivationStore,
    StoreConfig,
    StoreError,
    StoreWriter,
    shard_spans,
    storage,
)
from musicscope.core.io import atomic_dir, scratch_dir, sha256
from musicscope.core.progress import Bar


def align(
    values: np.ndarray, rate: float, to_rate: float, frames: int, offset_s: float = 0.0
) -> np.ndarray:
    """Average values [T, d] at `rate` Hz within `frames` frames at `to_rate` Hz.

    Slower frame s takes the mean over the seconds s / to_rate + offset_s to (s + 1) / to_rate +
    offset_s, as far as the clip goes; `offset_s` < 0 where the slower model answers late (a
    streaming export). A frame that lies wholly outside takes the nearest frame; see `outside`.
    Exact for any pair of rates, also equal ones. float32 [frames, d]. ValueError if to_rate > rate.
    """
    if not len(values):
        raise ValueError("no frames to align")
    _check_rates(rate, to_rate)
    begin, end = _edges(rate, to_rate, frames, offset_s)
    # In units of the faster frames. A frame outside becomes the whole first or last one.
    begin = np.clip(begin, 0, len(values) - 1e-6)
    end = np.clip(end, begin + 1e-6, len(values))
    total = np.zeros((len(values) + 1, values.shape[1]))
    np.cumsum(values, axis=0, dtype=np.float64, out=total[1:])

    def integral(at: np.ndarray) -> np.ndarray:
        whole = np.minimum(at.astype(np.int64), len(values) - 1)
        return total[whole] + (at - whole)[:, None] * values[whole]

    return ((integral(end) - integral(begin)) / (end - begin)[:, None]).astype(np.float32)


def _check_rates(rate: float, to_rate: float) -> None:
    if to_rate > rate * (1 + 1e-9):
        raise ValueError(f"{rate:g} Hz is slower than {to_rate:g} Hz: align the other one")


def outside(length: int, rate: float, to_rate: float, frames: int, offset_s: float = 0.0) -> int:
    """Count the slower frames, of `frames`, that overlap none of `length` faster ones."""
    begin, end = _edges(rate, to_rate, frames, offset_s)
    return int(((end <= 1e-6) | (begin >= length - 1e-6)).sum())


def _edges(
    rate: float, to_rate: float, frames: int, offset_s: float
) -> tuple[np.ndarray, np.ndarray]:
    """Begin and end of the slower frames [frames], in faster frames."""
    edges = (np.arange(frames + 1) / to_rate + offset_s) * rate
    return edges[:-1], edges[1:]


def frame_rate(store: ActivationStore, given: float | None = None) -> float:
    """Frames per second of a store: `given`, else its manifest's. StoreError without both."""
    rate = store.config.get("frame_rate") if given is None else given
    if rate is None:
        raise StoreError(
            f"{store.folder / 'manifest.json'} has no config.frame_rate: run extract_activations "
            "again, or give the model's frame rate"
        )
    return float(rate)


def aligned_store(
    fast: ActivationStore,
    slow: ActivationStore,
    folder: str | Path,
    *,
    fast_rate: float | None = None,
    slow_rate: float | None = None,
    offset_s: float = 0.0,
    shard_mb: float = 32.0,
) -> ActivationStore:
    """Write `fast` in the frames of `slow`: same clips, same order, same frame counts as `slow`.

    The result keeps the model, layer, width, dtype and clip table of `fast`; its config has
    ``frame_rate`` of `slow` and ``aligned`` (source hash, rates, offset, frames outside the clip).
    Rates come from the manifests unless given. `offset_s` as in `align`. One clip is in memory.

    StoreError names clips of `slow` that `fast` lacks, and a clip whose frames in the two stores
    cannot cover the same recording (durations differ by more than two slower frames).
    """
    rate, to_rate = frame_rate(fast, fast_rate), frame_rate(slow, slow_rate)
    _check_rates(rate, to_rate)
    place = {name: i for i, name in enumerate(fast.ids)}
    if absent := [name for name in slow.ids if name not in place]:
        raise StoreError(
            f"{fast.folder} lacks {len(absent)} clips of {slow.folder}, such as {absent[0]!r}: "
            "extract both from the same clips"
        )
    order = [place[name] for name in slow.ids]
    seconds = fast.frames[order] / rate - slow.frames / to_rate
    if len(seconds) and np.abs(seconds).max() > 2 / to_rate:
        worst = int(np.abs(seconds).argmax())
        raise StoreError(
            f"clip {slow.ids[worst]!r} lasts {fast.frames[order[worst]] / rate:.3f} s in "
            f"{fast.folder} and {slow.frames[worst] / to_rate:.3f} s in {slow.folder}: is a frame "
            f"rate wrong ({rate:g} and {to_rate:g} Hz)?"
        )
    table: pd.DataFrame = fast.rows.iloc[order][list(CLIP_COLUMNS)].reset_index(drop=True)
    table["frames"] = slow.frames
    pairs = list(zip(order, slow.frames.tolist(), strict=True))
    beyond = sum(outside(int(fast.frames[i]), rate, to_rate, n, offset_s) for i, n in pairs)
    config: StoreConfig = {
        **fast.config,
        "frame_rate": to_rate,
        "aligned": {
            "source_sha256": fast.manifest["sha256"],
            "source_frame_rate": rate,
            "offset_s": offset_s,
            "frames_outside": beyond,
        },
    }
    spans = shard_spans(slow.frames.tolist(), fast.width, fast.dtype, shard_mb)
    size = int(slow.frames.sum()) * fast.width * storage(fast.dtype).itemsize
    print(f"{folder}: {len(slow):,} clips, {size / 1e9:.3f} GB", file=sys.stderr)
    with atomic_dir(folder) as temporary:
        writer = StoreWriter(
            temporary, width=fast.width, dtype=fast.dtype, clips=table, spans=spans, config=config
        )
        for shard, (first, stop) in enumerate(Bar(spans, f"{rate:g} to {to_rate:g} Hz")):
            rows = (align(fast.clip(i), rate, to_rate, n, offset_s) for i, n in pairs[first:stop])
            writer.write(shard, list(rows))
        writer.finish()
    return ActivationStore.open(folder)


def slowest(stores: Sequence[ActivationStore]) -> int:
    """Find the store with the fewest frames per second; of equals the one with the fewest frames in
    all, then the first."""
    rates = [frame_rate(store) for store in stores]
    return min(range(len(stores)), key=lambda i: (rates[i], int(stores[i].frames.sum()), i))


def _same_frames(store: ActivationStore, other: ActivationStore) -> bool:
    return store.ids == other.ids and np.array_equal(store.frames, other.frames)


def common_frames(folders: Sequence[str | Path]) -> tuple[str, ...]:
    """Give folders of the same activations in the same frames: the given ones if all agree.

    Else every store is aligned to the `slowest` one (`aligned_store`), kept in scratch under the
    hash of both (`core.io.scratch_dir`), where the next stage finds it; deleting it costs time
    only. Several processes may ask at once: one writes, the others wait.
    """
    stores = [ActivationStore.open(folder) for folder in folders]
    given = tuple(str(folder) for folder in folders)
    if all(_same_frames(store, stores[0]) for store in stores):
        return given
    slow = stores[slowest(stores)]
    found = []
    for folder, store in zip(given, stores, strict=True):
        if _same_frames(store, slow):
            found.append(folder)
            continue
        hashes = {"fast": store.manifest["sha256"], "slow": slow.manifest["sha256"]}
        code = sha256(__file__)
        with scratch_dir({"stage": "align", **hashes, "code": code}) as scratch:
            if not (scratch / "store" / "manifest.json").is_file():
                aligned_store(store, slow, scratch / "store")
        found.append(str(scratch / "store"))
    return tuple(found)
