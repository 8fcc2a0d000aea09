"""The activation store: raw shards on disk, one manifest, a seeded global shuffle.

This docstring is the normative description of the format. A store is a folder with

``shard-00000.bin``, ``shard-00001.bin`` ...
    Little-endian float16 or bfloat16, [rows, width] row-major, no header. A row is a frame; the
    frames of a clip are consecutive; clips follow one another in the order of the clip table and
    are never split between shards.
``manifest.json``, written last: a folder without it is not a store.
    ``format``/``format_version``; ``config`` (the writer's request: model, hashes, layer ...) and
    ``config_sha256``, the hash of config + width + dtype + clip table + spans;
    ``shards`` (file, first and last clip, rows, sha256); ``clips`` (columns of the clip table,
    with ``frames`` and ``first_row``, the row over all shards where the clip begins); ``train``
    (number of frames, per-dimension mean and population standard deviation, mean norm: over the
    stored values of *all* rows of split "train", in float64 by Chan et al. 1983); ``sha256`` of
    the manifest itself.

While a store is being written each finished shard has a ``shard-00000.json`` beside it, so that a
rerun after a kill keeps it (`activations.writer`). Shard i depends on the configuration and on i
only: any process may write any shard, in any order, twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from musicscope.core.io import read_json, sha256
from musicscope.core.seeding import seed_for

FORMAT, FORMAT_VERSION = "musicscope.activations", 1
CLIP_COLUMNS = ("id", "split", "font", "kind", "group", "frames")
# bfloat16 is unknown to numpy: it travels as the upper half of a float32.
STORAGE = {"float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2")}
FLOAT16_MAX = 65504.0


class StoreError(ValueError):
    """A store that is missing, incomplete, damaged, or cannot hold the values asked for."""


def encode(values: np.ndarray, dtype: str, name: str = "activations") -> np.ndarray:
    """float32 [T, d] to storage words; NaN, infinity and float16 overflow raise, naming `name`."""
    if not np.isfinite(values).all():
        bad = np.argwhere(~np.isfinite(values))[0]
        raise StoreError(
            f"{name}: frame {bad[0]}, dimension {bad[1]} is {values[tuple(bad)]}; nothing was "
            "written for this shard. Check the model's weights and the clip's audio"
        )
    if dtype == "float16":
        largest = float(np.abs(values).max(initial=0.0))
        if largest > FLOAT16_MAX:
            raise StoreError(
                f"{name}: |{largest:.6g}| exceeds the float16 range ({FLOAT16_MAX:.0f}); "
                "set extract_activations.dtype to bfloat16"
            )
        return values.astype(STORAGE[dtype])
    import torch  # only to round to nearest even exactly as torch does

    tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    return tensor.to(torch.bfloat16).view(torch.int16).numpy().view(STORAGE[dtype])


def decode(words: np.ndarray, dtype: str) -> np.ndarray:
    """Storage words to float32, exactly, in memory of their own."""
    if dtype == "float16":
        return words.astype(np.float32)
    return (words.astype(np.uint32) << 16).view(np.float32)


def storage(dtype: str) -> np.dtype:
    """The numpy dtype whose words hold `dtype`."""
    if dtype not in STORAGE:
        raise StoreError(f"dtype {dtype!r} is not one of {', '.join(STORAGE)}")
    return STORAGE[dtype]


def digest(value: Any) -> str:
    """sha256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class ActivationStore:
    """Read access to a finished store; shards are memory-mapped, values come out as float32.

    Attributes: ``folder``, ``config`` (dict), ``width``, ``dtype``, ``ids`` (list of str),
    ``frames`` (int [n]), ``split`` (str [n]), ``rows`` (DataFrame: CLIP_COLUMNS + first_row),
    ``train_frames``, ``shards``.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.config, self.width, self.dtype = (manifest[k] for k in ("config", "width", "dtype"))
        self.shards: list[dict[str, Any]] = manifest["shards"]
        self.rows = pd.DataFrame(manifest["clips"], columns=[*CLIP_COLUMNS, "first_row"])
        self.ids: list[str] = manifest["clips"]["id"]
        self.split = np.array(manifest["clips"]["split"], dtype=str)
        self.frames = np.array(manifest["clips"]["frames"], dtype=np.int64)
        self.train_frames: int = manifest["train"]["frames"]
        self._shard_of = np.repeat(
            np.arange(len(self.shards)), [b - a for a, b in (s["clips"] for s in self.shards)]
        )
        # Row of each clip within its own shard.
        first = np.array(manifest["clips"]["first_row"], dtype=np.int64)
        heads = np.array([first[s["clips"][0]] for s in self.shards], dtype=np.int64)
        self._start = first - heads[self._shard_of]
        self._maps: dict[int, np.ndarray] = {}

    @classmethod
    def open(cls, folder: str | Path) -> ActivationStore:
        """Open a store; the manifest's own hash and every shard's size are checked."""
        folder = Path(folder)
        path = folder / "manifest.json"
        remedy = "rerun the stage extract_activations (dvc repro -f extract_activations)"
        if not path.is_file():
            raise StoreError(f"{path} is missing, so {folder} is not a finished store; {remedy}")
        try:
            manifest = read_json(path)
        except ValueError as error:
            raise StoreError(str(error)) from error
        manifest = manifest if isinstance(manifest, dict) else {}
        found = (manifest.get("format"), manifest.get("format_version"))
        if found != (FORMAT, FORMAT_VERSION):
            raise StoreError(
                f"{path}: format {found}, expected {(FORMAT, FORMAT_VERSION)}; {remedy}"
            )
        try:
            found = digest({k: v for k, v in manifest.items() if k != "sha256"})
        except ValueError as error:  # NaN
            raise StoreError(f"{path}: {error}; {remedy}") from error
        if found != manifest.get("sha256"):
            raise StoreError(f"{path}: its sha256 does not fit its content; {remedy}")
        store = cls(folder, manifest)
        for shard in store.shards:
            file = folder / shard["file"]
            if not file.is_file():
                raise StoreError(f"{file} is missing; {remedy}")
            expected = shard["rows"] * store.width * STORAGE[store.dtype].itemsize
            if (size := file.stat().st_size) != expected:
                raise StoreError(
                    f"{file} has {size} bytes, expected {expected} ({shard['rows']} rows of "
                    f"{store.width} x {store.dtype}); {remedy}"
                )
        return store

    def verify(self) -> None:
        """Hash every shard; a StoreError names all that differ from the manifest."""
        wrong = [
            str(self.folder / s["file"])
            for s in self.shards
            if sha256(self.folder / s["file"]) != s["sha256"]
        ]
        if wrong:
            raise StoreError(
                f"{', '.join(wrong)}: sha256 differs from {self.folder / 'manifest.json'}; remove "
                "the store and its copy in .dvc/cache, which DVC does not check by itself, then "
                "dvc repro -f extract_activations"
            )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """Size of all shards in bytes."""
        return int(self.frames.sum()) * self.width * STORAGE[self.dtype].itemsize

    @property
    def mean(self) -> np.ndarray:
        """Per-dimension mean over all train rows, float64 [width]."""
        return self._train("mean")

    @property
    def std(self) -> np.ndarray:
        """Per-dimension population standard deviation over all train rows, float64 [width]."""
        return self._train("std")

    def _train(self, key: str) -> np.ndarray:
        if not self.train_frames:
            raise StoreError(f"{self.folder} has no clip of split 'train', hence no {key}")
        return np.array(self.manifest["train"][key], dtype=np.float64)

    def _words(self, clip: int) -> np.ndarray:
        """Storage words [frames, width] of a clip, mapped, not read."""
        shard = int(self._shard_of[clip])
        if shard not in self._maps:
            entry = self.shards[shard]
            self._maps[shard] = np.memmap(
                self.folder / entry["file"],
                dtype=STORAGE[self.dtype],
                mode="r",
                shape=(entry["rows"], self.width),
            )
        return self._maps[shard][self._start[clip] : self._start[clip] + self.frames[clip]]

    def clip(self, i: int) -> np.ndarray:
        """Activations of clip i, float32 [frames, width]."""
        return decode(self._words(range(len(self))[i]), self.dtype)

    def clips(self, indices: Sequence[int]) -> np.ndarray:
        """Activations of clips of equal length, float32 [n, frames, width]."""
        lengths = sorted({int(self.frames[i]) for i in indices})
        if len(lengths) > 1:
            raise StoreError(f"{self.folder}: clips of {lengths} frames do not stack; use clip(i)")
        return np.stack([self.clip(int(i)) for i in indices])

    def train_batches(
        self,
        batch_size: int,
        seed: int,
        samples: int,
        select: np.ndarray | None = None,
        *,
        start_step: int = 0,
        buffer_mb: float = 256.0,
        rows: slice | None = None,
    ) -> Iterator[np.ndarray]:
        """Shuffled rows, float32 [batch_size, width], ``samples // batch_size`` batches in all.

        `select` is a mask over clips (default: split == "train"). Every epoch visits each
        selected row once; batches run on across epoch ends, so all have the same size.

        Shuffle: in each epoch the shards are permuted and taken, in that order, into windows of
        at most `buffer_mb` MiB of selected rows (at least one shard); a window is read front to
        back and emitted in uniformly random order. If all selected rows fit into the buffer the
        epoch is an exact uniform permutation; else rows mix within a window, and which shards
        share a window changes with the epoch. Keep the buffer several shards wide. Memory is one
        window plus one batch, however many clips there are.

        The orders depend on (seed, epoch) alone: ``start_step=n`` gives exactly what an unbroken
        run gives from batch n on, without reading what comes before. With `rows`, a slice from
        start to stop, only those rows of each batch are read and given.
        """
        chosen = self.split == "train" if select is None else np.asarray(select)
        if chosen.dtype != bool or chosen.shape != (len(self),):
            raise StoreError(f"select must be a mask of {len(self)} clips, got {chosen.shape}")
        members = [np.arange(*s["clips"])[chosen[slice(*s["clips"])]] for s in self.shards]
        counts = np.array([int(self.frames[m].sum()) for m in members], dtype=np.int64)
        if not (total := int(counts.sum())):
            raise StoreError(f"{self.folder}: no frames selected for training")
        steps = samples // batch_size
        if batch_size < 1 or steps < 1:
            raise StoreError(f"{samples} samples give no batch of {batch_size}")
        limit = buffer_mb * 2**20 / (self.width * STORAGE[self.dtype].itemsize)
        part = rows or slice(0, batch_size)
        return self._stream(
            members, counts, limit, batch_size, part, seed, start_step, steps, total
        )

    def _stream(
        self,
        members: list[np.ndarray],
        counts: np.ndarray,
        limit: float,
        batch_size: int,
        part: slice,
        seed: int,
        step: int,
        steps: int,
        total: int,
    ) -> Iterator[np.ndarray]:
        epoch, skip = divmod(step * batch_size, total)
        batch, filled = np.empty((part.stop - part.start, self.width), np.float32), 0
        while step < steps:
            rng = np.random.default_rng(seed_for(seed, "shuffle", epoch))
            for window in _windows(rng.permutation(np.flatnonzero(counts)), counts, limit):
                # Drawn even where it is skipped: a resumed epoch must use the same numbers.
                order = rng.permutation(int(counts[window].sum()))
                if skip >= len(order):
                    skip -= len(order)
                    continue
                buffer = self._load(window, members, len(order))
                position, skip = skip, 0
                while position < len(order):
                    take = order[position : position + batch_size - filled]
                    first, stop = max(filled, part.start), min(filled + len(take), part.stop)
                    if first < stop:
                        batch[first - part.start : stop - part.start] = decode(
                            buffer[take[first - filled : stop - filled]], self.dtype
                        )
                    position, filled = position + len(take), filled + len(take)
                    if filled == batch_size:
                        yield batch
                        step += 1
                        if step == steps:
                            return
                        batch, filled = np.empty_like(batch), 0
                del buffer  # before the next window is read, or two would be in memory
            epoch += 1

    def _load(self, window: Sequence[int], members: list[np.ndarray], rows: int) -> np.ndarray:
        """The selected rows of some shards as storage words [rows, width]."""
        buffer, at = np.empty((rows, self.width), STORAGE[self.dtype]), 0
        for shard in window:
            for clip in members[shard]:
                words = self._words(int(clip))
                buffer[at : at + len(words)] = words
                at += len(words)
            self._maps.pop(shard, None)  # unmap, or the pages would count as this process's
        return buffer


def _windows(shards: np.ndarray, counts: np.ndarray, limit: float) -> list[list[int]]:
    """Cut a list of shards into runs of at most `limit` rows, each of at least one shard."""
    windows: list[list[int]] = []
    rows = 0
    for shard in shards.tolist():
        if not windows or rows + counts[shard] > limit:
            windows.append([])
            rows = 0
        windows[-1].append(shard)
        rows += int(counts[shard])
    return windows
