"""Token search: gradients against differences, a planted feature found, and what is reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
import yaml
from torch.nn import functional as F

from musicscope.activations import extraction
from musicscope.config import MaximizeActivation, ParamsError, load_params
from musicscope.data.clips import ClipStore, write_clips
from musicscope.dictionaries.core import ModelWeights, TopKSAE, UniversalSAE
from musicscope.features.selection import Latent, choose, mismatched, read_features, universal
from musicscope.maximisation import moments as mx
from musicscope.maximisation import report
from musicscope.maximisation import run as mr
from musicscope.maximisation.search import (
    Codec,
    Objective,
    Target,
    activations,
    best_start,
    gains,
    log_probs,
    measure_survival,
    propose,
    search,
    window_means,
)
from musicscope.models.interface import Batch
from musicscope.models.registry import load_model
from musicscope.report import figures
from tests.conftest import ROOT, build_tiny_musicgen

LAYER, T, PLANTED = "layers.1", 16, 7
COST = {"steps": 12, "proposals": 8, "kept": 4}


@pytest.fixture(scope="module")
def model(tiny_musicgen: Path):
    return load_model(tiny_musicgen)


@pytest.fixture(scope="module")
def other(tmp_path_factory, model):
    """A second decoder with the first one's codec."""
    folder = tmp_path_factory.mktemp("other") / "tiny"
    build_tiny_musicgen(folder, seed=1)
    second = load_model(folder)
    second.hf.audio_encoder.load_state_dict(model.hf.audio_encoder.state_dict())
    return second


def random_codes(model, count: int, seed: int, frames: int = T) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.card, (count, model.num_codebooks, frames), generator=generator)


def planted(model, seed: int = 5) -> Target:
    """A direction that answers to code `PLANTED` in codebook 0: the difference of class means."""
    codes = random_codes(model, 64, seed)
    codes[:, 0][torch.rand(64, T, generator=torch.Generator().manual_seed(seed)) < 0.2] = PLANTED
    x = model.capture(model.with_captions(codes, [None] * 64), [LAYER])[LAYER]
    has = codes[:, 0] == PLANTED
    weight = x[has].mean(0) - x[~has].mean(0)
    middle = float((x[~has] @ weight).mean())
    return Target(model, LAYER, weight, -middle, float((x[has] @ weight).mean()) - middle)


def exact(objective: Objective, codes: torch.Tensor):
    found, streams = activations(objective, codes)
    return found, log_probs(objective, codes, streams)


# ---- gradients


def test_gradient_equals_finite_differences_through_the_embeddings(tiny_musicgen):
    double = load_model(tiny_musicgen)
    double.hf.double()
    codes = random_codes(double, 1, 3)
    batch = double.with_captions(codes, [None])
    batch = replace(batch, text=batch.text.double())
    weight = torch.randn(48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def terms(stream, logits):
        value = window_means(stream[:, 1 : T + 1] @ weight, 5).amax()
        return value, -F.cross_entropy(logits.flatten(0, 2), codes.flatten(), reduction="sum")

    inputs, stream, logits = double.traced(batch, LAYER, logits=True)
    assert torch.equal(logits, double.forward(batch))
    captured = double.capture(batch, [LAYER])[LAYER]
    assert torch.equal(stream[:, 1 : T + 1], captured)
    gradients = [
        torch.autograd.grad(value, inputs, retain_graph=True)[0] for value in terms(stream, logits)
    ]

    def at(hidden):
        kept = []
        hooks = {LAYER: lambda stream, _: kept.append(stream) or stream}
        logits = double.forward_from(batch, 0, hidden, hooks)
        return terms(kept[0], logits)

    for seed in range(3):
        step = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(seed)).double()
        step = 1e-5 * step / step.norm()
        ends = zip(at(inputs.detach() + step), at(inputs.detach() - step), strict=True)
        for gradient, (high, low) in zip(gradients, ends, strict=True):
            assert float(high - low) / 2 == pytest.approx(float((gradient * step).sum()), rel=1e-4)


def test_without_logits_no_layer_behind_the_hook_runs(model):
    batch = model.with_captions(random_codes(model, 1, 3), [None])
    before = model.layer_calls
    assert model.traced(batch, LAYER, logits=False)[2] is None
    assert model.layer_calls - before == 2


