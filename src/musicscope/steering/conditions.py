"""Conditions of the evaluation: rendered, judged, and kept on disk in case the run is killed.

Every method gets the same samples in the same batches with the same seeds. Controls and baselines:
a difference of class means and the weights of a probe as directions (ITI, arXiv 2306.03341), random
latents, a random direction, and the SAE's own reconstruction error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial, reduce
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from musicscope.config.concepts import Steer
from musicscope.core.audio import resample
from musicscope.core.io import atomic_file
from musicscope.core.parallel import workers
from musicscope.core.seeding import seed_for
from musicscope.data.clips import ClipStore
from musicscope.data.concepts import Concepts
from musicscope.dictionaries.core import TopKSAE
from musicscope.judges.pair import Judges, load_judges
from musicscope.models.interface import AudioModel, Hook, Model
from musicscope.models.registry import load_model
from musicscope.steering.edit import Change, change_hook, code_change
from musicscope.steering.methods import FROZEN, METHODS, Condition
from musicscope.steering.recipes import Recipe, Settings, load_recipe
from musicscope.steering.subjects import Subject, make_subject

JUDGE_RATE = 16_000
AVOID = 4
"""Random latents are drawn from outside the top AVOID x n_features latents."""
NEAREST = 8
"""Candidates for a random latent: the NEAREST latents closest in mean activation."""
DRAWS = 10
"""Draws of the random controls, dealt over prompts: all of them cost as much as one."""
AGAIN = ("crop", "codec")
"""How plain test pieces are heard again: without their first part, and through the codec."""
CROPPED = 0.05
"""Share of a piece that the crop takes off."""
HEARD_AGAIN = 4
"""Pieces per request that are heard again; judges take half the time of an evaluation."""


@dataclass(frozen=True)
class Measurement:
    """Samples of a condition as the judges and the unsteered model see them."""

    probabilities: Mapping[str, np.ndarray]
    """Judge -> [n, families]; NaN for silent samples and for families that it does not know."""
    embeddings: np.ndarray
    """[n, 200] of musicnn, NaN for silent samples"""
    ce: np.ndarray
    """[n] nats per code, of the unsteered model without a caption; NaN for an audio model"""
    audio: np.ndarray
    """[keep, samples] at the model's rate"""
    spectral: np.ndarray | None = None
    """[n] spectral distance from the plain reconstruction of an audio model"""
    groups: np.ndarray | None = None
    """[n] group of each sample; None: every sample is its own group"""
    again: np.ndarray | None = None
    """[len(AGAIN), judges, m, families] probabilities of the first m plain test pieces when heard
    again; judges in the order of `probabilities`"""

    def costs(self, plain: Measurement) -> dict[str, np.ndarray]:
        """Cost [n] per name: rise of cross-entropy and, for an audio model, spectral distance."""
        spectral = {} if self.spectral is None else {"spectral_cost": self.spectral}
        return {"ce_cost": self.ce - plain.ce, **spectral}


@dataclass(frozen=True)
class Context:
    """What conditions are measured with."""

    model: Model
    sae: TopKSAE
    recipes: Mapping[str, Recipe]
    judges: Judges
    subject: Subject
    seed: int
    frozen: tuple[TopKSAE, Mapping[str, Recipe]] | None = None
    """The frozen decoder and its recipes, if the subject has that method."""

    def edited_by(self, method: str) -> tuple[TopKSAE, Mapping[str, Recipe]]:
        """Return the dictionary whose latents a method edits, and its recipes."""
        if METHODS[method].dictionary != FROZEN:
            return self.sae, self.recipes
        if self.frozen is None:
            raise ValueError(f"the method {method} needs the frozen decoder and its recipes")
        return self.frozen

    @property
    def layer(self) -> str:
        return next(iter(self.recipes.values())).layer


Open = Callable[[], Context]
"""Picklable and cached: called once per condition."""


@lru_cache(maxsize=1)
def open_context(
    model: str, recipes: str, sae: str, concepts: tuple[str, ...], device: str, seed: int,
    section: Steer, defined: Concepts | None = None,
) -> Context:  # fmt: skip
    """Open data/models/<model>, the SAE and recipes in these folders, data/clips and data/judge.

    The frozen decoder lies beside the SAE, its recipes in the folder FROZEN of `recipes`.
    `defined`: params.concepts.
    """
    loaded, judges = load_model(f"data/models/{model}", device), load_judges("data/judge")
    if not judges.reliability:
        raise ValueError(
            "data/judge/reliability.json is missing, and without it no judge has a say: run dvc "
            "repro -f train_judge"
        )
    clips, frozen = ClipStore.open("data/clips"), None
    subject = make_subject(loaded, section, seed, clips, defined)

    def read(folder: Path) -> dict[str, Recipe]:
        return {concept: load_recipe(folder, concept) for concept in concepts}

    if FROZEN in subject.methods:
        frozen = TopKSAE.load(Path(sae).parent / FROZEN, device), read(Path(recipes) / FROZEN)
    return Context(
        loaded,
        TopKSAE.load(sae, device),
        read(Path(recipes)),
        judges,
        subject,
        seed,
        frozen,
    )


