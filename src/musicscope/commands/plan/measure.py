"""Time and memory per clip of a model, measured on noise: the content of a clip has no effect.

Memory is linear in the number of clips, so batches of one and three clips give its peak for any
batch. The batch decides the last bits of floating-point results: a run that must give the same
bytes everywhere fixes its batch in params.yaml.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from musicscope.activations.token_cache import CHUNK
from musicscope.models.interface import MusicModel

HEADROOM = 0.1  # of the limit: allocators round up and fragment


@dataclass(frozen=True)
class Footprint:
    """Peak memory of a step, linear in the number of clips."""

    fixed: int
    """Bytes for any batch: weights and other memory that does not grow with it."""
    per_clip: int
    """Bytes per clip at the peak."""


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
    extract_clip_bytes: int | None = None
    codec_fixed_bytes: int | None = None
    """Peak of the codec, which runs before a pass, without weights."""
    codec_clip_bytes: int | None = None
    ablate_fixed_bytes: int | None = None
    ablate_clip_bytes: int | None = None

    @property
    def note(self) -> str:
        """Conditions of the measurement."""
        return ", ".join(filter(None, (self.device, self.dtype)))

    @property
    def on_cpu(self) -> bool:
        return self.device.startswith("cpu")

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
        if self.codec_fixed_bytes is None:
            return 0.0
        peak = self.codec_fixed_bytes + CHUNK * self.codec_clip_bytes
        return self.weight_bytes + peak * seconds / self.clip_seconds

    def memory(self, stage: str, clips: int, seconds: float) -> float | None:
        """Peak bytes of a batch of clips of `seconds`: codec and decoder run in turn."""
        cost = self.footprint(stage, seconds)
        if cost is None:
            return None
        return max(cost.fixed + clips * cost.per_clip, self.codec_memory(seconds))


def footprint(first: tuple[int, int], second: tuple[int, int], resident: int) -> Footprint:
    """Fit a line to two measurements (clips, peak bytes) and add `resident` bytes of weights."""
    (few, low), (many, high) = sorted((first, second))
    if few < 1 or few == many:
        raise ValueError(f"need two different batch sizes of at least 1, got {few} and {many}")
    per_clip = -(-max(high - low, 0) // (many - few))
    return Footprint(resident + max(low - few * per_clip, 0), per_clip)


def largest_batch(cost: Footprint, limit: int, most: int) -> int:
    """Find the largest batch (1 to `most` clips) below `limit` bytes less the headroom.

    ValueError with the bytes needed if not even one clip fits.
    """
    usable = int(limit * (1 - HEADROOM))
    if cost.fixed + cost.per_clip > usable:
        raise ValueError(
            f"one clip needs {(cost.fixed + cost.per_clip) / 1e9:.3f} GB ({cost.fixed / 1e9:.3f} "
            f"for weights), more than {usable / 1e9:.3f} GB; raise the limit, take shorter clips, "
            "a smaller dtype or a device map"
        )
    return max(1, min(most, (usable - cost.fixed) // max(cost.per_clip, 1)))


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
    alive = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        alive += change
        peak = max(peak, alive)
    return peak


def seconds(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Measure the median time of `run`, after a warm-up round where `rounds` > 1.

    With one thread on a CPU: the thread's own time, independent of other load; else wall time.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    times = []
    for number in range(rounds + (rounds > 1)):
        start = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number or rounds == 1:
            times.append(clock() - start)
    return statistics.median(times)


def measure(
    model: MusicModel,
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
    device = torch.device(model.device)
    noise = 0.1 * np.random.default_rng(0).standard_normal(
        (batch_clips, round(clip_seconds * model.sample_rate))
    ).astype(np.float32)
    silent, deepest = [None] * batch_clips, model.hook_points[-1].name
    batch = model.encode(noise, silent)
    one = model.with_captions(batch.codes[:1].cpu(), [None])
    codec = seconds(lambda: model.encode(noise, silent), device, rounds) / batch_clips
    say(f"codec: {codec:.2f} s a clip of {clip_seconds:g} s")
    passed = seconds(lambda: model.capture(batch, [deepest]), device, rounds) / batch_clips
    say(f"a pass to the deepest layer: {passed:.2f} s a clip")
    weight_bytes = getattr(model, "weight_bytes", 0)
    peaks: dict[str, int] = {}

    def encode(clips: int) -> None:
        model.encode(noise[[0] * clips], [None] * clips)

    def decoder(clips: int) -> None:
        codes = one.codes.cpu().expand(clips, -1, -1)
        model.capture(model.with_captions(codes, [None] * clips), [deepest])

    stages = (("extract", "a pass", decoder, weight_bytes), ("codec", "the codec", encode, 0))
    for key, name, run, resident in stages if memory else ():
        low, high = (peak_bytes(lambda n=n, run=run: run(n), device) for n in (1, 3))
        cost = footprint((1, low), (3, high), resident)
        say(f"peak of {name}: {cost.fixed:,} bytes and {cost.per_clip:,} a clip")
        peaks |= {f"{key}_fixed_bytes": cost.fixed, f"{key}_clip_bytes": cost.per_clip}
    ablate = None
    if ablations:
        from musicscope.ablation import language

        means = language.sums(model, one).means

        def score() -> None:
            nonlocal ablate
            run = lambda: language.ablate(model, one, tuple(ablations), means)  # noqa: E731
            ablate = seconds(run, device, 1)

        if memory:  # in the same run, the longest of all: counting takes microseconds per operation
            peaks |= {"ablate_fixed_bytes": weight_bytes}
            peaks |= {"ablate_clip_bytes": peak_bytes(score, device)}
        else:
            score()
        say(f"ablating every layer: {ablate:.1f} s a clip")
    threads = f"cpu, {torch.get_num_threads()} threads"
    return Rate(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else threads,
        dtype=str(dtype).removeprefix("torch."),
        clip_seconds=clip_seconds,
        batch_clips=batch_clips,
        codec_seconds=codec,
        pass_seconds=passed,
        ablate_seconds=ablate,
        ablate_kinds=len(ablations),
        decoder_parameters=sum(p.numel() for p in _language_model(model).parameters()),
        weight_bytes=weight_bytes,
        **peaks,
    )


def _language_model(model: MusicModel) -> torch.nn.Module:
    """The decoder, without codec and text encoder."""
    hf = getattr(model, "hf", None)
    if hf is None:  # audiocraft's
        return model.lm
    return getattr(hf, "decoder", hf)
