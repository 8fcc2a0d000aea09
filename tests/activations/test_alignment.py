"""Models of different frame rates: paired by seconds their streams agree, paired by index not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from musicscope.activations import extraction
from musicscope.activations.alignment import (
    align,
    aligned_store,
    common_frames,
    frame_rate,
    outside,
    slowest,
)
from musicscope.activations.store import ActivationStore, StoreError, StoreWriter, shard_spans
from musicscope.data.clips import ResampledClips, at_rate
from musicscope.dictionaries import data
from musicscope.dictionaries.training import train
from musicscope.models.registry import load_model
from tests.conftest import ROOT
from tests.support import rave_export
from tests.support.dictionaries import usae_section

SLOW = 44100 / 2048  # RAVE: 21.53 Hz


def by_hand(values, rate, to_rate, frames, offset=0.0):
    """Overlap in seconds of every pair of frames, one by one."""
    out = np.zeros((frames, values.shape[1]))
    for s in range(frames):
        begin, end = s / to_rate + offset, (s + 1) / to_rate + offset
        weights = []
        for t in range(len(values)):
            overlap = min(end, (t + 1) / rate) - max(begin, t / rate)
            weights.append(max(0.0, overlap))
        weights = np.array(weights)
        if weights.sum() < 1e-9:  # wholly outside: the nearest
            weights[0 if end <= 1e-9 else -1] = 1.0
        out[s] = weights @ values / weights.sum()
    return out


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.sampled_from([50.0, 43.06640625, 75.0, 23.4375]),
    st.sampled_from([21.533203125, 23.4375, 12.5]),
    st.floats(-0.2, 0.2),
    st.integers(0, 2**31),
)
def test_alignment_equals_overlaps_added_one_by_one(length, rate, to_rate, offset, seed):
    values = np.random.default_rng(seed).standard_normal((length, 3)).astype(np.float32)
    frames = int(np.ceil(length / rate * to_rate))
    expected = by_hand(values, rate, to_rate, frames, offset)
    np.testing.assert_allclose(align(values, rate, to_rate, frames, offset), expected, atol=1e-4)


def test_simple_cases_by_eye():
    values = np.arange(6, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(align(values, 50, 25, 3)[:, 0], [0.5, 2.5, 4.5])
    # 50 to 20 Hz: frames of 2.5, the third belongs half to each.
    np.testing.assert_allclose(
        align(values, 50, 20, 2)[:, 0], [(0 + 1 + 2 / 2) / 2.5, (2 / 2 + 3 + 4) / 2.5]
    )
    # A last frame that the clip covers in part is the mean of that part.
    np.testing.assert_allclose(align(values[:5], 50, 20, 3)[2:, 0], [4.0], atol=1e-4)
    # A slower model that answers one of its frames late: its frame 1 is what was heard in frame 0.
    late = align(values, 50, 25, 3, offset_s=-1 / 25)[:, 0]
    np.testing.assert_allclose(late, [0, 0.5, 2.5], atol=1e-4)
    assert outside(6, 50, 25, 3, -1 / 25) == 1
    assert outside(6, 50, 25, 3) == 0


def test_equal_rates_change_no_stored_bit():
    values = np.random.default_rng(0).standard_normal((500, 8)).astype(np.float16)
    found = align(values.astype(np.float32), 50.0, 50.0, 499)
    np.testing.assert_array_equal(found.astype(np.float16), values[:499])


def test_time_is_kept():
    """A stream that says at each moment what time it is says so at the slower rate too."""
    centres = (np.arange(500) + 0.5) / 50
    slow = align(centres[:, None].astype(np.float32), 50, SLOW, 215)[:, 0]
    np.testing.assert_allclose(slow, (np.arange(215) + 0.5) / SLOW, atol=1e-3)


def test_the_slower_stream_is_never_stretched():
    with pytest.raises(ValueError, match=r"21\.53\d* Hz is slower than 50"):
        align(np.zeros((10, 2)), SLOW, 50, 20)


# ---- stores


def write(folder: Path, arrays: dict[str, np.ndarray], rate: float | None, **config):
    """A store of one shard or more, in the order of `arrays`."""
    names = list(arrays)
    table = pd.DataFrame(
        {
            "id": names,
            "split": ["train" if int(n[1:]) % 4 else "test" for n in names],
            "font": "f",
            "kind": "clip",
            "group": names,
            "frames": [len(x) for x in arrays.values()],
        }
    )
    width = next(iter(arrays.values())).shape[1]
    spans = shard_spans(table["frames"].tolist(), width, "float16", 0.002)
    config |= {"model": folder.name, "layer": "layers.1"}
    if rate is not None:
        config["frame_rate"] = rate
    writer = StoreWriter(
        folder, width=width, dtype="float16", clips=table, spans=spans, config=config
    )
    for shard, (first, stop) in enumerate(spans):
        writer.write(shard, [arrays[n] for n in names[first:stop]])
    return writer.finish()


def noise(count: int, frames: int, width: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        f"c{i}": rng.standard_normal((frames + i % 3, width)).astype(np.float32)
        for i in range(count)
    }


def test_an_aligned_store_pairs_with_the_slower_one(tmp_path):
    fast = write(tmp_path / "fast", noise(6, 100, 5), 50.0)
    slow_clips = {n: np.ones((int(np.ceil((100 + i % 3) / 50 * SLOW)), 3), np.float32)
                  for i, n in enumerate(["c0", "c1", "c2", "c3", "c4", "c5"])}  # fmt: skip
    reordered = {n: slow_clips[n] for n in ["c4", "c0", "c5", "c2", "c1"]}  # and one clip fewer
    slow = write(tmp_path / "slow", reordered, SLOW)
    with pytest.raises(StoreError):
        data.pair([fast, slow], "train")
    found = aligned_store(fast, slow, tmp_path / "aligned", shard_mb=0.001)
    assert found.ids == slow.ids
    assert found.frames.tolist() == slow.frames.tolist()
    assert len(found.shards) > 1
    for i, name in enumerate(found.ids):
        source = fast.clip(fast.ids.index(name))
        expected = by_hand(source, 50.0, SLOW, int(slow.frames[i]))
        np.testing.assert_allclose(found.clip(i), expected, atol=2e-3)
        row, origin = found.rows.iloc[i], fast.rows.iloc[fast.ids.index(name)]
        assert (row["split"], row["group"]) == (origin["split"], origin["group"])
    assert found.config["model"] == "fast"
    assert found.config["layer"] == "layers.1"
    assert found.config["frame_rate"] == SLOW
    assert found.config["aligned"]["source_sha256"] == fast.manifest["sha256"]
    assert found.config["aligned"]["frames_outside"] == 0
    found.verify()
    again = aligned_store(fast, slow, tmp_path / "again", shard_mb=0.001)
    assert again.manifest == found.manifest
    assert len(data.pair([found, slow], "train")) == 3
    assert slowest([fast, slow]) == 1


def test_two_models_of_one_rate_lose_only_what_the_shorter_lacks(tmp_path):
    """MusicGen and YuE run at 50 Hz but pad the end of a clip differently."""
    long = noise(4, 500, 5)
    first = write(tmp_path / "musicgen", long, None)
    second = write(tmp_path / "yue", {n: x[:-1, :3] for n, x in long.items()}, None)
    with pytest.raises(StoreError, match=r"no config\.frame_rate"):
        aligned_store(first, second, tmp_path / "x")
    found = aligned_store(first, second, tmp_path / "x", fast_rate=50.0, slow_rate=50.0)
    for i in range(4):
        np.testing.assert_array_equal(found.clip(i), first.clip(i)[:-1])
    assert len(data.pair([found, second], "train")) == 3


def test_what_cannot_be_aligned_is_named(tmp_path):
    fast = write(tmp_path / "fast", noise(3, 100, 2), 50.0)
    slow = write(tmp_path / "slow", noise(3, 43, 2), SLOW)
    other = write(tmp_path / "other", {"c99": np.ones((43, 2), np.float32)}, SLOW)
    with pytest.raises(StoreError, match=r"lacks 1 clips.*'c99'"):
        aligned_store(fast, other, tmp_path / "x")
    with pytest.raises(StoreError, match=r"2\.\d+ s in .*fast and .* s in .*frame rate wrong"):
        aligned_store(fast, slow, tmp_path / "x", slow_rate=10.0)
    with pytest.raises(ValueError, match="slower"):
        aligned_store(slow, fast, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert frame_rate(fast) == 50.0
    assert frame_rate(fast, 25) == 25.0


# ---- a planted signal that two models share


SECONDS, CLIPS, SOURCES = 6.0, 40, 6


def events(seed: int) -> list[tuple[int, float, float]]:
    """What happens in a clip: (source, begin, end) in seconds."""
    rng = np.random.default_rng(seed)
    starts = rng.uniform(0, SECONDS - 0.5, 10)
    return [(int(rng.integers(SOURCES)), b, b + rng.uniform(0.3, 0.8)) for b in starts]


def stream(seed: int, rate: float, dictionary: np.ndarray) -> np.ndarray:
    """How a model of frame rate `rate` tells the clip: each source on for the time it sounds."""
    frames = int(np.ceil(SECONDS * rate - 1e-9))
    edges = np.arange(frames + 1) / rate
    active = np.zeros((frames, SOURCES))
    for source, begin, end in events(seed):
        overlap = np.minimum(end, edges[1:]) - np.maximum(begin, edges[:-1])
        active[:, source] = np.maximum(active[:, source], np.clip(overlap * rate, 0, 1))
    rng = np.random.default_rng(seed + 1000)
    noise = rng.standard_normal((frames, dictionary.shape[1])) * 0.02
    return (active @ dictionary + noise).astype(np.float32)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Stores of a 50 Hz and a 21.53 Hz model of the same clips, and the aligned first."""
    folder = tmp_path_factory.mktemp("planted")
    rng = np.random.default_rng(7)
    wide, narrow = rng.standard_normal((SOURCES, 12)), rng.standard_normal((SOURCES, 8))
    names = {f"c{i:02d}": i for i in range(CLIPS)}
    fast = write(folder / "nano", {n: stream(i, 50.0, wide) for n, i in names.items()}, 50.0)
    slow = write(folder / "rave", {n: stream(i, SLOW, narrow) for n, i in names.items()}, SLOW)
    aligned = aligned_store(fast, slow, folder / "aligned")
    # What pairing by index would do: the first frames of the one beside those of the other.
    cut = {n: fast.clip(i)[: slow.frames[i]] for n, i in names.items()}
    by_index = write(folder / "by_index", cut, SLOW)
    return {"aligned": aligned, "by_index": by_index, "slow": slow}


