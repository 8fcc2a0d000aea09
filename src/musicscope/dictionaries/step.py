"""One training step of a sparse dictionary of M models, gradients by hand, codes sparse throughout.

One model is encoded; its code is decoded for every model, and the losses are added up. With M = 1
this is a TopK or BatchTopK SAE. With more it is a universal SAE (Thasarathan et al. 2025, arXiv
2502.03714, 3.2). A crosscoder on normalised activations is an SAE on the models side by side, since
the sum of the models' encoders is one product; `join` and `split` convert between the two.

The update rule decides which decoders learn. If decoder j also learns from the codes of encoder i,
errors fall but the dictionary splits into latents of one model each. So the rule is an option.

Cost: one dense product (encode); everything else touches the active latents only.

* decode and both weight gradients are embedding bags: over a row's latents, and over a latent's
  rows (codes sorted by latent, i.e. the product CSR^T x dense, which runs 2-10x faster here as a
  bag than through MKL's transposed CSR product);
* the gradient of the codes is needed on their support only: torch.sparse.sampled_addmm;
* no gradient flows to the input: b_dec's through the encoder is -(sum_b dz_b) W_enc;
* AuxK (Gao et al. 2024, A.2) gathers the columns of the pre-activations that belong to dead
  latents, so its cost is proportional to their number and it needs no second encode.

int32 indices: half the memory traffic, and the width MKL takes without converting.

On a GPU no step waits for the device, so that kernels queue up: shapes follow from k and B alone,
and the latents that count as dead are listed only every DEAD_EVERY steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from musicscope.core.distributed import ALONE, Ranks
from musicscope.dictionaries.core import largest_k

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

DEAD_EVERY = {"cuda": 16}
"""Type of device -> steps between two lists of dead latents, which each wait for it; else 1."""

RULES: dict[str, Callable[[int, int], Sequence[int]]] = {
    "paper": lambda drawn, models: (drawn,),
    "all_decoders": lambda drawn, models: range(models),
}
"""Name -> (encoded model, number of models) -> models whose decoders learn."""


class Weights(NamedTuple):
    """Parameters of one model, on centred and scaled activations."""

    W_enc: Tensor
    """[F, d]"""
    b_enc: Tensor
    """[F]"""
    W_dec: Tensor
    """[F, d], unit rows"""
    b_dec: Tensor
    """[d]"""


class Gradients(NamedTuple):
    """Gradients of one model's `Weights`; None where the rule lets nothing learn."""

    W_enc: Tensor | None = None
    b_enc: Tensor | None = None
    W_dec: Tensor | None = None
    b_dec: Tensor | None = None


class Codes(NamedTuple):
    """Sparse codes [B, F] in CSR form."""

    crow: Tensor
    """[B + 1] int32: row b holds entries crow[b] to crow[b + 1]"""
    columns: Tensor
    """[nnz] int32 latent of each entry"""
    values: Tensor
    """[nnz] activation of each entry, >= 0"""


class Aux(NamedTuple):
    """Settings of AuxK."""

    dead: Tensor
    """[n] int64 latents that count as dead"""
    k: int
    """how many of them reconstruct each residual"""
    weight: float
    """of the loss; 1/32 in the paper"""
    ranks: Ranks = ALONE
    """ranks over whose residuals the variance is taken"""


class Jump(NamedTuple):
    """Settings of JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435)."""

    threshold: Tensor
    """[F] >= 0, learnt: a latent is active above it"""
    bandwidth: float
    """width of the window about the threshold in which the step counts as differentiable"""
    weight: float
    """of the sparsity loss: mean over frames of 2 / k (active latents - k)^2"""


class Result(NamedTuple):
    """Outcome of one batch; losses are tensors on the device, so that no step waits for them."""

    gradients: tuple[Gradients, ...]
    """One per model."""
    losses: Tensor
    """[M] squared error per frame over the models' mean width: the unexplained share of each"""
    aux_loss: Tensor
    """[] AuxK's loss, summed over the models"""
    codes: Codes
    prefix_loss: Tensor | float = 0.0
    """[] losses of the Matryoshka prefixes, summed; `losses` are of all latents"""
    sparsity_loss: Tensor | float = 0.0
    """[] JumpReLU's, with its weight"""
    threshold: Tensor | None = None
    """[F] gradient of JumpReLU's thresholds"""


