"""Sections on judges, the concept finder and steering."""

from __future__ import annotations

import re
from dataclasses import dataclass

from musicscope.config.schema import ParamsError, choice, name, number, pattern

PAIR = re.compile(r"\w+-(on|off)(\+\w+-(on|off))+")


@dataclass(frozen=True)
class Steer:
    """Concepts switched off and on in generated music. Lists are searched over, on validation
    prompts. `steer` is what `dvc repro` does in minutes, `steer_full` what the committed numbers
    took hours for."""

    slot: str = name()
    """The slot whose layer and SAE are edited; one of `slots`."""
    concepts: tuple[str, ...] = name()
    """Instrument families, each to be switched off and on."""
    pairs: tuple[str, ...] = pattern(PAIR, "<concept>-off+<concept>-on and the like", empty=True)
    """Edits of several concepts at once, such as guitar-off+organ-on; may be none."""
    scores: tuple[str, ...] = choice("share", "effect", "partial", "auroc")
    """How train clips rank latents; see musicscope.steering.learning."""
    target: str = choice("active", "mean")
    """What latents are raised to: their mean where they fire, or over all frames."""
    both_sides: str = choice("never", "when_off", "when_on", "always")
    """When as many latents that speak against the concept are edited too, the other way round: to
    switch it off, on, always."""
    strengths: tuple[float, ...] = number(0.0, 1000.0, above=True)
    """Strengths of latents' edits: 1 reaches the target, above 1 goes past it."""
    n_features: tuple[int, ...] = number(1, 65536)
    """Numbers of latents."""
    branches: tuple[str, ...] = choice("conditional", "both", "guidance")
    """Rows of guided generation that are edited; see musicscope.steering.edit.Steering."""
    loops: tuple[str, ...] = choice("open", "closed")
    """closed: edit only while a probe on the latents hears something to change."""
    direction_strengths: tuple[float, ...] = number(0.0, 1000.0, above=True)
    """Strengths of the difference of means and of the probe direction, in lengths of the former."""
    words: bool
    """Also try latents and the difference of means on top of the edited prompt, with the first of
    `n_features` and of `branches`."""
    gate_features: int = number(1, 4096)
    """Latents that the closed loop's probe listens to."""
    gate_seconds: float = number(0.0, 60.0, above=True)
    """Time constant of what it hears."""
    seconds: float = number(0.1, 30.0)
    """Length of each piece; musicnn hears 3 s at a time."""
    validation_prompts: int = number(2)
    """Prompts of each concept and direction to choose settings on; of an audio model, clips."""
    n_prompts: int = number(2)
    """Prompts of each concept and direction, and of each pair, that numbers are reported on; of
    an audio model as many clips, or all there are."""
    batch: int = number(1)
    """Prompts generated together."""
    guidance: float = number(1.0, 20.0, above=True)
    """Scale of classifier-free guidance."""
    quality_budget: float = number(0.0, above=True)
    """Most that the unsteered model's cross-entropy may change by, nats a code, in the choice. An
    audio model has none: its choice has the next budget alone."""
    frechet_budget: float = number(0.0, above=True)
    """Most Frechet distance from plain music, in multiples of what other noise alone gives (of an
    audio model: or its codec, where that gives more)."""
    examples: int = number(0)
    """Pieces of each concept, direction and pair whose audio is kept."""
    bootstrap: int = number(1)
    """Bootstrap draws over prompts for each interval."""

    def check(self, section: str) -> None:
        """ParamsError, which names the keys under `section`, for pairs of unknown concepts."""
        for pair in self.pairs:
            named = [part.rsplit("-", 1)[0] for part in pair.split("+")]
            if len(set(named)) < len(named) or not set(named) <= set(self.concepts):
                raise ParamsError(
                    f"{section}.pairs has {pair!r}: allowed are different concepts out of "
                    f"{section}.concepts = {list(self.concepts)}"
                )


@dataclass(frozen=True)
class TrainJudge:
    """The judges of generated audio."""

    codec: str = name()
    """Model in data/models through whose codec the judge learns to hear."""
    clips: int = number(1)
    """Rendered train clips with each of the two soundfonts."""
    codec_clips: int = number(1)
    """How many of each also come as codec reconstructions."""
    epochs: int = number(1)
    """Passes over all of them."""
    cross_font_epochs: int = number(1)
    """Passes of the two controls that hear one soundfont, and are tested on the other."""
    test_clips: int = number(1)
    """Test clips with each soundfont."""
    codec_test_clips: int = number(1)
    """How many of each are also judged behind the codec."""
    pairs: int = number(0)
    """Matched pairs, guitar against another instrument."""
    bootstrap: int = number(1)
    """Bootstrap draws over compositions for each interval."""


@dataclass(frozen=True)
class Concept:
    """A concept to find: recordings that have it and recordings that lack it."""

    name: str = name()
    """What to call it."""
    positive: str
    """A folder of recordings, or clips of data/clips: `clips:has_guitar`; several terms are joined
    with `and`, such as `clips:has_guitar and not has_drums and kind=pair`. Terms on split, kind and
    font are train, clip and not the held-out font unless given."""
    negative: str
    """The same, without the concept."""


@dataclass(frozen=True)
class FindConcept:
    """Features that tell recordings with a concept from recordings without it."""

    slot: str = name()
    """The slot whose SAE is searched; one of `slots`."""
    universal: bool
    """Search the universal SAE too; its slot must be the same."""
    concepts: tuple[Concept, ...]
    """What to find. DVC watches data/clips only: name other folders under the stage's deps."""
    q: float = number(0.0, 0.5, above=True)
    """A feature counts as found where its p, corrected for all features, is at most this."""
    permutations: int = number(19)
    """Dealings of the labels; the smallest p is 1 / (permutations + 1)."""
    stability_draws: int = number(1)
    """Bootstrap draws of recordings that the stability of the ranking is measured on."""
    seconds: float = number(1.0, 120.0)
    """Length of the windows of a recording that the model hears, shorter if recordings are."""
    windows: int = number(1, 1000)
    """Most windows a recording."""
    few: int = number(4)
    """Recordings a side in the draws that show what so few suffice for."""
    few_draws: int = number(1)
    """Number of these draws, and of those without any concept."""
    features: int = number(0)
    """Best features of each concept whose top moments are kept as audio."""
    moments: int = number(1)
    """Top moments of each."""
    bootstrap: int = number(1)
    """Bootstrap draws over compositions for the intervals on test clips."""
