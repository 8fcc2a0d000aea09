"""Sampling from MusicGen with hooks: seeded, guided, one layer call a step.

Own loop rather than transformers' `generate()`, which runs the first decoder step twice (so that
a hook there must guess which call counts), draws from the global random state and takes several
times as long. Tests hold the greedy tokens equal to transformers', and the drawn ones to the
distribution that transformers' samplers give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from musicscope.models.interface import Hook
from musicscope.models.musicgen.decoder import undelayed

if TYPE_CHECKING:
    from musicscope.models.delay_pattern import DelayPatternModel


def sample(scores: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """Draw codes from logits [..., card] by adding Gumbel noise and taking the largest.

    `top_k` 0 keeps all; `temperature` 0 takes the most likely. Two runs with one seed share their
    noise, so a small change of the logits changes few draws: what paired comparisons want. (And
    torch.multinomial and topk together took three quarters of a generation step on a CPU.)
    """
    if temperature == 0:
        return scores.argmax(-1)
    scores = scores / temperature
    noise = torch.rand(scores.shape, generator=generator, device=scores.device)
    noisy = scores - noise.log_().neg_().log_()
    if 0 < top_k < scores.shape[-1]:
        noisy.masked_fill_(scores < kth_largest(scores, top_k), -torch.inf)
    return noisy.argmax(-1)


def kth_largest(scores: Tensor, k: int) -> Tensor:
    """The k-th largest of [..., n], as [..., 1]."""
    if scores.device.type != "cpu":
        return scores.topk(k).values[..., -1:]
    return torch.from_numpy(np.partition(scores.numpy(), -k)[..., -k, None])  # 8 times as fast


@torch.no_grad()
def generate(
    model: DelayPatternModel,
    captions: Sequence[str | None],
    seconds: float,
    seed: int,
    hooks: dict[str, Hook] | None,
    guidance_scale: float,
    temperature: float,
    top_k: int,
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
    shape = (len(captions), model.num_codebooks, frames + model.num_codebooks)
    sequence = torch.full(shape, model.special, device=model.device)
    try:
        model.conditional_rows = slice(0, len(captions)) if guided else slice(None)
        with decoder.steps(text, text_mask, shape[-1] - 1) as advance:
            for step in range(shape[-1] - 1):
                ids = sequence[:, :, step : step + 1]
                hidden = advance(ids.repeat(2, 1, 1) if guided else ids, wanted)
                scores = decoder.logits(hidden, None)[:, :, 0].float()
                if guided:
                    conditional, unconditional = scores.chunk(2)
                    scores = unconditional + (conditional - unconditional) * guidance_scale
                drawn = sample(scores, temperature, top_k, generator)
                # Codebook k of frame t is predicted at t + k: the pattern's corners stay special.
                books = slice(max(0, step - frames + 1), min(model.num_codebooks, step + 1))
                sequence[:, books, step + 1] = drawn[:, books]
    finally:
        model.conditional_rows = slice(None)
    codes = undelayed(sequence)
    return model.decode(codes), codes
