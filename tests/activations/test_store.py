"""The activation store: round trips, exact statistics, the shuffle, and every kind of damage."""

from __future__ import annotations

import json
import shutil
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from musicscope.activations.store import (
    ActivationStore,
    Moments,
    StoreError,
    StoreWriter,
    decode,
    encode,
    shard_spans,
)

SPLITS = ("train", "validation", "test")


def table(frames: list[int], splits: list[str] | None = None) -> pd.DataFrame:
    count = len(frames)
    return pd.DataFrame(
        {
            "id": [f"clip-{i}" for i in range(count)],
            "split": splits or [SPLITS[i % 3] if i else "train" for i in range(count)],
            "font": "mixed",
            "kind": "clip",
            "group": [f"g{i // 2}" for i in range(count)],
            "frames": frames,
        }
    )


def numbered(frames: list[int], width: int = 2) -> list[np.ndarray]:
    """Clips whose every row is unique and exact in float16: (clip number, frame number)."""
    return [
        np.stack([np.full(n, i), np.arange(n), *[np.zeros(n)] * (width - 2)], 1).astype(np.float32)
        for i, n in enumerate(frames)
    ]


def make(
    folder: Path,
    clips: list[np.ndarray],
    dtype: str = "float16",
    per_shard: int = 2,
    splits: list[str] | None = None,
    config: dict | None = None,
) -> StoreWriter:
    rows = table([len(c) for c in clips], splits)
    edges = [*range(0, len(clips), per_shard), len(clips)]
    return StoreWriter(
        folder,
        width=clips[0].shape[1],
        dtype=dtype,
        clips=rows,
        spans=list(zip(edges[:-1], edges[1:], strict=True)),
        config=config or {"model": "m"},
    )


def write_all(writer: StoreWriter, clips: list[np.ndarray]) -> ActivationStore:
    for shard, (first, stop) in enumerate(writer.spans):
        if not writer.has(shard):
            writer.write(shard, clips[first:stop])
    return writer.finish()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "store"


def small_store(folder: Path) -> ActivationStore:
    clips = numbered([5, 3, 4, 6, 2])
    return write_all(make(folder, clips), clips)


# ---- values


