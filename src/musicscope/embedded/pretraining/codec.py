"""Train an EnCodec with residual vector quantisation on CPU or GPU.

Architecture and losses follow EnCodec (Defossez et al., arXiv 2210.13438): multi-resolution mel and
waveform losses, an STFT discriminator with feature matching, EMA codebooks with revival of unused
codes. Training starts from an orthogonal lapped transform (`pretraining.mdct_start`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EncodecConfig, EncodecModel

from musicscope.embedded.pretraining.codec_losses import (
    SAMPLE_RATE,
    STFTDiscriminator,
    balanced_gradient,
    discriminator_loss,
    feature_loss,
    generator_loss,
    mel_loss,
    waveform_loss,
)
from musicscope.embedded.pretraining.cuda_graph import Graph
from musicscope.embedded.pretraining.mdct_start import finish_weights, start_weights

HOP = 320  # samples per frame: 50 frames per second
CODEBOOK_DECAY = 0.99
DEAD_BELOW = 0.1
"""A code whose running count falls below this share of an even share is replaced."""


@dataclass(frozen=True)
class CodecConfig:
    """Architecture and loss weights of the codec."""

    num_filters: int = 24
    upsampling_ratios: tuple[int, ...] = (4, 4, 4, 5)
    hidden_size: int = 64
    codebooks: int = 4
    codebook_size: int = 1024
    batch: int = 8
    """Crops per step."""
    crop: int = 16_000
    """Samples per crop; a multiple of 320."""
    learning_rate: float = 3e-4
    warmup_steps: int = 100
    adversarial_from: float = 0.35
    """Progress at which the discriminator starts."""
    average_from: float = 0.5
    """Progress at which the running mean of the weights starts."""
    average_decay: float = 0.998
    weights: tuple[tuple[str, float], ...] = (
        ("mel", 1.0), ("waveform", 1.0), ("generator", 0.5), ("feature", 0.5),
    )  # fmt: skip
    """Share of each loss in the gradient at the decoded audio (`balanced_gradient`)."""
    commitment_weight: float = 0.1
    scale_weight: float = 0.1
    """Of `scale_loss`."""
    discriminator_channels: int = 16


def build_codec(config: CodecConfig) -> EncodecModel:
    """Build a 16 kHz mono EnCodec at 50 frames per second with random weights."""
    kbps = config.codebooks * 50 * math.log2(config.codebook_size) / 1000
    return EncodecModel(
        EncodecConfig(
            target_bandwidths=[kbps], sampling_rate=SAMPLE_RATE, audio_channels=1, normalize=False,
            hidden_size=config.hidden_size, num_filters=config.num_filters,
            num_residual_layers=1, upsampling_ratios=list(config.upsampling_ratios),
            # Reflection padding costs a fifth of a CPU step and changes only the clip's two ends.
            use_causal_conv=False, pad_mode="constant", codebook_size=config.codebook_size,
            num_lstm_layers=1,
        )
    )  # fmt: skip


# --- quantiser --------------------------------------------------------------------------------


def nearest_code(points: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest row of `codebook` per row of `points` (Euclidean)."""
    return (codebook.square().sum(1) - 2 * points @ codebook.T).argmin(1)


def _count(nearest: Tensor, codebook: Tensor) -> Tensor:
    """Uses of each row of `codebook`; torch.bincount would wait for the GPU."""
    ones = torch.ones_like(nearest, dtype=codebook.dtype)
    return torch.zeros_like(codebook[:, 0]).index_add_(0, nearest, ones)


def kmeans(points: Tensor, k: int, generator: torch.Generator, iterations: int = 10) -> Tensor:
    """Lloyd's algorithm from a random subset; an empty cluster takes a random point."""
    centres = points[_draw(len(points), k, generator, points.device)]
    for _ in range(iterations):
        nearest = nearest_code(points, centres)
        counts = _count(nearest, centres)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        spare = points[_draw(len(points), k, generator, points.device)]
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], spare)
    return centres


