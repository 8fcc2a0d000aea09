"""What a probe on a model's features has to beat: features that need no language model.

Log-mel statistics, the codec's own latents, and seven trivial cues. SAE probes often fail to beat
plain baselines (Kantamneni et al. 2025, arXiv 2502.16681), and hand-made audio features come
within a few points of MusicGen's activations on music theory (SynTheory, arXiv 2410.00872).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from musicscope.activations import token_cache as codes
from musicscope.core import audio
from musicscope.core import io as artifacts
from musicscope.core.audio import at_rate
from musicscope.dictionaries.codes import Pools, by_batch
from musicscope.models.interface import is_audio_model
from musicscope.models.rave.inspect import POSTERIOR


def log_mel_statistics(signal: np.ndarray, rate: int) -> np.ndarray:
    """Five statistics of each log-mel band, float32 [n, 5 x bands], the same at any level.

    Per band over time: mean, 10th and 90th percentile (all three less the clip's overall mean),
    standard deviation, and mean absolute change from frame to frame. `signal` float [n, samples].
    """
    signal = np.asarray(signal, np.float32)
    level = np.sqrt((signal.astype(np.float64) ** 2).mean(1, keepdims=True))
    # log_mel has an absolute floor, so the level goes before it, not after.
    mel = audio.log_mel((0.1 * signal / np.maximum(level, 1e-9)).astype(np.float32), rate)
    low, high = np.percentile(mel, [10, 90], axis=2)
    mean = mel.mean(2)
    centre = mean.mean(1, keepdims=True)
    change = np.abs(np.diff(mel, axis=2)).mean(2)
    parts = [mean - centre, low - centre, high - centre, mel.std(2), change]
    return np.concatenate(parts, 1).astype(np.float32)


def codec_statistics(latents: torch.Tensor) -> np.ndarray:
    """Mean and max over time of codec latents [n, T, D], side by side: float32 [n, 2 D]."""
    latents = latents.float().cpu()
    return torch.cat([latents.mean(1), latents.amax(1)], 1).numpy()


def cached(key: Any, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """`compute()`, or its result from an earlier run with the same `key` (artifacts.partial_dir).

    For features of the clips alone, which every model and slot shares. `key` must name all that
    decides the values.
    """
    path = Path(artifacts.partial_dir(key)) / "features.npy"
    if path.is_file():
        try:
            return np.load(path, allow_pickle=False)
        except ValueError:  # cut short by a full disk: compute it again
            path.unlink()
    values = compute()
    temporary = path.with_name(f".{os.getpid()}.npy")
    np.save(temporary, values, allow_pickle=False)
    os.replace(temporary, path)
    return values


def codec_pools(
    clips: Any, clips_sha256: str, model: Any, rows: Sequence[int], workers: int = 1
) -> Pools:
    """Mean and max of the codec's quantised latents, from tokens that extraction left behind.

    Tokens that are not there (`activations.codes`) are computed first, so that the result is the
    same whether or not extraction ran on this machine. `model` needs `codec_latents(codes)`; an
    audio model is a codec itself, and its latents are taken. The clips are resampled for it.
    """
    clips = at_rate(clips, model.sample_rate)
    if is_audio_model(model):
        return _halves(latent_statistics(model, clips, rows))
    folder = codes.codes_dir(model, clips_sha256)
    if folder is None:
        raise ValueError(f"{model.name} has no codec of its own: no codec baseline for it")
    absent = codes.missing(folder, len(clips.rows))
    by_batch(lambda c: codes.write_chunk(lambda: (model, clips), folder, *c), absent, workers, 1)
    statistics = np.concatenate(
        by_batch(
            lambda batch: codec_statistics(model.codec_latents(codes.read_codes(folder, batch))),
            rows,
            workers,
        )
    )
    return _halves(statistics)


def latent_statistics(model: Any, clips: Any, rows: Sequence[int]) -> np.ndarray:
    """`codec_statistics` of an AudioModel's latents: of the posterior mean, which needs no noise,
    where the export tells it, else of the latents as they are drawn. `clips` at its rate."""
    known = {point.name for point in model.hook_points}

    def batch(at: list[int]) -> np.ndarray:
        heard = model.encode(clips.audio(at))
        if POSTERIOR in known:
            return codec_statistics(model.capture(heard, [POSTERIOR])[POSTERIOR])
        return codec_statistics(model.latents(heard))

    return np.concatenate(by_batch(batch, rows, 1))  # an export's caches are no threads' to share


def _halves(statistics: np.ndarray) -> Pools:
    half = statistics.shape[1] // 2
    return {"mean": statistics[:, :half], "max": statistics[:, half:]}


def baseline_pools(
    clips: Any, clips_sha256: str, model: Any, rows: Sequence[int], workers: int = 1
) -> dict[str, Pools]:
    """{"logmel", "codec", "trivial"} -> pools of the named rows of a ClipStore.

    `clips_sha256` is `artifacts.folder_sha256` of the clips, under which tokens are kept. The
    codec has pools "mean" and "max", as activations have; the others have one, "statistics".
    """
    rate = clips.sample_rate
    # The code is part of the key: an edit of a formula must not find the old numbers.
    code = {Path(m).name: artifacts.sha256(m) for m in (__file__, audio.__file__)}
    found: dict[str, Pools] = {}
    for name, function in (
        ("logmel", lambda batch: log_mel_statistics(clips.audio(batch), rate)),
        ("trivial", lambda batch: audio.trivial_cues(clips.audio(batch), rate)),
    ):
        key = {"stage": "probe", "features": name, "clips": clips_sha256, "code": code}
        key["rows"] = hashlib.sha256(np.asarray(rows, np.int64).tobytes()).hexdigest()
        values = cached(key, lambda f=function: np.concatenate(by_batch(f, rows, workers)))
        found[name] = {"statistics": values}
    return found | {"codec": codec_pools(clips, clips_sha256, model, rows, workers)}
