"""The hand-written gradients against autograd through a dense, obviously right SAE."""

from __future__ import annotations

import pytest
import torch

from musicscope.dictionaries.step import Aux, Weights, gradients, initial_state, step

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


def dense_loss(weights, x, k, activation, aux):
    """The textbook computation: dense codes, dense decode, autograd for everything."""
    B, d = x.shape
    z = torch.relu((x - weights.b_dec) @ weights.W_enc.T + weights.b_enc)
    if activation == "topk":
        best = z.topk(k).indices
        codes = torch.zeros_like(z).scatter(1, best, z.gather(1, best))
    else:
        codes = z * (z >= z.flatten().topk(B * k).values.min())
    error = x - (codes @ weights.W_dec + weights.b_dec)
    loss = error.square().sum() / (B * d)
    if aux is not None:
        residual = error.detach()
        dead = torch.full_like(z, -torch.inf)
        dead[:, aux.dead] = z[:, aux.dead]
        best = dead.topk(aux.k).indices
        codes = torch.zeros_like(z).scatter(1, best, z.gather(1, best))
        miss = (codes @ weights.W_dec - residual).square().sum(1).mean()
        variance = (residual - residual.mean(0)).square().sum(1).mean()
        loss = loss + aux.weight * miss / variance
    return loss


def random_weights(F, d, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)  # noqa: E731
    W_dec = torch.nn.functional.normalize(draw(F, d), dim=1)
    return Weights(draw(F, d) / d**0.5, 0.1 * draw(F), W_dec, 0.3 * draw(d)), draw


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
@pytest.mark.parametrize(
    ("n_dead", "aux_k"), [(0, 0), (5, 12), (40, 12)], ids=["no aux", "few dead", "many dead"]
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["f64", "f32"]
)
def test_gradients_equal_autograd(activation, n_dead, aux_k, dtype, tolerance):
    weights, draw = random_weights(192, 24, dtype)
    x = draw(64, 24) + 0.5
    aux = Aux(torch.arange(3, 3 + n_dead), min(aux_k, n_dead), 1 / 32) if n_dead else None
    leaves = Weights(*(w.clone().requires_grad_() for w in weights))
    loss = dense_loss(leaves, x, 6, activation, aux)
    loss.backward()
    result = gradients(weights, x, 6, activation, aux)
    total = result.loss + (aux.weight * result.aux_loss if aux else 0.0)
    torch.testing.assert_close(total, loss.detach(), rtol=tolerance, atol=tolerance)
    for name, ours, leaf in zip(Weights._fields, result.gradients, leaves, strict=True):
        scale = leaf.grad.abs().max()
        assert scale > 0
        assert (ours - leaf.grad).abs().max() <= tolerance * max(1.0, scale.item()), name


def test_rows_with_fewer_positive_latents_than_k():
    """Kept latents at or below 0 must get no gradient: ReLU's is 0 there."""
    weights, draw = random_weights(64, 8, torch.float64)
    weights = weights._replace(b_enc=torch.full((64,), -1.2, dtype=torch.float64))
    x = draw(32, 8)
    leaves = Weights(*(w.clone().requires_grad_() for w in weights))
    dense_loss(leaves, x, 16, "topk", None).backward()
    result = gradients(weights, x, 16)
    assert (result.codes.values == 0).any()
    for ours, leaf in zip(result.gradients, leaves, strict=True):
        torch.testing.assert_close(ours, leaf.grad, rtol=1e-11, atol=1e-13)


def test_aux_leaves_living_latents_and_the_codes_alone():
    weights, draw = random_weights(96, 16, torch.float64)
    x = draw(32, 16)
    plain = gradients(weights, x, 4)
    dead = torch.tensor([7, 50])
    helped = gradients(weights, x, 4, aux=Aux(dead, 2, 1.0))
    changed = (plain.gradients.W_dec != helped.gradients.W_dec).any(1)
    assert changed.nonzero().squeeze(1).tolist() == dead.tolist()
    assert torch.equal(plain.codes.values, helped.codes.values)


def test_aux_ignores_the_decoder_bias():
    """Moving b_dec and the data together changes nothing: the bias is not added a second time."""
    weights, draw = random_weights(96, 16, torch.float64)
    x, shift = draw(32, 16), draw(16)
    aux = Aux(torch.arange(10), 4, 1.0)
    moved = weights._replace(b_dec=weights.b_dec + shift)
    first, second = gradients(weights, x, 4, aux=aux), gradients(moved, x + shift, 4, aux=aux)
    torch.testing.assert_close(first.aux_loss, second.aux_loss)


def test_step_keeps_the_decoder_unit_norm_and_counts_silence():
    state = initial_state(128, 16, seed=1, device="cpu")
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(2))
    result = step(state, x, lr=1e-2, k=2)
    torch.testing.assert_close(state.weights.W_dec.norm(dim=1), torch.ones(128))
    fired = torch.zeros(128, dtype=torch.bool)
    fired[result.codes.columns[result.codes.values > 0].long()] = True
    assert fired.any()
    assert not fired.all()
    assert torch.equal(state.unfired, torch.where(fired, 0, 64))


def test_step_reports_nan_in_its_loss():
    state = initial_state(128, 16, seed=1, device="cpu")
    x = torch.randn(64, 16)
    x[3, 2] = torch.nan
    assert torch.isnan(step(state, x, lr=1e-3, k=4).loss)
