"""The Llama of YuE stage 1, one layer at a time, exactly as transformers runs it.

Sequence layout: a prompt of P ids, the last of them `<xcodec>`, then v0 i0 v1 i1 ... (vocal and
instrumental codes). Each id is predicted at the position before it, so v_t at P + 2t - 1 and i_t
at P + 2t. The position whose newest input is the instrumental code of frame t is P + 2t + 1: an
odd one counted from the first code, and that one is called frame t. It has seen both tracks of
frames up to t.

Hooks get a position's frame rather than its place in the sequence, for prompts differ in length:
t + 1 at frame t (as in every other model), -(t + 1) where the newest input is the vocal code of
frame t, 0 in the prompt. So tools that act on frames leave vocal positions and prompt alone.

Prompts of different lengths are padded on the left; every row's RoPE counts from its own start.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM
from transformers.cache_utils import Cache

from musicscope.models.yue.tokens import CODE_IDS


@dataclass(frozen=True)
class Context:
    """Inputs of every layer besides the stream; the same for all layers."""

    positions: Tensor
    """[S] labels for hooks, see `frame_labels`."""
    places: Tensor
    """[rows, S] place in its own row, for RoPE."""
    rotary: tuple[Tensor, Tensor]
    mask: Tensor | None
    """[rows, 1, S, past + S] bool, true where attention may look; None without padding."""
    cache: Cache | None = None


def frame_labels(prompt: int, codes: int) -> Tensor:
    """Labels [prompt + codes] of the positions: 0 in the prompt, then -1, 1, -2, 2, ..."""
    steps = torch.arange(codes)
    labels = (steps // 2 + 1) * torch.where(steps % 2 == 1, 1, -1)
    return torch.cat([torch.zeros(prompt, dtype=torch.int64), labels])


NUM_POSITION_GROUPS = 4


def position_groups(prompt_mask: Tensor, codes: int) -> Tensor:
    """Group alike positions, for means over them: [B, P + codes].

    0 the first of a row (the same in all clips, and where attention rests), 1 frames, 2 vocal
    codes, 3 the rest of the prompt, -1 padding. `prompt_mask` [B, P] is 0 on padding.
    """
    labels = frame_labels(prompt_mask.shape[1], codes).to(prompt_mask.device)
    kinds = torch.where(labels > 0, 1, torch.where(labels < 0, 2, 3)).repeat(len(prompt_mask), 1)
    kinds[:, : prompt_mask.shape[1]].masked_fill_(prompt_mask == 0, -1)
    return kinds.scatter(1, prompt_mask.argmax(1, keepdim=True), 0)


class LayerwiseLlama:
    """Embedding, layers and head as separate steps; counts layer evaluations."""

    def __init__(self, hf: LlamaForCausalLM) -> None:
        self.hf = hf
        self.num_layers: int = hf.config.num_hidden_layers
        self.calls = 0

    def check_length(self, prompt: int, frames: int) -> None:
        """ValueError if prompt and codes exceed the positions the model was trained on."""
        limit = self.hf.config.max_position_embeddings
        if prompt + 2 * frames > limit:
            raise ValueError(
                f"the model has {limit} positions, {prompt} of them for the prompt: that leaves "
                f"{(limit - prompt) // 2} frames of 2 codes, {frames} were asked for"
            )

    def embed(self, ids: Tensor) -> Tensor:
        """Turn ids [rows, S] into the input of layer 0 [rows, S, d]."""
        return self.hf.model.embed_tokens(ids)

    def context(
        self, hidden: Tensor, positions: Tensor, valid: Tensor, cache: Cache | None = None
    ) -> Context:
        """Inputs of every layer besides hidden [rows, S, d].

        `positions` [S] are labels for hooks. `valid` [rows, past + S] is 1 where an id is, 0 on
        padding, the cached positions first.
        """
        count, total = hidden.shape[1], valid.shape[1]
        valid = valid.to(hidden.device)
        places = (valid.cumsum(1) - 1).clamp(min=0)[:, total - count :]
        mask = None
        # Padding, if there is any, stands first.
        if not valid[:, 0].all():
            mask = valid.bool()[:, None, None, :]
            if count > 1:
                square = torch.ones(count, total, dtype=torch.bool, device=valid.device)
                mask = mask & square.tril(total - count)
                # Padding looks at itself: a row of attention without any key is not a number.
                mask = mask | square.tril(total - count).triu(total - count)
        return Context(positions, places, self.hf.model.rotary_emb(hidden, places), mask, cache)

    def layer(self, index: int, hidden: Tensor, context: Context) -> Tensor:
        """Run layer `index` on hidden [rows, S, d]."""
        return self.hf.model.layers[index](
            hidden,
            attention_mask=context.mask,
            position_ids=context.places,
            past_key_values=context.cache,
            use_cache=context.cache is not None,
            position_embeddings=context.rotary,
        )

    def logits(self, hidden: Tensor, frames: int) -> Tensor:
        """Run final norm and head: [rows, P + 2 frames, d] to [rows, 2, frames, 1024].

        Only the head's rows of stage-1 codes (of 83,968) are used, and only at positions that
        predict a code: [b, k, t] predicts code t of track k.
        """
        hidden = self.hf.model.norm(hidden[:, -2 * frames - 1 : -1])
        head = self.hf.lm_head
        if head.weight.is_meta:  # offloaded: the weights are there only while the module runs
            logits = head(hidden)[..., CODE_IDS]
        else:
            logits = F.linear(hidden.to(head.weight.device), head.weight[CODE_IDS])
        return logits.unflatten(1, (frames, 2)).transpose(1, 2)

    def next_scores(self, hidden: Tensor) -> Tensor:
        """Logits [rows, 83,968] float32 over the whole vocabulary, from the last position."""
        return self.hf.lm_head(self.hf.model.norm(hidden[:, -1])).float()
