"""Results of activation maximisation as metrics, table and audio.

Ratios are values divided by that of the best real clip (train and test). That clip has up to ten
seconds of context that the short searched sequences do not have.

Format of index.json beside the audio: ``models``, ``sample_rate``, ``frame_rate``, ``window``
(frames), ``naturalness`` and ``features``. A feature has ``name kind role concept``, ``numbers``
and ``best_clip`` per model, and two lists of audio files:

* ``maximised``: ``variant file frame`` and, per model, ``tokens sound log_prob_tokens
  log_prob_sound curves``;
* ``moments``: ``split clip seconds file frame`` and, per model, ``values curves``.

``best_clip`` and ``values`` are window means in the dictionary's unit. ``tokens`` and ``sound`` are
ratios: of the tokens that the file was decoded from, and of the tokens that it encodes to. A curve
has one value per frame of its file (if maximised, of its sound). ``frame`` is the first frame of
the window in the file, ``seconds`` the position of the file in the clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile

from musicscope.core.io import Metrics, atomic_dir, write_json, write_text
from musicscope.core.seeding import seed_for
from musicscope.core.stats import Estimate, estimate, mean_of
from musicscope.data.clips import Clips
from musicscope.features.selection import Latent
from musicscope.maximisation.moments import excerpt_start
from musicscope.maximisation.run import NULL_VARIANTS, SOUND, Plan, Result

FORMAT = 1
UNIT = "ratio to the best real clip"
NULL_ROLES = ("direction", "mismatched")
HEADLINE_CONTROLS = (
    "best_train", "best_test", "moments_max", "clips_q50", "clips_q95", "clips_max", "samples_q50",
    "samples_max", "random_tokens_q50",
)  # fmt: skip
QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95, "max": 1.0}
WHOLE_CLIP_CONTROLS = (
    "best_train", "best_test", "whole_clips_q05", "whole_clips_q50", "whole_clips_q95",
)  # fmt: skip


def write(result: Result, name: str, clips: Clips) -> None:
    """Write data/<name>, metrics/<name>.json and plots/<name>.csv of a run.

    `clips` are at the sample rate of the audio.
    """
    with atomic_dir(f"data/{name}") as folder:
        write_audio(result, folder, clips)
    table = plot_table(result)
    write_text(f"plots/{name}.csv", table.to_csv(index=False, float_format="%.6g"))
    write_json(f"metrics/{name}.json", metrics(result))


# --- numbers ----------------------------------------------------------------------------------


def search_table(result: Result) -> pd.DataFrame:
    """Tabulate the searches: one row per (search, model).

    `tokens` and `sound`: ratios of the result and of the tokens of its audio; `start`: of the
    tokens that the search began with; `others_*`: mean over the run's other features; `log_prob_*`
    in nats per code. `judged`: which of the two the search maximised; `*reached` repeats it.
    """
    records = []
    for i, search in enumerate(result.searches):
        column = result.plan.latents.index(search.latent)
        others = [
            j
            for j, latent in enumerate(result.plan.latents)
            if not latent.is_null
            and (latent.kind, latent.features) != (search.latent.kind, search.latent.features)
            and not (
                latent.kind == search.latent.kind == "usae" and _overlap(latent, search.latent)
            )
        ]
        for place, model in enumerate(result.plan.names):
            scale = result.scale[place]
            record = {
                "feature": search.latent.name,
                "role": search.latent.role,
                "concept": search.latent.concept,
                "variant": search.variant,
                "model": model,
                "judged": "sound" if search.variant.startswith(SOUND) else "tokens",
                "start": result.start[place].values[i, column] / scale[column],
                "log_prob_start": result.start[place].log_prob[i],
            }
            for medium, measured in (("tokens", result.optimised), ("sound", result.again)):
                ratios = measured[place].values[i] / scale
                record[medium] = ratios[column]
                record[f"others_{medium}"] = ratios[others].mean() if others else np.nan
                record[f"log_prob_{medium}"] = measured[place].log_prob[i]
            records.append(record)
    table = pd.DataFrame(records)
    for key in ("", "others_", "log_prob_") if records else ():
        sound = table[f"{key}sound"]
        table[f"{key}reached"] = table[f"{key}tokens"].where(table["judged"] == "tokens", sound)
    return table


def _overlap(first: Latent, second: Latent) -> bool:
    return bool(set(first.features) & set(second.features))


def control_ratios(result: Result, column: int, place: int) -> dict[str, float]:
    """Compute the ratios of the controls of one latent in one model."""
    scale = result.scale[place, column]
    best = {f"best_{split}": best[place, column] / scale for split, best in result.best.items()}
    ratios = {
        f"{name}_{key}": float(np.quantile(measured[place].values[:, column] / scale, q))
        for name, measured in result.controls.items()
        for key, q in QUANTILES.items()
    }
    if result.plan.not_searched:
        return {key: (best | ratios)[key] for key in WHOLE_CLIP_CONTROLS}
    if count := len(result.moments[column]):
        # The best moments without the context that they had in their clips.
        first = sum(len(moments) for moments in result.moments[:column])
        values = result.moment_values[place].values[first : first + count, column]
        ratios["moments_max"] = float(values.max() / scale)
    return ratios | best


def _control_table(result: Result) -> pd.DataFrame:
    """One row per (latent, model): `control_ratios`, and whether it is a null."""
    return pd.DataFrame(
        [
            {"null": latent.is_null, **control_ratios(result, column, place)}
            for column, latent in enumerate(result.plan.latents)
            for place in range(len(result.plan.names))
        ]
    )


def _mean(values: pd.Series, bootstrap: int, seed: int) -> dict[str, object]:
    """Mean over features as an estimate that resamples features; NaN where it is undefined."""
    values = values.dropna()
    if len(values) < 2:
        return Estimate(float(values.mean()), n=len(values), unit=UNIT).as_dict()
    mean = mean_of(values.to_numpy())
    return estimate(mean, values.index.to_numpy(), bootstrap, seed, UNIT).as_dict()


def headline(result: Result, table: pd.DataFrame) -> Metrics:
    """Compute the summary's numbers: means over features, and over models where several.

    `table` is the `search_table`. <variant>_reached is the ratio that the search maximised: of the
    tokens or (heard, alone) of the sound.
    """
    count = sum(not latent.is_null for latent in result.plan.latents)
    head: Metrics = {"features": count, "skipped": len(result.skipped)}
    ratios = _control_table(result)
    null, ratios = ratios[ratios["null"]], ratios[~ratios["null"]]
    if result.plan.not_searched:
        head["not_searched"] = count
        head |= {key: ratios[key].mean() for key in WHOLE_CLIP_CONTROLS}
        if len(null):
            head["null_whole_clips_q50"] = null["whole_clips_q50"].mean()
    else:
        head |= _search_headline(result, table)
        head |= {key: ratios[key].mean() for key in HEADLINE_CONTROLS}
        for name, measured in result.controls.items():
            head[f"log_prob_{name}"] = np.mean([np.median(m.log_prob) for m in measured])
    return {key: one if isinstance(one, dict) else float(one) for key, one in head.items()}


def _search_headline(result: Result, table: pd.DataFrame) -> Metrics:
    seed = seed_for(result.plan.seed, "maximize", "bootstrap")
    bootstrap = result.plan.section.bootstrap
    is_null = table["role"].isin(NULL_ROLES)
    nulls, real = table[is_null], table[~is_null]
    head: Metrics = {}

    def by_feature(rows: pd.DataFrame, key: str) -> pd.Series:
        return rows.groupby("feature", sort=False)[key].mean()

    for variant in result.plan.variants:
        if variant == "alone":
            continue
        rows = real[real["variant"] == variant]
        head[f"{variant}_reached"] = _mean(by_feature(rows, "reached"), bootstrap, seed)
        weakest = rows.groupby("feature", sort=False)["reached"].min()
        head[f"{variant}_reached_weakest_model"] = weakest.mean()
        head[f"{variant}_beats_best_clip"] = (weakest > 1).mean()
        head[f"{variant}_other_features"] = by_feature(rows, "others_reached").mean()
        head[f"{variant}_log_prob"] = by_feature(rows, "log_prob_reached").mean()
        head[f"{variant}_start"] = by_feature(rows, "start").mean()
        if variant not in SOUND:
            head[f"{variant}_sound"] = by_feature(rows, "sound").mean()
        if variant in NULL_VARIANTS:
            null = by_feature(nulls[nulls["variant"] == variant], "reached")
            head[f"{variant}_null_reached"] = _mean(null, bootstrap, seed)
    if "alone" in result.plan.variants:
        alone = real[real["variant"].str.startswith("alone-")]
        own = alone["variant"] == "alone-" + alone["model"]
        head["alone_reached"] = alone[own]["reached"].mean()
        head["transfer"] = _mean(by_feature(alone[~own], "reached"), bootstrap, seed)
        # In models outside the search, an input for one feature moves the other features too.
        head["transfer_other_features"] = alone[~own]["others_reached"].mean()
    return head


def metrics(result: Result) -> dict[str, object]:
    """Compute the numbers of metrics/maximize_*: headline, log_prob quantiles, every feature."""
    table, plan = search_table(result), result.plan
    features: dict[str, object] = {}
    for column, latent in enumerate(plan.latents):
        entry: dict[str, object] = {"role": latent.role, "concept": latent.concept or "none"}
        for place, model in enumerate(plan.names):
            searches = {}
            if len(table):
                rows = table[(table["feature"] == latent.name) & (table["model"] == model)]
                rows = rows.drop(columns=["feature", "role", "concept", "model", "judged"])
                searches = rows.set_index("variant").to_dict("index")
            entry[model] = {
                "number": latent.features[place],
                "best_clip": result.scale[place, column],
                "controls": control_ratios(result, column, place),
                "searches": searches,
            }
        features[latent.name] = entry
    numbers = {
        "frames": plan.frames,
        "window": plan.window,
        "skipped": {latent.name: latent.role for latent in result.skipped},
        "headline": headline(result, table),
        "features": features,
    }
    if plan.not_searched:
        return numbers | {"not_searched": plan.not_searched}
    log_prob = {
        name: {
            model: {key: float(np.quantile(m.log_prob, q)) for key, q in QUANTILES.items()}
            for model, m in zip(plan.names, measured, strict=True)
        }
        for name, measured in result.controls.items()
    }
    return numbers | {"naturalness": plan.section.naturalness, "log_prob": log_prob}


# --- table ------------------------------------------------------------------------------------


def plot_table(result: Result) -> pd.DataFrame:
    """Tabulate all ratios: one row per (feature, model, series) with ratio and log p per code."""
    controls = pd.DataFrame(
        {
            "feature": latent.name, "role": latent.role, "concept": latent.concept,
            "model": model, "series": series, "ratio": ratio,
        }
        for column, latent in enumerate(result.plan.latents)
        for place, model in enumerate(result.plan.names)
        for series, ratio in control_ratios(result, column, place).items()
    )  # fmt: skip
    if not result.searches:
        return controls
    searches = search_table(result)
    searches["series"], searches["ratio"] = searches["variant"], searches["reached"]
    searches = searches.rename(columns={"log_prob_reached": "log_prob"})
    searches = searches[[*controls.columns, "log_prob", "tokens", "sound"]]
    return pd.concat([searches, controls], ignore_index=True)


# --- audio ------------------------------------------------------------------------------------


def write_audio(result: Result, folder: Path, clips: Clips) -> None:
    """Write WAV files (16 bit) and index.json to an existing folder; nulls have no audio."""
    plan = result.plan
    features = [
        {
            "name": latent.name,
            "kind": latent.kind,
            "role": latent.role,
            "concept": latent.concept,
            "numbers": _by_model(plan, latent.features),
            "best_clip": _by_model(plan, result.scale[:, column]),
            "maximised": [
                _write_search(result, column, i, folder, clips.sample_rate)
                for i, search in enumerate(result.searches)
                if search.latent == latent
            ],
            "moments": [
                _write_moment(result, column, i, folder, clips)
                for i in range(len(result.moments[column]))
            ],
        }
        for column, latent in enumerate(plan.latents)
        if not latent.is_null
    ]
    index = {
        "format": FORMAT,
        "models": plan.names,
        "sample_rate": clips.sample_rate,
        "frame_rate": plan.frame_rate,
        "window": plan.window,
        "naturalness": plan.section.naturalness,
        "features": features,
    }
    write_json(folder / "index.json", index)


def _by_model(plan: Plan, values: Sequence | np.ndarray) -> dict[str, object]:
    return dict(zip(plan.names, values, strict=True))


def _write_search(
    result: Result, column: int, i: int, folder: Path, rate: int
) -> dict[str, object]:
    """Write the audio of search number i; return its entry of the index."""
    search, scale, plan = result.searches[i], result.scale[:, column], result.plan
    file = f"{search.latent.name}-{search.variant}.wav"
    _write_wav(folder / file, result.audio[i], rate)
    curves = np.stack([measured.curves[i, :, column] for measured in result.again])
    window = min(plan.window, curves.shape[1])
    joint = (curves / scale[:, None]).mean(0)
    entry = {
        "variant": search.variant,
        "file": file,
        "frame": int(np.convolve(joint, np.ones(window), "valid").argmax()),
        "curves": _by_model(plan, curves),
    }
    for medium, measured in (("tokens", result.optimised), ("sound", result.again)):
        ratios = np.array([m.values[i, column] for m in measured]) / scale
        entry[medium] = _by_model(plan, ratios)
        entry[f"log_prob_{medium}"] = _by_model(plan, [m.log_prob[i] for m in measured])
    return entry


def _write_moment(
    result: Result, column: int, i: int, folder: Path, clips: Clips
) -> dict[str, object]:
    """Write the audio of moment number i of a latent; return its entry of the index."""
    plan, moments = result.plan, result.moments[column]
    moment, hop = moments[i], clips.sample_rate / plan.frame_rate
    rank = sum(other.split == moment.split for other in moments[:i])
    file = f"{plan.latents[column].name}-{moment.split}-{rank}.wav"
    first = excerpt_start(moment.frame, plan.window, plan.frames, moment.curves.shape[1])
    start = round(first * hop)
    audio = clips.audio([moment.clip])[0][start : start + round(plan.frames * hop)]
    _write_wav(folder / file, audio, clips.sample_rate)
    return {
        "split": moment.split,
        "clip": str(clips.rows["id"].iloc[moment.clip]),
        "seconds": first / plan.frame_rate,
        "file": file,
        "frame": moment.frame - first,
        "values": _by_model(plan, moment.values),
        "curves": _by_model(plan, moment.curves[:, first : first + plan.frames]),
    }


def _write_wav(path: Path, audio: np.ndarray, rate: int) -> None:
    soundfile.write(path, np.clip(audio, -1, 1), rate, subtype="PCM_16")
