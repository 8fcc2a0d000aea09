"""Train the judges of defined concepts on clips of data/clips, and evaluate them on test clips.

Labels may be unknown, so each concept is learnt and tested on the clips that have one. Clips are
drawn by turns from both sides of all concepts, so that a rare one gets its share.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from musicscope.config import TrainJudge
from musicscope.core.io import Metrics
from musicscope.core.seeding import seed_for
from musicscope.core.stats import permute_labels
from musicscope.data.clips import ClipStore, known_labels, main_clips
from musicscope.data.concepts import Concepts
from musicscope.judges.concepts import OWN_FIT, ConceptJudges
from musicscope.judges.dataset import CHUNK, Chunk, Inputs, make_chunk, read_chunk
from musicscope.judges.embedding_distance import EmbeddingJudge
from musicscope.judges.instrument_classifier import JudgeConfig, train_family_judge
from musicscope.judges.musicnn import level
from musicscope.judges.pair import Judges
from musicscope.judges.report import ALL, family_report
from musicscope.judges.training import embed_audio, open_musicnn

LEAST = {"train": 8, "test": 4}
"""Fewest clips with and without a concept that a judge of it is trained and tested on."""
Each = Callable[[Callable, Iterable], Iterator]


@dataclass(frozen=True)
class Work:
    """Chunks of clips with the labels of all defined concepts, and which can be learnt."""

    names: tuple[str, ...]
    learnt: tuple[str, ...]
    """Concepts with enough clips"""
    clips: Mapping[str, Mapping[str, Mapping[str, int]]]
    """Concept -> split -> clips with and without it"""
    train: Sequence[Chunk]
    test: Sequence[Chunk]


def draw_rows(
    rows: pd.DataFrame, names: Sequence[str], split: str, most: int, seed: int
) -> list[int]:
    """Draw up to `most` clips of a split, by turns from both sides of each concept; ascending."""
    at, turns = main_clips(rows, split), []
    for name in names:
        known, has = known_labels(rows, name, at)
        for side in (True, False):
            rng = np.random.default_rng(seed_for(seed, "judge", name, split, side))
            turns += [(i, row) for i, row in enumerate(rng.permutation(known[has == side]))]
    turns.sort(key=lambda turn: turn[0])  # stable
    return sorted(list(dict.fromkeys(int(row) for _, row in turns))[:most])


def plan(store: ClipStore, concepts: Concepts, section: TrainJudge, seed: int) -> Work:
    """Plan chunks of train and test clips; test clips all go through the codec, if any do."""
    names, seconds = tuple(concepts), store.samples / store.sample_rate
    counts: dict[str, dict[str, dict[str, int]]] = {name: {} for name in names}
    chunks: dict[str, list[Chunk]] = {}
    coded = {"train": section.codec_clips, "test": section.codec_test_clips and section.test_clips}
    most = {"train": section.clips, "test": section.test_clips}
    for split in LEAST:
        rows = draw_rows(store.rows, names, split, most[split], seed)
        for name in names:
            _, has = known_labels(store.rows, name, np.array(rows, int))
            counts[name][split] = {"with": int(has.sum()), "without": int((~has).sum())}
        n, total = min(coded[split], len(rows)), len(rows)
        through = [(i + 1) * n // total > i * n // total for i in range(total)]
        chunks[split] = [
            Chunk(
                split, "concepts", first, len(rows[first : first + CHUNK]),
                tuple(rows[first : first + CHUNK]),
                tuple(np.flatnonzero(through[first : first + CHUNK]).tolist()), seconds, seed,
                names,
            )
            for first in range(0, total, CHUNK)
        ]  # fmt: skip
    learnt = tuple(
        name for name, of in counts.items()
        if all(min(of[split].values()) >= least for split, least in LEAST.items())
    )  # fmt: skip
    return Work(names, learnt, counts, chunks["train"], chunks["test"])


def _sounding(inputs: Inputs, chunk: Chunk) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(audio, labels, groups) of a chunk's clips, then of its reconstructions, but silent ones."""
    data = read_chunk(inputs, chunk)
    for audio, at in ((data.audio, np.arange(len(data.audio))), (data.codec, data.coded)):
        kept = level(audio)[1] if len(audio) else np.zeros(0, bool)
        yield audio[kept], data.labels[at][kept], data.groups[at][kept]


