"""Concepts as queries to the clip table: which clips have the concept and which do not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from musicscope.data.clips import HELD_OUT_FONT
from musicscope.data.taxonomy import FAMILIES

PREFIX = "clips:"
TERM = re.compile(r"(?P<no>not )?has_(?P<family>\w+)|(?P<column>\w+)=(?P<value>.+)")
COLUMNS = ("split", "kind", "font", "target_family", "key", "source", "group", "artist")


def is_query(text: str) -> bool:
    """Tell whether one side of a concept is a query to data/clips rather than a folder."""
    return text.startswith(PREFIX)


def select_query(rows: pd.DataFrame, query: str, split: str, font: str | None = None) -> np.ndarray:
    """Select row numbers, ascending, by a query such as ``clips:has_guitar and not has_drums``.

    Defaults, unless the query names the column: `split`, kind = clip, and the soundfont `font`
    (None: any but the held-out one). Clips without a label match neither has_ nor not has_.

    Raises:
        ValueError: an unknown term, family or column.
    """
    conditions, keep = {}, np.ones(len(rows), bool)
    for term in query.removeprefix(PREFIX).split(" and "):
        parts = TERM.fullmatch(term.strip())
        if not parts or (parts["family"] or FAMILIES[0]) not in FAMILIES:
            raise ValueError(
                f"{query!r}: {term.strip()!r} is no term; allowed are has_<family> and not "
                f"has_<family> with {', '.join(FAMILIES)}, and <column>=<value>"
            )
        if parts["family"]:
            has = rows[f"has_{parts['family']}"]
            keep &= (has == (not parts["no"])).fillna(False).to_numpy(bool)
        else:
            conditions[parts["column"]] = parts["value"].strip()
    defaults = {"split": split, "kind": "clip", **({"font": font} if font else {})}
    for column, value in {**defaults, **conditions}.items():
        if column not in COLUMNS or column not in rows:
            raise ValueError(f"{query!r}: no column {column!r}; allowed: {', '.join(COLUMNS)}")
        keep &= (rows[column].astype(str) == value).to_numpy()
    if font is None and "font" not in conditions:
        keep &= (rows["font"] != HELD_OUT_FONT).to_numpy()
    return np.flatnonzero(keep)


@dataclass(frozen=True)
class Sets:
    """Clips of one concept, as positions in the clip table."""

    train: np.ndarray
    labels: np.ndarray
    """[train] bool"""
    tests: Mapping[str, tuple[np.ndarray, np.ndarray]]
    """"test" and "heldout_font" -> positions and labels; only sets with both kinds of clips"""

    @property
    def used(self) -> np.ndarray:
        """Positions of all these clips, ascending."""
        return np.unique(np.concatenate([self.train, *(at for at, _ in self.tests.values())]))


def concept_sets(rows: pd.DataFrame, positive: str, negative: str) -> Sets:
    """Select train, test and held-out-font clips of a concept given by two queries.

    ValueError if a clip is on both sides, or a side has fewer than two train clips.
    """

    def sides(split: str, font: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        with_, without = (select_query(rows, query, split, font) for query in (positive, negative))
        if both := np.intersect1d(with_, without).tolist():
            raise ValueError(f"{positive!r} and {negative!r} share {len(both)} clips")
        return np.concatenate([with_, without]), np.arange(len(with_) + len(without)) < len(with_)

    train, labels = sides("train")
    if min(labels.sum(), (~labels).sum()) < 2:
        raise ValueError(
            f"{positive!r} has {labels.sum()} train clips, {negative!r} {(~labels).sum()}: at "
            "least two of each are needed; change the query, or raise "
            "prepare_data.timgm6mb_clips.train"
        )
    if any("split=" in query for query in (positive, negative)):
        return Sets(train, labels, {})
    tests = {"test": sides("test"), "heldout_font": sides("test", HELD_OUT_FONT)}
    both = {name: (at, has) for name, (at, has) in tests.items() if 0 < has.sum() < len(has)}
    return Sets(train, labels, both)
