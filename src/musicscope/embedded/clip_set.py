"""The embedded data set: rendered clips with exact labels, by split and by family of sounds.

A scene is a window of a piece, rendered stem by stem; CLIPS_PER_SCENE clips are mixed from it. All
of its clips have one group (its piece), and pieces are split by book. Clips for features are played
on `MIXED` sounds: TimGM6mb and synthesis. FluidR3Mono is left out of them, to test with.

Matched pairs are a clip twice, with and without guitar, alike in every trivial cue on average.
Notes, backing, levels, room and loudness are the same; only the instrument of one stem changes.
Among seeded candidates for the other instrument, that one is taken with which the cues of all
guitar clips so far are least separable from those of all other clips. No model, judge or probe is
asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from musicscope.config import PrepareData
from musicscope.core.audio import TRIVIAL_CUES, trivial_cues
from musicscope.core.io import atomic_file
from musicscope.core.parallel import follow_parent
from musicscope.core.progress import Bar
from musicscope.core.seeding import seed_for
from musicscope.core.stats import auroc
from musicscope.data import wheel_assets as assets
from musicscope.data.clips import ClipStore, write_clips
from musicscope.data.splits import HELDOUT_FONT, MAIN, TRAIN_FONT
from musicscope.data.taxonomy import FAMILIES, PITCHED_FAMILIES, PROGRAM_NAMES
from musicscope.embedded.rendering.captions import SINGERS, VOCALS, write_caption
from musicscope.embedded.rendering.mixing import (
    FADE_SECONDS,
    Mixes,
    Rooms,
    SceneTable,
    describe,
    draw_mixes,
    mix_audio,
)
from musicscope.embedded.rendering.pieces import Pieces
from musicscope.embedded.rendering.scenes import (
    Scene,
    Sounds,
    draw_rendered,
    render_stem,
    soundfonts,
)
from musicscope.embedded.rendering.scores import load_scores, read_scores, save_scores
from musicscope.embedded.rendering.soundfonts import SAMPLE_RATE, soundfont
from musicscope.embedded.rendering.tunes import MUSIC21
from musicscope.embedded.rendering.voices import load_bank

MIXED = TRAIN_FONT
LABELS = (*FAMILIES, VOCALS, *(f"{sex}_vocal" for sex in SINGERS))
"""Concepts that every rendered clip has an exact label for."""
SOUNDS = {MIXED: "timgm6mb", HELDOUT_FONT: "fluidr3mono"}
"""Family of sounds -> its soundfont; MIXED also has synthesis."""
CLIPS_PER_SCENE = 4
JOB_CLIPS = 40
JOB_PAIRS = 20
"""Cues are balanced within each run of so many pairs."""
CANDIDATES = 6
"""Other instruments per scene of pairs."""
DRIFT_WEIGHT = 0.01
CUE_SCALE = np.array([0.15, 0.35, 0.3, 0.45, 0.8, 0.45, 0.25])
"""Spread of each cue over rendered clips, to bring the seven on one scale."""


@dataclass(frozen=True)
class Job:
    """A run of clips that one process renders; results do not depend on how jobs are dealt out."""

    kind: str
    """clip or pair"""
    font: str
    split: str
    first: int
    """Number of the first clip or pair, a multiple of CLIPS_PER_SCENE."""
    count: int
    seed: int
    seconds: float
    name: str = "clip"
    """Other names give other clips of the same split."""


@dataclass(frozen=True)
class Clip:
    """One clip: audio float32 [samples] at 16 kHz, and its columns of clips.parquet."""

    audio: np.ndarray
    row: dict[str, object]


# --- material, loaded once per process --------------------------------------------------------


def scores_file(processes: int = 1) -> Path:
    """Return the parsed scores in the user's cache; the first call takes a minute of one core."""
    path = assets.cache_dir() / f"scores-{MUSIC21.sha256[:8]}{assets.VIZDOOM.sha256[:8]}.npz"
    if not path.exists():
        with atomic_file(path) as temporary:
            save_scores(temporary, read_scores(processes))
    return path


@lru_cache
def load_pieces(split: str, seed: int) -> Pieces:
    """Pieces of a split."""
    return Pieces(load_scores(scores_file()), split, seed)


