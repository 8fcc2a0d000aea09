"""Learn recipes from clips: evidence of each latent for a concept, a gate, and directions.

Train clips of the training soundfont are used; regularisation and the threshold of the gate are
chosen on validation clips. Test clips are never read.

Scores of a latent, all above 0 for evidence for the concept:

* share (SAeUron, arXiv 2501.18052): its share of the mean code with the concept minus without;
* effect: difference of the classes' mean clip averages over their pooled standard deviation;
* partial: t of the concept in a linear regression of the clip average on the labels of all
  concepts, so that those which often occur with the concept do not count;
* auroc: AUROC of the clip average minus 1/2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from scipy.signal import lfilter

from musicscope.activations.store import ActivationStore
from musicscope.core.stats import auroc_columns
from musicscope.data.clips import known_labels, main_clips
from musicscope.data.concepts import labelled
from musicscope.data.splits import label_matrix
from musicscope.data.taxonomy import FAMILIES
from musicscope.dictionaries.codes import Codes, by_batch, encode_clips, pool_clips
from musicscope.dictionaries.core import TopKSAE
from musicscope.features.association import rank_by_difference
from musicscope.features.logistic import Standardiser, fit_logistic
from musicscope.features.output_effects import TOWARD
from musicscope.steering.edit import Gate
from musicscope.steering.recipes import SCORES, Recipe

C_GRID = (1e-4, 1e-3, 1e-2, 1e-1)
DETERMINED = 1e-9
"""Power that regression on the other labels leaves of labels that they determine."""
MOMENTS = 4
"""Moments per clip at which the gate is trained, the last at its end."""


def latent_scores(
    means: np.ndarray, labels: np.ndarray, score: str, others: np.ndarray
) -> np.ndarray:
    """Compute one of `SCORES` from clip averages [clips, F] and labels [clips]: float64 [F].

    `others` [clips, m]: labels of the other families, for partial.
    """
    with_, without = means[labels].astype(np.float64), means[~labels].astype(np.float64)
    if score == "share":
        shares = [m.mean(0) / max(m.mean(0).sum(), 1e-12) for m in (with_, without)]
        return shares[0] - shares[1]
    if score == "effect":
        n, m = len(with_), len(without)
        pooled = (n * with_.var(0) + m * without.var(0)) / (n + m)
        gap = with_.mean(0) - without.mean(0)
        return np.divide(gap, np.sqrt(pooled), out=np.zeros_like(gap), where=pooled > 1e-12)
    if score == "partial":
        return _partial_t(means.astype(np.float64), labels, others)
    if score == "auroc":
        return np.nan_to_num(auroc_columns(means, labels) - 0.5)
    raise ValueError(f"score {score!r}: known {', '.join(SCORES)}")


def _partial_t(means: np.ndarray, labels: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Compute t of `labels` in least squares of each column on it, `others` and a constant."""
    # Frisch-Waugh-Lovell: regress the residuals of both sides after regression on the others.
    basis = np.column_stack([np.ones(len(labels)), others.astype(np.float64)])
    both = np.column_stack([labels.astype(np.float64), means])
    left = both - basis @ np.linalg.lstsq(basis, both, rcond=None)[0]
    own, columns = left[:, 0], left[:, 1:]
    power = own @ own
    if power < DETERMINED:
        return np.zeros(means.shape[1])  # the other labels determine it
    slope = own @ columns / power
    spare = max(1, len(labels) - np.linalg.matrix_rank(basis) - 1)
    error = np.sqrt(((columns - np.outer(own, slope)) ** 2).sum(0) / spare / power)
    return np.divide(slope, error, out=np.zeros_like(slope), where=error > 1e-12)


def _own_part(labels: np.ndarray, others: np.ndarray) -> float:
    """Compute the power that regression on `others` and a constant leaves of `labels`."""
    basis = np.column_stack([np.ones(len(labels)), others.astype(np.float64)])
    own = labels - basis @ np.linalg.lstsq(basis, labels.astype(np.float64), rcond=None)[0]
    return float(own @ own)


