"""Switch concepts off and on in one model's music: data/steering/<model>, metrics and plots/steer.

Learns recipes from data/activations and data/sae, chooses settings on validation prompts (of an
audio model, clips), and reports on test prompts. Both use the judges in data/judge, which never
choose latents.

--section steer_full is the whole evaluation with the settings of params.steer_full, which takes
hours: data/steering_full/<model>, metrics and plots/steer_full. It is frozen, with its outs in Git.
"""

from __future__ import annotations

from musicscope.config import load_params
from musicscope.core.command_line import Parser
from musicscope.core.distributed import resolve_device
from musicscope.steering.report import Outs
from musicscope.steering.run import evaluate
from stages import model_name, run_stage

FOLDERS = {"steer": "data/steering", "steer_full": "data/steering_full"}


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("model", type=model_name, help="a name in params.yaml: models")
    parser.add_argument("--section", choices=FOLDERS, default="steer", help="of params.yaml")
    args = parser.parse_args()
    params = load_params()
    device = resolve_device(params.compute.device)
    processes = params.compute.processes if device == "cpu" else 1
    name, section = args.model, args.section
    outs = Outs(f"{FOLDERS[section]}/{name}", f"metrics/{section}/{name}.json",
                f"plots/{section}/{name}")  # fmt: skip
    evaluate(name, getattr(params, section), params.seed, device, processes, outs, params.concepts)


if __name__ == "__main__":
    run_stage(main)
