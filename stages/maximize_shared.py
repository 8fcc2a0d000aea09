"""What shared features answer to in all models at once: data/maximize_shared.

One token sequence is searched for that activates a USAE feature through every model (coordinated);
beside it, searches on each model alone and what they do in the others, and pairs of unrelated
features as null. Models of different codecs have no tokens in common: for them only the moments of
real clips that activate a feature in all. Params are those of maximize_activation. Reads
data/features, data/activations, data/usae, data/models and data/clips; writes metrics and
plots/maximize_shared.
"""

from __future__ import annotations

import argparse
import functools
import sys

import torch

from musicscope.config import load_params
from musicscope.features.selection import mismatched, read_features, universal
from musicscope.maximisation import moments as maximization
from musicscope.maximisation.stage import maximize


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    params = load_params()
    section, device, names = params.maximize_activation, params.compute.device, params.models
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
    maximize(
        "maximize_shared", section, latents, open_run, ("heard", "alone"), params.seed, processes
    )


if __name__ == "__main__":
    main()
