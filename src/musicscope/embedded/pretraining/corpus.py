"""Rendered stems on disk, made by many processes while training already reads them.

A chunk holds SCENES_PER_CHUNK scenes: ``<split>-<number>.npy`` float16 [stems, samples] and
``<split>-<number>.json``. It is a function of (seed, split, number), so a killed run goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from musicscope.core.io import write_text
from musicscope.core.seeding import seed_for
from musicscope.core.user_outputs import OutputError
from musicscope.embedded.rendering.mixing import SceneTable
from musicscope.embedded.rendering.pieces import Pieces
from musicscope.embedded.rendering.scenes import (
    SAMPLE_RATE,
    Scene,
    Sounds,
    draw_rendered,
    soundfonts,
)
from musicscope.embedded.rendering.scores import load_scores, save_scores
from musicscope.embedded.rendering.soundfonts import FONTS, soundfont
from musicscope.embedded.rendering.voices import load_bank

SECONDS = 10.0
SAMPLES = round(SECONDS * SAMPLE_RATE)
"""Per clip."""
SCENES_PER_CHUNK = 20
STEMS_PER_SCENE = 5.5
"""Room to keep per scene; scenes have 1 to MOST_STEMS stems."""
MARK = ".musicscope-pretraining"
"""File that tells a folder of work in progress from a user's own."""


@dataclass(frozen=True)
class Material:
    """Where scores and sounds are read from."""

    scores: Path
    """File of `scores.save_scores`."""
    fonts: tuple[tuple[str, Path], ...]
    """Name and path per soundfont."""
    voices: Path | None = None
    """File or folder of the voice bank; None takes the one in this repository."""


def claim_work(work: Path, run: dict[str, object] | None = None) -> None:
    """Make the folder for work in progress, or see that an earlier run of the same kind made it.

    Args:
        work: the folder.
        run: what must be equal for a run to go on; None only adds stems, which fit every run.

    Raises:
        OutputError: it holds other files, or the work of another run.
    """
    mark = work / MARK
    if work.exists() and not mark.exists() and any(work.iterdir()):
        raise OutputError(f"--work {work} holds other files: name a new folder")
    work.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(mark.read_text(encoding="utf-8")) if mark.exists() else {}
    if run and earlier and earlier != run:
        raise OutputError(
            f"--work {work} holds the work of a run with {earlier}: name a new folder"
        )
    write_text(mark, json.dumps(run or earlier))


def add_material_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where scores and sounds are; none is needed with a network."""
    parser.add_argument(
        "--work", type=Path, default=Path("data/pretraining"),
        help="stems, tokens and checkpoints (default: data/pretraining)",
    )  # fmt: skip
    parser.add_argument(
        "--scores", type=Path,
        help="file of scores.save_scores (default: made in --work from the package index)",
    )  # fmt: skip
    parser.add_argument(
        "--font", action="append", default=[], metavar="NAME=FILE",
        help="a soundfont; may be given several times (default: both of the embedded set)",
    )  # fmt: skip
    parser.add_argument("--voices", type=Path, help="voice bank (default: assets/voices)")


def material_of(args: argparse.Namespace) -> Material:
    """What `add_material_options` was given; makes the scores file if there is none."""
    scores = args.scores or args.work / "scores.npz"
    if not scores.exists():
        args.work.mkdir(parents=True, exist_ok=True)
        print(f"reading tunes and pieces into {scores} (a minute)", file=sys.stderr)
        save_scores(scores)
    fonts = tuple((name, Path(path)) for name, _, path in (f.partition("=") for f in args.font))
    return Material(scores, fonts or tuple((f, soundfont(f)) for f in FONTS), args.voices)


@lru_cache
def _pieces(material: Material, split: str, seed: int) -> Pieces:
    return Pieces(load_scores(material.scores), split, seed)


@lru_cache
def _sounds(material: Material, split: str) -> Sounds:
    bank = load_bank(material.voices)
    singers = bank.names("test" if split == "test" else "train")
    return Sounds(soundfonts(dict(material.fonts)), bank, singers)


def render_chunk(folder: Path, material: Material, split: str, number: int, seed: int) -> str:
    """Render chunk `number` of `split` into `folder`; returns its name."""
    name = f"{split}-{number:05d}"
    if (folder / f"{name}.json").exists():
        return name
    pieces, sounds = _pieces(material, split, seed), _sounds(material, split)
    scenes, stems = [], []
    for i in range(number * SCENES_PER_CHUNK, (number + 1) * SCENES_PER_CHUNK):
        rng = np.random.default_rng(seed_for(seed, "scene", split, i))
        _, scene, audio = draw_rendered(pieces, sounds, rng, SECONDS)
        scenes.append(scene)
        stems.append(audio)
    temporary = folder / f".{name}.{os.getpid()}.npy"
    np.save(temporary, np.concatenate(stems))
    temporary.replace(folder / f"{name}.npy")
    write_text(folder / f"{name}.json", json.dumps([s.to_json() for s in scenes]))
    return name


class Renderers:
    """Processes that render chunks in the background; `close` ends them at once."""

    def __init__(self, folder: Path, material: Material, seed: int, processes: int):
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self.folder, self.material, self.seed = folder, material, seed
        # Spawned: a forked process would inherit torch's threads and the GPU in a broken state.
        self.pool = multiprocessing.get_context("spawn").Pool(processes)
        self.waiting: list = []

    def submit(self, split: str, chunks: range) -> None:
        """Queue chunks; those on disk cost nothing."""
        self.waiting += [
            self.pool.apply_async(render_chunk, (self.folder, self.material, split, n, self.seed))
            for n in chunks
        ]

    def finished(self) -> list[str]:
        """Names of chunks that ended since the last call; raises what a process raised."""
        done = [job for job in self.waiting if job.ready()]
        self.waiting = [job for job in self.waiting if not job.ready()]
        return [job.get() for job in done]

    def close(self) -> None:
        """End all processes; unfinished chunks are left out."""
        self.pool.terminate()
        self.pool.join()


class Corpus:
    """Stems in one tensor on the training device, with the table of their scenes."""

    def __init__(self, folder: Path, scenes: int, device: str | torch.device):
        """Room for `scenes` scenes; what does not fit is not loaded."""
        self.folder = folder
        # On the CPU, pages are touched only as stems arrive.
        self.bank = torch.zeros(
            (round(scenes * STEMS_PER_SCENE), SAMPLES), dtype=torch.float16, device=device
        )
        self.table = SceneTable.of([])
        self.stems = 0
        self.full = False

    def add(self, name: str) -> None:
        """Load one chunk."""
        audio = np.load(self.folder / f"{name}.npy")
        if self.stems + len(audio) > len(self.bank):
            self.full = True
            return
        scenes = [
            Scene.from_json(s)
            for s in json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        ]
        self.bank[self.stems : self.stems + len(audio)] = torch.from_numpy(audio).to(
            self.bank.device
        )
        self.table = self.table + SceneTable.of(scenes, self.stems)
        self.stems += len(audio)

    def __len__(self) -> int:
        return len(self.table.scenes)
