"""Write the training and evaluation of dictionaries as CSV tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from musicscope.core.io import write_text
from musicscope.dictionaries.evaluation import density_histogram, firing_entropy, relative_norms
from musicscope.dictionaries.runs import MISPAIRED, Metrics, SaeOutcome, SharedOutcome
from musicscope.dictionaries.training import LOG_COLUMNS, six_digits

SHARES = np.linspace(0, 1, 21)
"""Edges of the histograms of firing entropy and of relative decoder norms."""


def write_sae(stem: str | Path, outcomes: Sequence[SaeOutcome]) -> None:
    """Write <stem>-loss.csv (training, every seed) and <stem>-density.csv (test)."""
    outcomes = [outcome for outcome in outcomes if outcome.name.startswith("seed-")]
    rows = [
        {"seed": seed, **{name: six_digits(row[name]) for name in ("step", *LOG_COLUMNS)}}
        for seed, outcome in enumerate(outcomes)
        for row in outcome.history
    ]
    write_text(f"{stem}-loss.csv", pd.DataFrame(rows).to_csv(index=False))
    bins = density_histogram(outcomes[0].test.density)
    write_text(f"{stem}-density.csv", pd.DataFrame(bins).to_csv(index=False))


def write_usae(folder: str | Path, outcomes: Sequence[SharedOutcome], metrics: Metrics) -> None:
    """Write r2.csv, firing_entropy.csv and loss.csv."""
    _write_r2(folder, metrics)
    _write_entropy(folder, outcomes)
    _write_loss(folder, outcomes)


def write_crosscoder(
    folder: str | Path, outcomes: Sequence[SharedOutcome], metrics: Metrics
) -> None:
    """Write relative_norm.csv and loss.csv."""
    _write_norms(folder, outcomes, list(metrics["models"].values()))
    _write_loss(folder, outcomes)


def histogram(named: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Count each array's values in the bins SHARES of 0 to 1: low, high, one column per name.

    NaN (a latent that never fires) is in no bin.
    """
    ends = {"low": SHARES[:-1].round(6), "high": SHARES[1:].round(6)}
    counts = {n: np.histogram(v[np.isfinite(v)], SHARES)[0] for n, v in named.items()}
    return pd.DataFrame(ends | counts)


def _write_r2(folder: str | Path, metrics: Metrics) -> None:
    """One row per training (paired, mispaired, each model's own SAE), model encoded and decoded."""
    names = list(metrics["models"].values())
    head = {k: e["value"] for k, e in metrics["headline"].items() if k.startswith("r2")}
    rows = [
        {"training": training, "encoded": a, "decoded": b, "r2": values[f"r2_{i}_{j}"]}
        for training, values in (("paired", head), (MISPAIRED, metrics["null"][MISPAIRED]))
        for i, a in enumerate(names)
        for j, b in enumerate(names)
    ]
    rows += [
        {"training": "independent", "encoded": name, "decoded": name,
         "r2": metrics["independent_r2"][str(j)]}
        for j, name in enumerate(names)
    ]  # fmt: skip
    text = pd.DataFrame(rows).to_csv(index=False, float_format="%.6g")
    write_text(Path(folder) / "r2.csv", text)


def _null(outcomes: Sequence[SharedOutcome]) -> SharedOutcome:
    return next(o for o in outcomes if o.name.startswith(MISPAIRED))


def _write_entropy(folder: str | Path, outcomes: Sequence[SharedOutcome]) -> None:
    """Count latents by firing entropy, of seed 0 and its nulls."""
    tests = {"paired": outcomes[0].test, MISPAIRED: _null(outcomes).test}
    tests["random"] = outcomes[0].controls["random"]
    table = histogram({name: firing_entropy(test.fires.sum(0)) for name, test in tests.items()})
    write_text(Path(folder) / "firing_entropy.csv", table.to_csv(index=False))


def _write_norms(
    folder: str | Path, outcomes: Sequence[SharedOutcome], names: Sequence[str]
) -> None:
    """Count latents by each model's share of the decoder norm: paired, mispaired and random."""
    test, null = outcomes[0].test, _null(outcomes).test
    columns: dict[str, np.ndarray] = {}
    for training, of, norms in (
        ("paired", test, test.norms),
        (MISPAIRED, null, null.norms),
        ("random", test, outcomes[0].random_norms),
    ):
        if norms is None:
            raise ValueError("the first run lacks the norms of its random control")
        shares = relative_norms(norms)[:, of.fires.sum((0, 1)) > 0]
        columns |= {f"{name} {training}": row for name, row in zip(names, shares, strict=True)}
    write_text(Path(folder) / "relative_norm.csv", histogram(columns).to_csv(index=False))


def _write_loss(folder: str | Path, outcomes: Sequence[SharedOutcome]) -> None:
    """Tabulate the unexplained share of training batches of every run."""
    columns = ["drawn", "self_loss", "cross_loss", "aux_loss", "step", "samples", "learning_rate"]
    frames = [
        pd.DataFrame(o.history)
        .rename(columns={"loss": "self_loss"})[[*columns, "dead_fraction"]]
        .assign(run=o.name)
        for o in outcomes
    ]
    text = pd.concat(frames).to_csv(index=False, float_format="%.6g")
    write_text(Path(folder) / "loss.csv", text)
