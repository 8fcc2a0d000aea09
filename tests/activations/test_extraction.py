"""Extraction: the stored values are the model's, whatever the number of processes or kills."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from musicscope.activations import token_cache as codes
from musicscope.activations.extraction import Plan, extract, plan, summary
from musicscope.activations.store import ActivationStore, StoreError
from musicscope.core.io import folder_sha256, scratch_path
from musicscope.models.interface import HookPoint
from musicscope.models.registry import load_model
from tests.support.locks import holder

ROOT = Path(__file__).resolve().parents[2]
RATE, SAMPLES, FRAMES, CLIPS = 3200, 1280, 20, 11
LAYERS = {"top1": "layers.2", "top2": "layers.0"}


class FakeClips:
    """A ClipStore of seeded noise."""

    sample_rate = RATE

    def __init__(self, count: int = CLIPS) -> None:
        self.rows = pd.DataFrame(
            {
                "id": [f"c{i:02d}" for i in range(count)],
                "split": [("train", "train", "validation", "test")[i % 4] for i in range(count)],
                "font": "mixed",
                "kind": "clip",
                "group": [f"g{i // 3}" for i in range(count)],
                "caption": [f"flute and piano at {90 + i} bpm" for i in range(count)],
            }
        )
        self.samples = np.stack(
            [np.random.default_rng(i).standard_normal(SAMPLES) * 0.5 for i in range(count)]
        ).astype(np.float32)

    def audio(self, rows: list[int]) -> np.ndarray:
        return self.samples[rows]


class BatchModel:
    """Activations that depend on all clips of their batch, and no transformers to import."""

    name, sample_rate, frame_rate = "batch", RATE, 50.0
    hook_points = (HookPoint("layers.0", 48, 50.0), HookPoint("layers.2", 48, 50.0))

    def __init__(self, pause: float = 0.0) -> None:
        self.pause, self.passes = pause, 0

    def encode(self, audio, captions):
        return torch.as_tensor(audio).reshape(len(audio), FRAMES, -1)

    def capture(self, batch, names):
        time.sleep(self.pause)
        self.passes += 1
        weight = torch.randn(batch.shape[-1], 48, generator=torch.Generator().manual_seed(1))
        return {n: (batch + batch.mean() + len(batch) + int(n[-1])) @ weight for n in names}


def batch_sources(pids: str, pause: float = 0.0):
    """For processes of their own, which leave their pids."""
    (Path(pids) / str(os.getpid())).touch()
    return BatchModel(pause), FakeClips()


def make_plan(model, clips=None, **options) -> list[Plan]:
    # 48 dimensions, 20 frames: 1,920 bytes a clip, so three clips a shard and batches of 2 + 1.
    choices = {"dtype": "float16", "shard_mb": 3.2 * 1920 / 2**20, "batch_clips": 2}
    choices |= {"captions": False, "model_sha256": "m", "clips_sha256": "c", "layers": LAYERS}
    return plan(model, clips or FakeClips(), **(choices | options))


def contents(folders: dict[str, Path]) -> dict[str, dict[str, bytes]]:
    return {s: {p.name: p.read_bytes() for p in f.iterdir()} for s, f in folders.items()}


def out(folder: Path) -> dict[str, Path]:
    return {slot: folder / slot for slot in LAYERS}


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def model(tiny_musicgen: Path):
    return load_model(tiny_musicgen)


def test_stored_values_are_what_capture_gives(tiny_musicgen, device, tmp_path):
    model, clips = load_model(tiny_musicgen, device), FakeClips()
    todo = make_plan(model)
    assert [list(span) for span in todo[0].spans] == [[0, 3], [3, 6], [6, 9], [9, 11]]
    stores = extract(todo, lambda: (model, clips), out(tmp_path / "a"))
    for slot, name in LAYERS.items():
        store = ActivationStore.open(tmp_path / "a" / slot)
        store.verify()
        assert store.ids == clips.rows["id"].tolist() == stores[slot].ids
        assert store.config["layer"] == name
        assert store.config["captions"] is False
        for rows in ([0, 1], [2], [3, 4], [9, 10]):
            batch = model.encode(clips.audio(rows), [None] * len(rows))
            expected = model.capture(batch, [name])[name].cpu().numpy()
            assert expected.shape == (len(rows), FRAMES, 48)
            np.testing.assert_array_equal(
                store.clips(rows), expected.astype(np.float16).astype(np.float32)
            )
        train = np.concatenate([store.clip(i) for i in np.flatnonzero(store.split == "train")])
        np.testing.assert_allclose(store.mean, train.mean(0, dtype=np.float64), atol=1e-9)


def test_one_pass_captures_all_slots_and_ends_after_the_deepest(model, tmp_path):
    before = model.layer_calls
    extract(make_plan(model), lambda: (model, FakeClips()), out(tmp_path / "a"))
    assert model.layer_calls - before == 7 * 3  # 3 clips are batches of 2 and 1; layers 0 to 2


def test_two_slots_may_share_a_layer(model, tmp_path):
    same = make_plan(model, layers={"top1": "layers.1", "top2": "layers.1"})
    folders = out(tmp_path / "a")
    stores = extract(same, lambda: (model, FakeClips()), folders)
    np.testing.assert_array_equal(stores["top1"].clip(4), stores["top2"].clip(4))


def test_captions_are_given_only_where_asked_for(model, tmp_path):
    clips = FakeClips()
    captioned = make_plan(model, captions=True)
    store = extract(captioned, lambda: (model, clips), out(tmp_path / "a"))["top1"]
    batch = model.encode(clips.audio([0, 1]), clips.rows["caption"].tolist()[:2])
    with_text = model.capture(batch, ["layers.2"])["layers.2"].numpy()
    np.testing.assert_array_equal(store.clips([0, 1]), with_text.astype(np.float16))
    without = model.capture(model.encode(clips.audio([0, 1]), [None] * 2), ["layers.2"])
    assert np.abs(store.clips([0, 1]) - without["layers.2"].numpy()).max() > 0.01


def test_two_processes_write_the_bytes_of_one(tmp_path):
    todo = make_plan(BatchModel())
    extract(todo, lambda: (BatchModel(), FakeClips()), out(tmp_path / "one"))
    pids = tmp_path / "pids"
    pids.mkdir()
    shared = functools.partial(batch_sources, str(pids))
    extract(todo, shared, out(tmp_path / "two"), processes=2)
    assert contents(out(tmp_path / "one")) == contents(out(tmp_path / "two"))
    assert len({int(p.name) for p in pids.iterdir()} - {os.getpid()}) == 2


def running(pid: int) -> bool:
    """Whether the process lives (a zombie, which nobody has waited for yet, does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads process states in /proc")
def test_kill_dash_nine_keeps_finished_shards_and_a_rerun_gives_the_same_bytes(tmp_path):
    todo, folders = make_plan(BatchModel()), out(tmp_path / "killed")
    whole = out(tmp_path / "whole")
    extract(todo, lambda: (BatchModel(), FakeClips()), whole)
    pids = tmp_path / "pids"
    pids.mkdir()
    script = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "src")!r}]