@lru_cache
def load_sounds(font: str, split: str) -> Sounds:
    """Sounds of a family; singers of the test split are heard nowhere else."""
    bank = load_bank(None)
    names = bank.names("test" if split == "test" else "train")
    return Sounds(soundfonts({SOUNDS[font]: soundfont(SOUNDS[font])}), bank, names, font == MIXED)


@lru_cache
def load_rooms() -> Rooms:
    """Room responses."""
    return Rooms("cpu")


# --- clips ------------------------------------------------------------------------------------


def mix_clips(
    scene: Scene, stems: np.ndarray, mixes: Mixes, font: str, seconds: float
) -> list[Clip]:
    """Mix clips of one scene and describe them.

    Args:
        scene: whose stems are `stems`, float16 [stems, samples].
        mixes: one per clip, over this scene alone.
    """
    table, bank = SceneTable.of([scene]), torch.from_numpy(stems)
    generator = torch.Generator().manual_seed(int(mixes.seed[0]))
    starts = np.zeros(len(mixes), np.int64)
    audio = mix_audio(bank, mixes, load_rooms(), starts, stems.shape[1], generator).numpy()
    loud = np.square(stems.astype(np.float32)).mean(1) * 10 ** (mixes.gain_db[:, : len(stems)] / 10)
    clips = []
    for i, about in enumerate(describe(table, mixes, seconds)):
        heard = np.flatnonzero(mixes.rows[i] >= 0)
        shares = loud[i, heard] * _share_played(mixes, i, heard, seconds)
        energy = dict.fromkeys((*FAMILIES, VOCALS), 0.0)
        sounds = dict.fromkeys(FAMILIES, "")
        for stem, share in zip(heard, shares / shares.sum(), strict=True):
            energy[scene.stems[stem].concept] += float(share)
            if scene.stems[stem].concept in sounds:
                sounds[scene.stems[stem].concept] = scene.stems[stem].source
        singers = {p.singer for p in about.players}
        row = {
            "group": scene.group, "font": font, "source": scene.group.split("/")[0],
            "caption": write_caption(about, np.random.default_rng(mixes.seed[i])),
            "target_family": about.players[0].concept,
            "families": [f for f in FAMILIES if f in about.concepts],
            "programs": [p.program for p in about.players],
            "tempo_bpm": about.tempo_bpm, "density": about.density, "key": about.key,
            "style": about.style,
            **{f"has_{c}": c in about.concepts for c in (*FAMILIES, VOCALS)},
            **{f"has_{sex}_vocal": sex in singers for sex in SINGERS},
            **{f"energy_{c}": round(share, 6) for c, share in energy.items()},
            **{f"sound_{c}": source for c, source in sounds.items()},
        }  # fmt: skip
        clips.append(Clip(audio[i], row))
    return clips


def _share_played(mixes: Mixes, i: int, heard: np.ndarray, seconds: float) -> np.ndarray:
    """Share of the clip in which each stem plays, [heard]."""
    ends = np.minimum(mixes.leaves[i, heard], seconds)
    return np.maximum(ends - mixes.enters[i, heard], FADE_SECONDS) / seconds


def make_clips(job: Job) -> list[Clip]:
    """Make the single clips of a job; equal jobs give equal bytes."""
    pieces, sounds = load_pieces(job.split, job.seed), load_sounds(job.font, job.split)
    clips: list[Clip] = []
    while len(clips) < job.count:
        number = job.first + len(clips)
        rng = np.random.default_rng(seed_for(job.seed, job.name, job.font, job.split, number))
        _, scene, stems = draw_rendered(pieces, sounds, rng, job.seconds)
        count = min(CLIPS_PER_SCENE, job.count - len(clips))
        mixes = draw_mixes(
            SceneTable.of([scene]), CLIPS_PER_SCENE, rng, job.seconds,
            np.zeros(CLIPS_PER_SCENE, np.int64),
        )  # fmt: skip
        clips += mix_clips(scene, stems, mixes[:count], job.font, job.seconds)
    return clips


# --- pairs ------------------------------------------------------------------------------------


def comparable_cues(audio: np.ndarray) -> np.ndarray:
    """Log trivial cues in units of their spread over clips, [n, 7] of audio [n, samples]."""
    return np.log(trivial_cues(audio, SAMPLE_RATE) + 1e-9) / CUE_SCALE


