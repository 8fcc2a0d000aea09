"""The clip store: audio in shards of tens of megabytes, and a parquet table with a row per clip."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from musicscope.core.audio import resample
from musicscope.core.io import read_json, sha256, write_json, write_text

FORMAT = 1
SHARD_BYTES = 32_000_000
PEAK = 32767  # samples are stored as 16-bit PCM
HELD_OUT_FONT = "fluidr3mono"
PROGRESS = "progress.json"
REMEDY = "run `dvc repro -f prepare_data`"


Rows = Sequence[int] | np.ndarray
"""Row numbers of a table."""


class Clips(Protocol):
    """Clips of one length and sample rate. Row i of `rows` describes audio i."""

    @property
    def rows(self) -> pd.DataFrame: ...
    @property
    def sample_rate(self) -> int: ...
    @property
    def samples(self) -> int: ...
    def __len__(self) -> int: ...
    def audio(self, rows: Rows) -> np.ndarray: ...


@dataclass(frozen=True)
class ClipStore:
    """Clips on disk."""

    folder: Path
    rows: pd.DataFrame
    """id, group, split, kind, pair_id, font, caption, target_family, families, has_<family>,
    tempo_bpm, key, source; of rendered clips also programs, density, energy_<family> and
    sound_<family> (soundfont or synthesis that plays it, "" if it does not play), of recordings
    recording, start, artist, captions. Where a label is unknown, has_<family> is of pandas'
    nullable type and holds NA there: see `known_labels`."""
    sample_rate: int
    samples: int
    """Samples per clip."""
    per_shard: int

    @classmethod
    def open(cls, folder: str | Path = "data/clips") -> ClipStore:
        """Open a store written by `write_clips`.

        Raises:
            FileNotFoundError: no store there; the message names the stage to run.
            ValueError: the table and the shards disagree, or a shard was cut short.
        """
        folder = Path(folder)
        if not (folder / "manifest.json").is_file():
            raise FileNotFoundError(f"{folder} holds no clips; run `dvc repro prepare_data`")
        manifest = read_json(folder / "manifest.json")
        if manifest["format"] != FORMAT:
            raise ValueError(f"{folder}: format {manifest['format']}, this version reads {FORMAT}")
        rows = pd.read_parquet(folder / "clips.parquet")
        if len(rows) != manifest["clips"]:
            raise ValueError(
                f"{folder}/clips.parquet has {len(rows)} rows, the manifest {manifest['clips']}; "
                + REMEDY
            )
        for name, entry in manifest["shards"].items():
            size = (folder / name).stat().st_size if (folder / name).exists() else -1
            if size != entry["bytes"]:
                raise ValueError(
                    f"{folder / name}: {size} bytes, expected {entry['bytes']}; {REMEDY}"
                )
        return cls(
            folder, rows, manifest["sample_rate"], manifest["samples"], manifest["per_shard"]
        )

    def __len__(self) -> int:
        return len(self.rows)

    def audio(self, rows: Rows) -> np.ndarray:
        """Audio of the given row numbers, float32 [n, samples] in [-1, 1]."""
        out = np.empty((len(rows), self.samples), np.float32)
        for i, row in enumerate(rows):
            shard, offset = divmod(int(row), self.per_shard)
            out[i] = _shard(self.folder / shard_name(shard))[offset]
        return out / np.float32(PEAK)

    def select(self, **equal: object) -> np.ndarray:
        """Row numbers where every named column equals its value: ``select(split="test")``.

        An unknown label equals neither True nor False.
        """
        keep = np.ones(len(self.rows), bool)
        for column, value in equal.items():
            keep &= (self.rows[column] == value).fillna(False).to_numpy(bool)
        return np.flatnonzero(keep)

    def verify(self) -> None:
        """Read every shard and compare its sha256 with the manifest's.

        Raises:
            ValueError: naming the first file that differs.
        """
        manifest = read_json(self.folder / "manifest.json")
        for name, entry in manifest["shards"].items():
            if sha256(self.folder / name) != entry["sha256"]:
                raise ValueError(f"{self.folder / name} is corrupt; {REMEDY}")


@lru_cache(maxsize=64)
def _shard(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


@dataclass(frozen=True)
class ResampledClips:
    """Clips as if their audio had been stored at `sample_rate`."""

    clips: Clips
    sample_rate: int

    @property
    def rows(self) -> pd.DataFrame:
        return self.clips.rows

    @property
    def samples(self) -> int:
        """Samples per clip."""
        return math.ceil(self.clips.samples * self.sample_rate / self.clips.sample_rate)

    def __len__(self) -> int:
        return len(self.clips.rows)

    def audio(self, rows: Rows) -> np.ndarray:
        """Audio of the given row numbers, float32 [n, samples]."""
        return resample(self.clips.audio(rows), self.clips.sample_rate, self.sample_rate)


def at_rate(clips: Clips, sample_rate: int) -> Clips:
    """Give the clips themselves if they have that rate, else clips resampled as they are read."""
    return clips if clips.sample_rate == sample_rate else ResampledClips(clips, sample_rate)


def shard_name(index: int) -> str:
    """File name of the shard numbered `index`."""
    return f"audio-{index:05d}.npy"


def main_clips(rows: pd.DataFrame, split: str) -> np.ndarray:
    """Row numbers of the clips of a split that features are learnt or tested on.

    Single clips of all sounds except the held-out soundfont's: mixed renderings, or recordings.
    """
    wanted = (rows["kind"] == "clip") & (rows["font"] != HELD_OUT_FONT) & (rows["split"] == split)
    return np.flatnonzero(wanted)


def known_labels(
    rows: pd.DataFrame, family: str, at: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers out of `at` (default: all) with a known label, and their labels, bool."""
    at = np.arange(len(rows)) if at is None else np.asarray(at)
    has = rows[f"has_{family}"].iloc[at]
    known = has.notna().to_numpy()
    return at[known], has[known].to_numpy(bool)


