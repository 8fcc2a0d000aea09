"""Gradients with respect to the embeddings of YuE's codes: `musicscope.models.token_gradient`.

Each code is an id at a position of its own (v_t at P + 2t, i_t at P + 2t + 1 behind a prompt of P
ids), so with g [S, d] the gradient with respect to the embedded inputs, another code at (k, t)
changes J by g[P + 2t + k] . (E[new] - E[old]) to first order. E are the rows of stage 1's codes;
the tracks share them. Log-probabilities are those of `YueModel.cross_entropy`, among these codes.

Both tracks are searched, as the model writes both. A sound has one of them only: `YueModel.encode`
takes a mix for the instrumental track and puts silence into the vocal one, so that a search that is
judged by its sound changes instrumental codes alone (`FIRST_HEARD`), in the layout that activations
were extracted in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from musicscope.models import token_gradient
from musicscope.models.interface import Batch
from musicscope.models.yue.tokens import CODE_IDS

if TYPE_CHECKING:
    from musicscope.models.yue.model import YueModel

SAMPLING = {"guidance_scale": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
FIRST_HEARD = 1


def traced(
    model: YueModel, batch: Batch, layer: str, logits: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Embedded inputs [B, P + 2T, d], stream behind `layer` and logits [B, 2, T, 1024]."""
    inputs, stream, found = token_gradient.traced(
        model, lambda hidden: model.context(hidden, batch), batch, layer, logits
    )
    return inputs, stream.to(model.device), None if found is None else found.to(model.device)


@torch.no_grad()
def substitution_gains(model: YueModel, codes: Tensor, gradient: Tensor) -> Tensor:
    """First-order change of J for putting code v at (k, t), [2, T, 1024]; 0 where v is there now.

    `codes` [2, T]; `gradient` [P + 2T, d] of J with respect to the embedded inputs. Every code is
    fed, the last one too: it predicts nothing, but its frame is read.
    """
    count, frames = codes.shape
    ids = torch.arange(CODE_IDS.start, CODE_IDS.stop, device=codes.device)
    # Through the module: with a device map its weights may be there only while it runs.
    table = model.decoder.embed(ids).to(codes.device)
    here = gradient[-count * frames :].to(codes.device).unflatten(0, (frames, count))
    return torch.stack([
        token_gradient.gains_at(here[:, k], table, codes[k]) for k in range(count)
    ])  # fmt: skip


def at_frames(stream: Tensor, frames: int) -> Tensor:
    """Frame t is the position of its instrumental code, P + 2t + 1."""
    return stream[:, 1 - 2 * frames :: 2]
