"""Promises that models of all families keep: no input without effect, no effect of strength 0."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from musicscope.core.precision import tf32
from musicscope.dictionaries.core import TopKSAE
from musicscope.models.interface import AudioModel, LanguageModel, points_of
from musicscope.models.language_model import by_clip
from musicscope.steering import edit as steering
from musicscope.steering.conditions import direction_change
from tests.conftest import CAPTIONS
from tests.models.conftest import FAMILIES, load

LANGUAGE = tuple(family for family in FAMILIES if family != "rave")
SECONDS = 0.2
K, LATENTS = 4, 32


@pytest.fixture(scope="module")
def models(checkpoints):
    return {family: load(folder) for family, folder in checkpoints.items()}


def noise(model, rows: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, round(0.5 * model.sample_rate), generator=generator) * 0.3


@pytest.mark.parametrize("family", LANGUAGE)
def test_captions_change_all_logits(models, family):
    model = models[family]
    assert isinstance(model, LanguageModel)
    codes = model.encode(noise(model), [None, None]).codes[:1].expand(4, -1, -1)
    texts = [CAPTIONS[0], CAPTIONS[1], CAPTIONS[0].replace("drums", "strings"), None]
    logits = model.forward(model.with_captions(codes, texts))
    for i in range(4):
        for j in range(i):  # every code of every codebook is predicted otherwise
            assert (logits[i] - logits[j]).abs().amax(-1).min() > 1e-5, (texts[i], texts[j])


@pytest.mark.parametrize("family", LANGUAGE)
def test_audio_changes_logits(models, family):
    model = models[family]
    audio = noise(model)
    batch = model.encode(audio, [CAPTIONS[0]] * 2)
    later = model.encode(torch.cat([audio[:, :-1], -audio[:, -1:]], 1), [CAPTIONS[0]] * 2)
    assert not torch.equal(batch.codes[0], batch.codes[1])
    logits = model.forward(batch)
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    assert later.codes.shape == batch.codes.shape
    for book in range(model.num_codebooks):  # and each codebook does
        changed = batch.codes.clone()
        changed[:, book, 0] = (changed[:, book, 0] + 1) % model.card
        other = model.forward(model.with_captions(changed, [CAPTIONS[0]] * 2))
        assert (other - logits)[:, :, 2:].abs().amax((1, 3)).min() > 1e-6, book


@pytest.mark.parametrize("family", LANGUAGE)
def test_what_is_asked_of_a_generation_changes_its_codes(models, family):
    model = models[family]
    asked = {"captions": [CAPTIONS[0]], "seconds": SECONDS, "seed": 3, "guidance_scale": 3.0,
             "temperature": 1.0, "top_k": 20}  # fmt: skip
    _, plain = model.generate(**asked)
    changes = {"captions": [CAPTIONS[1]], "seed": 4, "guidance_scale": 8.0, "temperature": 3.0,
               "top_k": 1}  # fmt: skip
    if family == "yue":
        changes |= {"top_p": 0.1, "repetition_penalty": 4.0}
    for name, value in changes.items():
        _, other = model.generate(**{**asked, name: value})
        assert other.shape == plain.shape
        assert not torch.equal(other, plain), name
    for scale in (1.0, 2.0):  # without guidance as well
        _, one = model.generate(**{**asked, "guidance_scale": scale})
        _, other = model.generate(**{**asked, "guidance_scale": scale, "captions": [CAPTIONS[1]]})
        assert not torch.equal(one, other), scale


def test_yues_own_inputs_change_logits(models, checkpoints):
    model = models["yue"]
    audio, words = noise(model), [CAPTIONS[0]] * 2
    plain = model.forward(model.encode(audio, words))
    sung = model.forward(model.encode(audio, words, vocals=noise(model, seed=2)))
    assert (sung - plain).abs().amax((1, 3))[:, 4:].min() > 1e-5
    model.segment = "[chorus]\nthe music\n\n"
    try:
        other = model.forward(model.encode(audio, words))
        _, drawn = model.generate(words[:1], SECONDS, seed=0)
    finally:
        model.segment = "[verse]\n\n\n"
    assert (other - plain).abs().amax(-1).min() > 1e-5
    assert not torch.equal(drawn, model.generate(words[:1], SECONDS, seed=0)[1])


def test_raves_inputs_change_its_sound(models):
    model = models["rave"]
    assert isinstance(model, AudioModel)
    batch = model.encode(noise(model))
    sound, latents = model.reconstruct(batch), model.latents(batch)
    assert (sound[0] - sound[1]).abs().mean() > 1e-4
    assert (latents[0] - latents[1]).abs().mean() > 1e-3
    for d in range(latents.shape[-1]):  # each latent is heard
        changed = latents.clone()
        changed[..., d] += 1
        assert (model.decode(changed, batch) - sound).abs().mean() > 1e-5, d
    seeded = model.encode(noise(model), ["a caption"] * 2)
    assert torch.equal(model.reconstruct(seeded), sound)  # captions mean nothing to it


def edits(width: int, strength: float) -> tuple[TopKSAE, tuple[steering.ConceptEdit, ...]]:
    rng = np.random.default_rng(0)
    matrix = torch.from_numpy(rng.standard_normal((LATENTS, width)).astype(np.float32))
    sae = TopKSAE(matrix, torch.zeros(LATENTS), matrix.clone(), torch.zeros(width), K)
    every = tuple(range(LATENTS))
    parts = (
        steering.Edit(every, "set", (9.0,) * LATENTS),
        steering.Edit(every, "scale", (3.0,) * LATENTS),
        steering.Edit(every, "ablate"),
        steering.Edit(every, "clamp_min", (2.0,) * LATENTS),
    )
    gate = steering.Gate((3,), (1.0,), 0.0, 0.1)
    return sae, tuple(
        steering.ConceptEdit(f"{part.op} {kind}", (part,), strength, gate if kind else None)
        for part in parts
        for kind in ("", "gated")
    )


def hook_at(model, point, strength: float, branch: str = "conditional"):
    sae, concepts = edits(point.width, strength)
    made = steering.Steering(sae, concepts if strength == 0 else concepts[:1], branch)
    return {point.name: steering.steering_hook(model, made, frame_rate=point.rate)}


def places(model) -> list:
    """All hook points of a language model."""
    return list(points_of(model).values())


@pytest.mark.parametrize("family", ["musicgen", "audiocraft"])
def test_cross_attention_outputs_are_hook_points(models, family):
    model = models[family]
    batch = model.encode(noise(model), [CAPTIONS[0], None])
    names = [point.name for point in model.cross_points]
    assert names == [f"layers.{i}.cross_attention" for i in range(model.num_layers)]
    found = model.capture(batch, names)
    for name in names:
        assert found[name][0].abs().max() > 1e-4, name
        assert not found[name][1].any(), name  # a clip without a caption: nothing is added
    # Without them a captioned clip is predicted as if it had no caption.
    silent = dict.fromkeys(names, lambda x, positions: torch.zeros_like(x))
    bare = model.with_captions(batch.codes, [None, None])
    torch.testing.assert_close(model.forward(batch, silent), model.forward(bare))
    first = {names[0]: lambda x, positions: x * 2}
    assert torch.equal(model.capture(batch, names[:1], first)[names[0]], 2 * found[names[0]])
    with pytest.raises(ValueError, match=r"layers\.0\.cross_attention cannot act"):
        model.forward_from(batch, 1, model.layer_inputs(batch)[1], first)


def test_yue_has_no_cross_attention(models):
    assert models["yue"].cross_points == ()


@pytest.mark.parametrize("family", ["musicgen", "audiocraft"])
def test_steps_read_the_cross_attention_of_teacher_forcing(models, family):
    """Both halves of guidance, with the cache of generation and without any."""
    model = models[family]
    for point in model.cross_points:
        seen = []

        def read(x, positions, seen=seen):
            seen.append(x.clone())
            return x

        _, codes = model.generate([CAPTIONS[0]], SECONDS, 5, {point.name: read}, 3.0)
        both = model.with_captions(codes.repeat(2, 1, 1), [CAPTIONS[0], None])
        forced = model.capture(both, [point.name])[point.name]
        stepped = torch.cat(seen, 1)[:, 1 : codes.shape[-1] + 1]
        torch.testing.assert_close(stepped, forced, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", LANGUAGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength_0_is_byte_equal_at_every_hook_point(checkpoints, models, family, dtype):
    model = models[family] if dtype == torch.float32 else load(checkpoints[family], dtype=dtype)
    batch = model.encode(noise(model), [CAPTIONS[0], None])
    names = [point.name for point in places(model)]
    logits, streams, loss = model.forward(batch), model.capture(batch, names), model.loss(batch)
    made = model.generate([CAPTIONS[0]], SECONDS, 5, guidance_scale=3.0)
    for point in places(model):
        nothing = hook_at(model, point, 0.0)
        assert torch.equal(model.forward(batch, nothing), logits), point.name
        assert torch.equal(model.loss(batch, nothing), loss)
        for name, stream in model.capture(batch, names, nothing).items():
            assert torch.equal(stream, streams[name]), (point.name, name)
        for branch in steering.BRANCHES:
            hooks = hook_at(model, point, 0.0, branch)
            same = model.generate([CAPTIONS[0]], SECONDS, 5, hooks, guidance_scale=3.0)
            assert all(map(torch.equal, same, made)), (point.name, branch)
        # The same edit at strength 1 is no edit of nothing.
        assert not torch.equal(model.forward(batch, hook_at(model, point, 1.0)), logits)


def test_an_edit_by_nothing_is_byte_equal_with_the_librarys_own_cache(models, monkeypatch):
    """Models spread over devices generate with transformers' layers and cache."""
    model = models["musicgen"]
    monkeypatch.setattr(model.hf, "hf_device_map", {"": "cpu"}, raising=False)
    made = model.generate([CAPTIONS[0]], SECONDS, 5, guidance_scale=3.0)
    for point in places(model):
        for branch in steering.BRANCHES:
            for size in (0.0, 5.0):
                direction = torch.linspace(-size, size, point.width)
                hook = steering.change_hook(model, direction_change(direction), branch)
                so = model.generate([CAPTIONS[0]], SECONDS, 5, {point.name: hook}, 3.0)
                same = all(map(torch.equal, so, made))
                assert same == (size == 0), (point.name, branch, size)


