"""What an evaluation steers: prompts of a model that generates, or clips through an audio model.

A `Subject` chooses samples for requests (`select`), names and groups them (`titles`, `groups`),
renders them under a condition (`render`) and computes what a change costs (`costs`). It also has
`methods`. The noise of a sample depends on the sample alone, so only the edit differs from plain.

* `Prompts`: to switch a concept off, prompts name it; to switch it on, they do not. Those of a
  concept that params.concepts defines are its templates, or captions of clips (`Phrasing`). The
  cost is the cross-entropy of the tokens under the unsteered model.
* `Clips`: clips with the concept are to lose it, clips without it are to get it. "plain" is the
  unedited reconstruction, so that the loss of the codec cancels. The cost is the spectral distance
  from it (`musicscope.core.audio`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from musicscope.config.concepts import Steer
from musicscope.core.audio import resample, spectra, spectral_distance
from musicscope.core.seeding import seed_for
from musicscope.data.clips import ClipStore, known_labels, main_clips
from musicscope.data.concepts import Concepts, completed
from musicscope.data.splits import label_matrix
from musicscope.data.taxonomy import FAMILIES, KEYS, PITCHED_FAMILIES
from musicscope.models.interface import (
    AudioBatch,
    AudioModel,
    Hook,
    Model,
    audio_model,
    language_model,
)
from musicscope.steering.methods import FROZEN, METHODS, Condition, Request, Selection

FORMS = {
    "validation": (
        "{every}, {tempo}, {dense}",
        "a {lead} melody{backed}",
        "{dense} {tempo} music featuring {lead}{backed}",
    ),
    "test": (
        "A {tempo}, {dense} instrumental in {key} with {every}.",
        "{every} play a {dense} piece in {key} at about {bpm} BPM.",
        "{lead} leads a {tempo} tune{joined}.",
        "{every}",
    ),
}
"""Phrasings of the clips' captions by split; validation and test share none."""
TEMPOS = {"slow": (70, 75, 80, 85), "mid-tempo": (95, 110, 120, 130), "fast": (140, 150, 160)}
DENSITIES = ("sparse", "steady", "busy")


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _blanks(selection: Selection, seed: int, i: int) -> dict[str, object]:
    """Draw what fills the blanks of prompt `i`: families that a selection allows, tempo, key ..."""
    families = tuple(c for c in selection.named if c in FAMILIES)
    allowed = [f for f in FAMILIES if f not in (*families, *selection.without)]
    leads = [f for f in families if f in PITCHED_FAMILIES]
    name = (selection.split, "+".join(selection.named), "-".join(selection.without), i)
    rng = np.random.default_rng(seed_for(seed, "steer", "prompts", *name))
    others = list(rng.permutation(allowed))
    if leads:
        lead = leads[rng.integers(len(leads))]
    else:
        lead = next(f for f in others if f in PITCHED_FAMILIES)
    rest = [f for f in families if f != lead]
    rest += [f for f in others if f != lead][: rng.integers(3)]
    lead, *rest = (str(f).replace("_", " ") for f in (lead, *rest))
    tempo = list(TEMPOS)[rng.integers(len(TEMPOS))]
    return {
        "lead": lead, "every": _and([lead, *rest]), "tempo": tempo,
        "joined": f" with {_and(rest)}" if rest else "",
        "backed": f", backed by {_and(rest)}" if rest else "",
        "dense": DENSITIES[rng.integers(len(DENSITIES))],
        "key": f"{KEYS[rng.integers(len(KEYS))]} {('major', 'minor')[rng.integers(2)]}",
        "bpm": TEMPOS[tempo][rng.integers(len(TEMPOS[tempo]))],
    }  # fmt: skip


