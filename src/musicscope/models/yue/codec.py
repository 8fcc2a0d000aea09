"""xcodec (Ye et al. 2024, arXiv 2408.17175) as YuE stage 1 uses it: 16 kHz, 50 Hz, one codebook.

`XcodecModel` of transformers does the work; here are the checks and YuE's conventions. Stage 2
(codebooks 1..7) is out of scope, so audio is decoded from the first codebook only.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import XcodecConfig, XcodecModel

from musicscope.models import checkpoint
from musicscope.models.yue.tokens import CARD

HUB_ID = "Manel/YuE-XCodec"
"""The codec's weights in transformers' layout."""
BANDWIDTH = 0.5
"""Kilobits per second of one codebook, which stage 1 reads and writes."""
HOP, SAMPLE_RATE = 320, 16_000


def load_codec(folder: str | Path, device: torch.device) -> XcodecModel:
    """Load a save_pretrained folder, in float32: rounding would change the codes, that is the data.

    FileNotFoundError without a config.json, ValueError for a codec with other rates than YuE's.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no config.json: save YuE's codec there in transformers' layout "
            f"(hub id {HUB_ID}), or name its folder with codec="
        )
    checkpoint.read_config(folder)
    config = XcodecConfig.from_pretrained(folder, local_files_only=True)
    found = (config.sample_rate, config.hop_length, config.codebook_size)
    if found != (SAMPLE_RATE, HOP, CARD) or BANDWIDTH not in config.target_bandwidths:
        raise ValueError(
            f"{folder}/config.json: YuE's codec has {SAMPLE_RATE} Hz, {HOP} samples a frame and "
            f"{CARD} codes, and {BANDWIDTH} among target_bandwidths; this one has {found} and "
            f"{list(config.target_bandwidths)}: put {HUB_ID} there"
        )
    codec = checkpoint.load_pretrained(XcodecModel, folder, dtype=torch.float32)
    # Stage 1 uses the first codebook for both tracks.
    checkpoint.check_codec(codec, folder, (len(codec.quantizer.quantizers), CARD), (1, CARD))
    return codec.eval().to(device).requires_grad_(False)


@torch.no_grad()
def encode_track(codec: XcodecModel, signal: Tensor) -> Tensor:
    """Encode one track [B, n] float32 at 16 kHz into codes [B, T] int64, T = ceil(n / 320)."""
    # xcodec would drop a last frame of less than a quarter; padded, each started frame counts, as
    # in the other models.
    signal = F.pad(signal[:, None], (0, -signal.shape[-1] % HOP))
    return codec.encode(signal, bandwidth=BANDWIDTH).audio_codes[:, 0]


@torch.no_grad()
def latents(codec: XcodecModel, codes: Tensor) -> Tensor:
    """Look up quantised latents [B, T, D] of one track's codes [B, T]."""
    return codec.quantizer.decode(codes.to(codec.device)[None]).transpose(1, 2)


@torch.no_grad()
def decode_tracks(codec: XcodecModel, codes: Tensor) -> Tensor:
    """Turn codes [B, K, T] of K tracks into their audio [B, K, 320 T]."""
    flat = codes.to(codec.device).flatten(0, 1)[:, None]
    return codec.decode(flat).audio_values[:, 0].unflatten(0, codes.shape[:2])
