"""xcodec (Ye et al. 2024, arXiv 2408.17175) as YuE stage 1 uses it: 16 kHz, 50 Hz, one codebook.

`XcodecModel` of transformers does the work; here are the checks and YuE's conventions. Stage 2
would add codebooks 1..7; it is out of scope, so what is decoded here has the first one only.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import XcodecModel

from musicscope.models.yue.tokens import CARD

HUB_ID = "Manel/YuE-XCodec"
"""The codec's weights in transformers' layout."""
BANDWIDTH = 0.5
"""Kilobits a second of one codebook: what stage 1 reads and writes."""
HOP, SAMPLE_RATE = 320, 16_000


def load_codec(folder: str | Path, device: torch.device) -> XcodecModel:
    """From a save_pretrained folder, in float32: rounding would change the codes, that is the data.

    FileNotFoundError without a config.json, ValueError for a codec with other rates than YuE's.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no config.json: save YuE's codec there in transformers' layout "
            f"(hub id {HUB_ID}), or name its folder with codec="
        )
    codec = XcodecModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    config = codec.config
    found = (config.sample_rate, config.hop_length, config.codebook_size)
    if found != (SAMPLE_RATE, HOP, CARD) or BANDWIDTH not in config.target_bandwidths:
        raise ValueError(
            f"{folder}/config.json: YuE's codec has {SAMPLE_RATE} Hz, {HOP} samples a frame and "
            f"{CARD} codes, and {BANDWIDTH} among target_bandwidths; this one has {found} and "
            f"{list(config.target_bandwidths)}: put {HUB_ID} there"
        )
    return codec.eval().to(device).requires_grad_(False)


@torch.no_grad()
def encode_track(codec: XcodecModel, audio: Tensor | np.ndarray) -> Tensor:
    """One track [B, n] float at 16 kHz to codes [B, T] int64, T = n / 320 rounded up.

    ValueError for another shape or type, for NaN or infinity.
    """
    audio = torch.as_tensor(audio)
    if audio.ndim != 2 or 0 in audio.shape:
        raise ValueError(f"audio must be [clips, samples], got {list(audio.shape)}")
    if not audio.is_floating_point():
        raise ValueError(f"audio must be floating point in -1..1, got {audio.dtype}")
    finite = torch.isfinite(audio).all(1)
    if not finite.all():
        bad = torch.nonzero(~finite).flatten().tolist()
        raise ValueError(f"audio holds NaN or infinity in rows {bad}")
    signal = audio.to(codec.device, torch.float32)[:, None]
    # xcodec would drop a last frame of less than a quarter; padded, each started frame counts, as
    # in the other models.
    signal = F.pad(signal, (0, -signal.shape[-1] % HOP))
    # On a CPU clip by clip: a clip's codes then do not depend on what else is in the batch.
    parts = signal.split(1 if codec.device.type == "cpu" else len(signal))
    found = [codec.encode(part, bandwidth=BANDWIDTH).audio_codes for part in parts]
    return torch.cat(found)[:, 0]


def silence(codec: XcodecModel, frames: int) -> Tensor:
    """The codec's own codes [T] of that much silence (which need not be one code throughout)."""
    return encode_track(codec, torch.zeros(1, frames * HOP))[0]


@torch.no_grad()
def latents(codec: XcodecModel, codes: Tensor) -> Tensor:
    """Quantised latents [B, T, D] of one track's codes [B, T]."""
    return codec.quantizer.decode(codes.to(codec.device)[None]).transpose(1, 2)


@torch.no_grad()
def decode_tracks(codec: XcodecModel, codes: Tensor) -> Tensor:
    """Codes [B, K, T] of K tracks to their audio [B, K, 320 T]."""
    flat = codes.to(codec.device).flatten(0, 1)[:, None]
    return codec.decode(flat).audio_values[:, 0].unflatten(0, codes.shape[:2])
