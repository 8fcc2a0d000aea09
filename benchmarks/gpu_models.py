"""Parts b and c of benchmarks.gpu_check: the codec's codes on both devices; full-size MusicGen.

b. Codes of the same audio on CPU and device. The CPU takes one clip at a time in float32, as
   extraction does there; float64 on the CPU tells how much of a difference lies in near ties.
c. Random weights from the configuration, built on the device. Words are random token ids, so that
   cross-attention has something to read. Extraction runs in torch's default precisions: TF32 is
   on in cuDNN (codec) and off in products.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchEncoding, EncodecConfig, EncodecModel

from benchmarks.full_size import random_musicgen, tiny_config
from benchmarks.gpu_parts import Record, relative_error, wait
from musicscope.ablation import language
from musicscope.commands.plan.published_sizes import MUSICGEN, musicgen_config
from musicscope.commands.plan.rates import measure as measure_rate
from musicscope.commands.plan.rates import peak_bytes
from musicscope.commands.plan.rates import seconds as measure_seconds
from musicscope.core.io import read_json
from musicscope.core.precision import tf32
from musicscope.models.musicgen import model as musicgen  # noqa: F401 (slow to load: before the clock runs)

NANO = Path("data/models/nano-small")
NANO_CODEC = {
    "target_bandwidths": [4.0], "sampling_rate": 16_000, "audio_channels": 1, "normalize": False,
    "hidden_size": 64, "codebook_dim": 64, "codebook_size": 1024, "num_filters": 24,
    "num_residual_layers": 1, "upsampling_ratios": [4, 4, 4, 5], "num_lstm_layers": 1,
    "use_causal_conv": False, "pad_mode": "constant",
}  # fmt: skip
"""That of the nano models, for a machine that does not hold their weights."""
TF32 = {"off": (False, False), "torch default": (False, True), "on": (True, True)}
"""Setting -> allowed in (products, cuDNN)."""


# ---- part b


def music_like(clips: int, seconds: float, rate: int, seed: int) -> Tensor:
    """[clips, samples] float32 in -1..1: harmonic notes over noise; every 4th clip noise alone."""
    generator = np.random.default_rng(seed)
    count = round(seconds * rate)
    age = np.arange(min(count, rate))[:, None] / rate  # a note lasts a second at most
    out = 0.01 * generator.standard_normal((clips, count))
    for clip, signal in enumerate(out):
        if clip % 4 == 3:
            signal *= 20
            continue
        for start in np.sort(generator.uniform(0, seconds, max(1, round(6 * seconds)))):
            pitch = 55 * 2 ** generator.uniform(0, 4)
            partials = np.arange(1, max(2, min(12, int(0.45 * rate / pitch))))
            level = generator.uniform(0.05, 0.3) / partials ** generator.uniform(0.7, 2)
            phase = generator.uniform(0, 2 * np.pi, len(partials))
            note = np.sin(2 * np.pi * pitch * partials * age + phase) * level
            fade = np.exp(-age * generator.uniform(2, 8)) * np.clip(age * 200, 0, 1)
            here = signal[round(start * rate) :][: len(age)]
            here += (note * fade).sum(1)[: len(here)]
    return torch.from_numpy(out / np.abs(out).max(1, keepdims=True) * 0.9).float()


@torch.no_grad()
def fill_codebooks(codec: EncodecModel, signal: Tensor, seed: int) -> None:
    """Codebooks of a fresh codec, which are all zero: means of two of what is left to code each.

    `signal` [1, 1, n]. A codebook of drawn points alone would leave exact zeros for the next.
    """
    generator = torch.Generator().manual_seed(seed)
    left = codec.encoder(signal)
    for layer in codec.quantizer.layers:
        points, embed = left[0].T, layer.codebook.embed
        picks = torch.randint(len(points), (2, len(embed)), generator=generator).to(points.device)
        embed.copy_(points[picks].mean(0))
        left = left - layer.decode(layer.encode(left))


def random_codec(config: EncodecConfig, seed: int) -> EncodecModel:
    """An EnCodec with weights of a fixed seed and filled codebooks, on the CPU.

    Latents are centred on 0, as a trained codec's are: random biases would leave latents that
    differ by a tenth of their length, and codes that are near ties.
    """
    torch.manual_seed(seed)
    codec = EncodecModel(config).eval().requires_grad_(False)
    signal = music_like(1, 10.0, config.sampling_rate, seed + 1)[None]
    for name, weight in codec.encoder.named_parameters():
        if "bias" in name:
            weight.zero_()
    last = codec.encoder.layers[-1].conv
    last.bias.copy_(-codec.encoder(signal).mean((0, 2)))
    fill_codebooks(codec, signal, seed + 2)
    return codec


def stored_codec(folder: Path) -> EncodecModel:
    """The codec of a MusicGen folder."""
    from safetensors.torch import load_file

    prefix = "audio_encoder."
    codec = EncodecModel(EncodecConfig(**read_json(folder / "config.json")["audio_encoder"]))
    stored = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    codec.load_state_dict(
        {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    )
    return codec.eval().requires_grad_(False)


@torch.no_grad()
def encode(codec: EncodecModel, audio: Tensor, batch: int) -> Tensor:
    """Codes [B, K, T] on the CPU of audio [B, n], so many clips at a time."""
    like = next(codec.parameters())
    parts = audio.to(like)[:, None].split(batch)
    return torch.cat([codec.encode(part).audio_codes[0] for part in parts]).cpu()


@torch.no_grad()
def decode(codec: EncodecModel, codes: Tensor) -> Tensor:
    """Audio [B, n] on the CPU of codes [B, K, T], all together."""
    codes = codes.to(next(codec.parameters()).device)
    return codec.decode(codes[None], [None]).audio_values[:, 0].cpu()


def compare(codes: Tensor, reference: Tensor) -> dict[str, Any]:
    """How much of [B, K, T] is equal; `by_book`: one share for each codebook."""
    same = codes == reference
    return {
        "equal_codes": float(same.double().mean()),
        "equal_frames": float(same.all(1).double().mean()),
        "by_book": same.double().mean((0, 2)).tolist(),
    }


class CodecOnCpu:
    """A codec, audio, and what the CPU makes of it; made before the GPU is waited for."""

    def __init__(self, codec: EncodecModel, clips: int, seconds: float) -> None:
        self.codec = codec
        self.audio = music_like(clips, seconds, codec.config.sampling_rate, 11)
        self.codes = encode(codec, self.audio, 1)
        self.together = encode(codec, self.audio, clips)
        exact = codec.double()
        self.exact_codes = encode(exact, self.audio, 1)
        with torch.no_grad():
            self.exact_latents = exact.encoder(self.audio[:1, None].double())
        codec.float()
        self.heard = decode(codec, self.codes)

    def on(self, device: torch.device, batch: int) -> dict[str, Any]:
        """Equality of the device's codes with the CPU's, under whatever TF32 allows now."""
        moved = self.codec.to(device)
        found, again = (encode(moved, self.audio, batch) for _ in range(2))
        heard = decode(moved, self.codes)
        with torch.no_grad():
            latents = moved.encoder(self.audio[:1, None].to(device))
        return compare(found, self.codes) | {
            "against_float64": compare(found, self.exact_codes),
            "repeats": bool(torch.equal(found, again)),
            "latent_error": relative_error(latents.cpu(), self.exact_latents),
            "decode_error": relative_error(heard, self.heard),
        }


def codes(device: torch.device, tiny: bool) -> Callable[[Record], None]:
    """Share of equal codes on CPU and device."""
    clips, seconds = (4, 0.5) if tiny else (8, 5.0)
    if not tiny and (NANO / "config.json").is_file():
        first, codec = "nano-small", stored_codec(NANO)
    else:
        small = NANO_CODEC | ({"num_filters": 2, "codebook_size": 64} if tiny else {})
        first, codec = "nano random", random_codec(EncodecConfig(**small), 1)
    made = CodecOnCpu(codec, clips, seconds)

    def published() -> CodecOnCpu:
        """At 32 kHz; the CPU takes so long for it that it comes last."""
        config = musicgen_config("musicgen-small").audio_encoder
        return CodecOnCpu(random_codec(config, 2), clips, 1.0)

    def measure(record: Record) -> None:
        compare_devices(record, first, made, device, clips)
        name = "musicgen random"
        if not tiny and (codec := record.guard(f"codec/{name}/on CPU", published, 4.0)):
            compare_devices(record, name, codec, device, clips)

    return measure


def compare_devices(
    record: Record, name: str, codec: CodecOnCpu, device: torch.device, clips: int
) -> None:
    """Every setting of TF32 at batch 1 and `clips`; first, the CPU against itself."""
    cpu = {
        "codes": codec.codes.numel(),
        "codes_in_use": [int(book.unique().numel()) for book in codec.codes.transpose(0, 1)],
        "clips": clips,
        "against_float64": compare(codec.codes, codec.exact_codes),
    }
    record.add(f"codec/{name}/cpu batch {clips}", compare(codec.together, codec.codes) | cpu)
    for setting, allowed in TF32.items():
        for batch in (1, clips):

            def equal(batch: int = batch) -> dict[str, Any]:
                return codec.on(device, batch)

            with tf32(*allowed):
                record.attempt(f"codec/{name}/batch {batch}, TF32 {setting}", equal, 0.5)


# ---- part c


class RandomWords:
    """Stands for a tokenizer: so many random ids for every caption."""

    def __init__(self, vocabulary: int, words: int = 12) -> None:
        self.vocabulary, self.words = vocabulary, words

    def __call__(self, captions: list[str], **_: Any) -> BatchEncoding:
        generator = torch.Generator("cpu").manual_seed(0)
        shape = (len(captions), self.words)
        ids = torch.randint(2, self.vocabulary, shape, generator=generator, device="cpu")
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def build(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A MusicgenModel with random weights drawn on the device, codebooks filled."""
    config = tiny_config() if name == "tiny" else musicgen_config(name)
    with torch.device(device) if device.type == "cuda" else contextlib.nullcontext():
        model = random_musicgen(config, name, dtype, str(device))
    model.tokenizer = RandomWords(config.text_encoder.vocab_size)
    noise = torch.randn(1, 1, 20 * model.sample_rate, device=device) * 0.1
    fill_codebooks(model.hf.audio_encoder, noise, 3)
    return model


