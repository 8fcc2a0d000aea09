"""Results of steering as metrics, tables and audio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import soundfile

from musicscope.core import plots
from musicscope.core.io import atomic_dir, write_json, write_text
from musicscope.steering.charts import cross_talk_figure, dose_figure, trade_figure
from musicscope.steering.conditions import WITH_WORDS, Bench, Cell
from musicscope.steering.evaluation import advantage, all_wishes, family_changes, outcome
from musicscope.steering.recipes import DIRECTIONS, WORDS, save_recipe, summary_of
from musicscope.steering.search import Result, Wish, parse_pair

RIVALS = ("prompt_edit", "diff_means", "probe_direction", "random_feature", "random_direction")
"""Methods that the latents' success is compared with, paired over prompts."""
WORDS_RIVALS = ("sae", "prompt_edit", "diff_means", "diff_means_words")
"""The same for latents on top of the edited prompt."""
SUMMARY = (
    "prompt_edit", "diff_means", "random_feature", "passthrough", "reseed", *WITH_WORDS,
)  # fmt: skip
TEST_KEYS = (
    "success", "success_ci_low", "success_ci_high", "change", "change_ci_low", "change_ci_high",
    "wanted", "wanted_plain", "others_change", "ce_cost", "ce_cost_ci_low", "ce_cost_ci_high",
    "frechet", "silent",
)  # fmt: skip
SPECTRAL_KEYS = ("spectral_cost", "spectral_cost_ci_low", "spectral_cost_ci_high")
"""Of an audio model, whose ce_cost is NaN."""


@dataclass(frozen=True)
class Outs:
    """Where an evaluation is written."""

    folder: str
    """Recipes with the chosen settings, and examples/ with audio."""
    metrics: str
    """JSON file"""
    plots: str
    """Beginning of the names of tables and charts."""


def _name(wish: Wish) -> str:
    return f"{wish[0]} {wish[1]}"


def _outcome(result: Result, plain: Cell, cell: Cell, wish: Wish) -> dict[str, Any]:
    return outcome(result.scorer, result.measured[plain], result.measured[cell], *wish)


def _chosen(result: Result, method: str, wish: Wish) -> dict[str, Any]:
    """The settings chosen for a method, and what they did on validation prompts."""
    search = result.search
    own = (search["concept"] == wish[0]) & (search["direction"] == wish[1])
    (row,) = search[own & (search["method"] == method) & search["chosen"]].to_dict("records")
    kept = ("change", "success", "ce_cost", "spectral_cost", "frechet_ratio")
    validation = {k: row[k] for k in kept if k in row}
    return {**asdict(result.choices[method, wish]), "validation": validation}


def concept_metrics(result: Result, wish: Wish) -> dict[str, Any]:
    """Chosen settings, the outcome of every method, and the latents' success less that of each."""
    cells = result.tests[wish]
    plain = result.measured[cells["plain"]]
    methods = {m: _outcome(result, cells["plain"], c, wish) for m, c in cells.items()}
    del methods["plain"]  # against itself: no change

    def less(ours: str, rivals: Sequence[str]) -> dict[str, dict[str, float]]:
        first = result.measured[cells[ours]]
        return {
            m: advantage(result.scorer, plain, first, result.measured[cells[m]], *wish)
            for m in rivals
            if m in cells
        }

    found = {
        "chosen": {m: _chosen(result, m, wish) for m in cells if (m, wish) in result.choices},
        "methods": methods,
        "sae_minus": less("sae", RIVALS),
    }
    return found | (
        {"sae_words_minus": less("sae_words", WORDS_RIVALS)} if "sae_words" in cells else {}
    )


def joint_metrics(result: Result, name: str) -> dict[str, Any]:
    """Per method the share of pieces with every wish fulfilled; per wish its success in company
    and alone; and what each concept's probability changes by under every edit."""
    cells, pair = result.joints[name], parse_pair(name)
    plain = cells["plain"]
    found: dict[str, Any] = {}
    for method in (m for m in ("sae", "sae_words", "diff_means", "prompt_edit") if m in cells):
        measured = result.measured[cells[method]]
        entry = all_wishes(result.scorer, result.measured[plain], measured, pair)
        for concept, direction in pair:
            own = _outcome(result, plain, cells[method], (concept, direction))
            entry[concept] = {k: own[k] for k in ("success", "change")}
            costs = ("ce_cost", "spectral_cost", "frechet", "silent")
            entry |= {k: own[k] for k in costs if k in own}
        found[method] = entry
    for concept, direction in pair:
        own = _outcome(result, plain, cells[f"alone {concept}"], (concept, direction))
        found[f"alone_{concept}"] = {k: own[k] for k in ("success", "change", "ce_cost")}
    return found


