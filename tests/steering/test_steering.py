"""Edits of codes in generation: exact, on the right rows and frames, and nothing at strength 0."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from musicscope.dictionaries.core import TopKSAE
from musicscope.models.interface import chain
from musicscope.models.registry import load_model
from musicscope.steering import conditions
from musicscope.steering import edit as st
from musicscope.steering.subjects import edit_prompt
from tests.conftest import CAPTIONS
from tests.support.steered import LATENTS, LAYER, PUSH, WIDTH, K, random_sae

PROMPTS = [CAPTIONS[0], CAPTIONS[2], None]
TOKEN = 5


@pytest.fixture(scope="module")
def model(tiny_musicgen):
    return load_model(tiny_musicgen)


@pytest.fixture(scope="module")
def planted(model) -> TopKSAE:
    """A random SAE with latent PUSH along the gradient of token TOKEN's logit."""
    sae = random_sae(1)
    core = model.hf.decoder.model.decoder
    direction = core.layer_norm.weight * model.hf.decoder.lm_heads[0].weight[TOKEN]
    direction = (direction - direction.mean()).detach()
    direction = direction / direction.norm()
    W_enc, W_dec = sae.W_enc.clone(), sae.W_dec.clone()
    W_enc[PUSH], W_dec[PUSH] = direction, direction
    return TopKSAE(W_enc, torch.zeros(LATENTS), W_dec, torch.zeros(WIDTH), K)


def fake(rows: int | None = None, rate: float = 50.0):
    """As much of a model as a hook asks for; `rows` captioned rows of guided generation."""
    return SimpleNamespace(
        conditional_rows=slice(None) if rows is None else slice(0, rows), frame_rate=rate
    )


def dense(sae: TopKSAE, x: torch.Tensor) -> torch.Tensor:
    values, indices = sae.encode(x)
    return torch.zeros(len(x), sae.n_latents).scatter_add_(1, indices, values)


