"""Fetch and read checkpoints; refuse incomplete, damaged and mismatched ones.

Loaders work on local folders, so a hub id and a copied folder load alike, and a second load with
the network off (``HF_HUB_OFFLINE=1``) finds the hub's cache.

One check for all families. Left alone, transformers fills missing weights with random numbers,
passes over unknown ones, and makes an empty tokenizer where its files are absent.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from musicscope.core.io import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    M = TypeVar("M", bound=PreTrainedModel)


AGAIN = "download it again, or fetch it with `dvc pull`"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""In the order in which transformers takes them; each may be in shards, listed by its index."""
TOKENIZERS = ("tokenizer.json", "spiece.model")
DeviceMap = str | Mapping[str, str | int | torch.device] | None
"""As accelerate takes it: "auto", or module name to device, "cpu" or "disk"."""
POINTER = b"version https://git-lfs.github.com/spec/"
SMALL = 2**26
"""Bytes of a file below which a lack of memory means a damaged length inside it."""
RECOMPUTED = re.compile(r"embed_positions\.weights$|rotary_emb\.inv_freq$|position_ids$")
"""Tables in older checkpoints that the library computes by now."""
RENAMED = (("weight_g", "parametrizations.weight.original0"),
           ("weight_v", "parametrizations.weight.original1"))  # fmt: skip
UNUSED_IDS = 256
"""Rows of an embedding beyond the tokenizer's ids; T5 has 28, or 128 without its extra ids."""
TEXTS = ("*.json", "*.model", "*.txt")
FILES: dict[str, tuple[tuple[str, ...], ...]] = {
    # Hub pages hold every format beside the others: twice 2 GB for musicgen-small.
    "musicgen": ((*TEXTS, "model*.safetensors"), ("pytorch_model*.bin",)),
    "audiocraft": (("state_dict.bin", "compression_state_dict.bin"),),
    "t5": ((*TEXTS, "model*.safetensors"), ("pytorch_model*.bin",)),
}
"""File patterns of each family; the second row only where the first brought no weights."""


# ---- the hub


def fetch(name: str, revision: str | None, patterns: Sequence[str] | None = None) -> Path:
    """Fetch files of hub model `name` ("owner/model") that fit `patterns` (None: all); the folder.

    ValueError without a `revision` that pins (a branch moves); FileNotFoundError with the remedy
    if hub and cache have none.
    """
    if not revision or revision == "main":
        raise ValueError(
            f"hub model {name} needs revision=: a commit hash from its page (Files, History), "
            "or a tag. A branch such as main moves, and results with it"
        )
    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=None if patterns is None else list(patterns)
        )
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise FileNotFoundError(
            f"could not fetch {name} at revision {revision} from the hub or its cache "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); check name, revision and "
            "network, or copy the files to a folder and give that"
        ) from error
    return Path(folder)


def fetch_family(name: str, revision: str | None, system: str) -> Path:
    """Fetch the files that the family `system` loads (all if not in `FILES`); the folder."""
    if system not in FILES:
        return fetch(name, revision)
    for patterns in FILES[system]:
        folder = fetch(name, revision, patterns)
        if any(any(folder.glob(p)) for p in patterns if p not in TEXTS):
            return folder
    raise FileNotFoundError(
        f"{name} at revision {revision} has none of {', '.join(sum(FILES[system], ()))}"
    )


# ---- files


