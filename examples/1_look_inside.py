"""Read the activations of a model, and measure what each layer contributes.

    python examples/1_look_inside.py [--model nano-small]

Generates two seconds of music, encodes it again, and reads every decoder layer in one pass. Then it
replaces one layer's output at a time by its mean over frames, and prints the rise in cross-entropy.
Needs nothing but the model in data/models. Takes about ten seconds on one core.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from musicscope.core.command_line import Parser, run_program
from musicscope.models.registry import load_model

CAPTIONS = ["A calm piece with guitar and strings.", "A fast piece with drums and bass."]


def mean_over_frames(activations: Tensor, positions: Tensor) -> Tensor:
    """Replace activations [B, S, d] by their mean over frames; keep the start column."""
    frames = positions > 0
    mean = activations[:, frames].mean(dim=1, keepdim=True)
    return torch.where(frames[None, :, None], mean, activations)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="nano-small", help="a folder or a name in data/models")
    model = load_model(parser.parse_args().model)
    print(f"{model.name}: {len(model.hook_points)} layers, {model.frame_rate:g} frames per second")

    audio, _ = model.generate(CAPTIONS, seconds=2.0, seed=0)
    batch = model.encode(audio, CAPTIONS)
    names = [point.name for point in model.hook_points]
    activations = model.capture(batch, names)  # {name: [clip, frame, d]}

    def nats_per_code(hooks=None) -> float:
        logits = model.forward(batch, hooks)  # [clip, codebook, frame, code]
        return float(cross_entropy(logits.flatten(0, -2), batch.codes.flatten()))

    intact = nats_per_code()
    print(f"cross-entropy: {intact:.3f} nats per code")
    print("layer      shape             mean norm   rise in cross-entropy without its detail")
    for name in names:
        x = activations[name]
        norm = float(x.norm(dim=-1).mean())
        rise = nats_per_code({name: mean_over_frames}) - intact
        print(f"{name:10} {tuple(x.shape)!s:17} {norm:9.1f}   {rise:+.3f}")


if __name__ == "__main__":
    run_program(main)
