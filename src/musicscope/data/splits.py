"""Which clips a concept is learnt on and scored on, and what is known about them.

A label may be unknown, in data sets of recordings. Such a clip says nothing about that concept: it
is neither a positive nor a negative, in no set of clips.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from musicscope.data.clips import HELD_OUT_FONT, known_labels, main_clips

TRAIN_FONT, HELDOUT_FONT = "timgm6mb", HELD_OUT_FONT
MAIN = "guitar"
"""The concept of the headline numbers: always probed, and the only one with matched pairs."""
CLASS_SETS = ("test", "heldout_font")
PAIR_SETS = {f"pairs_{font}": font for font in (TRAIN_FONT, HELDOUT_FONT)}


def clip_sets(rows: pd.DataFrame) -> dict[str, np.ndarray]:
    """Positions in a clip table of train, validation, test, heldout_font and the pair sets.

    Probes learn from, and are chosen on, the training soundfont (or recordings) only. Compositions
    of the test sets must not occur in train or validation. The last three sets may be empty.
    """
    sets = {split: main_clips(rows, split) for split in ("train", "validation", "test")}
    test, held_out = rows["split"] == "test", rows["font"] == HELD_OUT_FONT
    sets["heldout_font"] = np.flatnonzero((rows["kind"] == "clip") & held_out & test)
    for name, font in PAIR_SETS.items():
        of = held_out if font == HELD_OUT_FONT else ~held_out
        sets[name] = np.flatnonzero((rows["kind"] == "pair") & of & test)
    learnt = set(rows["group"].iloc[np.concatenate([sets["train"], sets["validation"]])])
    if shared := sorted(learnt & set(rows["group"][test])):
        raise ValueError(f"composition {shared[0]!r} is both in test and in train or validation")
    return sets


def label_matrix(rows: pd.DataFrame, concepts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and whether they are known, bool [clips, concepts] each. An unknown label is False."""
    has, known = np.zeros((2, len(rows), len(concepts)), bool)
    for j, concept in enumerate(concepts):
        at, values = known_labels(rows, concept)
        has[at, j], known[at, j] = values, True
    return has, known


def known_blocks(known: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(row numbers, columns) of `known` [clips, concepts]: concepts known on just these clips.

    Each column is in one block; all are in one where every label is known.
    """
    patterns, of = np.unique(known, axis=1, return_inverse=True)
    return [
        (np.flatnonzero(pattern), np.flatnonzero(of.ravel() == i))
        for i, pattern in enumerate(patterns.T)
    ]


def known_sets(
    rows: pd.DataFrame, sets: dict[str, np.ndarray], concept: str
) -> dict[str, np.ndarray]:
    """`sets` without the clips of which it is unknown whether they have the concept."""
    return {name: known_labels(rows, concept, at)[0] for name, at in sets.items()}


def smaller_class(rows: pd.DataFrame, concept: str, at: np.ndarray) -> int:
    """Clips of the rarer class among those of `at` whose label is known."""
    _, has = known_labels(rows, concept, at)
    return int(min(has.sum(), (~has).sum()))


def select_concepts(
    rows: pd.DataFrame, sets: dict[str, np.ndarray], concepts: Sequence[str], least: int
) -> tuple[list[str], dict[str, int]]:
    """Concepts with at least `least` clips of either class in train and in test; and the others
    with their smallest class. Guitar stays whenever it can be fitted and scored at all."""
    chosen, skipped = [], {}
    for concept in concepts:
        sizes = {s: smaller_class(rows, concept, sets[s]) for s in ("train", "validation", "test")}
        enough = min(sizes["train"], sizes["test"])
        needed = 1 if concept == MAIN else least
        if enough >= needed and sizes["validation"] >= 1:
            chosen.append(concept)
        elif concept == MAIN:
            raise ValueError(
                f"train, validation or test has no clip with, or none without, {MAIN}: raise "
                "prepare_data.timgm6mb_clips (rendered clips) or prepare_data.recordings.limits "
                "(recordings)"
            )
        else:
            skipped[concept] = enough
    return chosen, skipped
