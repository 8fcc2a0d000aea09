"""Planted pairs come back exactly, nulls match nothing, sums per group equal the frames."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from musicscope.core.stats import Estimate
from musicscope.dictionaries.codes import Codes, encode_clips, to_csr
from musicscope.features import matching
from musicscope.features.matching import Match
from tests.support.planted import BOTH, OWN, WIDTH, plant


def sparse(rng, n: int, F: int, rate: float = 0.2) -> np.ndarray:
    return (rng.random((n, F)) < rate) * rng.uniform(0.5, 2.0, (n, F))


def codes(dense: np.ndarray, clips: int) -> Codes:
    return Codes(csr_array(dense.astype(np.float32)), np.full(clips, len(dense) // clips))


def streams(seed: int = 0, shared: int = 20, own: int = 7, clips: int = 24, T: int = 50):
    """Codes of two models by set, the permutation of the shared latents, and groups."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(shared + own)  # latent f of the first is latent order[f] of the second
    first, second = {}, {}
    for name in ("validation", "test"):
        a = sparse(rng, clips * T, shared + own)
        b = np.zeros_like(a)
        b[:, order] = np.where(
            np.arange(shared + own) < shared,
            3.0 * a * rng.uniform(0.7, 1.3, a.shape),
            sparse(rng, clips * T, shared + own),
        )
        first[name], second[name] = codes(a, clips), codes(b, clips)
    groups = {name: np.repeat([f"{name}{i}" for i in range(8)], clips // 8) for name in first}
    return first, second, order, groups


def test_csr_holds_what_is_active_and_nothing_else():
    values = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0], [3.0, 0.5, 0.0]])
    indices = torch.tensor([[4, 0, 1], [0, 1, 2], [0, 3, 0]])  # a zero may repeat an index
    matrix = to_csr(values, indices, 6)
    expected = np.zeros((3, 6))
    expected[0, 4], expected[0, 1], expected[2, 0], expected[2, 3] = 2, 1, 3, 0.5
    assert np.array_equal(matrix.toarray(), expected)
    assert matrix.nnz == 4
    assert matrix.has_sorted_indices


def test_encoding_keeps_the_order_of_clips_and_any_number_of_threads():
    planted = plant()
    store, sae = planted.stores[0], planted.saes[0][0]
    clips = [17, 2, 3, 40, 11, 5, 6, 7, 8, 30]
    one, two = (encode_clips(store, clips, sae.encode, WIDTH, n, "cpu") for n in (1, 2))
    dense = np.zeros((len(clips) * 30, WIDTH))
    x = torch.from_numpy(np.concatenate([store.clip(c) for c in clips]))
    values, indices = sae.encode(x)
    np.put_along_axis(dense, indices.numpy(), values.numpy(), 1)
    for found in (one, two):
        assert np.array_equal(found.matrix.toarray(), dense.astype(np.float32))
    assert np.allclose(one.mean, dense.mean(0))
    assert np.array_equal(one.fired, (dense > 0).sum(0))
    with pytest.raises(ValueError, match="no clips"):
        encode_clips(store, [], sae.encode, WIDTH, 1, "cpu")


def test_correlation_equals_numpys_on_dense_frames(monkeypatch):
    monkeypatch.setattr(matching, "CHUNK", 37)  # several chunks, the last one short
    rng = np.random.default_rng(0)
    a, b = sparse(rng, 400, 9), sparse(rng, 400, 5)
    b[:, 0] = a[:, 3] + 1000.0  # always on, far from 0
    a[:, 1] = 0.0  # never fires
    b[:, 2] = 0.7  # always the same
    a, b = a.astype(np.float32), b.astype(np.float32)
    found = matching.correlation(csr_array(a), csr_array(b))
    with np.errstate(invalid="ignore"):
        expected = np.corrcoef(a.T.astype(float), b.T.astype(float))[:9, 9:]
    assert np.allclose(found, np.nan_to_num(expected), atol=1e-5)
    assert not found[1].any()
    assert not found[:, 2].any()
    assert found[3, 0] == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(ValueError, match="not paired"):
        matching.correlation(csr_array(a), csr_array(b[:-1]))


