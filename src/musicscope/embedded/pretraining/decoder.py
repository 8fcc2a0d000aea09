"""Train a MusicGen decoder (Copet et al., arXiv 2306.05284) on codec tokens, on CPU or GPU.

The decoder sees what generation will show it: a start column, then codes in the delay pattern.
Captions are dropped at random, so that classifier-free guidance has an unconditional half.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    EncodecModel,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    T5EncoderModel,
)

from musicscope.core.seeding import seed_for
from musicscope.embedded.pretraining.codec import clip_gradients, learning_rate
from musicscope.embedded.pretraining.cuda_graph import Graph


@dataclass(frozen=True)
class DecoderConfig:
    """Architecture and schedule of one decoder."""

    width: int
    layers: int
    heads: int
    batch: int = 4
    """Clips per step."""
    crops: tuple[tuple[int, float], ...] = ((1, 0.5), (4, 0.25), (20, 0.25))
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


LENGTH_MARGIN = 1024  # positions the sinusoidal table holds at first; it grows on demand
EMBEDDING_RMS = 0.35  # eight embeddings then sum to about the size of the position's sinusoids
HEAD_RMS = 0.02
SIZES = {
    "nano-small": DecoderConfig(width=160, layers=6, heads=5),
    "nano-medium": DecoderConfig(width=256, layers=8, heads=8, learning_rate=4e-3),
}


@dataclass(frozen=True)
class TokenSet:
    """Clips as tokens, with their captions' token ids; all on one device."""

    codes: Tensor
    """uint16 values as int16 [clips, K, frames]."""
    states: Tensor
    """The text encoder's output per clip, bfloat16 [clips, L, d]; anything where the mask is 0."""
    mask: Tensor
    """1 where a state belongs to the caption, [clips, L]."""

    def __len__(self) -> int:
        return len(self.codes)


def build_musicgen(
    codec: EncodecModel, text: T5EncoderModel, config: DecoderConfig, seed: int
) -> MusicgenForConditionalGeneration:
    """A MusicGen around the given codec and text encoder, with a fresh decoder."""
    torch.manual_seed(seed_for(seed, "decoder-init", config.width, config.layers))
    card, books = codec.config.codebook_size, codec.config.num_quantizers
    decoder = MusicgenDecoderConfig(
        vocab_size=card, max_position_embeddings=LENGTH_MARGIN, num_hidden_layers=config.layers,
        ffn_dim=4 * config.width, num_attention_heads=config.heads, hidden_size=config.width,
        num_codebooks=books, audio_channels=1, dropout=0.0, pad_token_id=card, bos_token_id=card,
        eos_token_id=None, initializer_factor=0.02,
    )  # fmt: skip
    # transformers 5 dropped this field from the class, but forward(labels=...) reads it.
    decoder.decoder_start_token_id = card
    model = MusicgenForConditionalGeneration(
        MusicgenConfig(text_encoder=text.config, audio_encoder=codec.config, decoder=decoder)
    )
    model.audio_encoder.load_state_dict(codec.state_dict())
    model.text_encoder.load_state_dict(text.state_dict())
    start_from_codebooks(model, seed)
    generation = model.generation_config
    generation.decoder_start_token_id = generation.bos_token_id = generation.pad_token_id = card
    generation.max_length, generation.do_sample = 503, True
    generation.guidance_scale = config.guidance_scale
    return model


@torch.no_grad()
def start_from_codebooks(model: MusicgenForConditionalGeneration, seed: int) -> None:
    """Give codes that sound alike embeddings and output weights that are alike.

    Each codebook's vectors are rotated at random into the residual stream, the same rotation for
    input and output. From random rows (0.02, far below the position's sinusoids) the decoder needs
    hundreds of steps to find out which of 1,024 codes resemble each other: after 120 steps the
    held-out cross-entropy of codebook 0 was 6.42 nats so and 6.19 from the codebooks.
    """
    generator = torch.Generator().manual_seed(seed_for(seed, "decoder-start"))
    width = model.decoder.config.hidden_size
    layers = model.audio_encoder.quantizer.layers
    for k in range(model.decoder.config.num_codebooks):
        codes = layers[k].codebook.embed
        card, latent = codes.shape
        rotation = torch.linalg.qr(
            torch.randn(max(width, latent), max(width, latent), generator=generator)
        )[0][:latent, :width]
        vectors = codes @ rotation
        vectors /= vectors.square().mean().sqrt().clamp_min(1e-12)
        embedding = model.decoder.model.decoder.embed_tokens[k].weight
        embedding.normal_(0.0, EMBEDDING_RMS, generator=generator)  # the filler's row stays so
        embedding[:card] = EMBEDDING_RMS * vectors
        model.decoder.lm_heads[k].weight.copy_(HEAD_RMS * vectors)


