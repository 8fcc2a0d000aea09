"""Seconds and bytes per clip of a model: measured on noise, or read from benchmarks/results.

The content of a clip has no effect on either. Memory is linear in the number of clips, so batches
of one and three clips give its peak for any batch. The batch decides the last bits of
floating-point results: a run that must give the same bytes everywhere fixes it in params.yaml.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from musicscope.ablation import language
from musicscope.commands.plan.published_sizes import Shape
from musicscope.core.distributed import resolve_device
from musicscope.core.io import read_json
from musicscope.models.interface import Batch, LanguageModel

FULL_SIZE, EXTRACTION, SAE_STEP = "full_size.json", "extraction.json", "sae_step.json"
GPU_CHECKS = "gpu-*.json"
"""Results of benchmarks/gpu_check.py, one file per card."""
ONE_THREAD = "cpu, 1 threads"
HEADROOM = 0.1  # of a memory limit: allocators round up and fragment


class Footprint(NamedTuple):
    """Peak memory of a step, linear in the number of clips."""

    fixed: int
    """Bytes for any batch: weights and other memory that does not grow with it."""
    per_clip: int
    """Bytes per clip at the peak."""

    @classmethod
    def through(cls, one: int, three: int, resident: int) -> Footprint:
        """Fit a line to the peaks of one and of three clips; add `resident` bytes of weights."""
        per_clip = -(-max(three - one, 0) // 2)
        return cls(resident + max(one - per_clip, 0), per_clip)

    def largest_batch(self, limit: float, most: int) -> int:
        """Find the largest batch (1 to `most` clips) below `limit` bytes less the headroom.

        ValueError with the bytes needed if not even one clip fits.
        """
        usable, one = int(limit * (1 - HEADROOM)), self.fixed + self.per_clip
        if one > usable:
            raise ValueError(
                f"one clip needs {one / 1e9:.3f} GB ({self.fixed / 1e9:.3f} for weights), more "
                f"than {usable / 1e9:.3f} GB; raise the limit, take shorter clips, a smaller "
                "dtype or a device map"
            )
        return max(1, min(most, (usable - self.fixed) // max(self.per_clip, 1)))


@dataclass(frozen=True)
class Rate:
    """Seconds and bytes per clip, on one device by one process."""

    device: str
    """Such as "cpu, 1 threads" or the name of a GPU; of a scaled rate, with its origin."""
    dtype: str
    """Of the decoder; "" if not recorded."""
    clip_seconds: float
    batch_clips: int
    codec_seconds: float
    """Audio to codes, per clip."""
    pass_seconds: float
    """Codes to the activations of the deepest layer, per clip."""
    ablate_seconds: float | None = None
    """All `ablate_kinds` of all layers from codes, per clip; None where not measured."""
    ablate_kinds: int = 0
    decoder_parameters: int = 0
    weight_bytes: int = 0
    extract_fixed_bytes: int | None = None
    """Peak memory of a forward pass: fixed bytes (including weights) plus bytes per clip."""
    extract_clip_bytes: int = 0
    codec_fixed_bytes: int | None = None
    """Peak of the codec, which runs before a pass, without weights."""
    codec_clip_bytes: int = 0
    ablate_fixed_bytes: int | None = None
    ablate_clip_bytes: int = 0

    @property
    def note(self) -> str:
        """Conditions of the measurement."""
        return ", ".join(filter(None, (self.device, self.dtype)))

    @property
    def extract_seconds(self) -> float:
        """Audio to activations, per clip."""
        return self.codec_seconds + self.pass_seconds

    def seconds_to_ablate(self, kinds: int, layers: int) -> float:
        """Seconds per clip to score all layers; where not measured, from half the depth each."""
        if self.ablate_seconds is not None:
            return self.ablate_seconds * kinds / self.ablate_kinds
        return self.pass_seconds * kinds * (layers + 1) / 2

    def footprint(self, stage: str, seconds: float) -> Footprint | None:
        """Peak of a pass of `stage` (extract, ablate) over clips of `seconds`; None if unknown."""
        fixed, each = (getattr(self, f"{stage}_{part}_bytes") for part in ("fixed", "clip"))
        if fixed is None:
            return None
        return Footprint(fixed, math.ceil(seconds / self.clip_seconds * each))

    def codec_memory(self, seconds: float) -> float:
        """Peak bytes of the codec on a chunk of clips; 0 where unknown."""
        from musicscope.activations.token_cache import CHUNK  # it needs pydantic

        if self.codec_fixed_bytes is None:
            return 0.0
        peak = self.codec_fixed_bytes + CHUNK * self.codec_clip_bytes
        return self.weight_bytes + peak * seconds / self.clip_seconds

    def memory(self, stage: str, clips: int, seconds: float) -> float | None:
        """Peak bytes of a batch of clips of `seconds`: codec and decoder run in turn."""
        if (cost := self.footprint(stage, seconds)) is None:
            return None
        return max(cost.fixed + clips * cost.per_clip, self.codec_memory(seconds))


class StepRate(NamedTuple):
    """Cost of an SAE's training step, which its one dense product decides."""

    measured: Mapping[int, float]
    """Latents x width -> seconds per frame, with AuxK."""
    note: str
    least: float = 0.0
    """Seconds of the shortest step measured: on a GPU small steps take as long as their launches"""

    def seconds(self, batch: int, latents: int, width: float) -> float:
        """Scale the measurement of the nearest product size to a step of `batch` frames."""
        size = latents * width
        near = min(self.measured, key=lambda known: abs(math.log(known / size)))
        return max(self.least, self.measured[near] * batch * size / near)


