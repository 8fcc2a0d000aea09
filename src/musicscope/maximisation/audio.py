"""Maximised inputs and best moments as audio files with an index for readers.

index.json: ``models``, ``sample_rate``, ``frame_rate``, ``window`` (frames), ``naturalness`` and
``features``, each with ``name kind role concept``, ``numbers`` and ``best_clip`` by model, and two
lists of audio: ``maximised`` (``variant file frame`` and, by model, ``tokens sound log_prob_tokens
log_prob_sound curves``) and ``moments`` (``split clip seconds file frame`` and, by model, ``values
curves``). ``best_clip`` and ``values`` are window means in the dictionary's unit; ``tokens`` and
``sound`` are in units of best_clip: of the tokens that the file was decoded from, and of those that
the file encodes to. A curve has one value a frame of its file (of a maximised one: of its sound);
``frame`` is where the window that counts begins in the file, ``seconds`` where the file begins in
the clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from musicscope.core.io import write_json
from musicscope.maximisation.excerpts import cut
from musicscope.maximisation.jobs import Plan
from musicscope.maximisation.moments import Moment
from musicscope.maximisation.run import Result

FORMAT = 1


def write_audio(result: Result, folder: Path, clips: Any, frame_rate: float, rate: int) -> None:
    """WAV files (16 bit) and index.json in a folder that is there; nulls have no audio.

    `clips`: the `ClipStore` of the moments; `rate`: samples a second of both.
    """
    features = []
    for column, latent in enumerate(result.plan.latents):
        if latent.is_null:
            continue
        features.append({
            "name": latent.name,
            "kind": latent.kind,
            "role": latent.role,
            "concept": latent.concept,
            "numbers": _by_model(result, latent.features),
            "best_clip": _by_model(result, result.scale[:, column]),
            "maximised": [
                _maximised(result, column, i, folder, rate)
                for i, found in enumerate(result.searches)
                if found.latent == latent
            ],
            "moments": [
                write_moment(
                    result.plan, result.moments[column], column, i, folder, clips, frame_rate
                )
                for i in range(len(result.moments[column]))
            ],
        })  # fmt: skip
    write_index(folder, result.plan, features, frame_rate, rate)


def write_index(
    folder: Path, plan: Plan, features: list[dict[str, Any]], frame_rate: float, rate: int
) -> None:
    """index.json; `features` are its entries, without nulls."""
    index = {
        "format": FORMAT,
        "models": plan.names,
        "sample_rate": rate,
        "frame_rate": frame_rate,
        "window": plan.window,
        "naturalness": plan.naturalness,
        "features": features,
    }
    write_json(folder / "index.json", index)


def _by_model(result: Result, values: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(result.plan.names, values, strict=True))


def _maximised(result: Result, column: int, i: int, folder: Path, rate: int) -> dict[str, Any]:
    """Write search number i; its entry."""
    found, scale = result.searches[i], result.scale[:, column]
    file = f"{found.latent.name}-{found.variant}.wav"
    _write_wav(folder / file, result.audio[i], rate)
    values = {
        medium: np.array([measured.values[i, column] for measured in many]) / scale
        for medium, many in (("tokens", result.found), ("sound", result.again))
    }
    curves = np.stack([measured.curves[i, :, column] for measured in result.again])
    window = min(result.plan.window, curves.shape[1])
    joint = (curves / scale[:, None]).mean(0)
    return {
        "variant": found.variant,
        "file": file,
        "frame": int(np.convolve(joint, np.ones(window), "valid").argmax()),
        "tokens": _by_model(result, values["tokens"]),
        "sound": _by_model(result, values["sound"]),
        "log_prob_tokens": _by_model(result, [m.log_prob[i] for m in result.found]),
        "log_prob_sound": _by_model(result, [m.log_prob[i] for m in result.again]),
        "curves": _by_model(result, curves),
    }


def write_moment(
    plan: Plan, moments: Sequence[Moment], column: int, i: int, folder: Path, clips: Any,
    frame_rate: float,
) -> dict[str, Any]:  # fmt: skip
    """Write moment number i of latent number `column` as it sounds in the clip; its entry."""
    moment, hop = moments[i], clips.sample_rate / frame_rate
    rank = sum(other.split == moment.split for other in moments[:i])
    file = f"{plan.latents[column].name}-{moment.split}-{rank}.wav"
    first = cut(moment.frame, plan.window, plan.frames, moment.curves.shape[1])
    start = round(first * hop)
    audio = clips.audio([moment.clip])[0][start : start + round(plan.frames * hop)]
    _write_wav(folder / file, audio, clips.sample_rate)
    return {
        "split": moment.split,
        "clip": str(clips.rows["id"].iloc[moment.clip]),
        "seconds": first / frame_rate,
        "file": file,
        "frame": moment.frame - first,
        "values": dict(zip(plan.names, moment.values, strict=True)),
        "curves": dict(zip(plan.names, moment.curves[:, first : first + plan.frames], strict=True)),
    }


def _write_wav(path: Path, audio: np.ndarray, rate: int) -> None:
    soundfile.write(path, np.clip(audio, -1, 1), rate, subtype="PCM_16")
