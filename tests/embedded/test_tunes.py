"""Tunes read from ABC and MusicXML, bars, and settings of one melody."""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from musicscope.embedded.rendering.tunes import (
    CORPUS,
    MODES,
    MalformedTune,
    Tune,
    _on_bars,
    merge_settings,
    parse_abc,
    parse_key,
    parse_musicxml,
    read_tunes,
    same_tunes,
)

# Eight bars: a pickup, a repeat with two endings, ornaments, a fingering, a tie and a grace note.
ABC = """X:7
T:The Test % a remark
M:4/4
L:1/8
R:hornpipe
K:D
A2|:d2f2 "4"a2{b}f2|~e2c2 A2.A2|d2-d2 (3efg f2|1 e2c2 A4:|2 e2c2 d4|
f2f2 e2e2|d2d2 [A2c2]A2|G2A2 B2c2|d8|
"""


def melody(group: str, pitch: np.ndarray, book: str = "oneill", step: float = 0.5) -> Tune:
    start = np.arange(len(pitch)) * step
    return Tune(
        group, book, group, (4, 4), 2, "major", start, np.full(len(pitch), step),
        np.asarray(pitch, np.int64), np.zeros(len(pitch), np.int64),
    )  # fmt: skip


def random_melody(seed: int, notes: int = 128) -> np.ndarray:
    rng = np.random.default_rng(seed)
    scale = np.array([60 + 12 * o + d for o in (0, 1) for d in MODES["major"]])
    steps = rng.choice((-2, -1, 1, 2), notes).cumsum()
    return scale[np.abs((steps + 7) % 26 - 13)]


@pytest.mark.parametrize(
    ("text", "key"),
    [("G", (7, "major")), ("F#m", (6, "minor")), ("ADorian", (9, "dorian")),
     ("Hp", (9, "mixolydian")),
     ("Bb", (10, "major")), ("E Minor", (4, "minor")), ("Dmix=c", (2, "mixolydian")),
     ("EM", (4, "major")), ("EMin", (4, "minor"))],
)  # fmt: skip
def test_key(text, key):
    assert parse_key(text) == key


def test_abc_gives_notes_repeats_endings_and_pickup():
    tune = parse_abc(ABC, "aird", "b-1")
    assert (tune.group, tune.title, tune.meter) == ("aird/b-1", "The Test", (4, 4))
    assert (tune.tonic, tune.mode) == (2, "major")
    assert tune.start[0] == -1.0
    assert tune.pitch[0] == 69
    first = [74, 78, 81, 78, 76, 73, 69, 69, 74, 76, 78, 79, 78]
    assert tune.pitch[1:14].tolist() == first
    assert tune.pitch[14:17].tolist() == [76, 73, 69]
    assert tune.pitch[17:30].tolist() == first
    assert tune.pitch[30:33].tolist() == [76, 73, 74]
    # Onsets of the first three bars: plain quarters, then a tied half and a triplet.
    assert tune.start[1:9].tolist() == list(range(8))
    np.testing.assert_allclose(tune.start[9:14], [8, 10, 10 + 1 / 3, 10 + 2 / 3, 11], atol=0.01)
    assert 73 in tune.pitch[33:]  # the top of the chord
    assert tune.bars == 12
    assert tune.start[-1] == 44.0
    assert tune.duration[-1] == 4.0


@pytest.mark.parametrize(
    ("change", "reason"),
    [(("M:4/4", "M:5/4"), "rare meter"), (("K:D", "K:Dwrong"), "unknown key"),
     (("R:hornpipe", "V:1"), None), (("A2|:", "V:2\nA2|:"), "several voices"),
     (("M:4/4\n", ""), "no meter, key or notes"), (("d8|", "[M:3/4]d6|"), "several meters"),
     ((ABC[ABC.index("~e2") :], "\n"), "too few notes")],
)  # fmt: skip
def test_malformed_tunes_say_why(change, reason):
    text = ABC.replace(*change)
    assert text != ABC
    if reason is None:
        parse_abc(text, "aird", "1")
        return
    with pytest.raises(MalformedTune, match=reason):
        parse_abc(text, "aird", "1")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), min_size=1, max_size=6),
    st.integers(0, 2**31),
)
def test_bars_lie_on_the_grid_whatever_the_pickups(sections, seed):
    """Sections of full bars, each after a pickup of 0 to 5 eighths, and no bar cut short for it."""
    rng = np.random.default_rng(seed)
    eighth, bar = 24, 192
    start, first, full, now = [], [], [], 0
    for pickup, bars in sections:
        for length in [pickup] * (pickup > 0) + [8] * bars:
            start += [now, *(now + eighth * np.flatnonzero(rng.random(length - 1) < 0.6) + eighth)]
            added = len(start) - len(first)
            first += [True] + [False] * (added - 1)
            full += [length == 8] + [False] * (added - 1)
            now += eighth * length
    start, first, full = np.array(start), np.array(first), np.array(full)
    moved = _on_bars(start, first, bar)
    downbeats = moved[full]
    assert np.all(downbeats % bar == 0)
    assert downbeats[0] == 0
    assert np.all(np.diff(downbeats) >= bar)
    # Pickups of up to half a bar lie over the bar before; longer ones get a bar to themselves.
    assert downbeats[-1] <= bar * (full.sum() - 1 + sum(p == 5 for p, _ in sections[1:]))