def select(z: Tensor, k: int, activation: str, jump: Jump | None = None) -> Codes:
    """Select codes of pre-activations z [B, F]: the k largest per row, or B*k per batch; ReLU.

    jumprelu: all above the lower end of each threshold's window, without ReLU.
    """
    B = len(z)
    if activation == "topk":
        columns = largest_k(z, k)
        crow = torch.arange(0, B * k + 1, k, dtype=torch.int32, device=z.device)
        return Codes(crow, columns.reshape(-1).int(), z.gather(1, columns).reshape(-1).relu_())
    if jump is not None:
        return _codes_where(z, z > jump.threshold - jump.bandwidth / 2)
    if z.is_cuda:
        return select_of_batch(z, k)
    kth = torch.as_tensor(np.partition(z.reshape(-1).numpy(), -B * k)[-B * k])
    return _codes_where(z, (z >= kth) & (z > 0))


def _codes_where(z: Tensor, chosen: Tensor) -> Codes:
    rows, columns = chosen.nonzero().unbind(1)
    crow = torch.searchsorted(rows, torch.arange(len(z) + 1, device=z.device), out_int32=True)
    return Codes(crow, columns.int(), z[rows, columns])


def select_of_batch(z: Tensor, k: int) -> Codes:
    """`select` for batchtopk in static shapes: B*k entries always, 0 where z is below 0."""
    B, F = z.shape
    values, places = z.reshape(-1).topk(B * k, sorted=False)
    places, order = places.sort()
    crow = torch.searchsorted(
        places, torch.arange(0, B * F + 1, F, device=z.device), out_int32=True
    )
    return Codes(crow, (places % F).int(), values[order].relu_())


def decode(codes: Codes, W_dec: Tensor) -> Tensor:
    """Multiply codes x W_dec, [B, d]."""
    return embedding_bag(
        codes.columns, W_dec, codes.crow, mode="sum", per_sample_weights=codes.values,
        include_last_offset=True,
    )  # fmt: skip