def check_file(path: Path) -> Path:
    """Refuse (ValueError) a git-lfs pointer in place of the file; returns `path`."""
    with open(path, "rb") as stream:
        if stream.read(len(POINTER)) == POINTER:
            raise ValueError(
                f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull`, or "
                "download the file again"
            )
    return path


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a folder; {} without one. ValueError names a pointer or a broken file."""
    path = folder / "config.json"
    found = read_json(check_file(path)) if path.is_file() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not the settings of a model")
    return found


def damaged(path: Path, error: Exception) -> ValueError:
    """Make the error for a file that cannot be read."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ValueError(f"{path} is cut short or damaged ({reason}): {AGAIN}")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors. FileNotFoundError, or ValueError for a pointer, a damaged file or NaN."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {AGAIN}")
    try:
        found = load_file(check_file(path))
    except SafetensorError as error:
        raise damaged(path, error) from error
    if bad := [name for name, value in found.items() if not torch.isfinite(value).all()]:
        raise damaged(path, ValueError(f"NaN or infinity in {', '.join(bad[:3])}"))
    return found


def read_pickle(path: Path, device: str = "cpu") -> object:
    """Read a file of `torch.save` that names nothing but tensors and plain containers.

    ValueError for a pointer, a damaged file, and one that would need other objects.
    """
    try:
        return torch.load(
            check_file(path), map_location=device, weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except OSError:
        raise
    except Exception as error:  # foreign bytes: torch's unpickler raises whatever they lead to
        if isinstance(error, ValueError) and "git-lfs" in str(error):
            raise
        if isinstance(error, MemoryError) and path.stat().st_size > SMALL:
            raise
        raise damaged(path, error) from error


def weight_files(folder: Path) -> list[Path]:
    """Find the files that hold a folder's weights. FileNotFoundError for none, or a lost shard."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = [
                folder / f for f in sorted(set(read_json(check_file(index))["weight_map"].values()))
            ]
            if lost := [file.name for file in files if not file.is_file()]:
                raise FileNotFoundError(
                    f"{folder} lacks the weights {', '.join(lost)} that {index.name} names: {AGAIN}"
                )
            return files
    raise FileNotFoundError(
        f"{folder} holds no weights ({' or '.join(WEIGHTS)}, or their .index.json): {AGAIN}"
    )


def stored_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of all weights in a folder by name, as the files spell them; reads no weight.

    FileNotFoundError or ValueError names a file that is absent, a pointer, or damaged.
    """
    shapes: dict[str, list[int]] = {}
    for file in weight_files(folder):
        if file.suffix == ".bin":
            held = read_pickle(file, "meta")
            if not isinstance(held, dict):
                raise damaged(file, ValueError(f"a {type(held).__name__}, not weights"))
            shapes |= {k: list(v.shape) for k, v in held.items() if isinstance(v, Tensor)}
            continue
        try:
            with safe_open(check_file(file), framework="pt") as stored:
                names = stored.keys()
                shapes |= {name: stored.get_slice(name).get_shape() for name in names}
        except SafetensorError as error:
            raise damaged(file, error) from error
    return shapes


# ---- weights


def refuse(
    place: Path, missing: Iterable[str], unknown: Iterable[str], shapes: Iterable[str] = ()
) -> None:
    """Raise ValueError if any weight is missing, unknown or of another shape than its config's."""
    kinds = {"missing": missing, "unknown": unknown, "of another shape": shapes}
    wrong = {kind: sorted(names) for kind, names in kinds.items()}
    if any(wrong.values()):
        told = ", ".join(f"{len(n)} {kind} {n[:3]}" for kind, n in wrong.items() if n)
        raise ValueError(
            f"the weights in {place} are not those of its own config ({told}); they are another "
            f"model's, or incomplete: {AGAIN}"
        )


def fill(module: nn.Module, weights: Mapping[str, Tensor], place: Path) -> None:
    """Load `weights` of the file `place`; refuse (ValueError) all but exactly those of `module`."""
    own = module.state_dict()
    shapes = [
        f"{name} {list(value.shape)} for {list(own[name].shape)}"
        for name, value in weights.items()
        if name in own and value.shape != own[name].shape
    ]
    refuse(place, (), (), shapes)
    found = module.load_state_dict(weights, strict=False)
    refuse(place, found.missing_keys, found.unexpected_keys)


def unknown_names(names: Iterable[str], model: PreTrainedModel, ignored: str | None) -> list[str]:
    """Names of weights that `model` has no place for. transformers reports few of them."""
    known, prefix = set(model.state_dict()), f"{model.base_model_prefix}."
    found = []
    for name in names:
        new = name
        for old, by in RENAMED:
            new = new.replace(old, by)
        if known.isdisjoint((name, new, prefix + new, new.removeprefix(prefix))):
            found.append(name)
    return [n for n in found if not RECOMPUTED.search(n) and not (ignored and re.match(ignored, n))]


def load_pretrained(cls: type[M], folder: Path, ignored: str | None = None, /, **options: Any) -> M:
    """Load a save_pretrained folder, whole: `from_pretrained` with local files and checks.

    `ignored`: pattern of weights that `cls` has no use for. FileNotFoundError or ValueError names
    a file that is absent, a pointer or damaged, and weights that do not fit config.json.
    """
    from transformers.utils import logging

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: not a save_pretrained folder")
    read_config(folder)
    names = stored_shapes(folder)
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # its own report of what does not fit, which is an error here
    try:
        model, report = cls.from_pretrained(  # ty: ignore[not-iterable]  a pair with loading info
            folder, local_files_only=True, weights_only=True, output_loading_info=True,
            ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
    finally:
        logging.set_verbosity(level)
    shapes = [f"{n} {list(a)} for {list(b)}" for n, a, b in report["mismatched_keys"]]
    refuse(folder, report["missing_keys"], unknown_names(names, model, ignored), shapes)
    return model


# ---- parts that must fit one another


def load_tokenizer(folder: Path, encoder: PretrainedConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a T5 with config `encoder`.

    FileNotFoundError without its files: every word would become <unk>. ValueError for one whose ids
    are not those of the encoder's embedding.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    files = [folder / name for name in TOKENIZERS if (folder / name).is_file()]
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no tokenizer ({' or '.join(TOKENIZERS)}), without which every word of "
            f"a caption becomes <unk>: take it from the model's page, or {AGAIN}"
        )
    for file in files:
        check_file(file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises plain Exception
        raise damaged(files[0], error) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"{files[0]} gives a {type(tokenizer).__name__}, not a tokenizer")
    count, rows = len(tokenizer), encoder.vocab_size
    ends = {"pad": (tokenizer.pad_token_id, encoder.pad_token_id),
            "eos": (tokenizer.eos_token_id, encoder.eos_token_id)}  # fmt: skip
    other = {name: pair for name, pair in ends.items() if pair[0] != pair[1]}
    if not 0 <= rows - count <= UNUSED_IDS or other:
        raise ValueError(
            f"{files[0]} is not the tokenizer of the text encoder: {count} ids for {rows} rows of "
            f"its embedding{''.join(f', {n} {a} for {b}' for n, (a, b) in other.items())}; take "
            "tokenizer and text encoder from one model"
        )
    return tokenizer


def check_codec(
    codec: nn.Module, place: Path, found: tuple[int, int], wanted: tuple[int, int]
) -> None:
    """Refuse (ValueError) a codec that does not fit its decoder, or whose codebooks are untrained.

    `found` and `wanted` are (codebooks in use, codes in each).
    """
    if found != wanted:
        raise ValueError(
            f"{place}: the codec has {found[0]} codebooks of {found[1]} codes, the decoder needs "
            f"{wanted[0]} of {wanted[1]}; they do not belong together: take both from one model"
        )
    tables = [pair for pair in codec.named_buffers() if pair[0].endswith("codebook.embed")]
    for name, table in tables[: wanted[0]]:
        if table.device.type != "meta" and not table.any():
            raise ValueError(f"{place}: {name} of the codec is all zero, not trained: {AGAIN}")
