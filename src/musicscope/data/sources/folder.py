"""A user's own folder of recordings, with labels in an optional labels.csv."""

from __future__ import annotations

import csv
import difflib
import sys
from collections import Counter
from pathlib import Path, PurePosixPath

from musicscope.config import PrepareData
from musicscope.data.decoding import SUFFIXES, Problem
from musicscope.data.sources import labels
from musicscope.data.sources.recordings import (
    SPLITS,
    Audio,
    Recording,
    Scan,
    make_id,
    unsafe,
)
from musicscope.data.taxonomy import FAMILIES

TABLE = "labels.csv"
COLUMNS = ("path", "caption", "group", "split", "artist")
WORDS = {"1": True, "yes": True, "true": True, "0": False, "no": False, "false": False, "": None}


def read_table(path: Path) -> tuple[dict[str, dict[str, str]], list[Problem], list[str]]:
    """Read labels.csv: rows by path, skipped rows, and unused columns.

    Columns: path, and optionally caption, group, split, artist and one per family.

    Raises:
        ValueError: no path column, a value that is no label or split, a path twice, or a column
            name that looks misspelt.
    """
    rows: dict[str, dict[str, str]] = {}
    problems: list[Problem] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        names = [(n or "").strip().lower().removeprefix("has_") for n in reader.fieldnames or []]
        reader.fieldnames = names
        if "path" not in names:
            raise ValueError(f"{path} has no column path; its columns are {names}")
        unused = [n for n in names if n and n not in (*COLUMNS, *FAMILIES)]
        for name in unused:
            if near := difflib.get_close_matches(name, (*COLUMNS, *FAMILIES), 1, cutoff=0.8):
                raise ValueError(f"{path}: unknown column {name!r}; did you mean {near[0]}?")
        for row in reader:
            where = f"{path.name}:{reader.line_num}"
            row = {k: (v or "").strip() for k, v in row.items() if isinstance(k, str) and k}
            name = row["path"].replace("\\", "/")
            if unsafe(row["path"]):
                problems.append(Problem(row["path"] or where, "unsafe path", where))
                continue
            name = str(PurePosixPath(name))
            if name in rows:
                raise ValueError(f"{path}: line {reader.line_num} names {name!r} again")
            if row.get("split", "") not in ("", *SPLITS):
                raise ValueError(
                    f"{path}: line {reader.line_num}, split = {row['split']!r}: allowed is one of "
                    f"{', '.join(SPLITS)}, or nothing"
                )
            for family in FAMILIES:
                if row.get(family, "").lower() not in WORDS:
                    raise ValueError(
                        f"{path}: line {reader.line_num}, {family} = {row[family]!r}: allowed is "
                        "1, 0, yes, no, true, false, or nothing for unknown"
                    )
            rows[name] = row
    return rows, problems, unused


def list_audio(root: Path) -> tuple[list[str], list[Problem]]:
    """List relative paths of the audio files, sorted, and other files as problems."""
    names, others = [], []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_dir() or name == TABLE:
            continue
        if unsafe(name):
            others.append(Problem(name, "unsafe path", "its name is no UTF-8"))
        elif path.suffix.lower() in SUFFIXES:
            names.append(name)
        else:
            others.append(
                Problem(name, "not audio", "by its name: wav, flac, ogg, mp3 and aiff are read")
            )
    return names, others


def scan(config: PrepareData, seed: int) -> Scan:
    """List all audio below the folder.

    A recording's group is its group, else its artist in the table, else its folder, else itself.
    """
    settings = config.recordings
    root = Path(settings.audio or settings.folder)
    if not root.is_dir():
        raise FileNotFoundError(f"prepare_data.recordings.folder: {root} is no folder")
    names, problems = list_audio(root)
    table = Path(settings.folder) / TABLE
    rows: dict[str, dict[str, str]] = {}
    unused: list[str] = []
    if table.is_file():
        rows, bad, unused = read_table(table)
        problems += bad
        if unused:
            print(f"{table}: not used: {', '.join(unused)}", file=sys.stderr)
    recordings, taken = [], set()
    counts: Counter[str] = Counter(files=len(names), rows=len(rows))
    problems += [Problem(name, "missing", TABLE) for name in sorted(set(rows) - set(names))]
    for name in names:
        row = rows.get(name, {})
        caption = row.get("caption", "")
        known = labels.merge([labels.from_caption(caption)] if caption else [])
        for family in FAMILIES:
            if (label := WORDS[row.get(family, "").lower()]) is not None:
                known[family] = label
        counts["files_in_table"] += name in rows
        parent = str(PurePosixPath(name).parent)
        group = row.get("group") or row.get("artist") or (parent if parent != "." else name)
        recordings.append(
            Recording(
                name=name, key=name, id=make_id("folder", name, taken), group=f"folder-{group}",
                split=row.get("split", ""), labels=known, captions=(caption,),
                artist=row.get("artist", ""),
            )
        )  # fmt: skip
    facts = {
        "rows": dict(counts),
        "columns_not_used": ", ".join(unused),
        "label_rule": f"{TABLE}; families it leaves empty by its caption: " + labels.CAPTION_RULE,
    }
    inputs = (table,) if table.is_file() else ()
    return Scan(tuple(recordings), Audio("folder", (root,)), tuple(problems), facts, inputs)
