"""Import audiocraft 1.3.0, and read MusicGen in its own format: checkpoints, configs, checks.

A folder holds ``state_dict.bin`` (the language model) and ``compression_state_dict.bin`` (EnCodec).
Each is a ``torch.save`` of a dict: ``best_state`` (the weights) and ``xp.cfg`` (the whole config of
the training run). Exported checkpoints hold ``xp.cfg`` as YAML text; checkpoints as training wrote
them hold a pickled OmegaConf object and the weights one level deeper (``best_state["model"]``).

All are read with ``weights_only``, so that a file can name nothing but tensors and plain
containers. The classes of OmegaConf are let through under their names as `_Record`, which keeps
the values it is given and runs nothing; the config is then built from those values.

audiocraft imports packages that loading and running MusicGen never calls: torchaudio, librosa
(melody), av (reading files), spacy and num2words (text normalisation), xformers (attention kernels;
its default backend is torch's). Where one is absent, a module stands in for it while audiocraft is
imported; its functions raise ImportError with the package's name when called. Afterwards the
stand-ins are removed, so that no other library takes them for the packages; only xformers stays,
which audiocraft imports again when it runs.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, NoReturn

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from musicscope.models import checkpoint, missing
from musicscope.models.musicgen.delay_pattern import GUIDANCE

if TYPE_CHECKING:
    from audiocraft.models.encodec import CompressionModel
    from audiocraft.models.lm import LMModel
    from transformers import T5EncoderModel


MODEL_FILE, CODEC_FILE, TEXT_FOLDER = "state_dict.bin", "compression_state_dict.bin", "text_encoder"


class _Record:
    """Stand-in for any object of OmegaConf in a pickle: `__dict__` holds its stored values."""

    def __new__(cls, *args: object) -> _Record:
        return super().__new__(cls)


def _empty(*args: object) -> dict:
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


def _plain(node: object) -> object:
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
            package = checkpoint.read_pickle(path)
    except ValueError as error:
        raise ValueError(f"{error}; if you trained it, run audiocraft.utils.export") from error
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
    try:
        content = stored if isinstance(stored, str) else _plain(stored)
        config = OmegaConf.create(content if isinstance(content, str | dict) else {})
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise checkpoint.damaged(path, error) from error
    if not isinstance(config, DictConfig) or not config:
        raise ValueError(f"{path} holds no config under xp.cfg; found {sorted(package)}")
    return dict(weights), config


def check_supported(config: DictConfig, path: Path) -> None:
    """Refuse all but mono text-to-music language models with the plain delay pattern.

    ValueError names the file, the key and the value that is not supported.
    """

    def value(key: str, default: object = None):
        found = OmegaConf.select(config, key, default=default)
        return OmegaConf.to_container(found) if OmegaConf.is_config(found) else found

    books = value("transformer_lm.n_q")
    conditions = [name for name in value("conditioners", {}) if name != "args"]
    fused = {op: value(f"fuser.{op}", []) for op in ("sum", "prepend", "input_interpolate")}
    no_melody = "melody, style and other conditioning is not supported, only text"
    kind = value("conditioners.description.model")
    normalised = bool(value("conditioners.description.t5.normalize_text"))
    plain = list(range(books or 0))
    pattern = value("codebooks_pattern.modeling") or value("transformer_lm.q_modeling")
    stereo = "stereo is not supported: take a mono model"
    needs = [
        ("lm_model", value("lm_model"), "transformer_lm", "only MusicGen's decoder is supported"),
        ("interleave_stereo_codebooks.use", bool(value("interleave_stereo_codebooks.use", False)),
         False, stereo),
        ("conditioners", conditions, ["description"], no_melody),
        ("conditioners.description.model", kind, "t5", no_melody),
        ("fuser.cross", value("fuser.cross", []), ["description"], no_melody),
        ("fuser", [op for op, names in fused.items() if names], [], no_melody),
        ("fuser.cross_attention_pos_emb", bool(value("fuser.cross_attention_pos_emb")), False, ""),
        ("conditioners.description.t5.normalize_text", normalised, False, "it needs spacy"),
        ("codebooks_pattern.modeling", pattern, "delay", ""),
        ("codebooks_pattern.delay.delays", value("codebooks_pattern.delay.delays") or plain, plain,
         "stereo models delay two codebooks together: take a mono model"),
        ("codebooks_pattern.delay.flatten_first",
         value("codebooks_pattern.delay.flatten_first") or 0, 0, ""),
        ("codebooks_pattern.delay.empty_initial",
         value("codebooks_pattern.delay.empty_initial") or 0, 0, ""),
        ("transformer_lm.norm_first", value("transformer_lm.norm_first"), True, ""),
        ("transformer_lm.positional_embedding",
         value("transformer_lm.positional_embedding", "sin"), "sin", ""),
        ("transformer_lm.past_context", value("transformer_lm.past_context"), None, ""),
    ]  # fmt: skip
    for key, found, wanted, why in needs:
        if found != wanted:
            raise ValueError(
                f"{path}: {key} is {found!r}, need {wanted!r}{'; ' + why if why else ''}"
            )


def settle_guidance(config: DictConfig, path: Path) -> None:
    """Fill in the scale of guidance, with a warning, where the config names none."""
    key = "classifier_free_guidance"
    if OmegaConf.select(config, f"{key}.inference_coef") is None:
        warnings.warn(f"{path} lacks {key}.inference_coef: {GUIDANCE} is used", stacklevel=4)
        settings = {"training_dropout": 0.0, "inference_coef": GUIDANCE}
        OmegaConf.update(config, key, settings, force_add=True)


@contextlib.contextmanager
def _local_t5(conditioners: ModuleType, folder: Path) -> Generator[None]:
    """Let audiocraft's T5 conditioner take its T5 from `folder`, while a model is being built."""
    cls = conditioners.T5Conditioner
    own = {name: vars(conditioners)[name] for name in ("T5Tokenizer", "T5EncoderModel")}
    names, widths = cls.MODELS, cls.MODELS_DIMS
    encoder = load_text_encoder(folder)
    tokenizer = checkpoint.load_tokenizer(folder, encoder.config)
    cls.MODELS = [*names, str(folder)]
    cls.MODELS_DIMS = {**widths, str(folder): encoder.config.d_model}
    vars(conditioners).update(
        T5EncoderModel=SimpleNamespace(from_pretrained=lambda name: encoder),
        T5Tokenizer=SimpleNamespace(from_pretrained=lambda name: tokenizer),
    )
    try:
        yield
    finally:
        cls.MODELS, cls.MODELS_DIMS = names, widths
        vars(conditioners).update(own)