def sum_by_latent(codes: Codes, F: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return (per row [B, d], per entry [nnz]) -> codes^T x rows with those entries, [F, d]."""
    ordered, order = codes.columns.sort(stable=True)
    ends = torch.arange(F + 1, dtype=torch.int32, device=ordered.device)
    offsets = torch.searchsorted(ordered, ends, out_int32=True)
    counts = codes.crow.diff()
    rows = torch.arange(len(counts), dtype=torch.int32, device=ordered.device)
    rows = rows.repeat_interleave(counts, output_size=len(order))[order]
    return lambda per_row, per_entry: embedding_bag(
        rows, per_row, offsets, mode="sum", per_sample_weights=per_entry[order],
        include_last_offset=True,
    )  # fmt: skip


def by_prefix(codes: Codes, prefixes: Sequence[int]) -> Codes:
    """Move the entries of row b between prefix l - 1 and prefix l to row l B + b.

    Codes [(len(prefixes) + 1) B, F]: the rows of the latents beyond the last prefix come last.
    """
    B, device = len(codes.crow) - 1, codes.crow.device
    ends = torch.tensor(prefixes, dtype=torch.int32, device=device)
    rows = torch.arange(B, device=device).repeat_interleave(codes.crow.diff())
    rows = rows + B * torch.searchsorted(ends, codes.columns, right=True)
    ordered, order = rows.sort(stable=True)
    every = torch.arange((len(prefixes) + 1) * B + 1, device=device)
    crow = torch.searchsorted(ordered, every, out_int32=True)
    return Codes(crow, codes.columns[order], codes.values[order])


def gradients(
    weights: Sequence[Weights],
    xs: Sequence[Tensor],
    k: int,
    activation: str = "topk",
    drawn: int = 0,
    learning: Sequence[int] = (0,),
    aux: Aux | None = None,
    scratch: Tensor | None = None,
    prefixes: Sequence[int] = (),
    jump: Jump | None = None,
) -> Result:
    """Compute losses and exact gradients for paired batches xs[j] [B, d_j], centred and scaled.

    Loss: sum over models j of |x_j - x'_j|^2 / (B D) + aux.weight * AuxK_j, with D the mean width
    and x'_j decoded from the code of model `drawn`. Gradients: of the drawn encoder, and of the
    decoders of the models in `learning`, which must hold `drawn`. `scratch` [B, F] receives the
    pre-activations and saves allocating them anew each step.

    With `prefixes`, rising numbers of latents below F, each prefix of the latents must reconstruct
    too, and its squared error is added to the loss (Matryoshka, Bussmann et al. 2025, arXiv
    2503.17547). An entry learns from the errors of all prefixes that hold its latent: their sum is
    one more row per prefix, so that every product stays as sparse as without them.

    With `jump`, for activation jumprelu: the sparsity loss is added, and the straight-through
    estimator's gradients go to the thresholds and to the pre-activations.
    """
    own, B, F = weights[drawn], len(xs[0]), len(weights[drawn].b_enc)
    share = len(xs) / (B * sum(x.shape[1] for x in xs))  # 1 / (B D)
    centred = xs[drawn] - own.b_dec
    z = torch.addmm(own.b_enc, centred, own.W_enc.T, out=scratch)
    codes = select(z, k, activation, jump)
    kept, levels = by_prefix(codes, prefixes) if prefixes else codes, len(prefixes) + 1
    raw = kept.values
    if jump is not None:
        codes, kept = (
            c._replace(values=c.values * (c.values > jump.threshold[c.columns]))
            for c in (codes, kept)
        )
    support = torch.sparse_csr_tensor(*kept, (levels * B, F), check_invariants=False)
    errors: list[Tensor] = []
    grads: list[Tensor] = []
    prefix_loss: Tensor | float = 0.0
    for j, (x, model) in enumerate(zip(xs, weights, strict=True)):
        base = centred if model is own else x - model.b_dec
        decoded = decode(kept, model.W_dec)
        if prefixes:
            error = base - decoded.view(levels, B, -1).cumsum(0)
            prefix_loss = prefix_loss + error[:-1].square().sum() * share
            errors.append(error[-1])
            total = error.flip(0).cumsum(0).flip(0)  # over the prefixes that hold a row's latents
            grads.append(total.reshape(levels * B, -1) * (-2 * share))
        else:
            errors.append(base - decoded)
            grads.append(errors[-1] * (-2 * share))  # of the loss by the reconstruction
        # Adds up over the models; the first replaces the values of the codes.
        support = torch.sparse.sampled_addmm(
            support, grads[-1], model.W_dec.T, beta=1.0 if j else 0.0
        )
    dz = support.values() * (kept.values > 0)
    sparsity_loss: Tensor | float = 0.0
    if jump is not None:
        rows = torch.arange(levels * B, device=z.device).repeat_interleave(kept.crow.diff()) % B
        active = z.new_zeros(B).index_add_(0, rows, (kept.values > 0).to(z.dtype))
        excess = active - k
        sparsity_loss = jump.weight * 2 / k * excess.square().mean()
        threshold = jump.threshold[kept.columns]
        near = ((raw - threshold).abs() < jump.bandwidth / 2).to(z.dtype) / jump.bandwidth
        through = near * (threshold * support.values() + excess[rows] * (4 * jump.weight / (k * B)))
        dz = dz + through

    by_latent = sum_by_latent(kept, F)
    ones = centred.new_ones(levels * B, 1)
    inputs = centred.repeat(levels, 1) if prefixes else centred
    W_enc, b_enc = by_latent(inputs, dz), by_latent(ones, dz).squeeze(1)
    found = [Gradients() for _ in weights]
    b_dec = {j: grads[j][:B].sum(0) for j in learning}
    for j in learning:
        found[j] = Gradients(W_dec=by_latent(grads[j], kept.values), b_dec=b_dec[j])
    found[drawn] = found[drawn]._replace(W_enc=W_enc, b_enc=b_enc)
    aux_loss = z.new_zeros(())
    if aux is not None and len(aux.dead):
        aux_loss = _aux(weights, z, centred, errors, aux, (W_enc, b_enc), found)
    # b_dec is also subtracted before the drawn encoder.
    b_dec[drawn].sub_(b_enc @ own.W_enc)
    if len(xs) == 1:  # the same number up to rounding
        losses = errors[0].square().mean().reshape(1)
    else:
        losses = torch.stack([error.square().sum() for error in errors]) * share
    result = Result(tuple(found), losses, aux_loss, codes, prefix_loss, sparsity_loss)
    if jump is not None:
        return result._replace(threshold=-by_latent(ones, through).squeeze(1))
    return result


def _aux(
    weights: Sequence[Weights],
    z: Tensor,
    centred: Tensor,
    errors: Sequence[Tensor],
    aux: Aux,
    encoder: tuple[Tensor, Tensor],
    out: Sequence[Gradients],
) -> Tensor:
    """Add AuxK's gradients in place and return its loss.

    They go to the drawn `encoder` (gradients of W_enc and b_enc) and to the W_dec of `out`.

    Dead latents of the drawn encoder reconstruct every model's residual e = x - x': a latent that
    came back for one model only would never be shared. e is a constant without the decoder bias.
    The loss is squared error over the residual's own variance. Dense over the dead columns: AuxK
    keeps so many of them (d/2) that a sparse product would be slower.
    """
    codes = z[:, aux.dead]
    if len(aux.dead) > aux.k:
        best = largest_k(codes, aux.k)
        codes = torch.zeros_like(codes).scatter_(1, best, codes.gather(1, best))
    codes.relu_()
    dz, loss = torch.zeros_like(codes), z.new_zeros(())
    for model, error, target in zip(weights, errors, out, strict=True):
        W_dec = model.W_dec[aux.dead]
        miss = codes @ W_dec - error
        variance = aux.ranks.squares(error)
        loss = loss + (miss.square().sum() / variance).nan_to_num(0.0)
        grad = miss * (2 * aux.weight / variance).nan_to_num(0.0, 0.0, 0.0)
        dz.addmm_(grad, W_dec.T)
        if target.W_dec is not None:
            target.W_dec[aux.dead] += codes.T @ grad
    dz *= codes > 0
    for gradient, more in zip(encoder, (dz.T @ centred, dz.sum(0)), strict=True):
        gradient[aux.dead] += more
    return loss


@dataclass
class State:
    """What a training run carries from step to step."""

    weights: tuple[Weights, ...]
    """One per model."""
    optimizer: torch.optim.Adam
    unfired: Tensor
    """[F] int64 frames since each latent last fired, whichever model was encoded"""
    scratch: Tensor | None = None
    threshold: Tensor | None = None
    """[F] of JumpReLU"""
    dead: Tensor | None = None
    """[n] int64 latents that counted as dead when they were last listed"""
    dead_age: int = 0
    """Steps since then."""


def initial_state(
    n_latents: int,
    widths: Sequence[int],
    seed: int,
    device: str | torch.device,
    threshold: float | None = None,
) -> State:
    """Draw for each model decoder rows uniform on the sphere; encoder its transpose, biases 0.

    `threshold` is where every threshold of a JumpReLU starts.
    """
    weights = []
    for j, width in enumerate(widths):
        generator = torch.Generator().manual_seed(seed + j)
        W = torch.randn(n_latents, width, generator=generator)
        W = (W / torch.linalg.vector_norm(W, dim=1, keepdim=True)).to(device)
        b_enc, b_dec = torch.zeros(n_latents, device=device), torch.zeros(width, device=device)
        weights.append(Weights(W.clone(), b_enc, W, b_dec))
    parameters = [weight for model in weights for weight in model]
    if threshold is not None:
        parameters.append(torch.full((n_latents,), threshold, device=device))
    adam = torch.optim.Adam(parameters, lr=0.0, betas=(0.9, 0.999), fused=True)
    unfired = torch.zeros(n_latents, dtype=torch.int64, device=device)
    own = None if threshold is None else parameters[-1]
    return State(tuple(weights), adam, unfired, threshold=own)


@torch.no_grad()
def step(
    state: State,
    xs: Sequence[Tensor],
    lr: float,
    k: int,
    activation: str = "topk",
    drawn: int = 0,
    rule: str = "paper",
    aux_k: int = 0,
    aux_weight: float = 0.0,
    dead_after: int | None = None,
    ranks: Ranks = ALONE,
    prefixes: Sequence[int] = (),
    bandwidth: float = 0.0,
    sparsity_weight: float = 0.0,
) -> Result:
    """Take one step in place on paired xs[j] [B, d_j]: gradients, fused Adam, unit decoder rows.

    The drawn encoder and the decoders that the rule names step; every other weight and its moments
    stay. As in Gao et al. 2024 the part of the decoder's gradient along each row is removed first
    (it could only change the norm), and rows are normalised after the update, so that saved rows
    have unit norm. Latents that fired for none of the last `dead_after` frames are dead; see
    DEAD_EVERY.

    With several `ranks` xs are this rank's equal part of the batch; all end with the same state,
    that of one process with the whole batch but for the order of its sums (batchtopk: and for
    keeping k B latents in each part).
    """
    weights, aux = state.weights, None
    if dead_after is not None and aux_weight > 0:
        every = DEAD_EVERY.get(state.unfired.device.type, 1)
        if state.dead is None or state.dead_age >= every:
            state.dead = (state.unfired >= dead_after).nonzero().squeeze(1)
            state.dead_age = 0
        state.dead_age += 1
        aux = Aux(state.dead, min(aux_k, len(state.dead)), aux_weight, ranks)
    shape = (len(xs[0]), len(state.unfired))
    if state.scratch is None or state.scratch.shape != shape:
        state.scratch = xs[0].new_empty(shape)
    learning = RULES[rule](drawn, len(xs))
    jump = None
    if state.threshold is not None:
        jump = Jump(state.threshold, bandwidth, sparsity_weight)
    result = gradients(
        weights, xs, k, activation, drawn, learning, aux, state.scratch, prefixes, jump
    )
    present = [g for model in result.gradients for g in model if g is not None]
    if state.threshold is not None and result.threshold is not None:
        state.threshold.grad = result.threshold
        present.append(result.threshold)
    ranks.average_(*present, result.losses, result.aux_loss)
    for gradient, (_, _, W_dec, _) in zip(result.gradients, weights, strict=True):
        if (W_grad := gradient.W_dec) is not None:
            along = torch.einsum("fd,fd->f", W_grad, W_dec).unsqueeze(1)
            W_grad.addcmul_(along, W_dec, value=-1)
    for model, own in zip(weights, result.gradients, strict=True):
        for weight, gradient in zip(model, own, strict=True):
            weight.grad = gradient  # Adam leaves alone what has no gradient
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.step()
    if state.threshold is not None:
        state.threshold.clamp_(min=0.0)  # below 0 it would let negative pre-activations through
    for j in learning:
        W_dec = weights[j].W_dec
        W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True))
    state.unfired += len(xs[0]) * ranks.size
    # A minimum, as a boolean index would wait for the device.
    silent = ~(result.codes.values > 0)  # NaN too
    since = silent.long() * torch.iinfo(torch.int64).max
    state.unfired.scatter_reduce_(0, result.codes.columns.long(), since, "amin")
    ranks.minimum_(state.unfired)
    return result


@torch.no_grad()
def resample(
    state: State,
    x: Tensor,
    k: int,
    activation: str,
    dead_after: int,
    seed: int,
    ranks: Ranks = ALONE,
) -> None:
    """Restart the dead latents of one model from badly reconstructed rows of x [B, d].

    Rows are drawn by their squared error, whose direction becomes decoder row and, at 0.2 of the
    mean norm of the live rows, encoder row; bias, Adam's moments and the count of frames since the
    latent fired restart at 0 (Bricken et al. 2023, "Towards Monosemanticity").
    """
    weights = state.weights[0]
    dead = (state.unfired >= dead_after).nonzero().squeeze(1)
    if not 0 < len(dead) < len(state.unfired):
        return
    z = torch.addmm(weights.b_enc, x - weights.b_dec, weights.W_enc.T)
    jump = None if state.threshold is None else Jump(state.threshold, 0.0, 0.0)
    error = x - weights.b_dec - decode(select(z, k, activation, jump), weights.W_dec)
    generator = torch.Generator().manual_seed(seed)
    share = error.square().sum(1).cpu()
    rows = torch.multinomial(share, len(dead), replacement=True, generator=generator)
    chosen = error[rows.to(x.device)] * ranks.leads
    ranks.average_(chosen)  # the leading rank's, for all
    length = chosen.norm(dim=1, keepdim=True) * ranks.size
    live = state.unfired < dead_after
    gain = 0.2 * weights.W_enc[live].norm(dim=1).mean()
    weights.W_dec[dead] = torch.nn.functional.normalize(chosen, dim=1)
    weights.W_enc[dead] = gain * weights.W_dec[dead]
    weights.b_enc[dead] = 0.0
    restarted = [*weights[:3]]
    if state.threshold is not None:  # half of what the error alone gives
        state.threshold[dead] = 0.5 * gain * length.squeeze(1)
        restarted.append(state.threshold)
    for weight in restarted:
        for name, moment in state.optimizer.state[weight].items():
            if name != "step":
                moment[dead] = 0.0
    state.unfired[dead] = 0


def join(xs: Sequence[Tensor]) -> Tensor:
    """Put paired rows xs[j] [B, d_j] side by side, [B, sum d_j], for a crosscoder's step."""
    return torch.cat(tuple(xs), dim=1)


def split(joined: Weights, widths: Sequence[int]) -> tuple[Weights, ...]:
    """Split the weights of a crosscoder's step per model; the encoder bias is shared equally."""
    W_enc, W_dec = (w.split(list(widths), dim=1) for w in (joined.W_enc, joined.W_dec))
    b_dec, b_enc = joined.b_dec.split(list(widths)), joined.b_enc / len(widths)
    return tuple(
        Weights(e.contiguous(), b_enc.clone(), d.contiguous(), b.clone())
        for e, d, b in zip(W_enc, W_dec, b_dec, strict=True)
    )
