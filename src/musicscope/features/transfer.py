"""Do probes carry over to sounds that they were not trained on? One family of sounds left out.

A family is the soundfont, or synthesis, that plays the concept's instrument in a clip. For each
family in train, probes are fitted and chosen without the clips in which it plays the concept. They
are tested on test clips in which it does, against test clips without the concept. The held-out
soundfont is one more family, which no clip of train has. Clips without the concept stay, and other
instruments in them may be of the family left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import pandas as pd

from musicscope.core import stats
from musicscope.core.io import Metrics
from musicscope.core.stats import Estimate
from musicscope.data.splits import HELDOUT_FONT, MAIN
from musicscope.dictionaries.codes import Pools

COMPARED = ("sae", "dense", "logmel")
"""Representations that are probed with a family left out."""
BASELINE = "logmel"
FEWEST = 4
"""A family needs min_positive // FEWEST clips with the concept in test, and the rest in train and
in validation, to count for a concept."""


class Resamples(Protocol):
    """What is used of `probes.Evaluator`."""

    sets: dict[str, np.ndarray]
    groups: np.ndarray
    weights: dict[str, np.ndarray]

    def resample(self, groups: np.ndarray) -> np.ndarray: ...  # noqa: D102


def sounds_of(rows: pd.DataFrame, concepts: Sequence[str]) -> np.ndarray | None:
    """Family of sounds that plays each concept, str [clips, concepts]; None if not known."""
    columns = [f"sound_{concept}" for concept in concepts]
    if not set(columns) <= set(rows):
        return None
    return rows[columns].to_numpy(str)


def _aurocs(
    scores: Mapping[str, np.ndarray], labels: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """AUROC [resamples] of each representation's scores [clips]."""
    return {name: stats.auroc_of(of, labels)(weights) for name, of in scores.items()}


def _with_differences(values: Mapping[str, np.ndarray], n: int) -> Metrics:
    """AUROC of each representation, and of the SAE minus each other, from [1 + resamples]."""
    named = dict(values)
    if "sae" in values:
        named |= {f"sae_minus_{k}": values["sae"] - v for k, v in values.items() if k != "sae"}
    return {
        name: Estimate.from_resamples(float(v[0]), v[1:], n, "AUROC").as_dict()
        for name, v in named.items()
    }


def mean_over_concepts(
    evaluate: Resamples, fits: Mapping[str, np.ndarray], labels: np.ndarray
) -> Metrics:
    """Average AUROC over concepts: {set: {"concepts": n, representation: AUROC, difference}}.

    Args:
        fits: logits [clips, concepts] by representation.
        labels: bool [clips, concepts].
    """
    result: Metrics = {}
    for name, weights in evaluate.weights.items():
        at = evaluate.sets[name]
        both = np.flatnonzero(labels[at].any(0) & ~labels[at].all(0))
        if not len(both):
            continue
        each = [
            _aurocs({k: s[at, j] for k, s in fits.items()}, labels[at, j], weights) for j in both
        ]
        means = {k: np.mean([of[k] for of in each], 0) for k in fits}
        n = len(np.unique(evaluate.groups[at]))
        result[name] = {"concepts": len(both)} | _with_differences(means, n)
    return result


def leave_one_out(
    evaluate: Resamples,
    fit: Callable[[Pools, np.ndarray], np.ndarray],
    representations: Mapping[str, Pools],
    fits: Mapping[str, np.ndarray],
    concepts: Sequence[str],
    labels: np.ndarray,
    sounds: np.ndarray,
    min_positive: int,
) -> Metrics:
    """Compute AUROC on each family of sounds with probes that never had it as the concept.

    {"concepts": {concept: {"families": {family: numbers}, "mean": numbers}}, "mean": numbers}; the
    numbers are the AUROC of `COMPARED`, and of the SAE minus the others, paired by resample. The
    means are over families, then over concepts with at least two families.

    Args:
        fit: logits [clips, n * concepts] of probes on pools, fitted and chosen on the clips that a
            bool [clips, n * concepts] keeps.
        fits: logits of the probes on all families, for the held-out soundfont.
        labels: bool [clips, concepts].
        sounds: family that plays each concept [clips, concepts].
    """
    sets, groups = evaluate.sets, evaluate.groups
    train, validation, test = (sets[name] for name in ("train", "validation", "test"))
    # One bootstrap over the compositions of both test sets, so that means over families are paired.
    items = np.concatenate([test, sets["heldout_font"]])
    weights = evaluate.resample(groups[items])
    compared = [name for name in COMPARED if name in representations]
    scores: dict[str, dict[str, np.ndarray]] = {
        HELDOUT_FONT: {name: fits[name] for name in compared}
    }
    families = [family for family in np.unique(sounds[train][labels[train]]) if family]
    if len(families):
        # All families in one call: they share inputs, and so the solver's costly parts.
        kept = np.concatenate([~(labels & (sounds == family)) for family in families], 1)
        for name in compared:
            parts = np.split(fit(representations[name], kept), len(families), axis=1)
            for family, part in zip(families, parts, strict=True):
                scores.setdefault(family, {})[name] = part
    result, means = {}, []
    for j, concept in enumerate(concepts):
        least = 1 if concept == MAIN else max(1, min_positive // FEWEST)
        found, values = {}, []
        for family, of in sorted(scores.items()):
            in_test = np.arange(len(items)) < len(test)
            inside = ~in_test if family == HELDOUT_FONT else in_test
            has = labels[items, j]
            played = has & (sounds[items, j] == family)
            use = np.flatnonzero(inside & (played | ~has))
            rest = labels[:, j] & (sounds[:, j] != family)
            counts = [int(each.sum()) for each in (inside & played, rest[train], rest[validation])]
            if min(counts) < least or not (~has[use]).any():
                continue
            aurocs = _aurocs(
                {k: s[items[use], j] for k, s in of.items()}, has[use], weights[:, use]
            )
            n = len(np.unique(groups[items[use]]))
            found[family] = {"positives": counts[0]} | _with_differences(aurocs, n)
            values.append(aurocs)
        if found:
            mean = {k: np.mean([v[k] for v in values], 0) for k in compared}
            n = len(np.unique(groups[items]))
            result[concept] = {"families": found, "mean": _with_differences(mean, n)}
            if len(found) > 1:
                means.append(mean)
    whole: Metrics = {"concepts": result}
    if means:
        over = {k: np.mean([mean[k] for mean in means], 0) for k in compared}
        n = len(np.unique(groups[items]))
        whole["mean"] = {"concepts": len(means)} | _with_differences(over, n)
    return whole
