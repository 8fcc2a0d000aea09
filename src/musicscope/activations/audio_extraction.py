"""Activations of audio models (RAVE) into the same stores as everybody's, at their own rates.

The clips are resampled to the model's rate as they are read. Hook points of an audio model differ
in frame rate, so slots are extracted in one pass for each rate. A manifest's ``config`` says the
rate (``frame_rate``, Hz): `alignment` pairs such a store with another model's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from scipy.signal import resample_poly

from musicscope.activations import extraction
from musicscope.activations.extraction import Plan, Sources
from musicscope.activations.store import ActivationStore


def resample(audio: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Audio [..., n] at `rate` Hz to float32 [..., ceil(n * wanted / rate)] at `wanted` Hz.

    Polyphase filtering (Kaiser window, 5.0, scipy's default), linear phase: time is kept.
    """
    if rate == wanted:
        return np.asarray(audio, np.float32)
    common = math.gcd(rate, wanted)
    return resample_poly(audio, wanted // common, rate // common, axis=-1).astype(np.float32)


@dataclass(frozen=True)
class ResampledClips:
    """A ClipStore as if its audio had been stored at `sample_rate`."""

    clips: Any
    sample_rate: int

    @property
    def rows(self) -> pd.DataFrame:
        return self.clips.rows

    def __len__(self) -> int:
        return len(self.clips.rows)

    def audio(self, rows: Any) -> np.ndarray:
        """float32 [n, samples] of the given row numbers."""
        return resample(self.clips.audio(rows), self.clips.sample_rate, self.sample_rate)


@functools.cache
def open_sources(model: str, clips: str, device: str = "cpu") -> tuple[Any, Any]:
    """Load an AudioModel and the clips at its rate, once a process; use with functools.partial."""
    loaded, store = extraction.open_sources(model, clips, device)
    return loaded, ResampledClips(store, loaded.sample_rate)


def plans(
    model: Any,
    clips: Any,
    layers: dict[str, str],
    **options: Any,
) -> list[Plan]:
    """One plan for each frame rate among the slots, slowest first; nothing is run.

    `layers` names a hook point for each slot; `options` are those of `extraction.plan`
    (dtype, shard_mb, batch_clips, model_sha256, clips_sha256) but `captions`, which mean nothing
    to an audio model. Errors as there.
    """
    known = [point.name for point in model.hook_points]
    if unknown := sorted(set(layers.values()) - set(known)):
        raise ValueError(f"{model.name} has no {unknown}; its hook points are {known}")
    result = []
    for rate in sorted({model.frame_rates[point] for point in layers.values()}):
        view = SimpleNamespace(
            name=model.name,
            hook_points=model.hook_points,
            sample_rate=model.sample_rate,
            frame_rate=rate,
        )
        chosen = {slot: point for slot, point in layers.items() if model.frame_rates[point] == rate}
        plan = extraction.plan(view, clips, chosen, captions=False, **options)
        config = {**plan.config, "frame_rate": rate, "sample_rate": model.sample_rate}
        result.append(dataclasses.replace(plan, config=config))
    return result


def extract(
    chosen: list[Plan],
    sources: Sources | Callable[[], tuple[Any, Any]],
    folders: dict[str, str | Path],
    processes: int = 1,
    **engine: Any,
) -> dict[str, ActivationStore]:
    """Run all plans: one store for each slot at `folders[slot]`.

    See `extraction.extract`, which takes `engine` (ranks, workers).
    """
    stores: dict[str, ActivationStore] = {}
    for plan in chosen:
        own = {slot: folders[slot] for slot in plan.layers}
        stores |= extraction.extract(plan, sources, own, processes, **engine)
    return {slot: stores[slot] for slot in folders if slot in stores}


def summary(chosen: list[Plan], stores: dict[str, ActivationStore]) -> dict[str, Any]:
    """Numbers of all plans in the form of `extraction.summary`, with each slot's frame rate."""
    parts = [extraction.summary(p, {slot: stores[slot] for slot in p.layers}) for p in chosen]
    slots = {slot: entry for part in parts for slot, entry in part["slots"].items()}
    rates = {slot: plan.config["frame_rate"] for plan in chosen for slot in plan.layers}
    return {
        **parts[0],
        "frames": sum(part["frames"] for part in parts),
        "bytes": sum(part["bytes"] for part in parts),
        "slots": {slot: {**slots[slot], "frame_rate": rates[slot]} for slot in sorted(slots)},
    }
