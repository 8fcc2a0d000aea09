"""Tracks of Jamendo: MTG-Jamendo and Song Describer, whose audio is the test part of its split 0.

MTG-Jamendo (MTG/mtg-jamendo-dataset) has tag tables by artist-disjoint splits and whole tracks.
Song Describer has captions of two minutes per track: renumics' parquet with the audio inside, or
Zenodo's CSV, mp3s and tag table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from musicscope.config import PrepareData
from musicscope.core.io import read_text
from musicscope.data.audio_files import Problem
from musicscope.data.concepts import Concepts
from musicscope.data.sources import labels
from musicscope.data.sources.archives import archive_errors
from musicscope.data.sources.recordings import (
    BAD_ROW,
    SPLITS,
    Audio,
    Recording,
    Scan,
    find_audio,
    find_file,
    last_two,
    make_id,
    read_csv,
    unsafe,
)

TAG_HEADER = ["TRACK_ID", "ARTIST_ID", "ALBUM_ID", "PATH", "DURATION", "TAGS"]
TAG_CATEGORY = "instrument---"
CAPTION_COLUMNS = ["caption_id", "track_id", "caption", "is_valid_subset", "artist_id", "path"]
SUFFIX = ".mp3"
DESCRIBER_SUFFIX = ".2min.mp3"
"""Zenodo's files are 00/<id>.2min.mp3, its CSV says 00/<id>.mp3."""


@dataclass(frozen=True)
class Track:
    """One row of a tag table."""

    track: int
    artist: int
    path: str
    tags: frozenset[str]
    """Instrument tags without their prefix."""
    others: frozenset[str] = frozenset()
    """Tags of other categories (genre, mood), without their prefix."""


@dataclass(frozen=True)
class Caption:
    """One caption; a track may have several."""

    text: str
    track: int
    artist: int
    valid: bool
    path: str


def _trailing_number(text: str) -> int:
    """Parse `track_0000001` as 1."""
    return int(text.rsplit("_", 1)[-1])


def _whole(value: object) -> int:
    """Convert an id, also from the float columns of tables with gaps."""
    if not (result := float(str(value))).is_integer():
        raise ValueError(f"{value!r} is no whole number")
    return int(result)


def read_tags(path: Path) -> tuple[list[Track], list[Problem]]:
    """Read a tag table with one tab column per tag and CRLF line ends; bad rows are problems.

    Raises:
        ValueError: the header differs.
    """
    tracks, problems = [], []
    # Split by hand: the header names six columns, rows have one more for each further tag.
    lines = read_text(path).split("\n")
    if lines[0].split("\t") != TAG_HEADER:
        raise ValueError(f"{path}: the first line is {lines[0][:80]!r}, expected {TAG_HEADER}")
    for number, line in enumerate(lines[1:], start=2):
        columns = [column.strip() for column in line.split("\t")]
        if columns == [""]:
            continue
        where = f"{path.name}:{number}"
        try:
            track, artist = (_trailing_number(c) for c in columns[:2])
            file = columns[3]
        except (IndexError, ValueError):
            problems.append(Problem(where, BAD_ROW, line[:80]))
            continue
        if unsafe(file):
            problems.append(Problem(file, "unsafe path", where))
            continue
        tags = frozenset(
            t.removeprefix(TAG_CATEGORY).lower() for t in columns[5:] if t.startswith(TAG_CATEGORY)
        )
        others = frozenset(
            t.rpartition("---")[2].lower() for t in columns[5:]
            if t and not t.startswith(TAG_CATEGORY)
        )  # fmt: skip
        tracks.append(Track(track, artist, file, tags, others))
    return tracks, problems


def parquet_files(folder: Path) -> tuple[Path, ...]:
    """Shards of renumics/song-describer-dataset, sorted; empty without them."""
    for inside in ("data", "."):
        if found := sorted((folder / inside).glob("train-*.parquet")):
            return tuple(found)
    return ()


