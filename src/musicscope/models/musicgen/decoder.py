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

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import MusicgenForConditionalGeneration
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

from musicscope.models.interface import Hook
from musicscope.models.musicgen.loading import main_device

Step = Callable[[Tensor, dict[int, Hook]], Tensor]


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


def check_hooked(layer: int, hidden: Tensor, answer: Any) -> Tensor:
    """What a hook made of the output `hidden` of a layer; ValueError for another shape."""
    if not isinstance(answer, Tensor) or answer.shape != hidden.shape:
        got = list(answer.shape) if isinstance(answer, Tensor) else type(answer)
        raise ValueError(
            f"the hook at layers.{layer} must return activations {list(hidden.shape)}, got {got}"
        )
    return answer.to(hidden.dtype)


def run_layers(
    decoder: Any,
    hidden: Tensor,
    context: Context,
    hooks: dict[int, Hook],
    first: int = 0,
    last: int | None = None,
    inputs: list[Tensor] | None = None,
) -> Tensor:
    """Layers `first` to `last` (inclusive) of a decoder, with hooks; counts them in its `calls`."""
    for i in range(first, decoder.num_layers if last is None else last + 1):
        if inputs is not None:
            inputs.append(hidden)
        hidden = decoder.layer(i, hidden, context)
        decoder.calls += 1
        if i in hooks:
            hidden = check_hooked(i, hidden, hooks[i](hidden, context.positions))
    return hidden


class LayerwiseDecoder:
    """Embedding, layers and heads of a MusicGen as separate steps; counts layer evaluations."""

    def __init__(self, hf: MusicgenForConditionalGeneration) -> None:
        self.hf = hf
        self.num_codebooks: int = hf.config.decoder.num_codebooks
        self.num_layers: int = hf.config.decoder.num_hidden_layers
        self.calls = 0
        self._core = hf.decoder.model.decoder
        self.device = main_device(hf)
        self.dtype: torch.dtype = next(hf.decoder.lm_heads.parameters()).dtype

    @property
    def tables(self) -> list[torch.nn.Embedding]:
        """Token embeddings, one for each codebook; row `card` is the special id."""
        return list(self._core.embed_tokens)

    @property
    def layers(self) -> torch.nn.ModuleList:
        return self._core.layers

    def text_states(self, text: Tensor, text_mask: Tensor) -> Tensor:
        """T5 states [rows, L, d_text] as cross-attention reads them, [rows, L, d]."""
        if hasattr(self.hf, "enc_to_dec_proj"):
            text = self.hf.enc_to_dec_proj(text)
        return text * text_mask[..., None]

    def embed(self, ids: Tensor, past: int = 0) -> Tensor:
        """Ids [rows, K, S] to the input of layer 0 [rows, S, d]."""
        tokens = sum(table(ids[:, k]) for k, table in enumerate(self._core.embed_tokens))
        return tokens + self._core.embed_positions(ids, past).to(tokens.device)

    def context(
        self, hidden: Tensor, text: Tensor, text_mask: Tensor, cache: Cache | None = None
    ) -> Context:
        text = self.text_states(text, text_mask)
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

    @contextlib.contextmanager
    def steps(self, text: Tensor, text_mask: Tensor, positions: int) -> Iterator[Step]:
        """Generation: call it with ids [rows, K, 1] of positions 0, 1, 2 ... and hooks by layer,
        for the last layer's output [rows, 1, d]. Keys and values are kept until the block ends."""
        if getattr(self.hf, "hf_device_map", None):
            # Only the layers' own forward has accelerate's hooks, which move what they need.
            yield self._cached_steps(text, text_mask)
        else:
            from musicscope.models.musicgen.kv_cache import Steps

            yield Steps(self, text, text_mask, positions)

    def _cached_steps(self, text: Tensor, text_mask: Tensor) -> Step:
        config = self._core.config
        cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        first: list[Context] = []

        def step(ids: Tensor, hooks: dict[int, Hook]) -> Tensor:
            past = cache.get_seq_length()
            hidden = self.embed(ids, past=past)
            if not first:
                first.append(self.context(hidden, text, text_mask, cache))
            # One query a step: only the self-attention mask depends on how much is cached.
            context = replace(
                first[0],
                positions=first[0].positions + past,
                causal_mask=self.causal(hidden, cache),
            )
            return self.run(hidden, context, hooks)

        return step

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
        return run_layers(self, hidden, context, hooks, first, last, inputs)

    def layer(self, index: int, hidden: Tensor, context: Context) -> Tensor:
        """Layer `index` on hidden [rows, S, d]."""
        output = self._core.layers[index](
            hidden,
            context.causal_mask,
            context.text,
            encoder_attention_mask=context.text_mask,
            past_key_values=context.cache,
            use_cache=context.cache is not None,
        )
        return output[0] if isinstance(output, tuple) else output

    def logits(self, hidden: Tensor, frames: int | None) -> Tensor:
        """Final norm and heads: [rows, S, d] to [rows, K, frames, card], aligned to the codes.

        Only positions that predict a code go through a head. `frames` None: all positions, as is.
        With a device map the heads may be spread: their answers come together on `device`.
        """
        hidden = self._core.layer_norm(hidden)
        spans = (
            hidden if frames is None else hidden[:, k : k + frames]
            for k in range(self.num_codebooks)
        )
        heads = zip(self.hf.decoder.lm_heads, spans, strict=True)
        return torch.stack([head(span).to(self.device) for head, span in heads], 1)
