"""Our generation against transformers' `generate()` on the same model, from one interleaved run.

    python -m benchmarks.generation --model nano-small

One thread, process CPU time (robust to other processes), everything interleaved, median
[min, max] over rounds; guided sampling from the caption to the waveform.

* floor: the decoder's weight products of every step alone, one GEMM each, on as many rows.
* ours, ours with a hook that returns its input.
* transformers.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch  # noqa: E402

from benchmarks.records import OUT_HELP, open_record  # noqa: E402
from musicscope.core.command_line import Parser, number, run_program, whole
from musicscope.models.registry import load_model  # noqa: E402

RESULT = "benchmarks/results/generation.json"


def products(model, rows: int, steps: int) -> Callable[[], None]:
    """Every weight matrix of the decoder's layers and heads times as many rows, `steps` times."""
    matrices = [
        module.weight.detach()
        for name, module in model.hf.decoder.named_modules()
        if isinstance(module, torch.nn.Linear)
        # Keys and values of the text are computed once, not at every step.
        and not name.endswith(("encoder_attn.k_proj", "encoder_attn.v_proj"))
    ]
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1]) for w in matrices}

    def run() -> None:
        for _ in range(steps):
            for weight in matrices:
                inputs[weight.shape[1]] @ weight.T

    return run


def ways(model, prompts: int, frames: int) -> dict[str, Callable[[], object]]:
    """Name -> one generation of `prompts` pieces of `frames` frames."""
    texts = ["guitar and drums, slow tempo"] * prompts
    seconds = frames / model.frame_rate
    scale, layer = model.guidance_scale, model.hook_points[1].name
    inputs = model.tokenizer(texts, padding=True, return_tensors="pt")
    steps = frames + model.num_codebooks - 1

    def transformers() -> torch.Tensor:
        return model.hf.generate(
            **inputs, do_sample=True, guidance_scale=scale, max_new_tokens=steps, top_k=250
        )

    return {
        "floor": products(model, 2 * prompts, steps),
        "ours": lambda: model.generate(texts, seconds, 0),
        "ours_hooked": lambda: model.generate(texts, seconds, 0, {layer: lambda x, at: x}),
        "transformers": transformers,
    }


@torch.no_grad()
def measure(name: str, prompts: int, frames: int, budget: float) -> dict:
    """CPU seconds of every way, by interleaved rounds until `budget` seconds are over."""
    model = load_model(f"data/models/{name}")
    runs = ways(model, prompts, frames)
    times: dict[str, list[float]] = {way: [] for way in runs}
    for run in runs.values():
        run()
    end = time.monotonic() + budget
    while time.monotonic() < end or len(times["floor"]) < 3:
        for way, run in runs.items():
            begin = time.process_time()
            run()
            times[way].append(time.process_time() - begin)
    return {
        "model": name,
        "prompts": prompts,
        "frames": frames,
        "rounds": len(times["floor"]),
        "seconds": {
            way: {"median": statistics.median(t), "min": min(t), "max": max(t)}
            for way, t in times.items()
        },
        "ratio_to_ours": {
            way: statistics.median(a / b for a, b in zip(t, times["ours"], strict=True))
            for way, t in times.items()
        },
        "torch": torch.__version__,
    }


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano-small", help="a name under data/models")
    parser.add_argument("--prompts", type=whole(1), default=32, help="pieces generated together")
    parser.add_argument("--frames", type=whole(1), default=100, help="length of each")
    parser.add_argument(
        "--budget", type=number(above=0), default=60.0, help="seconds to measure for"
    )
    parser.add_argument("--out", metavar="FILE", help=OUT_HELP.format(RESULT))
    options = parser.parse_args()
    record = open_record(options.out, RESULT)
    torch.set_num_threads(1)
    result = measure(options.model, options.prompts, options.frames, options.budget)
    for way, seconds in result["seconds"].items():
        print(f"{way:13} {seconds['median']:7.2f} s   x {result['ratio_to_ours'][way]:.2f}")
    print(f"written to {record.write(result)}")


if __name__ == "__main__":
    run_program(main)
