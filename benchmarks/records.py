"""Files of measurements that benchmarks write: none replaces a result that nothing else holds."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from musicscope.core.io import read_json, write_json
from musicscope.core.user_outputs import (
    SCRATCH,
    OutputError,
    Place,
    check_no_stage,
    link_or_copy,
    made_parents,
    one_line_errors,
    real_path,
    shown,
    spelled,
)

OUT_HELP = "a new file; {}, or that name with a number where its earlier result would be lost"
"""Help of the option of a tool that writes a `Record`, with the tool's own path to be put in."""


def _numbered(path: Path) -> Iterator[Path]:
    """Give `path`, then the same name with -2, -3 and so on before the suffix of a file."""
    yield path
    for number in count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


class Record:
    """A JSON file of measurements: a new file that a user names, or a tool's own record.

    The record of a tool, whose path the tool knows, is replaced where nothing is lost by it: where
    Git holds what it says, or where the new one says all of it too. Else the new one gets a number.
    """

    def __init__(self, given: Place | None, default: Place, option: str = "--out") -> None:
        """Check, before the work, that the file can be written.

        Raises:
            OutputError: a file or folder of the name that the user gave is there, or the folder
                cannot be written.
        """
        name = default if given is None else given
        real = real_path(name, option) if given is not None else Path(os.path.abspath(name))
        self._path, self._own, self._option = spelled(name, real), given is None, option
        self._written: bytes | None = None
        if given is not None:
            if os.path.lexists(name) or real.exists():
                raise OutputError(
                    f"{option} {shown(name)} is there already: give {option} the name of a new file"
                )
            check_no_stage(real, option)
        with (
            one_line_errors(option, name),
            made_parents(real),
            tempfile.TemporaryFile(dir=real.parent),
        ):
            pass

    def read(self) -> Any:
        """What the record of the tool says now; {} where there is none."""
        return read_json(self._path) if self._own and self._path.is_file() else {}

    def write(self, value: Any) -> Path:
        """Write `value` and say where; a later call replaces what this one wrote.

        Raises:
            OutputError: the system refuses.
        """
        with (
            one_line_errors(self._option, self._path),
            tempfile.TemporaryDirectory(prefix=SCRATCH, dir=self._path.parent) as scratch,
        ):
            temporary = Path(scratch) / "record.json"
            write_json(temporary, value)
            if self._own and self._path.is_file() and self._nothing_lost(temporary):
                self._written = temporary.read_bytes()
                os.replace(temporary, self._path)
                return self._path
            for path in _numbered(self._path):
                with contextlib.suppress(FileExistsError):
                    link_or_copy(temporary, path)
                    self._path, self._own, self._written = path, True, temporary.read_bytes()
                    return path
        raise AssertionError("numbers do not end")

    def _nothing_lost(self, new: Path) -> bool:
        """Whether the present file is what this run wrote, in Git, or said by the new one too."""
        if self._path.is_symlink():
            return False
        now = self._path.read_bytes()
        if now == self._written or held_by_git(self._path, now):
            return True
        try:
            return _says_all(read_json(new), read_json(self._path))
        except ValueError:
            return False


def open_record(given: Place | None, default: Place) -> Record:
    """Give the `Record` of a script, which ends in one line if the file cannot be written."""
    try:
        return Record(given, default)
    except OutputError as error:
        sys.exit(str(error))


def held_by_git(path: Path, content: bytes) -> bool:
    """Whether the last commit holds these bytes under this name."""
    try:
        held = subprocess.run(
            ["git", "-C", str(path.parent), "show", f"HEAD:./{path.name}"], capture_output=True
        )
    except FileNotFoundError:  # Git is not installed
        return False
    return held.returncode == 0 and held.stdout == content


def _says_all(new: Any, old: Any) -> bool:
    """Whether every key of `old` is in `new` with the same value."""
    if isinstance(old, dict) and isinstance(new, dict):
        return all(key in new and _says_all(new[key], value) for key, value in old.items())
    return new == old
