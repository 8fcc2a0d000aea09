"""One training step of ours against the field's, as ratios to the one product none can avoid.

    python -m benchmarks.sae_step            # writes benchmarks/results/sae_step.json

One thread, process CPU time (robust to other processes), implementations interleaved, median
[min, max] over rounds. Data loading is left out; every step includes forward, backward,
optimiser and decoder norm.

* gemm: x W_enc^T alone, the floor.
* dictionary_learning: its TopKTrainer.update, installed package, wandb stubbed (never used).
* sparsify: eai-sparsify's SparseCoder where it is installed (`pip install -e .[bench]`), else the
  same operations transcribed below; the result's "sparsify" key says which. Around it the body of
  its trainer, which cannot run without a language model: normalise the decoder, forward, backward,
  gradient projection, Adam. Its default optimiser (signum) is some 10 % cheaper than Adam.
* auxk: 10 % of latents dead, kept dead by a bias of -1000.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
import types

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import embedding_bag  # noqa: E402

from benchmarks.records import OUT_HELP, open_record  # noqa: E402
from musicscope.core.command_line import Parser, number, run_program
from musicscope.dictionaries.step import Aux, gradients, initial_state, step  # noqa: E402

RESULT = "benchmarks/results/sae_step.json"

SHAPES = ((1024, 8192), (192, 1536), (128, 1024))
BATCH, K, DEAD_BIAS = 2048, 32, -1000.0


def activations(width: int, generator: torch.Generator) -> Tensor:
    """Low rank with a power-law spectrum + 10 % noise, unit variance, as in real streams."""
    rank = width // 4
    basis = torch.randn(rank, width, generator=generator) / rank**0.5
    scales = torch.arange(1, rank + 1).pow(-0.5)
    x = (torch.randn(BATCH, rank, generator=generator) * scales) @ basis
    return x / x.std() + 0.1 * torch.randn(BATCH, width, generator=generator)


class SparsifyEncoder(torch.autograd.Function):
    """Transcribed: Linear -> ReLU -> TopK whose backward touches the chosen latents only."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, k: int):
        dense = torch.relu(torch.nn.functional.linear(x, weight, bias))
        values, indices = dense.topk(k, sorted=False)
        ctx.save_for_backward(x, weight, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        x, weight, indices = ctx.saved_tensors
        flat = indices.flatten()
        rows = (grad.unsqueeze(2) * x.unsqueeze(1)).reshape(-1, x.shape[1])
        d_weight = torch.zeros_like(weight).index_add_(0, flat, rows)
        d_bias = weight.new_zeros(len(weight)).index_add_(0, flat, grad.flatten())
        d_x = embedding_bag(indices, weight, mode="sum", per_sample_weights=grad)
        return d_x, d_weight, d_bias, None


class SparsifyTranscribed(torch.nn.Module):
    """As much of sparsify's SparseCoder as a step without AuxK needs."""

    def __init__(self, width: int, latents: int) -> None:
        super().__init__()
        self.encoder = torch.nn.Linear(width, latents)
        self.W_dec = torch.nn.Parameter(self.encoder.weight.data.clone())
        self.b_dec = torch.nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, dead_mask: Tensor | None = None):
        values, indices = SparsifyEncoder.apply(
            x - self.b_dec, self.encoder.weight, self.encoder.bias, K
        )
        out = embedding_bag(indices, self.W_dec, mode="sum", per_sample_weights=values) + self.b_dec
        fvu = (x - out).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
        return types.SimpleNamespace(fvu=fvu, auxk_loss=0.0, latent_indices=indices)

    @torch.no_grad()
    def set_decoder_norm_to_unit_norm(self) -> None:
        norm = torch.norm(self.W_dec.data, dim=1, keepdim=True)
        self.W_dec.data /= norm + torch.finfo(self.W_dec.dtype).eps

    @torch.no_grad()
    def remove_gradient_parallel_to_decoder_directions(self) -> None:
        along = torch.einsum("fd,fd->f", self.W_dec.grad, self.W_dec.data)
        self.W_dec.grad -= torch.einsum("f,fd->fd", along, self.W_dec.data)


def sparsify_source() -> str:
    """The installed package's version, or "transcribed"."""
    try:
        import sparsify
    except ImportError:
        return "transcribed"
    return f"eai-sparsify {sparsify.__version__}"


