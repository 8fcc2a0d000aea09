"""Sections on judges, the concept finder and steering."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from musicscope.config.schema import (
    LATENT_SCORE,
    PAIR,
    Distinct,
    DistinctOrNone,
    FolderName,
    ParamsError,
    Section,
)

Strength = Annotated[float, Field(gt=0, le=1000)]


@dataclass(frozen=True)
class Steer(Section):
    """Concepts switched off and on in generated music. Lists are searched over, on validation
    prompts. `steer` takes minutes; `steer_full` takes hours and gives the committed numbers."""

    slot: FolderName
    """Slot whose layer and SAE are edited; one of `slots`."""
    concepts: Distinct[FolderName]
    """Instrument families, each to be switched off and on."""
    pairs: DistinctOrNone[Annotated[str, Field(pattern=PAIR)]]
    """Edits of several concepts at once, such as guitar-off+organ-on; may be none."""
    scores: Distinct[Annotated[str, Field(pattern=LATENT_SCORE)]]
    """What ranks latents. Input scores share, effect, partial, auroc: what makes a latent fire on
    train clips (musicscope.steering.learning). Output scores: output, KL at the logits; toward,
    pull towards codes of clips with the concept (musicscope.features.output_effects). With both,
    as in share+output, the best 32 by the first are ranked by the second."""
    stable_only: bool
    """Edit only latents that return in the other seeds (train_sae.stable_cosine), unless a concept
    has fewer of them than `n_features`; the metrics name the pool of each concept."""
    target: Literal["active", "mean"]
    """Value that latents are raised to: their mean where they fire, or over all frames."""
    both_sides: Literal["never", "when_off", "when_on", "always"]
    """When to edit as many latents that predict the concept's absence too, in the opposite
    direction: never, to switch it off, to switch it on, or always."""
    strengths: Distinct[Strength]
    """Strengths of edits of latents: 1 reaches the target, above 1 goes past it."""
    n_features: Distinct[Annotated[int, Field(ge=1, le=65536)]]
    """Numbers of latents."""
    branches: Distinct[Literal["conditional", "both", "guidance"]]
    """Rows of guided generation that are edited; see musicscope.steering.edit.Steering."""
    loops: Distinct[Literal["open", "closed"]]
    """closed: edit only while a probe on the latents detects something to change."""
    direction_strengths: Distinct[Strength]
    """Smallest and largest strength of the difference of means and of the probe direction, in
    lengths of the difference of means. As many are tried as settings of the latents."""
    words: bool
    """Also try latents and the difference of means on top of the edited prompt, with the first of
    `n_features` and of `branches` and every second strength."""
    frozen_decoder: bool
    """Also edit latents of the frozen decoder (`train_sae.baselines`), with the same search as
    those of the SAE. Not for audio models."""
    gate_features: Annotated[int, Field(ge=1, le=4096)]
    """Latents that the probe of the closed loop reads."""
    gate_seconds: Annotated[float, Field(gt=0, le=60)]
    """Time constant of that probe's moving average."""
    seconds: Annotated[float, Field(ge=0.1, le=30)]
    """Length of each generated clip; musicnn takes 3 s at a time."""
    validation_prompts: Annotated[int, Field(ge=2)]
    """Prompts per concept and direction to choose settings on; clips for an audio model."""
    n_prompts: Annotated[int, Field(ge=2)]
    """Prompts per concept and direction, and per pair, that numbers are reported on. For an audio
    model as many clips, or all there are."""
    batch: PositiveInt
    """Prompts generated together."""
    guidance: Annotated[float, Field(gt=1, le=20)]
    """Scale of classifier-free guidance: that of the models, or the results are of music that
    nobody hears."""
    quality_budget: PositiveFloat
    """Largest change of the unsteered model's cross-entropy, in nats per code, that a chosen
    setting may cause. Audio models have no cross-entropy: only `distance_budget` binds them."""
    distance_budget: PositiveFloat
    """Largest distance from unedited music of a chosen setting: MMD^2 of musicnn's embeddings,
    unbiased, so that other noise alone gives 0 on average. Methods are compared up to it."""
    examples: NonNegativeInt
    """Clips per concept, direction and pair whose audio is kept."""
    bootstrap: PositiveInt
    """Bootstrap draws over prompts per interval."""

    def check(self, section: str) -> None:
        """Raise ParamsError, which names keys under `section`.

        For pairs of unknown concepts, and for one strength of directions where latents have many.
        """
        settings = len(self.strengths) * len(self.n_features) * len(self.scores) * len(self.loops)
        if settings > 1 and len(self.direction_strengths) < 2:
            raise ParamsError(
                f"{section}.direction_strengths = {list(self.direction_strengths)}: give the "
                f"smallest and the largest, so that directions try {settings} strengths, as many "
                "as latents try settings"
            )
        for pair in self.pairs:
            named = [part.rsplit("-", 1)[0] for part in pair.split("+")]
            if len(set(named)) < len(named) or not set(named) <= set(self.concepts):
                raise ParamsError(
                    f"{section}.pairs has {pair!r}: allowed are different concepts out of "
                    f"{section}.concepts = {list(self.concepts)}"
                )


