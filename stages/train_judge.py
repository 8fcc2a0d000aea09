"""The judges of generated music: data/judge, metrics/train_judge.json, plots/train_judge.

Trains the family judge on train compositions in two soundfonts and on codec reconstructions, two
controls on one soundfont each, and measures them and musicnn on test compositions. Reads data/clips
and the codec in data/models/<params.train_judge.codec>.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import asdict

from musicscope.config import load_params
from musicscope.core import plots
from musicscope.core.io import folder_sha256, partial_dir, write_json, write_text
from musicscope.core.parallel import workers
from musicscope.data import wheel_assets as assets
from musicscope.data.clips import ClipStore
from musicscope.judges import training as judge_training

CLIPS = "data/clips"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    params = load_params()
    section, device, seed = params.train_judge, params.compute.device, params.seed
    processes = params.compute.processes if device == "cpu" else 1
    model, musicnn = f"data/models/{section.codec}", assets.fetch(assets.MUSICNN)
    work = judge_training.plan_work(ClipStore.open(CLIPS), section, seed)
    key = {"stage": "train_judge", "seed": seed, **asdict(section)}
    scratch = partial_dir({**key, "inputs": [folder_sha256(CLIPS), folder_sha256(model)]})
    with workers(processes) as run:
        answers = judge_training.do_work(run, work, scratch, CLIPS, model, musicnn, device)
    metrics = judge_training.measure(answers, section.bootstrap, seed)
    metrics["training"] = {font: sum(c.count for c in of) for font, of in work.train.items()}
    metrics["training"]["codec"] = sum(len(c.coded) for of in work.train.values() for c in of)

    judge_training.open_judges(scratch, musicnn)[1].save("data/judge")
    stem = "plots/train_judge/auroc"
    plots.save_figure(judge_training.judge_figure(metrics), f"{stem}.png")
    table = judge_training.judge_table(metrics)
    write_text(f"{stem}.csv", table.to_csv(index=False, float_format="%.6g"))
    write_json("metrics/train_judge.json", metrics)
    shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
