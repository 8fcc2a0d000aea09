"""Compare generated clips with real clips and with prompts: judges, distances, music measures.

Every function takes arrays and returns rows of the evidence table. Row i of every array belongs to
the composition `groups[i]`. Intervals are 95 % and resample compositions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from musicscope.core.mmd import Embedded, GaussianKernel
from musicscope.core.seeding import seed_for
from musicscope.core.stats import Statistic, auroc, auroc_of
from musicscope.embedded.pretraining import music_statistics as music
from musicscope.embedded.pretraining.evidence_rows import (
    TARGETS,
    Bootstrap,
    Row,
    both_classes,
    estimate_row,
    median_of,
)
from musicscope.embedded.pretraining.set_distance import (
    Comparison,
    classify,
    compare,
    frechet_infinity,
    null_auroc,
)
from musicscope.judges.musicnn import Musicnn
from musicscope.judges.pair import TAGS

VOICE_TAGS = {
    "vocals": ("vocal", "vocals", "voice", "singing"),
    "male_vocal": ("male", "male vocal", "male voice", "man"),
    "female_vocal": ("female", "female vocal", "female voice", "woman"),
}
"""Tags of musicnn that name a voice, chosen by their meaning alone; the highest counts."""
PROMPT_FORMS = (
    "{}",
    "a {} melody",
    "{} music",
    "{} and drums",
    "{} leads a mid-tempo tune.",
    "steady mid-tempo music featuring {}",
    "slow, sparse {} music",
    "{} leads a fast tune with bass and drums.",
)
SET_SIZE = 32
"""Clips per set in ratios to real against real (`set_distance`): a constant, so that the ratio
does not depend on how many clips are measured."""


# --- judges and prompts -----------------------------------------------------------------------


class FamilyScorer(Protocol):
    """A judge such as `FamilyJudge`: probability of each family, NaN rows for silent clips."""

    families: tuple[str, ...]

    def predict(self, audio: np.ndarray) -> np.ndarray: ...


Scores = dict[str, dict[str, np.ndarray]]
"""Judge -> family -> score of each clip [n], NaN for a silent clip."""
Truth = Mapping[str, np.ndarray]
"""Family -> whether each clip holds it, bool [n]. Families that are not in it are unknown."""


def musicnn_families(tags: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    """musicnn's tags [n, len(names)] as scores of the families that it has tags for."""
    return {
        family: tags[:, [names.index(tag) for tag in chosen]].max(1)
        for family, chosen in (TAGS | VOICE_TAGS).items()
    }


def judge(
    audio: np.ndarray, musicnn: Musicnn, judges: Mapping[str, FamilyScorer]
) -> tuple[Scores, np.ndarray]:
    """Scores of every judge, and musicnn's embedding [n, 200]."""
    tags, embedding = musicnn.predict(audio)
    scores: Scores = {"musicnn": musicnn_families(tags, musicnn.tags)}
    for name, scorer in judges.items():
        scores[name] = dict(zip(scorer.families, scorer.predict(audio).T, strict=True))
    return scores, embedding


def family_prompts(counts: Mapping[str, int]) -> tuple[list[str], np.ndarray]:
    """Prompts and the family that each one asks for: `counts` per family, in turn of phrasing."""
    pairs = [
        (PROMPT_FORMS[i % len(PROMPT_FORMS)].format(family.replace("_", " ")), family)
        for family, count in counts.items()
        for i in range(count)
    ]
    return [text for text, _ in pairs], np.array([family for _, family in pairs])


