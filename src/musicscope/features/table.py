"""The feature table: data/features/features.parquet and top_clips.parquet.

features.parquet, one row per latent of each model's SAE (seed 0) and, once per model, of the USAE:

kind, model, feature   "sae" or "usae"; the model's name; the latent's number
energy             |E[z] d|^2 over the summed variance of the activations, on test frames: the
                   latent's mean contribution, in one unit for every kind and model
firing_rate        share of test frames on which the latent is active (z > 0)
fires, firing_entropy, cofires, cofire_proportion   USAE: test frames with z above
                   train_usae.fire_threshold; the entropy of the fires over the models in units of
                   log M (1: all models alike, 0: one alone); frames on which it fires for all
                   models, and these over `fires` (arXiv 2502.03714, 3.1). NaN for a latent that
                   never fires, and for SAEs (whole numbers: -1)
set                SAE: common, positional, partial, own, unstable, unmatched or silent
                   (matching.py); ""
                   for the USAE
partner_model, partner, partner_correlation, partner_repaired   SAE: its one-to-one partner in
                   another model's SAE (of several models the one with the highest correlation),
                   their test correlation, and the same with clips re-paired to other compositions
best_model, best, best_correlation   SAE: the latent with the highest test correlation in any other
                   model's SAE, one-to-one or not
seed_correlation   SAE: test correlation with its partner in the SAE of seed 1 of the same model
seed_cosine, returns   SAE: mean over the other seeds of its decoder row's best cosine; 1 if that
                   makes it a latent that returns, else 0 (dictionaries.stability); -1 for the USAE
counterpart, counterpart_cosine   its partner in the other dictionary of the same model: a USAE
                   latent for "sae", an SAE latent for "usae", by decoder cosine
output_kl, output_confidence   SAE: effect of the latent at the logits (output_effects.py)
concept, concept_pooling, concept_auroc, concept_heldout_auroc, concept_p   association.py; missing
                   for an SAE latent that does not return, with match_features.stable_only
top_clip, top_frame, top_seconds, top_value   the test clip, and the exact frame in it, on which the
                   latent is highest; "" and -1 if it never fires

Missing numbers are -1 in integer columns and NaN in others; missing text is "". top_clips.parquet
holds the best clips of each: kind, model, feature, rank (from 1), clip, frame, seconds, value.
Frames count from 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from musicscope.core.io import atomic_dir
from musicscope.dictionaries.codes import ClipPools, Codes
from musicscope.dictionaries.evaluation import cofire_proportion, firing_entropy
from musicscope.features.association import Alignment
from musicscope.features.matching import Match

COLUMNS = (
    "kind", "model", "feature", "energy", "firing_rate", "fires", "firing_entropy", "cofires",
    "cofire_proportion", "set", "partner_model", "partner", "partner_correlation",
    "partner_repaired", "best_model", "best", "best_correlation", "seed_correlation", "seed_cosine",
    "returns", "counterpart", "counterpart_cosine", "output_kl", "output_confidence", "concept",
    "concept_pooling", "concept_auroc", "concept_heldout_auroc", "concept_p", "top_clip",
    "top_frame", "top_seconds", "top_value",
)  # fmt: skip
TOP_COLUMNS = ("kind", "model", "feature", "rank", "clip", "frame", "seconds", "value")
TEXT = ("set", "partner_model", "best_model", "concept", "concept_pooling", "top_clip")
WHOLE = ("feature", "fires", "cofires", "partner", "best", "returns", "counterpart", "top_frame")


def energy(codes: Codes, decoder: np.ndarray, variance: float) -> np.ndarray:
    """Compute |E[z] d|^2 over `variance`, the summed variance of the activations, [F].

    `decoder` [F, d] and `variance` in activation units (arXiv 2502.03714, eq. 9, per model).
    """
    return np.square(codes.mean) * np.square(decoder.astype(np.float64)).sum(1) / variance


def shared_firing(codes: Sequence[Codes], threshold: float) -> dict[str, np.ndarray]:
    """Count how a shared code fires for M models on paired frames, given one `Codes` per model.

    {"fires" [M, F], "firing_entropy" [F], "cofires" [F], "cofire_proportion" [M, F]}; a latent
    fires where its value is above `threshold`.
    """
    fired = []
    for c in codes:
        mask = c.matrix.copy()
        mask.data = (mask.data > threshold).astype(np.int64)
        mask.eliminate_zeros()
        fired.append(mask)
    together = fired[0]
    for mask in fired[1:]:
        together = together.multiply(mask)
    fires = np.stack([np.asarray(mask.sum(0)) for mask in fired])
    cofires = np.asarray(together.sum(0))
    return {
        "fires": fires,
        "firing_entropy": firing_entropy(fires),
        "cofires": cofires,
        "cofire_proportion": cofire_proportion(cofires, fires),
    }


def top_clips(pools: ClipPools, ids: Sequence[str], rate: float, n: int) -> pd.DataFrame:
    """List the `n` clips of the highest peaks of each latent: `TOP_COLUMNS` from feature on.

    `rate`: frames per second. Equal peaks: the earlier clip first. Clips in which the latent does
    not fire are left out.
    """
    order = np.argsort(-pools.highest, axis=0, kind="stable")[:n]
    value = np.take_along_axis(pools.highest, order, 0).T
    frame = np.take_along_axis(pools.frame, order, 0).T
    feature, rank = np.nonzero(value > 0)
    return pd.DataFrame(
        {
            "feature": feature,
            "rank": rank + 1,
            "clip": np.asarray(ids, dtype=str)[order.T[feature, rank]],
            "frame": frame[feature, rank].astype(np.int64),
            "seconds": frame[feature, rank] / rate,
            "value": value[feature, rank],
        }
    )


def describe(codes: Codes, power: np.ndarray, alignment: Alignment, top: pd.DataFrame) -> dict:
    """Make the columns that every dictionary has, {column: [F]}."""
    first = top[top["rank"] == 1].set_index("feature").reindex(np.arange(codes.n_latents))
    return {
        "feature": np.arange(codes.n_latents),
        "energy": power,
        "firing_rate": codes.fired / codes.matrix.shape[0],
        "concept": alignment.concept,
        **{
            f"concept_{k}": getattr(alignment, k)
            for k in ("pooling", "auroc", "heldout_auroc", "p")
        },
        **{f"top_{k}": first[k].to_numpy() for k in ("clip", "frame", "seconds", "value")},
    }


def only_returning(
    columns: dict[str, np.ndarray], returning: np.ndarray, level: float
) -> dict[str, np.ndarray]:
    """Take the concepts from latents that are not in `returning` [F].

    A concept that no returning latent follows at corrected p <= `level` stays with those that do.
    """
    concept, aligned = columns["concept"].astype(str), columns["concept_p"] <= level
    kept = returning | (aligned & ~np.isin(concept, concept[aligned & returning]))
    blank = {
        name: np.where(kept, values, "" if values.dtype.kind in "OU" else np.nan)
        for name, values in columns.items()
        if name == "concept" or name.startswith("concept_")
    }
    return columns | blank


def partners(
    model: str,
    latents: int,
    matches: dict[tuple[str, str], Match],
    highest: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]],
) -> dict[str, np.ndarray]:
    """Make the partner_* and best_* columns of one model's SAE, over all other models.

    `matches` [a, b] for models in order; `highest` [model, other]: latent [F] and correlation [F].
    """
    names, paired, score, repaired = [], [], [], []
    for (a, b), match in matches.items():
        if model in (a, b):
            names.append(b if model == a else a)
            oriented = (match.partner, match.score, match.repaired)
            oriented = oriented if model == a else match.inverse(latents)
            paired.append(oriented[0])
            score.append(np.where(oriented[0] >= 0, oriented[1], -np.inf))
            repaired.append(oriented[2])
    pick, at = np.argmax(score, axis=0), np.arange(latents)
    partner, correlation = np.stack(paired)[pick, at], np.stack(score)[pick, at]
    others = [other for a, other in highest if a == model]
    best = np.stack([highest[model, other][1] for other in others])
    top = best.argmax(0)
    # With correlations of at most 0 only, no latent is similar.
    near = best[top, at] > 0
    latent = np.stack([highest[model, other][0] for other in others])[top, at]
    return {
        "partner_model": np.where(partner >= 0, np.array(names, dtype=object)[pick], ""),
        "partner": partner,
        "partner_correlation": np.where(partner >= 0, correlation, np.nan),
        "partner_repaired": np.stack(repaired)[pick, at],
        "best_model": np.where(near, np.array(others, dtype=object)[top], ""),
        "best": np.where(near, latent, -1),
        "best_correlation": np.where(near, best[top, at], np.nan),
    }


def table(parts: Sequence[tuple[str, str, dict[str, np.ndarray]]]) -> pd.DataFrame:
    """Join (kind, model, columns) of each dictionary into one table of `COLUMNS`."""
    frames = [
        pd.DataFrame(columns).assign(kind=kind, model=model) for kind, model, columns in parts
    ]
    whole = pd.concat(frames, ignore_index=True).reindex(columns=list(COLUMNS))
    for name in COLUMNS:
        if name in WHOLE:
            whole[name] = whole[name].fillna(-1).astype(np.int64)
        elif name in TEXT:
            whole[name] = whole[name].astype(object).where(whole[name].notna(), "").astype(str)
        elif name not in ("kind", "model"):
            whole[name] = whole[name].astype(np.float64)
    return whole


def with_effects(features: pd.DataFrame, effects: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Fill the output_* columns of SAE latents from tables of `output_effects`, by model.

    ValueError for a table of another number of latents; one without rows (audio models) is left.
    """
    features = features.copy()
    for model, table_of in effects.items():
        own = (features["kind"] == "sae") & (features["model"] == model)
        if table_of.empty:
            continue
        if len(table_of) != own.sum():
            raise ValueError(
                f"{model}: output effects of {len(table_of)} latents for {own.sum()}: run dvc "
                "repro measure_effects"
            )
        by_feature = table_of.set_index("feature").loc[features.loc[own, "feature"]]
        for name in ("kl", "confidence"):
            features.loc[own, f"output_{name}"] = by_feature[name].to_numpy(np.float64)
    return features


def write(folder: str | Path, features: pd.DataFrame, top: pd.DataFrame) -> None:
    """Write both tables into a folder, atomically."""
    if repeated := features.duplicated(["kind", "model", "feature"]).sum():
        raise ValueError(f"{repeated} features have more than one row")
    with atomic_dir(folder) as temporary:
        features.to_parquet(temporary / "features.parquet", index=False)
        top[list(TOP_COLUMNS)].to_parquet(temporary / "top_clips.parquet", index=False)
