"""params.yaml as typed, frozen dataclasses: every key, what it means and what it may hold.

An unknown key, a wrong type or a value out of range is a ``ParamsError`` that names the key, the
value and what is allowed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from musicscope.typed_yaml import ParamsError, choice, load_typed, name, number, pattern

__all__ = ["Params", "ParamsError", "load_params"]

DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class ClipCounts:
    """Clips to render per split; compositions never cross splits."""

    train: int = number(1)
    """Clips that SAEs and probes learn from."""
    validation: int = number(1)
    """Clips for choosing layers, probe methods and C."""
    test: int = number(1)
    """Clips that only reported numbers are computed on."""


@dataclass(frozen=True)
class PrepareData:
    """Rendered clips and their labels."""

    source: str = choice("embedded")
    """Where recordings come from; `embedded` renders the compositions that a wheel ships."""
    seconds: float = number(0.5, 60.0)
    """Length of each clip in seconds."""
    timgm6mb_clips: ClipCounts
    """Clips with the soundfont TimGM6mb, the family that features are found on."""
    fluidr3mono_test_clips: int = number(0)
    """Test clips with the held-out soundfont FluidR3Mono."""
    pairs: int = number(0)
    """Matched pairs with TimGM6mb: the same clip, only the target's program changes."""
    fluidr3mono_pairs: int = number(0)
    """Matched pairs with FluidR3Mono."""


@dataclass(frozen=True)
class DecoderSize:
    """Size of one nano decoder."""

    width: int = number(8)
    """Dimensions of the residual stream."""
    layers: int = number(1)
    """Decoder layers."""
    heads: int = number(1)
    """Attention heads; must divide the width."""


@dataclass(frozen=True)
class Pretrain:
    """Training of the embedded models. Frozen: their weights are in Git."""

    clips: int = number(1)
    """Training clips to render, half with each soundfont."""
    codec_steps: int = number(1)
    """Optimiser steps of the codec."""
    codebooks: int = number(1, 16)
    """Residual codebooks of the codec."""
    text_steps: int = number(1)
    """Optimiser steps of the text encoder."""
    decoder_steps: int = number(1)
    """Optimiser steps of each decoder; both see the same clips in the same order."""
    nano_small: DecoderSize
    nano_medium: DecoderSize
    judge_clips: int = number(64)
    """Clips that the judge of generated audio learns from, each with its codec reconstruction."""
    generations: int = number(2)
    """Generated clips per side (guitar, other families) in the evaluation."""
    bootstrap: int = number(1)
    """Bootstrap draws for each interval."""

    def size(self, model: str) -> DecoderSize:
        """Decoder size of `nano-small` or `nano-medium`."""
        sizes = {"nano-small": self.nano_small, "nano-medium": self.nano_medium}
        if model not in sizes:
            raise ParamsError(f"pretrain makes {', '.join(sizes)}, not {model}")
        return sizes[model]


@dataclass(frozen=True)
class Ablate:
    """Which layers matter to the next-token distribution."""

    split: str = choice("train", "validation", "test")
    """Split that the clips are drawn from; validation, so that test data choose no layer."""
    clips: int = number(1)
    """Clips that every ablation is scored on."""
    kinds: tuple[str, ...] = choice("skip", "zero", "mean")
    """Ablations to run: skip drops the layer's update, mean puts the mean update in its place, zero
    cuts the whole stream behind the layer."""
    bootstrap: int = number(1)
    """Bootstrap draws over compositions for each interval."""


@dataclass(frozen=True)
class SelectLayers:
    """The rule that fills the slots."""

    kind: str = choice("skip", "zero", "mean")
    """Ablation whose scores rank the layers; one of `ablate.kinds`."""
    score: str = choice("dce", "kl")
    """Score that ranks: rise in cross-entropy (dce) or KL divergence at the logits."""
    skip_first: bool
    """Leave the first layer out: it mostly embeds, so ablating it always hurts."""
    skip_last: bool
    """Leave the last layer out: its output goes straight to the heads, no layer acts on an edit."""


@dataclass(frozen=True)
class ExtractActivations:
    """The activation store."""

    captions: bool
    """Give the model each clip's caption. False runs it unconditionally: captions name instruments,
    and a probe on captioned activations could read the label from the text instead of the music."""
    dtype: str = choice("float16", "bfloat16")
    """Number format on disk."""
    shard_mb: int = number(1, 1024)
    """Largest shard in MB; tens of MB suit DVC best."""
    batch_clips: int = number(1)
    """Clips per forward pass."""


