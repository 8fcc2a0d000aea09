"""The MusicGen decoder, one layer at a time, exactly as transformers runs it.

Two ways to go through a sequence: all positions at once (`LayerwiseDecoder.layer`, teacher
forcing), and one position per step (`Steps`, generation). Tests hold both equal to transformers'
forward and generate(). The sequence layout is in `musicscope.models.musicgen.delay_pattern`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

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

from musicscope.models.interface import Hook
from musicscope.models.language_model import CROSS, bound, run_layers
from musicscope.models.musicgen.delay_pattern import Context, Cross, DelayDecoder, Step, modules_of

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def part_configs(config: MusicgenConfig) -> tuple[MusicgenDecoderConfig, EncodecConfig]:
    """Give the configurations of decoder and codec; TypeError for other classes."""
    decoder, codec = config.decoder, config.audio_encoder
    if not isinstance(decoder, MusicgenDecoderConfig) or not isinstance(codec, EncodecConfig):
        raise TypeError(f"{type(decoder).__name__} with {type(codec).__name__} is no MusicGen")
    return decoder, codec


class LayerwiseDecoder(DelayDecoder):
    """The decoder of a MusicGen in transformers."""

    def __init__(self, hf: MusicgenForConditionalGeneration) -> None:
        self.hf, core = hf, hf.decoder.model.decoder
        self._config, self._positions = core.config, core.embed_positions
        super().__init__(
            core.embed_tokens, core.layers, core.layer_norm, hf.decoder.lm_heads, main_device(hf)
        )

    def text_states(self, text: Tensor, text_mask: Tensor) -> Tensor:
        """Project T5 states [rows, L, d_text] for cross-attention, [rows, L, d]."""
        if hasattr(self.hf, "enc_to_dec_proj"):
            text = self.hf.enc_to_dec_proj(text)
        return text * text_mask[..., None]

    def embed_positions(self, ids: Tensor, past: int, width: int) -> Tensor:
        return self._positions(ids, past)

    def context(
        self, hidden: Tensor, text: Tensor, text_mask: Tensor, cache: Cache | None = None
    ) -> Context:
        text = self.text_states(text, text_mask)
        attend = create_bidirectional_mask(
            config=self._config,
            inputs_embeds=hidden,
            attention_mask=text_mask,
            encoder_hidden_states=text,
        )
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        return Context(positions, text, attend, self._causal(hidden, cache), cache)

    def _causal(self, hidden: Tensor, cache: Cache | None) -> Tensor | BlockMask | None:
        return create_causal_mask(
            config=self._config,
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=cache,
        )

    @contextlib.contextmanager
    def steps(self, text: Tensor, text_mask: Tensor, positions: int) -> Generator[Step]:
        if getattr(self.hf, "hf_device_map", None):
            # Only the layers' own forward has accelerate's hooks, which move what they need.
            yield self._cached_steps(text, text_mask)
        else:
            yield Steps(self, text, text_mask, positions)

    def _cached_steps(self, text: Tensor, text_mask: Tensor) -> Step:
        config = self._config
        cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        first: list[Context] = []

        def step(ids: Tensor, hooks: Mapping[str, Hook]) -> Tensor:
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

    def layer(
        self, index: int, hidden: Tensor, context: Context, cross: Cross | None = None
    ) -> Tensor:
        layer = self.layers[index]
        with contextlib.ExitStack() as stack:
            if cross is not None:
                (block,) = modules_of(MusicgenDecoderLayer, [layer])
                handle = block.encoder_attn.register_forward_hook(
                    lambda module, arguments, output: (cross(output[0]), *output[1:])
                )
                stack.callback(handle.remove)
            output = layer(
                hidden,
                context.causal_mask,
                context.text,
                encoder_attention_mask=context.text_mask,
                past_key_values=context.cache,
                use_cache=context.cache is not None,
            )
        return output[0] if isinstance(output, tuple) else output


def main_device(hf: MusicgenForConditionalGeneration) -> torch.device:
    """Find the device of codec, text encoder and batches: the model's, or the map's first one."""
    placed = getattr(hf, "hf_device_map", None)
    if not placed:
        return hf.device
    # "disk" and "cpu" hold weights that are brought to the map's first accelerator to run.
    devices = [torch.device("cpu" if d in ("cpu", "disk") else d) for d in placed.values()]
    return next((d for d in devices if d.type != "cpu"), devices[0])


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

    def __call__(self, ids: Tensor, hooks: Mapping[str, Hook]) -> Tensor:
        """Run ids [rows, K, 1] of the next position: the last layer's output [rows, 1, d]."""
        hidden = self.decoder.embed(ids, past=self.position)
        where = torch.tensor([self.position], device=hidden.device)
        for i, layer in enumerate(self.layers):
            hidden = hidden + self._self_attention(i, layer.self_attn_layer_norm(hidden))
            point = f"layers.{i}"
            cross = bound(hooks, point + CROSS, where)
            if len(self.captioned):
                asking = layer.encoder_attn_layer_norm(hidden[self.captioned])
                added = self._cross_attention(i, asking)
                if cross is None:
                    hidden = hidden.index_add(0, self.captioned, added)
                else:
                    none = torch.zeros_like(hidden)
                    hidden = hidden + cross(none.index_copy(0, self.captioned, added))
            elif cross is not None:
                hidden = hidden + cross(torch.zeros_like(hidden))
            inner = layer.fc1(layer.final_layer_norm(hidden))
            hidden = hidden + layer.fc2(layer.activation_fn(inner))
            self.decoder.calls += 1
            if (edit := bound(hooks, point, where)) is not None:
                hidden = edit(hidden)
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
