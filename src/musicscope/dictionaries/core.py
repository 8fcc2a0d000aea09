"""Sparse dictionaries: TopK SAEs, universal SAEs and crosscoders. Weights, sparse codes, files.

TopK: Gao et al. 2024 (arXiv 2406.04093). BatchTopK: Bussmann et al. 2024 (arXiv 2412.06410).
JumpReLU: Rajamanoharan et al. 2024 (arXiv 2407.14435).
USAE: Thasarathan et al. 2025 (arXiv 2502.03714, eq. 3-4); every model has an encoder and a decoder,
and the code that encoder i computes from model i is read by the decoders of all models.
Crosscoder: Lindsey et al. 2024; one code is computed from all models, z = TopK(sum of encoders).
Codes are (values, indices) throughout; a dense [N, F] code is never returned.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from musicscope.core.io import atomic_file, read_json, write_json

CHUNK = 4096  # frames encoded at once: 4096 x 8192 latents in float32 are 128 MB
JUMPRELU = "jumprelu"
DICTIONARY_CLASSES = {
    "topk": ("AutoEncoderTopK", "TopKTrainer"), "batchtopk": ("BatchTopKSAE", "BatchTopKTrainer"),
    JUMPRELU: ("JumpReluAutoEncoder", "JumpReluTrainer"),
}  # fmt: skip
"""Activation -> classes of dictionary_learning."""
CROSSCODER = "crosscoder"
KINDS = ("usae", CROSSCODER)
USAE_FILE = "usae.safetensors"

SparseCode = tuple[Tensor, Tensor]
"""Values [N, n] >= 0 and latent indices [N, n] int64 of N frames, unordered."""


def _k_of_row(z: Tensor, k: int) -> Tensor:
    """Indices [B, k] of the k largest entries of each row, CPU, unordered, exact."""
    # numpy's partition is vectorised (x86-simd-sort) where torch.topk is scalar: 3x faster.
    n = z.shape[1]
    kth = torch.from_numpy(np.partition(z.numpy(), n - k, axis=1)[:, n - k : n - k + 1])
    chosen = z >= kth
    places = chosen.nonzero()
    if len(places) != k * len(z):  # rows with ties at the k-th place, or with NaN
        odd = (chosen.sum(1) != k).nonzero().squeeze(1)
        best = z[odd].topk(k, sorted=False).indices
        chosen[odd] = torch.zeros_like(chosen[odd]).scatter_(1, best, True)
        places = chosen.nonzero()
    return places[:, 1].reshape(len(z), k)


def _by_topk(z: Tensor, k: int) -> Tensor:
    return z.topk(k, sorted=False).indices


def largest_k(z: Tensor, k: int) -> Tensor:
    """Indices [B, k] int64 of the k largest entries of each row of z [B, F]; order undefined.

    In two stages on a CPU: against torch.topk on one thread, 2048 rows, k = 32, 3.2x as fast at
    F = 1024, 3.6x at 1536, 2.2x at 8192. On a GPU where rows are long: 0.99 against 2.40 ms on an
    H200 at 8192 rows, F = 24576, k = 64.
    """
    if z.is_cuda:
        return in_two_stages(z, k, _by_topk) if z.shape[1] > 4096 else _by_topk(z, k)
    if z.dtype not in (torch.float32, torch.float64):
        return _by_topk(z, k)
    return in_two_stages(z, k, _k_of_row)


def in_two_stages(z: Tensor, k: int, rank: Callable[[Tensor, int], Tensor]) -> Tensor:
    """`largest_k` by `rank`, exact: the k largest lie in the k groups with the largest maxima.

    F/g groups of g columns, so that only k*g candidates are ranked.
    """
    B, F = z.shape
    g = 16 if F > 4096 else 8
    if F % g or k >= F // g:
        return rank(z, k)
    groups = rank(z.view(B, g, F // g).amax(1), k)
    columns = torch.arange(0, F, F // g, device=z.device).view(1, g, 1)
    candidates = (groups.unsqueeze(1) + columns).reshape(B, g * k)
    return candidates.gather(1, rank(z.gather(1, candidates), k))


class SparseDictionary:
    """Encoders and decoders of one or several models that share a sparse code.

    Subclasses are frozen dataclasses. `model` is an index; a dictionary of one model has index 0.
    Activations are in their own units on both sides.
    """

    if TYPE_CHECKING:  # a field of the subclasses, which would take a property for its default

        @property
        def k(self) -> int:
            """Active latents per frame; for batchtopk their average."""
            raise NotImplementedError

    @property
    def n_latents(self) -> int:
        """Latents F."""
        raise NotImplementedError

    @property
    def widths(self) -> tuple[int, ...]:
        """Dimensions of each model's activations."""
        raise NotImplementedError

    def pre_activations(self, x: Tensor, model: int = 0) -> Tensor:
        """Compute latents before the selection and ReLU, [N, F], from activations x [N, d]."""
        raise NotImplementedError

    def decode(self, values: Tensor, indices: Tensor, model: int = 0) -> Tensor:
        """Decode codes (values [N, n], indices [N, n]) to activations [N, d] of a model."""
        raise NotImplementedError

    def decoder(self, model: int = 0) -> Tensor:
        """Return the dictionary rows of a model, [F, d]."""
        raise NotImplementedError

    def encode(self, x: Tensor, model: int = 0) -> SparseCode:
        """Encode activations [N, d] of a model to values [N, n] >= 0 and indices [N, n] int64.

        n = k; for batchtopk and jumprelu n is the largest count among the frames given, and rows
        with fewer latents are padded with value 0 at index 0. Values carry gradients where x does.
        """
        return self._encode(len(x), lambda rows: self.pre_activations(x[rows], model))

    def reconstruct(self, x: Tensor, model: int = 0) -> Tensor:
        """Decode the code of x [..., d] for the same model."""
        code = self.encode(x.reshape(-1, x.shape[-1]), model)
        return self.decode(*code, model).reshape(x.shape)

    def _encode(self, frames: int, pre_activations: Callable[[slice], Tensor]) -> SparseCode:
        """Select latents in chunks of frames."""
        starts = range(0, max(1, frames), CHUNK)
        parts = [self._select(pre_activations(slice(s, s + CHUNK))) for s in starts]
        if len(parts) == 1:
            return parts[0]
        n = max(values.shape[1] for values, _ in parts)
        padded = [[pad(t, (0, n - t.shape[1])) for t in part] for part in parts]
        values, indices = (torch.cat(column) for column in zip(*padded, strict=True))
        return values, indices

    def _select(self, z: Tensor) -> SparseCode:
        """Keep the k largest latents of each row of z [N, F], then ReLU."""
        indices = largest_k(z.detach(), self.k) if len(z) else z[:, : self.k].long()
        return z.gather(1, indices).relu(), indices


