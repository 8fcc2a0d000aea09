"""One input, plain and steered, and what the judges say: shared by `generate` and the studio.

The input is a prompt, or audio for a model that turns audio into audio. Seed and input decide the
noise, which is the same for both sounds, so they differ by the edit alone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from musicscope.core.audio import resample
from musicscope.core.io import read_json
from musicscope.data.audio_files import AudioFile
from musicscope.judges.pair import Judges
from musicscope.models.interface import (
    AudioModel,
    Hook,
    Model,
    audio_model,
    chain,
    language_model,
    points_of,
)
from musicscope.models.registry import load_model
from musicscope.steering.conditions import JUDGE_RATE
from musicscope.steering.edit import Steering, steering_hook
from musicscope.steering.recipes import DIRECTIONS, recipe_folder
from musicscope.steering.subjects import finite_audio, other_noise

MODELS = "data/models"
MAX_SECONDS = 120.0
MAX_PROMPT = 2_000
KINDS = ("plain", "steered")
Tick = Callable[[float], None]
"""Called with the share that is done, 0..1, before each step; may raise to stop the work."""


# --- inputs -----------------------------------------------------------------------------------


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed {seed}: 0 to 2^63 - 1")


@dataclass(frozen=True)
class TextInput:
    """A prompt to generate from; ValueError says what is wrong with it."""

    prompt: str
    """Empty: no caption."""
    seconds: float
    seed: int
    guidance: float | None = None
    """Scale of classifier-free guidance; None: the model's own."""

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= MAX_SECONDS:
            raise ValueError(f"{self.seconds:g} seconds: above 0 and up to {MAX_SECONDS:g}")
        _check_seed(self.seed)
        if len(self.prompt) > MAX_PROMPT:
            raise ValueError(f"a prompt of {len(self.prompt)} letters: up to {MAX_PROMPT}")
        if self.guidance is not None and not 1 <= self.guidance <= 20:
            raise ValueError(f"guidance {self.guidance:g}: 1 to 20")


@dataclass(frozen=True, eq=False)
class AudioInput:
    """A recording to reconstruct; ValueError says what is wrong with it."""

    audio: np.ndarray
    """float32 [samples] at the model's rate, see `read_audio`"""
    seed: int = 0
    """Of the noise; 0: the noise that the stage `steer` used"""

    def __post_init__(self) -> None:
        _check_seed(self.seed)


Input = TextInput | AudioInput


