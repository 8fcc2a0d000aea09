"""Part d of benchmarks.gpu_check: training steps of dictionaries on a GPU, checked, then timed.

Gradients are compared with dense float64 autograd. Methods of one race (benchmarks.gpu_steps) are
interleaved; a step's time is that between two CUDA events, so waiting for the host counts.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, linear

from benchmarks.gpu_parts import (
    Record,
    precision,
    relative_error,
    spread,
    times_ms,
    wait,
)
from benchmarks.gpu_steps import (
    LR,
    OURS,
    Method,
    Run,
    Size,
    activations,
    batches,
    dense_codes,
    dense_loss,
    goal_methods,
    leaves,
    ours,
    ours_usae,
    random_weights,
    sae_methods,
    usae_methods,
)
from musicscope.core.precision import tf32
from musicscope.dictionaries import step
from musicscope.dictionaries.step import Weights

BLOCK = 4
"""Steps of a method in a row; a round takes so many of each, or as many as last SLOW."""
SLOW = 200.0
"""Milliseconds."""
ROUNDS = 12
"""At most, within the time given; at least one."""
ADAM_BYTES = 28
"""A parameter's: fused Adam reads weight, gradient and two moments, and writes three of them."""
MAIN = Size(1536, 24_576, 64, 8192)
GOALS = (Size(768, 4096, 25, 1024), Size(1536, 12_288, 64, 4096))
SMALL = Size(96, 768, 16, 256)
TINY = Size(16, 128, 4, 64)