def explained(predicted: np.ndarray, target: np.ndarray) -> float:
    return 1 - np.square(target - predicted).sum() / np.square(target - target.mean(0)).sum()


def all_frames(store: ActivationStore, split: str) -> np.ndarray:
    return np.concatenate([store.clip(i) for i in np.flatnonzero(store.split == split)])


def test_a_linear_map_finds_the_shared_signal_only_when_aligned_by_seconds(planted):
    scores = {}
    for name in ("aligned", "by_index"):
        x, y = (all_frames(planted[k], "train") for k in (name, "slow"))
        bias = [
            np.append(v, np.ones((len(v), 1)), 1) for v in (x, all_frames(planted[name], "test"))
        ]
        weights = np.linalg.lstsq(bias[0], y, rcond=None)[0]
        scores[name] = explained(bias[1] @ weights, all_frames(planted["slow"], "test"))
    assert scores["aligned"] > 0.95
    assert scores["by_index"] < 0.25


def test_a_universal_sae_shares_its_code_only_when_aligned_by_seconds(planted):
    config = usae_section(
        expansion=2, k=6, batch_size=256, samples=256 * 250, learning_rate=0.01,
        dead_after_samples=5000,
    )  # fmt: skip
    scores = {}
    for name in ("aligned", "by_index"):
        paired = data.pair([planted[name], planted["slow"]], "train")
        found = train(paired, config, "paper", 0, (name, "slow"), "top1").dictionary
        x, y = (torch.from_numpy(all_frames(planted[k], "test")) for k in (name, "slow"))
        with torch.no_grad():
            from_fast = found.decode(*found.encode(x, 0), 1)
            from_slow = found.decode(*found.encode(y, 1), 0)
        scores[name] = (
            explained(from_fast.numpy(), y.numpy()),
            explained(from_slow.numpy(), x.numpy()),
        )
    assert min(scores["aligned"]) > 0.7
    assert max(scores["by_index"]) < 0.3


