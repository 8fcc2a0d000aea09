"""One training step of a universal SAE or a crosscoder, gradients by hand, codes sparse throughout.

USAE (Thasarathan et al. 2025, arXiv 2502.03714, 3.2): draw model i, encode it, decode the code for
every model, add up the losses, and let `update` decide who learns from that. Cost: one dense
product, the encoder of model i; each model adds an embedding bag (its reconstruction) and a product
sampled on the code's support (its part of the code's gradient). See sae_step for both.

Who learns is what aligns the models: if decoder j also learns from the codes of encoder i, errors
fall but the dictionary splits into latents of one model each. So the rule is an option by name.

A crosscoder on normalised activations is a TopK SAE on the models side by side: the sum of the
models' encoders is one product, and unit norm holds over all models' decoders together. Its step
is therefore sae_step.step on the joined activations; `join` and `split` go there and back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from musicscope.core.distributed import ALONE, Ranks
from musicscope.dictionaries import step as sae_step
from musicscope.dictionaries.core import largest_k
from musicscope.dictionaries.step import Aux, Codes, Weights, decode, select

RULES: dict[str, Callable[[int, int], Sequence[int]]] = {
    "paper": lambda drawn, models: (drawn,),
    "all_decoders": lambda drawn, models: range(models),
}
"""Name -> (drawn model, number of models) -> whose decoders step, beside the drawn encoder."""


class Result(NamedTuple):
    """Of one batch; losses are 0-d or 1-d tensors, so that no step waits for them."""

    encoder: tuple[Tensor, Tensor]
    """Gradients of the drawn model's W_enc [F, d] and b_enc [F]."""
    decoders: dict[int, tuple[Tensor, Tensor]]
    """Model -> gradients of its W_dec [F, d] and b_dec [d], for the models asked for."""
    losses: Tensor
    """[M] squared error a frame over the models' mean width: the unexplained share of each."""
    aux_loss: Tensor
    """AuxK's loss, summed over the models."""
    codes: Codes


@dataclass
class State:
    """What a training run carries from step to step."""

    weights: tuple[Weights, ...]
    """One a model; the encoder of model i is (W_enc, b_enc), its decoder (W_dec, b_dec)."""
    optimizer: torch.optim.Adam
    unfired: Tensor
    """[F] int64 frames since each latent last fired, in whichever model was drawn"""
    scratch: Tensor | None = None


def initial_state(
    n_latents: int, widths: Sequence[int], seed: int, device: str | torch.device
) -> State:
    """For each model decoder rows uniform on the sphere, encoder its transpose, biases 0."""
    weights = tuple(
        sae_step.initial_state(n_latents, width, seed + i, device).weights
        for i, width in enumerate(widths)
    )
    parameters = [weight for model in weights for weight in model]
    adam = torch.optim.Adam(parameters, lr=0.0, betas=(0.9, 0.999), fused=True)
    return State(weights, adam, torch.zeros(n_latents, dtype=torch.int64, device=device))


def gradients(
    weights: Sequence[Weights],
    xs: Sequence[Tensor],
    drawn: int,
    k: int,
    learning: Sequence[int],
    aux: Aux | None = None,
    scratch: Tensor | None = None,
) -> Result:
    """Losses and exact gradients for paired batches xs[j] [B, d_j], normalised.

    Loss: sum over models j of |x_j - x'_j|^2 / (B D) + aux.weight * AuxK_j, with D the mean width
    and x'_j decoded from the code of model `drawn`. Gradients: of the drawn encoder, and of the
    decoders of the models in `learning`, which must hold `drawn`. `scratch` [B, F] is reused.
    """
    own, B, F = weights[drawn], len(xs[0]), len(weights[drawn].b_enc)
    share = len(xs) / (B * sum(x.shape[1] for x in xs))  # 1 / (B D)
    centred = xs[drawn] - own.b_dec
    z = torch.addmm(own.b_enc, centred, own.W_enc.T, out=scratch)
    codes = select(z, k, "topk")

    support = torch.sparse_csr_tensor(
        codes.crow, codes.columns, torch.zeros_like(codes.values), (B, F), check_invariants=False
    )
    errors, grads = [], []
    for x, model in zip(xs, weights, strict=True):
        base = centred if model is own else x - model.b_dec
        errors.append(base - decode(codes, model.W_dec))
        grads.append(errors[-1] * (-2 * share))  # of the loss by the reconstruction
        support = torch.sparse.sampled_addmm(support, grads[-1], model.W_dec.T)  # adds up
    dz = support.values() * (codes.values > 0)

    sum_by_latent = _sum_by_latent(codes, F)
    ones = centred.new_ones(B, 1)
    encoder = sum_by_latent(centred, dz), sum_by_latent(ones, dz).squeeze(1)
    decoders = {j: (sum_by_latent(grads[j], codes.values), grads[j].sum(0)) for j in learning}
    aux_loss = z.new_zeros(())
    if aux is not None and len(aux.dead):
        aux_loss = _aux(weights, z, centred, errors, aux, encoder, decoders)
    # b_dec is also what the drawn encoder subtracts.
    decoders[drawn][1].sub_(encoder[1] @ own.W_enc)
    losses = torch.stack([error.square().sum() for error in errors]) * share
    return Result(encoder, decoders, losses, aux_loss, codes)


