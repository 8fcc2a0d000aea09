"""Write files and folders atomically, hash contents, keep scratch of killed runs."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np

Metrics = dict[str, Any]
"""Numbers and text nested by name, JSON-able: a metrics file, or a part of one."""


def _plain(value: object) -> object:
    """Turn numpy scalars, arrays and floats into JSON values with six significant digits."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        # JSON has no NaN; a missing number is null, which `dvc metrics` shows as such.
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def write_json(path: str | Path, value: object) -> None:
    """Write `value` with sorted keys and six significant digits, atomically."""
    write_text(path, json.dumps(_plain(value), indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Generator[Path]:
    """Give a temporary path in the same folder, which replaces `path` when the block ends.

    A reader of `path` sees the whole old file or the whole new one. After an error the temporary
    file is removed and `path` is unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: writers such as numpy choose the format by it, or append it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read JSON; ValueError names a broken file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); rerun the stage that wrote it"
        ) from error


def sha256(path: str | Path) -> str:
    """Compute the hex digest of a file, read in blocks."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_sha256(folder: str | Path) -> str:
    """Hash the names and contents of all files below `folder`, except hidden ones."""
    folder = Path(folder)
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    files = [p for p in files if not any(part.startswith(".") for part in p.parts)]
    if not files:
        raise FileNotFoundError(f"{folder} is missing or empty; run dvc repro, or dvc pull")
    lines = "".join(f"{p.as_posix()} {sha256(folder / p)}\n" for p in files)
    return hashlib.sha256(lines.encode()).hexdigest()


@contextlib.contextmanager
def atomic_dir(path: str | Path) -> Generator[Path]:
    """Give a new sibling folder that replaces `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def partial_dir(key: object) -> Path:
    """Make a scratch folder named by a hash of the inputs `key` (JSON-able), kept after a kill.

    It is below ``$DVC_ROOT/.dvc/tmp/partial`` (DVC sets DVC_ROOT for its stages, also in temporary
    experiment directories). A rerun with the same inputs resumes; other inputs start anew.
    """
    digest = hashlib.sha256(json.dumps(_plain(key), sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("DVC_ROOT", ".")) / ".dvc" / "tmp" / "partial" / digest
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def publish_dir(partial: Path, path: str | Path) -> None:
    """Move a finished scratch folder to `path`, replacing a folder that is there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(path, ignore_errors=True)
    shutil.move(str(partial), str(path))


@contextlib.contextmanager
def sole_user(scratch: Path) -> Generator[None]:
    """Wait until no other process works in `scratch`, and make others wait until the block ends.

    A killed `dvc` leaves its stage running, which would move the folder away under the next run.
    The lock file lies beside the folder; the system releases the lock when the process ends.
    """
    with open(scratch.with_name(f"{scratch.name}.lock"), "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another run ({stream.name})", file=sys.stderr)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