def load_text_encoder(folder: Path) -> T5EncoderModel:
    """Load the encoder of the T5 in `folder`, in float32; its decoder is not used."""
    from transformers import T5EncoderModel

    ignored = r"decoder\.|lm_head\."
    return checkpoint.load_pretrained(T5EncoderModel, folder, ignored, dtype=torch.float32)


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
    return checkpoint.fetch_family(name if "/" in name else f"google-t5/{name}", revision, "t5")


def build_language_model(
    path: Path, text: Path | None, text_revision: str | None, dtype: torch.dtype
) -> tuple[LMModel, DictConfig]:
    """Build (audiocraft's LMModel in `dtype`, its config) from a checkpoint; T5 in float32."""
    weights, config = read_checkpoint(path)
    check_supported(config, path)
    settle_guidance(config, path)
    import_audiocraft()
    from audiocraft.models import builders
    from audiocraft.modules import conditioners

    text = text or text_encoder_folder(path.parent, config, text_revision)
    OmegaConf.set_struct(config, False)
    config.device, config.dtype = "cpu", str(dtype).removeprefix("torch.")
    config.conditioners.description.t5.name = str(text)
    # Weights are about to be read: drawing random ones takes longer than that on a large model.
    config.transformer_lm.weight_init = config.transformer_lm.depthwise_init = None
    config.transformer_lm.zero_bias_init = False
    with _local_t5(conditioners, text):
        model = builders.get_lm_model(config)
    checkpoint.fill(model, weights, path)
    model = model.eval().to(dtype).requires_grad_(False)
    text_encoder = model.condition_provider.conditioners["description"].t5
    text_encoder.eval().float().requires_grad_(False)  # ty: ignore[missing-union-attribute]  module
    model.cfg = config  # ty: ignore[invalid-assignment]  audiocraft's own code sets it like this
    return model, config


