"""Training and test data of dictionaries: clips of one store, or the same clips in several.

A pair is one clip in every model's store. Nothing is ever zipped by position alone: ids that one
store lacks, or clips with other frame counts, are an error that names them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from musicscope.activations.store import STORAGE, ActivationStore, StoreError, decode, encode
from musicscope.core.seeding import seed_for
from musicscope.data.clips import HELD_OUT_FONT, main_clips

TRAIN, TEST = "train", "test"
HELDOUT_FONT = "heldout_font"


class Data(Protocol):
    """Frames to train on, the same ones in one or several stores."""

    @property
    def stores(self) -> tuple[ActivationStore, ...]:
        """One per model."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Dimensions of each model's activations."""

    def batches(
        self,
        batch_size: int,
        seed: int,
        samples: int,
        *,
        start_step: int = 0,
        rows: slice | None = None,
    ) -> Iterator[list[np.ndarray]]:
        """Yield shuffled rows, float32 [batch_size, d_j] per model, samples // batch_size times.

        The order depends on `seed` alone: ``start_step=n`` gives what an unbroken run gives from
        batch n on. With `rows`, a slice from start to stop, only those rows of each batch come.
        """


@dataclass(frozen=True)
class Selected:
    """Some clips of one store."""

    store: ActivationStore
    mask: np.ndarray
    """[clips of the store] bool"""

    @property
    def stores(self) -> tuple[ActivationStore, ...]:
        """The one store."""
        return (self.store,)

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of the one store."""
        return (self.store.width,)

    @property
    def frames(self) -> np.ndarray:
        """[n] frames of each clip."""
        return self.store.frames[self.mask]

    @property
    def groups(self) -> np.ndarray:
        """[n] composition of each clip."""
        return self.store.rows["group"].to_numpy()[self.mask]

    def clips(self) -> Iterator[np.ndarray]:
        """Yield the activations [frames, d] of every clip, in order."""
        return (self.store.clip(int(i)) for i in np.flatnonzero(self.mask))

    def batches(
        self,
        batch_size: int,
        seed: int,
        samples: int,
        *,
        start_step: int = 0,
        rows: slice | None = None,
    ) -> Iterator[list[np.ndarray]]:
        """Yield shuffled rows as `Data.batches`, by `ActivationStore.train_batches`."""
        stream = self.store.train_batches(
            batch_size, seed, samples, self.mask, start_step=start_step, rows=rows
        )
        return ([batch] for batch in stream)


def select(store: ActivationStore, wanted: str) -> Selected:
    """Select clips of TRAIN or TEST, or test clips of HELDOUT_FONT (recordings have none)."""
    rows = store.rows
    if wanted == HELDOUT_FONT:
        held_out = (rows["kind"] == "clip") & (rows["font"] == HELD_OUT_FONT)
        return Selected(store, (held_out & (rows["split"] == TEST)).to_numpy())
    return Selected(store, np.isin(np.arange(len(rows)), main_clips(rows, wanted)))


@dataclass(frozen=True)
class Paired:
    """The same clips in several stores."""

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

    def clip(self, n: int) -> list[np.ndarray]:
        """Read pair n in every model, float32 [frames, d_j] each."""
        parts = zip(self.stores, self.members[n], strict=True)
        return [store.clip(int(i))[: self.frames[n]] for store, i in parts]

    def clips(self) -> Iterator[list[np.ndarray]]:
        """Yield every pair in order, as `clip`."""
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
        """Yield shuffled paired rows as `Data.batches`.

        Every epoch visits each frame once; batches run on across epoch ends. In each epoch the
        clips are permuted and taken into windows of at most `buffer_mb` MiB over all models (at
        least one clip), each emitted in uniformly random order: an exact uniform permutation where
        all fits into one window. Memory is one window plus one batch. The orders depend on
        (seed, epoch) alone.
        """
        steps = samples // batch_size
        if batch_size < 1 or steps < 1:
            raise StoreError(f"{samples} samples give no batch of {batch_size}")
        row_bytes = sum(s.width * STORAGE[s.dtype].itemsize for s in self.stores)
        limit = max(1.0, buffer_mb * 2**20 / row_bytes)
        part = rows or slice(0, batch_size)
        return _stream(self, batch_size, part, seed, start_step, steps, limit)


def pair(stores: Sequence[ActivationStore], split: str) -> Paired:
    """Match the clips of a split (`clips.main_clips`) by id in every store.

    In the order of the first store. StoreError where a store lacks a clip, or where frame counts or
    compositions differ.
    """
    tables = []
    for store in stores:
        keep = main_clips(store.rows, split)
        tables.append(dict(zip(np.array(store.ids)[keep].tolist(), keep, strict=True)))
    first = stores[0]
    if not tables[0]:
        raise StoreError(f"{first.folder} has no clips of split {split}")
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
    for j, store in enumerate(stores):
        for what, ours, theirs in (
            ("frames", first.frames[members[:, 0]], store.frames[members[:, j]]),
            (
                "group",
                *(s.rows["group"].to_numpy()[members[:, m]] for s, m in ((first, 0), (store, j))),
            ),
        ):
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
