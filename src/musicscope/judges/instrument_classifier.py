"""A small CNN that detects the instrument families in a clip, trained on rendered audio only.

Its labels are exact, but soundfonts are its only sounds: it is trained on two of them and on their
codec reconstructions, and made invariant to level, spectral tilt and gaps. It is never trained on
generated audio. Its train clips are those that recipes and SAEs are learnt on, and it chooses the
settings of steering; so `pair.HELD_OUT` has judges that choose nothing.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from musicscope.core.io import atomic_dir, atomic_file, write_json
from musicscope.core.seeding import seed_for
from musicscope.judges.musicnn import (
    SAMPLE_RATE,
    check_audio,
    level,
    loud_windows,
    mel_power,
    repeat_to,
    spread,
)
from musicscope.models import checkpoint


@dataclass(frozen=True)
class JudgeConfig:
    """Hyperparameters of the network and of its training; stored beside the weights."""

    n_fft: int = 1024
    hop: int = 320
    """20 ms: 50 frames per second."""
    n_mels: int = 64
    crop_frames: int = 250
    """Frames of the network's input (5 s)."""
    channels: tuple[int, ...] = (32, 64, 96, 128)
    dropout: float = 0.3
    epochs: int = 24
    batch: int = 32
    learning_rate: float = 3e-3
    """Peak of the one-cycle schedule."""
    weight_decay: float = 0.02
    tilt: float = 0.6
    """Largest gain of the random tone control, in decades of power at the ends of the band."""
    mel_mask: int = 10
    time_mask: int = 40
    """Widest masked stripe in mels and frames; two of each per crop (SpecAugment, 1904.08779)."""


# --- features ---------------------------------------------------------------------------------


def judge_features(audio: np.ndarray, config: JudgeConfig) -> np.ndarray:
    """Compute the log-mel of levelled 16 kHz clips: float16 [n, frames, n_mels].

    Clips come from ``musicnn.level``; the logarithm's floor is about 55 dB under flat noise. Each
    clip is then shifted to mean 0 over its frames within 40 dB of the loudest, which makes the
    features invariant to gain and to silence around the music.
    """
    features = []
    for clip in audio:  # one at a time: a spectrogram in single precision is larger than its audio
        power = mel_power(torch.from_numpy(clip)[None], config.n_fft, config.hop, config.n_mels)
        decades = torch.log10(power[0] + 1e-6)
        energy = power[0].sum(dim=1)
        mean = decades[energy >= 1e-4 * energy.max()].mean()
        features.append((decades - mean).to(torch.float16).numpy())
    return np.stack(features)


# --- the network ------------------------------------------------------------------------------