def activations(rows: int = 4, frames: int = 6, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(rows, frames, WIDTH, generator=generator)


def edited_by(sae, concepts, x, rows=None, branch="conditional", schedule=st.ALWAYS, first=1):
    """The hook's answer to x [rows, S, d], frames at positions first, first + 1."""
    steering = st.Steering(sae, tuple(concepts), branch, schedule)
    hook = st.steering_hook(fake(rows), steering)
    return hook(x, torch.arange(first, first + x.shape[1]))


def fires(sae: TopKSAE, x: torch.Tensor, n: int) -> tuple[int, ...]:
    """The n latents that fire most in x: edits of others would prove nothing."""
    return tuple(dense(sae, x.flatten(0, 1)).gt(0).sum(0).argsort(descending=True)[:n].tolist())


@pytest.mark.parametrize(
    ("rows", "latents", "k"), [(5, 96, 8), (3, 1024, 32), (2, 100, 7), (4, 64, 9)]
)
def test_the_kth_largest_is_that_of_a_sort(rows, latents, k):
    generator = torch.Generator().manual_seed(rows)
    for z in (
        torch.randn(rows, latents, generator=generator),
        torch.randint(0, 5, (rows, latents), generator=generator).float(),  # ties
    ):
        wanted = z.sort(1, descending=True).values[:, k - 1 : k]
        assert torch.equal(st.kth_largest(z, k), wanted)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("strength", [1.0, 2.5, -0.5])
def test_what_is_added_is_the_difference_of_two_dense_decodes(activation, strength):
    sae, x = random_sae(activation=activation), activations()
    a, b, c, d, e = fires(sae, x, 5)
    rare = int(dense(sae, x.flatten(0, 1)).gt(0).sum(0).argmin())
    edits = (
        st.Edit((a, b), "ablate"),
        st.Edit((c,), "scale", (3.0,)),
        st.Edit((d, rare), "set", (1.5, 2.0)),
        st.Edit((e,), "clamp_min", (2.0,)),
    )
    before = dense(sae, x.flatten(0, 1))
    target = before.clone()
    target[:, [a, b]] = 0
    target[:, c] *= 3
    target[:, d], target[:, rare] = 1.5, 2.0
    target[:, e] = target[:, e].clamp(min=2.0)
    after = before + strength * (target - before)
    assert min((before[:, f] > 0).sum() for f in (a, b, c, d, e)) > 0
    wanted = (after @ sae.W_dec + sae.b_dec) - (before @ sae.W_dec + sae.b_dec)
    got = edited_by(sae, [st.ConceptEdit("x", edits, strength)], x) - x
    torch.testing.assert_close(got.flatten(0, 1), wanted, atol=1e-5, rtol=0)


def test_strength_0_gives_the_same_activations_and_the_same_tokens(model, planted):
    edit = (st.Edit((PUSH, 3), "set", (50.0, 50.0)),)
    gate = st.Gate((3,), (1.0,), 0.0, 0.1)
    nothing = (st.ConceptEdit("a", edit, 0.0), st.ConceptEdit("b", edit, 0.0, gate))
    hook = st.steering_hook(model, st.Steering(planted, nothing))
    x = activations()
    assert hook(x, torch.arange(6)) is x
    _, plain = model.generate(PROMPTS, 0.24, seed=7)
    _, same = model.generate(PROMPTS, 0.24, seed=7, hooks={LAYER: hook})
    assert torch.equal(plain, same)
    strong = st.Steering(planted, (st.ConceptEdit("a", edit, 1.0),))
    _, other = model.generate(PROMPTS, 0.24, 7, {LAYER: st.steering_hook(model, strong)})
    assert not torch.equal(plain, other)


def share_of_token(model, hook, seed=0) -> float:
    _, codes = model.generate([CAPTIONS[0]] * 24, 1.0, seed, {LAYER: hook} if hook else None)
    return (codes[:, 0] == TOKEN).float().mean().item()


def test_a_planted_latent_switches_its_token_on_and_off(model, planted):
    """And guidance counts the edit as it should: its scale, once, its scale less one."""

    def push(op, values, strength, branch):
        edit = st.ConceptEdit("token", (st.Edit((PUSH,), op, values),), strength)
        return st.steering_hook(model, st.Steering(planted, (edit,), branch))

    plain = share_of_token(model, None)
    up = {b: share_of_token(model, push("clamp_min", (20.0,), 1.0, b)) for b in st.BRANCHES}
    assert up["conditional"] > up["guidance"] > up["both"] > plain
    # Off: first make sure that there is something to remove, with a hook that always adds it.
    adds = st.change_hook(model, conditions.direction_change(60 * planted.W_dec[PUSH]), "both")
    present = share_of_token(model, adds)
    ablated = share_of_token(model, chain(adds, push("ablate", (), 1.0, "both")))
    assert present > plain + 0.1
    assert ablated < 0.5 * present


def test_branches_act_on_their_rows():
    sae, x = random_sae(), activations(rows=4)
    concept = [st.ConceptEdit("x", (st.Edit(fires(sae, x, 3), "scale", (4.0,) * 3),))]
    everywhere = edited_by(sae, concept, x) - x
    assert everywhere.flatten(1).norm(dim=1).min() > 0
    got = {b: edited_by(sae, concept, x, 2, b) - x for b in st.BRANCHES}
    close = dict(atol=1e-6, rtol=0)
    torch.testing.assert_close(got["both"], everywhere, **close)
    torch.testing.assert_close(got["conditional"][:2], everywhere[:2], **close)
    assert not got["conditional"][2:].any()
    # The unconditional halves get the opposite of what their captioned twins would have got.
    assert not got["guidance"][:2].any()
    torch.testing.assert_close(got["guidance"][2:], -everywhere[:2], **close)
    with pytest.raises(ValueError, match="guidance_scale above 1"):
        edited_by(sae, concept, x, None, "guidance")


def test_only_frames_of_the_schedule_are_edited_and_never_the_start_column():
    sae, x = random_sae(), activations(frames=12)
    concept = [st.ConceptEdit("x", (st.Edit(fires(sae, x, 4), "ablate"),), 2.0)]
    whole = edited_by(sae, concept, x, first=0)
    assert torch.equal(whole[:, 0], x[:, 0])
    # 0.1 s is frame 5 at 50 Hz, which stands at position 6; 0.16 s is frame 8.
    part = edited_by(sae, concept, x, first=0, schedule=(0.1, 0.16))
    changed = (part != x).flatten(2).any(2).any(0)
    assert changed.nonzero().flatten().tolist() == [6, 7, 8]
    torch.testing.assert_close(part[:, 6:9], whole[:, 6:9], atol=1e-6, rtol=0)
    outside = edited_by(sae, concept, x, schedule=(9.0, math.inf))
    assert outside is x


def test_joint_edits_add_up_and_share_latents_without_counting_twice():
    sae, x = random_sae(), activations()
    a, b, c = fires(sae, x, 3)
    off = st.ConceptEdit("off", (st.Edit((a, b), "ablate"),), 1.5)
    on = st.ConceptEdit("on", (st.Edit((c,), "clamp_min", (3.0,)),), 0.5)
    parts = [edited_by(sae, [concept], x) - x for concept in (off, on)]
    joint = edited_by(sae, [off, on], x) - x
    torch.testing.assert_close(joint, parts[0] + parts[1], atol=1e-5, rtol=0)
    once = st.ConceptEdit("once", (st.Edit((a,), "ablate"),))
    twice = edited_by(sae, [once, st.ConceptEdit("again", once.edits)], x)
    torch.testing.assert_close(twice, edited_by(sae, [once], x), atol=1e-6, rtol=0)
    raised = st.ConceptEdit("raise", (st.Edit((a,), "set", (2.0,)),))
    torch.testing.assert_close(
        edited_by(sae, [once, raised], x), edited_by(sae, [raised], x), atol=1e-5, rtol=0
    )


def test_running_means_are_those_of_the_formula_step_by_step_or_at_once():
    values = torch.rand(3, 7, 2, generator=torch.Generator().manual_seed(0))
    decay = 0.8
    wanted = []
    for t in range(7):
        weights = decay ** torch.arange(t, -1, -1.0)
        wanted.append((weights[:, None] * values[:, : t + 1]).sum(1) / weights.sum())
    at_once = st.running_means(decay)(values, torch.arange(1, 8))
    torch.testing.assert_close(at_once, torch.stack(wanted, 1))
    follow = st.running_means(decay)
    for _ in range(2):  # the second round is another generation: it must start anew
        steps = [follow(values[:, t : t + 1], torch.tensor([t + 1])) for t in range(7)]
        torch.testing.assert_close(torch.cat(steps, 1), at_once)
    torch.testing.assert_close(follow(values[:2, 2:3], torch.tensor([8])), values[:2, 2:3])


def one_latent_sae() -> TopKSAE:
    """Latent f reads and writes dimension f; all may fire."""
    eye = torch.eye(4)
    return TopKSAE(eye, torch.zeros(4), eye, torch.zeros(4), k=4)


def test_a_gate_edits_only_while_it_hears_something_to_change():
    """Latent 0 is the evidence, latent 1 the edited one; it sounds from frame 4 to 7."""
    sae = one_latent_sae()
    x = torch.ones(2, 12, 4)
    x[0, :, 0] = 0.0
    x[0, 4:8, 0] = 2.0
    x[1, :, 0] = 0.0  # never
    edit = (st.Edit((1,), "ablate"),)
    positions = torch.arange(1, 13)

    def run(opens: str) -> torch.Tensor:
        gate = st.Gate((0,), (1.0,), -1.0, seconds=0.02, opens=opens)
        steering = st.Steering(sae, (st.ConceptEdit("x", edit, 1.0, gate),))
        at_once = st.steering_hook(fake(), steering)(x, positions)
        hook = st.steering_hook(fake(), steering)
        steps = [hook(x[:, t : t + 1], positions[t : t + 1]) for t in range(12)]
        assert torch.equal(torch.cat(steps, 1), at_once)
        return at_once[..., 1] == 0

    # With a time constant of one frame the mean passes 1 at once, and is below 1 one frame after.
    edited = run("present")
    assert edited[0].nonzero().flatten().tolist() == [4, 5, 6, 7]
    assert not edited[1].any()
    assert torch.equal(run("absent"), ~edited)


def test_captioned_rows_decide_for_their_unconditional_halves():
    sae = one_latent_sae()
    x = torch.ones(4, 1, 4)
    x[0, :, 0], x[3, :, 0] = 5.0, 5.0
    gate = st.Gate((0,), (1.0,), -2.0, seconds=1.0)
    concept = [st.ConceptEdit("x", (st.Edit((1,), "ablate"),), 1.0, gate)]
    got = edited_by(sae, concept, x, rows=2, branch="both")
    assert (got[:, 0, 1] == 0).tolist() == [True, False, True, False]
    assert edited_by(sae, concept, x[1:2], None) is not None
    closed = x[1:2]
    assert edited_by(sae, concept, closed) is closed  # nothing open: nothing computed further


@pytest.mark.parametrize("strengths", [(1.0, 1.0, 1.0), (0.5, 2.0, 1.0)])
def test_concepts_apart_edited_together_are_edited_as_one_after_the_other(strengths):
    sae, x = random_sae(), activations()
    a, b, c, d = fires(sae, x, 2), fires(sae, x, 4)[2:], fires(sae, x, 6)[4:], fires(sae, x, 7)[6:]
    first, second, third = strengths
    concepts = [
        st.ConceptEdit("a", (st.Edit(a, "ablate"), st.Edit(b, "clamp_min", (3.0, 4.0))), first),
        st.ConceptEdit("c", (st.Edit(c, "ablate"),), second),
        st.ConceptEdit("d", (st.Edit(d, "clamp_min", (2.0,)),), third),
    ]
    args = (torch.arange(1, 7), 4)
    together = st.code_change(sae, concepts, 50.0)(x, *args)
    apart = sum(st.code_change(sae, [concept], 50.0)(x, *args) for concept in concepts)
    torch.testing.assert_close(together, apart)
    assert len(st._steps(concepts)) == 2
    # A latent with two edits: in the order given.
    clash = [concepts[0], st.ConceptEdit("e", (st.Edit(a, "set", (1.0, 1.0)),), 1.0)]
    assert len(st._steps(clash)) == 2
    assert not torch.equal(
        st.code_change(sae, clash, 50.0)(x, *args), st.code_change(sae, clash[::-1], 50.0)(x, *args)
    )


def test_passthrough_is_the_reconstruction_and_no_edit_is_not(model, planted):
    sae, x = random_sae(), activations()
    passthrough = st.change_hook(fake(), conditions.reconstruction_change(sae), "both")
    positions = torch.arange(1, 7)
    torch.testing.assert_close(passthrough(x, positions), sae.reconstruct(x), atol=1e-5, rtol=0)
    _, plain = model.generate(PROMPTS, 0.24, 7)
    hook = st.change_hook(model, conditions.reconstruction_change(planted), "both")
    _, through = model.generate(PROMPTS, 0.24, 7, {LAYER: hook})
    assert not torch.equal(plain, through)
    perfect = one_latent_sae()
    y = torch.rand(2, 3, 4)  # above 0: four latents say all of it
    same = st.change_hook(fake(), conditions.reconstruction_change(perfect), "both")
    torch.testing.assert_close(same(y, torch.arange(1, 4)), y)


def test_the_random_direction_has_the_length_of_the_edit_at_every_frame():
    sae, x = random_sae(), activations()
    concepts = [st.ConceptEdit("x", (st.Edit(fires(sae, x, 2), "ablate"),), 2.0)]
    change = st.code_change(sae, concepts, 50.0)
    direction = conditions.random_direction(WIDTH, 1)
    args = (x, torch.arange(1, 7), 4)
    ours, theirs = change(*args), conditions.matched_change(change, 7 * direction)(*args)
    torch.testing.assert_close(theirs.norm(dim=-1), ours.norm(dim=-1))
    some = ours.norm(dim=-1) > 0
    assert some.any()
    cosine = torch.cosine_similarity(theirs[some], direction.expand_as(theirs[some]), dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    assert torch.equal(direction, conditions.random_direction(WIDTH, 1))
    assert not torch.equal(direction, conditions.random_direction(WIDTH, 2))


def test_random_features_are_others_of_like_activity():
    rng = np.random.default_rng(0)
    activity = rng.lognormal(0, 3, 400)
    activity[::5] = 0.0
    chosen, avoid = (1, 2, 3, 4, 6), tuple(range(1, 30))
    drawn = conditions.random_features(activity, chosen, avoid, seed=1)
    assert len(set(drawn)) == len(chosen)
    assert not set(drawn) & set(avoid)
    assert (activity[list(drawn)] > 0).all()
    ratio = np.log(activity[list(drawn)] / activity[list(chosen)])
    assert np.abs(ratio).max() < 0.7  # of values that span a factor of exp(18)
    assert drawn == conditions.random_features(activity, chosen, avoid, seed=1)
    assert drawn != conditions.random_features(activity, chosen, avoid, seed=2)
    with pytest.raises(ValueError, match="1 live latents left"):
        conditions.random_features(np.array([1.0, 1, 1, 0, 0]), (0, 1), (), seed=0)


def test_wishes_in_words():
    assert edit_prompt("slow flute music.", {"guitar": "on"}) == ("slow flute music with guitar")
    wishes = {"guitar": "off", "electric_piano": "on", "organ": "on", "drums": "off"}
    assert edit_prompt("flute", wishes) == (
        "flute with electric piano and organ, no guitar, no drums"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: st.Edit((1,), "double"), "known ablate, scale, set, clamp_min"),
        (lambda: st.Edit((1, 1), "ablate"), "each once"),
        (lambda: st.Edit((1, 2), "set", (1.0,)), "a finite value for each of 2"),
        (lambda: st.Edit((1,), "set", (math.nan,)), "a finite value"),
        (lambda: st.Gate((1,), (), 0.0, 1.0), "0 weights for 1"),
        (lambda: st.Steering(random_sae(), (), "left"), "known conditional, both, guidance"),
        (
            lambda: st.Steering(
                random_sae(), (st.ConceptEdit("x", (st.Edit((LATENTS,), "ablate"),)),)
            ),
            "latents must lie in 0..95",
        ),
        (lambda: st.change_hook(fake(), None, "both", (2.0, 1.0)), "schedule"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
