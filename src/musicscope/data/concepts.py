"""Concepts: instrument families, and what params.concepts defines beside them.

A concept is a column `has_<name>` of the clip table: True, False, or NA where it is unknown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace

import pandas as pd

from musicscope.config.concepts import ConceptDefinition
from musicscope.data.taxonomy import FAMILIES

Concepts = Mapping[str, ConceptDefinition]
"""Definitions by name, in the order of params.yaml."""

_VOICE = ("vocals", "vocalist", "voice", "singer", "singing", "sings", "sing", "sung", "rapper",
          "rapping", "raps", "choir", "chorus", "chant", "chanting")  # fmt: skip
_SPEECH = ("speech", "spoken word", "narration", "talking")
_BOTH = ("male and female", "female and male", "male & female", "female & male", "male/female",
         "female/male", "both male")  # fmt: skip
_MAN = ("male vocal", "male vocalist", "male voice", "male singer", "male singing", "male rapper",
        "male lead vocal", "male lead singer", "male choir", "man singing", "man sings",
        "man rapping")  # fmt: skip
_WOMAN = ("female vocal", "female vocalist", "female voice", "female singer", "female singing",
          "female rapper", "female lead vocal", "female lead singer", "female choir",
          "woman singing", "woman sings", "woman rapping")  # fmt: skip
READY = {
    "vocals": ConceptDefinition(
        tags=("vocal", *_VOICE), unclear=_SPEECH,
        absent=("instrumental",), musicnn=("vocal", "vocals", "singing", "voice"),
    ),
    "male_vocal": ConceptDefinition(
        tags=(*_MAN, *_BOTH), unclear=("vocal", *_VOICE, *_SPEECH),
        absent=("instrumental", *_WOMAN), musicnn=("male vocal", "male voice"),
    ),
    "female_vocal": ConceptDefinition(
        tags=(*_WOMAN, *_BOTH), unclear=("vocal", *_VOICE, *_SPEECH),
        absent=("instrumental", *_MAN), musicnn=("female vocal", "female voice"),
    ),
}  # fmt: skip
"""Definitions that come with the package: what a key leaves empty under these names."""


def completed(concepts: Concepts) -> dict[str, ConceptDefinition]:
    """Fill empty keys of definitions up with `READY`."""
    found = {}
    for name, own in concepts.items():
        ready = READY.get(name, ConceptDefinition())
        keys = [field.name for field in fields(own)]
        found[name] = replace(own, **{k: getattr(own, k) or getattr(ready, k) for k in keys})
    return found


def concepts_of(rows: pd.DataFrame, concepts: Iterable[str] = ()) -> tuple[str, ...]:
    """Names of the concepts of a clip table: families, then those that params.concepts defines.

    ValueError for a defined one without a column.
    """
    for name in concepts:
        if f"has_{name}" not in rows:
            known = ", ".join(labelled(rows))
            raise ValueError(
                f"concepts.{name}: data/clips has no labels for it, only for {known}; run dvc "
                "repro prepare_data, or take it out"
            )
    return tuple(f for f in FAMILIES if f"has_{f}" in rows) + tuple(concepts)


def labelled(rows: pd.DataFrame) -> tuple[str, ...]:
    """Names of all concepts that a clip table has a column for, defined or not."""
    return tuple(c.removeprefix("has_") for c in rows if c.startswith("has_"))
