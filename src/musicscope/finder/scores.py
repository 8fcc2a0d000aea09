"""Scores of features: one number per recording or clip, and the moments of the highest values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
import torch

from musicscope.activations.store import ActivationStore
from musicscope.core.progress import Bar
from musicscope.data.audio_files import Problem
from musicscope.dictionaries.codes import ClipPools, Codes, Encode, encode_clips, pool_clips, to_csr
from musicscope.dictionaries.core import TopKSAE, UniversalSAE
from musicscope.finder.recordings import (
    SIDES,
    Plan,
    Recording,
    read_unlevelled,
    read_windows,
    window_cues,
)
from musicscope.judges.musicnn import level
from musicscope.models.interface import MusicModel

EXCERPT = 3.0
"""Seconds of the excerpt around a moment."""
BATCH = 8
POOLED = ("mean", "highest", "frame")
MOMENTS = ("dictionary", "feature", "rank", "recording", "seconds", "value", "file")
"""Columns of a table of moments; rank counts from 1, seconds from the start of the recording."""


@dataclass(frozen=True)
class Dictionary:
    """Features of one layer of one model."""

    encode: Encode
    n_latents: int


def dictionary(features: TopKSAE | UniversalSAE, model: str) -> Dictionary:
    """Take an SAE, or one model's side of a universal SAE; ValueError if it lacks the model."""
    if isinstance(features, UniversalSAE):
        if features.kind != "usae" or model not in features.names:
            raise ValueError(
                f"a {features.kind} of {', '.join(features.names)} cannot encode {model} alone"
            )
        i = features.names.index(model)
        return Dictionary(lambda x: features.encode(x, i), features.n_latents)
    return Dictionary(features.encode, features.n_latents)


@dataclass(frozen=True)
class Scores:
    """Values of the features of one dictionary in n recordings."""

    mean: np.ndarray
    """[n, F] mean over the windows of a recording"""
    highest: np.ndarray
    """[n, F]"""
    window: np.ndarray
    """[n, F] the window in which it is highest"""
    seconds: np.ndarray
    """[n, F] position in that window; -1 where the feature never fires"""
    fires: np.ndarray
    """[n, F] share of frames in which it fires"""


@dataclass(frozen=True)
class ScoredRecordings:
    """All usable recordings of both folders."""

    recordings: tuple[Recording, ...]
    labels: np.ndarray
    scores: Mapping[str, Scores]
    """By dictionary"""
    cues: np.ndarray
    """[n, 8] `recordings.window_cues`"""


@torch.no_grad()
def score_windows(
    model: MusicModel, layer: str, dictionaries: Mapping[str, Dictionary], audio: np.ndarray
) -> dict[str, Scores]:
    """Score one recording's windows [w, samples]: `Scores` of n = 1 for every dictionary."""
    parts: dict[str, list[ClipPools]] = {name: [] for name in dictionaries}
    fired = {name: np.zeros(of.n_latents) for name, of in dictionaries.items()}
    for start in range(0, len(audio), BATCH):
        part = audio[start : start + BATCH]
        frames = model.capture(model.encode(part, [None] * len(part)), [layer])[layer].float()
        for name, of in dictionaries.items():
            matrix = to_csr(*of.encode(frames.flatten(0, 1)), of.n_latents)
            parts[name].append(pool_clips(Codes(matrix, np.full(len(part), frames.shape[1]))))
            fired[name] += np.bincount(matrix.indices[matrix.data > 0], minlength=of.n_latents)
    hop = audio.shape[1] / model.sample_rate / frames.shape[1]
    scores = {}
    for name, pools in parts.items():
        mean, highest, frame = (np.concatenate([getattr(p, k) for p in pools]) for k in POOLED)
        window = highest.argmax(0)
        at = (window, np.arange(highest.shape[1]))
        seconds = np.where(frame[at] < 0, -1.0, frame[at] * hop)
        fires = fired[name][None] / (len(audio) * frames.shape[1])
        scores[name] = Scores(
            mean.mean(0)[None], highest[at][None], window[None], seconds[None], fires
        )
    return scores


