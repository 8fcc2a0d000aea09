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
rerun after a kill keeps it. Shard i depends on the configuration and on i
only: any process may write any shard, in any order, twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict, cast

import numpy as np
import pandas as pd

from musicscope.core.io import atomic_file, read_json, sha256, write_text
from musicscope.core.seeding import seed_for

FORMAT, FORMAT_VERSION = "musicscope.activations", 1
CLIP_COLUMNS = ("id", "split", "font", "kind", "group", "frames")
# bfloat16 is unknown to numpy: it travels as the upper half of a float32.
STORAGE = {"float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2")}
FLOAT16_MAX = 65504.0


class StoreConfig(TypedDict, total=False):
    """Source of the values; part of a store's identity."""

    model: str
    layer: str
    frame_rate: float
    sample_rate: int
    model_sha256: str
    clips_sha256: str
    captions: bool
    batch_clips: int
    aligned: dict[str, str | float]
    """See `alignment.aligned_store`."""


class Shard(TypedDict):
    """Entry of the manifest."""

    file: str
    clips: list[int]
    rows: int
    sha256: str


class Train(TypedDict, total=False):
    """Statistics over the rows of split "train"; without such rows `frames` alone."""

    frames: int
    mean: list[float]
    std: list[float]
    mean_norm: float


class Manifest(TypedDict):
    """Content of manifest.json."""

    format: str
    format_version: int
    config: StoreConfig
    config_sha256: str
    width: int
    dtype: str
    shards: list[Shard]
    clips: dict[str, list]
    train: Train
    sha256: str


class MomentsRecord(TypedDict):
    """`Moments` as JSON."""

    count: int
    mean: list[float]
    m2: list[float]
    norm_sum: float


class Finished(TypedDict):
    """Note beside a shard of a store that is being written."""

    config_sha256: str
    sha256: str
    moments: MomentsRecord


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


def digest(value: object) -> str:
    """sha256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class ActivationStore:
    """Read access to a finished store; shards are memory-mapped, values come out as float32.

    Attributes: ``folder``, ``config`` (dict), ``width``, ``dtype``, ``ids`` (list of str),
    ``frames`` (int [n]), ``split`` (str [n]), ``rows`` (DataFrame: CLIP_COLUMNS + first_row),
    ``train_frames``, ``shards``.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.config, self.shards = manifest["config"], manifest["shards"]
        self.width, self.dtype = manifest["width"], manifest["dtype"]
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
        store = cls(folder, cast(Manifest, manifest))
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

    def _train(self, key: Literal["mean", "std"]) -> np.ndarray:
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

        def batches(step: int) -> Iterator[np.ndarray]:
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

        return batches(start_step)

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


# ---- writing


