"""Rows of the table against brute force, p-values under nulls, and the whole comparison."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_array
from scipy.stats import mannwhitneyu

from musicscope.config.analysis import MatchFeatures
from musicscope.core import stats
from musicscope.core.io import read_json, sha256, write_json
from musicscope.dictionaries.codes import Codes, pool_clips
from musicscope.features import association as concepts
from musicscope.features import report
from musicscope.features import table as feature_table
from musicscope.features.run import Inputs, ModelSAEs, compare, describe_features
from tests.support.planted import BOTH, CLOCK, DEAD, GUITAR, OWN, SHARED, WIDTH, plant


def dense_codes(seed: int = 0, F: int = 6) -> tuple[np.ndarray, Codes]:
    """Clips of unequal lengths; latent 5 never fires; latent 0 reaches its maximum twice."""
    rng, frames = np.random.default_rng(seed), np.array([7, 3, 9, 5])
    dense = (rng.random((24, F)) < 0.4) * rng.uniform(0.1, 2.0, (24, F))
    dense[:, 5] = 0
    dense[[2, 4], 0] = 5.0
    dense = dense.astype(np.float32)
    return dense, Codes(csr_array(dense), frames)


def test_pools_equal_those_of_dense_frames():
    dense, codes = dense_codes()
    found = pool_clips(codes)
    for clip, part in enumerate(np.split(dense, np.cumsum(codes.frames)[:-1])):
        assert np.allclose(found.mean[clip], part.mean(0))
        assert np.array_equal(found.highest[clip], part.max(0))
        expected = np.where(part.max(0) > 0, part.argmax(0), -1)  # argmax: the first of equals
        assert np.array_equal(found.frame[clip], expected)
    assert found.frame[0, 0] == 2


def test_codes_and_clips_must_add_up():
    with pytest.raises(ValueError, match="24 frames for clips of 23"):
        Codes(dense_codes()[1].matrix, np.array([7, 3, 8, 5]))


def test_shared_firing_golden_values_and_brute_force():
    """tau = .1. Latents: alike in all, in one alone, in two of three, in none, and at random."""
    rng = np.random.default_rng(0)
    x = np.zeros((3, 40, 5), np.float32)
    x[:, :10, 0] = 1.0
    x[1, :10, 1] = 1.0
    x[:2, 5:15, 2] = 1.0
    x[:, :, 3] = 0.05  # active, but below the threshold
    x[..., 4] = rng.uniform(0, 0.3, (3, 40))
    found = feature_table.shared_firing(
        [Codes(csr_array(model), np.array([40])) for model in x], threshold=0.1
    )
    fires = (x > 0.1).sum(1)
    assert np.array_equal(found["fires"], fires)
    entropy = found["firing_entropy"]
    assert entropy[:3] == pytest.approx([1.0, 0.0, np.log(2) / np.log(3)])
    assert np.isnan(entropy[3])
    p = fires[:, 4] / fires[:, 4].sum()
    assert entropy[4] == pytest.approx(-(p * np.log(p)).sum() / np.log(3))
    both = (x > 0.1).all(0).sum(0)
    assert found["cofires"].tolist() == both.tolist() == [10, 0, 0, 0, both[4]]
    assert found["cofire_proportion"][:, 4] == pytest.approx(both[4] / fires[:, 4])
    assert found["cofire_proportion"][1, 1] == 0
    assert np.isnan(found["cofire_proportion"][0, 1])


def test_energy_is_that_of_the_mean_contribution():
    dense, codes = dense_codes()
    decoder = np.random.default_rng(1).standard_normal((6, 4))
    contribution = dense.astype(float).mean(0)[:, None] * decoder
    expected = np.square(contribution).sum(1) / 3.0
    assert np.allclose(feature_table.energy(codes, decoder, 3.0), expected)


def test_top_clips_give_the_exact_frame():
    dense, codes = dense_codes()
    top = feature_table.top_clips(pool_clips(codes), ["w", "x", "y", "z"], rate=50.0, n=3)
    starts = dict(zip("wxyz", np.cumsum(codes.frames) - codes.frames, strict=True))
    for row in top.itertuples():
        assert dense[starts[row.clip] + row.frame, row.feature] == np.float32(row.value)
        assert row.seconds == row.frame / 50
    assert 5 not in set(top["feature"])
    first = top[(top["feature"] == 0) & (top["rank"] == 1)].iloc[0]
    assert (first["clip"], first["frame"], first["value"]) == ("w", 2, 5.0)
    for _, part in top.groupby("feature"):
        assert part["rank"].tolist() == list(range(1, len(part) + 1))
        assert part["value"].is_monotonic_decreasing


def aligned(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray, seed=0, permutations=99):
    """Alignment where validation is the same as test, one pooling."""
    C = labels.shape[1]
    return concepts.align(
        {"x": {"validation": {"mean": scores}, "test": {"mean": scores}}},
        {"validation": labels, "test": labels}, groups, [f"c{i}" for i in range(C)],
        permutations, seed,
    )["x"]  # fmt: skip


def test_a_planted_concept_is_found_with_the_smallest_p():
    rng = np.random.default_rng(0)
    labels, scores = rng.random((120, 5)) < 0.4, rng.uniform(0, 1, (120, 30))
    scores[:, 7] += 0.8 * labels[:, 2]
    scores[:, 9] = 0.0
    groups = np.repeat(np.arange(12), 10)
    found = aligned(scores, labels, groups)
    assert found.concept[7] == "c2"
    assert found.auroc[7] == pytest.approx(stats.auroc(scores[:, 7], labels[:, 2]))
    assert found.p[7] == 1 / 100
    others = np.delete(np.arange(30), [7, 9])
    assert (found.p[others] > 0.05).all()
    assert (found.concept[9], found.pooling[9]) == ("", "")
    assert np.isnan(found.p[9])
    assert np.isnan(found.auroc[9])
    assert np.isnan(found.heldout_auroc).all()


def test_corrected_p_holds_its_level_over_all_latents_and_concepts():
    """Without any effect, few of 60 families of 5 x 30 tests have a single p <= .05."""
    hits = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        labels, scores = rng.random((80, 5)) < 0.4, rng.standard_normal((80, 30))
        hits += bool((aligned(scores, labels, np.repeat(np.arange(10), 8), seed).p <= 0.05).any())
    assert hits <= 8  # binomial(60, .05) is above 8 with probability .002


def test_compositions_are_the_unit_and_not_clips():
    """A label that belongs to whole compositions, and scores that do too, by chance alone: Mann and
    Whitney over clips calls many significant, the permutation of compositions none."""
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(8), 20)
    labels = (np.arange(8) % 2 == 0)[groups][:, None]
    scores = rng.standard_normal((8, 40))[groups] + 0.1 * rng.standard_normal((160, 40))
    naive = [mannwhitneyu(s[labels[:, 0]], s[~labels[:, 0]]).pvalue * 40 for s in scores.T]
    assert (np.array(naive) < 0.05).sum() > 10
    found = aligned(scores, labels, groups)
    assert not (found.p <= 0.05).any()


def test_concept_and_pooling_are_chosen_on_validation():
    rng = np.random.default_rng(0)
    labels = {k: rng.random((90, 2)) < 0.5 for k in ("validation", "test", "heldout_font")}
    noise = {k: {p: rng.uniform(0, 1, (90, 3)) for p in ("mean", "max")} for k in labels}
    noise["validation"]["max"][:, 0] += labels["validation"][:, 1]
    noise["test"]["mean"][:, 0] += labels["test"][:, 0]  # better on test, but not to be looked at
    found = concepts.align({"x": noise}, labels, np.repeat(np.arange(9), 10), ["u", "v"], 99, 0)
    found = found["x"]
    assert (found.concept[0], found.pooling[0]) == ("v", "max")
    for values, name in ((found.auroc, "test"), (found.heldout_auroc, "heldout_font")):
        expected = stats.auroc(noise[name]["max"][:, 0], labels[name][:, 1])
        assert values[0] == pytest.approx(expected)
    assert found.p[0] > 0.05


def test_unknown_labels_are_left_out_concept_by_concept():
    """A concept's z, AUROC and choice are those on its known clips alone."""
    rng = np.random.default_rng(3)
    labels, scores = rng.random((120, 3)) < 0.4, rng.uniform(0, 1, (120, 12))
    scores[:, 5] += 0.8 * labels[:, 1]
    known = np.ones((120, 3), bool)
    known[:, 1] = rng.random(120) < 0.7
    scores[~known[:, 1] & labels[:, 1], 5] = -9.0  # would spoil it if these were looked at
    sets, groups = ("validation", "test", "heldout_font"), np.repeat(np.arange(12), 10)
    names = ["u", "v", "w"]

    def align(labels, known):
        return concepts.align(
            {"x": {s: {"mean": scores} for s in sets}}, dict.fromkeys(sets, labels), groups, names,
            99, 0, dict.fromkeys(sets, known),
        )["x"]  # fmt: skip

    found = align(labels, known)
    assert (found.concept[5], found.p[5]) == ("v", 1 / 100)
    at = known[:, 1]
    expected = stats.auroc(scores[at, 5], labels[at, 1])
    assert found.auroc[5] == found.heldout_auroc[5] == pytest.approx(expected)
    other = align(labels & known, known)  # what is said of unknown clips changes nothing
    for name in ("concept", "auroc", "heldout_auroc", "p"):
        np.testing.assert_array_equal(getattr(found, name), getattr(other, name))
    rows = pd.DataFrame(labels, columns=[f"has_{c}" for c in names]).astype("boolean")
    rows.loc[~at, "has_v"] = pd.NA
    sizes = [int(min(labels[k, j].sum(), (~labels[k, j]).sum())) for j, k in enumerate(known.T)]
    every = [np.arange(120)] * 2
    assert concepts.usable_concepts(rows, every, names, sizes[1]) == (names, {})
    assert concepts.usable_concepts(rows, every, names, sizes[1] + 1)[1] == {"v": sizes[1]}


