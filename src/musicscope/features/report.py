"""Numbers and tables of the probes (stage probe) and of the comparison (match_features)."""

from __future__ import annotations

import numpy as np
import pandas as pd

from musicscope.config.analysis import MatchFeatures
from musicscope.core import stats
from musicscope.core.io import Metrics, write_text
from musicscope.core.seeding import seed_for
from musicscope.core.stats import Estimate
from musicscope.data.splits import (
    CLASS_SETS,
    MAIN,
    PAIR_SETS,
    clip_sets,
    label_matrix,
    labelled_sets,
)
from musicscope.dictionaries.codes import Pools
from musicscope.features.association import rank_by_difference
from musicscope.features.matching import NAMES, Match, common_tuples, correlations_of, tuple_scores
from musicscope.features.run import FONT, LEVEL, Comparison

EDGES = np.linspace(-0.2, 1.0, 49)
"""Histogram of correlations; lower ones count in the first bin."""


def probe_table(result: Metrics) -> pd.DataFrame:
    """Make one row per (concept, representation, set) of `probes.run_probes`.

    ``sae_k016`` is a k-sparse probe; ``sae_minus_dense`` has paired differences of AUROC; pair sets
    have `accuracy` instead of AUROC. Each of these has its limits in `<column>_low` and `_high`.
    """
    records = []
    for concept, entry in result["concepts"].items():
        probes = {name: numbers for name, numbers in entry.items() if name != "k_sparse"}
        probes |= {f"sae_k{size}": numbers for size, numbers in entry["k_sparse"].items()}
        positives = probes.pop("positives")
        for name, numbers in probes.items():
            chosen = {key: numbers.get(key) for key in ("pooling", "c", "validation_auroc")}
            for clip_set in (*CLASS_SETS, *PAIR_SETS):
                if clip_set in numbers:
                    key = {"concept": concept, "representation": name, "set": clip_set}
                    sizes = {"positives": positives[clip_set]}
                    records.append(key | stats.columns(numbers[clip_set]) | chosen | sizes)
    columns = ["concept", "representation", "set"]
    numbers = ("auroc", "average_precision", "accuracy", "difference")
    columns += [f"{name}{end}" for name in numbers for end in ("", "_low", "_high")]
    columns += ["pooling", "c", "validation_auroc", "positives"]
    return pd.DataFrame(records).reindex(columns=columns)


def latent_table(
    rows: pd.DataFrame,
    pools: Pools,
    result: Metrics,
    n_bootstrap: int,
    seed: int,
    concept: str = MAIN,
    top: int = 20,
) -> pd.DataFrame:
    """List the latents that separate a concept best on train, with the AUROC of each alone.

    Ranked as for the k-sparse probes, in the pooling that the SAE probe of `result` (from
    `probes.run_probes`) chose; `difference` is in standard deviations of the pooled code
    (negative: fires less with the concept); AUROC is of the raw pooled code times that sign.
    """
    has = label_matrix(rows, [concept])[0][:, 0]
    pooling = result["concepts"][concept]["sae"]["pooling"]
    sets, seed = labelled_sets(rows, clip_sets(rows), concept), seed_for(seed, "probe", "bootstrap")
    groups, codes, train = rows["group"].to_numpy(str), pools[pooling], sets["train"]
    order, difference = rank_by_difference(codes[train], has[train])
    records = []
    for rank, latent in enumerate(order[:top], start=1):
        record: dict[str, object] = {"rank": rank, "latent": int(latent), "pooling": pooling}
        record["difference"] = difference[latent]
        record["clips_active"] = (codes[train, latent] > 0).mean()
        scores = codes[:, latent].astype(np.float64) * np.sign(difference[latent])
        for name in ("train", "validation", *CLASS_SETS):
            if len(at := sets[name]):
                record[f"{name}_auroc"] = stats.auroc(scores[at], has[at])
        at = sets["test"]
        statistic = stats.auroc_of(scores[at], has[at])
        test = stats.estimate(statistic, groups[at], n_bootstrap, seed, "AUROC")
        records.append(record | stats.columns({"test_auroc": test.as_dict()}))
    return pd.DataFrame(records)