def test_planted_pairs_are_recovered_and_the_null_matches_nothing():
    first, second, order, groups = streams()
    found = matching.match_activations(first, second, groups, 3, 200, seed=1)
    assert np.array_equal(found.partner[:20], order[:20])
    assert (found.score[:20] > 0.9).all()
    assert not (found.score[20:] > 0.2).any()
    shares = found.share(0.5)
    assert shares["null_matched"] == 0
    assert len(found.null) == 3
    assert max(draw.max() for draw in found.null) < 0.3
    # Far from the threshold, every resample counts the same pairs.
    n = len(set(groups["test"]))
    assert shares["matched"] == Estimate(20 / 27, 20 / 27, 20 / 27, n, "share").as_dict()
    assert found.share(0.5, 40)["matched"]["value"] == 0.5
    assert shares["musical"]["value"] == 20 / 27
    assert found.repaired.shape == (27,)
    assert np.nanmax(found.repaired) < 0.3
    partner, score, _ = found.inverse(27)
    assert np.array_equal(partner[order[:20]], np.arange(20))
    assert np.array_equal(score[order[:20]], found.score[:20])
    again = matching.match_activations(first, second, groups, 3, 200, seed=1)
    assert np.array_equal(again.resampled, found.resampled, equal_nan=True)
    assert all(map(np.array_equal, again.null, found.null))


def test_pairs_are_chosen_on_validation_alone():
    """Pairs of validation stay pairs, and score nothing, where test frames do not bear them out."""
    first, second, order, groups = streams()
    _, other, other_order, _ = streams(seed=5)
    swapped = {"validation": second["validation"], "test": other["test"]}
    found = matching.match_activations(first, swapped, groups, 0, 10, seed=1)
    assert np.array_equal(found.partner[:20], order[:20])
    assert found.share(0.5)["matched"]["value"] == 0
    assert not np.array_equal(order, other_order)


def test_silent_latents_get_no_partner():
    first, second, order, groups = streams()
    for codes_of in first.values():
        codes_of.matrix.data[codes_of.matrix.indices == 4] = 0
        codes_of.matrix.eliminate_zeros()
    found = matching.match_activations(first, second, groups, 0, 10, seed=1)
    assert found.partner[4] == -1
    assert np.isnan(found.score[4])
    assert found.share(0.5)["matched"]["value"] == 19 / 27


def test_other_frame_counts_are_an_error():
    first, second, _, groups = streams()
    second["test"] = Codes(second["test"].matrix[:-24], second["test"].frames - 1)
    with pytest.raises(ValueError, match="frame counts"):
        matching.match_activations(first, second, groups, 0, 10, seed=1)


def test_pair_correlations_equal_those_of_repeated_frames():
    """A resample's weight w is the same as writing the group's frames down w times."""
    rng = np.random.default_rng(2)
    a, b = (sparse(rng, 120, F).astype(np.float32) for F in (4, 6))
    b[:, 5] += a[:, 1]
    partner, member = np.array([2, 5, -1, 0]), np.repeat(np.arange(6), 20)
    weights = np.array([[1.0] * 6, [0, 2, 0, 3, 1, 0]])
    found = matching.pair_correlations(csr_array(a), csr_array(b), partner, member, weights)
    for w, row in zip(weights, found, strict=True):
        at = np.repeat(np.arange(120), w.astype(int)[member])
        for f in (0, 1, 3):
            expected = np.corrcoef(a[at, f].astype(float), b[at, partner[f]].astype(float))[0, 1]
            assert row[f] == pytest.approx(expected, abs=1e-6)
        assert np.isnan(row[2])


