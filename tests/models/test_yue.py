"""YuE stage 1 against transformers' Llama and its generate(), and the promises of the interface."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from musicscope.ablation import language
from musicscope.activations.extraction import extract, plan
from musicscope.dictionaries.fidelity import replace_frames
from musicscope.models.interface import AudioModel, LanguageModel, chain, on_frames
from musicscope.models.registry import load_model
from musicscope.models.yue import tokens
from musicscope.models.yue.model import frame_labels
from tests.conftest import CAPTIONS
from tests.support.yue_export import build_tiny_yue, write_tokenizer

GOLDEN = [
    3251, 403, 4696, 515, 278, 2183, 26627, 1199, 10768, 491, 10768, 29889, 13, 29961, 15462, 276,
    29962, 11210, 13, 29961, 3901, 29962, 13, 13, 13, 518, 2962, 29918, 974, 29918, 28192, 29962,
    518, 3901, 29962, 13, 13, 13, 32001, 32016, 45334, 45339, 45335, 45340, 46357, 45341, 32002,
    518, 355, 29918, 974, 29918, 28192, 29962,
]  # fmt: skip
"""Genres "guitar", one empty verse, vocal codes 0 1 1023, instrumental 5 6 7; YuE's own."""
TRACKS = torch.tensor([[0, 1, 1023], [5, 6, 7]])
TEXTS = {
    "Generate music from the given lyrics segment by segment.\n[Genre] guitar\n[verse]\n\n\n": (
        GOLDEN[:25]
    ),
    "[verse]\n\n\n": GOLDEN[32:38],
    **{mark: list(ids) for mark, ids in tokens.MARKS.items()},
}
PROMPTS = ["guitar", None, "calm guitar music"]
NAMES = ["layers.0", "layers.1", "layers.2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-yue"
    build_tiny_yue(folder)
    return folder


def load(folder: Path, **options):
    pytest.importorskip("sentencepiece")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*tokenizer.model has sha256")
        return load_model(folder, **options)


@pytest.fixture(scope="module")
def model(folder: Path):
    return load(folder)


@pytest.fixture(scope="module")
def batch(model):
    audio = torch.randn(3, 3200, generator=torch.Generator().manual_seed(1))
    return model.encode(audio, PROMPTS)


# ---- ids and template


def test_golden_document():
    prompt = tokens.prompt_ids(TEXTS.__getitem__, " guitar\n")
    assert prompt == GOLDEN[:40]
    codes = tokens.interleave(TRACKS[None])[0].tolist()
    end = tokens.MARKS["[end_of_segment]"]
    assert [*prompt, *codes, tokens.EOA, *end] == GOLDEN


def test_golden_ids_come_from_a_real_sentencepiece_model(tmp_path):
    pytest.importorskip("sentencepiece")
    write_tokenizer(tmp_path / "tokenizer.model")
    with pytest.warns(UserWarning, match=r"sha256.*inference/mm_tokenizer"):
        tokenize = tokens.load_tokenizer(tmp_path / "tokenizer.model")
    for text, ids in TEXTS.items():
        assert list(tokenize(text)) == ids
    # Marks in a caption are text: nobody can end the audio by a caption.
    assert max(tokenize("<SOA><EOA><xcodec><EOD></s> é")) < tokens.TEXT_IDS
    write_tokenizer(tmp_path / "short.model", pieces=40_000)
    with pytest.raises(ValueError, match=r"short\.model.*40000 pieces for 83734"):
        tokens.load_tokenizer(tmp_path / "short.model")
    with pytest.raises(FileNotFoundError, match=r"absent\.model.*branch YuE-v1"):
        tokens.load_tokenizer(tmp_path / "absent.model")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.randoms(use_true_random=False))
def test_interleaving(clips, frames, random):
    codes = torch.tensor(
        [[[random.randrange(1024) for _ in range(frames)] for _ in "vi"] for _ in range(clips)]
    )
    ids = tokens.interleave(codes)
    for b in range(clips):
        for t in range(frames):
            assert ids[b, 2 * t] == 45334 + codes[b, 0, t]
            assert ids[b, 2 * t + 1] == 45334 + codes[b, 1, t]
    assert torch.equal(tokens.deinterleave(ids), codes)


