"""Methods that the evaluation compares, and one condition: a method on prompts or clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from musicscope.steering.recipes import Settings

Request = tuple[str, str]
"""(concept, "off" or "on")."""


@dataclass(frozen=True)
class Method:
    """One way to fulfil a request, or a control."""

    label: str
    """Name for readers."""
    edit: str | None = None
    """What changes the activations; see `conditions.condition_hooks`. None: nothing."""
    words: bool = False
    """Whether the prompt asks for the request in words."""
    searched: bool = False
    """Whether settings are chosen for it on validation data."""
    dictionary: str = "sae"
    """Whose latents: those of the SAE, or of one of its baselines in data/sae."""

    @property
    def has_settings(self) -> bool:
        """Whether it needs `Settings`; an edit that is not searched takes the settings of sae."""
        return self.edit not in (None, "reconstruction")


FROZEN = "frozen_decoder"
"""Name of the baseline whose latents are steered too, and of the method that does so."""
METHODS = {
    "plain": Method("plain"),
    "original": Method("the clip itself"),
    "reseed": Method("other noise"),
    "prompt_edit": Method("prompt edit", words=True),
    "sae": Method("features", "latents", searched=True),
    "sae_words": Method("features and words", "latents", words=True, searched=True),
    FROZEN: Method("features of the frozen decoder", "latents", searched=True, dictionary=FROZEN),
    "diff_means": Method("difference of means", "difference", searched=True),
    "diff_means_words": Method(
        "difference of means and words", "difference", words=True, searched=True
    ),
    "probe_direction": Method("probe direction", "probe", searched=True),
    "random_feature": Method("random features", "random latents"),
    "random_direction": Method("random direction", "random direction"),
    "passthrough": Method("passthrough", "reconstruction"),
}
"""Every method by its name in metrics. plain: no edit; original: a clip without the codec; reseed:
plain with other noise, which shows what chance changes; passthrough: x replaced by its SAE
reconstruction."""
# fmt: off
COMPARED = {
    "sae": (
        FROZEN, "prompt_edit", "diff_means", "probe_direction", "random_feature",
        "random_direction",
    ),
    "sae_words": ("sae", "prompt_edit", "diff_means", "diff_means_words"),
}
# fmt: on
"""Method -> methods whose success is subtracted from its own, paired over prompts."""
JOINT_METHODS = ("sae", "diff_means", "prompt_edit", "sae_words")
"""Methods that fulfil several requests at once."""


def searched_methods(methods: Sequence[str]) -> list[str]:
    """Return the methods with a search, methods with words last."""
    return sorted((m for m in methods if METHODS[m].searched), key=lambda m: METHODS[m].words)


def parse_pair(text: str) -> tuple[Request, ...]:
    """Parse guitar-off+organ-on into (("guitar", "off"), ("organ", "on"))."""
    parts = (part.rpartition("-") for part in text.split("+"))
    return tuple((concept, direction) for concept, _, direction in parts)


@dataclass(frozen=True)
class Selection:
    """Which prompts or clips: `n` of a split with some concepts and without others."""

    split: str
    n: int
    named: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    comes: str = ""
    """The defined concept that is to come, if its own prompts without it are used"""


@dataclass(frozen=True)
class Condition:
    """What decides the numbers of a condition, besides `conditions.Context`."""

    selection: Selection
    method: str = "plain"
    requests: tuple[Request, ...] = ()
    settings: tuple[Settings, ...] = ()
    """One per request, for methods that have settings."""
    keep: int = 0
    """Number of samples whose audio is kept."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r}: known {', '.join(METHODS)}")
        if METHODS[self.method].has_settings and len(self.settings) != len(self.requests):
            raise ValueError(f"{self.method}: {len(self.settings)} settings for {self.requests}")
