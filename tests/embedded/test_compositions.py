"""Compositions: WAD files, windows, splits."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest

from musicscope.embedded.rendering.compositions import (
    Composition,
    Part,
    midi_lumps,
    playable_windows,
    split_compositions,
)


def scale(program: int, pitch: int, notes: int = 60, is_drum: bool = False) -> Part:
    """A part that plays a note every quarter of a second."""
    start = np.arange(notes) * 0.25
    return Part(
        program, is_drum, start, start + 0.2, pitch + np.arange(notes) % 7, np.full(notes, 90)
    )


@pytest.fixture(scope="module")
def piece() -> Composition:
    parts = (scale(30, 52), scale(0, 76), scale(33, 33), scale(0, 36, is_drum=True))
    return Composition("test/piece", 15.0, parts, np.array([0.0]), np.array([120.0]))


def wad(lumps: dict[str, bytes]) -> bytes:
    body, directory = b"", b""
    for name, data in lumps.items():
        directory += struct.pack("<ii8s", 12 + len(body), len(data), name.encode())
        body += data
    return b"IWAD" + struct.pack("<ii", len(lumps), 12 + len(body)) + body + directory


def test_wad_gives_only_midi_lumps():
    data = wad({"D_E1M1": b"MThd-a", "D_MUS": b"MUS\x1a", "PLAYPAL": b"MThd-no"})
    assert midi_lumps(data) == {"D_E1M1": b"MThd-a"}


@pytest.mark.parametrize("data", [b"RIFF" + bytes(20), wad({"D_A": b"MThd"})[:-4]])
def test_wad_that_is_none_or_cut_is_an_error(data):
    with pytest.raises(ValueError, match="WAD"):
        midi_lumps(data)


def test_windows_need_two_pitched_parts(piece):
    assert playable_windows(piece, 10.0) == [0.0, 1.0, 2.0, 3.0, 4.0]
    alone = replace(piece, parts=(piece.parts[0], piece.parts[3]))
    assert playable_windows(alone, 10.0) == []


def test_splits_share_no_composition(piece):
    pieces = [replace(piece, group=f"p{i}") for i in range(40)]
    splits = split_compositions(pieces, seed=1, seconds=10.0)
    names = [{p.group for p in part} for part in splits.values()]
    assert sum(map(len, names)) == len(set.union(*names)) == 40
    assert all(names)
    assert splits == split_compositions(pieces, seed=1, seconds=10.0)
