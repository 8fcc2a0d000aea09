"""Short token sequences cut out of real clips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musicscope.activations import token_cache as codes


def cut(frame: int, window: int, length: int, total: int) -> int:
    """First frame of an excerpt of `length` frames of a clip of `total` frames that has the window
    of `window` frames at `frame` in its middle, as far as the clip's ends allow."""
    return int(np.clip(frame + window // 2 - length // 2, 0, max(0, total - length)))


def clip_tokens(model: Any, clips: Any, clips_sha256: str, rows: Sequence[int]) -> Tensor:
    """Codec tokens [n, K, T] of clips, from those that extraction left behind, or computed.

    One row may be named several times.
    """
    folder = codes.codes_dir(model, clips_sha256)
    if folder is None:
        raise ValueError(f"{model.name} has no codec: there are no tokens to search over")
    for chunk in sorted({int(row) // codes.CHUNK for row in rows}):
        try:
            codes.read_codes(folder, [chunk * codes.CHUNK])
        except ValueError:  # not there, or damaged
            codes.write_chunk(lambda: (model, clips), folder, chunk)
    return codes.read_codes(folder, [int(row) for row in rows])


def excerpts(tokens: Tensor, starts: Sequence[int], frames: int) -> Tensor:
    """Tokens [n, K, frames] that begin at frame starts[i] of tokens [n, K, T]."""
    if tokens.shape[-1] < frames:
        raise ValueError(
            f"clips have {tokens.shape[-1]} frames, excerpts of {frames} were asked for: lower "
            "maximize_activation.seconds"
        )
    pairs = zip(tokens, starts, strict=True)
    return torch.stack([code[:, int(start) : int(start) + frames] for code, start in pairs])


def random_excerpts(
    model: Any, clips: Any, clips_sha256: str, rows: np.ndarray, count: int, frames: int, seed: int
) -> Tensor:
    """Tokens [n, K, frames] of one random excerpt of each of `count` random clips of `rows`."""
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(rows, min(count, len(rows)), replace=False))
    tokens = clip_tokens(model, clips, clips_sha256, chosen)
    starts = rng.integers(0, max(1, tokens.shape[-1] - frames + 1), len(chosen))
    return excerpts(tokens, starts, frames)
