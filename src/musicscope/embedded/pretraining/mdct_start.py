"""Where codec training starts: an EnCodec that is an orthogonal lapped transform.

From random weights the first thousands of steps go into learning what a filter bank does. EnCodec's
strided convolutions have kernels of twice their stride, which is just what an MDCT needs, so the
cascade 5, 4, 4, 4 can hold an orthogonal transform of 320 coefficients a frame, and the transposed
convolutions its inverse. The signal travels in the first 1, 5, 20, 80 and 320 channels, scaled down
so far that ELU hardly bends it; all other channels start at random and are free to learn what is
not linear. The narrow latent starts as the principal components of the coefficients.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import remove_parametrizations
from transformers import EncodecModel

GAIN = 0.1  # of the signal inside the network: ELU is nearly linear at its small values


def mdct_kernels(bands: int) -> Tensor:
    """Orthonormal MDCT basis with a sine window, [bands, 2 * bands] (Princen & Bradley, 1986)."""
    n, k = np.arange(2 * bands), np.arange(bands)
    window = np.sin(np.pi / (2 * bands) * (n + 0.5))
    phase = np.pi / bands * (n[None] + 0.5 + bands / 2) * (k[:, None] + 0.5)
    return torch.from_numpy(np.sqrt(2 / bands) * window * np.cos(phase)).float()


def _convolutions(modules: nn.ModuleList) -> list[nn.Module]:
    """The convolutions between the residual blocks, in order."""
    return [m.conv for m in modules if hasattr(m, "conv")]


def _randomise(conv: nn.Module, fan_in: int) -> None:
    nn.init.normal_(conv.weight, std=fan_in**-0.5)
    nn.init.zeros_(conv.bias)


@torch.no_grad()
def start_weights(codec: EncodecModel, audio: Tensor) -> None:
    """Set all weights of a fresh codec; `audio` [B, samples] gives the principal components.

    Takes weight normalisation off (`finish_weights` puts it back): with it, and the gains that it
    starts from, the loss stood still for 1,600 steps.
    """
    for module in codec.modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            with torch.enable_grad():  # without it the weight would come back as a plain tensor
                remove_parametrizations(module, "weight")
            strided = isinstance(module, nn.ConvTranspose1d)
            fan_in = (
                module.in_channels * module.kernel_size[0] / (module.stride[0] if strided else 1)
            )
            _randomise(module, fan_in)
        elif isinstance(module, nn.LSTM):
            # Rows of the cell gate at zero: the layer is silent, its skip connection passes.
            hidden = module.hidden_size
            for name, value in module.named_parameters():
                value[2 * hidden : 3 * hidden].zero_()
                assert "l1" not in name, "one LSTM layer is expected"
    for layers in (codec.encoder.layers, codec.decoder.layers):
        for block in layers:
            if hasattr(block, "shortcut"):
                nn.init.zeros_(block.block[-1].conv.weight)
                block.shortcut.conv.weight.copy_(
                    torch.eye(block.shortcut.conv.in_channels)[..., None]
                )
    ratios = list(reversed(codec.config.upsampling_ratios))
    _start_encoder(_convolutions(codec.encoder.layers), ratios)
    _start_latent(codec, _principal_components(codec, audio))
    _start_decoder(_convolutions(codec.decoder.layers), ratios)


def _start_encoder(convs: list[nn.Module], ratios: list[int]) -> None:
    first = convs[0]
    first.weight[0].zero_()
    first.weight[0, 0, first.kernel_size[0] // 2] = GAIN
    carried = 1
    for conv, ratio in zip(convs[1:-1], ratios, strict=True):
        kernels = mdct_kernels(ratio)
        conv.weight[: carried * ratio].zero_()
        for j in range(carried):
            conv.weight[j * ratio : (j + 1) * ratio, j] = kernels
        carried *= ratio


def _principal_components(codec: EncodecModel, audio: Tensor) -> Tensor:
    """Leading components of the coefficients, [hidden, coefficients]."""
    hidden = audio[:, None]
    for layer in list(codec.encoder.layers)[:-2]:
        hidden = layer(hidden)
    size = int(np.prod(codec.config.upsampling_ratios))
    coefficients = hidden[:, :size].transpose(1, 2).reshape(-1, size)
    vectors = torch.linalg.eigh(torch.cov(coefficients.T)).eigenvectors
    return vectors[:, -codec.config.hidden_size :].T.flip(0)


def _start_latent(codec: EncodecModel, components: Tensor) -> None:
    out = _convolutions(codec.encoder.layers)[-1]
    back = _convolutions(codec.decoder.layers)[0]
    size, centre = components.shape[1], out.kernel_size[0] // 2
    out.weight.zero_()
    out.weight[:, :size, centre] = components
    back.weight[:size].zero_()
    back.weight[:size, :, centre] = components.T


def _start_decoder(convs: list[nn.Module], ratios: list[int]) -> None:
    carried = int(np.prod(ratios))
    for conv, ratio in zip(convs[1:-1], reversed(ratios), strict=True):
        outputs = carried // ratio
        kernels = mdct_kernels(ratio)
        conv.weight[:, :outputs].zero_()
        for j in range(outputs):
            conv.weight[j * ratio : (j + 1) * ratio, j] = kernels
        carried = outputs
    last = convs[-1]
    last.weight.mul_(0.1)
    last.weight[0, 0].zero_()
    last.weight[0, 0, last.kernel_size[0] // 2] = 1 / GAIN


def finish_weights(codec: EncodecModel) -> EncodecModel:
    """Put weight normalisation back (the same function), as the saved EnCodec format has it."""
    for module in codec.modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            # A filter that is exactly zero has no direction to normalise: give it one, of length 0.
            with torch.no_grad():
                empty = module.weight.flatten(1).norm(dim=1) == 0
                module.weight[empty] = 1e-3
                weight_norm(module)
                module.parametrizations.weight.original0[empty] = 0
    return codec.eval()