def cross_talk(result: Result) -> pd.DataFrame:
    """One row an edit (single wishes, then pairs alone and together), one column a family: mean
    change of the families' judge from the plain pieces on the same prompts."""
    families = result.scorer.families
    rows = {}

    def add(label: str, plain: Cell, cell: Cell) -> None:
        rows[label] = family_changes(result.measured[plain], result.measured[cell])

    for wish, cells in result.tests.items():
        add(_name(wish), cells["plain"], cells["sae"])
    for name, cells in result.joints.items():
        for concept, direction in parse_pair(name):
            add(f"{name}: {concept} {direction}", cells["plain"], cells[f"alone {concept}"])
        add(f"{name}: both", cells["plain"], cells["sae"])
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(families))


def test_table(result: Result) -> pd.DataFrame:
    """One row a method on test prompts, at the settings chosen for it."""
    records = []
    for wish, cells in result.tests.items():
        for method, cell in cells.items():
            if method == "plain":
                continue
            found = _outcome(result, cells["plain"], cell, wish)
            strength = cell.settings[0].strength if cell.settings else np.nan
            at = {"concept": wish[0], "direction": wish[1], "method": method, "strength": strength}
            keys = (*TEST_KEYS, *(k for k in SPECTRAL_KEYS if k in found))
            records.append({**at, **{k: found[k] for k in keys}})
    return pd.DataFrame(records)


def dose_table(search: pd.DataFrame) -> pd.DataFrame:
    """Rows of the search in which nothing but the strength differs from what was chosen."""
    others = ["concept", "direction", "method", "n_features", "score", "branch", "loop"]
    return search.merge(search.loc[search["chosen"], others], on=others)


def metrics(result: Result, recipes: Mapping[str, Any], bench: Bench) -> dict[str, Any]:
    """All numbers of metrics/steer/<model>.json; `recipes`: concept -> (Recipe, its AUROCs).

    Of an audio model `prompts` are the clips of the edit that has the fewest.
    """
    groups = (*result.tests.values(), *result.joints.values())
    return {
        "layer": bench.layer,
        "prompts": min(cells["plain"].prompts.n for cells in groups),
        "seconds": bench.seconds,
        "thresholds": result.scorer.thresholds,
        "recipes": {c: {**aurocs, **summary_of(r)} for c, (r, aurocs) in recipes.items()},
        "concepts": {
            c: {d: concept_metrics(result, (c, d)) for d in DIRECTIONS if (c, d) in result.tests}
            for c in recipes
        },
        "joint": {name: joint_metrics(result, name) for name in result.joints},
    }


def summary_keys(found: Mapping[str, Any]) -> dict[str, Any]:
    """The headline numbers of metrics/steer/<model>.json, one level deep.

    prompts: how many each is over; quality_cost: rise of the unsteered model's cross-entropy, nats
    a code. An audio model has spectral_cost for it, and skipped: edits that it has no clips for.
    """
    keys: dict[str, Any] = {k: found[k] for k in ("prompts", "skipped") if k in found}

    def cost(of: Mapping[str, Any]) -> dict[str, Any]:
        spectral = of.get("spectral_cost")
        return {"quality_cost": of["ce_cost"]} if spectral is None else {"spectral_cost": spectral}

    for concept, directions in found["concepts"].items():
        for direction, entry in directions.items():
            at, methods = f"{concept}.{direction}", entry["methods"]
            for key in ("success", "success_ci_low", "success_ci_high"):
                keys[f"{at}.{key}"] = methods["sae"][key]
            keys |= {f"{at}.{m}": methods[m]["success"] for m in SUMMARY if m in methods}
            keys |= {f"{at}.{k}": value for k, value in cost(methods["sae"]).items()}
            keys[f"{at}.others_change"] = methods["sae"]["others_change"]
            gap = entry["sae_minus"]["diff_means"]
            keys[f"{at}.minus_diff_means"] = gap["difference"]
            for end in ("low", "high"):
                keys[f"{at}.minus_diff_means_ci_{end}"] = gap[f"difference_ci_{end}"]
    for name, entry in found["joint"].items():
        at = "joint." + name.replace("+", "_").replace("-", "_")
        ours = entry["sae"]
        for key in ("all_wanted_plain", "all_wanted", "all_wanted_ci_low", "all_wanted_ci_high"):
            keys[f"{at}.{key}"] = ours[key]
        rivals = ("prompt_edit", "diff_means", "sae_words")
        keys |= {f"{at}.{m}": entry[m]["all_wanted"] for m in rivals if m in entry}
        keys |= {f"{at}.{k}": value for k, value in cost(ours).items()}
    return keys