# --- edits ------------------------------------------------------------------------------------


def condition_hooks(context: Context, condition: Condition) -> dict[str, Hook]:
    """Make the hooks of a condition; none if it edits no activations."""
    edit = METHODS[condition.method].edit
    change: Change | None = None
    if edit == "reconstruction":
        change = reconstruction_change(context.sae)
    elif edit in ("difference", "probe"):
        change = direction_change(_direction(context, condition, edit))
    elif edit in ("latents", "random latents"):
        change = _latent_change(context, condition)
        if edit == "random latents" and change is not None:
            drawn = [_latent_change(context, condition, draw) for draw in range(DRAWS)]
            change = dealt_change([c for c in drawn if c is not None])
    elif edit == "random direction":
        change = _latent_change(context, condition)
        if change is not None:
            name = (context.seed, "steer", "random direction", *condition.requests)
            drawn = [random_direction(context.sae.width, seed_for(*name, i)) for i in range(DRAWS)]
            change = matched_change(change, torch.stack(drawn).to(context.model.device))
    if change is None:
        return {}
    branch = condition.settings[0].branch if condition.settings else "both"
    return {context.layer: change_hook(context.model, change, branch)}


def _latent_change(
    context: Context, condition: Condition, draw: int | None = None
) -> Change | None:
    """Change of the latents for all requests, or of a draw of latents of similar activity."""
    edits, (sae, recipes) = [], context.edited_by(condition.method)
    for (concept, direction), settings in zip(condition.requests, condition.settings, strict=True):
        recipe, latents = recipes[concept], None
        if draw is not None:
            seed = seed_for(context.seed, "steer", "random", concept, direction, draw)
            latents = control_latents(recipe, direction, settings, seed)
        edits.append(recipe.concept_edit(direction, settings, latents))
    return code_change(sae, edits, context.model.frame_rates[context.layer])


def control_latents(
    recipe: Recipe, direction: str, settings: Settings, seed: int
) -> tuple[tuple[int, ...], ...]:
    """Draw control latents matched in activity, with low evidence for the concept.

    From the pool of the recipe, if enough are left.
    """
    activity = (recipe.statistics["mean_with"] + recipe.statistics["mean_without"]).numpy()
    sides, most = recipe.latents(direction, settings), AVOID * settings.n_features
    ranks = [recipe.ranked(settings.score, sign, True)[:most] for sign in (1, -1)[: len(sides)]]
    chosen, avoid = ([f for part in parts for f in part] for parts in (sides, ranks))
    if recipe.pool is not None:
        pooled = np.where(recipe.pool.numpy(), activity, 0.0)
        if (pooled > 0).sum() - len(set(avoid) | set(chosen)) >= len(chosen):
            activity = pooled
    drawn = random_features(activity, chosen, avoid, seed)
    return (drawn[: len(sides[0])], drawn[len(sides[0]) :])[: len(sides)]


def random_features(
    activity: np.ndarray, chosen: Sequence[int], avoid: Sequence[int], seed: int
) -> tuple[int, ...]:
    """Draw for each latent of `chosen` another one of similar activity, each once.

    `activity` [F] is the mean value over frames. Latents that never fire, chosen latents and
    latents to `avoid` are not drawn. So a random edit has about the same size.

    Raises:
        ValueError: too few latents are left.
    """
    rng = np.random.default_rng(seed)
    free = activity > 0
    free[list(chosen)] = False
    if len(avoid) and free.sum() - len(avoid) >= len(chosen):
        free[list(avoid)] = False
    if free.sum() < len(chosen):
        raise ValueError(f"{int(free.sum())} live latents left to draw {len(chosen)} from")
    drawn = []
    for feature in chosen:
        candidates = np.flatnonzero(free)
        # A chosen latent is alive too, but guard the logarithm.
        wanted = np.log(max(float(activity[feature]), 1e-12))
        distance = np.abs(np.log(activity[candidates]) - wanted)
        near = candidates[np.argsort(distance, kind="stable")[:NEAREST]]
        drawn.append(int(rng.choice(near)))
        free[drawn[-1]] = False
    return tuple(drawn)


def _direction(context: Context, condition: Condition, name: str) -> Tensor:
    """Sum of the requests' directions at their strengths, reversed for "off": [d]."""
    parts = (
        (1 if direction == "on" else -1) * s.strength * context.recipes[concept].directions[name]
        for (concept, direction), s in zip(condition.requests, condition.settings, strict=True)
    )
    return reduce(torch.add, parts).to(context.model.device)


def direction_change(direction: Tensor) -> Change:
    """Add `direction` [d] to every frame."""
    return lambda x, positions, conditional: direction.to(x.dtype).expand_as(x)


def reconstruction_change(sae: TopKSAE) -> Change:
    """Replace x by decode(encode(x)), which shows the cost of the SAE's error alone."""
    return lambda x, positions, conditional: sae.reconstruct(x) - x


