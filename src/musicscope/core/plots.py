"""PNG charts with the same bytes for the same numbers.

Agg canvas, matplotlib's own font, nothing in the file but the picture. Colours are Okabe and
Ito's (distinct under the common colour-vision deficiencies); bars also carry their value as text
and lines a marker, so that no reading depends on colour alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from musicscope.core.io import atomic_file

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType
    from numpy.typing import ArrayLike

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE: dict[RcKeyType, object] = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 10,
}


def new_figure(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (7.0, 4.0), **subplots
) -> tuple[Figure, np.ndarray]:
    """Make a figure without pyplot's global state, and axes [rows, columns]; `size` in inches.

    Sets the process's matplotlib settings to its defaults plus `STYLE`: a user's matplotlibrc
    would change the bytes from one machine to another.
    """
    mpl.rcdefaults()
    mpl.rcParams.update(STYLE)
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **subplots)


def save_figure(figure: Figure, path: str | Path, dpi: int = 110) -> None:
    """Write a PNG atomically, of 256 colours: a third of the bytes."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    with atomic_file(path) as temporary:
        image.quantize(256, dither=Image.Dither.NONE).save(temporary, "PNG", optimize=True)


def interval_bars(
    axis: Axes,
    labels: Sequence[str],
    values: ArrayLike,
    lows: ArrayLike | None = None,
    highs: ArrayLike | None = None,
    colour: str | Sequence[str] = COLOURS[0],
    offset: float = 0.0,
    width: float = 0.8,
    name: str | None = None,
    digits: int = 2,
    show_values: bool = True,
) -> None:
    """Draw vertical bars with interval whiskers and the value written above each.

    For bars side by side call once per series with `offset` and `width` in units of one bar slot.
    """
    x = np.arange(len(labels)) + offset
    values = np.asarray(values, dtype=float)
    axis.bar(x, values, width, color=colour, label=name)
    tops = values
    if lows is not None and highs is not None:
        tops = np.maximum(np.asarray(highs, dtype=float), values)
        spread = [np.clip(values - np.asarray(lows, dtype=float), 0, None), tops - values]
        axis.errorbar(x, values, yerr=spread, fmt="none", ecolor="#333333", capsize=3, lw=1.2)
    for position, value, top in zip(x, values, tops, strict=True) if show_values else ():
        text = f"{value:.{digits}f}" if np.isfinite(value) else "n/a"
        place = (position, top if np.isfinite(top) else axis.get_ylim()[0])
        axis.annotate(text, place, (0, 2), textcoords="offset points", ha="center", fontsize=9)
    axis.set_xticks(np.arange(len(labels)), labels)
    axis.grid(axis="y", color="#dddddd", lw=0.7)


def interval_curve(
    axis: Axes,
    x: ArrayLike,
    values: ArrayLike,
    lows: ArrayLike | None = None,
    highs: ArrayLike | None = None,
    name: str | None = None,
    series: int = 0,
) -> None:
    """Draw a line with markers and a shaded interval; `series` picks colour and marker."""
    colour = COLOURS[series % len(COLOURS)]
    axis.plot(x, values, color=colour, marker=MARKERS[series % len(MARKERS)], ms=5, label=name)
    if lows is not None and highs is not None:
        low, high = np.asarray(lows, dtype=float), np.asarray(highs, dtype=float)
        axis.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)
    axis.grid(color="#dddddd", lw=0.7)


def reference_line(axis: Axes, y: float, text: str) -> None:
    """Draw a dashed horizontal line (chance, no effect, a baseline), named at its right end."""
    axis.axhline(y, color="#555555", lw=1, ls="--")
    axis.annotate(
        text, (1, y), (-2, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
        ha="right", fontsize=9, color="#333333",
    )  # fmt: skip
