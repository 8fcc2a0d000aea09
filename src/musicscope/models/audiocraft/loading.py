"""Read MusicGen in audiocraft's own format: checkpoints, their configs, and checks of both.

A folder holds ``state_dict.bin`` (the language model) and ``compression_state_dict.bin`` (EnCodec).
Each is a ``torch.save`` of a dict: ``best_state`` (the weights) and ``xp.cfg`` (the whole config of
the training run). Exported checkpoints hold ``xp.cfg`` as YAML text; checkpoints as training wrote
them hold a pickled OmegaConf object and the weights one level deeper (``best_state["model"]``).

All are read with ``weights_only``, so that a file can name nothing but tensors and plain
containers. The classes of OmegaConf are let through under their names as `_Record`, which keeps
the values it is given and runs nothing; the config is then built from those values.
"""

from __future__ import annotations

import contextlib
import pickle
import zipfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from musicscope.models import hub
from musicscope.models.audiocraft.compat import import_audiocraft

MODEL_FILE, CODEC_FILE, TEXT_FOLDER = "state_dict.bin", "compression_state_dict.bin", "text_encoder"


class _Record:
    """Stand-in for any object of OmegaConf in a pickle: `__dict__` holds its stored values."""

    def __new__(cls, *args: Any) -> _Record:
        return super().__new__(cls)


def _empty(*args: Any) -> dict:
    """Stand-in for ``collections.defaultdict``, in which OmegaConf caches resolvers."""
    return {}


NODES = ("AnyNode", "BooleanNode", "BytesNode", "EnumNode", "FloatNode", "IntegerNode", "PathNode",
         "StringNode", "InterpolationResultNode")  # fmt: skip
RECORDS = (
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.base.UnionNode",
    "omegaconf.nodes.ValueNode",
    *(f"omegaconf.nodes.{name}" for name in NODES),
    # Types that a node's metadata name; they are only ever stored.
    *(f"typing.{name}" for name in ("Any", "Dict", "List", "Union", "Optional")),
    *(f"builtins.{name}" for name in ("dict", "list", "tuple", "str", "int", "float", "bool")),
)
ALLOWED = [*((_Record, name) for name in RECORDS), (_empty, "collections.defaultdict")]


def _plain(node: Any) -> Any:
    """Turn a config that was read as `_Record`s into dicts, lists and values."""
    if isinstance(node, _Record):
        stored = node.__dict__
        return _plain(stored["_content"] if "_content" in stored else stored.get("_val"))
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_plain(value) for value in node]
    return node


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], DictConfig]:
    """Read (weights, config) of one file, exported or as training wrote it.

    FileNotFoundError if it is missing; ValueError if it is damaged, would need other objects than
    tensors and configs, refers to a codec by name instead of holding it, or lacks a part.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; an audiocraft folder holds {MODEL_FILE} and {CODEC_FILE}"
        )
    try:
        with torch.serialization.safe_globals(ALLOWED):  # ty: ignore[invalid-argument-type]
            package = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(
            f"{path} could not be read as tensors and a config ({str(error).splitlines()[0]}); "
            "fetch it again, or, if you trained it, export it with audiocraft.utils.export"
        ) from error
    if not isinstance(package, dict):
        raise ValueError(f"{path} holds a {type(package).__name__}, not an audiocraft checkpoint")
    if "pretrained" in package:
        raise ValueError(
            f"{path} only names the codec {package['pretrained']!r}; replace it by that codec's "
            "own checkpoint, or convert a folder in transformers' layout (audiocraft.convert)"
        )
    weights = package.get("fsdp_best_state") or package.get("best_state")
    if isinstance(weights, dict) and isinstance(weights.get("model"), dict):
        weights = weights["model"]
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise ValueError(f"{path} holds no weights under best_state; found {sorted(package)}")
    stored = package.get("xp.cfg")
    config = OmegaConf.create(stored if isinstance(stored, str) else _plain(stored) or {})
    if not isinstance(config, DictConfig) or not config:
        raise ValueError(f"{path} holds no config under xp.cfg; found {sorted(package)}")
    return dict(weights), config


def check_supported(config: DictConfig, path: Path) -> None:
    """Refuse all but mono text-to-music language models with the plain delay pattern.

    ValueError names the file, the key and the value that is not supported.
    """

    def value(key: str, default: Any = None) -> Any:
        found = OmegaConf.select(config, key, default=default)
        return OmegaConf.to_container(found) if OmegaConf.is_config(found) else found

    books = value("transformer_lm.n_q")
    conditions = [name for name in value("conditioners", {}) if name != "args"]
    fused = {op: value(f"fuser.{op}", []) for op in ("sum", "prepend", "input_interpolate")}
    no_melody = "melody, style and other conditioning is not supported, only text"
    kind = value("conditioners.description.model")
    needs = [
        ("lm_model", value("lm_model"), "transformer_lm", "only MusicGen's decoder is supported"),
        (
            "interleave_stereo_codebooks.use",
            bool(value("interleave_stereo_codebooks.use", False)),
            False,
            "stereo is not supported: take a mono model",
        ),
        ("conditioners", conditions, ["description"], no_melody),
        ("conditioners.description.model", kind, "t5", no_melody),
        ("fuser.cross", value("fuser.cross", []), ["description"], no_melody),
        ("fuser", [op for op, names in fused.items() if names], [], no_melody),
        ("fuser.cross_attention_pos_emb", bool(value("fuser.cross_attention_pos_emb")), False, ""),
        (
            "conditioners.description.t5.normalize_text",
            bool(value("conditioners.description.t5.normalize_text")),
            False,
            "it needs spacy",
        ),
        (
            "codebooks_pattern.modeling",
            value("codebooks_pattern.modeling") or value("transformer_lm.q_modeling"),
            "delay",
            "",
        ),
        (
            "codebooks_pattern.delay.delays",
            value("codebooks_pattern.delay.delays") or list(range(books or 0)),
            list(range(books or 0)),
            "stereo models delay two codebooks together: take a mono model",
        ),
        ("transformer_lm.norm_first", value("transformer_lm.norm_first"), True, ""),
        ("transformer_lm.positional_embedding",
         value("transformer_lm.positional_embedding", "sin"), "sin", ""),
        ("transformer_lm.past_context", value("transformer_lm.past_context"), None, ""),
    ]  # fmt: skip
    for step in ("flatten_first", "empty_initial"):
        key = f"codebooks_pattern.delay.{step}"
        needs.append((key, value(key) or 0, 0, ""))
    for key, found, wanted, why in needs:
        if found != wanted:
            raise ValueError(
                f"{path}: {key} is {found!r}, need {wanted!r}{'; ' + why if why else ''}"
            )


@contextlib.contextmanager
def _local_t5(conditioners: Any, folder: Path, width: int) -> Generator[None]:
    """Let audiocraft's T5 conditioner take its T5 from `folder`, while a model is being built."""
    from transformers import AutoTokenizer

    cls, tokenizer = conditioners.T5Conditioner, conditioners.T5Tokenizer
    names, widths = cls.MODELS, cls.MODELS_DIMS
    cls.MODELS, cls.MODELS_DIMS = [*names, str(folder)], {**widths, str(folder): width}
    conditioners.T5Tokenizer = AutoTokenizer  # the class that the folder itself names
    try:
        yield
    finally:
        cls.MODELS, cls.MODELS_DIMS, conditioners.T5Tokenizer = names, widths, tokenizer


