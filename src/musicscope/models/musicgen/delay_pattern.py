"""MusicGen's sequence of codes: the delay pattern, teacher forcing over it, and generation.

Sequence layout (Copet et al. 2023; P is the special id): position 0 holds P in every codebook,
codebook k of frame t stands at position t + k + 1, P fills the corners. Position s predicts
position s + 1, so codebook k of frame t is predicted at position t + k. The position whose newest
input is codebook 0 of frame t is t + 1: it is called frame t.

`MusicgenModel` (transformers) and `AudiocraftModel` differ only in whose modules run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from musicscope.models.interface import Batch, Hook, Hooks
from musicscope.models.language_model import LayerwiseModel

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cache_utils import Cache

M = TypeVar("M", bound=nn.Module)
Cross = Callable[[Tensor], Tensor]
"""Output of cross-attention [rows, S, d] -> what is added to the stream in its place."""

GUIDANCE = 3.0
"""Scale of the released models (Copet et al. 2023), where a folder names none."""


def delayed(codes: Tensor, special: int) -> Tensor:
    """Codes [B, K, T] to the sequence [B, K, T + K]: start column, then the delay pattern."""
    batch, books, frames = codes.shape
    sequence = codes.new_full((batch, books, frames + books), special)
    for k in range(books):
        sequence[:, k, k + 1 : k + 1 + frames] = codes[:, k]
    return sequence


def undelayed(sequence: Tensor) -> Tensor:
    """Invert `delayed`: sequence [B, K, T + K] to codes [B, K, T]."""
    books = sequence.shape[1]
    frames = sequence.shape[-1] - books
    return torch.stack([sequence[:, k, k + 1 : k + 1 + frames] for k in range(books)], dim=1)


def sample(scores: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """Draw codes from logits [..., card] by adding Gumbel noise and taking the largest.

    `top_k` 0 keeps all; `temperature` 0 takes the most likely. Two runs with one seed share their
    noise, so a small change of the logits changes few draws, as paired comparisons need. (And
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
    """Find the k-th largest of [..., n], as [..., 1]."""
    if scores.device.type != "cpu":
        return scores.topk(k).values[..., -1:]
    return torch.from_numpy(np.partition(scores.numpy(), -k)[..., -k, None])  # 8 times as fast


@dataclass(frozen=True)
class Context:
    """Inputs of every layer besides the stream; the same for all layers."""

    positions: Tensor
    """[S] places in the sequence."""
    text: Tensor
    """[rows, L, d] as cross-attention reads it."""
    text_mask: Tensor | BlockMask | None
    causal_mask: Tensor | BlockMask | None = None
    cache: Cache | None = None


Step = Callable[[Tensor, Mapping[str, Hook]], Tensor]
"""(ids [rows, K, 1] of the next position, hooks by hook point) -> last layer output [rows, 1, d];
called for positions 0, 1, 2 ... in turn."""


def modules_of(kind: type[M], modules: Iterable[nn.Module]) -> list[M]:
    """Narrow modules to their class; TypeError for another, as of another library's version."""
    found = list(modules)
    if others := {type(m).__name__ for m in found if not isinstance(m, kind)}:
        raise TypeError(f"{kind.__name__} expected, found {sorted(others)}")
    return [module for module in found if isinstance(module, kind)]


class DelayDecoder:
    """Embedding, layers and heads as separate steps; counts layer evaluations.

    A library gives the methods without a body. `tables` [card + 1, d] are its token embeddings, one
    for each codebook; row `card` is the special id.
    """

    def __init__(
        self, tables: Iterable[nn.Module], layers: nn.ModuleList, norm: nn.Module,
        heads: Iterable[nn.Module], device: torch.device,
    ) -> None:  # fmt: skip
        self.tables, self.heads = modules_of(nn.Embedding, tables), list(heads)
        self.layers, self.norm, self.device = layers, norm, device
        self.num_codebooks, self.num_layers, self.calls = len(self.heads), len(layers), 0
        self.dtype: torch.dtype = next(self.heads[0].parameters()).dtype

    def embed_positions(self, ids: Tensor, past: int, width: int) -> Tensor:
        """Embed the positions of ids [rows, K, S]: [S, d] or [1, S, d]."""
        raise NotImplementedError

    def context(self, hidden: Tensor, text: Tensor, text_mask: Tensor) -> Context:
        """Prepare masks, positions and T5 states [rows, L, d_text] for hidden [rows, S, d]."""
        raise NotImplementedError

    def layer(
        self, index: int, hidden: Tensor, context: Context, cross: Cross | None = None
    ) -> Tensor:
        """Run layer `index` on hidden [rows, S, d]; `cross` edits its cross-attention output."""
        raise NotImplementedError

    def steps(
        self, text: Tensor, text_mask: Tensor, positions: int
    ) -> AbstractContextManager[Step]:
        """Give the step function of a generation of `positions` positions.

        `text` [rows, L, d_text], `text_mask` [rows, L]. Keys and values are kept until the block
        ends.
        """
        raise NotImplementedError

    def embed(self, ids: Tensor, past: int = 0) -> Tensor:
        """Turn ids [rows, K, S] into the input of layer 0 [rows, S, d]."""
        tokens = sum(table(ids[:, k]) for k, table in enumerate(self.tables))
        return tokens + self.embed_positions(ids, past, tokens.shape[-1]).to(tokens)

    def logits(self, hidden: Tensor, frames: int | None) -> Tensor:
        """Run final norm and heads: [rows, S, d] to [rows, K, frames, card], aligned to the codes.

        Only positions that predict a code go through a head. `frames` None: all positions, as is.
        With a device map the heads may be spread: their answers come together on `device`.
        """
        hidden = self.norm(hidden)
        read = (hidden if frames is None else hidden[:, k : k + frames]
                for k in range(self.num_codebooks))  # fmt: skip
        heads = zip(self.heads, read, strict=True)
        return torch.stack([head(span).to(self.device) for head, span in heads], 1)


class DelayPatternModel(LayerwiseModel[DelayDecoder]):
    """`LanguageModel` over K parallel codebooks in the delay pattern.

    `special` is the id that fills the start column and the corners of the pattern.
    """

    tokenizer: PreTrainedTokenizerBase
    text_encoder: PreTrainedModel
    has_cross_attention = True
    num_position_groups = 2
    plain_sampling = {"guidance_scale": 1.0, "top_k": 0}

    def __init__(
        self, name: str, decoder: DelayDecoder, *, special: int, guidance_scale: float,
        sample_rate: int, frame_rate: float, width: int, card: int,
    ) -> None:  # fmt: skip
        super().__init__(
            name, decoder, device=decoder.device, sample_rate=sample_rate, frame_rate=frame_rate,
            num_codebooks=decoder.num_codebooks, width=width, card=card,
        )  # fmt: skip
        self.special, self.guidance_scale = special, guidance_scale

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """T5 states [B, L, d_text] in the decoder's dtype and mask [B, L]; zeros for None.

        Both libraries use zeros for the unconditional half of guidance.
        """
        known = [i for i, caption in enumerate(captions) if caption is not None]
        count, device = len(captions), self.device
        if not known:
            text = torch.zeros(count, 1, self.text_encoder.config.hidden_size, device=device)
            mask = torch.zeros(count, 1, dtype=torch.int64, device=device)
            return text.to(self.decoder.dtype), mask
        given = [captions[i] for i in known]
        tokens = self.tokenizer(given, padding=True, return_tensors="pt").to(self.device)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        states = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        text = states.new_zeros(count, *states.shape[1:])
        text_mask = mask.new_zeros(count, mask.shape[1])
        text[known], text_mask[known] = states, mask
        return text.to(self.decoder.dtype), text_mask

    def sequence(self, batch: Batch) -> Tensor:
        """Decoder input ids [B, K, S]: start column and delay pattern, S = T + K - 1.

        The last column is predicted, never fed. (With one codebook it is fed too: frame T - 1 has
        its position there.)
        """
        sequence = delayed(batch.codes, self.special)
        return sequence[..., : max(batch.frames + self.num_codebooks - 1, batch.frames + 1)]

    def context(self, hidden: Tensor, batch: Batch) -> Context:
        return self.decoder.context(hidden, batch.text, batch.text_mask)

    def position_groups(self, batch: Batch) -> Tensor:
        """[B, S]: 0 the start column, 1 frames, -1 the tail of the delay pattern."""
        groups = torch.full((len(batch), self.sequence(batch).shape[-1]), -1, device=self.device)
        groups[:, 0], groups[:, 1 : batch.frames + 1] = 0, 1
        return groups

    def at_frames(self, stream: Tensor, frames: int) -> Tensor:
        return stream[:, 1 : frames + 1]

    def places(self, book: int, frames: int) -> slice:
        return slice(book + 1, book + 1 + frames)

    def table(self, book: int) -> Tensor:
        return self.decoder.tables[book].weight[: self.card]

    @torch.no_grad()
    def generate(
        self,
        captions: Sequence[str | None],
        seconds: float,
        seed: int,
        hooks: Hooks = None,
        guidance_scale: float | None = None,
        temperature: float = 1.0,
        top_k: int = 250,
    ) -> tuple[Tensor, Tensor]:
        """Draw audio [B, n] and codes [B, K, T] for B captions, T = round(seconds * frame rate).

        Classifier-free guidance: logits = u + guidance_scale * (c - u). The decoder then runs 2B
        rows, [conditional; unconditional]; hooks get both, and `conditional_rows` (slice(0, B))
        tells them apart. With guidance_scale 1 only the B conditional rows run.

        Hooks get [rows, 1, d] and the position of the step [1], each position once, 0..T+K-2. One
        draw per row and codebook comes from a generator of `seed`: the same seed gives the same
        tokens bit for bit, and hooks that change nothing change no token. Global random state is
        neither read nor written.

        Not transformers' `generate()`, which runs the first decoder step twice, draws from the
        global random state and takes several times as long. Tests hold greedy tokens equal to its
        tokens, and drawn ones to the distribution of its samplers. ValueError for a bad request.
        """
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        frames = self._frames(captions, seconds, temperature, top_k, scale)
        generator = torch.Generator(self.device).manual_seed(seed)
        text, text_mask = self.encode_text(captions)
        guided = scale != 1
        if guided:
            text = torch.cat([text, torch.zeros_like(text)])
            text_mask = torch.cat([text_mask, torch.zeros_like(text_mask)])
        decoder, wanted, books = self.decoder, self.known(hooks), self.num_codebooks
        sequence = torch.full(
            (len(captions), books, frames + books), self.special, device=self.device
        )
        steps = frames + books - 1
        rows = slice(0, len(captions)) if guided else slice(None)
        with self._conditional(rows), decoder.steps(text, text_mask, steps) as advance:
            for step in range(steps):
                ids = sequence[:, :, step : step + 1]
                hidden = advance(ids.repeat(2, 1, 1) if guided else ids, wanted)
                scores = decoder.logits(hidden, None)[:, :, 0].float()
                if guided:
                    conditional, unconditional = scores.chunk(2)
                    scores = unconditional + (conditional - unconditional) * scale
                drawn = sample(scores, temperature, top_k, generator)
                # Codebook k of frame t is predicted at t + k: the pattern's corners stay special.
                now = slice(max(0, step - frames + 1), min(books, step + 1))
                sequence[:, now, step + 1] = drawn[:, now]
        codes = undelayed(sequence)
        return self.decode(codes), codes
