"""Make a model's folder from hub ids and local folders, whole or absent."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from musicscope.config.data import DownloadModel, Part
from musicscope.core.io import atomic_dir
from musicscope.models import hub
from musicscope.models.registry import detect_system, fetch_model


def folder_of(
    source: str, revision: str, files: Sequence[str], system: str | None, family: bool
) -> Path:
    """Find the folder of a source: a hub id with a revision, a local folder without.

    `family`: where `files` is "*", fetch only the files of a hub id that its family needs.
    FileNotFoundError without such a folder.
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
    """Copy the files below `folder` whose name or path fits a pattern, except hidden ones.

    Links are followed: the hub's cache consists of them. Returns the number of files;
    FileNotFoundError if there is none.
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


def _check_apart(parts: Sequence[DownloadModel | Part], target: Path) -> None:
    """Refuse (ValueError) a local folder that overlaps `target`, which is replaced."""
    real = target.resolve()
    for part in parts:
        folder = Path(part.source).expanduser().resolve()
        if not part.revision and (real.is_relative_to(folder) or folder.is_relative_to(real)):
            raise ValueError(
                f"download_model: {part.source} and {target}, which is replaced, overlap: move the "
                "files elsewhere, or name the model otherwise"
            )


def download(entry: DownloadModel, target: str | Path) -> dict[str, Any]:
    """Replace the folder `target` by the model of `entry`.

    Returns numbers for metrics/download_model/<name>.json. A hub id is fetched into the hub's own
    cache, which resumes after an interruption, and copied. The folder appears once it is complete
    and known to be a model. ValueError for a hub id without a revision that pins, for a folder of
    another family than `entry` names, and for a source that is, holds or lies in `target`.
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
