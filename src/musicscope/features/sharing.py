"""Common, own, unmatched: named sets over the SAE latents of M models.

Pairs and correlations are from `matching.match_activations`: chosen on validation, scored on test.
The threshold is match_features.threshold, set in params.yaml beforehand.

silent       fires on no validation frame or on no test frame: cannot be compared.
common       one latent of each model, every two of them paired with one another, and every such
             pair's test correlation above the threshold.
positional   the same, but every pair's correlation also stays above the threshold when clips are
             re-paired to other compositions: these latents follow the position in the clip, not
             the music. They are not in `common`.
partial      (M > 2 only) matched in some other model but in no such tuple.
own_<model>  matched in no other model; *no* latent of any other model correlates above the
             threshold on test, paired or not; and reproduced: matched one to one, by the same
             rule, in a second SAE of its own model. Otherwise every accident of training would
             count as a model's own feature.
unmatched    the rest: not reproduced, or similar to a latent that is paired with another.

An own latent is missing from the *SAEs* of the other models. Their activations may still have its
direction.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from musicscope.features.matching import Match

NAMES = ("common", "positional", "partial", "own", "unmatched", "silent")
"""The sets; in metrics `own` carries the model's name."""


def common_tuples(matches: dict[tuple[str, str], Match], models: Sequence[str]) -> np.ndarray:
    """List tuples [tuples, M] of one latent per model, all paired with one another at any score."""
    first, *others = models
    columns = [np.arange(len(matches[first, others[0]].partner))]
    columns += [matches[first, other].partner for other in others]
    tuples = np.stack(columns, 1)
    whole = (tuples >= 0).all(1)
    for j, a in enumerate(others, start=1):
        for k, b in enumerate(others[j:], start=j + 1):
            whole &= matches[a, b].partner[tuples[:, j]] == tuples[:, k]
    return tuples[whole]


def tuple_scores(
    matches: dict[tuple[str, str], Match], models: Sequence[str], tuples: np.ndarray
) -> np.ndarray:
    """Compute the lowest pairwise correlation within each tuple, [2 + resamples, tuples].

    Row 0 is of re-paired clips (NaN without draws), row 1 of the data.
    """
    scores = []
    for (a, _), match in matches.items():
        r = np.concatenate([match.repaired[None], match.score[None], match.resampled])
        scores.append(r[:, tuples[:, models.index(a)]])
    return np.min(scores, 0)


def name_sets(
    matches: dict[tuple[str, str], Match],
    highest: dict[tuple[str, str], np.ndarray],
    reproduced: dict[str, np.ndarray],
    active: dict[str, np.ndarray],
    threshold: float,
) -> dict[str, np.ndarray]:
    """Name the set of each SAE latent: {model: [F] of `NAMES`}; see the module for definitions.

    `matches` [a, b] for models in order; `highest` [a, b] [F_a]: the highest test correlation of
    each latent of a with any of b, for both orders; `reproduced`, `active`: bool [F] per model.
    """
    models = list(active)
    tuples = common_tuples(matches, models)
    survives, above = tuple_scores(matches, models, tuples)[:2] > threshold
    sets = {}
    for at, model in enumerate(models):
        F = len(active[model])
        matched, similar = np.zeros(F, bool), np.zeros(F, bool)
        for (a, b), match in matches.items():
            if model in (a, b):
                score = match.score if model == a else match.inverse(F)[1]
                matched |= score > threshold
                similar |= highest[model, b if model == a else a] > threshold
        common, positional = (
            np.isin(np.arange(F), tuples[which, at])
            for which in (above & ~survives, above & survives)
        )
        own = reproduced[model] & ~matched & ~similar
        conditions = [~active[model], common, positional, matched, own]
        chosen = ["silent", "common", "positional", "partial", "own"]
        sets[model] = np.select(conditions, chosen, "unmatched")
    return sets