def draw_of(pieces: np.ndarray, batch: int) -> np.ndarray:
    """Tell which of the `DRAWS` each piece (its number) gets; batches start anew."""
    return pieces % batch % DRAWS


def dealt_change(changes: Sequence[Change]) -> Change:
    """Give row i of a batch the change number i modulo `len(changes)`, and both halves the same."""

    def dealt(x: Tensor, positions: Tensor, conditional: int) -> Tensor | None:
        added = torch.zeros_like(x)
        for number, change in enumerate(changes[:conditional]):
            rows = torch.arange(len(x), device=x.device) % conditional % len(changes) == number
            own = int(rows[:conditional].sum())
            if (difference := change(x[rows], positions, own)) is not None:
                added[rows] = difference.to(added.dtype)
        return added

    return dealt


def matched_change(change: Change, directions: Tensor) -> Change:
    """Add directions [draws, d] with the length, per row and frame, of what `change` adds.

    Row i of a batch gets draw i modulo their number, and both halves of guidance the same.
    """
    units = directions / torch.linalg.vector_norm(directions, dim=1, keepdim=True)

    def matched(x: Tensor, positions: Tensor, conditional: int) -> Tensor | None:
        difference = change(x, positions, conditional)
        if difference is None:
            return None
        draws = torch.arange(len(x), device=x.device) % conditional % len(units)
        return torch.linalg.vector_norm(difference, dim=-1, keepdim=True) * units[draws, None]

    return matched


def random_direction(width: int, seed: int) -> Tensor:
    """Draw a direction [width] of length 1, uniform on the sphere."""
    direction = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return direction / torch.linalg.vector_norm(direction)


# --- measuring --------------------------------------------------------------------------------


def measure(context: Context, condition: Condition) -> Measurement:
    """Render a condition and judge it."""
    subject, model = context.subject, context.model
    rendering = subject.render(model, condition, condition_hooks(context, condition))
    audio = resample(rendering.audio, model.sample_rate, JUDGE_RATE)
    plain_test = condition.method == "plain" and condition.selection.split == "test"
    return Measurement(
        _heard(context, audio),
        np.asarray(context.judges.embed(audio)),
        audio=rendering.audio[: condition.keep].copy(),
        groups=subject.groups(condition.selection),
        again=_again(context, rendering.audio[:HEARD_AGAIN]) if plain_test else None,
        **subject.costs(model, condition, rendering),
    )


def _heard(context: Context, audio: np.ndarray) -> dict[str, np.ndarray]:
    """Probabilities by judge, rounded as the table of verdicts keeps them."""
    found = context.judges.predict_all(audio)
    return {k: np.asarray(v, np.float16).astype(np.float32) for k, v in found.items()}


def _again(context: Context, audio: np.ndarray) -> np.ndarray:
    """Hear pieces [m, samples] again in the ways of `AGAIN`: [2, judges, m, families]."""
    model = context.model
    if isinstance(model, AudioModel):
        coded = model.reconstruct(model.encode(audio))
    else:
        coded = model.decode(model.encode(audio, [None] * len(audio)).codes)
    first = round(CROPPED * audio.shape[1])
    heard = (
        _heard(context, resample(sound, model.sample_rate, JUDGE_RATE))
        for sound in (audio[:, first:], coded.float().cpu().numpy())
    )
    return np.stack([np.stack(list(found.values())) for found in heard])


def run_condition(open_context: Open, scratch: Path, condition: Condition) -> Measurement:
    """Measure a condition, or read what an earlier run kept of it in `scratch`."""
    key = json.dumps(asdict(condition), sort_keys=True)
    path = scratch / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
    if not path.is_file():
        measured = measure(open_context(), condition)
        arrays = {f"judge.{name}": p for name, p in measured.probabilities.items()}
        fields = {k: v for k, v in vars(measured).items() if isinstance(v, np.ndarray)}
        with atomic_file(path) as temporary:
            np.savez(temporary, **fields, **arrays)
    with np.load(path, allow_pickle=False) as kept:
        judged = {k.removeprefix("judge."): kept[k] for k in kept if k.startswith("judge.")}
        fields = {k: kept[k] for k in kept if not k.startswith("judge.")}
        return Measurement(judged, **fields)


def run_conditions(
    open_context: Open, scratch: Path, conditions: Iterable[Condition], processes: int,
    progress: Callable[[Iterator[Measurement], int], Iterable[Measurement]],
) -> dict[Condition, Measurement]:  # fmt: skip
    """Measure each condition once, in several processes; numbers do not depend on how many.

    `progress` wraps an iterator and gets the number of conditions, such as a `Bar`.
    """
    todo = list(dict.fromkeys(conditions))
    with workers(max(1, min(processes, len(todo)))) as each:
        measured = each(partial(run_condition, open_context, scratch), todo)
        return dict(zip(todo, progress(measured, len(todo)), strict=True))
