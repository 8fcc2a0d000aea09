"""Scores of dictionaries on known features, at both ends, and SAELens' own scores beside them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks import synthetic_features as bench
from musicscope.dictionaries.data import TRAIN, pair

N, D, SHIFT = 96, 24, 3.0


@pytest.fixture
def codes() -> Tensor:
    """Activations [2000, N] of features, each active in a twentieth of the samples but the last."""
    generator = torch.Generator().manual_seed(0)
    codes = 1 + torch.rand(2000, N, generator=generator)
    codes[:, -1] = 0
    return codes * (torch.rand(2000, N, generator=generator) < 0.05)


@pytest.fixture
def planted(codes: Tensor) -> bench.Planted:
    generator = torch.Generator().manual_seed(1)
    features = normalize(torch.randn(N, D, generator=generator), dim=1)
    return bench.Planted(features, codes @ features + SHIFT, codes)


def oracle(rows: Tensor, codes: Tensor) -> bench.Learnt:
    """A dictionary of `rows` that gives `codes`, whatever the input."""
    return bench.Learnt(rows, lambda x: codes, lambda z: z @ rows + SHIFT)


def test_the_true_dictionary_scores_1_in_any_order_sign_and_norm(planted, codes):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    found = bench.score(oracle(planted.features[order], codes[:, order]), planted)
    assert found["mcc"] == pytest.approx(1, abs=1e-6)
    assert found["r2"] == pytest.approx(1, abs=1e-6)
    assert found["unique"] == 1
    assert found["dead"] == pytest.approx(1 / N)  # the feature that never fires
    assert found["f1"] == pytest.approx(1 - 1 / N)
    assert found["l0"] == pytest.approx(float((codes > 0).sum(1).double().mean()))
    flipped = -3 * planted.features[order]
    assert bench.matched_similarity(flipped, planted.features) == pytest.approx(1, abs=1e-6)


def test_a_dictionary_of_one_feature_finds_one(planted, codes):
    same = planted.features[:1].expand(N, D)
    found = bench.score(oracle(same, codes[:, :1].expand(-1, N)), planted)
    assert found["unique"] == 1 / N
    assert found["f1"] == pytest.approx(1)  # every latent detects the one feature
    cosines = (planted.features @ planted.features[0]).abs()
    assert found["mcc"] == pytest.approx(float(cosines.mean()), abs=1e-6)


def test_random_rows_score_their_null(planted, codes):
    """Below .6 in 24 dimensions, though the best matching is taken; firing is at chance."""
    generator = torch.Generator().manual_seed(3)
    rows = normalize(torch.randn(N, D, generator=generator), dim=1)
    at_random = codes[torch.randperm(len(codes), generator=generator)]
    found = bench.score(oracle(rows, at_random), planted)
    assert 0.3 < found["mcc"] < 0.6
    assert found["unique"] < 0.8
    assert found["f1"] < 0.08
    assert found["r2"] < 0


def test_half_the_features_found_count_half(planted, codes):
    """Latents that are right fire rightly; the other half is dead."""
    rows, fires = planted.features.clone(), codes.clone()
    fires[:, N // 2 :] = 0
    found = bench.score(oracle(rows, fires), planted)
    assert found["dead"] == 0.5
    assert found["f1"] == pytest.approx(0.5)
    assert 0.3 < found["r2"] < 0.7


def test_scores_equal_those_of_saelens(tmp_path, monkeypatch):
    """On a small world, for the null, our trainer and SAELens' own."""
    pytest.importorskip("sae_lens")
    from sae_lens.synthetic.evals import eval_sae_on_synthetic_data

    for name, value in {"ROWS": 256, "CLIPS": 4, "STEPS": 8, "BATCH": 64, "TEST_ROWS": 512}.items():
        monkeypatch.setattr(bench, name, value)
    world = bench.World(features=128, width=16, roots=1, k=3)
    model = bench.synthetic_model(world)
    planted = bench.planted_activations(model, world)
    data = pair([bench.training_store(model, world, tmp_path)], TRAIN)
    again = bench.training_store(model, world, tmp_path)
    assert data.stores[0].manifest == again.manifest
    for name in ("null", "ours_topk", "saelens_batchtopk"):
        learnt = bench.RECIPES[name](data, world, 0)
        found = bench.score(learnt, planted)
        assert found["l0"] > 0
        sae = SimpleNamespace(
            W_dec=learnt.W_dec, encode=learnt.encode, decode=learnt.decode, eval=lambda: None
        )
        fixed = SimpleNamespace(sample=lambda n: planted.codes[:n])
        theirs = eval_sae_on_synthetic_data(sae, model.feature_dict, fixed, bench.TEST_ROWS)
        assert found == pytest.approx({
            "mcc": theirs.mcc, "f1": theirs.classification.f1_score, "l0": theirs.sae_l0,
            "r2": theirs.explained_variance, "unique": theirs.uniqueness,
            "dead": theirs.dead_latents / world.features,
        }, abs=1e-4)  # fmt: skip
