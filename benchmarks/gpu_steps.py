"""Steps that benchmarks.gpu_dictionaries times: ours, dense autograd, and other libraries'.

* product: x W_enc^T alone, the one product that no TopK step can avoid. For bfloat16 both operands
  are stored so.
* ours: dictionaries.step (rule "paper"); ours_auxk with 10 % of latents dead, kept dead
  by a bias of -1000.
* dense: autograd through dense codes, fused Adam, decoder rows back to unit norm.
* sparsify, dictionary_learning: a step as their trainers take it, without AuxK in sparsify.
  sparsify runs its forward in bfloat16 autocast whatever is asked.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.gpu_parts import PRECISIONS
from musicscope.dictionaries import step
from musicscope.dictionaries.step import Weights

DEAD_BIAS = -1000.0
OURS = PRECISIONS[:2]
"""Of our step; autocast to bfloat16 does not reach its product."""
LR = 1e-4


@dataclass(frozen=True)
class Size:
    """Of a step."""

    width: int
    """Dimensions d of an activation."""
    latents: int
    """F"""
    k: int
    """Latents that are kept for each frame."""
    batch: int
    """Frames B."""

    @property
    def name(self) -> str:
        return f"d{self.width} F{self.latents} k{self.k} B{self.batch}"

    @property
    def flop(self) -> int:
        """Of the product that cannot be avoided."""
        return 2 * self.batch * self.width * self.latents


def activations(size: Size, device: torch.device, seed: int) -> Tensor:
    """[B, d]: low rank with a power-law spectrum + 10 % noise, unit variance, as real streams."""
    generator = torch.Generator(device).manual_seed(seed)
    rank = size.width // 4
    draw = functools.partial(torch.randn, generator=generator, device=device)
    basis = draw(rank, size.width) / rank**0.5
    scales = torch.arange(1, rank + 1, device=device).pow(-0.5)
    x = (draw(size.batch, rank) * scales) @ basis
    return x / x.std() + 0.1 * draw(size.batch, size.width)


def random_weights(size: Size, device: torch.device, seed: int) -> Weights:
    """Nothing is zero or tied: encoder, decoder and both biases are drawn."""
    generator = torch.Generator(device).manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator, device=device)
    W_dec = torch.nn.functional.normalize(draw(size.latents, size.width), dim=1)
    W_enc = draw(size.latents, size.width) / size.width**0.5
    return Weights(W_enc, 0.1 * draw(size.latents), W_dec, 0.3 * draw(size.width))


def dense_codes(own: Weights, x: Tensor, k: int, chosen: Tensor | None = None) -> Tensor:
    """Codes [B, F] of x, dense: the k largest a row, or those at the indices `chosen` [B, k]."""
    z = linear(x - own.b_dec, own.W_enc, own.b_enc).relu()
    best = z.topk(k, sorted=False).indices if chosen is None else chosen
    return torch.zeros_like(z).scatter(1, best, z.gather(1, best))


def dense_loss(weights: Weights, x: Tensor, codes: Tensor) -> Tensor:
    """Squared error per frame and dimension."""
    return (x - weights.b_dec - codes @ weights.W_dec).square().sum() / x.numel()


def leaves(weights: Weights, dtype: torch.dtype, device: torch.device | None = None) -> Weights:
    """Copies that autograd follows."""
    return Weights(*(w.detach().to(device, dtype, copy=True).requires_grad_() for w in weights))


Run = Callable[[int], "Tensor | None"]


@dataclass(frozen=True)
class Method:
    """One line of a race."""

    name: str
    precision: str
    build: Callable[[], Run]
    needs: str | None = None
    """Package without which it is left out."""


@functools.lru_cache(maxsize=4)
def batches(size: Size, device: torch.device) -> tuple[Tensor, ...]:
    """Several, so that none stays in the cache from one step to the next."""
    return tuple(activations(size, device, seed) for seed in range(10, 14))


def product(size: Size, device: torch.device, name: str) -> Run:
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    xs = [x.to(dtype) for x in batches(size, device)]
    weight = random_weights(size, device, 7).W_enc.to(dtype)
    out = weight.new_full((size.batch, size.latents), torch.nan)

    def run(number: int) -> None:
        torch.mm(xs[number % len(xs)], weight.T, out=out)

    return run


def ours(size: Size, device: torch.device, dead: bool) -> Run:
    xs, state = batches(size, device), step.initial_state(size.latents, [size.width], 0, device)
    gone = slice(0, size.latents // 10 if dead else 0)
    state.weights[0].b_enc[gone] = DEAD_BIAS
    state.unfired[gone] = 10**9
    state.scratch = xs[0].new_full((size.batch, size.latents), torch.nan)

    def run(number: int) -> Tensor:
        x = xs[number % len(xs)]
        return step.step(
            state, [x], LR, size.k, aux_k=size.width // 2, aux_weight=1 / 32 if dead else 0.0,
            dead_after=10**8,
        ).losses[0]  # fmt: skip

    return run


def dense(size: Size, device: torch.device) -> Run:
    xs = batches(size, device)
    weights = leaves(
        step.initial_state(size.latents, [size.width], 0, device).weights[0], xs[0].dtype
    )
    adam = torch.optim.Adam(weights, lr=LR, fused=True)

    def run(number: int) -> Tensor:
        x = xs[number % len(xs)]
        loss = dense_loss(weights, x, dense_codes(weights, x, size.k))
        loss.backward()
        adam.step()
        adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            weights.W_dec.div_(torch.linalg.vector_norm(weights.W_dec, dim=1, keepdim=True))
        return loss.detach()

    return run


def pairs(size: Size, device: torch.device) -> list[list[Tensor]]:
    """Paired batches of two models."""
    xs = batches(size, device)
    return [[x, y] for x, y in zip(xs, xs[1:] + xs[:1], strict=True)]


def ours_usae(size: Size, device: torch.device) -> Run:
    xs = pairs(size, device)
    state = step.initial_state(size.latents, (size.width, size.width), 0, device)
    state.scratch = xs[0][0].new_full((size.batch, size.latents), torch.nan)

    def run(number: int) -> Tensor:
        batch = xs[number % len(xs)]
        return step.step(state, batch, LR, size.k, drawn=number % 2).losses

    return run


def dense_usae(size: Size, device: torch.device) -> Run:
    xs = pairs(size, device)
    models = [
        leaves(
            step.initial_state(size.latents, [size.width], seed, device).weights[0], torch.float32
        )
        for seed in range(2)
    ]
    adam = torch.optim.Adam([w for model in models for w in model], lr=LR, fused=True)

    def run(number: int) -> Tensor:
        batch, drawn = xs[number % len(xs)], number % 2
        own, other = models[drawn], Weights(*(w.detach() for w in models[1 - drawn]))
        codes = dense_codes(own, batch[drawn], size.k)
        loss = dense_loss(own, batch[drawn], codes) + dense_loss(other, batch[1 - drawn], codes)
        loss.backward()
        adam.step()  # leaves alone the other model, which has no gradient
        adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            own.W_dec.div_(torch.linalg.vector_norm(own.W_dec, dim=1, keepdim=True))
        return loss.detach()

    return run


def library(package: str, module: str) -> types.ModuleType:
    """package.module without the package's own __init__, which loads what reads language models."""
    spec = importlib.util.find_spec(package)
    if package not in sys.modules:
        bare = types.ModuleType(package)
        bare.__path__, bare.__spec__ = list(spec.submodule_search_locations), spec
        sys.modules[package] = bare
    return importlib.import_module(f"{package}.{module}")