# ---- two real models: tiny MusicGen and a tiny RAVE export


class Bursts:
    """Clips of one second at 3,200 Hz: near silence with a burst at 0.6 s, and without."""

    sample_rate, at = 3200, 0.6

    def __init__(self) -> None:
        self.rows = pd.DataFrame(
            {"id": ["burst", "quiet"], "split": "train", "font": "f", "kind": "clip",
             "group": ["a", "b"], "caption": None}
        )  # fmt: skip
        quiet = np.random.default_rng(0).standard_normal(3200).astype(np.float32) * 1e-3
        burst = quiet.copy()
        burst[1920:2240] += np.random.default_rng(1).standard_normal(320).astype(np.float32)
        self.samples = np.stack([burst, quiet])

    def audio(self, rows):
        return self.samples[list(rows)]


def test_musicgen_and_rave_see_a_burst_in_the_same_aligned_frame(
    tiny_musicgen, tmp_path, monkeypatch
):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    clips, options = Bursts(), {"dtype": "float16", "shard_mb": 1, "batch_clips": 2}
    hashes = {"model_sha256": "m", "clips_sha256": "bursts"}
    musicgen = load_model(tiny_musicgen)
    plan = extraction.plan(
        musicgen, clips, {"top1": "layers.0"}, captions=False, **options, **hashes
    )
    fast = extraction.extract(plan, lambda: (musicgen, clips), {"top1": tmp_path / "m"})["top1"]
    rave = load_model(rave_export.save(rave_export.TinyRave(), tmp_path / "tiny.ts"))
    view = ResampledClips(clips, rave.sample_rate)
    plans = extraction.plan(rave, view, {"top1": "posterior_mean"}, **options, **hashes)
    slow = extraction.extract(plans, lambda: (rave, view), {"top1": tmp_path / "r"})["top1"]
    assert (fast.frames[0], slow.frames[0]) == (50, 22)
    aligned = aligned_store(fast, slow, tmp_path / "x", fast_rate=musicgen.frame_rate)
    assert len(data.pair([aligned, slow], "train")) == 2

    def change(store: ActivationStore) -> np.ndarray:
        return np.linalg.norm(store.clip(0) - store.clip(1), axis=1)

    expected = clips.at * rave.frame_rate  # frame 12.9
    assert abs(int(change(slow).argmax()) - expected) <= 2
    first = int(np.flatnonzero(change(aligned) > 0.2 * change(aligned).max())[0])
    assert abs(first - expected) <= 2
    unaligned = int(np.flatnonzero(change(fast) > 0.2 * change(fast).max())[0])
    assert abs(unaligned - expected) > 10