def read_audio(path: str | Path, rate: int, seconds: float | None = None) -> np.ndarray:
    """Read the first `seconds` (None: all) of an audio file: float32 [samples], mono, at `rate` Hz.

    Raises:
        FileNotFoundError: no such file.
        ValueError: libsndfile cannot read it, it is empty, it holds NaN or infinity, or it is
            longer than MAX_SECONDS and `seconds` is not given.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file")
    if seconds is not None and not 0 < seconds <= MAX_SECONDS:
        raise ValueError(f"{seconds:g} seconds: above 0 and up to {MAX_SECONDS:g}")
    try:
        file = AudioFile(path)
        own, length = file.rate, file.frames / file.rate
        if seconds is None and length > MAX_SECONDS:
            raise ValueError(f"{path} lasts {length:.0f} s: give --seconds, up to {MAX_SECONDS:g}")
        sound = file.read(0, file.frames if seconds is None else math.ceil(seconds * own)).T
    except EOFError as error:
        raise ValueError(f"{path} is cut short: {error}; copy it again") from error
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} is no audio that libsndfile reads: {error}") from error
    if file.cut:
        print(f"{path} is cut short: {file.cut}; edited as far as it goes", file=sys.stderr)
    if not len(sound):
        raise ValueError(f"{path} holds no samples")
    if not np.isfinite(sound).all():
        raise ValueError(f"{path} holds NaN or infinity")
    return resample(sound.mean(1), own, rate)


# --- models and concepts ----------------------------------------------------------------------


def known_models(models: str | Path = MODELS) -> list[str]:
    """List the names under data/models."""
    root = Path(models)
    folders = sorted(root.iterdir()) if root.is_dir() else []
    return [p.name for p in folders if p.is_dir() and not p.name.startswith(".")]


def known_concepts(model: str) -> dict[str, tuple[str, ...]]:
    """Map each concept to the directions ("off", "on") with settings chosen by `steer`."""
    chosen = {
        path.stem: read_json(path).get("chosen", {})
        for path in sorted(recipe_folder(model).glob("*.json"))
    }
    return {c: tuple(d for d in DIRECTIONS if d in known) for c, known in chosen.items()}


def check_model(model: str) -> None:
    """Raise ValueError, naming the known ones, if `model` is neither a folder nor a name."""
    if not Path(model).is_dir() and model not in known_models():
        known = ", ".join(known_models()) or f"none: {MODELS} is empty, git checkout {MODELS}"
        raise ValueError(f"no model {model!r}; known: {known}")


def check_requests(model: str, requests: Mapping[str, str]) -> None:
    """Raise an error of one line if a request {concept: "off" or "on"} is not possible.

    Raises:
        FileNotFoundError: nothing was learnt for the model.
        ValueError: no such concept, or nothing chosen for that direction.
    """
    folder, known = recipe_folder(model), known_concepts(model)
    if not known:
        raise FileNotFoundError(
            f"{folder} has no recipes: run dvc repro steer, or fetch it (dvc pull {folder})"
        )
    for concept, direction in requests.items():
        if concept not in known:
            raise ValueError(f"no concept {concept!r} of {model}; known: {', '.join(known)}")
        if direction not in known[concept]:
            raise ValueError(
                f"{concept} cannot be switched {direction!r} in {model}; chosen on validation "
                f"prompts: {', '.join(known[concept]) or 'nothing'}"
            )


# --- rendering --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sound:
    """Audio that a model rendered."""

    audio: np.ndarray
    """float32 [samples]"""
    rate: int
    codes: Tensor | None
    """[K, T]; None for an audio model"""

    def same_as(self, other: Sound) -> bool:
        """Whether both have the same codes; of an audio model, the same samples."""
        if self.codes is None or other.codes is None:
            return np.array_equal(self.audio, other.audio)
        return torch.equal(self.codes, other.codes)


def _progress_hook(tick: Tick, frames: float) -> Hook:
    """Make a hook that changes nothing and reports the share of frames that are generated."""

    def hook(activations: Tensor, positions: Tensor) -> Tensor:
        tick(min(1.0, max(0, int(positions[-1])) / frames))
        return activations

    return hook


class Session:
    """A loaded model that renders inputs plain and steered."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._last: tuple[Input, Sound] | None = None

    @classmethod
    def open(cls, name: str, device: str = "cpu", audio: bool = False) -> Session:
        """Load a model that generates, or with `audio` one that turns audio into audio.

        ValueError: it is of the other kind.
        """
        model = load_model(name, device)
        if audio and not isinstance(model, AudioModel):
            raise ValueError(
                f"{name} makes music from words: give --prompt TEXT in place of --audio FILE"
            )
        if not audio and isinstance(model, AudioModel):
            raise ValueError(
                f"{name} turns audio into audio and generates nothing from a prompt: musicscope "
                "generate --audio FILE edits a recording with it"
            )
        return cls(model)

    def _hooks(
        self, source: Input, layer: str, steering: Steering | None, tick: Tick | None
    ) -> dict[str, Hook]:
        model, hooks = self.model, []
        point = points_of(model).get(layer)
        if point is None:
            raise ValueError(f"{model.name} has no {layer}; it has {model.hook_points[0].name} ...")
        if tick is not None and isinstance(source, TextInput):
            hooks.append(_progress_hook(tick, source.seconds * model.frame_rate))
        if steering is not None:
            if steering.sae.width != point.width:
                raise ValueError(
                    f"the SAE has width {steering.sae.width}, {layer} of {model.name} "
                    f"{point.width}: they are not of one model; run dvc repro steer"
                )
            hooks.append(steering_hook(model, steering, model.frame_rates[layer]))
        return {layer: chain(*hooks)} if hooks else {}

    def draw(
        self, source: Input, layer: str, steering: Steering | None = None, tick: Tick | None = None
    ) -> Sound:
        """Render one input, steered at `layer` if `steering` is given.

        Raises:
            ValueError: the model has no such layer, or the SAE has another width.
        """
        model, hooks = self.model, self._hooks(source, layer, steering, tick)
        if isinstance(source, AudioInput):
            own = audio_model(model)
            batch = own.encode(torch.from_numpy(source.audio)[None])
            if source.seed:
                batch = other_noise(batch, "seed", source.seed)
            audio = finite_audio(own.reconstruct(batch, hooks))
            return Sound(audio[0], model.sample_rate, None)
        audio, codes = language_model(model).generate(
            [source.prompt or None], source.seconds, source.seed, hooks or None, source.guidance
        )
        return Sound(audio[0].float().cpu().numpy(), model.sample_rate, codes[0].cpu())

    def draw_pair(
        self, source: Input, layer: str, steering: Steering, tick: Tick | None = None,
        steered_source: Input | None = None,
    ) -> tuple[Sound, Sound]:  # fmt: skip
        """Render an input plain and steered, the latter from `steered_source` if given.

        The last plain sound is kept, since most calls of the studio change the edit alone.
        """
        halves = [None, None]
        if tick is not None:
            halves = [lambda share: tick(share / 2), lambda share: tick((1 + share) / 2)]
        plain = self.plain(source, layer, halves[0])
        return plain, self.draw(steered_source or source, layer, steering, halves[1])

    def plain(self, source: Input, layer: str, tick: Tick | None = None) -> Sound:
        """Render an input unedited; the last one is kept."""
        if self._last is None or self._last[0] != source:
            self._last = (source, self.draw(source, layer, None, tick))
        return self._last[1]


# --- judging ----------------------------------------------------------------------------------

Scores = Mapping[str, Mapping[str, tuple[float | None, ...]]]
"""Judge -> family -> probability per sound; None if a judge does not know the family, or if the
sound is silent."""


def judge(judges: Judges, sounds: tuple[Sound, ...]) -> Scores:
    """Compute both judges' probabilities of all families."""
    audio = resample(np.stack([s.audio for s in sounds]), sounds[0].rate, JUDGE_RATE)
    return {
        name: {
            family: tuple(float(v) if math.isfinite(v) else None for v in probabilities[:, i])
            for i, family in enumerate(judges.families)
        }
        for name, probabilities in judges.predict(audio).items()
    }


def score_table(
    scores: Scores, requests: Mapping[str, str], most: int = 3
) -> tuple[list[str], list[tuple[str, list[float | None]]]]:
    """Make heads and rows (family; plain and steered by each judge in turn).

    Requested families come first, with their request, then the `most` others of the highest
    probability.
    """
    heads = [f"{kind}, {judge.replace('_', ' ')}" for judge in scores for kind in KINDS]
    first = next(iter(scores.values()))
    others = [f for f in first if f not in requests]
    others.sort(key=lambda f: -max((v for v in first[f] if v is not None), default=0.0))
    rows = [
        (" ".join([family, *([requests[family]] if family in requests else [])]),
         [value for by_family in scores.values() for value in by_family[family]])
        for family in [*(f for f in requests if f in first), *others[:most]]
    ]  # fmt: skip
    return heads, rows
