"""Write files and folders atomically, hash contents, keep and lock scratch of killed runs."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import math
import os
import platform
import shutil
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any, TextIO

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


written: list[Path] = []
"""What this process has put in its place; a file that is written again is listed again."""


def _alive(process: str) -> bool:
    """Tell whether a number may be that of a running process."""
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except (ValueError, PermissionError):
        pass
    return True


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Generator[Path]:
    """Give a temporary path in the same folder, which replaces `path` when the block ends.

    A reader of `path` sees the whole old file or the whole new one. After an error the temporary
    file is removed and `path` is unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: writers such as numpy choose the format by it, or append it.
    prefix, end = f".{path.stem}.{platform.node()}-", f".tmp{path.suffix}"
    for left in path.parent.glob(f"{glob.escape(prefix)}*{glob.escape(end)}"):
        if not _alive(left.name.removeprefix(prefix).removesuffix(end)):
            left.unlink(missing_ok=True)  # in folders that DVC hashes it would be a change
    temporary = path.with_name(f"{prefix}{os.getpid()}{end}")
    try:
        yield temporary
        os.replace(temporary, path)
        written.append(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path: str | Path) -> str:
    r"""Read UTF-8 text with line ends as "\n"; byte order marks at the start of lines are dropped.

    Raises:
        ValueError: other encodings; the message names the file and the line.
    """
    data = Path(path).read_bytes()
    try:
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UnicodeDecodeError("utf-8", data, 0, 2, "this is UTF-16")
        if (at := data.find(b"\0")) >= 0:
            raise UnicodeDecodeError("utf-8", data, at, at + 1, "text holds no zero byte")
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8 text "
            f"({error.reason}); save the file as UTF-8"
        ) from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.removeprefix("\ufeff").replace("\n\ufeff", "\n")  # joined files hold several


def read_json(path: str | Path) -> Any:
    """Read JSON; ValueError names a broken file."""
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
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


def _check_folder(path: Path) -> None:
    """Refuse to replace a link or a file by a folder; ValueError names it."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        kind = "a link" if path.is_symlink() else "a file"
        raise ValueError(f"{path} is {kind}, but the stage writes a folder: move it away")


@contextlib.contextmanager
def atomic_dir(path: str | Path) -> Generator[Path]:
    """Give a new sibling folder that replaces `path` when the block ends without an error.

    For outputs of stages only, of which one runs at a time: what a killed run left is removed.

    Raises:
        ValueError: `path` is a file or a link.
    """
    path = Path(path)
    _check_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # One name for all runs: leftovers under other names would stay in folders that DVC hashes.
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
        written.append(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_dir(partial: Path, path: str | Path) -> None:
    """Move a finished scratch folder to `path`, replacing a folder; ValueError for a file or link.

    For outputs of stages only.
    """
    path = Path(path)
    _check_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(path, ignore_errors=True)
    shutil.move(str(partial), str(path))
    written.append(path)


# --- scratch ----------------------------------------------------------------------------------


def scratch_path(key: Any) -> Path:
    """Name the folder for unfinished work of the inputs `key` (JSON-able), by their hash.

    It is below ``$DVC_ROOT/.dvc/tmp/partial`` (DVC sets DVC_ROOT for its stages, also in temporary
    experiment directories). Work in it through `scratch_dir` or `cache_dir`.
    """
    digest = hashlib.sha256(json.dumps(_plain(key), sort_keys=True).encode()).hexdigest()[:16]
    return Path(os.environ.get("DVC_ROOT", ".")) / ".dvc" / "tmp" / "partial" / digest


@contextlib.contextmanager
def scratch_dir(key: Any) -> Generator[Path]:
    """Give a scratch folder of the inputs `key`, kept after a kill, to one process at a time.

    A rerun with the same inputs resumes; other inputs start anew. A killed `dvc` leaves its stage
    running: the next run waits here until it ends. The folder may be moved away in the block.
    """
    folder = scratch_path(key)
    with sole_user(folder, f"works in {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def cache_dir(key: Any) -> Path:
    """Make a scratch folder for results that several processes add and read at once.

    Files are added whole (`atomic_file`), and no code removes them: deleting them costs time only.
    """
    folder = scratch_path(key)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


_thread_locks: dict[Path, Any] = {}
_held: set[Path] = set()
"""Locks of this process: the system's are per process, and closing a second handle frees them."""


@contextlib.contextmanager
def sole_user(path: Path, what: str) -> Generator[None]:
    """Hold `path`.lock until the block ends; wait, saying so, while another process holds it.

    The system releases the lock when its holder ends, also by a kill. Processes that the holder
    forks do not inherit it. A process may take it again inside the block.

    Args:
        what: what the holder does, for the message of a process that waits.
    """
    lock = path.with_name(f"{path.name}.lock").absolute()
    lock.parent.mkdir(parents=True, exist_ok=True)
    with _thread_locks.setdefault(lock, threading.RLock()):
        if lock in _held:
            yield
            return
        with open(lock, "a+", encoding="utf-8") as stream:
            _take(stream, what)
            _held.add(lock)
            try:
                yield
            finally:
                _held.discard(lock)


def _take(stream: TextIO, what: str) -> None:
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        stream.seek(0)
        holder = stream.read() or "another process"
        print(f"waiting for {holder}: it {what} ({stream.name})", file=sys.stderr, flush=True)
        fcntl.lockf(stream, fcntl.LOCK_EX)
    stream.truncate(0)
    stream.write(f"process {os.getpid()}")
    stream.flush()
