"""Read a MusicGen folder in transformers' layout: dtypes, device maps, both weight formats.

Two layouts are in use on the hub: ``*.safetensors`` and ``pytorch_model*.bin``, each whole or in
shards with an index. The second is a pickle, read with ``weights_only``, so that a file can name no
object but tensors. Both may spell EnCodec's weight norm the old way (``weight_g``, ``weight_v``)
and hold the table of positions, which newer versions compute.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import MusicgenForConditionalGeneration

from musicscope.models import checkpoint

# Rounding the codec would change the codes, that is the data; T5 overflows in float16, and its
# states are the same for all precisions of the decoder when it keeps its own.
FLOAT32_PARTS = ("audio_encoder", "text_encoder")
GUIDANCE = 3.0
"""Scale of the released models (Copet et al. 2023), where a folder names none."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# transformers has no argument for this, only a class attribute; its loader, and what it writes on
# save_pretrained, go by the class name.
_Musicgen = type(
    "MusicgenForConditionalGeneration",
    (MusicgenForConditionalGeneration,),
    {
        "_keep_in_fp32_modules_strict": list(FLOAT32_PARTS),
        "__module__": MusicgenForConditionalGeneration.__module__,
    },
)


def check_folder(folder: Path) -> None:
    """Refuse all but a whole mono text-to-music MusicGen, naming the file and the remedy.

    FileNotFoundError for a missing file, ValueError for melody, stereo and other models.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: not a save_pretrained folder")
    config = checkpoint.read_config(folder)
    kind = config.get("model_type")
    if kind != "musicgen":
        why = (
            "melody conditioning is not supported; take facebook/musicgen-small, -medium or -large"
            if kind == "musicgen_melody"
            else "need musicgen"
        )
        raise ValueError(f"{folder}/config.json is of type {kind!r}: {why}")
    channels = {part: config.get(part, {}).get("audio_channels", 1) for part in
                ("decoder", "audio_encoder")}  # fmt: skip
    if set(channels.values()) != {1}:
        raise ValueError(
            f"{folder} is a stereo MusicGen ({channels} audio channels); only mono models are "
            "supported: take facebook/musicgen-small, -medium or -large"
        )


def load_parts(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    device_map: str | dict[str, Any] | None = None,
    **options: Any,
) -> tuple[MusicgenForConditionalGeneration, Any]:
    """Load (model, tokenizer) of a save_pretrained folder, frozen.

    The decoder is read in `dtype` (float32, bfloat16 or float16) without a float32 copy of the
    whole; codec and text encoder stay in float32. With a `device_map` ("auto", or module name to
    device, "cpu" or "disk", as accelerate takes it) `device` is not used; `options` such as
    `max_memory` and `offload_folder` go with it.

    Raises:
        FileNotFoundError, ValueError: see `check_folder`; weights that do not fit config.json.
    """
    check_folder(folder)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {[str(d) for d in DTYPES]}, got {dtype}")
    if options and device_map is None:
        raise ValueError(f"{sorted(options)} need a device_map")
    hf = checkpoint.load_pretrained(
        _Musicgen, folder, dtype=dtype, device_map=device_map, **options
    )
    codec, books = hf.config.audio_encoder, hf.config.decoder.num_codebooks
    quantizer = hf.audio_encoder.quantizer
    used = quantizer.get_num_quantizers_for_bandwidth(codec.target_bandwidths[0])
    checkpoint.check_codec(
        hf.audio_encoder,
        folder / "config.json",
        (min(used, len(quantizer.layers)), codec.codebook_size),
        (books, hf.config.decoder.vocab_size),
    )
    tokenizer = checkpoint.load_tokenizer(folder, hf.config.text_encoder)
    _say_defaults(folder, hf)
    if device_map is None:
        hf.to(device)
    return hf.requires_grad_(False), tokenizer


def _say_defaults(folder: Path, hf: MusicgenForConditionalGeneration) -> None:
    """Warn of generation settings that the folder lacks."""
    held, own = hf.generation_config, hf.config.decoder
    absent = []
    if not held.guidance_scale:
        absent.append(f"guidance_scale ({GUIDANCE} is used)")
    if held.decoder_start_token_id is None:
        absent.append(f"decoder_start_token_id (the decoder's bos_token_id {own.bos_token_id} is)")
    if absent:
        path = folder / "generation_config.json"
        state = "lacks" if path.is_file() else "is missing, and with it"
        warnings.warn(f"{path} {state} {', '.join(absent)}", stacklevel=3)


def main_device(hf: MusicgenForConditionalGeneration) -> torch.device:
    """Find the device of codec, text encoder and batches: the model's, or the map's first one."""
    placed = getattr(hf, "hf_device_map", None)
    if not placed:
        return hf.device
    # "disk" and "cpu" hold weights that are brought to the map's first accelerator to run.
    devices = [torch.device("cpu" if d in ("cpu", "disk") else d) for d in placed.values()]
    return next((d for d in devices if d.type != "cpu"), devices[0])
