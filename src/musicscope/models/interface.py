"""Interfaces of all models: `MusicModel`, and its kinds `LanguageModel` and `AudioModel`.

Frame t of a stream at rate r covers the seconds t / r to (t + 1) / r. Code outside
`musicscope.models` uses what these protocols name, and nothing else of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

Hook = Callable[[Tensor, Tensor], Tensor]
"""(activations [rows, S, d], positions [S]) -> activations of the same shape.

A hook gets the output of one hook point; its result goes to the next layer. `positions` are frame
labels: frame t is t + 1; a position that is no frame is 0 or less, or beyond T. In teacher forcing
a hook gets all S positions, in generation the one position of the step. A hook must not write into
its argument. See `MusicModel.conditional_rows` for guided generation.
"""
Hooks = Mapping[str, Hook] | None
"""Hook point to hook."""
B = TypeVar("B")


@dataclass(frozen=True)
class HookPoint:
    """A place whose activations can be read and replaced."""

    name: str
    """Such as "layers.3": the output of decoder layer 3, before the final norm."""
    width: int
    """Dimensions d of the activation."""
    rate: float
    """Frames per second."""


@dataclass(frozen=True)
class Batch:
    """Clips as a decoder gets them; `encode` runs text encoder and codec once."""

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


@dataclass(frozen=True)
class AudioBatch:
    """Clips as an audio model gets them."""

    audio: Tensor
    """[B, n] float32 at the model's sample rate, mono."""
    seeds: tuple[int, ...]
    """Seed of the noise in each clip's pass, from the clip's samples: independent of its place."""

    def __len__(self) -> int:
        return self.audio.shape[0]


@runtime_checkable
class MusicModel(Protocol[B]):
    """Every model; B is its kind of batch."""

    name: str
    sample_rate: int
    """Hz."""
    device: torch.device
    """Where batches and results are."""
    hook_points: tuple[HookPoint, ...]
    """In the order in which they are computed."""
    frame_rate: float
    """Hz; of an audio model that of its latents."""
    frame_rates: Mapping[str, float]
    """Hook point to Hz."""
    conditional_rows: slice
    """Rows conditioned on the caption in the argument of a hook: the first half of
    [conditional; unconditional] during guided generation, else all."""
    loss_name: str
    """Measure of `loss`: "ce" (cross-entropy, nats per code) or "spectral" (distance)."""

    def encode(self, audio: Tensor | np.ndarray, captions: Sequence[str | None]) -> B:
        """Turn audio [B, n] at `sample_rate` and captions (None: unconditional) into a batch."""

    def capture(self, batch: B, names: Sequence[str], hooks: Hooks = None) -> dict[str, Tensor]:
        """Read activations [B, T, d] of the named hook points in one pass.

        T = ceil(seconds * rate of the hook point). With hooks, activations are read after them.
        """

    def loss(self, batch: B, hooks: Hooks = None) -> Tensor:
        """Measure per clip how badly the model predicts or reproduces it: [B] float64, CPU."""


