"""Measured rates for `musicscope plan`: read from benchmarks/results and scaled, or taken now."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from musicscope.activations.token_cache import CHUNK
from musicscope.commands.plan.measure import Footprint, Rate, largest_batch, measure
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


@dataclass(frozen=True)
class Rates:
    """Known speed and memory of a model; None where nothing was measured."""

    note: str = ""
    """Device of the measurement, and the model if another."""
    clip_seconds: float = 10.0
    extract: float | None = None
    """Seconds per clip, from audio to activations."""
    a_pass: float | None = None
    """Part of `extract` in the model's layers."""
    measured: Rate | None = None
    """With memory and ablation, if measured on this very model."""
    on_cpu: bool = True

    def ablate(self, kinds: int, layers: int) -> float | None:
        """Seconds per clip to score all layers; on average half the depth follows a layer."""
        if self.measured and self.measured.ablate_seconds is not None:
            return self.measured.ablate_seconds * kinds / self.measured.ablate_kinds
        return None if self.a_pass is None else self.a_pass * kinds * (layers + 1) / 2

    def footprint(self, stage: str, seconds: float) -> Footprint | None:
        """Peak of a pass of `stage` (extract, ablate) over clips of `seconds`."""
        known, fixed = self.measured, f"{stage}_fixed_bytes"
        if known is None or getattr(known, fixed) is None:
            return None
        longer = seconds / known.clip_seconds
        per_clip = math.ceil(longer * getattr(known, f"{stage}_clip_bytes"))
        return Footprint(getattr(known, fixed), per_clip)

    def codec_memory(self, seconds: float) -> float:
        """Peak bytes of the codec on a chunk of clips; 0 where unknown."""
        known = self.measured
        if known is None or known.codec_fixed_bytes is None:
            return 0.0
        peak = known.codec_fixed_bytes + CHUNK * known.codec_clip_bytes
        return known.weight_bytes + peak * seconds / known.clip_seconds

    def memory(self, stage: str, clips: int, seconds: float) -> float | None:
        """Peak bytes of a batch of clips of `seconds`: codec and decoder run in turn."""
        cost = self.footprint(stage, seconds)
        if cost is None:
            return None
        return max(cost.fixed + clips * cost.per_clip, self.codec_memory(seconds))


def batches(rates: dict[str, Rates], seconds: float, gigabytes: float) -> str:
    """Describe, per model, the largest extract_activations.batch_clips within `gigabytes`."""
    lines = []
    for name, rate in rates.items():
        cost, codec = rate.footprint("extract", seconds), rate.codec_memory(seconds)
        try:
            if cost is None:
                raise ValueError("its memory was not measured")
            if codec > gigabytes * 1e9:
                raise ValueError(f"its codec alone needs {codec / 1e9:.3f} GB")
            most = largest_batch(cost, round(gigabytes * 1e9), most=256)
            lines.append(f"{name}: extract_activations.batch_clips up to {most}")
        except ValueError as error:
            lines.append(f"{name}: {error}")
    return "\n".join(lines)


def load(folder: str | Path, shapes: Sequence[Shape], device: str) -> dict[str, Rates]:
    """Read rates per model from results of benchmarks, scaled by parameters where necessary.

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


def _one(shape: Shape, known: dict[str, Rate], folder: Path) -> Rates:
    plain = shape.name.rsplit("/", 1)[-1]
    if plain in known:
        return _own(known[plain])
    path = folder / EXTRACTION
    if path.is_file() and (nano := read_json(path)).get("model") == plain:
        ms = nano["ms_cpu_a_clip"]
        times = (ms["extract"]["median"] / 1e3, ms["full"]["median"] / 1e3)
        return Rates(ONE_THREAD, nano["seconds_a_clip"], *times)
    if not known or not shape.decoder_parameters or not shape.layers:
        return Rates()
    # The measured MusicGen nearest in size; a pass scales with parameters and positions.
    own = shape.decoder_parameters
    name = min(known, key=lambda n: abs(math.log(known[n].decoder_parameters / own)))
    rate = known[name]
    passed = rate.pass_seconds * own / rate.decoder_parameters * shape.positions_per_frame
    return Rates(
        f"{rate.device}, scaled from {name}", rate.clip_seconds, rate.codec_seconds + passed,
        passed, on_cpu=rate.device.startswith("cpu"),
    )  # fmt: skip


def _own(rate: Rate) -> Rates:
    """Rates from a measurement of this very model."""
    return Rates(
        f"{rate.device}, {rate.dtype}", rate.clip_seconds, rate.extract_seconds,
        rate.pass_seconds, rate, rate.device.startswith("cpu"),
    )  # fmt: skip


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


def measured(shape: Shape, clip_seconds: float, device: str) -> Rates:
    """Measure a local model on two clips of noise.

    FileNotFoundError (from load_model) where its weights are absent.
    """
    return _own(measure(load_model(shape.name, resolve_device(device)), clip_seconds, memory=True))
