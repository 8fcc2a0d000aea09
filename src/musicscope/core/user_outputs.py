"""Write outputs that a user names: existing files are never replaced, changed or removed.

Commands write only through this module. `core.io.atomic_dir` and `core.io.publish_dir` remove the
folder that they replace, and are for outputs of stages.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping
from itertools import count
from pathlib import Path

import yaml

Place = str | os.PathLike[str]


class OutputError(ValueError):
    """An output that cannot be written without harm; the message, one line, says what to do."""


def shown(path: Place) -> str:
    """Format a path for a message of one line."""
    text = os.fspath(path)
    return text if text.isprintable() else repr(text)


def real_path(path: Place, option: str) -> Path:
    """Follow links; OutputError for an empty path and for a broken link."""
    text = os.fspath(path)
    if not text or "\0" in text:
        raise OutputError(f"{option} {text!r} is no path: name one")
    real = Path(os.path.realpath(text))
    if os.path.islink(real) or (os.path.islink(text.rstrip("/")) and not real.exists()):
        raise OutputError(f"{option} {shown(path)} is a link to nothing: name another path")
    return real


def spelled(given: Place, real: Path) -> Path:
    """Give a path as the user wrote it, or `real` if it contains .. and folders may be absent."""
    return real if ".." in Path(given).parts else Path(given)


# --- places that an output must avoid ---------------------------------------------------------


def _same(one: Path, other: Path) -> bool:
    """Compare existing paths by file: links, mounts and letter case do not matter."""
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return one == other


def _within(path: Path, folder: Path) -> bool:
    return any(_same(place, folder) for place in (path, *path.parents))


def check_apart(
    out: Place, inputs: Mapping[str, Place], option: str = "--out", contains: bool = True
) -> None:
    """Refuse an output that is an input or inside one, or with `contains` one that holds an input.

    Args:
        inputs: paths that are read, by their name for messages.

    Raises:
        OutputError: names the output, the input and what to do.
    """
    where, real = f"{option} {shown(out)}", Path(os.path.realpath(out))
    for name, given in inputs.items():
        read = Path(os.path.realpath(given))
        if _same(real, read):
            raise OutputError(f"{where} is {name}, which is read: give {option} another place")
        if _within(real, read):
            raise OutputError(
                f"{where} lies in {name} ({shown(given)}), which is read: give {option} a place "
                "outside it"
            )
        if contains and _within(read, real):
            raise OutputError(
                f"{where} holds {name} ({shown(given)}), which is read: give {option} the name of "
                "a new folder"
            )


def _stage_outputs() -> list[str]:
    """Patterns of the outputs of stages in ./dvc.yaml, relative to it; none without the file."""
    try:
        tree = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))
        return [
            _pattern(entry if isinstance(entry, str) else next(iter(entry)), stage)
            for stage in (stage.get("do", stage) for stage in tree["stages"].values())
            for section in ("outs", "metrics", "plots")
            for entry in stage.get(section, ())
        ]
    except (OSError, ValueError, AttributeError, KeyError, TypeError, yaml.YAMLError):
        return []


def _pattern(entry: str, stage: Mapping[str, Mapping[str, object]]) -> str:
    """Pattern of one output: ${item.x} is any of the listed values of x, or any name."""

    def values(name: str) -> str:
        listed = stage.get("matrix", {}).get(name.removeprefix("item."))
        if isinstance(listed, list):
            return f"({'|'.join(re.escape(str(value)) for value in listed)})"
        return "[^/]+"

    parts = re.split(r"\$\{([^}]*)\}", entry.rstrip("/"))  # text, name, text, name, ..., text
    return "".join(values(p) if i % 2 else re.escape(p) for i, p in enumerate(parts))


def check_no_stage(out: Path, option: str = "--out") -> None:
    """Refuse an output that is, or is inside, an output of a stage in ./dvc.yaml: DVC removes it.

    Raises:
        OutputError: names the output and what to do.
    """
    root = Path.cwd()
    place = next((p for p in (out, *out.parents) if _same(p, root)), None)
    if place is None:
        return
    name = out.relative_to(place).as_posix()
    if any(re.fullmatch(f"{pattern}(/.*)?", name) for pattern in _stage_outputs()):
        raise OutputError(
            f"{option} {shown(name)} is an output of a stage in dvc.yaml, which dvc repro removes: "
            f"give {option} another place"
        )


@contextlib.contextmanager
def one_line_errors(option: str, path: Place) -> Generator[None]:
    """Turn an OSError into an OutputError of one line that names the output."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"{option} {shown(path)} cannot be written ({reason}): name another path"
        ) from error


