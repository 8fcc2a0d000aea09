"""Folders of recordings as windows that a model hears: of one length and one loudness.

All recordings of both folders give windows of one length, and as many as a quarter of the shorter
folder's recordings would still allow: a folder of long recordings gets no steadier means, and no
other places in the model's sequence, than one of short ones. Every window is brought to one level.
Files that cannot be read are named with the reason; none of them stops the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from musicscope.core.audio import TRIVIAL_CUES, trivial_cues
from musicscope.core.stats import auroc_columns
from musicscope.data.decoding import Problem, Spec, decode
from musicscope.features.association import rank_z, standard_ranks
from musicscope.judges.musicnn import level, repeat_to

SIDES = ("with", "without")
LEAST_SECONDS = 0.5
"""A recording shorter than this is left out, by name."""
SHORTEST = 25
"""Percentile of a folder's lengths that windows are fitted to; shorter recordings are repeated."""
TELLING_Z = 3.0


@dataclass(frozen=True)
class Recording:
    """One readable file."""

    path: Path
    side: str
    """"with" or "without" """
    seconds: float
    """Of the whole file, by its header."""


@dataclass(frozen=True)
class Plan:
    """How all recordings are cut."""

    recordings: tuple[Recording, ...]
    seconds: float
    """Length of every window."""
    windows: int
    """Most windows a recording."""


def list_files(folder: str | Path) -> list[Path]:
    """All files below a folder but hidden ones, sorted by name.

    Raises:
        FileNotFoundError: no such folder, or nothing in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder of recordings")
    files = sorted(
        path for path in root.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(root).parts)
    )  # fmt: skip
    if not files:
        raise FileNotFoundError(f"{root} holds no files")
    return files


def _length(path: Path) -> float | Problem:
    """Seconds by the header, or why the file is of no use."""
    try:
        info = soundfile.info(str(path))
        seconds = info.frames / info.samplerate
    except (soundfile.LibsndfileError, ZeroDivisionError, RuntimeError, OSError, TypeError):
        seconds = float("nan")
    if seconds >= LEAST_SECONDS:
        return seconds
    # `decode` says what is wrong with it, in the same words as everywhere.
    problems = decode(path, Spec(LEAST_SECONDS, 16_000, 1, 0.0)).problems
    reason, detail = problems[0] if problems else ("too short", f"{seconds:.2f} s")
    return Problem(str(path), reason, detail)


def plan_recordings(
    folders: Sequence[str | Path], seconds: float, windows: int
) -> tuple[Plan, list[Problem]]:
    """Look at the headers of both folders (with, without the concept) and fix the windows."""
    found, problems = [], []
    for side, folder in zip(SIDES, folders, strict=True):
        for path in list_files(folder):
            length = _length(path)
            if isinstance(length, Problem):
                problems.append(length)
            else:
                found.append(Recording(path, side, length))
    lengths = [np.array([r.seconds for r in found if r.side == side]) for side in SIDES]
    if all(len(of) for of in lengths):
        shortest = min(np.percentile(of, SHORTEST, method="lower") for of in lengths)
        seconds = float(min(seconds, shortest))
        fits = [np.percentile(of // seconds, SHORTEST, method="lower") for of in lengths]
        windows = int(max(1, min(windows, *fits)))
    return Plan(tuple(found), seconds, windows), problems


def read_windows(
    recording: Recording, plan: Plan, rate: int
) -> tuple[np.ndarray, list[float], list[Problem]]:
    """Windows [w, samples] at one level and `rate` Hz, mono; where they start, in seconds.

    w is 0 if nothing of the file is of use; the problems say why.
    """
    seconds = min(plan.seconds, recording.seconds)
    decoded = decode(recording.path, Spec(seconds, rate, plan.windows, 0.0))
    problems = [Problem(str(recording.path), reason, detail) for reason, detail in decoded.problems]
    if not decoded.clips:
        reason = problems or [Problem(str(recording.path), "no audio", "")]
        return np.zeros((0, 1), np.float32), [], reason
    audio = repeat_to(np.stack([clip for _, clip in decoded.clips]), round(plan.seconds * rate))
    audio, sounds = level(audio)
    starts = [start for (start, _), kept in zip(decoded.clips, sounds, strict=True) if kept]
    if len(starts) < len(sounds):
        problems.append(Problem(str(recording.path), "silent", "but for an offset"))
    return audio[sounds], starts, problems


def window_cues(audio: np.ndarray, rate: int) -> np.ndarray:
    """Mean trivial cues of a recording's windows [w, samples]: float64 [7]."""
    return trivial_cues(audio, rate).mean(0)


def telling_cues(cues: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Cues [recordings, 7] by which the folders differ more than chance, and their AUROC.

    Not the level, which was made equal. Features found may carry these instead of the concept.
    """
    z = rank_z(standard_ranks(cues), labels[:, None])[0]
    auroc = auroc_columns(cues, labels)
    return {
        name: float(auroc[i])
        for i, name in enumerate(TRIVIAL_CUES)
        if name != "rms" and abs(z[i]) > TELLING_Z
    }
