"""Extraction of any model: hook points by number, one plan for each frame rate among them.

A text-to-music model has one rate, so one plan. Hook points of an audio model (RAVE) differ in
frame rate, so its slots are extracted in one pass for each rate. A manifest's ``config`` says the
rate (``frame_rate``, Hz): `alignment` pairs such a store with another model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from musicscope.activations import extraction
from musicscope.activations.extraction import Plan, Sources
from musicscope.activations.store import ActivationStore
from musicscope.models.interface import is_audio_model


def hook_names(model: Any, chosen: Mapping[str, int]) -> dict[str, str]:
    """Slot -> hook point, from slot -> its number in `model.hook_points` (metrics/layers)."""
    names = [point.name for point in model.hook_points]
    if wrong := {slot: i for slot, i in chosen.items() if not 0 <= int(i) < len(names)}:
        raise ValueError(
            f"{model.name} has hook points 0 to {len(names) - 1}, not {wrong}: run dvc repro "
            "select_layers"
        )
    return {slot: names[int(i)] for slot, i in chosen.items()}


def plans(
    model: Any, clips: Any, layers: dict[str, str], captions: bool = False, **options: Any
) -> list[Plan]:
    """One plan for each frame rate among the slots, slowest first; nothing is run.

    `layers` names a hook point for each slot; `options` are those of `extraction.plan`
    (dtype, shard_mb, batch_clips, model_sha256, clips_sha256), errors as there. `captions` mean
    nothing to an audio model.
    """
    if not is_audio_model(model):
        return [extraction.plan(model, clips, layers, captions=captions, **options)]
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
        result.append(extraction.plan(view, clips, chosen, captions=False, **options))
    return result


def extract(
    chosen: list[Plan],
    sources: Sources,
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
