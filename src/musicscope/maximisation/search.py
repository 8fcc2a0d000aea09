"""Activation maximisation over codec tokens, within the model's own prior.

A model of discrete tokens has no input that could follow a gradient, so tokens x are searched for
the largest ::

    J(x) = mean over models of [ a(x) / scale + naturalness * min(log p(x), usual) ]

a: the feature's pre-activation, averaged over a window of frames, maximised over the window's
position. scale: the activation of the best real clip. log p: the model's teacher-forced
log-probability per code, in nats. It counts only up to `usual`, the median real clip: the most
probable sequences of such models are drones and silence, not music. Several models with a common
codec share the tokens: the discrete counterpart of coordinated activation maximisation
(Thasarathan et al. 2025, arXiv 2502.03714, eq. 8). One step:

1. Gradients of both terms through the embeddings give the first-order gain of all K x T x card
   substitutions.
2. Proposals, each with many codes changed at once, are drawn from the best substitutions.
3. The layers up to the feature's run on all proposals: exact activations.
4. The most promising continue through the other layers: exact log p.
5. The best is accepted if it improves the objective.

That is GCG (Zou et al. 2023, arXiv 2307.15043) with several codes per step; their number adapts to
the last accepted steps.
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


# --- the objective ------------------------------------------------------------------------------

ALTERNATIVES = 4  # best codes per position that proposals draw from
LEAST_AUDIBLE = 8  # fewest changed codes where sound is judged: most single changes are inaudible
PATIENCE = 4  # rejected steps in a row, at the smallest size, after which a search ends


def propose(
    total: Tensor, codes: Tensor, sizes: Sequence[int], generator: torch.Generator
) -> Tensor:
    """Draw proposals [len(sizes), K, T]; number j changes up to sizes[j] codes.

    `codes` [K, T]; `total` [K, T, card] are the gains. A proposal takes the substitutions with the
    largest gains after Gumbel noise; the noise grows from zero in the first proposal to the spread
    of the gains over positions in the last. Negative gains are skipped, except the best.
    """
    places = codes.numel()
    open_to = total.scatter(-1, codes[..., None], -torch.inf).flatten(0, 1)
    values, tokens = open_to.topk(min(ALTERNATIVES, open_to.shape[-1] - 1), -1)
    noise = torch.rand((len(sizes), *values.shape), generator=generator, dtype=torch.float64)
    # Kept off 0, whose double logarithm is infinite.
    noise = -(-noise.clamp(min=1e-12).log()).clamp(min=1e-12).log()
    level = torch.linspace(0, 1, len(sizes), dtype=torch.float64)[:, None, None]
    spread = values[:, 0].std(correction=0)
    noisy = values + (noise * level).to(values) * spread
    best, choice = noisy.max(-1)
    order = best.argsort(-1, descending=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(places).expand_as(order).to(order)
    )
    allowed = torch.tensor(sizes, device=rank.device)[:, None]
    changed = (rank < allowed) & ((best > 0) | (rank == 0))
    picked = tokens.expand(len(sizes), -1, -1).gather(-1, choice[..., None])[..., 0]
    return torch.where(changed, picked, codes.flatten()).view(len(sizes), *codes.shape)


@dataclass(frozen=True)
class Codec:
    """The codec of searches that are judged by sound: tokens after decoding and encoding."""

    model: LanguageModel
    survival: Tensor
    """[K] fraction of each codebook's codes that decoding and encoding leave unchanged."""
    first: int = 0
    """Codebooks before this one are not searched: `encode` gives them the same codes for every
    recording (YuE's vocal track)."""

    def again(self, codes: Tensor) -> Tensor:
        """Decode tokens [B, K, T] to audio and encode that: tokens [B, K, T]."""
        audio = self.model.decode(codes)
        return self.model.encode(audio, [None] * len(audio)).codes[..., : codes.shape[-1]]


