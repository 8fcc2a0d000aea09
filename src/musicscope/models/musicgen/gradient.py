"""Gradients with respect to a MusicGen's token embeddings: `musicscope.models.token_gradient`.

The decoder's input at a position is the *sum* of its codebooks' embeddings, so one gradient g
[S, d] with respect to that sum gives the change for a new code in codebook k of frame t as
g[t + k + 1] . (E_k[new] - E_k[old]).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from musicscope.models import token_gradient
from musicscope.models.delay_pattern import DelayPatternModel
from musicscope.models.interface import Batch

SAMPLING = {"guidance_scale": 1.0, "top_k": 0}
FIRST_HEARD = 0


def traced(
    model: DelayPatternModel, batch: Batch, layer: str, logits: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Embedded inputs [B, S, d], stream behind `layer` [B, S, d] and logits [B, K, T, card]."""

    def context(inputs: Tensor) -> object:
        return model.decoder.context(inputs, batch.text, batch.text_mask)

    return token_gradient.traced(model, context, batch, layer, logits)


@torch.no_grad()
def substitution_gains(model: DelayPatternModel, codes: Tensor, gradient: Tensor) -> Tensor:
    """First-order change of J for putting code v at (k, t), [K, T, card]; 0 where v is there now.

    `codes` [K, T]; `gradient` [S, d] of J with respect to the embedded inputs. The last code of
    the last codebook is predicted and never fed, so its changes are 0.
    """
    books, frames = codes.shape
    # Codebook k of frame t stands at position t + k + 1.
    gradient = F.pad(gradient, (0, 0, 0, frames + books - len(gradient)))
    gains = []
    for k, table in enumerate(model.decoder.tables):
        here = gradient[k + 1 : k + 1 + frames]
        gains.append(token_gradient.gains_at(here, table.weight[: model.card], codes[k]))
    return torch.stack(gains)


def at_frames(stream: Tensor, frames: int) -> Tensor:
    """Frame t is position t + 1: behind the start column, where codebook 0 of t is the newest."""
    return stream[:, 1 : frames + 1]
