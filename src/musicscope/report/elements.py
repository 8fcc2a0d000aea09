"""Plain data that the page is made of; templates/elements.jinja says how each is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

MOST_COLUMNS = 14
"""Columns of a table that fit a page of 1440 pixels."""


@dataclass(frozen=True)
class Cell:
    """A table cell: text, a second line (an interval) and a shade 0..9 (None: no shade)."""

    text: str
    detail: str = ""
    shade: int | None = None


@dataclass(frozen=True)
class Table:
    """A table whose first column names the row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell | str, ...], ...]

    @property
    def body(self) -> list[list[Cell]]:
        """The rows with every cell as a `Cell`."""
        return [[Cell(cell) if isinstance(cell, str) else cell for cell in r] for r in self.rows]

    @property
    def shown(self) -> Table:
        """The table, or with rows for columns where a page is too narrow for its columns."""
        if len(self.columns) <= MOST_COLUMNS or len(self.rows) >= len(self.columns):
            return self
        names = (self.columns[0], *(row[0].text for row in self.body))
        turned = zip(self.columns[1:], *(row[1:] for row in self.body), strict=True)
        return Table(self.caption, names, tuple(turned))


@dataclass(frozen=True)
class Figure:
    """A picture that a stage wrote to plots/."""

    image: str
    """data: URI"""
    size: tuple[int, int]
    """Width and height on the page in CSS pixels."""
    alt: str
    """The numbers in words."""
    caption: str


@dataclass(frozen=True)
class Moment:
    """A short excerpt: spectrogram, curves drawn on it, sound."""

    caption: str
    detail: str
    audio: str
    """data: URI"""
    picture: str
    """data: URI"""
    curves: tuple[tuple[str, str, int], ...] = ()
    """(name, SVG path in a box of (frames - 1) x 100, number of its colour and dash)"""
    frames: int = 1
    label: str = ""
    """Spoken name of the play button; the caption if empty."""


@dataclass(frozen=True)
class Players:
    """Excerpts side by side, in rows that each have a title."""

    rows: tuple[tuple[str, tuple[Moment, ...]], ...]


@dataclass(frozen=True)
class Card:
    """One feature."""

    key: str
    """Anchor on the page: letters, digits, '-'."""
    title: str
    kinds: tuple[tuple[str, str], ...]
    """(key, label) of each set that the card belongs to."""
    numbers: Mapping[str, float | None]
    """Sort key -> value; absent or None sorts last."""
    facts: tuple[tuple[str, str], ...]
    by_model: Table | None = None
    matches: tuple[tuple[str, str], ...] = ()
    """(text, key of the card to link to or '')"""
    moments: tuple[Moment, ...] = ()
    maximised: tuple[Moment, ...] = ()
    others: tuple[Moment, ...] = ()
    """Searched inputs that stay folded until asked for."""
    remarks: tuple[str, ...] = ()
    page: str = ""
    """Address of its feature page."""

    @property
    def legend(self) -> list[tuple[str, int]]:
        """(name, number of the colour) of the curves, if the card has more than one."""
        shown = (*self.moments, *self.maximised, *self.others)
        names = {name: i for moment in shown for name, _, i in moment.curves}
        return list(names.items()) if len(names) > 1 else []


Plain: TypeAlias = str | int | float | None
Content: TypeAlias = (
    "Table | Figure | Players | Card | Plain | Sequence[Content] | Mapping[str, Content]"
)


@dataclass(frozen=True)
class Section:
    """A part of the page; templates/<key>.jinja holds its text and layout."""

    key: str
    title: str
    content: Mapping[str, Content] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    """Notes on what could not be shown."""

    @property
    def cards(self) -> list[Card]:
        """The section's feature cards."""
        cards = self.content.get("cards")
        cards = cards if isinstance(cards, Sequence) else ()
        return [one for one in cards if isinstance(one, Card)]
