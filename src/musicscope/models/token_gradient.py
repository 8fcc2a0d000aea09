"""What a search over tokens needs of a model besides `MusicModel`, and the parts all share.

A family offers it as a module of functions on its models (`TokenGradient`): `musicgen_gradient`,
where the input of a position is the sum of several codes' embeddings, and `yue_gradient`, where
each code has a position of its own. Either way one gradient of a number J with respect to the
embedded inputs gives the first-order change of J for every substitution of one code by another at
once (HotFlip, Ebrahimi et al. 2018, arXiv 1712.06751).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from musicscope.models.interface import Batch


class TokenGradient(Protocol):
    """A module that knows how a family's codes stand in its sequence.

    S positions, K codebooks of `card` codes, T frames.
    """

    SAMPLING: dict[str, float]
    """Options of `generate` that leave the model's probabilities as they are: no guidance, nothing
    cut off, nothing penalised."""
    FIRST_HEARD: int
    """First of the codebooks that `encode` fills from a recording; those before it are the same for
    every recording."""

    def traced(
        self, model: Any, batch: Batch, layer: str, logits: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Embedded inputs [B, S, d], stream behind `layer` [B, S, d], logits [B, K, T, card].

        The same numbers as in `MusicModel.forward`, with autograd: the inputs are the leaf. Without
        `logits` no layer behind `layer` runs and None stands in their place.
        """

    def substitution_gains(self, model: Any, codes: Tensor, gradient: Tensor) -> Tensor:
        """First-order change of J for code v at (k, t), [K, T, card]; 0 where v is there now.

        `codes` [K, T]; `gradient` [S, d] of J with respect to the embedded inputs of a batch
        without captions.
        """

    def at_frames(self, stream: Tensor, frames: int) -> Tensor:
        """The positions of the T frames [B, T, d] in a stream [B, S, d]."""


def traced(
    model: Any, context: Callable[[Tensor], Any], batch: Batch, layer: str, logits: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`TokenGradient.traced`; `context` makes of the embedded inputs what every layer needs."""
    (index,) = model.by_layer({layer: lambda activations, positions: activations})
    decoder = model.decoder
    with torch.enable_grad():
        inputs = decoder.embed(model.sequence(batch)).detach().requires_grad_()
        known = context(inputs)
        stream = decoder.run(inputs, known, {}, last=index)
        if not logits:
            return inputs, stream, None
        output = decoder.run(stream, known, {}, first=index + 1)
        return inputs, stream, decoder.logits(output, batch.frames)


def gains_at(gradient: Tensor, table: Tensor, codes: Tensor) -> Tensor:
    """g[t] . (E[v] - E[code t]) as [T, card]: `gradient` [T, d], `table` [card, d], `codes` [T]."""
    products = gradient @ table.T
    return products - products.gather(1, codes[:, None])
