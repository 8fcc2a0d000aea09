"""The hand-written gradients against autograd, and what each update rule leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch

from musicscope.dictionaries import step as sae_step
from musicscope.dictionaries.step import Aux, Weights
from musicscope.dictionaries.usae_step import RULES, gradients, initial_state, join, split, step

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

WIDTHS, F, B, K = (24, 16, 40), 192, 64, 6


def dense_loss(weights, xs, drawn, k, aux):
    """The textbook computation: dense codes, dense decodes, autograd for everything."""
    own, D = weights[drawn], sum(x.shape[1] for x in xs) / len(xs)
    z = torch.relu((xs[drawn] - own.b_dec) @ own.W_enc.T + own.b_enc)
    best = z.topk(k).indices
    codes = torch.zeros_like(z).scatter(1, best, z.gather(1, best))
    loss = 0.0
    for x, model in zip(xs, weights, strict=True):
        error = x - (codes @ model.W_dec + model.b_dec)
        loss = loss + error.square().sum() / (len(x) * D)
        if aux is not None:
            residual = error.detach()
            dead = torch.full_like(z, -torch.inf)
            dead[:, aux.dead] = z[:, aux.dead]
            best = dead.topk(aux.k).indices
            kept = torch.zeros_like(z).scatter(1, best, z.gather(1, best))
            miss = (kept @ model.W_dec - residual).square().sum()
            loss = loss + aux.weight * miss / (residual - residual.mean(0)).square().sum()
    return loss


def random_weights(dtype, widths=WIDTHS, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)  # noqa: E731
    unit = lambda w: torch.nn.functional.normalize(w, dim=1)  # noqa: E731
    weights = tuple(
        Weights(draw(F, d) / d**0.5, 0.1 * draw(F), unit(draw(F, d)), 0.3 * draw(d)) for d in widths
    )
    return weights, [draw(B, d) + 0.5 for d in widths]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("n_dead", "aux_k"), [(0, 0), (5, 12), (40, 12)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["f64", "f32"]
)
def test_gradients_equal_autograd(rule, n_dead, aux_k, dtype, tolerance):
    """Three models of different widths; the drawn encoder and whichever decoders the rule names."""
    weights, xs = random_weights(dtype)
    drawn = 1
    aux = Aux(torch.arange(3, 3 + n_dead), min(aux_k, n_dead), 1 / 32) if n_dead else None
    leaves = tuple(Weights(*(w.clone().requires_grad_() for w in model)) for model in weights)
    loss = dense_loss(leaves, xs, drawn, K, aux)
    loss.backward()
    found = gradients(weights, xs, drawn, K, RULES[rule](drawn, 3), aux)
    total = found.losses.sum() + (aux.weight * found.aux_loss if aux else 0.0)
    torch.testing.assert_close(total, loss.detach(), rtol=tolerance, atol=tolerance)
    assert sorted(found.decoders) == ([drawn] if rule == "paper" else [0, 1, 2])
    pairs = list(zip(found.encoder, leaves[drawn][:2], strict=True))
    for j, parts in found.decoders.items():
        pairs += zip(parts, leaves[j][2:], strict=True)
    for ours, leaf in pairs:
        scale = leaf.grad.abs().max()
        assert scale > 0
        assert (ours - leaf.grad).abs().max() <= tolerance * max(1.0, scale.item())
    assert all(leaves[j].W_enc.grad is None for j in (0, 2))


def test_latents_at_or_below_zero_get_no_gradient():
    weights, xs = random_weights(torch.float64)
    weights = tuple(w._replace(b_enc=torch.full((F,), -1.6, dtype=torch.float64)) for w in weights)
    leaves = tuple(Weights(*(w.clone().requires_grad_() for w in model)) for model in weights)
    dense_loss(leaves, xs, 0, 40, None).backward()
    found = gradients(weights, xs, 0, 40, (0,))
    assert (found.codes.values == 0).any()
    torch.testing.assert_close(found.encoder[0], leaves[0].W_enc.grad, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found.decoders[0][0], leaves[0].W_dec.grad, rtol=1e-11, atol=1e-13)


def snapshot(state):
    """Every weight with its Adam moments and step count, by (model, name)."""
    return {
        (j, name): [w.clone(), *copy.deepcopy(list(state.optimizer.state[w].values()))]
        for j, model in enumerate(state.weights)
        for name, w in zip(Weights._fields, model, strict=True)
    }


@pytest.mark.parametrize("rule", RULES)
def test_a_step_changes_what_the_rule_names_and_nothing_else(rule):
    state = initial_state(F, WIDTHS, seed=1, device="cpu")
    xs = [x.float() for x in random_weights(torch.float64)[1]]
    for drawn in (0, 1, 2, 0):  # so that every moment exists
        step(state, xs, drawn, rule, 1e-2, K, 8, 1 / 32, dead_after=2 * B)
    before = snapshot(state)
    step(state, xs, 1, rule, 1e-2, K, 8, 1 / 32, dead_after=2 * B)
    after = snapshot(state)
    changed = {key for key in before if not all(map(torch.equal, before[key], after[key]))}
    decoders = (1,) if rule == "paper" else (0, 1, 2)
    expected = {(1, "W_enc"), (1, "b_enc")}
    assert changed == expected | {(j, n) for j in decoders for n in ("W_dec", "b_dec")}
    for model in state.weights:
        torch.testing.assert_close(model.W_dec.norm(dim=1), torch.ones(F))


def test_one_model_is_an_ordinary_sae():
    """With M = 1 both rules are the step of sae_step, weights equal after some steps."""
    x = random_weights(torch.float32, (24,))[1][0]
    theirs = sae_step.initial_state(F, 24, 3, "cpu")
    ours = initial_state(F, (24,), 3, "cpu")
    for _ in range(5):
        sae_step.step(theirs, x, 1e-2, K, aux_k=8, aux_weight=1 / 32, dead_after=2 * B)
        step(ours, [x], 0, "paper", 1e-2, K, 8, 1 / 32, dead_after=2 * B)
    for a, b in zip(theirs.weights, ours.weights[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert torch.equal(theirs.unfired, ours.unfired)


def test_step_counts_silence_whichever_model_is_drawn():
    state = initial_state(F, WIDTHS, seed=1, device="cpu")
    xs = random_weights(torch.float32)[1]
    silent = torch.ones(F, dtype=torch.bool)
    for drawn in (0, 2):
        found = step(state, xs, drawn, "paper", 0.0, 2)
        silent[found.codes.columns[found.codes.values > 0].long()] = False
    assert silent.any()
    assert torch.equal(state.unfired == 2 * B, silent)


def test_a_crosscoder_is_the_sum_of_encoders_and_one_decoder_a_model():
    """`split` of the joined SAE computes what the joined SAE does, to the last decode."""
    g = torch.Generator().manual_seed(0)
    xs = [torch.randn(B, d, generator=g) for d in WIDTHS]
    state = sae_step.initial_state(F, sum(WIDTHS), 0, "cpu")
    for _ in range(3):
        result = sae_step.step(state, join(xs), 1e-2, K)
    joined = state.weights
    parts = split(joined, WIDTHS)
    z = sum((x - p.b_dec) @ p.W_enc.T + p.b_enc for x, p in zip(xs, parts, strict=True))
    torch.testing.assert_close(z, (join(xs) - joined.b_dec) @ joined.W_enc.T + joined.b_enc)
    norms = sum(p.W_dec.square().sum(1) for p in parts)
    torch.testing.assert_close(norms, torch.ones(F))
    dense = torch.randn(B, F, generator=g)
    out = join([dense @ p.W_dec + p.b_dec for p in parts])
    torch.testing.assert_close(out, dense @ joined.W_dec + joined.b_dec, rtol=1e-5, atol=1e-4)
    assert result.loss.isfinite()
