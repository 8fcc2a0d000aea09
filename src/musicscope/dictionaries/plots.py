"""Draw the training and evaluation of dictionaries, each figure with its numbers as CSV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from musicscope.core import plots
from musicscope.core.io import Metrics, write_text
from musicscope.dictionaries.evaluation import (
    DENSITY_EDGES,
    density_histogram,
    firing_entropy,
    relative_norms,
)
from musicscope.dictionaries.runs import MISPAIRED, SaeOutcome, SharedOutcome
from musicscope.dictionaries.training import LOG_COLUMNS, six_digits

SHARES = np.linspace(0, 1, 21)
"""Edges of the histograms of firing entropy and of relative decoder norms."""


def draw_sae(stem: str | Path, outcomes: Sequence[SaeOutcome]) -> None:
    """Write <stem>-loss.{csv,png} (training, every seed) and <stem>-density.{csv,png} (test)."""
    columns = ("step", *LOG_COLUMNS)
    histories = [
        pd.DataFrame([{name: six_digits(row[name]) for name in columns} for row in o.history])
        for o in outcomes
    ]
    figure, axes = plots.new_figure()
    for i, history in enumerate(histories):
        history.insert(0, "seed", i)
        plots.interval_curve(
            axes[0, 0], history["samples"] / 1e6, history["loss"], name=f"seed {i}", series=i
        )
    write_text(f"{stem}-loss.csv", pd.concat(histories).to_csv(index=False))
    axes[0, 0].set(xlabel="million frames", ylabel="unexplained variance (batch)", yscale="log")
    axes[0, 0].legend()
    plots.save_figure(figure, f"{stem}-loss.png")

    density = outcomes[0].test.density
    bins = density_histogram(density)
    write_text(f"{stem}-density.csv", pd.DataFrame(bins).to_csv(index=False))
    figure, axes = plots.new_figure()
    alive = pd.DataFrame(bins[1:])
    axes[0, 0].bar(
        alive["log10_low"], alive["latents"], np.diff(DENSITY_EDGES), align="edge",
        color=plots.COLOURS[0],
    )  # fmt: skip
    axes[0, 0].set(
        xlabel="log10 share of held-out frames on which a latent fires",
        ylabel="latents",
        title=f"{(density > 0).sum()} latents fire, {(density == 0).sum()} never do",
    )
    plots.save_figure(figure, f"{stem}-density.png")


def draw_usae(folder: str | Path, outcomes: Sequence[SharedOutcome], metrics: Metrics) -> None:
    """Write r2, firing_entropy and loss, each as CSV and PNG."""
    write_r2(folder, metrics)
    write_entropy(folder, outcomes)
    write_loss(folder, outcomes)


def draw_crosscoder(
    folder: str | Path, outcomes: Sequence[SharedOutcome], metrics: Metrics
) -> None:
    """Write relative_norm and loss, each as CSV and PNG."""
    write_norms(folder, outcomes, list(metrics["models"].values()))
    write_loss(folder, outcomes)


def histogram(named: dict[str, np.ndarray]) -> pd.DataFrame:
    """Count each array's values in the bins SHARES of 0 to 1: low, high, one column per name.

    NaN (a latent that never fires) is in no bin.
    """
    table: dict[str, object] = {"low": SHARES[:-1].round(6), "high": SHARES[1:].round(6)}
    for name, values in named.items():
        table[name] = np.histogram(values[np.isfinite(values)], SHARES)[0]
    return pd.DataFrame(table)


def _steps(stem: str | Path, table: pd.DataFrame, xlabel: str, title: str) -> None:
    """Write <stem>.{csv,png}: the histograms of `table` as outlines over each other."""
    write_text(f"{stem}.csv", table.to_csv(index=False))
    figure, axes = plots.new_figure()
    styles = ("-", "--", ":", "-.")
    for n, name in enumerate(table.columns[2:]):
        axes[0, 0].stairs(
            table[name], SHARES, color=plots.COLOURS[n % len(plots.COLOURS)], lw=1.8,
            fill=n == 0, alpha=0.45 if n == 0 else 1, ls=styles[n % len(styles)], label=name,
        )  # fmt: skip
    axes[0, 0].set(xlabel=xlabel, ylabel="latents that fire", title=title, xlim=(0, 1))
    axes[0, 0].legend()
    plots.save_figure(figure, f"{stem}.png")


def write_r2(folder: str | Path, metrics: Metrics) -> None:
    """Write r2.{csv,png}: encoded from (rows) by decoded to (columns), beside mispaired training.

    From metrics/train_usae.json; the last row is each model's own SAE.
    """
    names = list(metrics["models"].values())
    M = len(names)

    def matrix(values: dict[str, float]) -> np.ndarray:
        return np.array([[values[f"r2_{i}_{j}"] for j in range(M)] for i in range(M)])

    head = {key: entry["value"] for key, entry in metrics["headline"].items()}
    found = {"paired": matrix(head), MISPAIRED: matrix(metrics["null"][MISPAIRED])}
    own = [metrics["independent_r2"][str(j)] for j in range(M)]
    rows = [
        {"training": training, "encoded": names[i], "decoded": names[j], "r2": values[i, j]}
        for training, values in found.items()
        for i in range(M)
        for j in range(M)
    ]
    rows += [
        {"training": "independent", "encoded": names[j], "decoded": names[j], "r2": own[j]}
        for j in range(M)
    ]
    text = pd.DataFrame(rows).to_csv(index=False, float_format="%.6g")
    write_text(Path(folder) / "r2.csv", text)
    width = 2.6 + 1.1 * M
    figure, (axes,) = plots.new_figure(1, 2, size=(2 * width, width))
    for axis, (training, values) in zip(axes, found.items(), strict=True):
        labels = [*names, "own SAE"] if training == "paired" else names
        shown = np.vstack([values, own]) if training == "paired" else values
        axis.imshow(np.clip(shown, 0, 1), cmap="viridis", vmin=0, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(shown):
            colour = "black" if value > 0.6 else "white"
            axis.text(j, i, f"{value:.3f}", ha="center", va="center", color=colour)
        axis.set_xticks(range(M), names)
        axis.set_yticks(range(len(labels)), labels)
        axis.set(title=f"R2, {training} clips", xlabel="decoded", ylabel="encoded from")
        axis.spines[:].set_visible(False)
    plots.save_figure(figure, Path(folder) / "r2.png")


def write_entropy(folder: str | Path, outcomes: Sequence[SharedOutcome]) -> None:
    """Write firing_entropy.{csv,png}: latents by firing entropy, FIRST against the nulls."""
    null = next(o for o in outcomes if o.name.startswith(MISPAIRED))
    tests = {"paired": outcomes[0].test, MISPAIRED: null.test}
    tests["random"] = outcomes[0].controls["random"]
    entropies = {name: firing_entropy(test.fires.sum(0)) for name, test in tests.items()}
    _steps(
        Path(folder) / "firing_entropy", histogram(entropies),
        "firing entropy (0: one model only, 1: all equally often)", "Who fires a latent",
    )  # fmt: skip


def write_norms(
    folder: str | Path, outcomes: Sequence[SharedOutcome], names: Sequence[str]
) -> None:
    """Write relative_norm.{csv,png}: latents by the last model's share of the decoder norm.

    The CSV has every model's share, paired, mispaired and random.
    """
    null = next(o for o in outcomes if o.name.startswith(MISPAIRED))
    random = outcomes[0].random_norms
    columns: dict[str, np.ndarray] = {}
    for training, found, norms in (
        ("paired", outcomes[0].test, outcomes[0].test.norms),
        (MISPAIRED, null.test, null.test.norms),
        ("random", outcomes[0].test, random),
    ):
        alive = found.fires.sum((0, 1)) > 0
        shares = relative_norms(norms)[:, alive]
        columns |= {f"{name} {training}": row for name, row in zip(names, shares, strict=True)}
    table = histogram(columns)
    stem = Path(folder) / "relative_norm"
    last = [c for c in table.columns[2:] if c.startswith(f"{names[-1]} ")]
    _steps(
        stem, table[["low", "high", *last]], f"{names[-1]}'s share of a latent's decoder norm",
        "Whose latent it is",
    )  # fmt: skip
    write_text(f"{stem}.csv", table.to_csv(index=False))


def write_loss(folder: str | Path, outcomes: Sequence[SharedOutcome]) -> None:
    """Write loss.{csv,png}: unexplained share of training batches of every run."""
    columns = ["drawn", "self_loss", "cross_loss", "aux_loss", "step", "samples", "learning_rate"]
    frames = [
        pd.DataFrame(o.history)
        .rename(columns={"loss": "self_loss"})[[*columns, "dead_fraction"]]
        .assign(run=o.name)
        for o in outcomes
    ]
    text = pd.concat(frames).to_csv(index=False, float_format="%.6g")
    write_text(Path(folder) / "loss.csv", text)
    figure, axes = plots.new_figure()
    for n, (outcome, history) in enumerate(zip(outcomes, frames, strict=True)):
        colour = plots.COLOURS[n % len(plots.COLOURS)]
        for column, style in (("self_loss", "-"), ("cross_loss", ":")):
            if history[column].notna().any():
                axes[0, 0].plot(
                    history["samples"] / 1e6, history[column].astype(float), style, color=colour,
                    lw=1.2, label=outcome.name if column == "self_loss" else None,
                )  # fmt: skip
    axes[0, 0].set(
        xlabel="million frames", ylabel="unexplained share (dotted: other models)", yscale="log"
    )
    axes[0, 0].legend()
    plots.save_figure(figure, Path(folder) / "loss.png")
