"""All concepts of a model, from clips or folders: tables, numbers and excerpts on disk.

data/find_concept/<model>: features.parquet (dictionary, concept and the columns of
`concept_stats.COLUMNS`; of clips also test_auroc and heldout_font_auroc; all tested features, best
first), moments.parquet (concept and `concept_listening.MOMENTS`; recording is a clip's id or a
file) and the moments' WAV files, named in its column file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import soundfile

from musicscope.activations.store import ActivationStore
from musicscope.data.clips import ClipStore
from musicscope.dictionaries.codes import ClipPools, encode_clips, pool_clips
from musicscope.finder.queries import Options, Sets, concept_sets, examine, is_query
from musicscope.finder.scores import EXCERPT, MOMENTS, dictionary
from musicscope.finder.search import find_concept
from musicscope.judges.musicnn import level
from musicscope.models.registry import load_model


@dataclass(frozen=True)
class Subject:
    """One model: its clips, activations and dictionaries."""

    name: str
    clips: ClipStore
    store: ActivationStore
    features: Mapping[str, Any]
    """By name: TopKSAE, UniversalSAE"""
    device: str = "cpu"
    workers: int = 1


def _pools(subject: Subject, of: Any, used: np.ndarray) -> ClipPools:
    """Pools of all clips of the store; those not used are 0 and take no time."""
    encoder = dictionary(of, subject.name)
    codes = encode_clips(
        subject.store, used, encoder.encode, encoder.n_latents, subject.workers, subject.device
    )
    own, n = pool_clips(codes), len(subject.store)
    whole = []
    for array in (own.mean, own.highest, own.frame):
        full = np.zeros((n, array.shape[1]), array.dtype)
        full[used] = array
        whole.append(full)
    return ClipPools(*whole)


def _moments(
    subject: Subject, pools: ClipPools, sets: Sets, table: pd.DataFrame, features: int, n: int
) -> tuple[list[tuple], dict[int, np.ndarray]]:
    """Rows of `MOMENTS` without dictionary and file, and the audio of each."""
    clips, rows, audio = subject.clips, [], {}
    hop = clips.samples / clips.sample_rate / int(subject.store.frames[0])
    with_ = sets.train[sets.labels]
    for feature in table["feature"].head(features):
        highest = pools.highest[with_, feature]
        for rank, clip in enumerate(with_[np.argsort(-highest, kind="stable")[:n]], 1):
            if pools.highest[clip, feature] <= 0:
                break
            seconds = float(pools.frame[clip, feature] * hop)
            latest = clips.samples / clips.sample_rate - EXCERPT
            first = round(max(0.0, min(seconds - EXCERPT / 2, latest)) * clips.sample_rate)
            sound = level(clips.audio([clip]))[0][0]
            audio[len(rows)] = sound[first : first + round(EXCERPT * clips.sample_rate)]
            value = float(pools.highest[clip, feature])
            rows.append((feature, rank, str(clips.rows["id"].iloc[clip]), seconds, value))
    return rows, audio


def find_all(
    subject: Subject, section: Any, seed: int, out: Path
) -> tuple[list[pd.DataFrame], dict[str, dict[str, Any]]]:
    """Find every concept of params.find_concept and write `out`; tables and {dictionary: {concept:
    numbers}}. A concept is of clips (both sides) or of folders (both)."""
    rows = subject.clips.rows
    groups = rows["group"].to_numpy(str)
    options = Options(
        section.q, section.permutations, section.stability_draws, section.few, section.few_draws,
        section.bootstrap, seed,
    )  # fmt: skip
    sets = {
        c.name: concept_sets(rows, c.positive, c.negative)
        for c in section.concepts
        if is_query(c.positive) and is_query(c.negative)
    }
    for c in section.concepts:
        if is_query(c.positive) != is_query(c.negative):
            raise ValueError(
                f"find_concept.concepts: {c.name} compares clips with a folder; give two queries "
                "that begin with clips: or two folders"
            )
    tables, moments, metrics = [], [], {name: {} for name in subject.features}
    parts = [of.train for of in sets.values()]
    parts += [at for of in sets.values() for at, _ in of.tests.values()]
    used = np.unique(np.concatenate(parts)) if parts else np.zeros(0, int)
    for name, features in subject.features.items():
        pools = _pools(subject, features, used) if len(used) else None
        for concept, of in sets.items():
            table, found = examine(pools.mean, groups, of, options, subject.name, name, concept)
            metrics[name][concept] = found
            tables.append(table.assign(dictionary=name, concept=concept))
            own, audio = _moments(subject, pools, of, table, section.features, section.moments)
            for i, (feature, rank, *rest) in enumerate(own):
                file = f"{concept}-{name}-{feature}-{rank}.wav"
                _write(out / file, audio[i], subject.clips.sample_rate)
                moments.append((concept, name, feature, rank, *rest, file))
    model = None
    for c in section.concepts:
        if c.name in sets:
            continue
        model = model or load_model(f"data/models/{subject.name}", subject.device)
        report = find_concept(
            model, subject.features, c.positive, c.negative, subject.store.config["layer"],
            seconds=section.seconds, windows=section.windows, permutations=section.permutations,
            draws=section.stability_draws, q=section.q, audible=section.features,
            moments=section.moments, seed=seed,
        )  # fmt: skip
        print(f"{c.name}: {report.text()}")
        for name, table in report.tables.items():
            metrics[name][c.name] = {
                **{k: report.recordings[k] for k in ("with", "without")},
                "tested": len(table), "discoveries": len(report.discoveries(name)),
                "left_out": {"files": len({p.name for p in report.problems})},
                "cues": dict(report.cues),
            }  # fmt: skip
            tables.append(table.assign(dictionary=name, concept=c.name))
        for moment in report.moments.itertuples(index=False):
            file = f"{c.name}-{moment.file}"
            _write(out / file, report.excerpts[moment.file], report.rate)
            moments.append((c.name, *moment[:-1], file))
    pd.concat(tables, ignore_index=True).to_parquet(out / "features.parquet", index=False)
    frame = pd.DataFrame(moments, columns=["concept", *MOMENTS])
    frame.to_parquet(out / "moments.parquet", index=False)
    return tables, metrics


def _write(path: Path, audio: np.ndarray, rate: int) -> None:
    soundfile.write(path, np.clip(audio, -1, 1), rate, subtype="PCM_16")
