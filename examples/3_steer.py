"""Generate the same music twice, as it is and with a concept switched off or on.

    python examples/3_steer.py [--concept bass] [--off] [--out DIR]

Uses the difference-of-means direction that the stage `steer_full` learnt, which is in Git for
nano-small and nano-medium: guitar, drums, bass, brass. Both versions use the same noise. The
direction is added to the captioned rows of guided generation. Takes about ten seconds on one core.

`musicscope generate` edits SAE latents and scores the result with two judges. It needs outputs of
the pipeline: run `dvc repro train_sae train_judge` first.
"""

from __future__ import annotations

import sys
from pathlib import Path

import soundfile
import torch
from torch import Tensor

from musicscope.core.command_line import Parser, number, run_program
from musicscope.models.registry import load_model
from musicscope.steering.recipes import load_recipe


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="nano-small", help="nano-small or nano-medium")
    parser.add_argument("--concept", default="bass", help="guitar, drums, bass or brass")
    parser.add_argument("--off", action="store_true", help="switch off instead of on")
    parser.add_argument("--prompt", default=None, help="what to generate")
    parser.add_argument("--strength", type=number(), default=0.25, help="times the difference")
    parser.add_argument("--seconds", type=number(above=0), default=3.0)
    parser.add_argument(
        "--out", type=Path, default=Path("data/examples"), help="folder of the WAVs"
    )
    args = parser.parse_args()
    try:
        recipe = load_recipe(f"data/steering_full/{args.model}", args.concept)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"{error}\nRun from the root of the repository.")

    model = load_model(args.model)
    prompt = args.prompt or f"A calm piece with {args.concept if args.off else 'piano'}."
    direction = recipe.directions["difference"] * args.strength * (-1 if args.off else 1)

    def add(activations: Tensor, positions: Tensor) -> Tensor:
        changed = activations.clone()  # [rows, position, d]; a hook must not write into its input
        changed[model.conditional_rows] += direction.to(changed.dtype)
        return changed

    hooks = {recipe.layer: add}
    plain, codes = model.generate([prompt], args.seconds, seed=0)
    steered, changed = model.generate([prompt], args.seconds, seed=0, hooks=hooks)
    args.out.mkdir(parents=True, exist_ok=True)
    word = f"{args.concept}-{'off' if args.off else 'on'}"
    for name, audio in (("plain", plain), (word, steered)):
        path = args.out / f"{args.model}-{name}.wav"
        soundfile.write(path, audio[0].numpy(), model.sample_rate)
        print(path)
    share = float((codes != changed).float().mean())
    rms = [float(torch.sqrt(a.square().mean())) for a in (plain, steered)]
    print(f"{prompt!r}: {share:.0%} of codes differ; RMS {rms[0]:.3f} -> {rms[1]:.3f}")


if __name__ == "__main__":
    run_program(main)
