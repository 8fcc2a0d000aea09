"""Features that carry a concept: data/find_concept, metrics/ and plots/find_concept/<model>.

Each concept of params.find_concept is given by recordings with and without it: clips of data/clips,
whose activations are in data/activations, or folders, which are run through the model. Searches the
SAE of a slot (data/sae) and the universal SAE (data/usae); the SAE's baselines for comparison.
"""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import torch

from musicscope.activations.store import ActivationStore
from musicscope.config import load_params
from musicscope.core.distributed import resolve_device
from musicscope.core.io import atomic_dir, write_json, write_text
from musicscope.data.clips import ClipStore
from musicscope.dictionaries import stability
from musicscope.dictionaries.core import TopKSAE, UniversalSAE, open_saes
from musicscope.finder.run import Subject, find_all
from stages import run_stage, stage_args


def main() -> None:
    (name,) = stage_args(__doc__, "model")
    params = load_params()
    section, device = params.find_concept, resolve_device(params.compute.device)
    torch.set_num_threads(1)  # the work is parallel over batches instead

    clips = ClipStore.open("data/clips")
    store = ActivationStore.open(f"data/activations/{name}/{section.slot}")
    if store.ids != clips.rows["id"].tolist():
        sys.exit(f"{store.folder} holds other clips than data/clips: run dvc repro")
    saes = open_saes(f"data/sae/{name}/{section.slot}", params.train_sae.baselines, device)
    features: dict[str, TopKSAE | UniversalSAE] = {"sae": saes.pop("sae")}
    if section.universal:
        features["usae"] = UniversalSAE.load("data/usae/seed-0", device)

    seeds = stability.read(f"data/sae/{name}/{section.slot}")
    subject = Subject(name, clips, store, features, device, params.compute.processes, seeds, saes)
    with atomic_dir(f"data/find_concept/{name}") as out:
        tables, metrics = find_all(subject, section, params.seed, out)
        write_json(f"metrics/find_concept/{name}.json", metrics)
    top = pd.concat([t.head(20) for t in tables], ignore_index=True)
    top = top.replace([np.inf, -np.inf], np.nan)
    write_text(f"plots/find_concept/{name}.csv", top.to_csv(index=False, float_format="%.6g"))


if __name__ == "__main__":
    run_stage(main)
