"""Inline SVG charts that follow the page's light and dark colours through its style sheet.

Drawn 380 units wide, about a phone's width, so that text keeps its size there. Series differ by
colour and by marker; each chart carries its numbers in words for screen readers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from musicscope.report.parts import plain

WIDTH, HEIGHT = 380, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 26, 40
DOTTED = 16  # most points of a line that get a marker each


@dataclass(frozen=True)
class Series:
    """Points with optional intervals; None leaves a point out."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from 1, 2, 5 x 10^n that lie in [low, high], about `count` of them."""
    span = max(high - low, 1e-12)
    rough = span / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _marker(x: float, y: float, series: int) -> str:
    colour = f"s{series % 6}"
    shapes = (
        f'<circle class="fill {colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.4"/>',
        f'<rect class="fill {colour}" x="{x - 3.2:.1f}" y="{y - 3.2:.1f}" width="6.4" '
        'height="6.4"/>',
        f'<path class="fill {colour}" d="M{x:.1f} {y - 4.2:.1f}l4 7h-8z"/>',
        f'<path class="fill {colour}" d="M{x:.1f} {y - 4.6:.1f}l4.6 4.6l-4.6 4.6l-4.6 -4.6z"/>',
        f'<circle class="hollow stroke {colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>',
        f'<path class="stroke outline {colour}" d="M{x - 3.4:.1f} {y - 3.4:.1f}l6.8 6.8m0 -6.8'
        'l-6.8 6.8"/>',
    )
    return shapes[series % len(shapes)]


def _bar(x: float, y: float, series: int) -> str:
    kind = "bar fill" if series == 0 else "outline stroke"
    return f'<rect class="{kind} s{series % 6}" x="{x - 5}" y="{y - 5}" width="10" height="9"/>'


def _dash(x: float, y: float, series: int) -> str:
    return f'<path class="line stroke s{series % 6} dash{series % 4}" d="M{x - 9} {y}H{x + 7}"/>'


def _legend(
    names: Sequence[str], y: float, swatch: Callable[[float, float, int], str] = _marker
) -> tuple[str, float]:
    """Legend entries in rows from height y; returns the markup and the height after it."""
    x, parts = float(LEFT), []
    for series, name in enumerate(names):
        width = 26 + 6.9 * len(name)
        if x > LEFT and x + width > WIDTH - RIGHT:
            x, y = float(LEFT), y + 17
        parts.append(swatch(x + 5, y - 4, series))
        parts.append(f'<text x="{x + 14:.0f}" y="{y:.0f}">{escape(name)}</text>')
        x += width
    return "".join(parts), y + 6


def _svg(height: float, label: str, inside: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'
        f"{inside}</svg>"
    )


