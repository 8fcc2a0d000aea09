"""Recipes of the stages `steer` and `steer_full`, ready for use in a generation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from musicscope.core.io import folder_sha256
from musicscope.dictionaries.core import TopKSAE
from musicscope.steering.edit import ALWAYS, ConceptEdit, Schedule, Steering
from musicscope.steering.recipes import WORDS, Recipe, load_recipe

FOLDER, FULL_FOLDER = "data/steering", "data/steering_full"


def sae_folder(model: str, slot: str, saes: str | Path = "data/sae") -> Path:
    """The dictionary whose latents are edited: that of the first seed."""
    return Path(saes) / model / slot / "seed-0"


def recipe_folder(model: str) -> Path:
    """Where the best recipes of a model lie.

    Those of steer_full, chosen on more prompts, if they are of the SAE that is in data/sae (they
    are in Git, and a sweep may have trained another one since); else those of steer.
    """
    full = Path(FULL_FOLDER) / model
    for file in sorted(full.glob("*.safetensors"))[:1]:
        recipe = load_recipe(full, file.stem)
        there = sae_folder(model, recipe.slot)
        if there.is_dir() and folder_sha256(there) == recipe.sae:
            return full
    return Path(FOLDER) / model


def concept_edit(
    recipe: Recipe, direction: str, strength: float = 1.0, n_features: int | None = None,
    loop: str | None = None, words: bool = False,
) -> ConceptEdit:  # fmt: skip
    """A recipe's edit as chosen on validation prompts.

    `strength` is in units of what was chosen: 1 is that, 0 does nothing. `n_features` and `loop`
    ("open", "closed") are as chosen unless given. `words`: the settings for prompts that ask for
    the same in words, where there are any.
    """
    if direction not in recipe.chosen:
        raise ValueError(
            f"{recipe.concept}: nothing is chosen for {direction!r}; known "
            f"{', '.join(recipe.chosen) or 'none'}: rerun the stage steer"
        )
    usual = recipe.chosen[direction]
    if words:
        usual = recipe.chosen.get(direction + WORDS, usual)
    settings = replace(
        usual, strength=strength * usual.strength, n_features=n_features or usual.n_features,
        loop=loop or usual.loop,
    )  # fmt: skip
    return recipe.concept_edit(direction, settings)


def load_steering(
    model: str, wishes: Mapping[str, str], strength: float = 1.0, *, branch: str | None = None,
    schedule: Schedule = ALWAYS, n_features: int | None = None, loop: str | None = None,
    words: bool = False, folder: str | Path | None = None, saes: str | Path = "data/sae",
    device: str = "cpu",
) -> tuple[str, Steering]:  # fmt: skip
    """Hook point and `Steering` for {"guitar": "off", "piano": "on"}, ready for `steering_hook`.

    Recipes come from `recipe_folder` unless a `folder` is given; the branch is as chosen for the
    model unless given; the rest is `concept_edit`'s.

    Raises:
        FileNotFoundError: no recipe for a concept.
        ValueError: no wish, nothing chosen for a direction, or recipes of another SAE.
    """
    if not wishes:
        raise ValueError("name at least one concept to switch off or on")
    folder = recipe_folder(model) if folder is None else Path(folder)
    recipes = {concept: load_recipe(folder, concept) for concept in wishes}
    edits = tuple(
        concept_edit(recipes[concept], direction, strength, n_features, loop, words)
        for concept, direction in wishes.items()
    )
    (layer, slot, sae), *others = {(r.layer, r.slot, r.sae) for r in recipes.values()}
    if others:
        raise ValueError(f"{folder}: recipes of several layers or SAEs; rerun the stage steer")
    dictionary = sae_folder(model, slot, saes)
    if folder_sha256(dictionary) != sae:
        raise ValueError(f"{folder}: recipes of another SAE than {dictionary}; run dvc repro steer")
    concept, direction = next(iter(wishes.items()))
    branch = branch or recipes[concept].chosen[direction].branch
    return layer, Steering(TopKSAE.load(dictionary, device), edits, branch, schedule)