@contextlib.contextmanager
def made_parents(path: Path) -> Generator[None]:
    """Make the folders above `path`; after an error, remove new ones that are empty."""
    made = [p for p in path.parents if not os.path.lexists(p)]
    above = next((p for p in path.parents if os.path.lexists(p)), path)
    if not above.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{shown(above)} is no folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


# --- a new folder -----------------------------------------------------------------------------

SCRATCH = ".musicscope-"
"""Prefix of the temporary folders in which results are completed."""


def numbered(path: Path) -> Iterator[Path]:
    """Give `path`, then the same name with -2, -3 and so on at its end."""
    yield path
    for number in count(2):
        yield path.with_name(f"{path.name}-{number}")


class NewFolder:
    """A claimed folder: write into `scratch`, then `publish`."""

    def __init__(self, target: Path, given: Path, scratch: Path, made: bool, option: str) -> None:
        self.scratch = scratch
        """Empty folder on the same disk; write the result here."""
        self.published: Path | None = None
        self._target, self._given, self._made, self._option = target, given, made, option

    def publish(self) -> Path:
        """Move the contents of `scratch` to the claimed folder and give its path.

        Files that appeared there since stay; the result then goes to a numbered folder.

        Raises:
            OutputError: the system refuses.
        """
        with one_line_errors(self._option, self._given):
            self.published = self._moved()
        return self.published

    def _moved(self) -> Path:
        if self._made:
            # os.rename replaces an empty folder, and nothing else.
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
) -> Generator[NewFolder]:  # fmt: skip
    """Claim a new or empty folder before the work; after an error it is removed again.

    Args:
        given: path from the user; None takes `default`, with a number if that name is taken.
        inputs: paths that are read, by name; the folder may not be, hold or be inside one.
        stages: refuse outputs of stages in ./dvc.yaml.

    Raises:
        OutputError: the folder has contents, is a file, is an input, or cannot be made.
    """
    if given is not None:
        target = real_path(given, option)
        name = spelled(given, target)
    elif default is not None:
        name = Path(os.fspath(default))
        target = real_path(name.parent, option) / name.name
    else:
        raise ValueError("a folder, or a default, is needed")
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
    """Make the first free folder of the numbered names; give its real path and its name."""
    for folder, called in zip(numbered(target), numbered(name), strict=False):
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder, called
    raise AssertionError("numbers do not end")


def _make_or_take_empty(target: Path, name: Path, option: str) -> bool:
    """Make `target` (True), or accept it as an existing empty folder (False).

    Raises:
        OutputError: it is a file, or has contents.
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
) -> Generator[Path]:
    """Check, before the work, that files can be added to a folder, which may hold other files.

    The folder may hold an input but not be one or be inside one. After an error a folder that was
    made here is removed if it is empty.

    Raises:
        OutputError: the folder is a file, an input, an output of a stage, or not writable.
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
    """Write several files under free names; existing files of equal content are kept.

    Args:
        contents: gives bytes by name for a suffix of all names. It is called with "", "-2", "-3"
            and so on, until no name belongs to a file with other content.

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
    """Say whether `path` is free, or a file of these bytes."""
    if not os.path.lexists(path):
        return True
    try:
        return (
            path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content
        )
    except OSError:  # a file that cannot be read stays
        return False


def _write_new(path: Path, content: bytes) -> None:
    """Write a whole file to a free name; FileExistsError if it is taken."""
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=path.parent) as scratch:
        temporary = Path(scratch) / "file"
        temporary.write_bytes(content)
        link_or_copy(temporary, path)


def link_or_copy(source: Path, place: Path) -> None:
    """Give a file a second name, or copy it if the disk has no links; FileExistsError if taken."""
    try:
        os.link(source, place)
    except FileExistsError:
        raise
    except OSError:
        with open(source, "rb") as read, open(place, "xb") as write:
            shutil.copyfileobj(read, write)