def _check(owner: str, weights: Mapping[str, Tensor], k: int, latents: int, width: int) -> None:
    """Raise ValueError where a weight has another shape, NaN or infinity, or k is out of range."""
    shapes = {"W_enc": (latents, width), "b_enc": (latents,), "scale": ()}
    shapes |= {"W_dec": (latents, width), "b_dec": (width,), "mean": (width,)}
    for name, weight in weights.items():
        if tuple(weight.shape) != shapes[name]:
            raise ValueError(f"{owner} {name} is {tuple(weight.shape)}, expected {shapes[name]}")
        if not torch.isfinite(weight).all():
            raise ValueError(f"{owner} {name} holds NaN or infinity: train again")
    if not 1 <= k <= latents:
        raise ValueError(f"{owner} k = {k} must lie in 1..{latents} (number of latents)")


def _require(paths: Sequence[Path], stages: str) -> None:
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: run {stages} for {path.parent}")


def _write_bytes(path: Path, content: bytes) -> None:
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


@dataclass(frozen=True)
class TopKSAE(SparseDictionary):
    """A trained SAE of one model: z = select(W_enc (x - b_dec) + b_enc), x' = z W_dec + b_dec.

    Centring and scale of training are folded in, so values are in units of the activations.
    """

    W_enc: Tensor
    """[F, d]"""
    b_enc: Tensor
    """[F]"""
    W_dec: Tensor
    """[F, d], rows of unit norm"""
    b_dec: Tensor
    """[d], near the mean activation"""
    k: int
    """Active latents per frame; for batchtopk and jumprelu their average, in training."""
    activation: str = "topk"
    """topk, batchtopk or jumprelu"""
    threshold: float | Tensor = -1.0
    """A latent is active above it at inference; batchtopk: below 0 if not calibrated; jumprelu: [F]
    """

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        _check("SAE weight", weights, self.k, *self.W_enc.shape)
        if self.activation not in DICTIONARY_CLASSES:
            raise ValueError(f"SAE activation {self.activation!r}: known {[*DICTIONARY_CLASSES]}")
        limit = torch.as_tensor(self.threshold)
        if limit.shape != (wanted := self.b_enc.shape if self.activation == JUMPRELU else ()):
            raise ValueError(f"SAE threshold is {tuple(limit.shape)}, expected {tuple(wanted)}")
        if limit.ndim and not (limit >= 0).all():
            raise ValueError("SAE threshold holds NaN or values below 0: train again")

    @property
    def width(self) -> int:
        """Dimensions d of the activations."""
        return self.W_enc.shape[1]

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of the one model."""
        return (self.width,)

    @property
    def n_latents(self) -> int:
        """Latents F."""
        return self.W_enc.shape[0]

    def to(self, device: str | torch.device) -> Self:
        """Copy the SAE with its weights on `device`."""
        names = ("W_enc", "b_enc", "W_dec", "b_dec")
        moved = {n: getattr(self, n).to(device) for n in names}
        if isinstance(self.threshold, Tensor):
            moved["threshold"] = self.threshold.to(device)
        return replace(self, **moved)

    def pre_activations(self, x: Tensor, model: int = 0) -> Tensor:
        """Compute W_enc (x - b_dec) + b_enc, [N, F], for x [N, d] in activation units."""
        if x.ndim != 2 or x.shape[1] != self.width:
            raise ValueError(f"activations are {tuple(x.shape)}, this SAE takes [N, {self.width}]")
        # Subtract first: a mean far from 0 would cost precision inside the product.
        return torch.addmm(self.b_enc, x.to(self.W_enc.dtype) - self.b_dec, self.W_enc.T)

    def _select(self, z: Tensor) -> SparseCode:
        if self.activation == "topk" or not len(z):
            return super()._select(z)
        rows, columns = (z > self.limits()).nonzero().unbind(1)
        counts = torch.bincount(rows, minlength=len(z))
        place = torch.arange(len(rows), device=z.device) - (counts.cumsum(0) - counts)[rows]
        indices = columns.new_zeros((len(z), int(counts.max())))
        values = z.new_zeros(indices.shape)
        indices[rows, place] = columns
        values[rows, place] = z[rows, columns]
        return values, indices

    def limits(self, latents: Tensor | slice = slice(None)) -> float | Tensor:
        """Return the threshold of batchtopk, or jumprelu's of some latents; ValueError if unset."""
        if isinstance(self.threshold, Tensor):
            return self.threshold[latents]
        if self.threshold < 0:
            raise ValueError("this batchtopk SAE has no threshold: calibrate_threshold() first")
        return self.threshold

    def decode(self, values: Tensor, indices: Tensor, model: int = 0) -> Tensor:
        """Decode codes (values [N, n], indices [N, n]) to activations [N, d]."""
        return self.b_dec + embedding_bag(
            indices, self.W_dec, per_sample_weights=values, mode="sum"
        )

    def decoder(self, model: int = 0) -> Tensor:
        """Return the dictionary rows [F, d], of unit norm."""
        return self.W_dec

    def fold(self, mean: Tensor, scale: float) -> TopKSAE:
        """Turn an SAE on (x - mean) / scale into the same SAE on x; rows stay of unit norm."""
        unset = isinstance(self.threshold, float) and self.threshold < 0
        return replace(
            self,
            b_enc=self.b_enc * scale,
            b_dec=mean.to(self.b_dec) + scale * self.b_dec,
            threshold=self.threshold * (1.0 if unset else scale),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors under dictionary_learning's names."""
        return {
            "encoder.weight": self.W_enc.cpu().contiguous(),
            "encoder.bias": self.b_enc.cpu().contiguous(),
            "decoder.weight": self.W_dec.cpu().T.contiguous(),
            "b_dec": self.b_dec.cpu().contiguous(),
            "k": torch.tensor(self.k, dtype=torch.int),
            "threshold": torch.as_tensor(self.threshold, dtype=torch.float32).cpu(),
        }

    def _pickled(self) -> dict[str, Tensor]:
        """Return the tensors of ae.pt; JumpReluAutoEncoder does not subtract b_dec first."""
        tensors = self.state_dict()
        if self.activation == JUMPRELU:
            del tensors["k"]
            W_enc = tensors.pop("encoder.weight")
            tensors["W_enc"] = W_enc.T.contiguous()
            tensors["b_enc"] = tensors.pop("encoder.bias") - W_enc @ tensors["b_dec"]
            tensors["W_dec"] = tensors.pop("decoder.weight").T.contiguous()
        return tensors

    def save(self, folder: str | Path, trainer: Mapping[str, object] | None = None) -> None:
        """Write ae.pt + config.json (dictionary_learning loads them) and sae.safetensors.

        `trainer` is added to config.json's "trainer" section (lr, steps, seed, lm_name ...).
        """
        folder, tensors = Path(folder), self.state_dict()
        # Through memory: torch.save puts the file's own name inside, here a temporary one.
        torch.save(self._pickled(), buffer := io.BytesIO())
        _write_bytes(folder / "ae.pt", buffer.getvalue())
        _write_bytes(folder / "sae.safetensors", to_safetensors(tensors))
        dict_class, trainer_class = DICTIONARY_CLASSES[self.activation]
        config = {
            "trainer_class": trainer_class,
            "dict_class": dict_class,
            "activation_dim": self.width,
            "dict_size": self.n_latents,
            "k": self.k,
        }
        write_json(folder / "config.json", {"trainer": {**(trainer or {}), **config}})

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> Self:
        """Read sae.safetensors, or else ae.pt (a dictionary_learning SAE), beside config.json.

        FileNotFoundError and ValueError name the file and what it lacks.
        """
        folder = Path(folder)
        safe, pickled, config = folder / "sae.safetensors", folder / "ae.pt", folder / "config.json"
        path = safe if safe.exists() else pickled
        _require((config, path), "the stage train_sae")
        kinds = {names[0]: activation for activation, names in DICTIONARY_CLASSES.items()}
        kind = read_json(config)["trainer"]["dict_class"]
        if kind not in kinds:
            raise ValueError(f"{config}: trainer.dict_class {kind!r}: known {sorted(kinds)}")
        if path == safe:
            tensors = load_file(safe)
        else:
            tensors = torch.load(pickled, map_location="cpu", weights_only=True)
        try:
            if kinds[kind] == JUMPRELU and path == pickled:
                tensors = _from_jumprelu(tensors, read_json(config)["trainer"]["k"])
            threshold = tensors.get("threshold", torch.tensor(-1.0))
            sae = cls(
                W_enc=tensors["encoder.weight"],
                b_enc=tensors["encoder.bias"],
                W_dec=tensors["decoder.weight"].T.contiguous(),
                b_dec=tensors["b_dec"],
                k=int(tensors["k"]),
                activation=kinds[kind],
                threshold=threshold if threshold.ndim else float(threshold),
            )
        except KeyError as error:
            raise ValueError(f"{path} has no tensor {error}: not a TopK SAE") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return sae.to(device)


def _from_jumprelu(tensors: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """Rename the tensors of dictionary_learning's JumpReluAutoEncoder; undo `_pickled`."""
    W_enc = tensors["W_enc"].T.contiguous()
    b_enc = tensors["b_enc"] + W_enc @ tensors["b_dec"]
    names = {"encoder.weight": W_enc, "encoder.bias": b_enc, "decoder.weight": tensors["W_dec"].T}
    return {**tensors, **names, "k": torch.tensor(k)}


@dataclass(frozen=True)
class ModelWeights:
    """The weights of one model in a shared code, on normalised u = (x - mean) / scale."""

    W_enc: Tensor
    """[F, d]"""
    b_enc: Tensor
    """[F]; a crosscoder's one bias is the sum over the models"""
    W_dec: Tensor
    """[F, d]; rows of unit norm for a usae, unit norm over all models together for a crosscoder"""
    b_dec: Tensor
    """[d]; subtracted before the encoder, added after the decoder"""
    mean: Tensor
    """[d] in activation units"""
    scale: Tensor
    """[] > 0"""


@dataclass(frozen=True)
class UniversalSAE(SparseDictionary):
    """A USAE or a crosscoder: the activations of several models in one shared sparse code.

    The mean of the normalisation is per dimension. The scale is one number per model, which gives
    every model the same mean squared norm, the models' mean width: a unit of the code means as
    much in each of them. Values are in that shared, normalised unit.
    """

    names: tuple[str, ...]
    """Models, in the order of every model index."""
    slot: str
    """Layer of each, such as top1."""
    kind: str
    """usae: any one model gives the code; crosscoder: all of them together."""
    k: int
    """Active latents per frame."""
    weights: tuple[ModelWeights, ...]
    """One per model."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r}: known {', '.join(KINDS)}")
        if not self.names or len(self.names) != len(self.weights):
            raise ValueError(f"{len(self.names)} names for the weights of {len(self.weights)}")
        for name, side in zip(self.names, self.weights, strict=True):
            _check(f"{name}:", vars(side), self.k, self.n_latents, side.W_enc.shape[-1])
            if side.scale <= 0:
                raise ValueError(f"{name}: scale is {float(side.scale)}, must be above 0")

    @property
    def n_latents(self) -> int:
        """Latents F."""
        return len(self.weights[0].b_enc)

    @property
    def widths(self) -> tuple[int, ...]:
        """Dimensions of each model's activations."""
        return tuple(len(side.mean) for side in self.weights)

    @property
    def joint(self) -> bool:
        """Whether one code is computed from all models together (a crosscoder)."""
        return self.kind == CROSSCODER

    def to(self, device: str | torch.device) -> Self:
        """Copy the dictionary with its weights on `device`."""
        moved = (
            ModelWeights(**{name: weight.to(device) for name, weight in vars(side).items()})
            for side in self.weights
        )
        return replace(self, weights=tuple(moved))

    def pre_activations(self, x: Tensor, model: int = 0) -> Tensor:
        """Compute W_enc (u - b_dec) + b_enc, [N, F], from x [N, d]; for a crosscoder its summand.

        ValueError where x has another width, NaN or infinity.
        """
        side, name = self.weights[model], self.names[model]
        if x.ndim != 2 or x.shape[1] != len(side.mean):
            raise ValueError(
                f"activations are {tuple(x.shape)}, {name} takes [N, {len(side.mean)}]"
            )
        if not torch.isfinite(x).all():
            raise ValueError(f"activations of {name} hold NaN or infinity")
        # Subtract first: a mean far from 0 would cost precision inside the product.
        centred = (x.to(side.W_enc.dtype) - side.mean) / side.scale - side.b_dec
        return torch.addmm(side.b_enc, centred, side.W_enc.T)

    def encode(self, x: Tensor, model: int = 0) -> SparseCode:
        """Encode activations [N, d] of a model, as `SparseDictionary.encode`; n = k."""
        if self.joint:
            raise ValueError("a crosscoder encodes all models together: use encode_all")
        return super().encode(x, model)

    def encode_all(self, xs: Sequence[Tensor]) -> SparseCode:
        """Encode paired activations [N, d_j] of all models to the joint code of a crosscoder."""
        if not self.joint:
            raise ValueError("a usae encodes one model at a time: use encode(x, model)")
        if len(xs) != len(self.names) or len({len(x) for x in xs}) != 1:
            raise ValueError(
                f"shapes {[tuple(x.shape) for x in xs]}: expected as many rows from each of "
                f"{', '.join(self.names)}"
            )

        def summed(rows: slice) -> Tensor:
            z = self.pre_activations(xs[0][rows])
            for model, x in enumerate(xs[1:], 1):
                z = z + self.pre_activations(x[rows], model)
            return z

        return self._encode(len(xs[0]), summed)

    def decode(self, values: Tensor, indices: Tensor, model: int = 0) -> Tensor:
        """Decode codes (values [N, n], indices [N, n]) to activations [N, d] of a model."""
        side = self.weights[model]
        u = embedding_bag(indices, side.W_dec, per_sample_weights=values, mode="sum") + side.b_dec
        return side.mean + side.scale * u

    def decoder(self, model: int = 0) -> Tensor:
        """Return the rows of a model, [F, d], in normalised units (unit norm for a usae)."""
        return self.weights[model].W_dec

    def save(self, folder: str | Path, trainer: Mapping[str, object] | None = None) -> None:
        """Write usae.safetensors and config.json; `trainer` goes under its "trainer" key."""
        folder = Path(folder)
        tensors = {
            f"{i}.{name}": weight.detach().cpu().contiguous()
            for i, side in enumerate(self.weights)
            for name, weight in vars(side).items()
        }
        _write_bytes(folder / USAE_FILE, to_safetensors(tensors))
        names = ("kind", "names", "slot", "k", "n_latents", "widths")
        config = {name: getattr(self, name) for name in names}
        write_json(folder / "config.json", {**config, "trainer": trainer or {}})

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> Self:
        """Read what `save` wrote; errors name the file and what it lacks."""
        folder = Path(folder)
        path = folder / USAE_FILE
        _require((folder / "config.json", path), "the stage train_usae")
        config, tensors = read_json(folder / "config.json"), load_file(path)
        try:
            weights = tuple(
                ModelWeights(**{f.name: tensors[f"{i}.{f.name}"] for f in fields(ModelWeights)})
                for i in range(len(config["names"]))
            )
            head = (tuple(config["names"]), config["slot"], config["kind"], config["k"])
            usae = cls(*head, weights)
        except KeyError as error:
            raise ValueError(f"{folder}: {error} is missing in config.json or {path}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return usae.to(device)
