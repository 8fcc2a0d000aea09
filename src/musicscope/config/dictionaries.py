"""Sections on sparse autoencoders, universal SAEs and crosscoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from musicscope.config.schema import DistinctOrNone, FolderName, ParamsError, Section

Seeds = Annotated[int, Field(ge=1, le=64)]


@dataclass(frozen=True)
class Training(Section):
    """Settings that the training of every dictionary has."""

    k: Annotated[int, Field(ge=1, le=65536)]
    """Active latents per frame (on average for batchtopk and jumprelu)."""
    expansion: Annotated[int, Field(ge=1, le=1024)]
    """Latents per dimension of the (widest model's) activation."""
    batch_size: PositiveInt
    """Frames per step and model."""
    samples: PositiveInt
    """Frames seen in training, over as many passes as that takes."""
    learning_rate: Annotated[float, Field(gt=0, le=1)]
    """Adam's step size at its peak; the schedule counts global steps."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)]
    """Share of the steps in which the learning rate rises from 0."""
    decay_fraction: Annotated[float, Field(ge=0, le=1)]
    """Share of the steps, at the end, in which the learning rate falls to 0."""
    aux_k_fraction: Annotated[float, Field(gt=0, le=1)]
    """Dead latents used by AuxK, as a share of the activations' (mean) width."""
    aux_weight: NonNegativeFloat
    """Weight of the AuxK loss (1/32 in Gao et al. 2024)."""
    dead_after_samples: PositiveInt
    """Frames without firing after which a latent counts as dead."""
    seeds: Seeds
    """Dictionaries to train; seed 0 is used downstream, the others give spread and stability."""

    def check(self, section: str) -> None:
        """Raise ParamsError, which names keys under `section`, for values that do not agree."""
        if self.samples < self.batch_size:
            raise ParamsError(
                f"{section}.samples = {self.samples} gives no step: allowed is at least "
                f"{section}.batch_size = {self.batch_size}"
            )
        if self.warmup_fraction + self.decay_fraction > 1:
            raise ParamsError(
                f"{section}.decay_fraction = {self.decay_fraction} is out of range: allowed is "
                f"at most 1 - {section}.warmup_fraction = {1 - self.warmup_fraction:g}"
            )


@dataclass(frozen=True)
class TrainSae(Training):
    """The sparse autoencoders, `seeds` per model and slot."""

    activation: Literal["topk", "batchtopk", "jumprelu"]
    """Sparsity rule: k per frame, k per frame on average over the batch, or a learnt threshold per
    latent with a loss that draws the number of active latents to k."""
    ce_clips: PositiveInt
    """Held-out clips for the recovered cross-entropy."""
    matryoshka: DistinctOrNone[PositiveInt]
    """Numbers of first latents that must also reconstruct alone, rising; [] for none."""
    resample_every: NonNegativeInt
    """Steps after which dead latents restart from frames reconstructed badly; 0 for never."""
    bandwidth: PositiveFloat
    """Width of jumprelu's window, and where its thresholds start, in normalised units."""
    sparsity_weight: NonNegativeFloat
    """Weight of jumprelu's loss on the number of active latents."""

    def check(self, section: str) -> None:
        super().check(section)
        if list(self.matryoshka) != sorted(self.matryoshka):
            raise ParamsError(f"{section}.matryoshka = {list(self.matryoshka)} must rise")


@dataclass(frozen=True)
class TrainCrosscoder(Training):
    """The crosscoders: one code computed from all models together."""

    slot: FolderName
    """Layer taken from every model; one of `slots`."""
    null_seeds: Seeds
    """Dictionaries trained on mispaired clips, the null."""
    fire_threshold: NonNegativeFloat
    """A latent fires where its value exceeds this, in normalised units (0.1 in the USAE's code)."""
    bootstrap: PositiveInt
    """Bootstrap draws over compositions per interval."""


@dataclass(frozen=True)
class TrainUsae(TrainCrosscoder):
    """The universal SAEs: one code for all models, computed from any one of them."""

    rule: Literal["paper", "all_decoders"]
    """What a step updates: encoder and decoder of the model drawn, or also all decoders."""
