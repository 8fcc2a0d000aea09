"""List audio files and decode them into mono clips of one rate and length, or say why not."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile

from musicscope.core.audio import resample

Separator = Callable[[np.ndarray, int], np.ndarray]
"""(audio float32 [channels, samples], Hz) -> audio without vocals, [channels, samples]."""

SILENCE_DB = -60.0
"""RMS in dB of full scale below which a window counts as silent."""
RATES = (4_000, 384_000)
"""Range of Hz in a header; other values mean a broken file."""
BLOCK = 512
"""Frames that are read at once where the length is counted: fewer are lost at an error."""
HEAD = 1 << 16
"""Bytes at either end of a file that are searched for its size."""
ENDLESS = b"\0\xff\xff\xff"
MP3_HZ = (44100, 48000, 32000)
MP3_KBPS = (
    (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
)
"""Of layer III in MPEG 2 and 2.5, and in MPEG 1."""
UNSTATED = 1 << 60
"""Frames that libsndfile gives for a file that states no length."""
SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf")


def plain(text: str) -> str:
    """Escape bytes that are no UTF-8, so that the text can be written."""
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class Problem:
    """Something that was left out: its name, the reason, and details."""

    name: str
    reason: str
    detail: str = ""

    def texts(self) -> list[str]:
        """[name, reason, detail], as tables and JSON hold them."""
        return [plain(self.name), self.reason, plain(self.detail)]


def list_files(folder: str | Path) -> tuple[list[str], list[Problem]]:
    """List the files below a folder: names relative to it, sorted, and problems.

    Hidden names are left out. A link to a folder is followed unless that folder is listed already;
    then it is a problem, as are names that are not UTF-8, broken links, unreadable folders and
    anything that is neither file nor folder.

    Raises:
        OSError: the folder itself cannot be read.
    """
    root = Path(folder)
    names: list[str] = []
    problems: list[Problem] = []
    inside, links = [""], []
    seen = {_inode(root)}
    while inside or links:
        # Links come last, so that a folder is listed under its own name.
        if not inside:
            name = links.pop(0)
            if _inode(root / name) in seen:
                problems.append(Problem(name, "link", "to a folder that is listed already"))
                continue
            seen.add(_inode(root / name))
            inside.append(name)
        parent = inside.pop()
        try:
            entries = sorted(os.scandir(root / parent), key=lambda entry: entry.name)
        except OSError as error:
            if not parent:
                raise
            problems.append(Problem(parent, "unreadable", error.strerror or ""))
            continue
        for entry in entries:
            name = f"{parent}/{entry.name}" if parent else entry.name
            if entry.name.startswith("."):
                continue
            if plain(name) != name:
                problems.append(Problem(plain(name), "unsafe path", "its name is not UTF-8"))
            elif entry.is_file():
                names.append(name)
            elif entry.is_dir() and entry.is_symlink():
                links.append(name)
            elif entry.is_dir():
                seen.add(_inode(root / name))
                inside.append(name)
            else:
                broken = entry.is_symlink() and not os.path.exists(entry)
                problems.append(Problem(name, "link" if broken else "not a regular file",
                                        "to nothing" if broken else ""))  # fmt: skip
    problems.sort(key=lambda problem: problem.name.split("/"))
    return sorted(names, key=lambda name: name.split("/")), problems


def _inode(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


@dataclass(frozen=True)
class Spec:
    """Length, rate and number of clips to cut from a file."""

    seconds: float
    sample_rate: int
    windows: int
    min_share: float

    @property
    def samples(self) -> int:
        """Samples per clip."""
        return round(self.seconds * self.sample_rate)


@dataclass(frozen=True)
class Decoded:
    """Clips of one file, and problems."""

    clips: tuple[tuple[float, np.ndarray], ...] = ()
    """(start in seconds, float32 [samples] in [-1, 1])."""
    problems: tuple[tuple[str, str], ...] = ()
    """(reason, detail): of the file, or of a window."""
    rate: int = 0
    """Hz of the file."""
    padded: bool = False
    """Whether the file is shorter than a clip and was padded with zeros."""
    limited: int = 0
    """Windows above full scale, scaled down to it."""
    cut: str = ""
    """How much of the file is there, if its end is absent: the clips are of the rest."""


def window_starts(length: float, seconds: float, windows: int) -> list[float]:
    """Place up to `windows` clips, each in the middle of one of as many equal parts.

    One window is the middle of the recording; fewer are cut where they would overlap.
    """
    if length <= seconds:
        return [0.0]
    count = min(windows, int(length / seconds + 1e-9))
    return [length * (2 * i + 1) / (2 * count) - seconds / 2 for i in range(count)]


class UnusableRate(ValueError):
    """A sample rate out of RATES."""


class AudioFile:
    """An audio file whose length is counted where its header is wrong.

    Raises:
        EOFError: it is cut so short that it cannot be opened.
        soundfile.LibsndfileError, OSError: it cannot be opened.
    """

    def __init__(self, payload: bytes | Path) -> None:
        self.payload = payload
        size = len(payload) if isinstance(payload, bytes) else os.stat(payload).st_size
        with self._bytes() as file:
            head = file.read(HEAD)
            file.seek(max(size - HEAD, 0))
            tail = file.read()
            uncounted = _uncounted_mp3(file, head)
            if repaired := _repaired(head, size) or uncounted:
                file.seek(0)
                self.payload = repaired + file.read()[min(len(repaired), len(head)) :]
        stated = _stated_bytes(head)
        self.cut = f"{size} of {stated} bytes" if stated > size + 1 else ""
        """How much is there of how much the header states; empty if all is."""
        if head[:4] == b"OggS" and not _ends(tail):
            self.cut = "the last page is absent"
        try:
            file = self._open()
        except soundfile.LibsndfileError as error:
            raise EOFError(self.cut) if self.cut else error from error
        with file:
            self.rate, self.frames = file.samplerate, file.frames
            if not RATES[0] <= self.rate <= RATES[1]:
                raise UnusableRate(f"{self.rate} Hz")
            try:
                file.seek(max(self.frames - 1, 0))
                self.seekable = len(file.read(1)) == 1
            except soundfile.LibsndfileError:
                self.seekable = False
        if not self.seekable and self.frames:
            stated, self.frames = self.frames, sum(len(block) for block in self._blocks())
            if self.frames < stated < UNSTATED and not uncounted:
                self.cut = f"{self.frames / self.rate:.2f} of {stated / self.rate:.2f} s"

    def _bytes(self) -> BinaryIO:
        of = self.payload
        return io.BytesIO(of) if isinstance(of, bytes) else open(of, "rb")

    def _open(self) -> soundfile.SoundFile:
        of = self.payload
        return soundfile.SoundFile(io.BytesIO(of) if isinstance(of, bytes) else str(of))

    def _blocks(self) -> Iterator[np.ndarray]:
        """Read from the start to the first error."""
        with self._open() as file:
            try:
                while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
                    yield block
            except soundfile.LibsndfileError:
                return

    def read(self, first: int, count: int) -> np.ndarray:
        """Read float32 [channels, at most `count`] from frame `first` on."""
        if self.seekable:
            with self._open() as file:
                file.seek(first)
                return file.read(count, dtype="float32", always_2d=True).T
        kept, at = [], 0
        for block in self._blocks():
            part = block[max(first - at, 0) : first + count - at]
            kept += [part] if len(part) else []
            at += len(block)
            if at >= first + count:
                break
        return np.concatenate(kept or [np.zeros((0, 1), np.float32)]).T


def _unfilled(stated: int) -> bool:
    """Say whether a size is a placeholder of programs that write to a pipe."""
    return stated == 0 or 0x7FFFF000 <= stated < 0x80001000 or stated >= 0xFFFFF000


def _stated_bytes(head: bytes) -> int:
    """Size that the header of a WAV, AIFF or AU file states; 0 if none, or not filled in."""
    kinds = {b"RIFFWAVE": "<", b"FORMAIFF": ">", b"FORMAIFC": ">"}
    if form := kinds.get(head[:4] + head[8:12]):
        stated = struct.unpack(f"{form}I", head[4:8])[0]
        return 0 if _unfilled(stated) else stated + 8
    if head[:4] == b".snd" and len(head) >= 12:
        first, stated = struct.unpack(">II", head[4:12])
        return 0 if _unfilled(stated) else first + stated
    return 0


def _repaired(head: bytes, size: int) -> bytes:
    """Start of a WAV file with the size of its samples, where it states none; else nothing."""
    if head[:4] + head[8:12] != b"RIFFWAVE":
        return b""
    at = 12
    while at + 8 <= len(head):
        name, stated = struct.unpack("<4sI", head[at : at + 8])
        if name == b"data":
            rest = min(size - at - 8, 0xFFFFFFFE)
            return head[: at + 4] + struct.pack("<I", rest) if stated == 0 < rest else b""
        at += 8 + stated + stated % 2
    return b""


def _uncounted_mp3(file: BinaryIO, head: bytes) -> bytes:
    """Start of an MP3 file whose header claims endless frames, so that all are decoded; or nothing.

    Without a Xing header libsndfile estimates the length, and reads no further than that. With one
    it does not read what follows the stated bytes, as in files that were joined.
    """
    at = 0
    if head[:3] == b"ID3" and len(head) >= 10:
        at = 10 + sum((byte & 127) << 7 * (3 - i) for i, byte in enumerate(head[6:10]))
    frame = head[at : at + 4]
    if len(frame) < 4 or frame[0] != 255 or frame[1] & 0xE6 != 0xE2:  # MPEG audio, layer III
        return b""
    version, rate, kbps = frame[1] >> 3 & 3, frame[2] >> 2 & 3, frame[2] >> 4
    if version == 1 or rate == 3 or kbps in (0, 15):
        return b""
    side = (32, 17)[frame[3] >> 6 == 3] if version == 3 else (17, 9)[frame[3] >> 6 == 3]
    tag = at + 4 + side
    if head[tag : tag + 4] in (b"Xing", b"Info"):
        if head[tag + 7] & 3 != 3 or len(head) < tag + 16:
            return b""
        file.seek(at + struct.unpack(">I", head[tag + 12 : tag + 16])[0])
        more = file.read(4)
        joined = more[:3] == b"ID3" or more[:2] == frame[:2]
        return head[: tag + 8] + ENDLESS + head[tag + 12 :] if joined else b""
    if head[at + 36 : at + 40] == b"VBRI":
        return b""
    hz = MP3_HZ[rate] >> (0 if version == 3 else 1 if version == 2 else 2)
    length = (144 if version == 3 else 72) * 1000 * MP3_KBPS[version == 3][kbps - 1] // hz
    length += frame[2] >> 1 & 1
    made = frame[:1] + bytes([frame[1] | 1]) + frame[2:] + bytes(side) + b"Xing\0\0\0\1" + ENDLESS
    return head[:at] + made.ljust(length, b"\0") + head[at:] if len(made) <= length else b""


def _ends(tail: bytes) -> bool:
    """Say whether an Ogg file's last page is marked as the last of its stream."""
    at = tail.rfind(b"OggS")
    return at < 0 or len(tail) <= at + 5 or bool(tail[at + 5] & 4)


