"""Universal sparse autoencoders and crosscoders: one sparse code for several models' activations.

USAE (Thasarathan et al. 2025, arXiv 2502.03714, eq. 3-4): every model has an encoder and a decoder,
and the code that encoder i computes from model i is read by the decoders of all models. Crosscoder
(Lindsey et al. 2024): one code is computed from all models together, z = TopK(sum of encoders).

Model i's activations x are normalised, u = (x - mean) / scale: the mean is per dimension, and the
scale is one number that gives every model the same mean squared norm, the models' mean width.
With models of different widths a unit of the shared code then means as much in one as in the other;
with equal widths the variance per dimension is 1. Codes are (values, indices), never dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor
from torch.nn.functional import embedding_bag

from musicscope.core.io import read_json, write_json
from musicscope.dictionaries.core import CHUNK, _write_bytes, largest_k

KINDS = ("usae", "crosscoder")
FILE = "usae.safetensors"


@dataclass(frozen=True)
class ModelWeights:
    """One model's side of the code, on normalised activations u = (x - mean) / scale."""

    W_enc: Tensor
    """[F, d]"""
    b_enc: Tensor
    """[F]; a crosscoder's one bias is the sum over the models"""
    W_dec: Tensor
    """[F, d]; rows of unit norm for a usae, unit norm over all models together for a crosscoder"""
    b_dec: Tensor
    """[d]; taken off before the encoder, added behind the decoder"""
    mean: Tensor
    """[d] in activation units"""
    scale: Tensor
    """[] > 0"""

    def pre_activations(self, x: Tensor) -> Tensor:
        """W_enc (u - b_dec) + b_enc, [N, F], for x [N, d] in activation units."""
        # Subtract first: a mean far from 0 would cost precision inside the product.
        centred = (x.to(self.W_enc.dtype) - self.mean) / self.scale - self.b_dec
        return torch.addmm(self.b_enc, centred, self.W_enc.T)


