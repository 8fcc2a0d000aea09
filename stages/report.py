"""The report: data/report/report.html, one page of tables, figures and feature cards with sound.

It needs no network and no file beside it. Reads metrics and plots of all stages, data/features,
data/clips, data/maximize_activation, data/maximize_shared, data/find_concept and data/steering. A
missing part is left out, with a note where a reader would miss it.
"""

from __future__ import annotations

from pathlib import Path

from musicscope.config import load_params
from musicscope.core.io import write_text
from musicscope.report.build import build
from musicscope.report.metrics import Sources
from stages import run_stage, stage_args

OUT = "data/report/report.html"


def main() -> None:
    stage_args(__doc__)
    params = load_params()
    section = params.report
    rendered = params.prepare_data.source == "embedded"
    sources = Sources(Path("."), params.models, params.slots, rendered)
    text = build(sources, section.cards, section.moments, section.seconds)
    write_text(OUT, text)
    print(f"{OUT}: {len(text.encode()) / 1e6:.1f} MB")


if __name__ == "__main__":
    run_stage(main)
