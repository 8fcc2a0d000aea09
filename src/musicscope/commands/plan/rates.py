"""Measured rates for `musicscope plan`: read from benchmarks/results and scaled, or taken now."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from musicscope.commands.plan.measure import Rate, largest_batch, measure
from musicscope.commands.plan.published_sizes import Shape
from musicscope.core.distributed import resolve_device
from musicscope.core.io import read_json
from musicscope.models.registry import load_model

FULL_SIZE, EXTRACTION, SAE_STEP = "full_size.json", "extraction.json", "sae_step.json"
ONE_THREAD = "cpu, 1 threads"


@dataclass(frozen=True)
class StepRate:
    """Cost of an SAE's training step, which its one dense product decides."""

    measured: dict[int, float]
    """Latents x width -> seconds per frame, with AuxK."""
    note: str

    def seconds(self, batch: int, latents: int, width: float) -> float:
        """Scale the measurement of the nearest product size to a step of `batch` frames."""
        size = latents * width
        near = min(self.measured, key=lambda known: abs(math.log(known / size)))
        return self.measured[near] * batch * size / near


def batches(rates: dict[str, Rate | None], seconds: float, gigabytes: float) -> str:
    """Describe, per model, the largest extract_activations.batch_clips within `gigabytes`."""
    lines = []
    for name, rate in rates.items():
        cost = rate and rate.footprint("extract", seconds)
        try:
            if cost is None:
                raise ValueError("its memory was not measured")
            if (codec := rate.codec_memory(seconds)) > gigabytes * 1e9:
                raise ValueError(f"its codec alone needs {codec / 1e9:.3f} GB")
            most = largest_batch(cost, round(gigabytes * 1e9), most=256)
            lines.append(f"{name}: extract_activations.batch_clips up to {most}")
        except ValueError as error:
            lines.append(f"{name}: {error}")
    return "\n".join(lines)


def load(folder: str | Path, shapes: Sequence[Shape], device: str) -> dict[str, Rate | None]:
    """Read rates per model from results of benchmarks, scaled by parameters where necessary.

    None for a model that no measurement can be scaled to.

    A measurement on `device` (auto, cpu or cuda) takes precedence over other devices.
    """
    folder, on_cpu = Path(folder), resolve_device(device) == "cpu"
    full = read_json(folder / FULL_SIZE) if (folder / FULL_SIZE).is_file() else {}
    known: dict[str, Rate] = {}
    for name, by_device in full.items():
        entries = {key: _rate(value) for key, value in by_device.items()}
        same = [key for key in entries if key.startswith("cpu") == on_cpu]
        # As stages run: the decoder in float32, one thread per process.
        known[name] = entries[min(same or entries, key=lambda key: (_unlike(entries[key]), key))]
    return {shape.name: _one(shape, known, folder) for shape in shapes}


def _unlike(rate: Rate) -> tuple[bool, bool]:
    return rate.dtype != "float32", rate.device.startswith("cpu") and rate.device != ONE_THREAD


def _rate(value: dict[str, object]) -> Rate:
    return Rate(**{f.name: value[f.name] for f in fields(Rate) if f.name in value})


def _one(shape: Shape, known: dict[str, Rate], folder: Path) -> Rate | None:
    plain = shape.name.rsplit("/", 1)[-1]
    if plain in known:
        return known[plain]
    path = folder / EXTRACTION
    if path.is_file() and (nano := read_json(path)).get("model") == plain:
        whole, passed = (nano["ms_cpu_a_clip"][k]["median"] / 1e3 for k in ("extract", "full"))
        return Rate(ONE_THREAD, "", nano["seconds_a_clip"], 1, whole - passed, passed)
    if not known or not shape.decoder_parameters or not shape.layers:
        return None
    # The measured MusicGen nearest in size; a pass scales with parameters and positions.
    own = shape.decoder_parameters
    name = min(known, key=lambda n: abs(math.log(known[n].decoder_parameters / own)))
    rate = known[name]
    times = own / rate.decoder_parameters * shape.positions_per_frame
    origin = f"{rate.device}, scaled from {name}"
    seconds = (rate.codec_seconds, rate.pass_seconds * times)
    return Rate(origin, "", rate.clip_seconds, rate.batch_clips, *seconds)


def step_rate(folder: str | Path) -> StepRate | None:
    """Read the training rate of dictionaries from the results of benchmarks/sae_step.py."""
    path = Path(folder) / SAE_STEP
    if not path.is_file():
        return None
    timed, measured = read_json(path), {}
    for key, value in timed.items():
        if isinstance(value, dict) and key.startswith("d") and "_F" in key:
            width, latents = map(int, key[1:].split("_F"))
            seconds = value["steps"]["ours_auxk"]["ms"] / 1e3
            measured[width * latents] = seconds / timed["batch"]
    return StepRate(measured, ONE_THREAD) if measured else None


def measure_local(name: str, clip_seconds: float, device: str) -> Rate:
    """Measure a local model on two clips of noise.

    FileNotFoundError (from load_model) where its weights are absent.
    """
    return measure(load_model(name, resolve_device(device)), clip_seconds)