def written(folder: Path) -> Any:
    """State that `write_clips` kept after the last whole shard of a killed run, or None."""
    path = folder / PROGRESS
    return read_json(path)["state"] if path.is_file() else None


def forget_progress(folder: Path) -> None:
    """Remove the state that `write_clips` keeps for resuming."""
    for path in (folder / PROGRESS, *folder.glob("rows-*.json")):
        path.unlink(missing_ok=True)


def write_clips(
    folder: Path, clips: Iterable[tuple[np.ndarray, dict[str, object]]], sample_rate: int,
    samples: int, state: Callable[[], object] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Write (audio float [samples], row) pairs into `folder`, the manifest last.

    Memory holds one shard, whatever the number of clips. With `state`, a killed run can resume:
    after each shard its rows and the JSON-able result of `state()` are kept in `folder`. The next
    call keeps these shards, and its `clips` must begin after theirs (see `written`).

    Raises:
        ValueError: a clip of another length, not finite, or a repeated id; the clip is named.
    """
    per_shard = max(1, SHARD_BYTES // (2 * samples))
    table: list[dict[str, object]] = []
    seen: set[object] = set()
    shards: dict[str, dict[str, object]] = {}
    buffer: list[np.ndarray] = []
    if state is not None and (folder / PROGRESS).is_file():
        shards = read_json(folder / PROGRESS)["shards"]
        for number in range(len(shards)):
            table += read_json(folder / f"rows-{number:05d}.json")
        seen = {row["id"] for row in table}

    def flush() -> None:
        path = folder / shard_name(len(shards))
        np.save(path, np.stack(buffer))
        shards[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        if state is not None:
            rows = json.dumps(table[-len(buffer) :])  # exact, where write_json rounds
            write_text(folder / f"rows-{len(shards) - 1:05d}.json", rows)
            write_json(folder / PROGRESS, {"shards": shards, "state": state()})
        buffer.clear()

    for audio, row in clips:
        if audio.shape != (samples,) or not np.isfinite(audio).all():
            raise ValueError(f"clip {row['id']}: expected {samples} finite samples")
        if row["id"] in seen:
            raise ValueError(f"clip {row['id']} appears twice")
        seen.add(row["id"])
        buffer.append(np.round(np.clip(audio, -1, 1) * PEAK).astype(np.int16))
        table.append(row)
        if len(buffer) == per_shard:
            flush()
    if buffer:
        flush()
    frame = pd.DataFrame(table)
    for column in frame.columns:
        if column.startswith("has_") and frame[column].dtype != bool:  # None: unknown
            frame[column] = frame[column].astype("boolean")
    frame.to_parquet(folder / "clips.parquet", index=False)
    write_json(
        folder / "manifest.json",
        {"format": FORMAT, "clips": len(frame), "sample_rate": sample_rate, "samples": samples,
         "per_shard": per_shard, "shards": shards,
         "clips.parquet": sha256(folder / "clips.parquet")},
    )  # fmt: skip
    return frame
