"""Opens what the cells of an evaluation are run with, once a process."""

from __future__ import annotations

from functools import lru_cache

from musicscope.data.clips import ClipStore
from musicscope.dictionaries.core import TopKSAE
from musicscope.judges.pair import load_judges
from musicscope.models.registry import load_model
from musicscope.steering.audio_cells import AudioBench
from musicscope.steering.conditions import Bench
from musicscope.steering.recipes import load_recipe


@lru_cache(maxsize=1)
def open_bench(
    model: str, recipes: str, sae: str, concepts: tuple[str, ...], device: str, seed: int,
    seconds: float, batch: int, guidance: float,
) -> Bench:  # fmt: skip
    """Model data/models/<model>, the SAE and the recipes in these folders, and data/judge."""
    return Bench(
        load_model(f"data/models/{model}", device),
        TopKSAE.load(sae, device),
        {concept: load_recipe(recipes, concept) for concept in concepts},
        load_judges("data/judge"),
        seed, seconds, batch, guidance,
    )  # fmt: skip


@lru_cache(maxsize=1)
def open_audio_bench(
    model: str, recipes: str, sae: str, concepts: tuple[str, ...], device: str, seed: int,
    seconds: float, batch: int,
) -> AudioBench:  # fmt: skip
    """As `open_bench`, of an audio model and with data/clips."""
    return AudioBench(
        load_model(f"data/models/{model}", device),
        TopKSAE.load(sae, device),
        {concept: load_recipe(recipes, concept) for concept in concepts},
        load_judges("data/judge"),
        ClipStore.open("data/clips"),
        seed, seconds, batch,
    )  # fmt: skip