def delayed(codes: Tensor, filler: int) -> Tensor:
    """[B, K, T] codes -> [B, K, T + K] sequence: start column, then codebook k delayed by k."""
    batch, books, frames = codes.shape
    sequence = codes.new_full((batch, books, frames + books), filler)
    for k in range(books):
        sequence[:, k, 1 + k : 1 + k + frames] = codes[:, k]
    return sequence


@torch.no_grad()
def encode_captions(text: T5EncoderModel, ids: Tensor, mask: Tensor, batch: int = 256) -> Tensor:
    """States of TokenSet for padded caption ids [clips, L]. The text encoder is never trained."""
    return torch.cat([
        text(input_ids=i.long(), attention_mask=m.long()).last_hidden_state.bfloat16()
        for i, m in zip(ids.split(batch), mask.split(batch), strict=True)
    ])  # fmt: skip


class StackedMuon(torch.optim.Optimizer):
    """`torch.optim.Muon` for many matrices of few shapes at once.

    torch's takes one matrix after another: 25 small kernels for each of 60 to 80 matrices, which
    takes longer on a GPU than the rest of the step. Matrices of one shape go through it together
    here; the numbers are the same up to the order of sums.
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)
    STEPS = 5

    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.05,
        momentum: float = 0.95,
    ):  # fmt: skip
        """Learning rates are in units of AdamW's (`match_rms_adamw` of torch.optim.Muon)."""
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for matrix in matrices:
            shapes.setdefault(matrix.shape, []).append(matrix)
        groups = [{"params": alike} for alike in shapes.values()]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update all matrices from their gradients; nothing here waits for the device."""
        for group in self.param_groups:
            matrices: list[nn.Parameter] = group["params"]
            gradient = torch.stack([m.grad for m in matrices if m.grad is not None])
            mean = self.state[matrices[0]].setdefault("mean", torch.zeros_like(gradient))
            mean.lerp_(gradient, 1 - group["momentum"])
            update = self._orthogonal(gradient.lerp(mean, group["momentum"])).to(gradient.dtype)
            rate = group["lr"] * 0.2 * math.sqrt(max(gradient.shape[1:]))
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(matrices, list(update.unbind()), alpha=-rate)

    @classmethod
    def _orthogonal(cls, x: Tensor) -> Tensor:
        """Newton-Schulz iteration in bfloat16 on each of x [n, rows, columns]."""
        tall = x.shape[1] > x.shape[2]
        x = (x.mT if tall else x).bfloat16()
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
        a, b, c = cls.COEFFICIENTS
        for _ in range(cls.STEPS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.mT if tall else x


def make_optimisers(
    model: MusicgenForConditionalGeneration, rate: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, heads and norms.

    Orthogonalised updates (Jordan, 2024) need about half of AdamW's steps in short runs.
    """
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, value in trained_parameters(model).items():
        (matrices if ".layers." in name and value.ndim == 2 else rest).append(value)
    adam = torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [StackedMuon(matrices, lr=rate), adam]


def trained_parameters(model: MusicgenForConditionalGeneration) -> dict[str, nn.Parameter]:
    """The decoder and the projection of the text states, by name."""
    return {
        name: value for name, value in model.named_parameters()
        if name.startswith(("decoder.", "enc_to_dec_proj"))
    }  # fmt: skip


