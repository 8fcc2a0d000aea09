"""Train a real EnCodec (Defossez et al., arXiv 2210.13438) on rendered music.

Multi-resolution log-mel and waveform losses, residual vector quantiser with EMA codebooks, k-means
start, straight-through gradients and dead-code revival. Training starts from an orthogonal lapped
transform (`codec_start`), so that the first codebooks already cluster latents worth keeping.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import EncodecConfig, EncodecModel

from musicscope.core.audio import mel_filterbank
from musicscope.core.seeding import seed_for
from musicscope.embedded.nano.codec_start import finish_weights, start_weights

MEL_SCALES = ((128, 12), (256, 24), (512, 48), (1024, 80), (2048, 128))
"""(window in samples, mel bands); hop is a quarter of the window."""
RELATIVE_FLOOR = 0.01  # of the batch's mean: what lies 40 dB below it is not heard
CODEBOOK_DECAY = 0.99
DEAD_BELOW = 0.02  # EMA of uses a step; a batch of 240 frames gives each of 1,024 codes 0.23


@dataclass(frozen=True)
class CodecConfig:
    """Architecture and schedule of the codec."""

    num_filters: int = 24
    upsampling_ratios: tuple[int, ...] = (4, 4, 4, 5)
    hidden_size: int = 64
    codebooks: int = 8
    codebook_size: int = 1024
    steps: int = 1000
    batch: int = 6
    crop: int = 12800
    """Samples a training crop."""
    learning_rate: float = 3e-4
    ema_from: float = 0.7
    """Share of training after which weights are averaged."""
    start_clips: int = 128
    """Clips that the first codebooks are fitted to; half of them give the components."""


def build_codec(config: CodecConfig) -> EncodecModel:
    """A 16 kHz mono EnCodec of 50 frames a second with random weights and zero codebooks."""
    kbps = config.codebooks * 50 * math.log2(config.codebook_size) / 1000
    return EncodecModel(
        EncodecConfig(
            target_bandwidths=[kbps], sampling_rate=16_000, audio_channels=1, normalize=False,
            hidden_size=config.hidden_size, num_filters=config.num_filters,
            num_residual_layers=1, upsampling_ratios=list(config.upsampling_ratios),
            # Reflection padding costs a fifth of a CPU step and changes only the clip's two ends.
            use_causal_conv=False, pad_mode="constant", codebook_size=config.codebook_size,
            num_lstm_layers=1,
        )
    )  # fmt: skip


@lru_cache
def _mel_basis(window: int, bands: int) -> tuple[Tensor, Tensor]:
    basis = mel_filterbank(16_000, window, bands)
    return torch.from_numpy(basis), torch.hann_window(window)


def mel_loss(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference of log10 mels over MEL_SCALES; y [B, samples] is the target."""
    total = x.new_zeros(())
    both = torch.cat([x, y])
    for window, bands in MEL_SCALES:
        basis, hann = _mel_basis(window, bands)
        spectrum = torch.stft(
            both, window, window // 4, window=hann.to(both), return_complex=True
        ).abs()
        mel = torch.einsum("fm,bft->bmt", basis.to(both), spectrum)
        logs = (mel + RELATIVE_FLOOR * mel[len(x) :].mean()).log10()
        total = total + (logs[: len(x)] - logs[len(x) :]).abs().mean()
    return total / len(MEL_SCALES)


def kmeans(points: Tensor, k: int, generator: torch.Generator, iterations: int = 10) -> Tensor:
    """Lloyd's algorithm from a random subset; empty clusters are refilled with random points."""
    centres = points[torch.randperm(len(points), generator=generator)[:k]].clone()
    for _ in range(iterations):
        nearest = nearest_code(points, centres)
        counts = torch.bincount(nearest, minlength=k).to(points)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = sums / counts.clamp_min(1)[:, None]
        empty = counts == 0
        picks = torch.randint(len(points), (int(empty.sum()),), generator=generator)
        centres[empty] = points[picks]
    return centres


