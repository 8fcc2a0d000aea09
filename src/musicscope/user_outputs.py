"""Outputs that a user names: nothing that is there is ever replaced, changed or removed.

Commands write through this module and `measurement_records` alone. `artifacts.atomic_dir` and
`artifacts.publish_dir` remove the folder that they replace, and serve the outputs of stages only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path

from musicscope.output_places import (
    OutputError,
    Place,
    check_apart,
    check_no_stage,
    made_parents,
    one_line_errors,
    real_path,
    shown,
    spelled,
)

SCRATCH = ".musicscope-"
"""Prefix of the temporary folders in which results are completed."""


def numbered(path: Path) -> Iterator[Path]:
    """Give `path`, then the same name with -2, -3 and so on at its end."""
    yield path
    for number in count(2):
        yield path.with_name(f"{path.name}-{number}")


# --- a new folder -----------------------------------------------------------------------------


class NewFolder:
    """A claimed folder: write into `scratch`, then `publish`."""

    def __init__(self, target: Path, given: Path, scratch: Path, made: bool, option: str) -> None:
        self.scratch = scratch
        """Empty folder for the result, on the same disk."""
        self.published: Path | None = None
        self._target, self._given, self._made, self._option = target, given, made, option

    def publish(self) -> Path:
        """Move what is in `scratch` to the claimed folder and say where it is.

        If files appeared there since, they stay, and the result goes to a numbered folder.

        Raises:
            OutputError: the system refuses.
        """
        with one_line_errors(self._option, self._given):
            self.published = self._moved()
        return self.published

    def _moved(self) -> Path:
        if self._made:
            # A folder takes the place of an empty folder only, of nothing else that is there.
            with contextlib.suppress(OSError):
                os.rename(self.scratch, self._target)
                return self._given
            folders, given = numbered(self._target), numbered(self._given)
        else:
            if os.listdir(self._target) == [self.scratch.parent.name]:
                with contextlib.suppress(FileExistsError):
                    for path in sorted(self.scratch.rglob("*")):
                        place = self._target / path.relative_to(self.scratch)
                        place.mkdir() if path.is_dir() else link_or_copy(path, place)
                    return self._given
            inner = self._target.name or "result"
            folders = numbered(self._target / inner)
            given = numbered(self._given / inner)
        for folder, name in zip(folders, given, strict=False):
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            os.rename(self.scratch, folder)
            return name
        raise AssertionError("numbers do not end")


@contextlib.contextmanager
def new_folder(
    given: Place | None, default: Place | None = None, inputs: Mapping[str, Place] | None = None,
    option: str = "--out", stages: bool = True,
) -> Iterator[NewFolder]:  # fmt: skip
    """Claim a folder that is new, or empty, before the work; after an error nothing is left.

    Args:
        given: what the user named; None takes `default`, with a number if that name is taken.
        inputs: what is read, by what it is called; the folder may not be, hold or lie in it.
        stages: refuse what a stage of ./dvc.yaml makes.

    Raises:
        OutputError: the folder has contents, is a file, is an input, or cannot be made.
    """
    if given is None and default is None:
        raise ValueError("a folder, or a default, is needed")
    if given is not None:
        target = real_path(given, option)
        name = spelled(given, target)
    else:
        name = Path(os.fspath(default))  # type: ignore[arg-type]
        target = real_path(name.parent, option) / name.name
    free = target if given is not None else _first_free(target)
    check_apart(name if given is not None else free, inputs or {}, option)
    if stages:
        check_no_stage(target, option)
    with contextlib.ExitStack() as stack:
        with one_line_errors(option, name):
            stack.enter_context(made_parents(target))
            if given is None:
                target, name = _make_first_free(target, name)
                made = True
            else:
                made = _make_or_take_empty(target, name, option)
            if made:
                stack.callback(_remove_if_empty, target)
            beside = target.parent if made else target
            holder = tempfile.TemporaryDirectory(
                prefix=SCRATCH, dir=beside, ignore_cleanup_errors=True
            )
            scratch = Path(stack.enter_context(holder)) / "files"
            scratch.mkdir()  # unlike its parent, with the user's permissions
        yield NewFolder(target, name, scratch, made, option)


def _first_free(target: Path) -> Path:
    return next(path for path in numbered(target) if not os.path.lexists(path))


def _make_first_free(target: Path, name: Path) -> tuple[Path, Path]:
    """Make the first folder of the numbered names that is not there; it, and as it is called."""
    for folder, called in zip(numbered(target), numbered(name), strict=False):
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder, called
    raise AssertionError("numbers do not end")


def _make_or_take_empty(target: Path, name: Path, option: str) -> bool:
    """Make `target` (True), or see that it is an empty folder (False).

    Raises:
        OutputError: it is a file, or has contents, which are named.
    """
    try:
        target.mkdir()
        return True
    except FileExistsError:
        if not target.is_dir():
            raise OutputError(
                f"{option} {shown(name)} is a file: give {option} the name of a new folder"
            ) from None
    if found := sorted(os.listdir(target)):
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise OutputError(
            f"{option} {shown(name)} is not empty (it holds {shown(found[0])}{more}): give "
            f"{option} the name of a new folder"
        )
    return False


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


# --- files in a folder that may hold others ---------------------------------------------------


@contextlib.contextmanager
def folder_to_add_to(
    given: Place, inputs: Mapping[str, Place] | None = None, option: str = "--out"
) -> Iterator[Path]:
    """Make sure, before the work, that files can be added to a folder, which may hold others.

    The folder may hold an input but not be one or lie in one. After an error a folder that was
    made here is removed if it is empty.

    Raises:
        OutputError: the folder is a file, is an input, is of a stage, or cannot be written.
    """
    target = real_path(given, option)
    if target.exists() and not target.is_dir():
        raise OutputError(f"{option} {shown(given)} is a file: give {option} the name of a folder")
    check_apart(given, inputs or {}, option, contains=False)
    check_no_stage(target, option)
    with contextlib.ExitStack() as stack:
        with one_line_errors(option, given):
            stack.enter_context(made_parents(target / "file"))
            with tempfile.TemporaryFile(dir=target):
                pass
        yield spelled(given, target)


def add_files(folder: Place, contents: Callable[[str], Mapping[str, bytes]]) -> dict[str, Path]:
    """Write several files under names that are free; equal ones that are there serve as they are.

    Args:
        contents: names to bytes, given "" first and then "-2", "-3" and so on to put into each
            name, until no name is of a file with other content.

    Raises:
        OutputError: the system refuses.
    """
    folder = Path(folder)
    with one_line_errors("the folder", folder):
        for number in count(1):
            files = contents("" if number == 1 else f"-{number}")
            if all(_free(folder / name, content) for name, content in files.items()):
                with contextlib.suppress(FileExistsError):
                    for name, content in files.items():
                        if not os.path.lexists(folder / name):
                            _write_new(folder / name, content)
                    return {name: folder / name for name in files}
    raise AssertionError("numbers do not end")


def _free(path: Path, content: bytes) -> bool:
    """Whether nothing is at `path`, or a file of these bytes."""
    if not os.path.lexists(path):
        return True
    try:
        return (
            path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content
        )
    except OSError:  # what cannot be read stays
        return False


def _write_new(path: Path, content: bytes) -> None:
    """Write a whole file to a name that must be free; FileExistsError if it is not."""
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=path.parent) as scratch:
        temporary = Path(scratch) / "file"
        temporary.write_bytes(content)
        link_or_copy(temporary, path)


def link_or_copy(source: Path, place: Path) -> None:
    """Give a file a second name; a copy where the disk has no links. FileExistsError if taken."""
    try:
        os.link(source, place)
    except FileExistsError:
        raise
    except OSError:
        with open(source, "rb") as read, open(place, "xb") as write:
            shutil.copyfileobj(read, write)
