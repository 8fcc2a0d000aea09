"""A universal SAE's training step for two models, as ratios to the one product none can avoid.

    python -m benchmarks.usae_step           # writes benchmarks/results/usae_step.json

One thread, process CPU time (robust to other processes), implementations interleaved, median
[min, max] over rounds. A round draws each of the two models once, so widths may differ. Data
loading is left out; every step includes forward, backward, optimiser and decoder norm.

* gemm: x_i W_enc_i^T alone for the drawn model, the floor.
* paper, all_decoders: step; paper_auxk with 10 % of latents dead, kept dead by a
  bias of -1000. crosscoder: one step on both models, whose own floor is both products (gemm_both).
* released: the step of the USAE paper's released code, written here from its description, since
  the original trains on images with CUDA: encoder Linear -> BatchNorm -> ReLU -> TopK to dense
  codes, dictionaries normalised in every forward, dense decodes, for each model the mean absolute
  error + 0.1 x the error of the residual predicted by the top half of the codes not chosen, one
  backward over all, gradient norms clipped at 1, AdamW of the drawn model only.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.records import OUT_HELP, open_record  # noqa: E402
from benchmarks.sae_step import activations  # noqa: E402
from musicscope.core.command_line import Parser, number, run_program
from musicscope.dictionaries.step import initial_state, join, step  # noqa: E402

RESULT = "benchmarks/results/usae_step.json"

SHAPES = (((1024, 1024), 8192), ((128, 192), 1536))
BATCH, K, DEAD_BIAS = 2048, 32, -1000.0
Update = Callable[[list[Tensor], int], None]


class ReleasedSAE(torch.nn.Module):
    """One model's encoder and dictionary, dense."""

    def __init__(self, width: int, latents: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(width, latents)
        self.norm = torch.nn.BatchNorm1d(latents)
        self.rows = torch.nn.Parameter(torch.randn(latents, width))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """All positive codes, and those that are kept; both dense [B, F]."""
        dense = torch.relu(self.norm(self.linear(x)))
        best = dense.topk(K, dim=1)
        return dense, torch.zeros_like(dense).scatter(1, best.indices, best.values)

    def loss(self, x: Tensor, dense: Tensor, kept: Tensor) -> Tensor:
        dictionary = torch.nn.functional.normalize(self.rows, dim=1)
        error = x - kept @ dictionary
        rest = (dense - kept).topk(dense.shape[1] // 2, dim=1)
        others = torch.zeros_like(dense).scatter(1, rest.indices, rest.values)
        return error.abs().mean() + 0.1 * (error - others @ dictionary).abs().mean()


def released(widths: tuple[int, ...], latents: int) -> Update:
    torch.manual_seed(0)
    saes = [ReleasedSAE(width, latents) for width in widths]
    adams = [torch.optim.AdamW(sae.parameters(), lr=1e-4, weight_decay=1e-5) for sae in saes]

    def update(xs: list[Tensor], drawn: int) -> None:
        adams[drawn].zero_grad()
        dense, kept = saes[drawn].encode(xs[drawn])
        sum(sae.loss(x, dense, kept) for sae, x in zip(saes, xs, strict=True)).backward()
        for sae in saes:
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        adams[drawn].step()

    return update


def ours(widths: tuple[int, ...], latents: int, rule: str, dead: bool = False) -> Update:
    state = initial_state(latents, widths, 0, "cpu")
    gone = slice(0, latents // 10 if dead else 0)
    for model in state.weights:
        model.b_enc[gone] = DEAD_BIAS
    state.unfired[gone] = 10**9
    aux_k = sum(widths) // len(widths) // 2

    def update(xs: list[Tensor], drawn: int) -> None:
        step(
            state, xs, 1e-4, K, drawn=drawn, rule=rule, aux_k=aux_k, aux_weight=1 / 32,
            dead_after=10**8,
        )  # fmt: skip

    return update


def crosscoder(widths: tuple[int, ...], latents: int) -> Update:
    """A step already covers both models: it is taken where the first is drawn."""
    state = initial_state(latents, [sum(widths)], 0, "cpu")

    def update(xs: list[Tensor], drawn: int) -> None:
        if drawn == 0:
            step(state, [join(xs)], 1e-4, K)

    return update


def measure(widths: tuple[int, ...], latents: int, seconds: float) -> dict:
    generator = torch.Generator().manual_seed(0)
    xs = [activations(width, generator) for width in widths]
    encoders = [torch.randn(latents, width) for width in widths]
    joint, out = torch.cat(encoders, 1), torch.empty(BATCH, latents)

    def gemm_both(xs: list[Tensor], drawn: int) -> None:
        if drawn == 0:
            torch.mm(join(xs), joint.T, out=out)

    steps: dict[str, Update] = {
        "gemm": lambda xs, drawn: torch.mm(xs[drawn], encoders[drawn].T, out=out),
        "paper": ours(widths, latents, "paper"),
        "paper_auxk": ours(widths, latents, "paper", dead=True),
        "all_decoders": ours(widths, latents, "all_decoders"),
        "released": released(widths, latents),
        "gemm_both": gemm_both,
        "crosscoder": crosscoder(widths, latents),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for update in steps.values():
        for drawn in range(len(widths)):
            update(xs, drawn)
    end = time.process_time() + seconds
    while time.process_time() < end or len(times["gemm"]) < 3:
        for name, update in steps.items():
            start = time.process_time()
            for drawn in range(len(widths)):
                update(xs, drawn)
            times[name].append(time.process_time() - start)
    both = {"gemm_both", "crosscoder"}  # one step a round, the others one a model
    ms = {n: [1e3 * s / (1 if n in both else len(widths)) for s in t] for n, t in times.items()}
    floors = {n: statistics.median(ms["gemm_both" if n in both else "gemm"]) for n in ms}
    return {
        "rounds": len(times["gemm"]),
        "steps": {
            name: {
                "ms": statistics.median(t),
                "ms_min": min(t),
                "ms_max": max(t),
                "x_gemm": statistics.median(t) / floors[name],
            }
            for name, t in ms.items()
        },
    }


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", metavar="FILE", help=OUT_HELP.format(RESULT))
    parser.add_argument(
        "--seconds", type=number(above=0), default=60.0, help="in all, over the shapes"
    )
    parser.add_argument("--small", action="store_true", help="the small shape only, to try it")
    arguments = parser.parse_args()
    record = open_record(arguments.out, RESULT)
    torch.set_num_threads(1)
    result = {
        "batch": BATCH,
        "k": K,
        "threads": 1,
        "time": "process CPU",
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    shapes = SHAPES[1:] if arguments.small else SHAPES
    for widths, latents in shapes:
        name = f"d{'_'.join(map(str, widths))}_F{latents}"
        result[name] = measure(widths, latents, arguments.seconds / len(shapes))
        print(f"{name}: {result[name]['rounds']} rounds", file=sys.stderr)
        for method, t in result[name]["steps"].items():
            print(
                f"  {method:14s} {t['ms']:8.1f} ms [{t['ms_min']:.1f}, {t['ms_max']:.1f}]"
                f"  {t['x_gemm']:5.2f} x gemm",
                file=sys.stderr,
            )
    print(f"written to {record.write(result)}")


if __name__ == "__main__":
    run_program(main)