def test_a_tune_whose_sections_fill_their_bars_keeps_its_times():
    start = np.array([0, 24, 48, 96, 216, 240, 312, 336, 432])
    first = np.array([1, 1, 0, 0, 1, 0, 0, 1, 0], bool)
    # A pickup of an eighth, a bar, a bar of five eighths, a pickup of three, a bar.
    first[6] = False
    np.testing.assert_array_equal(_on_bars(start, first, 192)[:6], start[:6] - 24)


def test_settings_of_one_melody_share_a_group_and_stay_in_one_split():
    theme, other = random_melody(0), random_melody(1)
    varied = theme + 5
    varied[10::40] += 2
    tunes = [
        melody("oneill/1", theme), melody("oneill/2", other), melody("oneill/3", theme[:100] - 2),
        melody("aird/1", varied, "aird"), melody("ryan/1", random_melody(2), "ryan"),
        melody("ryan/2", other + 7, "ryan"), melody("ryan/3", other - 1, "ryan", 0.25),
    ]  # fmt: skip
    assert same_tunes(tunes).tolist() == [0, 1, 0, 0, 4, 1, 1]
    kept, dropped = merge_settings(tunes)
    # Test keeps what is in several splits, then validation.
    assert [t.group for t in kept] == ["aird/1", "ryan/1", "ryan/2", "ryan/2"]
    assert dropped == {"oneill": 3}


def test_settings_within_one_book_are_kept():
    theme = random_melody(0)
    kept, dropped = merge_settings([melody("oneill/1", theme), melody("oneill/2", theme + 3)])
    assert [t.group for t in kept] == ["oneill/1", "oneill/1"]
    assert not dropped


def musicxml(parts: int = 4) -> bytes:
    def note(step: str, octave: int, length: int, tie: str = "") -> str:
        tied = f'<tie type="{tie}"/>' if tie else ""
        return (
            f"<note><pitch><step>{step}</step><alter>1</alter><octave>{octave}</octave></pitch>"
            f"<duration>{length}</duration>{tied}</note>"
        )

    head = (
        "<attributes><divisions>2</divisions><key><fifths>-1</fifths><mode>minor</mode></key>"
        "<time><beats>3</beats><beat-type>4</beat-type></time></attributes>"
    )
    part = (
        f"<part><measure>{head}{note('C', 4, 2)}</measure>"
        f"<measure>{note('D', 4, 2)}{note('F', 4, 4, 'start')}</measure>"
        f"<measure>{note('F', 4, 2, 'stop')}{note('G', 4, 1)}{note('A', 4, 1)}"
        f"<note><rest/><duration>2</duration></note></measure>"
        f"<measure>{note('E', 4, 2)}{note('E', 4, 4)}</measure></part>"
    )
    return f"<score-partwise>{part * parts}</score-partwise>".encode()


def test_musicxml_joins_ties_and_finds_the_pickup():
    tune = parse_musicxml(musicxml(), "x")
    soprano = tune.voice == 0
    assert (tune.tonic, tune.mode, tune.meter) == (2, "minor", (3, 4))
    assert tune.pitch[soprano].tolist() == [61, 63, 66, 68, 70, 65, 65]
    assert tune.start[soprano].tolist() == [-1, 0, 1, 4, 4.5, 6, 7]
    assert tune.duration[soprano].tolist() == [1, 1, 3, 0.5, 0.5, 1, 2]
    assert np.bincount(tune.voice).tolist() == [7] * 4
    assert tune.harmonised
    with pytest.raises(MalformedTune, match="four parts"):
        parse_musicxml(musicxml(5), "x")


def test_books_are_read_from_the_wheel_and_skips_are_counted(tmp_path):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("mimetype", "x")
        archive.writestr("META-INF/container.xml", "<x/>")
        archive.writestr("bwv1.xml", musicxml())
    wheel = tmp_path / "music21.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        bad = ABC.replace("X:7", "X:8").replace("M:4/4", "M:5/4")
        archive.writestr(f"{CORPUS}oneills1850/0001-0050.abc", f"% head\n{ABC}\n\n{bad}")
        archive.writestr(f"{CORPUS}airdsAirs/book1.abc", ABC)
        archive.writestr(f"{CORPUS}essenFolksong/han1.abc", ABC)
        archive.writestr(f"{CORPUS}bach/bwv1.mxl", packed.getvalue())
    tunes, skipped = read_tunes(wheel)
    assert [t.group for t in tunes] == ["oneill/0001-0050-0007", "aird/book1-0007", "bach/bwv1"]
    assert skipped == {"oneill: rare meter": 1}
    again, skipped_again = read_tunes(wheel, processes=2)
    assert [t.group for t in again] == [t.group for t in tunes]
    assert all(np.array_equal(a.pitch, b.pitch) for a, b in zip(again, tunes, strict=True))
    assert skipped_again == skipped
    kept, dropped = merge_settings([replace(t, group=f"{i}") for i, t in enumerate(tunes)])
    assert [t.book for t in kept] == ["aird", "bach"]
    assert dropped == {"oneill": 1}
