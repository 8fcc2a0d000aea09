"""MTG-Jamendo's tag tables, which label its own tracks and Song Describer's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from musicscope.data.sources.recordings import Problem, unsafe

HEADER = ["TRACK_ID", "ARTIST_ID", "ALBUM_ID", "PATH", "DURATION", "TAGS"]
CATEGORY = "instrument---"


@dataclass(frozen=True)
class Track:
    """One row of a tag table."""

    track: int
    artist: int
    path: str
    tags: frozenset[str]
    """Instrument tags without their prefix."""


def _trailing_number(text: str) -> int:
    """1 of `track_0000001`."""
    return int(text.rsplit("_", 1)[-1])


def read_tags(path: Path) -> tuple[list[Track], list[Problem]]:
    """A table with one tab column a tag and lines that end CRLF; bad rows are problems.

    Raises:
        ValueError: the header is another.
    """
    tracks, problems = [], []
    # Split by hand: the header names six columns, rows have one more for each further tag.
    lines = path.read_text(encoding="utf-8").split("\n")
    if lines[0].rstrip("\r").split("\t") != HEADER:
        raise ValueError(f"{path}: the first line is {lines[0][:80]!r}, expected {HEADER}")
    for number, line in enumerate(lines[1:], start=2):
        columns = line.rstrip("\r").split("\t")
        if columns == [""]:
            continue
        where = f"{path.name}:{number}"
        try:
            track, artist = (_trailing_number(c) for c in columns[:2])
            file = columns[3]
        except (IndexError, ValueError):
            problems.append(Problem(where, "bad metadata row", line[:80]))
            continue
        if unsafe(file):
            problems.append(Problem(file, "unsafe path", where))
            continue
        tags = frozenset(t.removeprefix(CATEGORY) for t in columns[5:] if t.startswith(CATEGORY))
        tracks.append(Track(track, artist, file, tags))
    return tracks, problems
