"""Decode an encoded audio file into mono clips of one rate and length, or say why not."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from musicscope.core.audio import resample

Separator = Callable[[np.ndarray, int], np.ndarray]
"""(audio float32 [channels, samples], Hz) -> audio without vocals, [channels, samples]."""

SILENCE_DB = -60.0
"""RMS in dB of full scale below which a window counts as silent."""
RATES = (4_000, 384_000)
"""Range of Hz in a header; other values mean a broken file."""
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


def window_starts(length: float, seconds: float, windows: int) -> list[float]:
    """Place up to `windows` clips, each in the middle of one of as many equal parts.

    One window is the middle of the recording; fewer are cut where they would overlap.
    """
    if length <= seconds:
        return [0.0]
    count = min(windows, int(length / seconds + 1e-9))
    return [length * (2 * i + 1) / (2 * count) - seconds / 2 for i in range(count)]


def _cut_wav(payload: bytes | Path, size: int) -> str:
    """Say by how much a RIFF file is shorter than its header states; empty if it is whole."""
    if isinstance(payload, bytes):
        head = payload[:12]
    else:
        with open(payload, "rb") as file:
            head = file.read(12)
    if len(head) < 12 or head[:4] != b"RIFF" or head[8:] != b"WAVE":
        return ""
    stated = struct.unpack("<I", head[4:8])[0] + 8
    # Written to a pipe, a wav states nothing or the largest number.
    unstated = stated <= 8 or stated >= 0xFFFFFFFF
    return "" if unstated or stated <= size + 1 else f"{size} of {stated} bytes"


def decode(payload: bytes | Path | None, spec: Spec, separate: Separator | None = None) -> Decoded:
    """Cut the clips of `spec` out of one encoded file; no content of the file raises an error."""
    if payload is None:
        return Decoded(problems=(("no audio", "the data set gives none"),))
    size = len(payload) if isinstance(payload, bytes) else os.stat(payload).st_size
    if size == 0:
        return Decoded(problems=(("zero bytes", ""),))
    if cut := _cut_wav(payload, size):
        return Decoded(problems=(("truncated", cut),))
    source = io.BytesIO(payload) if isinstance(payload, bytes) else str(payload)
    try:
        with soundfile.SoundFile(source) as file:
            return _cut(file, spec, separate)
    except soundfile.LibsndfileError as error:
        unknown = error.code == 1  # SF_ERR_UNRECOGNISED_FORMAT
        return Decoded(problems=(("not audio" if unknown else "corrupt", error.error_string),))
    except (TypeError, ValueError, RuntimeError, MemoryError) as error:
        return Decoded(problems=(("corrupt", str(error)),))


def _cut(file: soundfile.SoundFile, spec: Spec, separate: Separator | None) -> Decoded:
    rate, frames = file.samplerate, file.frames
    if not RATES[0] <= rate <= RATES[1]:
        return Decoded(problems=(("unusable rate", f"{rate} Hz"),))
    wanted = round(spec.seconds * rate)
    if frames < spec.min_share * wanted:
        return Decoded(problems=(("too short", f"{frames / rate:.2f} s"),), rate=rate)
    clips, problems, limited = [], [], 0
    for start in window_starts(frames / rate, spec.seconds, spec.windows):
        first = min(round(start * rate), max(frames - wanted, 0))
        file.seek(first)
        sound = file.read(min(wanted, frames), dtype="float32", always_2d=True).T
        if sound.shape[1] < min(wanted, frames):
            problems.append(("truncated", f"{first / rate:.2f} s: the header promises more"))
            continue
        if not np.isfinite(sound).all():
            problems.append(("corrupt", f"{first / rate:.2f} s: not finite"))
            continue
        if separate is not None:
            sound = separate(sound, rate)
        mono = resample(sound.mean(0), rate, spec.sample_rate)[: spec.samples]
        mono = np.pad(mono, (0, spec.samples - len(mono)))
        level = float(np.sqrt(np.mean(np.square(mono, dtype=np.float64))))
        if level < 10 ** (SILENCE_DB / 20):
            problems.append(("silent", f"{first / rate:.2f} s"))
            continue
        if (peak := float(np.abs(mono).max())) > 1:
            limited += 1
            mono = mono / np.float32(peak)
        clips.append((first / rate, mono))
    padded = bool(clips) and frames < wanted
    return Decoded(tuple(clips), tuple(problems), rate, padded, limited)


def decode_job(job: tuple[bytes | Path | None, Spec], separate: Separator | None = None) -> Decoded:
    """Decode one (payload, spec), as jobs for other processes hold them."""
    return decode(*job, separate=separate)