def build_codec(path: Path, config: DictConfig) -> CompressionModel:
    """Build audiocraft's EncodecModel at `path` in float32, with the codebooks that `config` (of
    the language model) uses."""
    weights, own = read_checkpoint(path)
    used = OmegaConf.select(config, "compression_model_n_q", default=None) or own.rvq.n_q
    card = int(config.transformer_lm.card)
    held = (min(int(used), int(own.rvq.n_q)), int(own.rvq.bins))
    rates = config.get("sample_rate"), own.get("sample_rate")
    if None not in rates and rates[0] != rates[1]:
        raise ValueError(
            f"{path}: the codec works at {rates[1]} Hz, the language model at {rates[0]} Hz; they "
            "do not belong together: take both from one model"
        )
    import_audiocraft()
    from audiocraft.models import builders

    OmegaConf.set_struct(own, False)
    own.device = "cpu"
    if int(OmegaConf.select(own, "encodec.channels", default=1)) != 1:
        raise ValueError(f"{path}: encodec.channels is not 1; stereo is not supported")
    codec = builders.get_compression_model(own)
    checkpoint.fill(codec, weights, path)
    checkpoint.check_codec(codec, path, held, (int(config.transformer_lm.n_q), card))
    codec = builders.get_wrapped_compression_model(codec, config)
    return codec.float().eval().requires_grad_(False)


# ---- the package

ABSENT = {
    "torchaudio": ("torchaudio.transforms", "torchaudio.functional"),
    "librosa": ("librosa.filters",),
    "av": (),
    "spacy": (),
    "num2words": (),
    "xformers": ("xformers.ops",),
}
"""Packages that audiocraft imports and MusicGen does not use, with the submodules it names."""
KEPT = "xformers"


class _StandIn(ModuleType):
    """A module in which every public name is a function that raises when called."""

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)
        return missing(self.__name__.partition(".")[0], f"{self.__name__}.{name}")


def _stand_in(package: str) -> list[str]:
    """Put stand-ins for an absent package and its submodules in sys.modules; their names."""
    if sys.modules.get(package) is not None or importlib.util.find_spec(package) is not None:
        return []
    names = [package, *ABSENT[package]]
    for name in names:
        module = _StandIn(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=name == package)
        if name == package:
            module.__path__ = []
        sys.modules[name] = module
        if name != package:
            setattr(sys.modules[package], name.rpartition(".")[2], module)
    if package == "xformers":
        import torch

        # The one function that audiocraft calls with torch's attention backend, and a mask of which
        # it needs no more than the name.
        mask = type("LowerTriangularMask", (), {})
        vars(sys.modules["xformers.ops"]).update(unbind=torch.unbind, LowerTriangularMask=mask)
    return names


def _settle_transformers() -> None:
    """Have transformers record which packages are installed, before stand-ins exist."""
    utils = importlib.import_module("transformers.utils")
    for package in ABSENT:
        getattr(utils, f"is_{package}_available", bool)()


def import_audiocraft() -> ModuleType:
    """Import the package `audiocraft` once, with stand-ins for absent packages.

    ImportError with the remedy if audiocraft, or a small package that it needs, is missing.
    """
    if "audiocraft" in sys.modules:
        return sys.modules["audiocraft"]
    if importlib.util.find_spec("audiocraft") is None:
        raise ImportError(
            "audiocraft is not installed; pip install --no-deps -r requirements-nodeps.txt (its "
            "own pins would replace torch)"
        )
    _settle_transformers()
    added = [name for package in ABSENT for name in _stand_in(package)]
    try:
        return importlib.import_module("audiocraft")
    except BaseException:
        # A half imported package would look whole to the next caller.
        for name in [n for n in sys.modules if n.partition(".")[0] == "audiocraft"]:
            del sys.modules[name]
        added = [name for name in added if name in sys.modules]
        raise
    finally:
        for name in added:
            if name.partition(".")[0] != KEPT:
                sys.modules.pop(name, None)