def sparsify(size: Size, device: torch.device) -> Run:
    config = library("sparsify", "config").SparseCoderConfig(num_latents=size.latents, k=size.k)
    torch.manual_seed(0)
    sae = library("sparsify", "sparse_coder").SparseCoder(size.width, config, device=device)
    adam = torch.optim.Adam(sae.parameters(), lr=LR, fused=True)
    unfired = torch.zeros(size.latents, dtype=torch.long, device=device)
    xs = batches(size, device)

    def run(number: int) -> Tensor:
        x = xs[number % len(xs)]
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x, dead_mask=None)
        out.fvu.backward()
        fired = torch.zeros(size.latents, dtype=torch.bool, device=device)
        fired[out.latent_indices.flatten()] = True
        sae.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        unfired.add_(len(x))
        unfired[fired] = 0
        return out.fvu.detach()

    return run


def dictionary_learning(size: Size, device: torch.device) -> Run:
    sys.modules.setdefault("wandb", types.ModuleType("wandb"))  # imported there, never needed
    trainer = library("dictionary_learning", "trainers.top_k").TopKTrainer(
        steps=10**6, activation_dim=size.width, dict_size=size.latents, k=size.k, layer=0,
        lm_name="none", lr=LR, seed=0, device=str(device),
    )  # fmt: skip
    trainer.ae.b_dec.data.zero_()
    xs = batches(size, device)
    return lambda number: trainer.update(1, xs[number % len(xs)])  # step 0: a geometric median


def sae_methods(size: Size, device: torch.device) -> list[Method]:
    # One state for all precisions: fewer buffers, and time does not depend on the values.
    plain, auxk, dense_ = (
        functools.cache(lambda build=build: build())
        for build in (
            lambda: ours(size, device, dead=False),
            lambda: ours(size, device, dead=True),
            lambda: dense(size, device),
        )
    )
    return [
        *(Method("product", n, lambda n=n: product(size, device, n)) for n in PRECISIONS),
        *(Method("ours", n, plain) for n in OURS),
        *(Method("dense", n, dense_) for n in PRECISIONS),
        Method("ours_auxk", "tf32", auxk),
        Method("sparsify", "tf32", lambda: sparsify(size, device), "sparsify"),
        Method(
            "dictionary_learning", "tf32", lambda: dictionary_learning(size, device),
            "dictionary_learning",
        ),
    ]  # fmt: skip


def usae_methods(size: Size, device: torch.device) -> list[Method]:
    plain = functools.cache(lambda: ours_usae(size, device))
    dense_ = functools.cache(lambda: dense_usae(size, device))
    return [
        *(Method("product", n, lambda n=n: product(size, device, n)) for n in PRECISIONS),
        *(Method("ours", n, plain) for n in OURS),
        *(Method("dense", n, dense_) for n in PRECISIONS),
    ]


def goal_methods(size: Size, device: torch.device) -> list[Method]:
    wanted = {"product tf32", "product bfloat16", "ours float32", "ours tf32", "dense tf32",
              "dense bfloat16", "sparsify tf32", "dictionary_learning tf32"}  # fmt: skip
    return [m for m in sae_methods(size, device) if f"{m.name} {m.precision}" in wanted]