def test_substitution_gains_are_embedding_differences_at_the_right_place(model):
    codes = random_codes(model, 1, 2)[0]
    books = model.num_codebooks
    gradient = torch.randn(T + books - 1, 48, generator=torch.Generator().manual_seed(1))
    found = model.substitution_gains(codes, gradient)
    before = model.decoder.embed(model.sequence(model.with_captions(codes[None], [None])))[0]
    for k, t, v in [(0, 0, 5), (1, 3, 60), (3, 9, 0), (2, T - 1, 33), (3, T - 1, 8)]:
        changed = codes.clone()
        changed[k, t] = v
        after = model.decoder.embed(model.sequence(model.with_captions(changed[None], [None])))[0]
        expected = float(((after - before) * gradient).sum())
        assert float(found[k, t, v]) == pytest.approx(expected, abs=1e-4)
    assert not found[3, T - 1].any()  # never fed
    assert not found.gather(-1, codes[..., None]).any()


def test_gains_foretell_what_substitutions_do(model):
    objective = Objective((planted(model),), window=4, naturalness=1.0)
    codes = random_codes(model, 1, 8)[0]
    known = gains(objective, codes)
    base = exact(objective, codes[None])
    generator = torch.Generator().manual_seed(4)
    places = torch.randint(codes.numel(), (300,), generator=generator)
    values = torch.randint(model.card, (300,), generator=generator)
    changed = codes.flatten().repeat(300, 1).scatter_(1, places[:, None], values[:, None])
    now = exact(objective, changed.view(300, *codes.shape))
    for told, found, start, least in (
        (known.activation, now[0], base[0], 0.7),
        (known.log_prob[0], now[1], base[1], 0.5),
    ):
        foretold = told.flatten(0, 1)[places, values]
        both = torch.stack([foretold, (found - start)[0]])
        moved = both.abs().sum(0) > 1e-9
        assert float(torch.corrcoef(both[:, moved])[0, 1]) > least
    # The last code of the last codebook changes nothing but its own probability: exact.
    changed = codes.repeat(model.card, 1, 1)
    changed[:, -1, -1] = torch.arange(model.card)
    difference = (exact(objective, changed)[1] - base[1])[0]
    torch.testing.assert_close(known.log_prob[0, -1, -1], difference, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(known.total(1.0), known.activation + known.log_prob[0])


# ---- search


def test_window_means_are_those_of_every_window():
    values = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([values[:, i : i + 4].mean(1) for i in range(6)], 1)
    torch.testing.assert_close(window_means(values, 4), expected)
    torch.testing.assert_close(window_means(values, 50), values.mean(1, keepdim=True))
    assert torch.equal(window_means(values, 1), values)


def test_proposals_change_what_was_asked_for_and_begin_with_the_best():
    generator = torch.Generator().manual_seed(0)
    total = torch.randn(4, T, 64, generator=generator)
    codes = torch.randint(64, (4, T), generator=generator)
    total.scatter_(-1, codes[..., None], 99.0)  # to stay is no substitution, however good
    found = propose(total, codes, [3, 8, 8, 64], generator)
    changed = found != codes
    assert changed.flatten(1).sum(1).tolist() == [3, 8, 8, 64]
    gain = total.scatter(-1, codes[..., None], -torch.inf).amax(-1).flatten()
    assert set(changed[0].flatten().nonzero()[:, 0].tolist()) == set(gain.topk(3).indices.tolist())
    assert not torch.equal(found[1], found[2])  # noise
    losing = propose(-total.abs() - 1, codes, [64, 64], generator)
    assert (losing != codes).flatten(1).sum(1).tolist() == [1, 1]


def test_search_finds_the_planted_code(model):
    objective = Objective((planted(model),), window=T, naturalness=0.0)
    crowd = exact(objective, random_codes(model, 200, 77))[0][0]
    start = random_codes(model, 1, 9)[0]
    found = search(objective, start, seed=1, **COST)
    reached = float(exact(objective, found.codes[None])[0])
    assert reached == pytest.approx(found.objective[-1], rel=1e-5)
    assert list(found.objective) == sorted(found.objective)
    assert found.objective[0] == pytest.approx(float(exact(objective, start[None])[0]), rel=1e-5)
    spread = float(crowd.max() - crowd.median())
    assert reached > float(crowd.max()) + 2 * spread
    assert (found.codes[0] == PLANTED).float().mean() > 0.5 > (start[0] == PLANTED).float().mean()
    best = best_start(objective, random_codes(model, 200, 77))
    assert float(exact(objective, best[None])[0]) == pytest.approx(float(crowd.max()))


def test_the_weight_buys_naturalness_with_activation(model):
    target, start = planted(model), random_codes(model, 1, 10)[0]
    found = []
    for weight in (0.0, 1.0, 100.0):
        objective = Objective((target,), window=T, naturalness=weight)
        codes = search(objective, start, seed=1, **COST).codes
        found.append([float(v) for v in exact(objective, codes[None])])
    (free, wild), (between, calmer), (tame, calm) = found
    assert free > between > tame
    assert wild + 0.1 < calmer < calm
    assert calm > float(exact(objective, start[None])[1]) + 0.1  # the prior alone is climbed, too


def test_more_probable_than_usual_earns_nothing(model):
    target = replace(planted(model), usual=-5.0)
    objective = Objective((target,), window=T, naturalness=2.0)
    activation = torch.tensor([[1.0, 1.0, 1.0]])
    total = objective.total(activation, torch.tensor([[-6.0, -5.0, -3.0]]))
    assert total.tolist() == [-11.0, -9.0, -9.0]


def test_a_free_search_runs_the_lower_layers_alone(model):
    objective = Objective((planted(model),), window=4, naturalness=0.0)
    before = model.layer_calls
    found = search(objective, random_codes(model, 1, 9)[0], seed=0, **COST | {"steps": 3})
    # Two layers for the start, and in each step for the gradient and for the proposals.
    assert model.layer_calls - before == 2 * (1 + 2 * (len(found.objective) - 1))


def test_same_seed_same_codes(model):
    objective = Objective((planted(model),), window=4, naturalness=0.3)
    start = random_codes(model, 1, 9)[0]
    cost = COST | {"steps": 4}
    first, second, third = (search(objective, start, seed=s, **cost) for s in (1, 1, 2))
    assert torch.equal(first.codes, second.codes)
    assert first.objective == second.objective
    assert not torch.equal(first.codes, third.codes)


def test_coordinated_search_raises_both_models(model, other):
    targets = (planted(model), planted(other, seed=6))
    both = Objective(targets, window=T, naturalness=0.2)
    start = random_codes(model, 1, 11)[0]
    codes = search(both, start, seed=1, **COST).codes
    before, after = exact(both, start[None]), exact(both, codes[None])
    assert (after[0] > before[0] + 0.1).all()
    summed = after[0].mean() + 0.2 * after[1].mean()
    assert float(both.total(*after)) == pytest.approx(float(summed), rel=1e-5)
    alone = [search(replace(both, targets=(t,)), start, seed=1, **COST).codes for t in targets]
    crossed = torch.stack([exact(both, c[None])[0][:, 0] for c in alone])
    assert (after[0].min() > crossed.min(1).values - 0.05).all()  # no model is left behind


class CoarseCodec:
    """A codec whose sound holds the first two codebooks alone."""

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.flatten(1).float()

    def encode(self, audio: torch.Tensor, captions: list[None]) -> Batch:
        codes = audio.long().view(len(captions), 4, -1).clone()
        codes[:, 2:] = 0
        return Batch(codes, codes, codes, tuple(captions))


def test_a_search_by_ear_is_judged_by_the_tokens_of_its_sound(model):
    objective = Objective((planted(model),), window=T, naturalness=0.0)
    codes = random_codes(model, 6, 12)
    once = codes.clone()
    once[:, 2:] = 0
    codec = Codec(CoarseCodec(), torch.empty(0))
    codec = replace(codec, survival=measure_survival(codec, codes))
    assert torch.equal(codec.again(codes), once)
    assert codec.survival.tolist()[:2] == [1.0, 1.0]
    zeros = [float((codes[:, k] == 0).float().mean()) for k in (2, 3)]
    assert codec.survival.tolist()[2:] == pytest.approx(zeros)

    def sound(found: torch.Tensor) -> float:
        return float(exact(objective, codec.again(found[None]))[0])

    found = search(objective, codes[0], 1, replace(codec, survival=codec.survival.round()), **COST)
    assert found.objective[0] == pytest.approx(sound(codes[0]), rel=1e-4)
    assert found.objective[-1] == pytest.approx(sound(found.codes), rel=1e-4)
    assert list(found.objective) == sorted(found.objective)
    assert found.objective[-1] > found.objective[0] + 0.5
    # What cannot be heard is left as the sound has it, but for what noise proposes.
    assert int((found.codes[2:] != 0).sum()) <= 2
    plain = search(objective, once[0], 1, **COST)
    assert int((plain.codes[2:] != 0).sum()) >= 16


def test_an_objective_without_scale_is_refused(model):
    with pytest.raises(ValueError, match="scale > 0"):
        Objective((replace(planted(model), scale=0.0),), 4, 0.1)


# ---- values, moments, choice


def make_usae(models, seed: int = 0, F_: int = 24) -> UniversalSAE:
    g = torch.Generator().manual_seed(seed)
    sides = []
    for m in models:
        x = m.capture(m.with_captions(random_codes(m, 4, 1), [None] * 4), [LAYER])[LAYER]
        x = x.flatten(0, 1)
        W = F.normalize(torch.randn(F_, 48, generator=g), dim=1)
        zeros = torch.zeros(48)
        sides.append(ModelWeights(W, torch.zeros(F_), W, zeros, x.mean(0), x.std()))
    return UniversalSAE(tuple(f"m{i}" for i in range(len(models))), "top1", "usae", 6, tuple(sides))


def make_sae(model, seed: int = 0) -> TopKSAE:
    g = torch.Generator().manual_seed(seed)
    W = F.normalize(torch.randn(32, 48, generator=g), dim=1)
    x = model.capture(model.with_captions(random_codes(model, 4, 1), [None] * 4), [LAYER])[LAYER]
    return TopKSAE(W, 0.1 * torch.randn(32, generator=g), W, x.flatten(0, 1).mean(0), 6)


@pytest.fixture(scope="module")
def studied(model, other):
    usae = make_usae((model, other))
    return tuple(
        mx.StudiedModel(f"m{i}", m, LAYER, make_sae(m, i), usae, i, usae.weights[i].mean, 3)
        for i, m in enumerate((model, other))
    )


LATENTS = (
    Latent("sae", (4,), "concept", "guitar"),
    Latent("usae", (2,), "universal"),
    Latent("sae", (9,), "concept"),
    Latent("direction", (0,), "direction"),
)


def test_values_are_the_sparse_codes_and_pre_activations_where_active(studied):
    one = studied[0]
    x = one.mean + torch.randn(50, 48, generator=torch.Generator().manual_seed(0))
    found = mx.frame_values(one, LATENTS, 0, x)
    for column, latent in enumerate(LATENTS):
        weight, bias = mx.pre_activation(one, latent, 0)
        z = x @ weight + bias
        if latent.kind == "direction":
            assert float(weight.norm()) == pytest.approx(1.0, abs=1e-5)
            assert z.mean().abs() < 3  # from the mean
            torch.testing.assert_close(found[:, column], z.relu(), atol=1e-4, rtol=1e-4)
            continue
        dictionary = one.sae if latent.kind == "sae" else one.usae
        codes = dictionary.encode(x) if latent.kind == "sae" else dictionary.encode(x, 0)
        dense = torch.zeros(50, 32).scatter_add_(1, codes[1], codes[0])[:, latent.features[0]]
        assert torch.equal(found[:, column], dense)
        active = dense > 0
        assert 0 < active.sum() < 50
        torch.testing.assert_close(dense[active], z[active], atol=1e-3, rtol=1e-3)


def test_measure_is_capture_and_cross_entropy(studied):
    one = studied[0]
    codes = random_codes(one.model, 18, 21)  # more than a batch
    found = mx.measure(one, LATENTS, 0, codes, 4)
    batch = one.model.with_captions(codes, [None] * 18)
    x = one.model.capture(batch, [LAYER])[LAYER]
    values = mx.frame_values(one, LATENTS, 0, x.flatten(0, 1)).view(18, T, 4).numpy()
    np.testing.assert_allclose(found.curves, values, atol=1e-4)
    np.testing.assert_allclose(
        found.log_prob, -one.model.cross_entropy(batch).mean((1, 2)), rtol=1e-5
    )
    windows = np.stack([values[:, i : i + 4].mean(1) for i in range(T - 3)], 1)
    np.testing.assert_allclose(found.values, windows.max(1), atol=1e-4)


def test_models_without_common_tokens_are_not_searched(studied, tmp_path):
    assert mr.unsearchable(studied) == ""
    build_tiny_musicgen(tmp_path / "tiny", seed=2)
    foreign = replace(studied[1], model=load_model(tmp_path / "tiny"))
    reason = mr.unsearchable((studied[0], foreign))
    assert reason.startswith("m0, m1 have different codecs")
    assert mr.unsearchable((foreign,)) == ""
    other = mr.unsearchable((replace(foreign, model=object()),))
    assert other.startswith("m1 is a object: token search needs")


@pytest.mark.parametrize(("frame", "expected"), [(0, 0), (40, 35), (3, 0), (96, 80), (50, 45)])
def test_an_excerpt_has_its_moment_in_the_middle_or_ends_with_the_clip(frame, expected):
    assert mx.excerpt_start(frame, window=10, length=20, total=100) == expected


def feature_rows() -> pd.DataFrame:
    """Five USAE features through two models and three SAE features of each."""
    rows = []
    shape = {  # feature: entropy, rates, energies, cofire proportion
        0: (0.99, (0.1, 0.1), (5.0, 5.0), 0.9),
        1: (1.0, (0.1, 0.1), (0.1, 0.1), 0.9),  # as universal, but weak
        2: (0.05, (0.2, 0.001), (4.0, 0.1), 0.01),
        3: (0.05, (0.001, 0.2), (0.1, 4.0), 0.01),
        4: (np.nan, (0.0, 0.0), (0.0, 0.0), np.nan),  # dead
    }
    for feature, (entropy, rates, energies, cofires) in shape.items():
        for i, model in enumerate(("m0", "m1")):
            rows.append(("usae", model, feature, energies[i], rates[i], entropy, cofires,
                         "flute" if feature == 0 else "", 0.7, 0.01))  # fmt: skip
    for model in ("m0", "m1"):
        rows += [("sae", model, 7, 1.0, 0.1, np.nan, np.nan, "guitar", 0.8, 0.001),
                 ("sae", model, 8, 1.0, 0.1, np.nan, np.nan, "guitar", 0.9, 0.001),
                 ("sae", model, 9, 1.0, 0.1, np.nan, np.nan, "piano", 0.95, 0.4),
                 ("sae", model, 10, 1.0, 0.1, np.nan, np.nan, "drums", 0.7, 0.01)]  # fmt: skip
    columns = ["kind", "model", "feature", "energy", "firing_rate", "firing_entropy",
               "cofire_proportion", "concept", "concept_auroc", "concept_p"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns).assign(fires=1)


def test_features_are_chosen_by_what_they_are(tmp_path):
    path = tmp_path / "features.parquet"
    feature_rows().to_parquet(path)
    table = read_features(path)
    chosen = choose(table, ("m0", "m1"), "m1", (1, 1, 5))
    assert [(c.name, c.role, c.concept) for c in chosen] == [
        ("usae-00000", "universal", "flute"),
        ("usae-00003", "specific", None),
        ("sae-00008", "concept", "guitar"),  # the better of two; piano is not significant
        ("sae-00010", "concept", "drums"),
    ]
    assert choose(table, ("m0", "m1"), "m0", (0, 1, 0))[0].features == (2,)
    everywhere = universal(table, ("m0", "m1"), 9, 2)
    assert [c.features for c in everywhere][:2] == [(0, 0), (1, 1)]
    assert (4, 4) not in [c.features for c in everywhere]
    assert [c.features for c in mismatched(everywhere[:3], 2)][:2] == [
        (0, 1),
        (1, 2 if everywhere[2].features[0] == 2 else 3),
    ]
    assert mismatched(everywhere, 1) == []
    feature_rows().drop(columns="cofire_proportion").to_parquet(path)
    with pytest.raises(ValueError, match=r"features.parquet lacks .*cofire_proportion"):
        read_features(path)
    with pytest.raises(FileNotFoundError, match="match_features"):
        read_features(tmp_path / "absent.parquet")


# ---- the whole


SECTION = MaximizeActivation(
    seconds=0.3, window_seconds=0.1, universal=1, specific=1, concepts=1, directions=1, shared=2,
    examples=2, naturalness=0.2, steps=3, proposals=4, kept=2, samples=3, random_clips=4,
    bootstrap=20,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory, studied):
    """A clip store of 12 clips in 8 compositions and both models' activations."""
    root = tmp_path_factory.mktemp("data")

    def clips():
        for i in range(12):
            rng = np.random.default_rng(i)
            row = {"id": f"c{i:02d}", "group": f"g{i // 2}" if i < 8 else f"g{i}", "kind": "clip"}
            row |= {"split": ("train", "test")[i // 2 % 2], "font": "mixed", "caption": "flute"}
            audio = np.cumsum(rng.standard_normal(3200)) * 0.02
            yield np.clip(audio, -1, 1).astype(np.float32), row

    (root / "clips").mkdir()
    write_clips(root / "clips", clips(), 3200, 3200)
    store = ClipStore.open(root / "clips")
    stores = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(root))
        for i in studied:
            todo = extraction.plan(
                i.model, store, {"top1": LAYER}, dtype="float16", shard_mb=1, batch_clips=4,
                captions=False, model_sha256=i.name, clips_sha256="c",
            )  # fmt: skip
            folders = {"top1": root / i.name}
            stores += extraction.extract(todo, lambda i=i: (i.model, store), folders).values()
        yield store, stores


def test_moments_are_the_best_windows_of_different_compositions(studied, data):
    clips, stores = data
    both = (Latent("usae", (2, 2), "universal"),)
    rows = np.arange(12)
    curves = np.stack([
        mx.clip_values(i, store, both, place, rows)[..., 0]
        for place, (i, store) in enumerate(zip(studied, stores, strict=True))
    ])  # fmt: skip
    scores = np.stack([
        mx.clip_values(i, store, both, place, rows, 5)[:, 0]
        for place, (i, store) in enumerate(zip(studied, stores, strict=True))
    ])  # fmt: skip
    windows = np.stack([curves[..., t : t + 5].mean(-1) for t in range(46)], -1)
    np.testing.assert_allclose(scores, windows.max(-1), rtol=1e-5)
    scales = scores.max(1)
    moments = mx.best_moments(
        studied, stores, clips.rows, both[0], scores, scales, rows, 5, count=9
    )
    joint = (windows / scales[:, None, None]).mean(0)
    for split in mx.SPLITS:
        found = [m for m in moments if m.split == split]
        members = clips.rows.index[clips.rows["split"] == split]
        groups = clips.rows["group"][members].unique()
        assert len({clips.rows["group"][m.clip] for m in found}) == len(found) == len(groups)
        strength = [joint[m.clip, m.frame] for m in found]
        assert strength == sorted(strength, reverse=True)
        for m, s in zip(found, strength, strict=True):
            assert s == pytest.approx(joint[m.clip].max(), rel=1e-5)
            np.testing.assert_allclose(m.values, windows[:, m.clip, m.frame], rtol=1e-5)


def plan_of(latents, studied, variants=(), reason: str = "") -> mr.Plan:
    names = tuple(one.name for one in studied)
    return mr.Plan(SECTION, tuple(latents), names, variants, 50.0, seed=1, not_searched=reason)


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def outs(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_without_tokens_features_have_their_moments_and_say_so(studied, data, in_folder):
    clips, stores = data
    latents = [*LATENTS[:2], LATENTS[3]]  # the last one a random direction, the null
    plan = plan_of(latents, studied[:1], reason="no tokens")
    result = mr.run(plan, lambda: studied[:1], stores[:1], clips, "")
    report.write(result, "a/m0", clips)
    metrics = json.loads((in_folder / "metrics/a/m0.json").read_text())
    assert metrics["not_searched"] == "no tokens"
    head, entries = metrics["headline"], metrics["features"]
    assert (head["features"], head["not_searched"], head["skipped"]) == (2, 2, 0)
    test = clips.rows.index[clips.rows["split"] == "test"]
    for column, latent in enumerate(latents):
        found = entries[latent.name]["m0"]["controls"]
        values = mx.clip_values(studied[0], stores[0], latents, 0, np.arange(12), plan.window)
        scale = values[:, column].max()
        assert entries[latent.name]["m0"]["best_clip"] == pytest.approx(scale, rel=1e-5)
        middle = np.median(values[test, column]) / scale
        assert found["whole_clips_q50"] == pytest.approx(middle, rel=1e-4)
        assert max(found["best_train"], found["best_test"]) == pytest.approx(1)
    real = [entries[latent.name]["m0"]["controls"]["whole_clips_q95"] for latent in latents[:2]]
    assert head["whole_clips_q95"] == pytest.approx(np.mean(real), rel=1e-4)
    null = entries["direction-00000"]["m0"]["controls"]["whole_clips_q50"]
    assert head["null_whole_clips_q50"] == pytest.approx(null, rel=1e-4)
    index = json.loads((in_folder / "data/a/m0/index.json").read_text())
    assert [f["name"] for f in index["features"]] == [latent.name for latent in latents[:2]]
    for feature in index["features"]:
        assert feature["maximised"] == []
        assert len(feature["moments"]) == 4  # examples of either split
        for moment in feature["moments"]:
            audio, rate = soundfile.read(in_folder / "data/a/m0" / moment["file"])
            assert (len(audio), rate) == (round(plan.frames / 50 * 3200), 3200)
            assert len(moment["curves"]["m0"]) == plan.frames
            inside = moment["curves"]["m0"][moment["frame"] : moment["frame"] + plan.window]
            assert np.mean(inside) == pytest.approx(moment["values"]["m0"], rel=1e-3)
    table = pd.read_csv(in_folder / "plots/a/m0.csv")
    assert len(figures.maximisation(table, ["m0"], {}).axes) == 1


def test_one_model_from_features_to_files(studied, data, in_folder):
    clips, stores = data
    mine = studied[:1]
    latents = [*LATENTS[:2], LATENTS[3]]
    plan = plan_of(latents, mine, ("prior", "clip", "free", "heard"))
    assert (plan.frames, plan.window) == (15, 5)
    result = mr.run(plan, lambda: mine, stores[:1], clips, "c")
    report.write(result, "a/m0", clips)

    metrics = json.loads((in_folder / "metrics/a/m0.json").read_text())
    head = metrics["headline"]
    assert head["features"] == 2
    entry = metrics["features"]["sae-00004"]["m0"]
    assert entry["best_clip"] == pytest.approx(float(result.scale[0, 0]), rel=1e-5)
    assert max(entry["controls"]["best_train"], entry["controls"]["best_test"]) == 1
    assert set(entry["searches"]) == {"prior", "clip", "free", "heard"}
    assert set(metrics["features"]["direction-00000"]["m0"]["searches"]) == {"prior", "heard"}
    by_variant = {
        variant: [metrics["features"][x.name]["m0"]["searches"][variant] for x in latents]
        for variant in ("prior", "heard")
    }
    for variant, medium in (("prior", "tokens"), ("heard", "sound")):
        *real, null = (entry[medium] for entry in by_variant[variant])
        reached = head[f"{variant}_reached"]
        assert reached["value"] == pytest.approx(np.mean(real), rel=1e-4)
        assert reached["low"] <= reached["value"] <= reached["high"]
        assert reached["n"] == len(real)
        alone = head[f"{variant}_null_reached"]  # one null: no interval
        assert alone["value"] == pytest.approx(null, rel=1e-4)
        assert (alone["low"], alone["high"], alone["n"]) == (None, None, 1)
        assert head[f"{variant}_beats_best_clip"] == np.mean(np.array(real) > 1)

    # What the report says of a search is what the tokens, and those of the file, really do.
    number = next(i for i, s in enumerate(result.searches) if s.variant == "heard")
    codes = torch.from_numpy(result.searches[number].codes)[None]
    for tokens, medium in ((codes, "tokens"), (Codec(mine[0].model, codes).again(codes), "sound")):
        values = mx.measure(mine[0], latents[:1], 0, tokens, 5).values[0, 0]
        expected = by_variant["heard"][0][medium] * result.scale[0, 0]
        assert values == pytest.approx(expected, rel=1e-3, abs=1e-4)

    folder = in_folder / "data/a/m0"
    index = json.loads((folder / "index.json").read_text())
    assert [f["name"] for f in index["features"]] == [latent.name for latent in latents[:2]]
    first = index["features"][0]
    files = {a["file"] for f in index["features"] for a in f["maximised"] + f["moments"]}
    assert files == {path.name for path in folder.glob("*.wav")}
    for entry in first["maximised"] + first["moments"]:
        audio, rate = soundfile.read(folder / entry["file"])
        assert (rate, len(audio)) == (3200, 15 * 64)
        inside = np.mean(entry["curves"]["m0"][entry["frame"] : entry["frame"] + 5])
        value = entry["values"]["m0"] if "values" in entry else (
            entry["sound"]["m0"] * first["best_clip"]["m0"]
        )  # fmt: skip
        assert inside == pytest.approx(value, rel=1e-3, abs=1e-4)
    moment = first["moments"][0]
    row = clips.rows.index[clips.rows["id"] == moment["clip"]][0]
    at = round(moment["seconds"] * 3200)
    audio, _ = soundfile.read(folder / moment["file"])
    np.testing.assert_allclose(audio, clips.audio([row])[0][at : at + 960], atol=1e-4)
    table = pd.read_csv(in_folder / "plots/a/m0.csv")
    row = table[(table["feature"] == "sae-00004") & (table["series"] == "heard")]
    assert row["ratio"].item() == pytest.approx(by_variant["heard"][0]["sound"], rel=1e-4)


def test_a_second_run_writes_the_same_bytes(studied, data, in_folder):
    clips, stores = data
    mine = studied[:1]
    plan = plan_of(LATENTS[:2], mine, ("prior", "heard"))
    for name in ("a", "b"):
        result = mr.run(plan, lambda: mine, stores[:1], clips, "c")
        report.write(result, name, clips)
    first, second = (
        {k.replace(f"/{name}", "/", 1): v for k, v in outs(in_folder).items() if f"/{name}" in k}
        for name in ("a", "b")
    )
    assert len(first) > 8
    assert first == second


def test_several_models_at_once_report_transfer_and_nulls(studied, data, in_folder):
    clips, stores = data
    latents = [Latent("usae", (f, f), "universal") for f in (2, 5)]
    latents += mismatched(latents, 2)
    plan = plan_of(latents, studied, ("heard", "alone"))
    result = mr.run(plan, lambda: studied, stores, clips, "c")
    report.write(result, "shared", clips)
    metrics = json.loads((in_folder / "metrics/shared.json").read_text())
    searches = metrics["features"]["usae-00002"]["m1"]["searches"]
    assert set(searches) == {"heard", "alone-m0", "alone-m1"}
    head = metrics["headline"]
    crossed = [
        metrics["features"][f"usae-0000{f}"][m]["searches"][f"alone-{o}"]["sound"]
        for f in (2, 5)
        for m, o in (("m0", "m1"), ("m1", "m0"))
    ]
    assert head["transfer"]["value"] == pytest.approx(np.mean(crossed), rel=1e-4)
    nulls = [
        metrics["features"][name][m]["searches"]["heard"]["sound"]
        for name in ("usae-00002+00005", "usae-00005+00002")
        for m in ("m0", "m1")
    ]
    assert head["heard_null_reached"]["value"] == pytest.approx(np.mean(nulls), rel=1e-4)
    assert metrics["features"]["usae-00002+00005"]["m1"]["number"] == 5
    worst = [
        min(metrics["features"][f"usae-0000{f}"][m]["searches"]["heard"]["sound"]
            for m in ("m0", "m1"))
        for f in (2, 5)
    ]  # fmt: skip
    assert head["heard_reached_weakest_model"] == pytest.approx(np.mean(worst), rel=1e-4)


def test_excerpts_longer_than_clips_are_refused_in_the_params(tmp_path):
    whole = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    whole["maximize_activation"]["seconds"] = whole["prepare_data"]["seconds"] + 0.5
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(whole), encoding="utf-8")
    with pytest.raises(ParamsError, match=r"maximize_activation.seconds = 10.5 is out of range"):
        load_params(path)


def test_silent_features_are_counted_not_searched(studied, data):
    clips, stores = data
    dead = replace(studied[0].sae, b_enc=studied[0].sae.b_enc.clone())
    dead.b_enc[9] = -1e6
    mine = (replace(studied[0], sae=dead),)
    plan = plan_of(LATENTS[:3], mine, ("prior",))
    result = mr.run(plan, lambda: mine, stores[:1], clips, "c")
    assert result.skipped == (LATENTS[2],)
    assert report.metrics(result)["headline"]["skipped"] == 1
    alone = replace(plan, latents=LATENTS[2:3])
    with pytest.raises(ValueError, match="no real clip activates any of .*sae-00009"):
        mr.run(alone, lambda: mine, stores[:1], clips, "c")
    longer = replace(SECTION, seconds=1.4)
    with pytest.raises(ValueError, match=r"excerpts of 70 were asked for.*seconds"):
        mr.run(replace(plan, section=longer), lambda: mine, stores[:1], clips, "c")
