"""Train the judges of generated music: data/judge, metrics/train_judge.json, plots/train_judge.

Trains the instrument classifier on train compositions in two soundfonts and on codec
reconstructions, and two controls on one soundfont each. Evaluates them and musicnn on test
compositions. Reads data/clips and the codec in data/models/<params.train_judge.codec>.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import asdict

import numpy as np

from musicscope.config import load_params
from musicscope.core.distributed import resolve_device
from musicscope.core.io import folder_sha256, partial_dir, write_json, write_text
from musicscope.core.parallel import workers
from musicscope.data import wheel_assets
from musicscope.data.clips import ClipStore
from musicscope.data.taxonomy import FAMILIES
from musicscope.embedded.midi_set.corpus import make_clip
from musicscope.embedded.midi_set.embedded import load_splits, load_synths
from musicscope.judges import report, training
from musicscope.judges.dataset import Chunk, Clips, Inputs

CLIPS = "data/clips"


def render(chunk: Chunk) -> Clips:
    """Render the clips of a chunk from the embedded compositions of its split."""
    pieces, synths = load_splits(chunk.seed)[chunk.split], load_synths()
    clips = [
        make_clip(
            pieces, synths, chunk.font, chunk.seed, "train_judge", chunk.split, i,
            seconds=chunk.seconds,
        )
        for i in range(chunk.first, chunk.first + chunk.count)
    ]  # fmt: skip
    labels = [[clip.labels()[f"has_{f}"] for f in FAMILIES] for clip in clips]
    groups = np.array([clip.plan.group for clip in clips], dtype=str)
    return np.stack([clip.audio for clip in clips]), np.array(labels, bool), groups


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    params = load_params()
    section, seed = params.train_judge, params.seed
    device = resolve_device(params.compute.device)
    processes = params.compute.processes if device == "cpu" else 1
    codec = f"data/models/{section.codec}"
    work = training.plan_work(ClipStore.open(CLIPS), section, seed)
    key = {"stage": "train_judge", "seed": seed, **asdict(section)}
    scratch = partial_dir({**key, "inputs": [folder_sha256(CLIPS), folder_sha256(codec)]})
    musicnn = wheel_assets.fetch(wheel_assets.MUSICNN)
    inputs = Inputs(scratch, CLIPS, codec, musicnn, render, device)
    with workers(processes) as each:
        predictions = training.run(each, work, inputs)
    metrics = report.measure(predictions, section.bootstrap, seed)
    metrics["training"] = {font: sum(c.count for c in of) for font, of in work.train.items()}
    metrics["training"]["codec"] = sum(len(c.coded) for of in work.train.values() for c in of)

    training.open_judges(scratch, musicnn)[1].save("data/judge")
    table = report.plot_table(metrics)
    write_text("plots/train_judge/auroc.csv", table.to_csv(index=False, float_format="%.6g"))
    write_json("metrics/train_judge.json", metrics)
    shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
