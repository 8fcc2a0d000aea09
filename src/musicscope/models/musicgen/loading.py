"""Read a MusicGen folder in transformers' layout: dtypes, device maps, both weight formats.

Two layouts are in use on the hub: ``*.safetensors`` and ``pytorch_model*.bin``, each whole or in
shards with an index. The second is a pickle, read with ``weights_only``, so that a file can name no
object but tensors. Both may spell EnCodec's weight norm the old way (``weight_g``, ``weight_v``)
and hold the table of positions, which newer versions compute.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoTokenizer, MusicgenForConditionalGeneration

from musicscope.core.io import read_json

# Rounding the codec would change the codes, that is the data; T5 overflows in float16, and its
# states are the same for all precisions of the decoder when it keeps its own.
FLOAT32_PARTS = ("audio_encoder", "text_encoder")
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
LAYER = re.compile(r"decoder\.model\.decoder\.layers\.(\d+)\.")
RECOMPUTED = re.compile(r"embed_positions\.weights$")
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
    config = read_json(folder / "config.json")
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
    if not any(list(folder.glob(pattern)) for pattern in WEIGHTS):
        raise FileNotFoundError(
            f"{folder} holds no weights ({' or '.join(WEIGHTS)}); fetch them (dvc pull, or the hub)"
        )


def stored_names(folder: Path) -> set[str]:
    """List the names of the weights in a folder, as the files spell them; read no weight."""
    names: set[str] = set()
    for index in folder.glob("*.index.json"):
        names.update(read_json(index)["weight_map"])
    if names:
        return names
    if files := sorted(folder.glob(WEIGHTS[0])):
        for file in files:
            with safe_open(file, framework="pt") as stored:
                names.update(stored.keys())
        return names
    for file in sorted(folder.glob(WEIGHTS[1])):
        mapped = zipfile.is_zipfile(file)
        names.update(torch.load(file, weights_only=True, map_location="meta", mmap=mapped))
    return names


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
    # A folder must not be looked up on the hub when one of its files is missing.
    hf, report = _Musicgen.from_pretrained(  # ty: ignore[not-iterable]  a pair with loading info
        folder,
        dtype=dtype,
        local_files_only=True,
        weights_only=True,
        output_loading_info=True,
        device_map=device_map,
        **options,
    )
    layers = {int(m[1]) for m in map(LAYER.search, stored_names(folder)) if m}
    cut = layers - set(range(hf.config.decoder.num_hidden_layers))
    # transformers does not report layers beyond those of the config: the model would be cut short.
    unknown = [f"decoder.model.decoder.layers.{i}" for i in sorted(cut)]
    unknown += sorted(k for k in report["unexpected_keys"] if not RECOMPUTED.search(k))
    missing = sorted(report["missing_keys"])
    if unknown or missing:
        raise ValueError(
            f"the weights in {folder} are not those of its config.json: {len(missing)} missing "
            f"{missing[:3]}, {len(unknown)} unknown {unknown[:3]}; fetch the folder again"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if device_map is None:
        hf.to(device)
    return hf.requires_grad_(False), tokenizer


def main_device(hf: MusicgenForConditionalGeneration) -> torch.device:
    """Find the device of codec, text encoder and batches: the model's, or the map's first one."""
    placed = getattr(hf, "hf_device_map", None)
    if not placed:
        return hf.device
    # "disk" and "cpu" hold weights that are brought to the map's first accelerator to run.
    devices = [torch.device("cpu" if d in ("cpu", "disk") else d) for d in placed.values()]
    return next((d for d in devices if d.type != "cpu"), devices[0])