def read_captions(folder: Path) -> tuple[list[Caption], list[Problem], tuple[Path, ...]]:
    """Read captions of either layout: captions, bad rows, and the files read.

    Raises:
        FileNotFoundError: neither layout is there.
        ValueError: a column is missing.
    """
    shards = parquet_files(folder)
    table = find_file(folder, "song_describer.csv")
    rows: list[tuple[str, Mapping[str, object]]] = []
    good, problems = [], []
    if shards:
        for path in shards:
            with archive_errors(path):
                _check_columns(path, pq.read_schema(path).names)
                # The column called path holds the audio itself: gigabytes.
                few = [c for c in CAPTION_COLUMNS if c != "path"]
                for i, row in enumerate(pq.read_table(path, columns=few).to_pylist()):
                    rows.append((f"{path.name}:{i}", {**row, "path": ""}))
    elif table:
        names, lines = read_csv(table, problems=problems)
        _check_columns(table, names)
        rows = [(f"{table.name}:{line}", row) for line, row in lines]
    else:
        raise FileNotFoundError(
            f"{folder} holds no data/train-*.parquet (renumics/song-describer-dataset) and no "
            "song_describer.csv (Zenodo 10072001)"
        )
    for where, row in rows:
        try:
            track, artist = _whole(row["track_id"]), _whole(row["artist_id"])
        except ValueError:
            problems.append(Problem(where, BAD_ROW, "track_id or artist_id"))
            continue
        if not isinstance(row["caption"], str) or not isinstance(row["path"], str):
            problems.append(Problem(where, BAD_ROW, "caption or path"))
        elif table and not shards and unsafe(row["path"]):
            problems.append(Problem(row["path"], "unsafe path", where))
        else:
            valid = str(row["is_valid_subset"]).strip().lower() == "true"
            good.append(Caption(row["caption"], track, artist, valid, row["path"]))
    return good, problems, shards or ((table,) if table else ())


def _check_columns(path: Path, names: Sequence[str]) -> None:
    if missing := [c for c in CAPTION_COLUMNS if c not in names]:
        raise ValueError(f"{path} lacks the columns {missing}; it has {list(names)}")


def read_track_tags(
    config: PrepareData, problems: list[Problem]
) -> tuple[dict[int, Track], tuple[Path, ...]]:
    """Map track id to its row in MTG-Jamendo's tag table, and name the table, if there is one."""
    settings = config.recordings
    path = Path(settings.tags) if settings.tags else None
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"prepare_data.recordings.tags: {path} does not exist")
    path = path or find_file(Path(settings.folder), "song_describer.mtg-jamendo.tsv")
    if path is None:
        return {}, ()
    tracks, bad = read_tags(path)
    problems += bad
    tags: dict[int, Track] = {}
    for track in tracks:
        if tags.setdefault(track.track, track).tags != track.tags:
            problems.append(Problem(track.path, BAD_ROW, f"other tags earlier in {path.name}"))
    return tags, (path,)


