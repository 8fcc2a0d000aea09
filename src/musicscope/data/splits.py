"""Which clips a concept is learnt and tested on, and their labels.

In data sets of recordings, a clip may have no label for a concept. It is then neither a positive
nor a negative of that concept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from musicscope.data.clips import HELD_OUT_FONT, known_labels, main_clips

TRAIN_FONT, HELDOUT_FONT = "mixed", HELD_OUT_FONT
MAIN = "guitar"
"""The concept of the headline numbers, and the only one with matched pairs."""
CLASS_SETS = ("test", "heldout_font", "heldout_source")
PAIR_SETS = {f"pairs_{font}": font for font in (TRAIN_FONT, HELDOUT_FONT)}


def clip_sets(rows: pd.DataFrame) -> dict[str, np.ndarray]:
    """Positions in a clip table of train, validation and the test sets.

    Train and validation are of the training soundfont (or recordings) only. heldout_source is the
    part of test whose source (book of compositions) has no train or validation clip. All sets after
    test may be empty. ValueError if a composition of the test sets is also in train or validation.
    """
    sets = {split: main_clips(rows, split) for split in ("train", "validation", "test")}
    test, held_out = rows["split"] == "test", rows["font"] == HELD_OUT_FONT
    sets["heldout_font"] = np.flatnonzero((rows["kind"] == "clip") & held_out & test)
    sets["heldout_source"] = sets["test"][_new_sources(rows, sets)]
    for name, font in PAIR_SETS.items():
        of = held_out if font == HELD_OUT_FONT else ~held_out
        sets[name] = np.flatnonzero((rows["kind"] == "pair") & of & test)
    learnt = set(rows["group"].iloc[np.concatenate([sets["train"], sets["validation"]])])
    if shared := sorted(learnt & set(rows["group"][test])):
        raise ValueError(f"composition {shared[0]!r} is both in test and in train or validation")
    return sets


def _new_sources(rows: pd.DataFrame, sets: dict[str, np.ndarray]) -> np.ndarray:
    """Tell which test clips come from a source without train and validation clips, bool [test]."""
    if "source" not in rows:
        return np.zeros(len(sets["test"]), bool)
    source = rows["source"].to_numpy(str)
    learnt = np.concatenate([sets["train"], sets["validation"]])
    return ~np.isin(source[sets["test"]], source[learnt])


def label_matrix(rows: pd.DataFrame, concepts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and which clips have one, bool [clips, concepts] each. A missing label is False."""
    has, labelled = np.zeros((2, len(rows), len(concepts)), bool)
    for j, concept in enumerate(concepts):
        at, values = known_labels(rows, concept)
        has[at, j], labelled[at, j] = values, True
    return has, labelled


def label_blocks(labelled: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(row numbers, columns) of `labelled` [clips, concepts]: concepts labelled on the same clips.

    Each column is in one block; all are in one where every clip has every label.
    """
    patterns, of = np.unique(labelled, axis=1, return_inverse=True)
    return [
        (np.flatnonzero(pattern), np.flatnonzero(of.ravel() == i))
        for i, pattern in enumerate(patterns.T)
    ]


def labelled_sets(
    rows: pd.DataFrame, sets: dict[str, np.ndarray], concept: str
) -> dict[str, np.ndarray]:
    """`sets` without the clips that have no label for the concept."""
    return {name: known_labels(rows, concept, at)[0] for name, at in sets.items()}


def smaller_class(rows: pd.DataFrame, concept: str, at: np.ndarray) -> int:
    """Number of clips of the rarer class among the labelled ones of `at`."""
    _, has = known_labels(rows, concept, at)
    return int(min(has.sum(), (~has).sum()))


def select_concepts(
    rows: pd.DataFrame, sets: dict[str, np.ndarray], concepts: Sequence[str], least: int
) -> tuple[list[str], dict[str, int]]:
    """Select concepts with at least `least` clips of either class in train and in test.

    Returns them, and the size of the smallest class of each other concept. `MAIN` stays whenever
    it can be fitted and scored at all. ValueError if no concept is left.
    """
    chosen, skipped, counts = [], {}, []
    for concept in concepts:
        train, validation, test = (
            smaller_class(rows, concept, sets[s]) for s in ("train", "validation", "test")
        )
        smallest = min(train, test)
        if smallest >= (1 if concept == MAIN else least) and validation >= 1:
            chosen.append(concept)
        else:
            skipped[concept] = smallest
            counts.append(f"{concept} {train}, {validation}, {test}")
    if not chosen:
        raise ValueError(
            f"no concept has {least} clips with and {least} without it in train and in test, and "
            f"one of each in validation ({MAIN}: one each); the rarer class in train, validation "
            f"and test: {'; '.join(counts)}; lower probe.min_positive, raise prepare_data.clips "
            "(rendered clips) or prepare_data.recordings.limits (recordings), or label more "
            "recordings (docs/data.md)"
        )
    return chosen, skipped


def main_concept(concepts: Sequence[str]) -> str:
    """Return `MAIN` if it is among the concepts, or if there are none; else the first of them."""
    return MAIN if MAIN in concepts or not len(concepts) else concepts[0]