def test_rare_concepts_are_left_out_and_counted():
    rows = pd.DataFrame({"has_a": [True] * 5 + [False] * 5, "has_b": [True] + [False] * 9})
    halves = [np.arange(0, 10, 2), np.arange(1, 10, 2)]
    assert concepts.usable_concepts(rows, halves, ["a", "b"], 2) == (["a"], {"b": 0})
    with pytest.raises(ValueError, match="min_clips"):
        concepts.usable_concepts(rows, halves, ["a", "b"], 4)


SECTION = MatchFeatures(
    slot="top1", threshold=0.5, null_draws=2, permutations=99, bootstrap=50, min_clips=4,
    top_clips=3,
)  # fmt: skip


def inputs(planted, **changes):
    models = [
        ModelSAEs(name, store, saes)
        for name, store, saes in zip("ab", planted.stores, planted.saes, strict=True)
    ]
    values = {"models": models, "usae": planted.usae, "rows": planted.rows, "slot": "top1"}
    return Inputs(**values | changes)


def compare_planted(planted, workers=1):
    of = inputs(planted)
    comparison = compare(of, SECTION, 0, workers)
    features, top, skipped = describe_features(of, comparison, SECTION, 0.1, 50.0, 0)
    return comparison, features, top, report.metrics(comparison, features, skipped, SECTION)


