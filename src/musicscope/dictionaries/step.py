"""One training step of a TopK SAE, gradients by hand, codes sparse throughout.

Cost: one dense product (encode); everything else touches the active latents only.

* decode and both weight gradients are embedding bags: over a row's latents, and over a latent's
  rows (codes sorted by latent, i.e. the product CSR^T x dense, which runs 2-10x faster here as a
  bag than through MKL's transposed CSR product);
* the gradient of the codes is needed on their support only: torch.sparse.sampled_addmm;
* no gradient flows to the input: b_dec's through the encoder is -(sum_b dz_b) W_enc;
* AuxK (Gao et al. 2024, A.2) gathers the columns of the pre-activations that belong to dead
  latents, so its cost is proportional to their number and it needs no second encode.

int32 indices: half the memory traffic, and the width MKL takes without converting.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from musicscope.core.distributed import ALONE, Ranks
from musicscope.dictionaries.core import largest_k

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


class Weights(NamedTuple):
    """Parameters, or gradients, of an SAE on centred and scaled activations."""

    W_enc: Tensor
    """[F, d]"""
    b_enc: Tensor
    """[F]"""
    W_dec: Tensor
    """[F, d], unit rows"""
    b_dec: Tensor
    """[d]"""


class Codes(NamedTuple):
    """Sparse codes [B, F] in CSR form."""

    crow: Tensor
    """[B + 1] int32: row b holds entries crow[b] to crow[b + 1]"""
    columns: Tensor
    """[nnz] int32 latent of each entry"""
    values: Tensor
    """[nnz] activation of each entry, >= 0"""


class Aux(NamedTuple):
    """What AuxK needs to know."""

    dead: Tensor
    """[n] int64 latents that count as dead"""
    k: int
    """how many of them reconstruct each residual"""
    weight: float
    """of the loss; 1/32 in the paper"""
    ranks: Ranks = ALONE
    """whose residuals' variance counts"""


class Result(NamedTuple):
    """Of one batch: gradients, losses (0-d tensors, so that no step waits for them), codes."""

    gradients: Weights
    loss: Tensor
    """squared error per frame and dimension; on data of unit variance the unexplained share"""
    aux_loss: Tensor
    codes: Codes


def select(z: Tensor, k: int, activation: str) -> Codes:
    """Codes of pre-activations z [B, F]: the k largest a row, or B*k over the batch; then ReLU."""
    B = len(z)
    if activation == "topk":
        columns = largest_k(z, k)
        crow = torch.arange(0, B * k + 1, k, dtype=torch.int32, device=z.device)
        return Codes(crow, columns.reshape(-1).int(), z.gather(1, columns).reshape(-1).relu_())
    flat = z.reshape(-1)
    if z.is_cuda:
        kth = flat.topk(B * k, sorted=False).values.min()
    else:
        kth = torch.as_tensor(np.partition(flat.numpy(), -B * k)[-B * k])
    rows, columns = ((z >= kth) & (z > 0)).nonzero().unbind(1)
    crow = torch.searchsorted(rows, torch.arange(B + 1, device=z.device), out_int32=True)
    return Codes(crow, columns.int(), z[rows, columns])


def decode(codes: Codes, W_dec: Tensor) -> Tensor:
    """codes x W_dec, [B, d]."""
    return embedding_bag(
        codes.columns, W_dec, codes.crow, mode="sum", per_sample_weights=codes.values,
        include_last_offset=True,
    )  # fmt: skip


def _aux(
    weights: Weights, z: Tensor, centred: Tensor, error: Tensor, aux: Aux, out: Weights
) -> Tensor:
    """Add AuxK's gradients to `out` (all but b_dec's) and return its loss.

    Dead latents reconstruct the residual e = x - x' (a constant, without the decoder bias, which
    e no longer holds); squared error over the residual's own variance. Dense over the dead
    columns: AuxK keeps so many of them (d/2) that a sparse product would be slower.
    """
    codes = z[:, aux.dead]
    if len(aux.dead) > aux.k:
        best = largest_k(codes, aux.k)
        codes = torch.zeros_like(codes).scatter_(1, best, codes.gather(1, best))
    codes.relu_()
    W_dec = weights.W_dec[aux.dead]
    miss = codes @ W_dec - error
    variance = aux.ranks.squares(error)
    loss = (miss.square().sum() / variance).nan_to_num(0.0)
    grad = miss * (2 * aux.weight / variance).nan_to_num(0.0, 0.0, 0.0)
    dz = (grad @ W_dec.T) * (codes > 0)
    out.W_dec[aux.dead] += codes.T @ grad
    out.W_enc[aux.dead] += dz.T @ centred
    out.b_enc[aux.dead] += dz.sum(0)
    return loss


