"""Activation maximisation: data/maximize_activation/<model>, or data/maximize_shared.

Makes audio with index.json, metrics and plots of chosen features: the best moments of real clips
and token sequences searched for under the models' prior. Models without common tokens (RAVE, or
different codecs) get moments only.

For one model: universal, specific and concept features, with random directions as null. With
--shared: USAE features in all models at once (coordinated), searches on each model alone and their
effect in the others, and pairs of unrelated features as null.

Reads data/features, data/activations, data/usae, data/models and data/clips; for one model also
data/sae.
"""

from __future__ import annotations

import functools
import sys

import torch

from musicscope.activations.alignment import common_frames, frame_rate
from musicscope.activations.store import ActivationStore
from musicscope.config import load_params
from musicscope.core.command_line import Parser
from musicscope.core.distributed import resolve_device
from musicscope.core.io import folder_sha256
from musicscope.data.clips import ClipStore, at_rate
from musicscope.features.selection import Latent, choose, mismatched, read_features, universal
from musicscope.maximisation.moments import open_models
from musicscope.maximisation.report import write
from musicscope.maximisation.run import Plan, run, unsearchable
from stages import model_name, run_stage


def main() -> None:
    parser = Parser(description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("model", nargs="?", type=model_name, help="a name in params.yaml: models")
    which.add_argument("--shared", action="store_true", help="all models at once")
    args = parser.parse_args()
    params = load_params()
    section, device = params.maximize_activation, resolve_device(params.compute.device)
    processes = params.compute.processes if device == "cpu" else 1
    torch.set_num_threads(1)  # the work is parallel over clips and searches instead

    table = read_features("data/features/features.parquet")
    if args.shared:
        out, names, variants = "maximize_shared", params.models, ("heard", "alone")
        latents = universal(table, names, section.shared, len(names))
        nulls = mismatched(latents, len(names))
    else:
        out, names = f"maximize_activation/{args.model}", (args.model,)
        variants = ("prior", "clip", "free", "heard")
        counts = (section.universal, section.specific, section.concepts)
        latents = choose(table, params.models, args.model, counts)
        nulls = [Latent("direction", (i,), "direction") for i in range(section.directions)]
    if not latents:
        sys.exit(f"data/features has no live feature of {names}: run dvc repro match_features")

    opener = functools.partial(
        open_models, tuple(names), device, params.seed, with_sae=not args.shared
    )
    models = opener()
    slots = [m.usae.slot for m in models if m.usae is not None]
    pairs = zip(names, slots, strict=True)
    folders = common_frames([f"data/activations/{name}/{slot}" for name, slot in pairs])
    stores = [ActivationStore.open(folder) for folder in folders]
    first = models[0].model
    clips = at_rate(ClipStore.open("data/clips"), first.sample_rate)
    reason = unsearchable(models)
    plan = Plan(
        section=section,
        latents=(*latents, *nulls),
        names=tuple(names),
        variants=() if reason else variants,
        frame_rate=frame_rate(stores[0]) if reason else first.frame_rate,
        seed=params.seed,
        not_searched=reason,
    )
    write(run(plan, opener, stores, clips, folder_sha256("data/clips"), processes), out, clips)


if __name__ == "__main__":
    run_stage(main)
