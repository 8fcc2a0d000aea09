"""Draw every figure of the pipeline from committed tables: plots/figures/<stage>/<name>.png.

A figure reads plots/<stage>/<name>.csv and, for a threshold or a title, metrics/<stage>.json. The
stages that write these files take minutes to hours; this one takes seconds and loads no model, so
that a label can change without a rerun. A figure whose table has no rows is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from musicscope.core import plots
from musicscope.core.stats import Estimate
from musicscope.data.splits import HELDOUT_FONT, MAIN, TRAIN_FONT, main_concept
from musicscope.data.taxonomy import FAMILIES
from musicscope.report.metrics import Sources, Tree
from musicscope.report.sections.probes import REPRESENTATIONS
from musicscope.report.sections.steering import METHODS

LANGUAGE = {"kl": "KL(original || ablated)", "dce": "rise in cross-entropy"}
AUDIO = {"change": "D(reconstruction, ablated)", "rise": "rise in D to the clip"}
"""Columns of plots/ablate/<model>.csv of a language model and of an audio model -> titles."""
TEST_SETS = {
    "test": f"unheard compositions, {TRAIN_FONT}",
    "heldout_font": f"unheard compositions, {HELDOUT_FONT} (held out)",
}
OVERVIEW = ("sae", "diff_means", "prompt_edit", "random_feature", "reseed")
"""Methods of steering that the overview shows."""
LINES = ("-", "--", ":", "-.")
GRID: dict[str, Any] = {"color": "#dddddd", "lw": 0.7}
DASHED = {"color": "#555555", "lw": 1, "ls": "--"}


def draw_all(sources: Sources, kind: str, folder: Path) -> list[str]:
    """Draw the figures of the models and slots of `sources` into `folder`.

    Args:
        kind: ablation that the overview shows: skip, zero or mean.

    Returns:
        Names of the figures that were left out because their table is missing or empty.
    """
    left_out = []
    for name, draw in all_figures(sources, kind):
        if (figure := draw()) is None:
            left_out.append(name)
        else:
            plots.save_figure(figure, folder / f"{name}.png")
    return left_out


def all_figures(sources: Sources, kind: str) -> Iterator[tuple[str, Callable[[], Figure | None]]]:
    """Name each figure and how it is drawn; None stands for a table that is not there."""

    def of(draw: Callable[..., Figure], name: str, *more: object) -> Callable[[], Figure | None]:
        def drawn() -> Figure | None:
            table = sources.plot(name)
            return None if table is None else draw(table, *more)

        return drawn

    yield "overview", lambda: overview(sources, kind)
    for model in sources.models:
        yield f"ablate/{model}", of(ablation, f"ablate/{model}", model)
        for slot in sources.slots:
            name = f"{model}-{slot}"
            yield f"train_sae/{name}-loss", of(sae_loss, f"train_sae/{name}-loss")
            yield f"train_sae/{name}-density", of(density, f"train_sae/{name}-density")
            yield f"probe/{name}", of(probes, f"probe/{name}", f"{model} {slot}")
        found = sources.metrics(f"find_concept/{model}") or {}
        yield f"find_concept/{model}", lambda model=model, found=found: finder(found, model)
        name = f"maximize_activation/{model}"
        yield name, of(maximisation, name, [model], sources.metrics(name) or {})
        for stage in ("steer", "steer_full"):
            name = f"{stage}/{model}"
            yield f"{name}-dose", of(dose, f"{name}-dose", sources.plot(name), model)
            yield f"{name}-trade", of(trade, f"{name}-dose", model)
            yield f"{name}-crosstalk", of(cross_talk, f"{name}-crosstalk", model)
    yield "train_judge/auroc", of(judges, "train_judge/auroc")
    yield "train_usae/r2", of(shared_r2, "train_usae/r2")
    yield "train_usae/firing_entropy", of(
        outlines, "train_usae/firing_entropy", "",
        "firing entropy (0: one model only, 1: all equally often)", "Firing entropy per latent",
    )  # fmt: skip
    last = sources.models[-1]
    yield "train_crosscoder/relative_norm", of(
        outlines, "train_crosscoder/relative_norm", f"{last} ",
        f"share of {last} in a latent's decoder norm", "Relative decoder norm per latent",
    )  # fmt: skip
    for stage in ("train_usae", "train_crosscoder"):
        yield f"{stage}/loss", of(shared_loss, f"{stage}/loss")
    threshold = (sources.metrics("match_features") or {}).get("threshold")
    for name, draw, more in (
        ("correlations", correlations, (sources.models, threshold)),
        ("cosines", cosines, (threshold,)),
    ):
        yield f"match_features/{name}", of(draw, f"match_features/{name}", *more)
    shared = "maximize_shared"
    yield shared, of(maximisation, shared, sources.models, sources.metrics(shared) or {})


def _interval(rows: pd.DataFrame, name: str) -> tuple[pd.Series, pd.Series, pd.Series]:
    """Value, low and high end of a column of a table."""
    return rows[name], rows[f"{name}_low"], rows[f"{name}_high"]


def _legend_below(figure: Figure, axis: Axes, columns: int) -> None:
    handles, texts = axis.get_legend_handles_labels()
    texts = [text.replace("_", " ") for text in texts]
    figure.legend(handles, texts, loc="outside lower center", ncols=columns)


# --- layers -----------------------------------------------------------------------------------


def overview(sources: Sources, kind: str) -> Figure | None:
    """Draw KL per layer, and the success of each method that switches the main concept off."""
    figure, (axes,) = plots.new_figure(1, 2, size=(11.0, 3.6))
    drawn = MAIN
    for series, model in enumerate(sources.models):
        layers = sources.plot(f"ablate/{model}")
        if layers is None or "kl" not in layers:
            continue  # an audio model has no KL
        layers = layers[layers["kind"] == kind]
        plots.interval_curve(axes[0], layers["layer"], *_interval(layers, "kl"), model, series)
        chosen = layers[layers["layer"].isin(sources.chosen_layers(model))]
        colour = plots.COLOURS[series % len(plots.COLOURS)]
        axes[0].plot(chosen["layer"], chosen["kl"], "o", ms=11, mfc="none", mec=colour, ls="none")
        steered = sources.plot(f"steer_full/{model}")
        if steered is None:
            steered = sources.plot(f"steer/{model}")
        if steered is None:
            continue
        drawn = main_concept(steered["concept"].unique())
        off = steered[(steered["concept"] == drawn) & (steered["direction"] == "off")]
        off = off.set_index("method").reindex(OVERVIEW)
        width = 0.8 / len(sources.models)
        plots.interval_bars(
            axes[1], [METHODS[m].replace(" ", "\n", 1) for m in OVERVIEW],
            *_interval(off, "success"), colour, name=model,
            width=width, offset=width * (series - (len(sources.models) - 1) / 2),
        )  # fmt: skip
    if not axes[0].lines:
        return None
    axes[0].set(title="Which layers matter (circles: chosen)", xlabel="layer",
                ylabel=f"KL, nats per code ({kind} ablation)", yscale="log")  # fmt: skip
    axes[1].set(
        title=f"{drawn.replace('_', ' ').capitalize()} off: success on test prompts",
        ylabel="share (95 %)",
        ylim=(-0.5, 1.1),
    )
    axes[0].legend()
    return figure


def ablation(table: pd.DataFrame, model: str) -> Figure:
    """Draw both scores of each hook point, one line per kind, with intervals."""
    titles, unit, height = LANGUAGE, "nats per code", 3.8
    if numbered := "hook_point" not in table:
        ticks = {"ticks": sorted(table["layer"].unique())}
    else:
        titles, unit, height = AUDIO, "spectral distance", 4.6
        points = table.drop_duplicates("layer").sort_values("layer")
        ticks = {"ticks": points["layer"], "labels": points["hook_point"]}
        ticks |= {"rotation": 90, "fontsize": 6}
    figure, axes = plots.new_figure(1, 2, size=(9.0, height), sharex=True)
    for axis, (score, title) in zip(axes[0], titles.items(), strict=True):
        for series, (kind, rows) in enumerate(table.groupby("kind", sort=False)):
            plots.interval_curve(axis, rows["layer"], *_interval(rows, score), str(kind), series)
        axis.set(title=f"{model}: {title}", ylabel=unit, xlabel="layer" if numbered else "")
        axis.set_xticks(**ticks)
    axes[0, 0].legend()
    return figure


# --- dictionaries -----------------------------------------------------------------------------


def sae_loss(table: pd.DataFrame) -> Figure:
    """Draw the training loss of every seed."""
    figure, ((axis,),) = plots.new_figure()
    for seed in sorted(table["seed"].unique()):
        rows, name = table[table["seed"] == seed], f"seed {seed}"
        plots.interval_curve(axis, rows["samples"] / 1e6, rows["loss"], name=name, series=int(seed))
    axis.set(xlabel="million frames", ylabel="unexplained variance (batch)", yscale="log")
    axis.legend()
    return figure


def density(table: pd.DataFrame) -> Figure:
    """Draw the histogram of firing densities; the first row counts latents that never fire."""
    figure, ((axis,),) = plots.new_figure()
    alive, dead = table.iloc[1:], int(table["latents"].iloc[0])
    width = alive["log10_high"] - alive["log10_low"]
    axis.bar(alive["log10_low"], alive["latents"], width, align="edge", color=plots.COLOURS[0])
    axis.set(
        xlabel="log10 share of held-out frames on which a latent fires", ylabel="latents",
        title=f"{alive['latents'].sum()} latents fire, {dead} never do",
    )  # fmt: skip
    return figure


def shared_r2(table: pd.DataFrame) -> Figure:
    """Draw R2 by model encoded from and decoded to, beside training on mispaired clips."""
    names = list(table["decoded"].drop_duplicates())
    width = 2.6 + 1.1 * len(names)
    figure, (axes,) = plots.new_figure(1, 2, size=(2 * width, width))
    own = table[table["training"] == "independent"].set_index("decoded")["r2"][names]
    for axis, training in zip(axes, ("paired", "mispaired"), strict=True):
        rows = table[table["training"].str.startswith(training)]
        shown = rows.pivot(index="encoded", columns="decoded", values="r2").loc[names, names]
        if training == "paired":
            shown.loc["own SAE"] = own
        axis.imshow(np.clip(shown, 0, 1), cmap="viridis", vmin=0, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(shown.to_numpy(float)):
            colour = "black" if float(value) > 0.6 else "white"
            axis.text(j, i, f"{value:.3f}", ha="center", va="center", color=colour)
        axis.set_xticks(range(len(names)), names)
        axis.set_yticks(range(len(shown)), shown.index)
        axis.set(title=f"R2, {training} clips", xlabel="decoded")
        axis.spines[:].set_visible(False)
    axes[0].set_ylabel("encoded from")
    return figure


def outlines(table: pd.DataFrame, prefix: str, xlabel: str, title: str) -> Figure:
    """Draw the histograms in the columns that start with `prefix` over each other."""
    figure, ((axis,),) = plots.new_figure()
    edges = [*table["low"], table["high"].iloc[-1]]
    for n, name in enumerate(c for c in table.columns[2:] if c.startswith(prefix)):
        axis.stairs(
            table[name], edges, color=plots.COLOURS[n % len(plots.COLOURS)], lw=1.8, fill=n == 0,
            alpha=0.45 if n == 0 else 1, ls=LINES[n % len(LINES)], label=name,
        )  # fmt: skip
    axis.set(xlabel=xlabel, ylabel="latents that fire", title=title, xlim=(0, 1))
    axis.legend()
    return figure


def shared_loss(table: pd.DataFrame) -> Figure:
    """Draw the unexplained share of training batches of every run."""
    figure, ((axis,),) = plots.new_figure()
    for n, (run, rows) in enumerate(table.groupby("run", sort=False)):
        colour = plots.COLOURS[n % len(plots.COLOURS)]
        for column, style in (("self_loss", "-"), ("cross_loss", ":")):
            if rows[column].notna().any():
                label = str(run) if column == "self_loss" else None
                axis.plot(rows["samples"] / 1e6, rows[column], style, color=colour, lw=1.2,
                          label=label)  # fmt: skip
    ylabel = "unexplained share (dotted: other models)"
    axis.set(xlabel="million frames", ylabel=ylabel, yscale="log")
    axis.legend()
    return figure


# --- features ---------------------------------------------------------------------------------


def probes(table: pd.DataFrame, title: str) -> Figure:
    """Draw AUROC of the main concept by representation and test set, and k-sparse curves."""
    concept = main_concept(table["concept"].unique())
    table = table[table["concept"] == concept].set_index(["set", "representation"])
    sparse = [name for name in table.loc["test"].index if name.startswith("sae_k")]
    middle = "sae_k016" if "sae_k016" in sparse else sparse[-1]
    labels = {key: label.replace(" ", "\n") for label, key in REPRESENTATIONS}
    labels = {"sae": labels["sae"], middle: f"SAE k={int(middle[5:])}", **labels}
    names, k = list(labels), [int(name[5:]) for name in sparse]
    figure, (axes,) = plots.new_figure(1, 2, size=(12.0, 4.4), width_ratios=[1.7, 1], sharey=True)
    sets = [name for name in TEST_SETS if name in table.index.get_level_values(0)]
    for series, clip_set in enumerate(sets):
        part = table.loc[clip_set]
        label = TEST_SETS[clip_set] if len(sets) > 1 else "unheard compositions"
        offset = 0.42 * (series - (len(sets) - 1) / 2)
        plots.interval_bars(
            axes[0], list(labels.values()), *_interval(part.loc[names], "auroc"),
            plots.COLOURS[series], offset, 0.4, label,
        )  # fmt: skip
        plots.interval_curve(axes[1], k, *_interval(part.loc[sparse], "auroc"), label, series)
    axes[1].set_xscale("log", base=2)
    axes[1].set_xticks(k, [str(size) for size in k])
    axes[1].minorticks_off()
    axes[0].set(title=f"{title}: {concept}", ylabel="AUROC (95 % over compositions)")
    drawn = table[table.index.get_level_values(1).isin([*names, *sparse])]
    axes[0].set_ylim(min(0.3, drawn["auroc_low"].min() - 0.02), 1.05)
    axes[1].set(title="k-sparse probes on SAE codes", xlabel="latents used (k)")
    for axis in axes:
        axis.axhline(0.5, **DASHED)
    _legend_below(figure, axes[0], 2)
    return figure


def correlations(table: pd.DataFrame, models: Sequence[str], threshold: float) -> Figure:
    """Draw one panel per pair of models: the pairs, their null, and the pairs between seeds."""
    pairs = list(itertools.combinations(models, 2))
    figure, axes = plots.new_figure(1, len(pairs), size=(7.0 * len(pairs), 4.2))
    for axis, (a, b) in zip(axes[0], pairs, strict=True):
        lines = [(f"{a}_{b}", "share", f"{a} and {b}"), (f"{a}_{b}", "null_share", "null")]
        lines += [(f"seeds_{m}", "share", f"two seeds of {m}") for m in (a, b)]
        for (name, column, label), style, colour in zip(lines, LINES, plots.COLOURS, strict=False):
            part = table[table["comparison"] == name]
            edges = [*part["low"], part["high"].iloc[-1]]
            axis.stairs(part[column], edges, color=colour, ls=style, lw=1.8, label=label)
        axis.axvline(threshold, **DASHED)
        axis.set(xlabel="correlation on test", ylabel="share of pairs", yscale="log")
        axis.set_title("SAE latents paired on validation")
        axis.legend()
    return figure


def cosines(table: pd.DataFrame, threshold: float) -> Figure:
    """Draw cosines of SAE and USAE pairs from high to low, solid per model, its null dashed."""
    figure, ((axis,),) = plots.new_figure(size=(7.0, 4.2))
    for series, (model, part) in enumerate(table.groupby("model", sort=False)):
        colour = plots.COLOURS[series % len(plots.COLOURS)]
        rank = part["rank"] / len(part)
        axis.plot(rank, part["cosine"], color=colour, lw=1.8, label=str(model))
        axis.plot(rank, part["null_cosine"], color=colour, lw=1.4, ls="--", label=f"{model}, null")
    axis.axhline(threshold, **DASHED)
    axis.set(xlabel="pairs, from the most similar, as a share", ylabel="cosine of decoder rows")
    axis.set_title("SAE and universal SAE of one model")
    axis.grid(**GRID)
    axis.legend()
    return figure


def finder(metrics: Tree, model: str) -> Figure | None:
    """Draw test AUROC of each concept's best feature, and how often few recordings find any."""
    metrics = {name: of for name, of in metrics.items() if name in ("sae", "usae")}  # no baselines
    if not metrics:
        return None
    figure, (axes,) = plots.new_figure(1, 2, size=(12.0, 4.0))
    width = 0.8 / len(metrics)
    for series, (name, concepts) in enumerate(metrics.items()):
        labels = [c for c in concepts if "best_auroc" in concepts[c].get("test", {})]
        offset = width * (series - (len(metrics) - 1) / 2)
        best = [Estimate.from_dict(concepts[c]["test"]["best_auroc"]) for c in labels]
        few = [concepts[c]["few"]["any_discovery"] or 0.0 for c in labels]
        null = [concepts[c]["null"]["any_discovery"] or 0.0 for c in labels]
        ends = [b.value for b in best], [b.low for b in best], [b.high for b in best]
        for axis, values in zip(axes, (ends, (few, None, None)), strict=True):
            colour = plots.COLOURS[series]
            plots.interval_bars(axis, labels, *values, colour, offset, width, name)
        axes[1].scatter(np.arange(len(labels)) + offset, null, color="black", marker="x", zorder=3)
    axes[0].axhline(0.5, **DASHED)
    axes[0].set(title=f"{model}: best feature on test clips", ylabel="AUROC (95 %)", ylim=(0.3, 1))
    title = "few recordings: share of draws with a discovery (x: nothing to find)"
    axes[1].set(title=title, ylim=(0, 1.05))
    axes[0].legend()
    return figure


