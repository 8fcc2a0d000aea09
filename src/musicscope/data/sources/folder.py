"""A user's own folder of recordings, with labels in an optional labels.csv."""

from __future__ import annotations

import difflib
import os
import sys
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from musicscope.config import PrepareData
from musicscope.config.concepts import TABLE_COLUMNS as COLUMNS
from musicscope.data.audio_files import SUFFIXES, Problem, list_files
from musicscope.data.concepts import Concepts
from musicscope.data.sources import labels
from musicscope.data.sources.recordings import (
    SPLITS,
    Audio,
    Recording,
    Scan,
    make_id,
    name_key,
    read_csv,
    unsafe,
)
from musicscope.data.taxonomy import FAMILIES

TABLE = "labels.csv"
WORDS = {"1": True, "yes": True, "true": True, "0": False, "no": False, "false": False, "": None}


@dataclass(frozen=True)
class Labels:
    """The rows of labels.csv by `name_key` of their path, with their lines."""

    path: Path
    rows: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    unused: tuple[str, ...] = ()
    """Columns of no meaning here."""

    def of_files(self, root: Path, names: Sequence[str]) -> dict[str, dict[str, str]]:
        """Map each file to its row. Letter case counts as it does for the file system.

        Raises:
            ValueError: a row that fits two files, or a table of which no row fits one.
        """
        by_key, folded = defaultdict(list), defaultdict(list)
        for name in names:
            by_key[name_key(name)].append(name)
            folded[name_key(name).casefold()].append(name)
        rows: dict[str, dict[str, str]] = {}
        for key, (line, row) in self.rows.items():
            fit = by_key.get(key) or (folded[key.casefold()] if (root / key).is_file() else [])
            fit = [row["path"]] if row["path"] in fit else fit
            if len(fit) > 1:
                raise ValueError(
                    f"{self.path}, line {line}: {key!r} could be {fit[0]!r} or {fit[1]!r}; rename "
                    "one file"
                )
            rows |= {name: row for name in fit}
        if self.rows and names and not rows:
            raise ValueError(
                f"{self.path}: no row fits a file, first {next(iter(self.rows))!r}; write paths "
                f"relative to {root}"
            )
        return rows


def column_name(name: str) -> str:
    """Column as it is compared: in small letters, without has_."""
    return name.lower().removeprefix("has_")


def label_columns(concepts: Concepts) -> dict[str, str]:
    """Concept -> its column of labels.csv: families, then defined concepts."""
    own = {name: column_name(concept.column or name) for name, concept in concepts.items()}
    return {family: family for family in FAMILIES} | own


def read_labels(path: Path, labelled: Collection[str] = FAMILIES) -> Labels:
    """Read labels.csv if it is there.

    Columns: path, and optionally caption, group, split, artist and those of `labelled`.

    Raises:
        ValueError: no path column, a value that is no label or split, a path twice, or a column
            name that looks misspelt.
    """
    if not path.is_file():
        if path.exists():
            raise ValueError(f"{path} is no file; rename it")
        return Labels(path)
    names, lines = read_csv(path, column_name)
    if "path" not in names:
        raise ValueError(
            f"{path} has no column path; its columns, separated by commas, are {names}"
        )
    unused = tuple(n for n in names if n and n not in (*COLUMNS, *labelled))
    for name in unused:
        if near := difflib.get_close_matches(name, (*COLUMNS, *labelled), 1, cutoff=0.8):
            raise ValueError(f"{path}: unknown column {name!r}; did you mean {near[0]}?")
    rows, problems = {}, []
    for line, row in lines:
        row["path"] = str(PurePosixPath(row["path"].replace("\\", "/"))) if row["path"] else ""
        row |= {name: row[name].lower() for name in ("split", *labelled) if name in row}
        if unsafe(row["path"]):
            where = f"{path.name}:{line}"
            problems.append(Problem(row["path"] or where, "unsafe path", where))
            continue
        if (key := name_key(row["path"])) in rows:
            raise ValueError(f"{path}, line {line} names {row['path']!r} again")
        for column, allowed, text in (
            ("split", ("", *SPLITS), f"one of {', '.join(SPLITS)}, or nothing"),
            *((f, WORDS, "1, 0, yes, no, true, false, or nothing for unknown") for f in labelled),
        ):
            if row.get(column, "") not in allowed:
                raise ValueError(
                    f"{path}, line {line}, {column} = {row[column]!r}: allowed is {text}"
                )
        rows[key] = (line, row)
    return Labels(path, rows, tuple(problems), unused)


