"""Activation maximisation over codec tokens, within the model's own prior.

A model of discrete tokens has no input that could follow a gradient, so tokens are searched for
the largest `objective.Objective`. One step:

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

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from musicscope.maximisation.objective import Objective, activations, exact, gains, log_probs
from musicscope.models.interface import LanguageModel

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
