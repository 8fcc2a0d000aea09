"""Where the numbers of the report come from, and how each is read and written.

An entry of a metrics file is a plain number or an `Estimate`. A missing number becomes a dash.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from musicscope.core.io import read_json
from musicscope.core.stats import Estimate
from musicscope.report.elements import Cell, Figure
from musicscope.report.snippets import data_uri

DASH = "–"
FIGURE_SCALE = 0.7
"""CSS pixels per pixel of a plot: its text has about 12 pixels."""

Tree = Mapping[str, Any]
"""Contents of a JSON file."""


@dataclass(frozen=True)
class Sources:
    """Where the report reads from."""

    root: Path
    """The folder that holds metrics/, plots/ and data/."""
    models: tuple[str, ...]
    slots: tuple[str, ...]
    rendered: bool = True
    """Clips are rendered (params: prepare_data.source is embedded), not recordings."""

    def metrics(self, name: str) -> Tree | None:
        """metrics/<name>.json, or None if it is missing."""
        path = self.root / "metrics" / f"{name}.json"
        return read_json(path) if path.is_file() else None

    def plot(self, name: str) -> pd.DataFrame | None:
        """plots/<name>.csv, or None if it is missing or has no rows."""
        path = self.root / "plots" / f"{name}.csv"
        table = pd.read_csv(path) if path.is_file() else None
        return table if table is not None and len(table) else None

    def chosen_layers(self, model: str) -> list[int]:
        """Layers of the slots, from metrics/layers/<model>.yaml."""
        chosen = DictConfig(OmegaConf.load(self.root / "metrics/layers" / f"{model}.yaml"))
        return [int(chosen[slot]) for slot in self.slots]

    def figure(self, name: str, alt: str, caption: str) -> Figure | str:
        """plots/figures/<name>.png, or a note that it is missing."""
        path = self.root / "plots/figures" / f"{name}.png"
        if not path.is_file():
            return f"Left out: plots/figures/{name}.png is not there."
        content = path.read_bytes()
        width, height = struct.unpack(">II", content[16:24])
        size = round(width * FIGURE_SCALE), round(height * FIGURE_SCALE)
        return Figure(data_uri("image/png", content), size, alt, caption)


def missing(name: str, stage: str) -> str:
    """The note on a metrics file that is missing."""
    return f"Left out: metrics/{name}.json is not there (stage {stage})."


def get(tree: Any, dotted: str) -> Any:
    """The entry at a dotted key, or None; keys may hold dots."""
    if not isinstance(tree, Mapping):
        return None
    if dotted in tree:
        return tree[dotted]
    for dot in (i for i, letter in enumerate(dotted) if letter == "."):
        if (found := get(tree.get(dotted[:dot]), dotted[dot + 1 :])) is not None:
            return found
    return None


def read(tree: Any, dotted: str) -> Estimate:
    """The number at a dotted key."""
    return Estimate.read(get(tree, dotted))


def cell(tree: Any, dotted: str, digits: int = 3, shaded: bool = False) -> Cell:
    """A cell with the number at a dotted key and, where both limits are known, its interval below.

    `shaded`: with a shade for a value between 0 and 1.
    """
    found, detail, shade = read(tree, dotted), "", None
    if found.has_interval:
        detail = f"[{plain(found.low, digits)}, {plain(found.high, digits)}]"
    if shaded and math.isfinite(found.value):
        shade = round(9 * min(max(found.value, 0.0), 1.0))
    return Cell(plain(found.value, digits), detail, shade)


def short(value: float | None, digits: int = 2) -> str:
    """A number of any size as text with `digits` significant digits."""
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        text = f"{value:.{digits}g}"
        text = f"{value:,.0f}" if abs(value) >= 10**digits else text
    else:
        text = f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e")
    return text.replace("-", "−")


def plain(value: float | int | str | None, digits: int = 3) -> str:
    """A number as text: integers whole, small ones in powers of ten, missing as a dash."""
    if value is None or isinstance(value, str):
        return value or DASH
    if not math.isfinite(value):
        return DASH
    if isinstance(value, int):
        return f"{value:,}"
    if value and abs(value) < 0.5 * 10**-digits:
        return f"{value:.1e}".replace("e-0", "e-").replace("-", "−")
    return f"{value:,.{digits}f}".replace("-", "−")


def in_words(
    title: str, y_label: str, x_label: str, x: Sequence[float],
    series: Mapping[str, Sequence[float | None]],
) -> str:  # fmt: skip
    """The numbers of a chart in words, for `Figure.alt`."""
    spoken = (
        f"{name}: " + ", ".join(f"{at:.6g} {plain(y)}" for at, y in zip(x, values, strict=True))
        for name, values in series.items()
    )
    return f"{title}. {y_label} by {x_label}. {'; '.join(spoken)}"
