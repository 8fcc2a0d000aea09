"""What a clip costs a model, measured on noise: time does not depend on what is heard."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from musicscope.commands.plan.memory import Footprint, footprint, peak_bytes


@dataclass(frozen=True)
class Rate:
    """Seconds and bytes a clip, on one device by one process."""

    device: str
    """Such as "cpu, 1 threads" or the name of a GPU."""
    dtype: str
    """Of the decoder."""
    clip_seconds: float
    batch_clips: int
    codec_seconds: float
    """Audio to codes, a clip."""
    pass_seconds: float
    """Codes to the activations of the deepest layer, a clip."""
    ablate_seconds: float | None = None
    """All `ablate_kinds` of all layers from codes, a clip; None where not measured."""
    ablate_kinds: int = 0
    decoder_parameters: int = 0
    weight_bytes: int = 0
    extract_fixed_bytes: int | None = None
    """Peak of a pass: so many bytes, weights among them, and so many for each clip."""
    extract_clip_bytes: int | None = None
    codec_fixed_bytes: int | None = None
    """Peak of the codec, which runs before a pass, above the weights."""
    codec_clip_bytes: int | None = None
    ablate_fixed_bytes: int | None = None
    ablate_clip_bytes: int | None = None

    @property
    def extract_seconds(self) -> float:
        """Audio to activations, a clip."""
        return self.codec_seconds + self.pass_seconds


def device_name(device: torch.device) -> str:
    """What a time was taken on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def seconds(run: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Median time of `run`, after one round that does not count where there are several.

    Of one thread on a CPU it is that thread's own time, whatever else the machine is doing; else
    wall time.
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
    model: Any,
    clip_seconds: float = 10.0,
    batch_clips: int = 2,
    rounds: int = 3,
    ablations: Sequence[str] = (),
    memory: bool = True,
    dtype: torch.dtype = torch.float32,
    say: Callable[[str], None] = lambda text: None,
) -> Rate:
    """Rates of a MusicModel with a codec, unconditional as in extraction; `dtype` as loaded.

    `ablations` are kinds to ablate every layer with (ablation.ablate), on one clip: many passes.
    `memory` finds the peak from batches of one and three clips, which takes some passes more.
    `say` is told what was found as soon as it is.
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

    def peaks(run: Callable[[int], Any], resident: int) -> Footprint:
        found = [(clips, peak_bytes(lambda clips=clips: run(clips), device)) for clips in (1, 3)]
        return footprint(*found, resident)

    def decoder(clips: int) -> None:
        codes = one.codes.cpu().expand(clips, -1, -1)
        model.capture(model.with_captions(codes, [None] * clips), [deepest])

    extract = heard = None
    if memory:
        extract = peaks(decoder, weight_bytes)
        say(f"peak of a pass: {extract.fixed:,} bytes and {extract.per_clip:,} a clip")
        heard = peaks(lambda clips: model.encode(noise[[0] * clips], [None] * clips), 0)
        say(f"peak of the codec: {heard.fixed:,} bytes and {heard.per_clip:,} a clip")
    ablate, ablated = None, None
    if ablations:
        from musicscope.ablation import language

        means = language.sums(model, one).means

        def score() -> None:
            nonlocal ablate
            run = lambda: language.ablate(model, one, tuple(ablations), means)  # noqa: E731
            ablate = seconds(run, device, 1)

        if memory:  # in the same run, the longest of all: counting takes microseconds an operation
            ablated = peak_bytes(score, device)
        else:
            score()
        say(f"ablating every layer: {ablate:.1f} s a clip")
    return Rate(
        device=device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        clip_seconds=clip_seconds,
        batch_clips=batch_clips,
        codec_seconds=codec,
        pass_seconds=passed,
        ablate_seconds=ablate,
        ablate_kinds=len(ablations),
        decoder_parameters=sum(p.numel() for p in _language_model(model).parameters()),
        weight_bytes=weight_bytes,
        extract_fixed_bytes=extract.fixed if extract else None,
        extract_clip_bytes=extract.per_clip if extract else None,
        codec_fixed_bytes=heard.fixed if heard else None,
        codec_clip_bytes=heard.per_clip if heard else None,
        ablate_fixed_bytes=weight_bytes if ablated is not None else None,
        ablate_clip_bytes=ablated,
    )


def _language_model(model: Any) -> torch.nn.Module:
    """The part that is studied, without codec and text encoder."""
    hf = getattr(model, "hf", None)
    if hf is None:  # audiocraft's
        return model.lm
    return getattr(hf, "decoder", hf)
