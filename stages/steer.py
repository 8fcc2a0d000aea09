"""Concepts off and on in one model's music: data/steering/<model>, metrics and plots/steer.

Learns recipes from data/activations and data/sae (layer of metrics/layers/<model>.yaml), chooses
strength, number of latents and branch on validation prompts, and reports on test prompts; both by
the judges in data/judge, which never choose latents. As many prompts as minutes allow: steer_full
is the same with all that hours allow.
"""

from __future__ import annotations

import argparse

from musicscope.config import load_params
from musicscope.core.distributed import resolve_device
from musicscope.steering.report import Outs
from musicscope.steering.run import evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a name in params.yaml: models")
    name = parser.parse_args().model
    params = load_params()
    device = resolve_device(params.compute.device)
    processes = params.compute.processes if device == "cpu" else 1
    outs = Outs(f"data/steering/{name}", f"metrics/steer/{name}.json", f"plots/steer/{name}")
    evaluate(name, params.steer, params.seed, device, processes, outs)


if __name__ == "__main__":
    main()
