"""Train a MusicGen decoder (Copet et al., arXiv 2306.05284) on codec tokens, on CPU or GPU.

The decoder sees what generation will show it: a start column, then codes in the delay pattern.
Captions are dropped at random, so that classifier-free guidance has an unconditional half.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EncodecModel, MusicgenForConditionalGeneration, T5EncoderModel

from musicscope.core.seeding import seed_for
from musicscope.embedded.nano.decoder_training import build_musicgen, delayed, make_optimisers
from musicscope.embedded.pretraining.codec import clip_gradients, learning_rate


@dataclass(frozen=True)
class DecoderConfig:
    """Architecture and schedule of one decoder."""

    width: int
    layers: int
    heads: int
    batch: int = 4
    """Clips per step."""
    crops: tuple[tuple[int, float], ...] = ((1, 0.3), (4, 0.3), (20, 0.4))
    """(n, share of the steps that take n times as many crops, each a n-th of a clip). The caption
    tells most at the start of a sequence, before any code has been seen (docs/pretraining.md)."""
    learning_rate: float = 5e-3
    warmup_steps: int = 100
    caption_dropout: float = 0.15
    average_from: float = 0.6
    """Progress at which the running mean of the weights starts."""
    average_decay: float = 0.995
    guidance_scale: float = 3.0
    """Saved as the model's own default for generation."""


SIZES = {
    "nano-small": DecoderConfig(width=160, layers=6, heads=5),
    "nano-medium": DecoderConfig(width=256, layers=8, heads=8, learning_rate=4e-3),
}


@dataclass(frozen=True)
class TokenSet:
    """Clips as tokens, with their captions' token ids; all on one device."""

    codes: Tensor
    """uint16 values as int16 [clips, K, frames]."""
    ids: Tensor
    """Caption token ids [clips, L], padded with 0."""
    mask: Tensor
    """1 where an id is a token, [clips, L]."""

    def __len__(self) -> int:
        return len(self.codes)


def decoder_loss(model: MusicgenForConditionalGeneration, codes: Tensor, states: Tensor,
                 mask: Tensor) -> Tensor:  # fmt: skip
    """Mean cross-entropy per codebook, [K] nats; filler positions are not scored.

    Args:
        codes: int64 [B, K, T].
        states: projected text states [B, L, width].
        mask: [B, L]; a row of zeros is the unconditional half.
    """
    books, card = codes.shape[1], model.decoder.config.vocab_size
    # A GPU gives NaN where nothing may be attended to. The states of a dropped caption are zero,
    # and so is what attention reads from them.
    mask = mask.where(mask.any(1, keepdim=True), torch.ones_like(mask))
    sequence = delayed(codes, card)
    inputs, targets = sequence[..., :-1], sequence[..., 1:]
    with torch.autocast(codes.device.type, torch.bfloat16):
        hidden = model.decoder.model.decoder(
            input_ids=inputs.reshape(-1, inputs.shape[-1]), encoder_hidden_states=states,
            encoder_attention_mask=mask, use_cache=False,
        ).last_hidden_state  # fmt: skip
        losses = []
        for k in range(books):
            frames = slice(k, k + codes.shape[2])
            logits = model.decoder.lm_heads[k](hidden[:, frames])
            losses.append(
                F.cross_entropy(logits.float().flatten(0, 1), targets[:, k, frames].flatten())
            )
    return torch.stack(losses)


