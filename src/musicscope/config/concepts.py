"""Sections on concepts, judges, the concept finder and steering."""

from __future__ import annotations

import difflib
import re
import string
from collections.abc import Iterable
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
    Text,
)

FAMILIES = (
    "guitar", "piano", "electric_piano", "mallets", "organ", "strings", "choir", "brass", "reed",
    "flute", "synth", "plucked", "bass", "drums",
)  # fmt: skip
"""Instrument families, the concepts that every data set has labels for."""
MUSICNN_TAGS = (
    "guitar", "classical", "slow", "techno", "strings", "drums", "electronic", "rock", "fast",
    "piano", "ambient", "beat", "violin", "vocal", "synth", "female", "indian", "opera", "male",
    "singing", "vocals", "no vocals", "harpsichord", "loud", "quiet", "flute", "woman",
    "male vocal", "no vocal", "pop", "soft", "sitar", "solo", "man", "classic", "choir", "voice",
    "new age", "dance", "male voice", "female vocal", "beats", "harp", "cello", "no voice",
    "weird", "country", "metal", "female voice", "choral",
)  # fmt: skip
"""Tags of musicnn, in the order of its outputs."""
TABLE_COLUMNS = ("path", "caption", "group", "split", "artist")
"""Columns of labels.csv that hold no label."""
BLANKS = ("lead", "every", "joined", "backed", "tempo", "dense", "key", "bpm")
"""What a prompt of a concept may leave open, such as {tempo}; filled in as in other prompts."""
CONCEPT_NAME = re.compile(r"[a-z][a-z0-9_]*")
QUERY_NAME = re.compile(r"\bhas_(\w+)")

Strength = Annotated[float, Field(gt=0, le=1000)]


@dataclass(frozen=True)
class ConceptDefinition(Section):
    """A concept of your own: how recordings are labelled with it, how music with it is asked for,
    and what judges it. All keys are optional; vocals, male_vocal and female_vocal come with tags of
    captions and of musicnn (musicscope.data.concepts)."""

    column: str = ""
    """Column of labels.csv with 1, 0 or nothing for unknown; empty: named like the concept."""
    tags: DistinctOrNone[Text] = ()
    """Words that mean it, in captions (outside of negation) and among a data set's tags."""
    unclear: DistinctOrNone[Text] = ()
    """Words that could mean it: they leave a recording without `tags` unknown."""
    absent: DistinctOrNone[Text] = ()
    """Words that say that it is absent, unless one of `tags` is there too."""
    folder_with: str = ""
    """Folder of recordings with it, below prepare_data.recordings.folder (source folder)."""
    folder_without: str = ""
    """Folder of recordings without it, likewise."""
    prompts_with: DistinctOrNone[Text] = ()
    """Prompts for music with it, which steering switches off; those at odd places are for
    validation, the others for test. May hold {lead}, {every}, {tempo}, {dense}, {key}, {bpm},
    {joined} and {backed}. None: captions of validation and test clips that have it."""
    prompts_without: DistinctOrNone[Text] = ()
    """Prompts for music without it, which steering switches on; as above."""
    musicnn: DistinctOrNone[Text] = ()
    """Tags of musicnn that mean it, the highest counts; none: musicnn does not judge it."""

    def check(self, name: str) -> None:
        """Raise ParamsError, which names keys under concepts.`name`."""
        key = f"concepts.{name}"
        if not CONCEPT_NAME.fullmatch(name) or name in (*FAMILIES, *TABLE_COLUMNS):
            raise ParamsError(
                f"{key}: allowed are names of small letters, digits and '_' that are neither a "
                "family nor a column of labels.csv; rename it"
            )
        if self.column.lower() in TABLE_COLUMNS:
            raise ParamsError(f"{key}.column = {self.column!r}: that column holds no labels")
        if bool(self.folder_with) != bool(self.folder_without):
            raise ParamsError(f"{key}: give both folder_with and folder_without, or neither")
        for tag in self.musicnn:
            if tag not in MUSICNN_TAGS:
                raise ParamsError(
                    f"{key}.musicnn = {tag!r} is no tag of musicnn{nearest(tag, MUSICNN_TAGS)}"
                )
        for side in ("prompts_with", "prompts_without"):
            self._check_prompts(f"{key}.{side}", getattr(self, side))

    def _check_prompts(self, key: str, prompts: tuple[str, ...]) -> None:
        if len(prompts) == 1:
            raise ParamsError(f"{key}: one prompt; give none, or two: validation and test differ")
        for prompt in prompts:
            try:
                blanks = [name for _, name, *_ in string.Formatter().parse(prompt)]
            except ValueError as error:
                raise ParamsError(f"{key} = {prompt!r}: {error}; write {{{{ for a {{") from None
            if unknown := [b for b in blanks if b is not None and b not in BLANKS]:
                raise ParamsError(
                    f"{key} = {prompt!r}: no blank {{{unknown[0]}}}; allowed are "
                    + ", ".join(f"{{{name}}}" for name in BLANKS)
                )


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggest a known name in an error message: `; did you mean ...?`, or a list of all."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


@dataclass(frozen=True)
class Steer(Section):
    """Concepts switched off and on in generated music. Lists are searched over, on validation
    prompts. `steer` takes minutes; `steer_full` takes hours and gives the committed numbers."""

    slot: FolderName
    """Slot whose layer and SAE are edited; one of `slots`."""
    concepts: Distinct[FolderName]
    """Families, or names in `concepts`; each to be switched off and on."""
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
    """A folder of recordings, or a query on data/clips: `clips:has_guitar`, with a family or a
    name in `concepts`. Several terms are
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
