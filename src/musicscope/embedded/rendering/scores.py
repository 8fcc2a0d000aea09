"""Scores of the embedded data: tunes and Freedoom pieces, in one file, drawn by split.

`read_scores` parses them from the wheels and needs symusic. `load_scores` reads the file that
`save_scores` wrote and needs only numpy, for machines without symusic and network.
The file is not for publication: the encodings of the tune books carry no licence text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from musicscope.data import wheel_assets as assets
from musicscope.embedded.rendering.compositions import Composition, Part, load_freedoom
from musicscope.embedded.rendering.tunes import GRID, MUSIC21, Tune, merge_settings, read_tunes

FORMAT = 1


@dataclass(frozen=True)
class Arrangement(Composition):
    """A composition with the name of its style, for captions."""

    style: str = ""


@dataclass(frozen=True)
class Scores:
    """All parsed scores."""

    tunes: tuple[Tune, ...]
    """Each melody in one split only, see `merge_settings`."""
    freedoom: tuple[Composition, ...]
    """Sorted by group, as `load_freedoom` gives them."""
    skipped: dict[str, int]
    """Number of malformed tunes by ``book: reason``."""
    dropped: dict[str, int]
    """Number of tunes left out by book, because another split has the melody."""


def read_scores(processes: int = 1) -> Scores:
    """Parse all scores from the wheels of music21 and vizdoom (a minute of one core).

    Needs symusic. The result does not depend on the number of processes.
    """
    tunes, skipped = read_tunes(assets.fetch(MUSIC21), processes)
    kept, dropped = merge_settings(tunes)
    freedoom = load_freedoom(assets.fetch(assets.VIZDOOM))
    return Scores(tuple(kept), tuple(freedoom), dict(skipped), dict(dropped))


def _column(items: list[np.ndarray], dtype: type) -> np.ndarray:
    """Concatenate arrays as `dtype`.

    Raises:
        ValueError: a value changes by the conversion.
    """
    joined = np.concatenate(items) if items else np.zeros(0)
    packed = joined.astype(dtype)
    if not np.array_equal(packed.astype(joined.dtype), joined):
        raise ValueError(f"scores do not fit {np.dtype(dtype)}")
    return packed


def save_scores(path: str | Path, scores: Scores | None = None) -> Path:
    """Write `scores`, or those of `read_scores`, to one npz file without pickles.

    Loading returns bit-identical arrays: tunes lie on a grid of 1 / GRID quarter notes, and
    Freedoom's times are sums of float32 values.

    Returns:
        `path`.
    """
    scores = read_scores() if scores is None else scores
    parts = [part for piece in scores.freedoom for part in piece.parts]
    header = {
        "format": FORMAT,
        "grid": GRID,
        "tunes": [[t.group, t.book, t.title, *t.meter, t.tonic, t.mode] for t in scores.tunes],
        "freedoom": [[p.group, p.seconds, len(p.parts)] for p in scores.freedoom],
        "parts": [[p.program, p.is_drum] for p in parts],
        "skipped": scores.skipped,
        "dropped": scores.dropped,
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        np.savez_compressed(
            stream,
            header=np.frombuffer(json.dumps(header).encode(), np.uint8),
            tune_notes=np.array([len(t.start) for t in scores.tunes], np.int32),
            tune_start=_column([np.round(t.start * GRID) for t in scores.tunes], np.int32),
            tune_duration=_column([np.round(t.duration * GRID) for t in scores.tunes], np.int16),
            tune_pitch=_column([t.pitch for t in scores.tunes], np.int8),
            tune_voice=_column([t.voice for t in scores.tunes], np.int8),
            part_notes=np.array([len(p.start) for p in parts], np.int32),
            part_start=_column([p.start for p in parts], np.float32),
            part_end=np.concatenate([p.end for p in parts] or [np.zeros(0)]),
            part_pitch=_column([p.pitch for p in parts], np.int8),
            part_velocity=_column([p.velocity for p in parts], np.int8),
            tempo_notes=np.array([len(p.tempo_bpm) for p in scores.freedoom], np.int32),
            tempo_times=np.concatenate([p.tempo_times for p in scores.freedoom] or [np.zeros(0)]),
            tempo_bpm=np.concatenate([p.tempo_bpm for p in scores.freedoom] or [np.zeros(0)]),
        )
    return path


def load_scores(path: str | Path) -> Scores:
    """Read the file that `save_scores` wrote, with numpy alone.

    Raises:
        ValueError: the file has another format.
    """
    with np.load(path, allow_pickle=False) as file:
        data = {name: file[name] for name in file.files}
    header = json.loads(data["header"].tobytes()) if "header" in data else {}
    if header.get("format") != FORMAT:
        raise ValueError(f"{path}: not a file of scores of format {FORMAT}; save it again")

    def cut(name: str, dtype: type, counts: str) -> list[np.ndarray]:
        return np.split(data[name].astype(dtype), np.cumsum(data[counts])[:-1])

    start, duration, pitch, voice = (
        cut(f"tune_{name}", dtype, "tune_notes")
        for name, dtype in (
            ("start", np.float64), ("duration", np.float64), ("pitch", np.int64),
            ("voice", np.int64),
        )
    )  # fmt: skip
    tunes = tuple(
        Tune(group, book, title, (beats, unit), tonic, mode, start[i] / GRID, duration[i] / GRID,
             pitch[i], voice[i])
        for i, (group, book, title, beats, unit, tonic, mode) in enumerate(header["tunes"])
    )  # fmt: skip
    columns = zip(
        header["parts"], cut("part_start", np.float64, "part_notes"),
        cut("part_end", np.float64, "part_notes"), cut("part_pitch", np.int64, "part_notes"),
        cut("part_velocity", np.int64, "part_notes"), strict=True,
    )  # fmt: skip
    parts = iter([Part(*head, *notes) for head, *notes in columns])
    times, bpm = (cut(name, np.float64, "tempo_notes") for name in ("tempo_times", "tempo_bpm"))
    freedoom = tuple(
        Composition(group, seconds, tuple(next(parts) for _ in range(count)), times[i], bpm[i])
        for i, (group, seconds, count) in enumerate(header["freedoom"])
    )
    return Scores(tunes, freedoom, header["skipped"], header["dropped"])
