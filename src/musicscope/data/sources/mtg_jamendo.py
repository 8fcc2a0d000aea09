"""MTG-Jamendo (MTG/mtg-jamendo-dataset): tag tables by artist-disjoint splits, whole tracks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from musicscope.config import PrepareData
from musicscope.data.sources import labels, song_describer
from musicscope.data.sources.jamendo_tags import Track, read_tags
from musicscope.data.sources.recordings import (
    SPLITS,
    Problem,
    Recording,
    Scan,
    find_audio,
    find_file,
    last_two,
    make_id,
)

SUFFIX = ".mp3"


def split_file(folder: Path, split: int, part: str) -> Path:
    """Path of one split's instrument table, in a clone of the repository or its data folder."""
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
    rows, _, _ = song_describer.read_captions(Path(settings.song_describer))
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


def scan(config: PrepareData, seed: int) -> Scan:
    """Read the three tables of one split; one group an artist."""
    settings = config.recordings
    problems: list[Problem] = []
    recordings: list[Recording] = []
    tracks: dict[str, Track] = {}
    taken: set[str] = set()
    files = []
    counts: Counter[str] = Counter()
    for split in SPLITS:
        path = split_file(Path(settings.folder), settings.jamendo_split, split)
        files.append(path)
        rows, bad = read_tags(path)
        problems += bad
        for row in rows:
            file = row.path.removesuffix(SUFFIX) + (settings.audio_suffix or SUFFIX)
            key = last_two(file)
            if key in tracks:
                problems.append(Problem(row.path, "bad metadata row", f"twice in {path.name}"))
                continue
            tracks[key] = row
            counts[f"rows_{split}"] += 1
            counts["rows_with_few_tags"] += len(row.tags) < settings.min_tags
            recordings.append(
                Recording(
                    name=file, key=key, id=make_id("jamendo", row.path, taken),
                    group=f"jamendo-artist-{row.artist}", split=split,
                    labels=labels.merge([labels.from_tags(row.tags, settings.min_tags)]),
                    captions=(", ".join(sorted(row.tags)),), artist=str(row.artist),
                )
            )  # fmt: skip
    recordings, overlap, compared = remove_overlap(recordings, tracks, config)
    facts = {
        "rows": dict(sorted(counts.items())),
        "split": settings.jamendo_split,
        "label_rule": labels.TAG_RULE,
        **compared,
    }
    audio = find_audio(settings.folder, settings.audio, "audio", "data/audio")
    return Scan(
        tuple(recordings), audio, (*problems, *overlap), facts, tuple(files), frozenset(tracks)
    )