def dictionaries(device: torch.device, tiny: bool) -> Callable[[Record], None]:
    """Checks first, then races by importance."""
    main, goals = (TINY, (TINY,)) if tiny else (MAIN, GOALS)
    full = Size(main.width, main.latents, main.k, main.batch // 8)  # a reference that fits
    small = TINY if tiny else SMALL

    def measure(record: Record) -> None:
        for name in OURS:
            record.attempt(f"check/sae small {name}", lambda n=name: check_sae(small, device, n))
        record.attempt("check/usae small float32", lambda: check_usae(small, device, "float32"))
        race(record, f"sae {main.name}", sae_methods(main, device), main, device, 0.4)
        race(record, f"usae 2 models {main.name}", usae_methods(main, device), main, device, 0.45)
        for name in OURS:
            record.attempt(f"check/sae full {name}", lambda n=name: check_sae(full, device, n), 2)
        record.attempt("check/usae full float32", lambda: check_usae(full, device, "float32"), 2)
        if device.type == "cuda":
            record.attempt("waits/sae step", lambda: waits(ours(main, device, dead=False)))
            record.attempt("waits/sae step auxk", lambda: waits(ours(main, device, dead=True)))
            record.attempt("waits/usae step", lambda: waits(ours_usae(main, device)))
        pieces(record, main, device)
        for number, size in enumerate(goals):
            share = 0.9 / (len(goals) - number)
            race(record, f"sae goal {size.name}", goal_methods(size, device), size, device, share)

    return measure


# ---- checks against float64


def on_reference(size: Size, device: torch.device) -> torch.device:
    """Where float64 runs: on the CPU for small sizes, for an answer that no GPU took part in."""
    return torch.device("cpu") if size.latents <= SMALL.latents else device


def same_codes(found: Tensor, weights: Weights, x: Tensor, k: int) -> float:
    """Share of the indices [B, k] that float64 chooses too."""
    z = linear(x - weights.b_dec, weights.W_enc, weights.b_enc)
    wanted = torch.zeros_like(z, dtype=torch.bool).scatter_(1, z.topk(k).indices, True)
    return float(wanted.gather(1, found).double().mean())


@torch.no_grad()
def check_sae(size: Size, device: torch.device, name: str) -> dict[str, Any]:
    """step.gradients of one model against dense float64 autograd on the same latents.

    The choice of latents is compared by itself (equal_codes): another choice at the k-th place is
    no error of the gradients.
    """
    weights, x = random_weights(size, device, 1), activations(size, device, 2) + 0.5
    scratch = x.new_full((size.batch, size.latents), torch.nan)
    with precision(name, device):
        found = step.gradients([weights], [x], size.k, scratch=scratch)
    wait(device)
    where = on_reference(size, device)
    exact, signal = leaves(weights, torch.float64, where), x.to(where, torch.float64)
    chosen = found.codes.columns.to(where, torch.int64).view(size.batch, size.k)
    with torch.enable_grad():
        loss = dense_loss(exact, signal, dense_codes(exact, signal, size.k, chosen))
        loss.backward()
    z = linear(signal - exact.b_dec, exact.W_enc, exact.b_enc)
    return {
        "size": size.name,
        "z_error": relative_error(scratch, z),
        "loss_error": abs(float(found.losses[0]) / float(loss) - 1),
        "gradient_errors": {
            field: relative_error(ours, leaf.grad)
            for field, ours, leaf in zip(Weights._fields, found.gradients[0], exact, strict=True)
        },
        "equal_codes": same_codes(chosen, exact, signal, size.k),
    }


@torch.no_grad()
def check_usae(size: Size, device: torch.device, name: str) -> dict[str, Any]:
    """step.gradients of two models, both decoders learning, as `check_sae`."""
    weights = [random_weights(size, device, seed) for seed in (3, 4)]
    xs = [activations(size, device, seed) + 0.5 for seed in (5, 6)]
    scratch = xs[0].new_full((size.batch, size.latents), torch.nan)
    with precision(name, device):
        found = step.gradients(weights, xs, size.k, learning=(0, 1), scratch=scratch)
    wait(device)
    where = on_reference(size, device)
    exact = [leaves(w, torch.float64, where) for w in weights]
    signals = [x.to(where, torch.float64) for x in xs]
    chosen = found.codes.columns.to(where, torch.int64).view(size.batch, size.k)
    with torch.enable_grad():
        codes = dense_codes(exact[0], signals[0], size.k, chosen)
        loss = sum(dense_loss(w, x, codes) for w, x in zip(exact, signals, strict=True))
        loss.backward()
    own = found.gradients[0]
    pairs = {"W_enc": (own.W_enc, exact[0].W_enc), "b_enc": (own.b_enc, exact[0].b_enc)}
    for j, (made, leaf) in enumerate(zip(found.gradients, exact, strict=True)):
        pairs |= {f"W_dec {j}": (made.W_dec, leaf.W_dec), f"b_dec {j}": (made.b_dec, leaf.b_dec)}
    z = linear(signals[0] - exact[0].b_dec, exact[0].W_enc, exact[0].b_enc)
    return {
        "size": size.name,
        "z_error": relative_error(scratch, z),
        "loss_error": abs(float(found.losses.sum()) / float(loss) - 1),
        "gradient_errors": {
            n: relative_error(ours, leaf.grad) for n, (ours, leaf) in pairs.items()
        },
        "equal_codes": same_codes(chosen, exact[0], signals[0], size.k),
    }


# ---- timing


def race(
    record: Record,
    name: str,
    methods: Sequence[Method],
    size: Size,
    device: torch.device,
    share: float,
) -> None:
    """Time the methods, interleaved, for at most a `share` of the time that is left."""
    end = record.left() * (1 - share)
    runs: dict[str, Run] = {}
    blocks: dict[str, int] = {}
    for method in methods:
        key = f"steps/{name}/{method.name} {method.precision}"
        if method.needs and importlib.util.find_spec(method.needs) is None:
            record.add(key, {"skipped": f"{method.needs} is not installed"})
            continue

        def warm(method: Method = method, key: str = key) -> Run:
            run = method.build()
            with precision(method.precision, device):
                times = times_ms(run, device, 3)
            blocks[key] = max(1, min(BLOCK, int(SLOW / times[-1])))
            return run

        if (run := record.guard(key, warm, 1.5)) is not None:
            runs[key] = run
    times: dict[str, list[list[float]]] = {key: [] for key in runs}
    losses: dict[str, Tensor | None] = {}
    of = {f"steps/{name}/{m.name} {m.precision}": m for m in methods}
    rounds = 0
    while runs and rounds < ROUNDS and (rounds == 0 or record.left() > end):
        for key, run in list(runs.items()):

            def block(key: str = key, run: Run = run) -> list[float]:
                def remember(number: int) -> None:
                    losses[key] = run(number)

                with precision(of[key].precision, device):
                    return times_ms(remember, device, blocks[key])

            taken = record.guard(key, block)
            if taken is None:
                del runs[key]
            else:
                times[key].append(taken)
        rounds += 1
    floors = {
        of[key].precision: statistics.median(sum(taken, []))
        for key, taken in times.items()
        if key in runs and taken and of[key].name == "product"
    }
    for key in runs:
        if times[key]:
            record.add(key, _entry(of[key], times[key], losses[key], size, floors))
    runs.clear()
    batches.cache_clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _entry(
    method: Method,
    times: list[list[float]],
    loss: Tensor | None,
    size: Size,
    floors: dict[str, float],
) -> dict[str, Any]:
    middles = [statistics.median(taken) for taken in times]
    ms = statistics.median(sum(times, []))
    found: dict[str, Any] = {
        "precision": method.precision,
        "ms": ms,
        "ms_min": min(middles),
        "ms_max": max(middles),
        "rounds": len(times),
        "steps_a_round": len(times[0]),
        "per_s": 1e3 / ms,
        "tflops": size.flop / ms / 1e9,
        "x_product": ms / floors[method.precision] if method.precision in floors else None,
    }
    if isinstance(loss, Tensor):
        last = float(loss.float().sum())
        found["last_loss"] = last
        if not math.isfinite(last):
            found["error"] = "the loss is not finite"
    return found


def waits(run: Run) -> dict[str, Any]:
    """How often, and where, one step makes the host wait for the device."""
    run(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [w for w in seen if "synchronizing CUDA operation" in str(w.message)]
    return {
        "count": len(found),
        "places": [f"{Path(w.filename).name}:{w.lineno}" for w in found],
    }


@torch.no_grad()
def pieces(record: Record, size: Size, device: torch.device) -> None:
    """Milliseconds of what a step consists of, and of what could take its place, each alone."""
    B, F, k = size.batch, size.latents, size.k

    def inputs() -> tuple[Any, ...]:
        weights, x = random_weights(size, device, 8), activations(size, device, 9)
        z = torch.addmm(weights.b_enc, x - weights.b_dec, weights.W_enc.T)
        codes = step.select(z, k, "topk")
        grad = torch.randn(B, size.width, device=device)
        adam = torch.optim.Adam([w.clone() for w in weights], lr=LR, fused=True)
        for parameter in adam.param_groups[0]["params"]:
            parameter.grad = torch.randn_like(parameter)
        return weights, x, z, codes, grad, adam

    made = record.guard("pieces/inputs", inputs, 2.0)
    if made is None:
        return
    weights, x, z, codes, grad, adam = made
    columns = codes.columns.long().view(B, k)
    out = torch.empty_like(z)

    def support(kind: torch.dtype) -> Tensor:
        parts = codes.crow.to(kind), codes.columns.to(kind), codes.values
        return torch.sparse_csr_tensor(*parts, (B, F), check_invariants=False)

    narrow, wide = support(torch.int32), support(torch.int64)
    ordered = torch.sparse_csr_tensor(
        codes.crow, columns.sort(1).values.flatten().int(), codes.values, (B, F),
        check_invariants=False,
    )  # fmt: skip
    sampled = functools.partial(
        torch.sparse.sampled_addmm, mat1=grad, mat2=weights.W_dec.T, beta=0.0
    )
    z16, wide_columns = z.bfloat16(), codes.columns.long()
    dense = torch.zeros_like(z)

    def group_maxima() -> Tensor:
        """Exact top-k in two stages, as sae.largest_k on a CPU: the k groups of largest maximum."""
        g = 16 if F > 4096 else 8
        groups = z.view(B, g, F // g).amax(1).topk(k, sorted=False).indices
        offsets = torch.arange(0, F, F // g, device=device).view(1, g, 1)
        candidates = (groups.unsqueeze(1) + offsets).reshape(B, g * k)
        best = z.gather(1, candidates).topk(k, sorted=False).indices
        return candidates.gather(1, best)

    def gathered() -> Tensor:
        return torch.bmm(weights.W_dec[columns], grad.unsqueeze(2)).squeeze(2)

    def by_bag() -> Callable[[Tensor, Tensor], Tensor]:
        return step.sum_by_latent(codes, F)

    def unit_rows() -> None:
        along = torch.einsum("fd,fd->f", weights.W_enc, weights.W_dec)
        weights.W_enc.addcmul_(along.unsqueeze(1), weights.W_dec, value=-1)
        weights.W_dec.div_(torch.linalg.vector_norm(weights.W_dec, dim=1, keepdim=True))

    runs: dict[str, Callable[[], Any]] = {
        "addmm float32": lambda: torch.addmm(weights.b_enc, x, weights.W_enc.T, out=out),
        "addmm tf32": lambda: torch.addmm(weights.b_enc, x, weights.W_enc.T, out=out),
        "topk": lambda: z.topk(k, sorted=False),
        "topk bfloat16": lambda: z16.topk(k, sorted=False),
        "topk in two stages": group_maxima,
        "decode": lambda: step.decode(codes, weights.W_dec),
        "decode int64": lambda: embedding_bag(
            columns, weights.W_dec, mode="sum", per_sample_weights=codes.values.view(B, k)
        ),
        "sampled_addmm int32": lambda: sampled(narrow),
        "sampled_addmm int64": lambda: sampled(wide),
        "sampled_addmm sorted": lambda: sampled(ordered),
        "code gradient by gather": gathered,
        "code gradient dense tf32": lambda: (grad @ weights.W_dec.T).gather(1, columns),
        "sort by latent": by_bag,
        "weight gradient by bags": lambda: sum_by_latent(grad, codes.values),
        "weight gradient dense tf32": lambda: dense.scatter_(
            1, columns, codes.values.view(B, k)
        ).T @ grad,
        "adam": adam.step,
        "unit rows": unit_rows,
        "unfired by mask": lambda: torch.zeros(F, device=device).index_fill_(
            0, wide_columns[codes.values > 0], 1
        ),
    }  # fmt: skip
    sum_by_latent = record.guard("pieces/sort by latent first", by_bag)
    for name, run in runs.items():

        def timed(name: str = name, run: Callable[[], Any] = run) -> dict[str, Any]:
            with tf32("tf32" in name, False):
                return spread(times_ms(lambda _: run(), device, 7)[2:])

        record.attempt(f"pieces/{name}", timed, 1.0)
    count = sum(w.numel() for w in weights)
    record.add(
        "floor",
        {
            "parameters": count,
            "adam_bytes": ADAM_BYTES * count,
            "encode_flop": size.flop,
            "sparse_flop": 8 * B * k * size.width,
            "pre_activation_bytes": 4 * B * F,
        },
    )
