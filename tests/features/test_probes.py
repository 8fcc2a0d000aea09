"""Probes on planted data: they find what is there, nothing where nothing is, and do not peek."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from musicscope.activations import token_cache as codes
from musicscope.config.analysis import Probe
from musicscope.core import stats
from musicscope.data.splits import clip_sets, select_concepts
from musicscope.dictionaries import data
from musicscope.dictionaries.codes import pool_store
from musicscope.features import baselines, probes, report
from musicscope.features.association import rank_by_difference
from musicscope.features.logistic import Standardiser, fit_logistic
from musicscope.models.registry import load_model
from musicscope.report import figures


def probe_section(**changes):
    values = {"k_sparse": (1, 2, 4), "c_grid": (1e-3, 1e-1), "min_positive": 10}
    return Probe(**values | {"null_seeds": 4, "bootstrap": 200} | changes)


SECTION = probe_section()
SEED = 3


def clip_table(rng, train=200, validation=80, test=120, heldout=60, pairs=20):
    """Rows as in clips.parquet, labels at random, compositions that do not cross splits."""
    rows = []
    for split, font, n, groups in (
        ("train", "mixed", train, 20),
        ("validation", "mixed", validation, 8),
        ("test", "mixed", test, 10),
        ("test", "fluidr3mono", heldout, 10),
    ):
        for i in range(n):
            has = {f"has_{c}": bool(rng.random() < p) for c, p in (("guitar", 0.5), ("reed", 0.3))}
            row = {"split": split, "font": font, "kind": "clip", "pair_id": "", **has}
            rows.append(row | {"group": f"{split}{i % groups}", "has_choir": i == 0})
    for i in range(pairs):
        for guitar in (True, False):
            row = {"split": "test", "font": "mixed", "kind": "pair", "pair_id": f"p{i}"}
            row |= {"has_guitar": guitar, "has_reed": not guitar, "has_choir": False}
            rows.append(row | {"group": f"test{i % 10}"})
    return pd.DataFrame(rows)


def planted(rng, rows, latents=40, strength=3.0):
    """Pooled codes in which latent 7 follows guitar and latent 11 follows reed; "max" is noise."""
    codes = np.abs(rng.normal(size=(len(rows), latents))) * (rng.random((len(rows), latents)) < 0.4)
    codes[:, 7] = strength * rows["has_guitar"] + np.abs(rng.normal(size=len(rows)))
    codes[:, 11] = strength * rows["has_reed"] + np.abs(rng.normal(size=len(rows)))
    codes[:, 0] = 0.0  # a dead latent
    return {
        "mean": codes.astype(np.float32),
        "max": rng.random((len(rows), latents)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    rows = clip_table(rng)
    noise = rng.normal(size=(len(rows), 12)).astype(np.float32)
    representations = {
        "sae": planted(rng, rows),
        "dense": {"mean": noise},
        "logmel": {"statistics": noise[:, 3:6]},
        "codec": {"mean": noise[:, 6:9], "max": noise[:, 9:]},
        "trivial": {"statistics": noise[:, :3]},
    }
    concepts = ("guitar", "reed", "choir")
    return rows, representations, probes.run_probes(rows, representations, concepts, SECTION, SEED)


def test_finds_the_planted_concepts_and_nothing_in_noise(case):
    rows, _, result = case
    guitar = result["concepts"]["guitar"]
    for concept in result["concepts"].values():
        for held_out in ("test", "heldout_font"):
            assert concept["sae"][held_out]["auroc"]["value"] > 0.95
            assert concept["sae"][held_out]["auroc"]["low"] > 0.9
            assert concept["sae"][held_out]["average_precision"]["value"] > 0.9
        assert concept["sae"]["pooling"] == "mean"
        sae, dense = (concept[name]["test"]["auroc"] for name in ("sae", "dense"))
        assert 0.3 < dense["value"] < 0.7
        gap = concept["sae_minus_dense"]["test"]["difference"]
        assert gap["low"] <= gap["value"] <= gap["high"]
        assert gap["value"] == pytest.approx(sae["value"] - dense["value"])
        assert gap["low"] > 0.2
        assert sae["n"] == rows["group"].iloc[clip_sets(rows)["test"]].nunique()
        assert (sae["unit"], gap["unit"]) == ("AUROC", "AUROC")
    assert guitar["sae"]["pairs_mixed"]["accuracy"]["value"] > 0.9
    assert "pairs_fluidr3mono" not in guitar["sae"]  # no such pairs in the table
    assert set(result["concepts"]) == {"guitar", "reed"}
    assert result["skipped"] == {"choir": 1}


def test_shuffled_labels_leave_chance(case):
    *_, result = case
    for concept in result["concepts"].values():
        assert 0.35 < concept["shuffled"]["test"]["auroc"]["value"] < 0.65
    rng = np.random.default_rng(5)
    rows = clip_table(rng)
    section = probe_section(null_seeds=30, k_sparse=(1,), bootstrap=10)
    pools = planted(rng, rows)
    many = probes.run_probes(rows, {"sae": pools, "dense": pools}, ["guitar"], section, SEED)
    shuffled = many["concepts"]["guitar"]["shuffled"]["test"]["auroc"]["value"]
    assert shuffled == pytest.approx(0.5, abs=0.06)


def test_baselines_and_means_over_concepts(case):
    """A baseline whose codes know guitar only is behind the SAE by what it lacks, on the mean."""
    rows, representations, before = case
    poor = {key: of.copy() for key, of in representations["sae"].items()}
    poor["mean"][:, 11] = poor["mean"][:, 12]
    section = replace(SECTION, k_sparse=(1, 4, 20))
    result = probes.run_probes(
        rows, representations | {"frozen_decoder": poor}, ("guitar", "reed", "choir"), section,
        SEED, baselines=["frozen_decoder"],
    )  # fmt: skip
    guitar, reed = (result["concepts"][c] for c in ("guitar", "reed"))
    mean = result["mean"]["test"]
    assert guitar["sae"] == before["concepts"]["guitar"]["sae"]
    assert list(guitar["frozen_decoder"]["k_sparse"]) == ["001", "004"]  # 20 is beyond the limit
    assert guitar["frozen_decoder"]["k_sparse"]["001"]["test"]["auroc"]["value"] > 0.95
    assert reed["frozen_decoder"]["k_sparse"]["001"]["test"]["auroc"]["value"] < 0.7
    assert reed["sae_minus_frozen_decoder"]["test"]["difference"]["low"] > 0.2
    for name in ("sae", "frozen_decoder", "dense"):
        values = [entry[name]["test"]["auroc"]["value"] for entry in (guitar, reed)]
        assert mean[name]["value"] == pytest.approx(np.mean(values))
    sparse = [entry["frozen_decoder"]["k_sparse"]["004"]["test"] for entry in (guitar, reed)]
    assert mean["frozen_decoder_k004"]["value"] == pytest.approx(
        np.mean([entry["auroc"]["value"] for entry in sparse])
    )
    assert "sae_k004" in mean
    assert "sae_k020" not in mean
    assert mean["sae_minus_frozen_decoder"]["low"] > 0.1


def test_one_latent_is_enough_and_is_the_planted_one(case):
    rows, representations, result = case
    for concept, latent in (("guitar", 7), ("reed", 11)):
        train = clip_sets(rows)["train"]
        has = rows[f"has_{concept}"].to_numpy(bool)[train]
        order, difference = rank_by_difference(representations["sae"]["mean"][train], has)
        assert order[0] == latent
        assert 0 not in order  # the dead latent is never chosen
        assert difference[latent] > 0
        alone = result["concepts"][concept]["k_sparse"]["001"]
        at = clip_sets(rows)["test"]
        expected = stats.auroc(
            representations["sae"]["mean"][at, latent], rows[f"has_{concept}"].to_numpy(bool)[at]
        )
        assert alone["test"]["auroc"]["value"] == pytest.approx(expected, abs=1e-3)


def test_test_labels_and_features_change_no_choice(case):
    """Whatever the test clips say, pooling, C, weights and validation scores stay."""
    rows, representations, before = case
    sets = clip_sets(rows)
    learnt = np.concatenate([sets["train"], sets["validation"]])
    other = np.setdiff1d(np.arange(len(rows)), learnt)
    rng = np.random.default_rng(9)
    changed = rows.copy()
    clip = other[rows["kind"].to_numpy()[other] == "clip"]
    changed.loc[clip, "has_guitar"] = rng.permutation(changed.loc[clip, "has_guitar"].to_numpy())
    features = {
        name: {p: x.copy() for p, x in pools.items()} for name, pools in representations.items()
    }
    features["dense"]["mean"][other] += 100
    after = probes.run_probes(changed, features, ["guitar", "reed", "choir"], SECTION, SEED)
    for name in ("sae", "dense", "trivial"):
        for key in ("pooling", "c", "validation_auroc"):
            one, two = (r["concepts"]["guitar"][name][key] for r in (before, after))
            assert one == two, (name, key)
    moved = after["concepts"]["guitar"]["sae"]["test"]["auroc"]
    assert moved != before["concepts"]["guitar"]["sae"]["test"]["auroc"]


def test_validation_labels_do_choose():
    """The choice is made on validation: reverse its labels and the other pooling wins."""
    rng = np.random.default_rng(1)
    labels = rng.random(200) < 0.5
    train, validation = np.arange(120), np.arange(120, 200)
    pools = {"a": np.where(labels, 1, -1)[:, None] + 0.3 * rng.normal(size=(200, 1))}
    pools["b"] = pools["a"] * np.where(np.arange(200) < 120, 1, -1)[:, None]
    arguments = (train, validation, [0.1, 1.0])
    right = probes.choose(pools, labels[train, None], labels[validation, None], *arguments)
    wrong = probes.choose(pools, labels[train, None], ~labels[validation, None], *arguments)
    assert right.pooling == ["a"]
    assert wrong.pooling == ["b"]
    assert right.c[0] == 0.1  # one input: all C rank alike, and the smaller wins


def test_result_is_json_without_lists_and_repeats(case):
    rows, representations, result = case
    concepts = ("guitar", "reed", "choir")
    again = probes.run_probes(rows, representations, concepts, SECTION, SEED, workers=2)
    assert again == result

    def no_list(value):
        if isinstance(value, dict):
            return all(isinstance(k, str) and no_list(v) for k, v in value.items())
        return isinstance(value, str | int | float | np.generic)

    assert no_list(result)
    json.dumps(result["skipped"])


def test_report_holds_every_number_and_is_the_same_twice(case, tmp_path):
    rows, representations, result = case
    table = report.probe_table(result)
    guitar = table[table["concept"] == "guitar"].set_index(["representation", "set"])
    assert guitar.index.is_unique
    entry = result["concepts"]["guitar"]
    sparse = entry["k_sparse"]["004"]["heldout_font"]
    for place, column, found in (
        (("sae", "test"), "auroc", entry["sae"]["test"]),
        (("sae_k004", "heldout_font"), "average_precision", sparse),
        (("sae", "pairs_mixed"), "accuracy", entry["sae"]["pairs_mixed"]),
        (("sae_minus_dense", "test"), "difference", entry["sae_minus_dense"]["test"]),
    ):  # fmt: skip
        shown = guitar.loc[place, [column, f"{column}_low", f"{column}_high"]]
        assert list(shown) == [found[column][key] for key in ("value", "low", "high")]
    assert np.isnan(guitar.loc[("sae", "test"), "accuracy_low"])
    features = report.latent_table(rows, representations["sae"], result, 50, 1, top=5)
    assert features["latent"][0] == 7
    assert len(features) == 5
    assert features["test_auroc"][0] > 0.95 > features["test_auroc"][1]
    assert len(figures.probes(table, "model slot").axes) == 2


def test_sets_follow_font_kind_and_split_and_refuse_leaks():
    rows = clip_table(np.random.default_rng(0))
    sets = clip_sets(rows)
    assert [len(sets[s]) for s in ("train", "validation", "test", "heldout_font")] == [
        200, 80, 120, 60,
    ]  # fmt: skip
    assert len(sets["pairs_mixed"]) == 40
    assert len(np.unique(np.concatenate(list(sets.values())))) == len(rows)
    rows.loc[sets["test"][0], "group"] = "train3"
    with pytest.raises(ValueError, match="'train3' is both in test"):
        clip_sets(rows)


def test_selection_on_the_embedded_set_is_by_soundfont():
    """On the committed clips where they are there, else on a table like theirs."""
    table = Path(__file__).parents[2] / "data/clips/clips.parquet"
    planned = clip_table(np.random.default_rng(0))
    for rows in [planned, *([pd.read_parquet(table)] if table.is_file() else [])]:
        sets = clip_sets(rows)
        for name, split, font, kind in (
            ("train", "train", "mixed", "clip"),
            ("validation", "validation", "mixed", "clip"),
            ("test", "test", "mixed", "clip"),
            ("heldout_font", "test", "fluidr3mono", "clip"),
            ("pairs_mixed", "test", "mixed", "pair"),
            ("pairs_fluidr3mono", "test", "fluidr3mono", "pair"),
        ):
            same = (rows["split"] == split) & (rows["font"] == font) & (rows["kind"] == kind)
            np.testing.assert_array_equal(sets[name], np.flatnonzero(same))
            if name in (data.TRAIN, data.TEST, data.HELDOUT_FONT):
                np.testing.assert_array_equal(data.clip_rows(rows, name), np.flatnonzero(same))


def test_clips_without_a_label_are_no_negatives():
    """A concept's numbers are those of a table without the clips without a label for it."""
    rng = np.random.default_rng(4)
    rows = clip_table(rng, heldout=0, pairs=0).assign(font="recording")
    pools = {"sae": planted(rng, rows), "dense": planted(rng, rows, latents=12)}
    for column in ("has_guitar", "has_reed", "has_choir"):
        rows[column] = rows[column].astype("boolean")
    gone = rng.random((len(rows), 2)) < (0.4, 0.2)
    pools["sae"]["mean"][gone[:, 0] & rows["has_guitar"].to_numpy(bool), 7] += 50
    rows.loc[gone[:, 0], "has_guitar"] = pd.NA
    rows.loc[gone[:, 1], "has_reed"] = pd.NA
    rows.loc[np.arange(len(rows)) % 40 > 0, "has_choir"] = pd.NA
    found = probes.run_probes(rows, pools, ("guitar", "reed", "choir"), SECTION, SEED)
    assert set(found["concepts"]) == {"guitar", "reed"}
    assert found["skipped"] == {"choir": 1}
    assert found["clips"]["heldout_font"] == found["clips"]["pairs_mixed"] == 0
    for j, concept in enumerate(("guitar", "reed")):
        left = rows[~gone[:, j]].reset_index(drop=True)
        rest = {r: {p: x[~gone[:, j]] for p, x in of.items()} for r, of in pools.items()}
        alone = probes.run_probes(left, rest, (concept,), SECTION, SEED)
        one, two = (flat(r["concepts"][concept]) for r in (found, alone))
        assert one == {key: pytest.approx(value, abs=1e-6) for key, value in two.items()}
        assert found["concepts"][concept]["sae"]["test"]["auroc"]["value"] > 0.95
        clips = {s: len(at) for s, at in clip_sets(left).items()}
        assert found["unknown"][concept] == {
            s: n - clips[s] for s, n in found["clips"].items() if n > clips[s]
        }
    table = report.probe_table(found)
    assert set(table["set"]) == {"test"}
    features = report.latent_table(rows, pools["sae"], found, 50, 0)
    assert features["latent"][0] == 7
    assert features["test_auroc"][0] > 0.95
    assert "heldout_font_auroc" not in features


