"""Match sparse dictionaries one to one, with nulls: which features do two models share?

SAE against SAE of another model: Pearson correlation of two latents' activations over paired
frames. The one-to-one pairs are *chosen* on validation clips (Hungarian assignment over all
latents of both, maximising the sum) and *scored* on test clips of other compositions, so that a
pair's correlation is not inflated by having been searched for. Null: the same procedure with the
clips of one model re-paired to clips of other compositions (frame t stays frame t, so what is
common to all clips, such as their beginnings, stays in the null). A true pair whose correlation
survives re-pairing follows the position in the clip and not the music: such matches are counted
apart from the musical ones. Ceiling: the same procedure between two SAEs of one model that differ
in their seed.

SAE against USAE of one model: cosine of decoder rows, matched as in arXiv 2502.03714, 4.4. Null:
random dictionaries with the mean and covariance of the USAE decoder's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array

from musicscope.core.seeding import seed_for
from musicscope.core.stats import Estimate, resample_weights
from musicscope.dictionaries.codes import Codes
from musicscope.dictionaries.core import UniversalSAE
from musicscope.dictionaries.evaluation import random_like

CHUNK = 16384  # frames multiplied at once


@dataclass(frozen=True)
class Match:
    """One-to-one pairs between latents of a first (F1) and a second (F2) dictionary."""

    partner: np.ndarray
    """[F1] latent of the second, -1 for none; at most min(F1, F2) pairs"""
    score: np.ndarray
    """[F1] correlation on test, or cosine; NaN without a partner"""
    null: list[np.ndarray]
    """One array per draw: the scores of the null's pairs, from high to low"""
    repaired: np.ndarray
    """[F1] score of the *same* pair with clips re-paired, mean over draws; NaN without draws"""
    null_repaired: list[np.ndarray]
    """One array per draw, in the order of `null`: the null's pairs under a further re-pairing"""
    resampled: np.ndarray
    """[resamples, F1] score in each bootstrap over compositions; no rows for cosines"""
    compositions: int = 0
    """Number of test compositions that were resampled"""

    def inverse(self, latents: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`partner`, `score` and `repaired` of the second dictionary's `latents` latents."""
        has = np.flatnonzero(self.partner >= 0)
        partner, (score, repaired) = np.full(latents, -1), np.full((2, latents), np.nan)
        partner[self.partner[has]] = has
        score[self.partner[has]], repaired[self.partner[has]] = self.score[has], self.repaired[has]
        return partner, score, repaired

    def musical(self, threshold: float) -> np.ndarray:
        """[F1] matched, but at most the threshold once clips are re-paired."""
        return (self.score > threshold) & ~(self.repaired > threshold)

    def share(self, threshold: float, latents: int | None = None) -> dict[str, Any]:
        """Compute matched pairs as a share of all latents of the first dictionary, or of `latents`.

        {"matched"} and, where clips were re-paired, {"musical"}, the part that re-pairing ends:
        estimates where there are resamples, else numbers. "null_<name>": the mean over draws. Dead
        latents count as not matched.
        """
        F = latents or len(self.partner)
        parts = {"matched": np.ones(len(self.partner), bool)}
        null = {"matched": [n > threshold for n in self.null]}
        if self.null_repaired:
            parts["musical"] = ~(self.repaired > threshold)
            both = zip(null["matched"], self.null_repaired, strict=True)
            null["musical"] = [n & ~(r > threshold) for n, r in both]
        shares: dict[str, Any] = {}
        for name, part in parts.items():
            value = ((self.score > threshold) & part).sum() / F
            shares[name] = value
            if null[name]:
                shares[f"null_{name}"] = float(np.mean([draw.sum() / F for draw in null[name]]))
            if len(self.resampled):
                resampled = (self.resampled[:, part] > threshold).sum(1) / F
                estimate = Estimate.from_resamples(value, resampled, self.compositions, "share")
                shares[name] = estimate.as_dict()
        return shares


def _sums(x: csr_array) -> tuple[np.ndarray, np.ndarray]:
    """Sum and sum of squares of every column, in float64."""
    data, columns = x.data.astype(np.float64), x.shape[1]
    return np.bincount(x.indices, data, columns), np.bincount(x.indices, data * data, columns)


def _pearson(
    n: int | np.ndarray,
    sx: np.ndarray,
    sy: np.ndarray,
    sxx: np.ndarray,
    syy: np.ndarray,
    sxy: np.ndarray,
) -> np.ndarray:
    """Pearson's r from sums over n frames; 0 where either side is constant."""
    vx, vy = sxx - sx * sx / n, syy - sy * sy / n
    # A constant column leaves rounding error behind, not an exact 0.
    varies = (vx > 1e-10 * sxx) & (vy > 1e-10 * syy)
    bottom = np.sqrt(np.where(varies, vx, 1.0)) * np.sqrt(np.where(varies, vy, 1.0))
    return np.where(varies, np.clip((sxy - sx * sy / n) / bottom, -1, 1), 0.0)


def correlation(x: csr_array, y: csr_array) -> np.ndarray:
    """Correlate every column of x [N, F1] with every column of y [N, F2] (Pearson), float32.

    Rows are the same frames. Co-activation sums are CSR^T CSR products of `CHUNK` frames, added in
    float64: about N k^2 multiplications instead of N F1 F2. A constant latent has correlation 0.
    """
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"codes of {x.shape[0]} and of {y.shape[0]} frames are not paired")
    both = np.zeros((x.shape[1], y.shape[1]))
    for at in range(0, x.shape[0], CHUNK):
        a, b = (m[at : at + CHUNK].astype(np.float64) for m in (x, y))
        both += (a.T @ b).toarray()
    (sx, sxx), (sy, syy) = _sums(x), _sums(y)
    r = _pearson(x.shape[0], sx[:, None], sy, sxx[:, None], syy, both)
    return r.astype(np.float32)


