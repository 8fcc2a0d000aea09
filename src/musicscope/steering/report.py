"""Results of steering as metrics, tables and audio: projections of `Result.outcomes`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile

from musicscope.core.io import Metrics, atomic_dir, write_json, write_text
from musicscope.core.stats import columns
from musicscope.steering.conditions import Context
from musicscope.steering.evaluation import family_changes
from musicscope.steering.methods import JOINT_METHODS, Request
from musicscope.steering.recipes import DIRECTIONS, WORDS, Recipe, save_recipe, summary_of
from musicscope.steering.search import Plan, Result

TEST_KEYS = (
    "success", "change", "wanted", "wanted_plain", "others_change", "ce_cost", "frechet", "silent",
    "spectral_cost",
)  # fmt: skip
"""Numbers of the test table; spectral_cost exists for audio models only."""
COSTS = ("ce_cost", "spectral_cost", "frechet", "silent")
Learnt = Mapping[str, tuple[Recipe, Mapping[str, float]]]
"""Concept -> recipe and its AUROCs, as `learning.learn_recipe` returns."""


@dataclass(frozen=True)
class Outs:
    """Where an evaluation is written."""

    folder: str
    """Recipes with the chosen settings, and examples/ with audio."""
    metrics: str
    """JSON file"""
    plots: str
    """Prefix of the names of tables."""


# --- metrics ----------------------------------------------------------------------------------


def _pick(outcome: Metrics, keys: Sequence[str]) -> Metrics:
    return {key: outcome[key] for key in keys if key in outcome}


def _chosen(result: Result, method: str, request: Request) -> dict[str, object]:
    """The settings chosen for a method, and their scores on validation data."""
    search = result.search
    own = (search["concept"] == request[0]) & (search["direction"] == request[1])
    (row,) = search[own & (search["method"] == method) & search["chosen"]].to_dict("records")
    keys = ("change", "success", "ce_cost", "spectral_cost", "frechet_ratio")
    return {**asdict(result.choices[method, request]), "validation": _pick(row, keys)}


def concept_metrics(result: Result, request: Request) -> dict[str, object]:
    """Chosen settings, the outcome of every method, and differences of success."""
    edit, methods = " ".join(request), result.tests[request]
    return {
        "chosen": {
            m: _chosen(result, m, request) for m in methods if (m, request) in result.choices
        },
        "methods": {m: result.outcomes[edit, m, request] for m in methods if m != "plain"},
        **result.advantages(request),
    }


def joint_metrics(result: Result, pair: str) -> dict[str, object]:
    """Per method the share of samples with all requests fulfilled and the costs.

    Also success, change and costs per request, fulfilled together and alone, without intervals.
    """
    metrics: dict[str, object] = {}
    requests = result.requests_of(pair)
    for method in (m for m in JOINT_METHODS if m in result.joints[pair]):
        entry: Metrics = result.all_fulfilled(pair, method)
        for request in requests:
            outcome = columns(result.outcomes[pair, method, request])
            entry |= {request[0]: _pick(outcome, ("success", "change")), **_pick(outcome, COSTS)}
        metrics[method] = entry
    for request in requests:
        outcome = columns(result.outcomes[pair, f"alone {request[0]}", request])
        metrics[f"alone_{request[0]}"] = _pick(outcome, ("success", "change", "ce_cost"))
    return metrics


def plan_metrics(plan: Plan) -> dict[str, object]:
    """Clips used for each edit, and what was skipped and why; for audio models."""
    clips: dict[str, object] = {
        " ".join(request): {"validation": plan.validation[request].n, "test": test.n}
        for request, test in plan.tests.items()
    }
    clips |= {pair: {"test": test.n} for pair, test in plan.joints.items()}
    return {
        "pieces": "clips",
        "clips": clips,
        "skipped": len(plan.skipped),
        "skipped_because": dict(plan.skipped),
    }


def pool_of(recipe: Recipe) -> dict[str, object]:
    """Latents that could be edited: those that return in other seeds, or all; and their number."""
    latents = len(recipe.statistics["mean_with"])
    if recipe.pool is None:
        return {"of": "all", "latents": latents}
    return {"of": "returning", "latents": int(recipe.pool.sum())}


def metrics(result: Result, recipes: Learnt, context: Context) -> dict[str, object]:
    """All numbers of metrics/steer/<model>.json.

    `prompts` is the number of samples of the smallest edit.
    """
    clips = plan_metrics(result.plan) if context.subject.noun == "clips" else {}
    return {
        "layer": context.layer,
        "prompts": min(own["plain"].selection.n for own in result.edits.values()),
        "seconds": context.subject.seconds,
        "thresholds": result.scorer.thresholds,
        "recipes": {
            c: {**aurocs, "pool": pool_of(r), **summary_of(r)} for c, (r, aurocs) in recipes.items()
        },
        "concepts": {
            c: {d: concept_metrics(result, (c, d)) for d in DIRECTIONS if (c, d) in result.tests}
            for c in recipes
        },
        "joint": {pair: joint_metrics(result, pair) for pair in result.joints},
        **clips,
    }


# --- tables -----------------------------------------------------------------------------------


def test_table(result: Result) -> pd.DataFrame:
    """One row per request and method on test data, at the settings chosen for it."""
    rows = []
    for (edit, method, request), outcome in result.outcomes.items():
        if edit not in result.joints:
            settings = result.tests[request][method].settings
            at = {"concept": request[0], "direction": request[1], "method": method,
                  "strength": settings[0].strength if settings else np.nan}  # fmt: skip
            rows.append({**at, **columns(_pick(outcome, TEST_KEYS))})
    return pd.DataFrame(rows)


def dose_table(search: pd.DataFrame) -> pd.DataFrame:
    """Rows of the search that differ from the chosen settings in strength only."""
    others = ["concept", "direction", "method", "n_features", "score", "branch", "loop"]
    return search.merge(search.loc[search["chosen"], others], on=others)


def cross_talk(result: Result) -> pd.DataFrame:
    """Mean change of every family's probability: one row per edit, one column per family.

    Single requests come first, then the requests of each pair alone and together.
    """
    rows = {}
    for edit in result.edits:
        requests, plain = result.requests_of(edit), result.of(edit, "plain")
        names = {edit: "sae"}
        if edit in result.joints:
            names = {f"{edit}: {c} {d}": f"alone {c}" for c, d in requests}
            names[f"{edit}: both"] = "sae"
        for name, method in names.items():
            rows[name] = family_changes(plain, result.of(edit, method))
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(result.scorer.families))


# --- files ------------------------------------------------------------------------------------


def write_examples(result: Result, folder: Path, context: Context) -> None:
    """Write plain and steered FLAC files of the first test samples, and index.json.

    index.json: ``sample_rate``, ``families`` and ``examples``, each with ``wishes`` ("guitar off"
    ...), ``prompt``, the files ``plain`` and ``steered``, and ``judges``: judge -> concept ->
    [probability before, after].
    """
    folder.mkdir(parents=True, exist_ok=True)
    rate, entries = context.model.sample_rate, []
    for edit, conditions in result.edits.items():
        requests = result.requests_of(edit)
        both = {"plain": result.of(edit, "plain"), "steered": result.of(edit, "sae")}
        titles = context.subject.titles(conditions["plain"].selection)
        stem = "-".join(f"{c}-{d}" for c, d in requests)
        for i in range(len(both["plain"].audio)):
            files = {kind: f"{stem}-{i}-{kind}.flac" for kind in both}
            for kind, measured in both.items():
                sound = np.clip(measured.audio[i], -1, 1)
                soundfile.write(folder / files[kind], sound, rate, subtype="PCM_16")
            judges = {
                judge: {
                    c: [float(m.probabilities[judge][i, result.scorer.column(c)])
                        for m in both.values()]
                    for c, _ in requests
                }
                for judge in both["plain"].probabilities
            }  # fmt: skip
            wishes = [" ".join(request) for request in requests]
            entries.append({"wishes": wishes, "prompt": titles[i], **files, "judges": judges})
    write_json(
        folder / "index.json",
        {"sample_rate": rate, "families": result.scorer.families, "examples": entries},
    )


def _write_recipes(result: Result, recipes: Learnt, folder: Path) -> None:
    """Save the recipes with their chosen settings."""
    for concept, (recipe, _) in recipes.items():
        chosen = {}
        for suffix, method in (("", "sae"), (WORDS, "sae_words")):
            for d in DIRECTIONS:
                if (method, (concept, d)) in result.choices:
                    chosen[d + suffix] = result.choices[method, (concept, d)]
        save_recipe(replace(recipe, chosen=chosen), folder)


def write(result: Result, recipes: Learnt, context: Context, outs: Outs) -> None:
    """Write all outs of a run."""
    with atomic_dir(outs.folder) as folder:
        _write_recipes(result, recipes, folder)
        write_examples(result, folder / "examples", context)
    frames = {
        "": test_table(result),
        "-search": result.search,
        "-dose": dose_table(result.search),
        "-crosstalk": cross_talk(result).rename_axis("edit").reset_index(),
    }
    for suffix, frame in frames.items():
        write_text(f"{outs.plots}{suffix}.csv", frame.to_csv(index=False, float_format="%.6g"))
    write_json(outs.metrics, metrics(result, recipes, context))


def write_nothing(plan: Plan, outs: Outs) -> None:
    """Write all outs if no edit has the clips that it needs: reasons and empty tables."""
    with atomic_dir(outs.folder) as folder:
        index = {"sample_rate": None, "families": [], "examples": []}
        (folder / "examples").mkdir()
        write_json(folder / "examples" / "index.json", index)
    for suffix in ("", "-search", "-dose", "-crosstalk"):
        write_text(f"{outs.plots}{suffix}.csv", "concept,direction,method\n")
    write_json(outs.metrics, {**plan_metrics(plan), "prompts": 0, "concepts": {}, "joint": {}})