def sparsify_step(width: int, latents: int, dead: bool):
    torch.manual_seed(0)
    if sparsify_source() == "transcribed":
        sae = SparsifyTranscribed(width, latents)
    else:
        from sparsify import SparseCoder, SparseCoderConfig

        sae = SparseCoder(width, SparseCoderConfig(num_latents=latents, k=K))
    adam = torch.optim.Adam(sae.parameters(), lr=1e-4)
    mask = torch.zeros(latents, dtype=torch.bool)
    mask[: latents // 10 if dead else 0] = True
    sae.encoder.bias.data[mask] = DEAD_BIAS
    unfired = torch.zeros(latents, dtype=torch.long)

    def update(x: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x, dead_mask=mask if dead else None)
        (out.fvu + out.auxk_loss / 32).backward()
        fired = torch.zeros_like(mask)
        fired[out.latent_indices.flatten()] = True
        sae.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        unfired.add_(len(x))
        unfired[fired] = 0

    return update


def dictionary_learning_step(width: int, latents: int, dead: bool):
    sys.modules.setdefault("wandb", types.ModuleType("wandb"))  # imported there, never needed
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=10**6, activation_dim=width, dict_size=latents, k=K, layer=0, lm_name="none",
        lr=1e-4, seed=0, device="cpu",
    )  # fmt: skip
    trainer.ae.b_dec.data.zero_()
    gone = slice(0, latents // 10 if dead else 0)
    trainer.ae.encoder.bias.data[gone] = DEAD_BIAS

    def update(x: Tensor) -> None:
        trainer.num_tokens_since_fired[gone] = trainer.dead_feature_threshold
        trainer.update(1, x)  # step 0 would time the geometric median

    return update


def ours_step(width: int, latents: int, dead: bool):
    state = initial_state(latents, [width], 0, "cpu")
    if dead:
        state.weights[0].b_enc[: latents // 10] = DEAD_BIAS
        state.unfired[: latents // 10] = 10**9

    def update(x: Tensor) -> None:
        step(state, [x], 1e-4, K, aux_k=width // 2, aux_weight=1 / 32, dead_after=10**8)

    return update


def gradients_only(width: int, latents: int):
    state = initial_state(latents, [width], 0, "cpu")
    scratch = torch.empty(BATCH, latents)
    none = Aux(torch.empty(0, dtype=torch.int64), 0, 0.0)
    return lambda x: gradients(state.weights, [x], K, aux=none, scratch=scratch)


def measure(width: int, latents: int, seconds: float) -> dict:
    x = activations(width, torch.Generator().manual_seed(0))
    weight, out = torch.randn(latents, width), torch.empty(BATCH, latents)
    steps = {
        "gemm": lambda x: torch.mm(x, weight.T, out=out),
        "ours": ours_step(width, latents, False),
        "ours_gradients_only": gradients_only(width, latents),
        "ours_auxk": ours_step(width, latents, True),
        "sparsify": sparsify_step(width, latents, False),
        "dictionary_learning": dictionary_learning_step(width, latents, False),
        "dictionary_learning_auxk": dictionary_learning_step(width, latents, True),
    }
    if sparsify_source() != "transcribed":
        steps["sparsify_auxk"] = sparsify_step(width, latents, True)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for update in steps.values():
        update(x)
    end = time.process_time() + seconds
    while time.process_time() < end or len(times["gemm"]) < 3:
        for name, update in steps.items():
            start = time.process_time()
            update(x)
            times[name].append(time.process_time() - start)
    floor = statistics.median(times["gemm"])
    return {
        "rounds": len(times["gemm"]),
        "steps": {
            name: {
                "ms": 1e3 * statistics.median(t),
                "ms_min": 1e3 * min(t),
                "ms_max": 1e3 * max(t),
                "x_gemm": statistics.median(t) / floor,
            }
            for name, t in times.items()
        },
    }


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", metavar="FILE", help=OUT_HELP.format(RESULT))
    parser.add_argument(
        "--seconds", type=number(above=0), default=60.0, help="in all, over three shapes"
    )
    arguments = parser.parse_args()
    record = open_record(arguments.out, RESULT)
    torch.set_num_threads(1)
    result = {
        "batch": BATCH,
        "k": K,
        "threads": 1,
        "time": "process CPU",
        "torch": torch.__version__,
        "sparsify": sparsify_source(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    for (width, latents), share in zip(SHAPES, (0.7, 0.15, 0.15), strict=True):
        name = f"d{width}_F{latents}"
        result[name] = measure(width, latents, share * arguments.seconds)
        print(f"{name}: {result[name]['rounds']} rounds", file=sys.stderr)
        for method, t in result[name]["steps"].items():
            print(
                f"  {method:26s} {t['ms']:8.1f} ms [{t['ms_min']:.1f}, {t['ms_max']:.1f}]"
                f"  {t['x_gemm']:5.2f} x gemm",
                file=sys.stderr,
            )
    print(f"written to {record.write(result)}")


if __name__ == "__main__":
    run_program(main)