@pytest.mark.parametrize("family", LANGUAGE)
def test_an_edit_by_nothing_is_byte_equal_in_each_half(models, family):
    """A change of 0 goes all the way through the hook, unlike strength 0, which makes no hook."""
    model = models[family]
    batch = model.encode(noise(model), [CAPTIONS[0], None])
    logits = model.forward(batch)
    made = model.generate([CAPTIONS[0]], SECONDS, 5, guidance_scale=3.0)
    for point in places(model):
        changed = {}
        for size in (0.0, 5.0):
            direction = torch.full((point.width,), size)
            direction[::2] *= -1
            for branch in steering.BRANCHES:
                halves = []
                edit = steering.change_hook(model, direction_change(direction), branch)

                def both(x, positions, edit=edit, halves=halves):
                    edited = edit(x, positions)
                    halves.append([not torch.equal(a, b) for a, b in zip(edited, x, strict=True)])
                    return edited

                hooks = {point.name: both}
                made_so = model.generate([CAPTIONS[0]], SECONDS, 5, hooks, guidance_scale=3.0)
                changed[size, branch] = torch.tensor(halves).any(0).tolist()
                if size == 0:
                    assert all(map(torch.equal, made_so, made)), (point.name, branch)
            if size == 0:
                edit = steering.change_hook(model, direction_change(direction), "both")
                assert torch.equal(model.forward(batch, {point.name: edit}), logits), point.name
        assert {b: changed[5.0, b] for b in steering.BRANCHES} == {
            "conditional": [True, False], "both": [True, True], "guidance": [False, True]
        }  # fmt: skip
        assert not any(any(changed[0.0, b]) for b in steering.BRANCHES)


