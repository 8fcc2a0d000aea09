"""Charts of a steering evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from musicscope.core import plots


def _panels(table: pd.DataFrame, title: str) -> tuple[Figure, list[tuple[Any, pd.DataFrame]]]:
    """One panel a concept (columns) and direction (rows), and its rows of the table."""
    concepts = list(dict.fromkeys(table["concept"]))
    figure, axes = plots.new_figure(2, len(concepts), (3.3 * len(concepts) + 0.8, 6.2), sharey=True)
    figure.suptitle(title)
    parts = []
    for row, direction in enumerate(("off", "on")):
        for column, concept in enumerate(concepts):
            axis = axes[row, column]
            axis.set(title=f"{concept} {direction}", ylim=(-0.03, 1.03))
            here = (table["concept"] == concept) & (table["direction"] == direction)
            parts.append((axis, table[here]))
    return figure, parts


def dose_figure(doses: pd.DataFrame, tests: pd.DataFrame, title: str) -> Figure:
    """Success over strength on validation prompts, with test prompts' controls as lines."""
    figure, parts = _panels(doses, title)
    for axis, rows in parts:
        at = rows.iloc[0]
        for series, method in enumerate(("sae", "diff_means")):
            part = rows[rows["method"] == method].sort_values("strength")
            plots.interval_curve(
                axis, part["strength"], part["success"], part["success_ci_low"],
                part["success_ci_high"], method, series,
            )  # fmt: skip
        here = (tests["concept"] == at["concept"]) & (tests["direction"] == at["direction"])
        for style, method in (("--", "prompt_edit"), (":", "reseed")):
            # An audio model has no prompt to edit, and may lack clips for a wish.
            for value in tests.loc[here & (tests["method"] == method), "success"]:
                axis.axhline(value, color="#555555", lw=1.4, ls=style, label=method)
        if rows["success"].notna().any():  # nothing to change: no point, and no logarithm
            axis.set_xscale("log")
        axis.set_xlabel("strength")
    _legend(figure, parts, "success (95 %)")
    return figure


def trade_figure(doses: pd.DataFrame, title: str) -> Figure:
    """Success over what it costs: methods compare at the same place on the axis."""
    figure, parts = _panels(doses, title)
    for axis, rows in parts:
        for series, method in enumerate(dict.fromkeys(doses["method"])):
            part = rows[rows["method"] == method].sort_values("strength")
            style = {"color": plots.COLOURS[series % 8], "marker": plots.MARKERS[series % 8]}
            axis.plot(part["frechet"], part["success"], ms=5, label=method, **style)
        axis.set(xlabel="Frechet distance from plain")
        axis.grid(color="#dddddd", lw=0.7)
    _legend(figure, parts, "success")
    return figure


def _legend(figure: Figure, parts: Sequence[tuple[Any, Any]], label: str) -> None:
    for axis in (parts[0][0], parts[len(parts) // 2][0]):
        axis.set_ylabel(label)
    handles, texts = parts[0][0].get_legend_handles_labels()
    texts = [text.replace("_", " ") for text in texts]
    figure.legend(handles, texts, loc="outside lower center", ncols=4)


def cross_talk_figure(table: pd.DataFrame, title: str) -> Figure:
    """The cross-talk matrix as a heat map with its numbers."""
    figure, ((axis,),) = plots.new_figure(
        size=(2.8 + 0.62 * table.shape[1], 1.4 + 0.36 * len(table))
    )
    values = table.to_numpy()
    largest = float(np.nanmax(np.abs(values), initial=1e-3))
    axis.imshow(values, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        colour = "white" if abs(value) > 0.6 * largest else "black"
        axis.text(x, y, f"{value:+.2f}", ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(table.shape[1]), [c.replace("_", " ") for c in table], rotation=40)
    axis.set_yticks(range(len(table)), table.index, fontsize=8)
    axis.set_title(title)
    return figure