@pytest.fixture(scope="module")
def compared():
    planted = plant(reproducible_own=OWN - 1)
    return planted, *compare_planted(planted)


def test_planted_sets_partners_and_counterparts_are_found(compared):
    planted, found, features, _, metrics = compared
    table = features.set_index(["kind", "model", "feature"])
    for m, name in enumerate("ab"):
        latent, rows = planted.latent[m], table.loc["sae", name]
        other = planted.latent[1 - m]
        expected = ["common"] * SHARED + ["positional"] * CLOCK + ["own"] * (OWN - 1)
        expected += ["unmatched"] + ["silent"] * DEAD
        assert rows.loc[latent, "set"].tolist() == expected
        shared = rows.loc[latent[:BOTH]]
        assert shared["partner"].tolist() == shared["best"].tolist() == other[:BOTH].tolist()
        assert set(shared["partner_model"]) == {"ba"[m]}
        assert (shared["partner_correlation"] > 0.9).all()
        assert (shared["partner_repaired"] > 0.9).tolist() == [False] * SHARED + [True] * CLOCK
        assert shared["counterpart"].tolist() == list(range(BOTH))
        assert shared["counterpart_cosine"].to_numpy() == pytest.approx(1)
        own = rows.loc[latent[BOTH : BOTH + OWN]]
        assert own["counterpart"].tolist() == [BOTH + m * OWN + i for i in range(OWN)]
        assert (own["best_correlation"].fillna(0) < 0.3).all()
        assert (own["seed_correlation"].fillna(0) > 0.99).tolist() == [True] * (OWN - 1) + [False]
        dead = rows.loc[latent[-DEAD:]]
        assert (dead[["partner", "best", "top_frame"]] == -1).all(axis=None)
        assert (dead["top_clip"] == "").all()
        usae = table.loc["usae", name]
        assert usae.loc[: BOTH - 1, "counterpart"].tolist() == latent[:BOTH].tolist()
        assert usae.loc[: BOTH - 1, "firing_entropy"].to_numpy() == pytest.approx(1)
        assert (usae.loc[BOTH:, "firing_entropy"] == 0).all()
        assert usae.loc[: BOTH - 1, "cofire_proportion"].to_numpy() == pytest.approx(1)
    between = metrics["sae_sae"]["a_b"]
    assert (between["matched_pairs"], between["musical_pairs"]) == (BOTH, SHARED)
    assert between["matched_a"] == between["matched_b"] == BOTH / WIDTH
    assert between["musical_a"] == between["musical_b"] == SHARED / WIDTH
    assert between["musical_a_low"] == between["musical_a_high"] == SHARED / WIDTH
    assert between["heldout_font_matched_a"] == BOTH / WIDTH
    # Re-paired clips keep their clock, and nothing else.
    assert between["null_matched_a"] == CLOCK / WIDTH
    assert between["null_musical_a"] == 0


