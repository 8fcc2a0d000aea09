"""One position of MusicGen's decoder at a time, for generation on one device.

The same weights and arithmetic as transformers' layers, without what makes a step there cost
several times its arithmetic: the cache is written in place instead of being copied at every step
(T steps copy T^2 / 2 positions), keys and values of the text are computed once, rows without a
caption skip cross-attention (its keys and values are all zero, the projections have no bias), and
no masks are built. Measured by benchmarks/generation.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from musicscope.models.interface import Hook
from musicscope.models.musicgen.decoder import LayerwiseDecoder, check_hooked


class Steps:
    """Call it with the ids of positions 0, 1, 2 ... in turn; it remembers keys and values."""

    def __init__(
        self, decoder: LayerwiseDecoder, text: Tensor, text_mask: Tensor, positions: int
    ) -> None:
        """Text states [rows, L, d_text], mask [rows, L], and how many positions will be asked."""
        self.decoder, self.position = decoder, 0
        self.layers = decoder.layers
        rows = len(text)
        self.told = text_mask.any(1).nonzero().squeeze(1)  # rows with a caption
        attention = self.layers[0].self_attn
        self.heads, width = attention.num_heads, attention.head_dim
        shape = (len(self.layers), rows, self.heads, positions, width)
        self.keys = torch.empty(shape, device=text.device, dtype=text.dtype)
        self.values = torch.empty_like(self.keys)
        mask = text_mask[self.told]
        self.mask = mask[:, None, None].bool()
        states = decoder.text_states(text[self.told], mask)
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

    def __call__(self, ids: Tensor, hooks: dict[int, Hook]) -> Tensor:
        """Ids [rows, K, 1] of the next position to the last layer's output [rows, 1, d]."""
        hidden = self.decoder.embed(ids, past=self.position)
        where = torch.tensor([self.position], device=hidden.device)
        for i, layer in enumerate(self.layers):
            hidden = hidden + self._self_attention(i, layer.self_attn_layer_norm(hidden))
            if len(self.told):
                asking = layer.encoder_attn_layer_norm(hidden[self.told])
                hidden = hidden.index_add(0, self.told, self._cross_attention(i, asking))
            inner = layer.fc1(layer.final_layer_norm(hidden))
            hidden = hidden + layer.fc2(layer.activation_fn(inner))
            self.decoder.calls += 1
            if i in hooks:
                hidden = check_hooked(i, hidden, hooks[i](hidden, where))
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
