"""Score a steered condition against its unedited control: success, specificity, cost, intervals.

A judge's verdict is whether its probability for the concept is above a threshold. The threshold is
fixed on plain validation samples: halfway between the mean over samples that should have the
concept and the mean over samples that should not. All samples count, whatever the verdict before
the edit, and the share that another seed gives is subtracted. So regression to the mean cancels.

Judges of `CHOOSING` choose settings; all others never do, and `success` is theirs. A judge that
does not detect a concept on codec output (AUROC below `least_auroc`) has no say on it. Without any
judge a cell is not judged, and its numbers are NaN.

All intervals resample samples (or their groups) with the same draws for every method, so that
differences between methods are paired.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from musicscope.core.io import Metrics
from musicscope.core.mmd import GaussianKernel, paired_mmd
from musicscope.core.stats import Estimate, Statistic, mean_of, resample_weights
from musicscope.judges.pair import CHOOSING, least_auroc
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
    reliability: Mapping[str, Mapping[str, float]]
    """Judge -> concept -> AUROC on codec output"""
    kernel: GaussianKernel | None
    """Of the distance between sets of embeddings; None: they are all the same."""
    bootstrap: int
    seed: int
    scales: Thresholds = field(default_factory=dict)
    """Judge -> concept -> unit of `gains`, of `fix_scales`; where absent, the deviation over the
    plain pieces at hand"""

    def column(self, concept: str) -> int:
        if concept not in self.families:
            raise ValueError(
                f"the judges know no {concept!r}: known {', '.join(self.families)}; change "
                "params.steer.concepts, or define it in params.concepts and run dvc repro "
                "train_judge"
            )
        return self.families.index(concept)

    def judges(self, of: Measurement, concept: str, choosing: bool) -> list[str]:
        """Judges with a say on a concept: those that choose, or those that never do.

        A choosing judge that knows the concept always has a say: without one nothing is chosen.
        """
        least = least_auroc(concept)
        return [
            judge
            for judge in of.probabilities
            if _known(self, judge, concept) and (judge in CHOOSING) == choosing
            and (choosing or self.reliability.get(judge, {}).get(concept, 0.0) >= least)
        ]  # fmt: skip

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
            # As many digits as metrics/ keeps, so that verdicts can be had from the files again.
            thresholds.setdefault(judge, {})[concept] = float(f"{np.mean(means):.6g}")
    return thresholds


def fix_scales(
    families: Sequence[str], pairs: Mapping[str, tuple[Measurement, Measurement]]
) -> dict[str, dict[str, float]]:
    """Standard deviation of a judge over plain validation samples with and without a concept.

    Over both sides: on one alone, all pieces may sound alike, and any gain would be huge.
    """
    scales: dict[str, dict[str, float]] = {}
    for concept, sides in pairs.items():
        at = list(families).index(concept)
        for judge in sides[0].probabilities:
            values = np.concatenate([m.probabilities[judge][:, at] for m in sides])
            finite = values[np.isfinite(values)]
            scales.setdefault(judge, {})[concept] = float(finite.std()) if len(finite) else 0.0
    return scales


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


def wanted_of(
    scorer: Scorer, steered: Measurement, concept: str, direction: str, choosing: bool = False
) -> Statistic:
    """Share of samples with the wanted verdict, mean over judges with a say; NaN without any."""
    at, limits = scorer.column(concept), scorer.thresholds
    parts = [
        _is_wanted(steered.probabilities[judge][:, at], limits[judge][concept], direction)
        for judge in scorer.judges(steered, concept, choosing)
    ]
    return mean_of(np.mean(parts, 0) if parts else np.full(len(steered.ce), np.nan))


def success_of(
    scorer: Scorer, chance: Measurement, steered: Measurement, concept: str, direction: str,
    choosing: bool = False,
) -> Statistic:  # fmt: skip
    """`wanted_of` the edited samples minus that of `chance`: another seed, or plain."""
    ours, theirs = (wanted_of(scorer, m, concept, direction, choosing) for m in (steered, chance))
    return lambda weights: ours(weights) - theirs(weights)


def gains(
    scorer: Scorer, plain: Measurement, steered: Measurement, concept: str, direction: str
) -> np.ndarray:
    """Change of the judges that never choose, in their standard deviations over pieces: [n].

    Mean over these judges; NaN for silent samples, and for all if no judge has a say. So judges
    of other calibration count alike.
    """
    at, sign = scorer.column(concept), 1 if direction == "on" else -1
    parts = []
    for judge in scorer.judges(plain, concept, choosing=False):
        before, after = (m.probabilities[judge][:, at] for m in (plain, steered))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # all silent
            own = float(np.nanstd(before))
        scale = scorer.scales.get(judge, {}).get(concept, own)
        parts.append(sign * (after - before) / max(scale, 0.02))
    return np.mean(parts, 0) if parts else np.full(len(plain.ce), np.nan)


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


def leaks(plain: Measurement, steered: Measurement, column: int) -> Statistic:
    """How well other families tell edited from plain samples: |2 AUROC - 1|, mean over families.

    By SPECIFIC_JUDGE, without samples that are silent in either. Positive by chance: subtract
    what another seed gives.
    """
    before, after = (
        np.delete(m.probabilities[SPECIFIC_JUDGE], column, 1) for m in (plain, steered)
    )
    if (known := np.isfinite(before).any(0)).any():  # no judge of a defined concept: no column
        before, after = before[:, known], after[:, known]
    sounds = np.isfinite(before).all(1) & np.isfinite(after).all(1)
    gap = after[sounds, None] - before[sounds]  # [n, n, families]
    won = np.moveaxis((gap > 0) + 0.5 * (gap == 0), 2, 0)

    def statistic(weights: np.ndarray) -> np.ndarray:
        own = weights[:, sounds]
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.stack([((own @ m) * own).sum(1) for m in won]) / own.sum(1) ** 2
        return np.abs(2 * share - 1).mean(0)

    return statistic


def distances(
    scorer: Scorer, plain: Measurement, steered: Measurement
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Unbiased MMD^2 of edited from plain samples, and their similarity; see `paired_mmd`.

    A piece that is silent in either set leaves both, so both have the same number.
    """
    sounds = np.isfinite(plain.embeddings).all(1) & np.isfinite(steered.embeddings).all(1)
    groups = np.arange(len(plain.ce)) if plain.groups is None else plain.groups
    if scorer.kernel is None or len(set(groups[sounds])) < 2:
        return lambda weights: (np.full(len(weights), np.nan), np.full(len(weights), np.nan))
    sets = (m.embeddings[sounds].astype(float) for m in (plain, steered))
    values = paired_mmd(scorer.kernel, *sets, groups[sounds])
    return lambda weights: values(weights[:, sounds])


