"""An audio file through an audio model, plain and steered: what `generate --audio` plays.

The noise of the pass is decided by the samples and the seed, the same for both pieces, so they
differ by the edit alone.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from musicscope.core.audio import resample
from musicscope.models.interface import AudioModel, is_audio_model
from musicscope.models.registry import load_model
from musicscope.steering.audio_cells import heard, other_noise
from musicscope.steering.edit import Steering, steering_hook
from musicscope.steering.pieces import MAX_SECONDS, Piece


def open_audio_model(name: str, device: str = "cpu") -> AudioModel:
    """`load_model` of a model that turns audio into audio; ValueError of one that generates."""
    model: Any = load_model(name, device)
    if not is_audio_model(model):
        raise ValueError(
            f"{name} makes music from words: give --prompt TEXT in place of --audio FILE"
        )
    return model


def read_audio(path: str | Path, rate: int, seconds: float | None = None) -> np.ndarray:
    """The first `seconds` (None: all) of a file that libsndfile reads: float32 [samples], mono,
    at `rate` Hz.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no audio, is empty, holds NaN or infinity, or is longer than MAX_SECONDS
            where `seconds` is not given.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file")
    if seconds is not None and not 0 < seconds <= MAX_SECONDS:
        raise ValueError(f"{seconds:g} seconds: above 0 and up to {MAX_SECONDS:g}")
    try:
        with soundfile.SoundFile(str(path)) as file:
            own, length = file.samplerate, file.frames / file.samplerate
            if seconds is None and length > MAX_SECONDS:
                raise ValueError(
                    f"{path} lasts {length:.0f} s: give --seconds, up to {MAX_SECONDS:g}"
                )
            wanted = file.frames if seconds is None else math.ceil(seconds * own)
            sound = file.read(wanted, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} is no audio that libsndfile reads: {error}") from error
    if not len(sound):
        raise ValueError(f"{path} holds no samples")
    if not np.isfinite(sound).all():
        raise ValueError(f"{path} holds NaN or infinity")
    return resample(sound.mean(1), own, rate)


def edit(
    model: AudioModel, audio: np.ndarray, seed: int, layer: str, steering: Steering | None = None
) -> Piece:
    """One reconstruction of audio [samples], steered at `layer` if `steering` is given.

    Seed 0 is the noise of the model's own, which the stage `steer` used.

    Raises:
        ValueError: the model has no such layer, or the SAE is of another width.
    """
    width = {point.name: point.width for point in model.hook_points}.get(layer)
    if width is None:
        raise ValueError(f"{model.name} has no {layer}; it has {model.hook_points[0].name} ...")
    hooks = {}
    if steering is not None:
        if steering.sae.width != width:
            raise ValueError(
                f"the SAE has width {steering.sae.width}, {layer} of {model.name} {width}: they "
                "are not of one model; run dvc repro steer"
            )
        hooks[layer] = steering_hook(model, steering, model.frame_rates[layer])
    batch = model.encode(torch.from_numpy(audio)[None])
    found = model.reconstruct(other_noise(batch, "seed", seed) if seed else batch, hooks)
    return Piece(heard(found)[0], model.sample_rate, None)
