"""Recipes: how to switch a concept off or on in one model, on disk and ready for use.

A recipe has latents, targets, a gate and directions, learnt by `musicscope.steering.learning`.
Strength and number of latents are chosen later on generated music (`musicscope.steering.search`)
and kept in `chosen`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from musicscope.core.io import atomic_file, folder_sha256, read_json, write_json
from musicscope.dictionaries.core import DICTIONARY_CLASSES, TopKSAE
from musicscope.steering.edit import ALWAYS, ConceptEdit, Edit, Gate, Schedule, Steering

FOLDER, FULL_FOLDER = "data/steering", "data/steering_full"
FORMAT = 2
DICTIONARY = "dictionary"
"""Folder beside recipes: their SAE in float16, for a checkout without data/sae."""
GROUNDED = 0.6
"""Least grounding of a concept that edits can be trusted with; below it `generate` warns."""
DIRECTIONS = ("off", "on")
WORDS = " with words"
"""Suffix of a direction in `Recipe.chosen`: the best settings on top of the edited prompt."""
SCORES = ("share", "effect", "partial", "auroc")
"""Input scores: evidence for the concept in what makes a latent fire."""
OUTPUT_SCORES = ("output", "toward")
"""Scores of what a latent does at the logits; see `musicscope.features.output_effects`."""
SHORTLIST = 32
"""Latents that the input score of "share+output" and the like hands to the output score."""
PLAIN = ("model", "slot", "layer", "sae", "concept", "target", "both_sides")
MEANS = ("mean_with", "mean_without", "active_with", "active_without")


def input_parts(scores: Sequence[str]) -> tuple[str, ...]:
    """Input scores of a search for a model without logits, each once; share if there is none."""
    parts = (score.partition("+")[0] for score in scores)
    return tuple(dict.fromkeys(p for p in parts if p in SCORES)) or SCORES[:1]


@dataclass(frozen=True)
class Settings:
    """How one concept is edited in one direction."""

    strength: float
    n_features: int
    score: str = "effect"
    """What ranks the latents: one of `SCORES` or `OUTPUT_SCORES`, or one of each, such as
    share+output; see `Recipe.ranked`."""
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
    never does. `OUTPUT_SCORES`, where they were measured: output, KL at the logits; toward, the
    pull towards codes of clips with the concept."""
    directions: Mapping[str, Tensor]
    """[d] each, towards the concept: difference of the classes' mean activations, and probe, the
    weights of a logistic probe scaled to the same length."""
    gate: Gate
    chosen: Mapping[str, Settings] = field(default_factory=dict)
    """By direction, with or without `WORDS`: the best settings on validation data."""
    grounding: float | None = None
    """AUROC of judges between plain pieces whose prompts name the concept and pieces whose prompts
    do not; None: not measured"""
    pool: Tensor | None = None
    """[F] bool: latents that may be edited, those that return in other seeds; None: all."""

    def ranked(self, score: str, sign: int = 1, every: bool = False) -> list[int]:
        """Rank latents with evidence for (sign 1) or against (-1) the concept, best first.

        Of `pool`, or of `every` latent. output, which knows no concept, ranks latents with evidence
        by share. With two scores, as in share+output, the best `SHORTLIST` by the first come in the
        order of the second.

        ValueError: an unknown score, or no output effects of this model and concept.
        """
        first, both, second = score.partition("+")
        known = (*SCORES, *OUTPUT_SCORES)
        if first not in known or (both and (first not in SCORES or second not in OUTPUT_SCORES)):
            raise ValueError(
                f"score {score!r}: known {', '.join(known)}, or two such as share+output"
            )
        if missing := {first, second} & set(OUTPUT_SCORES) - set(self.statistics):
            raise ValueError(
                f"{self.model}, {self.concept}: no {', '.join(missing)} is measured, which score "
                f"{score!r} needs: run dvc repro measure_effects and steer, with more of "
                "measure_effects.train_clips if few have the concept; an audio model has none"
            )

        def by(name: str, among: Tensor) -> Tensor:
            values = self.statistics[name][among] * (1 if name == "output" else sign)
            return among[torch.argsort(-values, stable=True)]

        evidence = sign * self.statistics["share" if first == "output" else first]
        if self.pool is not None and not every:
            evidence = evidence * self.pool
        order = by(first, (evidence > 0).nonzero()[:, 0])
        if both:
            order = torch.cat([by(second, order[:SHORTLIST]), order[SHORTLIST:]])
        return order.tolist()

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
        **({} if recipe.pool is None else {"pool": recipe.pool.contiguous()}),
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
            "grounding": recipe.grounding,
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
            grounding=found.get("grounding"),
            pool=tensors.get("pool"),
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


def save_dictionary(sae: TopKSAE, slot: str, layer: str, folder: str | Path) -> None:
    """Write the SAE of recipes in float16 into `DICTIONARY` in their folder."""
    folder = Path(folder) / DICTIONARY
    tensors = {k: v.half() if v.ndim else v for k, v in sae.state_dict().items()}
    with atomic_file(folder / "sae.safetensors") as temporary:
        save_file(tensors, temporary)
    kind = DICTIONARY_CLASSES[sae.activation][0]
    trainer = {"dict_class": kind, "layer": layer, "slot": slot, "dtype": "float16"}
    write_json(folder / "config.json", {"trainer": trainer})


def sae_folder(model: str, slot: str, saes: str | Path = "data/sae") -> Path:
    """Return the folder of the SAE whose latents are edited: the first seed.

    Where there is none, that of the copy beside the committed recipes, if it is of this slot.
    """
    own, copy = Path(saes) / model / slot / "seed-0", Path(FULL_FOLDER) / model / DICTIONARY
    about = copy / "config.json"
    if not own.is_dir() and about.is_file() and read_json(about)["trainer"]["slot"] == slot:
        return copy
    return own


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
    learnt on the SAE in data/sae, or if there is none; otherwise those of steer.
    """
    full = Path(FULL_FOLDER) / model
    for file in sorted(full.glob("*.safetensors"))[:1]:
        recipe = load_recipe(full, file.stem)
        there = sae_folder(model, recipe.slot)
        if there.parent == full or (there.is_dir() and folder_sha256(there) == recipe.sae):
            return full
    return Path(FOLDER) / model


def doubts(folder: str | Path, concepts: Iterable[str]) -> list[str]:
    """Say of each concept that the model hardly plays when asked, or whose judges hardly hear it.

    A recipe without a measured grounding says nothing.
    """
    found = []
    for concept in concepts:
        recipe = load_recipe(folder, concept)
        if recipe.grounding is not None and not recipe.grounding >= GROUNDED:
            found.append(
                f"{recipe.model} hardly plays {concept} on request, or the judges hardly hear it "
                f"(grounding {recipe.grounding:.2f}, below {GROUNDED}): the edit may do nothing"
            )
    return found


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
    if dictionary != folder / DICTIONARY and folder_sha256(dictionary) != sae:
        raise ValueError(f"{folder}: recipes of another SAE than {dictionary}; run dvc repro steer")
    concept, direction = next(iter(requests.items()))
    branch = branch or recipes[concept].chosen[direction].branch
    return layer, Steering(TopKSAE.load(dictionary, device), edits, branch, schedule)