def flat(tree, prefix=""):
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, part in tree.items() for k, v in flat(part, f"{prefix}.{name}").items()}


def test_guitar_without_a_class_is_an_error():
    rows = clip_table(np.random.default_rng(0)).assign(has_guitar=True)
    with pytest.raises(ValueError, match=r"clips.* prepare_data\.recordings\.limits"):
        select_concepts(rows, clip_sets(rows), ["guitar"], 10)


@pytest.mark.parametrize("columns", [6, 150])
def test_logistic_equals_sklearn(columns):
    """More rows than columns and the reverse; several problems and C at once."""
    rng = np.random.default_rng(columns)
    x = rng.normal(size=(90, columns)) + 0.5
    x[:, 1] = x[:, 0]  # rank-deficient
    labels = np.stack([x[:, 0] + rng.normal(size=90) > 0.5, rng.random(90) < 0.2], 1)
    grid = np.array([1e-3, 1e-2, 1.0])
    weights, intercepts = fit_logistic(
        x, np.repeat(labels, 3, 1), np.tile(grid, 2), tolerance=1e-8, iterations=20000
    )
    loose = fit_logistic(x, np.repeat(labels, 3, 1), np.tile(grid, 2))
    for j in range(6):
        model = LogisticRegression(C=grid[j % 3], tol=1e-10, max_iter=10000)
        model.fit(x, labels[:, j // 3])
        expected = model.decision_function(x)
        np.testing.assert_allclose(x @ weights[:, j] + intercepts[j], expected, atol=2e-4)
        np.testing.assert_allclose(x @ loose[0][:, j] + loose[1][j], expected, atol=5e-3)


def test_standardiser_drops_constant_columns():
    x = np.array([[1.0, 5.0, 2.0], [3.0, 5.0, 4.0]], np.float32)
    z = Standardiser.fit(x)(x)
    np.testing.assert_allclose(z, [[-1, -1], [1, 1]])
    with pytest.raises(ValueError, match="none of 3 columns varies"):
        Standardiser.fit(np.ones((4, 3)))


class FakeStore:
    """Clips of unequal length, and an SAE that keeps the two largest positive of 9 projections."""

    width, folder = 5, "data/activations/x/top1"

    def __init__(self):
        rng = np.random.default_rng(2)
        self.data = [rng.normal(size=(t, 5)).astype(np.float32) for t in (3, 7, 1, 4, 6)]
        self.matrix = torch.from_numpy(rng.normal(size=(5, 9)).astype(np.float32))

    def clip(self, i):
        return self.data[i]

    def encode(self, x):
        values, indices = (x @ self.matrix).topk(2)
        return values.relu(), indices


def test_pooled_sparse_codes_equal_dense_computation():
    store = FakeStore()
    sae = SimpleNamespace(width=5, n_latents=9, encode=store.encode)
    other = SimpleNamespace(width=5, n_latents=9, encode=lambda x: store.encode(-x))
    pools = pool_store(store, [4, 0, 1, 2], {"sae": sae, "other": other}, workers=2)
    alone = pool_store(store, [4, 0, 1, 2], {"other": other})
    for name in ("dense", "other"):
        for key, values in alone[name].items():
            np.testing.assert_array_equal(pools[name][key], values)
    for row, clip in enumerate([4, 0, 1, 2]):
        x = store.clip(clip)
        values, indices = store.encode(torch.from_numpy(x))
        dense = torch.zeros(len(x), 9).scatter_(1, indices, values).numpy()
        np.testing.assert_allclose(pools["sae"]["mean"][row], dense.mean(0), rtol=1e-5)
        np.testing.assert_allclose(pools["sae"]["max"][row], dense.max(0), rtol=1e-5)
        np.testing.assert_allclose(pools["dense"]["mean"][row], x.mean(0), rtol=1e-5)
        np.testing.assert_array_equal(pools["dense"]["max"][row], x.max(0))
    with pytest.raises(ValueError, match="rerun train_sae"):
        pool_store(store, [0], {"sae": SimpleNamespace(width=6, n_latents=9)})


def test_log_mel_statistics_ignore_level_and_see_timbre():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(1, 8000)).astype(np.float32) * 0.1
    tone = np.sin(np.arange(8000) * 0.3)[None].astype(np.float32) * 0.1
    loud, quiet = (baselines.log_mel_statistics(g * noise, 16000) for g in (1.0, 0.01))
    assert loud.shape == (1, 320)
    np.testing.assert_allclose(loud, quiet, atol=1e-3)
    assert np.abs(loud - baselines.log_mel_statistics(tone, 16000)).mean() > 0.5
    assert np.isfinite(baselines.log_mel_statistics(np.zeros((1, 8000)), 16000)).all()


class FakeClips:
    sample_rate = 3200

    def __init__(self):
        rng = np.random.default_rng(1)
        self.data, self.asked = 0.1 * rng.normal(size=(11, 3200)).astype(np.float32), 0
        self.rows = pd.DataFrame({"id": [f"c{i}" for i in range(11)]})

    def audio(self, rows):
        self.asked += len(rows)
        return self.data[list(rows)]


def same(one, two):
    assert one.keys() == two.keys()
    for name, pools in one.items():
        for pool, values in pools.items():
            np.testing.assert_array_equal(values, two[name][pool])


def test_baselines_are_the_same_for_any_workers_and_from_cache(
    tiny_musicgen, tmp_path, monkeypatch
):
    model, rows, clips = load_model(tiny_musicgen), [9, 0, 3, 4, 5, 6, 7, 8, 10], FakeClips()
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "a"))
    one = baselines.baseline_pools(clips, "hash", model, rows, workers=1)
    asked = clips.asked
    same(one, baselines.baseline_pools(clips, "hash", model, rows, workers=1))
    assert clips.asked == asked  # all from the cache
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "b"))
    same(one, baselines.baseline_pools(clips, "hash", model, rows, workers=2))
    assert clips.asked == 2 * asked
    assert one["trivial"]["statistics"].shape == (9, 7)
    baselines.baseline_pools(clips, "other", model, rows)
    assert clips.asked == 3 * asked  # other clips


