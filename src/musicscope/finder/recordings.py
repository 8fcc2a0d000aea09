"""Folders of recordings as windows of one length and one loudness, ready for a model.

All recordings of both folders give windows of one length, and at most as many as three quarters of
the recordings of either folder can fill. Otherwise the means of longer recordings would be
steadier, and their frames later in the model's sequence. Every window is brought to one level.
Files that cannot be read, and copies, are reported with the reason; the others are used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile

from musicscope.core.audio import TRIVIAL_CUES, trivial_cues
from musicscope.core.stats import auroc_columns, rank_z, standard_ranks
from musicscope.data.audio_files import AudioFile, Problem, Spec, decode, list_files, plain
from musicscope.finder.confounding import indicators
from musicscope.judges.musicnn import level, repeat_to

SIDES = ("with", "without")
LEAST_SECONDS = 0.5
"""A shorter recording is left out and reported."""
MOST_COMPARED = 30.0
"""Seconds in the middle of recordings of one length that are compared."""
SHORTEST = 25
"""Percentile of a folder's lengths that windows are fitted to; shorter recordings are repeated."""
CUE_Z = 3.0
"""A cue is reported if the folders differ in it by more."""


@dataclass(frozen=True)
class Recording:
    """One readable file."""

    path: Path
    side: str
    """"with" or "without" """
    seconds: float
    """Of the whole file, as far as it can be decoded."""


@dataclass(frozen=True)
class Plan:
    """How all recordings are cut."""

    recordings: tuple[Recording, ...]
    seconds: float
    """Length of every window."""
    windows: int
    """Most windows per recording."""


def _length(path: Path) -> float | Problem:
    """Seconds that can be decoded, or why the file cannot be used."""
    cut = ""
    try:
        sound = AudioFile(path)
        seconds, cut = sound.frames / sound.rate, sound.cut
    except (soundfile.LibsndfileError, ZeroDivisionError, RuntimeError, OSError, EOFError,
            TypeError, ValueError):  # fmt: skip
        seconds = float("nan")
    if seconds >= LEAST_SECONDS:
        return seconds
    # `decode` names the problem in the same words as everywhere.
    problems = decode(path, Spec(LEAST_SECONDS, 16_000, 1, 0.0)).problems
    short = ("truncated", cut) if cut else ("too short", f"{seconds:.2f} s")
    reason, detail = problems[0] if problems else short
    return Problem(str(path), reason, detail)