def nearest_code(points: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest row of `codebook` for each row of `points` (Euclidean)."""
    return (codebook.square().sum(1) - 2 * points @ codebook.T).argmin(1)


class CodebookTrainer:
    """EMA updates of the residual codebooks inside an EncodecModel (van den Oord et al., 2017)."""

    def __init__(self, codec: EncodecModel, generator: torch.Generator, frames_per_step: int):
        self.books = [layer.codebook for layer in codec.quantizer.layers]
        self.generator = generator
        self.frames_per_step = frames_per_step

    @torch.no_grad()
    def start(self, latents: Tensor) -> None:
        """k-means of each level on the residual that the level before leaves; latents [N, D]."""
        residual = latents
        for book in self.books:
            centres = kmeans(residual, book.codebook_size, self.generator)
            nearest = nearest_code(residual, centres)
            counts = torch.bincount(nearest, minlength=len(centres)).to(centres)
            book.embed.copy_(centres)
            book.cluster_size.copy_(counts / len(latents) * self.frames_per_step)
            book.embed_avg.copy_(centres * book.cluster_size[:, None])
            residual = residual - centres[nearest]

    def quantise(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise [B, T, D] with all codebooks and update them.

        Returns:
            Straight-through latents [B, T, D] and the commitment loss.
        """
        batch, frames, width = latents.shape
        residual = latents.detach().reshape(-1, width)
        total = torch.zeros_like(residual)
        spread = latents.detach().var()  # so that the latents' scale does not matter
        commitment = latents.new_zeros(())
        for book in self.books:
            nearest = nearest_code(residual, book.embed)
            chosen = F.embedding(nearest, book.embed)
            self._update(book, residual, nearest)
            total, residual = total + chosen, residual - chosen
            target = total.view(batch, frames, width)
            commitment = commitment + F.mse_loss(latents, target) / spread
        quantised = total.view(batch, frames, width)
        return latents + (quantised - latents).detach(), commitment / len(self.books)

    @torch.no_grad()
    def _update(self, book, points: Tensor, nearest: Tensor) -> None:
        counts = torch.bincount(nearest, minlength=book.codebook_size).to(points)
        sums = torch.zeros_like(book.embed_avg).index_add_(0, nearest, points)
        book.cluster_size.mul_(CODEBOOK_DECAY).add_(counts, alpha=1 - CODEBOOK_DECAY)
        book.embed_avg.mul_(CODEBOOK_DECAY).add_(sums, alpha=1 - CODEBOOK_DECAY)
        dead = book.cluster_size < DEAD_BELOW
        if bool(dead.any()):
            picks = torch.randint(len(points), (int(dead.sum()),), generator=self.generator)
            book.cluster_size[dead] = 10 * DEAD_BELOW
            book.embed_avg[dead] = points[picks] * 10 * DEAD_BELOW
        book.embed.copy_(book.embed_avg / book.cluster_size[:, None])


def cosine(step: int, steps: int, peak: float, floor: float = 0.03, warmup: int = 100) -> float:
    """Linear warm-up, then cosine decay to `floor` x `peak`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    phase = (step - warmup) / max(steps - warmup, 1)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(phase, 1.0))))


def random_crops(corpus: np.ndarray, config: CodecConfig, seed: int, step: int) -> Tensor:
    """Crops [batch, crop] of random clips, a function of (seed, step) only: resuming is exact."""
    rng = np.random.default_rng(seed_for(seed, "codec-batch", step))
    rows = rng.integers(len(corpus), size=config.batch)
    starts = rng.integers(corpus.shape[1] - config.crop + 1, size=config.batch)
    gains = 10 ** (rng.uniform(-6, 6, size=config.batch) / 20)
    crops = [
        corpus[r, s : s + config.crop].astype(np.float32) * np.float32(g)
        for r, s, g in zip(rows, starts, gains, strict=True)
    ]
    return torch.from_numpy(np.stack(crops)).clamp(-1, 1)


def sample_audio(corpus: np.ndarray, seed: int, clips: int, samples: int = 48_000) -> Tensor:
    """The first `samples` of random clips, to fit components and codebooks to; [clips, samples]."""
    rows = np.random.default_rng(seed_for(seed, "codec-start")).integers(len(corpus), size=clips)
    return torch.from_numpy(corpus[np.sort(rows), :samples].astype(np.float32))


def train_codec(
    corpus: np.ndarray, config: CodecConfig, seed: int, checkpoint: Path,
    report: Callable[[int, dict[str, float]], None], checkpoint_every: int = 250,
    bfloat16: bool = True,
) -> EncodecModel:  # fmt: skip
    """Train on `corpus` [clips, samples]; goes on from `checkpoint` if that file exists."""
    torch.manual_seed(seed_for(seed, "codec-init"))
    codec = build_codec(config)
    start_weights(codec, sample_audio(corpus, seed, config.start_clips // 2))
    generator = torch.Generator().manual_seed(seed_for(seed, "codec-books"))
    books = CodebookTrainer(codec, generator, config.batch * config.crop // 320)
    optimiser = torch.optim.AdamW(
        codec.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    average = {k: v.detach().clone() for k, v in codec.named_parameters()}
    first = 0
    if not checkpoint.exists():
        with torch.no_grad():
            latents = codec.encoder(sample_audio(corpus, seed, config.start_clips)[:, None])
        books.start(latents.transpose(1, 2).flatten(0, 1))
    else:
        state = torch.load(checkpoint, weights_only=True)
        codec.load_state_dict(state["codec"])
        optimiser.load_state_dict(state["optimiser"])
        generator.set_state(state["generator"])
        average, first = state["average"], state["step"]
    for step in range(first, config.steps):
        for group in optimiser.param_groups:
            group["lr"] = cosine(step, config.steps, config.learning_rate)
        losses = codec_step(codec, books, optimiser, config, corpus, seed, step, bfloat16)
        fraction = step / config.steps
        decay = 0.0 if fraction < config.ema_from else 0.997
        for name, value in codec.named_parameters():
            average[name].lerp_(value.detach(), 1 - decay)
        if (step + 1) % checkpoint_every == 0 or step + 1 == config.steps:
            temporary = checkpoint.with_suffix(".tmp")
            torch.save(
                {"codec": codec.state_dict(), "optimiser": optimiser.state_dict(),
                 "generator": generator.get_state(), "average": average, "step": step + 1},
                temporary,
            )  # fmt: skip
            temporary.replace(checkpoint)
        report(step + 1, losses)
    codec.load_state_dict({**codec.state_dict(), **average})
    return finish_weights(codec)


def codec_step(
    codec, books, optimiser, config: CodecConfig, corpus, seed: int, step: int, bfloat16: bool
) -> dict[str, float]:
    """One optimiser step; returns its losses."""
    audio = random_crops(corpus, config, seed, step)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        latents = codec.encoder(audio[:, None])
    latents = latents.float().transpose(1, 2)
    latents, commitment = books.quantise(latents)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        decoded = codec.decoder(latents.transpose(1, 2))
    decoded = decoded.float()[:, 0, : audio.shape[1]]
    # Over the batch, not per item: a crop that is nearly silent must not outweigh the others.
    waveform = (decoded - audio).abs().mean() / audio.abs().mean().clamp_min(1e-4)
    mel = mel_loss(decoded, audio)
    loss = 2.0 * mel + 0.5 * waveform + 0.1 * commitment
    if not bool(torch.isfinite(loss)):
        raise FloatingPointError(f"codec loss is {float(loss)} at step {step}; lower learning_rate")
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
    optimiser.step()
    losses = {"mel": mel, "waveform": waveform, "commitment": commitment}
    return {name: float(value.detach()) for name, value in losses.items()}
