"""One cell of the evaluation: prompts generated under one method, judged, kept if the run dies.

Every method sees the same prompts in the same batches with the same seeds, and a seed fixes the
noise of every draw, so a steered piece differs from its plain twin by the edit alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.signal import resample_poly

from musicscope.core.parallel import workers
from musicscope.core.seeding import seed_for
from musicscope.dictionaries.core import TopKSAE
from musicscope.models.interface import Hook, MusicModel
from musicscope.steering import baselines as baselines
from musicscope.steering.edit import Change, change_hook, code_change
from musicscope.steering.prompts import PromptSet, make_prompts
from musicscope.steering.recipes import Recipe, Settings

METHODS = (
    "plain", "reseed", "prompt_edit", "sae", "sae_words", "diff_means", "diff_means_words",
    "probe_direction", "random_feature", "random_direction", "passthrough",
)  # fmt: skip
WITH_WORDS = {"sae_words": "sae", "diff_means_words": "diff_means"}
"""Methods on top of the edited prompt, and what acts on activations in them."""
DIRECTIONS = {"diff_means": "difference", "probe_direction": "probe"}
"""Methods that add a direction of the recipe, and its name there."""
JUDGE_RATE = 16_000
AVOID = 4
"""A random feature is none of the so many times more latents with the most evidence."""


@dataclass(frozen=True)
class Cell:
    """What decides a cell's numbers, beside the model, the recipes, the judges and the bench."""

    prompts: PromptSet
    method: str = "plain"
    """plain; reseed: plain with other noise, what chance alone moves; prompt_edit: the wish in
    words; sae: latents; sae_words: both; original: an audio model's clip itself; the rest are
    controls and baselines."""
    wishes: tuple[tuple[str, str], ...] = ()
    """(concept, "off" or "on"), one or several at once."""
    settings: tuple[Settings, ...] = ()
    """One a wish, for methods that have a strength."""
    keep: int = 0
    """Pieces whose audio is kept."""

    def __post_init__(self) -> None:
        if self.method not in (*METHODS, "original"):
            raise ValueError(f"method {self.method!r}: known {', '.join(METHODS)}")
        needs = self.method not in ("plain", "reseed", "prompt_edit", "passthrough")
        if needs and len(self.settings) != len(self.wishes):
            raise ValueError(f"{self.method}: {len(self.settings)} settings for {self.wishes}")


@dataclass(frozen=True)
class Measured:
    """A cell's pieces as the judges and the unsteered model see them."""

    probabilities: Mapping[str, np.ndarray]
    """Judge -> [n, families]; NaN for silent pieces and for families it does not know."""
    embeddings: np.ndarray
    """[n, 200] of musicnn, NaN for silent pieces"""
    ce: np.ndarray
    """[n] nats a code, of the unsteered model without a caption"""
    audio: np.ndarray
    """[keep, samples] at the model's rate"""
    spectral: np.ndarray | None = None
    """[n] spectral distance from the plain reconstruction; of an audio model, which has no `ce`"""
    groups: np.ndarray | None = None
    """[n] group of each piece where they are clips; None: every piece is one of its own"""


@dataclass(frozen=True)
class Bench:
    """What cells are run with."""

    model: MusicModel
    sae: TopKSAE
    recipes: Mapping[str, Recipe]
    judges: Any
    """`musicscope.judges.pair.Judges`"""
    seed: int
    seconds: float
    batch: int
    guidance: float

    @property
    def layer(self) -> str:
        return next(iter(self.recipes.values())).layer

    @property
    def frame_rate(self) -> float:
        return self.model.frame_rate

    def titles(self, wanted: PromptSet) -> list[str]:
        """What the pieces are called: their prompts."""
        return make_prompts(wanted, self.seed)


Open = Callable[[], Bench]
"""Picklable and cached: it is called for every cell."""


# --- methods ----------------------------------------------------------------------------------


