"""Two models that share some factors and not others, as stores, SAEs and a universal SAE.

Every factor has a direction of its own in each model that has it, so the dictionaries are known
exactly and whatever a comparison finds can be held against what was planted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from musicscope.config.concepts import Concept, FindConcept
from musicscope.data.taxonomy import FAMILIES
from musicscope.dictionaries.core import ModelWeights, TopKSAE, UniversalSAE

SHARED, CLOCK, OWN, DEAD, K, FRAMES = 12, 1, 4, 2, 16, 30
BOTH = SHARED + CLOCK
WIDTH = BOTH + OWN + DEAD
GUITAR = 3
"""The shared factor that is loud in clips with a guitar."""


@dataclass
class Store:
    """What the comparison uses of an ActivationStore."""

    data: np.ndarray
    ids: list[str]
    folder: Path = field(default=Path("data/activations/planted"))

    def __post_init__(self) -> None:
        self.frames = np.full(len(self.data), self.data.shape[1])
        self.width = self.data.shape[2]
        self.std = self.data.reshape(-1, self.width).std(0)

    def __len__(self) -> int:
        return len(self.data)

    def clip(self, i: int) -> np.ndarray:
        return self.data[i]


def clip_rows(groups: int = 6, per_group: int = 8, seed: int = 0) -> pd.DataFrame:
    """Clips of validation, test and the held-out font; every family in half of them, at random."""
    rng, rows = np.random.default_rng(seed), []
    for split, font in (("validation", "mixed"), ("test", "mixed"), ("test", "fluidr3mono")):
        for g in range(groups):
            for i in range(per_group):
                has = {f"has_{f}": bool(rng.random() < 0.5) for f in FAMILIES}
                name = f"{font}-{split}-{g}-{i}"
                rows.append(
                    {"id": name, "group": f"{split}{g}", "split": split, "kind": "clip",
                     "pair_id": "", "font": font, **has}
                )  # fmt: skip
    return pd.DataFrame(rows)


def find_concept_section(**changes: object) -> FindConcept:
    """Section find_concept of params.yaml, small, with one concept."""
    guitar = Concept(name="guitar", positive="clips:has_guitar", negative="clips:not has_guitar")
    values = {
        "slot": "top1", "universal": False, "concepts": (guitar,), "q": 0.05, "permutations": 199,
        "stability_draws": 10, "seconds": 10.0, "windows": 4, "few": 10, "few_draws": 10,
        "features": 4, "moments": 3, "bootstrap": 50,
    }  # fmt: skip
    return FindConcept(**values | changes)


def orders(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Where factor f of a model is: its dimension, and its latent in that model's SAE."""
    rng = np.random.default_rng(seed)
    return rng.permutation(WIDTH), rng.permutation(WIDTH)


def sae(latent_of: np.ndarray, dimension_of: np.ndarray) -> TopKSAE:
    """Latent `latent_of[f]` reads and writes dimension `dimension_of[f]`."""
    W = torch.zeros(WIDTH, WIDTH)
    W[latent_of, dimension_of] = 1.0
    return TopKSAE(W, torch.zeros(WIDTH), W, torch.zeros(WIDTH), k=K)


@dataclass
class Planted:
    rows: pd.DataFrame
    stores: list[Store]
    saes: list[list[TopKSAE]]
    usae: UniversalSAE
    latent: list[np.ndarray]
    """[factor] -> latent of the SAE of seed 0, by model; in the order of `plant`"""


def plant(seed: int = 0, reproducible_own: int = OWN) -> Planted:
    """Factors 0..SHARED-1 are in both models, the next CLOCK follow the place in the clip in both,
    the next OWN differ, the last DEAD never fire.

    The SAEs of seed 1 lack all but the first `reproducible_own` own factors. In the universal SAE
    latent f < BOTH is factor f of both; BOTH + f and BOTH + OWN + f are own factor f of either.
    """
    rng, rows = np.random.default_rng(seed), clip_rows(seed=seed)
    n = len(rows)

    def factors(count: int) -> np.ndarray:
        on = rng.random((n, FRAMES, count)) < 0.15
        return on * rng.uniform(1.0, 3.0, on.shape)

    both = factors(BOTH)
    both[..., SHARED:] = (np.arange(FRAMES) % 10 < 3)[:, None]
    both[..., GUITAR] *= np.where(rows["has_guitar"], 3.0, 0.5)[:, None]
    stores, saes, latents, weights = [], [], [], []
    F = BOTH + 2 * OWN
    for m in range(2):
        dimension, latent = orders(10 + m)
        x = np.zeros((n, FRAMES, WIDTH), np.float32)
        x[..., dimension[:BOTH]] = both * rng.uniform(0.9, 1.1, both.shape)
        x[..., dimension[BOTH : BOTH + OWN]] = factors(OWN)
        stores.append(Store(x, rows["id"].tolist()))
        second = sae(rng.permutation(WIDTH), dimension)
        gone = dimension[BOTH + reproducible_own : BOTH + OWN]
        second.W_enc[:, gone] = 0
        saes.append([sae(latent, dimension), second])
        latents.append(latent)
        W = torch.zeros(F, WIDTH)
        own = BOTH + m * OWN + np.arange(OWN)
        W[np.arange(BOTH), dimension[:BOTH]] = 1.0
        W[own, dimension[BOTH : BOTH + OWN]] = 1.0
        offset = torch.full((WIDTH,), 100.0)
        weights.append(ModelWeights(W, torch.zeros(F), W, -offset / 2, offset, torch.tensor(2.0)))
    return Planted(
        rows, stores, saes, UniversalSAE(("a", "b"), "top1", "usae", K, tuple(weights)), latents
    )
