"""What every latent does on test clips, against the same computed latent by latent."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_array

from musicscope.config.analysis import FeatureActivity, MatchFeatures
from musicscope.data.taxonomy import FAMILIES
from musicscope.dictionaries.codes import Codes, pool_clips
from musicscope.features import activity
from musicscope.features.activity import ALL, LEVELS, Dictionary

CLIPS, FRAMES, F, WINDOW = 30, 40, 6, 10
SECTION = FeatureActivity(
    clips=CLIPS, moments=3, bands=4, per_band=2, seconds=1.0, bars=5, nearest=2
)
MATCHING = MatchFeatures("top1", 0.5, 1, 49, 10, 3, 3, True)


def random_codes(seed: int, clips: int = CLIPS) -> Codes:
    rng = np.random.default_rng(seed)
    dense = rng.gamma(1.0, 1.0, (clips * FRAMES, F)) * (rng.random((clips * FRAMES, F)) < 0.1)
    dense[:, 4] = 0  # never fires
    return Codes(csr_array(dense.astype(np.float32)), np.full(clips, FRAMES))


def described(codes: list[Codes], models: tuple[str, ...] = ("a",)):
    decoder = np.random.default_rng(9).standard_normal((F, 4))
    one = Dictionary("sae", "a", "top1", "layers.1", models, 10.0, decoder, lambda _: codes, True)
    ids = np.array([f"clip-{i}" for i in range(CLIPS)])
    return activity.describe(one, codes, [pool_clips(c) for c in codes], ids, SECTION, 0)


def test_numbers_of_a_latent_are_those_of_its_own_frames():
    codes = random_codes(0)
    dense = codes.matrix.toarray()
    features, _ = described([codes])
    assert features["feature"].tolist() == [0, 1, 2, 3, 5]  # live ones alone
    for row in features.to_dict("records"):
        values = dense[:, row["feature"]]
        fired = values[values > 0]
        assert row["firing_rate"] == pytest.approx(len(fired) / len(values))
        assert row["clips"] == (values.reshape(CLIPS, FRAMES) > 0).any(1).mean()
        assert row["mean_active"] == pytest.approx(fired.mean(), rel=1e-6)
        assert row["highest"] == fired.max()
        edges = np.linspace(0, fired.max(), SECTION.bars + 1)
        wanted = [((fired > low) & (fired <= high)).sum()
                  for low, high in zip(edges, [*edges[1:-1], np.inf], strict=False)]  # fmt: skip
        assert row["histogram"].tolist() == wanted


def test_excerpts_are_the_best_clips_and_random_ones_of_every_interval():
    codes = random_codes(1)
    dense = codes.matrix.toarray().reshape(CLIPS, FRAMES, F)
    features, samples = described([codes])
    tops = features.set_index("feature")["highest"]
    for feature, rows in samples.groupby("feature"):
        peaks = dense[:, :, feature].max(1)
        best = rows[rows["band"] == 0].sort_values("rank")
        wanted = np.sort(peaks[peaks > 0])[::-1][: SECTION.moments]
        assert best["value"].tolist() == wanted.tolist()
        assert not rows.duplicated("clip").any()
        rest = set(rows["clip"]) - set(best["clip"])
        for row in rows.to_dict("records"):
            clip = int(row["clip"].split("-")[1])
            assert row["value"] == peaks[clip]
            assert dense[clip, row["frame"], feature] == peaks[clip]
            assert row["first"] <= row["frame"] < row["first"] + WINDOW
            curve = dense[clip, row["first"] : row["first"] + WINDOW, feature]
            assert row["curve"].tolist() == np.round(curve * (LEVELS / tops[feature])).tolist()
            if row["clip"] in rest:
                share = peaks[clip] / tops[feature]
                assert (row["band"] - 1) / 4 < share <= row["band"] / 4
        counts = rows[rows["band"] > 0]["band"].value_counts()
        assert counts.max() <= SECTION.per_band
        others = peaks[[i for i in range(CLIPS) if f"clip-{i}" not in set(best["clip"])]]
        for band in range(1, 5):
            share = others / tops[feature]
            there = ((share > (band - 1) / 4) & (share <= band / 4)).sum()
            assert counts.get(band, 0) == min(there, SECTION.per_band)


def test_the_draw_is_the_same_every_time_and_a_shared_code_has_the_same_excerpts_in_all_models():
    both = [random_codes(2), random_codes(3)]
    features, samples = described(both, ("a", "b"))
    pd.testing.assert_frame_equal(samples, described(both, ("a", "b"))[1])
    first, second = (samples[samples["model"] == m].reset_index(drop=True) for m in ("a", "b"))
    columns = ["feature", "band", "rank", "clip", "first", "frame"]
    pd.testing.assert_frame_equal(first[columns], second[columns])
    assert not np.allclose(first["value"], second["value"])
    assert len(features) == 2 * 5


def test_nearest_rows_leave_the_row_itself_out():
    rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 2.0], [-1.0, 0.0]])
    cosines, near = activity.nearest_rows(rows, 2)
    assert near[:, 0].tolist() == [1, 0, 1, 2]
    assert cosines[0, 0] == pytest.approx(0.9 / np.hypot(0.9, 0.1))


def clip_table() -> pd.DataFrame:
    rng = np.random.default_rng(4)
    rows = [
        {"id": f"{split}-{i}", "group": f"{split}-{i}", "split": split, "kind": "clip",
         "font": "mixed"}
        for split in ("train", "validation", "test")
        for i in range(CLIPS)
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    labels = dict.fromkeys((f"has_{family}" for family in FAMILIES), False)
    random = {f"has_{family}": rng.random(len(table)) < 0.5 for family in ("guitar", "drums")}
    return table.assign(**(labels | random))


def test_concepts_are_tested_only_where_the_feature_table_has_none(tmp_path):
    rows = clip_table()

    def codes(clips: np.ndarray) -> list[Codes]:
        dense = random_codes(int(clips[0]), len(clips)).matrix.toarray()
        dense[:, 0] = np.repeat(rows["has_guitar"].to_numpy()[clips], FRAMES)  # follows guitar
        return [Codes(csr_array(dense), np.full(len(clips), FRAMES))]

    decoder = np.eye(F)
    dictionaries = [
        Dictionary("sae", "a", slot, "layers.1", ("a",), 10.0, decoder, codes, slot == "top1")
        for slot in ("top1", "top2")
    ]
    dictionaries.append(
        Dictionary("crosscoder", "", "top1", "layers.1", (ALL,), 10.0, decoder, codes, False)
    )
    activity.write(tmp_path / "out", dictionaries, rows, SECTION, MATCHING, 0, FAMILIES)
    features = pd.read_parquet(tmp_path / "out/features.parquet").set_index(
        ["dictionary", "feature"]
    )
    assert features.loc["sae-a-top1", "concept_p"].isna().all()
    for name in ("sae-a-top2", "crosscoder-top1"):
        first = features.loc[name, 0]
        assert (first["concept"], first["concept_auroc"]) == ("guitar", 1.0)
        assert first["concept_p"] <= 0.05
        assert (features.loc[name].loc[1:, "concept_p"].dropna() > 0.05).all()
    listed = json.loads((tmp_path / "out/dictionaries.json").read_text())
    assert [one["name"] for one in listed["dictionaries"]] == [one.name for one in dictionaries]
    assert listed["clips"] == [f"test-{i}" for i in range(CLIPS)]
    with pytest.raises(ValueError, match=r"prepare_data\.clips"):
        activity.write(tmp_path / "no", dictionaries, rows[rows["split"] == "test"], SECTION,
                       MATCHING, 0, FAMILIES)  # fmt: skip


def test_clips_are_thinned_evenly():
    assert activity.spread(np.arange(10), 4).tolist() == [0, 3, 6, 9]
    assert activity.spread(np.arange(3), 4).tolist() == [0, 1, 2]
    assert activity.spread(np.arange(0), 4).tolist() == []