def judge_loss_rows(
    truth: Truth, groups: np.ndarray, before: Scores, after: Scores, boot: Bootstrap
) -> list[Row]:
    """AUROC of each judge on original clips less its AUROC on reconstructed clips.

    Per family with enough clips, and the mean over families. The target holds for guitar and for
    the mean. Silent clips are left out of both.
    """
    rows = []
    for name in before:
        losses: list[tuple[Statistic, Statistic]] = []
        known = [f for f in before[name] if f in truth and both_classes(truth[f])]
        if not known:
            continue
        columns = np.stack([s[name][f] for s in (before, after) for f in known])
        kept = np.isfinite(columns).all(0)
        for family in known:
            labels = truth[family][kept]
            losses.append(tuple(auroc_of(s[name][family][kept], labels) for s in (before, after)))

        def loss(weights: np.ndarray, pairs: list) -> np.ndarray:
            values = np.stack([first(weights) - last(weights) for first, last in pairs])
            # A resample may hold no clip of a family: the mean is over the others.
            defined = np.isfinite(values)
            with np.errstate(invalid="ignore"):
                return np.where(defined, values, 0.0).sum(0) / defined.sum(0)

        single = [(f, [pair]) for f, pair in zip(known, losses, strict=True)]
        for family, pairs in [*single, ("mean", losses)]:
            bound = family in ("guitar", "mean")
            original = [float(first(np.ones((1, int(kept.sum()))))[0]) for first, _ in pairs]
            rows.append(
                boot.row(
                    f"codec.auroc_loss.{name}.{family}",
                    lambda w, pairs=pairs: loss(w, pairs),
                    groups[kept], "AUROC",
                    target=TARGETS["auroc_loss"] if bound else None,
                    direction="at_most" if bound else None,
                    control={"auroc_original": float(np.mean(original))},
                )
            )  # fmt: skip
    return rows


# --- generated audio --------------------------------------------------------------------------


def prompt_rows(
    scores: Scores, families: np.ndarray, real: Scores, real_truth: Truth, boot: Bootstrap
) -> list[Row]:
    """AUROC of each judge for the prompted family in generated clips, one family against the rest.

    Intervals resample prompts. Controls: the judge on real clips, and shuffled prompts.
    """
    rng = np.random.default_rng(seed_for(boot.seed, "shuffled prompts"))
    rows = []
    for name, by_family in scores.items():
        for family, score in by_family.items():
            heard = np.isfinite(score)
            labels = (families == family)[heard]
            if not both_classes(labels):
                continue
            control = {"shuffled": auroc(score[heard], rng.permutation(labels))}
            known = np.isfinite(real[name][family])
            if family in real_truth and both_classes(real_truth[family][known]):
                control["real_clips"] = auroc(real[name][family][known], real_truth[family][known])
            guitar = family == "guitar"
            rows.append(
                boot.row(
                    f"prompts.{name}.{family}", auroc_of(score[heard], labels),
                    np.arange(len(labels)), "AUROC",
                    target=TARGETS["guitar_auroc"] if guitar else None,
                    direction="at_least" if guitar else None, control=control,
                    note=f"{int(labels.sum())} prompts; {int((~heard).sum())} silent clips",
                )
            )  # fmt: skip
    return rows


def distance_rows(
    name: str, real: np.ndarray, groups: np.ndarray, others: Mapping[str, np.ndarray],
    boot: Bootstrap, size: int = SET_SIZE,
) -> list[Row]:  # fmt: skip
    """Distances of sets of clips from real clips in the embedding `name` (`set_distance`).

    All embeddings are [n, d] and row i of each belongs to `groups[i]`. Sets called "codec" and
    "generated" have targets for their ratio to real against real; the others are controls.
    """
    reference = Embedded.of(real, groups)
    kernel = GaussianKernel.fit(reference)
    rows: list[Row] = []
    for kind, values in others.items():
        other = Embedded.of(values, groups)
        seed = seed_for(boot.seed, "distance")
        found: Comparison = compare(kernel, reference, other, size, boot.n, seed)
        start, n = f"distance.{name}", len(other.values)
        refused = np.isnan(found.ratio.value)
        if not rows:
            rows.append(
                estimate_row(
                    f"{start}.real_against_real", found.real, len(real),
                    note=f"expected of two sets of {size} clips",
                )
            )  # fmt: skip
        target = TARGETS.get(f"{kind}_ratio")
        rng = np.random.default_rng(seed_for(boot.seed, "frechet", name, kind))
        frechet, fit = frechet_infinity(reference.values, other.values, rng)
        rows += [
            estimate_row(f"{start}.{kind}", found.distance, n),
            estimate_row(
                f"{start}.{kind}_ratio", found.ratio, n, target=target,
                direction=None if target is None else "at_most",
                note="refused: real against real may be 0" if refused else "",
            ),
            estimate_row(
                f"{start}.{kind}_population", found.population, n,
                control={"same_distribution": 0.0, "frechet_infinity": frechet,
                         "frechet_infinity_r2": fit},
            ),
        ]  # fmt: skip
    return rows


