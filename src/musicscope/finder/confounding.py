"""Do simple cues separate the recordings with a concept from those without it?

Features that separate two folders need not follow the concept: loudness, brightness, tempo, file
type, source or style may differ between the folders as well. `measure` compares such cues with the
best feature, and warns if one of them, or all together, separate the folders as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from musicscope.core import stats
from musicscope.core.io import Metrics
from musicscope.core.seeding import seed_for
from musicscope.features.association import label_permutations
from musicscope.features.logistic import Standardiser, fit_logistic

TOGETHER = "all cues together"
MARGIN = 0.02
"""A cue that is this much below the best feature's AUROC still separates as well."""
LEVEL = 0.01
PERMUTATIONS = 99
FOLDS, C, TOLERANCE = 5, 1.0, 1e-2
"""Of the cross-validated probe on all cues."""
LEAST = 3
"""Fewest recordings with a value of a label, such as a style, for it to be a cue."""
NUMBERS, LABELS = ("tempo_bpm", "density"), ("source", "style", "artist")
"""Columns of the clip table that are cues, if it has them."""


@dataclass(frozen=True)
class Confounding:
    """How well cues separate the recordings, beside the best feature."""

    separation: Mapping[str, float]
    """AUROC of each cue in the direction that separates, and of all together out of sample."""
    p: Mapping[str, float]
    """Corrected for all of them."""
    best_feature: float
    """AUROC; NaN if no feature was tested."""

    @property
    def worst(self) -> str | None:
        """Cue that separates best among those beyond chance."""
        beyond = [name for name, p in self.p.items() if p <= LEVEL]
        return max(beyond, key=self.separation.__getitem__, default=None)

    @property
    def warns(self) -> bool:
        """Whether a cue beyond chance separates as well as the best feature."""
        worst = self.worst
        return worst is not None and not self.separation[worst] < self.best_feature - MARGIN

    def text(self) -> str:
        """One line for the user; empty if there is nothing to warn of."""
        worst = self.worst
        if worst is None or not self.warns:
            return ""
        verb = "separate" if worst == TOGETHER else "separates"
        return (
            f"warning: {worst} {verb} the two sides as well as the best feature does (AUROC "
            f"{self.separation[worst]:.2f} against {self.best_feature:.2f}); the features "
            "may follow that instead of the concept"
        )

    def as_metrics(self) -> Metrics:
        """Plain values for a metrics file or report.json; of the cues those beyond chance."""
        worst = self.worst
        return {
            "warns": self.warns, "worst": worst or "none",
            "separation": self.separation[worst] if worst else None,
            "best_feature": self.best_feature,
            "cues": {n: self.separation[n] for n, p in self.p.items() if p <= LEVEL},
        }  # fmt: skip


def indicators(name: str, values: pd.Series) -> pd.DataFrame:
    """Make a column per value of a label that `LEAST` rows have, such as ``style=waltz``."""
    counts = values.value_counts()
    wanted = sorted(str(v) for v in counts.index[counts >= LEAST] if str(v))
    text = values.astype(str)
    return pd.DataFrame({f"{name}={v}": (text == v).to_numpy(float) for v in wanted})


def known_cues(rows: pd.DataFrame) -> pd.DataFrame:
    """Take cues from the columns of a clip table, one row per clip."""
    parts = [rows[[n for n in NUMBERS if n in rows]].reset_index(drop=True).astype(float)]
    parts += [indicators(n, rows[n].reset_index(drop=True)) for n in LABELS if n in rows]
    return pd.concat(parts, axis=1).dropna(axis=1)


def measure(
    cues: pd.DataFrame,
    labels: np.ndarray,
    best_feature: float,
    seed: int,
    groups: np.ndarray | None = None,
) -> Confounding:
    """Compute the AUROC of every cue and of a cross-validated probe on all of them.

    p is the share of label permutations whose best cue separates as well.

    Args:
        cues: one row per recording; constant columns are left out.
        labels: bool [recordings].
        best_feature: AUROC of the best feature on the same recordings.
        groups: [recordings] of dependent recordings, which are permuted together.
    """
    values = cues.to_numpy(np.float64)
    varies = np.ptp(values, axis=0) > 0 if len(values) else np.zeros(values.shape[1], bool)
    values, names = values[:, varies], [n for n, kept in zip(cues, varies, strict=True) if kept]
    if not names:
        return Confounding({}, {}, best_feature)
    permuted = label_permutations(labels, groups, PERMUTATIONS, seed_for(seed, "cues"))
    targets = np.concatenate([labels[:, None], permuted], 1)
    positive, negative = int(labels.sum()), int((~labels).sum())
    sums = targets.T.astype(np.float64) @ rankdata(values, axis=0)
    auroc = (sums - positive * (positive + 1) / 2) / (positive * negative)
    separation = 0.5 + np.abs(auroc - 0.5)
    if len(names) > 1:
        units = np.arange(len(labels)) if groups is None else groups
        together = stats.auroc_columns(_out_of_sample(values, targets, units, seed), targets)
        separation, names = np.column_stack([separation, together]), [*names, TOGETHER]
    maxima = separation[1:].max(1)
    p = [(1 + (maxima >= s - 1e-9).sum()) / (1 + len(maxima)) for s in separation[0]]
    found = dict(zip(names, separation[0].tolist(), strict=True))
    return Confounding(found, dict(zip(names, map(float, p), strict=True)), best_feature)


def _out_of_sample(
    values: np.ndarray, targets: np.ndarray, units: np.ndarray, seed: int
) -> np.ndarray:
    """Logits [n, m] of probes for targets [n, m], each on rows of groups that it was not fitted on.

    Without intercepts, which would follow the share of positives in the other folds.
    """
    names, member = np.unique(units, return_inverse=True)
    order = np.random.default_rng(seed_for(seed, "folds")).permutation(len(names))
    fold = (order % min(FOLDS, len(names)))[member]
    logits = np.zeros(targets.shape)
    for k in np.unique(fold):
        fitted, rest = fold != k, fold == k
        if not (np.ptp(values[fitted], axis=0) > 0).any():
            continue
        standardise = Standardiser.fit(values[fitted])
        c = np.full(targets.shape[1], C)
        weights, _ = fit_logistic(standardise(values[fitted]), targets[fitted], c, TOLERANCE)
        logits[rest] = standardise(values[rest]) @ weights
    return np.round(logits, 6)