def test_metrics_and_the_keys_of_the_summary(compared, tmp_path):
    *_, metrics = compared
    write_json(tmp_path / "m.json", metrics)  # numpy numbers and all
    stored = read_json(tmp_path / "m.json")
    keys = report.summary_keys(stored)
    assert keys["match.common"] == SHARED
    assert keys["match.common_low"] == keys["match.common_high"] == SHARED
    assert keys["match.null_common"] == 0
    assert keys["match.positional"] == CLOCK
    for name in "ab":
        assert keys[f"match.own_{name}"] == OWN - 1
        assert keys[f"match.sae_usae_matched_{name}"] == pytest.approx((BOTH + OWN) / WIDTH)
        assert keys[f"match.null_matched_{name}"] < 0.6
        # Seed 1 lacks one own factor and, like seed 0, the dead ones.
        assert keys[f"match.sae_sae_musical_{name}"] == pytest.approx(SHARED / WIDTH)
        assert keys[f"match.seeds_musical_{name}"] == pytest.approx((SHARED + OWN - 1) / WIDTH)
        assert stored["seeds"][name]["matched"] == pytest.approx(1 - (DEAD + 1) / WIDTH)
        assert stored["sets"][f"silent_{name}"] == DEAD
    assert stored["clips"] == {"validation": 48, "test": 48, "heldout_font": 48}