def make_prompts(
    selection: Selection, seed: int, phrasings: Mapping[str, Phrasing] | None = None
) -> list[str]:
    """Make the prompts [n] of a selection.

    A pitched family leads, as in the clips; up to two families accompany it. A defined concept
    that is named, or that `comes`, brings its own phrasing instead, and all else that is named is
    added in words. There may be fewer than n of these, as none comes twice.

    ValueError for an unknown split or concept, or one that is to be both named and absent.
    """
    own, named, without = phrasings or {}, selection.named, selection.without
    if selection.split not in FORMS:
        raise ValueError(f"no prompts for split {selection.split!r}: known {', '.join(FORMS)}")
    for concept in (*named, *without):
        if concept not in FAMILIES and concept not in own:
            known = ", ".join((*FAMILIES, *own))
            raise ValueError(f"unknown concept {concept!r}: known {known}")
    if both := set(named) & set(without):
        raise ValueError(f"{sorted(both)} cannot be named and absent in one prompt")
    phrased = next((c for c in named if c in own), selection.comes)
    if not phrased:
        forms = FORMS[selection.split]
        return [
            forms[i % len(forms)].format(**_blanks(selection, seed, i)) for i in range(selection.n)
        ]
    forms = own[phrased].forms(phrased in named, selection)
    further = {c: "on" for c in named if c != phrased}
    texts: dict[str, None] = {}
    for i in range(TRIES * selection.n if forms else 0):
        text = forms[i % len(forms)].format(**_blanks(selection, seed, i))
        texts[edit_prompt(text, further) if further else text] = None
        if len(texts) == selection.n:
            break
    return list(texts)


def edit_prompt(prompt: str, requests: Mapping[str, str]) -> str:
    """Add requests {concept: "off" or "on"} to a prompt: "... with organ, no guitar"."""
    words = {concept: concept.replace("_", " ") for concept in requests}
    wanted = [words[c] for c, direction in requests.items() if direction == "on"]
    unwanted = [f"no {words[c]}" for c, direction in requests.items() if direction == "off"]
    text = prompt.rstrip(". ")
    if wanted:
        text += f" with {' and '.join(wanted)}"
    return ", ".join([text, *unwanted])


# --- prompts, in the phrasings of the clips' captions -------------------------------------------

LEAST_GROUPS = 2
"""Groups of clips, or prompts, that an interval needs."""
TRIES = 10
"""Attempts per prompt to fill the blanks of a concept's templates in a new way."""


@dataclass(frozen=True)
class Phrasing:
    """Prompts that name a defined concept, and prompts that do not."""

    with_: Mapping[str, tuple[str, ...]]
    """Split -> templates with the blanks of `FORMS`; none: captions take their place"""
    without: Mapping[str, tuple[str, ...]]
    captions: Mapping[tuple[str, bool], tuple[tuple[str, frozenset[str]], ...]]
    """(split, whether the clip has it) -> captions, and what else their clips are known to have"""

    def forms(self, named: bool, selection: Selection) -> tuple[str, ...]:
        """Templates for a selection, else captions: first of clips without what is to be absent."""
        if given := (self.with_ if named else self.without).get(selection.split):
            return given
        absent = set(selection.without)
        of = self.captions.get((selection.split, named), ())
        return tuple(text for text, _ in sorted(of, key=lambda one: bool(one[1] & absent)))


