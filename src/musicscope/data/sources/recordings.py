"""The metadata of a data set of recordings: its tables, one form for all sources, and splits."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from musicscope.config import RecordingLimits
from musicscope.core.io import read_text, sha256
from musicscope.core.seeding import seed_for
from musicscope.data.audio_files import Problem, plain

SPLITS = ("train", "validation", "test")
HASHED_BYTES = 500_000_000
"""Larger inputs are described by their size only."""
BAD_ROW = "bad metadata row"


@dataclass(frozen=True)
class Recording:
    """One audio file and its metadata."""

    name: str
    """Path in the data set; unique, and its name in metrics."""
    key: str
    """Key of its audio: the last two parts of its path, or its track id."""
    id: str
    """Stem of its clips' ids; unique."""
    group: str
    """Recordings of one group (source clip, artist) never cross splits."""
    split: str
    """train, validation or test; empty: to be drawn."""
    labels: Mapping[str, bool | None]
    """Label per family; None: unknown."""
    captions: tuple[str, ...] = ()
    """Models are conditioned on the first."""
    tempo_bpm: float = float("nan")
    music_key: str = ""
    artist: str = ""
    fixed: str = ""
    """The data set's own split, if it gives one."""


@dataclass(frozen=True)
class Audio:
    """Place of the audio: `kind` is tar, zip, folder or parquet; folders are tried in sequence."""

    kind: str
    paths: tuple[Path, ...]

    @property
    def bytes(self) -> int:
        """Size of the archives; 0 for folders."""
        return sum(p.stat().st_size for p in self.paths if p.is_file())


@dataclass(frozen=True)
class Scan:
    """The metadata of a data set."""

    recordings: tuple[Recording, ...]
    audio: Audio
    problems: tuple[Problem, ...] = ()
    facts: Mapping[str, object] = field(default_factory=dict)
    """Counts, label rules and agreements, for the stage's metrics."""
    inputs: tuple[Path, ...] = ()
    """Metadata files that were read."""
    listed: frozenset[str] = frozenset()
    """Keys of all recordings in the metadata, requested or not."""


