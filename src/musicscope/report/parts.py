"""What the report is made of: tables, figures, notes, cards; numbers as readers want them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

MISSING = "–"


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
    note: str = ""
    """What the control is, and what the table does not show."""


@dataclass(frozen=True)
class Figure:
    """An inline SVG (made by report_charts) with its caption."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Note:
    """A paragraph; `kind` is text, missing (a part that was not there) or caution."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Moment:
    """A short excerpt: picture, curves drawn on it, sound."""

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
    """What the play button is called aloud."""


@dataclass(frozen=True)
class Players:
    """Excerpts side by side, in rows that each have a title."""

    rows: tuple[tuple[str, tuple[Moment, ...]], ...]
    caption: str = ""


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
    numbers_table: Table | None = None
    """Numbers that differ by model."""
    matches: tuple[tuple[str, str], ...] = ()
    """(text, key of the card to link to or '')"""
    moments: tuple[Moment, ...] = ()
    maximised: tuple[Moment, ...] = ()
    others: tuple[Moment, ...] = ()
    """Searched inputs that stay folded until asked for."""
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """Figures or tables side by side where the page is wide enough."""

    parts: tuple[Figure | Table, ...]


@dataclass(frozen=True)
class Details:
    """Parts that stay folded until asked for."""

    summary: str
    parts: tuple[Figure | Table | Group | Players, ...]


Part = Table | Figure | Note | Group | Details | Players


@dataclass(frozen=True)
class Section:
    """A part of the page; `cards` sections get the search bar."""

    key: str
    title: str
    parts: tuple[Part, ...] = ()
    cards: tuple[Card, ...] = ()
    sort_keys: tuple[tuple[str, str, bool], ...] = field(default=())
    """(key, label, largest first)"""


def number(
    value: float | None,
    low: float | None = None,
    high: float | None = None,
    digits: int = 3,
) -> Cell:
    """A cell with a number and, where both ends are known, its interval below."""
    detail = ""
    if low is not None and high is not None:
        detail = f"[{plain(low, digits)}, {plain(high, digits)}]"
    return Cell(plain(value, digits), detail)


def short(value: float | None, digits: int = 2) -> str:
    """A number of any size with so many significant digits."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        text = f"{value:.{digits}g}"
        text = f"{value:,.0f}" if abs(value) >= 10**digits else text
    else:
        text = f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e")
    return text.replace("-", "−")


def plain(value: float | int | str | None, digits: int = 3) -> str:
    """A number as readers want it: integers whole, small ones in powers, missing as a dash."""
    if value is None or isinstance(value, str):
        return value or MISSING
    if not math.isfinite(value):
        return MISSING
    if isinstance(value, int):
        return f"{value:,}"
    if value and abs(value) < 0.5 * 10**-digits:
        return f"{value:.1e}".replace("e-0", "e-").replace("-", "−")
    return f"{value:,.{digits}f}".replace("-", "−")
