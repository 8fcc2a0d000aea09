"""Write an activation store: its shards in any order, twice, with kills in between."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from musicscope.activations.store import (
    CLIP_COLUMNS,
    FORMAT,
    FORMAT_VERSION,
    ActivationStore,
    StoreError,
    decode,
    digest,
    encode,
    storage,
)
from musicscope.core.io import atomic_file, read_json, sha256, write_text


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

    def to_json(self) -> dict[str, Any]:
        return self.__dict__ | {"mean": self.mean.tolist(), "m2": self.m2.tolist()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Moments:
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
        config: dict[str, Any],
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

    def _finished(self, shard: int) -> dict[str, Any] | None:
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
        found = [self._finished(i) for i in range(len(self.spans))]
        records = [record for record in found if record is not None]
        if absent := [i for i, record in enumerate(found) if record is None]:
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
        train: dict[str, Any] = {"frames": total.count}
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
