"""Concept probes: metrics/probe/<model>-<slot>.json, plots/probe/<model>-<slot>.csv.

Reads data/clips, data/activations/<model>/<slot>, seed 0 and the baselines in
data/sae/<model>/<slot>, and the codec in data/models/<model>.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from musicscope.activations.store import ActivationStore
from musicscope.config import load_params
from musicscope.core.distributed import resolve_device
from musicscope.core.io import folder_sha256, write_json
from musicscope.data.clips import ClipStore
from musicscope.data.concepts import concepts_of
from musicscope.data.splits import clip_sets, main_concept
from musicscope.dictionaries.codes import pool_store
from musicscope.dictionaries.core import open_saes
from musicscope.features import report
from musicscope.features.baselines import baseline_pools
from musicscope.features.probes import run_probes
from musicscope.models.registry import load_model
from stages import run_stage, stage_args


def main() -> None:
    model, slot = stage_args(__doc__, "model", "slot")
    params = load_params()
    section, workers = params.probe, params.compute.processes
    device = resolve_device(params.compute.device)
    torch.set_num_threads(1)  # the work is parallel over batches and concepts instead

    clips = ClipStore.open("data/clips")
    store = ActivationStore.open(f"data/activations/{model}/{slot}")
    if store.ids != clips.rows["id"].tolist():
        sys.exit(f"{store.folder} holds other clips than data/clips: run dvc repro")
    used = np.unique(np.concatenate(list(clip_sets(clips.rows).values())))
    rows = clips.rows.iloc[used].reset_index(drop=True)
    baselines = params.train_sae.baselines
    saes = open_saes(f"data/sae/{model}/{slot}", baselines, device)
    pools = pool_store(store, used, saes, workers, device)
    music = load_model(f"data/models/{model}", device)
    pools |= baseline_pools(clips, folder_sha256("data/clips"), music, used, workers)

    concepts = concepts_of(rows, params.concepts)
    result = run_probes(rows, pools, concepts, section, params.seed, workers, baselines)
    for name in params.concepts:
        if name in result["skipped"]:
            print(
                f"concepts.{name} is not probed: its rarer class has {result['skipped'][name]} "
                f"clips in train or test, probe.min_positive is {section.min_positive}",
                file=sys.stderr,
            )
    latents = report.latent_table(
        rows, pools["sae"], result, section.bootstrap, params.seed,
        main_concept(list(result["concepts"])),
    )  # fmt: skip
    write_json(f"metrics/probe/{model}-{slot}.json", result)
    stem = f"plots/probe/{model}-{slot}"
    report.write_probes(stem, report.probe_table(result), latents)


if __name__ == "__main__":
    run_stage(main)