def phrasing_of(
    name: str, concepts: Concepts, rows: pd.DataFrame | None, others: Sequence[str], seed: int
) -> Phrasing:
    """Make the prompts of a defined concept from its templates, else from captions.

    Captions of clips with it that have none of its words get them added; captions of clips without
    it that have one are left out, as are captions of test that validation has. Every group comes
    once before any comes twice. `others`: concepts whose labels are read too.
    """
    definition = concepts[name]
    given = [
        {"validation": texts[::2], "test": texts[1::2]}
        for texts in (definition.prompts_with, definition.prompts_without)
    ]
    if rows is None or f"has_{name}" not in rows or all(of["test"] for of in given):
        return Phrasing(given[0], given[1], {})
    words = "|".join(re.escape(word) for word in (name.replace("_", " "), *definition.tags))
    names = re.compile(rf"\b(?:{words})", re.IGNORECASE)
    columns = [c for c in others if c != name and f"has_{c}" in rows]
    else_there, captions = label_matrix(rows, columns)[0], {}
    for split in FORMS:
        at, labels = known_labels(rows, name, main_clips(rows, split))
        for side in (True, False):
            rng = np.random.default_rng(seed_for(seed, "steer", "captions", name, split, side))
            own = rng.permutation(at[labels == side])
            turn = rows.iloc[own].groupby("group").cumcount().to_numpy()
            own = own[np.argsort(turn, kind="stable")]
            taken = {text for text, _ in captions.get(("validation", side), ())}
            found: dict[str, frozenset[str]] = {}
            for text, has in zip(rows["caption"].iloc[own], else_there[own], strict=True):
                text, named = " ".join(str(text).split()), bool(names.search(str(text)))
                if not text or (named and not side):
                    continue
                text = text if named or not side else edit_prompt(text, {name: "on"})
                text = text.replace("{", "{{").replace("}", "}}")
                if text not in taken:
                    found.setdefault(text, frozenset(np.array(columns)[has].tolist()))
            captions[split, side] = tuple(found.items())
    return Phrasing(given[0], given[1], captions)


@dataclass(frozen=True)
class Rendering:
    """Samples under a condition."""

    audio: np.ndarray
    """float32 [n, samples] at the model's rate"""
    codes: Tensor = field(default_factory=lambda: torch.empty(0))
    """[n, K, T] of generated samples, else empty"""


