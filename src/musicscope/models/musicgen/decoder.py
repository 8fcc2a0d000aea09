"""The MusicGen decoder, one layer at a time, exactly as transformers runs it.

Two ways to go through a sequence: all positions at once (`LayerwiseDecoder.layer`, teacher
forcing), and one position per step (`Steps`, generation). Tests hold both equal to transformers'
forward and generate(). The sequence layout is in `musicscope.models.musicgen.delay_pattern`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    EncodecConfig,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
)
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.models.musicgen.modeling_musicgen import MusicgenDecoderLayer

from musicscope.models import hooks as hooked
from musicscope.models.interface import Hook
from musicscope.models.language_model import run_layers
from musicscope.models.musicgen.loading import main_device

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

M = TypeVar("M", bound=torch.nn.Module)

Step = Callable[[Tensor, Mapping[int, Hook]], Tensor]
"""(ids [rows, K, 1] of the next position, hooks by layer) -> the last layer's output [rows, 1, d];
called for positions 0, 1, 2 ... in turn."""


@dataclass(frozen=True)
class Context:
    """Inputs of every layer besides the stream; the same for all layers."""

    positions: Tensor
    """[S] places in the sequence."""
    text: Tensor
    """[rows, L, d] as cross-attention reads it."""
    text_mask: Tensor | BlockMask | None
    causal_mask: Tensor | BlockMask | None
    cache: Cache | None = None


def part_configs(config: MusicgenConfig) -> tuple[MusicgenDecoderConfig, EncodecConfig]:
    """Give the configurations of decoder and codec; TypeError for other classes."""
    decoder, codec = config.decoder, config.audio_encoder
    if not isinstance(decoder, MusicgenDecoderConfig) or not isinstance(codec, EncodecConfig):
        raise TypeError(f"{type(decoder).__name__} with {type(codec).__name__} is no MusicGen")
    return decoder, codec


def modules_of(kind: type[M], modules: Iterable[torch.nn.Module]) -> list[M]:
    """Narrow modules to their class; TypeError for another, as of another transformers."""
    found = [module for module in modules if isinstance(module, kind)]
    if others := {type(m).__name__ for m in modules if not isinstance(m, kind)}:
        raise TypeError(f"{kind.__name__} expected, found {sorted(others)}")
    return found


class LayerwiseDecoder:
    """Embedding, layers and heads of a MusicGen as separate steps; counts layer evaluations."""

    def __init__(self, hf: MusicgenForConditionalGeneration) -> None:
        self.hf = hf
        config, _ = part_configs(hf.config)
        self.num_codebooks: int = config.num_codebooks
        self.num_layers: int = config.num_hidden_layers
        self.calls = 0
        self._core = hf.decoder.model.decoder
        self.device = main_device(hf)
        self.dtype: torch.dtype = next(hf.decoder.lm_heads.parameters()).dtype

    @property
    def tables(self) -> list[torch.nn.Embedding]:
        """Token embeddings, one for each codebook; row `card` is the special id."""
        return modules_of(torch.nn.Embedding, self._core.embed_tokens)

    @property
    def layers(self) -> torch.nn.ModuleList:
        return self._core.layers

    def text_states(self, text: Tensor, text_mask: Tensor) -> Tensor:
        """Project T5 states [rows, L, d_text] for cross-attention, [rows, L, d]."""
        if hasattr(self.hf, "enc_to_dec_proj"):
            text = self.hf.enc_to_dec_proj(text)
        return text * text_mask[..., None]

    def embed(self, ids: Tensor, past: int = 0) -> Tensor:
        """Turn ids [rows, K, S] into the input of layer 0 [rows, S, d]."""
        tokens = sum(table(ids[:, k]) for k, table in enumerate(self._core.embed_tokens))
        return tokens + self._core.embed_positions(ids, past).to(tokens.device)

    def context(
        self, hidden: Tensor, text: Tensor, text_mask: Tensor, cache: Cache | None = None
    ) -> Context:
        """Masks, positions and text for hidden [rows, S, d]."""
        text = self.text_states(text, text_mask)
        attend = create_bidirectional_mask(
            config=self._core.config,
            inputs_embeds=hidden,
            attention_mask=text_mask,
            encoder_hidden_states=text,
        )
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        return Context(positions, text, attend, self._causal(hidden, cache), cache)

    def _causal(self, hidden: Tensor, cache: Cache | None) -> Tensor | BlockMask | None:
        return create_causal_mask(
            config=self._core.config,
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=cache,
        )

    @contextlib.contextmanager
    def steps(self, text: Tensor, text_mask: Tensor, positions: int) -> Generator[Step]:
        """Give the step function of a generation of `positions` positions.

        `text` [rows, L, d_text], `text_mask` [rows, L]. Keys and values are kept until the block
        ends.
        """
        if getattr(self.hf, "hf_device_map", None):
            # Only the layers' own forward has accelerate's hooks, which move what they need.
            yield self._cached_steps(text, text_mask)
        else:
            yield Steps(self, text, text_mask, positions)

    def _cached_steps(self, text: Tensor, text_mask: Tensor) -> Step:
        config = self._core.config
        cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        first: list[Context] = []

        def step(ids: Tensor, hooks: Mapping[int, Hook]) -> Tensor:
            past = cache.get_seq_length()
            hidden = self.embed(ids, past=past)
            if not first:
                first.append(self.context(hidden, text, text_mask, cache))
            # One query per step: only the self-attention mask depends on how much is cached.
            context = replace(
                first[0],
                positions=first[0].positions + past,
                causal_mask=self._causal(hidden, cache),
            )
            return run_layers(self, hidden, context, hooks)

        return step

    def layer(self, index: int, hidden: Tensor, context: Context) -> Tensor:
        """Run layer `index` on hidden [rows, S, d]."""
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
        """Run final norm and heads: [rows, S, d] to [rows, K, frames, card], aligned to the codes.

        Only positions that predict a code go through a head. `frames` None: all positions, as is.
        With a device map the heads may be spread: their answers come together on `device`.
        """
        read = spans(self._core.layer_norm(hidden), frames, self.num_codebooks)
        heads = zip(self.hf.decoder.lm_heads, read, strict=True)
        return torch.stack([head(span).to(self.device) for head, span in heads], 1)


def spans(hidden: Tensor, frames: int | None, books: int) -> list[Tensor]:
    """Positions of [rows, S, d] that predict codebook k = 0..K-1; `frames` None: all positions."""
    return [hidden if frames is None else hidden[:, k : k + frames] for k in range(books)]


class Steps:
    """Run the decoder one position at a time with an in-place cache, on one device.

    Same weights and arithmetic as transformers' layers, without the overhead that makes a step
    there cost several times its arithmetic. The cache is written in place instead of being copied
    at every step (T steps copy T^2 / 2 positions). Keys and values of the text are computed once.
    Rows without a caption skip cross-attention: its keys and values are all zero, the projections
    have no bias. No masks are built. Measured by benchmarks/generation.py.
    """

    def __init__(
        self, decoder: LayerwiseDecoder, text: Tensor, text_mask: Tensor, positions: int
    ) -> None:
        """Text states [rows, L, d_text], mask [rows, L], and the number of positions to come."""
        self.decoder, self.position = decoder, 0
        self.layers = modules_of(MusicgenDecoderLayer, decoder.layers)
        rows = len(text)
        self.captioned = text_mask.any(1).nonzero().squeeze(1)
        attention = self.layers[0].self_attn
        self.heads, width = attention.num_heads, attention.head_dim
        shape = (len(self.layers), rows, self.heads, positions, width)
        self.keys = torch.empty(shape, device=text.device, dtype=text.dtype)
        self.values = torch.empty_like(self.keys)
        mask = text_mask[self.captioned]
        self.mask = mask[:, None, None].bool()
        states = decoder.text_states(text[self.captioned], mask)
        self.text = [
            tuple(
                self._split(projection(states))
                for projection in (layer.encoder_attn.k_proj, layer.encoder_attn.v_proj)
            )
            for layer in self.layers
        ]

    def _split(self, x: Tensor) -> Tensor:
        """[rows, S, d] to [rows, heads, S, d / heads]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def __call__(self, ids: Tensor, hooks: Mapping[int, Hook]) -> Tensor:
        """Run ids [rows, K, 1] of the next position: the last layer's output [rows, 1, d]."""
        hidden = self.decoder.embed(ids, past=self.position)
        where = torch.tensor([self.position], device=hidden.device)
        for i, layer in enumerate(self.layers):
            hidden = hidden + self._self_attention(i, layer.self_attn_layer_norm(hidden))
            if len(self.captioned):
                asking = layer.encoder_attn_layer_norm(hidden[self.captioned])
                hidden = hidden.index_add(0, self.captioned, self._cross_attention(i, asking))
            inner = layer.fc1(layer.final_layer_norm(hidden))
            hidden = hidden + layer.fc2(layer.activation_fn(inner))
            self.decoder.calls += 1
            if i in hooks:
                hidden = hooked.apply(f"layers.{i}", hooks[i], hidden, where)
        self.position += 1
        return hidden

    def _self_attention(self, i: int, x: Tensor) -> Tensor:
        attention, now = self.layers[i].self_attn, self.position
        self.keys[i, :, :, now : now + 1] = self._split(attention.k_proj(x))
        self.values[i, :, :, now : now + 1] = self._split(attention.v_proj(x))
        keys, values = self.keys[i, :, :, : now + 1], self.values[i, :, :, : now + 1]
        mixed = scaled_dot_product_attention(self._split(attention.q_proj(x)), keys, values)
        return attention.out_proj(mixed.transpose(1, 2).flatten(2))

    def _cross_attention(self, i: int, x: Tensor) -> Tensor:
        attention = self.layers[i].encoder_attn
        query = self._split(attention.q_proj(x))
        mixed = scaled_dot_product_attention(query, *self.text[i], attn_mask=self.mask)
        return attention.out_proj(mixed.transpose(1, 2).flatten(2))