def test_an_edited_formula_does_not_find_old_features(tiny_musicgen, tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    model, clips = load_model(tiny_musicgen), FakeClips()
    before = baselines.baseline_pools(clips, "hash", model, [0, 1])
    edited = tmp_path / "audio.py"
    edited.write_text("# another formula")
    monkeypatch.setattr(baselines.audio, "__file__", str(edited))
    monkeypatch.setattr(baselines.audio, "trivial_cues", lambda signal, rate: np.ones((2, 7)))
    after = baselines.baseline_pools(clips, "hash", model, [0, 1])
    assert (after["trivial"]["statistics"] == 1).all()
    np.testing.assert_array_equal(after["codec"]["max"], before["codec"]["max"])


def test_codec_pools_are_sums_of_code_embeddings(tiny_musicgen, tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    model, clips = load_model(tiny_musicgen), FakeClips()
    pools = baselines.codec_pools(clips, "hash", model, [4, 1])
    books = [layer.codebook.embed for layer in model.hf.audio_encoder.quantizer.layers]
    for row, clip in enumerate((4, 1)):
        found = model.encode(clips.audio([clip]), [None]).codes[0]
        latents = sum(books[k][found[k]] for k in range(len(found))).numpy()
        np.testing.assert_allclose(pools["mean"][row], latents.mean(0), atol=1e-5)
        np.testing.assert_allclose(pools["max"][row], latents.max(0), atol=1e-5)


def test_every_codec_of_its_own_has_a_hash():
    """audiocraft's and YuE's are `model.codec`; only the latter has a config."""
    codec = torch.nn.Linear(3, 2)
    model = SimpleNamespace(codec=codec, hf=SimpleNamespace())
    plain = codes.codec_sha256(model)
    codec.config = SimpleNamespace(to_dict=lambda: {"rate": 1, "_name_or_path": "here"})
    configured = codes.codec_sha256(model)
    codec.config = SimpleNamespace(to_dict=lambda: {"rate": 1, "_name_or_path": "there"})
    assert codes.codec_sha256(model) == configured
    codec.config = SimpleNamespace(to_dict=lambda: {"rate": 2})
    others = {codes.codec_sha256(model)}
    del codec.config
    codec.weight.data[0, 0] += 1
    others.add(codes.codec_sha256(model))
    assert len({plain, configured, *others}) == 4
    assert codes.codec_sha256(SimpleNamespace()) is None
