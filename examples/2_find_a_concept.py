"""Find which features of a layer tell music with a concept from music without it.

    python examples/2_find_a_concept.py [--model nano-small] [--concept guitar] [--layer layers.1]

Generates clips from captions with and without the concept, reads one layer, and ranks its features
on half of the captions. The AUROC on the other half is printed beside a null: the same
selection under permuted labels. Features are the latents of an SAE where `dvc repro train_sae` has
trained one, and else the dimensions of the activations. Takes about half a minute on one core.

This is a demonstration. `musicscope find-concept` does it on recordings, with corrected p-values.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from musicscope.core.command_line import Parser, number, run_program
from musicscope.dictionaries.core import TopKSAE
from musicscope.models.registry import load_model

OTHERS = ("piano", "strings", "flute", "organ", "drums", "bass", "brass", "synth")
MOODS = ("calm", "fast", "slow", "busy", "sparse", "bright")


def features_of(x: torch.Tensor, sae: TopKSAE | None) -> np.ndarray:
    """Means over frames [clip, feature] of activations [clip, frame, d], or of their latents."""
    if sae is None:
        return x.mean(dim=1).numpy()
    values, indices = sae.encode(x.flatten(0, 1))
    codes = torch.zeros(len(values), sae.n_latents).scatter_(1, indices, values)
    return codes.view(len(x), -1, sae.n_latents).mean(dim=1).numpy()


def auroc(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """AUROC of every column of scores [clip, feature]; ties count half."""
    on, off = scores[labels][:, None], scores[~labels][None]
    return (on > off).mean((0, 1)) + 0.5 * (on == off).mean((0, 1))


def best_on_test(scores: np.ndarray, labels: np.ndarray, half: np.ndarray, n: int) -> np.ndarray:
    """Choose n features on one half; give their indices and AUROC on the other half [n, 2]."""
    chosen = np.argsort(-auroc(scores[half], labels[half]), kind="stable")[:n]
    return np.column_stack([chosen, auroc(scores[~half][:, chosen], labels[~half])])


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="nano-small", help="a folder or a name in data/models")
    parser.add_argument("--concept", default="guitar", help="a word to put into the captions")
    parser.add_argument("--layer", default="layers.1", help="hook point that is read")
    parser.add_argument("--seconds", type=number(above=0), default=2.0, help="length of each clip")
    args = parser.parse_args()

    model = load_model(args.model)
    folder = Path("data/sae") / model.name / "top1" / "seed-0"
    sae = TopKSAE.load(folder) if folder.is_dir() else None
    kind = "SAE latents" if sae else "activation dimensions"
    print(f"features: {kind} of {args.layer}" + ("" if sae else f" (no SAE in {folder})"))

    rng = np.random.default_rng(0)
    pairs = [(m, o) for m in MOODS for o in OTHERS if o != args.concept]
    captions = [f"A {m} piece with {args.concept} and {o}." for m, o in pairs]
    captions += [f"A {m} piece with {o}." for m, o in pairs]
    labels = np.repeat([True, False], len(pairs))
    half = np.tile(rng.permutation(len(pairs)) < len(pairs) // 2, 2)  # a pair stays in one half

    parts = []
    for start in range(0, len(captions), 32):
        chunk = captions[start : start + 32]
        _, codes = model.generate(chunk, args.seconds, seed=start)
        batch = model.with_captions(codes, [None] * len(chunk))  # the layer must not see the words
        parts.append(features_of(model.capture(batch, [args.layer])[args.layer], sae))
    scores = np.concatenate(parts)

    print(f"{len(captions)} clips; best features on one half, AUROC on the other")
    for feature, value in best_on_test(scores, labels, half, 5):
        print(f"  feature {int(feature):5d}   {value:.2f}")
    null = [best_on_test(scores, rng.permutation(labels), half, 5)[:, 1].mean() for _ in range(20)]
    print(f"null (permuted labels): {np.mean(null):.2f}, highest of 20: {np.max(null):.2f}")


if __name__ == "__main__":
    run_program(main)
