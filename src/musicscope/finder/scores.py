"""Scores of features: one number per recording or clip, and the moments of the highest values."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from musicscope.activations.store import ActivationStore
from musicscope.data.clips import ClipStore
from musicscope.data.sources.recordings import Problem
from musicscope.dictionaries.codes import (
    ClipPools,
    Codes,
    Encode,
    encode_clips,
    pool_clips,
    to_csr,
)
from musicscope.dictionaries.core import TopKSAE
from musicscope.dictionaries.usae import UniversalSAE
from musicscope.finder.queries import Sets
from musicscope.finder.recordings import SIDES, Plan, Recording, read_windows, window_cues
from musicscope.judges.musicnn import level
from musicscope.models.interface import MusicModel

EXCERPT = 3.0
"""Seconds of the excerpt around a moment."""
BATCH = 8
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
        return Dictionary(lambda x: features.encode(i, x), features.n_latents)
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


@dataclass(frozen=True)
class ScoredRecordings:
    """All usable recordings of both folders."""

    recordings: tuple[Recording, ...]
    labels: np.ndarray
    scores: Mapping[str, Scores]
    """By dictionary"""
    cues: np.ndarray
    """[n, 7] trivial cues"""


@torch.no_grad()
def score_windows(
    model: MusicModel, layer: str, dictionaries: Mapping[str, Dictionary], audio: np.ndarray
) -> dict[str, Scores]:
    """Score one recording's windows [w, samples]: `Scores` of n = 1 for every dictionary."""
    pools: dict[str, list[ClipPools]] = {name: [] for name in dictionaries}
    for start in range(0, len(audio), BATCH):
        part = audio[start : start + BATCH]
        frames = model.capture(model.encode(part, [None] * len(part)), [layer])[layer].float()
        for name, of in dictionaries.items():
            matrix = to_csr(*of.encode(frames.flatten(0, 1)), of.n_latents)
            pools[name].append(pool_clips(Codes(matrix, np.full(len(part), frames.shape[1]))))
    hop = audio.shape[1] / model.sample_rate / frames.shape[1]
    scores = {}
    for name, parts in pools.items():
        mean, highest, frame = (
            np.concatenate([getattr(p, k) for p in parts]) for k in ("mean", "highest", "frame")
        )
        window = highest.argmax(0)
        at = (window, np.arange(highest.shape[1]))
        seconds = np.where(frame[at] < 0, -1.0, frame[at] * hop)
        scores[name] = Scores(mean.mean(0)[None], highest[at][None], window[None], seconds[None])
    return scores


def score_recordings(
    model: MusicModel, layer: str, dictionaries: Mapping[str, Dictionary], plan: Plan
) -> tuple[ScoredRecordings, list[Problem]]:
    """Score all recordings of a plan, one at a time: memory does not grow with their number."""
    usable, cues, problems = [], [], []
    scores: dict[str, list[Scores]] = {name: [] for name in dictionaries}
    bar = tqdm(plan.recordings, desc="listening", unit="recording", file=sys.stderr, mininterval=1)
    for recording in bar:
        audio, _, wrong = read_windows(recording, plan, model.sample_rate)
        problems += wrong
        if not len(audio):
            continue
        usable.append(recording)
        cues.append(window_cues(audio, model.sample_rate))
        for name, of in score_windows(model, layer, dictionaries, audio).items():
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
    arrays = []
    for array in (pools.mean, pools.highest, pools.frame):
        arrays.append(np.zeros((len(store), array.shape[1]), array.dtype))
        arrays[-1][used] = array
    return ClipPools(*arrays)


Read = Callable[[int, int], tuple[str, float, np.ndarray, float]]
"""(row, feature) -> recording, seconds in it, and audio around with the second of the moment."""


def top_moments(
    name: str, highest: np.ndarray, features: pd.Series, n: int, read: Read, rate: int
) -> tuple[list[tuple], dict[str, np.ndarray]]:
    """Select the `n` recordings in which each feature is highest, one moment per recording.

    `highest` [recordings, F] is of recordings with the concept. Returns rows of `MOMENTS`, for the
    dictionary `name`, and the excerpts by file name.
    """
    rows, excerpts = [], {}
    for feature in features:
        for rank, i in enumerate(np.argsort(-highest[:, feature], kind="stable")[:n], 1):
            if highest[i, feature] <= 0:
                break
            recording, seconds, audio, within = read(i, feature)
            file = f"{name}-{feature}-{rank}.wav"
            start = max(0.0, min(within - EXCERPT / 2, len(audio) / rate - EXCERPT))
            excerpts[file] = audio[round(start * rate) :][: round(EXCERPT * rate)]
            value = float(highest[i, feature])
            rows.append((name, feature, rank, recording, seconds, value, file))
    return rows, excerpts


def recording_moments(
    scored: ScoredRecordings,
    tables: Mapping[str, pd.DataFrame],
    plan: Plan,
    rate: int,
    features: int,
    n: int,
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Select top moments of the best `features` of each table; see `top_moments`."""
    with_ = np.flatnonzero(scored.labels)
    rows, excerpts = [], {}
    for name, table in tables.items():
        scores = scored.scores[name]

        def read(i: int, feature: int, scores: Scores = scores) -> tuple:
            recording, window = scored.recordings[with_[i]], scores.window[with_[i], feature]
            within = float(scores.seconds[with_[i], feature])
            audio, starts, _ = read_windows(recording, plan, rate)
            # A recording shorter than the window is repeated in it.
            seconds = starts[window] + within % min(plan.seconds, recording.seconds)
            return str(recording.path), seconds, audio[window], within

        more, audio = top_moments(
            name, scores.highest[with_], table["feature"].head(features), n, read, rate
        )
        rows += more
        excerpts |= audio
    return pd.DataFrame(rows, columns=list(MOMENTS)), excerpts


def clip_moments(
    name: str,
    clips: ClipStore,
    pools: ClipPools,
    frames: int,
    sets: Sets,
    features: pd.Series,
    n: int,
) -> tuple[list[tuple], dict[str, np.ndarray]]:
    """Select top moments in train clips with the concept, of `frames` frames each."""
    with_ = sets.train[sets.labels]
    hop = clips.samples / clips.sample_rate / frames

    def read(i: int, feature: int) -> tuple:
        seconds = float(pools.frame[with_[i], feature] * hop)
        audio = level(clips.audio([with_[i]]))[0][0]
        return str(clips.rows["id"].iloc[with_[i]]), seconds, audio, seconds

    return top_moments(name, pools.highest[with_], features, n, read, clips.sample_rate)