def unsafe(name: str) -> bool:
    """Say whether a name in metadata or an archive could lead out of its folder, or is no text."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return (
        not parts
        or ".." in parts
        or parts[0] == "/"
        or "\0" in name
        or plain(name) != name
        or re.match(r"[A-Za-z]:[\\/]", name) is not None
    )


def last_two(name: str) -> str:
    """Keep the last two parts of a path, which archives and metadata have in common."""
    return "/".join(PurePosixPath(name).parts[-2:])


def make_id(source: str, name: str, taken: set[str]) -> str:
    """Make a clip id stem that is a safe file name, unlike those in `taken`, and add it there."""
    stem = f"{source}-" + re.sub(r"[^\w.-]+", "_", str(PurePosixPath(name).with_suffix("")))
    if stem in taken:
        stem += "-" + hashlib.sha256(name.encode()).hexdigest()[:8]
    taken.add(stem)
    return stem


def name_key(name: str) -> str:
    """Compare names as a reader would: Unicode NFC, without blanks around the parts of a path."""
    return "/".join(part.strip() for part in unicodedata.normalize("NFC", name).split("/"))


def read_csv(
    path: Path, rename: Callable[[str], str] = str, problems: list[Problem] | None = None
) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Read a CSV with a header: column names, and (line, fields without blanks around them).

    Args:
        rename: applied to each column name.
        problems: gets rows with another number of fields. Without it they are errors, and so are
            fields of several lines, which hide a missing quote.

    Raises:
        ValueError: naming file and line: not UTF-8, quotes that do not match, a repeated column.
    """
    reader = csv.reader(io.StringIO(read_text(path)), strict=True, skipinitialspace=True)
    names: list[str] = []
    rows: list[tuple[int, dict[str, str]]] = []
    line = 0
    try:
        names = [rename(name.strip()) for name in next(reader, [])]
        if repeated := [name for name, n in Counter(names).items() if name and n > 1]:
            raise ValueError(f"{path}, line 1: two columns are {repeated[0]!r}; rename one")
        line = reader.line_num + 1
        for fields in reader:
            last, width = reader.line_num, len(names)
            if any(f.strip() for f in fields):
                wrong = ""
                if len(fields) < width or any(f.strip() for f in fields[width:]):
                    wrong = f"{len(fields)} fields, but the header has {width}"
                elif problems is None and any("\n" in f for f in fields):
                    wrong = f"a quoted field goes on to line {last}; close its quote on the line"
                if wrong and problems is None:
                    raise ValueError(f"{path}, line {line}: {wrong}")
                if wrong and problems is not None:
                    problems.append(Problem(f"{path.name}:{line}", BAD_ROW, wrong))
                else:
                    pairs = zip(names, fields, strict=False)
                    rows.append((line, {name: f.strip() for name, f in pairs if name}))
            line = last + 1
    except csv.Error as error:
        raise ValueError(
            f"{path}, lines {line} to {max(line, reader.line_num)}: {error}; close every quote, "
            'and write a quote inside a field twice ("")'
        ) from error
    return names, rows


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(row := dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return row


def read_json_lines(
    path: Path, problems: list[Problem]
) -> Iterator[tuple[str, str, dict[str, object]]]:
    """Yield (file:line, text, object) per line; the object of a bad line is empty, and a problem.

    Raises:
        ValueError: not UTF-8, or one JSON array.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        if number == 1 and line.lstrip().startswith("["):
            raise ValueError(f"{path} is one JSON array; write JSON lines: one object per line")
        where, row = f"{path.name}:{number}", {}
        try:
            row = json.loads(line, object_pairs_hook=_unique_keys)
            if not isinstance(row, dict):
                raise ValueError("no JSON object")
        except (ValueError, RecursionError) as error:
            problems.append(Problem(where, BAD_ROW, str(error)))
            row = {}
        yield where, line, row


def find_file(folder: Path, *patterns: str) -> Path | None:
    """Find the first file in `folder` that matches a pattern: first pattern, then first name."""
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            if path.is_file():
                return path
    return None


def find_audio(folder: str, audio: str, *inside: str) -> Audio:
    """Find the archives (`*.tar*`, `*.tgz`, `*.zip`) or folders with the audio.

    `audio` is a folder, an archive, or empty: then archives in `folder` itself, else its
    subfolders `inside`, else itself.

    Raises:
        FileNotFoundError: no such file or folder; the message names the params key.
    """
    root = Path(audio or folder)
    if not root.exists():
        key = "audio" if audio else "folder"
        raise FileNotFoundError(f"prepare_data.recordings.{key}: {root} does not exist")
    inside_root = [root] if root.is_file() else sorted(p for p in root.iterdir() if p.is_file())
    archives = [p for p in inside_root if not p.name.startswith(".")]
    tars = [p for p in archives if re.search(r"\.(tar(\.\w+)?|tgz)$", p.name)]
    zips = [p for p in archives if p.suffix == ".zip"]
    if tars:
        return Audio("tar", tuple(tars))
    if zips:
        return Audio("zip", tuple(zips))
    if root.is_file():
        raise FileNotFoundError(f"prepare_data.recordings.audio: {root} is no folder, tar or zip")
    return Audio("folder", tuple(p for p in (*(root / i for i in inside), root) if p.is_dir()))


def describe_inputs(paths: Iterable[Path]) -> dict[str, dict[str, object]]:
    """Size per file name, and sha256 unless the file is large: the copy of the data set."""
    described: dict[str, dict[str, object]] = {}
    for path in paths:
        size = path.stat().st_size
        digest = {"sha256": sha256(path)} if size <= HASHED_BYTES else {}
        described[path.name] = {"bytes": size, **digest}
    return described


def _drawn(groups: Iterable[str], share: float, seed: int, purpose: str) -> set[str]:
    """Draw `share` of the groups, at least one, in the sequence of their hashes."""
    ranked = sorted(set(groups), key=lambda g: (seed_for(seed, "split", purpose, g), g))
    return set(ranked[: max(1, round(share * len(ranked)))])


def assign_splits(
    recordings: Sequence[Recording], seed: int, validation_share: float, test_share: float
) -> list[Recording]:
    """Give every group one split: the data set's own if it has one, else one drawn by seed.

    Without a test split, `test_share` of the groups without a split become test. Without a
    validation split, `validation_share` of the rest and of train become validation.

    Raises:
        ValueError: a group in two splits, or a split that stays empty.
    """
    given: dict[str, set[str]] = defaultdict(set)
    for r in recordings:
        given[r.group] |= {r.split} - {""}
    for group, splits in given.items():
        if len(splits) > 1:
            raise ValueError(
                f"group {group!r} is in splits {sorted(splits)}: the same artist or source clip "
                "must not be learnt from and tested on; correct the metadata's split or group"
            )
    split = {group: next(iter(splits), "") for group, splits in given.items()}
    named = set(split.values())
    for wanted, share in (("test", test_share), ("validation", validation_share)):
        # Groups that the data set calls train give validation, but never test.
        pool = [g for g, s in split.items() if s == "" or (s, wanted) == ("train", "validation")]
        if wanted not in named and len(pool) > 1:
            split |= dict.fromkeys(_drawn(pool, share, seed, wanted), wanted)
    split = {group: s or "train" for group, s in split.items()}
    for wanted in SPLITS:
        if wanted not in split.values():
            raise ValueError(
                f"no recording for split {wanted}: {len(split)} groups (artists or source clips) "
                "are too few, at least 3 are needed, or the metadata fills the other splits only"
            )
    return [replace(r, split=split[r.group], fixed=r.split) for r in recordings]


def limit(recordings: Sequence[Recording], limits: RecordingLimits, seed: int) -> list[Recording]:
    """Keep at most `limits` recordings per split, the same for any sequence of the metadata."""
    chosen: set[str] = set()
    for split in SPLITS:
        of_split = [r for r in recordings if r.split == split]
        of_split.sort(key=lambda r: (seed_for(seed, "limit", r.id), r.id))
        chosen.update(r.id for r in of_split[: getattr(limits, split) or None])
    return [r for r in recordings if r.id in chosen]


def number(value: object) -> float:
    """Convert to a finite, positive number, or NaN."""
    try:
        result = float(value)  # ty: ignore[invalid-argument-type]  errors are caught
    except (TypeError, ValueError):
        return float("nan")
    return result if 0 < result < float("inf") else float("nan")