def test_stores_of_other_rates_are_brought_to_the_slowest_and_others_left_alone(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    fast = write(tmp_path / "fast", noise(5, 100, 5), 50.0)
    slow_clips = {n: np.ones((int(np.ceil((100 + i % 3) / 50 * SLOW)), 3), np.float32)
                  for i, n in enumerate(fast.ids)}  # fmt: skip
    slow = write(tmp_path / "slow", slow_clips, SLOW)
    found = common_frames([fast.folder, slow.folder])
    assert found[1] == str(slow.folder)
    stores = [ActivationStore.open(folder) for folder in found]
    assert stores[0].frames.tolist() == slow.frames.tolist()
    assert stores[0].config["frame_rate"] == SLOW
    np.testing.assert_array_equal(
        stores[0].clip(2), aligned_store(fast, slow, tmp_path / "by hand").clip(2)
    )
    assert len(data.pair(stores, "train")) == 3
    written = (Path(found[0]) / "manifest.json").stat().st_mtime_ns
    assert common_frames([fast.folder, slow.folder]) == found  # kept, not written again
    assert (Path(found[0]) / "manifest.json").stat().st_mtime_ns == written
    # One rate: nothing to do, also without a rate in the manifest.
    twin = write(tmp_path / "twin", noise(5, 100, 2), None)
    assert common_frames([fast.folder, twin.folder]) == (str(fast.folder), str(twin.folder))
    # One rate, but one model drops the end of a clip: the shorter is what they share.
    less = {n: np.ones((99 + i % 3, 2), np.float32) for i, n in enumerate(fast.ids)}
    short = write(tmp_path / "short", less, 50.0)
    cut = common_frames([fast.folder, short.folder])
    assert cut[1] == str(short.folder)
    assert ActivationStore.open(cut[0]).frames.tolist() == short.frames.tolist()


# ---- two families of real models hear the same planted sound


class Bursts16k:
    """Two-second clips at 16 kHz: one of two sounds comes and goes at random moments."""

    sample_rate, samples = 16_000, 32_000

    def __init__(self, count: int = 30) -> None:
        names = [f"c{i}" for i in range(count)]
        self.rows = pd.DataFrame(
            {"id": names, "split": ["test" if i % 4 == 0 else "train" for i in range(count)],
             "font": "f", "kind": "clip", "group": names, "caption": None}
        )  # fmt: skip
        t = np.arange(self.samples) / self.sample_rate
        rng = np.random.default_rng(3)
        # Whole periods a frame of 20 ms: frames of one sound are alike, whoever encodes them.
        sounds = (np.sin(2 * np.pi * 200 * t), np.sign(np.sin(2 * np.pi * 350 * t)))
        self.all = np.zeros((count, self.samples))
        for clip in self.all:
            for _ in range(3):
                begin = int(rng.uniform(0, 1.6) * self.sample_rate)
                on = slice(begin, begin + int(rng.uniform(0.2, 0.5) * self.sample_rate))
                clip[on] += 0.7 * sounds[int(rng.integers(2))][on]
        self.all = np.clip(self.all, -1, 1).astype(np.float32)

    def audio(self, rows):
        return self.all[list(rows)]


def extracted(model, clips, layer: str, folder: Path) -> ActivationStore:
    heard = at_rate(clips, model.sample_rate)
    plans = extraction.plan(
        model, heard, {"top1": layer}, dtype="float16", shard_mb=1, batch_clips=4,
        model_sha256=model.name, clips_sha256="bursts",
    )  # fmt: skip
    return extraction.extract(plans, lambda: (model, heard), {"top1": folder})["top1"]


@pytest.fixture(scope="module")
def tiny_yue(tmp_path_factory):
    from tests.support import yue_export

    folder = tmp_path_factory.mktemp("yue") / "tiny"
    yue_export.build_tiny_yue(folder)
    return load_model(folder)


@pytest.mark.slow
def test_a_universal_sae_over_nano_and_rave_shares_what_sounds_in_both(tmp_path, monkeypatch):
    """Each model hears the clips at its own rate. One's code predicts the other's activations on
    clips that nothing learnt from, and does not after training on mispaired clips."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    export = rave_export.save(rave_export.TinyRave(), tmp_path / "tiny.ts")
    models = (load_model(ROOT / "data/models/nano-small"), load_model(export))
    clips, layers = Bursts16k(), ("layers.1", "encoder.encoder.net.3")
    rates = (models[0].frame_rate, models[1].frame_rates[layers[1]])
    folders = [
        extracted(model, clips, layer, tmp_path / str(i)).folder
        for i, (model, layer) in enumerate(zip(models, layers, strict=True))
    ]
    stores = [ActivationStore.open(folder) for folder in common_frames(folders)]
    assert {int(n) for s in stores for n in s.frames} == {int(np.ceil(2 * min(rates) - 1e-6))}
    learn, test = (data.pair(stores, split) for split in ("train", "test"))
    config = usae_section(
        expansion=1, k=4, batch_size=128, samples=128 * 300, learning_rate=0.005,
        dead_after_samples=5000,
    )  # fmt: skip
    scores = {}
    for name, paired in (("paired", learn), ("mispaired", data.mispair(learn, 5))):
        found = train(paired, config, "paper", 0, ("a", "b"), "top1").dictionary
        x, y = (torch.from_numpy(np.concatenate(p)) for p in zip(*test.clips(), strict=True))
        with torch.no_grad():
            scores[name] = (
                explained(found.decode(*found.encode(x, 0), 1).numpy(), y.numpy()),
                explained(found.decode(*found.encode(y, 1), 0).numpy(), x.numpy()),
            )
    for paired, mispaired in zip(*scores.values(), strict=True):
        assert paired > max(0.1, mispaired + 0.1)


def ridge(x: np.ndarray, y: np.ndarray):
    """Linear readout of y from activations x."""
    mean, scale = x.mean(0), x.std(0) + 1e-6
    z = (x - mean) / scale
    w = np.linalg.solve(z.T @ z + 0.01 * len(z) * np.eye(z.shape[1]), z.T @ (y - y.mean()))
    return lambda new: (new - mean) / scale @ w


@pytest.mark.slow
def test_musicgen_and_yue_tell_the_same_planted_sounds_at_the_same_frames(
    tiny_musicgen, tiny_yue, tmp_path, monkeypatch
):
    """16 and 3.2 kHz, 50 frames a second each: linear readouts of whether a sound is on, learnt in
    each model alone, agree on clips that neither was learnt on, frame by frame."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    clips, models = Bursts16k(), (load_model(tiny_musicgen), tiny_yue)
    folders = [
        extracted(model, clips, "layers.0", tmp_path / str(i)).folder
        for i, model in enumerate(models)
    ]
    stores = [ActivationStore.open(folder) for folder in common_frames(folders)]
    assert {int(n) for s in stores for n in s.frames} == {100}
    sounds = np.abs(clips.all.reshape(len(clips.all), 100, 320)).mean(2) > 0.02

    def frames(split: str) -> tuple[list[np.ndarray], np.ndarray]:
        pairs = data.pair(stores, split)
        rows = [int(stores[0].ids[i][1:]) for i in pairs.members[:, 0]]
        parts = [np.concatenate(part) for part in zip(*pairs.clips(), strict=True)]
        return parts, sounds[rows].ravel().astype(float)

    (learn, on), (test, heard) = frames("train"), frames("test")
    told = [ridge(x, on)(y) for x, y in zip(learn, test, strict=True)]
    assert min(np.corrcoef(values, heard)[0, 1] for values in told) > 0.35
    assert np.corrcoef(*told)[0, 1] > 0.3
    assert abs(np.corrcoef(told[0], np.roll(told[1], 30))[0, 1]) < 0.2
