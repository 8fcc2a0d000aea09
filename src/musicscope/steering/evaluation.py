"""What a steered cell is worth beside its plain twin: success, specificity, quality, intervals.

A judge's verdict is whether its probability for the concept is above a threshold fixed on
validation prompts: halfway between its mean over pieces whose prompts name the concept and over
pieces whose prompts do not. All intervals resample prompts, the same draws for every method, so
that differences between methods are paired.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from musicscope.core.stats import Statistic, mean_of, percentile_interval, resample_weights
from musicscope.steering.conditions import Measured

SPECIFIC_JUDGE = "family_judge"
"""The judge that knows all families, by which their changes are measured."""
Thresholds = Mapping[str, Mapping[str, float]]
"""Judge -> concept -> probability above which it counts as present (NaN: it does not know it)."""


@dataclass(frozen=True)
class Scorer:
    """What all outcomes share."""

    families: tuple[str, ...]
    thresholds: Thresholds
    frechet: Callable[[np.ndarray, np.ndarray], float]
    bootstrap: int
    seed: int

    def column(self, concept: str) -> int:
        if concept not in self.families:
            raise ValueError(
                f"the judges know no {concept!r}: known {', '.join(self.families)}; change "
                "params.steer.concepts or retrain the judges"
            )
        return self.families.index(concept)

    def weights(self, pieces: Measured) -> np.ndarray:
        """Ones, then the resamples of pieces, or of their groups: [1 + bootstrap, n]."""
        n = len(pieces.ce)
        groups = range(n) if pieces.groups is None else pieces.groups
        return np.concatenate(
            [np.ones((1, n)), resample_weights(groups, self.bootstrap, self.seed)]
        )


def fix_thresholds(
    families: Sequence[str], pairs: Mapping[str, tuple[Measured, Measured]]
) -> dict[str, dict[str, float]]:
    """Thresholds from plain validation cells: concept -> (named in the prompts, not named)."""
    found: dict[str, dict[str, float]] = {}
    for concept, (named, absent) in pairs.items():
        at = list(families).index(concept)
        for judge in named.probabilities:
            means = [_mean(m.probabilities[judge][:, at]) for m in (named, absent)]
            found.setdefault(judge, {})[concept] = float(np.mean(means))
    return found


def _mean(values: np.ndarray) -> float:
    """Mean over what is not NaN; NaN if nothing is."""
    heard = values[np.isfinite(values)]
    return float(heard.mean()) if len(heard) else float("nan")


def _known(scorer: Scorer, judge: str, concept: str) -> bool:
    return bool(np.isfinite(scorer.thresholds[judge][concept]))


def _is_wanted(probability: np.ndarray, threshold: float, direction: str) -> np.ndarray:
    """Whether the verdict is the wanted one; a silent piece (NaN) never is."""
    with np.errstate(invalid="ignore"):
        return probability > threshold if direction == "on" else probability <= threshold


def verdicts(
    scorer: Scorer, plain: Measured, steered: Measured, concept: str, direction: str, judge: str
) -> tuple[np.ndarray, np.ndarray]:
    """Which pieces had the unwanted verdict, and which of those got the wanted one: bool [n] each.

    Pieces whose plain twin is silent have no verdict to change.
    """
    at, threshold = scorer.column(concept), scorer.thresholds[judge][concept]
    before, after = (m.probabilities[judge][:, at] for m in (plain, steered))
    open_ = np.isfinite(before) & ~_is_wanted(before, threshold, direction)
    return open_, open_ & _is_wanted(after, threshold, direction)


def success_of(
    scorer: Scorer, plain: Measured, steered: Measured, concept: str, direction: str
) -> Statistic:
    """Share of pieces with the unwanted verdict that get the wanted one, mean over the judges
    that know the concept, as a `Statistic` of weights over prompts."""
    parts = [
        verdicts(scorer, plain, steered, concept, direction, judge)
        for judge in plain.probabilities
        if _known(scorer, judge, concept)
    ]

    def statistic(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # no judge had a piece to change
            shares = [(weights @ moved) / (weights @ open_) for open_, moved in parts]
            return np.nanmean(shares, axis=0) if shares else np.full(len(weights), np.nan)

    return statistic


def change_of(
    plain: Measured, steered: Measured, column: int, judges: Sequence[str], sign: int
) -> np.ndarray:
    """sign * (steered - plain) probability, mean over the judges that heard both: [n] or NaN."""
    changes = [
        sign * (steered.probabilities[j][:, column] - plain.probabilities[j][:, column])
        for j in judges
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(changes, axis=0) if changes else np.full(len(plain.ce), np.nan)


def nanmean_of(values: np.ndarray) -> Statistic:
    """Weighted mean of what is not NaN among values [n]."""
    heard = np.isfinite(values)
    if heard.all():
        return mean_of(values)
    filled = np.where(heard, values, 0.0)

    def statistic(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return (weights @ filled) / (weights @ heard)

    return statistic


def entry(name: str, statistic: Statistic, weights: np.ndarray) -> dict[str, float]:
    """{name, name_ci_low, name_ci_high}; weights as `Scorer.weights`. NaN where undefined."""
    values = statistic(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        low, high = percentile_interval(values[1:])
    return {name: float(values[0]), f"{name}_ci_low": low, f"{name}_ci_high": high}


def family_changes(plain: Measured, steered: Measured) -> np.ndarray:
    """Mean change of every family's probability by the judge that knows all: [families]."""
    change = steered.probabilities[SPECIFIC_JUDGE] - plain.probabilities[SPECIFIC_JUDGE]
    return np.array([_mean(column) for column in change.T])


