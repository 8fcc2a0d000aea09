"""Sparse autoencoders on one layer of one model, several seeds: data/sae/<model>/<slot>/seed-<i>.

Trains on split train (of rendered clips: family of sounds mixed); evaluates on split test, whose
compositions were never trained on.
"""

from __future__ import annotations

import numpy as np
import torch

from musicscope.config import load_params
from musicscope.core import distributed
from musicscope.core.seeding import seed_for
from musicscope.data.clips import ClipStore, main_clips
from musicscope.dictionaries import runs, tables
from musicscope.dictionaries.data import TEST
from stages import run_stage, stage_args


def main() -> None:
    model, slot = stage_args(__doc__, "model", "slot")
    params, clips = load_params(), ClipStore.open("data/clips").rows
    rng = np.random.default_rng(seed_for(params.seed, "train_sae", "ce clips"))
    test, section = main_clips(clips, TEST), params.train_sae
    rows = np.sort(rng.choice(test, min(section.ce_clips, len(test)), replace=False)).tolist()
    groups, stem = clips["group"].iloc[rows].tolist(), f"plots/train_sae/{model}-{slot}"
    torch.set_num_threads(params.compute.threads)
    with distributed.start(params.compute) as engine:
        plan = runs.sae_plan(
            section, model, slot, params.seed, engine.device, f"{stem}-live", rows, groups
        )
        runs.execute(
            plan, engine, f"data/sae/{model}/{slot}", f"metrics/train_sae/{model}-{slot}.json",
            lambda outcomes, _: tables.write_sae(stem, outcomes),
        )  # fmt: skip


if __name__ == "__main__":
    run_stage(main)