def harmonic_mean(*parts: np.ndarray) -> np.ndarray:
    """Harmonic mean of shares, each cut to 0..1: 0 where any is 0, NaN where any is unknown."""
    cut = np.clip(np.stack(parts), 0.0, 1.0)
    with np.errstate(divide="ignore"):
        return len(cut) / np.reciprocal(cut).sum(0)


def outcome(
    scorer: Scorer, plain: Measurement, steered: Measurement, concept: str, direction: str,
    again: Measurement | None = None,
) -> Metrics:  # fmt: skip
    """Compute all numbers of one condition for one request.

    * success: share with the wanted verdict by judges that never choose, minus the share of
      `again` (other noise; None: of plain). success_choosing: by those that chose. not_judged: no
      judge has a say, and success is NaN.
    * change: of the choosing judges' probability in the wanted direction; gain: `gains`.
    * others_change: mean over the other families of |mean change|. kept: 1 - `leaks`, as far as
      they exceed those of `again`.
    * distance: `distances` from plain; quality: similarity to plain. ce_cost: rise of the
      unsteered model's cross-entropy, nats per code (NaN for an audio model); spectral_cost:
      distance from plain, of an audio model; silent: share of samples.
    * headline: harmonic mean of success, kept and quality.

    The numbers of one judge are under its name. There, `moved` is the share of the samples with
    the unwanted verdict (`to_change`) that got the wanted one.
    """
    estimate, chance = scorer.estimates(plain), plain if again is None else again
    at, sign = scorer.column(concept), 1 if direction == "on" else -1
    chosen_by = scorer.judges(plain, concept, choosing=True)
    success = success_of(scorer, chance, steered, concept, direction)
    by_choosing = success_of(scorer, chance, steered, concept, direction, choosing=True)
    leak, by_chance = leaks(plain, steered, at), leaks(plain, chance, at)
    apart = distances(scorer, plain, steered)

    def kept(w: np.ndarray) -> np.ndarray:
        floor = 0.0 if again is None else by_chance(w)
        return 1 - np.maximum(leak(w) - floor, 0.0)

    def quality(w: np.ndarray) -> np.ndarray:
        return np.clip(apart(w)[1], 0.0, 1.0)

    change = nanmean_of(change_of(plain, steered, at, chosen_by, sign))
    gain = nanmean_of(gains(scorer, plain, steered, concept, direction))
    others = np.delete(family_changes(plain, steered), at)
    found: Metrics = {
        "success": estimate(success, "share"),
        "success_choosing": estimate(by_choosing, "share"),
        "not_judged": not scorer.judges(plain, concept, choosing=False),
        "change": estimate(change, "probability"),
        "gain": estimate(gain, "deviations"),
        "others_change": _mean(np.abs(others)),
        "kept": estimate(kept, "share"),
        "distance": estimate(lambda w: apart(w)[0], "MMD^2"),
        "quality": estimate(quality, "similarity"),
        "headline": estimate(
            lambda w: harmonic_mean(success(w), kept(w), quality(w)), "harmonic mean"
        ),
        **{k: estimate(mean_of(v), UNITS[k]) for k, v in steered.costs(plain).items()},
        "silent": float(np.isnan(steered.probabilities[SPECIFIC_JUDGE][:, 0]).mean()),
    }  # fmt: skip
    for judge in (j for j in plain.probabilities if _known(scorer, j, concept)):
        open_, moved = verdicts(scorer, plain, steered, concept, direction, judge)
        threshold = scorer.thresholds[judge][concept]
        shares = [
            float(_is_wanted(m.probabilities[judge][:, at], threshold, direction).mean())
            for m in (plain, steered)
        ]
        own = change_of(plain, steered, at, [judge], sign)
        found[judge] = {
            "moved": float(moved.sum() / open_.sum()) if open_.any() else float("nan"),
            "to_change": int(open_.sum()),
            "wanted_plain": shares[0],
            "wanted": shares[1],
            "change": estimate(nanmean_of(own), "probability"),
        }
    return found