@pytest.mark.parametrize("seed", range(8))
def test_repaired_clips_meet_another_composition_each_once(seed):
    sizes = np.random.default_rng(seed).integers(1, 9, 7)
    groups = np.random.default_rng(seed).permutation(np.repeat(np.arange(7), sizes))
    if 2 * sizes.max() > len(groups):
        pytest.skip("one composition has over half of the clips")
    order = matching.repaired_clips(groups, seed)
    assert sorted(order) == list(range(len(groups)))
    assert (groups[order] != groups).all()
    assert np.array_equal(order, matching.repaired_clips(groups, seed))
    assert not np.array_equal(order, matching.repaired_clips(groups, seed + 100))


def test_one_composition_with_over_half_of_the_clips_is_an_error():
    with pytest.raises(ValueError, match="'x' has 3 of 5"):
        matching.repaired_clips(["x", "x", "y", "x", "z"], 0)


def test_repaired_frames_keep_their_place_in_the_clip():
    """Values say (clip, frame); clips of unequal length are cut to the shorter one."""
    frames = np.array([3, 2, 4])
    label = np.concatenate([100 * (c + 1) + np.arange(n) for c, n in enumerate(frames)])
    both = Codes(csr_array(label[:, None].astype(np.float32)), frames)
    a, b = matching._repaired(both, both, np.array([2, 0, 1]))
    assert a.toarray()[:, 0].tolist() == [100, 101, 102, 200, 201, 300, 301]
    assert b.toarray()[:, 0].tolist() == [300, 301, 302, 100, 101, 200, 201]


def test_a_permuted_decoder_is_recovered_and_random_ones_are_not():
    rng = np.random.default_rng(0)
    first = rng.standard_normal((300, 96)) + 0.3  # rows lean to one side, as real ones do
    order = rng.permutation(300)
    second = np.empty_like(first)
    second[order] = 7.0 * first + 0.5 * rng.standard_normal(first.shape)
    second[order[250:]] = 7.0 * rng.standard_normal((50, 96)) + 2.1
    second = np.concatenate([second, np.zeros((2, 96))])
    found = matching.match_decoders(first, second, 4, seed=0)
    assert np.array_equal(found.partner[:250], order[:250])
    expected = (first[0] @ second[order[0]]) / np.sqrt(
        (first[0] @ first[0]) * (second[order[0]] @ second[order[0]])
    )
    assert found.score[0] == pytest.approx(expected)
    shares = found.share(0.5)
    assert shares["matched"] == 250 / 300  # decoders do not depend on clips: no interval
    assert shares["null_matched"] < 0.02


def test_the_null_of_decoders_keeps_their_mean_and_covariance():
    """Rows in a narrow cone are all alike; so are random rows of the same statistics."""
    rng = np.random.default_rng(1)
    cone = 10.0 + rng.standard_normal((40, 16))
    shares = matching.match_decoders(cone, 10.0 + rng.standard_normal((40, 16)), 2, 0).share(0.5)
    assert shares["matched"] == shares["null_matched"] == 1


def test_raw_decoder_is_what_a_latent_adds_to_the_stream():
    usae = plant().usae
    found = matching.raw_decoder(usae, 1)
    assert np.allclose(found, 2.0 * usae.decoder(1).numpy(), atol=1e-6)


def match(partner: list[int], score: list[float], repaired: float = 0.0) -> Match:
    score = np.array(score)
    resampled = np.stack([score, score - 0.2])
    return Match(np.array(partner), score, [], np.full(len(score), repaired), [], resampled)


