"""What the stages `steer` and `steer_full` do: recipes, search on validation prompts, test."""

from __future__ import annotations

import functools
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from musicscope.activations.store import ActivationStore
from musicscope.core.io import folder_sha256, partial_dir
from musicscope.data.clips import ClipStore
from musicscope.dictionaries.core import TopKSAE
from musicscope.judges.pair import frechet_distance
from musicscope.models.interface import is_audio_model
from musicscope.models.registry import load_model
from musicscope.steering import audio_outs, audio_steering
from musicscope.steering import report as steering_report
from musicscope.steering import search as steering_run
from musicscope.steering.context import open_audio_bench, open_bench
from musicscope.steering.learning import learn_recipes, read_clips
from musicscope.steering.recipes import save_recipe


def evaluate(
    name: str, section: Any, seed: int, device: str, processes: int, outs: steering_report.Outs
) -> None:
    """Learn recipes for one model, choose settings, measure them, write `outs`.

    `section` is params.steer or params.steer_full. Cells that a killed run finished are kept
    under the hash of all inputs, and taken from there. An audio model is steered on clips instead
    of prompts (`audio_steering`).
    """
    clips = ClipStore.open("data/clips")
    store = ActivationStore.open(f"data/activations/{name}/{section.slot}")
    if store.ids != clips.rows["id"].tolist():
        sys.exit(f"{store.folder} holds other clips than data/clips: run dvc repro")
    model = load_model(f"data/models/{name}", device)
    plan = audio_steering.make_plan(section, clips.rows) if is_audio_model(model) else None
    if plan is not None and not plan.tests:
        audio_outs.write_nothing(plan, name, outs)
        return
    concepts = section.concepts if plan is None else plan.concepts
    frame_rate = model.frame_rate if plan is None else model.frame_rates[store.config["layer"]]
    sae_folder = f"data/sae/{name}/{section.slot}/seed-0"
    seen = read_clips(store, TopKSAE.load(sae_folder, device), clips.rows, processes, device)
    recipes = learn_recipes(
        seen, concepts, model=name, slot=section.slot, layer=store.config["layer"],
        sae=folder_sha256(sae_folder), target=section.target, both_sides=section.both_sides,
        gate_features=section.gate_features, gate_seconds=section.gate_seconds,
        frame_rate=frame_rate,
    )  # fmt: skip
    del seen, model

    inputs = ("data/clips", f"data/models/{name}", str(store.folder), sae_folder, "data/judge")
    key = {"stage": "steer", "seed": seed, **asdict(section)}
    scratch = partial_dir({**key, "inputs": [folder_sha256(folder) for folder in inputs]})
    for recipe, _ in recipes.values():
        save_recipe(recipe, scratch)
    torch.set_num_threads(1)  # the work is parallel over cells instead
    common = (
        name,
        str(scratch),
        sae_folder,
        concepts,
        device,
        seed,
        section.seconds,
        section.batch,
    )
    if plan is None:
        bench = functools.partial(open_bench, *common, section.guidance)
        result = steering_run.run(section, bench, scratch, frechet_distance, processes, seed)
        steering_report.write(result, recipes, bench(), outs)
    else:
        bench = functools.partial(open_audio_bench, *common)
        result = audio_steering.run(
            section, plan, bench, scratch, frechet_distance, processes, seed
        )
        steering_report.write(result, recipes, bench(), outs, audio_outs.numbers(plan))
    shutil.rmtree(Path(scratch))
