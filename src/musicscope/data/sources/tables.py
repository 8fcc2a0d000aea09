"""Read tables of metadata: CSV and JSON lines, strictly, with the line of every row."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from musicscope.core.io import read_text
from musicscope.data.audio_files import Problem

BAD_ROW = "bad metadata row"


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
                if wrong:
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