# --- files ------------------------------------------------------------------------------------


def write_examples(result: Result, folder: Path, bench: Bench) -> None:
    """Plain and steered FLAC files of the first test prompts or clips, and index.json.

    index.json: ``sample_rate``, ``families`` and ``examples``, each with ``wishes`` ("guitar off"
    ...), ``prompt``, the files ``plain`` and ``steered``, and ``judges``: judge -> concept ->
    [probability before, after].
    """
    folder.mkdir(parents=True, exist_ok=True)
    rate, entries = bench.model.sample_rate, []
    groups = [((wish,), cells) for wish, cells in result.tests.items()]
    groups += [(parse_pair(name), cells) for name, cells in result.joints.items()]
    for wishes, cells in groups:
        plain, steered = (result.measured[cells[m]] for m in ("plain", "sae"))
        texts = bench.titles(cells["plain"].prompts)
        stem = "-".join(f"{c}-{d}" for c, d in wishes)
        for i in range(len(plain.audio)):
            files = {}
            for kind, measured in (("plain", plain), ("steered", steered)):
                files[kind] = f"{stem}-{i}-{kind}.flac"
                sound = np.clip(measured.audio[i], -1, 1)
                soundfile.write(folder / files[kind], sound, rate, subtype="PCM_16")
            judges = {
                judge: {
                    c: [float(m.probabilities[judge][i, result.scorer.column(c)])
                        for m in (plain, steered)]
                    for c, _ in wishes
                }
                for judge in plain.probabilities
            }  # fmt: skip
            entries.append(
                {"wishes": [_name(w) for w in wishes], "prompt": texts[i], **files,
                 "judges": judges}
            )  # fmt: skip
    write_json(
        folder / "index.json",
        {"sample_rate": rate, "families": result.scorer.families, "examples": entries},
    )


def write(
    result: Result, recipes: Mapping[str, Any], bench: Bench, outs: Outs,
    more: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """All outs of a run; `recipes` as for `metrics`, to which `more` is added."""
    with atomic_dir(outs.folder) as folder:
        for concept, (recipe, _) in recipes.items():
            chosen = {d: result.choices["sae", (concept, d)] for d in DIRECTIONS}
            for d in DIRECTIONS:
                if ("sae_words", (concept, d)) in result.choices:
                    chosen[d + WORDS] = result.choices["sae_words", (concept, d)]
            save_recipe(replace(recipe, chosen=chosen), folder)
        write_examples(result, folder / "examples", bench)
    stem, model = outs.plots, bench.model.name
    table, talk, doses = test_table(result), cross_talk(result), dose_table(result.search)
    frames = {
        "": table,
        "-search": result.search,
        "-dose": doses,
        "-crosstalk": talk.rename_axis("edit").reset_index(),
    }
    for suffix, frame in frames.items():
        write_text(f"{stem}{suffix}.csv", frame.to_csv(index=False, float_format="%.6g"))
    plots.save_figure(dose_figure(doses, table, model), f"{stem}-dose.png")
    plots.save_figure(trade_figure(doses, model), f"{stem}-trade.png")
    plots.save_figure(
        cross_talk_figure(talk, f"{model}: mean change of the judge"), f"{stem}-crosstalk.png"
    )
    write_json(outs.metrics, {**metrics(result, recipes, bench), **(more or {})})