def line_chart(
    title: str, x_label: str, y_label: str, series: Sequence[Series], log_y: bool = False,
    log_x: bool = False,
) -> str:  # fmt: skip
    """Lines with markers and shaded intervals; on a log axis values <= 0 are left out.

    All x must be above 0 for `log_x`.
    """

    def usable(value: float | None) -> bool:
        return value is not None and math.isfinite(value) and (not log_y or value > 0)

    bounds = [v for s in series for part in (s.y, s.low or (), s.high or ()) for v in part]
    values = [v for v in bounds if usable(v)]
    if not values:
        return _svg(60, title, f'<text x="{LEFT}" y="30">{escape(title)}: no numbers</text>')
    low, high = min(values), max(values)
    if log_y:
        lowest, highest = math.floor(math.log10(low)), math.ceil(math.log10(high))
        highest = max(highest, lowest + 1)
        marks = [10.0**p for p in range(lowest, highest + 1)]
        low, high = marks[0], marks[-1]
    else:
        low, high = min(0.0, low), high + 0.05 * (high - min(0.0, low) or 1)
        marks = ticks(low, high)
    xs = [x for s in series for x in s.x]
    first, last = min(xs), max(xs)
    many = len(set(xs)) > DOTTED  # points too dense for markers: dashes tell the series apart
    swatch = _dash if many else _marker
    legend, top = _legend([s.name for s in series], 42, swatch) if len(series) > 1 else ("", TOP)
    top += 6
    bottom = top + HEIGHT - TOP - BOTTOM

    def at_x(x: float) -> float:
        share = math.log(x / first) / (math.log(last / first) or 1) if log_x else (
            (x - first) / (last - first or 1)
        )  # fmt: skip
        return LEFT + 8 + (WIDTH - LEFT - RIGHT - 16) * share

    def at_y(y: float) -> float:
        share = math.log(y / low) / math.log(high / low) if log_y else (y - low) / (high - low)
        return bottom - (bottom - top) * share

    parts = [f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>', legend]
    for mark in marks:
        y = at_y(mark)
        text = f"{mark:g}"
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        )
    for x in ticks(first, last) if many else sorted(set(xs)):
        parts.append(
            f'<text class="tick" x="{at_x(x):.1f}" y="{bottom + 16:.0f}" text-anchor="middle">'
            f"{x:g}</text>"
        )
    parts.append(f'<path class="axis" d="M{LEFT} {top:.0f}V{bottom:.0f}H{WIDTH - RIGHT}"/>')
    spoken = []
    for index, one in enumerate(series):
        points = [(at_x(x), at_y(y)) for x, y in zip(one.x, one.y, strict=True) if usable(y)]
        if one.low is not None and one.high is not None:
            ends = [
                (at_x(x), at_y(a), at_y(b))
                for x, a, b in zip(one.x, one.low, one.high, strict=True)
                if usable(a) and usable(b)
            ]
            around = [(x, b) for x, _, b in ends] + [(x, a) for x, a, _ in reversed(ends)]
            if around:
                parts.append(f'<path class="band fill s{index % 6}" d="{_path(around)}Z"/>')
        if points:
            dash = f" dash{index % 4}" if many else ""
            parts.append(f'<path class="line stroke s{index % 6}{dash}" d="{_path(points)}"/>')
        parts += [] if many else [_marker(x, y, index) for x, y in points]
        pairs = zip(one.x, one.y, strict=True)
        spoken.append(f"{one.name}: " + ", ".join(f"{x:g} {plain(y)}" for x, y in pairs))
    parts.append(_axis_labels(x_label, y_label, top, bottom))
    label = f"{title}. {y_label} by {x_label}. {'; '.join(spoken)}"
    return _svg(bottom + BOTTOM, label, "".join(parts))


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _axis_labels(x_label: str, y_label: str, top: float, bottom: float) -> str:
    middle = (top + bottom) / 2
    return (
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{bottom + 34:.0f}" text-anchor="middle">'
        f'{escape(x_label)}</text><text transform="translate(13 {middle:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )


def histogram(
    title: str, x_label: str, y_label: str, edges: Sequence[float],
    series: Sequence[tuple[str, Sequence[float]]],
) -> str:  # fmt: skip
    """The first series as bars, the others (controls) as outlines over the same bins."""
    highest = max((v for _, values in series for v in values), default=0) or 1
    legend, top = _legend([name for name, _ in series], 42, _bar)
    top += 6
    bottom = top + HEIGHT - TOP - BOTTOM
    first, last = edges[0], edges[-1]

    def at_x(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (x - first) / (last - first)

    def at_y(y: float) -> float:
        return bottom - (bottom - top) * y / (1.05 * highest)

    parts = [f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>', legend]
    for mark in ticks(0, 1.05 * highest):
        y = at_y(mark)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{mark:g}</text>'
        )
    for x in ticks(first, last):
        parts.append(
            f'<text class="tick" x="{at_x(x):.1f}" y="{bottom + 16:.0f}" text-anchor="middle">'
            f"{x:g}</text>"
        )
    spoken = []
    for index, (name, values) in enumerate(series):
        steps = np.repeat([at_x(e) for e in edges], 2)[1:-1]
        heights = np.repeat([at_y(v) for v in values], 2)
        outline = list(zip(steps.tolist(), heights.tolist(), strict=True))
        closed = [(at_x(first), bottom), *outline, (at_x(last), bottom)]
        kind = "bar fill" if index == 0 else "outline stroke"
        parts.append(f'<path class="{kind} s{index % 6}" d="{_path(closed)}"/>')
        spoken.append(f"{name}: " + ", ".join(plain(float(v)) for v in values))
    parts.append(f'<path class="axis" d="M{LEFT} {top:.0f}V{bottom:.0f}H{WIDTH - RIGHT}"/>')
    parts.append(_axis_labels(x_label, y_label, top, bottom))
    label = f"{title}. {y_label} by {x_label} from {first:g} to {last:g}. {'; '.join(spoken)}"
    return _svg(bottom + BOTTOM, label, "".join(parts))


def dot_chart(
    title: str, x_label: str, rows: Sequence[str],
    series: Sequence[tuple[str, Sequence[tuple[float | None, float | None, float | None]]]],
    chance: float,
) -> str:  # fmt: skip
    """One line a row, one marker a series, with its interval; a dashed line at `chance`."""
    left, slot = 104, 8.0 * len(series) + 8
    legend, top = _legend([name for name, _ in series], 42)
    top += 4
    bottom = top + slot * len(rows)
    flat = [v for _, points in series for point in points for v in point if v is not None]
    low, high = min([chance - 0.05, *flat]), max([chance + 0.05, *flat])
    low, high = max(0.0, low - 0.02), min(1.0, high + 0.02)

    def at(value: float) -> float:
        return left + (WIDTH - left - RIGHT) * (value - low) / (high - low)

    parts = [f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>', legend]
    for mark in ticks(low, high):
        parts.append(f'<path class="grid" d="M{at(mark):.1f} {top:.0f}V{bottom:.0f}"/>')
        parts.append(
            f'<text class="tick" x="{at(mark):.1f}" y="{bottom + 16:.0f}" text-anchor="middle">'
            f"{mark:g}</text>"
        )
    parts.append(f'<path class="chance" d="M{at(chance):.1f} {top:.0f}V{bottom:.0f}"/>')
    spoken = []
    for row, name in enumerate(rows):
        middle = top + slot * (row + 0.5)
        parts.append(
            f'<text x="{left - 8}" y="{middle + 4:.1f}" text-anchor="end">{escape(name)}</text>'
        )
        said = []
        for index, (series_name, points) in enumerate(series):
            value, start, end = points[row]
            y = middle + 8 * (index - (len(series) - 1) / 2)
            if start is not None and end is not None:
                parts.append(
                    f'<path class="whisker stroke s{index % 6}" '
                    f'd="M{at(start):.1f} {y:.1f}H{at(end):.1f}"/>'
                )
            if value is not None:
                parts.append(_marker(at(value), y, index))
            said.append(f"{series_name} {plain(value)}")
        spoken.append(f"{name}: {', '.join(said)}")
    parts.append(
        f'<text x="{(left + WIDTH - RIGHT) / 2:.0f}" y="{bottom + 34:.0f}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    return _svg(bottom + BOTTOM, f"{title}. {x_label}. {'; '.join(spoken)}", "".join(parts))