def of_folders(root: Path, concepts: Concepts) -> dict[str, dict[PurePosixPath, bool]]:
    """Concept -> {its folder below `root`: the label of recordings in it}.

    ValueError for a folder that is not there, or not below `root`.
    """
    found: dict[str, dict[PurePosixPath, bool]] = {}
    for name, concept in concepts.items():
        sides = {"folder_with": True, "folder_without": False}
        for key, label in sides.items():
            if not (given := getattr(concept, key)):
                continue
            # As written from here, or from the folder of recordings.
            whole = Path(os.path.abspath(given if Path(given).is_dir() else root / given))
            top = Path(os.path.abspath(root))  # links to folders are kept
            if not whole.is_dir() or top not in whole.parents:
                raise ValueError(
                    f"concepts.{name}.{key} = {given!r} is no folder below {root}; put both "
                    "folders, or links to them, into prepare_data.recordings.folder"
                )
            below = PurePosixPath(whole.relative_to(top).as_posix())
            found.setdefault(name, {})[below] = label
        if len(found.get(name, (True, False))) < len(sides):
            raise ValueError(f"concepts.{name}: folder_with and folder_without are the same")
    return found


def folder_label(name: str, folders: Mapping[PurePosixPath, bool]) -> bool | None:
    """Label of a recording by the nearest of `folders` that it lies in; None outside of them."""
    return next((folders[p] for p in PurePosixPath(name).parents if p in folders), None)


def scan(config: PrepareData, seed: int, concepts: Concepts | None = None) -> Scan:
    """List all audio below the folder.

    A recording's group is its group, else its artist in the table, else its folder, else itself. A
    folder of a concept is no group: its recordings would be all of one split.
    """
    concepts = concepts or {}
    settings = config.recordings
    root = Path(settings.audio or settings.folder)
    for key, folder in (("audio", settings.audio), ("folder", settings.folder)):
        if folder and not Path(folder).is_dir():
            raise FileNotFoundError(f"prepare_data.recordings.{key}: {folder} is no folder")
    files, listed = list_files(root)
    columns, folders = label_columns(concepts), of_folders(root, concepts)
    table = read_labels(Path(settings.folder) / TABLE, tuple(dict.fromkeys(columns.values())))
    if table.unused:
        print(
            f"{table.path}: not used: {', '.join(table.unused)}; a column of labels becomes a "
            f"concept with `{table.unused[0]}: {{}}` under `concepts` in params.yaml",
            file=sys.stderr,
        )
    names, problems = [], listed
    for name in files:
        if unsafe(name):
            problems.append(Problem(name, "unsafe path"))
        elif PurePosixPath(name).suffix.lower() in SUFFIXES:
            names.append(name)
        elif name != TABLE:
            detail = "by its name: wav, flac, ogg, mp3 and aiff are read"
            problems.append(Problem(name, "not audio", detail))
    problems += table.problems
    rows = table.of_files(root, names)
    used = {id(row) for row in rows.values()}
    folded = {name_key(name).casefold(): name for name in names}
    for key, (line, row) in sorted(table.rows.items()):
        if id(row) not in used:
            near = folded.get(key.casefold(), "")
            detail = f"{TABLE}:{line}" + (f"; {near} has other letter case" if near else "")
            problems.append(Problem(row["path"], "missing", detail))
    counts = {"files": len(names), "rows": len(table.rows), "files_in_table": len(rows)}
    recordings, taken = [], set()
    spelled: dict[str, str] = {}
    for name in names:
        row = rows.get(name, {})
        caption = row.get("caption", "")
        known = labels.merge([labels.from_caption(caption, concepts)] if caption else [])
        for concept, of in folders.items():
            if (label := folder_label(name, of)) is not None:
                known[concept] = label
        for concept, column in columns.items():
            if (label := WORDS[row.get(column, "")]) is not None:
                known[concept] = label
        parent = str(PurePosixPath(name).parent)
        if any(PurePosixPath(parent) in of for of in folders.values()):
            parent = "."
        group = row.get("group") or row.get("artist") or (parent if parent != "." else name)
        if group != name:  # one artist, however it is spelled
            group = spelled.setdefault(" ".join(name_key(group).casefold().split()), group)
        recordings.append(
            Recording(
                name=name, key=name, id=make_id("folder", name, taken), group=f"folder-{group}",
                split=row.get("split", ""), labels=known, captions=(caption,),
                artist=row.get("artist", ""),
            )
        )  # fmt: skip
    facts = {
        "rows": counts,
        "columns_not_used": ", ".join(table.unused),
        "label_rule": f"{TABLE}; families it leaves empty by its caption: " + labels.CAPTION_RULE,
    }
    inputs = (table.path,) if table.path.is_file() else ()
    return Scan(tuple(recordings), Audio("folder", (root,)), tuple(problems), facts, inputs)