@dataclass(frozen=True)
class TrainSae:
    """The sparse autoencoders."""

    k: int = number(1, 65536)
    """Active latents per frame (on average for batchtopk)."""
    expansion: int = number(1, 1024)
    """Latents per dimension of the activation."""
    activation: str = choice("topk", "batchtopk")
    """Sparsity rule: k per frame, or k per frame on average over the batch."""
    batch_size: int = number(1)
    """Frames per step."""
    samples: int = number(1)
    """Frames seen in training, over as many passes as that takes."""
    learning_rate: float = number(0.0, 1.0, above=True)
    """Adam's step size at its peak."""
    warmup_fraction: float = number(0.0, 1.0, below=True)
    """Share of the steps in which the learning rate rises from 0."""
    decay_fraction: float = number(0.0, 1.0)
    """Share of the steps, at the end, in which it falls to 0."""
    aux_k_fraction: float = number(0.0, 1.0, above=True)
    """Dead latents used by AuxK, as a share of the activation's width."""
    aux_weight: float = number(0.0)
    """Weight of the AuxK loss (1/32 in Gao et al. 2024)."""
    dead_after_samples: int = number(1)
    """Frames without firing after which a latent counts as dead."""
    seeds: int = number(1, 64)
    """SAEs per model and slot; seed 0 is used downstream, the others measure stability."""
    ce_clips: int = number(1)
    """Held-out clips for the recovered cross-entropy."""

    def latents(self, width: int) -> int:
        """Number of latents over activations of `width` dimensions; ParamsError if below k."""
        total = self.expansion * width
        if self.k > total:
            raise ParamsError(
                f"train_sae.k = {self.k} is out of range: allowed is at most {total}, the latents "
                f"that train_sae.expansion = {self.expansion} gives over width {width}"
            )
        return total


@dataclass(frozen=True)
class Probe:
    """Concept classifiers in SAE space and against every baseline."""

    k_sparse: tuple[int, ...] = number(1)
    """Sizes of the k-sparse probes, rising."""
    c_grid: tuple[float, ...] = number(0.0, above=True)
    """Inverse regularisation strengths to choose from on validation."""
    min_positive: int = number(1)
    """Fewest positive and negative clips per split for a concept to be probed."""
    null_seeds: int = number(1)
    """Shuffles of the training labels that the null is averaged over."""
    bootstrap: int = number(1)
    """Bootstrap draws over compositions for each interval."""


@dataclass(frozen=True)
class Compute:
    """How to run, never what: no stage lists this section, so changing it reruns nothing."""

    device: str = pattern(DEVICE, "auto, cpu, cuda or cuda:<index>")
    """Where models run; auto takes CUDA where there is one."""
    threads: int = number(1, 1024)
    """Torch threads per stage."""
    processes: int = number(1, 1024)
    """Processes for work that splits by clip or by seed."""


@dataclass(frozen=True)
class Params:
    """The whole of params.yaml; each stage has the section of its name."""

    seed: int = number(0, 2**62)
    """The one seed; every generator derives its own from it by name."""
    models: tuple[str, ...] = name()
    """Folders in data/models to study."""
    slots: tuple[str, ...] = name()
    """Layers to study in each model, by rank in the ablation."""
    prepare_data: PrepareData
    pretrain: Pretrain
    ablate: Ablate
    select_layers: SelectLayers
    extract_activations: ExtractActivations
    train_sae: TrainSae
    probe: Probe
    compute: Compute


def _check_together(params: Params, path: str) -> None:
    """What no single field shows."""
    sae, probe = params.train_sae, params.probe
    if params.select_layers.kind not in params.ablate.kinds:
        raise ParamsError(
            f"{path}: select_layers.kind = {params.select_layers.kind!r} is not among "
            f"ablate.kinds = {list(params.ablate.kinds)}; add it there or rank by another"
        )
    if sae.samples < sae.batch_size:
        raise ParamsError(
            f"{path}: train_sae.samples = {sae.samples} gives no step: allowed is at least "
            f"train_sae.batch_size = {sae.batch_size}"
        )
    if sae.warmup_fraction + sae.decay_fraction > 1:
        raise ParamsError(
            f"{path}: train_sae.decay_fraction = {sae.decay_fraction} is out of range: allowed is "
            f"at most 1 - train_sae.warmup_fraction = {1 - sae.warmup_fraction:g}"
        )
    if list(probe.k_sparse) != sorted(probe.k_sparse):
        raise ParamsError(f"{path}: probe.k_sparse = {list(probe.k_sparse)} must rise")


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check params.yaml; ParamsError names the key (``train_sae.k``) that is wrong."""
    params = load_typed(path, Params)
    _check_together(params, str(path))
    return params