def write_probes(stem: str, table: pd.DataFrame, latents: pd.DataFrame) -> None:
    """Write `stem`.csv (all concepts) and `stem`-features.csv (the main concept)."""
    for name, frame in ((f"{stem}.csv", table), (f"{stem}-features.csv", latents)):
        write_text(name, frame.to_csv(index=False, float_format="%.6g"))


def _quality(match: Match, threshold: float) -> Metrics:
    """Shares of the first dictionary's latents, mean score over the pairs, and their nulls."""
    entry = match.share(threshold) | {"mean": np.nanmean(match.score)}
    if match.null:
        entry["null_mean"] = np.mean([draw.mean() if len(draw) else 0.0 for draw in match.null])
    return entry


def between_models(comparison: Comparison, a: str, b: str, threshold: float) -> dict[str, object]:
    """Compare SAE with SAE: matched pairs as a share of the latents of `a` and of `b`.

    heldout_font_matched_*: the same pairs scored on the test compositions in the held-out
    soundfont.
    """
    match = comparison.matches[a, b]
    first, second = (comparison.codes[m, "sae"] for m in (a, b))
    entry: dict[str, object] = {"pairs": (match.partner >= 0).sum()}
    entry["matched_pairs"] = (match.score > threshold).sum()
    entry["musical_pairs"] = match.musical(threshold).sum()
    entry |= {k: v for k, v in _quality(match, threshold).items() if k in ("mean", "null_mean")}
    sizes = {name: len(comparison.sets[name]) for name in (a, b)}
    for name, F in sizes.items():
        for key, value in match.share(threshold, F).items():
            word = "matched" if "matched" in key else "musical"
            entry[key.replace(word, f"{word}_{name}")] = value
    if FONT in first:
        r = correlations_of(first[FONT].matrix, second[FONT].matrix, match.partner)
        entry |= {f"{FONT}_matched_{m}": (r > threshold).sum() / F for m, F in sizes.items()}
    return entry


def set_sizes(comparison: Comparison, threshold: float) -> dict[str, float]:
    """Count the latents in each set by model, the common tuples with their interval, and a null.

    The null of `common`, for two models, is the number of pairs that fit the same definition when
    both choice and score are made on re-paired clips, whether or not their latents return.
    """
    matches, models = comparison.matches, list(comparison.sets)
    tuples = common_tuples(matches, models)
    stable = [comparison.returning[m][tuples[:, at]] for at, m in enumerate(models)]
    tuples = tuples[np.all(stable, axis=0)]
    scores = tuple_scores(matches, models, tuples) > threshold
    counts = scores[1:, ~scores[0]].sum(1)
    match = matches[models[0], models[1]]
    common = Estimate.from_resamples(counts[0], counts[1:], match.compositions, "features")
    sizes: Metrics = {"common": common.as_dict()}
    sizes["positional"] = (scores[0] & scores[1]).sum()
    if len(models) == 2:
        sizes["null_common"] = match.share(threshold, 1)["null_musical"]
    for model, names in comparison.sets.items():
        for name in NAMES:
            if name != "partial" or len(models) > 2:
                sizes[f"{name}_{model}"] = (names == name).sum()
    return sizes


