"""Cache the codec tokens of a clip collection for all models that share a codec.

EnCodec's encoder costs several times as much as a small decoder on the same clip. Its tokens are a
function of codec and audio alone, so they are kept under the hash of both, beside the other
scratch, where any model with the same codec finds them. Deleting them costs time only.
"""

from __future__ import annotations

import functools
import hashlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from musicscope.core.io import atomic_file, cache_dir
from musicscope.models.interface import MusicModel, language_model
from musicscope.models.registry import Sources

CHUNK = 8  # clips encoded together: fixed, so that tokens never depend on who asks for them
# Says where a config was saved, not what the codec computes.
INCIDENTAL = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}


def codec_sha256(model: MusicModel) -> str | None:
    """Hash the codec's weights and settings; None where the model has no separate codec."""
    codec = getattr(model, "codec", None)
    if codec is None:
        return None
    if hasattr(codec, "config"):
        settings = {k: v for k, v in codec.config.to_dict().items() if k not in INCIDENTAL}
    else:  # audiocraft's: all else shows in names and shapes of its weights
        names = ("sample_rate", "frame_rate", "channels", "num_codebooks", "cardinality")
        settings = {"class": type(codec).__name__, **{n: getattr(codec, n, None) for n in names}}
    hasher = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, value in sorted(codec.state_dict().items()):
        hasher.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        hasher.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return hasher.hexdigest()


def codes_dir(model: MusicModel, clips_sha256: str) -> Path | None:
    """Folder of this model's tokens of this collection; None if it has no codec."""
    codec = codec_sha256(model)
    device = str(getattr(model, "device", "cpu")).split(":")[0]  # floats differ between kinds
    if device != "cpu":
        device += " without TF32"  # with it, about 1 % of the codes were others
    key = {"codes": 1, "codec": codec, "clips": clips_sha256, "chunk": CHUNK, "device": device}
    return cache_dir(key) if codec else None


def _file(folder: Path, chunk: int) -> Path:
    return folder / f"codes-{chunk:05d}.npz"


@functools.lru_cache(maxsize=4)
def _read(path: Path) -> np.ndarray | None:
    """Read tokens [clips, K, T] of one file; None if absent or damaged (zip has checksums)."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive["codes"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def missing(folder: Path, clips: int) -> list[int]:
    """List the chunks of a collection of `clips` clips that are not there yet."""
    _read.cache_clear()
    absent = [c for c in range(-(-clips // CHUNK)) if _read(_file(folder, c)) is None]
    _read.cache_clear()  # another process may write one of them before it is asked for again
    return absent


def write_chunk(sources: Sources, folder: Path, chunk: int) -> int:
    """Encode one chunk of clips and keep its tokens; return its number of clips."""
    opened, clips = sources()
    model = language_model(opened)
    rows = list(range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(clips.rows))))
    try:
        codes = model.encode(clips.audio(rows), [None] * len(rows)).codes.cpu().numpy()
    except Exception as error:
        error.add_note(f"while encoding the clips {clips.rows['id'].iloc[rows].tolist()}")
        raise
    with atomic_file(_file(folder, chunk)) as temporary:
        np.savez(temporary, codes=codes.astype(np.int32))
    _read.cache_clear()
    return len(rows)


def read_codes(folder: Path, rows: Sequence[int]) -> torch.Tensor:
    """Read tokens of the given clips, int64 [n, K, T]. ValueError names a damaged file."""
    found = []
    for row in rows:
        path = _file(folder, row // CHUNK)
        if (chunk := _read(path)) is None:
            raise ValueError(f"{path} is missing or damaged; delete it and rerun the stage")
        found.append(chunk[row % CHUNK])
    return torch.from_numpy(np.stack(found).astype(np.int64))
