"""Numbers and charts of the comparison: metrics/match_features.json, plots/match_features/."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from musicscope.core import plots
from musicscope.core.io import write_text
from musicscope.core.stats import percentile_interval
from musicscope.features import sharing as feature_sets
from musicscope.features.matching import Match, correlations_of
from musicscope.features.run import FONT, Comparison, Settings

LEVEL = 0.05
EDGES = np.linspace(-0.2, 1.0, 49)  # histogram of correlations; lower ones count in the first bin


def _quality(match: Match, threshold: float) -> dict[str, float]:
    """Share of the first's latents, mean score over the pairs, and the same of the null."""
    found = match.share(threshold) | {"mean": np.nanmean(match.score)}
    if match.null:
        found["null_mean"] = np.mean([draw.mean() if len(draw) else 0.0 for draw in match.null])
    return found


def between_models(found: Comparison, a: str, b: str, threshold: float) -> dict[str, Any]:
    """SAE against SAE: matched pairs as a share of the latents of `a` and of those of `b`.

    heldout_font_matched_*: the same pairs scored on the test compositions in the held-out
    soundfont.
    """
    match, (first, second) = found.matches[a, b], (found.codes[m, "sae"] for m in (a, b))
    entry: dict[str, Any] = {"pairs": (match.partner >= 0).sum()}
    entry["matched_pairs"] = (match.score > threshold).sum()
    entry["musical_pairs"] = match.musical(threshold).sum()
    entry |= {k: v for k, v in _quality(match, threshold).items() if k in ("mean", "null_mean")}
    sizes = {name: len(found.sets[name]) for name in (a, b)}
    for name, F in sizes.items():
        for key, value in match.share(threshold, F).items():
            word = "matched" if "matched" in key else "musical"
            entry[key.replace(word, f"{word}_{name}")] = value
    if FONT in first:
        r = correlations_of(first[FONT].matrix, second[FONT].matrix, match.partner)
        entry |= {f"{FONT}_matched_{m}": (r > threshold).sum() / F for m, F in sizes.items()}
    return entry


def set_sizes(found: Comparison, threshold: float) -> dict[str, Any]:
    """Latents in each set by model, common tuples with their interval, and the null's tuples.

    The null of `common` is the number of pairs that fit the same definition when both the choice
    and the score are made on re-paired clips; it is given for two models.
    """
    models = list(found.sets)
    tuples = feature_sets.common_tuples(found.matches, models)
    scores = feature_sets.tuple_scores(found.matches, models, tuples) > threshold
    counts = scores[1:, ~scores[0]].sum(1)
    low, high = percentile_interval(counts[1:])
    sizes: dict[str, Any] = {"common": counts[0], "common_low": low, "common_high": high}
    sizes["positional"] = (scores[0] & scores[1]).sum()
    if len(models) == 2:
        null = found.matches[models[0], models[1]].share(threshold, 1)
        sizes["null_common"] = null["null_musical"]
    for model, names in found.sets.items():
        for name in feature_sets.NAMES:
            if name != "partial" or len(models) > 2:
                sizes[f"{name}_{model}"] = (names == name).sum()
    return sizes


def metrics(
    found: Comparison,
    features: pd.DataFrame,
    skipped: dict[str, int],
    at: dict[str, np.ndarray],
    settings: Settings,
) -> dict[str, Any]:
    """metrics/match_features.json; shares are of all latents of the dictionary, dead ones too.

    sae_sae.<a>_<b> and its null; seeds.<model>: seed 1 for another model's SAE, the ceiling;
    sae_usae.<model>: by decoder cosine, with the lowest and highest share over SAE seeds; sets;
    concepts: latents with a concept at corrected p <= .05, by dictionary.
    """
    t = settings.threshold
    usae = {}
    for model, matches in found.decoders.items():
        shares = [match.share(t)["matched"] for match in matches]
        spread = {"matched_seeds_lowest": min(shares), "matched_seeds_highest": max(shares)}
        usae[model] = _quality(matches[0], t) | spread
    aligned: dict[str, Any] = {"skipped": skipped}
    for (kind, model), part in features.groupby(["kind", "model"], sort=False):
        known = part["concept_p"] <= LEVEL
        aligned[f"{kind}_{model}"] = {
            "latents": len(part),
            "tested": part["concept_p"].notna().sum(),
            "aligned": known.sum(),
            "by_concept": part["concept"][known].value_counts().sort_index().to_dict(),
        }
    return {
        "slot": settings.slot,
        "threshold": t,
        "clips": {name: len(rows) for name, rows in at.items()},
        "sae_sae": {f"{a}_{b}": between_models(found, a, b, t) for a, b in found.matches},
        "seeds": {model: _quality(match, t) for model, match in found.seeds.items()},
        "sae_usae": usae,
        "sets": set_sizes(found, t),
        "concepts": aligned,
    }