def measure_survival(codec: Codec, codes: Tensor) -> Tensor:
    """Measure `Codec.survival` [K] on tokens [B, K, T], with codebooks before `first` as encoded.

    At least one in n tokens counts as unchanged: 0 would hide the differences between gains.
    """
    if codec.first:
        codes = torch.cat([codec.again(codes)[:, : codec.first], codes[:, codec.first :]], 1)
    share = (codes == codec.again(codes)).float().mean((0, 2))
    return share.clamp(min=1 / codes[:, 0].numel())


@dataclass(frozen=True)
class Optimised:
    """Outcome of a search."""

    codes: Tensor
    """[K, T]"""
    objective: tuple[float, ...]
    """J of the start and after each step, never falling. With a `Codec`: J of `codes` after it."""


@torch.no_grad()
def search(
    objective: Objective,
    start: Tensor,
    seed: int,
    codec: Codec | None = None,
    *,
    steps: int,
    proposals: int,
    kept: int,
) -> Optimised:
    """Maximise `objective` from codes `start` [K, T]. Same seed, same machine: same codes.

    With a `codec`, candidates are scored on the tokens that their decoded audio encodes to. No
    codec reproduces all tokens (EnCodec least in the fine codebooks), so a change of tokens need
    not be audible. Gains are then weighted by survival, and each step starts from encoded audio.

    Args:
        steps: most steps of the search.
        proposals: candidates per step whose activation is computed.
        kept: how many of these also have their log p computed.
    """
    generator = torch.Generator().manual_seed(seed)
    codes = start if codec is None else codec.again(start[None])[0]
    best, (activation, log_prob) = start, exact(objective, codes[None])
    history = [float(objective.total(activation, log_prob))]
    first = 0 if codec is None else codec.first
    size, rejected = max(1, start[first:].numel() // 16), 0
    least = 1 if codec is None else LEAST_AUDIBLE
    for _ in range(steps):
        gain = gains(objective, codes)
        total = gain.total(objective.naturalness)
        if codec is not None:
            total = total * codec.survival.to(total)[:, None, None]
        sizes = [max(1, (2 * size) >> (i % 4)) for i in range(proposals)]
        candidates = codes.repeat(len(sizes), 1, 1)
        candidates[:, first:] = propose(total[first:], codes[first:], sizes, generator)
        value, streams = activations(objective, candidates)
        # First-order log p ranks the candidates; exact log p is computed for the best of them.
        changed = candidates != codes
        own = gain.log_prob.unsqueeze(1).expand(-1, len(candidates), -1, -1, -1)
        index = candidates[None, ..., None].expand(len(own), -1, -1, -1, 1)
        shift = (own.gather(-1, index)[..., 0] * changed).sum((-1, -2))
        promise = objective.total(value, log_prob + shift)
        promising = promise.topk(min(kept, len(candidates))).indices
        if codec is None:
            states, value = candidates[promising], value[:, promising]
            natural = log_prob.new_zeros((0, len(promising)))
            if objective.naturalness:
                natural = log_probs(objective, states, [stream[promising] for stream in streams])
        else:
            states = codec.again(candidates[promising])
            value, natural = exact(objective, states)
        totals = objective.total(value, natural)
        winner = int(totals.argmax())
        if float(totals[winner]) > history[-1]:
            best, codes, rejected = candidates[promising[winner]], states[winner], 0
            size = min(start.numel(), int(changed[promising[winner]].sum()))
            log_prob = natural[:, winner, None]
            history.append(float(totals[winner]))
        else:
            rejected = rejected + 1 if size <= least else 0
            size = max(least, size // 4)
            history.append(history[-1])
        if rejected == PATIENCE:
            break
    return Optimised(best, tuple(history))


def best_start(objective: Objective, candidates: Tensor) -> Tensor:
    """Return the sequence [K, T] of candidates [B, K, T] with the largest objective."""
    return candidates[int(objective.total(*exact(objective, candidates)).argmax())]