def _sides(requests: Sequence[Request]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Concepts to switch off, and concepts to switch on."""
    off, on = (tuple(c for c, d in requests if d == side) for side in ("off", "on"))
    return off, on


@dataclass(frozen=True)
class Prompts:
    """Prompts of a model that generates."""

    seed: int
    seconds: float
    batch: int
    """Prompts per batch."""
    guidance: float
    concepts: tuple[str, ...]
    """All concepts that are steered."""
    words: bool
    """Whether methods on top of the edited prompt are evaluated."""
    frozen_decoder: bool = False
    """Whether latents of the frozen decoder are."""
    phrasings: Mapping[str, Phrasing] = field(default_factory=dict)
    """Of the concepts that params.concepts defines."""

    noun: ClassVar[str] = "prompts"
    guided: ClassVar[bool] = True

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(
            name
            for name, m in METHODS.items()
            if name != "original"
            and (self.words or not (m.words and m.searched))
            and (self.frozen_decoder or name != FROZEN)
        )

    def check_concept(self, concept: str) -> None:
        """Do nothing: any concept can be named."""

    def select(self, split: str, n: int, requests: Sequence[Request]) -> Selection:
        """Choose prompts that name what is to go.

        If a concept is to come, they name no other of the concepts. So all requests to switch one
        on have the same prompts, and share their plain samples. A defined concept has prompts of
        its own.

        ValueError: a defined concept has fewer prompts than an interval needs.
        """
        named, comes = _sides(requests)
        without = tuple(c for c in self.concepts if comes and c not in named)
        own = comes[0] if comes and not named and comes[0] in self.phrasings else ""
        selection = Selection(split, n, named, without, own)
        if not own and not set(named) & set(self.phrasings):
            return selection
        if (count := len(self.titles(selection))) < LEAST_GROUPS:
            concept = own or next(c for c in named if c in self.phrasings)
            side = "without" if own else "with"
            raise ValueError(
                f"{count} {split} prompts {side} {concept}, at least {LEAST_GROUPS} are needed: "
                f"give concepts.{concept}.prompts_{side}, or captions to more clips {side} it"
            )
        return replace(selection, n=count)

    def titles(self, selection: Selection) -> list[str]:
        """Return the prompts."""
        return make_prompts(selection, self.seed, self.phrasings)

    def groups(self, selection: Selection) -> None:
        """Return None: every prompt is its own group."""

    def batches(self, name: str, condition: Condition) -> Iterator[tuple[list[str], int]]:
        """Prompts and seed per batch for the model `name`; only reseed has other seeds."""
        texts = self.titles(condition.selection)
        if METHODS[condition.method].words:
            texts = [edit_prompt(text, dict(condition.requests)) for text in texts]
        again = ("again",) if condition.method == "reseed" else ()
        for first in range(0, len(texts), self.batch):
            key = (name, condition.selection.split, first // self.batch, *again)
            yield texts[first : first + self.batch], seed_for(self.seed, "steer", *key)

    def render(self, model: Model, condition: Condition, hooks: Mapping[str, Hook]) -> Rendering:
        """Generate audio and codes of all prompts."""
        model, audio, codes = language_model(model), [], []
        for texts, seed in self.batches(model.name, condition):
            sound, tokens = model.generate(
                texts, self.seconds, seed, dict(hooks), guidance_scale=self.guidance
            )
            audio.append(sound.float().cpu().numpy())
            codes.append(tokens)
        return Rendering(np.concatenate(audio), torch.cat(codes))

    def costs(
        self, model: Model, condition: Condition, rendering: Rendering
    ) -> dict[str, np.ndarray]:
        """ce [n]: cross-entropy under the unsteered model, nats per code.

        There is no caption: music with a concept that the prompt does not name is no worse for it.
        """
        model = language_model(model)
        parts = [
            model.cross_entropy(model.with_captions(part, [None] * len(part))).mean((1, 2))
            for part in rendering.codes.split(self.batch)
        ]
        return {"ce": torch.cat(parts).double().cpu().numpy()}


@dataclass(frozen=True)
class Clips:
    """Clips through an audio model. There are no words to edit and no cross-entropy."""

    seed: int
    seconds: float
    """Middle part of each clip that is used; all of a shorter clip."""
    batch: int
    """Clips per batch."""
    store: ClipStore

    noun: ClassVar[str] = "clips"
    guided: ClassVar[bool] = False
    methods: ClassVar[tuple[str, ...]] = tuple(
        n for n, m in METHODS.items() if not m.words and n != FROZEN
    )

    @property
    def rows(self) -> pd.DataFrame:
        return self.store.rows

    def check_concept(self, concept: str) -> None:
        """Raise ValueError unless train clips with and without the concept are known."""
        _, labels = known_labels(self.rows, concept, main_clips(self.rows, "train"))
        if not 0 < labels.sum() < len(labels):
            raise ValueError(f"{labels.sum()} of {len(labels)} train clips have {concept}")

    def select(self, split: str, n: int, requests: Sequence[Request]) -> Selection:
        """Choose clips with all that is to go and without all that is to come.

        ValueError: their groups are fewer than an interval needs.
        """
        named, without = _sides(requests)
        at = self.candidates(Selection(split, n, named, without))
        groups = self.rows["group"].iloc[at].nunique()
        if groups < LEAST_GROUPS:
            sides = [f"with {c}" for c in named] + [f"without {c}" for c in without]
            raise ValueError(f"{len(at)} {split} clips {' and '.join(sides)}, of {groups} groups")
        return Selection(split, min(n, len(at)), named, without)

    def candidates(self, selection: Selection) -> np.ndarray:
        """Row numbers of all clips of a split known to match; `n` does not count."""
        at = main_clips(self.rows, selection.split)
        sides = [*((c, True) for c in selection.named), *((c, False) for c in selection.without)]
        for concept, has in sides:
            at, labels = known_labels(self.rows, concept, at)
            at = at[labels == has]
        return at

    def chosen(self, selection: Selection) -> np.ndarray:
        """Up to `n` row numbers of `candidates` in random order.

        Every group comes once before any comes twice. The first clips of a larger selection are the
        smaller selection.
        """
        name = (selection.split, "+".join(selection.named), "-".join(selection.without))
        rng = np.random.default_rng(seed_for(self.seed, "steer", "clips", *name))
        at = rng.permutation(self.candidates(selection))
        turn = self.rows.iloc[at].groupby("group").cumcount().to_numpy()
        return at[np.argsort(turn, kind="stable")][: selection.n]

    def titles(self, selection: Selection) -> list[str]:
        """Return the ids of the clips."""
        return [f"clip {name}" for name in self.rows["id"].iloc[self.chosen(selection)]]

    def groups(self, selection: Selection) -> np.ndarray:
        """Return the group of each clip."""
        return self.rows["group"].iloc[self.chosen(selection)].to_numpy(str)

    def audio(self, at: np.ndarray, rate: int) -> np.ndarray:
        """Middle `seconds` of clips: float32 [n, samples] at `rate` Hz."""
        audio, stored = self.store.audio(at), self.store.sample_rate
        length = min(audio.shape[1], round(self.seconds * stored))
        first = (audio.shape[1] - length) // 2
        return resample(audio[:, first : first + length], stored, rate)

    def play(
        self, model: AudioModel, method: str, batch: AudioBatch, hooks: Mapping[str, Hook]
    ) -> Tensor:
        """Audio [n, samples] of a batch under a method."""
        if method == "original":
            return batch.audio
        if method == "reseed":
            return model.reconstruct(other_noise(batch, "again"))
        return model.reconstruct(batch, dict(hooks))

    def render(self, model: Model, condition: Condition, hooks: Mapping[str, Hook]) -> Rendering:
        """Pass all clips through the model."""
        model, at, parts = audio_model(model), self.chosen(condition.selection), []
        for first in range(0, len(at), self.batch):
            batch = model.encode(self.audio(at[first : first + self.batch], model.sample_rate))
            parts.append(finite_audio(self.play(model, condition.method, batch, hooks)))
        return Rendering(np.concatenate(parts))

    def costs(
        self, model: Model, condition: Condition, rendering: Rendering
    ) -> dict[str, np.ndarray]:
        """spectral [n]: distance from the plain reconstruction; ce [n] is NaN."""
        plain = rendering
        if condition.method != "plain":
            plain = self.render(model, Condition(condition.selection), {})
        pairs = zip(plain.audio, rendering.audio, strict=True)
        distances = [spectral_distance(spectra(a), spectra(b)) for a, b in pairs]
        return {"ce": np.full(len(distances), np.nan), "spectral": np.array(distances)}


Subject = Prompts | Clips


def make_subject(
    model: Model, section: Steer, seed: int, clips: ClipStore | None = None,
    concepts: Concepts | None = None,
) -> Subject:  # fmt: skip
    """Make the subject for a model; an audio model needs `clips`.

    `concepts`: params.concepts, whose prompts may come from captions of `clips`.
    """
    if isinstance(model, AudioModel):
        if clips is None:
            raise ValueError(f"{model.name} is steered on clips: open data/clips for it")
        return Clips(seed, section.seconds, section.batch, clips)
    defined, rows = completed(concepts or {}), None if clips is None else clips.rows
    phrasings = {
        name: phrasing_of(name, defined, rows, section.concepts, seed)
        for name in section.concepts if name in defined
    }  # fmt: skip
    return Prompts(
        seed, section.seconds, section.batch, section.guidance, section.concepts, section.words,
        section.frozen_decoder, phrasings,
    )  # fmt: skip


def other_noise(batch: AudioBatch, *names: object) -> AudioBatch:
    """Give the same clips other noise, decided by `names`."""
    return replace(batch, seeds=tuple(seed_for(seed, "steer", *names) for seed in batch.seeds))


def finite_audio(audio: Tensor) -> np.ndarray:
    """Convert audio [n, samples] to an array; a sample with infinity or NaN becomes silent."""
    found = audio.float().cpu().numpy().copy()
    found[~np.isfinite(found).all(1)] = 0.0
    return found