def list_recordings(folder: str | Path) -> tuple[list[Path], list[Problem]]:
    """List the files below a folder, and names that are left out.

    Raises:
        FileNotFoundError: no such folder, or nothing in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{plain(str(root))} is no folder of recordings")
    if plain(str(root)) != str(root):
        raise ValueError(f"{plain(str(root))}: its name is not UTF-8; rename the folder")
    names, problems = list_files(root)
    if not names:
        raise FileNotFoundError(f"{root} holds no files" + "".join(
            f"; {p.name}: {p.reason} {p.detail}" for p in problems[:1]))  # fmt: skip
    listed = [Problem(f"{root}/{p.name}", p.reason, p.detail) for p in problems]
    return [root / name for name in names], listed


def _without_copies(recordings: Sequence[Recording]) -> tuple[list[Recording], list[Problem]]:
    """Keep each sound once, whatever its name or lossless format; none that is in both folders."""
    first: dict[object, Recording] = {}
    copies: dict[Recording, Recording] = {}
    for recording in recordings:
        decoded = decode(recording.path, Spec(min(recording.seconds, MOST_COMPARED), 16_000, 1, 0))
        for _, audio in decoded.clips:
            key = (round(recording.seconds, 3), hashlib.sha256(audio.tobytes()).digest())
            if (of := first.setdefault(key, recording)) is not recording:
                copies[recording] = of
    both = {r for pair in copies.items() if pair[0].side != pair[1].side for r in pair}
    kept = [r for r in recordings if r not in copies and r not in both]
    problems = [
        Problem(str(r.path), "copy", "in both folders" if r in both else f"of {copies[r].path}")
        for r in recordings if r in copies or r in both
    ]  # fmt: skip
    return kept, problems


def plan_recordings(
    folders: Sequence[str | Path], seconds: float, windows: int
) -> tuple[Plan, list[Problem]]:
    """Measure the files of both folders (with, without the concept) and fix the windows.

    One folder alone is one with the concept. `seconds` and `windows` are upper limits.

    Raises:
        FileNotFoundError: no such folder, or nothing in it.
    """
    usable, problems = [], []
    sides = SIDES[: len(folders)]
    for side, folder in zip(sides, folders, strict=True):
        files, listed = list_recordings(folder)
        problems += listed
        for path in files:
            length = _length(path)
            if isinstance(length, Problem):
                problems.append(length)
            else:
                usable.append(Recording(path, side, length))
    usable, copies = _without_copies(usable)
    problems += copies
    lengths = [np.array([r.seconds for r in usable if r.side == side]) for side in sides]
    if all(len(of) for of in lengths):
        shortest = min(np.percentile(of, SHORTEST, method="lower") for of in lengths)
        seconds = float(min(seconds, shortest))
        fits = [np.percentile(of // seconds, SHORTEST, method="lower") for of in lengths]
        windows = int(max(1, min(windows, *fits)))
    return Plan(tuple(usable), seconds, windows), problems


def read_windows(
    recording: Recording, plan: Plan, rate: int
) -> tuple[np.ndarray, list[float], list[Problem]]:
    """Read windows [w, samples] at one level and `rate` Hz, mono, and their starts in seconds.

    w is 0 if nothing of the file can be used; the problems say why.
    """
    audio, starts, problems = read_unlevelled(recording, plan, rate)
    return (level(audio)[0] if len(audio) else audio), starts, problems


def read_unlevelled(
    recording: Recording, plan: Plan, rate: int
) -> tuple[np.ndarray, list[float], list[Problem]]:
    """Read windows as `read_windows` does, as loud as they are in the file."""
    seconds = min(plan.seconds, recording.seconds)
    decoded = decode(recording.path, Spec(seconds, rate, plan.windows, 0.0))
    problems = [Problem(str(recording.path), reason, detail) for reason, detail in decoded.problems]
    if decoded.clips and decoded.cut:
        problems.append(Problem(str(recording.path), "truncated", f"{decoded.cut}; used so far"))
    if not decoded.clips:
        reason = problems or [Problem(str(recording.path), "no audio", "")]
        return np.zeros((0, 1), np.float32), [], reason
    audio = repeat_to(np.stack([clip for _, clip in decoded.clips]), round(plan.seconds * rate))
    _, sounds = level(audio)
    starts = [start for (start, _), kept in zip(decoded.clips, sounds, strict=True) if kept]
    if len(starts) < len(sounds):
        problems.append(Problem(str(recording.path), "silent", "but for an offset"))
    return audio[sounds], starts, problems


def window_cues(audio: np.ndarray, rate: int) -> np.ndarray:
    """Compute cues of a recording's windows [w, samples] as they are in the file: float64 [8].

    The mean trivial cues of the windows at one level, and the mean level of the file.
    """
    loudness = np.sqrt(np.square(audio, dtype=np.float64).mean(1)).mean()
    return np.append(trivial_cues(level(audio)[0], rate).mean(0), loudness)


def recording_cues(recordings: Sequence[Recording], cues: np.ndarray) -> pd.DataFrame:
    """Tabulate all cues of recordings that could separate the folders, one row per recording.

    `cues` [n, 8]: `window_cues` and the level of the file. The level of the windows was made equal
    and is left out; length and type of the file are added.
    """
    table = pd.DataFrame(cues, columns=[*TRIVIAL_CUES, "loudness"]).drop(columns="rms")
    table["length"] = [recording.seconds for recording in recordings]
    types = pd.Series([recording.path.suffix.lower() for recording in recordings], dtype=str)
    return pd.concat([table, indicators("file type", types)], axis=1)


def differing_cues(cues: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Select the cues of [recordings, 8] in which the folders differ beyond chance, with AUROC.

    Features found may follow these instead of the concept. The level is left out: it was made
    equal.
    """
    z = rank_z(standard_ranks(cues), labels[:, None])[0]
    auroc = auroc_columns(cues, labels)
    return {
        name: float(auroc[i])
        for i, name in enumerate(TRIVIAL_CUES)
        if name != "rms" and abs(z[i]) > CUE_Z
    }