def imbalance(guitar: np.ndarray, other: np.ndarray) -> float:
    """How far the cues of two sets of clips [n, 7] separate the sets; 0 is not at all.

    The worst and the mean squared distance of a cue's AUROC from a half; the mean difference in
    the cues' own units settles it while there are few clips and the AUROC is coarse.
    """
    above = (guitar[:, None] > other[None]).mean((0, 1)) - 0.5
    ties = (guitar[:, None] == other[None]).mean((0, 1)) / 2
    distance = (above + ties) ** 2
    drift = (guitar - other).mean(0)
    return float(distance.max() + distance.mean() + DRIFT_WEIGHT * drift @ drift)


def make_pairs(job: Job) -> Iterator[tuple[Clip, Clip]]:
    """Yield a (guitar, other) pair of clips per number of the job, in order."""
    pieces, sounds = load_pieces(job.split, job.seed), load_sounds(job.font, job.split)
    guitars, others = np.zeros((2, 0, len(CUE_SCALE)))
    for first in range(job.first, job.first + job.count, CLIPS_PER_SCENE):
        rng = np.random.default_rng(seed_for(job.seed, "pair", job.font, first))
        piece, scene, stems = draw_rendered(pieces, sounds, rng, job.seconds, MAIN)
        at = [stem.concept for stem in scene.stems].index(MAIN)
        mixes = _leading(scene, at, min(CLIPS_PER_SCENE, job.first + job.count - first), rng, job)
        with_guitar = mix_clips(scene, stems, mixes, job.font, job.seconds)
        guitars = np.vstack([guitars, _cues(with_guitar)])
        best, score = None, np.inf
        free = [f for f in PITCHED_FAMILIES if f not in {stem.concept for stem in scene.stems}]
        for _ in range(CANDIDATES):
            family = free[rng.integers(len(free))]
            program = int(rng.choice(list(PROGRAM_NAMES[family])))
            stem = replace(scene.stems[at], concept=family, program=program)
            audio = render_stem(piece, scene, stem, sounds, job.seconds)
            if not audio.any():
                continue
            changed = replace(scene, stems=(*scene.stems[:at], stem, *scene.stems[at + 1 :]))
            bank = stems.copy()
            bank[at] = audio
            without = mix_clips(changed, bank, mixes, job.font, job.seconds)
            candidates = np.vstack([others, _cues(without)])
            if (found := imbalance(guitars, candidates)) < score:
                best, best_cues, score = without, candidates, found
        if best is None:
            raise ValueError(f"{scene.group} at {scene.start:.1f} s: no other instrument sounds")
        others = best_cues
        yield from zip(with_guitar, best, strict=True)


def _cues(clips: Sequence[Clip]) -> np.ndarray:
    return comparable_cues(np.stack([clip.audio for clip in clips]))


def _leading(scene: Scene, at: int, count: int, rng: np.random.Generator, job: Job) -> Mixes:
    """Draw mixes of a scene in which stem `at` plays from the start and is loudest."""
    table, zeros = SceneTable.of([scene]), np.zeros(CLIPS_PER_SCENE, np.int64)
    mixes = draw_mixes(table, CLIPS_PER_SCENE, rng, job.seconds, zeros)
    rows, gain = mixes.rows.copy(), mixes.gain_db.copy()
    enters, leaves = mixes.enters.copy(), mixes.leaves.copy()
    rows[:, at] = at
    gain[:, at] = np.where(rows >= 0, gain, -np.inf).max(1) + 1.0
    enters[:, at], leaves[:, at] = 0.0, np.inf
    return replace(mixes, rows=rows, gain_db=gain, enters=enters, leaves=leaves)[:count]


# --- the data set -----------------------------------------------------------------------------


def plan_jobs(config: PrepareData, seed: int) -> list[Job]:
    """Every clip of the data set, in store order."""
    wanted = [
        *(("clip", MIXED, s, getattr(config.clips, s)) for s in ("train", "validation", "test")),
        ("clip", HELDOUT_FONT, "test", config.heldout_font_clips),
        ("pair", MIXED, "test", config.pairs),
        ("pair", HELDOUT_FONT, "test", config.heldout_font_pairs),
    ]
    size = {"clip": JOB_CLIPS, "pair": JOB_PAIRS}
    return [
        Job(kind, font, split, first, min(size[kind], count - first), seed, config.seconds)
        for kind, font, split, count in wanted
        for first in range(0, count, size[kind])
    ]


