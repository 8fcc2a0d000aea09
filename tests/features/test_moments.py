"""Which features get curves of their best moments, and whether the curves equal the codes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from musicscope.features import moments
from tests.support.report import CLIPS, FRAMES, MODELS, RATE_OF_FRAMES, make_inputs


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Codes by (model, kind), and the folder of the tables made from them."""
    root = tmp_path_factory.mktemp("inputs")
    return make_inputs(root), root / "data/features"


@pytest.fixture(scope="module")
def table(written) -> pd.DataFrame:
    return pd.read_parquet(written[1] / "features.parquet")


def test_no_feature_gets_two_cards_and_sets_hold_what_they_say(table):
    picks = moments.pick(table, MODELS, 4)
    assert len({(o.kind, o.model, o.number) for o in picks}) == len(picks)
    by_set: dict[str, list] = {}
    for one in picks:
        for name, model in one.sets:
            by_set.setdefault(f"{name}-{model}".strip("-"), []).append(one)
    assert max(map(len, by_set.values())) == 4
    sae = table[table["kind"] == "sae"].set_index(["model", "feature"])
    for model in MODELS:
        for name in ("common", "own"):
            assert all(sae.loc[(model, o.number), "set"] == name for o in by_set[f"{name}-{model}"])
        best = [o.number for o in by_set[f"common-{model}"]]
        assert best == [21, 18, 15, 12]  # the largest correlations with a partner
        (concept,) = by_set[f"concept-{model}"]  # one card a concept that stands up
        assert concept.number == 19
    entropy = table[table["kind"] == "usae"].set_index("feature")["firing_entropy"]
    shared = entropy[[one.number for one in by_set["shared"]]].mean()
    assert shared > entropy[[o.number for m in MODELS for o in by_set[f"specific-{m}"]]].mean()


def test_curves_equal_the_dense_code(written):
    codes, folder = written
    ids = [f"clip-{i}" for i in range(CLIPS)]
    wanted = [(("sae", "wide", 5), "clip-3"), (("usae", "wide", 7), "clip-3"),
              (("sae", "wide", 6), "clip-3"), (("usae", "tiny", 7), "clip-0")]  # fmt: skip
    curves = moments.cut(codes, ids, wanted)
    moments.write(folder / "some.parquet", curves, RATE_OF_FRAMES)
    back, rate = moments.read(folder / "some.parquet")
    assert rate == RATE_OF_FRAMES
    assert set(curves) == set(back) == set(wanted)
    for ((kind, model, number), clip), found in curves.items():
        start = int(clip[-1]) * FRAMES
        dense = codes[model, kind].matrix[start : start + FRAMES].toarray()
        assert np.array_equal(found, dense[:, number])
        assert np.array_equal(back[(kind, model, number), clip], found)
        assert found.any()


def test_every_feature_of_a_card_has_curves_in_its_best_clips(written, table):
    top = pd.read_parquet(written[1] / "top_clips.parquet")
    curves, _ = moments.read(written[1] / "moments.parquet")
    for one in moments.pick(table, MODELS, 4):
        traces, best = one.traces(table, MODELS), one.best_clips(table, top, MODELS, 5)
        assert best
        for clip, _, _ in best:
            assert all((trace, clip) in curves for trace in traces)
        clip, model, frame = best[0]
        own = next(trace for trace in traces if trace[1] == model)
        assert curves[own, clip][frame] == curves[own, clip].max()


def test_a_missing_file_names_its_stage(tmp_path):
    with pytest.raises(FileNotFoundError, match="dvc repro match_features"):
        moments.read(tmp_path / "moments.parquet")


def test_best_clips_are_ranked_over_models_by_share_of_the_highest_value():
    rows = [("tiny", "a", 10, 8.0), ("tiny", "b", 20, 4.0), ("wide", "b", 30, 1.0),
            ("wide", "c", 40, 0.9)]  # fmt: skip
    top = pd.DataFrame(rows, columns=["model", "clip", "frame", "value"])
    top = top.assign(kind="usae", feature=3, rank=[1, 2, 1, 2])
    features = [("usae", model, 3) for model in MODELS]
    # a: 1 + 0; b: .5 + 1; c: 0 + .9
    assert moments.best_clips(top, features, 2) == [("b", "wide", 30), ("a", "tiny", 10)]
