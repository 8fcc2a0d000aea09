"""The clip store: round trip, and what is broken is named."""

from __future__ import annotations

import numpy as np
import pytest

from musicscope.data.clips import ClipStore, write_clips


def row(name: str) -> dict[str, object]:
    return {"id": name, "split": "train", "families": ["guitar"]}


def test_clip_store_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    sounds = rng.uniform(-1, 1, (5, 800)).astype(np.float32)
    write_clips(tmp_path, ((a, row(f"c{i}")) for i, a in enumerate(sounds)), 16_000, 800)
    store = ClipStore.open(tmp_path)
    np.testing.assert_allclose(store.audio([4, 0]), sounds[[4, 0]], atol=1 / 32767)
    assert list(store.select(id="c3")) == [3]
    store.verify()


def test_clip_store_names_what_is_broken(tmp_path):
    with pytest.raises(FileNotFoundError, match="prepare_data"):
        ClipStore.open(tmp_path)
    with pytest.raises(ValueError, match="c0"):
        write_clips(tmp_path, [(np.full(8, np.nan, np.float32), row("c0"))], 16_000, 8)
    good = [(np.zeros(8, np.float32), row("c0"))]
    with pytest.raises(ValueError, match="twice"):
        write_clips(tmp_path, good * 2, 16_000, 8)
    write_clips(tmp_path, good, 16_000, 8)
    shard = tmp_path / "audio-00000.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + b"\x01")
    with pytest.raises(ValueError, match="audio-00000.npy is corrupt"):
        ClipStore.open(tmp_path).verify()
    shard.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match="audio-00000.npy"):
        ClipStore.open(tmp_path)
