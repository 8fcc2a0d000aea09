"""Prompts for steering, in the phrasings of the clips' captions; validation and test share none.

To switch a concept off it must be there: those prompts name it. To switch it on it must not: those
prompts name other instruments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from musicscope.core.seeding import seed_for
from musicscope.data.taxonomy import FAMILIES, PITCHED_FAMILIES
from musicscope.steering.methods import Selection

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
KEYS = ("C", "C sharp", "D", "E flat", "E", "F", "F sharp", "G", "A flat", "A", "B flat", "B")
"""As in the captions of the embedded clips."""


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def make_prompts(selection: Selection, seed: int) -> list[str]:
    """Make the prompts [n] of a selection.

    A pitched family leads, as in the clips; up to two families accompany it.

    ValueError for an unknown split or family, or one that is to be both named and absent.
    """
    if selection.split not in FORMS:
        raise ValueError(f"no prompts for split {selection.split!r}: known {', '.join(FORMS)}")
    for family in (*selection.named, *selection.without):
        if family not in FAMILIES:
            raise ValueError(f"unknown family {family!r}: known {', '.join(FAMILIES)}")
    if both := set(selection.named) & set(selection.without):
        raise ValueError(f"{sorted(both)} cannot be named and absent in one prompt")
    allowed = [f for f in FAMILIES if f not in (*selection.named, *selection.without)]
    leads = [f for f in selection.named if f in PITCHED_FAMILIES]
    forms, texts = FORMS[selection.split], []
    for i in range(selection.n):
        name = (selection.split, "+".join(selection.named), "-".join(selection.without), i)
        rng = np.random.default_rng(seed_for(seed, "steer", "prompts", *name))
        others = list(rng.permutation(allowed))
        if leads:
            lead = leads[rng.integers(len(leads))]
        else:
            lead = next(f for f in others if f in PITCHED_FAMILIES)
        rest = [f for f in selection.named if f != lead]
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


def edit_prompt(prompt: str, requests: Mapping[str, str]) -> str:
    """Add requests {concept: "off" or "on"} to a prompt: "... with organ, no guitar"."""
    words = {concept: concept.replace("_", " ") for concept in requests}
    wanted = [words[c] for c, direction in requests.items() if direction == "on"]
    unwanted = [f"no {words[c]}" for c, direction in requests.items() if direction == "off"]
    text = prompt.rstrip(". ")
    if wanted:
        text += f" with {' and '.join(wanted)}"
    return ", ".join([text, *unwanted])
