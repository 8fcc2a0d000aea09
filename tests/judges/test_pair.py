"""The judges as one object, the distance of two sets, and how the judges' report is made."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.linalg import sqrtm

from musicscope.core import stats
from musicscope.data import wheel_assets as assets
from musicscope.data.taxonomy import FAMILIES
from musicscope.embedded.clip_set import Job, make_clips
from musicscope.judges import dataset, training
from musicscope.judges import pair as judging
from musicscope.judges import report as judge_report
from musicscope.judges.embedding_distance import EmbeddingJudge
from musicscope.judges.instrument_classifier import (
    FamilyJudge,
    FamilyNet,
    JudgeConfig,
    load_family_judge,
)
from musicscope.judges.musicnn import load_musicnn
from musicscope.report import figures
from stages import train_judge

RATE = 16_000
SMALL = JudgeConfig(channels=(4, 4, 4, 4), n_mels=32, crop_frames=50, epochs=1, batch=8)


@pytest.fixture(scope="module")
def judges():
    try:
        wheel = assets.fetch(assets.MUSICNN)
    except assets.AssetError as error:
        pytest.skip(f"the musicnn wheel is neither cached nor to be had: {error}")
    torch.manual_seed(0)
    family_judge = FamilyJudge(FamilyNet(SMALL, len(FAMILIES)).eval(), FAMILIES, SMALL)
    return judging.Judges(family_judge, load_musicnn(wheel))


def noise(n, seconds=3.0, seed=0):
    audio = np.random.default_rng(seed).standard_normal((n, int(seconds * RATE)))
    return (0.1 * audio).astype(np.float32)


# --- the object -------------------------------------------------------------------------------


def test_tags_are_families_by_their_meaning(judges):
    names = judges.musicnn.tags
    assert {tag for tags in judging.TAGS.values() for tag in tags} <= set(names)
    assert set(judging.TAGS) < set(FAMILIES)
    tags = np.random.default_rng(0).random((3, len(names))).astype(np.float32)
    found = judging.family_probabilities(tags, names, FAMILIES)
    np.testing.assert_array_equal(
        found[:, FAMILIES.index("guitar")], tags[:, names.index("guitar")]
    )
    pair = [names.index("choir"), names.index("choral")]
    np.testing.assert_array_equal(found[:, FAMILIES.index("choir")], tags[:, pair].max(1))
    unknown = [f not in judging.TAGS for f in FAMILIES]
    assert np.isnan(found).all(0).tolist() == unknown


def test_predict_and_embed_hear_the_same_audio_once(judges, monkeypatch):
    audio = np.concatenate([noise(2), np.zeros((1, 3 * RATE), np.float32)])
    calls = []
    predict = type(judges.musicnn).predict
    monkeypatch.setattr(
        type(judges.musicnn), "predict", lambda *a: (calls.append(1), predict(*a))[1]
    )
    found, embedding = judges.predict(audio), judges.embed(audio)
    assert len(calls) == 1
    assert list(found) == list(judging.JUDGES)
    assert all(p.shape == (3, len(FAMILIES)) for p in found.values())
    assert np.isnan(found["family_judge"][2]).all()
    assert np.isnan(found["musicnn"][2]).all()
    assert np.isfinite(found["family_judge"][:2]).all()
    assert embedding.shape == (3, 200)
    assert np.isnan(embedding[2]).all()
    np.testing.assert_array_equal(judges.embed(audio[:2]), predict(judges.musicnn, audio[:2])[1])
    assert len(calls) == 2


def test_saved_judges_are_the_same_and_need_no_wheel(judges, tmp_path, monkeypatch):
    judges.save(tmp_path / "judge")
    monkeypatch.setattr(assets, "fetch", None)
    loaded = judging.load_judges(tmp_path / "judge")
    assert loaded.families == FAMILIES
    audio = noise(2, seed=1)
    for name, values in judges.predict(audio).items():
        np.testing.assert_array_equal(loaded.predict(audio)[name], values)
    np.testing.assert_array_equal(loaded.embed(audio), judges.embed(audio))
    with pytest.raises(FileNotFoundError, match="train_judge"):
        judging.load_judges(tmp_path)


def test_judges_that_never_choose_are_saved_with_what_they_can_do(judges, tmp_path):
    labels = np.random.default_rng(0).random((12, len(FAMILIES))) < 0.5
    embedded = np.random.default_rng(1).standard_normal((12, 200))
    own = replace(
        judges, other_font_judge=judges.family_judge,
        embedding_judge=EmbeddingJudge.fit(embedded, labels),
        reliability={"musicnn": {"guitar": 0.8}},
    )  # fmt: skip
    assert set(judges.predict_all(noise(1))) == set(judging.JUDGES)
    own.save(tmp_path / "judge")
    loaded, audio = judging.load_judges(tmp_path / "judge"), noise(2, seed=3)
    found = loaded.predict_all(audio)
    assert set(found) == {*judging.CHOOSING, *judging.HELD_OUT}
    assert not set(judging.CHOOSING) & set(judging.HELD_OUT)
    for name, values in own.predict_all(audio).items():
        np.testing.assert_array_equal(found[name], values)
    assert loaded.reliability == {"musicnn": {"guitar": 0.8}}
    assert set(loaded.predict(audio)) == set(judging.JUDGES)


def without_a_tensor(path):
    held = load_file(path)
    held.pop(sorted(held)[-1])
    save_file(held, path)


def with_other_shapes(path):
    held = load_file(path)
    name = max(held, key=lambda key: held[key].numel())
    save_file({**held, name: held[name].flatten().contiguous()}, path)


def with_nan(path):
    held = load_file(path)
    name = next(key for key, value in held.items() if value.is_floating_point() and value.ndim)
    held[name].flatten()[0] = torch.nan
    save_file(held, path)


DAMAGES = {
    "pointer": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-100]), "cut short or damaged"),
    "nan": (with_nan, "NaN or infinity in"),
    "missing": (without_a_tensor, "are not those of|does not hold the weights"),
    "shape": (with_other_shapes, "are not those of|does not hold the weights"),
    "absent": (lambda p: p.unlink(), "missing"),
}


@pytest.mark.parametrize("file", ["musicnn.safetensors", "family_judge/model.safetensors"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_judges_whose_weights_cannot_be_read_never_score(judges, tmp_path, file, damage):
    judges.save(tmp_path / "judge")
    change, message = DAMAGES[damage]
    change(tmp_path / "judge" / file)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        judging.load_judges(tmp_path / "judge")
    assert f"{tmp_path / 'judge' / file}" in str(caught.value)


def test_settings_that_are_no_judges_are_named(judges, tmp_path):
    judges.save(tmp_path / "judge")
    config = tmp_path / "judge/family_judge/config.json"
    for text in ("{}", '{"families": ["a"], "other": 1, "channels": []}', "[]", "{"):
        config.write_text(text)
        with pytest.raises(ValueError, match=r"family_judge/config\.json"):
            judging.load_judges(tmp_path / "judge")


# --- distance ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m", "d"), [(60, 80, 12), (15, 20, 40)])
def test_frechet_distance_is_that_of_the_matrix_square_root(n, m, d):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((n, d)) @ rng.standard_normal((d, d))
    b = 0.5 + rng.standard_normal((m, d)) @ rng.standard_normal((d, d))
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    root = np.trace(sqrtm(covariances[0] @ covariances[1]).real)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + sum(map(np.trace, covariances)) - 2 * root
    assert judging.frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)
    assert judging.frechet_distance(b, a) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_of_a_shift_is_its_square():
    a = np.random.default_rng(1).standard_normal((30, 8))
    assert judging.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert judging.frechet_distance(a, a + 2) == pytest.approx(8 * 4)
    partly_silent = np.concatenate([a + 2, np.full((3, 8), np.nan)])
    assert judging.frechet_distance(a, partly_silent) == pytest.approx(8 * 4)
    with pytest.raises(ValueError, match="1 of 2 clips sound"):
        judging.frechet_distance(a, np.array([[0.0] * 8, [np.nan] * 8]))
    with pytest.raises(ValueError, match="do not compare"):
        judging.frechet_distance(a, a[:, :4])


# --- the data set -----------------------------------------------------------------------------


class Clips:
    """The parts of a ClipStore that the data set uses."""

    sample_rate, samples = RATE, RATE

    def __init__(self, n):
        rng = np.random.default_rng(0)
        self.rows = pd.DataFrame({"group": [f"g{i % 5}" for i in range(n)]})
        for family in FAMILIES:
            self.rows[f"has_{family}"] = rng.random(n) < 0.5
        self.sound = noise(n, 1.0)

    def select(self, **equal):
        return np.arange(len(self.rows)) if equal["font"] == "mixed" else np.arange(0)

    def audio(self, rows):
        return self.sound[rows]


class Codec:
    """A codec at another rate that halves the level."""

    sample_rate = 8000

    def encode(self, audio, captions):
        return SimpleNamespace(codes=torch.as_tensor(audio) / 2)

    def decode(self, codes):
        return codes


def inputs_of(folder, render=None) -> dataset.Inputs:
    return dataset.Inputs(folder, "clips", "model", folder / "wheel", render)


def test_chunks_cover_the_clips_and_spread_the_codec():
    plan = dataset.plan_chunks(Clips(57), "test", "mixed", 50, 10, 0)
    assert [c.count for c in plan] == [20, 20, 10]
    assert [r for c in plan for r in c.rows] == list(range(50))
    assert [len(c.coded) for c in plan] == [4, 4, 2]
    rendered = dataset.plan_chunks(Clips(57), "train", "fluidr3mono", 25, 99, 0)
    assert [(c.first, c.count, c.rows, len(c.coded)) for c in rendered] == [
        (0, 20, (), 20), (20, 5, (), 5),
    ]  # fmt: skip
    assert rendered[0].seconds == 1.0


def test_chunks_are_made_once_and_again_if_damaged(tmp_path, monkeypatch):
    store, made = Clips(8), []
    monkeypatch.setattr(dataset, "open_clips", lambda folder: store)
    monkeypatch.setattr(dataset, "open_codec", lambda *a: (made.append(1), Codec())[1])
    chunk = dataset.plan_chunks(store, "test", "mixed", 8, 4, 0)[0]
    inputs = inputs_of(tmp_path)

    def make():
        dataset.make_chunk(inputs, chunk)
        return dataset.read_chunk(inputs, chunk)

    data = make()
    np.testing.assert_array_equal(data.audio, store.sound)
    wanted = store.rows[[f"has_{f}" for f in FAMILIES]].to_numpy()
    np.testing.assert_array_equal(data.labels, wanted)
    assert data.groups.tolist() == store.rows["group"].tolist()
    assert data.codec.shape == (4, RATE)
    spectra = [np.abs(np.fft.rfft(x))[:, :3000] for x in (data.codec, store.sound[data.coded])]
    np.testing.assert_allclose(spectra[0], spectra[1] / 2, rtol=0.1, atol=0.5)
    make()
    assert len(made) == 1
    (tmp_path / chunk.file).write_bytes((tmp_path / chunk.file).read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        dataset.read_chunk(inputs, chunk)
    np.testing.assert_array_equal(make().codec, data.codec)
    assert len(made) == 2
    parts = list(dataset.batches(inputs, [chunk]))
    np.testing.assert_array_equal(parts[1][1], wanted[data.coded])
    # Training goes on from a killed run by a hash of its labels, which wants them by row.
    assert data.labels.flags.c_contiguous
    network = training.Network("both", (chunk,), 1, 0)
    assert training.train_network(inputs, network) == "both"
    assert training.train_network(inputs, network) == "both"
    assert load_family_judge(tmp_path / "both").families == FAMILIES


def test_rendered_clips_are_exact_and_their_own(tmp_path, monkeypatch):
    try:
        assets.fetch(assets.VIZDOOM), assets.fetch(assets.PRETTY_MIDI)
    except assets.AssetError as error:
        pytest.skip(f"a wheel is neither cached nor to be had: {error}")
    monkeypatch.setattr(dataset, "open_codec", lambda *a: Codec())
    chunk = dataset.plan_chunks(Clips(2), "train", "fluidr3mono", 2, 1, 5)[0]
    inputs = inputs_of(tmp_path, train_judge.render)
    dataset.make_chunk(inputs, chunk)
    data = dataset.read_chunk(inputs, chunk)
    clip = make_clips(Job("clip", "fluidr3mono", "train", 0, 2, 5, 1.0, "train_judge"))[1]
    np.testing.assert_allclose(data.audio[1], clip.audio, atol=1e-3)
    assert data.labels[1].tolist() == [clip.row[f"has_{f}"] for f in FAMILIES]
    assert data.groups[1] == clip.row["group"]
    assert not np.allclose(data.audio[0], data.audio[1], atol=1e-2)


# --- the report -------------------------------------------------------------------------------


def predictions(seed, name, n=120, skill=None, pairs=False):
    """Judges whose score is the truth times their skill plus noise."""
    rng = np.random.default_rng(seed)
    labels = rng.random((n, len(FAMILIES))) < 0.4
    groups = np.array([f"g{i}" for i in rng.integers(0, 12, n)])
    names = np.full(n, "")
    if pairs:
        labels[:, 0] = np.arange(n) % 2 == 0
        names, groups = (np.array([f"{p}{i // 2}" for i in range(n)]) for p in "pg")
    found = {}
    for judge, ability in (skill or {"family_judge": 3.0, "musicnn": 1.0}).items():
        found[judge] = ability * labels + rng.standard_normal(labels.shape)
    found["musicnn"][:, [f not in judging.TAGS for f in FAMILIES]] = np.nan
    return training.Predictions(name, found, labels, groups, names)


@pytest.fixture(scope="module")
def report():
    skills = {
        "mixed": {"family_judge": 3.0, "musicnn": 1.0, "mixed": 3.0, "fluidr3mono": 0.3},
        "fluidr3mono": {"family_judge": 3.0, "musicnn": 1.0, "mixed": 0.3, "fluidr3mono": 3.0},
    }
    parts = [predictions(i, name, skill=skill) for i, (name, skill) in enumerate(skills.items())]
    parts += [predictions(5, "codec"), predictions(6, "pairs", pairs=True), predictions(7, "codec")]
    return training.gather(parts)


def test_the_report_says_what_the_judges_can(report):
    assert len(report["codec"].labels) == 240
    metrics = judge_report.measure(report, 50, 0)
    assert metrics["clips"]["codec"] == 240
    own = report["codec"]
    for judge in judging.JUDGES:
        auroc = metrics[judge]["codec"]["guitar"]["auroc"]
        assert auroc["value"] == stats.auroc(own.scores[judge][:, 0], own.labels[:, 0])
        assert auroc["low"] < auroc["value"] < auroc["high"]
        assert (auroc["n"], auroc["unit"]) == (len(set(own.groups)), "AUROC")
        assert 0.4 < metrics[judge]["shuffled"]["mean_auroc"] < 0.6
        assert metrics[judge]["pairs"]["pairs"] == 60
    assert set(judging.TAGS) == set(FAMILIES) & set(metrics["musicnn"]["codec"])
    assert metrics["family_judge"]["pairs"]["accuracy"]["value"] > 0.95
    cross = {name: entry["mean_auroc"] for name, entry in metrics["cross_font"].items()}
    assert min(cross["mixed_to_mixed"], cross["fluidr3mono_to_fluidr3mono"]) > 0.9
    assert max(cross["mixed_to_fluidr3mono"], cross["fluidr3mono_to_mixed"]) < 0.7
    can = judge_report.reliability(metrics)
    guitar = metrics["family_judge"]["codec"]["guitar"]["auroc"]
    assert can["family_judge"]["guitar"] == guitar["value"]
    assert set(can["musicnn"]) == set(judging.TAGS)
    guitar["value"] = float("nan")  # no test clip has it
    assert "guitar" not in judge_report.reliability(metrics)["family_judge"]
    table = judge_report.plot_table(metrics)
    assert table.loc[
        (table["judge"] == "musicnn") & (table["set"] == "codec"), "family"
    ].tolist() == [f for f in FAMILIES if f in judging.TAGS]
    assert figures.judges(table).axes


def test_a_silent_clip_takes_its_pair_along(report):
    own = report["pairs"]
    scores = own.scores["family_judge"][:, 0].copy()
    scores[0] = np.nan
    found = judge_report.pair_report(scores, own, 20, 0)
    assert (found["pairs"], found["silent"]) == (59, 1)
