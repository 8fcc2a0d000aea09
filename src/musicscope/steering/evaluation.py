"""Score a steered condition against its unedited control: success, specificity, cost, intervals.

A judge's verdict is whether its probability for the concept is above a threshold. The threshold is
fixed on plain validation samples: halfway between the mean over samples that should have the
concept and the mean over samples that should not. All intervals resample samples (or their groups)
with the same draws for every method, so that differences between methods are paired.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from musicscope.core.io import Metrics
from musicscope.core.stats import Estimate, Statistic, mean_of, resample_weights
from musicscope.steering.conditions import Measurement
from musicscope.steering.methods import Request

SPECIFIC_JUDGE = "family_judge"
"""The judge that knows all families."""
UNITS = {"ce_cost": "nats per code", "spectral_cost": "spectral distance"}
Thresholds = Mapping[str, Mapping[str, float]]
"""Judge -> concept -> probability above which it counts as present (NaN: unknown to the judge)."""


@dataclass(frozen=True)
class Scorer:
    """Settings shared by all outcomes."""

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

    def estimates(self, plain: Measurement) -> Callable[[Statistic, str], dict[str, object]]:
        """Make a function of statistic and unit that gives the estimate; NaN if undefined.

        All statistics get the same resamples of the samples of `plain` or of their groups.
        """
        n = len(plain.ce)
        groups = range(n) if plain.groups is None else plain.groups
        weights = resample_weights(groups, self.bootstrap, self.seed)
        weights = np.concatenate([np.ones((1, n)), weights])

        def estimate(statistic: Statistic, unit: str) -> dict[str, object]:
            values = statistic(weights)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # no resample has a value
                found = Estimate.from_resamples(values[0], values[1:], len(set(groups)), unit)
            return found.as_dict()

        return estimate


def fix_thresholds(
    families: Sequence[str], pairs: Mapping[str, tuple[Measurement, Measurement]]
) -> dict[str, dict[str, float]]:
    """Compute thresholds from plain validation samples: concept -> (with it, without)."""
    thresholds: dict[str, dict[str, float]] = {}
    for concept, (named, absent) in pairs.items():
        at = list(families).index(concept)
        for judge in named.probabilities:
            means = [_mean(m.probabilities[judge][:, at]) for m in (named, absent)]
            thresholds.setdefault(judge, {})[concept] = float(np.mean(means))
    return thresholds


def _mean(values: np.ndarray) -> float:
    """Mean of finite values; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _known(scorer: Scorer, judge: str, concept: str) -> bool:
    return bool(np.isfinite(scorer.thresholds[judge][concept]))


def _is_wanted(probability: np.ndarray, threshold: float, direction: str) -> np.ndarray:
    """Whether the verdict is the wanted one; never for a silent sample (NaN)."""
    with np.errstate(invalid="ignore"):
        return probability > threshold if direction == "on" else probability <= threshold


