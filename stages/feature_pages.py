"""The feature pages: data/feature_pages/index.html, one page per live feature, with sound.

They need no network. Reads data/feature_activity, data/features, data/effects, data/find_concept,
data/clips and stability.parquet of data/sae/<model>/<slot>; loads no model and no SAE.
"""

from __future__ import annotations

from pathlib import Path

from musicscope.config import load_params
from musicscope.data.clips import ClipStore
from musicscope.report import pages
from stages import run_stage, stage_args

OUT = "data/feature_pages"


def main() -> None:
    stage_args(__doc__)
    params = load_params()
    tables = pages.read(
        Path("."), params.match_features.slot, params.find_concept.slot, params.steer.slot
    )
    pages.write(OUT, tables, ClipStore.open("data/clips"))


if __name__ == "__main__":
    run_stage(main)