def advantage(
    scorer: Scorer, plain: Measurement, first: Measurement, second: Measurement, concept: str,
    direction: str,
) -> dict[str, object]:  # fmt: skip
    """Success of the first condition minus success of the second, paired over samples."""
    gap = success_of(scorer, second, first, concept, direction)
    return scorer.estimates(plain)(gap, "share")


def all_fulfilled(
    scorer: Scorer, plain: Measurement, steered: Measurement, requests: Sequence[Request]
) -> dict[str, object]:
    """Share of samples with every request fulfilled, before and after.

    Mean over the judges that never choose and have a say on every concept; NaN without any.
    """
    estimate, fulfilled = scorer.estimates(plain), {}
    each = [scorer.judges(plain, concept, choosing=False) for concept, _ in requests]
    judges = [judge for judge in each[0] if all(judge in say for say in each)]
    for name, measured in (("all_wanted_plain", plain), ("all_wanted", steered)):
        by_judge = [
            np.all([
                _is_wanted(
                    measured.probabilities[judge][:, scorer.column(concept)],
                    scorer.thresholds[judge][concept], direction,
                )
                for concept, direction in requests
            ], axis=0)
            for judge in judges
        ]  # fmt: skip
        shares = np.mean(by_judge, 0) if judges else np.full(len(plain.ce), np.nan)
        fulfilled[name] = estimate(mean_of(shares), "share")
    return fulfilled