class DecoderTrainer:
    """Model, optimisers and running mean; one object that can be saved and resumed.

    Batches are a function of (seed, step) and of the number of clips. The schedule follows
    `progress` in [0, 1], which the caller takes from steps or from time.
    """

    def __init__(
        self, config: DecoderConfig, codec: EncodecModel, text: T5EncoderModel, seed: int,
        device: str | torch.device,
    ):  # fmt: skip
        self.config, self.seed, self.device = config, seed, torch.device(device)
        self.model = build_musicgen(codec, text, config, seed).to(self.device)
        self.model.text_encoder.requires_grad_(False).eval()
        self.model.audio_encoder.requires_grad_(False).eval()
        self.model.decoder.train()
        self.optimisers = make_optimisers(self.model, config.learning_rate)
        self.average = {n: p.detach().clone() for n, p in self._trained().items()}
        self.step_count = 0

    @torch.no_grad()
    def take_over(self, earlier: MusicgenForConditionalGeneration) -> None:
        """Start from the decoder of a model of the same size, codec and text encoder."""
        found = dict(earlier.named_parameters())
        for name, value in self._trained().items():
            value.copy_(found[name])
            self.average[name].copy_(found[name])

    def _trained(self) -> dict[str, nn.Parameter]:
        return {
            name: value for name, value in self.model.named_parameters()
            if name.startswith(("decoder.", "enc_to_dec_proj"))
        }  # fmt: skip

    def _states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Projected text states [B, L, width], zero where the mask is."""
        with torch.no_grad():
            states = self.model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        if hasattr(self.model, "enc_to_dec_proj"):
            states = self.model.enc_to_dec_proj(states)
        return states * mask[..., None]

    def draw(self, tokens: TokenSet) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [n, K, T], caption ids and masks of the next step; captions dropped at random."""
        config = self.config
        rng = np.random.default_rng(seed_for(self.seed, "decoder-step", self.step_count))
        frames = tokens.codes.shape[-1]
        parts, shares = zip(*config.crops, strict=True)
        part = int(rng.choice(parts, p=shares))
        length, count = frames // part, config.batch * part
        device = tokens.codes.device
        rows = torch.from_numpy(rng.integers(len(tokens), size=count)).to(device)
        starts = torch.from_numpy(rng.integers(frames - length + 1, size=count)).to(device)
        keep = torch.from_numpy(rng.random(count) >= config.caption_dropout).to(device)
        time = starts[:, None, None] + torch.arange(length, device=device)
        codes = tokens.codes[rows].gather(2, time.expand(-1, tokens.codes.shape[1], -1)).long()
        mask = tokens.mask[rows].long()
        if device.type == "cpu":  # padding costs time; a GPU is faster with one shape throughout
            mask = mask[:, : int(mask.sum(1).max())]
        return codes, tokens.ids[rows, : mask.shape[1]].long(), mask * keep[:, None]

    def step(self, tokens: TokenSet, progress: float) -> Tensor:
        """Train on one batch; cross-entropy per codebook [K] as a tensor (no waiting)."""
        rate = self.config.learning_rate * learning_rate(
            progress, self.step_count, self.config.warmup_steps
        )
        codes, ids, mask = self.draw(tokens)
        for optimiser in self.optimisers:
            optimiser.param_groups[0]["lr"] = rate
            optimiser.zero_grad(set_to_none=True)
        losses = decoder_loss(self.model, codes, self._states(ids, mask), mask)
        losses.mean().backward()
        trained = self._trained()
        clip_gradients(trained.values())
        for optimiser in self.optimisers:
            optimiser.step()
        decay = self.config.average_decay if progress >= self.config.average_from else 0.0
        with torch.no_grad():
            torch._foreach_lerp_(
                [self.average[n] for n in trained], [p.detach() for p in trained.values()],
                1 - decay,
            )  # fmt: skip
        self.step_count += 1
        return losses.detach()

    @torch.no_grad()
    def evaluate(self, tokens: TokenSet, batch: int = 32) -> Tensor:
        """Cross-entropy per codebook [K] of the averaged weights on whole clips with captions."""
        live = {n: p.detach().clone() for n, p in self._trained().items()}
        self.model.load_state_dict(self.average, strict=False)
        losses = []
        for at in range(0, len(tokens), batch):
            codes, ids, mask = (
                x[at : at + batch].long() for x in (tokens.codes, tokens.ids, tokens.mask)
            )
            part = decoder_loss(self.model, codes, self._states(ids, mask), mask)
            losses.append(part * len(codes) / len(tokens))
        self.model.load_state_dict(live, strict=False)
        return torch.stack(losses).sum(0)

    def state(self) -> dict[str, object]:
        """Everything that a resumed run needs; loads with `torch.load(weights_only=True)`."""
        return {
            "weights": {n: p.detach() for n, p in self._trained().items()},
            "average": self.average, "optimisers": [o.state_dict() for o in self.optimisers],
            "step": self.step_count,
        }  # fmt: skip

    def load(self, state: Mapping[str, object]) -> None:
        """Go on from `state`."""
        self.model.load_state_dict(state["weights"], strict=False)
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        for name, value in state["average"].items():
            self.average[name].copy_(value)
        self.step_count = state["step"]

    def finished(self) -> MusicgenForConditionalGeneration:
        """The whole model on the CPU with the averaged decoder weights."""
        model = self.model.cpu()
        model.load_state_dict({n: p.cpu() for n, p in self.average.items()}, strict=False)
        return model.eval()
