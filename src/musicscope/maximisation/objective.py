"""Objective of a token search: a feature's activation and the model's own log-probability.

For tokens x::

    J(x) = mean over models of [ a(x) / scale + naturalness * min(log p(x), usual) ]

a: the feature's pre-activation, averaged over a window of frames, maximised over the window's
position. scale: the activation of the best real clip. log p: the model's teacher-forced
log-probability per code, in nats. It counts only up to `usual`, the median real clip: the most
probable sequences of such models are drones and silence, not music. Several models with a common
codec share the tokens: the discrete counterpart of coordinated activation maximisation
(Thasarathan et al. 2025, arXiv 2502.03714, eq. 8).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from musicscope.models.interface import Batch, LanguageModel

BATCH = 16  # sequences through the heads at once: 16 x 8 x 75 x 1024 logits are 39 MB


@dataclass(frozen=True)
class Target:
    """A feature of one model, as the affine pre-activation weight . x + bias."""

    model: LanguageModel
    """All models of one search share a codec."""
    layer: str
    """Hook point whose activations the feature reads."""
    weight: Tensor
    """[d]"""
    bias: float
    scale: float
    """Activation that counts as 1; above 0."""
    usual: float = math.inf
    """log p per code (nats) above which more probable tokens earn nothing."""


@dataclass(frozen=True)
class Objective:
    """The objective J of a search; see the module's docstring."""

    targets: tuple[Target, ...]
    window: int
    """Length of the averaging window in frames."""
    naturalness: float
    """Weight of log p: best-clip activations per nat per code. 0: the prior is not run."""

    def __post_init__(self) -> None:
        if not self.targets or any(not target.scale > 0 for target in self.targets):
            raise ValueError(
                "a search needs targets with scale > 0: a feature that no real clip activates "
                "has no scale; leave it out"
            )
        if self.window < 1 or self.naturalness < 0:
            raise ValueError(f"need window >= 1 and naturalness >= 0, got {self}")

    def total(self, activation: Tensor, log_prob: Tensor) -> Tensor:
        """Compute J [B] from activations / scale [M, B] and log p per code [M, B]."""
        total = activation.mean(0)
        if self.naturalness:
            usual = log_prob.new_tensor([target.usual for target in self.targets])
            total = total + self.naturalness * log_prob.minimum(usual[:, None]).mean(0)
        return total


def window_means(values: Tensor, window: int) -> Tensor:
    """Average over all windows of `window` frames: [..., T] to [..., T - window + 1].

    A window longer than the sequence is cut to the sequence.
    """
    return values.unfold(-1, min(window, values.shape[-1]), 1).mean(-1)


def _activation(target: Target, stream: Tensor, frames: int, window: int) -> Tensor:
    """Activation / scale [B] from the stream [B, S, d] of sequences of `frames` frames."""
    read = target.model.at_frames(stream, frames)
    values = read @ target.weight.to(stream) + target.bias
    return window_means(values, window).amax(-1) / target.scale


def _unconditional(model: LanguageModel, codes: Tensor) -> Batch:
    return model.with_captions(codes, [None] * len(codes))


@torch.no_grad()
def activations(objective: Objective, codes: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Compute activations / scale [M, B] of codes [B, K, T], and the streams [B, S, d] read.

    Runs only the layers up to each target's.
    """
    values, streams = [], []
    for target in objective.targets:
        read: list[Tensor] = []

        def keep(stream: Tensor, _: Tensor, read: list[Tensor] = read) -> Tensor:
            read.append(stream)
            return stream

        batch = _unconditional(target.model, codes)
        target.model.forward(batch, {target.layer: keep}, target.layer)
        streams.append(read[0])
        values.append(_activation(target, read[0], codes.shape[-1], objective.window))
    return torch.stack(values), streams


@torch.no_grad()
def log_probs(objective: Objective, codes: Tensor, streams: Sequence[Tensor]) -> Tensor:
    """Compute log p per code [M, B] in nats, continuing from the streams of `activations`."""
    values = []
    for target, stream in zip(objective.targets, streams, strict=True):
        layer = [point.name for point in target.model.hook_points].index(target.layer)
        parts = []
        for part, hidden in zip(codes.split(BATCH), stream.split(BATCH), strict=True):
            batch = _unconditional(target.model, part)
            logits = target.model.forward_from(batch, layer + 1, hidden).float()
            parts.append(_log_prob(logits, part).mean((1, 2)))
        values.append(torch.cat(parts))
    return torch.stack(values)


def _log_prob(logits: Tensor, codes: Tensor) -> Tensor:
    """log p [B, K, T] of the codes [B, K, T] from logits [B, K, T, card]."""
    flat = F.cross_entropy(logits.flatten(0, 2), codes.flatten(), reduction="none")
    return -flat.view(codes.shape)


@dataclass(frozen=True)
class Gains:
    """First-order changes per substitution of one code."""

    activation: Tensor
    """[K, T, card] change of the mean over models of activation / scale."""
    log_prob: Tensor
    """[M, K, T, card] change of log p per code; [0, K, T, card] without naturalness."""

    def total(self, naturalness: float) -> Tensor:
        """Compute the change of J [K, T, card], for log p below its usual value."""
        if not len(self.log_prob):
            return self.activation
        return self.activation + naturalness * self.log_prob.mean(0)


def gains(objective: Objective, codes: Tensor) -> Gains:
    """Compute the gains of all substitutions in codes [K, T]: one backward pass per term and model.

    The change of a position's own probability is exact, from the logits. Changes of the activation
    and of later positions are first order.
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
        if total is not None and logits is not None:
            (gradient,) = torch.autograd.grad(total, inputs)
            own = logits[0].detach().log_softmax(-1)
            own = own - own.gather(-1, codes[..., None])
            later = target.model.substitution_gains(codes, gradient[0])
            log_prob.append((own + later) / (books * frames))
    mean = torch.stack(activation).mean(0)
    return Gains(mean, torch.stack(log_prob) if log_prob else mean.new_zeros((0, *mean.shape)))


def exact(objective: Objective, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Compute activations / scale and log p per code, [M, B] each.

    log p is [0, B] without naturalness.
    """
    activation, streams = activations(objective, codes)
    if not objective.naturalness:
        return activation, activation.new_zeros((0, len(codes)))
    return activation, log_probs(objective, codes, streams)