def verdicts(
    scorer: Scorer,
    plain: Measurement,
    steered: Measurement,
    concept: str,
    direction: str,
    judge: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Find samples with the unwanted verdict, and which of them got the wanted one: bool [n] each.

    Samples that are silent without the edit have no verdict to change.
    """
    at, threshold = scorer.column(concept), scorer.thresholds[judge][concept]
    before, after = (m.probabilities[judge][:, at] for m in (plain, steered))
    open_ = np.isfinite(before) & ~_is_wanted(before, threshold, direction)
    return open_, open_ & _is_wanted(after, threshold, direction)


def success_of(
    scorer: Scorer, plain: Measurement, steered: Measurement, concept: str, direction: str
) -> Statistic:
    """Share of samples with the unwanted verdict that get the wanted one.

    Mean over the judges that know the concept, as a `Statistic` of weights over samples.
    """
    parts = [
        verdicts(scorer, plain, steered, concept, direction, judge)
        for judge in plain.probabilities
        if _known(scorer, judge, concept)
    ]

    def statistic(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # no judge had a sample to change
            shares = [(weights @ moved) / (weights @ open_) for open_, moved in parts]
            return np.nanmean(shares, axis=0) if shares else np.full(len(weights), np.nan)

    return statistic


def change_of(
    plain: Measurement, steered: Measurement, column: int, judges: Sequence[str], sign: int
) -> np.ndarray:
    """sign * (steered - plain) probability, mean over judges where both are finite: [n] or NaN."""
    changes = [
        sign * (steered.probabilities[j][:, column] - plain.probabilities[j][:, column])
        for j in judges
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(changes, axis=0) if changes else np.full(len(plain.ce), np.nan)


def nanmean_of(values: np.ndarray) -> Statistic:
    """Weighted mean of the finite values among [n]."""
    finite = np.isfinite(values)
    if finite.all():
        return mean_of(values)
    filled = np.where(finite, values, 0.0)

    def statistic(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return (weights @ filled) / (weights @ finite)

    return statistic


def family_changes(plain: Measurement, steered: Measurement) -> np.ndarray:
    """Mean change of every family's probability by SPECIFIC_JUDGE: [families]."""
    change = steered.probabilities[SPECIFIC_JUDGE] - plain.probabilities[SPECIFIC_JUDGE]
    return np.array([_mean(column) for column in change.T])


def quality(
    scorer: Scorer, plain: Measurement, steered: Measurement, estimate: Callable
) -> dict[str, object]:
    """Compute the costs of an edit.

    ce_cost: rise of the unsteered model's cross-entropy, nats per code (NaN for an audio model);
    spectral_cost: distance from plain, of an audio model; silent: share of samples; frechet:
    distance of musicnn embeddings from plain. For so few samples the latter is above 0 by chance:
    compare it with reseed. `estimate` is that of `Scorer.estimates`.
    """
    finite = [m.embeddings[np.isfinite(m.embeddings).all(1)] for m in (plain, steered)]
    enough = min(map(len, finite)) > 1
    costs = {k: estimate(mean_of(v), UNITS[k]) for k, v in steered.costs(plain).items()}
    return costs | {
        "frechet": float(scorer.frechet(*finite)) if enough else float("nan"),
        "silent": float(np.isnan(steered.probabilities[SPECIFIC_JUDGE][:, 0]).mean()),
    }


def outcome(
    scorer: Scorer, plain: Measurement, steered: Measurement, concept: str, direction: str
) -> Metrics:
    """Compute all numbers of one condition for one request.

    success: see `success_of`; wanted (wanted_plain): share of all samples with the wanted verdict
    after (before) the edit; change: of the judges' probability in the wanted direction;
    others_change: mean over the other families of |mean change|; and `quality`. The numbers of one
    judge are under its name.
    """
    estimate = scorer.estimates(plain)
    at, sign = scorer.column(concept), 1 if direction == "on" else -1
    judges = [j for j in plain.probabilities if _known(scorer, j, concept)]
    success = success_of(scorer, plain, steered, concept, direction)
    change = nanmean_of(change_of(plain, steered, at, judges, sign))
    others = np.delete(family_changes(plain, steered), at)
    found: Metrics = {
        "success": estimate(success, "share"), "change": estimate(change, "probability"),
        "others_change": _mean(np.abs(others)), **quality(scorer, plain, steered, estimate),
    }  # fmt: skip
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
            "change": estimate(nanmean_of(own), "probability"),
        }
    found["wanted"] = _mean(np.array([found[j]["wanted"] for j in judges]))
    found["wanted_plain"] = _mean(np.array([found[j]["wanted_plain"] for j in judges]))
    return found


def advantage(
    scorer: Scorer,
    plain: Measurement,
    first: Measurement,
    second: Measurement,
    concept: str,
    direction: str,
) -> dict[str, object]:
    """Success of the first condition minus success of the second, paired over samples."""
    a, b = (success_of(scorer, plain, m, concept, direction) for m in (first, second))
    return scorer.estimates(plain)(lambda w: a(w) - b(w), "share")


def all_fulfilled(
    scorer: Scorer, plain: Measurement, steered: Measurement, requests: Sequence[Request]
) -> dict[str, object]:
    """Share of samples with every request fulfilled by SPECIFIC_JUDGE, before and after."""
    estimate, fulfilled = scorer.estimates(plain), {}
    for name, measured in (("all_wanted_plain", plain), ("all_wanted", steered)):
        wanted = [
            _is_wanted(
                measured.probabilities[SPECIFIC_JUDGE][:, scorer.column(concept)],
                scorer.thresholds[SPECIFIC_JUDGE][concept],
                direction,
            )
            for concept, direction in requests
        ]
        fulfilled[name] = estimate(mean_of(np.all(wanted, axis=0)), "share")
    return fulfilled
