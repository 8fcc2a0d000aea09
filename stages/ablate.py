"""Score every layer of a model, and find the layers that carry a concept of the caption.

Writes metrics/ablate/<model>.json and plots/ablate/<model>.csv. Reads data/clips and
data/models/<model>.
"""

from __future__ import annotations

from musicscope.ablation.run import localise, run
from musicscope.config import load_params
from musicscope.core.distributed import resolve_device
from musicscope.core.io import write_json, write_text
from stages import run_stage, stage_args


def main() -> None:
    (name,) = stage_args(__doc__, "model")
    params = load_params()
    section, device = params.ablate, resolve_device(params.compute.device)
    processes = params.compute.processes if device == "cpu" else 1

    metrics, table = run(name, section, params.seed, device, processes)
    metrics["concepts"] = localise(name, section, params.seed, device, processes)
    write_json(f"metrics/ablate/{name}.json", metrics)
    write_text(f"plots/ablate/{name}.csv", table.to_csv(index=False, float_format="%.6g"))


if __name__ == "__main__":
    run_stage(main)
