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
from musicscope.steering.curves import grounding, noise_floor, null_slopes
from musicscope.steering.evaluation import family_changes
from musicscope.steering.methods import JOINT_METHODS, Request
from musicscope.steering.recipes import (
    DIRECTIONS,
    WORDS,
    Recipe,
    save_dictionary,
    save_recipe,
    summary_of,
)
from musicscope.steering.search import Plan, Result

TEST_KEYS = (
    "success", "success_choosing", "headline", "kept", "quality", "change", "gain",
    "others_change", "ce_cost", "distance", "silent", "spectral_cost",
)  # fmt: skip
"""Numbers of the test table; spectral_cost exists for audio models only."""
COSTS = ("ce_cost", "spectral_cost", "distance", "silent")
VERDICTS = "verdicts.parquet"
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
    keys = ("change", "success_choosing", "ce_cost", "spectral_cost", "distance")
    return {
        **asdict(result.choices[method, request]),
        "within_budget": bool(row["within_budget"]),
        "validation": _pick(row, keys),
    }


def concept_metrics(result: Result, request: Request, batch: int) -> dict[str, object]:
    """Chosen settings, the outcome of every method, differences of success, curves and nulls."""
    edit, methods = " ".join(request), result.tests[request]
    ours, measured = methods["sae"], {m: result.of(edit, m) for m in methods}
    return {
        "chosen": {
            m: _chosen(result, m, request) for m in methods if (m, request) in result.choices
        },
        "methods": {m: result.outcomes[edit, m, request] for m in methods if m != "plain"},
        **result.advantages(request),
        "curves": result.curves[request],
        "null": null_slopes(
            result.scorer, measured["plain"], measured, ours.settings[0].strength, request, batch
        ),
    }


def judge_metrics(result: Result) -> dict[str, object]:
    """Noise floor and grounding per concept, on plain test pieces."""
    noise, grounded = {}, {}
    for concept in result.plan.concepts:
        plain = {
            d: result.of(f"{concept} {d}", "plain")
            for d in DIRECTIONS if (concept, d) in result.tests
        }  # fmt: skip
        noise[concept] = noise_floor(result.scorer, list(plain.values()), concept)
        if len(plain) == len(DIRECTIONS):
            grounded[concept] = grounding(result.scorer, plain["off"], plain["on"], concept)
    return {"noise": noise, "grounding": grounded}


def joint_metrics(result: Result, pair: str) -> dict[str, object]:
    """Per method the share of samples with all requests fulfilled and the costs.

    Also success, change and costs per request, fulfilled together and alone, without intervals.
    Here success is the share with the wanted verdict less that of the unedited pieces.
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
    if result.plan.skipped and not clips:
        of = plan_metrics(result.plan)
        clips = {key: of[key] for key in ("skipped", "skipped_because")}
    return {
        "layer": context.layer,
        "prompts": min(own["plain"].selection.n for own in result.edits.values()),
        "seconds": context.subject.seconds,
        "thresholds": result.scorer.thresholds,
        "reliability": {
            judge: {c: known[c] for c in result.plan.concepts if c in known}
            for judge, known in result.scorer.reliability.items()
        },
        "recipes": {
            c: {**aurocs, "pool": pool_of(r), **summary_of(r)} for c, (r, aurocs) in recipes.items()
        },
        "concepts": {
            c: {
                d: concept_metrics(result, (c, d), context.subject.batch)
                for d in DIRECTIONS
                if (c, d) in result.tests
            }
            for c in recipes
        },
        **judge_metrics(result),
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


def verdict_table(result: Result) -> pd.DataFrame:
    """One row per edit, method, request and test piece, with every judge's probability, float16.

    With the thresholds in metrics/, any success can be had from it again.
    """
    frames = []
    for edit, conditions in result.edits.items():
        for method in conditions:
            measured = result.of(edit, method)
            for concept, direction in result.requests_of(edit):
                at = result.scorer.column(concept)
                own = pd.DataFrame(
                    {j: p[:, at].astype(np.float16) for j, p in measured.probabilities.items()}
                )
                own.insert(0, "piece", np.arange(len(own), dtype=np.int16))
                frames.append(
                    own.assign(edit=edit, method=method, concept=concept, direction=direction)
                )
    names = ["edit", "method", "concept", "direction"]
    table = pd.concat(frames, ignore_index=True)
    judges = [c for c in table if c not in (*names, "piece")]
    return table[[*names, "piece", *judges]].astype(dict.fromkeys(names, "category"))


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


def _write_recipes(
    result: Result, recipes: Learnt, folder: Path, grounded: Mapping[str, float]
) -> None:
    """Save the recipes with their chosen settings and the grounding of their concepts."""
    for concept, (recipe, _) in recipes.items():
        chosen = {}
        for suffix, method in (("", "sae"), (WORDS, "sae_words")):
            for d in DIRECTIONS:
                if (method, (concept, d)) in result.choices:
                    chosen[d + suffix] = result.choices[method, (concept, d)]
        save_recipe(replace(recipe, chosen=chosen, grounding=grounded.get(concept)), folder)


def write(result: Result, recipes: Learnt, context: Context, outs: Outs) -> None:
    """Write all outs of a run."""
    found: Metrics = metrics(result, recipes, context)
    grounded = {c: of["auroc"]["value"] for c, of in found["grounding"].items()}
    with atomic_dir(outs.folder) as folder:
        _write_recipes(result, recipes, folder, grounded)
        own = next(iter(recipes.values()))[0]
        save_dictionary(context.sae, own.slot, own.layer, folder)
        verdict_table(result).to_parquet(folder / VERDICTS, index=False, compression="zstd")
        write_examples(result, folder / "examples", context)
    frames = {
        "": test_table(result),
        "-search": result.search,
        "-dose": dose_table(result.search),
        "-crosstalk": cross_talk(result).rename_axis("edit").reset_index(),
    }
    for suffix, frame in frames.items():
        write_text(f"{outs.plots}{suffix}.csv", frame.to_csv(index=False, float_format="%.6g"))
    write_json(outs.metrics, found)


def write_nothing(plan: Plan, outs: Outs) -> None:
    """Write all outs if no edit has the clips that it needs: reasons and empty tables."""
    with atomic_dir(outs.folder) as folder:
        index = {"sample_rate": None, "families": [], "examples": []}
        (folder / "examples").mkdir()
        write_json(folder / "examples" / "index.json", index)
    for suffix in ("", "-search", "-dose", "-crosstalk"):
        write_text(f"{outs.plots}{suffix}.csv", "concept,direction,method\n")
    write_json(outs.metrics, {**plan_metrics(plan), "prompts": 0, "concepts": {}, "joint": {}})
