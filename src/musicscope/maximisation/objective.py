"""What a search over tokens maximises: a feature's activation and the model's own log-probability.

For tokens x::

    J(x) = mean over models of [ a(x) / scale + naturalness * min(log p(x), usual) ]

a: the feature's pre-activation, averaged over a window of frames, at the best place of the window
(a window of one frame is the maximum over frames, one of all frames the mean). scale: what the
best real clip reaches, so that 1 stands for it. log p: the model's own teacher-forced
log-probability per code, in nats; tokens more probable than usual (than the median real clip) earn
nothing more, for the most probable sequences of such models are drones and silence, not music.
With several models the tokens, which a common codec gives them, serve all of them at once: the
discrete counterpart of coordinated activation maximisation (Thasarathan et al. 2025, arXiv
2502.03714, eq. 8).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from musicscope.models.interface import LanguageModel

BATCH = 16  # sequences through the heads at once: 16 x 8 x 75 x 1024 logits are 39 MB


def gradient_of(model: Any) -> LanguageModel | None:
    """The model, if it has tokens to search over."""
    return model if isinstance(model, LanguageModel) else None


@dataclass(frozen=True)
class Target:
    """A feature of one model as the search sees it: pre-activation weight . x + bias."""

    model: Any
    """With tokens (`gradient_of`); all models of one search must share a codec."""
    layer: str
    """Hook point that the feature reads."""
    weight: Tensor
    """[d]"""
    bias: float
    scale: float
    """Activation that counts as 1; above 0."""
    usual: float = math.inf
    """log p per code (nats) above which more probable tokens earn nothing."""


@dataclass(frozen=True)
class Objective:
    """What a search maximises; see the head of this module."""

    targets: tuple[Target, ...]
    window: int
    """Frames that the activation is averaged over."""
    naturalness: float
    """Weight of log p: best-clip activations per nat and code. 0: the prior is not run at all."""

    def __post_init__(self) -> None:
        if not self.targets or any(not target.scale > 0 for target in self.targets):
            raise ValueError(
                "a search needs targets with scale > 0: a feature that no real clip activates "
                "has no scale; leave it out"
            )
        if self.window < 1 or self.naturalness < 0:
            raise ValueError(f"need window >= 1 and naturalness >= 0, got {self}")

    def total(self, activation: Tensor, log_prob: Tensor) -> Tensor:
        """J [B] from activations / scale [M, B] and log p per code [M, B]."""
        total = activation.mean(0)
        if self.naturalness:
            usual = log_prob.new_tensor([target.usual for target in self.targets])
            total = total + self.naturalness * log_prob.minimum(usual[:, None]).mean(0)
        return total


def window_means(values: Tensor, window: int) -> Tensor:
    """Means over all windows of `window` frames: [..., T] to [..., T - window + 1].

    A window longer than the sequence is the whole sequence.
    """
    return values.unfold(-1, min(window, values.shape[-1]), 1).mean(-1)


def _activation(target: Target, stream: Tensor, frames: int, window: int) -> Tensor:
    """Activation / scale [B] from the stream [B, S, d] of sequences of that many frames."""
    read = target.model.at_frames(stream, frames)
    values = read @ target.weight.to(stream) + target.bias
    return window_means(values, window).amax(-1) / target.scale


def _unconditional(model: Any, codes: Tensor) -> Any:
    return model.with_captions(codes, [None] * len(codes))


@torch.no_grad()
def activations(objective: Objective, codes: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Activations / scale [M, B] of codes [B, K, T], and the streams [B, S, d] they were read in.

    Only the layers up to each target's run.
    """
    found, streams = [], []
    for target in objective.targets:
        kept: list[Tensor] = []

        def keep(stream: Tensor, _: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(stream)
            return stream

        batch = _unconditional(target.model, codes)
        target.model.forward(batch, {target.layer: keep}, target.layer)
        streams.append(kept[0])
        found.append(_activation(target, kept[0], codes.shape[-1], objective.window))
    return torch.stack(found), streams


@torch.no_grad()
def log_probs(objective: Objective, codes: Tensor, streams: Sequence[Tensor]) -> Tensor:
    """log p per code in nats [M, B], going on from the streams that `activations` gave."""
    found = []
    for target, stream in zip(objective.targets, streams, strict=True):
        (layer,) = target.model.by_layer({target.layer: lambda stream, _: stream})
        parts = []
        for part, hidden in zip(codes.split(BATCH), stream.split(BATCH), strict=True):
            batch = _unconditional(target.model, part)
            logits = target.model.forward_from(batch, layer + 1, hidden).float()
            parts.append(_log_prob(logits, part).mean((1, 2)))
        found.append(torch.cat(parts))
    return torch.stack(found)


def _log_prob(logits: Tensor, codes: Tensor) -> Tensor:
    """log p of the codes [B, K, T] from logits [B, K, T, card]."""
    flat = F.cross_entropy(logits.flatten(0, 2), codes.flatten(), reduction="none")
    return -flat.view(codes.shape)


@dataclass(frozen=True)
class Gains:
    """First-order changes for each substitution of one code."""

    activation: Tensor
    """[K, T, card] of the mean over models of activation / scale."""
    log_prob: Tensor
    """[M, K, T, card] of log p per code; [0, K, T, card] without naturalness."""

    def total(self, naturalness: float) -> Tensor:
        """[K, T, card] of J where log p is below its usual value."""
        if not len(self.log_prob):
            return self.activation
        return self.activation + naturalness * self.log_prob.mean(0)


def gains(objective: Objective, codes: Tensor) -> Gains:
    """Gains of all substitutions in codes [K, T], from one backward pass a term and model.

    What a substitution does to the probability of its own place is exact (the logits say it);
    what it does to the activation and to later places is first order.
    """
    books, frames = codes.shape
    activation, log_prob = [], []
    for target in objective.targets:
        batch = _unconditional(target.model, codes[None])
        natural = objective.naturalness > 0
        with torch.enable_grad():
            inputs, stream, logits = target.model.traced(batch, target.layer, natural)
            value = _activation(target, stream, frames, objective.window).sum()
            total = None if logits is None else _log_prob(logits, batch.codes).sum()
        (gradient,) = torch.autograd.grad(value, inputs, retain_graph=natural)
        activation.append(target.model.substitution_gains(codes, gradient[0]))
        if total is not None:
            (gradient,) = torch.autograd.grad(total, inputs)
            own = logits[0].detach().log_softmax(-1)
            own = own - own.gather(-1, codes[..., None])
            later = target.model.substitution_gains(codes, gradient[0])
            log_prob.append((own + later) / (books * frames))
    mean = torch.stack(activation).mean(0)
    return Gains(mean, torch.stack(log_prob) if log_prob else mean.new_zeros((0, *mean.shape)))


def exact(objective: Objective, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Activations / scale and log p per code, [M, B] each; log p is [0, B] without naturalness."""
    activation, streams = activations(objective, codes)
    if not objective.naturalness:
        return activation, activation.new_zeros((0, len(codes)))
    return activation, log_probs(objective, codes, streams)
