"""Import an SAE that SAELens or dictionary_learning saved.

    musicscope import downloads/my-sae --model musicgen-small --layer layers.11

Reads cfg.json with sae_weights.safetensors, or config.json with ae.pt. Writes the files of this
package into --out, a new or empty folder. The default is data/imported/<name of the folder>, with a
number if that exists. Give that folder to find-concept --sae.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from musicscope.core.user_outputs import new_folder


def run(args: argparse.Namespace) -> dict[str, object]:
    """Read, check against the model, write; errors name the file and what is not supported."""
    source = Path(args.folder)
    default = Path("data/imported") / (source.resolve().name or "sae")
    with new_folder(args.out, default, {"the SAE": source}) as out:
        from musicscope.dictionaries.formats import load_sae_folder

        sae, about = load_sae_folder(source, k=args.k)
        model, layer = Path(args.model).name, args.layer or about.layer
        if args.check:
            from musicscope.models.registry import load_model

            widths = {p.name: p.width for p in load_model(args.model).hook_points}
            if layer not in widths:
                known = ", ".join(widths)
                raise ValueError(
                    f"{model} has no hook point {layer!r}: give --layer, one of {known}"
                )
            if widths[layer] != sae.width:
                raise ValueError(
                    f"{source} has width {sae.width}, {layer} of {model} {widths[layer]}"
                )
        elif not layer:
            raise ValueError(f"{source} names no hook point: give --layer, such as layers.3")
        sae.save(out.scratch, {**about.trainer, "lm_name": model, "layer": layer})
        placed = out.publish()
    kind = f"{sae.activation}, k = {sae.k}, {sae.n_latents:,} latents of width {sae.width}"
    print(f"{kind}, {layer} of {model}: {placed}")
    return {
        "folder": str(placed), "model": model, "layer": layer, "activation": sae.activation,
        "k": sae.k, "latents": sae.n_latents, "width": sae.width,
    }  # fmt: skip