def gradients(
    weights: Weights,
    x: Tensor,
    k: int,
    activation: str = "topk",
    aux: Aux | None = None,
    scratch: Tensor | None = None,
) -> Result:
    """Losses and exact gradients for a batch x [B, d] (centred, scaled).

    Loss: sum |x - x'|^2 / (B d) + aux.weight * AuxK. `scratch` [B, F] receives the
    pre-activations and saves allocating them anew each step.
    """
    B, d = x.shape
    F = len(weights.b_enc)
    centred = x - weights.b_dec
    z = torch.addmm(weights.b_enc, centred, weights.W_enc.T, out=scratch)
    codes = select(z, k, activation)
    error = centred - decode(codes, weights.W_dec)
    grad = error * (-2 / (B * d))  # of the loss by the reconstruction

    support = torch.sparse_csr_tensor(*codes, (B, F), check_invariants=False)
    sampled = torch.sparse.sampled_addmm(support, grad, weights.W_dec.T, beta=0.0)
    dz = sampled.values() * (codes.values > 0)

    ordered, order = codes.columns.sort(stable=True)
    ends = torch.arange(F + 1, dtype=torch.int32, device=x.device)
    offsets = torch.searchsorted(ordered, ends, out_int32=True)
    counts = codes.crow.diff()
    rows = torch.arange(B, dtype=torch.int32, device=x.device).repeat_interleave(counts)[order]

    def sum_by_latent(per_row: Tensor, per_entry: Tensor) -> Tensor:
        return embedding_bag(
            rows, per_row, offsets, mode="sum", per_sample_weights=per_entry[order],
            include_last_offset=True,
        )  # fmt: skip

    out = Weights(
        W_enc=sum_by_latent(centred, dz),
        b_enc=sum_by_latent(x.new_ones(B, 1), dz).squeeze(1),
        W_dec=sum_by_latent(grad, codes.values),
        b_dec=grad.sum(0),
    )
    aux_loss = x.new_zeros(())
    if aux is not None and len(aux.dead):
        aux_loss = _aux(weights, z, centred, error, aux, out)
    out.b_dec.sub_(out.b_enc @ weights.W_enc)
    return Result(out, error.square().mean(), aux_loss, codes)


@dataclass
class State:
    """What a training run carries from step to step."""

    weights: Weights
    optimizer: torch.optim.Adam
    unfired: Tensor
    """[F] int64 frames since each latent last fired"""
    scratch: Tensor | None = None


def initial_state(n_latents: int, width: int, seed: int, device: str | torch.device) -> State:
    """Decoder rows uniform on the sphere, encoder its transpose, biases 0 (data are centred)."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(n_latents, width, generator=generator)
    W = (W / torch.linalg.vector_norm(W, dim=1, keepdim=True)).to(device)
    zeros = torch.zeros(n_latents, device=device), torch.zeros(width, device=device)
    weights = Weights(W.clone(), zeros[0], W, zeros[1])
    adam = torch.optim.Adam(list(weights), lr=0.0, betas=(0.9, 0.999), fused=True)
    return State(weights, adam, torch.zeros(n_latents, dtype=torch.int64, device=device))


@torch.no_grad()
def step(
    state: State,
    x: Tensor,
    lr: float,
    k: int,
    activation: str = "topk",
    aux_k: int = 0,
    aux_weight: float = 0.0,
    dead_after: int | None = None,
    ranks: Ranks = ALONE,
) -> Result:
    """One step on x [B, d] in place: gradients, fused Adam, decoder rows back to unit norm.

    As in Gao et al. 2024 the part of the decoder's gradient along each row is removed first (it
    could only change the norm), and rows are normalised after the update, so that what is saved
    is of unit norm. Latents that fired for none of the last `dead_after` frames are dead.

    With several `ranks` x is this rank's equal part of the batch; all end with the same state, that
    of one process with the whole batch but for the order of its sums (batchtopk: and for keeping k
    B latents in each part).
    """
    weights, aux = state.weights, None
    if dead_after is not None and aux_weight > 0:
        dead = (state.unfired >= dead_after).nonzero().squeeze(1)
        aux = Aux(dead, min(aux_k, len(dead)), aux_weight, ranks)
    shape = (len(x), len(weights.b_enc))
    if state.scratch is None or state.scratch.shape != shape:
        state.scratch = x.new_empty(shape)
    result = gradients(weights, x, k, activation, aux, state.scratch)
    ranks.average_(*result.gradients, result.loss, result.aux_loss)
    along = torch.einsum("fd,fd->f", result.gradients.W_dec, weights.W_dec)
    result.gradients.W_dec.addcmul_(along.unsqueeze(1), weights.W_dec, value=-1)
    for weight, gradient in zip(weights, result.gradients, strict=True):
        weight.grad = gradient
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.step()
    weights.W_dec.div_(torch.linalg.vector_norm(weights.W_dec, dim=1, keepdim=True))
    state.unfired += len(x) * ranks.size
    state.unfired[result.codes.columns[result.codes.values > 0].long()] = 0
    ranks.minimum_(state.unfired)
    return result