@runtime_checkable
class LanguageModel(MusicModel[Batch], Protocol):
    """A decoder over K codebooks of `card` codes each, conditioned on text.

    Frame t is the sequence position whose newest input is codebook 0 of frame t (YuE: the
    instrumental code). S is the number of positions of a sequence, L the number of layers.
    """

    codec: torch.nn.Module
    """Its weights and settings decide the codes of a clip."""
    num_codebooks: int
    card: int
    cross_points: tuple[HookPoint, ...]
    """Hook points of what each layer's cross-attention adds to the stream, such as
    "layers.3.cross_attention"; none in a model without it. All zero for a clip without a caption.
    """
    layer_calls: int
    """Layer evaluations since loading."""
    num_position_groups: int
    """G: kinds of positions that have a mean of their own in mean ablation."""
    weight_bytes: int
    """Bytes of all parameters and buffers."""
    plain_sampling: Mapping[str, float]
    """Options of `generate` under which codes are drawn from the model's own probabilities: no
    guidance, no truncation, no penalty."""
    first_encoded: int
    """First codebook that `encode` fills from audio; those before it are the same for all audio."""

    def position_groups(self, batch: Batch) -> Tensor:
        """Tell the kind of each position: [B, S] int64 in 0..G-1 (1: a frame); -1: in no mean."""

    def at_frames(self, stream: Tensor, frames: int) -> Tensor:
        """Select the positions of `frames` frames: a stream [B, S, d] to [B, T, d]."""

    def with_captions(self, codes: Tensor, captions: Sequence[str | None]) -> Batch:
        """Make a batch of existing codes [B, K, T]."""

    def forward(
        self, batch: Batch, hooks: Hooks = None, stop_after: str | None = None
    ) -> Tensor | None:
        """Logits [B, K, T, card]; [b, k, t] predicts codes[b, k, t]. None if stopped early."""

    def differentiable(self, batch: Batch, hooks: Hooks) -> Tensor:
        """Logits as in `forward`, with gradients with respect to what the hooks add."""

    def layer_inputs(self, batch: Batch, last: int | None = None) -> list[Tensor]:
        """Input of each layer [B, S, d] over all positions, then the last layer's output.

        The first is the embedded codes. With `last` no layer behind that number runs; -1: none.
        """

    def redrawn(self, seed: int, last: int) -> AbstractContextManager[None]:
        """Permute the entries of every matrix in layers 0 to `last`, until the block ends.

        A control: the architecture, the embeddings and the distribution of weights stay.
        """

    def forward_from(self, batch: Batch, layer: int, hidden: Tensor, hooks: Hooks = None) -> Tensor:
        """Logits as in `forward`, from the input `hidden` [B, S, d] of layer number `layer`."""

    def cross_entropy(self, batch: Batch, hooks: Hooks = None) -> Tensor:
        """-log p(codes) in nats, [B, K, T]."""

    def generate(
        self,
        captions: Sequence[str | None],
        seconds: float,
        seed: int,
        hooks: Hooks = None,
        guidance_scale: float | None = None,
        temperature: float = 1.0,
        top_k: int = 250,
    ) -> tuple[Tensor, Tensor]:
        """Draw audio [B, n] and codes [B, K, T]; one generator of `seed` draws everything."""

    def decode(self, codes: Tensor) -> Tensor:
        """Turn codes [B, K, T] into audio [B, n]."""

    def codec_latents(self, codes: Tensor) -> Tensor:
        """Look up the codec's quantised latents [B, T, D] of codes [B, K, T]."""

    def traced(
        self, batch: Batch, layer: str, logits: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run `forward` with autograd, from embedded inputs that are a leaf of the graph.

        Returns embedded inputs [B, S, d], stream behind `layer` [B, S, d], logits
        [B, K, T, card]. Without `logits` no layer behind `layer` runs and None takes their place.
        """

    def substitution_gains(self, codes: Tensor, gradient: Tensor) -> Tensor:
        """First-order change of a number J if code v were at (k, t): [K, T, card].

        0 where v is there already. `codes` [K, T]; `gradient` [S, d] of J with respect to the
        embedded inputs of a batch without captions. See HotFlip (Ebrahimi et al. 2018, arXiv
        1712.06751).
        """


@runtime_checkable
class AudioModel(MusicModel[AudioBatch], Protocol):
    """An autoencoder: audio in, audio out, one clip per pass.

    There is no start column, but frame t has label t + 1 here too, so `hooks.on_frames` counts
    frames alike in every model. Hook points differ in rate.
    """

    def encode(
        self, audio: Tensor | np.ndarray, captions: Sequence[str | None] | None = None
    ) -> AudioBatch:
        """Turn audio [B, n] at `sample_rate` into a batch; captions are ignored."""

    def latents(self, batch: AudioBatch, hooks: Hooks = None) -> Tensor:
        """Draw the latents [B, T, D] of a batch."""

    def decode(self, latents: Tensor, batch: AudioBatch, hooks: Hooks = None) -> Tensor:
        """Turn (edited) latents of `batch` into audio [B, n], with the batch's noise and length."""

    def reconstruct(
        self, batch: AudioBatch, hooks: Hooks = None, latents: Tensor | None = None
    ) -> Tensor:
        """Encode, edit and decode: audio [B, n].

        With the batch's own `latents` the encoder runs only where a hook acts in it.
        """


Model = LanguageModel | AudioModel
"""What `registry.load_model` gives. `isinstance(model, AudioModel)` tells the kinds apart."""


def language_model(model: Model) -> LanguageModel:
    """Narrow to a language model; ValueError for an audio model."""
    if isinstance(model, AudioModel):
        raise ValueError(f"{model.name} turns audio into audio: it generates no tokens")
    return model


def audio_model(model: Model) -> AudioModel:
    """Narrow to an audio model; ValueError for a language model."""
    if not isinstance(model, AudioModel):
        raise ValueError(f"{model.name} generates tokens: it does not turn audio into audio")
    return model


def points_of(model: MusicModel) -> dict[str, HookPoint]:
    """Give all hook points by name: those of layers, then those inside them."""
    inner = () if isinstance(model, AudioModel) else getattr(model, "cross_points", ())
    return {point.name: point for point in (*model.hook_points, *inner)}


def check_audio(audio: Tensor | np.ndarray) -> Tensor:
    """Take audio as every `encode` does: float32 [clips, samples].

    ValueError for another shape, for integers, and for NaN or infinity (the rows are named).
    """
    audio = torch.as_tensor(audio)
    if audio.ndim != 2 or 0 in audio.shape:
        raise ValueError(f"audio must be [clips, samples], got {list(audio.shape)}")
    if not audio.is_floating_point():
        raise ValueError(f"audio must be floating point in -1..1, got {audio.dtype}")
    if bad := torch.nonzero(~torch.isfinite(audio).all(1)).flatten().tolist():
        raise ValueError(f"audio holds NaN or infinity in rows {bad}")
    return audio.float()


# ---- hooks


def apply_hook(name: str, hook: Hook, activations: Tensor, positions: Tensor) -> Tensor:
    """Call the hook at hook point `name` on activations [rows, S, d].

    The result keeps their type. ValueError for a result of another shape.
    """
    result = hook(activations, positions)
    if not isinstance(result, Tensor) or result.shape != activations.shape:
        got = list(result.shape) if isinstance(result, Tensor) else type(result)
        raise ValueError(
            f"the hook at {name} must return activations {list(activations.shape)}, got {got}"
        )
    return result.to(activations.dtype)


def chain(*hooks: Hook) -> Hook:
    """Combine hooks into one that applies them from left to right."""

    def chained(activations: Tensor, positions: Tensor) -> Tensor:
        for hook in hooks:
            activations = hook(activations, positions)
        return activations

    return chained


def on_frames(hook: Hook, first: int = 0, last: int | None = None) -> Hook:
    """Restrict a hook to frames first..last-1; other positions keep their activations.

    Frame t has label t + 1. The defaults leave out only the start column, which is no frame: its
    activations are the same in every clip, and no dictionary has seen them. `hook` gets the chosen
    positions alone; it is not called for a step without any. ValueError unless 0 <= first <= last.
    """
    if first < 0 or (last is not None and last < first):
        raise ValueError(f"need 0 <= first <= last, got {first} and {last}")

    def limited(activations: Tensor, positions: Tensor) -> Tensor:
        chosen = positions > first
        if last is not None:
            chosen &= positions <= last
        if not chosen.any():
            return activations
        changed = activations.clone()
        changed[:, chosen] = hook(activations[:, chosen], positions[chosen]).to(changed.dtype)
        return changed

    return limited
