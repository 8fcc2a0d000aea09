"""Token search on YuE: gains against a one-hot Llama of transformers, searches, whole runs."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from musicscope.activations import extraction
from musicscope.config import MaximizeActivation
from musicscope.data.clips import ClipStore, write_clips
from musicscope.dictionaries.core import TopKSAE
from musicscope.features.selection import Latent
from musicscope.maximisation import moments as mx
from musicscope.maximisation import report
from musicscope.maximisation import run as mr
from musicscope.maximisation.search import (
    Codec,
    Objective,
    Target,
    activations,
    exact,
    gains,
    log_probs,
    measure_survival,
    search,
)
from musicscope.models.registry import load_model
from musicscope.models.yue.tokens import CODE_IDS, FIRST_CODE, XCODEC
from tests.conftest import build_tiny_musicgen
from tests.support.yue_export import build_tiny_yue

LAYER, NUMBER, T, PLANTED = "layers.1", 1, 10, 7
COST = {"steps": 10, "proposals": 8, "kept": 4}


def load(folder: Path):
    pytest.importorskip("sentencepiece")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*tokenizer.model has sha256")
        return load_model(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-yue"
    build_tiny_yue(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture(scope="module")
def double(folder):
    """The same in double precision, for differences. Llama's norms would go through float32."""
    loaded = load(folder)
    loaded.hf.double()

    def exact_norm(norm):
        def forward(x):
            return norm.weight * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()

        eps = norm.variance_epsilon
        return forward

    for module in loaded.hf.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = exact_norm(module)
    return loaded


def random_codes(count: int, seed: int, frames: int = T) -> torch.Tensor:
    return torch.randint(1024, (count, 2, frames), generator=torch.Generator().manual_seed(seed))


