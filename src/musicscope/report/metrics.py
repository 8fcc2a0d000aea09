"""Where the report's numbers come from; what is not there becomes a visible note or a dash."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from musicscope.core.io import read_json
from musicscope.report.parts import Cell, Note, number


@dataclass(frozen=True)
class Sources:
    """Where the report reads from."""

    root: Path
    """The folder that holds metrics/ and data/."""
    models: tuple[str, ...]
    slots: tuple[str, ...]
    rendered: bool = True
    """Clips are rendered (params: prepare_data.source is embedded), not recordings."""

    def metrics(self, name: str) -> dict[str, Any] | None:
        """metrics/<name>.json, or None where there is none."""
        path = self.root / "metrics" / f"{name}.json"
        return read_json(path) if path.is_file() else None

    def plot(self, name: str) -> pd.DataFrame | None:
        """plots/<name>.csv, or None where there is none."""
        path = self.root / "plots" / f"{name}.csv"
        return pd.read_csv(path) if path.is_file() else None

    def missing(self, name: str, stage: str) -> Note:
        """The note for metrics that are not there."""
        return Note(f"Left out: metrics/{name}.json is not there (stage {stage}).", "missing")


def get(tree: Any, dotted: str) -> Any:
    """What is at a dotted key, or None."""
    for key in dotted.split("."):
        if not isinstance(tree, dict) or key not in tree:
            return None
        tree = tree[key]
    return tree


def cell(tree: Any, key: str, digits: int = 3) -> Cell:
    """The number at `key` with the interval at <key>_low and <key>_high."""
    return number(get(tree, key), get(tree, f"{key}_low"), get(tree, f"{key}_high"), digits)


def scored(tree: Any, key: str, value: str = "auroc", digits: int = 3) -> Cell:
    """The number at key.value with the interval at key.ci_low and key.ci_high."""
    found = get(tree, key)
    return number(get(found, value), get(found, "ci_low"), get(found, "ci_high"), digits)
