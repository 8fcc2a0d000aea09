"""Files of other libraries: SAEs in the layouts of SAELens and dictionary_learning.

Neither library is needed. SAELens (6.x) keeps cfg.json and sae_weights.safetensors,
dictionary_learning config.json and ae.pt. What differs is whether b_dec is subtracted before the
encoder, whether norms of decoder rows scale the code, and what a threshold belongs to. All of it is
folded into the weights in float64, so that codes are equal up to float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from musicscope.core.io import atomic_file, read_json, write_json
from musicscope.dictionaries.core import (
    DICTIONARY_CLASSES,
    JUMPRELU,
    ModelWeights,
    TopKSAE,
    UniversalSAE,
)
from musicscope.models.checkpoint import check_file, damaged, read_pickle, read_safetensors

SAE_LENS = ("cfg.json", "sae_weights.safetensors")
DICTIONARY_LEARNING = ("config.json", "ae.pt")
SAE_LENS_VERSION = "6.0.0"
"""Version of the layout of cfg.json that is written."""
RELU_CLASSES = ("AutoEncoder", "AutoEncoderNew")
MATRYOSHKA = "MatryoshkaBatchTopKSAE"
UNNORMALISED = (None, "none", False)


@dataclass(frozen=True)
class About:
    """What a format says about an SAE beside its weights; absent values are not written."""

    model: str = ""
    layer: str = ""
    """Hook point, such as layers.3."""
    frames: int = 0
    """Frames of a clip in training: the context length of the other libraries."""
    data: str = ""
    """Name of the data that the SAE was trained on."""
    trainer: Mapping[str, Any] = field(default_factory=dict)
    """Section "trainer" of config.json."""

    @property
    def number(self) -> int:
        """Number of the layer, 3 of layers.3; ValueError if it has none."""
        digits = [part for part in self.layer.split(".") if part.isdigit()]
        if not digits:
            raise ValueError(
                f"hook point {self.layer!r} has no number, which dictionary_learning's "
                "trainer.layer must be: export to sae-lens instead"
            )
        return int(digits[-1])


# --- write ------------------------------------------------------------------------------------


def one_model(dictionary: UniversalSAE, model: str) -> TopKSAE:
    """Make an SAE of one model's side of a universal SAE; codes are `scale` times the shared code.

    ValueError for a crosscoder, whose code needs all models, and for a model that it lacks.
    """
    if dictionary.joint:
        raise ValueError("a crosscoder computes its code from all models: export a usae or an SAE")
    if model not in dictionary.names:
        raise ValueError(f"the usae is of {', '.join(dictionary.names)}, not of {model}")
    side: ModelWeights = dictionary.weights[dictionary.names.index(model)]
    sae = TopKSAE(side.W_enc, side.b_enc, side.W_dec, side.b_dec, dictionary.k)
    return sae.fold(side.mean, float(side.scale))


def save_sae_lens(sae: TopKSAE, folder: str | Path, about: About) -> None:
    """Write cfg.json and sae_weights.safetensors, for SAELens' ``SAE.load_from_disk``.

    batchtopk becomes SAELens' jumprelu, as SAELens itself saves it. ValueError for batchtopk
    without a threshold.
    """
    folder = Path(folder)
    tensors = {
        "W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec,
    }  # fmt: skip
    config: dict[str, object] = {
        "d_in": sae.width, "d_sae": sae.n_latents, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none",
        "reshape_activations": "none",
    }  # fmt: skip
    metadata: dict[str, object] = {
        "sae_lens_version": SAE_LENS_VERSION, "model_name": about.model, "hook_name": about.layer,
        "context_size": about.frames, "dataset_path": about.data, "prepend_bos": False,
    }  # fmt: skip
    metadata = {key: value for key, value in metadata.items() if value not in ("", 0)}
    if sae.activation == "topk":
        config |= {"architecture": "topk", "k": sae.k, "rescale_acts_by_decoder_norm": False}
    else:
        config["architecture"] = "jumprelu"
        metadata["k"] = sae.k
        tensors["threshold"] = torch.as_tensor(sae.limits()).expand(sae.n_latents)
    plain = {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_file(folder / SAE_LENS[1]) as temporary:
        save_file(plain, temporary)
    write_json(folder / SAE_LENS[0], {**config, "metadata": metadata})


def save_dictionary_learning(sae: TopKSAE, folder: str | Path, about: About) -> None:
    """Write config.json and ae.pt, for dictionary_learning's ``load_dictionary``.

    SAELens' converter of that format reads `buffer.ctx_len` and the number of the layer too.
    """
    folder = Path(folder)
    layer = {"layer": about.number, "hook_point": about.layer, "lm_name": about.model}
    sae.save(folder, {**about.trainer, **layer})
    (folder / "sae.safetensors").unlink()
    config = read_json(folder / DICTIONARY_LEARNING[0])
    buffer = {"ctx_len": about.frames, "d_submodule": sae.width, "io": "out"}
    write_json(folder / DICTIONARY_LEARNING[0], {**config, "buffer": buffer})
    if sae.activation == JUMPRELU:  # the bias that is folded there, from a product in float64
        path = folder / DICTIONARY_LEARNING[1]
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        folded = sae.b_enc.double() - sae.W_enc.double() @ sae.b_dec.double()
        with atomic_file(path) as temporary:
            torch.save({**tensors, "b_enc": folded.float().cpu()}, temporary)


# --- read -------------------------------------------------------------------------------------


def load_sae_folder(
    folder: str | Path, device: str = "cpu", k: int | None = None
) -> tuple[TopKSAE, About]:
    """Load an SAE of this package, SAELens or dictionary_learning, by the files of its folder.

    ReLU SAEs become jumprelu with thresholds of 0. Codes and reconstructions are those of the other
    library; decoder rows keep their norms.

    Args:
        k: average number of active latents, where the files of a ReLU or JumpReLU SAE lack it.

    Raises:
        FileNotFoundError: the folder holds no SAE.
        ValueError: names the file and the property that is not supported.
    """
    folder = Path(folder)
    if all((folder / name).is_file() for name in SAE_LENS):
        sae, about = _from_sae_lens(folder, k)
    elif (folder / "config.json").is_file() and (
        (folder / "ae.pt").is_file() or (folder / "sae.safetensors").is_file()
    ):
        sae, about = _from_dictionary_learning(folder, k)
    else:
        raise FileNotFoundError(
            f"{folder} holds no SAE: expected {' and '.join(SAE_LENS)} (SAELens), or config.json "
            "with sae.safetensors or ae.pt (this package, dictionary_learning)"
        )
    return sae.to(device), about


def _settings(path: Path) -> dict[str, Any]:
    found = read_json(check_file(path))
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not the settings of an SAE")
    return found


def _pickled(path: Path) -> dict[str, Tensor]:
    found = read_pickle(path)
    if not isinstance(found, dict):
        raise damaged(path, ValueError(f"a {type(found).__name__}, not weights"))
    return found


def _topk_sae(path: Path, tensors: Mapping[str, Tensor], **settings: Any) -> TopKSAE:
    """Make the SAE; ValueError names the file."""
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    if missing := [name for name in names if name not in tensors]:
        raise ValueError(f"{path} has no tensor {', '.join(missing)}")
    if not isinstance(settings["k"], int):
        raise ValueError(f"{path.parent} does not say k: give --k, the average of active latents")
    try:
        W_enc, b_enc, W_dec, b_dec = (tensors[name].float().contiguous() for name in names)
        return TopKSAE(W_enc, b_enc, W_dec, b_dec, **settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _relu_threshold(tensors: Mapping[str, Tensor], latents: int) -> Tensor:
    """Return thresholds [F]; without one, those of a ReLU."""
    threshold = tensors.get("threshold", torch.zeros(()))
    return threshold.float().expand(latents).clamp_min(0).contiguous()


def _subtracted(W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """Turn the bias of W_enc x + b_enc into that of W_enc (x - b_dec) + b_enc."""
    return (b_enc.double() + W_enc.double() @ b_dec.double()).float()


def _whole(*values: object) -> int | None:
    """Return the first positive number, rounded."""
    found = (v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v > 0)
    value = next(found, None)
    return None if value is None else max(1, round(value))


def _from_sae_lens(folder: Path, k: int | None) -> tuple[TopKSAE, About]:
    path, config = folder / SAE_LENS[1], _settings(folder / SAE_LENS[0])
    metadata = {**config, **config.get("metadata", {})}
    architecture = config.get("architecture", "standard")
    keywords = config.get("activation_fn_kwargs") or {}
    if metadata.get("activation_fn", metadata.get("activation_fn_str")) == "topk":
        architecture = "topk"  # before version 6
    if architecture not in ("topk", "jumprelu", "standard"):
        raise ValueError(
            f"{folder}/cfg.json: architecture {architecture!r} is not supported: topk, jumprelu "
            "(also of batchtopk) or standard"
        )
    for key, plain in (
        ("normalize_activations", UNNORMALISED),
        ("reshape_activations", UNNORMALISED),
    ):
        if config.get(key) not in plain:
            raise ValueError(
                f"{folder}/cfg.json: {key} = {config[key]!r} is not supported: fold it into the "
                "weights with SAELens and save again"
            )
    tensors = read_safetensors(path)
    if "scaling_factor" in tensors and not torch.allclose(
        tensors["scaling_factor"], torch.ones_like(tensors["scaling_factor"])
    ):
        raise ValueError(f"{path}: scaling_factor is not supported: fold it into the weights")
    own = {name: tensors[name].float() for name in ("W_dec", "b_dec", "b_enc") if name in tensors}
    if "W_enc" in tensors:
        own["W_enc"] = tensors["W_enc"].float().T
    if config.get("rescale_acts_by_decoder_norm") and {"W_enc", "W_dec", "b_enc"} <= set(own):
        norm = own["W_dec"].norm(dim=1)
        own["b_enc"] = own["b_enc"] * norm
        own["W_enc"], own["W_dec"] = own["W_enc"] * norm[:, None], own["W_dec"] / norm[:, None]
    if not config.get("apply_b_dec_to_input", True) and len(own) == 4:
        own["b_enc"] = _subtracted(own["W_enc"], own["b_enc"], own["b_dec"])
    if architecture == "topk":
        settings = {"k": _whole(config.get("k"), keywords.get("k")), "activation": "topk"}
    else:
        threshold = _relu_threshold(tensors, len(own.get("b_enc", ())))
        settings = {
            "k": _whole(metadata.get("k"), k),
            "activation": JUMPRELU,
            "threshold": threshold,
        }
    about = About(
        model=str(metadata.get("model_name") or ""),
        layer=str(metadata.get("hook_name", metadata.get("hook_point")) or ""),
        frames=int(metadata.get("context_size") or 0),
        data=str(metadata.get("dataset_path") or ""),
    )
    return _topk_sae(path, own, **settings), about


def _from_dictionary_learning(folder: Path, k: int | None) -> tuple[TopKSAE, About]:
    config = _settings(folder / "config.json")
    trainer = config.get("trainer", {})
    kind, layer = trainer.get("dict_class"), trainer.get("hook_point", trainer.get("layer", ""))
    about = About(
        model=str(trainer.get("lm_name", "")),
        layer=f"layers.{layer}" if isinstance(layer, int) else str(layer),
        frames=int(config.get("buffer", {}).get("ctx_len", 0)),
        trainer=trainer,
    )
    known = {names[0] for names in DICTIONARY_CLASSES.values()}
    relu = (*RELU_CLASSES, DICTIONARY_CLASSES[JUMPRELU][0])
    own, path = folder / "sae.safetensors", folder / "ae.pt"
    if own.is_file() or kind in known - set(relu):
        _ = read_safetensors(own) if own.is_file() else _pickled(path)  # refuses a damaged file
        return TopKSAE.load(folder), about
    if kind not in (*relu, MATRYOSHKA):
        names = sorted({*known, *relu, MATRYOSHKA})
        raise ValueError(f"{folder}/config.json: trainer.dict_class {kind!r}: known {names}")
    tensors = _pickled(path)
    renamed = {
        "W_enc": tensors["W_enc"].T if "W_enc" in tensors else tensors.get("encoder.weight"),
        "b_enc": tensors.get("b_enc", tensors.get("encoder.bias")),
        "W_dec": tensors["W_dec"] if "W_dec" in tensors else tensors.get("decoder.weight"),
        "b_dec": tensors.get("b_dec", tensors.get("bias", tensors.get("decoder.bias"))),
    }
    weights = {name: tensor for name, tensor in renamed.items() if tensor is not None}
    if "W_dec" not in tensors and "W_dec" in weights:
        weights["W_dec"] = weights["W_dec"].T
    if kind not in ("AutoEncoder", MATRYOSHKA) and len(weights) == 4:  # b_dec is added only
        weights["b_enc"] = _subtracted(*(weights[name] for name in ("W_enc", "b_enc", "b_dec")))
    if kind == MATRYOSHKA:
        threshold = float(tensors.get("threshold", torch.tensor(-1.0)))
        settings = {
            "k": _whole(trainer.get("k")),
            "activation": "batchtopk",
            "threshold": threshold,
        }
    else:
        found = _whole(trainer.get("k"), trainer.get("target_l0"), k)
        threshold = _relu_threshold(tensors, len(weights.get("b_enc", ())))
        settings = {"k": found, "activation": JUMPRELU, "threshold": threshold}
    return _topk_sae(path, weights, **settings), about