def test_what_is_no_code_is_refused():
    for wrong in (torch.zeros(2, 3), torch.zeros(1, 8, 3), torch.zeros(1, 2, 0)):
        with pytest.raises(ValueError, match=r"\[clips, 2 .*stage 2"):
            tokens.interleave(wrong)
    for value in (-1, 1024):
        with pytest.raises(ValueError, match=r"0\.\.1023"):
            tokens.interleave(torch.full((1, 2, 1), value))
    for other in (45333, 46358, 32016):
        with pytest.raises(ValueError, match=rf"\[{other}\].*45334\.\.46357"):
            tokens.deinterleave(torch.tensor([[45334, other]]))
    with pytest.raises(ValueError, match="2T"):
        tokens.deinterleave(torch.tensor([[45334]]))


# ---- teacher forcing


def test_forward_is_transformers_own_and_aligned(model, batch):
    logits = model.forward(batch)
    assert logits.shape == (3, 2, 10, 1024)
    for b, caption in enumerate(PROMPTS):
        # One clip at a time and no padding: as anybody would run a Llama.
        prompt = [32016]
        if caption is not None:
            prompt = tokens.prompt_ids(model.tokenize, caption)
        ids = torch.tensor([*prompt, *tokens.interleave(batch.codes[b : b + 1])[0].tolist()])
        with torch.no_grad():
            out = model.hf(ids[None], output_hidden_states=True)
        for k in range(2):
            for t in range(10):
                place = len(prompt) + 2 * t + k
                assert ids[place] == 45334 + batch.codes[b, k, t]
                expected = out.logits[0, place - 1, 45334:46358]
                torch.testing.assert_close(logits[b, k, t], expected, atol=1e-5, rtol=1e-5)
        found = model.capture(batch, NAMES)
        for layer in (0, 1):
            frames = out.hidden_states[layer + 1][0, len(prompt) + 1 :: 2]
            torch.testing.assert_close(found[NAMES[layer]][b], frames, atol=1e-5, rtol=1e-5)


def test_frames_see_the_instrumental_code_of_their_time_and_no_later_one(model, batch):
    cut = 6
    for track in (0, 1):
        codes = batch.codes.clone()
        codes[:, track, cut:] = (codes[:, track, cut:] + 1) % 1024
        other = model.with_captions(codes, PROMPTS)
        a, b = model.capture(batch, NAMES), model.capture(other, NAMES)
        for name in NAMES:
            torch.testing.assert_close(a[name][:, :cut], b[name][:, :cut], atol=1e-6, rtol=0)
            assert (a[name][:, cut] - b[name][:, cut]).abs().amax(-1).min() > 1e-3
        x, y = model.forward(batch), model.forward(other)
        # The instrumental code of a frame is predicted from its vocal code, not the reverse.
        assert torch.allclose(x[:, 0, cut], y[:, 0, cut], atol=1e-5)
        assert torch.allclose(x[:, 1, cut], y[:, 1, cut], atol=1e-5) == (track == 1)


def test_cross_entropy_by_hand(model, batch):
    entropy = model.cross_entropy(batch)
    assert entropy.shape == (3, 2, 10)
    expected = F.cross_entropy(model.forward(batch)[2, 1], batch.codes[2, 1], reduction="none")
    torch.testing.assert_close(entropy[2, 1], expected)


def test_forward_from_any_layer_is_forward(model, batch):
    expected, inputs = model.forward(batch), model.layer_inputs(batch)
    assert len(inputs) == 4
    for layer, hidden in enumerate(inputs):
        before = model.layer_calls
        assert torch.equal(model.forward_from(batch, layer, hidden), expected)
        assert model.layer_calls - before == 3 - layer
    edit = {"layers.1": lambda x, _: x * 2}
    edited = model.forward(batch, edit)
    assert (edited - expected).abs().max() > 0.01
    assert torch.equal(model.forward_from(batch, 1, inputs[1], edit), edited)
    with pytest.raises(ValueError, match=r"layers\.0 cannot act"):
        model.forward_from(batch, 1, inputs[1], {"layers.0": lambda x, _: x})
    with pytest.raises(ValueError, match=r"layers 0\.\.2"):
        model.forward_from(batch, 4, inputs[3])
    before = model.layer_calls
    assert model.forward(batch, stop_after="layers.1") is None
    assert model.layer_calls - before == 2


