"""What the features of a model do in folders of recordings: one number a recording, and moments."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from musicscope.data.sources.recordings import Problem
from musicscope.dictionaries.codes import Codes, pool_clips, to_csr
from musicscope.dictionaries.core import TopKSAE, UniversalSAE
from musicscope.finder import recordings as reading
from musicscope.finder.recordings import Plan, Recording

EXCERPT = 3.0
"""Seconds of a top moment."""
BATCH = 8
MOMENTS = ("dictionary", "feature", "rank", "recording", "seconds", "value", "file")


@dataclass(frozen=True)
class Dictionary:
    """Features of one layer of one model, by what encodes its activations."""

    encode: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    n_latents: int


def dictionary(features: TopKSAE | UniversalSAE, model: str) -> Dictionary:
    """An SAE, or a model's side of a universal SAE. ValueError if it is of other models."""
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
    """What the features of one dictionary do in n recordings."""

    mean: np.ndarray
    """[n, F] mean over the windows of a recording"""
    highest: np.ndarray
    """[n, F]"""
    window: np.ndarray
    """[n, F] the window in which it is highest"""
    seconds: np.ndarray
    """[n, F] where in that window; -1 where it never fires"""


@dataclass(frozen=True)
class Heard:
    """All usable recordings of both folders."""

    recordings: tuple[Recording, ...]
    labels: np.ndarray
    scores: Mapping[str, Scores]
    """By dictionary"""
    cues: np.ndarray
    """[n, 7] trivial cues"""


@torch.no_grad()
def score_windows(
    model: Any, layer: str, dictionaries: Mapping[str, Dictionary], audio: np.ndarray
) -> dict[str, Scores]:
    """One recording's windows [w, samples] to `Scores` of n = 1, for every dictionary."""
    pools: dict[str, list] = {name: [] for name in dictionaries}
    for start in range(0, len(audio), BATCH):
        part = audio[start : start + BATCH]
        frames = model.capture(model.encode(part, [None] * len(part)), [layer])[layer].float()
        for name, of in dictionaries.items():
            matrix = to_csr(*of.encode(frames.flatten(0, 1)), of.n_latents)
            pools[name].append(pool_clips(Codes(matrix, np.full(len(part), frames.shape[1]))))
    hop = audio.shape[1] / model.sample_rate / frames.shape[1]
    found = {}
    for name, parts in pools.items():
        mean, highest, frame = (
            np.concatenate([getattr(p, k) for p in parts]) for k in ("mean", "highest", "frame")
        )
        window = highest.argmax(0)
        at = (window, np.arange(highest.shape[1]))
        seconds = np.where(frame[at] < 0, -1.0, frame[at] * hop)
        found[name] = Scores(mean.mean(0)[None], highest[at][None], window[None], seconds[None])
    return found


def hear(
    model: Any, layer: str, dictionaries: Mapping[str, Dictionary], plan: Plan
) -> tuple[Heard, list[Problem]]:
    """All recordings of a plan, one at a time: memory does not grow with their length."""
    kept, cues, problems = [], [], []
    scores: dict[str, list[Scores]] = {name: [] for name in dictionaries}
    bar = tqdm(plan.recordings, desc="listening", unit="recording", file=sys.stderr, mininterval=1)
    for recording in bar:
        audio, _, wrong = reading.read_windows(recording, plan, model.sample_rate)
        problems += wrong
        if not len(audio):
            continue
        kept.append(recording)
        cues.append(reading.window_cues(audio, model.sample_rate))
        for name, own in score_windows(model, layer, dictionaries, audio).items():
            scores[name].append(own)
    stacked = {
        name: Scores(
            *(np.concatenate([getattr(s, k) for s in own]) for k in Scores.__annotations__)
        )
        for name, own in scores.items()
        if own
    }
    labels = np.array([r.side == reading.SIDES[0] for r in kept], bool)
    return Heard(tuple(kept), labels, stacked, np.array(cues)), problems


def top_moments(
    heard: Heard, tables: Mapping[str, pd.DataFrame], plan: Plan, rate: int, features: int, n: int
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """The `n` recordings with the concept in which each of the best features is highest, one
    moment a recording; rows of `MOMENTS`, and their audio by file name."""
    rows, audio = [], {}
    with_ = np.flatnonzero(heard.labels)
    for name, table in tables.items():
        scores = heard.scores[name]
        for feature in table["feature"].head(features):
            highest = scores.highest[with_, feature]
            for rank, i in enumerate(with_[np.argsort(-highest, kind="stable")[:n]], 1):
                if scores.highest[i, feature] <= 0:
                    break
                recording, window = heard.recordings[i], scores.window[i, feature]
                within = float(scores.seconds[i, feature])
                sound, starts, _ = reading.read_windows(recording, plan, rate)
                file = f"{name}-{feature}-{rank}.wav"
                first = round(max(0.0, min(within - EXCERPT / 2, plan.seconds - EXCERPT)) * rate)
                audio[file] = sound[window, first : first + round(EXCERPT * rate)]
                rows.append(
                    (name, feature, rank, str(recording.path),
                     starts[window] + within % min(plan.seconds, recording.seconds),
                     float(scores.highest[i, feature]), file)
                )  # fmt: skip
    return pd.DataFrame(rows, columns=list(MOMENTS)), audio
