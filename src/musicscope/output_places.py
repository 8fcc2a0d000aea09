"""Whether an output may go where a user says: errors of one line that say what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

Place = str | os.PathLike[str]


class OutputError(ValueError):
    """An output that cannot be written without harm; the text says what to do, in one line."""


def shown(path: Place) -> str:
    """Show a path in a message of one line."""
    text = os.fspath(path)
    return text if text.isprintable() else repr(text)


def real_path(path: Place, option: str) -> Path:
    """Follow links; OutputError for an empty path and for a link to nothing."""
    text = os.fspath(path)
    if not text or "\0" in text:
        raise OutputError(f"{option} {text!r} is no path: name one")
    real = Path(os.path.realpath(text))
    if os.path.islink(real) or (os.path.islink(text.rstrip("/")) and not real.exists()):
        raise OutputError(f"{option} {shown(path)} is a link to nothing: name another path")
    return real


def spelled(given: Place, real: Path) -> Path:
    """A path as it was given, or `real` where that passes through folders that may not be there."""
    return real if ".." in Path(given).parts else Path(given)


# --- what an output must keep away from -------------------------------------------------------


def _same(one: Path, other: Path) -> bool:
    """Compare by file where both are there: links, mounts and letter case do not matter."""
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return one == other


def _within(path: Path, folder: Path) -> bool:
    return any(_same(place, folder) for place in (path, *path.parents))


def check_apart(
    out: Place, inputs: Mapping[str, Place], option: str = "--out", contains: bool = True
) -> None:
    """Refuse an output that is an input or lies in one; with `contains` also one that holds one.

    Args:
        inputs: what is read, by what it is called.

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
    """Patterns of what the stages of ./dvc.yaml make, relative to it; none without one."""
    try:
        tree = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))
        stages = [stage.get("do", stage) for stage in tree["stages"].values()]
        entries = [
            entry if isinstance(entry, str) else next(iter(entry))
            for stage in stages
            for section in ("outs", "metrics", "plots")
            for entry in stage.get(section, ())
        ]
    except (OSError, ValueError, AttributeError, KeyError, TypeError, yaml.YAMLError):
        return []
    parts = (re.split(r"\$\{[^}]*\}", entry.rstrip("/")) for entry in entries)
    return ["[^/]+".join(map(re.escape, part)) for part in parts]


def check_no_stage(out: Path, option: str = "--out") -> None:
    """Refuse an output that is, or lies in, what a stage of ./dvc.yaml makes: DVC removes that.

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
def one_line_errors(option: str, path: Place) -> Iterator[None]:
    """Turn an error of the system into one line that names the output."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"{option} {shown(path)} cannot be written ({reason}): name another path"
        ) from error


@contextlib.contextmanager
def made_parents(path: Path) -> Iterator[None]:
    """Make the folders above `path`; those made here are removed, if empty, after an error."""
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
