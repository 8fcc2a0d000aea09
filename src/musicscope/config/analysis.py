"""Sections on layers, activations, probes, matching, maximisation and the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from musicscope.config.schema import (
    Distinct,
    DistinctOrNone,
    FolderName,
    ParamsError,
    Section,
)

Ablation = Literal["skip", "zero", "mean"]


@dataclass(frozen=True)
class Ablate(Section):
    """Which layers matter to the next-token distribution."""

    split: Literal["train", "validation", "test"]
    """Split that the clips are drawn from; validation, so that test data choose no layer."""
    clips: PositiveInt
    """Clips that every ablation is scored on."""
    kinds: Distinct[Ablation]
    """Ablations to run: skip leaves out the layer's update, mean replaces it by its mean, zero sets
    the layer's whole output to zero."""
    concepts: DistinctOrNone[FolderName]
    """Families, or names in `concepts`, to find the layers of, by patching cross-attention between
    captions that differ in one of them; the next one is the control. None: nothing is patched."""
    concept_clips: PositiveInt
    """Clips per concept."""
    concept_seconds: Annotated[float, Field(ge=0.1, le=30)]
    """Beginning of each of these clips that is used."""
    bootstrap: PositiveInt
    """Bootstrap draws over compositions per interval."""

    def check(self, section: str) -> None:
        """Raise ParamsError for a single concept, which has no control."""
        if len(self.concepts) == 1:
            raise ParamsError(f"{section}.concepts = {list(self.concepts)}: name none, or two")


@dataclass(frozen=True)
class SelectLayers(Section):
    """The rule that assigns layers to slots."""

    kind: Ablation
    """Ablation whose scores rank the layers; one of `ablate.kinds`."""
    score: Literal["dce", "kl"]
    """Score that ranks: rise in cross-entropy (dce) or KL divergence at the logits."""
    skip_first: bool
    """Leave the first layer out: it mostly embeds, so ablating it always hurts."""
    skip_last: bool
    """Leave the last layer out: no later layer would act on an edit of its output."""


@dataclass(frozen=True)
class ExtractActivations(Section):
    """The activation store."""

    captions: bool
    """Condition the model on each clip's caption. Captions name instruments, so a probe on such
    activations could read the label from the text; false runs the model unconditionally."""
    dtype: Literal["float16", "bfloat16"]
    """Number format on disk."""
    shard_mb: Annotated[int, Field(ge=1, le=1024)]
    """Largest shard in MB; tens of MB suit DVC best."""
    batch_clips: PositiveInt
    """Clips per forward pass."""


@dataclass(frozen=True)
class MeasureEffects(Section):
    """What each latent does at the logits of teacher-forced music."""

    clips: PositiveInt
    """Validation clips for KL and confidence."""
    train_clips: PositiveInt
    """Train clips for the usual value of a latent, and for likelihoods with and without a
    concept."""
    seconds: Annotated[float, Field(ge=0.1, le=30)]
    """Middle part of each clip that is used."""
    draws: PositiveInt
    """Sets of codes drawn per validation clip; KL has a relative error of
    sqrt(2 / (clips * draws))."""
    checked: Annotated[int, Field(ge=3)]
    """Latents whose first-order effect is compared with a true edit."""
    batch: PositiveInt
    """Clips per pass."""


@dataclass(frozen=True)
class Probe(Section):
    """Concept classifiers on SAE latents and on every baseline."""

    k_sparse: Distinct[PositiveInt]
    """Sizes of the k-sparse probes, rising."""
    c_grid: Distinct[PositiveFloat]
    """Inverse regularisation strengths to choose from on validation clips."""
    min_positive: PositiveInt
    """Fewest positive and negative clips per split for a concept to be probed."""
    null_seeds: PositiveInt
    """Permutations of the training and validation labels that the null is averaged over."""
    bootstrap: PositiveInt
    """Bootstrap draws over compositions per interval."""


