"""The outs of a steering evaluation for a model that generates nothing from prompts, such as RAVE.

What an edit does is judged on pieces that prompts ask for. An audio model turns audio into audio;
its latents can be edited (`AudioModel.reconstruct` with hooks), but that has no prompts, no plain
model's cross-entropy and no guidance to hold it to. Nothing is measured here, and the metrics count
what was not.
"""

from __future__ import annotations

from typing import Any

from musicscope import plots
from musicscope.artifacts import atomic_dir, write_json, write_text
from musicscope.steering.steering_report import Outs

TABLES, CHARTS = ("", "-search", "-dose", "-crosstalk"), ("-dose", "-trade", "-crosstalk")
REASON = "an audio model has no prompts: nothing was generated, so nothing was steered"


def write(section: Any, name: str, outs: Outs) -> None:
    """Metrics with `REASON` and the number of edits left out; empty tables and charts."""
    with atomic_dir(outs.folder) as folder:
        index = {"sample_rate": None, "families": [], "examples": []}
        (folder / "examples").mkdir()
        write_json(folder / "examples" / "index.json", index)
    for suffix in TABLES:
        write_text(f"{outs.plots}{suffix}.csv", "concept,direction,method\n")
    for suffix in CHARTS:
        figure, ((axis,),) = plots.new_figure(1, 1, (6.0, 1.4))
        axis.text(0.5, 0.5, f"{name}: {REASON}", ha="center", va="center", wrap=True, fontsize=8)
        axis.set_axis_off()
        plots.save_figure(figure, f"{outs.plots}{suffix}.png")
    left_out = 2 * len(section.concepts) + len(section.pairs)
    write_json(
        outs.metrics,
        {"not_steered": REASON, "edits_left_out": left_out, "prompts": 0, "concepts": {},
         "joint": {}},
    )  # fmt: skip