@dataclass(frozen=True)
class UniversalSAE:
    """Several models' activations in one shared sparse code."""

    names: tuple[str, ...]
    """Models, in the order of every model index."""
    slot: str
    """Which layer of each, such as top1."""
    kind: str
    """usae: any one model gives the code; crosscoder: all of them together."""
    k: int
    """Active latents a frame."""
    weights: tuple[ModelWeights, ...]
    """One a model."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r}: known {', '.join(KINDS)}")
        if not self.names or len(self.names) != len(self.weights):
            raise ValueError(f"{len(self.names)} names for the weights of {len(self.weights)}")
        F = len(self.weights[0].b_enc)
        for name, side in zip(self.names, self.weights, strict=True):
            d = side.W_enc.shape[-1]
            shapes = {"W_enc": (F, d), "b_enc": (F,), "W_dec": (F, d), "b_dec": (d,), "mean": (d,)}
            for field, shape in {**shapes, "scale": ()}.items():
                weight = getattr(side, field)
                if tuple(weight.shape) != shape:
                    found = tuple(weight.shape)
                    raise ValueError(f"{name}: {field} is {found}, expected {shape}")
                if not torch.isfinite(weight).all():
                    raise ValueError(f"{name}: {field} holds NaN or infinity: train again")
            if side.scale <= 0:
                raise ValueError(f"{name}: scale is {float(side.scale)}, must be above 0")
        if not 1 <= self.k <= F:
            raise ValueError(f"k = {self.k} must lie in 1..{F} (number of latents)")

    @property
    def n_latents(self) -> int:
        """Latents F."""
        return len(self.weights[0].b_enc)

    @property
    def widths(self) -> tuple[int, ...]:
        """Dimensions of each model's activations."""
        return tuple(len(side.mean) for side in self.weights)

    def to(self, device: str | torch.device) -> UniversalSAE:
        """The same with weights on `device`."""
        moved = (
            ModelWeights(*(getattr(side, f.name).to(device) for f in fields(side)))
            for side in self.weights
        )
        return replace(self, weights=tuple(moved))

    def pre_activations(self, i: int, x: Tensor) -> Tensor:
        """What latents of model i are before TopK and ReLU, [N, F], from x [N, d_i].

        Activation units in, normalised units out. ValueError where x has another width, NaN or
        infinity. For a crosscoder this is model i's part of the sum.
        """
        if x.ndim != 2 or x.shape[1] != self.widths[i]:
            raise ValueError(
                f"activations are {tuple(x.shape)}, {self.names[i]} takes [N, {self.widths[i]}]"
            )
        if not torch.isfinite(x).all():
            raise ValueError(f"activations of {self.names[i]} hold NaN or infinity")
        return self.weights[i].pre_activations(x)

    def encode(self, i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations [N, d_i] of model i to values [N, k] >= 0 and indices [N, k] int64.

        Unordered. Values are in the shared, normalised unit and carry gradients where x does.
        """
        if self.kind == "crosscoder":
            raise ValueError("a crosscoder encodes all models together: use encode_all")
        return self._top([(i, x)])

    def encode_all(self, xs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The joint code of a crosscoder, as `encode`, from paired activations [N, d_i] of all."""
        if self.kind != "crosscoder":
            raise ValueError("a usae encodes one model at a time: use encode(i, x)")
        if len(xs) != len(self.names) or len({len(x) for x in xs}) != 1:
            raise ValueError(
                f"shapes {[tuple(x.shape) for x in xs]}: expected as many rows from each of "
                f"{', '.join(self.names)}"
            )
        return self._top(list(enumerate(xs)))

    def _top(self, parts: list[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
        """TopK and ReLU of the summed pre-activations, in chunks of rows."""
        values, indices = [], []
        for start in range(0, max(1, len(parts[0][1])), CHUNK):
            rows = slice(start, start + CHUNK)
            z = self.pre_activations(parts[0][0], parts[0][1][rows])
            for i, x in parts[1:]:
                z = z + self.pre_activations(i, x[rows])
            chosen = largest_k(z.detach(), self.k) if len(z) else z[:, : self.k].long()
            values.append(z.gather(1, chosen).relu())
            indices.append(chosen)
        return torch.cat(values), torch.cat(indices)

    def decode(self, j: int, values: Tensor, indices: Tensor) -> Tensor:
        """Codes (values [N, n], indices [N, n]) to activations [N, d_j] of model j."""
        side = self.weights[j]
        u = embedding_bag(indices, side.W_dec, per_sample_weights=values, mode="sum") + side.b_dec
        return side.mean + side.scale * u

    def decoder(self, j: int) -> Tensor:
        """Dictionary rows of model j, [F, d_j], in normalised units (unit norm for a usae)."""
        return self.weights[j].W_dec

    def save(self, folder: str | Path, trainer: dict[str, Any] | None = None) -> None:
        """Write usae.safetensors and config.json; `trainer` goes under its "trainer" key."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{i}.{f.name}": getattr(side, f.name).detach().cpu().contiguous()
            for i, side in enumerate(self.weights)
            for f in fields(side)
        }
        _write_bytes(folder / FILE, to_safetensors(tensors))
        config = {
            "kind": self.kind,
            "names": self.names,
            "slot": self.slot,
            "k": self.k,
            "n_latents": self.n_latents,
            "widths": self.widths,
            "trainer": trainer or {},
        }
        write_json(folder / "config.json", config)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> UniversalSAE:
        """Read what `save` wrote; errors name the file and what it lacks."""
        folder = Path(folder)
        path = folder / FILE
        for needed in (folder / "config.json", path):
            if not needed.exists():
                raise FileNotFoundError(
                    f"{needed} is missing: run the stage train_usae or train_crosscoder"
                )
        config, tensors = read_json(folder / "config.json"), load_file(path)
        try:
            weights = tuple(
                ModelWeights(**{f.name: tensors[f"{i}.{f.name}"] for f in fields(ModelWeights)})
                for i in range(len(config["names"]))
            )
            head = (tuple(config["names"]), config["slot"], config["kind"], config["k"])
            found = cls(*head, weights)
        except KeyError as error:
            raise ValueError(f"{folder}: {error} is missing in config.json or {FILE}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return found.to(device)
