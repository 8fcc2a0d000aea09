"""Sparse autoencoders on one layer of one model, several seeds: data/sae/<model>/<slot>/seed-<i>.

Trains on split train (of rendered clips: soundfont timgm6mb); evaluates on split test, whose
compositions nothing heard.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import fields, replace

import numpy as np
import torch

from musicscope.activations.store import ActivationStore
from musicscope.config import Params, load_params
from musicscope.core import distributed
from musicscope.core import io as artifacts
from musicscope.data.clips import ClipStore, main_clips
from musicscope.dictionaries import fidelity as sae_losses
from musicscope.dictionaries import runs as sae_runs
from musicscope.dictionaries.training import SAEConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a name in params.yaml: models")
    parser.add_argument("slot", help="a name in params.yaml: slots")
    model, slot = vars(parser.parse_args()).values()
    params = load_params()
    torch.set_num_threads(params.compute.threads)
    with distributed.start(params.compute) as engine:
        train(model, slot, params, engine)


def train(model: str, slot: str, params: Params, engine: distributed.Engine) -> None:
    """Train, report and publish; every rank comes here, the first one writes."""
    section, device, ranks = params.train_sae, engine.device, engine.ranks
    folder, stem = f"data/activations/{model}/{slot}", f"plots/train_sae/{model}-{slot}"
    store, clips = ActivationStore.open(folder), ClipStore.open("data/clips")
    names = {f.name for f in fields(SAEConfig)} & {f.name for f in fields(section)}
    config = SAEConfig(section.latents(store.width), **{n: getattr(section, n) for n in names})
    seeds = [
        artifacts.seed_for(params.seed, "train_sae", model, slot, i) for i in range(section.seeds)
    ]
    rng = np.random.default_rng(artifacts.seed_for(params.seed, "train_sae", "ce clips"))
    test = main_clips(clips.rows, sae_runs.TEST)
    rows = np.sort(rng.choice(test, min(section.ce_clips, len(test)), replace=False)).tolist()

    scratch = artifacts.partial_dir(sae_runs.scratch_key(store, config, seeds))
    jobs = sae_runs.seed_jobs(folder, config, seeds, scratch, f"{stem}-live", device, model)
    losses = sae_losses.LossJob(
        f"data/models/{model}", "data/clips", rows, folder, f"{jobs[0].out}/seed-0", device
    )
    jobs[0] = replace(jobs[0], losses=losses)
    with sae_runs.sole_user(scratch, ranks):
        outcomes = sae_runs.run_all(jobs, engine.processes, ranks, engine.workers)
        if not ranks.leads:
            return
        groups = clips.rows["group"].iloc[rows].tolist()
        found = sae_runs.report(store, outcomes, groups, params.seed)
        sae_runs.write_plots(stem, outcomes)
        artifacts.publish_dir(scratch / "sae", f"data/sae/{model}/{slot}")
        artifacts.write_json(f"metrics/train_sae/{model}-{slot}.json", found)
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
