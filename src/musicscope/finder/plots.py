"""The finder's numbers for readers: headline keys and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from musicscope.core import plots

SUMMARY = {
    "discoveries": "discoveries",
    "best_test_auroc": "test.best_auroc",
    "best_test_auroc_ci_low": "test.best_ci_low",
    "best_test_auroc_ci_high": "test.best_ci_high",
    "top_test_auroc": "test.top_auroc",
    "tested_test_auroc": "test.tested_auroc",
    "found_above_half": "test.found_above_half",
    "few_any_discovery": "few.any_discovery",
    "few_top_agree": "few.top_agree",
    "few_top_test_auroc": "few.top_test_auroc",
    "null_any_discovery": "null.any_discovery",
    "null_discoveries": "null.discoveries",
}


def find_summary(model: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """{"find_concept.<model>.<dictionary>.<concept>.<SUMMARY>": number} of a metrics file."""
    found = {}
    for name, concepts in metrics.items():
        for concept, entry in concepts.items():
            for key, dotted in SUMMARY.items():
                value: Any = entry
                for part in dotted.split("."):
                    value = value.get(part) if isinstance(value, Mapping) else None
                found[f"find_concept.{model}.{name}.{concept}.{key}"] = value
    return found


def find_figure(model: str, metrics: Mapping[str, Any]) -> Figure:
    """Test AUROC of the best feature of each concept, and how often ten recordings find any."""
    figure, (axes,) = plots.new_figure(1, 2, size=(12.0, 4.0))
    width = 0.8 / max(1, len(metrics))
    for series, (name, concepts) in enumerate(metrics.items()):
        labels = [c for c in concepts if "best_auroc" in concepts[c].get("test", {})]
        tests = [concepts[c]["test"] for c in labels]
        offset = width * (series - (len(metrics) - 1) / 2)
        looks = {"colour": plots.COLOURS[series], "offset": offset, "width": width, "name": name}
        values, low, high = (
            [t[k] for t in tests] for k in ("best_auroc", "best_ci_low", "best_ci_high")
        )
        plots.interval_bars(axes[0], labels, values, low, high, **looks)
        few = [concepts[c]["few"]["any_discovery"] for c in labels]
        null = [concepts[c]["null"]["any_discovery"] or 0.0 for c in labels]
        plots.interval_bars(axes[1], labels, few, **looks)
        axes[1].scatter(np.arange(len(labels)) + offset, null, color="black", marker="x", zorder=3)
    axes[0].axhline(0.5, color="#555555", lw=1, ls="--")
    axes[0].set(title=f"{model}: best feature on test clips", ylabel="AUROC (95 %)", ylim=(0.3, 1))
    axes[1].set(title="few recordings: share of draws with a discovery (x: nothing to find)",
                ylim=(0, 1.05))  # fmt: skip
    axes[0].legend()
    return figure