def scan_song_describer(config: PrepareData, seed: int, concepts: Concepts | None = None) -> Scan:
    """Read Song Describer: a recording per track, a group per artist; splits are drawn."""
    settings = config.recordings
    folder = Path(settings.folder)
    rows, problems, files = read_captions(folder)
    tags, tag_files = read_track_tags(config, problems)
    by_track: dict[int, list[Caption]] = {}
    for row in rows:
        of_track = by_track.setdefault(row.track, [])
        if of_track and of_track[0].artist != row.artist:
            raise ValueError(
                f"{folder}: track {row.track} has the artists {of_track[0].artist} and "
                f"{row.artist}; correct artist_id: tracks of one artist must not cross splits"
            )
        of_track.append(row)
    embedded = bool(parquet_files(folder))
    recordings, pairs = [], []
    for track, captions in by_track.items():
        captions.sort(key=lambda row: not row.valid)  # stable: the valid captions first
        answers = [labels.from_caption(r.text, concepts) for r in captions]
        if track in tags:
            of = tags[track]
            tagged = labels.from_tags(of.tags, settings.min_tags, concepts, of.others)
            pairs.append((labels.merge_answers(answers)["guitar"], tagged["guitar"]))
            answers.append(tagged)
        path = captions[0].path.removesuffix(".mp3") + (settings.audio_suffix or DESCRIBER_SUFFIX)
        recordings.append(
            Recording(
                name=f"track_{track}" if embedded else path,
                key=str(track) if embedded else last_two(path),
                id=f"songdescriber-{track}", group=f"jamendo-artist-{captions[0].artist}", split="",
                labels=labels.merge(answers), captions=tuple(r.text for r in captions),
                artist=str(captions[0].artist),
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


def split_file(folder: Path, split: int, part: str) -> Path:
    """Find the instrument table of one split, in a clone of the repository or its data folder."""
    name = f"splits/split-{split}/autotagging_instrument-{part}.tsv"
    found = find_file(folder, f"data/{name}", name)
    if found is None:
        raise FileNotFoundError(
            f"{folder}/data/{name} does not exist; set prepare_data.recordings.folder to a clone "
            "of MTG/mtg-jamendo-dataset"
        )
    return found


def remove_overlap(
    recordings: list[Recording], tracks: dict[str, Track], config: PrepareData
) -> tuple[list[Recording], list[Problem], dict[str, object]]:
    """Keep Song Describer's tracks and artists out of train and validation.

    Its audio is the test part of split 0, which therefore needs no list.

    Raises:
        ValueError: tracks in common under `overlap: refuse`, or no list for another split.
    """
    settings = config.recordings
    if not settings.song_describer:
        if settings.jamendo_split:
            raise ValueError(
                f"prepare_data.recordings.jamendo_split = {settings.jamendo_split}: Song "
                "Describer's tracks are test in split 0 only; set "
                "prepare_data.recordings.song_describer to the folder of its metadata so that "
                "they can be kept out of train, or use split 0"
            )
        return recordings, [], {"song_describer": "not compared: its tracks are test in split 0"}
    rows, problems, _ = read_captions(Path(settings.song_describer))
    if bad := [p for p in problems if p.reason == BAD_ROW]:
        raise ValueError(
            f"{settings.song_describer}: {bad[0].name} cannot be read ({bad[0].detail}), so its "
            "track cannot be kept out of train; correct the row"
        )
    theirs = {r.track for r in rows}
    artists = {r.artist for r in rows}
    shared = [r for r in recordings if tracks[r.key].track in theirs]
    leaks = [
        r for r in recordings
        if r.split != "test"
        and (tracks[r.key].track in theirs or tracks[r.key].artist in artists)
    ]  # fmt: skip
    if leaks and settings.overlap == "refuse":
        raise ValueError(
            f"{len(leaks)} tracks of train and validation (first: {leaks[0].name}) are, or share "
            "an artist with, tracks of Song Describer; set prepare_data.recordings.overlap to "
            "remove, or jamendo_split to 0"
        )
    names = {r.name for r in leaks}
    problems = [Problem(r.name, "overlap with Song Describer", r.split) for r in leaks]
    facts = {"song_describer_tracks": len(shared), "song_describer_removed": len(leaks)}
    return [r for r in recordings if r.name not in names], problems, facts


def scan_mtg_jamendo(config: PrepareData, seed: int, concepts: Concepts | None = None) -> Scan:
    """Read MTG-Jamendo's three tables of one split; a group per artist."""
    settings = config.recordings
    problems: list[Problem] = []
    recordings: list[Recording] = []
    tracks: dict[str, Track] = {}
    taken: set[str] = set()
    files = []
    counts, unknown = Counter[str](), Counter[str]()
    for split in SPLITS:
        path = split_file(Path(settings.folder), settings.jamendo_split, split)
        files.append(path)
        rows, bad = read_tags(path)
        problems += bad
        for row in rows:
            file = row.path.removesuffix(SUFFIX) + (settings.audio_suffix or SUFFIX)
            key = last_two(file)
            if key in tracks:
                problems.append(Problem(row.path, BAD_ROW, f"twice in {path.name}"))
                continue
            tracks[key] = row
            counts[f"rows_{split}"] += 1
            counts["rows_with_few_tags"] += len(row.tags) < settings.min_tags
            unknown.update(tag for tag in row.tags if not labels.is_known_tag(tag))
            tagged = labels.from_tags(row.tags, settings.min_tags, concepts, row.others)
            recordings.append(
                Recording(
                    name=file, key=key, id=make_id("jamendo", row.path, taken),
                    group=f"jamendo-artist-{row.artist}", split=split,
                    labels=labels.merge([tagged]),
                    captions=(", ".join(sorted(row.tags)),), artist=str(row.artist),
                )
            )  # fmt: skip
    recordings, overlap, compared = remove_overlap(recordings, tracks, config)
    facts = {
        "rows": dict(sorted(counts.items())),
        "split": settings.jamendo_split,
        "tags_of_no_known_instrument": dict(sorted(unknown.items())),
        "label_rule": labels.TAG_RULE,
        **compared,
    }
    audio = find_audio(settings.folder, settings.audio, "audio", "data/audio")
    return Scan(
        tuple(recordings), audio, (*problems, *overlap), facts, tuple(files), frozenset(tracks)
    )
