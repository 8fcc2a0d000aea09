"""Clips at another rate than the model's are resampled wherever a model hears them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from musicscope.ablation import run as ablation_run
from musicscope.activations import extraction
from musicscope.activations import token_cache as codes
from musicscope.core.audio import resample
from musicscope.data.clips import ClipStore, ResampledClips, at_rate, write_clips
from musicscope.dictionaries import fidelity
from musicscope.dictionaries.core import TopKSAE
from musicscope.features import baselines
from musicscope.models.registry import load_model, open_sources
from tests.conftest import build_tiny_musicgen
from tests.support import rave_export

RATE = 8000


def tone(hertz: float, rate: int, seconds: float = 1.0) -> np.ndarray:
    return 0.4 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A repository: eight clips at 8 kHz, a tiny MusicGen (3,200 Hz) and a RAVE export."""
    root = tmp_path_factory.mktemp("repository")
    rows = [
        {"id": f"c{i}", "group": f"g{i}", "split": ("train", "validation", "test")[i % 3],
         "kind": "clip", "font": "recording", "caption": "flute"}
        for i in range(9)
    ]  # fmt: skip
    (root / "data/clips").mkdir(parents=True)
    sound = ((tone(150 + 60 * i, RATE), row) for i, row in enumerate(rows))
    write_clips(root / "data/clips", sound, RATE, RATE)
    build_tiny_musicgen(root / "data/models/tiny")
    (root / "data/models/rave").mkdir(parents=True)
    rave_export.save(rave_export.TinyRave(), root / "data/models/rave/one.ts")
    return root


@pytest.fixture
def here(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    open_sources.cache_clear()
    return folder


def test_a_view_has_the_clips_at_the_models_rate(here):
    clips = ClipStore.open()
    assert at_rate(clips, RATE) is clips
    view = at_rate(clips, 3200)
    assert isinstance(view, ResampledClips)
    assert (len(view), view.samples) == (9, 3200)
    audio = view.audio([2, 0])
    assert audio.shape == (2, 3200)
    np.testing.assert_allclose(audio[1, 200:-200], tone(150, 3200)[200:-200], atol=2e-3)
    np.testing.assert_allclose(audio[0], resample(clips.audio([2]), RATE, 3200)[0])


def test_extraction_and_its_tokens_hear_the_resampled_clips(here):
    model, clips = open_sources("data/models/tiny", "data/clips")
    assert clips.sample_rate == model.sample_rate == 3200
    plan = extraction.plan(
        model, clips, {"top1": "layers.1"}, dtype="float16", shard_mb=1, batch_clips=4,
        captions=False, model_sha256="m", clips_sha256="c",
    )  # fmt: skip
    store = extraction.extract(plan, lambda: (model, clips), {"top1": here / "a"})["top1"]
    assert (store.config["frame_rate"], store.config["sample_rate"]) == (50.0, 3200)
    heard = resample(ClipStore.open().audio(range(8)), RATE, 3200)  # a chunk of tokens
    batch = model.encode(heard, [None] * 8)
    tokens = codes.read_codes(codes.codes_dir(model, "c"), range(8))
    assert (tokens == batch.codes).all()
    expected = model.capture(batch, ["layers.1"])["layers.1"]
    for i in range(8):
        np.testing.assert_allclose(store.clip(i), expected[i].numpy(), atol=1e-2, rtol=1e-2)
    with pytest.raises(ValueError, match=r"8000 Hz, tiny works at 3200 Hz; .*core.audio.at_rate"):
        extraction.plan(
            model, ClipStore.open(), {"top1": "layers.1"}, dtype="float16", shard_mb=1,
            batch_clips=4, captions=False, model_sha256="m", clips_sha256="c",
        )  # fmt: skip
    pools = baselines.codec_pools(ClipStore.open(), "c", model, [1, 7])
    latents = baselines.codec_statistics(model.codec_latents(batch.codes[[1, 7]]))
    np.testing.assert_array_equal(np.hstack([pools["mean"], pools["max"]]), latents)


@pytest.mark.parametrize("name", ["tiny", "rave"])
def test_ablation_runs_on_both_kinds_of_models(here, name):
    section = SimpleNamespace(clips=3, split="validation", kinds=("skip", "zero", "mean"),
                              bootstrap=20)  # fmt: skip
    metrics, table = ablation_run.run(name, section, 7, "cpu", 1)
    model = load_model(name)
    audio = name == "rave"
    kinds = {"zero", "mean"} if audio else {"skip", "zero", "mean"}
    assert set(metrics["layers"]) == {str(i) for i in range(len(model.hook_points))}
    assert all(set(entry) == kinds for entry in metrics["layers"].values())
    assert metrics.get("kinds_left_out", {}) == ({"skip": len(model.hook_points)} if audio else {})
    assert np.isfinite(table.select_dtypes(float).to_numpy()).all()
    if audio:
        only = SimpleNamespace(**{**vars(section), "kinds": ("skip",)})
        with pytest.raises(ValueError, match=r"ablate.kinds = \['skip'\]: rave is an audio model"):
            ablation_run.run(name, only, 7, "cpu", 1)


def identity(width: int) -> TopKSAE:
    """Reconstructs everything: a latent for either sign of each dimension."""
    import torch

    W = torch.cat([torch.eye(width), -torch.eye(width)])
    return TopKSAE(W, torch.zeros(2 * width), W, torch.zeros(width), width)


def test_a_lossless_sae_costs_an_audio_model_nothing_and_a_mean_something(here):
    import torch

    model, clips = open_sources("data/models/rave", "data/clips")
    batch = model.encode(clips.audio([0, 3, 5]))
    point = model.hook_points[2]
    mean = model.capture(batch, [point.name])[point.name].mean((0, 1))
    found = fidelity.spectral_distances(model, point.name, identity(point.width), mean, [batch])
    np.testing.assert_allclose(found["sae"], found["clean"], rtol=1e-4)
    assert np.abs(found["ablated"] - found["clean"]).max() > 1e-3
    rows = {"clean": [1.0, 2.0], "ablated": [3.0, 4.0], "sae": [2.0, 3.0]}
    losses = {name: np.array(values) for name, values in rows.items()}
    numbers = fidelity.ce_recovered(losses, ["a", "b"], 20, 0, fidelity.SPECTRAL)
    assert numbers["spectral_recovered"]["value"] == pytest.approx(0.5)
    assert numbers["ce_recovered"] is None
    assert numbers["spectral_ablated"] == 3.5
    assert torch.isfinite(mean).all()


def test_an_audio_models_own_latents_are_its_codec_baseline(here):
    model = load_model("rave")
    pools = baselines.codec_pools(ClipStore.open(), "c", model, [0, 4, 8])
    heard = model.encode(resample(ClipStore.open().audio([0, 4, 8]), RATE, model.sample_rate))
    mean = model.capture(heard, ["posterior_mean"])["posterior_mean"].mean(1)
    np.testing.assert_allclose(pools["mean"], mean.numpy(), rtol=1e-4, atol=1e-5)
    assert pools["max"].shape == pools["mean"].shape


def test_rows_of_a_view_are_those_of_the_store(here):
    pd.testing.assert_frame_equal(at_rate(ClipStore.open(), 3200).rows, ClipStore.open().rows)
