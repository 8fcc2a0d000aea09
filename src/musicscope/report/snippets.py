"""Sound and pictures small enough to lie inside a page: MP3, spectrograms, activation curves.

MP3 because every browser plays it and the encoder writes the same bytes each time (Ogg streams
carry a random serial number). 2.5 s of 16 kHz mono are 8 to 20 kB, a spectrogram about 2 kB.
"""

from __future__ import annotations

import base64
import io
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from musicscope.core.audio import log_mel, resample
from musicscope.report.elements import Moment

RATE = 16_000
FADE = 0.01  # seconds at either end, so that a cut does not click
BANDS, HOP = 48, 320
RANGE = 10.0  # nats of power below the loudest point that are still drawn (43 dB)
LEVELS = 16
KBITS, CONSTANT_LEVEL = 48, 0.75
"""Bit rate per second of `constant_mp3`, and the level of libsndfile that gives it at 16 kHz."""
LONGEST = 6.0  # seconds of a file that are played
DARKEST = 200  # of 255: the activation curve must stand out on the loudest patch


def data_uri(kind: str, content: bytes) -> str:
    """`content` as a data: URI of that MIME type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def window(centre: int, length: int, total: int) -> tuple[int, int]:
    """First frame and end of `length` frames around frame `centre`, inside [0, total)."""
    length = min(length, total)
    first = min(max(0, centre - length // 2), total - length)
    return first, first + length


def mp3(audio: np.ndarray, rate: int) -> bytes:
    """Mono audio [samples] in [-1, 1] as variable-rate MP3 at 16 kHz, faded at both ends.

    Raises:
        ValueError: empty or not finite.
    """
    return _mp3(audio, rate, "VARIABLE", 0.5)


def constant_mp3(audio: np.ndarray, rate: int) -> bytes:
    """As `mp3`, at a constant `KBITS`, so that a browser seeks to within some 50 ms."""
    return _mp3(audio, rate, "CONSTANT", CONSTANT_LEVEL)


def _mp3(audio: np.ndarray, rate: int, mode: str, level: float) -> bytes:
    audio = resample(np.asarray(audio, np.float32), rate, RATE)
    if not len(audio) or not np.isfinite(audio).all():
        raise ValueError("audio for the report is empty or not finite; rerun the stage it is from")
    ramp = np.minimum(1, (np.arange(len(audio)) + 1) / (FADE * RATE)).astype(np.float32)
    stream = io.BytesIO()
    soundfile.write(
        stream, np.clip(audio * ramp * ramp[::-1], -1, 1), RATE, format="MP3",
        bitrate_mode=mode, compression_level=level,
    )  # fmt: skip
    return stream.getvalue()


def spectrogram_levels(audio: np.ndarray, rate: int) -> np.ndarray:
    """Mel spectrogram [48, frames of 20 ms] as uint8 0 (quiet) .. 15, low bands first."""
    mel = log_mel(resample(audio, rate, RATE), RATE, BANDS, hop=HOP)[0]
    floor = max(float(mel.max()) - RANGE, math.log(1e-6))
    scaled = (mel - floor) / RANGE
    return np.round(np.clip(scaled, 0, 1) * (LEVELS - 1)).astype(np.uint8)


def png(levels: np.ndarray) -> bytes:
    """A PNG of 4-bit levels [height, width], row 0 at the bottom: black, level as opacity.

    Transparent where quiet, so that it lies on a light page, and inverted on a dark one.
    """
    height, width = levels.shape
    rows = np.pad(levels[::-1], ((0, 0), (0, width % 2)))
    packed = (rows[:, 0::2] << 4 | rows[:, 1::2]).astype(np.uint8)
    scanlines = np.pad(packed, ((0, 0), (1, 0)))  # filter type 0 before each row
    opacity = bytes(round(i * DARKEST / (LEVELS - 1)) for i in range(LEVELS))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in (
            (b"IHDR", struct.pack(">IIBBBBB", width, height, 4, 3, 0, 0, 0)),
            (b"PLTE", bytes(3 * LEVELS)),
            (b"tRNS", opacity),
            (b"IDAT", zlib.compress(scanlines.tobytes(), 9)),
            (b"IEND", b""),
        )
    )


def curve(values: np.ndarray, top: float) -> str:
    """Activations [frames] as an SVG path in a box of (frames - 1) x 100, 0 at the bottom.

    `top` is the activation at the upper edge. Points inside a straight run are left out.
    """
    heights = np.round(98 - 94 * np.clip(np.asarray(values, float) / max(top, 1e-12), 0, 1))
    keep = np.ones(len(heights), bool)
    keep[1:-1] = np.diff(heights, 2) != 0
    points = " ".join(f"{x} {heights[x]:.0f}" for x in np.flatnonzero(keep))
    return f"M{points}"


@dataclass(frozen=True)
class Line:
    """One curve to draw."""

    name: str
    values: np.ndarray
    """[frames] of the whole clip or file"""
    top: float
    """Activation at the upper edge."""
    colour: int


def excerpt(
    audio: np.ndarray, rate: int, frame_rate: float, centre: int, seconds: float,
    lines: Sequence[Line], caption: str, detail: Callable[[float, float], str], label: str,
) -> Moment:  # fmt: skip
    """Cut `seconds` around frame `centre` out of mono audio [samples].

    All lines share the frames. `detail` makes text from the first and the last second.
    """
    total = max((len(line.values) for line in lines), default=0)
    total = total or round(len(audio) / rate * frame_rate)
    first, end = window(centre, max(2, round(seconds * frame_rate)), total)
    sound = audio[round(first / frame_rate * rate) : round(end / frame_rate * rate)]
    return Moment(
        caption,
        detail(first / frame_rate, end / frame_rate),
        data_uri("audio/mpeg", mp3(sound, rate)),
        data_uri("image/png", png(spectrogram_levels(sound, rate))),
        tuple((line.name, curve(line.values[first:end], line.top), line.colour) for line in lines),
        end - first,
        label,
    )


def file_moment(
    folder: Path, name: str, caption: str, detail: str, label: str = "", longest: float = LONGEST
) -> Moment | None:
    """The first `longest` seconds of a sound file in `folder`; None if it cannot be read there."""
    path = folder / name
    if Path(name).name != name or not path.is_file():
        return None
    try:
        audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
        audio = audio[: round(longest * rate)].mean(1)
        sound, picture = mp3(audio, rate), png(spectrogram_levels(audio, rate))
    except (soundfile.LibsndfileError, ValueError):
        return None
    return Moment(
        caption, detail, data_uri("audio/mpeg", sound), data_uri("image/png", picture),
        label=label or caption,
    )  # fmt: skip