def text_encoder_folder(source: Path, config: DictConfig, revision: str | None) -> Path:
    """Find the T5: in the model's folder, else on the hub under the name in the config."""
    folder = source / TEXT_FOLDER
    if folder.is_dir():
        return folder
    name = str(config.conditioners.description.t5.name)
    if revision is None:
        raise FileNotFoundError(
            f"{source} holds no {TEXT_FOLDER}/ (a T5 as save_pretrained writes it): put {name} "
            "there, or give text_revision=, the commit of its hub page to take it from"
        )
    return hub.fetch_model(name if "/" in name else f"google-t5/{name}", revision, "t5")


def build_language_model(
    path: Path, text: Path | None, text_revision: str | None, dtype: torch.dtype
) -> tuple[Any, DictConfig]:
    """Build (audiocraft's LMModel in `dtype`, its config) from a checkpoint; T5 in float32."""
    weights, config = read_checkpoint(path)
    check_supported(config, path)
    import_audiocraft()
    from audiocraft.models import builders
    from audiocraft.modules import conditioners
    from transformers import AutoConfig

    text = text or text_encoder_folder(path.parent, config, text_revision)
    OmegaConf.set_struct(config, False)
    config.device, config.dtype = "cpu", str(dtype).removeprefix("torch.")
    config.conditioners.description.t5.name = str(text)
    # Weights are about to be read: drawing random ones takes longer than that on a large model.
    config.transformer_lm.weight_init = config.transformer_lm.depthwise_init = None
    config.transformer_lm.zero_bias_init = False
    width = AutoConfig.from_pretrained(text, local_files_only=True).d_model
    with _local_t5(conditioners, text, width):
        model = builders.get_lm_model(config)
    _fill(model, weights, path)
    model = model.eval().to(dtype).requires_grad_(False)
    text_encoder = model.condition_provider.conditioners["description"].t5
    text_encoder.eval().float().requires_grad_(False)  # ty: ignore[missing-union-attribute]  module
    model.cfg = config  # ty: ignore[invalid-assignment]  audiocraft's own code sets it like this
    return model, config


def build_codec(path: Path, config: DictConfig) -> Any:
    """Build audiocraft's EncodecModel at `path` in float32, with the codebooks that `config` (of
    the language model) uses."""
    weights, own = read_checkpoint(path)
    import_audiocraft()
    from audiocraft.models import builders

    OmegaConf.set_struct(own, False)
    own.device = "cpu"
    if int(OmegaConf.select(own, "encodec.channels", default=1)) != 1:
        raise ValueError(f"{path}: encodec.channels is not 1; stereo is not supported")
    codec = builders.get_compression_model(own)
    _fill(codec, weights, path)
    codec = builders.get_wrapped_compression_model(codec, config)
    return codec.float().eval().requires_grad_(False)


def _fill(model: torch.nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        what = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the weights in {path} are not those of its own config ({what}); fetch it again"
        ) from error