def summary_keys(metrics: dict[str, Any]) -> dict[str, Any]:
    """The headline numbers, {"match.<name>": number}, from metrics/match_features.json.

    match.sae_usae_matched_<model> and null_matched_<model>: shares of the SAE's latents;
    match.common (with _low, _high and null_common), positional and own_<model>: numbers of
    features; match.sae_sae_musical_<model>: the share of its latents paired with another model's,
    and match.seeds_musical_<model> its ceiling, the share paired with another seed's.
    """
    keys, several = {}, len(metrics["sae_sae"]) > 1
    for model, entry in metrics["sae_usae"].items():
        keys[f"sae_usae_matched_{model}"] = entry["matched"]
        keys[f"null_matched_{model}"] = entry["null_matched"]
        keys[f"own_{model}"] = metrics["sets"][f"own_{model}"]
        keys[f"seeds_musical_{model}"] = metrics["seeds"][model]["musical"]
        for pair, between in metrics["sae_sae"].items():
            if (word := f"musical_{model}") in between:
                keys[f"sae_sae_{word}" + (f"_in_{pair}" if several else "")] = between[word]
    for name in ("common", "common_low", "common_high", "null_common", "positional"):
        if name in metrics["sets"]:
            keys[name] = metrics["sets"][name]
    return {f"match.{key}": value for key, value in keys.items()}


def correlation_table(found: Comparison) -> pd.DataFrame:
    """Histogram of test correlations of the pairs: one row a (comparison, bin [low, high)).

    `comparison`: <a>_<b> between models, seeds_<model> between two seeds; `share` of its pairs,
    `null_share` of the null's.
    """

    def shares(scores: np.ndarray) -> np.ndarray:
        known = np.clip(scores[np.isfinite(scores)], EDGES[0], EDGES[-1])
        return np.histogram(known, EDGES)[0] / max(1, len(known))

    rows = []
    named = {f"{a}_{b}": match for (a, b), match in found.matches.items()}
    named |= {f"seeds_{model}": match for model, match in found.seeds.items()}
    for name, match in named.items():
        null = shares(np.concatenate(match.null))
        columns = (EDGES[:-1], EDGES[1:], shares(match.score), null)
        rows += [(name, *values) for values in zip(*columns, strict=True)]
    return pd.DataFrame(rows, columns=["comparison", "low", "high", "share", "null_share"])


def cosine_table(found: Comparison) -> pd.DataFrame:
    """Cosines of SAE and USAE pairs from high to low: model, rank, cosine, null_cosine.

    `null_cosine` is the mean over draws at that rank; empty where one list is shorter.
    """
    parts = []
    for model, (match, *_) in found.decoders.items():
        curves = [np.sort(match.score[np.isfinite(match.score)])[::-1], *match.null]
        length = max(map(len, curves))
        padded = [np.pad(c, (0, length - len(c)), constant_values=np.nan) for c in curves]
        part = {"model": model, "rank": np.arange(1, length + 1), "cosine": padded[0]}
        parts.append(pd.DataFrame(part | {"null_cosine": np.mean(padded[1:], axis=0)}))
    return pd.concat(parts, ignore_index=True)


def _threshold_line(axis: Axes, threshold: float, vertical: bool) -> None:
    draw = axis.axvline if vertical else axis.axhline
    draw(threshold, color="#555555", lw=1, ls="--")


def plot_correlations(table: pd.DataFrame, pairs: Sequence[tuple[str, str]], t: float) -> Figure:
    """One panel a pair of models: the pairs, their null, and the pairs between seeds."""
    figure, axes = plots.new_figure(1, len(pairs), size=(7.0 * len(pairs), 4.2))
    for axis, (a, b) in zip(axes[0], pairs, strict=True):
        lines = [(f"{a}_{b}", "share", f"{a} and {b}"), (f"{a}_{b}", "null_share", "null")]
        lines += [(f"seeds_{m}", "share", f"two seeds of {m}") for m in (a, b)]
        styles = ("-", "--", ":", "-.")
        for (name, column, label), style, colour in zip(lines, styles, plots.COLOURS, strict=False):
            part = table[table["comparison"] == name]
            axis.stairs(
                part[column].astype(float), EDGES, color=colour, ls=style, lw=1.8, label=label
            )
        _threshold_line(axis, t, vertical=True)
        axis.set(xlabel="correlation on test", ylabel="share of pairs", yscale="log")
        axis.set_title("SAE latents paired on validation")
        axis.legend()
    return figure


def plot_cosines(table: pd.DataFrame, t: float) -> Figure:
    """Cosines of SAE and USAE pairs from high to low, a solid line a model, its null dashed."""
    figure, ((axis,),) = plots.new_figure(1, 1, size=(7.0, 4.2))
    for series, (model, part) in enumerate(table.groupby("model", sort=False)):
        colour = plots.COLOURS[series % len(plots.COLOURS)]
        rank = part["rank"] / len(part)
        axis.plot(rank, part["cosine"], color=colour, lw=1.8, label=model)
        axis.plot(rank, part["null_cosine"], color=colour, lw=1.4, ls="--", label=f"{model}, null")
    _threshold_line(axis, t, vertical=False)
    axis.set(xlabel="pairs, from the most similar, as a share", ylabel="cosine of decoder rows")
    axis.set_title("SAE and universal SAE of one model")
    axis.grid(color="#dddddd", lw=0.7)
    axis.legend()
    return figure


def write_plots(folder: str, found: Comparison, threshold: float) -> None:
    """`folder`/correlations.{csv,png} and cosines.{csv,png}."""
    correlations, cosines = correlation_table(found), cosine_table(found)
    for name, frame in (("correlations", correlations), ("cosines", cosines)):
        write_text(f"{folder}/{name}.csv", frame.to_csv(index=False, float_format="%.6g"))
    figure = plot_correlations(correlations, list(found.matches), threshold)
    plots.save_figure(figure, f"{folder}/correlations.png")
    plots.save_figure(plot_cosines(cosines, threshold), f"{folder}/cosines.png")
