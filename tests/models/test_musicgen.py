"""The model behind the interface against transformers itself, and the promises of the interface."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

from musicscope.models.interface import AudioModel, LanguageModel, chain, on_frames
from musicscope.models.musicgen.delay_pattern import delayed, sample, undelayed
from musicscope.models.registry import load_model
from tests.conftest import CAPTIONS, ROOT

NANO = ROOT / "data/models/nano-small"
PROMPTS = [CAPTIONS[0], None, CAPTIONS[2]]
NAMES = [f"layers.{i}" for i in range(4)]


@pytest.fixture(scope="module")
def model(tiny_musicgen: Path):
    return load_model(tiny_musicgen)


@pytest.fixture(scope="module")
def batch(model):
    audio = torch.randn(3, 3200, generator=torch.Generator().manual_seed(1))
    return model.encode(audio, PROMPTS)


@contextlib.contextmanager
def recorded(model):
    """Outputs of all layers of the transformers model by torch's own hooks, a list a layer."""
    layers = model.hf.decoder.model.decoder.layers
    seen = [[] for _ in layers]

    def recorder(into):
        return lambda module, inputs, output: into.append(output.clone())

    handles = [
        layer.register_forward_hook(recorder(into))
        for layer, into in zip(layers, seen, strict=True)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def hf_generate(model, captions, frames: int, seed: int = 0, **options):
    """transformers' generate(); returns codes [B, K, T] from what it hands to the codec."""
    codec, found = model.hf.audio_encoder, []
    decode = codec.decode
    codec.decode = lambda codes, **rest: (found.append(codes[0]), decode(codes, **rest))[1]
    tokens = model.tokenizer(captions, padding=True, return_tensors="pt")
    torch.manual_seed(seed)
    try:
        audio = model.hf.generate(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            max_new_tokens=frames + model.num_codebooks - 1,
            **options,
        )
    finally:
        del codec.decode
    return audio[:, 0], found[0]


def generation_against_teacher_forcing(model, captions, frames: int) -> float:
    """Largest difference, over layers, positions and both halves of guidance."""
    count = len(captions)
    with recorded(model) as seen:
        _, codes = hf_generate(model, captions, frames, do_sample=True, guidance_scale=3.0)
    assert codes.shape == (count, model.num_codebooks, frames)
    halves = (
        (slice(0, count), model.with_captions(codes, captions)),
        (slice(count, None), model.with_captions(codes, [None] * count)),
    )
    worst = 0.0
    names = [point.name for point in model.hook_points]
    for rows, batch in halves:
        forced = model.capture(batch, names)
        for layer, name in enumerate(names):
            # transformers 5 runs the first step twice; the rest is one position a call.
            assert len(seen[layer]) == frames + model.num_codebooks
            steps = torch.cat(seen[layer][1:], dim=1)[rows]
            worst = max(worst, (steps[:, 1 : frames + 1] - forced[name]).abs().max().item())
    return worst


def test_teacher_forcing_is_what_generate_computes(model):
    assert generation_against_teacher_forcing(model, list(CAPTIONS[:3]), 20) < 1e-5


@pytest.mark.skipif(not NANO.is_dir(), reason="data/models/nano-small is absent: fetch the weights")
def test_teacher_forcing_is_what_generate_computes_on_the_nano_model():
    # In float64: its stream reaches some hundreds, where float32 itself is only 3e-5 fine.
    nano = load_model(NANO, dtype=torch.float64)
    nano.hf.text_encoder.double()  # transformers hands its states on as they are
    assert generation_against_teacher_forcing(nano, list(CAPTIONS[:2]), 100) < 1e-5


def test_undelayed_input_would_fail_that_test(model, batch):
    # The field's usual extraction (raw codes, no start column) is what the test must tell apart.
    raw = model.hf(
        encoder_outputs=(batch.text,),
        attention_mask=batch.text_mask,
        decoder_input_ids=batch.codes.flatten(0, 1),
        output_hidden_states=True,
    ).decoder_hidden_states[2]
    assert (raw - model.capture(batch, ["layers.1"])["layers.1"]).abs().max() > 0.1


@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_generate_gives_the_greedy_tokens_of_transformers(model, scale):
    captions = list(CAPTIONS[:2])
    audio, codes = model.generate(captions, 0.4, seed=7, temperature=0.0, guidance_scale=scale)
    greedy = {"do_sample": False, "temperature": None, "top_k": None, "guidance_scale": scale}
    expected_audio, expected = hf_generate(model, captions, 20, seed=7, **greedy)
    assert torch.equal(codes, expected)
    torch.testing.assert_close(audio, expected_audio, atol=1e-5, rtol=0)
    assert codes.shape == (2, 4, 20)
    assert audio.shape == (2, 20 * 64)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.7, 5), (2.0, 1)])
