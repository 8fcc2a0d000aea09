"""Ridge controls: known R2 on linear data, streams that equal the model's, an unchanged model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import Ridge as SklearnRidge

from musicscope.activations.store import ActivationStore, StoreWriter
from musicscope.data.clips import ClipStore, write_clips
from musicscope.dictionaries import linear_maps, sharing
from musicscope.dictionaries.data import TEST, TRAIN, VALIDATION, pair
from musicscope.dictionaries.evaluation import SharedEvaluation
from musicscope.models.registry import load_model
from tests.support import rave_export

SPLITS = [TRAIN] * 12 + [VALIDATION] * 6 + [TEST] * 6


def test_ridge_reaches_the_known_r2_and_equals_sklearn():
    """Signal of variance 4 and noise of 1: R2 .8. Targets without a signal: 0, by shrinking."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((6, 3))
    weights *= 2 / np.linalg.norm(weights, axis=0)

    def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
        x = 5 + rng.standard_normal((n, 6))
        signal = (x - 5) @ weights + rng.standard_normal((n, 3)) + 7
        return x, np.concatenate([signal, rng.standard_normal((n, 2))], 1)

    ridge, (x, y) = linear_maps.Ridge(), draw(4000)
    for part in np.split(np.arange(4000), 4):  # sums over parts
        ridge.add(TRAIN, x[part], y[part])
    ridge.add(VALIDATION, *draw(4000))
    predict = ridge.fit(TRAIN, VALIDATION, [slice(0, 3), slice(3, 5)])
    new, target = draw(20_000)
    squares = np.square(target - target.mean(0)).sum(0)
    r2 = 1 - np.square(target - predict(new)).sum(0) / squares
    np.testing.assert_allclose(r2[:3], 0.8, atol=0.02)
    np.testing.assert_allclose(r2[3:], 0.0, atol=0.003)
    largest = np.linalg.eigvalsh(np.cov(x.T, bias=True) * len(x))[-1]
    candidates = [
        SklearnRidge(alpha=penalty * largest).fit(x, y[:, :3]).predict(new)
        for penalty in linear_maps.PENALTIES
    ]
    assert min(np.abs(predict(new)[:, :3] - theirs).max() for theirs in candidates) < 1e-8


def write_clips_and_stores(root: Path, folder: Path) -> list[ActivationStore]:
    """Noise, and stores of two models: its embedded codes times a matrix, and layers.1."""
    rng = np.random.default_rng(1)
    rows = [
        {"id": f"c{i}", "group": f"g{i // 2}", "split": split, "font": "mixed", "kind": "clip",
         "caption": "flute"}
        for i, split in enumerate(SPLITS)
    ]  # fmt: skip
    (root / "clips").mkdir()
    write_clips(root / "clips", ((0.3 * rng.standard_normal(3200), r) for r in rows), 3200, 3200)
    clips, model = ClipStore.open(root / "clips"), load_model(folder)
    with torch.no_grad():
        batch = model.encode(clips.audio(range(len(clips))), [None] * len(clips))
        inputs = model.at_frames(model.layer_inputs(batch, 1)[0], batch.frames)
        layer = model.capture(batch, ["layers.1"])["layers.1"]
    mixed = inputs.numpy() @ rng.standard_normal((inputs.shape[-1], 60))
    stores = []
    for name, values in (("a", mixed), ("b", layer.numpy())):
        writer = StoreWriter(
            root / name, width=values.shape[-1], dtype="float16", spans=[(0, len(clips))],
            clips=clips.rows.assign(frames=values.shape[1]),
            config={"layer": "layers.1", "captions": False, "clips_sha256": "these",
                    "frame_rate": 50.0},
        )  # fmt: skip
        writer.write(0, list(values.astype(np.float32)))
        stores.append(writer.finish())
    return stores


@pytest.fixture
def streams(tiny_musicgen: Path, tmp_path: Path, monkeypatch) -> linear_maps.ModelStreams:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return linear_maps.ModelStreams((str(tiny_musicgen),) * 2, str(tmp_path / "clips"), "cpu", 3)


