"""Small tools that make hooks out of hooks; see `musicscope.models.interface.Hook`."""

from __future__ import annotations

import torch
from torch import Tensor

from musicscope.models.interface import Hook, MusicModel


def chain(*hooks: Hook) -> Hook:
    """One hook that applies `hooks` from left to right."""

    def chained(activations: Tensor, positions: Tensor) -> Tensor:
        for hook in hooks:
            activations = hook(activations, positions)
        return activations

    return chained


def on_frames(hook: Hook, first: int = 0, last: int | None = None) -> Hook:
    """`hook` on frames first..last-1 only; the rest keeps its activations.

    Frame t is position t + 1, so with the defaults all but the start column, which is no frame: its
    activations are the same in every clip, and nothing that learns from frames has seen them.
    `hook` is given the chosen positions alone, and is not called when a step has none.
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


def on_conditional(model: MusicModel, hook: Hook) -> Hook:
    """`hook` on the rows with the caption only, in guided generation; on all rows otherwise.

    Guidance adds (conditional - unconditional) several times over, so an edit of the conditional
    rows alone is amplified with it, while an edit of both halves cancels in the difference.
    """

    def limited(activations: Tensor, positions: Tensor) -> Tensor:
        rows = model.conditional_rows
        if rows == slice(None):
            return hook(activations, positions)
        size = len(range(*rows.indices(len(activations))))
        head, tail = activations[:size], activations[size:]
        return torch.cat([hook(head, positions), tail])

    return limited
