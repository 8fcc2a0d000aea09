"""What every live latent does on test clips: the tables behind the feature pages.

data/feature_activity holds

features.parquet, one row per latent that fires and model through which it is computed:

dictionary, model, feature   `Dictionary.name`; the model whose activations give the code, ALL for a
                   crosscoder, whose code is of all models together; the latent's number
firing_rate        share of frames on which the latent is active
clips              share of clips in which it is
mean_active, highest   mean over the frames on which it is active, and the highest value
histogram          frames per equal interval of (0, highest]
nearest, nearest_cosine   latents of the same dictionary whose decoder rows are most similar (of
                   several models: the rows of all, one after the other)
concept, concept_pooling, concept_auroc, concept_heldout_auroc, concept_p   association.py; "" and
                   NaN in dictionaries that data/features/features.parquet describes

samples.parquet, one row per excerpt and model: dictionary, model, feature and

band               0 for the best clips; else the interval of the clip's highest value, from 1 (low)
rank               from 1, the best first; within a band as drawn
clip, first, frame   id of the clip, first frame of the excerpt, frame of the clip's highest value
value              that value
curve              frames of the excerpt, 255 x value / highest, uint8

dictionaries.json lists the dictionaries in order, and the clips that the numbers are of.

An excerpt of a shared code is the same for all models. Its clips are ranked by the mean over models
of value / highest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from musicscope.config.analysis import FeatureActivity, MatchFeatures
from musicscope.core.io import atomic_dir, write_json
from musicscope.core.progress import Bar
from musicscope.core.seeding import seed_for
from musicscope.data.splits import clip_sets, label_matrix, smaller_class
from musicscope.dictionaries.codes import ClipPools, Codes, pool_clips
from musicscope.features.association import Alignment, Scores, align

CHOOSE, REPORT, FONT = "validation", "test", "heldout_font"
ALL = "all"
LEVELS = 255
CONCEPT = ("concept", "concept_pooling", "concept_auroc", "concept_heldout_auroc", "concept_p")
Key = tuple[str, str]
"""Dictionary, model"""
ROWS = 1024
"""Decoder rows whose cosines are computed at once."""


@dataclass(frozen=True)
class Dictionary:
    """A dictionary to describe, and how its codes are computed."""

    kind: str
    """sae, usae or crosscoder"""
    model: str
    """The model of an SAE; "" for a shared code."""
    slot: str
    layer: str
    models: tuple[str, ...]
    """Models through which codes are computed: the SAE's, the USAE's, or `ALL`."""
    frame_rate: float
    decoder: np.ndarray
    """[F, d] in activation units"""
    codes: Callable[[np.ndarray], list[Codes]]
    """Codes of clips (positions in the clip table), one per model."""
    described: bool
    """Whether data/features/features.parquet names its concepts."""

    @property
    def name(self) -> str:
        """Such as sae-nano-small-top1 or usae-top1; part of links to pages."""
        return "-".join(filter(None, (self.kind, self.model, self.slot)))


def nearest_rows(decoder: torch.Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the rows of highest cosine to each row, itself left out: cosines and indices [F, n]."""
    unit = torch.nn.functional.normalize(decoder, dim=1)
    found = [[], []]
    for start in range(0, len(unit), ROWS):
        cosines = unit[start : start + ROWS] @ unit.T
        own = torch.arange(len(cosines))
        cosines[own, own + start] = -2
        best = cosines.topk(min(count, len(unit) - 1))
        found[0].append(best.values)
        found[1].append(best.indices)
    return torch.cat(found[0]).numpy(), torch.cat(found[1]).numpy()


def spread(rows: np.ndarray, most: int) -> np.ndarray:
    """Choose at most `most` of `rows`, evenly spaced over all."""
    places = np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int)
    return rows[places]


def histograms(codes: Codes, highest: np.ndarray, bars: int) -> np.ndarray:
    """Count frames [F, bars] per equal interval of (0, highest]."""
    m = codes.matrix
    share = m.data / np.maximum(highest[m.indices], np.finfo(np.float32).tiny)
    bar = np.clip(np.ceil(share * bars).astype(np.int64) - 1, 0, bars - 1)
    counts = np.bincount(m.indices.astype(np.int64) * bars + bar, minlength=codes.n_latents * bars)
    return counts.reshape(-1, bars)


