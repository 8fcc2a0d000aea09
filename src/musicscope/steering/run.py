"""The stage `steer`: learn recipes, search on validation data, test, write."""

from __future__ import annotations

import functools
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from musicscope.activations.store import ActivationStore
from musicscope.config.concepts import Steer
from musicscope.config.schema import Sections
from musicscope.core.io import folder_sha256, scratch_dir, sha256
from musicscope.data.clips import ClipStore
from musicscope.data.concepts import Concepts, concepts_of
from musicscope.dictionaries import stability
from musicscope.dictionaries.core import TopKSAE
from musicscope.features import output_effects
from musicscope.models.interface import AudioModel
from musicscope.models.registry import load_model
from musicscope.steering import report, search
from musicscope.steering.conditions import open_context
from musicscope.steering.learning import learn_recipe, read_clips
from musicscope.steering.methods import FROZEN
from musicscope.steering.recipes import Recipe, sae_folder, save_recipe
from musicscope.steering.subjects import make_subject


def evaluate(
    name: str, section: Steer, seed: int, device: str, processes: int, outs: report.Outs,
    concepts: Concepts | None = None,
) -> None:  # fmt: skip
    """Learn recipes for one model, choose settings, test them and write `outs`.

    `concepts`: params.concepts.

    Conditions that a killed run finished are kept under the hash of all inputs and read again.
    """
    clips = ClipStore.open("data/clips")
    store = ActivationStore.open(f"data/activations/{name}/{section.slot}")
    if store.ids != clips.rows["id"].tolist():
        sys.exit(f"{store.folder} holds other clips than data/clips: run dvc repro")
    model = load_model(f"data/models/{name}", device)
    concepts_of(clips.rows, (c for c in section.concepts if c in (concepts or ())))
    subject = make_subject(model, section, seed, clips, concepts)
    plan = search.make_plan(subject, section)
    if not plan.tests:
        report.write_nothing(plan, outs)
        return
    dictionary, layer = sae_folder(name, section.slot), store.config["layer"]
    shared = ("slot", "target", "both_sides", "gate_features", "gate_seconds")
    options = {key: getattr(section, key) for key in shared}
    options |= {"model": name, "layer": layer, "frame_rate": model.frame_rates[layer],
                "n_features": max(section.n_features)}  # fmt: skip
    ours = {}
    if not isinstance(model, AudioModel):
        ours["effects"] = output_effects.read(name, section.slot)
    if section.stable_only:
        ours["returning"] = stability.read(dictionary.parent)["returns"].to_numpy(bool)

    def learn(folder: Path, **more: Any) -> dict[str, tuple[Recipe, dict[str, float]]]:
        train = read_clips(store, TopKSAE.load(folder, device), clips.rows, processes, device)
        sae = folder_sha256(folder)
        return {c: learn_recipe(train, c, sae=sae, **options, **more) for c in plan.concepts}

    recipes, baseline = learn(dictionary, **ours), dictionary.parent / FROZEN
    frozen = learn(baseline) if FROZEN in subject.methods else {}
    del model

    saes = dictionary.parent  # all seeds, as they decide which latents return
    inputs = ("data/clips", f"data/models/{name}", store.folder, saes, "data/judge")
    key = {"stage": "steer", "seed": seed, **asdict(section)}
    if concepts:
        key["concepts"] = {name: asdict(concept) for name, concept in concepts.items()}
    if "effects" in ours:
        key["effects"] = sha256(output_effects.path_of(name, section.slot))
    torch.set_num_threads(1)  # conditions run in parallel instead
    with scratch_dir({**key, "inputs": [folder_sha256(folder) for folder in inputs]}) as scratch:
        for recipe, _ in recipes.values():
            save_recipe(recipe, scratch)
        for recipe, _ in frozen.values():
            save_recipe(recipe, scratch / FROZEN)
        context = functools.partial(
            open_context,
            name,
            str(scratch),
            str(dictionary),
            plan.concepts,
            device,
            seed,
            section,
            Sections(concepts or {}),
        )
        result = search.run(section, context, scratch, processes, seed)
        report.write(result, recipes, context(), outs)
        shutil.rmtree(scratch)
