"""Sampling from MusicGen with hooks: seeded, guided, one layer call a step.

Own loop rather than transformers' `generate()`, which runs the first decoder step twice (so that
a hook there must guess which call counts) and draws from the global random state. A test holds
the tokens equal to transformers' for the same seed, greedy and sampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from musicscope.models import Hook
from musicscope.models.musicgen_decoder import undelayed

if TYPE_CHECKING:
    from musicscope.models.musicgen import MusicgenModel


def sample(scores: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """Draw from logits [..., card], in the order of operations of transformers' samplers.

    `top_k` 0 keeps all; `temperature` 0 takes the most likely.
    """
    if temperature == 0:
        return scores.argmax(-1)
    scores = scores / temperature
    if 0 < top_k < scores.shape[-1]:
        floor = scores.topk(top_k).values[..., -1:]
        scores = scores.masked_fill(scores < floor, -torch.inf)
    flat = scores.softmax(-1).flatten(0, -2)
    return torch.multinomial(flat, 1, generator=generator).view(scores.shape[:-1])


@torch.no_grad()
def generate(
    model: MusicgenModel,
    captions: Sequence[str | None],
    seconds: float,
    seed: int,
    hooks: dict[str, Hook] | None = None,
    guidance_scale: float = 3.0,
    temperature: float = 1.0,
    top_k: int = 250,
) -> tuple[Tensor, Tensor]:
    """Audio [B, n] and codes [B, K, T] for B captions, T = round(seconds * frame rate).

    Classifier-free guidance: logits = u + guidance_scale * (c - u). The decoder then runs 2B rows,
    [conditional; unconditional]; hooks get both, and `model.conditional_rows` (slice(0, B)) tells
    them apart. With guidance_scale 1 only the B conditional rows run.

    Hooks get [rows, 1, d] and the position of the step [1], each position once, 0..T+K-2.
    The draws come from a generator of their own, always one for each row and codebook, so the same
    seed gives the same tokens bit for bit whatever else happens, and hooks that change nothing
    change no token. Global random state is neither read nor written.
    """
    frames = round(seconds * model.frame_rate)
    if frames < 1 or not captions or isinstance(captions, str):
        raise ValueError(f"need a list of captions and at least one frame, got {seconds} s")
    if temperature < 0 or top_k < 0 or not math.isfinite(guidance_scale):
        raise ValueError("temperature and top_k must be at least 0, guidance_scale finite")
    generator = torch.Generator(model.device).manual_seed(seed)
    text, text_mask = model.encode_text(captions)
    guided = guidance_scale != 1
    if guided:
        text = torch.cat([text, torch.zeros_like(text)])
        text_mask = torch.cat([text_mask, torch.zeros_like(text_mask)])
    decoder, wanted = model.decoder, model.by_layer(hooks)
    config = model.hf.decoder.config
    cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    shape = (len(captions), model.num_codebooks, frames + model.num_codebooks)
    sequence = torch.full(shape, model.special, device=model.device)
    try:
        model.conditional_rows = slice(0, len(captions)) if guided else slice(None)
        for step in range(shape[-1] - 1):
            ids = sequence[:, :, step : step + 1]
            hidden = decoder.embed(ids.repeat(2, 1, 1) if guided else ids, past=step)
            if step == 0:
                first = context = decoder.context(hidden, text, text_mask, cache)
            else:
                # One query a step: only the self-attention mask depends on how much is cached.
                causal = decoder.causal(hidden, cache)
                context = replace(first, positions=first.positions + step, causal_mask=causal)
            scores = decoder.logits(decoder.run(hidden, context, wanted), None)[:, :, 0].float()
            if guided:
                conditional, unconditional = scores.chunk(2)
                scores = unconditional + (conditional - unconditional) * guidance_scale
            drawn = sample(scores, temperature, top_k, generator)
            # Codebook k of frame t is predicted at t + k: the corners of the pattern stay special.
            books = slice(max(0, step - frames + 1), min(model.num_codebooks, step + 1))
            sequence[:, books, step + 1] = drawn[:, books]
    finally:
        model.conditional_rows = slice(None)
    codes = undelayed(sequence)
    return model.decode(codes), codes
