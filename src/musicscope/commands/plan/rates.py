"""Measured rates for `musicscope plan`: read from benchmarks/results, scaled, or taken now."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from musicscope.activations.token_cache import CHUNK
from musicscope.commands.plan.measure import Rate
from musicscope.commands.plan.memory import Footprint, largest_batch
from musicscope.commands.plan.published_sizes import Shape
from musicscope.core.io import read_json

FULL_SIZE, EXTRACTION, SAE_STEP = "full_size.json", "extraction.json", "sae_step.json"
ONE_THREAD = "cpu, 1 threads"
WINDOW_BYTES = 256 * 2**20
"""What a store's shuffle holds (ActivationStore.train_batches)."""


@dataclass(frozen=True)
class StepRate:
    """Cost of an SAE's training step, which its one dense product decides."""

    measured: dict[int, float]
    """Latents x width -> seconds for a frame, AuxK and all."""
    note: str

    def seconds(self, batch: int, latents: int, width: float) -> float:
        """Of a step, by the measured shape next in size and in proportion to its product."""
        size = latents * width
        near = min(self.measured, key=lambda known: abs(math.log(known / size)))
        return self.measured[near] * batch * size / near


@dataclass(frozen=True)
class Rates:
    """What is known of a model's speed; None where nothing was measured."""

    note: str = ""
    """Where it was measured, and on what."""
    clip_seconds: float = 10.0
    extract: float | None = None
    """Seconds a clip, from audio to activations."""
    a_pass: float | None = None
    """Of them, those in the model's layers."""
    measured: Rate | None = None
    """With memory and ablation, where they are of this very model."""
    step: StepRate | None = None
    on_cpu: bool = True

    def ablate(self, kinds: int, layers: int) -> float | None:
        """Seconds a clip to score all layers: half the depth follows after one on average."""
        if self.measured and self.measured.ablate_seconds is not None:
            return self.measured.ablate_seconds * kinds / self.measured.ablate_kinds
        return None if self.a_pass is None else self.a_pass * kinds * (layers + 1) / 2

    def extract_footprint(self, seconds: float) -> Footprint | None:
        """Peak of a pass over clips of `seconds`, weights among it."""
        known = self.measured
        if known is None or known.extract_fixed_bytes is None:
            return None
        longer = seconds / known.clip_seconds
        return Footprint(known.extract_fixed_bytes, math.ceil(longer * known.extract_clip_bytes))

    def codec_memory(self, seconds: float) -> float:
        """Peak bytes of the codec on the clips that it is given at once; 0 where unknown."""
        known = self.measured
        if known is None or known.codec_fixed_bytes is None:
            return 0.0
        held = known.codec_fixed_bytes + CHUNK * known.codec_clip_bytes
        return known.weight_bytes + held * seconds / known.clip_seconds

    def extract_memory(self, clips: int, seconds: float) -> float | None:
        """Peak bytes of a batch of clips of `seconds`: codec and decoder run in turn."""
        cost = self.extract_footprint(seconds)
        if cost is None:
            return None
        return max(cost.fixed + clips * cost.per_clip, self.codec_memory(seconds))

    def ablate_memory(self, clips: int, seconds: float) -> float | None:
        """Peak bytes of a batch of clips of `seconds`."""
        known = self.measured
        if known is None or known.ablate_fixed_bytes is None:
            return None
        longer = seconds / known.clip_seconds
        passed = known.ablate_fixed_bytes + clips * known.ablate_clip_bytes * longer
        return max(passed, self.codec_memory(seconds))


def batches(rates: dict[str, Rates], seconds: float, gigabytes: float) -> str:
    """A line a model: the largest extract_activations.batch_clips within so much memory."""
    lines = []
    for name, rate in rates.items():
        cost = rate.extract_footprint(seconds)
        if cost is None:
            lines.append(f"{name}: its memory was not measured")
            continue
        try:
            if rate.codec_memory(seconds) > gigabytes * 1e9:
                raise ValueError(f"its codec alone needs {rate.codec_memory(seconds) / 1e9:.3f} GB")
            most = largest_batch(cost, round(gigabytes * 1e9), most=256)
            lines.append(f"{name}: extract_activations.batch_clips up to {most}")
        except ValueError as error:
            lines.append(f"{name}: {error}")
    return "\n".join(lines)


