"""What it takes to switch a concept off or on in one model: latents, targets, gate, directions.

Learnt on train clips (of the training soundfont), with regularisation and the gate's threshold
chosen on validation clips; test clips are never read. How strongly to edit, and with how many
latents, is chosen later on generated music (`steering_run`) and kept in `chosen`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from musicscope.core.io import read_json, write_json
from musicscope.steering.edit import ConceptEdit, Edit, Gate

FORMAT = 2
DIRECTIONS = ("off", "on")
WORDS = " with words"
"""In `Recipe.chosen` behind a direction: what served best on top of the edited prompt."""
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
    """closed: only while the gate hears that there is something to change."""


@dataclass(frozen=True)
class Recipe:
    """A concept in the latents of one SAE."""

    model: str
    slot: str
    layer: str
    """Hook point, such as layers.3."""
    sae: str
    """`folder_sha256` of the dictionary that the latents belong to."""
    concept: str
    target: str
    """Value that a latent is raised to: its mean over frames where it is "active", or over all
    frames ("mean"), of train clips of the class."""
    both_sides: str
    """When latents that speak against the concept are edited too, the other way round: never,
    when_off (to switch it off), when_on, always."""
    statistics: Mapping[str, Tensor]
    """[F] float32 each. `SCORES`: above 0 for latents with evidence for the concept, the more the
    better. `MEANS`: mean_* over all frames of clips with and without it, active_* over frames
    where the latent fires, 0 where it never does."""
    directions: Mapping[str, Tensor]
    """[d] each, pointing towards the concept: difference of the classes' mean activations, and
    probe, the weights of a logistic probe at the same length."""
    gate: Gate
    chosen: Mapping[str, Settings] = field(default_factory=dict)
    """By direction, with or without `WORDS`: what served best on validation prompts."""

    def ranked(self, score: str, sign: int = 1) -> list[int]:
        """Latents with evidence for (sign 1) or against (-1) the concept, best first."""
        if score not in SCORES:
            raise ValueError(f"score {score!r}: known {', '.join(SCORES)}")
        evidence = sign * self.statistics[score]
        order = torch.argsort(-evidence, stable=True)
        return order[evidence[order] > 0].tolist()

    def latents(self, direction: str, settings: Settings) -> tuple[tuple[int, ...], ...]:
        """The best latents for the concept and, if `both_sides` says so, those against it."""
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
        """Edits of `latents(direction, settings)`, or of others in their place.

        on: latents for the concept are raised to what is usual with it; off: they are ablated.
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
        """The edits as one `ConceptEdit`; the branch is the caller's to set."""
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
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        **{f"statistics.{k}": v.float().contiguous() for k, v in recipe.statistics.items()},
        **{f"directions.{k}": v.float().contiguous() for k, v in recipe.directions.items()},
        "gate.features": torch.tensor(gate.features),
        "gate.weights": torch.tensor(gate.weights, dtype=torch.float64),
        "gate.bias": torch.tensor(gate.bias, dtype=torch.float64),
    }
    path = folder / f"{recipe.concept}.safetensors"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(to_safetensors(tensors))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
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
    """Read what `save_recipe` wrote; errors name the file and the stage to run."""
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


def summary_of(recipe: Recipe, most: int = 4) -> dict[str, Any]:
    """The best latents of a recipe by every score, for metrics."""
    return {
        score: {
            str(f): {name: float(recipe.statistics[name][f]) for name in (score, *MEANS)}
            for f in recipe.ranked(score)[:most]
        }
        for score in SCORES
    }