def choose(
    shares: np.ndarray, moments: int, bands: int, per_band: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Choose excerpts from the share of each clip's highest value [clips, F] in [0, 1].

    The best clips of each latent, then in each of `bands` equal intervals of the share some of the
    other clips at random. Returns columns feature, clip, band (0: best), rank (from 1).
    """
    clips, latents = shares.shape
    order = np.argsort(-shares, axis=0, kind="stable")
    best = order[:moments]
    taken = np.zeros(shares.shape, bool)
    np.put_along_axis(taken, best, True, 0)
    chosen = [(best, np.take_along_axis(shares, best, 0) > 0, 0)]
    band_of = np.clip(np.ceil(shares * bands).astype(int), 0, bands)  # 0: does not fire
    draw = rng.random(shares.shape)
    for band in range(1, bands + 1):
        free = (band_of == band) & ~taken
        first = np.argsort(np.where(free, draw, 2.0), axis=0, kind="stable")[:per_band]
        chosen.append((first, np.take_along_axis(free, first, 0), band))
    columns: dict[str, list[np.ndarray]] = {k: [] for k in ("feature", "clip", "band", "rank")}
    for places, there, band in chosen:
        feature, rank = np.nonzero(there.T)
        columns["feature"].append(feature)
        columns["clip"].append(places[rank, feature])
        columns["band"].append(np.full(len(feature), band))
        columns["rank"].append(rank + 1)
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def curves(codes: Codes, chosen: dict[str, np.ndarray], length: int) -> list[np.ndarray]:
    """Cut the excerpts of `length` frames that begin at chosen["first"] in their clips."""
    starts = np.cumsum(codes.frames) - codes.frames
    cut: list[np.ndarray] = [np.empty(0)] * len(chosen["feature"])
    order = np.argsort(chosen["clip"], kind="stable")
    edges = np.searchsorted(chosen["clip"][order], np.arange(len(codes.frames) + 1))
    for clip, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        if low == high:
            continue
        at = order[low:high]
        columns, where = np.unique(chosen["feature"][at], return_inverse=True)
        rows = codes.matrix[starts[clip] : starts[clip] + codes.frames[clip]]
        dense = rows[:, columns].toarray().T
        for i, column in zip(at, where, strict=True):
            first = chosen["first"][i]
            cut[i] = dense[column, first : first + length].copy()
    return cut


def describe(
    one: Dictionary, coded: Sequence[Codes], pools: Sequence[ClipPools], ids: np.ndarray,
    section: FeatureActivity, seed: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:  # fmt: skip
    """Make the rows of one dictionary in features.parquet (without concepts) and samples.parquet.

    `coded`, `pools`: of the same clips, one per model; `ids` [clips] theirs.
    """
    tops = [pool.highest.max(0) for pool in pools]
    scaled = [p.highest / np.maximum(top, 1e-30) for p, top in zip(pools, tops, strict=True)]
    chosen = choose(
        np.mean(scaled, axis=0), section.moments, section.bands, section.per_band,
        np.random.default_rng(seed_for(seed, "feature_activity", one.name)),
    )  # fmt: skip
    at = chosen["clip"], chosen["feature"]
    leading = np.argmax([share[at] for share in scaled], axis=0)
    chosen["frame"] = np.stack([pool.frame[at] for pool in pools])[leading, np.arange(len(at[0]))]
    frames = coded[0].frames[chosen["clip"]]
    length = max(2, round(section.seconds * one.frame_rate))
    chosen["first"] = np.clip(chosen["frame"] - length // 2, 0, np.maximum(frames - length, 0))
    cosines, near = nearest_rows(torch.from_numpy(one.decoder.astype(np.float32)), section.nearest)
    live = np.flatnonzero(np.any([top > 0 for top in tops], axis=0))
    features, samples = [], []
    for model, codes, pool, top in zip(one.models, coded, pools, tops, strict=True):
        fired = codes.fired
        features.append(pd.DataFrame({
            "dictionary": one.name, "model": model, "feature": live,
            "firing_rate": (fired / codes.matrix.shape[0])[live],
            "clips": (pool.highest > 0).mean(0)[live],
            "mean_active": (codes.mean * codes.matrix.shape[0] / np.maximum(fired, 1))[live],
            "highest": top[live],
            "histogram": list(histograms(codes, top, section.bars)[live]),
            "nearest": list(near[live]), "nearest_cosine": list(cosines[live]),
        }))  # fmt: skip
        scale = LEVELS / np.maximum(top[chosen["feature"]], 1e-30)
        cut = curves(codes, chosen, length)
        samples.append(pd.DataFrame({
            "dictionary": one.name, "model": model,
            **{name: chosen[name] for name in ("feature", "band", "rank")},
            "clip": ids[chosen["clip"]],
            **{name: chosen[name] for name in ("first", "frame")},
            "value": pool.highest[at],
            "curve": [np.round(c * s).astype(np.uint8) for c, s in zip(cut, scale, strict=True)],
        }))  # fmt: skip
    return pd.concat(features, ignore_index=True), pd.concat(samples, ignore_index=True)


def concepts(
    scores: Mapping[Key, dict[str, Scores]], sets: Mapping[str, np.ndarray],
    rows: pd.DataFrame, names: Sequence[str], section: MatchFeatures, seed: int,
) -> dict[Key, Alignment]:  # fmt: skip
    """Align latents with the concepts `names` as match_features does, by the keys of `scores`.

    `scores`: {key: {set: pools of its clips}}; `sets`: positions of the clips. p is corrected over
    the latents of all `scores`, not those of match_features. Empty where no concept has
    section.min_clips clips of either class.
    """
    usable = [
        name for name in names
        if min(smaller_class(rows, name, sets[of]) for of in (CHOOSE, REPORT)) >= section.min_clips
    ] if scores else []  # fmt: skip
    if not usable:  # of the few clips that are looked at; match_features says so for all
        return {}
    has, labelled = label_matrix(rows, usable)
    keys = {"/".join(key): key for key in scores}
    found = align(
        {name: scores[key] for name, key in keys.items()},
        {name: has[at] for name, at in sets.items()},
        rows["group"].to_numpy(str)[sets[REPORT]],
        usable,
        section.permutations,
        seed,
        {name: labelled[at] for name, at in sets.items()},
    )
    return {keys[str(name)]: alignment for name, alignment in found.items()}


def write(
    folder: str | Path, dictionaries: Sequence[Dictionary], rows: pd.DataFrame,
    section: FeatureActivity, matching: MatchFeatures, seed: int,
    names: Sequence[str],
) -> None:  # fmt: skip
    """Write the tables of all dictionaries, atomically; of at most section.clips clips per set.

    `names`: concepts that latents of dictionaries without a feature table are compared with.
    """
    sets = {name: spread(clip_sets(rows)[name], section.clips) for name in (CHOOSE, REPORT, FONT)}
    sets = {name: clips for name, clips in sets.items() if len(clips)}
    needed = {REPORT} if all(one.described for one in dictionaries) else {CHOOSE, REPORT}
    if not needed <= set(sets):
        raise ValueError(
            "no clips in validation or test: raise prepare_data.clips (rendered clips) or "
            "prepare_data.recordings.limits (recordings)"
        )
    ids, tables, scores = rows["id"].to_numpy(str)[sets[REPORT]], [], {}
    for one in Bar(dictionaries, desc="describe features", unit="dictionaries"):
        for name in (REPORT,) if one.described else sets:
            coded = one.codes(sets[name])
            pools = [pool_clips(codes) for codes in coded]
            if name == REPORT:
                tables.append(describe(one, coded, pools, ids, section, seed))
            if not one.described:
                for model, pool in zip(one.models, pools, strict=True):
                    kinds = {"mean": pool.mean, "max": pool.highest}
                    scores.setdefault((one.name, model), {})[name] = kinds
    features, samples = (pd.concat(of, ignore_index=True) for of in zip(*tables, strict=True))
    features[list(CONCEPT[:2])], features[list(CONCEPT[2:])] = "", np.nan
    for (name, model), found in concepts(scores, sets, rows, names, matching, seed).items():
        own = (features["dictionary"] == name) & (features["model"] == model)
        number = features.loc[own, "feature"].to_numpy()
        for column in CONCEPT:
            features.loc[own, column] = getattr(found, column.removeprefix("concept_"))[number]
    listed = [
        {"name": one.name, "kind": one.kind, "model": one.model, "slot": one.slot,
         "layer": one.layer, "models": one.models, "latents": len(one.decoder),
         "frame_rate": one.frame_rate, "described": one.described}
        for one in dictionaries
    ]  # fmt: skip
    with atomic_dir(folder) as temporary:
        features.to_parquet(temporary / "features.parquet", index=False)
        samples.to_parquet(temporary / "samples.parquet", index=False)
        write_json(temporary / "dictionaries.json", {
            "dictionaries": listed, "clips": ids.tolist(), "bands": section.bands,
        })  # fmt: skip