def extraction(model: Any, dtype: torch.dtype, clips: int, seconds: float) -> dict[str, Any]:
    """Clips per second from audio to the deepest layer, and the peak with weights."""
    device = torch.device(model.device)
    on_card = device.type == "cuda"  # the CPU's profiler would take minutes
    rate = measure_rate(model, seconds, clips, 3, memory=on_card, dtype=dtype)
    noise = 0.1 * np.random.default_rng(1).standard_normal(
        (clips, round(seconds * model.sample_rate))
    ).astype(np.float32)
    deepest = model.hook_points[-1].name

    def extract() -> None:
        found = model.capture(model.encode(noise, [None] * clips), [deepest])[deepest]
        if not torch.isfinite(found).all() or float(found.float().std()) == 0:
            raise AssertionError("activations are not finite or all the same")

    peak = peak_bytes(extract, device) + model.weight_bytes if on_card else None
    return {
        "clips_per_s": 1 / rate.extract_seconds,
        "codec_ms": 1e3 * rate.codec_seconds,
        "pass_ms": 1e3 * rate.pass_seconds,
        "batch_clips": clips,
        "peak_gb": None if peak is None else peak / 1e9,
        "rate": asdict(rate),  # as benchmarks/results/full_size.json holds it
    }


def ablation(model: Any, clips: int, seconds: float) -> dict[str, Any]:
    """Seconds and bytes per clip of ablating every layer by every kind, from codes."""
    device = torch.device(model.device)
    shape = (clips, model.num_codebooks, round(seconds * model.frame_rate))
    codes = torch.randint(model.card, shape, generator=torch.Generator().manual_seed(2))
    batch = model.with_captions(codes, [None] * clips)
    means = language.sums(model, model.with_captions(codes[:1], [None])).means
    scores: list[Any] = []

    def score() -> None:
        scores.append(language.ablate(model, batch, means=means))

    peak = peak_bytes(score, device) if device.type == "cuda" else None  # also warms up
    taken = measure_seconds(score, device, 1) / clips
    if not np.isfinite(scores[-1]["kl"]).all():
        raise AssertionError("scores are not finite")
    rate = {"ablate_seconds": taken, "ablate_kinds": len(language.KINDS)}
    if peak is not None:
        rate |= {"ablate_fixed_bytes": model.weight_bytes, "ablate_clip_bytes": peak // clips}
    return {"s_per_clip": taken, "layers": len(model.hook_points), "clips": clips, "rate": rate}


def generation(model: Any, prompts: int, frames: int) -> dict[str, Any]:
    """Guided sampling from captions to sound: milliseconds a step, without the decoding."""
    device, seconds = torch.device(model.device), frames / model.frame_rate
    captions = ["random words"] * prompts

    def timed(run: Callable[[], Any]) -> tuple[float, Any]:
        wait(device)
        start = time.perf_counter()
        made = run()
        wait(device)
        return time.perf_counter() - start, made

    timed(lambda: model.generate(captions, 4 / model.frame_rate, 0))
    whole, decoding = [], []
    for seed in range(3):
        taken, (audio, made) = timed(lambda seed=seed: model.generate(captions, seconds, seed))
        whole.append(taken)
        if not torch.isfinite(audio).all():
            raise AssertionError("the audio is not finite")
        decoding.append(timed(lambda made=made: model.decode(made))[0])
    steps = frames + model.num_codebooks - 1
    step = statistics.median(a - b for a, b in zip(whole, decoding, strict=True)) / steps
    return {
        "ms_per_step": 1e3 * step,
        "ms_per_step_all": [
            1e3 * (a - b) / steps for a, b in zip(whole, decoding, strict=True)
        ],
        "decode_ms": 1e3 * statistics.median(decoding),
        "real_time_factor": prompts * seconds / statistics.median(whole),
        "prompts": prompts,
        "rows": 2 * prompts,
        "frames": frames,
        "decoder_bytes": sum(p.nbytes for p in model.hf.decoder.parameters()),
    }  # fmt: skip


def full_size(device: torch.device, tiny: bool) -> Callable[[Record], None]:
    """Extraction, ablation and generation at published sizes."""
    small, medium = list(MUSICGEN)[:2]
    wanted = [
        (small, torch.float32, 6.0), (small, torch.bfloat16, 5.0),
        (medium, torch.bfloat16, 8.0), (medium, torch.float32, 12.0),
    ]  # fmt: skip
    if tiny:
        wanted = [("tiny", torch.float32, 0.0), ("tiny", torch.bfloat16, 0.0)]
    clips, seconds, frames = (2, 0.2, 4) if tiny else (16, 10.0, 60)

    def measure(record: Record) -> None:
        for name, dtype, needs in wanted:
            key = f"model/{name} {str(dtype).removeprefix('torch.')}"
            start = time.monotonic()
            model = record.guard(
                f"{key}/build", lambda name=name, dtype=dtype: build(name, dtype, device), needs
            )
            if model is None:
                continue
            wait(device)
            record.add(f"built/{key}", time.monotonic() - start)
            record.attempt(
                f"{key}/extraction",
                lambda model=model, dtype=dtype: extraction(model, dtype, clips, seconds), 1.5,
            )  # fmt: skip
            record.attempt(
                f"{key}/ablation",
                lambda model=model: ablation(model, 2 if tiny else 4, seconds), 3.0,
            )  # fmt: skip
            for prompts in (1, 2) if tiny else (1, 8):
                record.attempt(
                    f"{key}/generation, {prompts} prompts",
                    lambda model=model, prompts=prompts: generation(model, prompts, frames), 1.5,
                )  # fmt: skip
            del model
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()

    return measure