@settings(max_examples=40, deadline=None)
@given(
    frames=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    width=st.integers(1, 7),
    dtype=st.sampled_from(["float16", "bfloat16"]),
    per_shard=st.integers(1, 4),
    scale=st.sampled_from([1e-6, 1.0, 3e3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_values_come_back_rounded_and_the_statistics_are_those_of_train_rows(
    frames, width, dtype, per_shard, scale, seed
):
    rng = np.random.default_rng(seed)
    splits = ["train", *rng.choice(SPLITS, len(frames) - 1)]
    offset = 50 * rng.standard_normal(width)
    clips = [
        (scale * (rng.standard_normal((n, width)) + offset)).clip(-6e4, 6e4).astype(np.float32)
        for n in frames
    ]
    torch_dtype = getattr(torch, dtype)
    stored = [torch.from_numpy(c).to(torch_dtype).float().numpy() for c in clips]
    with tempfile.TemporaryDirectory() as folder:
        store = write_all(make(Path(folder), clips, dtype, per_shard, splits), clips)
        assert store.ids == [f"clip-{i}" for i in range(len(frames))]
        assert store.split.tolist() == splits
        assert store.frames.tolist() == frames
        for i, expected in enumerate(stored):
            assert store.clip(i).dtype == np.float32
            np.testing.assert_array_equal(store.clip(i), expected)
        np.testing.assert_array_equal(store.clips([0, 0]), np.stack([stored[0]] * 2))
        train = np.concatenate([s for s, p in zip(stored, splits, strict=True) if p == "train"])
        train = train.astype(np.float64)
        assert store.train_frames == len(train)
        np.testing.assert_allclose(store.mean, train.mean(0), rtol=1e-12)
        np.testing.assert_allclose(store.std, train.std(0), rtol=1e-9, atol=1e-12 * scale)
        norm = np.linalg.norm(train, axis=1).mean()
        assert store.manifest["train"]["mean_norm"] == pytest.approx(norm, rel=1e-12)
        store.verify()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=50))
def test_bfloat16_words_decode_as_torch_does(words):
    raw = np.array(words, dtype="<u2")
    expected = torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(decode(raw, "bfloat16"), expected)


def test_statistics_hold_where_a_sum_of_squares_would_cancel():
    rows = 1e6 + np.random.default_rng(0).standard_normal((3000, 2))
    total = Moments.of(rows[:0])
    for part in np.split(rows, [7, 900]):
        total += Moments.of(part)
    np.testing.assert_allclose(np.sqrt(total.m2 / total.count), rows.std(0), rtol=1e-9)
    again = Moments.from_json(json.loads(json.dumps(total.to_json())))
    np.testing.assert_array_equal(again.m2, total.m2)  # through JSON without losing a digit


@settings(max_examples=60, deadline=None)
@given(
    frames=st.lists(st.integers(1, 400), max_size=30),
    width=st.integers(1, 600),
    shard_mb=st.floats(0.01, 1),
)
def test_spans_cover_the_clips_and_only_a_lone_clip_may_exceed_the_size(frames, width, shard_mb):
    spans = shard_spans(frames, width, "float16", shard_mb)
    assert [i for a, b in spans for i in range(a, b)] == list(range(len(frames)))
    sizes = [sum(frames[a:b]) * width * 2 for a, b in spans]
    for (a, b), size in zip(spans, sizes, strict=True):
        assert b > a
        assert size <= shard_mb * 2**20 or b - a == 1
    for (_, edge), size in zip(spans[:-1], sizes[:-1], strict=True):
        assert size + frames[edge] * width * 2 > shard_mb * 2**20  # no room was left


def test_rows_and_files_are_as_documented(scratch):
    store = small_store(scratch)
    assert sorted(contents(scratch)) == [
        "manifest.json", "shard-00000.bin", "shard-00001.bin", "shard-00002.bin",
    ]  # fmt: skip
    assert store.rows["first_row"].tolist() == [0, 5, 8, 12, 18]
    assert store.rows.columns.tolist() == [
        "id", "split", "font", "kind", "group", "frames", "first_row",
    ]  # fmt: skip
    raw = np.fromfile(scratch / "shard-00001.bin", "<f2").reshape(-1, 2)
    np.testing.assert_array_equal(raw, np.concatenate(numbered([5, 3, 4, 6])[2:]))
    assert store.nbytes == sum(p.stat().st_size for p in scratch.glob("*.bin"))


# ---- the shuffle


def batches(store: ActivationStore, *args, **options) -> np.ndarray:
    return np.stack(list(store.train_batches(*args, **options)))


@settings(max_examples=25, deadline=None)
@given(
    frames=st.lists(st.integers(1, 8), min_size=2, max_size=10),
    per_shard=st.integers(1, 3),
    batch=st.integers(1, 7),
    buffer_rows=st.integers(1, 60),
    seed=st.integers(0, 100),
    start=st.integers(0, 12),
)
def test_every_epoch_is_a_permutation_and_resuming_equals_the_unbroken_run(
    frames, per_shard, batch, buffer_rows, seed, start
):
    clips = numbered(frames)
    with tempfile.TemporaryDirectory() as folder:
        splits = ["train" if i % 3 != 1 else "test" for i in range(len(frames))]
        store = write_all(make(Path(folder), clips, per_shard=per_shard, splits=splits), clips)
        train = np.concatenate([c for c, s in zip(clips, splits, strict=True) if s == "train"])
        total, options = len(train), {"buffer_mb": buffer_rows * 4 / 2**20}
        samples = 3 * total + batch  # three whole epochs are in it
        seen = batches(store, batch, seed, samples, **options)
        assert seen.shape == (samples // batch, batch, 2)
        flat = seen.reshape(-1, 2)
        for epoch in range(3):
            rows = flat[epoch * total : (epoch + 1) * total]
            np.testing.assert_array_equal(np.unique(rows, axis=0), np.unique(train, axis=0))
        np.testing.assert_array_equal(batches(store, batch, seed, samples, **options), seen)
        start = min(start, len(seen) - 1)
        tail = batches(store, batch, seed, samples, start_step=start, **options)
        np.testing.assert_array_equal(tail, seen[start:])


def test_orders_differ_between_epochs_and_seeds(scratch):
    clips = numbered([40] * 6)
    store = write_all(make(scratch, clips, splits=["train"] * 6), clips)
    two = batches(store, 240, 1, 480)
    other = batches(store, 240, 2, 240)
    assert not np.array_equal(two[0], two[1])
    assert not np.array_equal(two[0], other[0])
    # With everything in the buffer the order is uniform: no clip keeps to a part of the epoch.
    position = np.array([np.flatnonzero(two[0][:, 0] == c).mean() for c in range(6)])
    assert np.abs(position - 119.5).max() < 5 * 240 / np.sqrt(12 * 40)


def test_rows_of_several_shards_mix_and_the_company_changes_with_the_epoch(scratch):
    clips = numbered([50] * 8)
    store = write_all(make(scratch, clips, per_shard=1, splits=["train"] * 8), clips)
    epochs = batches(store, 400, 0, 1600, buffer_mb=100 * 4 / 2**20)[:, :, 0]
    pairs = set()
    for epoch in epochs:
        for window in epoch.reshape(4, 100):
            shards, counts = np.unique(window, return_counts=True)
            assert counts.tolist() == [50, 50]  # two shards at a time, whole
            assert (np.diff(window) != 0).sum() > 30  # and not one after the other
            pairs.add(tuple(shards))
    assert len(pairs) > 8  # four windows in each of four epochs


def test_select_limits_training_to_chosen_clips(scratch):
    store = small_store(scratch)
    mask = np.array([False, True, False, False, True])
    rows = batches(store, 5, 0, 5, mask)[0]
    assert sorted(map(tuple, rows.tolist())) == [(1, 0), (1, 1), (1, 2), (4, 0), (4, 1)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": np.zeros(5, bool)}, "no frames selected"),
        ({"select": [0, 1]}, "mask of 5 clips"),
        ({"samples": 3}, "3 samples give no batch of 4"),
    ],
)
def test_impossible_training_requests_fail_at_once(scratch, options, message):
    store = small_store(scratch)
    with pytest.raises(StoreError, match=message):
        store.train_batches(**{"batch_size": 4, "seed": 0, "samples": 40, **options})


def test_memory_does_not_grow_with_the_number_of_clips(scratch):
    def peak(count: int) -> int:
        clips = [np.ones((100, 256), np.float32)] * count
        folder = scratch / str(count)
        store = write_all(make(folder, clips, per_shard=5, splits=["train"] * count), clips)
        tracemalloc.start()
        for _ in store.train_batches(32, 0, 100 * count, buffer_mb=window / 2**20):
            pass
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    window = 2 * 500 * 256 * 2
    few, many = peak(20), peak(160)
    assert window < few < 1.5 * window  # the buffer is held once, never twice
    assert many < 1.1 * few


# ---- what must not be written


def test_infinity_and_nan_are_refused_with_the_clip_and_the_place(scratch):
    for bad in (np.nan, np.inf):
        clips = numbered([5, 3])
        clips[1][2, 1] = bad
        with pytest.raises(StoreError, match=r"clip 'clip-1': frame 2, dimension 1"):
            make(scratch, clips).write(0, clips)
    assert list(scratch.iterdir()) == []


def test_float16_overflow_is_refused_and_bfloat16_takes_it(scratch):
    clips = numbered([3])
    clips[0][0, 0] = 65504
    assert make(scratch / "edge", clips).write(0, clips) is None
    clips[0][0, 0] = -65505
    with pytest.raises(StoreError, match=r"clip 'clip-0'.*extract_activations.dtype to bfloat16"):
        make(scratch / "over", clips).write(0, clips)
    assert write_all(make(scratch / "bf", clips, "bfloat16"), clips).clip(0)[0, 0] == -65536


def test_wrong_shapes_duplicate_ids_and_gaps_are_refused(scratch):
    clips = numbered([5, 3])
    writer = make(scratch, clips)
    with pytest.raises(StoreError, match=r"'clip-0': got \(5, 1\), expected \(5, 2\)"):
        writer.write(0, [c[:, :1] for c in clips])
    with pytest.raises(StoreError, match="takes 2 clips, got 1"):
        writer.write(0, clips[:1])
    rows, same = table([5, 3]), {"width": 2, "dtype": "float16", "config": {}}
    with pytest.raises(StoreError, match="'clip-0' occurs more than once"):
        StoreWriter(scratch, clips=rows.assign(id="clip-0"), spans=[(0, 2)], **same)
    for spans in ([(0, 1)], [(1, 2)], [(0, 1), (0, 2)], []):
        with pytest.raises(StoreError, match="do not cover 2 clips"):
            StoreWriter(scratch, clips=rows, spans=spans, **same)
    with pytest.raises(StoreError, match="dtype 'int8'"):
        make(scratch, clips, "int8")


def test_encode_rounds_to_nearest_even():
    values = np.array([[1 + 2**-8, 1 + 3 * 2**-8]], np.float32)  # halfway in bfloat16
    assert decode(encode(values, "bfloat16"), "bfloat16").tolist() == [[1.0, 1 + 2**-6]]


# ---- interruption


def test_an_interrupted_writer_leaves_no_store_and_a_rerun_gives_the_same_bytes(scratch):
    clips = numbered([5, 3, 4, 6, 2])
    whole = write_all(make(scratch / "whole", clips), clips).folder
    folder = scratch / "broken"
    writer = make(folder, clips)
    writer.write(2, clips[4:])
    writer.write(0, clips[:2])
    bad = [clips[2], np.full_like(clips[3], np.nan)]
    with pytest.raises(StoreError):
        writer.write(1, bad)
    with pytest.raises(StoreError, match=r"shards \[1\] are not written"):
        writer.finish()
    with pytest.raises(StoreError, match="manifest.json is missing"):
        ActivationStore.open(folder)
    # What kill -9 may leave: a torn temporary file, and a shard whose record was not written.
    (folder / ".shard-00001.bin.99.tmp").write_bytes(b"torn")
    (folder / "shard-00001.bin").write_bytes(b"torn")
    again = make(folder, clips)
    assert [again.has(i) for i in range(3)] == [True, False, True]
    write_all(again, clips)
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize("damage", ["data", "record", "truncated"])
def test_a_damaged_shard_is_not_kept(scratch, damage):
    clips = numbered([5, 3, 4])
    writer = make(scratch, clips)
    writer.write(0, clips[:2])
    if damage == "data":
        flip(scratch / "shard-00000.bin")
    elif damage == "record":
        (scratch / "shard-00000.json").write_text("{")
    else:
        with open(scratch / "shard-00000.bin", "r+b") as stream:
            stream.truncate(6)
    assert not make(scratch, clips).has(0)


def test_shards_of_another_configuration_are_not_kept(scratch):
    clips = numbered([5, 3, 4])
    make(scratch, clips).write(0, clips[:2])
    assert make(scratch, clips).has(0)
    assert not make(scratch, clips, config={"model": "other"}).has(0)
    assert not make(scratch, clips, "bfloat16").has(0)
    assert not make(scratch, clips, splits=["test"] * 3).has(0)
    assert not make(scratch, clips, per_shard=3).has(0)


# ---- damage found by the reader


def flip(path: Path, at: int = 3) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


def test_damage_is_named_with_the_file_and_the_remedy(scratch, tmp_path):
    small_store(scratch)

    def damaged(name: str) -> Path:
        shutil.copytree(scratch, tmp_path / name)
        return tmp_path / name

    folder = damaged("no manifest")
    (folder / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"no manifest.*not a finished store; rerun the stage"):
        ActivationStore.open(folder)

    folder = damaged("truncated")
    with open(folder / "shard-00001.bin", "r+b") as stream:
        stream.truncate(10)
    with pytest.raises(StoreError, match=r"shard-00001.bin has 10 bytes, expected 40.*rerun"):
        ActivationStore.open(folder)

    folder = damaged("absent")
    (folder / "shard-00002.bin").unlink()
    with pytest.raises(StoreError, match="shard-00002.bin is missing; rerun"):
        ActivationStore.open(folder)

    folder = damaged("flipped")
    flip(folder / "shard-00001.bin")
    store = ActivationStore.open(folder)  # sizes fit
    with pytest.raises(StoreError, match=r"shard-00001.bin: sha256 differs"):
        store.verify()

    folder = damaged("width")
    edit(folder, width=3)
    with pytest.raises(StoreError, match="manifest.json: its sha256 does not fit"):
        ActivationStore.open(folder)

    folder = damaged("version")
    edit(folder, format_version=99)
    with pytest.raises(StoreError, match=r"manifest.json: format .*99.*expected"):
        ActivationStore.open(folder)

    folder = damaged("half a manifest")
    (folder / "manifest.json").write_text((scratch / "manifest.json").read_text()[:100])
    with pytest.raises(StoreError, match="manifest.json is not valid JSON"):
        ActivationStore.open(folder)


def edit(folder: Path, **changes) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def test_a_store_without_train_clips_says_so_when_asked_for_statistics(scratch):
    clips = numbered([5, 3])
    store = write_all(make(scratch, clips, splits=["test", "test"]), clips)
    assert store.clip(1).shape == (3, 2)
    with pytest.raises(StoreError, match="no clip of split 'train', hence no mean"):
        _ = store.mean


def test_clips_of_unequal_length_do_not_stack(scratch):
    store = small_store(scratch)
    with pytest.raises(StoreError, match=r"clips of \[3, 5\] frames do not stack"):
        store.clips([0, 1])
