"""Train a nano MusicGen decoder (Copet et al., arXiv 2306.05284) on codes of rendered clips.

The decoder sees what generation will show it: a start column, then codes in the delay pattern.
Captions are dropped at random, so that classifier-free guidance has an unconditional half.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    EncodecModel,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    T5EncoderModel,
)

from musicscope.core.seeding import seed_for
from musicscope.embedded.nano.codec_training import cosine

LENGTH_MARGIN = 1024  # positions the sinusoidal table holds at first; it grows on demand
EMBEDDING_RMS = 0.35  # eight embeddings then sum to about the size of the position's sinusoids
HEAD_RMS = 0.02
SHORT_CROP = 4  # a short crop is a quarter of a clip, so that four times as many fit a batch


@dataclass(frozen=True)
class DecoderConfig:
    """Architecture and schedule of one decoder."""

    width: int
    layers: int
    heads: int
    steps: int = 3000
    batch: int = 4
    """Clips a step."""
    short_crops: float = 0.5
    """Share of the steps that take four times as many crops of a quarter of a clip instead.
    The caption tells most at the start of a sequence, where nothing has been heard yet."""
    learning_rate: float = 8e-3
    caption_dropout: float = 0.15
    ema_from: float = 0.8
    guidance_scale: float = 3.0
    """Saved as the model's own default for generation."""


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


def decoder_loss(model, codes: Tensor, states: Tensor, mask: Tensor, bfloat16: bool) -> Tensor:
    """Mean cross-entropy per codebook, [K] nats; fillers are not scored."""
    books, card = codes.shape[1], model.decoder.config.vocab_size
    sequence = delayed(codes, card)
    inputs, targets = sequence[..., :-1], sequence[..., 1:]
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
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


def make_optimisers(model, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, heads and norms.

    Orthogonalised updates (Jordan, 2024) need about half of AdamW's steps in short runs.
    """
    matrices, rest = (
        [],
        [*model.enc_to_dec_proj.parameters()] if hasattr(model, "enc_to_dec_proj") else [],
    )
    for name, value in model.decoder.named_parameters():
        inner = ".layers." in name and value.ndim == 2
        (matrices if inner else rest).append(value)
    return [
        torch.optim.Muon(
            matrices, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def draw_batch(
    codes: np.ndarray, config: DecoderConfig, seed: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """Clip numbers [n] and codes [n, K, T] of a step: a function of (seed, step) alone.

    Clips come in a fresh random order every epoch; n and T are `batch` whole clips or, in a share
    `short_crops` of the steps, SHORT_CROP times as many crops of a SHORT_CROP-th of a clip.
    """
    per_epoch = len(codes) // config.batch
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng(seed_for(seed, "decoder-epoch", epoch)).permutation(len(codes))
    rng = np.random.default_rng(seed_for(seed, "decoder-crops", step))
    frames = codes.shape[-1]
    if rng.random() >= config.short_crops or frames < SHORT_CROP:
        rows = order[place * config.batch : (place + 1) * config.batch]
        return rows, codes[rows]
    rows = rng.integers(len(codes), size=SHORT_CROP * config.batch)
    length = frames // SHORT_CROP
    starts = rng.integers(frames - length + 1, size=len(rows))
    return rows, np.stack([codes[r][:, s : s + length] for r, s in zip(rows, starts, strict=True)])


def train_decoder(
    model: MusicgenForConditionalGeneration, codes: np.ndarray, states: Tensor, masks: Tensor,
    config: DecoderConfig, seed: int, checkpoint: Path,
    report: Callable[[int, dict[str, float]], None], checkpoint_every: int = 100,
    bfloat16: bool = True,
) -> MusicgenForConditionalGeneration:  # fmt: skip
    """Train on codes [clips, K, T] with text states [clips, L, d] and masks [clips, L].

    Batches are a function of (seed, step), so a resumed run equals an unbroken one.
    """
    optimisers = make_optimisers(model, config.learning_rate)
    trained = {n: p for n, p in model.named_parameters()
               if n.startswith(("decoder.", "enc_to_dec_proj"))}  # fmt: skip
    average = {n: p.detach().clone() for n, p in trained.items()}
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["weights"], strict=False)
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        average, first = state["average"], state["step"]
    model.decoder.train()
    for step in range(first, config.steps):
        rows, crops = draw_batch(codes, config, seed, step)
        rng = np.random.default_rng(seed_for(seed, "decoder-dropout", step))
        keep = torch.from_numpy(rng.random(len(rows)) >= config.caption_dropout)
        text = states[rows] * keep[:, None, None]
        if hasattr(model, "enc_to_dec_proj"):
            text = model.enc_to_dec_proj(text)
        mask = masks[rows] * keep[:, None]
        text = text * mask[..., None]
        rate = cosine(step, config.steps, config.learning_rate, floor=0.02)
        for optimiser in optimisers:
            optimiser.param_groups[0]["lr"] = rate
            optimiser.zero_grad(set_to_none=True)
        batch = torch.from_numpy(crops.astype(np.int64))
        losses = decoder_loss(model, batch, text, mask, bfloat16)
        loss = losses.mean()
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(f"loss is {float(loss)} at step {step}; lower learning_rate")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        decay = 0.0 if step < config.ema_from * config.steps else 0.99
        for name, value in trained.items():
            average[name].lerp_(value.detach(), 1 - decay)
        if (step + 1) % checkpoint_every == 0 or step + 1 == config.steps:
            temporary = checkpoint.with_suffix(".tmp")
            torch.save(
                {"weights": {n: p.detach() for n, p in trained.items()}, "average": average,
                 "optimisers": [o.state_dict() for o in optimisers], "step": step + 1},
                temporary,
            )  # fmt: skip
            temporary.replace(checkpoint)
        report(step + 1, {f"ce_{k}": float(v) for k, v in enumerate(losses.detach())})
    model.load_state_dict(average, strict=False)
    return model.eval()
