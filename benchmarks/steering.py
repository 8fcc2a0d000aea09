"""Steered against plain generation of the same model, as ratios from one interleaved run.

    python -m benchmarks.steering --model nano-small

One thread, process CPU time (robust to other processes), everything interleaved, median
[min, max] over rounds; guided generation of as many prompts as the evaluation takes at once, from
the caption to the waveform. Edits raise latents, so that they act on every frame.

* plain: no hook.
* strength_0: a steering of strength 0; its tokens are checked to be those of plain.
* conditional, both: 16 latents on the captioned rows, on all rows.
* joint: four concepts of 16 latents each.
* closed_loop: conditional, with a gate that listens to 16 latents.
* passthrough: all rows encoded and decoded, the usual way to edit codes.
"""

from __future__ import annotations

import os
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from benchmarks.records import OUT_HELP, open_record  # noqa: E402
from musicscope.core.command_line import Parser, number, run_program, whole
from musicscope.core.io import read_json  # noqa: E402
from musicscope.dictionaries.core import TopKSAE  # noqa: E402
from musicscope.models.registry import load_model  # noqa: E402
from musicscope.steering.conditions import reconstruction_change  # noqa: E402
from musicscope.steering.edit import ConceptEdit, Edit, Gate, Steering, change_hook, steering_hook  # noqa: E402

RESULT = "benchmarks/results/steering.json"
LATENTS = 16
VALUE = 5.0
TARGET = 1.05
"""The most that steering may cost, as a multiple of plain generation."""


def concepts(sae: TopKSAE, n: int, strength: float = 1.0) -> tuple[ConceptEdit, ...]:
    """`n` concepts of `LATENTS` random latents each, raised to a value that they rarely reach."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(sae.n_latents, generator=generator).tolist()
    return tuple(
        ConceptEdit(
            str(i),
            (Edit(tuple(order[i * LATENTS : (i + 1) * LATENTS]), "clamp_min", (VALUE,) * LATENTS),),
            strength,
        )
        for i in range(n)
    )


def measure(name: str, slot: str, prompts: int, seconds: float, budget: float) -> dict:
    """CPU seconds of every way to generate, by interleaved rounds until `budget` is over."""
    model = load_model(f"data/models/{name}")
    folder = f"data/sae/{name}/{slot}/seed-0"
    sae, layer = TopKSAE.load(folder), read_json(f"{folder}/config.json")["trainer"]["layer"]
    gate = Gate(tuple(range(LATENTS)), (1.0,) * LATENTS, 1e6, 1.0)  # always open
    (one,) = concepts(sae, 1)
    closed = ConceptEdit(one.name, one.edits, 1.0, gate)
    hooks = {
        "plain": None,
        "strength_0": steering_hook(model, Steering(sae, concepts(sae, 4, 0.0))),
        "conditional": steering_hook(model, Steering(sae, (one,))),
        "both": steering_hook(model, Steering(sae, (one,), "both")),
        "joint": steering_hook(model, Steering(sae, concepts(sae, 4))),
        "closed_loop": steering_hook(model, Steering(sae, (closed,))),
        "passthrough": change_hook(model, reconstruction_change(sae), "both"),
    }
    texts = ["guitar and drums"] * prompts

    def run(hook) -> torch.Tensor:
        return model.generate(texts, seconds, 0, None if hook is None else {layer: hook})[1]

    tokens = {way: run(hook) for way, hook in hooks.items()}
    assert torch.equal(tokens["plain"], tokens["strength_0"]), "strength 0 changed the tokens"
    for way in ("conditional", "both", "joint", "closed_loop", "passthrough"):
        assert not torch.equal(tokens["plain"], tokens[way]), f"{way} changed nothing"
    times: dict[str, list[float]] = {way: [] for way in hooks}
    end = time.monotonic() + budget
    while time.monotonic() < end or len(times["plain"]) < 3:
        for way, hook in hooks.items():
            start = time.process_time()
            run(hook)
            times[way].append(time.process_time() - start)
    # By round: what slows the machine for a while slows both of a pair.
    ratios = {
        way: statistics.median(a / b for a, b in zip(t, times["plain"], strict=True))
        for way, t in times.items()
    }
    steps = round(seconds * model.frame_rate) + model.num_codebooks - 1
    return {
        "layer": layer,
        "latents": sae.n_latents,
        "width": sae.width,
        "prompts": prompts,
        "frames": round(seconds * model.frame_rate),
        "rounds": len(times["plain"]),
        "ms_cpu_a_step": {
            way: {
                "median": 1e3 * statistics.median(t) / steps,
                "min": 1e3 * min(t) / steps,
                "max": 1e3 * max(t) / steps,
            }
            for way, t in times.items()
        },
        "ratio_to_plain": {way: ratio for way, ratio in ratios.items() if way != "plain"},
        "target": TARGET,
        "within_target": all(
            ratios[way] <= TARGET
            for way in ("strength_0", "conditional", "both", "joint", "closed_loop")
        ),
    }


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano-small", help="a name under data/models")
    parser.add_argument("--slot", default="top1", help="the SAE's slot")
    parser.add_argument("--prompts", type=whole(1), default=32, help="prompts generated together")
    parser.add_argument("--seconds", type=number(above=0), default=0.5, help="length of each piece")
    parser.add_argument(
        "--budget", type=number(above=0), default=50.0, help="seconds to measure for"
    )
    parser.add_argument("--out", metavar="FILE", help=OUT_HELP.format(RESULT))
    options = parser.parse_args()
    record = open_record(options.out, RESULT)
    torch.set_num_threads(1)
    result = measure(
        options.model, options.slot, options.prompts, options.seconds, options.budget
    ) | {"model": options.model, "torch": torch.__version__}
    for way, ms in result["ms_cpu_a_step"].items():
        ratio = result["ratio_to_plain"].get(way, 1.0)
        print(f"{way:12} {ms['median']:7.2f} ms a step [{ms['min']:.2f}, {ms['max']:.2f}]", end="")
        print(f"   x {ratio:.3f}")
    print(f"written to {record.write(result)}")


if __name__ == "__main__":
    run_program(main)
