"""One cell of the evaluation of an audio model: clips through it under one method, judged.

Clips stand where a generator has prompts: those with a concept are to lose it, those without are to
get it. What the codec itself loses cancels, since "plain" is the clip's unedited reconstruction and
everything is measured from there; the noise of a clip's pass is that of its plain twin, so a
steered piece differs by the edit alone. There are no words to edit, and no cross-entropy: how far
the sound moved is its spectral distance from the plain reconstruction, as in the ablation of audio
models (`musicscope.core.audio`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from musicscope.core.audio import resample, spectra, spectral_distance
from musicscope.core.seeding import seed_for
from musicscope.data.clips import known_labels, main_clips
from musicscope.dictionaries.core import TopKSAE
from musicscope.models.interface import AudioBatch, AudioModel, Hook
from musicscope.steering.conditions import Cell, Measured, cell_hooks, to_judges
from musicscope.steering.prompts import PromptSet
from musicscope.steering.recipes import Recipe

METHODS = (
    "plain", "original", "reseed", "sae", "diff_means", "probe_direction", "random_feature",
    "random_direction", "passthrough",
)  # fmt: skip
"""Those of `steering_cells.METHODS` that need no words, and original: the clip itself, not through
the codec."""


@dataclass(frozen=True)
class AudioBench:
    """What cells of an audio model are run with; see `steering_cells.Bench`."""

    model: AudioModel
    sae: TopKSAE
    recipes: Mapping[str, Recipe]
    judges: Any
    """`musicscope.judges.pair.Judges`"""
    clips: Any
    """`musicscope.data.clips.ClipStore`"""
    seed: int
    seconds: float
    """The middle of each clip that is played; all of a shorter clip."""
    batch: int

    @property
    def layer(self) -> str:
        return next(iter(self.recipes.values())).layer

    @property
    def frame_rate(self) -> float:
        """Of the hook point: a convolution may run many times faster than the latents."""
        return self.model.frame_rates[self.layer]

    def titles(self, wanted: PromptSet) -> list[str]:
        """What the pieces are called: the clips' ids."""
        at = choose_clips(self.clips.rows, wanted, self.seed)
        return [f"clip {name}" for name in self.clips.rows["id"].iloc[at]]


# --- clips ------------------------------------------------------------------------------------


def candidates(rows: pd.DataFrame, wanted: PromptSet) -> np.ndarray:
    """Row numbers of all clips of a split that are known to have the named concepts and to lack
    the others; `n` does not count here."""
    at = main_clips(rows, wanted.split)
    sides = [*((c, True) for c in wanted.named), *((c, False) for c in wanted.without)]
    for concept, has in sides:
        at, labels = known_labels(rows, concept, at)
        at = at[labels == has]
    return at


def choose_clips(rows: pd.DataFrame, wanted: PromptSet, seed: int) -> np.ndarray:
    """Up to `wanted.n` row numbers of `candidates` in a drawn order: every group comes once before
    any comes twice, and the first clips of a larger set are the smaller set."""
    name = (wanted.split, "+".join(wanted.named), "-".join(wanted.without))
    rng = np.random.default_rng(seed_for(seed, "steer", "clips", *name))
    at = rng.permutation(candidates(rows, wanted))
    turn = rows.iloc[at].groupby("group").cumcount().to_numpy()
    return at[np.argsort(turn, kind="stable")][: wanted.n]


def cut(bench: AudioBench, at: np.ndarray) -> np.ndarray:
    """The middle `seconds` of clips, float32 [n, samples] at the model's rate."""
    audio, rate = bench.clips.audio(at), bench.clips.sample_rate
    wanted = min(audio.shape[1], round(bench.seconds * rate))
    first = (audio.shape[1] - wanted) // 2
    return resample(audio[:, first : first + wanted], rate, bench.model.sample_rate)


# --- playing ----------------------------------------------------------------------------------


def other_noise(batch: AudioBatch, *names: object) -> AudioBatch:
    """The same clips with other draws of noise, which `names` decide."""
    return replace(batch, seeds=tuple(seed_for(seed, "steer", *names) for seed in batch.seeds))


def play(bench: AudioBench, method: str, batch: AudioBatch, hooks: Mapping[str, Hook]) -> Any:
    """Audio [n, samples] of a batch under a method; `hooks` are those of the cell."""
    if method == "original":
        return batch.audio
    if method == "reseed":
        return bench.model.reconstruct(other_noise(batch, "again"))
    return bench.model.reconstruct(batch, dict(hooks))


def heard(audio: torch.Tensor) -> np.ndarray:
    """Audio as an array; a piece that an edit drove to infinity is silent, so no success."""
    found = audio.float().cpu().numpy().copy()
    found[~np.isfinite(found).all(1)] = 0.0
    return found


def measure(bench: AudioBench, cell: Cell) -> Measured:
    """Play a cell's clips and judge them; `ce` is NaN, `spectral` the distance from plain."""
    at = choose_clips(bench.clips.rows, cell.prompts, bench.seed)
    hooks, parts, distances = cell_hooks(bench, cell), [], []
    for first in range(0, len(at), bench.batch):
        batch = bench.model.encode(cut(bench, at[first : first + bench.batch]))
        parts.append(heard(play(bench, cell.method, batch, hooks)))
        plain = heard(bench.model.reconstruct(batch)) if cell.method != "plain" else parts[-1]
        distances += [
            spectral_distance(spectra(a), spectra(b)) for a, b in zip(plain, parts[-1], strict=True)
        ]
    audio = np.concatenate(parts)
    sound = to_judges(audio, bench.model.sample_rate)
    return Measured(
        {k: np.asarray(v) for k, v in bench.judges.predict(sound).items()},
        np.asarray(bench.judges.embed(sound)),
        np.full(len(at), np.nan),
        audio[: cell.keep].copy(),
        np.array(distances),
        bench.clips.rows["group"].iloc[at].to_numpy(str),
    )


def estimate(bench: AudioBench, cells: int, clips: int, processes: int) -> str:
    """What is ahead, from one clip: print it before the run. `clips` is the mean number a cell."""
    at = main_clips(bench.clips.rows, "validation")[:1]
    begin = time.perf_counter()
    batch = bench.model.encode(cut(bench, at))
    sound = to_judges(heard(bench.model.reconstruct(batch)), bench.model.sample_rate)
    bench.judges.predict(sound)
    bench.judges.embed(sound)
    cell = (time.perf_counter() - begin) * clips
    minutes = cells * cell / max(1, processes) / 60
    return (
        f"{cells} cells of about {clips} clips x {bench.seconds:g} s at {cell:.0f} s: about "
        f"{minutes:.0f} min on {processes} process(es)"
    )
