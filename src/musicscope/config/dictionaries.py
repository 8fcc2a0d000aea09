"""Sections on sparse autoencoders, universal SAEs and crosscoders."""

from __future__ import annotations

from dataclasses import dataclass

from musicscope.config.schema import ParamsError, choice, name, number


@dataclass(frozen=True)
class Training:
    """What every dictionary's training has."""

    k: int = number(1, 65536)
    """Active latents per frame (on average for batchtopk)."""
    expansion: int = number(1, 1024)
    """Latents per dimension of the (widest model's) activation."""
    batch_size: int = number(1)
    """Frames per step, each in every model."""
    samples: int = number(1)
    """Frames seen in training, over as many passes as that takes."""
    learning_rate: float = number(0.0, 1.0, above=True)
    """Adam's step size at its peak; the schedule counts global steps."""
    warmup_fraction: float = number(0.0, 1.0, below=True)
    """Share of the steps in which the learning rate rises from 0."""
    decay_fraction: float = number(0.0, 1.0)
    """Share of the steps, at the end, in which it falls to 0."""
    aux_k_fraction: float = number(0.0, 1.0, above=True)
    """Dead latents used by AuxK, as a share of the activations' (mean) width."""
    aux_weight: float = number(0.0)
    """Weight of the AuxK loss (1/32 in Gao et al. 2024)."""
    dead_after_samples: int = number(1)
    """Frames without firing after which a latent counts as dead."""
    seeds: int = number(1, 64)
    """Dictionaries; seed 0 is used downstream, the others give spread and stability."""

    def check(self, section: str) -> None:
        """ParamsError, which names the keys under `section`, where no single one is wrong."""
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
    """The sparse autoencoders, `seeds` for each model and slot."""

    activation: str = choice("topk", "batchtopk")
    """Sparsity rule: k per frame, or k per frame on average over the batch."""
    ce_clips: int = number(1)
    """Held-out clips for the recovered cross-entropy."""


@dataclass(frozen=True)
class TrainCrosscoder(Training):
    """The crosscoders: one code computed from all models together."""

    slot: str = name()
    """Layer taken from every model; one of `slots`."""
    null_seeds: int = number(1, 64)
    """Dictionaries trained on mispaired clips, the null."""
    fire_threshold: float = number(0.0)
    """A latent fires where its value exceeds this, in normalised units (0.1 in the USAE's code)."""
    bootstrap: int = number(1)
    """Bootstrap draws over compositions for each interval."""


@dataclass(frozen=True)
class TrainUsae(TrainCrosscoder):
    """The universal SAEs: one code for all models, computed from any one of them."""

    rule: str = choice("paper", "all_decoders")
    """Who learns from a step: encoder and decoder of the model drawn, or all decoders."""