def _edits(bench: Bench, cell: Cell, at_random: bool = False) -> Change | None:
    """The latents' change of all wishes; with other latents of like activity if `at_random`."""
    found = []
    for (concept, direction), settings in zip(cell.wishes, cell.settings, strict=True):
        recipe, latents = bench.recipes[concept], None
        if at_random:
            seed = seed_for(bench.seed, "steer", "random", concept, direction)
            latents = _random_latents(recipe, direction, settings, seed)
        found.append(recipe.concept_edit(direction, settings, latents))
    return code_change(bench.sae, found, bench.frame_rate)


def _random_latents(
    recipe: Recipe, direction: str, settings: Settings, seed: int
) -> tuple[tuple[int, ...], ...]:
    """Others in the place of `Recipe.latents`, each of like activity, none with much evidence."""
    activity = (recipe.statistics["mean_with"] + recipe.statistics["mean_without"]).numpy()
    sides, most = recipe.latents(direction, settings), AVOID * settings.n_features
    ranks = [recipe.ranked(settings.score, sign)[:most] for sign in (1, -1)[: len(sides)]]
    chosen, avoid = ([f for part in parts for f in part] for parts in (sides, ranks))
    drawn = baselines.random_features(activity, chosen, avoid, seed)
    return (drawn[: len(sides[0])], drawn[len(sides[0]) :])[: len(sides)]


def _direction(bench: Bench, cell: Cell, name: str) -> Change:
    """The sum of the wishes' directions at their strengths, against the concept for "off"."""
    total = sum(
        (1 if direction == "on" else -1) * s.strength * bench.recipes[concept].directions[name]
        for (concept, direction), s in zip(cell.wishes, cell.settings, strict=True)
    )
    return baselines.direction_change(total.to(bench.model.device))


def cell_hooks(bench: Bench, cell: Cell) -> dict[str, Hook]:
    """The hooks that a cell generates with; none where it differs in words or noise only."""
    branch = cell.settings[0].branch if cell.settings else "both"
    method = WITH_WORDS.get(cell.method, cell.method)
    if method == "passthrough":
        change: Change | None = baselines.passthrough_change(bench.sae)
    elif method in DIRECTIONS:
        change = _direction(bench, cell, DIRECTIONS[method])
    elif method in ("sae", "random_feature"):
        change = _edits(bench, cell, method == "random_feature")
    elif method == "random_direction":
        change = _edits(bench, cell)
        seed = seed_for(bench.seed, "steer", "random direction", *cell.wishes)
        if change is not None:
            direction = baselines.random_direction(bench.sae.width, seed)
            change = baselines.matched_change(change, direction.to(bench.model.device))
    else:
        return {}
    if change is None:
        return {}
    return {bench.layer: change_hook(bench.model, change, branch)}


# --- running ----------------------------------------------------------------------------------