def decode(payload: bytes | Path | None, spec: Spec, separate: Separator | None = None) -> Decoded:
    """Cut the clips of `spec` out of one encoded file; no content of the file raises an error."""
    if payload is None:
        return Decoded(problems=(("no audio", "the data set gives none"),))
    try:
        if not (len(payload) if isinstance(payload, bytes) else os.stat(payload).st_size):
            return Decoded(problems=(("zero bytes", ""),))
        return _cut(AudioFile(payload), spec, separate)
    except soundfile.LibsndfileError as error:
        unknown = error.code == 1  # SF_ERR_UNRECOGNISED_FORMAT
        return Decoded(problems=(("not audio" if unknown else "corrupt", error.error_string),))
    except UnusableRate as error:
        return Decoded(problems=(("unusable rate", str(error)),))
    except EOFError as error:
        return Decoded(problems=(("truncated", str(error)),))
    except OSError as error:
        return Decoded(problems=(("unreadable", error.strerror or str(error)),))
    except (TypeError, ValueError, RuntimeError, MemoryError) as error:
        return Decoded(problems=(("corrupt", str(error)),))


def _cut(file: AudioFile, spec: Spec, separate: Separator | None) -> Decoded:
    rate, frames = file.rate, file.frames
    wanted = round(spec.seconds * rate)
    if not frames or frames < spec.min_share * wanted:
        reason = ("truncated", file.cut) if file.cut else ("too short", f"{frames / rate:.2f} s")
        return Decoded(problems=(reason,), rate=rate)
    clips, problems, limited = [], [], 0
    for start in window_starts(frames / rate, spec.seconds, spec.windows):
        first = min(round(start * rate), max(frames - wanted, 0))
        where = f"{first / rate:.2f} s"
        try:
            sound = file.read(first, min(wanted, frames))
        except soundfile.LibsndfileError as error:
            problems.append(("corrupt", f"{where}: {error.error_string}"))
            continue
        if sound.shape[1] < min(wanted, frames):
            problems.append(("truncated", f"{where}: the header promises more"))
            continue
        if not np.isfinite(sound).all():
            problems.append(("corrupt", f"{where}: not finite"))
            continue
        if separate is not None:
            sound = separate(sound, rate)
        mono = resample(sound.mean(0), rate, spec.sample_rate)[: spec.samples]
        mono = np.pad(mono, (0, spec.samples - len(mono)))
        level = float(np.sqrt(np.mean(np.square(mono, dtype=np.float64))))
        if level < 10 ** (SILENCE_DB / 20):
            problems.append(("silent", where))
            continue
        if (peak := float(np.abs(mono).max())) > 1:
            limited += 1
            mono = mono / np.float32(peak)
        clips.append((first / rate, mono))
    padded = bool(clips) and frames < wanted
    return Decoded(tuple(clips), tuple(problems), rate, padded, limited, file.cut)


def decode_job(job: tuple[bytes | Path | None, Spec], separate: Separator | None = None) -> Decoded:
    """Decode one (payload, spec), as jobs for other processes hold them."""
    return decode(*job, separate=separate)
