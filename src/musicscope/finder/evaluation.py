"""Evaluate the finder on clips: do test labels agree, do ten recordings suffice, is it fooled?

Features are found on train clips. Test clips of other compositions then show whether these features
agree with the labels. Draws of a few recordings show what a user's folder of ten can give. Draws of
clips that all lack the concept show how often the finder reports a feature where there is none, and
draws that a cue separates whether it warns of the cue. A draw has one clip per composition.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from musicscope.config.concepts import FindConcept
from musicscope.core import stats
from musicscope.core.io import Metrics
from musicscope.core.seeding import seed_for
from musicscope.data.clips import HELD_OUT_FONT
from musicscope.data.concepts import labelled
from musicscope.data.splits import clip_sets
from musicscope.features.association import rank_by_auroc
from musicscope.finder.confounding import Confounding, measure

PREFIX = "clips:"
TERM = re.compile(r"(?P<no>not )?has_(?P<concept>\w+)|(?P<column>\w+)=(?P<value>.+)")
COLUMNS = ("split", "kind", "font", "target_family", "key", "source", "group", "artist")


def is_query(text: str) -> bool:
    """Tell whether one side of a concept is a query to data/clips rather than a folder."""
    return text.startswith(PREFIX)


def select_query(rows: pd.DataFrame, query: str, split: str, font: str | None = None) -> np.ndarray:
    """Select row numbers, ascending, by a query such as ``clips:has_guitar and not has_drums``.

    Defaults, unless the query names the column: `split`, kind = clip, and the soundfont `font`
    (None: any but the held-out one). Clips without a label match neither has_ nor not has_.

    Raises:
        ValueError: an unknown term, concept or column.
    """
    conditions, keep, known = {}, np.ones(len(rows), bool), labelled(rows)
    for term in query.removeprefix(PREFIX).split(" and "):
        parts = TERM.fullmatch(term.strip())
        if not parts or (parts["concept"] or known[0]) not in known:
            raise ValueError(
                f"{query!r}: {term.strip()!r} is no term; allowed are has_<concept> and not "
                f"has_<concept> with {', '.join(known)}, and <column>=<value>"
            )
        if parts["concept"]:
            has = rows[f"has_{parts['concept']}"]
            keep &= (has == (not parts["no"])).fillna(False).to_numpy(bool)
        else:
            conditions[parts["column"]] = parts["value"].strip()
    defaults = {"split": split, "kind": "clip", **({"font": font} if font else {})}
    for column, value in {**defaults, **conditions}.items():
        if column not in COLUMNS or column not in rows:
            raise ValueError(f"{query!r}: no column {column!r}; allowed: {', '.join(COLUMNS)}")
        keep &= (rows[column].astype(str) == value).to_numpy()
    if font is None and "font" not in conditions:
        keep &= (rows["font"] != HELD_OUT_FONT).to_numpy()
    return np.flatnonzero(keep)


@dataclass(frozen=True)
class Sets:
    """Clips of one concept, as positions in the clip table."""

    train: np.ndarray
    labels: np.ndarray
    """[train] bool"""
    tests: Mapping[str, tuple[np.ndarray, np.ndarray]]
    """"test", "heldout_font" and "heldout_source" -> positions and labels; only sets with both
    kinds of clips"""

    @property
    def used(self) -> np.ndarray:
        """Positions of all these clips, ascending."""
        return np.unique(np.concatenate([self.train, *(at for at, _ in self.tests.values())]))


def concept_sets(rows: pd.DataFrame, positive: str, negative: str) -> Sets:
    """Select train, test and held-out clips of a concept given by two queries.

    ValueError if a clip is on both sides, or a side has fewer than two train clips.
    """

    def sides(split: str, font: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        with_, without = (select_query(rows, query, split, font) for query in (positive, negative))
        if both := np.intersect1d(with_, without).tolist():
            raise ValueError(f"{positive!r} and {negative!r} share {len(both)} clips")
        return np.concatenate([with_, without]), np.arange(len(with_) + len(without)) < len(with_)

    train, labels = sides("train")
    if min(labels.sum(), (~labels).sum()) < 2:
        raise ValueError(
            f"{positive!r} has {labels.sum()} train clips, {negative!r} {(~labels).sum()}: at "
            "least two of each are needed; change the query in find_concept.concepts, raise "
            "prepare_data.clips.train, or label more recordings"
        )
    if any("split=" in query for query in (positive, negative)):
        return Sets(train, labels, {})
    at, has = sides("test")
    new = np.isin(at, clip_sets(rows)["heldout_source"])
    tests = {
        "test": (at, has), "heldout_font": sides("test", HELD_OUT_FONT),
        "heldout_source": (at[new], has[new]),
    }  # fmt: skip
    both = {name: (at, has) for name, (at, has) in tests.items() if 0 < has.sum() < len(has)}
    return Sets(train, labels, both)


# --- concepts as queries to the clip table ------------------------------------------------------

TOP = 10


CONFOUNDS = ("rms", "centroid")
"""Loudness and brightness: cues that sides without the concept are made to differ in."""
CONFOUNDED_SHARE = 5
"""One confounded draw for so many draws of the null."""


def examine(
    means: np.ndarray,
    groups: np.ndarray,
    sets: Sets,
    section: FindConcept,
    seed: int,
    *name: str,
    cues: pd.DataFrame | None = None,
) -> tuple[pd.DataFrame, Metrics]:
    """Rank a concept's features and evaluate them: the table, and the numbers for the metrics.

    `means` [clips, F] and `groups` [clips] are of all clips, in the order of the clip table; clips
    in no set are not read. `name` makes the seed differ between concepts. `cues`, a row per clip,
    are compared with the best feature.
    """
    seed = seed_for(seed, "find_concept", *name)
    x, labels, train_groups = means[sets.train], sets.labels, groups[sets.train]
    table = rank_by_auroc(
        x, labels, section.permutations, section.stability_draws, seed, train_groups
    )
    significant = (table["q"] <= section.q).to_numpy()
    metrics: Metrics = {
        "with": int(labels.sum()), "without": int((~labels).sum()), "tested": len(table),
        "discoveries": int(significant.sum()),
    }  # fmt: skip
    if len(table):
        best = table.iloc[0]
        metrics["best"] = {k: best[k] for k in ("effect_size", "auroc", "q", "stability")}
        metrics["best"]["feature"] = int(best["feature"])
    of_train = pd.DataFrame() if cues is None else cues.iloc[sets.train].reset_index(drop=True)
    if cues is not None:
        auroc = float(table["auroc"].iloc[0]) if len(table) else float("nan")
        confounding = measure(of_train, labels, auroc, seed_for(seed, "cues"), train_groups)
        metrics["confounding"] = confounding.as_metrics()
    aurocs: dict[str, np.ndarray] = {}
    for test, (at, has) in sets.tests.items():
        scores = means[at][:, table["feature"]]
        auroc = aurocs[test] = table[f"{test}_auroc"] = stats.auroc_columns(scores, has)
        metrics[test] = {"clips": len(has), "tested_auroc": np.nanmean(auroc)}
        if len(table):
            best_auroc = stats.estimate(
                stats.auroc_of(scores[:, 0], has), groups[at], section.bootstrap,
                seed_for(seed, "test"), "AUROC",
            )  # fmt: skip
            metrics[test]["best_auroc"] = best_auroc.as_dict()
            metrics[test]["top_auroc"] = np.nanmean(auroc[:TOP])
        if significant.any():
            metrics[test]["found_auroc"] = np.nanmean(auroc[significant])
            metrics[test]["found_above_half"] = np.mean(auroc[significant] > 0.5)
    metrics["few"] = few_recordings(
        x, labels, train_groups, of_train, table, aurocs.get("test"), section, seed
    )
    without = of_train.iloc[np.flatnonzero(~labels) if len(of_train) else []]
    metrics["null"] = without_concept(x[~labels], train_groups[~labels], without, section, seed)
    return table, metrics


def draw_clips(
    rng: np.random.Generator, groups: np.ndarray, sides: np.ndarray, n: int
) -> np.ndarray:
    """Draw clips of different compositions, at most `n` per side, as row numbers.

    `sides` [clips]: any value per side. Clips of one composition are no independent recordings, so
    no composition is drawn twice, on either side.
    """
    taken, counts, drawn = set(), dict.fromkeys(np.unique(sides).tolist(), 0), []
    for i in rng.permutation(len(groups)).tolist():
        side = sides[i].item()
        if groups[i] not in taken and counts[side] < n:
            taken.add(groups[i])
            counts[side] += 1
            drawn.append(i)
    return np.array(drawn, int)


def _search(
    x: np.ndarray, labels: np.ndarray, cues: pd.DataFrame, section: FindConcept, seed: int
) -> tuple[pd.DataFrame, Confounding | None]:
    """Rank the features of one draw, and compare the best with the cues if there are any."""
    table = rank_by_auroc(x, labels, section.permutations, 1, seed)
    best = float(table["auroc"].iloc[0]) if len(table) else float("nan")
    return table, measure(cues, labels, best, seed) if len(cues) else None


def _share(values: list) -> float | None:
    """Mean of the values; None without any."""
    return float(np.mean(values)) if values else None


def few_recordings(
    x: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    cues: pd.DataFrame,
    table: pd.DataFrame,
    test_auroc: np.ndarray | None,
    section: FindConcept,
    seed: int,
) -> dict[str, object]:
    """Compare draws of `section.few` clips per side with the table made from all clips.

    any_discovery: share of draws with any discovery; discoveries: their mean number; agree: share
    of these that are discoveries on all clips as well; top_agree: share of the best `TOP` of a draw
    that are among the best 10 % of all (chance: 0.1); top_test_auroc: their mean on test clips;
    warned: share of draws with a warning of a cue.
    """
    whole = set(table["feature"][table["q"] <= section.q])
    upper = set(table["feature"].head(max(TOP, len(table) // 10)))
    auroc = {} if test_auroc is None else dict(zip(table["feature"], test_auroc, strict=True))
    counts, agree, top, scores, warned, smaller = [], [], [], [], [], []
    for draw in range(section.few_draws):
        rng = np.random.default_rng(seed_for(seed, "few", draw))
        at = draw_clips(rng, groups, labels, section.few)
        sides = np.bincount(labels[at], minlength=2)
        if sides.min() < 2:
            continue
        few, confounding = _search(
            x[at], labels[at], cues.iloc[at] if len(cues) else cues, section,
            seed_for(seed, "p", draw),
        )  # fmt: skip
        significant, best = few["feature"][few["q"] <= section.q], few["feature"].head(TOP)
        smaller.append(int(sides.min()))
        counts.append(len(significant))
        agree += [f in whole for f in significant]
        top += [f in upper for f in best]
        scores += [auroc[f] for f in best if f in auroc]
        warned += [confounding.warns] if confounding else []
    return {
        "recordings": min(smaller, default=0), "draws": len(counts),
        "any_discovery": _share([n > 0 for n in counts]), "discoveries": _share(counts),
        "agree": _share(agree), "top_agree": _share(top), "warned": _share(warned),
        "top_test_auroc": np.nanmean(scores) if scores else None,
    }  # fmt: skip


def without_concept(
    x: np.ndarray, groups: np.ndarray, cues: pd.DataFrame, section: FindConcept, seed: int
) -> dict[str, object]:
    """Run the finder on two sets of clips that both lack the concept: the null.

    any_discovery: share of draws of `section.few` clips per side with any discovery, at most q if
    the test holds its level; warned: share with a warning. discoveries: their number between all
    clips of a random half of the compositions and all others. confounded: {cue: the same shares,
    and missed} for draws whose sides have the highest and the lowest values of a cue; missed is the
    share with a discovery and no warning.
    """
    compositions = len(np.unique(groups))
    n = min(section.few, compositions // 2)
    counts, warned = [], []
    for draw in range(section.few_draws if n >= 2 else 0):
        rng = np.random.default_rng(seed_for(seed, "null", draw))
        at = draw_clips(rng, groups, np.zeros(len(x), int), 2 * n)
        few, confounding = _search(
            x[at], np.arange(2 * n) < n, cues.iloc[at] if len(cues) else cues, section,
            seed_for(seed, "null p", draw),
        )  # fmt: skip
        counts.append(int((few["q"] <= section.q).sum()))
        warned += [confounding.warns] if confounding else []
    names, member = np.unique(groups, return_inverse=True)
    half = np.random.default_rng(seed_for(seed, "null", "all")).permutation(names)[::2]
    labels, whole = np.isin(groups, half), None
    if min(labels.sum(), (~labels).sum()) >= 2:
        # Whole compositions change sides, so compositions are what is permuted.
        total = np.zeros((len(names), x.shape[1]))
        np.add.at(total, member, x)
        means = total / np.bincount(member)[:, None]
        found = rank_by_auroc(means, np.isin(names, half), section.permutations, 1, seed)
        whole = int((found["q"] <= section.q).sum())
    return {
        "recordings": n, "draws": len(counts), "discoveries": whole,
        "any_discovery": _share([c > 0 for c in counts]), "warned": _share(warned),
        "confounded": {
            cue: _confounded(x, groups, cues, cue, section, seed)
            for cue in CONFOUNDS if cue in cues and n >= 2
        },
    }  # fmt: skip


def _confounded(
    x: np.ndarray, groups: np.ndarray, cues: pd.DataFrame, cue: str, section: FindConcept, seed: int
) -> dict[str, object]:
    """Run the finder on clips with the highest against clips with the lowest values of a cue."""
    found, warned = [], []
    n = min(section.few, len(np.unique(groups)) // 2)
    for draw in range(max(1, section.few_draws // CONFOUNDED_SHARE)):
        rng = np.random.default_rng(seed_for(seed, "confounded", cue, draw))
        at = draw_clips(rng, groups, np.zeros(len(x), int), len(x))
        at = at[np.argsort(-cues[cue].to_numpy()[at], kind="stable")]
        at = np.concatenate([at[:n], at[-n:]])
        few, confounding = _search(
            x[at], np.arange(2 * n) < n, cues.iloc[at], section, seed_for(seed, cue, draw)
        )
        found.append(bool((few["q"] <= section.q).any()))
        warned.append(confounding is not None and confounding.warns)
    missed = [f and not w for f, w in zip(found, warned, strict=True)]
    return {
        "draws": len(found), "any_discovery": _share(found), "warned": _share(warned),
        "missed": _share(missed),
    }  # fmt: skip