def metrics(
    comparison: Comparison, features: pd.DataFrame, skipped: dict[str, int], section: MatchFeatures
) -> dict[str, object]:
    """Make metrics/match_features.json; shares are of all latents of a dictionary, dead ones too.

    sae_sae.<a>_<b> and its null; seeds.<model>: seed 1 instead of another model's SAE, the ceiling;
    sae_usae.<model>: by decoder cosine, with the lowest and highest share over SAE seeds; sets;
    concepts: latents with a concept at corrected p <= .05, by dictionary; named_by_all: concepts
    that no latent follows that returns in the other seeds.
    """
    t = section.threshold
    usae = {}
    for model, matches in comparison.decoders.items():
        shares = [match.share(t)["matched"] for match in matches]
        spread = {"matched_seeds_lowest": min(shares), "matched_seeds_highest": max(shares)}
        usae[model] = _quality(matches[0], t) | spread
    aligned: dict[str, object] = {"skipped": skipped}
    for kind, model in features[["kind", "model"]].drop_duplicates().itertuples(index=False):
        part = features[(features["kind"] == kind) & (features["model"] == model)]
        significant = part["concept_p"] <= LEVEL
        entry: Metrics = {
            "latents": len(part),
            "tested": part["concept_p"].notna().sum(),
            "aligned": significant.sum(),
            "by_concept": part["concept"][significant].value_counts().sort_index().to_dict(),
        }
        if kind == "sae":
            back = part["returns"] == 1
            unstable = part["concept"][significant & ~back]
            entry |= {
                "returning": back.sum(),
                "named_by_all": sorted(set(unstable)) if section.stable_only else [],
            }
        aligned[f"{kind}_{model}"] = entry
    codes = next(iter(comparison.codes.values()))
    return {
        "slot": section.slot,
        "threshold": t,
        "clips": {name: len(of.frames) for name, of in codes.items()},
        "sae_sae": {f"{a}_{b}": between_models(comparison, a, b, t) for a, b in comparison.matches},
        "seeds": {model: _quality(match, t) for model, match in comparison.seeds.items()},
        "sae_usae": usae,
        "sets": set_sizes(comparison, t),
        "concepts": aligned,
    }


def correlation_table(comparison: Comparison) -> pd.DataFrame:
    """Count test correlations of the pairs: one row per (comparison, bin [low, high)).

    `comparison`: <a>_<b> between models, seeds_<model> between two seeds; `share` of its pairs,
    `null_share` of the null's.
    """

    def shares(scores: np.ndarray) -> np.ndarray:
        finite = np.clip(scores[np.isfinite(scores)], EDGES[0], EDGES[-1])
        return np.histogram(finite, EDGES)[0] / max(1, len(finite))

    rows = []
    named = {f"{a}_{b}": match for (a, b), match in comparison.matches.items()}
    named |= {f"seeds_{model}": match for model, match in comparison.seeds.items()}
    for name, match in named.items():
        null = shares(np.concatenate(match.null))
        columns = (EDGES[:-1], EDGES[1:], shares(match.score), null)
        rows += [(name, *values) for values in zip(*columns, strict=True)]
    return pd.DataFrame(rows, columns=["comparison", "low", "high", "share", "null_share"])


def cosine_table(comparison: Comparison) -> pd.DataFrame:
    """List cosines of SAE and USAE pairs from high to low: model, rank, cosine, null_cosine.

    `null_cosine` is the mean over draws at that rank; empty where one list is shorter.
    """
    parts = []
    for model, (match, *_) in comparison.decoders.items():
        curves = [np.sort(match.score[np.isfinite(match.score)])[::-1], *match.null]
        length = max(map(len, curves))
        padded = [np.pad(c, (0, length - len(c)), constant_values=np.nan) for c in curves]
        part = {"model": model, "rank": np.arange(1, length + 1), "cosine": padded[0]}
        parts.append(pd.DataFrame(part | {"null_cosine": np.mean(padded[1:], axis=0)}))
    return pd.concat(parts, ignore_index=True)


def write_comparison(folder: str, comparison: Comparison) -> None:
    """Write `folder`/correlations.csv and cosines.csv."""
    correlations, cosines = correlation_table(comparison), cosine_table(comparison)
    for name, frame in (("correlations", correlations), ("cosines", cosines)):
        write_text(f"{folder}/{name}.csv", frame.to_csv(index=False, float_format="%.6g"))
