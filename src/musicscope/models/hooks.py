"""Apply and combine hooks; see `musicscope.models.interface.Hook`."""

from __future__ import annotations

from torch import Tensor

from musicscope.models.interface import Hook


def apply(name: str, hook: Hook, activations: Tensor, positions: Tensor) -> Tensor:
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
