"""Whole curves instead of single settings; what the judges hear in plain music.

Trade-off and dose are measured on validation prompts with all settings that the search tries, by
judges that never choose (`evaluation.gains`). The null of the dose is measured on test prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import rankdata

from musicscope.core.io import Metrics
from musicscope.core.stats import Estimate, Statistic, auroc_of, estimate
from musicscope.steering.conditions import AGAIN, Measurement, draw_of
from musicscope.steering.evaluation import Scorer, distances, gains, nanmean_of
from musicscope.steering.methods import Request
from musicscope.steering.recipes import Settings

MONOTONE = 0.8
"""Rank correlation of dose and gain above which a prompt counts as monotone."""
Tried = Sequence[tuple[Settings, Measurement]]
"""Settings of one method and their validation samples."""


# --- gain against distance --------------------------------------------------------------------


def envelope(
    scorer: Scorer, plain: Measurement, tried: Tried, request: Request, most: float
) -> tuple[Statistic, Statistic]:
    """Best gain within a distance, for one method: mean over distances 0 to `most`, and at `most`.

    With no setting within a distance the gain is 0: the music is left alone. Settings count by
    their own distance, so methods meet at equal distance whatever their strengths mean.
    """
    parts = [
        (nanmean_of(gains(scorer, plain, m, *request)), distances(scorer, plain, m))
        for _, m in tried
    ]

    def steps(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        gain = np.stack([g(weights) for g, _ in parts], 1)
        far = np.stack([d(weights)[0] for _, d in parts], 1)
        order = np.argsort(np.clip(np.nan_to_num(far, nan=np.inf), 0, None), axis=1)
        far, gain = (np.take_along_axis(x, order, 1) for x in (np.clip(far, 0, None), gain))
        zero = np.zeros((len(weights), 1))
        best = np.maximum.accumulate(np.concatenate([zero, gain], 1), axis=1)
        return np.concatenate([zero, far], 1), best

    def area(weights: np.ndarray) -> np.ndarray:
        far, best = steps(weights)
        ends = np.clip(np.nan_to_num(far, nan=np.inf), 0, most)
        widths = np.diff(np.concatenate([ends, np.full((len(ends), 1), most)], 1), axis=1)
        return (widths * best).sum(1) / most

    def at_most(weights: np.ndarray) -> np.ndarray:
        far, best = steps(weights)
        last = np.maximum((far <= most).sum(1) - 1, 0)
        return np.take_along_axis(best, last[:, None], 1)[:, 0]

    return area, at_most


# --- dose -------------------------------------------------------------------------------------


def slope_of(strengths: np.ndarray, by_dose: np.ndarray) -> Statistic:
    """Least-squares slope of gains [doses, n] on strength with an intercept per prompt.

    Every prompt has every dose, so this within-prompt slope equals that of a mixed model with
    random intercepts. Resampling prompts gives its interval. Dose 0 is the unedited piece.
    """
    doses = np.concatenate([[0.0], strengths])
    centred = doses - doses.mean()
    filled = np.concatenate([np.zeros((1, by_dose.shape[1])), by_dose])
    return nanmean_of(centred @ filled / (centred @ centred))


def monotone_share(strengths: np.ndarray, by_dose: np.ndarray) -> float:
    """Share of prompts whose gain rises with the dose: rank correlation above `MONOTONE`."""
    doses = rankdata(np.concatenate([[0.0], strengths]))
    ranks = rankdata(np.concatenate([np.zeros((1, by_dose.shape[1])), by_dose]), axis=0)
    centred, doses = ranks - ranks.mean(0), doses - doses.mean()
    norms = np.sqrt((centred**2).sum(0) * (doses @ doses))
    heard = np.isfinite(by_dose).all(0) & (norms > 0)
    correlation = np.divide(doses @ centred, norms, out=np.zeros(len(norms)), where=heard)
    return float((correlation > MONOTONE).mean())


def curves(
    scorer: Scorer, plain: Measurement, tried: Mapping[str, Tried],
    chosen: Mapping[str, Settings], request: Request, most: float,
) -> Metrics:  # fmt: skip
    """Compute for every searched method the trade-off up to distance `most`, and the dose response.

    area, at_budget: `envelope`; slope: `slope_of`; smoothness: standard deviation of successive
    gains along the doses, the lower the smoother; monotone_share. The dose response is that of the
    settings that differ from the chosen ones in strength only. area_minus: area of sae minus
    another's, paired over prompts.
    """
    judge, found, areas = scorer.estimates(plain), {}, {}
    for method, own in tried.items():
        area, at_most = envelope(scorer, plain, own, request, most)
        areas[method] = area
        at = {**vars(chosen[method]), "strength": 0.0}
        doses = sorted(
            ((s.strength, m) for s, m in own if {**vars(s), "strength": 0.0} == at),
            key=lambda pair: pair[0],
        )
        strengths = np.array([strength for strength, _ in doses])
        by_dose = np.stack([gains(scorer, plain, m, *request) for _, m in doses])
        heard = bool(scorer.judges(plain, request[0], choosing=False))
        means = [nanmean_of(row)(np.ones((1, len(row))))[0] for row in by_dose]
        found[method] = {
            "settings": len(own),
            "doses": len(doses),
            "area": judge(area, "deviations"),
            "at_budget": judge(at_most, "deviations"),
            "slope": judge(slope_of(strengths, by_dose), "deviations per strength"),
            "smoothness": float(np.std(np.diff([0.0, *means]))),
            "monotone_share": monotone_share(strengths, by_dose) if heard else float("nan"),
        }
    if "sae" in areas:
        found["area_minus"] = {
            method: judge(lambda w, theirs=theirs: areas["sae"](w) - theirs(w), "deviations")
            for method, theirs in areas.items() if method != "sae"
        }  # fmt: skip
    return found


def null_slopes(
    scorer: Scorer, plain: Measurement, measured: Mapping[str, Measurement], strength: float,
    request: Request, batch: int,
) -> Metrics:  # fmt: skip
    """Compare the slope of the latents with random controls, each a draw per prompt.

    The slope has two doses, 0 and `strength`: gain per unit of strength on test prompts. Per
    control: slope; draws; spread and highest of the draws' means; sae_minus, paired over prompts.
    """
    judge = scorer.estimates(plain)

    def slopes(method: str) -> np.ndarray:
        return gains(scorer, plain, measured[method], *request) / strength

    found: Metrics = {"sae": {"slope": judge(nanmean_of(slopes("sae")), "deviations per strength")}}
    for method in ("random_feature", "random_direction"):
        own = slopes(method)
        draws = draw_of(np.arange(len(own)), batch)
        means = np.array([
            own[(draws == d) & np.isfinite(own)].mean()
            for d in np.unique(draws[np.isfinite(own)])
        ])  # fmt: skip
        found[method] = {
            "slope": judge(nanmean_of(own), "deviations per strength"),
            "draws": len(means) if len(means) else len(np.unique(draws)),
            "spread": float(means.std(ddof=1)) if len(means) > 1 else float("nan"),
            "highest": float(means.max()) if len(means) else float("nan"),
            "sae_minus": judge(nanmean_of(slopes("sae") - own), "deviations per strength"),
        }
    return found


# --- judges on generated music ----------------------------------------------------------------


def noise_floor(scorer: Scorer, plains: Sequence[Measurement], concept: str) -> Metrics:
    """How much a judge moves when it hears one piece again, by judge and kind of repetition.

    deviation: standard deviation of the change of probability; flipped: share of changed verdicts.
    """
    at, found = scorer.column(concept), {}
    heard = [(m, m.again) for m in plains if m.again is not None]
    for number, judge in enumerate(plains[0].probabilities):
        threshold = scorer.thresholds[judge][concept]
        if not np.isfinite(threshold) or not heard:
            continue
        found[judge] = {}
        for kind, name in enumerate(AGAIN):
            second = np.concatenate([again[kind, number, :, at] for _, again in heard])
            first = np.concatenate(
                [m.probabilities[judge][: again.shape[2], at] for m, again in heard]
            )
            both = np.isfinite(first) & np.isfinite(second)
            first, second = first[both], second[both]
            flipped = (first > threshold) != (second > threshold)
            found[judge][name] = {
                "pieces": len(first),
                "deviation": float(np.sqrt(np.mean((second - first) ** 2))) if len(first) else None,
                "flipped": float(flipped.mean()) if len(first) else None,
            }
    return found


def grounding(scorer: Scorer, named: Measurement, absent: Measurement, concept: str) -> Metrics:
    """How well judges tell plain pieces whose prompts name a concept from pieces that do not.

    AUROC per judge, and `auroc`: their mean over the judges with a say that never choose; if none
    has one, over all judges that know the concept. It needs a model that heeds the prompt and a
    judge that hears it: it is a lower bound of both.
    """
    at, parts, found = scorer.column(concept), {}, {}
    labels = np.repeat([True, False], [len(named.ce), len(absent.ce)])
    for judge in named.probabilities:
        scores = np.concatenate([m.probabilities[judge][:, at] for m in (named, absent)])
        if np.isfinite(scores).any():
            # A silent piece has nothing of the concept.
            parts[judge] = auroc_of(np.nan_to_num(scores, nan=-1.0), labels)
            found[judge] = float(parts[judge](np.ones((1, len(labels))))[0])
    say = [j for j in scorer.judges(named, concept, choosing=False) if j in parts] or list(parts)
    if not say:
        return {"auroc": Estimate(np.nan, n=len(labels), unit="AUROC").as_dict()}
    mean = estimate(
        lambda w: np.mean([parts[j](w) for j in say], 0), np.arange(len(labels)),
        scorer.bootstrap, scorer.seed, "AUROC",
    )  # fmt: skip
    return {"auroc": mean.as_dict(), "judges": found}
