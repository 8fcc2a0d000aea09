"""Metrics and table of the judges on test clips: AUROC per family with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from musicscope.core import stats
from musicscope.core.io import Metrics
from musicscope.core.seeding import seed_for
from musicscope.core.stats import Estimate
from musicscope.data.taxonomy import FAMILIES
from musicscope.judges.musicnn import silent
from musicscope.judges.pair import CHOOSING, HELD_OUT, TAGS
from musicscope.judges.training import FONTS, Predictions, gather

ALL = (*CHOOSING, *HELD_OUT)
SETS = (*FONTS, "codec_source", "codec")
"""Test clips per soundfont; the clips that go through the codec, before and after it."""


def family_report(
    probabilities: np.ndarray,
    labels: np.ndarray,
    families: Sequence[str],
    groups: Sequence[str] | np.ndarray,
    bootstrap: int,
    seed: int,
) -> Metrics:
    """Compute AUROC per family with a 95 % bootstrap interval over `groups` (compositions).

    `probabilities` and `labels` are [n, families], `groups` [n]. Rows of silent clips (NaN) are
    left out and counted under ``silent``. A family with positives only or negatives only gets
    NaN. ``mean_auroc`` is over the other families.
    """
    probabilities, labels = np.asarray(probabilities), np.asarray(labels).astype(bool)
    kept = ~np.isnan(probabilities).any(axis=1)
    groups = np.asarray(groups)[kept]
    report: Metrics = {"clips": int(kept.sum()), "silent": int((~kept).sum())}
    scores = []
    for family, score, truth in zip(families, probabilities.T, labels.T, strict=True):
        score, truth = score[kept], truth[kept]
        auroc = Estimate(np.nan, n=len(np.unique(groups)), unit="AUROC")
        if 0 < truth.sum() < len(truth):
            auroc = stats.estimate(
                stats.auroc_of(score, truth), groups, bootstrap,
                seed_for(seed, "family_report", family), "AUROC",
            )  # fmt: skip
            scores.append(auroc.value)
        report[family] = {"positives": int(truth.sum()), "auroc": auroc.as_dict()}
    report["mean_auroc"] = float(np.mean(scores)) if scores else None
    return report


def measure(sets: Mapping[str, Predictions], bootstrap: int, seed: int) -> Metrics:
    """Compute the numbers of metrics/train_judge.json.

    <judge>.<set>: AUROC per family with intervals over compositions; <judge>.shuffled: the same on
    single clips with labels permuted over compositions (the null); <judge>.pairs.
    cross_font.<train>_to_<test>: classifiers trained on one soundfont, tested on each.
    """

    def scored(of: Predictions, judge: str) -> Metrics:
        columns = [i for i, f in enumerate(FAMILIES) if judge != "musicnn" or f in TAGS]
        names = [FAMILIES[i] for i in columns]
        scores, labels = of.scores[judge][:, columns], of.labels[:, columns]
        return family_report(scores, labels, names, of.groups, bootstrap, seed)

    numbers: Metrics = {"clips": {name: len(of.labels) for name, of in sets.items()}}
    single = gather([replace(sets[font], name="") for font in FONTS])[""]
    permuted = stats.permute_labels(
        single.labels, single.groups, seed_for(seed, "train_judge", "null")
    )
    for judge in (j for j in ALL if j in single.scores):
        entry = {name: scored(sets[name], judge) for name in SETS if name in sets}
        entry["shuffled"] = scored(replace(single, labels=permuted), judge)
        if "pairs" in sets:
            guitar = sets["pairs"].scores[judge][:, FAMILIES.index("guitar")]
            entry["pairs"] = pair_report(guitar, sets["pairs"], bootstrap, seed)
        numbers[judge] = entry
    numbers["cross_font"] = {
        f"{font}_to_{test}": scored(sets[test], font) for font in FONTS for test in FONTS
    }
    return numbers


def reliability(metrics: Metrics) -> dict[str, dict[str, float]]:
    """Judge -> family or defined concept -> AUROC on codec output, from the stage's metrics.

    Without clips through the codec, on the clips of the training soundfont. A family that no clip
    has, or all have, is left out.
    """
    found: dict[str, dict[str, float]] = {}
    for judge in (j for j in ALL if j in metrics):
        report = metrics[judge].get("codec") or metrics[judge][FONTS[0]]
        found[judge] = {
            family: entry["auroc"]["value"]
            for family, entry in report.items()
            if isinstance(entry, dict) and np.isfinite(entry["auroc"]["value"])
        }
    for concept, own in metrics.get("concepts", {}).items():
        for judge, of in own.items():
            number = (of.get("codec") or of.get("test")) if judge in found else None
            if number and np.isfinite(number["auroc"]["value"]):
                found[judge][concept] = number["auroc"]["value"]
    return found


def pair_report(
    scores: np.ndarray, of: Predictions, bootstrap: int, seed: int
) -> dict[str, object]:
    """Compute the share of matched pairs whose guitar side has the higher score [clips].

    A pair with a silent side is left out and counted.
    """
    lost = np.unique(of.pairs[silent(scores[:, None])])
    kept = ~np.isin(of.pairs, lost)
    guitar = of.labels[kept, FAMILIES.index("guitar")]
    wins, groups = stats.pair_wins(scores[kept], guitar, of.pairs[kept], of.groups[kept])
    accuracy = stats.estimate(
        stats.mean_of(wins), groups, bootstrap, seed_for(seed, "train_judge", "pairs"), "share"
    )
    return {"pairs": len(wins), "silent": len(lost), "accuracy": accuracy.as_dict()}


def plot_table(metrics: Metrics) -> pd.DataFrame:
    """Tabulate AUROC with intervals: one row per judge, set and family or defined concept."""
    judges = [judge for judge in ALL if judge in metrics]
    reports = [(judge, name, r) for judge in judges for name, r in metrics[judge].items()]
    reports += [("one font", name, r) for name, r in metrics["cross_font"].items()]
    for concept, own in metrics.get("concepts", {}).items():
        reports += [(j, n, {concept: r}) for j in ALL for n, r in own.get(j, {}).items()]
    known = (*FAMILIES, *metrics.get("concepts", {}))
    return pd.DataFrame(
        [
            {"judge": judge, "set": name, "family": family, **stats.columns(report[family])}
            for judge, name, report in reports
            for family in known
            if family in report
        ]
    )
