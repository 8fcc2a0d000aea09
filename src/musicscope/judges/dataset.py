"""What the judges are trained and tested on: both soundfonts, and some of it through the codec.

Clips come from data/clips where it holds them; all others are rendered here under names of their
own. A chunk of clips is one file in a scratch folder, so that a killed run keeps what it made.
"""

from __future__ import annotations

import functools
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from musicscope.core.audio import resample
from musicscope.data.clips import ClipStore
from musicscope.data.taxonomy import FAMILIES
from musicscope.embedded.midi_set.corpus import make_clip
from musicscope.embedded.midi_set.embedded import FONTS, load_splits, load_synths
from musicscope.judges.musicnn import SAMPLE_RATE
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
    """Which of them, counted within the chunk, also go through the codec."""
    seconds: float
    seed: int

    @property
    def file(self) -> str:
        """Name in the scratch folder."""
        return f"{self.split}-{self.font}-{self.first:05d}.npz"


@dataclass(frozen=True)
class Heard:
    """The clips of a chunk."""

    audio: np.ndarray
    """float32 [n, samples], 16 kHz"""
    labels: np.ndarray
    """bool [n, families]"""
    groups: np.ndarray
    """[n] compositions"""
    coded: np.ndarray
    """Clips that also went through the codec, [m]"""
    codec: np.ndarray
    """Their reconstructions, float32 [m, samples]"""


def plan_chunks(
    store: ClipStore, split: str, font: str, clips: int, codec_clips: int, seed: int
) -> list[Chunk]:
    """Chunks of up to `clips` clips; those of the store if it has any such clip, else rendered.

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


def reconstruct(model: Any, audio: np.ndarray) -> np.ndarray:
    """Audio [n, samples] at 16 kHz through the model's codec and back, same shape and rate."""
    found = []
    for clip in audio:  # one at a time: it fits the cache and depends on no neighbour
        there = resample(clip[None], SAMPLE_RATE, model.sample_rate)
        back = model.decode(model.encode(there, [None]).codes).cpu().numpy()
        sound = resample(back[0], model.sample_rate, SAMPLE_RATE)[: audio.shape[1]]
        found.append(np.pad(sound, (0, audio.shape[1] - len(sound))))
    return np.stack(found) if found else np.zeros_like(audio)


@functools.lru_cache(maxsize=1)
def open_codec(model: str, device: str = "cpu") -> Any:
    """The model whose codec is used, loaded once a process."""
    return load_model(model, device)


@functools.lru_cache(maxsize=1)
def open_clips(folder: str) -> ClipStore:
    """The clip store, opened once a process."""
    return ClipStore.open(folder)


def _clips(chunk: Chunk, clips: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Audio, labels and compositions of a chunk."""
    if chunk.rows:
        store, rows = open_clips(clips), list(chunk.rows)
        table = store.rows.iloc[rows]
        audio = resample(store.audio(rows), store.sample_rate, SAMPLE_RATE)
        # Tables are laid out by column; what hashes labels wants them by row.
        labels = np.ascontiguousarray(table[[f"has_{f}" for f in FAMILIES]].to_numpy(bool))
        return audio, labels, table["group"].to_numpy(str)
    pieces, synths = load_splits(chunk.seed)[chunk.split], load_synths()
    made = [
        make_clip(
            pieces, synths, chunk.font, chunk.seed, "train_judge", chunk.split, i,
            seconds=chunk.seconds,
        )
        for i in range(chunk.first, chunk.first + chunk.count)
    ]  # fmt: skip
    labels = [[clip.labels()[f"has_{f}"] for f in FAMILIES] for clip in made]
    groups = np.array([clip.plan.group for clip in made], dtype=str)
    return np.stack([clip.audio for clip in made]), np.array(labels, bool), groups


def make_chunk(scratch: Path, clips: str, model: str, device: str, chunk: Chunk) -> int:
    """Write a chunk's file unless it is there; the number of its clips."""
    if _read(scratch / chunk.file) is None:
        audio, labels, groups = _clips(chunk, clips)
        torch.set_num_threads(1)
        codec = audio[:0]
        if chunk.coded:
            codec = reconstruct(open_codec(model, device), audio[list(chunk.coded)])
        arrays = {"labels": labels, "groups": groups, "codec": codec.astype(np.float16)}
        if not chunk.rows:  # those of the store need no second copy
            arrays["audio"] = audio.astype(np.float16)
        temporary = scratch / f".{chunk.file}.{os.getpid()}.tmp"
        try:
            with open(temporary, "wb") as stream:
                np.savez(stream, **arrays)
            os.replace(temporary, scratch / chunk.file)
        finally:
            temporary.unlink(missing_ok=True)
    return chunk.count


def _read(path: Path) -> dict[str, np.ndarray] | None:
    """A chunk's arrays; None if the file is absent or damaged (zip files carry a checksum)."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def read_chunk(scratch: Path, clips: str, chunk: Chunk) -> Heard:
    """The clips of a chunk whose file is there. ValueError if it is not."""
    if (found := _read(scratch / chunk.file)) is None:
        raise ValueError(f"{scratch / chunk.file} is missing or damaged; rerun train_judge")
    audio = found.get("audio")
    if audio is None:
        audio = _clips(chunk, clips)[0]
    return Heard(
        audio.astype(np.float32), found["labels"], found["groups"],
        np.array(chunk.coded, dtype=int), found["codec"].astype(np.float32),
    )  # fmt: skip


def batches(
    scratch: Path, clips: str, chunks: Sequence[Chunk]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(audio, labels) of all clips, each chunk's followed by its reconstructions."""
    for chunk in chunks:
        heard = read_chunk(scratch, clips, chunk)
        yield heard.audio, heard.labels
        if len(heard.coded):
            yield heard.codec, heard.labels[heard.coded]


__all__ = ["FONTS", "Chunk", "Heard", "batches", "make_chunk", "plan_chunks", "read_chunk"]
