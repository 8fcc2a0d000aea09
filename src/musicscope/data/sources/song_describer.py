"""Song Describer: renumics' parquet with the audio inside, or Zenodo's CSV, mp3s and tag table."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from musicscope.config import PrepareData
from musicscope.data.sources import labels
from musicscope.data.sources.jamendo_tags import read_tags
from musicscope.data.sources.recordings import (
    Audio,
    Problem,
    Recording,
    Scan,
    find_audio,
    find_file,
    last_two,
    unsafe,
)

COLUMNS = ["caption_id", "track_id", "caption", "is_valid_subset", "artist_id", "path"]
SUFFIX = ".2min.mp3"
"""Zenodo's files are 00/<id>.2min.mp3, its CSV says 00/<id>.mp3."""


@dataclass(frozen=True)
class Row:
    """One caption; several may speak of one track."""

    caption: str
    track: int
    artist: int
    valid: bool
    path: str


def parquet_files(folder: Path) -> tuple[Path, ...]:
    """renumics/song-describer-dataset's shards, in order."""
    for inside in ("data", "."):
        if found := sorted((folder / inside).glob("train-*.parquet")):
            return tuple(found)
    return ()


def read_captions(folder: Path) -> tuple[list[Row], list[Problem], tuple[Path, ...]]:
    """Captions of either layout without their audio, bad rows, and the files they came from.

    Raises:
        FileNotFoundError: neither layout is there.
        ValueError: a column is missing.
    """
    shards = parquet_files(folder)
    table = find_file(folder, "song_describer.csv")
    rows: list[tuple[str, dict]] = []
    if shards:
        for path in shards:
            names = pq.read_schema(path).names
            _check_columns(path, names)
            # The column called path holds the audio itself: gigabytes.
            few = [c for c in COLUMNS if c != "path"]
            for i, row in enumerate(pq.read_table(path, columns=few).to_pylist()):
                rows.append((f"{path.name}:{i}", {**row, "path": ""}))
    elif table:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            _check_columns(table, reader.fieldnames or [])
            rows = [(f"{table.name}:{reader.line_num}", row) for row in reader]
    else:
        raise FileNotFoundError(
            f"{folder} holds no data/train-*.parquet (renumics/song-describer-dataset) and no "
            "song_describer.csv (Zenodo 10072001)"
        )
    good, problems = [], []
    for where, row in rows:
        try:
            track, artist = int(row["track_id"]), int(row["artist_id"])
        except (TypeError, ValueError):
            problems.append(Problem(where, "bad metadata row", "track_id or artist_id"))
            continue
        if not isinstance(row["caption"], str) or not isinstance(row["path"], str):
            problems.append(Problem(where, "bad metadata row", "caption or path"))
        elif table and not shards and unsafe(row["path"]):
            problems.append(Problem(row["path"], "unsafe path", where))
        else:
            valid = str(row["is_valid_subset"]).strip().lower() == "true"
            good.append(Row(row["caption"], track, artist, valid, row["path"]))
    return good, problems, shards or (table,)


def _check_columns(path: Path, names: list[str]) -> None:
    if missing := [c for c in COLUMNS if c not in names]:
        raise ValueError(f"{path} lacks the columns {missing}; it has {list(names)}")


def read_track_tags(config: PrepareData) -> tuple[dict[int, frozenset[str]], tuple[Path, ...]]:
    """Track id -> MTG-Jamendo's instrument tags, from the table named or the one at hand."""
    settings = config.recordings
    path = Path(settings.tags) if settings.tags else None
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"prepare_data.recordings.tags: {path} does not exist")
    path = path or find_file(Path(settings.folder), "song_describer.mtg-jamendo.tsv")
    if path is None:
        return {}, ()
    tracks, _ = read_tags(path)
    return {t.track: t.tags for t in tracks}, (path,)


def scan(config: PrepareData, seed: int) -> Scan:
    """One recording a track with all its captions, one group an artist; splits are drawn."""
    settings = config.recordings
    folder = Path(settings.folder)
    rows, problems, files = read_captions(folder)
    tags, tag_files = read_track_tags(config)
    by_track: dict[int, list[Row]] = {}
    for row in rows:
        by_track.setdefault(row.track, []).append(row)
    embedded = bool(parquet_files(folder))
    recordings, pairs = [], []
    for track, told in by_track.items():
        told.sort(key=lambda row: not row.valid)  # stable: the valid captions first
        answers = [labels.from_caption(r.caption) for r in told]
        if track in tags:
            tagged = labels.from_tags(tags[track], settings.min_tags)
            pairs.append((labels.merge_answers(answers)["guitar"], tagged["guitar"]))
            answers.append(tagged)
        path = told[0].path.removesuffix(".mp3") + (settings.audio_suffix or SUFFIX)
        recordings.append(
            Recording(
                name=f"track_{track}" if embedded else path,
                key=str(track) if embedded else last_two(path),
                id=f"songdescriber-{track}", group=f"jamendo-artist-{told[0].artist}", split="",
                labels=labels.merge(answers), captions=tuple(r.caption for r in told),
                artist=str(told[0].artist),
            )
        )  # fmt: skip
    counts = Counter(captions=len(rows), tracks=len(by_track), tracks_with_tags=len(pairs))
    facts = {
        "rows": dict(counts),
        "label_rule": "all captions of a track, and its instrument tags where a tag table is "
        "given; either is enough. " + labels.CAPTION_RULE + " Tags: " + labels.TAG_RULE,
        "guitar_captions_against_tags": labels.agreement(pairs),
        "mtg_jamendo": "the audio is the test part of MTG-Jamendo's split 0: test nothing on these "
        "that has learnt from it, nor the reverse",
    }
    if embedded:
        audio = Audio("parquet", files)
    else:
        audio = find_audio(settings.folder, settings.audio, "audio")
    listed = frozenset(r.key for r in recordings)
    return Scan(tuple(recordings), audio, tuple(problems), facts, (*files, *tag_files), listed)
