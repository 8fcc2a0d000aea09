"""Activation maximisation over codec tokens: what a feature answers to, within what a model plays.

A model of discrete tokens has no input that could follow a gradient; here tokens are searched for
the largest `token_objective.Objective`. One step: gradients of both its terms through the
embeddings give the first-order gain of all K x T x card substitutions; many proposals, each with
many codes changed at once, are drawn from the best; the layers up to the feature's run on all of
them and give the activation exactly; the most promising go on from there through the other layers,
which gives log p exactly; the best is taken if it is better than what there is. That is GCG (Zou et
al. 2023, arXiv 2307.15043) with steps of several codes, whose number follows what the last steps
could use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from musicscope.maximisation.objective import Objective, activations, exact, gains, log_probs

ALTERNATIVES = 4  # best codes of a place that proposals draw from
LEAST_HEARD = 8  # smallest size where sound is judged: what single codes do is mostly lost
PATIENCE = 4  # rejected steps in a row, at the smallest size, after which a search ends


def propose(
    total: Tensor, codes: Tensor, sizes: Sequence[int], generator: torch.Generator
) -> Tensor:
    """Proposals [len(sizes), K, T]: codes [K, T] with up to sizes[j] places changed in number j.

    `total` [K, T, card] are the gains. A proposal takes the places and codes with the largest
    gains after Gumbel noise has been added, from none in the first to the spread of the gains
    over places in the last. Places that promise a loss are left alone, but for the best one.
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
class Settings:
    """Cost of a search."""

    steps: int
    proposals: int
    """Candidates a step, whose activation is computed."""
    kept: int
    """Candidates a step, of these, whose log p is computed."""


@dataclass(frozen=True)
class Codec:
    """For searches that are judged by ear: what tokens become once they were audio."""

    model: Any
    survival: Tensor
    """[K] share of each codebook's codes that are the same after decoding and encoding."""
    first: int = 0
    """Codebooks before this one are left alone, since no sound has them: in YuE a mix becomes the
    instrumental track and silence the vocal one (`LanguageModel.first_encoded`)."""

    def again(self, codes: Tensor) -> Tensor:
        """Tokens [B, K, T] of the audio that tokens [B, K, T] decode to."""
        audio = self.model.decode(codes)
        return self.model.encode(audio, [None] * len(audio)).codes[..., : codes.shape[-1]]


def survival(codes: Tensor, again: Tensor) -> Tensor:
    """`Codec.survival` [K] from tokens [B, K, T] and what they are after one round."""
    return (codes == again).float().mean((0, 2))


def survived(codec: Codec, codes: Tensor) -> Tensor:
    """`Codec.survival` [K] of tokens [B, K, T], with what a search leaves alone as a sound has it.

    Where none of n survives, one in n is taken: 0 would hide what the gains tell codes apart by.
    """
    if codec.first:
        codes = torch.cat([codec.again(codes)[:, : codec.first], codes[:, codec.first :]], 1)
    return survival(codes, codec.again(codes)).clamp(min=1 / codes[:, 0].numel())


@dataclass(frozen=True)
class Found:
    """Where a search came to."""

    codes: Tensor
    """[K, T]"""
    objective: tuple[float, ...]
    """J of the start and after each step; never falls. With a `Codec`, J of `codes` again."""


@torch.no_grad()
def search(
    objective: Objective,
    start: Tensor,
    settings: Settings,
    seed: int,
    codec: Codec | None = None,
) -> Found:
    """Maximise `objective` from codes `start` [K, T]. Same seed, same machine: same codes.

    With a `codec` candidates are judged by the tokens of the audio that they decode to: no codec
    gives back all the tokens that it was given (EnCodec least in the fine codebooks), so that what
    a search does to tokens need not be in the sound. Substitutions then count by their chance to
    survive, and each step begins at the tokens of the sound.
    """
    generator = torch.Generator().manual_seed(seed)
    codes = start if codec is None else codec.again(start[None])[0]
    best, (activation, log_prob) = start, exact(objective, codes[None])
    history = [float(objective.total(activation, log_prob))]
    first = 0 if codec is None else codec.first
    size, rejected = max(1, start[first:].numel() // 16), 0
    least = 1 if codec is None else LEAST_HEARD
    for _ in range(settings.steps):
        known = gains(objective, codes)
        total = known.total(objective.naturalness)
        if codec is not None:
            total = total * codec.survival.to(total)[:, None, None]
        sizes = [max(1, (2 * size) >> (i % 4)) for i in range(settings.proposals)]
        proposals = codes.repeat(len(sizes), 1, 1)
        proposals[:, first:] = propose(total[first:], codes[first:], sizes, generator)
        found, streams = activations(objective, proposals)
        # log p by first order, to choose the few for which it is worth computing.
        changed = proposals != codes
        own = known.log_prob.unsqueeze(1).expand(-1, len(proposals), -1, -1, -1)
        index = proposals[None, ..., None].expand(len(own), -1, -1, -1, 1)
        shift = (own.gather(-1, index)[..., 0] * changed).sum((-1, -2))
        promise = objective.total(found, log_prob + shift)
        kept = promise.topk(min(settings.kept, len(proposals))).indices
        if codec is None:
            states, found = proposals[kept], found[:, kept]
            natural = log_prob.new_zeros((0, len(kept)))
            if objective.naturalness:
                natural = log_probs(objective, states, [stream[kept] for stream in streams])
        else:
            states = codec.again(proposals[kept])
            found, natural = exact(objective, states)
        totals = objective.total(found, natural)
        winner = int(totals.argmax())
        if float(totals[winner]) > history[-1]:
            best, codes, rejected = proposals[kept[winner]], states[winner], 0
            size = min(start.numel(), int(changed[kept[winner]].sum()))
            activation, log_prob = found[:, winner, None], natural[:, winner, None]
            history.append(float(totals[winner]))
        else:
            rejected = rejected + 1 if size <= least else 0
            size = max(least, size // 4)
            history.append(history[-1])
        if rejected == PATIENCE:
            break
    return Found(best, tuple(history))


def best_start(objective: Objective, candidates: Tensor) -> Tensor:
    """The one [K, T] of candidates [B, K, T] with the largest objective."""
    return candidates[int(objective.total(*exact(objective, candidates)).argmax())]
