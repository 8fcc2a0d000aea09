"""What shared features answer to in all models at once: data/maximize_shared.

One token sequence is searched for that activates a USAE feature through every model (coordinated);
beside it, searches on each model alone and what they do in the others, and pairs of unrelated
features as null. Params are those of maximize_activation. Reads data/features, data/activations,
data/usae, data/models and data/clips; writes metrics and plots/maximize_shared.
"""

from __future__ import annotations

import argparse
import functools
import sys

import torch

from musicscope.activations.extraction import folder_sha256
from musicscope.activations.store import ActivationStore
from musicscope.clips import ClipStore
from musicscope.config import load_params
from musicscope.features.feature_choice import mismatched, read_features, universal
from musicscope.maximizing import (
    maximization,
    maximization_jobs,
    maximization_report,
    maximization_run,
)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    params = load_params()
    section, device, names = params.maximize_activation, params.compute.device, params.models
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    processes = params.compute.processes if device == "cpu" else 1
    torch.set_num_threads(1)  # the work is parallel over clips and searches instead

    table = read_features("data/features/features.parquet")
    latents = universal(table, names, section.shared, len(names))
    if not latents:
        sys.exit("data/features has no live USAE feature: run dvc repro match_features")
    latents += mismatched(latents, len(names))
    open_run = functools.partial(
        maximization.open_instruments, names, device, params.seed, with_sae=False
    )
    instruments, clips = open_run(), ClipStore.open("data/clips")
    stores = [ActivationStore.open(f"data/activations/{i.name}/{i.usae.slot}") for i in instruments]
    plan = maximization_jobs.make_plan(
        section, latents, instruments, ("heard", "alone"), params.seed
    )
    sha256 = folder_sha256("data/clips")
    result = maximization_run.run(plan, open_run, stores, clips, sha256, processes)
    maximization_report.write(
        result, "maximize_shared", clips, instruments[0].model, section.bootstrap
    )


if __name__ == "__main__":
    main()
