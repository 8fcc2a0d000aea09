"""The file of scores, and pieces drawn by split."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from musicscope.embedded.rendering.compositions import Composition, Part
from musicscope.embedded.rendering.pieces import SHARES, SPLITS, Pieces
from musicscope.embedded.rendering.scores import Scores, load_scores, save_scores
from musicscope.embedded.rendering.styles import HELD_OUT_STYLES, TRAIN_STYLES
from musicscope.embedded.rendering.tunes import BOOK_SPLITS, GRID, Tune

WITHOUT_SYMUSIC = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("symusic", "music21", "torch", "tinysoundfont"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda n, p=None: None if n == "symusic" else find(n, p)
from musicscope.embedded.rendering.scores import load_scores
from musicscope.embedded.rendering.pieces import Pieces
pieces = Pieces(load_scores(sys.argv[1]), "test", 3)
print([[int(p.pitch.sum()), float(p.start.sum()).hex()] for p in pieces.piece(5).parts])
assert "symusic" not in sys.modules
"""


def a_tune(book: str, number: int, voices: int = 1) -> Tune:
    rng = np.random.default_rng(number)
    notes = 128
    start = np.repeat((np.arange(notes) - 1) / 2, voices)
    start[7] += 1 / GRID
    return Tune(
        f"{book}/{number // 2}", book, f"Title é {number}", (4, 4), number % 12, "dorian", start,
        np.full(len(start), 0.5), rng.integers(60, 80, len(start)),
        np.tile(np.arange(voices), notes),
    )  # fmt: skip


def a_composition(number: int) -> Composition:
    rng = np.random.default_rng(number)

    def part(program: int) -> Part:
        start = np.sort(rng.uniform(0.0, 30.0, 200).astype(np.float32)).astype(np.float64)
        end = start + rng.uniform(0.1, 1.0, 200).astype(np.float32)
        return Part(program, False, start, end, rng.integers(30, 90, 200),
                    rng.integers(1, 128, 200))  # fmt: skip

    return Composition(
        f"freedoom/{number:02d}", 31.0 + number / 7, (part(0), part(5)), np.array([0.0, 3.3]),
        np.array([119.99, 80.0]),
    )  # fmt: skip


@pytest.fixture(scope="module")
def scores() -> Scores:
    tunes = [a_tune(book, i) for book in ("oneill", "ryan", "aird") for i in range(6)]
    tunes += [a_tune("bach", i, 4) for i in range(3)]
    return Scores(tuple(tunes), tuple(map(a_composition, range(12))), {"aird: x": 2}, {"ryan": 1})


@pytest.fixture(scope="module")
def path(scores, tmp_path_factory) -> Path:
    return save_scores(tmp_path_factory.mktemp("scores") / "new" / "scores.npz", scores)


def same(left, right):
    assert type(left) is type(right)
    for field in fields(left):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype, field.name
            np.testing.assert_array_equal(a, b)
        elif field.name == "parts":
            for one, other in zip(a, b, strict=True):
                same(one, other)
        else:
            assert a == b, field.name


def test_scores_come_back_bit_for_bit(scores, path):
    loaded = load_scores(path)
    assert (loaded.skipped, loaded.dropped) == (scores.skipped, scores.dropped)
    for name in ("tunes", "freedoom"):
        for left, right in zip(getattr(scores, name), getattr(loaded, name), strict=True):
            same(left, right)


def test_what_does_not_fit_the_file_is_refused(scores, tmp_path):
    bad = replace(scores.tunes[0], pitch=scores.tunes[0].pitch + 300)
    with pytest.raises(ValueError, match="do not fit int8"):
        save_scores(tmp_path / "x.npz", replace(scores, tunes=(bad,)))
    np.savez(tmp_path / "y.npz", header=np.frombuffer(b'{"format": 0}', np.uint8))
    with pytest.raises(ValueError, match="save it again"):
        load_scores(tmp_path / "y.npz")


def test_pieces_are_drawn_without_symusic(scores, path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_SYMUSIC, str(path)], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    parts = Pieces(scores, "test", 3).piece(5).parts
    expected = [[int(p.pitch.sum()), float(p.start.sum()).hex()] for p in parts]
    assert done.stdout.strip() == str(expected)


def test_splits_share_no_group(scores):
    groups = {
        split: {g for many in Pieces(scores, split, 0).groups.values() for g in many}
        for split in SPLITS
    }
    assert not groups["train"] & groups["test"]
    assert not groups["train"] & groups["validation"]
    assert not groups["validation"] & groups["test"]
    for split, names in groups.items():
        books = {g.split("/")[0] for g in names} - {"freedoom"}
        assert books == {book for book, home in BOOK_SPLITS.items() if home == split}


@pytest.mark.parametrize("split", SPLITS)
def test_draws_have_the_shares_and_styles_of_the_split(scores, split):
    pieces = Pieces(scores, split, 0)
    drawn = [pieces.piece(i) for i in range(150)]
    styles = [getattr(p, "style", "") for p in drawn]
    allowed = HELD_OUT_STYLES if split == "test" else TRAIN_STYLES
    kinds = {
        "tunes": np.mean([s in allowed for s in styles]),
        "freedoom": np.mean([s == "" for s in styles]),
        "chorales": np.mean([s == "chorale" for s in styles]),
    }
    for kind, share in kinds.items():
        assert abs(share - SHARES[split].get(kind, 0.0)) < 0.12, kind
    assert sum(kinds.values()) == pytest.approx(1.0)
    again = Pieces(scores, split, 0).piece(149)
    assert [p.pitch.tolist() for p in again.parts] == [p.pitch.tolist() for p in drawn[149].parts]


def test_freedoom_is_split_as_for_the_older_data(scores):
    from musicscope.embedded.rendering.compositions import split_compositions

    expected = split_compositions(list(scores.freedoom), 4, 10.0)
    for split in SPLITS:
        found = Pieces(scores, split, 4).groups["freedoom"]
        assert found == tuple(c.group for c in expected[split])


def test_unknown_names_and_empty_kinds_are_refused(scores):
    with pytest.raises(ValueError, match="unknown split"):
        Pieces(scores, "dev", 0)
    with pytest.raises(ValueError, match="no pieces of kind 'chorales'"):
        Pieces(scores, "train", 0, shares={"chorales": 1.0})
    only = Pieces(scores, "train", 0, styles=("polka",), shares={"tunes": 1.0})
    assert {only.piece(i).style for i in range(8)} == {"polka"}
