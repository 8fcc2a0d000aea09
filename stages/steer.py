"""Concepts off and on in one model's music: data/steering/<model>, metrics and plots/steer.

Learns recipes from data/activations and data/sae (layer of metrics/layers/<model>.yaml), chooses
strength, number of latents and branch on validation prompts, and reports on test prompts; both by
the judges in data/judge, which never choose latents.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from musicscope.activations.extraction import folder_sha256
from musicscope.activations.store import ActivationStore
from musicscope.artifacts import partial_dir
from musicscope.clips import ClipStore
from musicscope.config import load_params
from musicscope.dictionaries.sae import TopKSAE
from musicscope.judges.judging import frechet_distance
from musicscope.models import load_model
from musicscope.steering import steering_report, steering_run
from musicscope.steering.steering_bench import open_bench
from musicscope.steering.steering_learning import learn_recipes, read_clips
from musicscope.steering.steering_recipes import save_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a name in params.yaml: models")
    name = parser.parse_args().model
    params = load_params()
    section, device = params.steer, params.compute.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    processes = params.compute.processes if device == "cpu" else 1
    torch.set_num_threads(1)  # the work is parallel over cells instead

    clips = ClipStore.open("data/clips")
    store = ActivationStore.open(f"data/activations/{name}/{section.slot}")
    if store.ids != clips.rows["id"].tolist():
        sys.exit(f"{store.folder} holds other clips than data/clips: run dvc repro")
    sae_folder = f"data/sae/{name}/{section.slot}/seed-0"
    sae = TopKSAE.load(sae_folder, device)
    seen = read_clips(store, sae, clips.rows, params.compute.processes, device)
    recipes = learn_recipes(
        seen, section.concepts, model=name, slot=section.slot, layer=store.config["layer"],
        target=section.target, both_sides=section.both_sides,
        gate_features=section.gate_features, gate_seconds=section.gate_seconds,
        frame_rate=load_model(f"data/models/{name}").frame_rate,
    )  # fmt: skip

    inputs = ("data/clips", f"data/models/{name}", str(store.folder), sae_folder, "data/judge")
    key = {"stage": "steer", "seed": params.seed, **asdict(section)}
    scratch = partial_dir({**key, "inputs": [folder_sha256(folder) for folder in inputs]})
    for recipe, _ in recipes.values():
        save_recipe(recipe, scratch)
    bench = functools.partial(
        open_bench, name, str(scratch), sae_folder, section.concepts, device, params.seed,
        section.seconds, section.batch, section.guidance,
    )  # fmt: skip
    result = steering_run.run(section, bench, scratch, frechet_distance, processes, params.seed)
    steering_report.write(result, recipes, bench(), name)
    shutil.rmtree(Path(scratch))


if __name__ == "__main__":
    main()