import functools
from tests.activations import test_extraction as t
if __name__ == "__main__":
    sources = functools.partial(t.batch_sources, {str(pids)!r}, 1.0)
    folders = t.out(t.Path({str(tmp_path / "killed")!r}))
    t.extract(t.make_plan(t.BatchModel()), sources, folders, processes=2)
"""
    (tmp_path / "run.py").write_text(script)
    process = subprocess.Popen(
        [sys.executable, "run.py"], cwd=tmp_path, stderr=subprocess.PIPE, env=dict(os.environ)
    )
    scratch = tmp_path / ".dvc" / "tmp" / "partial"
    finished = lambda: sorted(p.stem for p in scratch.glob("*/top2/shard-*.json"))  # noqa: E731
    try:
        deadline = time.monotonic() + 240
        while not finished() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        error = process.communicate()[1].decode()
    assert finished(), error
    workers = {int(p.name) for p in pids.iterdir()} - {process.pid}
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while any(map(running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(running, workers))  # no orphan goes on writing
    kept = finished()
    assert 0 < len(kept) < len(todo[0].spans)
    assert not any(f.exists() for f in folders.values())  # nothing half done in its place

    rest = BatchModel()
    extract(todo, lambda: (rest, FakeClips()), folders)
    assert contents(folders) == contents(whole)
    lost = [b - a for i, (a, b) in enumerate(todo[0].spans) if f"shard-{i:05d}" not in kept]
    assert rest.passes == sum(-(-clips // 2) for clips in lost)
    assert not list(scratch.glob("*/top*"))  # the scratch is gone


def test_codec_tokens_are_computed_once_for_all_models_with_the_codec(model, tmp_path, monkeypatch):
    encode, heard = model.encode, []
    monkeypatch.setattr(model, "encode", lambda x, c: (heard.append(len(x)), encode(x, c))[1])
    extract(make_plan(model), lambda: (model, FakeClips()), out(tmp_path / "a"))
    assert heard == [8, 3]  # chunks of the collection, not batches of a shard
    again = make_plan(model, layers={"top1": "layers.1", "top2": "layers.3"}, batch_clips=3)
    extract(again, lambda: (model, FakeClips()), out(tmp_path / "b"))
    assert heard == [8, 3]
    # A damaged file is seen and made again; other clips have other tokens.
    folder = codes.codes_dir(model, "c")
    torch.testing.assert_close(
        codes.read_codes(folder, [9, 2]), model.encode(FakeClips().audio([9, 2]), [None] * 2).codes
    )
    path = folder / "codes-00001.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert codes.missing(folder, CLIPS) == [1]
    with pytest.raises(ValueError, match="codes-00001.npz is missing or damaged; delete it"):
        codes.read_codes(folder, [10])
    extract(make_plan(model), lambda: (model, FakeClips()), out(tmp_path / "c"))
    assert heard == [8, 3, 2, 3]  # and the two asked for above
    assert contents(out(tmp_path / "a")) == contents(out(tmp_path / "c"))
    assert codes.codes_dir(model, "other clips") != folder


def test_the_hash_of_the_codec_sees_weights_and_settings_but_not_where_it_lies(model):
    before = codes.codec_sha256(model)
    codec = model.hf.audio_encoder
    codec.config._name_or_path = "elsewhere"
    assert codes.codec_sha256(model) == before
    with torch.no_grad():
        weight = codec.quantizer.layers[0].codebook.embed
        weight[0, 0] += 1
        assert codes.codec_sha256(model) != before
        weight[0, 0] -= 1
    codec.config.normalize = True
    assert codes.codec_sha256(model) != before
    codec.config.normalize = False
    assert codes.codec_sha256(BatchModel()) is None


def test_a_second_run_waits_for_the_first(model, tmp_path, capsys):
    todo, folders = make_plan(model), out(tmp_path / "a")
    with holder(todo[0].identity()) as first:
        run = threading.Thread(target=extract, args=(todo, lambda: (model, FakeClips()), folders))
        run.start()
        run.join(0.3)
        assert run.is_alive()
        assert not folders["top1"].exists()
        first.communicate("finish\n")  # it removes the folder, as a run does at its end
        run.join(30)
    assert ActivationStore.open(folders["top1"]).ids
    assert f"waiting for process {first.pid}: it works in" in capsys.readouterr().err


def test_a_bad_clip_is_named_and_leaves_no_store(model, tmp_path):
    clips = FakeClips()
    clips.samples[4, 7] = np.nan
    with pytest.raises(ValueError, match="NaN") as caught:
        extract(make_plan(model), lambda: (model, clips), out(tmp_path / "a"))
    assert "while encoding the clips ['c00', 'c01', 'c02', " in caught.value.__notes__[0]
    assert not (tmp_path / "a").exists()


def test_activations_too_large_for_float16_name_the_parameter(model, tmp_path):
    class Loud:
        def __getattr__(self, name):
            return getattr(model, name)

        def capture(self, batch, names):
            return {n: 1e5 * torch.ones(len(batch), FRAMES, 48) for n in names}

    todo = make_plan(model)
    with pytest.raises(StoreError, match=r"clip 'c00'.*extract_activations.dtype to bfloat16"):
        extract(todo, lambda: (Loud(), FakeClips()), out(tmp_path / "a"))
    wide = make_plan(model, dtype="bfloat16")
    stores = extract(wide, lambda: (Loud(), FakeClips()), out(tmp_path / "b"))
    assert stores["top1"].clip(0)[0, 0] == pytest.approx(1e5, rel=2**-8)


def test_the_plan_knows_the_size_before_anything_runs(model, tmp_path):
    before = model.layer_calls
    todo = make_plan(model)
    size = CLIPS * FRAMES * 48 * 2
    text = todo[0].describe()
    assert "11 clips, 220 frames, 4 shards a slot" in text
    assert "top1: layers.2, 48 x float16, 0.000 GB" in text
    assert todo[0].nbytes("top1") == size
    assert model.layer_calls == before
    stores = extract(todo, lambda: (model, FakeClips()), out(tmp_path / "a"))
    assert stores["top2"].nbytes == size
    assert todo[0].identity() == make_plan(model)[0].identity()
    assert scratch_path(todo[0].identity()) != scratch_path(
        make_plan(model, captions=True)[0].identity()
    )


def test_impossible_plans_are_refused(model):
    with pytest.raises(ValueError, match=r"has no \['layers.9'\]; its hook points are"):
        make_plan(model, layers={"top1": "layers.9"})
    clips = FakeClips()
    clips.sample_rate = 16000
    with pytest.raises(ValueError, match="clips are at 16000 Hz, .* works at 3200 Hz"):
        make_plan(model, clips)
    with pytest.raises(ValueError, match="batch_clips >= 1"):
        make_plan(model, batch_clips=0)
    with pytest.raises(StoreError, match="dtype 'int8'"):
        make_plan(model, dtype="int8")


def test_summary_numbers(model, tmp_path):
    todo = make_plan(model)
    stores = extract(todo, lambda: (model, FakeClips()), out(tmp_path / "a"))
    numbers = summary(todo, stores)
    assert numbers["clips"] == {"train": 6, "validation": 3, "test": 2}
    assert (numbers["skipped_clips"], numbers["frames"]) == (0, 220)
    assert numbers["bytes"] == 2 * 220 * 48 * 2
    store = stores["top1"]
    train = np.concatenate([store.clip(i) for i in range(CLIPS) if store.split[i] == "train"])
    gamma = np.abs(train.mean(0, dtype=np.float64)) / train.std(0, dtype=np.float64)
    slot = numbers["slots"]["top1"]
    assert slot["layer"] == "layers.2"
    assert slot["train_frames"] == len(train) == 120
    assert slot["mean_norm"] == pytest.approx(np.linalg.norm(train, axis=1).mean(), rel=1e-5)
    assert slot["gamma_median"] == pytest.approx(np.median(gamma), rel=1e-6)
    assert slot["gamma_max"] == pytest.approx(gamma.max(), rel=1e-6)
    assert slot["constant_dimensions"] == 0


def test_the_hash_of_a_folder_sees_names_and_contents(tmp_path):
    folder = tmp_path / "m"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_text("1")
    (folder / "sub" / "b").write_text("2")
    first = folder_sha256(folder)
    (folder / ".gitignore").write_text("x")  # DVC may leave one; it is no content
    assert folder_sha256(folder) == first
    (folder / "sub" / "b").write_text("3")
    second = folder_sha256(folder)
    (folder / "sub" / "b").rename(folder / "sub" / "c")
    assert len({first, second, folder_sha256(folder)}) == 3
    with pytest.raises(FileNotFoundError, match="nowhere is missing or empty; run dvc repro"):
        folder_sha256(tmp_path / "nowhere")


def test_the_stage_writes_stores_and_metrics(model, tiny_musicgen, tmp_path, monkeypatch, capsys):
    from stages import extract_activations as stage

    monkeypatch.chdir(tmp_path)
    params = (ROOT / "params.yaml").read_text().replace("processes: 2", "processes: 1")
    Path("params.yaml").write_text(params)
    for name in ("data/models/nano-small", "data/clips", "metrics/layers"):
        Path(name).mkdir(parents=True)
    Path("data/models/nano-small/config.json").write_text("{}")
    Path("data/clips/clips.bin").write_text("audio")
    Path("metrics/layers/nano-small.yaml").write_text("top1: 2\n")
    monkeypatch.setattr(stage, "open_sources", lambda *_: (model, FakeClips()))
    monkeypatch.setattr(sys, "argv", ["extract_activations", "nano-small"])
    with pytest.raises(SystemExit, match=r"nano-small.yaml lacks \['top2'\]: run dvc repro"):
        stage.main()
    Path("metrics/layers/nano-small.yaml").write_text("top1: 2\ntop2: 0\n")
    stage.main()
    assert "nano-small: 11 clips, 220 frames, 1 shards" in capsys.readouterr().err
    numbers = json.loads(Path("metrics/extract_activations/nano-small.json").read_text())
    assert numbers["slots"]["top2"]["layer"] == "layers.0"
    store = ActivationStore.open("data/activations/nano-small/top1")
    assert store.config["model_sha256"] == folder_sha256("data/models/nano-small")
