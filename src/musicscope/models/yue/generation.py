"""Sampling from YuE stage 1 with hooks: seeded, guided, one layer call a step.

The recipe is that of the released script (branch YuE-v1, inference/infer.py), in the order in which
transformers applies it: guidance on log-probabilities, repetition penalty, forbidden ids,
temperature, top-k 50 (transformers' own default, which the script leaves in place), top-p .93. A
test holds the tokens equal to those of transformers' `generate()` for the same seed.

Two differences, both because the number of frames is given here: every id but the codes of stage 1
is forbidden (the script forbids `yue_tokens.RELEASED_BLOCK` only, and has to throw away what is no
code), among them EOA, with which the script's segments end; and there is a single segment. The
script guides the first segment by 1.5 and later ones by 1.2 (`GUIDANCE`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from musicscope.models.interface import Hook
from musicscope.models.yue.decoder import frame_labels
from musicscope.models.yue.tokens import CODE_IDS, FIRST_CODE, deinterleave

if TYPE_CHECKING:
    from musicscope.models.yue.model import YueModel

GUIDANCE = (1.5, 1.2)
"""Scales of the released script: first segment, later segments."""
TOP_K, TOP_P, REPETITION_PENALTY = 50, 0.93, 1.1


def guided(scores: Tensor, scale: float) -> Tensor:
    """Scores [2B, V], rows [conditional; unconditional], to [B, V]: u + scale (c - u) in logs."""
    conditional, unconditional = scores.log_softmax(-1).chunk(2)
    return scale * (conditional - unconditional) + unconditional


def penalised(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Scores [B, V] where `seen` [B, V] made less likely (Keskar et al. 2019, arXiv 1909.05858)."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def nucleus(scores: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Probabilities [B, V] after temperature, top-k (0: all) and top-p (1: all)."""
    scores = scores / temperature
    if 0 < top_k < scores.shape[-1]:
        floor = scores.topk(top_k).values[..., -1:]
        scores = scores.masked_fill(scores < floor, -torch.inf)
    if top_p < 1:
        ascending, order = scores.sort(-1)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[..., -1] = False
        scores = scores.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return scores.softmax(-1)


@torch.no_grad()
def generate(
    model: YueModel,
    captions: Sequence[str | None],
    seconds: float,
    seed: int,
    hooks: dict[str, Hook] | None = None,
    guidance_scale: float = GUIDANCE[0],
    temperature: float = 1.0,
    top_k: int = TOP_K,
    top_p: float = TOP_P,
    repetition_penalty: float = REPETITION_PENALTY,
) -> tuple[Tensor, Tensor]:
    """Audio [B, n] at 16 kHz and codes [B, 2, T] for B captions, T = round(seconds * 50).

    With guidance the model runs 2B rows, [conditional; unconditional]; hooks get both, and
    `model.conditional_rows` (slice(0, B)) tells them apart. The unconditional rows know nothing
    before `<xcodec>`, as in the script. With guidance_scale 1 only the B conditional rows run.

    Hooks get the whole prompt once, [rows, P, d] with labels 0, then [rows, 1, d] with the label
    of the code just written: -1, 1, -2, 2, ..., T (`yue_decoder.frame_labels`), the last included.

    The repetition penalty reads what was written, so a steered run may drift for that reason
    alone: give a run and its control the same `repetition_penalty`.
    """
    frames = round(seconds * model.frame_rate)
    if frames < 1 or not captions or isinstance(captions, str):
        raise ValueError(f"need a list of captions and at least one frame, got {seconds} s")
    if temperature < 0 or top_k < 0 or not math.isfinite(guidance_scale):
        raise ValueError("temperature and top_k must be at least 0, guidance_scale finite")
    if not 0 < top_p <= 1 or repetition_penalty <= 0:
        raise ValueError("top_p must be above 0 and at most 1, repetition_penalty above 0")
    count, guide = len(captions), guidance_scale != 1
    ids, valid = model.encode_text([*captions, *[None] * (count if guide else 0)])
    prompt = ids.shape[1]
    model.decoder.check_length(prompt, frames)
    valid = torch.cat([valid, valid.new_ones(len(valid), 2 * frames)], 1)
    labels = frame_labels(prompt, 2 * frames).to(ids.device)
    generator = torch.Generator(model.device).manual_seed(seed)
    decoder, wanted = model.decoder, model.by_layer(hooks)
    cache = DynamicCache(config=model.hf.config)
    seen = torch.zeros(count, CODE_IDS.stop - FIRST_CODE, dtype=torch.bool, device=ids.device)
    written: list[Tensor] = []
    try:
        model.conditional_rows = slice(0, count) if guide else slice(None)
        for step in range(2 * frames + 1):
            end = prompt + step
            hidden = decoder.embed(ids)
            context = decoder.context(
                hidden, labels[end - ids.shape[1] : end], valid[:, :end], cache
            )
            hidden = decoder.run(hidden, context, wanted)
            if step == 2 * frames:
                break  # the last code predicts nothing, it ran for the hooks
            scores = decoder.next_scores(hidden).to(seen.device)
            scores = guided(scores, guidance_scale) if guide else scores
            codes = penalised(scores[:, CODE_IDS], seen, repetition_penalty)
            if temperature == 0:
                drawn = codes.argmax(-1, keepdim=True)
            else:
                # Over all ids, so that the draws are those of transformers' generate().
                probabilities = torch.zeros_like(scores)
                probabilities[:, CODE_IDS] = nucleus(codes, temperature, top_k, top_p)
                drawn = torch.multinomial(probabilities, 1, generator=generator) - FIRST_CODE
            seen.scatter_(1, drawn, True)
            written.append(drawn + FIRST_CODE)
            ids = written[-1].repeat(2, 1) if guide else written[-1]
    finally:
        model.conditional_rows = slice(None)
    codes = deinterleave(torch.cat(written, 1))
    return model.decode(codes), codes