def maximisation(table: pd.DataFrame, models: Sequence[str], metrics: Tree) -> Figure:
    """Draw the ratios of each feature and, for searches, log p per code of their results."""
    controls = table[table["series"] == "best_train"]
    rows = {
        key: y for y, key in enumerate(zip(controls["feature"], controls["model"], strict=True))
    }
    log_prob = metrics.get("log_prob", {})
    searched = bool(log_prob)
    height, ratios = 1.6 + 0.34 * len(rows), [1.7, 1] if searched else [1]
    figure, (axes,) = plots.new_figure(
        1, len(ratios), (12.0 if searched else 8.0, height), sharey=True, width_ratios=ratios
    )

    def series(name: str) -> tuple[np.ndarray, pd.DataFrame]:
        part = table[table["series"] == name]
        at = [rows[key] for key in zip(part["feature"], part["model"], strict=True)]
        return np.array(at), part

    spans = [("whole_clips_q05", "whole_clips_q95", 6, 0.0, "test clips, 5-95 %")]
    points = {"whole_clips_q50": "whole clips median"}
    points |= {"best_train": "best train", "best_test": "best test"}
    if searched:
        spans = [
            ("clips_q05", "clips_q95", 6, 0.16, "random clips, 5-95 %"),
            ("samples_q05", "samples_max", 5, -0.16, "model samples, 5 % to best"),
        ]
        variants = table.loc[table["log_prob"].notna(), "series"].drop_duplicates()
        points = {variant: f"search: {variant}" for variant in variants}
        points["moments_max"] = "best moment on its own"
    for low, high, colour, shift, label in spans:
        (y, left), (_, right) = series(low), series(high)
        axes[0].hlines(y + shift, left["ratio"], right["ratio"], color=plots.COLOURS[colour], lw=5,
                       alpha=0.45, label=label)  # fmt: skip
    for number, (name, label) in enumerate(points.items()):
        y, part = series(name)
        style = {"marker": plots.MARKERS[number], "color": plots.COLOURS[number], "ls": "none"}
        axes[0].plot(part["ratio"], y, label=label, **style)
        if searched and name != "moments_max":
            axes[1].plot(part["log_prob"], y, **style)
    about = controls["concept"].where(controls["role"] == "concept", controls["role"])
    labels = [
        f"{feature} {what}" + (f" {model}" if len(models) > 1 else "")
        for feature, what, model in zip(controls["feature"], about, controls["model"], strict=True)
    ]
    if searched:
        axes[0].axvline(1, **DASHED)
        _mark_controls(axes[1], log_prob)
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    axes[0].set(title=", ".join(models), xlabel="activation (1: the best real clip)")
    for axis in axes:
        axis.grid(axis="x", **GRID)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _mark_controls(axis: Axes, log_prob: Tree) -> None:
    """Mark the median log p of each control, averaged over models."""
    for style, (name, by_model) in zip(LINES, log_prob.items(), strict=False):
        at = float(np.mean([quantiles["q50"] for quantiles in by_model.values()]))
        axis.axvline(at, color="#555555", lw=1.2, ls=style)
        axis.annotate(
            name.replace("_", " "), (at, 1), (2, -4), xycoords=("data", "axes fraction"),
            textcoords="offset points", rotation=90, va="top", fontsize=8, color="#333333",
        )  # fmt: skip
    axis.set(title="naturalness", xlabel="log p per code (nats)")