def decoder_states(
    model: MusicgenForConditionalGeneration, inputs: Tensor, states: Tensor, mask: Tensor
) -> Tensor:
    """Hidden states [B, S, width] before the heads, as the decoder's own forward gives them.

    The layers are called one by one, because that forward copies positions from the host and looks
    at the masks, which a CUDA graph cannot hold. Without a mask, attention is causal by itself.

    Args:
        inputs: int64 [B, K, S], at most as long as the table of positions.
        states: projected text states [B, L, width].
        mask: bool [B, L], true somewhere in each row.
    """
    decoder = model.decoder.model.decoder
    hidden = decoder.embed_positions.weights[: inputs.shape[2]]
    for k, embed in enumerate(decoder.embed_tokens):
        hidden = hidden + embed(inputs[:, k])
    visible = mask[:, None, None].expand(-1, -1, inputs.shape[2], -1)
    for layer in decoder.layers:
        hidden = layer(
            hidden, encoder_hidden_states=states, encoder_attention_mask=visible, use_cache=False
        )
    return decoder.layer_norm(hidden)


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
        hidden = decoder_states(model, inputs, states, mask.bool())
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
    `progress` in [0, 1], which the caller takes from steps or from time. On a GPU forward and
    backward pass are captured as a CUDA graph, one per length of crops.
    """

    def __init__(
        self, config: DecoderConfig, codec: EncodecModel, text: T5EncoderModel, seed: int,
        device: str | torch.device, graphs: bool = True,
    ):  # fmt: skip
        self.config, self.seed, self.device = config, seed, torch.device(device)
        self.capturing = graphs and self.device.type == "cuda"
        self.model = build_musicgen(codec, text, config, seed).to(self.device)
        self.model.text_encoder.requires_grad_(False).eval()
        self.model.audio_encoder.requires_grad_(False).eval()
        self.model.decoder.train()
        self.trained = trained_parameters(self.model)
        self.optimisers = make_optimisers(self.model, config.learning_rate)
        self.average = {n: p.detach().clone() for n, p in self.trained.items()}
        self.step_count = 0
        self.graphs: dict[torch.Size, Graph[Tensor]] = {}

    @torch.no_grad()
    def take_over(self, earlier: MusicgenForConditionalGeneration) -> None:
        """Start from the decoder of a model of the same size, codec and text encoder."""
        found = dict(earlier.named_parameters())
        for name, value in self.trained.items():
            value.copy_(found[name])
            self.average[name].copy_(found[name])

    def _loss(self, codes: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """`decoder_loss` for states that are not projected yet; zero where the mask is."""
        with torch.autocast(codes.device.type, torch.bfloat16):
            if hasattr(self.model, "enc_to_dec_proj"):
                states = self.model.enc_to_dec_proj(states)
        return decoder_loss(self.model, codes, states * mask[..., None], mask)

    def draw(self, tokens: TokenSet) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [n, K, T], text states and masks of the next step; captions dropped at random."""
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
        return codes, tokens.states[rows, : mask.shape[1]], mask * keep[:, None]

    def step(self, tokens: TokenSet, progress: float) -> Tensor:
        """Train on one batch; cross-entropy per codebook [K] as a tensor (no waiting)."""
        rate = self.config.learning_rate * learning_rate(
            progress, self.step_count, self.config.warmup_steps
        )
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
        batch = self.draw(tokens)
        losses = self._replay(batch) if self.capturing else self._backward(*batch)
        for optimiser in self.optimisers:
            optimiser.step()
        decay = self.config.average_decay if progress >= self.config.average_from else 0.0
        with torch.no_grad():
            torch._foreach_lerp_(
                [self.average[n] for n in self.trained],
                [p.detach() for p in self.trained.values()], 1 - decay,
            )  # fmt: skip
        self.step_count += 1
        return losses

    def _backward(self, codes: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """Losses of a batch; leaves clipped gradients in the parameters."""
        for value in self.trained.values():
            value.grad = None
        losses = self._loss(codes, states, mask)
        losses.mean().backward()
        clip_gradients(self.trained.values())
        return losses.detach()

    def _replay(self, batch: tuple[Tensor, ...]) -> Tensor:
        """`_backward` as a CUDA graph; without one if the device refuses to record it."""
        key = batch[0].shape
        if key not in self.graphs:
            try:
                self.graphs[key] = Graph(self._backward, batch, list(self.trained.values()))
            except RuntimeError as error:
                print(f"no CUDA graph ({error}); each kernel is launched", file=sys.stderr)
                self.capturing = False
                return self._backward(*batch)
        return self.graphs[key](*batch)

    @torch.no_grad()
    def evaluate(self, tokens: TokenSet, batch: int = 32) -> Tensor:
        """Cross-entropy per codebook [K] of the averaged weights on whole clips with captions."""
        live = {n: p.detach().clone() for n, p in self.trained.items()}
        self.model.load_state_dict(self.average, strict=False)
        losses = []
        for at in range(0, len(tokens), batch):
            part = slice(at, at + batch)
            codes, mask = tokens.codes[part].long(), tokens.mask[part].long()
            losses.append(self._loss(codes, tokens.states[part], mask) * len(codes) / len(tokens))
        self.model.load_state_dict(live, strict=False)
        return torch.stack(losses).sum(0)

    def state(self) -> dict[str, object]:
        """Everything that a resumed run needs; loads with `torch.load(weights_only=True)`."""
        return {
            "weights": {n: p.detach() for n, p in self.trained.items()},
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