def classifier_rows(
    real: np.ndarray, codec: np.ndarray, generated: np.ndarray, groups: np.ndarray, boot: Bootstrap
) -> list[Row]:
    """AUROC of classifiers of modulation and onset statistics [n, features], held out by group.

    Generated against codec-reconstructed, and reconstructed against real clips. Null: two random
    halves of the real compositions.
    """
    null, low, high = null_auroc(real, groups, seed_for(boot.seed, "null classifier"))
    both = np.concatenate([groups, groups])
    rows = []
    for name, (one, zero) in {
        "generated_against_codec": (generated, codec), "codec_against_real": (codec, real),
    }.items():  # fmt: skip
        labels = np.repeat([1, 0], [len(one), len(zero)])
        scored = classify(np.concatenate([one, zero]), labels, both, seed_for(boot.seed, name))
        rows.append(
            estimate_row(
                f"classifier.{name}", scored.estimate(boot.n, boot.seed), len(labels),
                control={"real_against_real": null, "null_lower_end": low, "null_upper_end": high},
            )
        )  # fmt: skip
    return rows


def music_rows(
    real: Mapping[str, np.ndarray], generated: Mapping[str, np.ndarray],
    controls: Mapping[str, Mapping[str, np.ndarray]], groups: np.ndarray, boot: Bootstrap,
) -> list[Row]:  # fmt: skip
    """Median of each measure of generated clips beside the middle 90 % of real clips.

    All are name -> [n] (`music_measures`) with row i in `groups[i]`; `controls` such as codec,
    noise and shuffled frames. The share of clips inside is a row of its own; its control for real
    clips uses bounds of the other compositions.
    """
    rows = []
    for name, values in real.items():
        band = tuple(float(v) for v in np.percentile(values, [5, 95]))
        medians = {k: float(np.median(v[name])) for k, v in controls.items()}
        unit = music.UNITS[name]
        rows.append(
            boot.row(
                f"music.{name}", median_of(generated[name]), groups, unit, target=band,
                direction="within", control=medians | {"real": float(np.median(values))},
                note="median; target: middle 90 % of real clips",
            )
        )  # fmt: skip

        def inside(found: np.ndarray, band: tuple = band) -> np.ndarray:
            return ((found >= band[0]) & (found <= band[1])).astype(float)

        shares = {k: float(inside(v[name]).mean()) for k, v in controls.items()}
        kept = np.empty(len(values))
        for group in np.unique(groups):
            own = groups == group
            kept[own] = inside(values[own], tuple(np.percentile(values[~own], [5, 95])))
        rows.append(
            boot.row(
                f"music.{name}.share_inside", inside(generated[name]), groups, "share of clips",
                control=shares | {"real": float(kept.mean())},
            )
        )  # fmt: skip
    means = {k: float(v["beat_periodicity"].mean()) for k, v in controls.items()}
    rows.append(
        boot.row(
            "music.beat_periodicity.mean", generated["beat_periodicity"], groups, "correlation",
            target=TARGETS["beat_periodicity"], direction="at_least",
            control=means | {"real": float(real["beat_periodicity"].mean())},
        )
    )  # fmt: skip
    return rows
