"""Every figure of the pipeline: plots/figures/<stage>/<name>.png.

Reads plots/<stage>/*.csv and metrics/. A figure whose table has no rows is left out, by name.
"""

from __future__ import annotations

from pathlib import Path

from musicscope.config import load_params
from musicscope.core.io import atomic_dir
from musicscope.report.figures import draw_all
from musicscope.report.metrics import Sources
from stages import run_stage, stage_args

OUT = "plots/figures"


def main() -> None:
    stage_args(__doc__)
    params = load_params()
    sources = Sources(Path("."), params.models, params.slots)
    with atomic_dir(OUT) as folder:
        left_out = draw_all(sources, params.select_layers.kind, folder)
    for name in left_out:
        print(f"{OUT}/{name}.png is left out: its table is missing or has no rows")


if __name__ == "__main__":
    run_stage(main)