def test_hooks_are_told_frames_so_tools_for_frames_act_on_them(model, batch):
    prompt = batch.text.shape[1]
    assert frame_labels(2, 5).tolist() == [0, 0, -1, 1, -2, 2, -3]
    seen = []
    plain = model.capture(batch, ["layers.0"], {"layers.0": lambda x, p: (seen.append(p), x)[1]})
    assert seen[0].tolist() == model.positions(batch).tolist()
    assert seen[0].tolist() == [0] * prompt + [s for t in range(1, 11) for s in (-t, t)]

    def stream_after(hook):
        inputs = model.layer_inputs(batch)[1]
        changed = []
        model.forward(
            batch,
            {"layers.0": lambda x, p: (changed.append(hook(x, p)), changed[-1])[1]},
            stop_after="layers.0",
        )
        return torch.nonzero((changed[0] != inputs).any(-1).any(0)).flatten().tolist()

    def double(x, _):
        return x * 2

    odd = [prompt + 2 * t + 1 for t in range(10)]
    assert stream_after(on_frames(double)) == odd
    assert stream_after(on_frames(double, 3, 5)) == odd[3:5]
    assert stream_after(replace_frames(lambda x: x * 2, 10)) == odd
    edited = model.capture(batch, ["layers.0"], {"layers.0": double})["layers.0"]
    assert torch.equal(edited, plain["layers.0"] * 2)
    with pytest.raises(ValueError, match=r"layers\.1 must return"):
        model.forward(batch, {"layers.1": lambda x, _: x[:, :1]})
    with pytest.raises(ValueError, match=r"no hook point 'layers\.9'"):
        model.forward(batch, {"layers.9": double})


# ---- generation


class Forbid:
    """A logits processor of transformers."""

    def __init__(self, start: int, stop: int) -> None:
        self.ids = slice(start, stop)

    def __call__(self, input_ids, scores):
        scores[:, self.ids] = -torch.inf
        return scores


def released_recipe(model, caption: str, frames: int, seed: int, **options):
    """Codes [1, 2, T] by transformers' generate() with the script's settings, and layer outputs."""
    prompt = torch.tensor([tokens.prompt_ids(model.tokenize, caption)])
    seen = [[] for _ in NAMES]
    handles = [
        layer.register_forward_hook(lambda m, i, output, into=into: into.append(output.clone()))
        for layer, into in zip(model.hf.model.layers, seen, strict=True)
    ]
    settings = {"do_sample": True, "top_p": 0.93, "temperature": 1.0, "guidance_scale": 1.5}
    torch.manual_seed(seed)
    try:
        out = model.hf.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=2 * frames,
            eos_token_id=tokens.EOA,
            pad_token_id=tokens.EOA,
            # The script's two ranges, the second of them empty, then all that is no code.
            logits_processor=[
                Forbid(0, 32_002), Forbid(32_016, 32_016),
                Forbid(32002, 45334), Forbid(46358, 83968),
            ],
            **settings | {"repetition_penalty": 1.1} | options,
        )  # fmt: skip
    finally:
        for handle in handles:
            handle.remove()
    return tokens.deinterleave(out[:, prompt.shape[1] :]), seen


@pytest.mark.parametrize(
    "options",
    [{}, {"guidance_scale": 1.0, "temperature": 0.7, "top_k": 10, "repetition_penalty": 1.5}],
)
def test_generate_gives_the_tokens_of_transformers(model, options):
    expected, _ = released_recipe(model, "guitar", 30, seed=7, **options)
    audio, codes = model.generate(["guitar"], seconds=0.6, seed=7, **options)
    assert torch.equal(codes, expected)
    assert codes.shape == (1, 2, 30)
    assert audio.shape == (1, 30 * 320)
    assert torch.equal(audio, model.decode(expected))
    _, plain = model.generate(["guitar"], 0.6, seed=7, **options | {"repetition_penalty": 1.0})
    assert not torch.equal(plain, expected)  # a penalty that does nothing would prove nothing


