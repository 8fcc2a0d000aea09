"""Agreement of dictionaries that differ in their seed: of each latent, and of subspaces.

A latent returns if its decoder row has a like row in the dictionaries of the other seeds: its best
cosine, averaged over them, exceeds both a fixed threshold and the 99th percentile of the same
number against Gaussian rows of equal mean and covariance. High explained variance does not imply
it. Unstable latents may still span the same subspace in every seed (arXiv 2606.12138), so the
overlap of subspaces stands beside it.

`write` keeps one row per latent of seed 0 in stability.parquet of data/sae/<model>/<slot>:

feature       the latent's number
seed_cosine   mean over the other seeds of its best cosine; NaN with one seed
null_cosine   the same against random rows
returns       seed_cosine is above the threshold and above the null's 99th percentile
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from musicscope.core.io import atomic_file
from musicscope.core.seeding import seed_for
from musicscope.dictionaries.evaluation import random_like

FILE = "stability.parquet"
NULL_PERCENTILE = 99.0
SUBSPACE = 0.25
"""Dimensions of the subspaces that are compared, as a share of the activations' width."""


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def best_cosine(rows: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """Find each row's highest cosine with any row of a dictionary, averaged over `others`: [F]."""
    unit = _unit(rows)
    return np.mean([(unit @ _unit(other).T).max(1) for other in others], axis=0)


def per_latent(dictionaries: Sequence[np.ndarray], threshold: float, seed: int) -> pd.DataFrame:
    """Make the table of `write` for the first of the dictionaries [F, d]."""
    first, others = dictionaries[0], dictionaries[1:]
    cosine = null = np.full(len(first), np.nan)
    returns = np.zeros(len(first), bool)
    if others:
        random = [random_like(o, seed_for(seed, "random", i)) for i, o in enumerate(others)]
        cosine, null = best_cosine(first, others), best_cosine(first, random)
        returns = cosine > max(threshold, float(np.percentile(null, NULL_PERCENTILE)))
    return pd.DataFrame(
        {"feature": np.arange(len(first)), "seed_cosine": cosine, "null_cosine": null,
         "returns": returns}
    )  # fmt: skip


def write(folder: str | Path, table: pd.DataFrame) -> None:
    """Write a table of `per_latent` into data/sae/<model>/<slot>."""
    with atomic_file(Path(folder) / FILE) as temporary:
        table.to_parquet(temporary, index=False)


def read(folder: str | Path) -> pd.DataFrame:
    """Read the table of data/sae/<model>/<slot>; FileNotFoundError names the stage to run."""
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run dvc repro train_sae")
    return pd.read_parquet(path)


def decoder_cosine(dictionary: np.ndarray) -> float:
    """Compute c_dec, the mean |cosine| of different rows [F, d] (arXiv 2508.16560).

    Lowest where k fits the data: too small a k mixes features, too large a k splits them.
    """
    unit = _unit(dictionary)
    n = len(unit)
    return float((np.abs(unit @ unit.T).sum() - n) / (n * (n - 1)))


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Mean squared cosine of the principal angles between the spans of two sets of rows [n, d].

    1 for the same subspace; n / d for random ones.
    """
    bases = [np.linalg.qr(rows.T.astype(np.float64))[0] for rows in (first, second)]
    return float(np.square(bases[0].T @ bases[1]).sum() / len(first))


def subspaces(
    dictionaries: Sequence[np.ndarray], fired: Sequence[np.ndarray], threshold: float, seed: int
) -> dict[str, dict[str, float | int | None]]:
    """Compare subspaces between seeds: of the latents used most, and of unstable ones used most.

    `fired` [F] per seed orders the latents. {"used", "unstable": {"latents", "overlap", "null"}}:
    mean over pairs of seeds of `overlap`; null: one side drawn by `random_like`. Both are None with
    one seed or with fewer than two unstable latents.
    """
    most = max(2, round(SUBSPACE * dictionaries[0].shape[1]))
    tables = [
        per_latent([d, *(o for o in dictionaries if o is not d)], threshold, seed)
        for d in dictionaries
    ]
    unstable = [~table["returns"].to_numpy() for table in tables]
    chosen = {"used": [np.ones(len(f), bool) for f in fired], "unstable": unstable}
    found: dict[str, dict[str, float | int | None]] = {}
    for name, masks in chosen.items():
        n = min(most, *(int(mask.sum()) for mask in masks))
        rows = [
            d[np.lexsort((np.arange(len(f)), -f * mask, ~mask))[:n]]
            for d, f, mask in zip(dictionaries, fired, masks, strict=True)
        ]
        pairs = [(i, j) for i in range(len(rows)) for j in range(i)]
        if n < 2 or not pairs:
            found[name] = {"latents": n, "overlap": None, "null": None}
            continue
        drawn = [random_like(d, seed_for(seed, name, i))[:n] for i, d in enumerate(dictionaries)]
        found[name] = {
            "latents": n,
            "overlap": float(np.mean([overlap(rows[i], rows[j]) for i, j in pairs])),
            "null": float(np.mean([overlap(rows[i], drawn[j]) for i, j in pairs])),
        }
    return found


def metrics(
    dictionaries: Sequence[np.ndarray], fired: Sequence[np.ndarray], threshold: float, seed: int
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Summarise the decoders [F, d] of all seeds, and make the table of `write`.

    `fired` [F] per seed: frames on which each latent is active. {"decoder_cosine", "returning":
    {"features", "share", "null_share", "share_of_firings", "limit"}, "subspaces"}; null_share is of
    random rows, 1 % unless the threshold lies above their 99th percentile.
    """
    table = per_latent(dictionaries, threshold, seed)
    found: dict[str, Any] = {"decoder_cosine": decoder_cosine(dictionaries[0])}
    if len(dictionaries) > 1:
        limit = max(threshold, float(np.percentile(table["null_cosine"], NULL_PERCENTILE)))
        back = table["returns"].to_numpy()
        found["returning"] = {
            "features": int(back.sum()),
            "share": float(back.mean()),
            "null_share": float((table["null_cosine"] > limit).mean()),
            "share_of_firings": float(fired[0][back].sum() / max(1, fired[0].sum())),
            "limit": limit,
        }
    found["subspaces"] = subspaces(dictionaries, fired, threshold, seed)
    return found, table
