"""The embedded data set: which clips are rendered, from which compositions and soundfonts."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from musicscope.config import PrepareData
from musicscope.core.audio import TRIVIAL_CUES, trivial_cues
from musicscope.core.parallel import follow_parent
from musicscope.core.stats import auroc
from musicscope.data import wheel_assets as assets
from musicscope.data.clips import ClipStore, write_clips
from musicscope.data.taxonomy import FAMILIES
from musicscope.embedded.midi_set.compositions import Composition, load_freedoom, split_compositions
from musicscope.embedded.midi_set.corpus import Clip, make_clip
from musicscope.embedded.midi_set.pairs import make_pairs
from musicscope.embedded.midi_set.render import SAMPLE_RATE, Synth

FONTS = ("timgm6mb", "fluidr3mono")
SPLIT_WINDOW = 10.0
"""Seconds; fixed, so that the split of compositions is the same for every clip length."""
JOB_CLIPS = 40
JOB_PAIRS = 20
"""Cues are balanced within each run of so many pairs."""
FLUIDR3MONO = Path(__file__).parents[4] / "assets" / "soundfonts" / "FluidR3Mono_GM.sf3"


@dataclass(frozen=True)
class Job:
    """A run of clips that one process renders; results do not depend on how jobs are dealt out."""

    kind: str
    font: str
    split: str
    first: int
    count: int


def soundfont(font: str) -> Path:
    """Path of a soundfont: FluidR3Mono from this repository, TimGM6mb from pretty_midi's wheel."""
    if font == "fluidr3mono":
        return FLUIDR3MONO
    wheel = assets.fetch(assets.PRETTY_MIDI)
    path = assets.cache_dir() / "soundfonts" / "TimGM6mb.sf2"
    with zipfile.ZipFile(wheel) as archive:
        assets.extract_once(archive, "pretty_midi/TimGM6mb.sf2", path)
    return path


@lru_cache
def load_synths() -> dict[str, Synth]:
    """Both soundfonts, loaded once a process."""
    return {font: Synth(soundfont(font)) for font in FONTS}


@lru_cache
def load_splits(seed: int) -> dict[str, list[Composition]]:
    """Split name -> compositions, the same for pretraining and everything after it."""
    pieces = load_freedoom(assets.fetch(assets.VIZDOOM))
    return split_compositions(pieces, seed, SPLIT_WINDOW)


def plan_jobs(config: PrepareData) -> list[Job]:
    """Every clip of the data set, in store order."""
    wanted = [
        *(("clip", "timgm6mb", s, getattr(config.timgm6mb_clips, s))
          for s in ("train", "validation", "test")),
        ("clip", "fluidr3mono", "test", config.fluidr3mono_test_clips),
    ]  # fmt: skip
    jobs = [
        Job(kind, font, split, first, min(JOB_CLIPS, count - first))
        for kind, font, split, count in wanted
        for first in range(0, count, JOB_CLIPS)
    ]
    pairs = (("timgm6mb", config.pairs), ("fluidr3mono", config.fluidr3mono_pairs))
    return jobs + [
        Job("pair", font, "test", first, min(JOB_PAIRS, count - first))
        for font, count in pairs
        for first in range(0, count, JOB_PAIRS)
    ]


def _row(clip: Clip, name: str, job: Job, pair: str = "") -> dict[str, object]:
    return {
        "id": name, "split": job.split, "kind": job.kind, "pair_id": pair, "source": "freedoom",
        **clip.labels(),
    }  # fmt: skip


def run_job(args: tuple[Job, int, float]) -> list[tuple[np.ndarray, dict[str, object]]]:
    """Render one job: (audio as float16 to travel between processes, row)."""
    job, seed, seconds = args
    pieces, synths = load_splits(seed)[job.split], load_synths()
    out: list[tuple[Clip, dict[str, object]]] = []
    if job.kind == "pair":
        numbers = range(job.first, job.first + job.count)
        pairs = make_pairs(pieces, synths[job.font], job.font, numbers, seed, seconds)
        for i, both in zip(numbers, pairs, strict=True):
            pair = f"{job.font}-pair-{i:04d}"
            for side, clip in zip("ab", both, strict=True):
                out.append((clip, _row(clip, f"{pair}{side}", job, pair)))
    else:
        for i in range(job.first, job.first + job.count):
            clip = make_clip(pieces, synths, job.font, seed, job.split, i, seconds=seconds)
            out.append((clip, _row(clip, f"{job.font}-{job.split}-{i:05d}", job)))
    return [(clip.audio.astype(np.float16), row) for clip, row in out]


def render_all(
    config: PrepareData, seed: int, processes: int
) -> Iterator[tuple[np.ndarray, dict[str, object]]]:
    """Render the whole data set in store order, with a progress bar."""
    jobs = plan_jobs(config)
    total = sum(job.count * (2 if job.kind == "pair" else 1) for job in jobs)
    args = [(job, seed, config.seconds) for job in jobs]
    bar = tqdm(total=total, desc="rendering", unit="clip")
    with ProcessPoolExecutor(max(processes, 1), initializer=follow_parent) as pool:
        # The slow jobs (pairs) come last in the store and start first.
        started = sorted(range(len(jobs)), key=lambda i: jobs[i].kind != "pair")
        futures = {i: pool.submit(run_job, args[i]) for i in started}
        for i in range(len(jobs)):
            result = futures.pop(i).result()
            bar.update(len(result))
            yield from result
    bar.close()


def write_embedded(folder: Path, config: PrepareData, seed: int, processes: int) -> None:
    """Render the data set into the clip store at `folder`."""
    samples = round(config.seconds * SAMPLE_RATE)
    write_clips(folder, render_all(config, seed, processes), SAMPLE_RATE, samples)


def cue_aurocs(store: ClipStore, rows: np.ndarray) -> dict[str, float]:
    """AUROC of every trivial cue for guitar against no guitar, over the given rows."""
    cues = np.concatenate([trivial_cues(store.audio([r]), store.sample_rate) for r in rows])
    guitar = store.rows["has_guitar"].to_numpy()[rows]
    return {
        name: auroc(cues[:, i], guitar) if 0 < guitar.sum() < len(guitar) else float("nan")
        for i, name in enumerate(TRIVIAL_CUES)
    }


def measure(store: ClipStore) -> dict[str, object]:
    """The stage's metrics: counts, balance, and how far trivial cues betray guitar."""
    rows: pd.DataFrame = store.rows
    counts = rows.groupby(["kind", "font", "split"]).size()
    groups = rows.groupby("split")["group"].nunique()
    cues = {"clips": cue_aurocs(store, store.select(kind="clip", font="timgm6mb"))}
    for font in FONTS:
        pairs = store.select(kind="pair", font=font)
        if len(pairs):
            cues[f"{font}_pairs"] = cue_aurocs(store, pairs)
    return {
        "clips": {"-".join(key): int(n) for key, n in counts.items()},
        "compositions": {str(k): int(n) for k, n in groups.items()},
        "share_with": {f: float(rows[f"has_{f}"].mean()) for f in FAMILIES},
        "trivial_cue_auroc": cues,
        "skipped": 0,
    }