def test_shares_tell_music_from_the_place_in_the_clip():
    """Four latents: matched; matched whatever the clip; not matched; without a partner."""
    found = Match(
        partner=np.array([0, 1, 2, -1]),
        score=np.array([0.9, 0.8, 0.3, np.nan]),
        null=[np.array([0.7, 0.6, 0.1]), np.array([0.55, 0.1, 0.0])],
        repaired=np.array([0.1, 0.7, 0.1, np.nan]),
        null_repaired=[np.array([0.7, 0.2, 0.0]), np.array([0.6, 0.0, 0.0])],
        resampled=np.array([[0.9, 0.8, 0.6, np.nan]] * 5),
    )
    shares = found.share(0.5)
    assert [shares[k]["value"] for k in ("matched", "musical")] == [2 / 4, 1 / 4]
    assert (shares["null_matched"], shares["null_musical"]) == (1.5 / 4, 0.5 / 4)
    assert (shares["matched"]["low"], shares["musical"]["high"]) == (3 / 4, 2 / 4)


def test_sets_of_two_models():
    """Latents of a: common; own; alike but taken; not reproduced; silent; weak pair."""
    matches = {("a", "b"): match([2, -1, -1, -1, -1, 0], [0.9, *[np.nan] * 4, 0.4])}
    highest = {
        ("a", "b"): np.array([0.9, 0.1, 0.8, 0.1, 0.0, 0.4]),
        ("b", "a"): np.array([0.4, 0.7, 0.9]),
    }
    reproduced = {"a": np.array([1, 1, 1, 0, 1, 1], bool), "b": np.ones(3, bool)}
    active = {"a": np.array([1, 1, 1, 1, 0, 1], bool), "b": np.ones(3, bool)}
    sets = matching.name_sets(matches, highest, reproduced, active, 0.5)
    assert sets["a"].tolist() == ["common", "own", "unmatched", "unmatched", "silent", "own"]
    assert sets["b"].tolist() == ["own", "unmatched", "common"]
    clock = {("a", "b"): match([2, -1, -1, -1, -1, 0], [0.9, *[np.nan] * 4, 0.4], repaired=0.8)}
    sets = matching.name_sets(clock, highest, reproduced, active, 0.5)
    assert sets["a"].tolist() == ["positional", "own", "unmatched", "unmatched", "silent", "own"]
    assert sets["b"].tolist() == ["own", "unmatched", "positional"]
    returning = {"a": np.array([1, 0, 0, 0, 0, 1], bool), "b": np.array([1, 1, 0], bool)}
    sets = matching.name_sets(matches, highest, reproduced, active, 0.5, returning)
    assert sets["a"].tolist() == [
        "unstable", "unstable", "unmatched", "unmatched", "silent", "own",
    ]  # fmt: skip
    assert sets["b"].tolist() == ["own", "unmatched", "unstable"]


def test_common_of_three_models_needs_all_three_pairs():
    """a0-b1-c2 close the triangle; a1-b0 and a1-c0 do not meet (b0 is paired with c1)."""
    matches = {
        ("a", "b"): match([1, 0, 2], [0.9, 0.8, 0.1]),
        ("a", "c"): match([2, 0, -1], [0.9, 0.8, np.nan]),
        ("b", "c"): match([1, 2, -1], [0.1, 0.7, np.nan]),
    }
    models = ["a", "b", "c"]
    tuples = matching.common_tuples(matches, models)
    assert tuples.tolist() == [[0, 1, 2]]
    scores = matching.tuple_scores(matches, models, tuples)
    assert scores[:, 0] == pytest.approx([0.0, 0.7, 0.7, 0.5])  # re-paired, data, resamples
    low = {pair: np.full(3, 0.1) for x in models for pair in [(x, y) for y in models if y != x]}
    every = {m: np.ones(3, bool) for m in models}
    sets = matching.name_sets(matches, low, every, every, 0.5)
    assert sets["a"].tolist() == ["common", "partial", "own"]
    assert sets["b"].tolist() == ["partial", "common", "own"]
    assert sets["c"].tolist() == ["partial", "own", "common"]


def test_planted_models_have_the_sizes_that_the_tests_rely_on():
    planted = plant()
    assert planted.usae.n_latents == BOTH + 2 * OWN
    x = planted.stores[0].data[0]
    assert (x > 0).sum(1).max() <= planted.saes[0][0].k
