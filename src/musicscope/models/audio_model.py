"""Models that turn audio into audio, such as RAVE: what they share with `MusicModel`, what not.

An autoencoder has no tokens, no captions, no next-code distribution and nothing to sample, so
`MusicModel`'s codes, `with_captions`, logits, `cross_entropy`, `generate` and `layer_inputs` mean
nothing for it. What is left is enough for extraction, SAEs, probes and steering: `encode`,
`capture`, hooks, and `reconstruct` in place of `generate` (audio in, edited audio out). Code that
serves both asks ``is_audio_model(model)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from musicscope.models import Hook, HookPoint


@dataclass(frozen=True)
class AudioBatch:
    """Clips as an audio model takes them."""

    audio: Tensor
    """[B, n] float32 at the model's sample rate, mono."""
    seeds: tuple[int, ...]
    """Of the noise in each clip's pass: from the clip's samples, so its place does not matter."""

    def __len__(self) -> int:
        return self.audio.shape[0]


class AudioModel(Protocol):
    """Audio in, audio out; hooks as in `musicscope.models.Hook`, one clip at a time.

    There is no start column, but frame t is position t + 1 here too, so that
    `hooks.on_frames` counts frames alike in every model. Hook points have frame rates
    of their own; frame t of rate r covers the seconds t / r to (t + 1) / r.
    """

    name: str
    sample_rate: int
    frame_rate: float
    """Of the latents, in Hz."""
    hook_points: tuple[HookPoint, ...]
    """In the order in which they are computed."""
    frame_rates: dict[str, float]
    """Of every hook point, in Hz."""
    conditional_rows: slice
    """Always slice(None): nothing is guided."""

    def encode(
        self, audio: Tensor | np.ndarray, captions: Sequence[str | None] | None = None
    ) -> AudioBatch:
        """Audio [B, n] at `sample_rate` to a batch; captions are accepted and ignored."""

    def capture(
        self, batch: AudioBatch, names: Sequence[str], hooks: dict[str, Hook] | None = None
    ) -> dict[str, Tensor]:
        """Activations [B, T, d] of the named points, T = ceil(seconds * frame_rates[name])."""

    def reconstruct(self, batch: AudioBatch, hooks: dict[str, Hook] | None = None) -> Tensor:
        """Audio [B, n] after encoding, edits and decoding."""


def is_audio_model(model: Any) -> bool:
    """True for an `AudioModel`, False for a `MusicModel`."""
    return hasattr(model, "reconstruct") and not hasattr(model, "generate")
