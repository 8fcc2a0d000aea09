"""A folder with a tiny model that can be steered: recipes, an SAE and judges made on the spot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from musicscope.core.io import folder_sha256
from musicscope.dictionaries.core import TopKSAE
from musicscope.steering.recipes import Settings, save_recipe
from tests.steering.test_evaluation import StubJudges, recipe
from tests.steering.test_steering import random_sae

CHOSEN = {"off": Settings(4.0, 40), "on": Settings(4.0, 4)}
SLOT = "data/sae/tiny/top1/seed-0"


def make_steerable(root: Path, model: Path) -> None:
    """data/models/tiny, data/steering/tiny (guitar off and on, organ on only) and its SAE."""
    (root / "data/models").mkdir(parents=True)
    (root / "data/models/tiny").symlink_to(model, target_is_directory=True)
    random_sae().save(root / SLOT, {"layer": "layers.3"})
    sae = folder_sha256(root / SLOT)
    guitar, organ = (
        replace(recipe(name, i), sae=sae) for i, name in enumerate(("guitar", "organ"))
    )
    save_recipe(replace(guitar, chosen=CHOSEN), root / "data/steering/tiny")
    save_recipe(replace(organ, chosen={"on": CHOSEN["on"]}), root / "data/steering/tiny")


def other_sae() -> TopKSAE:
    """An SAE of another model."""
    return random_sae(width=6)


__all__ = ["CHOSEN", "SLOT", "StubJudges", "make_steerable", "other_sae"]