@dataclass(frozen=True)
class Clips:
    """Codes and activations of the train and validation clips, read once for all concepts."""

    rows: pd.DataFrame
    """Rows of the clip table, train first."""
    n_train: int
    codes: Codes
    means: np.ndarray
    """[clips, F] clip averages of the codes"""
    dense: np.ndarray
    """[clips, d] clip averages of the activations"""

    def labelled(self, concept: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return clips whose label is known, the labels, and which of them are train clips."""
        at, labels = known_labels(self.rows, concept)
        train = at < self.n_train
        for name, mask in (("train", train), ("validation", ~train)):
            if not 0 < labels[mask].sum() < mask.sum():
                raise ValueError(
                    f"{concept}: {labels[mask].sum()} of {mask.sum()} labelled {name} clips have "
                    "it, and some of both are needed: raise the number of clips in prepare_data, "
                    "label more recordings (docs/data.md), or take it out of params.steer.concepts"
                )
        return at, labels, train

    def others(self, concept: str) -> np.ndarray:
        """Return labels of the other concepts that are known for every clip, bool [clips, m].

        Those of families alone, or none, where all of them determine the concept (male and female
        voices say whether there are vocals): nothing would be left to explain.
        """
        names = [c for c in labelled(self.rows) if c != concept]
        names = [c for c in names if self.rows[f"has_{c}"].notna().all()]
        at, labels, train = self.labelled(concept)
        for kept in (names, [c for c in names if c in FAMILIES]):
            others = label_matrix(self.rows, kept)[0]
            if _own_part(labels[train], others[at[train]]) >= DETERMINED:
                return others
        return np.zeros((len(self.rows), 0), bool)


def read_clips(
    store: ActivationStore, sae: TopKSAE, rows: pd.DataFrame, workers: int = 1, device: str = "cpu"
) -> Clips:
    """Encode train and validation clips (main font, single clips) of an ActivationStore."""
    train, validation = main_clips(rows, "train"), main_clips(rows, "validation")
    used = np.concatenate([train, validation])
    codes = encode_clips(store, used, sae.encode, sae.n_latents, workers, device)

    def average(batch: list[int]) -> np.ndarray:
        return np.stack([store.clip(i).mean(0, dtype=np.float64) for i in batch])

    dense = np.concatenate(by_batch(average, used, workers)).astype(np.float32)
    table = rows.iloc[used].reset_index(drop=True)
    return Clips(table, len(train), codes, pool_clips(codes).mean, dense)


def active_means(codes: Codes, clips: np.ndarray) -> np.ndarray:
    """Mean value [F] of each latent over frames of `clips` (bool) where it fires; 0 if never."""
    matrix = codes.matrix
    chosen = np.repeat(clips[codes.owner], np.diff(matrix.indptr))
    at = matrix.indices[chosen]
    total = np.bincount(at, matrix.data[chosen], codes.n_latents)
    return total / np.maximum(np.bincount(at, minlength=codes.n_latents), 1)


def best_logistic(
    x: np.ndarray, labels: np.ndarray, train: np.ndarray
) -> tuple[np.ndarray, float, float]:
    """Fit a logistic probe: weights [p] and intercept on x [n, p], and the validation AUROC.

    It is fitted on standardised rows of `train` (bool). AUROC on the other rows chooses C.
    """
    standardise = Standardiser.fit(x[train])
    weights, intercepts = fit_logistic(
        standardise(x[train]), np.repeat(labels[train, None], len(C_GRID), 1), np.array(C_GRID)
    )
    quality = auroc_columns(standardise(x[~train]) @ weights + intercepts, labels[~train])
    best = int(np.nan_to_num(quality).argmax())
    raw = np.zeros(x.shape[1])
    raw[standardise.columns] = weights[:, best] / standardise.std
    bias = intercepts[best] - raw[standardise.columns] @ standardise.mean
    return raw, float(bias), float(quality[best])


def best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """Choose the threshold with the highest balanced accuracy of score > threshold."""
    values = np.unique(scores)
    cuts = (values[1:] + values[:-1]) / 2 if len(values) > 1 else values
    hits = (scores[labels, None] > cuts).mean(0) + (scores[~labels, None] <= cuts).mean(0)
    return float(cuts[hits.argmax()])


def learn_gate(
    clips: Clips, concept: str, n_features: int, seconds: float, frame_rate: float
) -> tuple[Gate, float]:
    """Learn a gate on the `n_features` most predictive latents; also return its validation AUROC.

    It is trained on the statistic that it reads in generation: running means of the values, at
    `MOMENTS` moments per clip. Its threshold is the best on validation clips.
    """
    at, labels, train = clips.labelled(concept)
    order, _ = rank_by_difference(clips.means[at[train]], labels[train])
    features = np.sort(order[:n_features])
    values = clips.codes.matrix[:, features].toarray().astype(np.float64)
    ends = np.cumsum(clips.codes.frames)
    decay = math.exp(-1 / (seconds * frame_rate))
    seen = []
    for clip in at:
        own = values[ends[clip] - clips.codes.frames[clip] : ends[clip]]
        means = lfilter([1 - decay], [1, -decay], own, axis=0)
        means /= (1 - decay ** np.arange(1, len(own) + 1))[:, None]
        seen.append(means[[(i + 1) * len(own) // MOMENTS - 1 for i in range(MOMENTS)]])
    x = np.concatenate(seen)
    each, learns = np.repeat(labels, MOMENTS), np.repeat(train, MOMENTS)
    weights, bias, quality = best_logistic(x, each, learns)
    bias -= best_threshold((x @ weights + bias)[~learns], each[~learns])
    gate = Gate(tuple(features.tolist()), tuple(weights.tolist()), float(bias), seconds)
    return gate, quality


def output_scores(
    effects: pd.DataFrame | None, concept: str, latents: int
) -> dict[str, np.ndarray]:
    """Read `recipes.OUTPUT_SCORES` [F] from a table of effects, as far as it has them.

    ValueError for a table of another number of latents; one without rows (audio models) has none.
    """
    if effects is None or effects.empty:
        return {}
    if len(effects) != latents:
        raise ValueError(
            f"output effects of {len(effects)} latents for a dictionary of {latents}: run dvc "
            "repro measure_effects"
        )
    columns = {"output": "kl", "toward": f"{TOWARD}{concept}"}
    return {k: effects[c].to_numpy(np.float64) for k, c in columns.items() if c in effects}


def learn_recipe(
    clips: Clips, concept: str, *, model: str, slot: str, layer: str, sae: str, target: str,
    both_sides: str, gate_features: int, gate_seconds: float, frame_rate: float,
    effects: pd.DataFrame | None = None, returning: np.ndarray | None = None, n_features: int = 1,
) -> tuple[Recipe, dict[str, float]]:  # fmt: skip
    """Learn the recipe of a concept; also return the validation AUROC of its gate and its probe.

    `effects`: table of `features.output_effects`, whose KL and pull become output scores.

    Only latents of `returning` [F] bool are edited, if by every score at least `n_features` of them
    have evidence for the concept; None: all.
    """
    at, labels, train = clips.labelled(concept)
    learns = at[train]
    known = labels[train]
    sides = {"with": learns[known], "without": learns[~known]}
    others = clips.others(concept)[learns]
    statistics = {s: latent_scores(clips.means[learns], known, s, others) for s in SCORES}
    for side, members in sides.items():
        mask = np.zeros(len(clips.rows), bool)
        mask[members] = True
        statistics[f"mean_{side}"] = clips.means[members].mean(0, dtype=np.float64)
        statistics[f"active_{side}"] = active_means(clips.codes, mask)
    statistics |= output_scores(effects, concept, clips.codes.n_latents)
    difference = clips.dense[sides["with"]].mean(0) - clips.dense[sides["without"]].mean(0)
    weights, _, probe_auroc = best_logistic(clips.dense[at], labels, train)
    probe = weights * np.linalg.norm(difference) / max(np.linalg.norm(weights), 1e-12)
    gate, gate_auroc = learn_gate(clips, concept, gate_features, gate_seconds, frame_rate)

    def tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        return {k: torch.from_numpy(np.asarray(v, np.float32)) for k, v in arrays.items()}

    recipe = Recipe(
        model, slot, layer, sae, concept, target, both_sides, tensors(statistics),
        tensors({"difference": difference, "probe": probe}), gate,
    )  # fmt: skip
    if returning is not None:
        stable = replace(recipe, pool=torch.from_numpy(returning.copy()))
        if min(len(stable.ranked(score)) for score in SCORES) >= n_features:
            recipe = stable
    return recipe, {"gate_auroc": gate_auroc, "probe_auroc": probe_auroc}