# --- steering ---------------------------------------------------------------------------------


def _panels(table: pd.DataFrame, title: str) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """Make one panel per concept (columns) and direction (rows), with its rows of the table."""
    concepts = list(dict.fromkeys(table["concept"]))
    figure, axes = plots.new_figure(2, len(concepts), (3.3 * len(concepts) + 0.8, 6.2), sharey=True)
    figure.suptitle(title)
    parts = []
    for row, direction in enumerate(("off", "on")):
        for column, concept in enumerate(concepts):
            axis = axes[row, column]
            axis.set(title=f"{concept} {direction}", ylim=(-0.53, 1.03))
            here = (table["concept"] == concept) & (table["direction"] == direction)
            parts.append((axis, table[here]))
        axes[row, 0].set_ylabel("success")
    return figure, parts


def dose(doses: pd.DataFrame, tests: pd.DataFrame, title: str) -> Figure:
    """Draw success over strength on validation data, with controls on test data as lines."""
    figure, parts = _panels(doses, title)
    for axis, rows in parts:
        for series, method in enumerate(("sae", "diff_means")):
            part = rows[rows["method"] == method].sort_values("strength")
            plots.interval_curve(
                axis, part["strength"], *_interval(part, "success"), method, series
            )
        here = tests["concept"].isin(rows["concept"]) & tests["direction"].isin(rows["direction"])
        for style, method in (("--", "prompt_edit"), (":", "reseed")):
            # An audio model has no prompt to edit, and may have no clips for a request.
            for value in tests.loc[here & (tests["method"] == method), "success"]:
                axis.axhline(value, color="#555555", lw=1.4, ls=style, label=method)
        if rows["success"].notna().any():  # nothing to change: no point, and no logarithm
            axis.set_xscale("log")
            ticks = sorted(rows["strength"].unique())
            axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axis.minorticks_off()
        axis.set_xlabel("strength")
    _legend_below(figure, parts[0][0], 4)
    return figure


