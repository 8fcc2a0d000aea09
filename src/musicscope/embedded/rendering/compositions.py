"""The 75 Freedoom MIDI pieces, read out of the two WAD files of the `vizdoom` wheel.

WAD: magic, lump count and directory offset (12 bytes), then one 16-byte directory entry a lump:
offset, size, eight characters of name. Music lumps are called ``D_*`` and hold standard MIDI.
"""

from __future__ import annotations

import hashlib
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SPLITS = ("train", "validation", "test")
# Shares of compositions. Test is large because every interval is a bootstrap over compositions.
SPLIT_SHARES = (0.6, 0.13, 0.27)
MIN_NOTES = 4  # a part with fewer notes in a window is not "playing"
BASS_PROGRAMS = range(32, 40)


@dataclass(frozen=True)
class Part:
    """One MIDI track: notes sorted by onset, seconds and MIDI numbers."""

    program: int
    is_drum: bool
    start: np.ndarray
    """Onsets [notes], seconds."""
    end: np.ndarray
    pitch: np.ndarray
    velocity: np.ndarray

    @property
    def is_bass(self) -> bool:
        """Whether General MIDI calls this part a bass."""
        return not self.is_drum and self.program in BASS_PROGRAMS

    def window(self, start: float, seconds: float) -> Part:
        """Notes sounding in [start, start + seconds), times relative to `start`.

        A note that began up to one second before is kept (its onset clipped to -1 s), so that a
        held chord is heard from the first sample.
        """
        keep = (self.start >= start - 1.0) & (self.start < start + seconds) & (self.end > start)
        return Part(
            self.program,
            self.is_drum,
            self.start[keep] - start,
            np.minimum(self.end[keep], start + seconds) - start,
            self.pitch[keep],
            self.velocity[keep],
        )


@dataclass(frozen=True)
class Composition:
    """One piece. `group` names it in every split and every bootstrap."""

    group: str
    seconds: float
    parts: tuple[Part, ...]
    tempo_times: np.ndarray
    """Seconds at which the tempo changes."""
    tempo_bpm: np.ndarray


def midi_lumps(wad: bytes) -> dict[str, bytes]:
    """Name -> MIDI bytes of every ``D_*`` lump.

    Raises:
        ValueError: the bytes are no WAD, or its directory points outside the file.
    """
    if wad[:4] not in (b"IWAD", b"PWAD"):
        raise ValueError("not a WAD file: it must begin with IWAD or PWAD")
    count, directory = struct.unpack_from("<ii", wad, 4)
    if count < 0 or directory < 0 or directory + 16 * count > len(wad):
        raise ValueError("truncated WAD file: its directory lies outside the file")
    lumps = {}
    for i in range(count):
        offset, size, raw_name = struct.unpack_from("<ii8s", wad, directory + 16 * i)
        name = raw_name.split(b"\0")[0].decode("ascii", "replace")
        data = wad[offset : offset + size]
        if name.startswith("D_") and data[:4] == b"MThd":
            lumps[name] = data
    return lumps


def parse_midi(data: bytes, group: str) -> Composition:
    """Parse MIDI bytes into parts with times in seconds."""
    from symusic import Score  # a machine that only trains needs no MIDI parser

    score = Score.from_midi(data).to("second")
    parts = []
    for track in score.tracks:
        notes = track.notes.numpy()
        if len(notes["time"]) == 0:
            continue
        order = np.lexsort((notes["pitch"], notes["time"]))
        start = notes["time"][order].astype(np.float64)
        parts.append(
            Part(
                int(track.program),
                bool(track.is_drum),
                start,
                start + notes["duration"][order].astype(np.float64),
                notes["pitch"][order].astype(np.int64),
                notes["velocity"][order].astype(np.int64),
            )
        )
    tempos = sorted((float(t.time), float(t.qpm)) for t in score.tempos) or [(0.0, 120.0)]
    seconds = max((float(p.end.max()) for p in parts), default=0.0)
    times, bpm = np.array(tempos).T
    return Composition(group, seconds, tuple(parts), times, bpm)


def load_freedoom(wheel: str | Path) -> list[Composition]:
    """All distinct pieces, sorted by name; a lump found in both WADs is kept once."""
    seen: dict[str, Composition] = {}
    with zipfile.ZipFile(wheel) as archive:
        for wad in ("freedoom1", "freedoom2"):
            lumps = midi_lumps(archive.read(f"vizdoom/{wad}.wad"))
            for name, data in sorted(lumps.items()):
                digest = hashlib.sha256(data).hexdigest()
                if digest not in seen:
                    seen[digest] = parse_midi(data, f"{wad}/{name}")
    return sorted(seen.values(), key=lambda c: c.group)


def split_compositions(
    pieces: list[Composition], seed: int, seconds: float
) -> dict[str, list[Composition]]:
    """Split whole pieces into train, validation and test; one with no usable window is left out."""
    usable = [p for p in pieces if playable_windows(p, seconds)]
    order = np.random.default_rng(seed).permutation(len(usable))
    bounds = np.round(np.cumsum((0.0, *SPLIT_SHARES)) * len(usable)).astype(int)
    return {
        split: [usable[i] for i in sorted(order[a:b])]
        for split, a, b in zip(SPLITS, bounds[:-1], bounds[1:], strict=True)
    }


def playable_windows(piece: Composition, seconds: float, hop: float = 1.0) -> list[float]:
    """Starts (seconds, on a grid of `hop`) of windows with two or more pitched parts playing."""
    starts = np.arange(0.0, max(piece.seconds - seconds, 0.0), hop)
    playing = np.zeros(len(starts), int)
    for part in piece.parts:
        if not part.is_drum:
            notes = np.searchsorted(part.start, starts + seconds) - np.searchsorted(
                part.start, starts
            )
            playing += notes >= MIN_NOTES
    return [float(s) for s in starts[playing >= 2]]
