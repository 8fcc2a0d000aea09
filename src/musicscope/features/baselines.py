"""Baseline features for probes, which need no language model.

Log-mel statistics, the codec's own latents, and seven trivial cues. SAE probes often fail to beat
plain baselines (Kantamneni et al. 2025, arXiv 2502.16681), and hand-made audio features come
within a few points of MusicGen's activations on music theory (SynTheory, arXiv 2410.00872).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from musicscope.activations import token_cache
from musicscope.core import audio
from musicscope.core.io import atomic_file, cache_dir, sha256
from musicscope.data.clips import Clips, Rows, at_rate
from musicscope.dictionaries.codes import Pools, by_batch
from musicscope.models.interface import AudioModel, Model
from musicscope.models.rave.hook_points import POSTERIOR


def log_mel_statistics(signal: np.ndarray, rate: int) -> np.ndarray:
    """Compute five statistics of each log-mel band, float32 [n, 5 x bands], the same at any level.

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
    """Compute mean and max over time of codec latents [n, T, D], side by side: float32 [n, 2 D]."""
    latents = latents.float().cpu()
    return torch.cat([latents.mean(1), latents.amax(1)], 1).numpy()


def cached(key: Mapping[str, object], compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Compute an array, or read it from an earlier run with the same `key` (`io.cache_dir`).

    For features of the clips alone, which every model and slot shares. `key` must name everything
    that decides the values.
    """
    path = cache_dir(key) / "features.npy"
    if path.is_file():
        try:
            return np.load(path, allow_pickle=False)
        except ValueError:  # cut short by a full disk: compute it again
            path.unlink()
    values = compute()
    with atomic_file(path) as temporary:
        np.save(temporary, values, allow_pickle=False)
    return values


def codec_pools(
    clips: Clips, clips_sha256: str, model: Model, rows: Rows, workers: int = 1
) -> Pools:
    """Pool the codec's quantised latents (mean, max) of clips, resampled for the codec.

    Uses the tokens that extraction left in `token_cache` and computes missing ones first, so that
    the result does not depend on earlier runs. An audio model is a codec itself: its own latents
    are taken.
    """
    clips = at_rate(clips, model.sample_rate)
    if isinstance(model, AudioModel):
        return _halves(latent_statistics(model, clips, rows))
    folder = token_cache.codes_dir(model, clips_sha256)
    if folder is None:
        raise ValueError(f"{model.name} has no codec of its own: no codec baseline for it")

    def statistics(batch: list[int]) -> np.ndarray:
        return codec_statistics(model.codec_latents(token_cache.read_codes(folder, batch)))

    absent = token_cache.missing(folder, len(clips.rows))
    by_batch(
        lambda c: token_cache.write_chunk(lambda: (model, clips), folder, *c), absent, workers, 1
    )
    return _halves(np.concatenate(by_batch(statistics, rows, workers)))


def latent_statistics(model: AudioModel, clips: Clips, rows: Rows) -> np.ndarray:
    """Compute `codec_statistics` of an audio model's latents; `clips` at its rate.

    Takes the posterior mean, which has no noise, if the export has it, else sampled latents.
    """
    has_posterior = POSTERIOR in {point.name for point in model.hook_points}

    def statistics(at: list[int]) -> np.ndarray:
        batch = model.encode(clips.audio(at))
        if has_posterior:
            return codec_statistics(model.capture(batch, [POSTERIOR])[POSTERIOR])
        return codec_statistics(model.latents(batch))

    # One thread: caches inside an export must not be shared between threads.
    return np.concatenate(by_batch(statistics, rows, 1))


def _halves(statistics: np.ndarray) -> Pools:
    half = statistics.shape[1] // 2
    return {"mean": statistics[:, :half], "max": statistics[:, half:]}


def baseline_pools(
    clips: Clips, clips_sha256: str, model: Model, rows: Rows, workers: int = 1
) -> dict[str, Pools]:
    """Compute {"logmel", "codec", "trivial"} -> pools of the given rows of the clips.

    `clips_sha256`: `io.folder_sha256` of the clips. The codec has pools "mean" and "max", as
    activations have; the others have one, "statistics".
    """
    rate = clips.sample_rate
    # The code is part of the key: an edit of a formula must not read old numbers.
    code = {Path(m).name: sha256(m) for m in (__file__, audio.__file__)}
    pools: dict[str, Pools] = {}
    for name, function in (
        ("logmel", lambda batch: log_mel_statistics(clips.audio(batch), rate)),
        ("trivial", lambda batch: audio.trivial_cues(clips.audio(batch), rate)),
    ):
        key = {"stage": "probe", "features": name, "clips": clips_sha256, "code": code}
        key["rows"] = hashlib.sha256(np.asarray(rows, np.int64).tobytes()).hexdigest()
        values = cached(key, lambda f=function: np.concatenate(by_batch(f, rows, workers)))
        pools[name] = {"statistics": values}
    return pools | {"codec": codec_pools(clips, clips_sha256, model, rows, workers)}
