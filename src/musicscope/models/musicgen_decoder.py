"""The MusicGen decoder, one layer at a time, exactly as transformers runs it.

Sequence layout (Copet et al. 2023, "delay" pattern; P is the special id): position 0 holds P in
every codebook, codebook k of frame t stands at position t + k + 1, P fills the corners. Position
s predicts position s + 1, so codebook k of frame t is predicted at position t + k, and the
position whose newest input is codebook 0 of frame t is t + 1: that one is called frame t.

The layers are called one after another here instead of through the model's own forward, because
stopping early, restarting at a layer and replacing activations are then plain loops without
exceptions or registered state. Tests hold this equal to transformers' forward and generate().
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import MusicgenForConditionalGeneration
from transformers.cache_utils import Cache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

from musicscope.models import Hook


@dataclass(frozen=True)
class Context:
    """What every layer needs besides the stream; the same for all layers."""

    positions: Tensor
    text: Tensor
    text_mask: Tensor | None
    causal_mask: Tensor | None
    cache: Cache | None = None


def delayed(codes: Tensor, special: int) -> Tensor:
    """Codes [B, K, T] to the sequence [B, K, T + K]: start column, then the delay pattern."""
    batch, books, frames = codes.shape
    sequence = codes.new_full((batch, books, frames + books), special)
    for k in range(books):
        sequence[:, k, k + 1 : k + 1 + frames] = codes[:, k]
    return sequence


def undelayed(sequence: Tensor) -> Tensor:
    """Inverse of `delayed`: sequence [B, K, T + K] to codes [B, K, T]."""
    books = sequence.shape[1]
    frames = sequence.shape[-1] - books
    return torch.stack([sequence[:, k, k + 1 : k + 1 + frames] for k in range(books)], dim=1)


class LayerwiseDecoder:
    """Embedding, layers and heads of a MusicGen as separate steps; counts layer evaluations."""

    def __init__(self, hf: MusicgenForConditionalGeneration) -> None:
        self.hf = hf
        self.num_codebooks: int = hf.config.decoder.num_codebooks
        self.num_layers: int = hf.config.decoder.num_hidden_layers
        self.calls = 0
        self._core = hf.decoder.model.decoder

    def embed(self, ids: Tensor, past: int = 0) -> Tensor:
        """Ids [rows, K, S] to the input of layer 0 [rows, S, d]."""
        tokens = sum(table(ids[:, k]) for k, table in enumerate(self._core.embed_tokens))
        return tokens + self._core.embed_positions(ids, past).to(tokens.device)

    def context(
        self, hidden: Tensor, text: Tensor, text_mask: Tensor, cache: Cache | None = None
    ) -> Context:
        if hasattr(self.hf, "enc_to_dec_proj"):
            text = self.hf.enc_to_dec_proj(text)
        text = text * text_mask[..., None]
        attend = create_bidirectional_mask(
            config=self._core.config,
            inputs_embeds=hidden,
            attention_mask=text_mask,
            encoder_hidden_states=text,
        )
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        return Context(positions, text, attend, self.causal(hidden, cache), cache)

    def causal(self, hidden: Tensor, cache: Cache | None) -> Tensor | None:
        return create_causal_mask(
            config=self._core.config,
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=cache,
        )

    def run(
        self,
        hidden: Tensor,
        context: Context,
        hooks: dict[int, Hook],
        first: int = 0,
        last: int | None = None,
        inputs: list[Tensor] | None = None,
    ) -> Tensor:
        """Layers `first` to `last` (inclusive) on hidden [rows, S, d]; fills `inputs` if given."""
        for i in range(first, self.num_layers if last is None else last + 1):
            if inputs is not None:
                inputs.append(hidden)
            output = self._core.layers[i](
                hidden,
                context.causal_mask,
                context.text,
                encoder_attention_mask=context.text_mask,
                past_key_values=context.cache,
                use_cache=context.cache is not None,
            )
            hidden = output[0] if isinstance(output, tuple) else output
            self.calls += 1
            if i in hooks:
                hooked = hooks[i](hidden, context.positions)
                if not isinstance(hooked, Tensor) or hooked.shape != hidden.shape:
                    got = list(hooked.shape) if isinstance(hooked, Tensor) else type(hooked)
                    raise ValueError(
                        f"the hook at layers.{i} must return activations {list(hidden.shape)}, "
                        f"got {got}"
                    )
                hidden = hooked.to(hidden.dtype)
        return hidden

    def logits(self, hidden: Tensor, frames: int | None) -> Tensor:
        """Final norm and heads: [rows, S, d] to [rows, K, frames, card], aligned to the codes.

        Only positions that predict a code go through a head. `frames` None: all positions, as is.
        """
        hidden = self._core.layer_norm(hidden)
        spans = (
            hidden if frames is None else hidden[:, k : k + frames]
            for k in range(self.num_codebooks)
        )
        return torch.stack(
            [head(span) for head, span in zip(self.hf.decoder.lm_heads, spans, strict=True)], 1
        )
