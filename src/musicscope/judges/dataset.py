"""Clips to train and test the judges on: both soundfonts, some of them also through the codec.

Clips come from data/clips where it holds them; all others are rendered under names of their own.
A chunk of clips is one file in a scratch folder, so that a killed run keeps its finished chunks.
"""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from musicscope.core.audio import resample
from musicscope.core.io import atomic_file
from musicscope.data.clips import ClipStore
from musicscope.data.taxonomy import FAMILIES
from musicscope.judges.musicnn import SAMPLE_RATE
from musicscope.models.interface import LanguageModel, language_model
from musicscope.models.registry import load_model

CHUNK = 20


@dataclass(frozen=True)
class Chunk:
    """A run of clips of one split and soundfont that one process makes."""

    split: str
    font: str
    first: int
    count: int
    rows: tuple[int, ...]
    """Rows of data/clips; empty: they are rendered."""
    coded: tuple[int, ...]
    """Clips, numbered within the chunk, that also go through the codec."""
    seconds: float
    seed: int
    names: tuple[str, ...] = ()
    """Defined concepts whose labels are read, of rows of data/clips; empty: families."""

    @property
    def file(self) -> str:
        """Name in the scratch folder."""
        return f"{self.split}-{self.font}-{self.first:05d}.npz"


Clips = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Audio float32 [n, samples] at 16 kHz, labels bool [n, families], compositions [n]. Of defined
concepts labels are float32 [n, concepts], NaN where unknown."""


@dataclass(frozen=True)
class Inputs:
    """Where a run of train_judge reads and works; picklable."""

    scratch: Path
    clips: str
    """Folder of the clip store."""
    codec: str
    """Folder of the model whose codec is used."""
    musicnn: Path
    """Wheel of musicnn."""
    render: Callable[[Chunk], Clips]
    """Renders the clips of a chunk without rows."""
    device: str = "cpu"


@dataclass(frozen=True)
class ChunkData:
    """The clips of a chunk."""

    audio: np.ndarray
    """float32 [n, samples], 16 kHz"""
    labels: np.ndarray
    """bool [n, families], or float32 [n, concepts] as in `Clips`"""
    groups: np.ndarray
    """[n] compositions"""
    coded: np.ndarray
    """Clips that also went through the codec, [m]"""
    codec: np.ndarray
    """Their reconstructions, float32 [m, samples]"""


def plan_chunks(
    store: ClipStore, split: str, font: str, clips: int, codec_clips: int, seed: int
) -> list[Chunk]:
    """Plan chunks of up to `clips` clips: of the store if it has any such clip, else rendered.

    `codec_clips` of them, spread evenly, also go through the codec.
    """
    rows = store.select(split=split, kind="clip", font=font)[:clips].tolist()
    total = len(rows) if rows else clips
    codec_clips = min(codec_clips, total)
    coded = [(i + 1) * codec_clips // total > i * codec_clips // total for i in range(total)]
    seconds = store.samples / store.sample_rate
    return [
        Chunk(
            split, font, first, len(coded[first : first + CHUNK]),
            tuple(rows[first : first + CHUNK]),
            tuple(np.flatnonzero(coded[first : first + CHUNK]).tolist()), seconds, seed,
        )
        for first in range(0, total, CHUNK)
    ]  # fmt: skip


def reconstruct(model: LanguageModel, audio: np.ndarray) -> np.ndarray:
    """Encode and decode audio [n, samples] at 16 kHz by the model's codec; same shape and rate."""
    rebuilt = np.zeros_like(audio)
    for i, clip in enumerate(audio):  # one by one: fits the cache, and no neighbour matters
        there = resample(clip[None], SAMPLE_RATE, model.sample_rate)
        back = model.decode(model.encode(there, [None]).codes).cpu().numpy()
        sound = resample(back[0], model.sample_rate, SAMPLE_RATE)[: audio.shape[1]]
        rebuilt[i, : len(sound)] = sound
    return rebuilt


@functools.lru_cache(maxsize=1)
def open_codec(model: str, device: str = "cpu") -> LanguageModel:
    """Load the model whose codec is used, once per process."""
    return language_model(load_model(model, device))


@functools.lru_cache(maxsize=1)
def open_clips(folder: str) -> ClipStore:
    """Open the clip store, once per process."""
    return ClipStore.open(folder)


def labels_of(store: ClipStore, rows: Sequence[int]) -> np.ndarray:
    """Read the families of clips: bool [n, families], C-contiguous (training hashes them)."""
    table = store.rows.iloc[list(rows)]
    return np.ascontiguousarray(table[[f"has_{f}" for f in FAMILIES]].to_numpy(bool))


def known_or_nan(store: ClipStore, rows: Sequence[int], names: Sequence[str]) -> np.ndarray:
    """Read the labels of defined concepts: float32 [n, concepts], NaN where unknown."""
    table = store.rows.iloc[list(rows)][[f"has_{name}" for name in names]]
    return table.astype("boolean").to_numpy(np.float32, na_value=np.nan)


def _clips(inputs: Inputs, chunk: Chunk) -> Clips:
    if not chunk.rows:
        return inputs.render(chunk)
    store, rows = open_clips(inputs.clips), list(chunk.rows)
    audio = resample(store.audio(rows), store.sample_rate, SAMPLE_RATE)
    labels = known_or_nan(store, rows, chunk.names) if chunk.names else labels_of(store, rows)
    return audio, labels, store.rows["group"].iloc[rows].to_numpy(str)


def make_chunk(inputs: Inputs, chunk: Chunk) -> int:
    """Write a chunk's file unless it exists; return the number of its clips."""
    path = inputs.scratch / chunk.file
    if _read(path) is None:
        audio, labels, groups = _clips(inputs, chunk)
        torch.set_num_threads(1)
        codec = audio[:0]
        if chunk.coded:
            codec = reconstruct(open_codec(inputs.codec, inputs.device), audio[list(chunk.coded)])
        arrays = {"labels": labels, "groups": groups, "codec": codec.astype(np.float16)}
        if not chunk.rows:  # clips of the store need no second copy
            arrays["audio"] = audio.astype(np.float16)
        with atomic_file(path) as temporary:
            np.savez(temporary, **arrays)  # ty: ignore[invalid-argument-type]  arrays by name
    return chunk.count


def _read(path: Path) -> dict[str, np.ndarray] | None:
    """A chunk's arrays; None if the file is absent or damaged (zip files carry a checksum)."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def read_chunk(inputs: Inputs, chunk: Chunk) -> ChunkData:
    """Read the clips of a finished chunk. ValueError if its file is missing or damaged."""
    path = inputs.scratch / chunk.file
    if (arrays := _read(path)) is None:
        raise ValueError(f"{path} is missing or damaged; rerun train_judge")
    audio = arrays["audio"] if "audio" in arrays else _clips(inputs, chunk)[0]
    return ChunkData(
        audio.astype(np.float32), arrays["labels"], arrays["groups"],
        np.array(chunk.coded, dtype=int), arrays["codec"].astype(np.float32),
    )  # fmt: skip


def batches(inputs: Inputs, chunks: Sequence[Chunk]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (audio, labels) of all clips, each chunk followed by its reconstructions."""
    for chunk in chunks:
        data = read_chunk(inputs, chunk)
        yield data.audio, data.labels
        if len(data.coded):
            yield data.codec, data.labels[data.coded]
