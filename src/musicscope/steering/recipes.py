"""Recipes: how to switch a concept off or on in one model, on disk and ready for use.

A recipe has latents, targets, a gate and directions, learnt by `musicscope.steering.learning`.
Strength and number of latents are chosen later on generated music (`musicscope.steering.search`)
and kept in `chosen`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from musicscope.core.io import atomic_file, folder_sha256, read_json, write_json
from musicscope.dictionaries.core import TopKSAE
from musicscope.steering.edit import ALWAYS, ConceptEdit, Edit, Gate, Schedule, Steering

FOLDER, FULL_FOLDER = "data/steering", "data/steering_full"
FORMAT = 2
DIRECTIONS = ("off", "on")
WORDS = " with words"
"""Suffix of a direction in `Recipe.chosen`: the best settings on top of the edited prompt."""
SCORES = ("share", "effect", "partial", "auroc")
PLAIN = ("model", "slot", "layer", "sae", "concept", "target", "both_sides")
MEANS = ("mean_with", "mean_without", "active_with", "active_without")


@dataclass(frozen=True)
class Settings:
    """How one concept is edited in one direction."""

    strength: float
    n_features: int
    score: str = "effect"
    """Which of `SCORES` ranks the latents; see `musicscope.steering.learning`."""
    branch: str = "conditional"
    loop: str = "open"
    """closed: edit only while the gate detects something to change."""


@dataclass(frozen=True)
class Recipe:
    """A concept in the latents of one SAE."""

    model: str
    slot: str
    layer: str
    """Hook point, such as layers.3."""
    sae: str
    """`folder_sha256` of the dictionary of the latents."""
    concept: str
    target: str
    """Value that a latent is raised to: its mean on train clips of the class, over frames where it
    is "active" or over all frames ("mean")."""
    both_sides: str
    """When latents against the concept are edited too, in the opposite way: never, when_off (to
    switch it off), when_on, always."""
    statistics: Mapping[str, Tensor]
    """[F] float32 each. `SCORES`: evidence for the concept, above 0 if for it. `MEANS`: mean_* over
    all frames of clips with and without it; active_* over frames where the latent fires, 0 if it
    never does."""
    directions: Mapping[str, Tensor]
    """[d] each, towards the concept: difference of the classes' mean activations, and probe, the
    weights of a logistic probe scaled to the same length."""
    gate: Gate
    chosen: Mapping[str, Settings] = field(default_factory=dict)
    """By direction, with or without `WORDS`: the best settings on validation data."""

    def ranked(self, score: str, sign: int = 1) -> list[int]:
        """Rank latents with evidence for (sign 1) or against (-1) the concept, best first."""
        if score not in SCORES:
            raise ValueError(f"score {score!r}: known {', '.join(SCORES)}")
        evidence = sign * self.statistics[score]
        order = torch.argsort(-evidence, stable=True)
        return order[evidence[order] > 0].tolist()

    def latents(self, direction: str, settings: Settings) -> tuple[tuple[int, ...], ...]:
        """Return the best latents for the concept and, depending on `both_sides`, against it."""
        if direction not in DIRECTIONS:
            raise ValueError(f"direction {direction!r}: known {', '.join(DIRECTIONS)}")
        signs = (1, -1) if self.both_sides in ("always", f"when_{direction}") else (1,)
        return tuple(
            tuple(self.ranked(settings.score, sign)[: settings.n_features]) for sign in signs
        )

    def edits(
        self, direction: str, settings: Settings,
        latents: tuple[tuple[int, ...], ...] | None = None,
    ) -> tuple[Edit, ...]:  # fmt: skip
        """Make edits of `latents(direction, settings)`, or of other latents in their place.

        on: latents for the concept are raised to their usual value with it; off: they are ablated.
        Latents against it are ablated to switch on, raised to switch off.
        """
        found = []
        sides = latents or self.latents(direction, settings)
        for chosen, side in zip(sides, ("with", "without"), strict=False):
            if not chosen:
                continue
            if (direction == "on") == (side == "with"):
                usual = self.statistics[f"{self.target}_{side}"]
                values = tuple(float(usual[f]) for f in chosen)
                found.append(Edit(chosen, "clamp_min", values))
            else:
                found.append(Edit(chosen, "ablate"))
        if not found:
            raise ValueError(f"{self.model}: no latent has evidence for {self.concept}")
        return tuple(found)

    def concept_edit(
        self, direction: str, settings: Settings,
        latents: tuple[tuple[int, ...], ...] | None = None,
    ) -> ConceptEdit:  # fmt: skip
        """Make the edits as one `ConceptEdit`; the caller sets the branch."""
        opens = "present" if direction == "off" else "absent"
        return ConceptEdit(
            f"{self.concept} {direction}",
            self.edits(direction, settings, latents),
            settings.strength,
            replace(self.gate, opens=opens) if settings.loop == "closed" else None,
        )


def save_recipe(recipe: Recipe, folder: str | Path) -> None:
    """Write <concept>.safetensors (tensors) and <concept>.json (all else) into `folder`."""
    folder, gate = Path(folder), recipe.gate
    tensors = {
        **{f"statistics.{k}": v.float().contiguous() for k, v in recipe.statistics.items()},
        **{f"directions.{k}": v.float().contiguous() for k, v in recipe.directions.items()},
        "gate.features": torch.tensor(gate.features),
        "gate.weights": torch.tensor(gate.weights, dtype=torch.float64),
        "gate.bias": torch.tensor(gate.bias, dtype=torch.float64),
    }
    path = folder / f"{recipe.concept}.safetensors"
    with atomic_file(path) as temporary:
        save_file(tensors, temporary)
    write_json(
        folder / f"{recipe.concept}.json",
        {
            "format": FORMAT,
            **{name: getattr(recipe, name) for name in PLAIN},
            "gate_seconds": gate.seconds,
            "chosen": {direction: asdict(s) for direction, s in recipe.chosen.items()},
        },
    )


def load_recipe(folder: str | Path, concept: str) -> Recipe:
    """Read a recipe that `save_recipe` wrote; errors name the file and the stage to run."""
    folder = Path(folder)
    path, weights = folder / f"{concept}.json", folder / f"{concept}.safetensors"
    if not path.is_file() or not weights.is_file():
        known = sorted(p.stem for p in folder.glob("*.safetensors"))
        raise FileNotFoundError(
            f"{folder} has no recipe for {concept!r} (it has: {', '.join(known) or 'none'}); add "
            "it to params.steer.concepts and run dvc repro steer"
        )
    found, tensors = read_json(path), load_file(weights)
    if found.get("format") != FORMAT:
        raise ValueError(f"{path}: format {found.get('format')}, expected {FORMAT}; rerun steer")

    def group(name: str) -> dict[str, Tensor]:
        return {k.split(".")[1]: v for k, v in tensors.items() if k.startswith(f"{name}.")}

    try:
        gate = group("gate")
        return Recipe(
            **{k: found[k] for k in PLAIN},
            statistics=group("statistics"),
            directions=group("directions"),
            gate=Gate(
                tuple(gate["features"].tolist()), tuple(gate["weights"].tolist()),
                float(gate["bias"]), found["gate_seconds"],
            ),
            chosen={direction: Settings(**s) for direction, s in found["chosen"].items()},
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} or {weights} is incomplete ({error}): rerun steer") from error


def summary_of(recipe: Recipe, most: int = 4) -> dict[str, object]:
    """Return the best latents of a recipe by every score, for metrics."""
    return {
        score: {
            str(f): {name: float(recipe.statistics[name][f]) for name in (score, *MEANS)}
            for f in recipe.ranked(score)[:most]
        }
        for score in SCORES
    }


# --- use --------------------------------------------------------------------------------------


def sae_folder(model: str, slot: str, saes: str | Path = "data/sae") -> Path:
    """Return the folder of the SAE whose latents are edited: the first seed."""
    return Path(saes) / model / slot / "seed-0"


def load_sae(model: str, slot: str, device: str = "cpu") -> tuple[str, TopKSAE]:
    """Load hook point and SAE of a slot; FileNotFoundError, ValueError name what is missing."""
    folder = sae_folder(model, slot)
    sae = TopKSAE.load(folder, device)
    layer = read_json(folder / "config.json")["trainer"].get("layer")
    if not isinstance(layer, str):
        raise ValueError(f"{folder}/config.json names no hook point as trainer.layer: retrain it")
    return layer, sae


def recipe_folder(model: str) -> Path:
    """Return the folder of a model's best recipes.

    Recipes of steer_full were chosen on more prompts and are committed. They are used if they were
    learnt on the SAE in data/sae; otherwise those of steer.
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
    """Make a recipe's edit as chosen on validation prompts.

    `strength` multiplies the chosen strength. `n_features` and `loop` ("open", "closed") are as
    chosen unless given. `words`: use the settings for prompts that also ask in words, if there
    are any.
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
    model: str, requests: Mapping[str, str], strength: float | Mapping[str, float] = 1.0, *,
    branch: str | None = None, schedule: Schedule = ALWAYS, n_features: int | None = None,
    loop: str | None = None, words: bool = False, folder: str | Path | None = None,
    saes: str | Path = "data/sae", sae_path: str | Path | None = None, device: str = "cpu",
) -> tuple[str, Steering]:  # fmt: skip
    """Load hook point and `Steering` for requests such as {"guitar": "off", "piano": "on"}.

    Recipes come from `recipe_folder` and the branch is as chosen, unless given. Other arguments
    are as in `concept_edit`; `strength` may differ between concepts. `sae_path` is the SAE's
    folder, if it is not in `saes`.

    Raises:
        FileNotFoundError: no recipe for a concept.
        ValueError: no request, nothing chosen for a direction, or recipes of another SAE.
    """
    if not requests:
        raise ValueError("name at least one concept to switch off or on")
    folder = recipe_folder(model) if folder is None else Path(folder)
    recipes = {concept: load_recipe(folder, concept) for concept in requests}
    each = strength if isinstance(strength, Mapping) else dict.fromkeys(requests, strength)
    edits = tuple(
        concept_edit(recipes[concept], direction, each[concept], n_features, loop, words)
        for concept, direction in requests.items()
    )
    (layer, slot, sae), *others = {(r.layer, r.slot, r.sae) for r in recipes.values()}
    if others:
        raise ValueError(f"{folder}: recipes of several layers or SAEs; rerun the stage steer")
    dictionary = Path(sae_path) if sae_path else sae_folder(model, slot, saes)
    if folder_sha256(dictionary) != sae:
        raise ValueError(f"{folder}: recipes of another SAE than {dictionary}; run dvc repro steer")
    concept, direction = next(iter(requests.items()))
    branch = branch or recipes[concept].chosen[direction].branch
    return layer, Steering(TopKSAE.load(dictionary, device), edits, branch, schedule)