def quality(scorer: Scorer, plain: Measured, steered: Measured, weights: np.ndarray) -> dict:
    """ce_cost: what the unsteered model's cross-entropy rises by, nats a code; frechet: distance
    of musicnn embeddings from those of the plain pieces (compare with that of reseed, which is
    what so few pieces give by chance); silent: share of pieces. An audio model has no
    cross-entropy: ce_cost is NaN, and spectral_cost the distance from the plain pieces."""
    heard = [m.embeddings[np.isfinite(m.embeddings).all(1)] for m in (plain, steered)]
    enough = min(map(len, heard)) > 1
    return {
        **entry("ce_cost", mean_of(steered.ce - plain.ce), weights),
        "frechet": float(scorer.frechet(*heard)) if enough else float("nan"),
        "silent": float(np.isnan(steered.probabilities[SPECIFIC_JUDGE][:, 0]).mean()),
        **({} if steered.spectral is None else
           entry("spectral_cost", mean_of(steered.spectral), weights)),
    }  # fmt: skip


def outcome(
    scorer: Scorer, plain: Measured, steered: Measured, concept: str, direction: str
) -> dict[str, Any]:
    """All numbers of one method on one set of prompts.

    success: see `success_of`; wanted (and wanted_plain): share of all pieces with the wanted
    verdict after (and before); change: of the judges' probability in the wanted direction;
    others_change: mean over the other families of |mean change|; and `quality`. Per judge under
    its name.
    """
    weights = scorer.weights(plain)
    at, sign = scorer.column(concept), 1 if direction == "on" else -1
    judges = [j for j in plain.probabilities if _known(scorer, j, concept)]
    found: dict[str, Any] = entry(
        "success", success_of(scorer, plain, steered, concept, direction), weights
    )
    found |= entry("change", nanmean_of(change_of(plain, steered, at, judges, sign)), weights)
    others = np.delete(family_changes(plain, steered), at)
    found["others_change"] = _mean(np.abs(others))
    found |= quality(scorer, plain, steered, weights)
    for judge in judges:
        open_, moved = verdicts(scorer, plain, steered, concept, direction, judge)
        threshold = scorer.thresholds[judge][concept]
        shares = [
            float(_is_wanted(m.probabilities[judge][:, at], threshold, direction).mean())
            for m in (plain, steered)
        ]
        own = change_of(plain, steered, at, [judge], sign)
        found[judge] = {
            "success": float(moved.sum() / open_.sum()) if open_.any() else float("nan"),
            "to_change": int(open_.sum()),
            "wanted_plain": shares[0],
            "wanted": shares[1],
            **entry("change", nanmean_of(own), weights),
        }
    found["wanted"] = _mean(np.array([found[j]["wanted"] for j in judges]))
    found["wanted_plain"] = _mean(np.array([found[j]["wanted_plain"] for j in judges]))
    return found


def advantage(
    scorer: Scorer, plain: Measured, first: Measured, second: Measured, concept: str, direction: str
) -> dict[str, float]:
    """Success of the first method less that of the second, paired over prompts."""
    a, b = (success_of(scorer, plain, m, concept, direction) for m in (first, second))
    return entry("difference", lambda w: a(w) - b(w), scorer.weights(plain))


def all_wishes(
    scorer: Scorer, plain: Measured, steered: Measured, wishes: Sequence[tuple[str, str]]
) -> dict[str, float]:
    """Share of pieces on which the families' judge finds every wish fulfilled, before and after."""
    held = []
    for measured in (plain, steered):
        wanted = [
            _is_wanted(
                measured.probabilities[SPECIFIC_JUDGE][:, scorer.column(concept)],
                scorer.thresholds[SPECIFIC_JUDGE][concept],
                direction,
            )
            for concept, direction in wishes
        ]
        held.append(np.all(wanted, axis=0).astype(float))
    weights = scorer.weights(plain)
    return entry("all_wanted_plain", mean_of(held[0]), weights) | entry(
        "all_wanted", mean_of(held[1]), weights
    )