def direction(seed: int = 0) -> torch.Tensor:
    return torch.randn(16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- gradients


def one_hot_terms(model, weight: torch.Tensor, codes: torch.Tensor, window: int):
    """Activation, log p and their gradients [2, T, 1024], from transformers' own forward alone.

    Inputs and targets are rows of one matrix [2T, 1024], one-hot in the order v0 i0 v1 i1 ..., so
    that its gradient holds what a code does as an input and what it does to its own probability.
    """
    order = [codes[k, t] for t in range(codes.shape[1]) for k in range(2)]
    hot = F.one_hot(torch.stack(order), 1024).double().requires_grad_()
    table = model.hf.model.embed_tokens.weight.detach()
    inputs = torch.cat([table[XCODEC : XCODEC + 1], hot @ table[CODE_IDS]])
    out = model.hf(inputs_embeds=inputs[None], output_hidden_states=True)
    curve = out.hidden_states[NUMBER + 1][0, 2::2] @ weight
    windows = [curve[i : i + window].mean() for i in range(len(curve) - window + 1)]
    activation = torch.stack(windows).max()
    log_prob = (out.logits[0, :-1, CODE_IDS].log_softmax(-1) * hot).sum() / len(order)
    found = [activation.detach(), log_prob.detach()]
    for term in (activation, log_prob):
        (gradient,) = torch.autograd.grad(term, hot, retain_graph=True)
        by_place = gradient.view(-1, 2, 1024).transpose(0, 1)
        found.append(by_place - by_place.gather(-1, codes[..., None]))
    return found


@pytest.mark.parametrize("window", [1, 4, 99])
def test_gains_are_the_gradients_of_a_one_hot_llama(double, window):
    codes, weight = random_codes(1, 3)[0], direction()
    activation, log_prob, *expected = one_hot_terms(double, weight, codes, min(window, T))
    target = Target(double, LAYER, weight, 0.5, scale=2.0)
    objective = Objective((target,), window, naturalness=1.0)
    found = exact(objective, codes[None])
    assert float(found[0]) == pytest.approx(float(activation + 0.5) / 2, rel=1e-6)
    assert float(found[1]) == pytest.approx(float(log_prob), rel=1e-5)
    known = gains(objective, codes)
    torch.testing.assert_close(known.activation, expected[0] / 2, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(known.log_prob[0], expected[1], rtol=1e-5, atol=1e-9)
    for term in (known.activation, known.log_prob[0]):
        assert not term.gather(-1, codes[..., None]).any()
        assert term.abs().amax((1, 2)).min() > 1e-3  # either track counts


def test_gradient_equals_finite_differences_through_the_embeddings(double):
    codes, weight = random_codes(1, 4), direction(1)
    batch = double.with_captions(codes, [None])

    def terms(stream, logits):
        curve = double.at_frames(stream, T) @ weight
        return curve[:, 3:7].mean(), -F.cross_entropy(
            logits.flatten(0, 2), codes.flatten(), reduction="sum"
        )

    inputs, stream, logits = double.traced(batch, LAYER, logits=True)
    assert torch.equal(logits, double.forward(batch))
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


def test_substitution_gains_are_embedding_differences_at_the_right_place(double):
    codes = random_codes(1, 2)[0]
    gradient = torch.randn(1 + 2 * T, 16, generator=torch.Generator().manual_seed(1)).double()
    found = double.substitution_gains(codes, gradient)
    table = double.hf.model.embed_tokens.weight
    for k, t, v in [(0, 0, 5), (1, 3, 60), (1, 0, 0), (0, T - 1, 1023), (1, T - 1, 8)]:
        rise = table[FIRST_CODE + v] - table[FIRST_CODE + int(codes[k, t])]
        expected = float(gradient[1 + 2 * t + k] @ rise)
        assert float(found[k, t, v]) == pytest.approx(expected, abs=1e-9)


def test_gains_foretell_what_substitutions_do(double):
    objective = Objective((Target(double, LAYER, direction(), 0.0, 1.0),), 4, 1.0)
    codes = random_codes(1, 8)[0]
    known, base = gains(objective, codes), exact(objective, codes[None])
    generator = torch.Generator().manual_seed(4)
    places = torch.randint(codes.numel(), (300,), generator=generator)
    values = torch.randint(1024, (300,), generator=generator)
    changed = codes.flatten().repeat(300, 1).scatter_(1, places[:, None], values[:, None])
    now = exact(objective, changed.view(300, *codes.shape))
    for told, found, start in (
        (known.activation, now[0], base[0]), (known.log_prob[0], now[1], base[1])
    ):  # fmt: skip
        both = torch.stack([told.flatten(0, 1)[places, values], (found - start)[0]])
        moved = both.abs().sum(0) > 1e-9
        assert float(torch.corrcoef(both[:, moved])[0, 1]) > 0.4
    # The last instrumental code changes nothing but its own probability and its own frame: exact.
    changed = codes.repeat(1024, 1, 1)
    changed[:, 1, -1] = torch.arange(1024)
    difference = (exact(objective, changed)[1] - base[1])[0]
    torch.testing.assert_close(known.log_prob[0, 1, -1].float(), difference, atol=1e-6, rtol=1e-5)


def test_what_the_search_reads_is_capture_and_cross_entropy(model):
    codes = random_codes(18, 5)  # more than a batch
    batch = model.with_captions(codes, [None] * 18)
    weight = direction().float()
    objective = Objective((Target(model, LAYER, weight, 0.5, 2.0),), 4, 1.0)
    before = model.layer_calls
    found, streams = activations(objective, codes)
    assert model.layer_calls - before == NUMBER + 1
    captured = model.capture(batch, [LAYER])[LAYER]
    assert torch.equal(model.at_frames(streams[0], T), captured)
    curve = (captured @ weight + 0.5) / 2
    windows = torch.stack([curve[:, i : i + 4].mean(1) for i in range(T - 3)], 1)
    torch.testing.assert_close(found[0], windows.amax(1))
    natural = log_probs(objective, codes, streams)[0]
    torch.testing.assert_close(natural, -model.cross_entropy(batch).mean((1, 2)))
    part = model.with_captions(codes[:1], [None])
    before = model.layer_calls
    inputs, stream, logits = model.traced(part, LAYER, logits=False)
    assert logits is None
    assert model.layer_calls - before == NUMBER + 1
    assert inputs.is_leaf
    torch.testing.assert_close(stream, streams[0][:1])


# ---- search


def planted(model) -> Target:
    """A direction that answers to instrumental code `PLANTED`: the difference of class means."""
    codes = random_codes(64, 5)
    codes[:, 1][torch.rand(64, T, generator=torch.Generator().manual_seed(5)) < 0.2] = PLANTED
    x = model.capture(model.with_captions(codes, [None] * 64), [LAYER])[LAYER]
    has = codes[:, 1] == PLANTED
    weight = x[has].mean(0) - x[~has].mean(0)
    middle = float((x[~has] @ weight).mean())
    return Target(model, LAYER, weight, -middle, float((x[has] @ weight).mean()) - middle)


def test_search_raises_a_planted_feature(model):
    objective = Objective((planted(model),), window=T, naturalness=0.0)
    crowd = exact(objective, random_codes(200, 77))[0][0]
    start = random_codes(1, 9)[0]
    found = search(objective, start, seed=1, **COST)
    reached = float(exact(objective, found.codes[None])[0])
    assert reached == pytest.approx(found.objective[-1], rel=1e-4)
    assert list(found.objective) == sorted(found.objective)
    assert found.objective[0] == pytest.approx(float(exact(objective, start[None])[0]), rel=1e-4)
    assert reached > float(crowd.max()) + float(crowd.max() - crowd.median())
    assert not torch.equal(found.codes[0], start[0])  # the vocal track, too
    again = search(objective, start, seed=1, **COST)
    assert torch.equal(again.codes, found.codes)
    natural = replace(objective, naturalness=50.0)
    calm = search(natural, start, seed=1, **COST)
    assert list(calm.objective) == sorted(calm.objective)
    ends = [exact(natural, codes[None])[1] for codes in (calm.codes, start, found.codes)]
    assert ends[0] > max(ends[1:]) + 0.1


def test_a_search_by_ear_leaves_the_vocal_track_silent(model):
    target = Target(model, LAYER, direction().float(), 0.0, 1.0)
    objective = Objective((target,), window=4, naturalness=0.1)
    codes = random_codes(3, 12)
    codec = Codec(model, torch.ones(2), model.first_encoded)
    heard = codec.again(codes)
    assert torch.equal(heard[:, 0], model.silence(T).expand(3, T))
    # Only the instrumental track counts: what becomes of it beside silence.
    share = (codec.again(heard) == heard).float().mean((0, 2))
    assert 0.2 < share[1] < share[0] == 1
    loud = torch.stack([codes[:, 0], heard[:, 1]], 1)
    torch.testing.assert_close(measure_survival(codec, loud), share)
    assert measure_survival(codec, codes).tolist() == [1.0, pytest.approx(1 / (3 * T))]
    codec = replace(codec, survival=share)

    def sound(found: torch.Tensor) -> float:
        return float(objective.total(*exact(objective, codec.again(found[None]))))

    found = search(objective, codes[0], 1, codec, **COST)
    assert found.objective[0] == pytest.approx(sound(codes[0]), rel=1e-4)
    assert found.objective[-1] == pytest.approx(sound(found.codes), rel=1e-4)
    assert list(found.objective) == sorted(found.objective)
    assert found.objective[-1] > found.objective[0] + 0.1
    assert torch.equal(found.codes[0], model.silence(T))


def test_models_are_searched_where_they_share_tokens(model, tmp_path):
    build_tiny_musicgen(tmp_path / "tiny")
    musicgen = load_model(tmp_path / "tiny")
    one = mx.StudiedModel("yue", model, LAYER, None, None, 0, torch.zeros(16), 3)
    other = replace(one, name="musicgen", model=musicgen, mean=torch.zeros(48))
    assert mr.unsearchable((one,)) == ""
    assert mr.unsearchable((one, replace(one, name="icl"))) == ""
    reason = mr.unsearchable((one, other))
    assert reason.startswith("yue, musicgen have different codecs")


# ---- the whole


SECTION = MaximizeActivation(
    seconds=0.2, window_seconds=0.1, universal=1, specific=1, concepts=1, directions=1, shared=2,
    examples=1, naturalness=0.2, steps=2, proposals=4, kept=2, samples=3, random_clips=4,
    bootstrap=20,
)  # fmt: skip
LATENTS = (Latent("sae", (4,), "concept", "guitar"), Latent("direction", (0,), "direction"))


@pytest.fixture(scope="module")
def data(tmp_path_factory, model):
    """A store of 8 clips of 0.5 s, the model's activations of them and dictionary."""
    root = tmp_path_factory.mktemp("data")

    def clips():
        for i in range(8):
            rng = np.random.default_rng(i)
            row = {"id": f"c{i}", "group": f"g{i}", "kind": "clip", "font": "mixed"}
            row |= {"split": ("train", "test")[i % 2], "caption": "flute"}
            audio = np.cumsum(rng.standard_normal(8000)) * 0.02
            yield np.clip(audio, -1, 1).astype(np.float32), row

    (root / "clips").mkdir()
    write_clips(root / "clips", clips(), 16_000, 8000)
    store = ClipStore.open(root / "clips")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(root))
        todo = extraction.plan(
            model, store, {"top1": LAYER}, dtype="float16", shard_mb=1, batch_clips=4,
            captions=False, model_sha256="m", clips_sha256="c",
        )  # fmt: skip
        stores = extraction.extract(todo, lambda: (model, store), {"top1": root / "acts"})
        g = torch.Generator().manual_seed(0)
        W = F.normalize(torch.randn(32, 16, generator=g), dim=1)
        mean = torch.as_tensor(stores["top1"].mean, dtype=torch.float32)
        sae = TopKSAE(W, torch.zeros(32), W, mean, 6)
        yield mx.StudiedModel("yue", model, LAYER, sae, None, 0, mean, 3), stores["top1"], store


def test_from_features_to_files(data, tmp_path, monkeypatch):
    studied, acts, clips = data
    monkeypatch.chdir(tmp_path)
    variants = ("prior", "clip", "free", "heard")
    plan = mr.Plan(SECTION, LATENTS, ("yue",), variants, 50.0, seed=1)
    result = mr.run(plan, lambda: (studied,), [acts], clips, "c")
    report.write(result, "a/yue", clips)
    metrics = json.loads((tmp_path / "metrics/a/yue.json").read_text())
    assert "not_searched" not in metrics
    assert set(metrics["features"]["sae-00004"]["yue"]["searches"]) == set(variants)
    assert set(metrics["features"]["direction-00000"]["yue"]["searches"]) == {"prior", "heard"}
    # Samples follow the very probabilities that the search is held to.
    seed = mr.seed_for(1, "maximize", "samples", "yue")
    _, samples = studied.model.generate(
        [None] * 3, 0.2, seed, guidance_scale=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0
    )
    assert torch.equal(mr.control_tokens(plan, (studied,), clips, "c")["samples"], samples)
    silence = studied.model.silence(plan.frames).numpy()
    for number, found in enumerate(result.searches):
        assert list(found.objective) == sorted(found.objective)
        if found.variant == "heard":
            assert found.objective[-1] == found.objective[0] or (found.codes[0] == silence).all()
        medium = result.again if found.variant == "heard" else result.optimised
        tokens = torch.from_numpy(found.codes)[None]
        if found.variant == "heard":
            tokens = Codec(studied.model, torch.ones(2)).again(tokens)
        batch = studied.model.with_captions(tokens, [None])
        x = studied.model.capture(batch, [LAYER])[LAYER]
        column = result.plan.latents.index(found.latent)
        curve = mx.frame_values(studied, result.plan.latents, 0, x[0])[:, column]
        windows = [float(curve[i : i + 5].mean()) for i in range(6)]
        assert medium[0].values[number, column] == pytest.approx(max(windows), abs=1e-4)
        entropy = float(studied.model.cross_entropy(batch).mean())
        assert medium[0].log_prob[number] == pytest.approx(-entropy, rel=1e-5)
    index = json.loads((tmp_path / "data/a/yue/index.json").read_text())
    (feature,) = index["features"]
    assert {entry["variant"] for entry in feature["maximised"]} == set(variants)
    for entry in (*feature["maximised"], *feature["moments"]):
        audio, rate = soundfile.read(tmp_path / "data/a/yue" / entry["file"])
        assert (rate, len(audio)) == (16_000, 3200)
        assert len(entry["curves"]["yue"]) == 10
