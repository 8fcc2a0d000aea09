"""Paired activations: by id, never by position; mispaired; in an order that resumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from musicscope.activations.store import StoreError
from musicscope.core.distributed import Ranks
from musicscope.dictionaries import data
from musicscope.dictionaries.data import TEST, TRAIN
from tests.support.dictionaries import PAIRED_FRAMES as T
from tests.support.dictionaries import PAIRED_WIDTHS as WIDTHS
from tests.support.dictionaries import paired_frames, write_paired, write_store


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory):
    return write_paired(tmp_path_factory.mktemp("stores"))


def test_pairs_meet_by_id_whatever_their_order(stores):
    paired = data.pair(stores, TEST)
    assert len(paired) == 8
    for n in range(8):
        ids = {s.ids[i] for s, i in zip(stores, paired.members[n], strict=True)}
        assert ids == {f"c{40 + n}"}
    clip = paired.clip(3)
    np.testing.assert_array_equal(clip[2], stores[2].clip(stores[2].ids.index("c43")))
    assert [x.shape for x in clip] == [(T, d) for d in WIDTHS]


def test_stores_that_do_not_pair_raise(stores, tmp_path: Path):
    clips = paired_frames(4, 0, seed=0)
    write = lambda name, ids, clips=clips, **kw: write_store(  # noqa: E731
        tmp_path / name, clips, ids, **{"group": list("aabb"), **kw}
    )
    good = write("good", ["p", "q", "r", "s"])
    with pytest.raises(StoreError, match=r"1 clips of .*good are not in .*other \(first: s\)"):
        data.pair((good, write("other", ["p", "q", "r", "t"])), TRAIN)
    short = [*clips[:3], clips[3][:-1]]
    with pytest.raises(StoreError, match="clip s has frames 120 in .* and 119 in .*short"):
        data.pair((good, write("short", ["p", "q", "r", "s"], short)), TRAIN)
    with pytest.raises(StoreError, match="clip q has group a in .* and b in"):
        data.pair((good, write("groups", ["p", "q", "r", "s"], group=list("abbb"))), TRAIN)
    with pytest.raises(StoreError, match="no clips"):
        data.pair((good,), "none")


def test_mispaired_clips_are_of_different_compositions_and_all_used(stores):
    paired = data.pair(stores, TRAIN)
    for seed in range(5):
        crossed = data.mispair(paired, seed)
        for j in range(3):
            assert sorted(crossed.members[:, j]) == sorted(paired.members[:, j])
        groups = [s.rows["group"].to_numpy()[crossed.members[:, j]] for j, s in enumerate(stores)]
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert (groups[a] != groups[b]).all()
    few = data.Paired(stores, paired.members[:4], paired.frames[:4], paired.groups[:4])
    with pytest.raises(StoreError, match="cannot be mispaired over 3 models"):
        data.mispair(few, 0)


def test_batches_are_a_paired_permutation_and_start_anywhere(stores):
    paired = data.pair(stores, TRAIN)
    n = int(paired.frames.sum())
    whole = [np.concatenate(x) for x in zip(*paired.clips(), strict=True)]
    for buffer_mb in (512.0, 0.05):
        make_stream = lambda start=0, mb=buffer_mb: paired.batches(  # noqa: E731
            100, 7, 3 * n, start_step=start, buffer_mb=mb
        )
        stream = list(make_stream())
        assert len(stream) == 3 * n // 100
        seen = [np.concatenate(x)[:n] for x in zip(*stream, strict=True)]
        joined, expected = np.concatenate(seen, 1), np.concatenate(whole, 1)
        order, base = np.lexsort(joined.T), np.lexsort(expected.T)
        np.testing.assert_array_equal(joined[order], expected[base])  # each frame once, in pairs
        assert not np.array_equal(joined, expected)
        for late, ours in zip(make_stream(60), stream[60:], strict=True):
            for a, b in zip(late, ours, strict=True):
                np.testing.assert_array_equal(a, b)


def test_each_rank_decodes_its_part_of_the_paired_batches(stores):
    paired = data.pair(stores, TRAIN)
    for buffer_mb in (512.0, 0.05):  # everything in one window, or several
        draw = lambda rows=None, **more: list(  # noqa: E731
            paired.batches(96, 3, 96 * 20, rows=rows, buffer_mb=buffer_mb, **more)  # noqa: B023
        )
        whole, parts = draw(), [draw(Ranks(r, 3).rows(96)) for r in range(3)]
        assert len(whole) == 20
        for step, xs in enumerate(whole):
            for j, x in enumerate(xs):
                np.testing.assert_array_equal(np.concatenate([p[step][j] for p in parts]), x)
        np.testing.assert_array_equal(draw(slice(32, 64), start_step=17)[0][1], whole[17][1][32:64])
