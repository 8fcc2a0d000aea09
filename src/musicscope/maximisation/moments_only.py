"""What features answer to where no input can be searched for: the best moments of real clips.

Token search needs tokens and, over several models, one codec. RAVE has no tokens, and MusicGen's
mean nothing to YuE. There the same features get their best moments as audio, held against all real
clips, and the searches that were not made are counted (``headline.not_searched``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from musicscope.activations import token_cache as codec_codes
from musicscope.activations.store import ActivationStore
from musicscope.core import plots
from musicscope.core.io import atomic_dir, write_json, write_text
from musicscope.data.clips import main_clips
from musicscope.maximisation import moments as mx
from musicscope.maximisation.audio import write_index, write_moment
from musicscope.maximisation.jobs import Plan
from musicscope.maximisation.objective import gradient_of
from musicscope.maximisation.run import Found, find_moments

PROBE = 50  # frames on which codecs are compared
QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95}


def unsearchable(instruments: Sequence[mx.Instrument]) -> str | None:
    """Why no tokens can be searched for with these models; None if they can."""
    for instrument in instruments:
        if gradient_of(instrument.model) is None:
            return (
                f"{instrument.name} is a {type(instrument.model).__name__}: token search needs "
                "gradients through the embeddings of tokens, which MusicGen and YuE have"
            )
    models = {i.name: i.model for i in instruments}
    if not _one_codec(list(models.values())):
        return f"{', '.join(models)} have different codecs: tokens of one mean nothing to the other"
    return None


def _one_codec(models: Sequence[Any]) -> bool:
    """Whether the same tokens are the same sound to all of them: by their weights, or, where two
    implementations spell these differently, by what they make of random tokens and that sound."""
    if len({codec_codes.codec_sha256(model) for model in models}) == 1:
        return True
    if len({(m.sample_rate, m.frame_rate, m.num_codebooks, m.card) for m in models}) > 1:
        return False
    first, *others = models
    shape = (1, first.num_codebooks, PROBE)
    tokens = torch.randint(first.card, shape, generator=torch.Generator().manual_seed(0))
    sound = first.decode(tokens).cpu()
    heard = first.encode(sound, [None]).codes.cpu()
    for model in others:
        difference = (model.decode(tokens).cpu() - sound).abs().max()
        same = model.encode(sound, [None]).codes.cpu() == heard
        # Rounding may turn a tie over; another codec shares hardly a token.
        if difference > 1e-3 * sound.std() or same.float().mean() < 0.99:
            return False
    return True


@dataclass(frozen=True)
class Result:
    """The best moments, and how strongly whole clips activate each feature."""

    plan: Plan
    found: Found
    clips: np.ndarray
    """[models, latents, clips] highest window mean in each test clip"""
    reason: str
    """Why nothing was searched for."""


def run(
    plan: Plan, instruments: Sequence[mx.Instrument], stores: Sequence[ActivationStore],
    clips: Any, reason: str, processes: int,
) -> Result:  # fmt: skip
    """Moments of the plan's latents in `stores`, which have the same frames."""
    found = find_moments(plan, instruments, stores, clips.rows, processes)
    test = main_clips(clips.rows, "test")
    values = np.stack([
        mx.scan(instrument, store, found.plan.latents, place, test, plan.window, processes).T
        for place, (instrument, store) in enumerate(zip(instruments, stores, strict=True))
    ])  # fmt: skip
    return Result(found.plan, found, values, reason)


def ratios(result: Result, column: int, place: int) -> dict[str, float]:
    """Best clip of each split, and quantiles of all test clips, in units of the best clip."""
    scale = result.found.scale[place, column]
    values = result.clips[place, column] / scale
    found = {f"best_{s}": best[place, column] / scale for s, best in result.found.best.items()}
    return found | {
        f"whole_clips_{key}": float(np.quantile(values, q)) for key, q in QUANTILES.items()
    }


