"""Prompts for steering, in the phrasings of the clips' captions; validation and test share none.

To switch a concept off it must be there: those prompts name it. To switch it on it must not: those
prompts name other instruments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from musicscope.core.seeding import seed_for
from musicscope.data.taxonomy import FAMILIES, PITCHED_FAMILIES
from musicscope.embedded.midi_set.captions import KEYS

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
TEMPOS = {"slow": (70, 75, 80, 85), "mid-tempo": (95, 110, 120, 130), "fast": (140, 150, 160)}
DENSITIES = ("sparse", "steady", "busy")


@dataclass(frozen=True)
class PromptSet:
    """Which prompts: `n` of a split that name some families and keep clear of others."""

    split: str
    n: int
    named: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def make_prompts(wanted: PromptSet, seed: int) -> list[str]:
    """The prompts [n] of a set. A pitched family leads, as in the clips; up to two play along.

    ValueError for an unknown split or family, or one that is to be both named and absent.
    """
    if wanted.split not in FORMS:
        raise ValueError(f"no prompts for split {wanted.split!r}: known {', '.join(FORMS)}")
    for family in (*wanted.named, *wanted.without):
        if family not in FAMILIES:
            raise ValueError(f"unknown family {family!r}: known {', '.join(FAMILIES)}")
    if both := set(wanted.named) & set(wanted.without):
        raise ValueError(f"{sorted(both)} cannot be named and absent in one prompt")
    allowed = [f for f in FAMILIES if f not in (*wanted.named, *wanted.without)]
    leads = [f for f in wanted.named if f in PITCHED_FAMILIES]
    forms, texts = FORMS[wanted.split], []
    for i in range(wanted.n):
        name = (wanted.split, "+".join(wanted.named), "-".join(wanted.without), i)
        rng = np.random.default_rng(seed_for(seed, "steer", "prompts", *name))
        others = list(rng.permutation(allowed))
        if leads:
            lead = leads[rng.integers(len(leads))]
        else:
            lead = next(f for f in others if f in PITCHED_FAMILIES)
        rest = [f for f in wanted.named if f != lead]
        rest += [f for f in others if f != lead][: rng.integers(3)]
        lead, *rest = (str(f).replace("_", " ") for f in (lead, *rest))
        tempo = list(TEMPOS)[rng.integers(len(TEMPOS))]
        texts.append(
            forms[i % len(forms)].format(
                lead=lead, every=_and([lead, *rest]), tempo=tempo,
                joined=f" with {_and(rest)}" if rest else "",
                backed=f", backed by {_and(rest)}" if rest else "",
                dense=DENSITIES[rng.integers(len(DENSITIES))],
                key=f"{KEYS[rng.integers(len(KEYS))]} {('major', 'minor')[rng.integers(2)]}",
                bpm=TEMPOS[tempo][rng.integers(len(TEMPOS[tempo]))],
            )
        )  # fmt: skip
    return texts
