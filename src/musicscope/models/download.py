"""A model's folder out of hub ids and local folders, whole or absent."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from musicscope.core.io import atomic_dir
from musicscope.models import hub
from musicscope.models.registry import detect_system, fetch_model


def folder_of(
    source: str, revision: str, files: Sequence[str], system: str | None, family: bool
) -> Path:
    """The folder that a source stands for: with a revision a hub id, without one a local folder.

    `family`: of a hub id take what its family needs where `files` is "*", else the files alone.
    """
    if not revision:
        folder = Path(source).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(
                f"download_model: {source} is no folder here; a hub id needs a revision"
            )
        return folder
    if family and list(files) == ["*"]:
        return fetch_model(source, revision, system)
    return hub.fetch(source, revision, files)


def copy_files(folder: Path, patterns: Sequence[str], target: Path) -> int:
    """Copy the files below `folder` whose name or path fits a pattern, hidden ones left out.

    Links are followed: the hub's cache consists of them. The number of files; FileNotFoundError
    if there is none.
    """
    count = 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder)
        fits = any(fnmatch.fnmatch(n, p) for n in (name.name, name.as_posix()) for p in patterns)
        if not fits or any(part.startswith(".") for part in name.parts):
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)
        count += 1
    if not count:
        raise FileNotFoundError(f"download_model: {folder} has no file {' or '.join(patterns)}")
    return count


def _check_apart(parts: Sequence[Any], target: Path) -> None:
    """ValueError for a local folder that overlaps the one which is replaced."""
    real = target.resolve()
    for part in parts:
        folder = Path(part.source).expanduser().resolve()
        if not part.revision and (real.is_relative_to(folder) or folder.is_relative_to(real)):
            raise ValueError(
                f"download_model: {part.source} and {target}, which is replaced, overlap: move the "
                "files elsewhere, or name the model otherwise"
            )


def download(entry: Any, target: str | Path) -> dict[str, Any]:
    """Bring a model to the folder `target`, replacing what is there; numbers for
    metrics/download_model/<name>.json.

    `entry` is a section of download_model in params.yaml. A hub id is fetched into the hub's own
    cache, which goes on where it was cut off, and copied. The folder appears once it is complete
    and known to be a model. ValueError for a hub id without a revision that pins, for a folder that
    is not of the family that `entry` names, and for a source that is, holds or lies in `target`.
    """
    for part in entry.parts:
        if ".." in Path(part.into).parts or Path(part.into).is_absolute():
            raise ValueError(f"download_model: parts.into = {part.into!r} leaves the folder")
    _check_apart([entry, *entry.parts], Path(target))
    system = None if entry.system == "auto" else entry.system
    with atomic_dir(target) as out:
        folder = folder_of(entry.source, entry.revision, entry.files, system, family=True)
        count = copy_files(folder, entry.files, out)
        for part in entry.parts:
            folder = folder_of(part.source, part.revision, part.files, None, family=False)
            count += copy_files(folder, part.files, out / part.into)
        found = detect_system(out)
        if system not in (None, found):  # every stage goes by what the folder holds
            raise ValueError(
                f"download_model: with files {list(entry.files)} of {entry.source} the folder is "
                f"taken for {found}, not {system}: let files name those of {system} alone"
            )
        size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    return {"source": entry.source, "revision": entry.revision, "system": found,
            "files": count, "bytes": size}  # fmt: skip
