"""Training of the family judge: streamed clips to log-mel in memory, random crops and tones."""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from musicscope.core.seeding import seed_for
from musicscope.judges.instrument_classifier import (
    FamilyJudge,
    FamilyNet,
    JudgeConfig,
    judge_features,
)
from musicscope.judges.musicnn import check_audio, level, repeat_to


def random_tone(n: int, config: JudgeConfig) -> torch.Tensor:
    """Random tone controls [n, 1, n_mels, 1] in decades: a straight tilt and two slow ripples.

    Stands for what differs between sample families and codecs but is not the instrument.
    """
    mels = torch.linspace(-1, 1, config.n_mels)
    phase = torch.rand(2, n, 1) * 2 * np.pi
    shape = (torch.rand(n, 1) * 2 - 1) * mels
    for cycles, shift in zip((0.75, 1.5), phase, strict=True):
        shape = shape + 0.35 * torch.rand(n, 1) * torch.sin(np.pi * cycles * mels + shift)
    return (config.tilt * shape)[:, None, :, None]


def augment(crops: torch.Tensor, config: JudgeConfig) -> torch.Tensor:
    """Random tone, then masked stripes of mels and of frames, on crops [n, 1, n_mels, frames]."""
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

    Only the float16 log-mel of the batches is kept (64 kB for 10 s). One thread hears 3,000 clips
    24 times in about four minutes. Randomness comes from (`seed`, epoch), and with `scratch` (see
    ``artifacts.partial_dir``) the state is kept after each epoch, so that a killed run goes on and
    ends in the same weights.

    Raises:
        ValueError: labels that do not fit, a silent clip, or a family without both positive and
            negative clips.
    """
    config = config or JudgeConfig()
    features, labels = _load(batches, families, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "family_judge", "init"))
        net = FamilyNet(config, len(families)).to(memory_format=torch.channels_last)
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
    net = net.to(memory_format=torch.contiguous_format)
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
        f for f, m in zip(families, truth.T, strict=True) if m.min(initial=1) == m.max(initial=0)
    ]
    if one_sided or not len(truth):
        raise ValueError(f"families {one_sided or list(families)} lack clips with or without them")
    return torch.from_numpy(np.concatenate(features)), torch.from_numpy(truth)


def _epoch(
    net: FamilyNet,
    optimizer: torch.optim.Optimizer,
    features: torch.Tensor,
    labels: torch.Tensor,
    config: JudgeConfig,
    step: int,
) -> float:
    """One pass in random order, one random crop a clip; mean loss in nats a label."""
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
        loss = F.binary_cross_entropy_with_logits(logits, labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return float(np.mean(losses))


def one_cycle(progress: float) -> float:
    """Share of the peak rate at `progress` in [0, 1): a rise over a tenth, then a cosine."""
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
    """Where the state is kept, named by all that decides the weights: other runs pass it by."""
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
    temporary = path.with_suffix(".tmp")
    state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "done": done}
    torch.save(state, temporary)
    os.replace(temporary, path)


def _restore(path: Path | None, net: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Read the training state, if there is one; the number of finished epochs."""
    if path is None or not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    return state["done"]
