"""The clip store: audio in shards of tens of megabytes, and one parquet table of what is in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from musicscope.artifacts import read_json, sha256, write_json
from musicscope.orchestration import FAMILIES

__all__ = ["FAMILIES", "ClipStore", "write_clips"]

FORMAT = 1
SHARD_BYTES = 32_000_000
PEAK = 32767  # samples are stored as 16-bit PCM


@dataclass(frozen=True)
class ClipStore:
    """Clips of one length. Row i of `rows` describes audio i."""

    folder: Path
    rows: pd.DataFrame
    """id, group, split, kind, pair_id, font, caption, target_family, families, programs,
    has_<family>, energy_<family>, tempo_bpm, density, key, source."""
    sample_rate: int
    samples: int
    """Samples a clip."""
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
                "run `dvc repro -f prepare_data`"
            )
        for name, entry in manifest["shards"].items():
            size = (folder / name).stat().st_size if (folder / name).exists() else -1
            if size != entry["bytes"]:
                raise ValueError(
                    f"{folder / name}: {size} bytes, expected {entry['bytes']}; "
                    "run `dvc repro -f prepare_data`"
                )
        return cls(
            folder, rows, manifest["sample_rate"], manifest["samples"], manifest["per_shard"]
        )

    def __len__(self) -> int:
        return len(self.rows)

    def audio(self, rows: Sequence[int]) -> np.ndarray:
        """Audio of the given row numbers, float32 [n, samples] in [-1, 1]."""
        out = np.empty((len(rows), self.samples), np.float32)
        for i, row in enumerate(rows):
            shard, offset = divmod(int(row), self.per_shard)
            out[i] = _shard(self.folder / shard_name(shard))[offset]
        return out / np.float32(PEAK)

    def select(self, **equal: object) -> np.ndarray:
        """Row numbers where every named column equals its value: ``select(split="test")``."""
        keep = np.ones(len(self.rows), bool)
        for column, value in equal.items():
            keep &= (self.rows[column] == value).to_numpy()
        return np.flatnonzero(keep)

    def verify(self) -> None:
        """Read every shard and compare its sha256 with the manifest's.

        Raises:
            ValueError: naming the first file that differs.
        """
        manifest = read_json(self.folder / "manifest.json")
        for name, entry in manifest["shards"].items():
            if sha256(self.folder / name) != entry["sha256"]:
                raise ValueError(
                    f"{self.folder / name} is corrupt; run `dvc repro -f prepare_data`"
                )


@lru_cache(maxsize=64)
def _shard(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def shard_name(index: int) -> str:
    """File name of the shard numbered `index`."""
    return f"audio-{index:05d}.npy"


def write_clips(
    folder: Path, clips: Iterable[tuple[np.ndarray, dict[str, object]]], sample_rate: int,
    samples: int,
) -> pd.DataFrame:  # fmt: skip
    """Write (audio float [samples], row) pairs into `folder`, the manifest last.

    Memory holds one shard, whatever the number of clips.

    Raises:
        ValueError: a clip of another length, not finite, or a repeated id; the clip is named.
    """
    per_shard = max(1, SHARD_BYTES // (2 * samples))
    table: list[dict[str, object]] = []
    seen: set[object] = set()
    shards: dict[str, dict[str, object]] = {}
    buffer: list[np.ndarray] = []

    def flush() -> None:
        path = folder / shard_name(len(shards))
        np.save(path, np.stack(buffer))
        shards[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
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
    frame.to_parquet(folder / "clips.parquet", index=False)
    write_json(
        folder / "manifest.json",
        {"format": FORMAT, "clips": len(frame), "sample_rate": sample_rate, "samples": samples,
         "per_shard": per_shard, "shards": shards,
         "clips.parquet": sha256(folder / "clips.parquet")},
    )  # fmt: skip
    return frame
