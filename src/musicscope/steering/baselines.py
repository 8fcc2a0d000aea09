"""What steering with latents is held against: directions, random edits, words, the SAE's own error.

The directions are a difference of class means and a probe's weights (ITI, arXiv 2306.03341), made
by `steering_recipes`; here is how each of these acts on activations or on prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from musicscope.dictionaries.core import TopKSAE
from musicscope.steering.edit import Change

NEAREST = 8  # a random latent is drawn among so many of like activity


def direction_change(direction: Tensor) -> Change:
    """Add `direction` [d] (its length is the dose) to every frame."""
    return lambda x, positions, told: direction.to(x.dtype).expand_as(x)


def passthrough_change(sae: TopKSAE) -> Change:
    """Replace x by decode(encode(x)): what the SAE's error costs when nothing is edited."""
    return lambda x, positions, told: sae.reconstruct(x) - x


def matched_change(change: Change, direction: Tensor) -> Change:
    """`direction` [d] with, at every row and frame, the length of what `change` would add."""
    unit = direction / torch.linalg.vector_norm(direction)

    def matched(x: Tensor, positions: Tensor, told: int) -> Tensor | None:
        difference = change(x, positions, told)
        if difference is None:
            return None
        return torch.linalg.vector_norm(difference, dim=-1, keepdim=True) * unit

    return matched


def random_direction(width: int, seed: int) -> Tensor:
    """A direction [width] of length 1, uniform on the sphere."""
    direction = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return direction / torch.linalg.vector_norm(direction)


def random_features(
    activity: np.ndarray, chosen: Sequence[int], avoid: Sequence[int], seed: int
) -> tuple[int, ...]:
    """For each latent of `chosen` another at random, of about its activity, each once.

    `activity` [F] is the mean value over frames; latents that never fire, those chosen and those
    to `avoid` (with evidence for the concept) are not drawn. So a random edit is about as large.
    """
    rng = np.random.default_rng(seed)
    free = activity > 0
    free[list(chosen)] = False
    if len(avoid) and free.sum() - len(avoid) >= len(chosen):
        free[list(avoid)] = False
    if free.sum() < len(chosen):
        raise ValueError(f"{int(free.sum())} live latents left to draw {len(chosen)} from")
    drawn = []
    for feature in chosen:
        candidates = np.flatnonzero(free)
        # A chosen latent is alive too, but guard the logarithm.
        wanted = np.log(max(float(activity[feature]), 1e-12))
        distance = np.abs(np.log(activity[candidates]) - wanted)
        near = candidates[np.argsort(distance, kind="stable")[:NEAREST]]
        drawn.append(int(rng.choice(near)))
        free[drawn[-1]] = False
    return tuple(drawn)


def edit_prompt(prompt: str, wishes: Mapping[str, str]) -> str:
    """The prompt that asks for the same in words: "... with organ, no guitar"."""
    words = {concept: concept.replace("_", " ") for concept in wishes}
    wanted = [words[c] for c, direction in wishes.items() if direction == "on"]
    unwanted = [f"no {words[c]}" for c, direction in wishes.items() if direction == "off"]
    text = prompt.rstrip(". ")
    if wanted:
        text += f" with {' and '.join(wanted)}"
    return ", ".join([text, *unwanted])