def _draw(n: int, count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """`count` row numbers below `n`; a GPU draws from its own generator, as its graphs must."""
    if device.type == "cuda":
        return torch.randint(n, (count,), device=device)
    return torch.randint(n, (count,), generator=generator)


class CodebookTrainer:
    """Update the codebooks inside an EncodecModel by running means (van den Oord et al., 2017)."""

    def __init__(self, codec: EncodecModel, generator: torch.Generator, frames_per_step: int):
        self.books = [layer.codebook for layer in codec.quantizer.layers]
        self.generator = generator
        self.frames_per_step = frames_per_step

    @torch.no_grad()
    def start(self, latents: Tensor) -> None:
        """Fit each codebook by k-means to the residual of those before it; latents [N, D]."""
        residual = latents
        for book in self.books:
            centres = kmeans(residual, book.codebook_size, self.generator)
            nearest = nearest_code(residual, centres)
            counts = _count(nearest, centres)
            book.embed.copy_(centres)
            book.cluster_size.copy_(counts / len(latents) * self.frames_per_step)
            book.embed_avg.copy_(centres * book.cluster_size[:, None])
            residual = residual - centres[nearest]

    def quantise(self, latents: Tensor, update: bool = True) -> tuple[Tensor, Tensor]:
        """Quantise latents [B, T, D] with all codebooks and, unless told not to, update them.

        Returns:
            Straight-through latents [B, T, D], and the commitment loss relative to their variance.
        """
        batch, frames, width = latents.shape
        residual = latents.detach().reshape(-1, width)
        total = torch.zeros_like(residual)
        variance = latents.detach().var()
        commitment = latents.new_zeros(())
        for book in self.books:
            nearest = nearest_code(residual, book.embed)
            chosen = F.embedding(nearest, book.embed)
            if update:
                self._update(book, residual, nearest)
            total, residual = total + chosen, residual - chosen
            target = total.view(batch, frames, width)
            commitment = commitment + F.mse_loss(latents, target) / variance
        quantised = total.view(batch, frames, width)
        return latents + (quantised - latents).detach(), commitment / len(self.books)

    @torch.no_grad()
    def _update(self, book, points: Tensor, nearest: Tensor) -> None:
        """Running means of counts and sums; unused codes move to random points of the batch."""
        size = book.codebook_size
        counts = _count(nearest, book.embed)
        sums = torch.zeros_like(book.embed_avg).index_add_(0, nearest, points)
        book.cluster_size.mul_(CODEBOOK_DECAY).add_(counts, alpha=1 - CODEBOOK_DECAY)
        book.embed_avg.mul_(CODEBOOK_DECAY).add_(sums, alpha=1 - CODEBOOK_DECAY)
        even = self.frames_per_step / size
        dead = book.cluster_size < DEAD_BELOW * even
        spare = points[_draw(len(points), size, self.generator, points.device)]
        # torch.where, because indexing with `dead` would wait for the GPU at every step.
        book.cluster_size.copy_(torch.where(dead, 0.5 * even, book.cluster_size))
        book.embed_avg.copy_(torch.where(dead[:, None], spare * 0.5 * even, book.embed_avg))
        book.embed.copy_(book.embed_avg / book.cluster_size[:, None])


# --- training ---------------------------------------------------------------------------------


def latent_scale(latents: Tensor) -> Tensor:
    """Root mean square of latents [B, T, D]."""
    return latents.square().mean().clamp_min(1e-12).sqrt()


class ScaleWatch:
    """Collects the scale of what goes into the LSTMs, and of the latents.

    Commitment relative to the latents' variance leaves their scale free. Without a penalty it grew
    to 4,000 in 6,000 steps: the LSTMs were saturated and did nothing, and losses became NaN.
    """

    def __init__(self, codec: EncodecModel):
        self.scales: list[Tensor] = []
        for module in codec.modules():
            if isinstance(module, nn.LSTM):
                module.register_forward_pre_hook(self._watch)

    def _watch(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.scales.append(latent_scale(inputs[0].float()))

    def loss(self, latents: Tensor) -> Tensor:
        """Squared log of each scale above 1."""
        scales = torch.stack([latent_scale(latents), *self.scales])
        self.scales.clear()
        return scales.log().clamp_min(0.0).square().sum()


def learning_rate(progress: float, step: int, warmup_steps: int, floor: float = 0.02) -> float:
    """Factor in [0, 1]: linear warm-up by step, then cosine decay to `floor` by progress."""
    warm = min((step + 1) / warmup_steps, 1.0)
    return warm * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def keep_shapes_on_cpu(codec: EncodecModel) -> EncodecModel:
    """Move the convolutions' stride and padding buffers back to the CPU.

    transformers computes paddings from them as integers; on a GPU each convolution would wait for
    the device to read them.
    """
    for module in codec.modules():
        for name in ("stride", "kernel_size", "padding_total"):
            if isinstance(module.__dict__.get("_buffers", {}).get(name), Tensor):
                module._buffers[name] = module._buffers[name].cpu()
    return codec


def plain_weights(codec: EncodecModel) -> EncodecModel:
    """Take weight normalisation off, in place; `finish_weights` puts it back."""
    for module in codec.modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            nn.utils.parametrize.remove_parametrizations(module, "weight")
    return codec


def restart_codebooks(codec: EncodecModel) -> EncodecModel:
    """Make each codebook's running sums agree with its saved vectors, in place.

    Saved vectors are a running mean over steps and rounded to float16; the sums are neither.
    """
    for layer in codec.quantizer.layers:
        book = layer.codebook
        book.embed_avg.copy_(book.embed * book.cluster_size[:, None])
    return codec


def start_codec(config: CodecConfig, seed: int, audio: Tensor) -> EncodecModel:
    """A lapped transform with codebooks fitted by k-means to `audio` [clips, samples].

    Works on the device of `audio`, which is where the codec will be.
    """
    torch.manual_seed(seed)
    codec = build_codec(config)
    start_weights(codec, audio[: len(audio) // 2].float().cpu())
    keep_shapes_on_cpu(codec.to(audio.device))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        latents = codec.encoder(audio.float()[:, None])
    books = CodebookTrainer(codec, generator, config.batch * config.crop // HOP)
    books.start(latents.transpose(1, 2).flatten(0, 1))
    return codec


def clip_gradients(parameters: Iterable[nn.Parameter], most: float = 1.0) -> Tensor:
    """Clip to norm `most` and return the norm before; non-finite gradients become zero.

    One bad batch must not end a long run. Nothing here waits for the device.
    """
    parameters = list(parameters)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
    return nn.utils.clip_grad_norm_(parameters, most)


class CodecTrainer:
    """Codec, discriminator, optimisers and running mean; one object that can be saved and resumed.

    The schedule follows `progress` in [0, 1], which the caller takes from steps or from time. On a
    GPU a step is captured once as a CUDA graph.
    """

    def __init__(
        self, config: CodecConfig, codec: EncodecModel, seed: int, device: str | torch.device,
        decoder_only: bool = False, graphs: bool = True,
    ):  # fmt: skip
        """Take over a codec of `start_codec` or `plain_weights`.

        Args:
            config: schedule and loss weights; its architecture is that of `codec`.
            codec: without weight normalisation; it is trained in place.
            seed: of the discriminator and of codes that replace unused ones.
            device: where to train.
            decoder_only: keep encoder and codebooks, so that all codes stay what they are.
            graphs: replay CUDA graphs on a GPU.
        """
        self.config, self.device, self.decoder_only = config, torch.device(device), decoder_only
        self.capturing = graphs and self.device.type == "cuda"
        torch.manual_seed(seed)
        self.codec = keep_shapes_on_cpu(codec.to(self.device)).train()
        self.discriminator = STFTDiscriminator(config.discriminator_channels).to(self.device)
        self.generator = torch.Generator().manual_seed(seed)
        frames = config.batch * config.crop // HOP
        self.books = CodebookTrainer(self.codec, self.generator, frames)
        self.watch = ScaleWatch(self.codec)
        self.trained = list((codec.decoder if decoder_only else codec).parameters())
        self.optimisers = [
            torch.optim.AdamW(
                parameters, lr=self._scalar(0.0) if self.capturing else 0.0, betas=betas,
                weight_decay=0.0, fused=True, capturable=self.capturing,
            )
            for parameters, betas in (
                (self.trained, (0.9, 0.99)), (list(self.discriminator.parameters()), (0.8, 0.99)),
            )
        ]  # fmt: skip
        self.average = {k: v.detach().clone() for k, v in self._averaged().items()}
        self.norms = {name: self._scalar(0.0) for name, _ in config.weights}
        # What changes from step to step lies in tensors, because a graph keeps plain numbers.
        self.fade_in, self.follow = self._scalar(0.0), self._scalar(1.0)
        self.step_count = self.adversarial_steps = 0
        self.graphs: dict[bool, Graph[dict[str, Tensor]]] = {}

    def _scalar(self, value: float) -> Tensor:
        return torch.full((), value, device=self.device)

    def _averaged(self) -> dict[str, Tensor]:
        """What the running mean covers: weights and code vectors."""
        state = dict(self.codec.named_parameters())
        return state | {
            name: value for name, value in self.codec.named_buffers() if name.endswith(".embed")
        }

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16)

    def reconstruct(self, audio: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Encode, quantise and decode audio [B, samples]; also losses of what lies between."""
        if self.decoder_only:
            with torch.no_grad():  # in float32, as codes are made
                latents = self.codec.encoder(audio[:, None])
                quantised, commitment = self.books.quantise(latents.transpose(1, 2), update=False)
        else:
            with self._autocast():
                latents = self.codec.encoder(audio[:, None])
            latents = latents.float().nan_to_num(0.0, 0.0, 0.0)  # codebooks would keep a NaN
            quantised, commitment = self.books.quantise(latents.transpose(1, 2))
        with self._autocast():
            decoded = self.codec.decoder(quantised.transpose(1, 2))
        between = {"commitment": commitment, "scale": self.watch.loss(latents)}
        return decoded.float()[:, 0, : audio.shape[1]], between

    def step(self, audio: Tensor, progress: float) -> dict[str, Tensor]:
        """Train on crops [B, samples] on the device; losses as tensors, without waiting."""
        config = self.config
        adversarial = progress >= config.adversarial_from
        rate = config.learning_rate * learning_rate(progress, self.step_count, config.warmup_steps)
        for optimiser, value in zip(self.optimisers, (rate, config.learning_rate), strict=True):
            group = optimiser.param_groups[0]
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value
        # The adversarial losses fade in over 500 steps, so that the discriminator comes first.
        self.fade_in.fill_(min(self.adversarial_steps / 500, 1.0))
        self.follow.fill_(1 - config.average_decay if progress >= config.average_from else 1.0)
        if self.capturing:
            if adversarial not in self.graphs:  # the steps that warm it up are steps of training
                run = partial(self._train, adversarial=adversarial)
                self.graphs[adversarial] = Graph(run, (audio,))
            losses = self.graphs[adversarial](audio)
        else:
            losses = self._train(audio, adversarial)
        self.step_count += 1
        self.adversarial_steps += adversarial
        return losses

    def _train(self, audio: Tensor, adversarial: bool) -> dict[str, Tensor]:
        """Forward, backward and update; nothing here waits for the device."""
        config = self.config
        decoded, between = self.reconstruct(audio)
        losses = {"mel": mel_loss(decoded, audio), "waveform": waveform_loss(decoded, audio)}
        weights = {name: self._scalar(weight) for name, weight in config.weights}
        if adversarial:
            discriminator = self._train_discriminator(audio, decoded.detach())
            with self._autocast():
                logits, features = self.discriminator(decoded)
                with torch.no_grad():
                    _, wanted = self.discriminator(audio)
            losses |= {
                "generator": generator_loss(logits), "feature": feature_loss(wanted, features)
            }  # fmt: skip
            weights |= {name: weights[name] * self.fade_in for name in ("generator", "feature")}
        at_audio = balanced_gradient(losses, weights, self.norms, decoded)
        # In units of the waveform loss, so that the commitment weight is relative to that loss.
        at_audio = at_audio * self.norms["waveform"]
        outputs, gradients = [decoded], [at_audio]
        if not self.decoder_only:
            for loss, weight in zip(
                between.values(), (config.commitment_weight, config.scale_weight), strict=True
            ):
                outputs.append(loss)
                gradients.append(torch.full_like(loss, weight))
        self.optimisers[0].zero_grad(set_to_none=True)
        torch.autograd.backward(outputs, gradients)
        norm = clip_gradients(self.trained)
        self.optimisers[0].step()
        with torch.no_grad():
            mean = list(self.average.values())
            change = torch._foreach_sub([v.detach() for v in self._averaged().values()], mean)
            torch._foreach_mul_(change, self.follow)
            torch._foreach_add_(mean, change)
        losses |= between | {"gradient": norm}
        if adversarial:
            losses["discriminator"] = discriminator
        return {name: value.detach() for name, value in losses.items()}

    def _train_discriminator(self, audio: Tensor, decoded: Tensor) -> Tensor:
        with self._autocast():
            both, _ = self.discriminator(torch.cat([audio, decoded]))
        n = len(audio)
        loss = discriminator_loss([x[:n] for x in both], [x[n:] for x in both])
        self.optimisers[1].zero_grad(set_to_none=True)
        loss.backward()
        clip_gradients(self.discriminator.parameters())
        self.optimisers[1].step()
        return loss.detach()

    def state(self) -> dict[str, object]:
        """Everything that a resumed run needs; loads with `torch.load(weights_only=True)`."""
        return {
            "codec": self.codec.state_dict(), "discriminator": self.discriminator.state_dict(),
            "optimisers": [o.state_dict() for o in self.optimisers], "average": self.average,
            "generator": self.generator.get_state(), "step": self.step_count,
            "norms": self.norms, "adversarial_steps": self.adversarial_steps,
        }  # fmt: skip

    def load(self, state: Mapping[str, object]) -> None:
        """Go on from `state`."""
        self.codec.load_state_dict(state["codec"])
        self.discriminator.load_state_dict(state["discriminator"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        for name, value in state["average"].items():
            self.average[name].copy_(value)
        self.generator.set_state(state["generator"].cpu())
        for name, value in state["norms"].items():
            self.norms[name].copy_(value)
        self.step_count = state["step"]
        self.adversarial_steps = state["adversarial_steps"]

    def _tensors(self) -> list[Tensor]:
        """What training changes, but for the optimisers' moments."""
        modules = [*self.codec.state_dict().values(), *self.discriminator.state_dict().values()]
        return [*modules, *self.average.values(), *self.norms.values()]

    def snapshot(self) -> list[Tensor]:
        """A copy to go back to with `restore`."""
        return [tensor.detach().clone() for tensor in self._tensors()]

    @torch.no_grad()
    def restore(self, saved: list[Tensor]) -> None:
        """Go back to a snapshot, in place, so that captured graphs stay valid; moments restart."""
        for tensor, value in zip(self._tensors(), saved, strict=True):
            tensor.copy_(value)
        for optimiser in self.optimisers:
            for moments in optimiser.state.values():
                moments["exp_avg"].zero_()
                moments["exp_avg_sq"].zero_()

    def finished(self) -> EncodecModel:
        """A codec on the CPU with the averaged weights, in the saved EnCodec format."""
        codec = plain_weights(build_codec(self.config))
        state = {k: v.detach().cpu().clone() for k, v in self.codec.state_dict().items()}
        state |= {k: v.cpu().clone() for k, v in self.average.items()}
        codec.load_state_dict(state)
        return finish_weights(codec)
