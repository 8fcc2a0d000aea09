"""Rows of the table against brute force, and the whole comparison on planted models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_array

from musicscope.config.analysis import MatchFeatures
from musicscope.core.io import read_json, sha256, write_json
from musicscope.dictionaries.codes import Codes, pool_clips
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


def test_effects_fill_the_rows_of_their_models_sae():
    rows = pd.DataFrame(
        {"kind": ["sae", "sae", "usae", "sae"], "model": ["a", "a", "a", "b"],
         "feature": [1, 0, 0, 0], "output_kl": np.nan, "output_confidence": np.nan}
    )  # fmt: skip
    effects = pd.DataFrame({"feature": [0, 1], "kl": [0.5, 2.0], "confidence": [0.1, -0.1]})
    found = feature_table.with_effects(rows, {"a": effects, "b": effects.head(0)})
    assert found["output_kl"].fillna(-1).tolist() == [2.0, 0.5, -1, -1]
    assert found["output_confidence"].fillna(-1).tolist() == [-0.1, 0.1, -1, -1]
    with pytest.raises(ValueError, match="b: output effects of 2 latents for 1"):
        feature_table.with_effects(rows, {"b": effects})


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


SECTION = MatchFeatures(
    slot="top1", threshold=0.5, null_draws=2, permutations=99, bootstrap=50, min_clips=4,
    top_clips=3, stable_only=True,
)  # fmt: skip


def returning(latents: int, lost: tuple[int, ...] = ()) -> pd.DataFrame:
    """Table of dictionaries.stability in which all latents but `lost` return."""
    back = ~np.isin(np.arange(latents), lost)
    return pd.DataFrame({"seed_cosine": np.where(back, 0.9, 0.3), "returns": back})


def inputs(planted, lost=(), **changes):
    models = [
        ModelSAEs(name, store, saes, returning(saes[0].n_latents, lost))
        for name, store, saes in zip("ab", planted.stores, planted.saes, strict=True)
    ]
    values = {"models": models, "usae": planted.usae, "rows": planted.rows, "slot": "top1"}
    return Inputs(**values | changes)


def compare_planted(planted, workers=1, lost=()):
    of = inputs(planted, lost)
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
    assert between["matched_a"]["value"] == between["matched_b"]["value"] == BOTH / WIDTH
    for musical in (between["musical_a"], between["musical_b"]):
        assert [musical[k] for k in ("value", "low", "high")] == [SHARED / WIDTH] * 3
    assert between["heldout_font_matched_a"] == BOTH / WIDTH
    # Re-paired clips keep their clock, and nothing else.
    assert between["null_matched_a"] == CLOCK / WIDTH
    assert between["null_musical_a"] == 0


def test_metrics_count_the_planted_sets(compared, tmp_path):
    *_, metrics = compared
    write_json(tmp_path / "m.json", metrics)  # numpy numbers and all
    stored = read_json(tmp_path / "m.json")
    sets = stored["sets"]
    assert [sets["common"][k] for k in ("value", "low", "high")] == [SHARED] * 3
    assert sets["common"]["unit"] == "features"
    assert sets["null_common"] == 0
    assert sets["positional"] == CLOCK
    for name in "ab":
        assert sets[f"own_{name}"] == OWN - 1
        assert stored["sae_usae"][name]["matched"] == pytest.approx((BOTH + OWN) / WIDTH)
        assert stored["sae_usae"][name]["null_matched"] < 0.6
        # Seed 1 lacks one own factor and, like seed 0, the dead ones.
        (between,) = stored["sae_sae"].values()
        assert between[f"musical_{name}"]["value"] == pytest.approx(SHARED / WIDTH)
        assert stored["seeds"][name]["musical"]["value"] == pytest.approx(
            (SHARED + OWN - 1) / WIDTH
        )
        assert stored["seeds"][name]["matched"]["value"] == pytest.approx(1 - (DEAD + 1) / WIDTH)
        assert sets[f"silent_{name}"] == DEAD
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


def test_latents_that_do_not_return_are_neither_named_nor_matched():
    """Two shared factors, of which one is the guitar's, and one own factor are lost."""
    planted = plant()
    whole = compare_planted(planted)
    guitar, other, own = (planted.latent[0][f] for f in (GUITAR, GUITAR + 1, BOTH))
    lost = (int(other), int(own))
    _, features, _, metrics = compare_planted(planted, lost=lost)
    row = features.set_index(["kind", "model", "feature"]).loc["sae", "a"]
    assert row.loc[list(lost), "set"].tolist() == ["unstable", "unstable"]
    assert row.loc[list(lost), "returns"].tolist() == [0, 0]
    assert (row.loc[list(lost), "concept"] == "").all()
    assert row.loc[list(lost), "concept_p"].isna().all()
    gone = {f for f in range(BOTH) for m in (0, 1) if planted.latent[m][f] in lost}
    assert metrics["sets"]["common"]["value"] == SHARED - len(gone - set(range(SHARED, BOTH)))
    assert (row.loc[guitar, "set"], row.loc[guitar, "concept"]) == ("common", "guitar")
    assert metrics["concepts"]["sae_a"]["named_by_all"] == []
    assert metrics["concepts"]["sae_a"]["returning"] == WIDTH - 2
    # Nothing but the guitar's latent follows the guitar: then it keeps its name, and this is said.
    _, features, _, metrics = compare_planted(planted, lost=(int(guitar),))
    row = features.set_index(["kind", "model", "feature"]).loc["sae", "a"]
    assert (row.loc[guitar, "set"], row.loc[guitar, "concept"]) == ("unstable", "guitar")
    assert "guitar" in metrics["concepts"]["sae_a"]["named_by_all"]
    assert whole[3]["sets"]["unstable_a"] == 0


def test_with_the_switch_off_every_latent_is_named():
    planted = plant()
    section = replace(SECTION, stable_only=False)
    of = inputs(planted, lost=range(WIDTH))
    found = compare(of, section, 0)
    features, _, _ = describe_features(of, found, section, 0.1, 50.0, 0)
    first = compare_planted(planted)[1]
    for column in ("set", "concept", "concept_p"):
        pd.testing.assert_series_equal(features[column], first[column])


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
        report.write_comparison(str(folder), of)
        feature_table.write(folder / "features", table, best)
        write_json(folder / "metrics.json", (metrics, again[3])[i])
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        hashes.append({str(p.relative_to(folder)): sha256(p) for p in files})
    assert hashes[0] == hashes[1]
    assert {"correlations.csv", "cosines.csv"} <= set(hashes[0])
    shown = pd.read_csv(tmp_path / "0/correlations.csv")
    assert shown.groupby("comparison")["share"].sum().to_numpy() == pytest.approx(1)
    cosines = pd.read_csv(tmp_path / "0/cosines.csv")
    assert cosines.groupby("model")["cosine"].first().to_numpy() == pytest.approx(1)


def test_what_does_not_belong_together_is_an_error():
    planted = plant()
    models = inputs(planted).models
    lone = [ModelSAEs(m.name, m.store, m.saes[:1], m.stability) for m in models]
    for changes, message in (
        ({"models": models[:1]}, "at least two"),
        ({"slot": "top2"}, "of a, b at top1, params ask for a usae of a, b at top2"),
        ({"models": models[::-1]}, "train_usae"),
        ({"rows": planted.rows.iloc[::-1]}, "other clips"),
        ({"models": lone}, r"train_sae\.seeds"),
    ):
        with pytest.raises(ValueError, match=message):
            inputs(planted, **changes)