def to_judges(audio: np.ndarray, rate: int) -> np.ndarray:
    """Audio [n, samples] at `rate`, as the judges want it: 16 kHz."""
    if rate == JUDGE_RATE:
        return audio
    common = math.gcd(rate, JUDGE_RATE)
    return resample_poly(audio, JUDGE_RATE // common, rate // common, axis=1).astype(np.float32)


def batches(bench: Bench, cell: Cell) -> Iterator[tuple[list[str], int]]:
    """Prompts and seed of each batch; the same for all methods on the same prompts but reseed."""
    texts = make_prompts(cell.prompts, bench.seed)
    if cell.method == "prompt_edit" or cell.method in WITH_WORDS:
        texts = [baselines.edit_prompt(text, dict(cell.wishes)) for text in texts]
    again = ("again",) if cell.method == "reseed" else ()
    for first in range(0, len(texts), bench.batch):
        name = (bench.model.name, cell.prompts.split, first // bench.batch, *again)
        yield texts[first : first + bench.batch], seed_for(bench.seed, "steer", *name)


def generate(bench: Bench, cell: Cell) -> tuple[np.ndarray, torch.Tensor]:
    """Audio [n, samples] and codes [n, K, T] of a cell's prompts."""
    hooks, audio, codes = cell_hooks(bench, cell), [], []
    for texts, seed in batches(bench, cell):
        sound, tokens = bench.model.generate(
            texts, bench.seconds, seed, hooks, guidance_scale=bench.guidance
        )
        audio.append(sound.float().cpu().numpy())
        codes.append(tokens)
    return np.concatenate(audio), torch.cat(codes)


def naturalness(model: MusicModel, codes: torch.Tensor, batch: int) -> np.ndarray:
    """Cross-entropy [n] of codes under the model as it is, nats a code.

    Without a caption: music with a concept that the prompt does not name is no worse for it.
    """
    parts = [
        model.cross_entropy(model.with_captions(part, [None] * len(part))).mean((1, 2))
        for part in codes.split(batch)
    ]
    return torch.cat(parts).double().cpu().numpy()


def measure(bench: Bench, cell: Cell) -> Measured:
    """Generate a cell and judge it."""
    audio, codes = generate(bench, cell)
    heard = to_judges(audio, bench.model.sample_rate)
    probabilities = {k: np.asarray(v) for k, v in bench.judges.predict(heard).items()}
    return Measured(
        probabilities,
        np.asarray(bench.judges.embed(heard)),
        naturalness(bench.model, codes, bench.batch),
        audio[: cell.keep].copy(),
    )


def _file(scratch: Path, cell: Cell) -> Path:
    text = json.dumps(asdict(cell), sort_keys=True)
    return scratch / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.npz"


def run_cell(
    open_bench: Open, scratch: Path, cell: Cell, measuring: Callable = measure
) -> Measured:
    """`measuring` of the cell, or what an earlier run kept of it in `scratch`."""
    path = _file(scratch, cell)
    if not path.is_file():
        found = measuring(open_bench(), cell)
        arrays = {f"judge.{name}": p for name, p in found.probabilities.items()}
        more = {name: getattr(found, name) for name in ("spectral", "groups")}
        arrays |= {name: values for name, values in more.items() if values is not None}
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with open(temporary, "wb") as stream:
            np.savez(stream, embeddings=found.embeddings, ce=found.ce, audio=found.audio, **arrays)
        os.replace(temporary, path)
    with np.load(path, allow_pickle=False) as kept:
        judged = {k.removeprefix("judge."): kept[k] for k in kept if k.startswith("judge.")}
        more = {name: kept[name] for name in ("spectral", "groups") if name in kept}
        return Measured(judged, kept["embeddings"], kept["ce"], kept["audio"], **more)


def run_cells(
    open_bench: Open, scratch: Path, cells: Iterable[Cell], processes: int, progress: Callable,
    measuring: Callable = measure,
) -> dict[Cell, Measured]:  # fmt: skip
    """All cells, each once, in several processes; numbers do not depend on how many.

    `progress` wraps an iterator and gets the number of cells, such as a tqdm bar; `measuring`
    (bench, cell) is that of the model's kind.
    """
    todo = list(dict.fromkeys(cells))
    with workers(max(1, min(processes, len(todo)))) as each:
        finished = each(partial(run_cell, open_bench, scratch, measuring=measuring), todo)
        return dict(zip(todo, progress(finished, len(todo)), strict=True))


def estimate(bench: Bench, cells: int, prompts: int, processes: int) -> str:
    """What is ahead, from one short generation: print it before the run.

    Costs some two seconds. `prompts` is the mean number a cell.
    """
    count, short = min(bench.batch, prompts), min(bench.seconds, 0.5)
    begin = time.perf_counter()
    audio, _ = bench.model.generate(
        ["guitar music"] * count, short, 0, guidance_scale=bench.guidance
    )
    piece = (time.perf_counter() - begin) * bench.seconds / short
    sound = np.tile(audio[:1].float().cpu().numpy(), (1, math.ceil(bench.seconds / short)))
    begin = time.perf_counter()
    heard = to_judges(sound, bench.model.sample_rate)
    bench.judges.predict(heard)
    bench.judges.embed(heard)
    judged = (time.perf_counter() - begin) * count
    cell = (piece + judged) * prompts / count
    minutes = cells * cell / max(1, processes) / 60
    return (
        f"{cells} cells of about {prompts} prompts x {bench.seconds:g} s at {cell:.0f} s: about "
        f"{minutes:.0f} min on {processes} process(es)"
    )
