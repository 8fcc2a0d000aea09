"""Train the instrument classifiers and the centroids; run all judges on test clips."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from musicscope.config import TrainJudge
from musicscope.core.progress import Bar
from musicscope.core.seeding import seed_for
from musicscope.data.clips import HELD_OUT_FONT, ClipStore
from musicscope.data.splits import TRAIN_FONT
from musicscope.data.taxonomy import FAMILIES
from musicscope.judges.dataset import (
    Chunk,
    Inputs,
    batches,
    labels_of,
    make_chunk,
    open_clips,
    plan_chunks,
    read_chunk,
)
from musicscope.judges.embedding_distance import EmbeddingJudge, load_embedding_judge
from musicscope.judges.instrument_classifier import (
    FamilyJudge,
    JudgeConfig,
    load_family_judge,
    train_family_judge,
)
from musicscope.judges.musicnn import SAMPLE_RATE, Musicnn, load_musicnn
from musicscope.judges.pair import Judges

FONTS = (TRAIN_FONT, HELD_OUT_FONT)
BOTH = "both"
PAIR_CHUNK = 20
CENTROIDS = "embedding_judge.safetensors"
EMBEDDED_SECONDS = 3
"""Middle part of a clip that the centroids know, as long as steered pieces; musicnn is slow."""


@dataclass(frozen=True)
class Network:
    """One network to train."""

    name: str
    """both: the judge; a font: the control that is tested on the other font."""
    chunks: tuple[Chunk, ...]
    epochs: int
    seed: int


@dataclass(frozen=True)
class Work:
    """Chunks to make, networks to train and clips to predict in a run."""

    train: Mapping[str, Sequence[Chunk]]
    """Per font"""
    test: Sequence[Chunk]
    pairs: Sequence[int]
    """Rows of the clip store, both sides of a pair in succession."""
    networks: Sequence[Network]


@dataclass(frozen=True)
class Predictions:
    """Predictions of every judge on a set of clips, with the true labels."""

    name: str
    """A key of `report.SETS`, or "pairs"."""
    scores: Mapping[str, np.ndarray]
    """Judge, or font whose classifier it is -> probabilities [n, F]"""
    labels: np.ndarray
    groups: np.ndarray
    pairs: np.ndarray
    """[n] name of the pair, "" for single clips"""


def plan_work(store: ClipStore, section: TrainJudge, seed: int) -> Work:
    """Plan a run from the clip store and params.train_judge."""
    train, test = (
        {font: plan_chunks(store, split, font, clips, codec_clips, seed) for font in FONTS}
        for split, clips, codec_clips in (
            ("train", section.clips, section.codec_clips),
            ("test", section.test_clips, section.codec_test_clips),
        )
    )
    fonts_of = {BOTH: FONTS, **{font: (font,) for font in FONTS}}
    networks = [
        Network(
            name, tuple(c for font in fonts for c in train[font]),
            section.epochs if name == BOTH else section.cross_font_epochs,
            seed_for(seed, "train_judge", name),
        )
        for name, fonts in fonts_of.items()
    ]  # fmt: skip
    pairs = store.select(kind="pair")[: 2 * section.pairs].tolist()
    return Work(train, [c for font in FONTS for c in test[font]], pairs, networks)


def train_network(inputs: Inputs, network: Network) -> str:
    """Train and save `scratch`/<name> unless it exists; return its name."""
    folder = inputs.scratch / network.name
    if not (folder / "config.json").exists():
        torch.set_num_threads(1)
        judge = train_family_judge(
            batches(inputs, network.chunks), FAMILIES, network.seed,
            replace(JudgeConfig(), epochs=network.epochs), inputs.scratch,
        )  # fmt: skip
        judge.save(folder)
    return network.name


@functools.lru_cache(maxsize=1)
def open_musicnn(wheel: Path) -> Musicnn:
    """Load musicnn, once per process."""
    return load_musicnn(wheel)


def embed_chunk(inputs: Inputs, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
    """Embed the codec reconstructions of a train chunk: [m, 200], and their labels [m, F]."""
    torch.set_num_threads(1)
    data = read_chunk(inputs, chunk)
    return embed_audio(open_musicnn(inputs.musicnn), data.codec), data.labels[data.coded]


def embed_audio(musicnn: Musicnn, audio: np.ndarray) -> np.ndarray:
    """Embed the middle `EMBEDDED_SECONDS` of 16 kHz clips: [n, 200]."""
    length = min(audio.shape[1], EMBEDDED_SECONDS * SAMPLE_RATE)
    first = (audio.shape[1] - length) // 2
    return musicnn.predict(audio[:, first : first + length])[1]


@functools.lru_cache(maxsize=1)
def open_judges(scratch: Path, musicnn: Path) -> tuple[dict[str, FamilyJudge], Judges]:
    """Load the three classifiers by name, and all judges, once per process."""
    trained = {name: load_family_judge(scratch / name) for name in (BOTH, *FONTS)}
    centroids = load_embedding_judge(scratch / CENTROIDS, trained[BOTH].families)
    judges = Judges(trained[BOTH], open_musicnn(musicnn), trained[HELD_OUT_FONT], centroids)
    return trained, judges


def predict(inputs: Inputs, job: Chunk | tuple[int, ...]) -> list[Predictions]:
    """Run all judges on a chunk of test clips, plain and through the codec, or on rows of pairs."""
    torch.set_num_threads(1)
    trained, judges = open_judges(inputs.scratch, inputs.musicnn)
    if isinstance(job, tuple):
        store, rows = open_clips(inputs.clips), list(job)
        groups, pairs = (store.rows[c].iloc[rows].to_numpy(str) for c in ("group", "pair_id"))
        scores = judges.predict_all(store.audio(rows))
        return [Predictions("pairs", scores, labels_of(store, rows), groups, pairs)]
    data = read_chunk(inputs, job)

    def scores_of(audio: np.ndarray) -> dict[str, np.ndarray]:
        scores = judges.predict_all(audio)
        own = {HELD_OUT_FONT: scores["other_font_judge"]}
        return scores | own | {TRAIN_FONT: trained[TRAIN_FONT].predict(audio)}

    def part(name: str, scores: dict[str, np.ndarray], at: np.ndarray) -> Predictions:
        return Predictions(name, scores, data.labels[at], data.groups[at], np.full(len(at), ""))

    plain = scores_of(data.audio)
    parts = [part(job.font, plain, np.arange(len(data.audio)))]
    if len(at := data.coded):
        parts.append(part("codec_source", {k: v[at] for k, v in plain.items()}, at))
        parts.append(part("codec", scores_of(data.codec), at))
    return parts


def gather(parts: Sequence[Predictions]) -> dict[str, Predictions]:
    """Concatenate the predictions of each set."""
    sets = {}
    for name in dict.fromkeys(part.name for part in parts):
        own = [part for part in parts if part.name == name]
        scores = {k: np.concatenate([p.scores[k] for p in own]) for k in own[0].scores}
        facts = (
            np.concatenate([getattr(p, k) for p in own]) for k in ("labels", "groups", "pairs")
        )
        sets[name] = Predictions(name, scores, *facts)
    return sets


def run(
    each: Callable[[Callable, Iterable], Iterator], work: Work, inputs: Inputs
) -> dict[str, Predictions]:
    """Make the clips, train, and predict: predictions per set; `each` maps (`parallel.workers`)."""
    chunks = [c for of in (*work.train.values(), work.test) for c in of]
    chunks.sort(key=lambda c: -len(c.coded))  # the codec takes the longest
    total, coded = sum(c.count for c in chunks), sum(len(c.coded) for c in chunks)
    print(f"{total} clips, {coded} of them through the codec", file=sys.stderr)
    with Bar(total=total, desc="clips", unit="clips") as progress:
        for count in each(functools.partial(make_chunk, inputs), chunks):
            progress.update(count)
    trained = each(functools.partial(train_network, inputs), work.networks)
    list(Bar(trained, "networks", len(work.networks), unit="networks"))
    coded = [chunk for of in work.train.values() for chunk in of if chunk.coded]
    embedded = Bar(each(functools.partial(embed_chunk, inputs), coded), "centroids", len(coded))
    arrays = (np.concatenate(part) for part in zip(*embedded, strict=True))
    EmbeddingJudge.fit(*arrays).save(inputs.scratch / CENTROIDS)
    pairs = [tuple(work.pairs[i : i + PAIR_CHUNK]) for i in range(0, len(work.pairs), PAIR_CHUNK)]
    jobs = [*work.test, *pairs]
    parts = Bar(each(functools.partial(predict, inputs), jobs), "test", len(jobs), unit="chunks")
    return gather([prediction for part in parts for prediction in part])
