"""Results of activation maximisation as metrics, chart, table and audio.

Ratios are values divided by that of the best real clip (train and test, in the context of its
clip, which gives it up to ten seconds of past that the short searched pieces do not have).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from musicscope.core import plots
from musicscope.core.io import atomic_dir, write_json, write_text
from musicscope.core.seeding import seed_for
from musicscope.core.stats import bootstrap_groups
from musicscope.features.selection import Latent
from musicscope.maximisation.audio import write_audio
from musicscope.maximisation.jobs import NULL_VARIANTS, SOUND
from musicscope.maximisation.run import Result

NULL_ROLES = ("direction", "mismatched")
HEADLINE_CONTROLS = (
    "best_train", "best_test", "moments_max", "clips_q50", "clips_q95", "clips_max", "samples_q50",
    "samples_max", "random_tokens_q50",
)  # fmt: skip
QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95, "max": 1.0}


def search_table(result: Result) -> pd.DataFrame:
    """One row a (search, model).

    `tokens` and `sound`: ratios of what was found and of the tokens of its audio; `start`: of the
    tokens that the search began with; `others_*`: mean over the run's other features; `log_prob_*`
    in nats per code. `judged`: which of the two the search was to raise.
    """
    records = []
    for i, found in enumerate(result.searches):
        column = result.plan.latents.index(found.latent)
        others = [
            j
            for j, latent in enumerate(result.plan.latents)
            if not latent.is_null
            and (latent.kind, latent.features) != (found.latent.kind, found.latent.features)
            and not (latent.kind == found.latent.kind == "usae" and _overlap(latent, found.latent))
        ]
        for place, model in enumerate(result.plan.names):
            scale = result.scale[place]
            record = {
                "feature": found.latent.name,
                "role": found.latent.role,
                "concept": found.latent.concept,
                "variant": found.variant,
                "model": model,
                "judged": "sound" if found.variant.startswith(SOUND) else "tokens",
                "start": result.start[place].values[i, column] / scale[column],
                "log_prob_start": result.start[place].log_prob[i],
            }
            for medium, measured in (("tokens", result.found), ("sound", result.again)):
                ratios = measured[place].values[i] / scale
                record[medium] = ratios[column]
                record[f"others_{medium}"] = ratios[others].mean() if others else np.nan
                record[f"log_prob_{medium}"] = measured[place].log_prob[i]
            records.append(record)
    table = pd.DataFrame(records)
    for key in ("", "others_", "log_prob_"):
        sound = table[f"{key}sound"]
        table[f"{key}reached"] = table[f"{key}tokens"].where(table["judged"] == "tokens", sound)
    return table


def _overlap(first: Latent, second: Latent) -> bool:
    return bool(set(first.features) & set(second.features))


def control_ratios(result: Result, column: int, place: int) -> dict[str, float]:
    """Quantiles of each control for one latent in one model, as ratios."""
    scale = result.scale[place, column]
    found = {}
    for name, measured in result.controls.items():
        values = measured[place].values[:, column] / scale
        found |= {f"{name}_{key}": float(np.quantile(values, q)) for key, q in QUANTILES.items()}
    at = sum(len(excerpts) for excerpts in result.excerpts[:column])
    mine = slice(at, at + len(result.excerpts[column]))
    if len(result.excerpts[column]):
        # What the best moments are worth without the past they had in their clips.
        found["moments_max"] = float(result.moment_values[place].values[mine, column].max() / scale)
    return found | {
        f"best_{split}": best[place, column] / scale for split, best in result.best.items()
    }


def _mean_interval(values: pd.Series, key: str, bootstrap: int, seed: int) -> dict[str, Any]:
    """Mean over features and its interval (features resampled); None where it is undefined."""
    values = values.dropna()
    low = high = None
    if len(values) > 1:
        low, high = bootstrap_groups(values.to_numpy(), values.index.to_numpy(), bootstrap, seed)
    mean = float(values.mean()) if len(values) else None
    return {key: mean, f"{key}_low": low, f"{key}_high": high}


def headline(result: Result, table: pd.DataFrame, bootstrap: int) -> dict[str, Any]:
    """The few numbers for the summary: means over features (and over models, where several).

    <variant>_reached is what the search was judged by, the tokens or (heard, alone) the sound.
    """
    seed = seed_for(result.plan.seed, "maximize", "bootstrap")
    is_null = table["role"].isin(NULL_ROLES)
    nulls, real = table[is_null], table[~is_null]

    def by_feature(rows: pd.DataFrame, key: str) -> pd.Series:
        return rows.groupby("feature", sort=False)[key].mean()

    kept = [latent for latent in result.plan.latents if not latent.is_null]
    found: dict[str, Any] = {"features": len(kept), "skipped": len(result.skipped)}
    for variant in result.plan.variants:
        if variant == "alone":
            continue
        rows = real[real["variant"] == variant]
        found |= _mean_interval(by_feature(rows, "reached"), f"{variant}_reached", bootstrap, seed)
        weakest = rows.groupby("feature", sort=False)["reached"].min()
        found[f"{variant}_reached_weakest_model"] = weakest.mean()
        found[f"{variant}_beats_best_clip"] = (weakest > 1).mean()
        found[f"{variant}_other_features"] = by_feature(rows, "others_reached").mean()
        found[f"{variant}_log_prob"] = by_feature(rows, "log_prob_reached").mean()
        found[f"{variant}_start"] = by_feature(rows, "start").mean()
        if variant not in SOUND:
            found[f"{variant}_sound"] = by_feature(rows, "sound").mean()
        if variant in NULL_VARIANTS:
            null = by_feature(nulls[nulls["variant"] == variant], "reached")
            found |= _mean_interval(null, f"{variant}_null_reached", bootstrap, seed)
    if "alone" in result.plan.variants:
        alone = real[real["variant"].str.startswith("alone-")]
        own = alone["variant"] == "alone-" + alone["model"]
        found["alone_reached"] = alone[own]["reached"].mean()
        found |= _mean_interval(by_feature(alone[~own], "reached"), "transfer", bootstrap, seed)
        # In the model it was not searched for, an input for one feature moves the others too.
        found["transfer_other_features"] = alone[~own]["others_reached"].mean()
    ratios = pd.DataFrame(
        [
            control_ratios(result, column, place)
            for column, latent in enumerate(result.plan.latents)
            if not latent.is_null
            for place in range(len(result.plan.names))
        ]
    )
    for key in HEADLINE_CONTROLS:
        found[key] = ratios[key].mean()
    for name, measured in result.controls.items():
        found[f"log_prob_{name}"] = np.mean([np.median(m.log_prob) for m in measured])
    return {key: None if value is None else float(value) for key, value in found.items()}


def metrics(result: Result, bootstrap: int) -> dict[str, Any]:
    """Numbers of metrics/maximize_*: headline, log_prob quantiles, and every feature."""
    table = search_table(result)
    plan = result.plan
    features: dict[str, Any] = {}
    for column, latent in enumerate(plan.latents):
        entry: dict[str, Any] = {"role": latent.role, "concept": latent.concept or "none"}
        for place, model in enumerate(plan.names):
            rows = table[(table["feature"] == latent.name) & (table["model"] == model)]
            searches = rows.drop(columns=["feature", "role", "concept", "model", "judged"])
            entry[model] = {
                "number": latent.features[place],
                "best_clip": result.scale[place, column],
                "controls": control_ratios(result, column, place),
                "searches": searches.set_index("variant").to_dict("index"),
            }
        features[latent.name] = entry
    log_prob = {
        name: {
            model: {key: float(np.quantile(m.log_prob, q)) for key, q in QUANTILES.items()}
            for model, m in zip(plan.names, measured, strict=True)
        }
        for name, measured in result.controls.items()
    }
    return {
        "frames": plan.frames,
        "window": plan.window,
        "naturalness": plan.naturalness,
        "skipped": {latent.name: latent.role for latent in result.skipped},
        "headline": headline(result, table, bootstrap),
        "log_prob": log_prob,
        "features": features,
    }


def write(result: Result, name: str, clips: Any, model: Any, bootstrap: int) -> None:
    """All outs of a run: data/<name>, metrics/<name>.json, plots/<name>.{csv,png}."""
    with atomic_dir(f"data/{name}") as folder:
        write_audio(result, folder, clips, model.frame_rate, model.sample_rate)
    table = plot_table(result).to_csv(index=False, float_format="%.6g")
    write_text(f"plots/{name}.csv", table)
    title = ", ".join(result.plan.names)
    plots.save_figure(figure(result, title), f"plots/{name}.png")
    write_json(f"metrics/{name}.json", metrics(result, bootstrap))


def summary_keys(found: dict[str, Any], name: str) -> dict[str, Any]:
    """Flat keys ``maximize.<name>.*`` for metrics/summary.json; `name` is the model or shared."""
    return {f"maximize.{name}.{key}": value for key, value in found["headline"].items()}


def plot_table(result: Result) -> pd.DataFrame:
    """What the chart shows: one row a (feature, model, series) with ratio and log p per code."""
    table = search_table(result)
    table["series"], table["ratio"] = table["variant"], table["reached"]
    records = table.rename(columns={"log_prob_reached": "log_prob"})
    columns = ["feature", "role", "concept", "model", "series", "ratio", "log_prob"]
    records = records[[*columns, "tokens", "sound"]]
    controls = []
    for column, latent in enumerate(result.plan.latents):
        for place, model in enumerate(result.plan.names):
            key = {"feature": latent.name, "role": latent.role, "concept": latent.concept}
            for series, ratio in control_ratios(result, column, place).items():
                controls.append(key | {"model": model, "series": series, "ratio": ratio})
    return pd.concat([records, pd.DataFrame(controls)], ignore_index=True)


def figure(result: Result, title: str) -> Figure:
    """Left: what each feature reached, in best real clips; right: log p per code of the results."""
    table, names = plot_table(result), result.plan.names
    labels = [(latent, model) for latent in result.plan.latents for model in names]
    height = 1.6 + 0.34 * len(labels)
    figure, (axes,) = plots.new_figure(1, 2, (12.0, height), sharey=True, width_ratios=[1.7, 1])
    rows = {(latent.name, model): y for y, (latent, model) in enumerate(labels)}

    def y_of(part: pd.DataFrame) -> list[int]:
        return [rows[key] for key in zip(part["feature"], part["model"], strict=True)]

    def span(low: str, high: str, colour: str, shift: float, text: str) -> None:
        left, right = (table[table["series"] == series] for series in (low, high))
        y = np.array(y_of(left)) + shift
        axes[0].hlines(y, left["ratio"], right["ratio"], color=colour, lw=5, alpha=0.45, label=text)

    span("clips_q05", "clips_q95", plots.COLOURS[6], 0.16, "random clips, 5-95 %")
    span("samples_q05", "samples_max", plots.COLOURS[5], -0.16, "model samples, 5 % to best")
    searched = list(dict.fromkeys(found.variant for found in result.searches))
    for number, name in enumerate([*searched, "moments_max"]):
        part = table[table["series"] == name]
        text = f"search: {name}" if name in searched else "best moment on its own"
        style = {"marker": plots.MARKERS[number], "color": plots.COLOURS[number], "ls": "none"}
        axes[0].plot(part["ratio"], y_of(part), label=text, **style)
        if name in searched:
            axes[1].plot(part["log_prob"], y_of(part), **style)
    axes[0].axvline(1, color="#555555", lw=1, ls="--")
    axes[0].set_yticks(range(len(labels)), [_label(*label, len(names) > 1) for label in labels])
    axes[0].invert_yaxis()
    axes[0].set(title=title, xlabel="activation (1: the best real clip)")
    for number, (name, measured) in enumerate(result.controls.items()):
        at = float(np.mean([np.median(m.log_prob) for m in measured]))
        axes[1].axvline(at, color="#555555", lw=1.2, ls=("-", "--", ":")[number])
        axes[1].annotate(
            name.replace("_", " "), (at, 1), (2, -4), xycoords=("data", "axes fraction"),
            textcoords="offset points", rotation=90, va="top", fontsize=8, color="#333333",
        )  # fmt: skip
    axes[1].set(title="naturalness", xlabel="log p per code (nats)")
    for axis in axes:
        axis.grid(axis="x", color="#dddddd", lw=0.7)
    handles, texts = axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=4)
    return figure


def _label(latent: Any, model: str, several: bool) -> str:
    about = latent.concept if latent.role == "concept" else latent.role
    return f"{latent.name} {about}{f' {model}' if several else ''}"