def test_the_guitar_latent_is_credited_with_the_guitar(compared):
    planted, _, features, _, metrics = compared
    for name, latent in zip("ab", planted.latent, strict=True):
        for kind, feature in (("sae", latent[GUITAR]), ("usae", GUITAR)):
            row = features[
                (features["kind"] == kind)
                & (features["model"] == name)
                & (features["feature"] == feature)
            ].iloc[0]
            assert row["concept"] == "guitar"
            assert row["concept_p"] == 0.01
            assert min(row["concept_auroc"], row["concept_heldout_auroc"]) > 0.95
            assert metrics["concepts"][f"{kind}_{name}"]["by_concept"]["guitar"] >= 1
    assert (features["concept_p"] <= 0.05).sum() <= 8  # four are planted


def test_tables_survive_the_disk_and_have_their_columns(compared, tmp_path):
    planted, _, features, top, _ = compared
    feature_table.write(tmp_path / "features", features, top)
    first = {p.name: sha256(p) for p in (tmp_path / "features").iterdir()}
    assert set(first) == {"features.parquet", "top_clips.parquet"}
    read = pd.read_parquet(tmp_path / "features/features.parquet")
    pd.testing.assert_frame_equal(read, features)
    assert list(read.columns) == list(feature_table.COLUMNS)
    assert len(read) == 2 * WIDTH + 2 * (BOTH + 2 * OWN)
    for name in feature_table.TEXT:
        assert read[name].map(type).eq(str).all(), name
    ranks = pd.read_parquet(tmp_path / "features/top_clips.parquet")
    best = ranks[ranks["rank"] == 1].set_index(["kind", "model", "feature"])
    rows = read[read["top_frame"] >= 0].set_index(["kind", "model", "feature"])
    assert (best.loc[rows.index, "clip"] == rows["top_clip"]).all()
    assert (best.loc[rows.index, "frame"] == rows["top_frame"]).all()
    clip = planted.rows.index[planted.rows["id"] == rows["top_clip"].iloc[0]][0]
    kind, model, feature = rows.index[0]
    values, indices = planted.saes[0][0].encode(torch.from_numpy(planted.stores[0].clip(clip)))
    frame = rows["top_frame"].iloc[0]
    assert (kind, model) == ("sae", "a")
    assert values[frame][indices[frame] == feature].item() == rows["top_value"].iloc[0]
    with pytest.raises(ValueError, match="more than one row"):
        feature_table.write(tmp_path / "x", pd.concat([features, features]), top)
    assert not (tmp_path / "x").exists()


def test_same_numbers_and_same_bytes_with_any_number_of_threads(compared, tmp_path):
    planted, found, features, top, metrics = compared
    again = compare_planted(planted, workers=2)
    pd.testing.assert_frame_equal(again[1], features)
    pd.testing.assert_frame_equal(again[2], top)
    hashes = []
    for i, (of, table, best) in enumerate(((found, features, top), again[:3])):
        folder = tmp_path / str(i)
        report.write_comparison(str(folder), of, 0.5)
        feature_table.write(folder / "features", table, best)
        write_json(folder / "metrics.json", (metrics, again[3])[i])
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        hashes.append({str(p.relative_to(folder)): sha256(p) for p in files})
    assert hashes[0] == hashes[1]
    assert {"correlations.png", "correlations.csv", "cosines.png", "cosines.csv"} <= set(hashes[0])
    shown = pd.read_csv(tmp_path / "0/correlations.csv")
    assert shown.groupby("comparison")["share"].sum().to_numpy() == pytest.approx(1)
    cosines = pd.read_csv(tmp_path / "0/cosines.csv")
    assert cosines.groupby("model")["cosine"].first().to_numpy() == pytest.approx(1)


def test_what_does_not_belong_together_is_an_error():
    planted = plant()
    models = inputs(planted).models
    lone = [ModelSAEs(m.name, m.store, m.saes[:1]) for m in models]
    for changes, message in (
        ({"models": models[:1]}, "at least two"),
        ({"slot": "top2"}, "of a, b at top1, params ask for a usae of a, b at top2"),
        ({"models": models[::-1]}, "train_usae"),
        ({"rows": planted.rows.iloc[::-1]}, "other clips"),
        ({"models": lone}, r"train_sae\.seeds"),
    ):
        with pytest.raises(ValueError, match=message):
            inputs(planted, **changes)