def test_draws_have_the_distribution_of_transformers_samplers(temperature, top_k):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 2
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    wanted = processors(None, logits[None])[0].softmax(-1)
    draws = 40_000
    generator = torch.Generator().manual_seed(1)
    drawn = sample(logits.expand(4, draws // 4, -1), temperature, top_k, generator)
    found = torch.bincount(drawn.flatten(), minlength=12) / draws
    assert (found - wanted).abs().max() < 4 * (0.25 / draws) ** 0.5
    assert not found[wanted == 0].any()


def test_a_small_change_of_logits_changes_few_draws():
    logits = torch.randn(2000, 50, generator=torch.Generator().manual_seed(0))
    moved = logits + 0.02 * torch.randn(2000, 50, generator=torch.Generator().manual_seed(1))
    one, two = (
        sample(scores, 1.0, 0, torch.Generator().manual_seed(2)) for scores in (logits, moved)
    )
    share = (one != two).float().mean()
    distance = (logits.softmax(-1) - moved.softmax(-1)).abs().sum(-1).mean() / 2
    assert 0 < share < 2 * distance  # of coupled draws; independent ones would differ in 96 %


def test_forward_is_the_models_own_and_aligned(model, batch):
    ids = model.sequence(batch)
    full = model.hf(
        encoder_outputs=(batch.text,),
        attention_mask=batch.text_mask,
        decoder_input_ids=ids.flatten(0, 1),
    ).logits.view(3, 4, -1, 64)
    logits = model.forward(batch)
    assert logits.shape == (3, 4, 50, 64)
    for k in range(4):
        # Codebook k of frame t is the input at position t + k + 1, so position t + k predicts it.
        assert torch.equal(ids[:, k, k + 1 :][:, :49], batch.codes[:, k, :49])
        assert torch.equal(logits[:, k], full[:, k, k : k + 50])


def test_cross_entropy_is_the_loss_of_transformers(model, batch):
    labels = delayed(batch.codes, 64)[..., 1:].permute(0, 2, 1)
    loss = model.hf(
        encoder_outputs=(batch.text,), attention_mask=batch.text_mask, labels=labels
    ).loss
    entropy = model.cross_entropy(batch)
    assert entropy.shape == batch.codes.shape
    torch.testing.assert_close(entropy.mean(), loss, atol=1e-6, rtol=1e-6)
    assert torch.equal(model.loss(batch), entropy.double().mean((1, 2)))
    assert isinstance(model, LanguageModel)
    assert not isinstance(model, AudioModel)


def test_delay_is_the_pattern_of_transformers(model, batch):
    ours = delayed(batch.codes, 64)
    start = torch.full((12, 1), 64)
    prompt = torch.cat([start, batch.codes.flatten(0, 1)], 1)
    # As in generate(): the mask says where tokens go (-1), the rest is the special id.
    _, mask = model.hf.decoder.build_delay_pattern_mask(prompt[:, :1], 64, max_length=54)
    theirs = model.hf.decoder.apply_delay_pattern_mask(ours.flatten(0, 1), mask)
    assert torch.equal(theirs, ours.flatten(0, 1))
    assert torch.equal(mask == -1, (ours != 64).flatten(0, 1))
    _, filled = model.hf.decoder.build_delay_pattern_mask(prompt, 64, max_length=54)
    assert torch.equal(filled, ours.flatten(0, 1))
    assert torch.equal(undelayed(ours), batch.codes)


def test_forward_from_any_layer_is_forward(model, batch):
    expected = model.forward(batch)
    inputs = model.layer_inputs(batch)
    assert len(inputs) == 5
    before = model.layer_calls
    first = model.layer_inputs(batch, last=1)
    assert model.layer_calls - before == 2
    assert all(torch.equal(a, b) for a, b in zip(first, inputs[:3], strict=True))
    for layer, hidden in enumerate(inputs):
        before = model.layer_calls
        assert torch.equal(model.forward_from(batch, layer, hidden), expected)
        assert model.layer_calls - before == 4 - layer
    edited = model.forward(batch, {"layers.2": lambda x, _: x * 2})
    assert (edited - expected).abs().max() > 0.01
    assert torch.equal(
        model.forward_from(batch, 1, inputs[1], {"layers.2": lambda x, _: x * 2}), edited
    )
    with pytest.raises(ValueError, match=r"layers\.0 cannot act"):
        model.forward_from(batch, 1, inputs[1], {"layers.0": lambda x, _: x})
    with pytest.raises(ValueError, match=r"layers 0\.\.3"):
        model.forward_from(batch, 5, inputs[4])


def test_redrawn_weights_are_a_permutation_and_come_back(model, batch):
    layers, expected = model.decoder.layers, model.layer_inputs(batch)
    before = [[p.clone() for p in layer.parameters()] for layer in layers]
    with contextlib.suppress(InterruptedError), model.redrawn(3, last=1):
        for i, (layer, old) in enumerate(zip(layers, before, strict=True)):
            for p, kept in zip(layer.parameters(), old, strict=True):
                assert torch.equal(p, kept) == (i > 1 or p.ndim < 2)
                assert torch.equal(p.flatten().sort()[0], kept.flatten().sort()[0])
        first = model.layer_inputs(batch, last=1)
        assert torch.equal(first[0], expected[0])
        assert (first[1] - expected[1]).abs().max() > 0.1
        raise InterruptedError
    assert all(map(torch.equal, model.layer_inputs(batch), expected))


def test_capture_reads_the_frames_and_stops_after_the_deepest(model, batch):
    inputs = model.layer_inputs(batch)
    with recorded(model) as seen:
        found = model.capture(batch, ["layers.2", "layers.0"])
    assert [len(calls) for calls in seen] == [1, 1, 1, 0]
    assert list(found) == ["layers.2", "layers.0"]
    for layer in (0, 2):
        assert torch.equal(found[f"layers.{layer}"], inputs[layer + 1][:, 1:51])
    assert model.forward(batch, stop_after="layers.1") is None
    edited = model.capture(batch, ["layers.0"], {"layers.0": lambda x, _: -x})["layers.0"]
    assert torch.equal(edited, -found["layers.0"])


def test_nnsight_sees_what_capture_sees(model, batch):
    pytest.importorskip("nnsight")
    expected = model.capture(batch, ["layers.1"])["layers.1"]
    push = torch.linspace(-1, 1, 48)  # not a constant: the next layer norm would remove it
    changed = model.forward(batch, {"layers.1": lambda x, _: x + push})
    assert (changed - model.forward(batch)).abs().max() > 0.1
    view, inputs = model.trace(batch)
    layers = view.decoder.model.decoder.layers
    with torch.no_grad(), view.trace(**inputs):
        seen = layers[1].output.save()
        layers[1].output = layers[1].output + push
        logits = view.output.logits.save()
    assert torch.equal(seen[:, 1 : batch.frames + 1], expected)
    first = logits.view(3, 4, -1, 64)[:, 0, : batch.frames]
    torch.testing.assert_close(first, changed[:, 0], atol=1e-6, rtol=0)


def test_frames_do_not_see_later_codes(model, batch):
    cut = 21
    codes = batch.codes.clone()
    codes[:, :, cut:] = (codes[:, :, cut:] + 1) % 64
    other = model.with_captions(codes, PROMPTS)
    a, b = model.capture(batch, NAMES), model.capture(other, NAMES)
    for name in NAMES:
        torch.testing.assert_close(a[name][:, :cut], b[name][:, :cut], atol=1e-6, rtol=0)
        assert (a[name][:, cut] - b[name][:, cut]).abs().amax(-1).min() > 1e-3
    # Codebook k of frame t is predicted at position t + k, which has seen frames below t + k.
    x, y = model.forward(batch), model.forward(other)
    for k in range(4):
        seen = slice(0, cut + 1 - k)
        torch.testing.assert_close(x[:, k, seen], y[:, k, seen], atol=1e-5, rtol=0)
        assert (x[:, k, cut + 1 - k] - y[:, k, cut + 1 - k]).abs().amax(-1).min() > 1e-3


def test_no_caption_means_no_text_whatever_the_batch(model, batch):
    alone = model.with_captions(batch.codes[1:2], [None])
    assert not batch.text[1].any()
    assert not batch.text_mask[1].any()
    torch.testing.assert_close(
        model.forward(alone)[0], model.forward(batch)[1], atol=1e-6, rtol=1e-5
    )
    empty = model.with_captions(batch.codes[1:2], [""])
    assert empty.text_mask.sum() == 1  # an empty caption is a caption: its end mark is read
    assert (model.forward(empty) - model.forward(alone)).abs().max() > 1e-3


def test_text_is_encoded_once_a_batch(model, batch, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the text encoder ran again")

    monkeypatch.setattr(model.hf.text_encoder, "forward", never)
    model.forward(batch)
    model.cross_entropy(batch)
    model.capture(batch, NAMES)


def test_hook_gets_rows_and_positions_and_its_answer_goes_on(model, batch):
    seen = []

    def hook(activations, positions):
        seen.append((activations.shape, positions.tolist()))
        return torch.zeros_like(activations)

    logits = model.forward(batch, {"layers.3": hook})
    assert seen == [((3, 53, 48), list(range(53)))]
    bias = model.hf.decoder.model.decoder.layer_norm(torch.zeros(48))
    expected = torch.stack([head(bias) for head in model.hf.decoder.lm_heads])
    torch.testing.assert_close(logits[0, :, 0], expected)


def test_a_failing_hook_leaves_no_trace(model, batch):
    expected = model.forward(batch)
    layers = model.hf.decoder.model.decoder.layers
    registered = [len(layer._forward_hooks) for layer in layers]  # nnsight leaves one behind

    def broken(activations, positions):
        raise RuntimeError("no")

    for run in (
        lambda: model.forward(batch, {"layers.1": broken}),
        lambda: model.generate([CAPTIONS[0]], 0.2, 0, {"layers.1": broken}),
    ):
        with pytest.raises(RuntimeError, match="no"):
            run()
    assert model.conditional_rows == slice(None)
    assert torch.equal(model.forward(batch), expected)
    assert [len(layer._forward_hooks) for layer in layers] == registered
    with pytest.raises(ValueError, match=r"layers\.1 must return"):
        model.forward(batch, {"layers.1": lambda x, _: x[:, :1]})
    with pytest.raises(ValueError, match=r"no hook point 'layers\.9'.*layers\.0"):
        model.forward(batch, {"layers.9": broken})


def test_same_seed_same_tokens_whatever_else_happens(model):
    captions = [CAPTIONS[0], None]
    _, codes = model.generate(captions, 0.6, seed=3)
    state = torch.random.get_rng_state()
    torch.rand(5)
    _, again = model.generate(captions, 0.6, seed=3, hooks={"layers.2": lambda x, _: x + 0 * x})
    assert torch.equal(codes, again)
    torch.random.set_rng_state(state)
    model.generate(captions, 0.2, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)  # global randomness is left alone
    _, other = model.generate(captions, 0.6, seed=4)
    assert not torch.equal(codes, other)
    _, steered = model.generate(captions, 0.6, seed=3, hooks={"layers.2": lambda x, _: -x})
    assert not torch.equal(codes, steered)
    assert 0 <= codes.min() <= codes.max() < 64


@pytest.mark.parametrize(("scale", "rows"), [(3.0, 4), (1.0, 2)])
def test_generation_hooks_see_each_position_once_and_both_halves(model, scale, rows):
    seen, halves = [], []

    def hook(activations, positions):
        assert activations.shape == (rows, 1, 48)
        halves.append(activations[model.conditional_rows])
        seen.extend(positions.tolist())
        return activations

    captions = list(CAPTIONS[:2])
    _, codes = model.generate(captions, 0.4, 0, {"layers.1": hook}, guidance_scale=scale)
    assert seen == list(range(20 + 3))
    forced = model.capture(model.with_captions(codes, captions), ["layers.1"])["layers.1"]
    torch.testing.assert_close(torch.cat(halves, 1)[:, 1:21], forced, atol=1e-5, rtol=0)


def test_hook_tools(model, batch):
    def double(activations, positions):
        return activations * 2

    plain = model.capture(batch, ["layers.0"])["layers.0"]
    some = on_frames(double, 5, 8)
    found = model.capture(batch, ["layers.0"], {"layers.0": some})["layers.0"]
    expected = plain.clone()
    expected[:, 5:8] *= 2
    assert torch.equal(found, expected)
    x = torch.ones(4, 3, 48)
    assert on_frames(double)(x, torch.arange(3))[0, :, 0].tolist() == [1, 2, 2]
    twice = chain(double, lambda a, _: a + 1)
    assert twice(x, torch.arange(3)).unique().tolist() == [3]

    rows = []

    def spy(activations, positions):
        rows.append(activations[:, 0, 0].tolist())
        return activations

    def silence(activations, positions):
        activations = activations.clone()
        activations[model.conditional_rows] = 0
        return activations

    only = chain(silence, spy)
    model.generate(list(CAPTIONS[:2]), 0.1, 0, {"layers.0": only})
    assert all(r[:2] == [0, 0] and 0 not in r[2:] for r in rows)
    rows.clear()
    model.generate(list(CAPTIONS[:2]), 0.1, 0, {"layers.0": only}, guidance_scale=1.0)
    assert all(r == [0, 0] for r in rows)


def test_a_device_computes_what_the_cpu_computes(tiny_musicgen, model, device):
    """Codes are equal, activations and audio close; a seed gives the same codes twice."""
    there = load_model(tiny_musicgen, device)
    audio = torch.randn(3, 3200, generator=torch.Generator().manual_seed(1))
    here, found = (m.encode(audio, PROMPTS) for m in (model, there))
    assert found.codes.device.type == device.type
    assert torch.equal(here.codes, found.codes.cpu())
    expected, captured = (m.capture(b, NAMES) for m, b in ((model, here), (there, found)))
    for name in NAMES:
        torch.testing.assert_close(captured[name].cpu(), expected[name], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        there.decode(found.codes).cpu(), model.decode(here.codes), rtol=1e-3, atol=1e-4
    )
    greedy = {"captions": [CAPTIONS[0]], "seconds": 0.2, "seed": 0, "top_k": 1}
    _, mine = model.generate(**greedy)
    sound, theirs = there.generate(**greedy)
    assert torch.equal(mine, theirs.cpu())
    assert torch.isfinite(sound).all()
    drawn = [there.generate([CAPTIONS[0]], 0.2, 3)[1] for _ in range(2)]
    assert torch.equal(*drawn)


def test_encode_is_the_codec_clip_by_clip_and_names_bad_input(model, batch):
    audio = torch.randn(3, 3200, generator=torch.Generator().manual_seed(1))
    together = model.hf.audio_encoder.encode(audio[:, None]).audio_codes[0]
    assert torch.equal(batch.codes, together)
    assert len(batch.codes.unique()) > 20  # a codec that says the same for all tests nothing
    assert torch.equal(model.encode(audio[1:2].numpy(), [None]).codes, batch.codes[1:2])
    silent = model.encode(torch.zeros(1, 1000), ["silence"])
    assert silent.frames == 16  # 1000 samples at 64 a frame, the last one padded
    assert torch.isfinite(model.cross_entropy(silent)).all()
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
    with pytest.raises(ValueError, match=r"0\.\.63"):
        model.with_captions(batch.codes + 64, PROMPTS)


def test_load_by_name_and_errors(tiny_musicgen, tmp_path, monkeypatch):
    (tmp_path / "data/models").mkdir(parents=True)
    (tmp_path / "data/models/mine").symlink_to(tiny_musicgen)
    monkeypatch.chdir(tmp_path)
    model = load_model("mine", dtype=torch.bfloat16)
    assert (model.name, model.sample_rate, model.frame_rate) == ("mine", 3200, 50.0)
    assert [(p.name, p.width) for p in model.hook_points] == [(n, 48) for n in NAMES]
    audio = torch.randn(2, 640, generator=torch.Generator().manual_seed(0))
    half = model.encode(audio, ["flute", None])
    full = load_model(tiny_musicgen).encode(audio, ["flute", None])
    assert torch.equal(half.codes, full.codes)  # the codec is never rounded
    assert model.forward(half).dtype == torch.bfloat16
    assert model.generate(["flute"], 0.1, seed=0)[0].dtype == torch.float32
    with pytest.raises(FileNotFoundError, match="data/models/absent"):
        load_model("absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model("empty")


def test_cross_entropy_of_one_codebook_by_hand(model, batch):
    expected = F.cross_entropy(model.forward(batch)[2, 3], batch.codes[2, 3], reduction="none")
    torch.testing.assert_close(model.cross_entropy(batch)[2, 3], expected)


# ---- loading


def old_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As the hub's MusicGen pages spell them, with the table of positions that they hold."""
    renamed = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): value
        for name, value in weights.items()
    }
    assert sum(name.endswith("weight_g") for name in renamed) > 5
    renamed["decoder.model.decoder.embed_positions.weights"] = torch.zeros(512, 48)
    return renamed


def bin_layout(source: Path, out: Path, shards: int = 1) -> Path:
    """The folder with pytorch_model*.bin under the old names instead of safetensors."""
    shutil.copytree(source, out)
    weights = old_names(load_file(out / "model.safetensors"))
    (out / "model.safetensors").unlink()
    if shards == 1:
        torch.save(weights, out / "pytorch_model.bin")
        return out
    names, index = sorted(weights), {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = {name: weights[name] for name in names[i::shards]}
        torch.save(part, out / file)
        index.update(dict.fromkeys(part, file))
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    (out / "pytorch_model.bin.index.json").write_text(text)
    return out


@pytest.mark.parametrize("shards", [1, 3])
def test_the_bin_layout_is_the_same_model(tiny_musicgen, model, batch, tmp_path, shards):
    other = load_model(bin_layout(tiny_musicgen, tmp_path / "bin", shards))
    expected, found = model.hf.state_dict(), other.hf.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert torch.equal(other.forward(batch), model.forward(batch))
    assert torch.equal(other.decode(batch.codes), model.decode(batch.codes))


class Stranger:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_bin_with_other_objects_is_not_unpickled(tiny_musicgen, tmp_path):
    folder = bin_layout(tiny_musicgen, tmp_path / "bin")
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({**weights, "extra": Stranger(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match="weights_only|WeightsUnpickler|Unsupported global"):
        load_model(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_decoders_alone(tiny_musicgen, model, batch, dtype):
    half = load_model(tiny_musicgen, dtype=dtype)
    kinds = {name: {p.dtype for p in part.parameters()} for name, part in half.hf.named_children()}
    assert kinds == {
        "text_encoder": {torch.float32},
        "audio_encoder": {torch.float32},
        "decoder": {dtype},
        "enc_to_dec_proj": {dtype},
    }
    expected = model.hf.decoder.lm_heads[1].weight.to(dtype)
    assert torch.equal(half.hf.decoder.lm_heads[1].weight, expected)
    seen = half.with_captions(batch.codes, PROMPTS)
    logits = half.forward(seen)
    assert logits.dtype == seen.text.dtype == dtype
    assert 1e-5 < (logits.float() - model.forward(batch)).abs().max() < 0.2
    assert half.generate(["flute"], 0.1, seed=0)[1].shape == (1, 4, 5)
    assert half.weight_bytes < model.weight_bytes
    with pytest.raises(ValueError, match=r"dtype must be one of .*bfloat16"):
        load_model(tiny_musicgen, dtype=torch.int8)


def test_a_device_map_spreads_the_layers(tiny_musicgen, model, batch, tmp_path):
    parts = {"text_encoder": "cpu", "audio_encoder": "cpu", "enc_to_dec_proj": "cpu",
             "decoder.lm_heads": "cpu", "decoder.model.decoder.embed_tokens": "cpu",
             "decoder.model.decoder.embed_positions": "cpu",
             "decoder.model.decoder.layer_norm": "cpu"}  # fmt: skip
    # On a machine without accelerators the disk is another place: weights come when a layer runs.
    layers = {f"decoder.model.decoder.layers.{i}": "disk" if i in (1, 2) else "cpu"
              for i in range(4)}  # fmt: skip
    spread = load_model(
        tiny_musicgen, device_map={**parts, **layers}, offload_folder=str(tmp_path / "offload")
    )
    held = spread.hf.decoder.model.decoder.layers[1].fc1.weight
    assert held.device.type == "meta"
    assert spread.device.type == "cpu"
    assert torch.equal(spread.forward(batch), model.forward(batch))
    edit = {"layers.2": lambda x, _: x * 0.5}
    assert torch.equal(spread.forward(batch, edit), model.forward(batch, edit))
    _, codes = spread.generate(PROMPTS, 0.1, seed=0, hooks=edit, temperature=0.0)
    assert torch.equal(codes, model.generate(PROMPTS, 0.1, 0, edit, temperature=0.0)[1])
    with pytest.raises(ValueError, match=r"\['offload_folder'\] need a device_map"):
        load_model(tiny_musicgen, offload_folder="x")


def changed(source: Path, out: Path, change) -> Path:
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text())
    change(config)
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_what_is_not_supported_is_refused_by_name(tiny_musicgen, tmp_path):
    melody = changed(
        tiny_musicgen, tmp_path / "melody", lambda c: c.update(model_type="musicgen_melody")
    )
    with pytest.raises(ValueError, match=r"melody/config\.json.*melody conditioning is not supp"):
        load_model(melody)
    stereo = changed(
        tiny_musicgen, tmp_path / "stereo", lambda c: c["decoder"].update(audio_channels=2)
    )
    with pytest.raises(ValueError, match=r"stereo MusicGen.*only mono"):
        load_model(stereo)
    other = changed(tiny_musicgen, tmp_path / "other", lambda c: c.update(model_type="bert"))
    with pytest.raises(FileNotFoundError, match=r"other holds no model of musicgen.*'bert'"):
        load_model(other)
    with pytest.raises(ValueError, match=r"no system 'magnet'; known: musicgen, audiocraft"):
        load_model(tiny_musicgen, system="magnet")


def test_weights_that_do_not_fit_the_config_are_refused(tiny_musicgen, tmp_path):
    few = changed(
        tiny_musicgen, tmp_path / "few", lambda c: c["decoder"].update(num_hidden_layers=3)
    )
    with pytest.raises(ValueError, match=r"few are not those.*unknown.*layers\.3"):
        load_model(few)
    many = changed(
        tiny_musicgen, tmp_path / "many", lambda c: c["decoder"].update(num_hidden_layers=5)
    )
    with pytest.raises(ValueError, match=r"many are not those.*missing.*layers\.4"):
        load_model(many)
    (few / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"few holds no weights \(model\.safetensors"):
        load_model(few)