def score_recordings(
    model: MusicModel, layer: str, dictionaries: Mapping[str, Dictionary], plan: Plan,
    tick: Callable[[float], None] = lambda share: None,
) -> tuple[ScoredRecordings, list[Problem]]:  # fmt: skip
    """Score all recordings of a plan, one at a time: memory does not grow with their length.

    `tick` gets the share that is done before each; an error in it ends the work.
    """
    usable, cues, problems = [], [], []
    scores: dict[str, list[Scores]] = {name: [] for name in dictionaries}
    bar = Bar(plan.recordings, desc="listening", unit="recordings")
    for number, recording in enumerate(bar):
        tick(number / len(plan.recordings))
        raw, _, wrong = read_unlevelled(recording, plan, model.sample_rate)
        problems += wrong
        if not len(raw):
            continue
        usable.append(recording)
        cues.append(window_cues(raw, model.sample_rate))
        for name, of in score_windows(model, layer, dictionaries, level(raw)[0]).items():
            scores[name].append(of)
    stacked = {
        name: Scores(*(np.concatenate([getattr(s, f.name) for s in of]) for f in fields(Scores)))
        for name, of in scores.items()
        if of
    }
    labels = np.array([r.side == SIDES[0] for r in usable], bool)
    return ScoredRecordings(tuple(usable), labels, stacked, np.array(cues)), problems


def pool_all(
    store: ActivationStore, of: Dictionary, used: np.ndarray, workers: int, device: str
) -> ClipPools:
    """Pool the codes of the clips `used` of a store; rows of the other clips are 0."""
    pools = pool_clips(encode_clips(store, used, of.encode, of.n_latents, workers, device))
    arrays = {}
    for k in POOLED:
        part = getattr(pools, k)
        arrays[k] = np.zeros((len(store), part.shape[1]), part.dtype)
        arrays[k][used] = part
    return ClipPools(**arrays)


def top_moments(
    highest: np.ndarray, rows: np.ndarray, features: pd.Series, n: int
) -> Iterator[tuple[int, int, int]]:
    """Yield (feature, rank, row): the `n` of `rows` in which each feature of [all, F] is highest.

    Rows in which it never fires are left out.
    """
    for feature in features:
        values = highest[rows, feature]
        for rank, i in enumerate(np.argsort(-values, kind="stable")[:n], 1):
            if values[i] > 0:
                yield feature, rank, rows[i]


def excerpt(audio: np.ndarray, seconds: float, rate: int) -> np.ndarray:
    """Cut `EXCERPT` seconds around a moment out of audio [samples]."""
    start = max(0.0, min(seconds - EXCERPT / 2, len(audio) / rate - EXCERPT))
    return audio[round(start * rate) :][: round(EXCERPT * rate)]


def recording_moments(
    scored: ScoredRecordings, tables: Mapping[str, pd.DataFrame], plan: Plan, rate: int,
    features: int, n: int,
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:  # fmt: skip
    """Select top moments in recordings with the concept, of the best `features` of each table.

    Returns rows of `MOMENTS`, and excerpts by file name.
    """
    rows, excerpts, with_ = [], {}, np.flatnonzero(scored.labels)
    for name, table in tables.items():
        scores = scored.scores[name]
        best = table["feature"].head(features)
        for feature, rank, i in top_moments(scores.highest, with_, best, n):
            recording, window = scored.recordings[i], scores.window[i, feature]
            within = float(scores.seconds[i, feature])
            audio, starts, _ = read_windows(recording, plan, rate)
            # A recording shorter than the window is repeated in it.
            seconds = starts[window] + within % min(plan.seconds, recording.seconds)
            value, file = float(scores.highest[i, feature]), f"{name}-{feature}-{rank}.wav"
            excerpts[file] = excerpt(audio[window], within, rate)
            rows.append((name, feature, rank, str(recording.path), seconds, value, file))
    return pd.DataFrame(rows, columns=list(MOMENTS)), excerpts