def run_job(job: Job) -> list[tuple[np.ndarray, dict[str, object]]]:
    """Render one job: (audio as float16 to travel between processes, row)."""
    torch.set_num_threads(1)
    head = {"split": job.split, "kind": job.kind}
    if job.kind == "clip":
        clips = [
            (clip, {"id": f"{job.font}-{job.split}-{i:05d}", **head, "pair_id": ""})
            for i, clip in enumerate(make_clips(job), job.first)
        ]
    else:
        clips = [
            (clip, {"id": f"{job.font}-pair-{i:04d}{side}", **head,
                    "pair_id": f"{job.font}-pair-{i:04d}"})
            for i, both in enumerate(make_pairs(job), job.first)
            for side, clip in zip("ab", both, strict=True)
        ]  # fmt: skip
    return [(clip.audio.astype(np.float16), row | clip.row) for clip, row in clips]


def render_all(
    config: PrepareData, seed: int, processes: int
) -> Iterator[tuple[np.ndarray, dict[str, object]]]:
    """Render the whole data set in store order, with a progress bar."""
    jobs = plan_jobs(config, seed)
    total = sum(job.count * (2 if job.kind == "pair" else 1) for job in jobs)
    scores_file(processes)  # once, before the processes would all make it
    bar = Bar(total=total, desc="rendering", unit="clips")
    with ProcessPoolExecutor(max(processes, 1), initializer=follow_parent) as pool:
        # The slow jobs (pairs) come last in the store and start first.
        started = sorted(range(len(jobs)), key=lambda i: jobs[i].kind != "pair")
        futures = {i: pool.submit(run_job, jobs[i]) for i in started}
        for i in range(len(jobs)):
            result = futures.pop(i).result()
            bar.update(len(result))
            yield from result
    bar.close()


def check_concepts(concepts: Iterable[str]) -> None:
    """Raise ValueError for a concept of params.concepts that rendered clips have no label for."""
    for name in concepts:
        if name not in LABELS:
            raise ValueError(
                f"concepts.{name}: with prepare_data.source = embedded, labels are those of the "
                f"rendered music: {', '.join(LABELS)}; take recordings for other concepts"
            )


def write_embedded(folder: Path, config: PrepareData, seed: int, processes: int) -> None:
    """Render the data set into the clip store at `folder`."""
    samples = round(config.seconds * SAMPLE_RATE)
    write_clips(folder, render_all(config, seed, processes), SAMPLE_RATE, samples)


def cue_aurocs(store: ClipStore, rows: np.ndarray) -> dict[str, float]:
    """AUROC of every trivial cue for guitar against no guitar, over the given rows."""
    cues = np.concatenate([trivial_cues(store.audio([r]), store.sample_rate) for r in rows])
    guitar = store.rows[f"has_{MAIN}"].to_numpy()[rows]
    return {
        name: auroc(cues[:, i], guitar) if 0 < guitar.sum() < len(guitar) else float("nan")
        for i, name in enumerate(TRIVIAL_CUES)
    }


def measure(store: ClipStore) -> dict[str, object]:
    """The stage's metrics: counts, balance, and AUROC of trivial cues for guitar."""
    rows: pd.DataFrame = store.rows
    counts = rows.groupby(["kind", "font", "split"]).size()
    groups = rows.groupby("split")["group"].nunique()
    cues = {"clips": cue_aurocs(store, store.select(kind="clip", font=MIXED))}
    for font in SOUNDS:
        pairs = store.select(kind="pair", font=font)
        if len(pairs):
            cues[f"{font}_pairs"] = cue_aurocs(store, pairs)
    return {
        "clips": {"-".join(key): int(n) for key, n in counts.items()},
        "compositions": {str(k): int(n) for k, n in groups.items()},
        "share_with": {c: float(rows[f"has_{c}"].mean()) for c in LABELS},
        "trivial_cue_auroc": cues,
        "skipped": 0,
    }