class FamilyNet(nn.Module):
    """Four strided convolutions, then mean and maximum over time of each (channel, mel band)."""

    def __init__(self, config: JudgeConfig, n_families: int):
        super().__init__()
        layers: list[nn.Module] = []
        before, bands = 1, config.n_mels
        for i, width in enumerate(config.channels):
            kernel = 5 if i == 0 else 3
            # Frequency halves each time; time keeps its rate once, so that onsets stay visible.
            stride = (2, 1) if i == 2 else (2, 2)
            layers += [
                nn.Conv2d(before, width, kernel, stride, kernel // 2, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            before, bands = width, -(-bands // 2)
        self.body = nn.Sequential(*layers)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(2 * before * bands, n_families)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map log-mel [n, 1, n_mels, frames] to logits [n, families], float32."""
        x = self.body(x).float().flatten(1, 2)
        with torch.autocast(x.device.type, enabled=False):
            return self.head(self.dropout(torch.cat([x.mean(2), x.amax(2)], dim=1)))


@dataclass(frozen=True)
class FamilyJudge:
    """A trained network and the names of its outputs."""

    net: FamilyNet
    families: tuple[str, ...]
    config: JudgeConfig
    sample_rate: int = SAMPLE_RATE

    @torch.inference_mode()
    def predict(self, audio: np.ndarray, batch: int = 32) -> np.ndarray:
        """Predict family probabilities of clips [n, samples] of 16 kHz mono: float32 [n, families].

        Averages over the 5-s windows that cover the clip, without quiet windows (40 dB under the
        clip); shorter clips are repeated. A silent clip (below -60 dBFS) gets NaN: count it with
        ``musicnn.silent``. Gain has no effect.

        Raises:
            ValueError: audio of another rank, empty, or with NaN or infinity.
        """
        config, net = self.config, self.net.eval()
        crop = config.crop_frames
        probabilities = []
        for first in range(0, len(audio), batch):
            clips = check_audio(audio[first : first + batch])
            clips, _ = level(repeat_to(clips, crop * config.hop))
            frames = 1 + clips.shape[1] // config.hop
            starts = spread(frames, crop, frames // crop)
            loud = loud_windows(clips, [start * config.hop for start in starts], crop * config.hop)
            features = torch.from_numpy(judge_features(clips, config)).transpose(1, 2)[:, None]
            windows = [net(features[..., s : s + crop].float()).sigmoid().numpy() for s in starts]
            total = loud.sum(axis=1, keepdims=True)
            means = np.einsum("wnf,nw->nf", np.stack(windows), loud) / np.maximum(total, 1)
            probabilities.append(np.where(total > 0, means, np.nan).astype(np.float32))
        return np.concatenate(probabilities)

    def save(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` and ``config.json`` to `folder`, all or nothing."""
        with atomic_dir(folder) as temporary:
            state = {key: value.contiguous() for key, value in self.net.state_dict().items()}
            save_file(state, temporary / "model.safetensors")
            config = {"families": self.families, **asdict(self.config)}
            write_json(temporary / "config.json", config)


def load_family_judge(folder: str | Path) -> FamilyJudge:
    """Load a judge from the folder of ``FamilyJudge.save``.

    FileNotFoundError or ValueError names a file that is missing or does not fit.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}/config.json: no judge there; run the stage train_judge")
    values = checkpoint.read_config(folder)
    try:
        families = tuple(values.pop("families"))
        values["channels"] = tuple(values["channels"])
        config = JudgeConfig(**values)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}/config.json is no judge's ({error}); run dvc repro -f train_judge"
        ) from error
    net, file = FamilyNet(config, len(families)), folder / "model.safetensors"
    checkpoint.fill(net, checkpoint.read_safetensors(file), file)
    return FamilyJudge(net.eval(), families, config)


# --- training ---------------------------------------------------------------------------------


def random_tone(n: int, config: JudgeConfig) -> torch.Tensor:
    """Draw spectral tilts with two slow ripples [n, 1, n_mels, 1], in decades.

    They model differences between soundfonts and codecs that are not the instrument.
    """
    mels = torch.linspace(-1, 1, config.n_mels)
    phase = torch.rand(2, n, 1) * 2 * np.pi
    shape = (torch.rand(n, 1) * 2 - 1) * mels
    for cycles, shift in zip((0.75, 1.5), phase, strict=True):
        shape = shape + 0.35 * torch.rand(n, 1) * torch.sin(np.pi * cycles * mels + shift)
    return (config.tilt * shape)[:, None, :, None]


def augment(crops: torch.Tensor, config: JudgeConfig) -> torch.Tensor:
    """Add random tones to crops [n, 1, n_mels, frames], then mask stripes of mels and frames."""
    n, _, mels, frames = crops.shape
    crops = crops + random_tone(n, config)
    for _ in range(2):
        for size, width, axis in ((mels, config.mel_mask, 2), (frames, config.time_mask, 3)):
            start = torch.rand(n, 1) * size
            place = torch.arange(size)[None]
            hidden = (place >= start) & (place < start + torch.rand(n, 1) * width)
            shape = [n, 1, 1, 1]
            shape[axis] = size
            crops = crops.masked_fill(hidden.view(shape), 0.0)
    return crops


def train_family_judge(
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    families: Sequence[str],
    seed: int,
    config: JudgeConfig | None = None,
    scratch: str | Path | None = None,
) -> FamilyJudge:
    """Train on (audio [n, samples] at 16 kHz, labels [n, families]) batches of equal-length clips.

    Keeps only the float16 log-mel of the batches (64 kB for 10 s). 24 epochs of 3,000 clips take
    one thread about four minutes. Randomness comes from (`seed`, epoch). With `scratch` (see
    ``io.scratch_dir``) the state is saved after each epoch, so that a killed run resumes and ends
    in the same weights. Labels may be NaN where they are unknown.

    Raises:
        ValueError: labels that do not fit, a silent clip, or a family without both positive and
            negative clips.
    """
    config = config or JudgeConfig()
    features, labels = _load(batches, families, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "family_judge", "init"))
        net = FamilyNet(config, len(families))
        net.to(memory_format=torch.channels_last)  # ty: ignore[no-matching-overload]  not in its types
        optimizer = torch.optim.AdamW(
            net.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        steps = -(-len(features) // config.batch)
        state_file = _state_file(scratch, features, labels, seed, config)
        for epoch in range(_restore(state_file, net, optimizer), config.epochs):
            torch.manual_seed(seed_for(seed, "family_judge", epoch))
            loss = _epoch(net, optimizer, features, labels, config, epoch * steps)
            if not np.isfinite(loss):
                raise ValueError(f"family judge: loss is {loss} in epoch {epoch}; lower the rate")
            print(
                f"family judge: epoch {epoch + 1}/{config.epochs} loss {loss:.4f}", file=sys.stderr
            )
            _keep(state_file, net, optimizer, epoch + 1)
    net.to(memory_format=torch.contiguous_format)  # ty: ignore[no-matching-overload]  as above
    return FamilyJudge(net.eval(), tuple(families), config)


def _load(
    batches: Iterable[tuple[np.ndarray, np.ndarray]], families: Sequence[str], config: JudgeConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [n, frames, n_mels] float16 and labels [n, families] float32 of all batches."""
    features, labels = [], []
    for number, (audio, truth) in enumerate(batches):
        truth = np.asarray(truth, dtype=np.float32)
        if truth.shape != (len(audio), len(families)):
            raise ValueError(
                f"batch {number}: labels {truth.shape}, expected {(len(audio), len(families))}"
            )
        audio = repeat_to(check_audio(audio), config.crop_frames * config.hop)
        audio, sounds = level(audio)
        if not sounds.all():
            silent = np.flatnonzero(~sounds).tolist()
            raise ValueError(f"batch {number}: clips {silent} are silent; leave them out, counted")
        features.append(judge_features(audio, config))
        labels.append(truth)
    truth = np.concatenate(labels) if labels else np.zeros((0, len(families)))
    one_sided = [
        f
        for f, m in zip(families, truth.T, strict=True)
        if np.nanmin(m, initial=1) == np.nanmax(m, initial=0)
    ]
    if one_sided or not len(truth):
        raise ValueError(f"families {one_sided or list(families)} lack clips with or without them")
    # By row in memory, whatever the batches are: the state file is named by a hash of the labels.
    truth = np.ascontiguousarray(truth)
    return torch.from_numpy(np.concatenate(features)), torch.from_numpy(truth)


def _epoch(
    net: FamilyNet,
    optimizer: torch.optim.Optimizer,
    features: torch.Tensor,
    labels: torch.Tensor,
    config: JudgeConfig,
    step: int,
) -> float:
    """Train one epoch on a random crop per clip; mean loss in nats per label."""
    net.train()
    order = torch.randperm(len(features))
    total = config.epochs * -(-len(features) // config.batch)
    losses = []
    for chosen in order.split(config.batch):
        starts = torch.randint(features.shape[1] - config.crop_frames + 1, (len(chosen),))
        crops = torch.stack(
            [
                features[clip, start : start + config.crop_frames]
                for clip, start in zip(chosen.tolist(), starts.tolist(), strict=True)
            ]
        )
        crops = augment(crops.float().transpose(1, 2)[:, None], config)
        crops = crops.contiguous(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * one_cycle((step + len(losses)) / total)
        # Half the time of float32 on a CPU with bfloat16 products; the weights stay float32.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = net(crops)
        truth = labels[chosen]
        if not (known := truth.isfinite()).all():
            logits, truth = logits[known], truth[known]
        loss = F.binary_cross_entropy_with_logits(logits, truth)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return float(np.mean(losses))


def one_cycle(progress: float) -> float:
    """Return learning rate / peak at `progress` in [0, 1): linear rise over 0.1, then cosine."""
    if progress < 0.1:
        return 0.1 + 9 * progress
    return 0.5 * (1 + math.cos(math.pi * (progress - 0.1) / 0.9))


def _state_file(
    scratch: str | Path | None,
    features: torch.Tensor,
    labels: torch.Tensor,
    seed: int,
    config: JudgeConfig,
) -> Path | None:
    """Path of the training state, named by a hash of everything that decides the weights."""
    if scratch is None:
        return None
    digest = hashlib.sha256(repr((seed, config)).encode())
    digest.update(features.numpy())
    digest.update(labels.numpy())
    return Path(scratch) / f"family_judge-{digest.hexdigest()[:16]}.pt"


def _keep(path: Path | None, net: nn.Module, optimizer: torch.optim.Optimizer, done: int) -> None:
    """Write the training state to `path`, atomically."""
    if path is None:
        return
    state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "done": done}
    with atomic_file(path) as temporary:
        torch.save(state, temporary)


def _restore(path: Path | None, net: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the training state if it exists; return the number of finished epochs."""
    if path is None or not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    return state["done"]