def _batches(
    inputs: Inputs, chunks: Sequence[Chunk], columns: list[int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (audio, labels) of all clips with a label of a concept that is learnt."""
    for chunk in chunks:
        for audio, labels, _ in _sounding(inputs, chunk):
            known = np.isfinite(labels[:, columns]).any(1)
            if known.any():
                yield audio[known], labels[known][:, columns]


def train(work: Work, inputs: Inputs, concepts: Concepts, section: TrainJudge, seed: int,
          ) -> ConceptJudges:  # fmt: skip
    """Train the classifier and fit the centroids of all concepts with enough clips."""
    tags = {name: concept.musicnn for name, concept in concepts.items() if concept.musicnn}
    if not work.learnt:
        return ConceptJudges(work.names, tags)
    torch.set_num_threads(1)
    columns = [work.names.index(name) for name in work.learnt]
    network = train_family_judge(
        _batches(inputs, work.train, columns), work.learnt, seed_for(seed, "judge", "concepts"),
        replace(JudgeConfig(), epochs=section.epochs), inputs.scratch,
    )  # fmt: skip
    musicnn, embedded = open_musicnn(inputs.musicnn), []
    for chunk in work.train:
        plain, coded = _sounding(inputs, chunk)
        audio, labels, _ = coded if len(coded[0]) else plain
        if len(audio):
            embedded.append((embed_audio(musicnn, audio), labels[:, columns]))
    embeddings, labels = (np.concatenate(part) for part in zip(*embedded, strict=True))
    fits = [EmbeddingJudge.fit(embeddings[k], labels[k][:, [j]] == 1) for j, k in
            enumerate(np.isfinite(labels).T)]  # fmt: skip
    centroids = EmbeddingJudge(
        np.concatenate([fit.weights for fit in fits]), np.concatenate([fit.bias for fit in fits])
    )
    return ConceptJudges(work.names, tags, network, centroids)


Tested = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]
"""Probabilities by judge [n, concepts], labels [n, concepts], groups [n]."""


def predict(inputs: Inputs, judges: Judges, chunk: Chunk) -> list[Tested]:
    """Predict a chunk's clips, and their reconstructions by the codec."""
    return [
        (judges.predict_own(audio) if len(audio) else {}, labels, groups)
        for audio, labels, groups in _sounding(inputs, chunk)
    ]


def evaluate(work: Work, parts: Sequence[Sequence[Tested]], bootstrap: int, seed: int) -> Metrics:
    """Compute {concept: clips per split and, per judge, AUROC on test clips with its null}.

    `codec` is of codec reconstructions, where there are any; `test` of the clips themselves;
    `shuffled` of labels permuted over groups.
    """
    found: Metrics = {name: {"clips": work.clips[name]} for name in work.names}
    for place, name in enumerate(("test", "codec")):
        own = [part[place] for part in parts if len(part[place][1])]
        if not own:
            continue
        labels, groups = (np.concatenate([of[i] for of in own]) for i in (1, 2))
        for judge in own[0][0]:
            scores = np.concatenate([of[0][judge] for of in own])
            for j, concept in enumerate(work.names):
                known = np.isfinite(labels[:, j])
                if not np.isfinite(scores[:, j]).any() or not known.any():
                    continue
                has = labels[known][:, [j]] == 1
                null = permute_labels(has, groups[known], seed_for(seed, "judge null", concept))
                entry = found[concept].setdefault(judge, {})
                for key, truth in ((name, has), ("shuffled", null)):
                    entry[key] = family_report(
                        scores[known][:, [j]], truth, [concept], groups[known], bootstrap, seed
                    )[concept]
    return found


def run(
    each: Each, store: ClipStore, inputs: Inputs, judges: Judges, concepts: Concepts,
    section: TrainJudge, seed: int,
) -> tuple[ConceptJudges, Metrics]:  # fmt: skip
    """Make the clips, train, and evaluate: the judges, and metrics by concept."""
    work = plan(store, concepts, section, seed)
    chunks = [*work.train, *work.test]
    print(f"{sum(c.count for c in chunks)} clips of defined concepts", file=sys.stderr)
    list(each(functools.partial(make_chunk, inputs), chunks))
    own = train(work, inputs, concepts, section, seed)
    job = functools.partial(predict, inputs, replace(judges, own=own))
    metrics = evaluate(work, list(each(job, work.test)), section.bootstrap, seed)
    for name, say in trusted(metrics).items():
        of = work.clips[name]
        counts = ", ".join(f"{s}: {of[s]['with']} with, {of[s]['without']} without" for s in of)
        text = f"judged by {', '.join(say)}" if say else "no judge is trusted, nor chooses settings"
        print(f"concepts.{name}: {text} (clips {counts})", file=sys.stderr)
        metrics[name]["trusted"] = ", ".join(say)
    return own, metrics


def trusted(metrics: Metrics) -> dict[str, list[str]]:
    """Concept -> judges with an AUROC of at least `OWN_FIT` on codec output, or on clips."""
    found: dict[str, list[str]] = {name: [] for name in metrics}
    for name, entry in metrics.items():
        for judge in (j for j in ALL if j in entry):
            number = entry[judge].get("codec") or entry[judge]["test"]
            if (number["auroc"]["value"] or 0.0) >= OWN_FIT:
                found[name].append(judge)
    return found
