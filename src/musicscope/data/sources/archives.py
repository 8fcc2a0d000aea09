"""Stream audio files out of tars, zips, folders and parquets without unpacking.

A tar is read once from front to back, one file at a time; no name in an archive is ever used as a
path on disk.
"""

from __future__ import annotations

import contextlib
import functools
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from musicscope.data.audio_files import Problem
from musicscope.data.sources.recordings import Audio, Recording, last_two, unsafe

MAX_BYTES = 1 << 30
"""Larger files in archives are skipped: one file at a time is held in memory."""
BATCH_ROWS = 8
Listed = dict[str, bool]
"""Keys in the metadata, and whether the archive has had them."""


class ArchiveError(ValueError):
    """An archive that cannot be read further; a single bad file in it is a Problem instead."""


@dataclass(frozen=True)
class Item:
    """One requested file, or the reason why a file is skipped."""

    done: int
    """Progress of the stream, in the unit of `extent`."""
    recording: Recording | None = None
    read: Callable[[], bytes | Path | None] | None = None
    """Gives the encoded audio, or its path; valid until the next item is asked for."""
    problem: Problem | None = None


def extent(audio: Audio, recordings: Sequence[Recording]) -> tuple[int, str]:
    """Compute the total of a stream's progress, and its unit."""
    if audio.kind in ("tar", "zip"):
        return audio.bytes, "B"
    if audio.kind == "parquet":
        return sum(pq.read_metadata(path).num_rows for path in audio.paths), "row"
    return len(recordings), "file"


def stream(
    audio: Audio, recordings: Sequence[Recording], listed: frozenset[str], whole: bool
) -> Iterator[Item]:
    """Yield each requested recording in the sequence of the archive, and a problem per other entry.

    Requested recordings that are absent come last, as problems. With `whole` False the stream ends
    once all are read. Entries that the metadata lists (`listed`) but that are not requested are
    passed over.

    Raises:
        ArchiveError: a file that is cut short, or no archive.
    """
    left = {r.key: r for r in recordings}
    if len(left) < len(recordings):
        raise ValueError(f"two of {len(recordings)} recordings have the same audio file by name")
    reader = {"tar": _tar, "zip": _zip, "folder": _folder, "parquet": _parquet}[audio.kind]
    done = 0
    for item in reader(audio.paths, left, {key: False for key in listed | set(left)}):
        done = item.done
        yield item
        if not left and not whole:
            break
    for r in recordings:
        if r.key in left:
            yield Item(done, problem=Problem(r.name, "missing", "not in the archive or folder"))


def _entry(
    name: str, size: int, done: int, left: dict[str, Recording], listed: Listed,
    read: Callable[[], bytes],
) -> Item | None:  # fmt: skip
    """Make the item of one archive entry and take it out of `left`; None if not requested."""
    key = last_two(name)
    if unsafe(name):
        return Item(done, problem=Problem(name, "unsafe path"))
    if key not in listed:
        return Item(done, problem=Problem(name, "not in the metadata"))
    if listed[key]:
        return Item(done, problem=Problem(name, "twice in the archive", "the first is used"))
    listed[key] = True
    if key not in left:
        return None  # not requested
    if size > MAX_BYTES:
        return Item(done, problem=Problem(left.pop(key).name, "too large", f"{size} bytes"))
    return Item(done, left.pop(key), read)


def _tar(paths: Sequence[Path], left: dict[str, Recording], listed: Listed) -> Iterator[Item]:
    before = 0
    for path in paths:
        with path.open("rb") as raw, archive_errors(path):
            tar = tarfile.open(fileobj=raw, mode="r|*")  # noqa: SIM115  closed with `raw`
            while (member := tar.next()) is not None:
                tar.members.clear()  # ty: ignore[missing-attribute]  it would remember every member
                done = before + raw.tell()
                if member.isdir():
                    continue
                if not member.isreg():
                    problem = Problem(member.name, "not a regular file", "link or device")
                    yield Item(done, problem=problem)
                    continue

                read = functools.partial(_read_member, path, tar, member)
                if item := _entry(member.name, member.size, done, left, listed, read):
                    yield item
        before += path.stat().st_size


@contextlib.contextmanager
def archive_errors(path: Path) -> Generator[None]:
    """Turn errors of tarfile, its decompressors and pyarrow into ArchiveError."""
    try:
        yield
    except (
        tarfile.TarError,
        EOFError,
        zlib.error,
        lzma.LZMAError,
        OSError,
        pa.ArrowException,
    ) as e:
        raise ArchiveError(
            f"{path} is cut short or corrupt ({e}); compare its size with the data set's page "
            "and download it again"
        ) from e


def _read_member(path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    with archive_errors(path):
        if (stream := tar.extractfile(member)) is None:
            raise tarfile.TarError(f"{member.name} is no file")
        return stream.read()


def _zip(paths: Sequence[Path], left: dict[str, Recording], listed: Listed) -> Iterator[Item]:
    done = 0
    for path in paths:
        try:
            archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
            raise ArchiveError(f"{path} is no whole zip ({error}); download it again") from error
        with archive:
            for info in archive.infolist():
                done += info.compress_size
                if info.is_dir():
                    continue
                read = functools.partial(archive.read, info)
                if item := _entry(info.filename, info.file_size, done, left, listed, read):
                    yield item


def _folder(paths: Sequence[Path], left: dict[str, Recording], listed: Listed) -> Iterator[Item]:
    for done, (key, recording) in enumerate(list(left.items()), start=1):
        # The metadata's own names lead no further than the folder; links in it are the user's.
        found = next((p / key for p in paths if (p / key).is_file()), None)
        if found is not None and not unsafe(key):
            left.pop(key)
            yield Item(done, recording, lambda found=found: found)


def _parquet(paths: Sequence[Path], left: dict[str, Recording], listed: Listed) -> Iterator[Item]:
    done = 0
    for path in paths:
        with archive_errors(path):
            file = pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
            if "path.bytes" not in {
                c.path for c in map(file.schema.column, range(len(file.schema)))
            }:
                raise ArchiveError(f"{path}: its column path holds no audio (no field bytes)")
            for batch in file.iter_batches(BATCH_ROWS, columns=["track_id", "path"]):
                keys, sounds = batch.column("track_id").to_pylist(), batch.column("path")
                for i, key in enumerate(keys):
                    done += 1
                    if str(key) in left:  # a track has a row per caption
                        embedded = sounds.field("bytes")[i]
                        yield Item(done, left.pop(str(key)), embedded.as_py)
