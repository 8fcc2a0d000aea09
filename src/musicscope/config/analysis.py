"""Sections on layers, activations, probes, matching, maximisation and the report."""

from __future__ import annotations

from dataclasses import dataclass

from musicscope.config.schema import choice, name, number


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
class MaximizeActivation:
    """Activation maximisation of chosen features; of maximize_shared as well."""

    seconds: float = number(0.1, 30.0)
    """Length of searched pieces and of excerpts of real clips."""
    window_seconds: float = number(0.0, 30.0)
    """The activation is averaged over so long (at least one frame), at its best place."""
    universal: int = number(1)
    """USAE features that fire for all models alike."""
    specific: int = number(0)
    """USAE features that fire for this model alone."""
    concepts: int = number(0)
    """Concepts, each with its best SAE feature."""
    directions: int = number(0)
    """Random directions, the null."""
    shared: int = number(1)
    """The same as `universal` in maximize_shared, which searches all models at once."""
    examples: int = number(1)
    """Best real moments of each split."""
    naturalness: float = number(0.0)
    """Weight of the model's own log-probability per code, in best-clip activations per nat."""
    steps: int = number(1)
    """Steps of each search."""
    proposals: int = number(1)
    """Candidates a step, whose activation is computed."""
    kept: int = number(1)
    """Candidates a step, of these, that are also scored by the prior, or heard and encoded."""
    samples: int = number(1)
    """Unoptimised samples of each model: a control, and where searches start."""
    random_clips: int = number(1)
    """Random real excerpts, a control."""
    bootstrap: int = number(1)
    """Bootstrap draws over features for each interval."""


@dataclass(frozen=True)
class MatchFeatures:
    """Which features the models share, and the table of features."""

    slot: str = name()
    """The slot whose SAEs are compared; that of train_usae."""
    threshold: float = number(0.0, 1.0, above=True, below=True)
    """A pair above it is a match: correlation between models, cosine to the universal SAE. Fixed
    beforehand at the .5 of the USAE paper, not chosen on data."""
    null_draws: int = number(1)
    """Re-pairings of clips, and random dictionaries, that each null is averaged over."""
    permutations: int = number(1)
    """Permutations of the concept labels; the smallest p is 1 / (permutations + 1)."""
    bootstrap: int = number(1)
    """Bootstrap draws over compositions for each interval."""
    min_clips: int = number(1)
    """Fewest clips with and without a concept, in validation and in test, to test for it."""
    top_clips: int = number(1)
    """Best clips listed for each feature."""


@dataclass(frozen=True)
class Report:
    """The report page."""

    cards: int = number(1, 100)
    """Most feature cards of each set: shared, of one model, best for a concept, common, own."""
    moments: int = number(1, 20)
    """Top moments on each card."""
    seconds: float = number(0.5, 10.0)
    """Length of each excerpt; with cards and moments it decides the page's size, at most 15 MB."""
