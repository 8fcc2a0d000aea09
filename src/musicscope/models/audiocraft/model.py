"""MusicGen in audiocraft as a `LanguageModel`: the weights as they were released.

Hook points, frames and sampling are as in `musicscope.models.musicgen.delay_pattern`; audiocraft's
own modules run. Two things differ from `MusicgenModel`:

- An empty caption counts as none, as in audiocraft's T5 conditioner.
- audiocraft's cross-attention has no mask: in a batch, padding dilutes a short caption. Here each
  clip is computed as audiocraft computes it alone, so that activations do not depend on the other
  captions of a batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from musicscope.core.precision import tf32
from musicscope.models.audiocraft.loading import (
    CODEC_FILE,
    MODEL_FILE,
    build_codec,
    build_language_model,
)
from musicscope.models.interface import Hook
from musicscope.models.language_model import by_clip, run_layers
from musicscope.models.musicgen.delay_pattern import (
    Context,
    Cross,
    DelayDecoder,
    DelayPatternModel,
    Step,
)

if TYPE_CHECKING:
    from audiocraft.models.encodec import CompressionModel
    from audiocraft.models.lm import LMModel
    from audiocraft.modules.conditioners import T5Conditioner
    from audiocraft.modules.transformer import (
        StreamingMultiheadAttention,
        StreamingTransformerLayer,
    )


class AudiocraftModel(DelayPatternModel):
    """`LanguageModel` over audiocraft's LMModel (`.lm`) and EncodecModel (`.codec`)."""

    def __init__(
        self, lm: LMModel, codec: CompressionModel, name: str, device: torch.device
    ) -> None:
        self.lm, self.codec = lm.to(device), codec.to(device)
        conditioner = lm.condition_provider.conditioners["description"]
        self.conditioner = cast("T5Conditioner", conditioner)
        # Not a registered module of its conditioner, unless it was trained along.
        self.text_encoder = self.conditioner.t5.to(device)
        self.tokenizer = self.conditioner.t5_tokenizer
        self.conditioner.device = lm.condition_provider.device = str(device)
        super().__init__(
            name,
            AudiocraftDecoder(lm, self.conditioner, device),
            sample_rate=int(codec.sample_rate),
            frame_rate=float(codec.frame_rate),
            width=lm.dim,
            card=lm.card,
            special=lm.special_token_id,
            guidance_scale=float(lm.cfg_coef),
        )

    @classmethod
    def load(
        cls,
        source: Path,
        device: torch.device,
        dtype: torch.dtype,
        text_encoder: Path | None = None,
        text_revision: str | None = None,
    ) -> AudiocraftModel:
        """Load a folder with state_dict.bin and compression_state_dict.bin.

        The T5 is not in them (unless it was trained along): it is read from `text_encoder`, else
        from ``text_encoder/`` in the folder, else from the hub at `text_revision`. The decoder is
        in `dtype`; codec and T5 stay in float32.

        Raises:
            ImportError: audiocraft is not installed.
            FileNotFoundError, ValueError: see `musicscope.models.audiocraft.loading`.
        """
        source = Path(source)
        text = None if text_encoder is None else Path(text_encoder)
        lm, config = build_language_model(source / MODEL_FILE, text, text_revision, dtype)
        return cls(lm, build_codec(source / CODEC_FILE, config), source.name, device)

    @property
    def modules(self) -> tuple[torch.nn.Module, ...]:
        return self.lm, self.codec, self.text_encoder

    @torch.no_grad()
    @tf32(False, False)  # rounding would change the codes
    def encode_signal(self, signal: Tensor) -> Tensor:
        codes, scale = self.codec.encode(signal[:, None])
        if scale is not None:
            raise ValueError(f"{self.name}: a codec that renormalizes is not supported")
        return codes

    def encode_text(self, captions: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        return super().encode_text([caption or None for caption in captions])

    @torch.no_grad()
    def codec_latents(self, codes: Tensor) -> Tensor:
        return self.codec.decode_latent(codes.to(self.device)).transpose(1, 2)

    @torch.no_grad()
    @tf32(False, False)
    def decode(self, codes: Tensor) -> Tensor:
        parts = by_clip(codes.to(self.device))
        return torch.cat([self.codec.decode(part)[:, 0] for part in parts])


class AudiocraftDecoder(DelayDecoder):
    """The decoder of audiocraft's LMModel."""

    def __init__(self, lm: LMModel, conditioner: T5Conditioner, device: torch.device) -> None:
        from audiocraft.modules.transformer import create_sin_embedding

        self._transformer, self._sinusoids = lm.transformer, create_sin_embedding
        self._project = conditioner.output_proj
        norm = cast(torch.nn.Module, lm.out_norm)  # `check_supported`: norm_first
        super().__init__(lm.emb, lm.transformer.layers, norm, lm.linears, device)

    def embed_positions(self, ids: Tensor, past: int, width: int) -> Tensor:
        # In float32 whatever the decoder: float16 cannot tell positions beyond 2,048 apart.
        positions = torch.arange(ids.shape[-1], device=ids.device).view(1, -1, 1) + past
        period = self._transformer.max_period
        table = self._sinusoids(positions, width, max_period=period, dtype=torch.float32)
        return self._transformer.positional_scale * table

    def context(self, hidden: Tensor, text: Tensor, text_mask: Tensor) -> Context:
        """`text_mask` of the result: None where no caption is padded, else bool [rows, L]."""
        text = self._project(text.to(self._project.weight.dtype)) * text_mask[..., None]
        words = text_mask.bool()
        # Without a caption all states are zero, and so is what attention finds, wherever it looks.
        words = words | ~words.any(1, keepdim=True)
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        return Context(positions, text, None if bool(words.all()) else words)

    @contextlib.contextmanager
    def steps(self, text: Tensor, text_mask: Tensor, positions: int) -> Generator[Step]:
        # audiocraft's layers keep keys and values.
        past = 0
        first: list[Context] = []

        def step(ids: Tensor, hooks: Mapping[str, Hook]) -> Tensor:
            nonlocal past
            hidden = self.embed(ids, past=past)
            if not first:
                first.append(self.context(hidden, text, text_mask))
            context = replace(first[0], positions=first[0].positions + past)
            past += 1
            return run_layers(self, hidden, context, hooks)

        with self._transformer.streaming():
            yield step

    def layer(
        self, index: int, hidden: Tensor, context: Context, cross: Cross | None = None
    ) -> Tensor:
        block, mask = cast("StreamingTransformerLayer", self.layers[index]), context.text_mask
        if not isinstance(mask, Tensor) and cross is None:
            return block(hidden, cross_attention_src=context.text)
        # The same three steps, with the hook, and the mask that audiocraft's attention lacks.
        hidden = hidden + block.layer_scale_1(block._sa_block(block.norm1(hidden), None, None))
        attention = cast("StreamingMultiheadAttention", block.cross_attention)
        if isinstance(mask, Tensor):
            mixed = _attend(attention, block.norm_cross(hidden), context.text, mask)
        else:
            mixed = block._cross_attention_block(block.norm_cross(hidden), context.text)
        mixed = block.layer_scale_cross(mixed)
        hidden = hidden + (mixed if cross is None else cross(mixed))
        return hidden + block.layer_scale_2(block._ff_block(block.norm2(hidden)))


def _attend(
    attention: StreamingMultiheadAttention, query: Tensor, text: Tensor, mask: Tensor
) -> Tensor:
    """Run audiocraft's cross-attention of query [rows, S, d], masked to the captions' tokens."""
    inner = attention if attention.custom else attention.mha
    weights = inner.in_proj_weight.chunk(3)
    biases = (None,) * 3 if inner.in_proj_bias is None else inner.in_proj_bias.chunk(3)
    sources = (query, text, text)
    q, k, v = (
        F.linear(source, weight, bias).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for source, weight, bias in zip(sources, weights, biases, strict=True)
    )
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
    return inner.out_proj(mixed.transpose(1, 2).flatten(-2))