@dataclass(frozen=True)
class MaximizeActivation(Section):
    """Activation maximisation of chosen features; also used by the stage maximize_shared."""

    seconds: Annotated[float, Field(ge=0.1, le=30)]
    """Length of searched excerpts and of excerpts of real clips."""
    window_seconds: Annotated[float, Field(ge=0, le=30)]
    """Length of the window that the activation is averaged over, at its best place; at least one
    frame."""
    universal: PositiveInt
    """USAE features that fire for all models alike."""
    specific: NonNegativeInt
    """USAE features that fire for this model alone."""
    concepts: NonNegativeInt
    """Concepts, each with its best SAE feature."""
    directions: NonNegativeInt
    """Random directions, the null."""
    shared: PositiveInt
    """USAE features that fire for all models, in maximize_shared, which searches all models at
    once."""
    examples: PositiveInt
    """Best real moments per split."""
    naturalness: NonNegativeFloat
    """Weight of the model's own log-probability per code, in best-clip activations per nat."""
    steps: PositiveInt
    """Steps per search."""
    proposals: PositiveInt
    """Candidates per step whose activation is computed."""
    kept: PositiveInt
    """Best of these candidates that are also scored by the prior, or decoded and encoded again."""
    samples: PositiveInt
    """Samples per model without optimisation: a control, and where searches start."""
    random_clips: PositiveInt
    """Random real excerpts, a control."""
    bootstrap: PositiveInt
    """Bootstrap draws over features per interval."""


@dataclass(frozen=True)
class MatchFeatures(Section):
    """Which features the models share, and the table of features."""

    slot: FolderName
    """Slot whose SAEs are compared; the slot of train_usae."""
    threshold: Annotated[float, Field(gt=0, lt=1)]
    """Pairs above it match: correlation between models, cosine to the universal SAE. Fixed
    beforehand at the 0.5 of the USAE paper, not chosen on data."""
    null_draws: PositiveInt
    """Permutations of clips, and random dictionaries, that each null is averaged over."""
    permutations: PositiveInt
    """Permutations of the concept labels; the smallest p is 1 / (permutations + 1)."""
    bootstrap: PositiveInt
    """Bootstrap draws over compositions per interval."""
    min_clips: PositiveInt
    """Fewest clips with and without a concept, in validation and in test, to test for it."""
    top_clips: PositiveInt
    """Best clips listed per feature."""
    stable_only: bool
    """Name SAE latents by a concept, and call them common or own, only if they return in the other
    seeds (train_sae.stable_cosine). A concept that no such latent follows is named by all."""


@dataclass(frozen=True)
class FeatureActivity(Section):
    """The tables behind the feature pages."""

    clips: Annotated[int, Field(ge=2, le=5000)]
    """Most test clips, evenly spaced over all; each is exported whole as sound, 6 kB per second."""
    moments: Annotated[int, Field(ge=1, le=20)]
    """Best clips per feature."""
    bands: Annotated[int, Field(ge=1, le=10)]
    """Intervals between 0 and the highest activation from which other clips are drawn."""
    per_band: Annotated[int, Field(ge=1, le=10)]
    """Random clips per interval."""
    seconds: Annotated[float, Field(ge=0.5, le=10)]
    """Length of an excerpt."""
    bars: Annotated[int, Field(ge=2, le=100)]
    """Bars of the histogram of activations."""
    nearest: Annotated[int, Field(ge=1, le=50)]
    """Nearest features listed, by decoder cosine."""


@dataclass(frozen=True)
class Gallery(Section):
    """Generated pieces that the report plays."""

    pieces: Annotated[int, Field(ge=1, le=50)]
    """Pieces per model, on captions of test clips drawn at random."""
    seconds: Annotated[float, Field(ge=1, le=30)]
    """Length of each piece."""


@dataclass(frozen=True)
class Report(Section):
    """The report page."""

    cards: Annotated[int, Field(ge=1, le=100)]
    """Most feature cards per set: shared, of one model, best for a concept, common, own."""
    moments: Annotated[int, Field(ge=1, le=20)]
    """Top moments per card."""
    seconds: Annotated[float, Field(ge=0.5, le=10)]
    """Length of each excerpt; with cards and moments it decides the page's size, at most 15 MB."""