def test_controls_of_a_layer_that_is_linear_in_the_input(streams, tiny_musicgen, tmp_path):
    stores = write_clips_and_stores(tmp_path, tiny_musicgen)
    sets = linear_maps.Sets(*(pair(stores, part) for part in (TRAIN, VALIDATION, TEST)))
    model, _ = streams.sources(1)
    before = [p.clone() for p in model.hf.parameters()]
    errors = linear_maps.control_errors(sets, streams)
    assert all(torch.equal(a, b) for a, b in zip(before, model.hf.parameters(), strict=True))
    groups = sets.groups
    clips = [np.concatenate(parts) for parts in zip(*sets.test.clips(), strict=True)]
    squares = np.zeros((len(groups), 2))
    for n, clip in enumerate(sets.test.clips()):
        g = list(groups).index(sets.test.groups[n])
        squares[g] += [
            np.square(x - all_.mean(0)).sum() for x, all_ in zip(clip, clips, strict=True)
        ]
    assert set(errors) == set(linear_maps.SOURCES)
    r2 = {name: linear_maps.r2_estimates(e, squares, groups, 20, 0) for name, e in errors.items()}
    for i in (0, 1):  # both models have the same embeddings
        assert r2["input"][f"r2_{i}_0"].value > 0.999
        assert r2["input"][f"r2_{i}_1"].value < r2["before"][f"r2_{i}_1"].value
        assert r2["redrawn"][f"r2_{i}_1"].value < r2["before"][f"r2_{i}_1"].value
    assert r2["layer"]["r2_1_1"].value == pytest.approx(1, abs=1e-3)
    assert r2["layer"]["r2_0_1"].value == pytest.approx(r2["input"]["r2_0_1"].value, abs=0.02)
    unused = np.zeros((len(groups), 1))
    found = SharedEvaluation(
        groups, unused, errors["before"], squares, unused, unused, unused, unused, unused
    )
    metrics = sharing.linear_metrics({**errors, "redrawn": None}, found, 20, 0)
    assert metrics["linear"]["redrawn"] is metrics["r2_above_linear"]["redrawn"] is None
    above = metrics["r2_above_linear"]["input"]["r2_0_1"]
    gain = r2["before"]["r2_0_1"].value - r2["input"]["r2_0_1"].value
    assert above["value"] == pytest.approx(gain)
    assert above["low"] <= above["value"] <= above["high"]
    assert metrics["r2_above_linear"]["before"]["r2_0_1"]["value"] == 0


def test_an_audio_model_has_no_embedded_codes(streams, tiny_musicgen, tmp_path):
    write_clips_and_stores(tmp_path, tiny_musicgen)
    folder = tmp_path / "rave"
    folder.mkdir()
    rave_export.save(rave_export.TinyRave(), folder / "mine.ts")
    both = linear_maps.ModelStreams(
        (str(folder), str(tiny_musicgen)), str(tmp_path / "clips"), "cpu", 0
    )
    assert [both.available(i) for i in (0, 1)] == [False, True]
    unknown = np.full((3, 2, 2), np.nan)
    unknown[:, 1] = 1.0
    r2 = linear_maps.r2_estimates(unknown, np.full((3, 2), 2.0), np.array(list("abc")), 20, 0)
    assert np.isnan(r2["r2_0_1"].value)
    assert r2["r2_1_0"].value == 0.5


def test_clips_are_drawn_once_each_in_their_order(tiny_musicgen, tmp_path):
    clips = pair(write_clips_and_stores(tmp_path, tiny_musicgen), TRAIN)
    drawn = linear_maps.thinned(clips, 5, 0)
    assert len(drawn) == 5 == len(set(drawn.members[:, 0]))
    assert (np.diff(drawn.members[:, 0]) > 0).all()
    assert len(linear_maps.thinned(clips, 99, 0)) == len(clips)
    assert pd.Series(drawn.groups).isin(clips.groups).all()