def load(folder: str | Path, shapes: Sequence[Shape], device: str) -> dict[str, Rates]:
    """Rates of every model from the results of benchmarks, scaled by parameters where need be.

    A result on `device` (auto, cpu or cuda) goes before one on another kind.
    """
    folder = Path(folder)
    step = _step(folder / SAE_STEP)
    wanted = "cuda" if device == "auto" and _cuda() else device.split(":")[0]
    full = read_json(folder / FULL_SIZE) if (folder / FULL_SIZE).is_file() else {}
    known: dict[str, Rate] = {}
    for name, by_device in full.items():
        found = {key: _rate(value) for key, value in by_device.items()}
        right = [key for key in found if key.startswith("cpu") == (wanted in ("cpu", "auto"))]
        # As stages run: the decoder in float32, one thread a process.
        known[name] = found[min(right or found, key=lambda key: (_unlike(found[key]), key))]
    return {shape.name: _one(shape, known, folder, step) for shape in shapes}


def _unlike(rate: Rate) -> tuple[bool, bool]:
    return rate.dtype != "float32", rate.device.startswith("cpu") and rate.device != ONE_THREAD


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _rate(value: dict) -> Rate:
    return Rate(**{f.name: value[f.name] for f in fields(Rate) if f.name in value})


def _one(shape: Shape, known: dict[str, Rate], folder: Path, step: StepRate | None) -> Rates:
    plain = shape.name.rsplit("/", 1)[-1]
    if plain in known:
        return of(known[plain], step)
    path = folder / EXTRACTION
    if path.is_file() and (nano := read_json(path)).get("model") == plain:
        ms = nano["ms_cpu_a_clip"]
        return Rates(
            ONE_THREAD, nano["seconds_a_clip"], ms["extract"]["median"] / 1e3,
            ms["full"]["median"] / 1e3, None, step,
        )  # fmt: skip
    nearest = _nearest(shape, known)
    if nearest is None:
        return Rates(step=step)
    name, rate, times = nearest
    passed = rate.pass_seconds * times
    return Rates(
        f"{rate.device}, scaled from {name}", rate.clip_seconds, rate.codec_seconds + passed,
        passed, None, step, rate.device.startswith("cpu"),
    )  # fmt: skip


def of(rate: Rate, step: StepRate | None = None) -> Rates:
    """What a measurement of this very model says."""
    return Rates(
        f"{rate.device}, {rate.dtype}", rate.clip_seconds, rate.extract_seconds,
        rate.pass_seconds, rate, step, rate.device.startswith("cpu"),
    )  # fmt: skip


def _nearest(shape: Shape, known: dict[str, Rate]) -> tuple[str, Rate, float] | None:
    """The measured MusicGen next in size, and by what factor its passes are shorter."""
    if not shape.decoder_parameters or not shape.layers:
        return None
    sizes = {name: rate.decoder_parameters for name, rate in known.items()}
    if not sizes:
        return None
    own = shape.decoder_parameters
    name = min(sizes, key=lambda n: abs(math.log(sizes[n] / own)))
    return name, known[name], own / sizes[name] * shape.positions_per_frame


def _step(path: Path) -> StepRate | None:
    """From the shapes that benchmarks/sae_step.py timed."""
    if not path.is_file():
        return None
    found, measured = read_json(path), {}
    for key, value in found.items():
        if isinstance(value, dict) and key.startswith("d") and "_F" in key:
            width, latents = map(int, key[1:].split("_F"))
            seconds = value["steps"]["ours_auxk"]["ms"] / 1e3
            measured[width * latents] = seconds / found["batch"]
    return StepRate(measured, ONE_THREAD) if measured else None


def sae_step_rate(rates: dict[str, Rates]) -> StepRate | None:
    """The one training rate, which all models share."""
    return next((rate.step for rate in rates.values() if rate.step is not None), None)


def measured(shape: Shape, clip_seconds: float, device: str) -> Rates:
    """Rates of a model that is here, timed now on two clips of noise.

    FileNotFoundError (from load_model) where its weights are not.
    """
    import torch

    from musicscope.commands.plan.measure import measure
    from musicscope.models.registry import load_model

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return of(measure(load_model(shape.name, device), clip_seconds, memory=True))
