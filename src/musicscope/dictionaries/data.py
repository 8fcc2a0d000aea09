"""Training and test data of dictionaries: the same clips in the stores of one or several models.

Clips meet by id. Nothing is ever zipped by position alone: ids that one store lacks, or clips with
other frame counts, are an error that names them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from musicscope.activations.store import STORAGE, ActivationStore, StoreError, decode, encode
from musicscope.core.seeding import seed_for
from musicscope.data.clips import HELD_OUT_FONT, main_clips

TRAIN, VALIDATION, TEST = "train", "validation", "test"
HELDOUT_FONT = "heldout_font"


@dataclass(frozen=True)
class Paired:
    """The same clips in M stores."""

    stores: tuple[ActivationStore, ...]
    members: np.ndarray
    """[n, M] index of each clip in each store"""
    frames: np.ndarray
    """[n] frames of each clip"""
    groups: np.ndarray
    """[n] composition of each clip (of the first store's clip when mispaired)"""

    def __len__(self) -> int:
        return len(self.members)

    @property
    def widths(self) -> tuple[int, ...]:
        """Dimensions of each model's activations."""
        return tuple(store.width for store in self.stores)

    def take(self, chosen: np.ndarray) -> Paired:
        """Keep the clips at the positions `chosen`."""
        kept = (self.members[chosen], self.frames[chosen], self.groups[chosen])
        return Paired(self.stores, *kept)

    def clip(self, n: int) -> list[np.ndarray]:
        """Read clip n in every store, float32 [frames, d_j] each."""
        parts = zip(self.stores, self.members[n], strict=True)
        return [store.clip(int(i))[: self.frames[n]] for store, i in parts]

    def clips(self) -> Iterator[list[np.ndarray]]:
        """Yield every clip in order, as `clip`."""
        return (self.clip(n) for n in range(len(self)))

    def batches(
        self,
        batch_size: int,
        seed: int,
        samples: int,
        *,
        start_step: int = 0,
        rows: slice | None = None,
        buffer_mb: float = 512.0,
    ) -> Iterator[list[np.ndarray]]:
        """Yield shuffled rows, float32 [batch_size, d_j] per model, samples // batch_size times.

        Every epoch visits each frame once; batches run on across epoch ends. The order depends on
        (seed, epoch) alone: ``start_step=n`` gives what an unbroken run gives from batch n on. With
        `rows`, a slice from start to stop, only those rows of each batch come.

        One store: the order of `ActivationStore.train_batches`. Several: in each epoch the clips
        are permuted and taken into windows of at most `buffer_mb` MiB over all models
        (at least one clip), each emitted in uniformly random order: an exact uniform permutation
        where all fits into one window. Memory is one window plus one batch.
        """
        if len(self.stores) == 1:
            store = self.stores[0]
            mask = np.isin(np.arange(len(store)), self.members)
            stream = store.train_batches(
                batch_size, seed, samples, mask, start_step=start_step, rows=rows
            )
            return ([batch] for batch in stream)
        steps = samples // batch_size
        if batch_size < 1 or steps < 1:
            raise StoreError(f"{samples} samples give no batch of {batch_size}")
        row_bytes = sum(s.width * STORAGE[s.dtype].itemsize for s in self.stores)
        limit = max(1.0, buffer_mb * 2**20 / row_bytes)
        part = rows or slice(0, batch_size)
        return _stream(self, batch_size, part, seed, start_step, steps, limit)


def clip_rows(rows: pd.DataFrame, wanted: str) -> np.ndarray:
    """Return positions of a split's `main_clips`, or of test clips of HELDOUT_FONT.

    Recordings have no held-out font.
    """
    if wanted == HELDOUT_FONT:
        held_out = (rows["kind"] == "clip") & (rows["font"] == HELD_OUT_FONT)
        return np.flatnonzero(held_out & (rows["split"] == TEST))
    return main_clips(rows, wanted)


def pair(stores: Sequence[ActivationStore], wanted: str) -> Paired:
    """Match the clips of a split, or of HELDOUT_FONT (`clip_rows`), by id in every store.

    In the order of the first store. StoreError where a store lacks a clip, or where frame counts or
    compositions differ.
    """
    tables = []
    for store in stores:
        keep = clip_rows(store.rows, wanted)
        tables.append(dict(zip(np.array(store.ids)[keep].tolist(), keep, strict=True)))
    first = stores[0]
    if not tables[0]:
        raise StoreError(f"{first.folder} has no clips of {wanted}")
    for store, index in zip(stores, tables, strict=True):
        for a, b, here, there in (
            (tables[0], index, first, store),
            (index, tables[0], store, first),
        ):
            if missing := [name for name in a if name not in b]:
                raise StoreError(
                    f"{len(missing)} clips of {here.folder} are not in {there.folder} (first: "
                    f"{missing[0]}): extract both models' activations from the same data/clips"
                )
    members = np.array([[index[name] for index in tables] for name in tables[0]])
    columns = {"frames": lambda s: s.frames, "group": lambda s: s.rows["group"].to_numpy()}
    for j, store in enumerate(stores):
        for what, column in columns.items():
            ours, theirs = column(first)[members[:, 0]], column(store)[members[:, j]]
            if (wrong := np.flatnonzero(ours != theirs)).size:
                n = wrong[0]
                raise StoreError(
                    f"clip {first.ids[members[n, 0]]} has {what} {ours[n]} in {first.folder} and "
                    f"{theirs[n]} in {store.folder}: frames pair by number, so models need the "
                    "same clips at the same frame rate"
                )
    frames = first.frames[members[:, 0]]
    return Paired(tuple(stores), members, frames, first.rows["group"].to_numpy()[members[:, 0]])


def mispair(paired: Paired, seed: int) -> Paired:
    """Permute the clips of all models but the first: the null of unrelated music.

    Every model keeps each of its clips once; within a pair all compositions differ. Frames stay
    paired by their place in the clip, so that agreement about time alone is not counted as shared
    music. Clips of unequal length are cut to the shorter. StoreError with too few compositions.
    """
    rng = np.random.default_rng(seed)
    n, M = paired.members.shape
    names, member = np.unique(paired.groups, return_inverse=True)
    largest = int(np.bincount(member).max())
    if n < M * largest:
        raise StoreError(
            f"{n} clips, up to {largest} of one composition, cannot be mispaired over {M} models"
        )
    # Compositions end to end on a circle: clips at least `largest` places apart differ in theirs.
    place = rng.permutation(len(names))[member]
    circle = np.lexsort((rng.permutation(n), place))
    gaps = largest + rng.multinomial(n - M * largest, [1 / M] * M)
    shifts = np.cumsum(gaps)[:-1]
    members = paired.members.copy()
    for j, shift in enumerate(shifts, 1):
        members[circle, j] = paired.members[np.roll(circle, shift), j]
    lengths = [s.frames[members[:, j]] for j, s in enumerate(paired.stores)]
    return replace(paired, members=members, frames=np.minimum.reduce(lengths))


def _stream(
    paired: Paired, batch_size: int, part: slice, seed: int, step: int, steps: int, limit: float
) -> Iterator[list[np.ndarray]]:
    total = int(paired.frames.sum())
    # One window for everything is read once, in the order of the table, and kept.
    kept = _load(paired, np.arange(len(paired))) if total <= limit else None
    epoch, skip = divmod(step * batch_size, total)
    batch, filled = _empty(paired, part.stop - part.start), 0
    while step < steps:
        rng = np.random.default_rng(seed_for(seed, "shuffle", epoch))
        windows = [np.arange(len(paired))]
        if kept is None:
            order = rng.permutation(len(paired))
            ends = paired.frames[order].cumsum() // limit
            windows = np.split(order, np.flatnonzero(np.diff(ends)) + 1)
        for window in windows:
            # Drawn even where it is skipped: a resumed epoch must use the same numbers.
            order = rng.permutation(int(paired.frames[window].sum()))
            if skip >= len(order):
                skip -= len(order)
                continue
            buffers = kept or _load(paired, window)
            position, skip = skip, 0
            while position < len(order):
                take = order[position : position + batch_size - filled]
                first, stop = max(filled, part.start), min(filled + len(take), part.stop)
                own = take[first - filled : max(stop - filled, 0)]
                for store, buffer, rows in zip(paired.stores, buffers, batch, strict=True):
                    if len(own):
                        rows[first - part.start :][: len(own)] = decode(buffer[own], store.dtype)
                position, filled = position + len(take), filled + len(take)
                if filled == batch_size:
                    yield batch
                    step += 1
                    if step == steps:
                        return
                    batch, filled = _empty(paired, part.stop - part.start), 0
            del buffers  # before the next window is read, or two would be in memory
        epoch += 1


def _empty(paired: Paired, rows: int) -> list[np.ndarray]:
    return [np.empty((rows, width), np.float32) for width in paired.widths]


def _load(paired: Paired, window: np.ndarray) -> list[np.ndarray]:
    """Read storage words [rows, d_j] of some pairs, half the memory of float32."""
    rows = int(paired.frames[window].sum())
    buffers = [np.empty((rows, s.width), STORAGE[s.dtype]) for s in paired.stores]
    at = 0
    for n in window:
        stop = at + int(paired.frames[n])
        for store, buffer, x in zip(paired.stores, buffers, paired.clip(int(n)), strict=True):
            buffer[at:stop] = encode(x, store.dtype)
        at = stop
    return buffers