@dataclass(frozen=True)
class TrainJudge(Section):
    """The judges of generated audio."""

    codec: FolderName
    """Model in data/models whose codec makes reconstructions to train and test the judge on."""
    clips: PositiveInt
    """Rendered train clips per family of sounds, of two."""
    codec_clips: PositiveInt
    """How many clips per family of sounds are also used as codec reconstructions."""
    epochs: PositiveInt
    """Passes over all of them."""
    cross_font_epochs: PositiveInt
    """Passes of the two controls that train on one family of sounds and are tested on the other."""
    test_clips: PositiveInt
    """Test clips per family of sounds."""
    codec_test_clips: PositiveInt
    """How many of them are also judged as codec reconstructions."""
    pairs: NonNegativeInt
    """Matched pairs, guitar against another instrument."""
    bootstrap: PositiveInt
    """Bootstrap draws over compositions per interval."""


@dataclass(frozen=True)
class Concept(Section):
    """A concept to find: recordings that have it and recordings that lack it."""

    name: FolderName
    """Name of the concept in results."""
    positive: str
    """A folder of recordings, or a query on data/clips: `clips:has_guitar`. Several terms are
    joined with `and`, such as `clips:has_guitar and not has_drums and kind=pair`. Terms on split,
    kind and font are train, clip and not the held-out font unless given."""
    negative: str
    """The same, without the concept."""


@dataclass(frozen=True)
class FindConcept(Section):
    """Features that separate recordings with a concept from recordings without it."""

    slot: FolderName
    """Slot whose SAE is searched; one of `slots`."""
    universal: bool
    """Search the universal SAE too; its slot must be the same."""
    concepts: Distinct[Concept]
    """Concepts to find. DVC watches data/clips only: add other folders to the stage's deps."""
    q: Annotated[float, Field(gt=0, le=0.5)]
    """A feature is reported as found if its p, corrected for all features, is at most this."""
    permutations: Annotated[int, Field(ge=19)]
    """Permutations of the labels; the smallest p is 1 / (permutations + 1)."""
    stability_draws: PositiveInt
    """Bootstrap draws of recordings that the stability of the ranking is measured on."""
    seconds: Annotated[float, Field(ge=1, le=120)]
    """Length of the windows of a recording that the model reads; shorter if recordings are."""
    windows: Annotated[int, Field(ge=1, le=1000)]
    """Most windows per recording."""
    few: Annotated[int, Field(ge=4)]
    """Recordings per side in draws that show what few recordings suffice for."""
    few_draws: PositiveInt
    """Number of these draws, and of draws without any concept."""
    features: NonNegativeInt
    """Best features per concept whose top moments are kept as audio."""
    moments: PositiveInt
    """Top moments per feature."""
    bootstrap: PositiveInt
    """Bootstrap draws over compositions for the intervals on test clips."""
