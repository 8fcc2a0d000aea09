"""What chosen features of one model answer to: data/maximize_activation/<model>.

Best moments of real clips, and token sequences searched for under the model's own prior, as audio
with index.json; moments alone where a model has no tokens to search over (RAVE). Reads
data/features, data/activations, data/sae, data/usae, data/models and data/clips; writes metrics and
plots/maximize_activation/<model>.
"""

from __future__ import annotations

import argparse
import functools
import sys

import torch

from musicscope.config import load_params
from musicscope.core.distributed import resolve_device
from musicscope.features.selection import Latent, choose, read_features
from musicscope.maximisation import moments as maximization
from musicscope.maximisation.stage import maximize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a name in params.yaml: models")
    name = parser.parse_args().model
    params = load_params()
    section, device = params.maximize_activation, resolve_device(params.compute.device)
    processes = params.compute.processes if device == "cpu" else 1
    torch.set_num_threads(1)  # the work is parallel over clips and searches instead

    table = read_features("data/features/features.parquet")
    counts = (section.universal, section.specific, section.concepts)
    latents = choose(table, params.models, name, counts)
    if not latents:
        sys.exit(f"data/features has no live feature of {name}: run dvc repro match_features")
    latents += [Latent("direction", (i,), "direction") for i in range(section.directions)]
    open_run = functools.partial(
        maximization.open_instruments, (name,), device, params.seed, with_sae=True
    )
    maximize(
        f"maximize_activation/{name}", section, latents, open_run,
        ("prior", "clip", "free", "heard"), params.seed, processes,
    )  # fmt: skip


if __name__ == "__main__":
    main()
