"""Train the embedded models and measure them: data/models/nano-*, metrics/pretrain (hours; frozen).

Training takes params.pretrain.minutes of wall-clock time, so weights differ between machines.
The models in Git are those that all other stages use. A killed run goes on where it stopped.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from musicscope.config import Pretrain, load_params
from musicscope.core.command_line import Parser, number
from musicscope.core.distributed import resolve_device
from musicscope.core.io import publish_dir, scratch_dir, write_text
from musicscope.embedded.clip_set import scores_file
from musicscope.embedded.pretraining import measure, run
from musicscope.embedded.pretraining.corpus import Material
from musicscope.embedded.pretraining.decoder import SIZES
from musicscope.embedded.pretraining.phases import Log
from musicscope.embedded.pretraining.saved_models import model_card
from musicscope.embedded.rendering.soundfonts import FONTS, soundfont
from stages import run_stage


def train(config: Pretrain, seed: int, device: str, processes: int) -> None:
    """Train both models and publish them to data/models."""
    with scratch_dir({"stage": "pretrain", "seed": seed, **asdict(config)}) as work:
        print(f"work in progress is kept in {work}", file=sys.stderr)
        shares = {k.replace("_", "-"): share for k, share in asdict(config.shares).items()}
        arguments = run.parse_arguments([
            "--out", "unused", "--work", str(work), "--scores", str(scores_file(processes)),
            "--minutes", str(config.minutes), "--shares", json.dumps(shares),
            "--codec", json.dumps(asdict(config.codec)), "--scenes", str(config.scenes),
            "--clips", str(config.clips), "--codec-batch", str(config.codec_batch),
            "--decoder-batch", str(config.decoder_batch), "--device", device,
            "--processes", str(processes), "--seed", str(seed),
        ])  # fmt: skip
        run.train(arguments, Log(work / "models" / "log.jsonl"))
        for name in SIZES:
            made = f"{config.minutes:g} minutes on `{device}`, {config.scenes:,} scenes"
            write_text(work / "models" / name / "README.md", model_card(name, made))
            publish_dir(work / "models" / name, f"data/models/{name}")


def main() -> None:
    """Train (or go on training), publish, measure."""
    parser = Parser(description=__doc__)
    parser.add_argument("--minutes", type=number(above=0), help="instead of pretrain.minutes")
    parser.add_argument(
        "--measure", action="store_true", help="measure the models in data/models; no training"
    )
    args = parser.parse_args()
    params = load_params()
    config, processes = params.pretrain, params.compute.processes
    if args.minutes:
        config = replace(config, minutes=args.minutes)
    torch.set_num_threads(1)  # small tensors: a second thread gains nothing
    if not args.measure:
        train(config, params.seed, resolve_device(params.compute.device), processes)
    folders = [Path(f"data/models/{name}") for name in SIZES]
    fonts = tuple((font, soundfont(font)) for font in FONTS)
    material = Material(scores_file(processes), fonts)
    with scratch_dir({"stage": "pretrain evidence", "seed": params.seed}) as work:
        for name, table in measure.evidence(
            folders, work, material, config.evidence_clips, config.bootstrap, params.seed
        ):
            table.save(f"metrics/pretrain/{name}.json")


if __name__ == "__main__":
    run_stage(main)
