"""A folder with a tiny model that can be steered: recipes, an SAE and judges made on the spot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from musicscope.core.io import folder_sha256
from musicscope.data.taxonomy import FAMILIES
from musicscope.dictionaries.core import TopKSAE
from musicscope.models.registry import load_model
from musicscope.steering.conditions import Context
from musicscope.steering.edit import Gate
from musicscope.steering.recipes import SCORES, Recipe, Settings, save_recipe
from musicscope.steering.subjects import Prompts

WIDTH, LATENTS, K = 48, 96, 8
LAYER = "layers.3"
PUSH = 90
"""The planted latent: it reads and writes the direction of token TOKEN in codebook 0."""
SECTION = SimpleNamespace(
    concepts=("guitar", "organ"), pairs=("guitar-off+organ-on",), strengths=(1.0, 3.0),
    n_features=(2,), scores=("effect",), branches=("conditional",), loops=("open",),
    direction_strengths=(1.0,), words=True, validation_prompts=2, n_prompts=3,
    quality_budget=0.1, frechet_budget=9.0, examples=1, bootstrap=30,
)  # fmt: skip
CHOSEN = {"off": Settings(4.0, 40), "on": Settings(4.0, 4)}
SLOT = "data/sae/tiny/top1/seed-0"


def random_sae(seed: int = 0, activation: str = "topk", width: int = WIDTH) -> TopKSAE:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(LATENTS, width, generator=generator)
    W = W / W.norm(dim=1, keepdim=True)
    b_enc, b_dec = (0.1 * torch.randn(n, generator=generator) for n in (LATENTS, width))
    mixed = W + 0.1 * torch.randn(W.shape, generator=generator)
    threshold = {"topk": -1.0, "batchtopk": 1.2, "jumprelu": torch.linspace(1.0, 1.4, LATENTS)}
    return TopKSAE(mixed, b_enc, W, b_dec, K, activation, threshold[activation])


class StubJudges:
    """Probabilities out of the levels of bands of the spectrum; musicnn knows three families."""

    families = FAMILIES

    def predict(self, audio):
        power = np.abs(np.fft.rfft(audio, axis=1)) ** 2
        bands = np.stack([b.sum(1) for b in np.array_split(power, len(FAMILIES), axis=1)], 1)
        level = np.log(bands + 1e-9)
        family = 1 / (1 + np.exp(level.mean(1, keepdims=True) - level))
        tags = np.full_like(family, np.nan)
        tags[:, [0, 1, -1]] = family[:, [0, 1, -1]]
        return {"family_judge": family, "musicnn": tags}

    def embed(self, audio):
        return np.stack([audio.std(1), audio.mean(1), np.abs(audio).max(1)], 1)


def recipe(concept: str, seed: int) -> Recipe:
    generator = torch.Generator().manual_seed(seed)
    F, d = 96, 48
    score = torch.randn(F, generator=generator)
    score[PUSH] = 9.0 if concept == "guitar" else -9.0
    statistics = {name: torch.rand(F, generator=generator) + 3.0 for name in
                  ("mean_with", "mean_without", "active_with", "active_without")}  # fmt: skip
    directions = {n: torch.randn(d, generator=generator) for n in ("difference", "probe")}
    gate = Gate((1, 2), (1.0, -1.0), 0.0, 0.5)
    statistics |= {name: score.clone() for name in SCORES}
    return Recipe(
        "tiny", "top1", LAYER, "", concept, "active", "never", statistics, directions, gate
    )


def tiny_context(model: Path) -> Context:
    """The evaluation of the tiny model, with prompts of 0.2 s."""
    recipes = {c: recipe(c, i) for i, c in enumerate(("guitar", "organ"))}
    subject = Prompts(5, 0.2, 2, 3.0, ("guitar", "organ"), words=True)
    return Context(load_model(model), random_sae(), recipes, StubJudges(), subject, 5)


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
