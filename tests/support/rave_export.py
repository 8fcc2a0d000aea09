"""A tiny autoencoder in the layout of a RAVE export, scripted and saved by the tests themselves.

PQMF-like filter bank, variational encoder with residual units, noise draw, PCA, truncation to the
leading latents; decoder with noise in the missing ones, up-sampling, a noise branch and amplitude
modulation; with `streaming`, convolutions that keep the end of their input. Written from RAVE's
documented interface, no line of it is RAVE's.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SR, BANDS, STRIDES, FULL, KEPT, WIDTH = 1378, 4, (4, 4), 6, 4, 8
RATIO = BANDS * STRIDES[0] * STRIDES[1]  # 64 samples: 21.53 Hz


class Padded(nn.Module):
    """A convolution with padding on both sides or, streaming, with the end of the last input."""

    def __init__(self, conv: nn.Conv1d, streaming: bool) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.dilation = conv.stride[0], conv.dilation[0]
        self.total = (conv.kernel_size[0] - 1) * self.dilation + 1 - self.stride
        self.streaming = streaming
        self.register_buffer("pad", torch.zeros(8, conv.in_channels, max(self.total, 0)))

    def forward(self, x: Tensor) -> Tensor:
        if self.streaming:
            x = torch.cat([self.pad[: x.shape[0]], x], -1)
            if self.total > 0:
                self.pad[: x.shape[0]] = x[:, :, -self.total :]
        else:
            x = F.pad(x, (self.total - self.total // 2, self.total // 2))
        return F.conv1d(x, self.weight, self.bias, self.stride, 0, self.dilation)


class Residual(nn.Module):
    def __init__(self, width: int, streaming: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.LeakyReLU(0.2), Padded(nn.Conv1d(width, width, 3, dilation=2), streaming)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class FilterBank(nn.Module):
    """Orthonormal blocks of BANDS samples: perfect reconstruction."""

    def __init__(self) -> None:
        super().__init__()
        self.bands = BANDS
        basis = torch.linalg.qr(torch.randn(BANDS, BANDS))[0]
        self.forward_conv = nn.Conv1d(1, BANDS, BANDS, stride=BANDS, bias=False)
        self.forward_conv.weight.data = basis[:, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_conv(x)

    @torch.jit.export
    def inverse(self, x: Tensor) -> Tensor:
        return F.conv_transpose1d(x, self.forward_conv.weight, stride=self.bands)


class Encoder(nn.Module):
    def __init__(self, streaming: bool) -> None:
        super().__init__()
        a, b = STRIDES
        self.net = nn.Sequential(
            Padded(nn.Conv1d(BANDS, WIDTH, 5), streaming),
            Residual(WIDTH, streaming),
            nn.LeakyReLU(0.2),
            Padded(nn.Conv1d(WIDTH, 2 * WIDTH, 2 * a, stride=a), streaming),
            nn.LeakyReLU(0.2),
            Padded(nn.Conv1d(2 * WIDTH, 2 * WIDTH, 2 * b, stride=b), streaming),
            nn.LeakyReLU(0.2),
            Padded(nn.Conv1d(2 * WIDTH, 2 * FULL, 3), streaming),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Variational(nn.Module):
    def __init__(self, streaming: bool) -> None:
        super().__init__()
        self.encoder = Encoder(streaming)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    @torch.jit.export
    def draw(self, stats: Tensor) -> Tensor:
        mean, scale = stats.chunk(2, 1)
        return mean + (F.softplus(scale) + 1e-4) * torch.randn_like(mean)


class Decoder(nn.Module):
    def __init__(self, streaming: bool) -> None:
        super().__init__()
        a, b = STRIDES
        self.net = nn.Sequential(
            Padded(nn.Conv1d(FULL, 2 * WIDTH, 3), streaming),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose1d(2 * WIDTH, 2 * WIDTH, 2 * b, stride=b, padding=b // 2),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose1d(2 * WIDTH, WIDTH, 2 * a, stride=a, padding=a // 2),
            Residual(WIDTH, streaming),
        )
        self.waveform = Padded(nn.Conv1d(WIDTH, 2 * BANDS, 3), streaming)
        self.noise = nn.Sequential(nn.Conv1d(WIDTH, BANDS, 1))
        self.dead = nn.Conv1d(WIDTH, BANDS, 1)
        self.dead.weight.data.zero_()
        self.dead.bias.data.zero_()

    def forward(self, z: Tensor) -> Tensor:
        h = self.net(z)
        wave, amplitude = self.waveform(h).chunk(2, 1)
        noise = torch.sigmoid(self.noise(h) - 2) * (torch.rand_like(wave) * 2 - 1)
        return torch.tanh(wave * torch.sigmoid(amplitude) + 0.1 * noise + self.dead(h))


class TinyRave(nn.Module):
    """The export: encode [B, 1, n] -> [B, KEPT, n / 64] and back."""

    def __init__(self, streaming: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.sr, self.latent_size, self.full_latent_size, self.n_channels = SR, KEPT, FULL, 1
        self.pqmf = FilterBank()
        self.encoder, self.decoder = Variational(streaming), Decoder(streaming)
        with torch.no_grad():  # fresh weights give almost the same output whatever the input
            for name, weight in self.named_parameters():
                if weight.ndim == 3 and "pqmf" not in name and "dead" not in name:
                    weight.mul_(2.0)
        self.register_buffer("latent_pca", torch.linalg.qr(torch.randn(FULL, FULL))[0])
        self.register_buffer("latent_mean", torch.randn(FULL))
        self.register_buffer("fidelity", torch.linspace(0.5, 1, FULL))
        self.register_buffer("encode_params", torch.tensor([1, 1, KEPT, RATIO]))
        self.register_buffer("decode_params", torch.tensor([KEPT, RATIO, 1, 1]))

    @torch.jit.export
    def encode(self, x: Tensor) -> Tensor:
        z = self.encoder.draw(self.encoder(self.pqmf(x))) - self.latent_mean[:, None]
        return F.conv1d(z, self.latent_pca[:, :, None])[:, : self.latent_size]

    @torch.jit.export
    def decode(self, z: Tensor) -> Tensor:
        missing = self.full_latent_size - z.shape[1]
        z = torch.cat([z, torch.randn(z.shape[0], missing, z.shape[2])], 1)
        z = F.conv1d(z, self.latent_pca.t()[:, :, None]) + self.latent_mean[:, None]
        return self.pqmf.inverse(self.decoder(z))

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


def save(module: nn.Module, path: Path, freeze: bool = False) -> Path:
    """Script and save, as an export is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(module.eval())
        if freeze:
            scripted = torch.jit.freeze(scripted, preserved_attrs=["encode", "decode", "sr"])
        scripted.save(str(path))
    return path