def test_teacher_forcing_is_what_transformers_generate_computes(model):
    codes, seen = released_recipe(model, "guitar", 15, seed=2)
    conditional = model.layer_inputs(model.with_captions(codes, ["guitar"]))
    unconditional = model.layer_inputs(model.with_captions(codes, [None]))
    prompt = len(GOLDEN[:40])
    for layer in range(3):
        # Guidance calls the model in turn, with the prompt and then with its last id alone.
        assert len(seen[layer]) == 2 * 30
        with_text = torch.cat(seen[layer][0::2], 1)
        without = torch.cat(seen[layer][1::2], 1)
        # The last code is not fed.
        assert with_text.shape[1] == prompt + 29
        worst = (with_text - conditional[layer + 1][:, :-1]).abs().max()
        assert max(worst, (without - unconditional[layer + 1][:, :-1]).abs().max()) < 1e-5


@pytest.mark.parametrize(("scale", "rows"), [(1.5, 6), (1.0, 3)])
def test_teacher_forcing_is_what_our_generation_computes_step_by_step(model, scale, rows):
    captions, frames = PROMPTS, 8
    halves, labels = {name: [] for name in NAMES}, []

    def recorder(name):
        def hook(activations, positions):
            assert len(activations) == rows
            halves[name].append(activations)
            if name == "layers.1":
                labels.extend(positions.tolist())
            return activations

        return hook

    _, codes = model.generate(
        captions, frames / 50, 0, {n: recorder(n) for n in NAMES}, guidance_scale=scale
    )
    batch = model.with_captions(codes, captions)
    assert labels == model.positions(batch).tolist()  # each position once, the last one too
    texts = [batch] if scale == 1 else [batch, model.with_captions(codes, [None] * 3)]
    for layer, name in enumerate(NAMES):
        found = torch.cat(halves[name], 1)
        for half, forced in enumerate(texts):
            ours = found[3 * half : 3 * half + 3, -2 * frames :]
            expected = model.layer_inputs(forced)[layer + 1][:, -2 * frames :]
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(
                ours[:, 1::2], model.capture(forced, [name])[name], atol=1e-5, rtol=0
            )


def test_conditional_rows_are_those_with_the_caption(model):
    spans = []

    def spy(activations, positions):
        spans.append(model.conditional_rows)
        return activations

    def zero(activations, positions):
        activations = activations.clone()
        activations[model.conditional_rows] = 0
        return activations

    rows = []
    watch = chain(
        on_frames(zero),
        lambda a, p: (rows.append((p.tolist(), a[:, -1].abs().sum(-1) == 0)), a)[1],
    )
    model.generate(["guitar", "music"], 0.04, 0, {"layers.0": spy, "layers.1": watch})
    assert spans == [slice(0, 2)] * 5
    for labels, silent in rows:
        assert silent.tolist() == [labels[-1] > 0] * 2 + [False] * 2
    assert model.conditional_rows == slice(None)

    def broken(activations, positions):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        model.generate(["guitar"], 0.04, 0, {"layers.0": broken})
    assert model.conditional_rows == slice(None)


def test_forbidden_ids_have_no_say(folder):
    model = load(folder)
    options = {"guidance_scale": 1.0, "seed": 3}
    _, codes = model.generate(["guitar"], 0.3, **options)
    with torch.no_grad():
        # Were they allowed, these would always be drawn.
        outside = torch.ones(83968, dtype=torch.bool)
        outside[tokens.CODE_IDS] = False
        model.hf.lm_head.weight[outside] *= 100
        batch = model.with_captions(codes, ["guitar"])
        winner = model.hf(model.sequence(batch)).logits[0, -1].argmax()
    assert outside[winner]
    _, again = model.generate(["guitar"], 0.3, **options)
    assert torch.equal(codes, again)
    assert 0 <= codes.min() <= codes.max() < 1024
    assert len(codes.unique()) > 10