def metrics(result: Result) -> dict[str, Any]:
    """metrics/maximize_*.json: headline and every feature; there are no searches."""
    plan = result.plan
    features: dict[str, Any] = {}
    rows = []
    for column, latent in enumerate(plan.latents):
        entry: dict[str, Any] = {"role": latent.role, "concept": latent.concept or "none"}
        for place, model in enumerate(plan.names):
            controls = ratios(result, column, place)
            rows.append({"null": latent.is_null, **controls})
            entry[model] = {
                "number": latent.features[place],
                "best_clip": result.found.scale[place, column],
                "controls": controls,
                "searches": {},
            }
        features[latent.name] = entry
    table = pd.DataFrame(rows)
    real, null = (table[table["null"] == wanted].drop(columns="null") for wanted in (False, True))
    count = sum(not latent.is_null for latent in plan.latents)
    head: dict[str, Any] = {"features": count, "skipped": len(result.found.skipped)}
    head |= {"not_searched": count} | real.mean().to_dict()
    if len(null):
        head["null_whole_clips_q50"] = null["whole_clips_q50"].mean()
    return {
        "frames": plan.frames,
        "window": plan.window,
        "not_searched": result.reason,
        "skipped": {latent.name: latent.role for latent in result.found.skipped},
        "headline": {key: float(value) for key, value in head.items()},
        "features": features,
    }


def plot_table(result: Result) -> pd.DataFrame:
    """What the chart shows: one row a (feature, model, series)."""
    return pd.DataFrame(
        {
            "feature": latent.name, "role": latent.role, "concept": latent.concept,
            "model": model, "series": series, "ratio": ratio,
        }
        for column, latent in enumerate(result.plan.latents)
        for place, model in enumerate(result.plan.names)
        for series, ratio in ratios(result, column, place).items()
    )  # fmt: skip


def figure(result: Result, title: str) -> Figure:
    """All test clips (5 to 95 %) and the best one of each split, in units of the best clip."""
    table = plot_table(result)
    labels = [(latent.name, model) for latent in result.plan.latents for model in result.plan.names]
    rows = {label: y for y, label in enumerate(labels)}
    drawn, ((axis,),) = plots.new_figure(1, 1, (8.0, 1.6 + 0.34 * len(labels)))
    at = {
        name: ([rows[key] for key in zip(part["feature"], part["model"], strict=True)],
               part["ratio"].to_numpy())
        for name, part in table.groupby("series", sort=False)
    }  # fmt: skip
    y, low = at["whole_clips_q05"]
    axis.hlines(y, low, at["whole_clips_q95"][1], color=plots.COLOURS[6], lw=5, alpha=0.45,
                label="test clips, 5-95 %")  # fmt: skip
    for number, name in enumerate(("whole_clips_q50", "best_train", "best_test")):
        y, ratio = at[name]
        axis.plot(ratio, y, ls="none", marker=plots.MARKERS[number], color=plots.COLOURS[number],
                  label=name.replace("_", " ").replace("q50", "median"))  # fmt: skip
    axis.set_yticks(range(len(labels)), [" ".join(label) for label in labels])
    axis.invert_yaxis()
    axis.set(title=title, xlabel="activation (1: the best real clip)")
    axis.grid(axis="x", color="#dddddd", lw=0.7)
    drawn.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return drawn


def write(result: Result, name: str, clips: Any, rate: float) -> None:
    """All outs of a run: data/<name>, metrics/<name>.json, plots/<name>.{csv,png}.

    `rate`: frames a second of the stores; excerpts are at the rate of `clips`.
    """
    plan, found = result.plan, result.found
    with atomic_dir(f"data/{name}") as folder:
        features = [
            {
                "name": latent.name, "kind": latent.kind, "role": latent.role,
                "concept": latent.concept,
                "numbers": dict(zip(plan.names, latent.features, strict=True)),
                "best_clip": dict(zip(plan.names, found.scale[:, column], strict=True)),
                "maximised": [],
                "moments": [
                    write_moment(plan, found.moments[column], column, i, folder, clips, rate)
                    for i in range(len(found.moments[column]))
                ],
            }
            for column, latent in enumerate(plan.latents)
            if not latent.is_null
        ]  # fmt: skip
        write_index(folder, plan, features, rate, clips.sample_rate)
    table = plot_table(result).to_csv(index=False, float_format="%.6g")
    write_text(f"plots/{name}.csv", table)
    plots.save_figure(figure(result, ", ".join(plan.names)), f"plots/{name}.png")
    write_json(f"metrics/{name}.json", metrics(result))