def batches(rates: Mapping[str, Rate | None], seconds: float, gigabytes: float) -> str:
    """Describe, per model, the largest extract_activations.batch_clips within `gigabytes`."""
    lines = []
    for name, rate in rates.items():
        cost = None if rate is None else rate.footprint("extract", seconds)
        if rate is None or cost is None:
            text = "its memory was not measured"
        elif (codec := rate.codec_memory(seconds)) > gigabytes * 1e9:
            text = f"its codec alone needs {codec / 1e9:.3f} GB"
        else:
            try:
                most = cost.largest_batch(gigabytes * 1e9, most=256)
                text = f"extract_activations.batch_clips up to {most}"
            except ValueError as error:
                text = str(error)
        lines.append(f"{name}: {text}")
    return "\n".join(lines)


# --- stored rates -----------------------------------------------------------------------------


def load(folder: str | Path, shapes: Sequence[Shape], device: str) -> dict[str, Rate | None]:
    """Read rates per model from results of benchmarks, scaled by parameters where necessary.

    None for a model that no measurement can be scaled to. If anything was measured on `device`
    (auto, cpu or cuda), other devices give only the memory of models that it did not run.
    """
    folder, on_cpu = Path(folder), _is_cpu(device)
    names, known, same = {field.name for field in fields(Rate)}, {}, {}
    for name, by_device in _stored(folder).items():
        entries = {
            key: Rate(**{k: v for k, v in value.items() if k in names})
            for key, value in by_device.items()
        }
        # As stages run: the decoder in float32, one thread per process.
        best = sorted(entries, key=lambda key: (_unlike(entries[key]), key))
        here = [key for key in best if key.startswith("cpu") == on_cpu]
        known[name] = entries[(here or best)[0]]
        if here:
            same[name] = known[name]
    found = {shape.name: _rate_of(shape, same or known, folder) for shape in shapes}
    for name, rate in found.items():
        other = known.get(name.rsplit("/", 1)[-1])
        if rate is not None and other is not None and rate.extract_fixed_bytes is None:
            memory = {n: getattr(other, n) for n in names if n.endswith("_bytes")}
            found[name] = replace(rate, **memory)
    return found


def _is_cpu(device: str) -> bool:
    # Not `resolve_device` for cuda: the plan may be for another machine.
    return (resolve_device(device) if device == "auto" else device) == "cpu"