def test_same_seed_same_tokens_whatever_else_happens(model):
    captions = ["guitar", None]
    audio, codes = model.generate(captions, 0.3, seed=3)
    state = torch.random.get_rng_state()
    torch.rand(5)
    again_audio, again = model.generate(
        captions, 0.3, seed=3, hooks={"layers.2": lambda x, _: x + 0 * x}
    )
    assert torch.equal(codes, again)
    assert torch.equal(audio, again_audio)
    torch.random.set_rng_state(state)
    _, other = model.generate(captions, 0.3, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)  # global randomness is left alone
    assert not torch.equal(codes, other)
    _, steered = model.generate(captions, 0.3, seed=3, hooks={"layers.1": lambda x, _: -x})
    assert not torch.equal(codes, steered)
    _, likely = model.generate(captions, 0.1, seed=1, temperature=0)
    assert torch.equal(likely, model.generate(captions, 0.1, seed=2, temperature=0)[1])
    for wrong in ({"top_p": 0}, {"repetition_penalty": 0}, {"temperature": -1}):
        with pytest.raises(ValueError, match=r"at least 0|above 0"):
            model.generate(captions, 0.1, 0, **wrong)
    with pytest.raises(ValueError, match="list of captions"):
        model.generate("guitar", 0.1, 0)


# ---- audio


def test_encode_takes_a_mix_or_stems(model, batch):
    audio = torch.randn(3, 3200, generator=torch.Generator().manual_seed(1))
    mixed = model.codec.encode(audio[:, None], bandwidth=0.5).audio_codes
    quiet = model.codec.encode(torch.zeros(1, 1, 3200), bandwidth=0.5).audio_codes
    assert mixed.shape == (3, 1, 10)
    assert torch.equal(batch.codes[:, 1], mixed[:, 0])
    assert torch.equal(batch.codes[:, 0], quiet[:, 0].repeat(3, 1))
    assert len(batch.codes[:, 1].unique()) > 15  # a codec that says the same for all tests nothing
    voice = torch.randn(3, 3200, generator=torch.Generator().manual_seed(2))
    stems = model.encode(audio, PROMPTS, vocals=voice.numpy())
    assert torch.equal(stems.codes[:, 0], model.encode(voice, PROMPTS).codes[:, 1])
    assert torch.equal(stems.codes[:, 1], batch.codes[:, 1])
    with pytest.raises(ValueError, match="same number of clips and samples"):
        model.encode(audio, PROMPTS, vocals=voice[:, :1600])
    assert torch.equal(model.encode(audio[1:2].numpy(), [None]).codes, batch.codes[1:2])


