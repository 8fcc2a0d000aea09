"""The whole evaluation of steering: data/steering_full/<model>, metrics and plots/steer_full.

As the stage steer, with the settings of params.steer_full: hours. Frozen, with its outs in Git;
data/judge and the SAEs are those of the same commit.
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
    outs = Outs(
        f"data/steering_full/{name}", f"metrics/steer_full/{name}.json", f"plots/steer_full/{name}"
    )
    evaluate(name, params.steer_full, params.seed, device, processes, outs)


if __name__ == "__main__":
    main()
