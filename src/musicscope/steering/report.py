"""Results of steering as metrics, tables, charts and audio: projections of `Result.outcomes`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from musicscope.core import plots
from musicscope.core.io import Metrics, atomic_dir, write_json, write_text
from musicscope.steering.conditions import Context
from musicscope.steering.evaluation import family_changes
from musicscope.steering.methods import JOINT_METHODS, Request
from musicscope.steering.recipes import DIRECTIONS, WORDS, Recipe, save_recipe, summary_of
from musicscope.steering.search import Plan, Result

TEST_KEYS = (
    "success", "success_ci_low", "success_ci_high", "change", "change_ci_low", "change_ci_high",
    "wanted", "wanted_plain", "others_change", "ce_cost", "ce_cost_ci_low", "ce_cost_ci_high",
    "frechet", "silent", "spectral_cost", "spectral_cost_ci_low", "spectral_cost_ci_high",
)  # fmt: skip
"""Columns of the test table; spectral_cost exists for audio models only."""
COSTS = ("ce_cost", "spectral_cost", "frechet", "silent")
CHART_SUFFIXES = ("-dose", "-trade", "-crosstalk")
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
    """Prefix of the names of tables and charts."""


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

    Also success and change per request, fulfilled together and alone.
    """
    metrics: dict[str, object] = {}
    requests = result.requests_of(pair)
    for method in (m for m in JOINT_METHODS if m in result.joints[pair]):
        entry: Metrics = result.all_fulfilled(pair, method)
        for request in requests:
            outcome = result.outcomes[pair, method, request]
            entry |= {request[0]: _pick(outcome, ("success", "change")), **_pick(outcome, COSTS)}
        metrics[method] = entry
    for request in requests:
        outcome = result.outcomes[pair, f"alone {request[0]}", request]
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
        "recipes": {c: {**aurocs, **summary_of(r)} for c, (r, aurocs) in recipes.items()},
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
            rows.append({**at, **_pick(outcome, TEST_KEYS)})
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


# --- charts -----------------------------------------------------------------------------------


def _panels(table: pd.DataFrame, title: str) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """Make one panel per concept (columns) and direction (rows), with its rows of the table."""
    concepts = list(dict.fromkeys(table["concept"]))
    figure, axes = plots.new_figure(2, len(concepts), (3.3 * len(concepts) + 0.8, 6.2), sharey=True)
    figure.suptitle(title)
    parts = []
    for row, direction in enumerate(("off", "on")):
        for column, concept in enumerate(concepts):
            axis = axes[row, column]
            axis.set(title=f"{concept} {direction}", ylim=(-0.03, 1.03))
            here = (table["concept"] == concept) & (table["direction"] == direction)
            parts.append((axis, table[here]))
    return figure, parts


def dose_figure(doses: pd.DataFrame, tests: pd.DataFrame, title: str) -> Figure:
    """Draw success over strength on validation data, with controls on test data as lines."""
    figure, parts = _panels(doses, title)
    for axis, rows in parts:
        at = rows.iloc[0]
        for series, method in enumerate(("sae", "diff_means")):
            part = rows[rows["method"] == method].sort_values("strength")
            plots.interval_curve(
                axis, part["strength"], part["success"], part["success_ci_low"],
                part["success_ci_high"], method, series,
            )  # fmt: skip
        here = (tests["concept"] == at["concept"]) & (tests["direction"] == at["direction"])
        for style, method in (("--", "prompt_edit"), (":", "reseed")):
            # An audio model has no prompt to edit, and may have no clips for a request.
            for value in tests.loc[here & (tests["method"] == method), "success"]:
                axis.axhline(value, color="#555555", lw=1.4, ls=style, label=method)
        if rows["success"].notna().any():  # nothing to change: no point, and no logarithm
            axis.set_xscale("log")
        axis.set_xlabel("strength")
    _legend(figure, parts, "success (95 %)")
    return figure


def trade_figure(doses: pd.DataFrame, title: str) -> Figure:
    """Draw success over cost: compare methods at the same cost."""
    figure, parts = _panels(doses, title)
    for axis, rows in parts:
        for series, method in enumerate(dict.fromkeys(doses["method"])):
            part = rows[rows["method"] == method].sort_values("strength")
            style = {"color": plots.COLOURS[series % 8], "marker": plots.MARKERS[series % 8]}
            axis.plot(part["frechet"], part["success"], ms=5, label=method, **style)
        axis.set(xlabel="Frechet distance from plain")
        axis.grid(color="#dddddd", lw=0.7)
    _legend(figure, parts, "success")
    return figure


def _legend(figure: Figure, parts: Sequence[tuple[Axes, pd.DataFrame]], label: str) -> None:
    for axis in (parts[0][0], parts[len(parts) // 2][0]):
        axis.set_ylabel(label)
    handles, texts = parts[0][0].get_legend_handles_labels()
    texts = [text.replace("_", " ") for text in texts]
    figure.legend(handles, texts, loc="outside lower center", ncols=4)


def cross_talk_figure(table: pd.DataFrame, title: str) -> Figure:
    """Draw the cross-talk matrix as a heat map with its numbers."""
    figure, ((axis,),) = plots.new_figure(
        size=(2.8 + 0.62 * table.shape[1], 1.4 + 0.36 * len(table))
    )
    values = table.to_numpy()
    largest = float(np.nanmax(np.abs(values), initial=1e-3))
    axis.imshow(values, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        colour = "white" if abs(value) > 0.6 * largest else "black"
        axis.text(x, y, f"{value:+.2f}", ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(table.shape[1]), [c.replace("_", " ") for c in table], rotation=40)
    axis.set_yticks(range(len(table)), table.index, fontsize=8)
    axis.set_title(title)
    return figure


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
    model = context.model.name
    table, talk, doses = test_table(result), cross_talk(result), dose_table(result.search)
    frames = {
        "": table,
        "-search": result.search,
        "-dose": doses,
        "-crosstalk": talk.rename_axis("edit").reset_index(),
    }
    for suffix, frame in frames.items():
        write_text(f"{outs.plots}{suffix}.csv", frame.to_csv(index=False, float_format="%.6g"))
    figures = (
        dose_figure(doses, table, model),
        trade_figure(doses, model),
        cross_talk_figure(talk, f"{model}: mean change of the judge"),
    )
    for suffix, figure in zip(CHART_SUFFIXES, figures, strict=True):
        plots.save_figure(figure, f"{outs.plots}{suffix}.png")
    write_json(outs.metrics, metrics(result, recipes, context))


def write_nothing(plan: Plan, name: str, outs: Outs) -> None:
    """Write all outs if no edit has the clips that it needs: reasons, empty tables and charts."""
    with atomic_dir(outs.folder) as folder:
        index = {"sample_rate": None, "families": [], "examples": []}
        (folder / "examples").mkdir()
        write_json(folder / "examples" / "index.json", index)
    for suffix in ("", "-search", "-dose", "-crosstalk"):
        write_text(f"{outs.plots}{suffix}.csv", "concept,direction,method\n")
    for suffix in CHART_SUFFIXES:
        figure, ((axis,),) = plots.new_figure(1, 1, (6.0, 1.4))
        text = f"{name}: no edit has the clips that it needs"
        axis.text(0.5, 0.5, text, ha="center", va="center", wrap=True, fontsize=8)
        axis.set_axis_off()
        plots.save_figure(figure, f"{outs.plots}{suffix}.png")
    write_json(outs.metrics, {**plan_metrics(plan), "prompts": 0, "concepts": {}, "joint": {}})