def test_strength_0_is_byte_equal_at_every_hook_point_of_rave(models):
    model = models["rave"]
    batch = model.encode(noise(model))
    names = [point.name for point in model.hook_points]
    sound, streams, loss = model.reconstruct(batch), model.capture(batch, names), model.loss(batch)
    idle = []
    for point in model.hook_points:
        nothing = hook_at(model, point, 0.0)
        assert torch.equal(model.reconstruct(batch, nothing), sound), point.name
        assert torch.equal(model.loss(batch, nothing), loss)
        for name, stream in model.capture(batch, names, nothing).items():
            assert torch.equal(stream, streams[name]), (point.name, name)
        if torch.equal(model.reconstruct(batch, hook_at(model, point, 1.0)), sound):
            idle.append(point.name)
    assert idle == []


class Convolutions(TorchDispatchMode):
    """Remembers whether TF32 was allowed (in products, in cuDNN) as each convolution ran."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in str(func):
            matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
            self.seen.append((matmul.allow_tf32, cudnn.allow_tf32))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_codecs_run_without_tf32_whatever_the_rest_uses(models, family):
    """It changes about 1 % of the codes on a GPU."""
    model, audio = models[family], noise(models[family])
    with tf32(True, True):
        with Convolutions() as encoding:
            batch = model.encode(audio, [None, None])
            if family == "rave":
                latents = model.latents(batch)
        with Convolutions() as decoding:
            model.decode(latents, batch) if family == "rave" else model.decode(batch.codes)
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32
    for seen in (encoding.seen, decoding.seen):
        assert set(seen) == {(False, False)}


def test_codecs_take_bounded_chunks_on_a_gpu_and_single_clips_on_a_cpu():
    assert [len(part) for part in by_clip(torch.empty(20, 3, device="meta"))] == [8, 8, 4]
    assert [len(part) for part in by_clip(torch.empty(3, 3))] == [1, 1, 1]
    assert [len(part) for part in by_clip(torch.empty(0, 3, device="meta"))] == [0]
