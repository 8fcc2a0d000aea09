"""What a model of any family offers: `MusicModel`, and `AudioModel` for models without tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

Hook = Callable[[Tensor, Tensor], Tensor]
"""(activations [rows, S, d], positions [S]) -> activations of the same shape.

Called with the output of one hook point; what it returns goes on to the next layer. `positions`
are frame labels: frame t is t + 1, anything that is no frame is 0 or less, or beyond T. In teacher
forcing they are of all S positions, in generation of the one position of the step. A hook must not
write into its argument. See `MusicModel.conditional_rows` for guided generation.
"""


@dataclass(frozen=True)
class HookPoint:
    """A place whose activations can be read and replaced."""

    name: str
    """Such as "layers.3": the output of decoder layer 3, before the final norm."""
    width: int
    """Dimensions d of the activation."""


@dataclass(frozen=True)
class Batch:
    """Clips as the decoder sees them; made by `encode`, text and codec run once."""

    codes: Tensor
    """[B, K, T] int64, frame by frame (no delay, no start column)."""
    text: Tensor
    """[B, L, d_text] text states; all zero for a clip without a caption. YuE keeps prompt ids
    [B, L] here, padded on the left."""
    text_mask: Tensor
    """[B, L] int64, 1 where `text` counts; all zero for a clip without a caption."""
    captions: tuple[str | None, ...]
    """As given to `encode`."""

    def __len__(self) -> int:
        return self.codes.shape[0]

    @property
    def frames(self) -> int:
        return self.codes.shape[-1]


class MusicModel(Protocol):
    """What a model must offer. Frame t <-> the position whose newest input is codebook 0 of t."""

    name: str
    sample_rate: int
    frame_rate: float
    num_codebooks: int
    hook_points: tuple[HookPoint, ...]
    layer_calls: int
    """Layer evaluations since loading: what an experiment cost, counted rather than assumed."""
    conditional_rows: slice
    """Rows conditioned on the caption in what hooks are being given: the first half of
    [conditional; unconditional] during guided generation, else all."""
    num_position_groups: int
    """G: kinds of positions that have a mean of their own in mean ablation."""

    def position_groups(self, batch: Batch) -> Tensor:
        """[B, S] int64 in 0..G-1: the kind of each position (1: a frame); -1: in no mean."""

    def encode(self, audio: Tensor | np.ndarray, captions: Sequence[str | None]) -> Batch:
        """Audio [B, n] at `sample_rate` and captions (None: unconditional) to a batch."""

    def forward(
        self, batch: Batch, hooks: dict[str, Hook] | None = None, stop_after: str | None = None
    ) -> Tensor | None:
        """Logits [B, K, T, card]; [b, k, t] predicts codes[b, k, t]. None if stopped early."""

    def capture(
        self, batch: Batch, names: Sequence[str], hooks: dict[str, Hook] | None = None
    ) -> dict[str, Tensor]:
        """Activations [B, T, d] of the named hook points from one pass, deepest one last run."""

    def layer_inputs(self, batch: Batch) -> list[Tensor]:
        """Input of each layer [B, S, d] over all positions, then the last layer's output."""

    def forward_from(
        self, batch: Batch, layer: int, hidden: Tensor, hooks: dict[str, Hook] | None = None
    ) -> Tensor:
        """Logits as in `forward`, from the input `hidden` [B, S, d] of layer number `layer`."""

    def cross_entropy(self, batch: Batch, hooks: dict[str, Hook] | None = None) -> Tensor:
        """-log p(codes) in nats, [B, K, T]."""

    def generate(
        self,
        captions: Sequence[str | None],
        seconds: float,
        seed: int,
        hooks: dict[str, Hook] | None = None,
        guidance_scale: float | None = None,
        temperature: float = 1.0,
        top_k: int = 250,
    ) -> tuple[Tensor, Tensor]:
        """Audio [B, n] and codes [B, K, T]."""


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
    """Audio in, audio out; hooks as in `musicscope.models.interface.Hook`, one clip at a time.

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
