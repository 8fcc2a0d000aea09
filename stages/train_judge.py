"""Train the judges of generated music: data/judge, metrics/train_judge.json, plots/train_judge.

Trains the instrument classifier on train compositions in two soundfonts and on codec
reconstructions, and two controls on one soundfont each. Evaluates them and musicnn on test
compositions. Reads data/clips and the codec in data/models/<params.train_judge.codec>.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace

import numpy as np

from musicscope.config import TrainJudge, load_params
from musicscope.core.distributed import resolve_device
from musicscope.core.io import Metrics, folder_sha256, scratch_dir, write_json, write_text
from musicscope.core.parallel import workers
from musicscope.data import wheel_assets
from musicscope.data.clips import ClipStore
from musicscope.data.concepts import completed, concepts_of
from musicscope.data.taxonomy import FAMILIES
from musicscope.embedded.clip_set import Job, make_clips, scores_file
from musicscope.judges import concept_training, report, training
from musicscope.judges.dataset import Chunk, Clips, Inputs
from musicscope.judges.pair import Judges
from stages import run_stage, stage_args

CLIPS = "data/clips"


def render(chunk: Chunk) -> Clips:
    """Render the clips of a chunk from pieces of its split, under names of their own."""
    clips = make_clips(
        Job("clip", chunk.font, chunk.split, chunk.first, chunk.count, chunk.seed, chunk.seconds,
            "train_judge")
    )  # fmt: skip
    labels = [[clip.row[f"has_{f}"] for f in FAMILIES] for clip in clips]
    groups = np.array([clip.row["group"] for clip in clips], dtype=str)
    return np.stack([clip.audio for clip in clips]), np.array(labels, bool), groups


def main() -> None:
    stage_args(__doc__)
    params = load_params()
    section, seed = params.train_judge, params.seed
    device = resolve_device(params.compute.device)
    processes = params.compute.processes if device == "cpu" else 1
    codec = f"data/models/{section.codec}"
    store, concepts = ClipStore.open(CLIPS), completed(params.concepts)
    concepts_of(store.rows, concepts)  # or an error that names the one without labels
    work = training.plan_work(store, section, seed)
    key = {"stage": "train_judge", "seed": seed, **asdict(section)}
    key |= {"inputs": [folder_sha256(CLIPS), folder_sha256(codec)]}
    if concepts:
        key["concepts"] = {name: asdict(concept) for name, concept in concepts.items()}
    musicnn = wheel_assets.fetch(wheel_assets.MUSICNN)
    scores_file(processes)  # once, before the processes would all make it
    with scratch_dir(key) as scratch:
        inputs = Inputs(scratch, CLIPS, codec, musicnn, render, device)
        with workers(processes) as each:
            predictions = training.run(each, work, inputs)
            judges, own = training.open_judges(scratch, musicnn)[1], {}
            if concepts:
                learnt, own = concept_training.run(
                    each, store, inputs, judges, concepts, section, seed
                )
                judges = replace(judges, own=learnt)
        write(predictions, judges, work, section, seed, own)
        shutil.rmtree(scratch, ignore_errors=True)


def write(
    predictions: Mapping[str, training.Predictions], judges: Judges, work: training.Work,
    section: TrainJudge, seed: int, own: Metrics | None = None,
) -> None:  # fmt: skip
    """Write the judges, metrics and plots. `own`: metrics of defined concepts."""
    metrics = report.measure(predictions, section.bootstrap, seed)
    metrics["training"] = {font: sum(c.count for c in of) for font, of in work.train.items()}
    metrics["training"]["codec"] = sum(len(c.coded) for of in work.train.values() for c in of)

    if own:
        metrics["concepts"] = own
    replace(judges, reliability=report.reliability(metrics)).save("data/judge")
    table = report.plot_table(metrics)
    write_text("plots/train_judge/auroc.csv", table.to_csv(index=False, float_format="%.6g"))
    write_json("metrics/train_judge.json", metrics)


if __name__ == "__main__":
    run_stage(main)