def trade(doses: pd.DataFrame, title: str) -> Figure:
    """Draw success over cost: compare methods at the same cost."""
    figure, parts = _panels(doses, title)
    for axis, rows in parts:
        for series, method in enumerate(dict.fromkeys(doses["method"])):
            part = rows[rows["method"] == method].sort_values("distance")
            colour, marker = plots.COLOURS[series % 8], plots.MARKERS[series % 8]
            axis.plot(part["distance"], part["success"], color=colour, marker=marker, ms=5,
                      label=method)  # fmt: skip
        axis.set(xlabel="distance from plain (MMD^2)")
        axis.grid(**GRID)
    _legend_below(figure, parts[0][0], 4)
    return figure


def cross_talk(table: pd.DataFrame, model: str) -> Figure:
    """Draw the mean change of every family's probability per edit, with its numbers."""
    table = table.set_index("edit")
    figure, ((axis,),) = plots.new_figure(
        size=(2.8 + 0.62 * table.shape[1], 1.4 + 0.36 * len(table))
    )
    values = table.to_numpy(float)
    largest = float(np.nanmax(np.abs(values), initial=1e-3))
    axis.imshow(values, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        colour = "white" if abs(value) > 0.6 * largest else "black"
        axis.text(x, y, f"{value:+.2f}", ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(table.shape[1]), [c.replace("_", " ") for c in table], rotation=40)
    axis.set_yticks(range(len(table)), table.index, fontsize=8)
    axis.set_title(f"{model}: mean change of the judge")
    return figure


def judges(table: pd.DataFrame) -> Figure:
    """Draw AUROC per family and judge on codec output, the domain of generated music."""
    figure, ((axis,),) = plots.new_figure(size=(12.0, 4.2))
    on_codec = table[table["set"] == "codec"]
    table = on_codec if len(on_codec) else table[table["set"] == TRAIN_FONT]
    names = list(dict.fromkeys((*FAMILIES, *table["family"])))
    for series, (judge, rows) in enumerate(table.groupby("judge", sort=False)):
        rows = rows.set_index("family").reindex(names)
        plots.interval_bars(
            axis, [f.replace("_", "\n") for f in names], *_interval(rows, "auroc"),
            plots.COLOURS[series], series * 0.4, 0.4, str(judge).replace("_", " "),
            show_values=False,
        )  # fmt: skip
    plots.reference_line(axis, 0.5, "chance")
    title = "Judges on codec output of unheard compositions"
    axis.set(title=title, ylabel="AUROC (95 %)", ylim=(0.3, 1.02))
    axis.legend(loc="lower right")
    return figure
