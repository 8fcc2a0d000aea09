"""Losses of codec training: mel and waveform, an STFT discriminator, and their balance."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musicscope.core.audio import mel_filterbank

SAMPLE_RATE = 16_000
MEL_SCALES = ((128, 12), (256, 24), (512, 48), (1024, 80), (2048, 128))
"""(window in samples, mel bands); the hop is a quarter of the window."""
MEL_FLOOR_DB = 60.0
"""Mel power this far below a crop's loudest band counts as silence, as in the evaluation."""
QUIET = 1e-5
"""Mel power added to that floor, so that a nearly silent crop does not rule the gradient."""
NORM_DECAY = 0.99


@lru_cache
def _mel_basis(window: int, bands: int, device: torch.device) -> tuple[Tensor, Tensor]:
    basis = torch.from_numpy(mel_filterbank(SAMPLE_RATE, window, bands)).to(device)
    return basis, torch.hann_window(window, device=device)


def mel_loss(x: Tensor, target: Tensor) -> Tensor:
    """Mean absolute log-mel difference over MEL_SCALES, in units of 10 dB.

    Args:
        x: audio [B, samples].
        target: reference audio [B, samples]; sets the floor, MEL_FLOOR_DB below its loudest band.
    """
    total = x.new_zeros(())
    both = torch.cat([x, target])
    for window, bands in MEL_SCALES:
        basis, hann = _mel_basis(window, bands, x.device)
        spectrum = torch.stft(both, window, window // 4, window=hann, return_complex=True)
        power = spectrum.real.square() + spectrum.imag.square()
        mel = torch.einsum("fm,bft->bmt", basis, power)
        got, wanted = mel[: len(x)], mel[len(x) :]
        peak = wanted.amax((1, 2), keepdim=True)
        floor = peak * 10 ** (-MEL_FLOOR_DB / 10) + QUIET
        total = total + ((got + floor) / (wanted + floor)).log10().abs().mean()
    return total / len(MEL_SCALES)


def waveform_loss(x: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error relative to the batch's mean magnitude.

    The scale is the batch's, because a nearly silent crop must not outweigh the others.
    """
    return (x - target).abs().mean() / target.abs().mean().clamp_min(1e-4)


class STFTDiscriminator(nn.Module):
    """Score real and decoded audio on complex STFTs of several windows (EnCodec, section 3.4)."""

    WINDOWS = (2048, 1024, 512, 256)

    def __init__(self, channels: int):
        super().__init__()
        self.stacks = nn.ModuleList([self._stack(channels) for _ in self.WINDOWS])

    @staticmethod
    def _stack(channels: int) -> nn.ModuleList:
        """Convolutions over [time, frequency]."""
        norm = torch.nn.utils.parametrizations.weight_norm
        layers = [norm(nn.Conv2d(2, channels, (3, 9), padding=(1, 4)))]
        for dilation in (1, 2, 4):
            layers.append(
                norm(nn.Conv2d(channels, channels, (3, 9), stride=(1, 2),
                               dilation=(dilation, 1), padding=(dilation, 4)))
            )  # fmt: skip
        layers.append(norm(nn.Conv2d(channels, channels, (3, 3), padding=1)))
        layers.append(norm(nn.Conv2d(channels, 1, (3, 3), padding=1)))
        return nn.ModuleList(layers)

    def forward(self, audio: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Logits and feature maps per window of audio [B, samples]."""
        logits, features = [], []
        for window, stack in zip(self.WINDOWS, self.stacks, strict=True):
            hann = _mel_basis(window, 8, audio.device)[1]
            with torch.autocast(audio.device.type, enabled=False):
                spectrum = torch.stft(
                    audio.float(), window, window // 4, window=hann, normalized=True,
                    return_complex=True,
                )  # fmt: skip
                x = torch.view_as_real(spectrum).permute(0, 3, 2, 1)  # [B, 2, time, frequency]
                # Magnitudes to the power 0.3: otherwise the loudest partials are all that counts.
                x = x * (x.square().sum(1, keepdim=True) + 1e-6).pow(-0.35)
            maps = []
            for layer in stack[:-1]:
                x = F.leaky_relu(layer(x), 0.2)
                maps.append(x)
            logits.append(stack[-1](x))
            features.append(maps)
        return logits, features


def discriminator_loss(real: list[Tensor], decoded: list[Tensor]) -> Tensor:
    """Hinge loss of the discriminator, mean over windows."""
    terms = [
        F.relu(1 - r.float()).mean() + F.relu(1 + d.float()).mean()
        for r, d in zip(real, decoded, strict=True)
    ]
    return torch.stack(terms).mean()


def generator_loss(decoded: list[Tensor]) -> Tensor:
    """Hinge loss of the codec against the discriminator, mean over windows."""
    return torch.stack([-d.float().mean() for d in decoded]).mean()


def feature_loss(real: list[list[Tensor]], decoded: list[list[Tensor]]) -> Tensor:
    """Relative L1 distance of feature maps, mean over windows and layers."""
    terms = [
        (r.detach().float() - d.float()).abs().mean() / r.detach().float().abs().mean()
        for one, other in zip(real, decoded, strict=True)
        for r, d in zip(one, other, strict=True)
    ]
    return torch.stack(terms).mean()


def balanced_gradient(
    losses: dict[str, Tensor], weights: dict[str, Tensor], norms: dict[str, Tensor], at: Tensor
) -> Tensor:
    """Gradient at `at` [B, samples] in which each loss has the share that its weight says.

    The loss balancer of EnCodec (arXiv 2210.13438, section 3.4): each loss's gradient is divided by
    a running mean of its norm, so that weights do not depend on the losses' units.

    Args:
        losses: scalars that depend on `at`.
        weights: share per loss, before division by their sum; scalars.
        norms: running mean of the gradient norm per loss, 0 before the first; updated in place.
        at: the tensor to differentiate with respect to.
    """
    total = torch.stack([weights[name] for name in losses]).sum()
    combined = torch.zeros_like(at)
    for name, loss in losses.items():
        gradient = torch.autograd.grad(loss, at, retain_graph=True)[0]
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
        norm, mean = gradient.norm(), norms[name]
        mean.copy_(torch.where(mean == 0, norm, mean.lerp(norm, 1 - NORM_DECAY)))
        combined += weights[name] / total * gradient / mean.clamp_min(1e-12)
    return combined
