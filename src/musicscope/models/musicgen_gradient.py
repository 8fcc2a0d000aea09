"""Gradients with respect to a MusicGen's token embeddings, for searches over tokens.

The decoder's input at a position is the *sum* of its codebooks' embeddings. One gradient g [S, d]
of a number J with respect to that sum therefore gives the first-order change of J for every
substitution of one code by another at once (HotFlip, Ebrahimi et al. 2018, arXiv 1712.06751):
g[t + k + 1] . (E_k[new] - E_k[old]) for codebook k of frame t.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from musicscope.models import Batch
from musicscope.models.delay_pattern import DelayPatternModel


def traced(
    model: DelayPatternModel, batch: Batch, layer: str, logits: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Embedded inputs [B, S, d], stream behind `layer` [B, S, d] and logits [B, K, T, card].

    The same numbers as in `MusicModel.forward`, with autograd: the inputs are the leaf. Without
    `logits` no layer behind `layer` runs and None stands in their place.
    """
    (index,) = model.by_layer({layer: lambda activations, positions: activations})
    decoder = model.decoder
    with torch.enable_grad():
        inputs = decoder.embed(model.sequence(batch)).detach().requires_grad_()
        context = decoder.context(inputs, batch.text, batch.text_mask)
        stream = decoder.run(inputs, context, {}, last=index)
        if not logits:
            return inputs, stream, None
        output = decoder.run(stream, context, {}, first=index + 1)
        return inputs, stream, decoder.logits(output, batch.frames)


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
        products = gradient[k + 1 : k + 1 + frames] @ table.weight[: model.card].T
        gains.append(products - products.gather(1, codes[k][:, None]))
    return torch.stack(gains)
