"""What the evaluation of an audio model says beside its outcomes: clips used, edits left out."""

from __future__ import annotations

from typing import Any

from musicscope.core import plots
from musicscope.core.io import atomic_dir, write_json, write_text
from musicscope.steering.audio_steering import Plan
from musicscope.steering.report import Outs

TABLES, CHARTS = ("", "-search", "-dose", "-crosstalk"), ("-dose", "-trade", "-crosstalk")


def numbers(plan: Plan) -> dict[str, Any]:
    """Parts of the metrics: clips of each edit, and how many were left out and why."""
    clips = {
        " ".join(wish): {"validation": plan.validation[wish].n, "test": test.n}
        for wish, test in plan.tests.items()
    }
    clips |= {pair: {"test": test.n} for pair, test in plan.joints.items()}
    return {
        "pieces": "clips",
        "clips": clips,
        "skipped": len(plan.skipped),
        "skipped_because": dict(plan.skipped),
    }


def write_nothing(plan: Plan, name: str, outs: Outs) -> None:
    """All outs where no edit has the clips it needs: the reasons, empty tables and charts."""
    with atomic_dir(outs.folder) as folder:
        index = {"sample_rate": None, "families": [], "examples": []}
        (folder / "examples").mkdir()
        write_json(folder / "examples" / "index.json", index)
    for suffix in TABLES:
        write_text(f"{outs.plots}{suffix}.csv", "concept,direction,method\n")
    for suffix in CHARTS:
        figure, ((axis,),) = plots.new_figure(1, 1, (6.0, 1.4))
        text = f"{name}: no edit has the clips that it needs"
        axis.text(0.5, 0.5, text, ha="center", va="center", wrap=True, fontsize=8)
        axis.set_axis_off()
        plots.save_figure(figure, f"{outs.plots}{suffix}.png")
    write_json(outs.metrics, {**numbers(plan), "prompts": 0, "concepts": {}, "joint": {}})
