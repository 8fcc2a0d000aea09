"""Measure trained models on clips of compositions and singers that training never had.

    python -m musicscope.embedded.pretraining.measure FOLDER --out evidence

Takes about 15 minutes of one core per model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from musicscope.core.command_line import Parser, run_program, whole
from musicscope.core.seeding import seed_for
from musicscope.core.user_outputs import new_folder
from musicscope.data import wheel_assets as assets
from musicscope.data.taxonomy import PITCHED_FAMILIES
from musicscope.embedded.pretraining.corpus import (
    SAMPLES,
    SCENES_PER_CHUNK,
    SECONDS,
    Corpus,
    Material,
    add_material_options,
    claim_work,
    material_of,
    render_chunk,
)
from musicscope.embedded.pretraining.evidence import Clips, evidence_table
from musicscope.embedded.pretraining.evidence_rows import Bootstrap, Table
from musicscope.embedded.rendering.captions import CONCEPTS
from musicscope.embedded.rendering.mixing import (
    Rooms,
    captions,
    describe,
    draw_mixes,
    mix_audio,
)
from musicscope.judges.musicnn import load_musicnn
from musicscope.models.registry import load_model

GUITAR_PROMPTS, OTHER_PROMPTS = 32, 3


def held_out_clips(
    folder: Path, material: Material, split: str, count: int, seed: int
) -> Clips:  # fmt: skip
    """Render and mix `count` clips of one split, one per scene.

    Up to `count` scenes are rendered into `folder`, unless they are there.
    """
    corpus = Corpus(folder, count + SCENES_PER_CHUNK, "cpu")
    for number in range(-(-count // SCENES_PER_CHUNK)):
        corpus.add(render_chunk(folder, material, split, number, seed))
    rng = np.random.default_rng(seed_for(seed, "evidence clips", split))
    mixes = draw_mixes(corpus.table, count, rng, SECONDS, np.arange(count))
    audio = [
        mix_audio(corpus.bank, mixes[i : i + 1], Rooms("cpu"), np.zeros(1, np.int64), SAMPLES)
        for i in range(count)
    ]
    about = describe(corpus.table, mixes, SECONDS)
    pitched = [
        [p.concept for p in d.players if p.concept in PITCHED_FAMILIES] or [d.players[0].concept]
        for d in about
    ]
    return Clips(
        torch.cat(audio).numpy(),
        np.array([corpus.table.scenes[i].group for i in mixes.scene]),
        captions(corpus.table, mixes, SECONDS),
        np.array([families[0] for families in pitched]),
        {c: np.array([c in d.concepts for d in about]) for c in CONCEPTS},
    )


def evidence(
    folders: Sequence[Path], work: Path, material: Material, count: int, bootstrap: int, seed: int
) -> Iterator[tuple[str, Table]]:
    """Yield the name and the table of each model; stems are kept in `work`/stems.

    Args:
        count: held-out clips; as many of training, and half as many of validation.
    """
    stems = work / "stems"
    stems.mkdir(parents=True, exist_ok=True)
    parts = [
        held_out_clips(stems, material, split, clips, seed)
        for split, clips in (("test", count), ("train", count), ("validation", count // 2))
    ]
    prompts = {f: GUITAR_PROMPTS if f == "guitar" else OTHER_PROMPTS for f in PITCHED_FAMILIES}
    musicnn = load_musicnn(assets.fetch(assets.MUSICNN))
    for folder in folders:
        model = load_model(folder)
        table = evidence_table(model, *parts, musicnn, {}, prompts, Bootstrap(bootstrap, seed))
        print(f"{folder.name}: {sum(table.seconds.values()):.0f} s", file=sys.stderr)
        yield folder.name, table


def main(argv: list[str] | None = None) -> None:
    """Write one table per model of the folder."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, help="folder that holds one folder per model")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the tables")
    parser.add_argument("--clips", type=whole(2), default=64, help="held-out clips")
    parser.add_argument("--seed", type=whole(0), default=20)
    add_material_options(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    folders = sorted(p for p in args.models.iterdir() if (p / "config.json").exists())
    if not folders:
        parser.error(f"{args.models} holds no model: name the folder above the models' folders")
    with new_folder(args.out, inputs={"models": args.models, "--work": args.work}) as out:
        claim_work(args.work)
        found = evidence(folders, args.work, material_of(args), args.clips, 1000, args.seed)
        for name, table in found:
            table.save(out.scratch / f"{name}.json")
        print(f"tables: {out.publish()}", file=sys.stderr)


if __name__ == "__main__":
    run_program(main)