def _stored(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Read the fields of all measured `Rate`s, by model and conditions."""
    found = read_json(folder / FULL_SIZE) if (folder / FULL_SIZE).is_file() else {}
    for path in sorted(folder.glob(GPU_CHECKS)):
        for key, measured in read_json(path)["parts"].get("c", {}).get("model", {}).items():
            if rate := measured.get("extraction", {}).get("rate"):
                conditions = f"{rate['device']}, {rate['dtype']}"
                rate = rate | measured.get("ablation", {}).get("rate", {})
                found.setdefault(key.split()[0], {})[conditions] = rate
    return found


def _unlike(rate: Rate) -> tuple[bool, bool]:
    return rate.dtype != "float32", rate.device.startswith("cpu") and rate.device != ONE_THREAD


def _rate_of(shape: Shape, known: Mapping[str, Rate], folder: Path) -> Rate | None:
    plain, path = shape.name.rsplit("/", 1)[-1], folder / EXTRACTION
    if plain in known:
        return known[plain]
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
    seconds = (rate.codec_seconds, rate.pass_seconds * times)
    origin = f"{rate.device}, scaled from {name}"
    return Rate(origin, "", rate.clip_seconds, rate.batch_clips, *seconds)


def step_rate(folder: str | Path, device: str = "cpu") -> StepRate | None:
    """Read the training rate of dictionaries from benchmarks/sae_step.py or, for cuda, gpu_check.

    On a GPU with TF32, as training runs there. A GPU without results gets the rate of a CPU.
    """
    if not _is_cpu(device):
        for path in sorted(Path(folder).glob(GPU_CHECKS)):
            if rate := _gpu_step_rate(read_json(path)):
                return rate
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


def _gpu_step_rate(found: dict[str, Any]) -> StepRate | None:
    measured, least = {}, []
    for name, methods in found["parts"].get("d", {}).get("steps", {}).items():
        if not name.startswith("sae "):
            continue
        width, latents, _, batch = (int(part[1:]) for part in name.split()[-4:])
        if "ms" in (plain := methods.get("ours tf32", {})):
            least.append(plain["ms"] / 1e3)
        if "ms" in (auxk := methods.get("ours_auxk tf32", {})):
            measured[width * latents] = auxk["ms"] / 1e3 / batch
    return StepRate(measured, f"{found['device']}, TF32", min(least)) if measured else None


# --- measuring --------------------------------------------------------------------------------


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Measure the most bytes of tensors alive at once during `run`, above those before it.

    Uses the allocator's own count: on CUDA its statistics, on a CPU the events of torch's profiler
    (the memory of a process would include its heap).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    alive = np.cumsum([change for _, change in sorted(changes, key=lambda pair: pair[0])])
    return max(0, int(alive.max(initial=0)))


def seconds(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Measure the median time of `run`, after a warm-up round where `rounds` > 1.

    With one thread on a CPU: the thread's own time, independent of other load; else wall time.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    times = []
    for _ in range(rounds + (rounds > 1)):
        start = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock() - start)
    return statistics.median(times[1:] or times)


def measure(
    model: LanguageModel,
    clip_seconds: float = 10.0,
    batch_clips: int = 2,
    rounds: int = 3,
    ablations: Sequence[str] = (),
    memory: bool = True,
    dtype: torch.dtype = torch.float32,
    say: Callable[[str], None] = lambda text: None,
) -> Rate:
    """Measure a model with a codec, unconditional as in extraction.

    Args:
        ablations: kinds to ablate every layer with (ablation.ablate), on one clip: many passes.
        memory: also find the peaks, which takes further passes.
        dtype: of the decoder, as loaded.
        say: called with each result as soon as it is known.
    """
    device, deepest = torch.device(model.device), model.hook_points[-1].name
    samples = round(clip_seconds * model.sample_rate)
    noise = 0.1 * np.random.default_rng(0).standard_normal((1, samples)).astype(np.float32)

    def encode(clips: int) -> Batch:
        return model.encode(noise[[0] * clips], [None] * clips)

    def decoder(clips: int) -> None:
        codes = one.codes.cpu().expand(clips, -1, -1)
        model.capture(model.with_captions(codes, [None] * clips), [deepest])

    batch = encode(batch_clips)
    one = model.with_captions(batch.codes[:1].cpu(), [None])
    codec = seconds(lambda: encode(batch_clips), device, rounds) / batch_clips
    say(f"codec: {codec:.2f} s a clip of {clip_seconds:g} s")
    passed = seconds(lambda: model.capture(batch, [deepest]), device, rounds) / batch_clips
    say(f"a pass to the deepest layer: {passed:.2f} s a clip")
    weights, peaks = getattr(model, "weight_bytes", 0), {}
    stages = (("extract", "a pass", decoder, weights), ("codec", "the codec", encode, 0))
    for key, name, run, resident in stages if memory else ():
        low, high = (peak_bytes(lambda n=n, run=run: run(n), device) for n in (1, 3))
        cost = Footprint.through(low, high, resident)
        say(f"peak of {name}: {cost.fixed:,} bytes and {cost.per_clip:,} a clip")
        peaks |= {f"{key}_fixed_bytes": cost.fixed, f"{key}_clip_bytes": cost.per_clip}
    ablate = None
    if ablations:
        means, times = language.sums(model, one).means, []

        def score() -> None:
            run = lambda: language.ablate(model, one, tuple(ablations), means)  # noqa: E731
            times.append(seconds(run, device, 1))

        if memory:  # in the same run, the longest of all: counting takes microseconds per operation
            peaks |= {"ablate_fixed_bytes": weights, "ablate_clip_bytes": peak_bytes(score, device)}
        else:
            score()
        (ablate,) = times
        say(f"ablating every layer: {ablate:.1f} s a clip")
    hf = getattr(model, "hf", None)  # with codec and text encoder; `lm` of audiocraft has neither
    language_part = getattr(hf, "decoder", hf) or getattr(model, "lm")  # noqa: B009
    on_gpu = device.type == "cuda"
    return Rate(
        torch.cuda.get_device_name(device) if on_gpu else f"cpu, {torch.get_num_threads()} threads",
        str(dtype).removeprefix("torch."),
        clip_seconds,
        batch_clips,
        codec,
        passed,
        ablate_seconds=ablate,
        ablate_kinds=len(ablations),
        decoder_parameters=sum(p.numel() for p in language_part.parameters()),
        weight_bytes=weights,
        **peaks,
    )