def assign(scores: np.ndarray) -> np.ndarray:
    """Assign columns to rows one to one with the largest sum of scores: column [F1], -1 for none.

    Pairs that score 0 or less, such as latents that never fire, are left out.
    """
    rows, columns = linear_sum_assignment(scores, maximize=True)
    real = scores[rows, columns] > 0
    partner = np.full(len(scores), -1)
    partner[rows[real]] = columns[real]
    return partner


def pair_correlations(
    x: csr_array, y: csr_array, partner: np.ndarray, member: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Correlate each latent with its partner under each row of weights, [W, F1].

    `member` [N] is the group of each frame, `weights` [W, groups] how often a group counts. Uses
    sums per group and pair, so that frames are read once for all resamples. NaN without a partner.
    """
    rows, N = np.flatnonzero(partner >= 0), x.shape[0]
    a, b = x[:, rows].astype(np.float64), y[:, partner[rows]].astype(np.float64)
    groups = csr_array((np.ones(N), (member, np.arange(N))), shape=(weights.shape[1], N))
    terms = (a, b, a.multiply(a), b.multiply(b), a.multiply(b))
    n = weights @ np.bincount(member, minlength=weights.shape[1])
    r = np.full((len(weights), len(partner)), np.nan)
    r[:, rows] = _pearson(n[:, None], *(weights @ (groups @ t).toarray() for t in terms))
    return r


def correlations_of(x: csr_array, y: csr_array, partner: np.ndarray) -> np.ndarray:
    """Correlate each latent with its partner over all frames, [F1]; NaN without a partner."""
    return pair_correlations(x, y, partner, np.zeros(x.shape[0], np.int64), np.ones((1, 1)))[0]


def repaired_clips(groups: Sequence[str] | np.ndarray, seed: int) -> np.ndarray:
    """Give every clip [clips] the position of a clip of another group; each is used once.

    Clips are ordered by group, groups at random, and shifted cyclically by at least the size of the
    largest group.
    """
    groups, rng = np.asarray(groups), np.random.default_rng(seed)
    names, sizes = np.unique(groups, return_counts=True)
    if 2 * sizes.max() > len(groups):
        raise ValueError(
            f"composition '{names[sizes.argmax()]}' has {sizes.max()} of {len(groups)} clips: "
            "over half, so they cannot be re-paired to others; raise prepare_data.clips"
        )
    line = np.concatenate(
        [rng.permutation(np.flatnonzero(groups == name)) for name in rng.permutation(names)]
    )
    order = np.empty(len(line), np.int64)
    order[line] = np.roll(line, rng.integers(sizes.max(), len(line) - sizes.max() + 1))
    return order


def _repaired(first: Codes, second: Codes, order: np.ndarray) -> tuple[csr_array, csr_array]:
    """Pair frame t of clip i with frame t of clip order[i]; the longer clip is cut."""
    length = np.minimum(first.frames, second.frames[order])
    within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    rows = []
    for codes, clips in ((first, np.arange(len(order))), (second, order)):
        starts = np.cumsum(codes.frames) - codes.frames
        rows.append(np.repeat(starts[clips], length) + within)
    return first.matrix[rows[0]], second.matrix[rows[1]]


def match_activations(
    first: dict[str, Codes],
    second: dict[str, Codes],
    groups: dict[str, np.ndarray],
    null_draws: int,
    n_bootstrap: int,
    seed: int,
) -> Match:
    """Choose pairs by correlation on validation frames and score them on test frames.

    `first`, `second`: codes of the same clips by set, "validation" and "test"; `groups`: the
    composition of each clip by set. Intervals resample test compositions and keep the pairs.
    """
    for name in ("validation", "test"):
        if not np.array_equal(first[name].frames, second[name].frames):
            raise ValueError(
                f"{name} clips have other frame counts in the two models: extract both from the "
                "same clips (dvc repro extract_activations)"
            )
    x, y = first["test"], second["test"]
    names, member = np.unique(groups["test"], return_inverse=True)
    weights = resample_weights(names, n_bootstrap, seed_for(seed, "match_features", "bootstrap"))
    weights = np.concatenate([np.ones((1, len(names))), weights])
    partner = assign(correlation(first["validation"].matrix, second["validation"].matrix))
    r = pair_correlations(x.matrix, y.matrix, partner, member[x.owner], weights)

    def other_clips(name: str, draw: int) -> tuple[csr_array, csr_array]:
        stream = seed_for(seed, "match_features", "null", name, draw)
        return _repaired(first[name], second[name], repaired_clips(groups[name], stream))

    null, null_repaired, repaired = [], [], np.full((null_draws, len(partner)), np.nan)
    for draw in range(null_draws):
        chosen = assign(correlation(*other_clips("validation", draw)))
        a, b = other_clips("test", draw)
        repaired[draw], score = correlations_of(a, b, partner), correlations_of(a, b, chosen)
        again = correlations_of(*other_clips("test", null_draws + draw), chosen)
        has = np.flatnonzero(chosen >= 0)
        order = has[np.argsort(-score[has], kind="stable")]
        null.append(score[order])
        null_repaired.append(again[order])
    survived = repaired.mean(0) if null_draws else np.full(len(partner), np.nan)
    return Match(partner, r[0], null, survived, null_repaired, r[1:], len(names))


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def match_decoders(first: np.ndarray, second: np.ndarray, null_draws: int, seed: int) -> Match:
    """Match rows of two decoders [F1, d], [F2, d] by cosine; a zero row has cosine 0.

    With F2 < F1 at most F2 / F1 of the first can be matched.
    """
    a = _unit(first)

    def match(other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cosine = a @ _unit(other).T
        partner = assign(cosine)
        taken = cosine[np.arange(len(a)), partner]
        return partner, np.where(partner >= 0, taken, np.nan)

    partner, score = match(second)
    draws = [
        match(random_like(np.asarray(second), seed_for(seed, "match_features", "random", i)))[1]
        for i in range(null_draws)
    ]
    null = [np.sort(d[np.isfinite(d)])[::-1] for d in draws]
    return Match(partner, score, null, np.full(len(a), np.nan), [], np.empty((0, len(a))))


def raw_decoder(usae: UniversalSAE, i: int) -> np.ndarray:
    """Compute decoder rows [F, d_i] of model i in activation units, float64.

    `usae.decoder(i)` is in normalised units, which a cosine with an SAE's decoder must not use.
    """
    device, large = usae.decoder(i).device, 1000.0  # large: rounding of the mean must not count
    latents = torch.arange(usae.n_latents, device=device)[:, None]
    values = torch.full(latents.shape, large, device=device)
    added = usae.decode(values, latents, i) - usae.decode(0 * values, latents, i)
    return added.cpu().double().numpy() / large


# --- named sets over the latents of M models ----------------------------------------------------

NAMES = ("common", "positional", "partial", "own", "unstable", "unmatched", "silent")
"""Sets of SAE latents over M models; in metrics `own` carries the model's name.

Pairs and correlations are from `match_activations`: chosen on validation, scored on test. The
threshold is match_features.threshold, set in params.yaml beforehand.

silent      fires on no validation frame or on no test frame: cannot be compared.
common      one latent of each model, every two of them paired with one another, and every such
            pair's test correlation above the threshold.
positional  the same, but every pair's correlation also stays above the threshold when clips are
            re-paired to other compositions: these latents follow the position in the clip, not
            the music. They are not in `common`.
partial     (M > 2 only) matched in some other model but in no such tuple.
own         matched in no other model; *no* latent of any other model correlates above the
            threshold on test, paired or not; and reproduced: matched one to one, by the same
            rule, in a second SAE of its own model. Otherwise every accident of training would
            count as a model's own feature.
unstable    common or own but for one condition: it does not return in the other seeds, or, for
            common, one of its partners does not (`dictionaries.stability`)
unmatched   the rest: not reproduced, or similar to a latent that is paired with another.

An own latent is missing from the *SAEs* of the other models. Their activations may still have its
direction.
"""


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
    returning: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Name the set of each SAE latent: {model: [F] of `NAMES`}; see the module for definitions.

    `matches` [a, b] for models in order; `highest` [a, b] [F_a]: the highest test correlation of
    each latent of a with any of b, for both orders; `reproduced`, `active` and
    `returning` (None: all): bool [F] per model.
    """
    models = list(active)
    returning = returning or {model: np.ones(len(of), bool) for model, of in active.items()}
    tuples = common_tuples(matches, models)
    stable = np.all([returning[m][tuples[:, at]] for at, m in enumerate(models)], axis=0)
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
        common, positional, lost = (
            np.isin(np.arange(F), tuples[which, at])
            for which in (above & ~survives & stable, above & survives, above & ~survives & ~stable)
        )
        own = reproduced[model] & ~matched & ~similar
        lost |= own & ~returning[model]
        conditions = [~active[model], common, positional, lost, matched, own]
        chosen = ["silent", "common", "positional", "unstable", "partial", "own"]
        sets[model] = np.select(conditions, chosen, "unmatched")
    return sets