@pytest.mark.parametrize("samples", [1, 320, 330, 3199])
def test_every_frame_that_begins_counts(model, samples):
    # xcodec alone would give 1 frame for 330 samples.
    assert model.encode(torch.randn(1, samples), [None]).frames == -(-samples // 320)


def test_frames_pair_with_musicgens_for_any_length(model, tiny_musicgen):
    other = load_model(tiny_musicgen)
    assert other.frame_rate == model.frame_rate
    for seconds in (0.2, 0.31, 0.5):
        ours = model.encode(torch.randn(1, int(seconds * model.sample_rate)), [None])
        theirs = other.encode(torch.randn(1, int(seconds * other.sample_rate)), [None])
        assert ours.frames == theirs.frames


def test_bad_audio_is_named(model):
    audio = torch.randn(3, 640)
    audio[1, 7] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinity in rows \[1\]"):
        model.encode(audio, PROMPTS)
    for wrong in (torch.zeros(3200), torch.zeros(1, 1, 3200), torch.zeros(2, 0)):
        with pytest.raises(ValueError, match=r"\[clips, samples\]"):
            model.encode(wrong, [None])
    with pytest.raises(ValueError, match="int16"):
        model.encode(torch.zeros(1, 100, dtype=torch.int16), [None])
    with pytest.raises(ValueError, match="one caption"):
        model.encode(torch.zeros(2, 100), ["a"])
    with pytest.raises(ValueError, match=r"16384 positions.*frames of 2 codes, 8200 were"):
        model.with_captions(torch.zeros(1, 2, 8200, dtype=torch.int64), ["guitar"])


def test_decode_is_the_sum_of_the_tracks(model, batch):
    tracks = model.decode_tracks(batch.codes)
    assert tracks.shape == (3, 2, 3200)
    with torch.no_grad():
        alone = model.codec.decode(batch.codes[1:2, 1:2]).audio_values[0, 0]
        latents = model.codec.quantizer.quantizers[0].decode(batch.codes[:, 1]).transpose(1, 2)
    assert alone.std() > 1e-3
    torch.testing.assert_close(tracks[1, 1], alone)
    torch.testing.assert_close(model.decode(batch.codes), tracks[:, 0] + tracks[:, 1])
    assert torch.equal(model.codec_latents(batch.codes), latents)


# ---- the rest of the package on it


def naive_scores(model, batch, layer: int, replace) -> torch.Tensor:
    """Log-probabilities of transformers' own forward with layer's output := replace(x, y)."""
    handle = model.hf.model.layers[layer].register_forward_hook(
        lambda module, args, output: replace(args[0], output)
    )
    try:
        with torch.no_grad():
            ids = model.sequence(batch)
            logits = model.hf(ids, attention_mask=(ids != 0).long()).logits
    finally:
        handle.remove()
    codes = logits[:, batch.text.shape[1] - 1 : -1, tokens.CODE_IDS].double().log_softmax(-1)
    return codes.unflatten(1, (-1, 2)).transpose(1, 2)


@pytest.mark.parametrize("layer", [0, 2])
def test_ablation(model, batch, layer):
    scores = language.ablate(model, batch, kinds=["skip", "zero"])
    p = naive_scores(model, batch, layer, lambda x, y: y)
    for j, replace in enumerate((lambda x, y: x, lambda x, y: y * 0)):
        q = naive_scores(model, batch, layer, replace)
        kl = (p.exp() * (p - q)).sum(-1).mean(-1)
        np.testing.assert_allclose(scores["kl"][j, layer], kl, rtol=1e-4, atol=1e-5)
        rise = (p - q).gather(-1, batch.codes[..., None])[..., 0].mean(-1)
        np.testing.assert_allclose(scores["dce"][j, layer], rise, rtol=1e-3, atol=1e-5)
    assert scores["kl"].mean((2, 3)).min() > 1e-3


def test_mean_ablation_has_a_mean_for_each_kind_of_position(model, batch):
    prompt, labels = batch.text.shape[1], model.positions(batch)
    starts = [prompt - int(mask.sum()) for mask in batch.text_mask]
    means = language.sums(model, batch).means
    assert [(name, tuple(mean.shape)) for name, mean in means.items()] == [
        (n, (4, 16)) for n in NAMES
    ]
    stream = model.layer_inputs(batch)
    update, kinds = stream[2] - stream[1], torch.full((3, len(labels)), 3)
    kinds[:, labels > 0], kinds[:, labels < 0] = 1, 2
    for b, start in enumerate(starts):
        kinds[b, start] = 0
        kinds[b, :start] = -1
    for kind in range(4):
        torch.testing.assert_close(means["layers.1"][kind], update[kinds == kind].mean(0))
    scores = language.ablate(model, batch, kinds=["mean"], means=means)
    p = naive_scores(model, batch, 1, lambda x, y: y)
    q = naive_scores(model, batch, 1, lambda x, y: x + means["layers.1"][kinds])
    kl = (p.exp() * (p - q)).sum(-1).mean(-1)
    np.testing.assert_allclose(scores["kl"][0, 1], kl, rtol=1e-4, atol=1e-5)


class Clips:
    """A ClipStore of seeded noise."""

    sample_rate = 16_000

    def __init__(self) -> None:
        self.rows = pd.DataFrame(
            {"id": list("abc"), "split": ["train", "train", "test"], "group": list("abc")}
            | {"font": "mixed", "kind": "clip", "caption": list(CAPTIONS[:3])}
        )
        generator = np.random.default_rng(0)
        self.samples = generator.standard_normal((3, 3300)).astype(np.float32)

    def audio(self, rows: list[int]) -> np.ndarray:
        return self.samples[rows]


def test_extraction_stores_the_instrumental_positions(model, tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    clips = Clips()
    todo = plan(
        model, clips, {"top1": "layers.1"}, dtype="float16", shard_mb=1, batch_clips=2,
        captions=True, model_sha256="m", clips_sha256="c",
    )  # fmt: skip
    stores = extract(todo, lambda: (model, clips), {"top1": tmp_path / "top1"})
    for rows in ([0, 1], [2]):
        batch = model.encode(clips.audio(rows), [CAPTIONS[i] for i in rows])
        expected = model.capture(batch, ["layers.1"])["layers.1"].half()
        assert expected.shape[1] == 11
        for row, values in zip(rows, expected, strict=True):
            assert torch.equal(torch.as_tensor(np.array(stores["top1"].clip(row))), values)


# ---- loading


def test_load(folder, tmp_path, batch):
    half = load(folder, dtype=torch.bfloat16)
    assert isinstance(half, LanguageModel)
    assert not isinstance(half, AudioModel)
    assert (half.name, half.sample_rate, half.frame_rate) == ("tiny-yue", 16000, 50.0)
    assert [(p.name, p.width) for p in half.hook_points] == [(n, 16) for n in NAMES]
    audio = torch.randn(3, 3200, generator=torch.Generator().manual_seed(1))
    again = half.encode(audio, PROMPTS)
    assert torch.equal(again.codes, batch.codes)  # the codec is never rounded
    assert half.forward(again).dtype == torch.bfloat16
    assert half.cross_entropy(again).dtype == torch.float32
    assert half.generate(["guitar"], 0.04, seed=0)[0].dtype == torch.float32
    shards = [file.stat().st_size for file in folder.glob("model-*-of-*.safetensors")]
    assert len(shards) > 1  # as on the hub
    codec = (folder / "xcodec/model.safetensors").stat().st_size
    assert half.weight_bytes == pytest.approx(sum(shards) / 2 + codec, rel=0.01)


def test_layers_may_be_anywhere(folder, tmp_path, model, batch):
    pytest.importorskip("accelerate")
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "model.layers.0"]
    places = dict.fromkeys(parts, "cpu")
    places |= {"model.layers.1": "disk", "model.layers.2": "disk", "lm_head": "disk"}
    spread = load(folder, device_map=places, offload_folder=tmp_path / "offload")
    assert spread.hf.lm_head.weight.is_meta
    assert torch.equal(spread.layer_inputs(batch)[3], model.layer_inputs(batch)[3])
    torch.testing.assert_close(spread.forward(batch), model.forward(batch))
    assert torch.equal(
        spread.generate(["guitar"], 0.06, seed=0)[1], model.generate(["guitar"], 0.06, seed=0)[1]
    )


def test_loading_errors_say_what_to_do(folder, tmp_path):
    def copy(name: str) -> Path:
        made = tmp_path / name
        made.mkdir()
        for file in folder.iterdir():
            (made / file.name).symlink_to(file)
        return made

    bare = copy("bare")
    (bare / "xcodec").unlink()
    with pytest.raises(FileNotFoundError, match=r"xcodec.*Manel/YuE-XCodec.*codec="):
        load(bare)
    assert load(bare, codec=folder / "xcodec").name == "bare"
    (bare / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model.*YuE-v1"):
        load(bare, codec=folder / "xcodec")
    with pytest.raises(ValueError, match="stage 2 is not supported"):
        load(copy("YuE-s2-1B-general"))
    other = copy("rates")
    (other / "xcodec").unlink()
    (other / "xcodec").mkdir()
    (other / "xcodec/model.safetensors").symlink_to(folder / "xcodec/model.safetensors")
    config = (folder / "xcodec/config.json").read_text()
    changed = config.replace('"sample_rate": 16000', '"sample_rate": 24000')
    assert changed != config
    (other / "xcodec/config.json").write_text(changed)
    with pytest.raises(ValueError, match=r"xcodec/config\.json.*24000.*Manel/YuE-XCodec"):
        load(other)