def _sum_by_latent(codes: Codes, F: int) -> Callable[[Tensor, Tensor], Tensor]:
    """(per row [B, d], per entry [nnz]) -> codes^T x rows with those entries, [F, d]."""
    ordered, order = codes.columns.sort(stable=True)
    ends = torch.arange(F + 1, dtype=torch.int32, device=ordered.device)
    offsets = torch.searchsorted(ordered, ends, out_int32=True)
    counts = codes.crow.diff()
    rows = torch.arange(len(counts), dtype=torch.int32, device=ordered.device)
    rows = rows.repeat_interleave(counts)[order]
    return lambda per_row, per_entry: embedding_bag(
        rows, per_row, offsets, mode="sum", per_sample_weights=per_entry[order],
        include_last_offset=True,
    )  # fmt: skip


def _aux(
    weights: Sequence[Weights],
    z: Tensor,
    centred: Tensor,
    errors: Sequence[Tensor],
    aux: Aux,
    encoder: tuple[Tensor, Tensor],
    decoders: dict[int, tuple[Tensor, Tensor]],
) -> Tensor:
    """Add AuxK's gradients (Gao et al. 2024, A.2) in place and return its loss.

    The dead latents of the drawn encoder reconstruct every model's residual, as living ones do:
    a latent that came back for one model only would never be shared. Dense over dead columns.
    """
    codes = z[:, aux.dead]
    if len(aux.dead) > aux.k:
        best = largest_k(codes, aux.k)
        codes = torch.zeros_like(codes).scatter_(1, best, codes.gather(1, best))
    codes.relu_()
    dz, loss = torch.zeros_like(codes), z.new_zeros(())
    for j, (model, error) in enumerate(zip(weights, errors, strict=True)):
        W_dec = model.W_dec[aux.dead]
        miss = codes @ W_dec - error
        variance = aux.ranks.squares(error)
        loss = loss + (miss.square().sum() / variance).nan_to_num(0.0)
        grad = miss * (2 * aux.weight / variance).nan_to_num(0.0, 0.0, 0.0)
        dz.addmm_(grad, W_dec.T)
        if j in decoders:
            decoders[j][0][aux.dead] += codes.T @ grad
    dz *= codes > 0
    encoder[0][aux.dead] += dz.T @ centred
    encoder[1][aux.dead] += dz.sum(0)
    return loss


def update(state: State, drawn: int, found: Result) -> None:
    """The drawn encoder and the decoders in `found` step; every other gradient is dropped."""
    state.optimizer.zero_grad(set_to_none=True)  # Adam leaves alone what has no gradient
    state.weights[drawn].W_enc.grad, state.weights[drawn].b_enc.grad = found.encoder
    for j, (W_dec, b_dec) in found.decoders.items():
        state.weights[j].W_dec.grad, state.weights[j].b_dec.grad = W_dec, b_dec
    state.optimizer.step()


@torch.no_grad()
def step(
    state: State,
    xs: Sequence[Tensor],
    drawn: int,
    rule: str,
    lr: float,
    k: int,
    aux_k: int = 0,
    aux_weight: float = 0.0,
    dead_after: int | None = None,
    ranks: Ranks = ALONE,
) -> Result:
    """One step in place on paired, normalised xs[j] [B, d_j] with the code of model `drawn`.

    As in sae_step.step: the gradient along each decoder row is removed, rows that stepped go back
    to unit norm, latents that fired for none of the last `dead_after` frames are dead. With several
    `ranks` xs are this rank's equal part of the batch.
    """
    aux = None
    if dead_after is not None and aux_weight > 0:
        dead = (state.unfired >= dead_after).nonzero().squeeze(1)
        aux = Aux(dead, min(aux_k, len(dead)), aux_weight, ranks)
    shape = (len(xs[0]), len(state.unfired))
    if state.scratch is None or state.scratch.shape != shape:
        state.scratch = xs[0].new_empty(shape)
    learning = RULES[rule](drawn, len(xs))
    found = gradients(state.weights, xs, drawn, k, learning, aux, state.scratch)
    decoders = [tensor for j in sorted(found.decoders) for tensor in found.decoders[j]]
    ranks.average_(*found.encoder, *decoders, found.losses, found.aux_loss)
    for j, (W_grad, _) in found.decoders.items():
        W_dec = state.weights[j].W_dec
        W_grad.addcmul_(torch.einsum("fd,fd->f", W_grad, W_dec).unsqueeze(1), W_dec, value=-1)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    update(state, drawn, found)
    for j in found.decoders:
        W_dec = state.weights[j].W_dec
        W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True))
    state.unfired += len(xs[0]) * ranks.size
    state.unfired[found.codes.columns[found.codes.values > 0].long()] = 0
    ranks.minimum_(state.unfired)
    return found


def join(xs: Sequence[Tensor]) -> Tensor:
    """Paired rows xs[j] [B, d_j] side by side, [B, sum d_j]: what a crosscoder's step takes."""
    return torch.cat(tuple(xs), dim=1)


def split(joined: Weights, widths: Sequence[int]) -> tuple[Weights, ...]:
    """The weights of a crosscoder's step, one part a model; the encoder bias is shared out."""
    W_enc, W_dec = (w.split(list(widths), dim=1) for w in (joined.W_enc, joined.W_dec))
    b_dec, b_enc = joined.b_dec.split(list(widths)), joined.b_enc / len(widths)
    return tuple(
        Weights(e.contiguous(), b_enc.clone(), d.contiguous(), b.clone())
        for e, d, b in zip(W_enc, W_dec, b_dec, strict=True)
    )