def shard_spans(
    frames: Sequence[int], width: int, dtype: str, shard_mb: float
) -> list[tuple[int, int]]:
    """Cut clips into half-open ranges of at most `shard_mb` MiB each, but at least one clip."""
    if shard_mb <= 0:
        raise StoreError(f"shard_mb is {shard_mb}; give a positive size, tens of MB are best")
    limit = shard_mb * 2**20 / (width * storage(dtype).itemsize)
    spans, start, rows = [], 0, 0
    for i, count in enumerate(frames):
        if i > start and rows + count > limit:
            spans.append((start, i))
            start, rows = i, 0
        rows += int(count)
    return [*spans, (start, len(frames))] if len(frames) > start else spans


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of rows [n, d], in float64; `+` merges."""

    count: int
    mean: np.ndarray
    m2: np.ndarray
    norm_sum: float

    @classmethod
    def of(cls, rows: np.ndarray) -> Moments:
        rows = rows.astype(np.float64)
        if not len(rows):
            return cls(0, np.zeros(rows.shape[1]), np.zeros(rows.shape[1]), 0.0)
        mean = rows.mean(axis=0)
        norms = float(np.sqrt(np.square(rows).sum(axis=1)).sum())
        return cls(len(rows), mean, np.square(rows - mean).sum(axis=0), norms)

    def __add__(self, other: Moments) -> Moments:
        """Chan, Golub, LeVeque (1983), eq. 2.1."""
        count = self.count + other.count
        if not other.count or not self.count:
            return other if not self.count else self
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * (other.count / count),
            self.m2 + other.m2 + np.square(delta) * (self.count * other.count / count),
            self.norm_sum + other.norm_sum,
        )

    def to_json(self) -> MomentsRecord:
        mean, m2 = self.mean.tolist(), self.m2.tolist()
        return {"count": self.count, "mean": mean, "m2": m2, "norm_sum": self.norm_sum}

    @classmethod
    def from_json(cls, value: MomentsRecord) -> Moments:
        mean, m2 = np.array(value["mean"]), np.array(value["m2"])
        return cls(value["count"], mean, m2, value["norm_sum"])


class StoreWriter:
    """Write the shards of one store, idempotently; `finish` turns the folder into a store.

    `clips` has the columns of CLIP_COLUMNS; `spans` are clip ranges from `shard_spans`; `config`
    is any JSON-able description of the source of the values and becomes part of the identity.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        width: int,
        dtype: str,
        clips: pd.DataFrame,
        spans: Sequence[tuple[int, int]],
        config: StoreConfig,
    ) -> None:
        storage(dtype)
        if missing := [c for c in CLIP_COLUMNS if c not in clips]:
            raise StoreError(f"the clip table lacks the columns {missing}")
        if len(ids := clips["id"].astype(str)) != ids.nunique():
            raise StoreError(f"clip id {ids[ids.duplicated()].iloc[0]!r} occurs more than once")
        if [a for a, _ in spans] != [0, *(b for _, b in spans)][: len(spans)] or (
            len(clips) != (spans[-1][1] if spans else 0)
        ):
            raise StoreError(f"the spans {list(spans)} do not cover {len(clips)} clips in order")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.width, self.dtype, self.spans = width, dtype, [(int(a), int(b)) for a, b in spans]
        self.clips = {c: clips[c].astype(str).tolist() for c in CLIP_COLUMNS[:-1]}
        self.clips["frames"] = [int(f) for f in clips["frames"]]
        starts = np.concatenate([[0], np.cumsum(self.clips["frames"])])
        self.clips["first_row"] = [int(r) for r in starts[:-1]]
        self.identity = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "config": config,
            "width": width,
            "dtype": dtype,
            "clips": self.clips,
        }
        self.config_sha256 = digest({**self.identity, "spans": self.spans})

    def _files(self, shard: int) -> tuple[Path, Path]:
        stem = self.folder / f"shard-{shard:05d}"
        return stem.with_suffix(".bin"), stem.with_suffix(".json")

    def _finished(self, shard: int) -> Finished | None:
        """Read the record of a shard that an earlier writer of this configuration left whole."""
        data, note = self._files(shard)
        if not (data.exists() and note.exists()):
            return None
        try:
            record = read_json(note)
        except ValueError:
            return None
        same = isinstance(record, dict) and record.get("config_sha256") == self.config_sha256
        return record if same and sha256(data) == record["sha256"] else None

    def has(self, shard: int) -> bool:
        """Tell whether the shard is on disk for this configuration with the right hash."""
        return self._finished(shard) is not None

    def write(self, shard: int, arrays: Sequence[np.ndarray]) -> None:
        """Write shard `shard` from the float32 [frames, width] arrays of its clips, in order."""
        first, stop = self.spans[shard]
        if len(arrays) != stop - first:
            raise StoreError(f"shard {shard} takes {stop - first} clips, got {len(arrays)}")
        data, note = self._files(shard)
        hasher, moments = hashlib.sha256(), Moments.of(np.empty((0, self.width)))
        with atomic_file(data) as temporary, open(temporary, "wb") as stream:
            for clip, values in zip(range(first, stop), arrays, strict=True):
                name, shape = self.clips["id"][clip], (self.clips["frames"][clip], self.width)
                if values.shape != shape:
                    raise StoreError(f"clip {name!r}: got {values.shape}, expected {shape}")
                words = encode(values, self.dtype, f"clip {name!r}")
                if self.clips["split"][clip] == "train":
                    moments += Moments.of(decode(words, self.dtype))
                content = words.tobytes()
                hasher.update(content)
                stream.write(content)
        record = {
            "config_sha256": self.config_sha256,
            "sha256": hasher.hexdigest(),
            "moments": moments.to_json(),
        }
        # Not write_json: the moments keep all their digits.
        write_text(note, json.dumps(record))

    def finish(self) -> ActivationStore:
        """Merge the statistics, write the manifest last, and open the store."""
        finished = {i: self._finished(i) for i in range(len(self.spans))}
        records = [record for record in finished.values() if record is not None]
        if absent := [i for i, record in finished.items() if record is None]:
            raise StoreError(f"{self.folder}: shards {absent} are not written or damaged")
        total = Moments.of(np.empty((0, self.width)))
        shards = []
        for i, (record, (first, stop)) in enumerate(zip(records, self.spans, strict=True)):
            total += Moments.from_json(record["moments"])
            rows = sum(self.clips["frames"][first:stop])
            shards.append(
                {
                    "file": self._files(i)[0].name,
                    "clips": [first, stop],
                    "rows": rows,
                    "sha256": record["sha256"],
                }
            )
        train: Train = {"frames": total.count}
        if total.count:
            train["mean"] = total.mean.tolist()
            train["std"] = np.sqrt(total.m2 / total.count).tolist()
            train["mean_norm"] = total.norm_sum / total.count
        manifest = {
            **self.identity,
            "config_sha256": self.config_sha256,
            "shards": shards,
            "train": train,
        }
        manifest["sha256"] = digest(manifest)
        write_text(self.folder / "manifest.json", json.dumps(manifest, sort_keys=True))
        for leftover in [*self.folder.glob("shard-*.json"), *self.folder.glob(".shard-*.tmp*")]:
            leftover.unlink(missing_ok=True)
        return ActivationStore.open(self.folder)
