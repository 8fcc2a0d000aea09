"""A small CNN that names the instrument families in a clip, trained on rendered audio only.

The second judge of generated music beside musicnn: its labels are exact, but it has only heard
soundfonts, so it is trained on two sample families and on codec reconstructions of them, and made
blind to level, spectral tilt and gaps. It never hears generated audio in training, and it must
never choose features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from musicscope.core.io import atomic_dir, read_json, write_json
from musicscope.core.seeding import seed_for
from musicscope.core.stats import auroc, auroc_of, bootstrap_groups
from musicscope.judges.musicnn import (
    SAMPLE_RATE,
    check_audio,
    heard,
    level,
    mel_power,
    repeat_to,
    spread,
)


@dataclass(frozen=True)
class JudgeConfig:
    """Shape of the network and of its training; stored beside the weights."""

    n_fft: int = 1024
    hop: int = 320
    """20 ms: 50 frames a second."""
    n_mels: int = 64
    crop_frames: int = 250
    """Frames the network hears at a time (5 s)."""
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
    """Widest masked stripe, in mels and frames; two of each a crop (SpecAugment, 1904.08779)."""


# --- what the network hears -------------------------------------------------------------------


def judge_features(audio: np.ndarray, config: JudgeConfig) -> np.ndarray:
    """Log-mel of 16 kHz clips at one level (``musicnn.level``): float16 [n, frames, n_mels].

    The logarithm's floor is about 55 dB under flat noise of that level, and each clip gets mean 0
    after it, over its frames within 40 dB of the loudest: neither gain nor silence around the
    music changes what the network sees of it.
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
        """Log-mel [n, 1, n_mels, frames] -> logits [n, families], float32."""
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
        """Probability of each family in clips [n, samples] of 16 kHz mono: float32 [n, families].

        The mean over as many 5-s windows as cover the clip, quiet windows (40 dB under the clip)
        left out; shorter clips are repeated. A silent clip (below -60 dBFS) gets NaN: count it
        with ``musicnn.silent``. Gain changes nothing.

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
            loud = heard(clips, [start * config.hop for start in starts], crop * config.hop)
            features = torch.from_numpy(judge_features(clips, config)).transpose(1, 2)[:, None]
            answers = []
            for start in starts:
                answers.append(net(features[..., start : start + crop].float()).sigmoid().numpy())
            total = loud.sum(axis=1, keepdims=True)
            means = np.einsum("wnf,nw->nf", np.stack(answers), loud) / np.maximum(total, 1)
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
    """Read what ``FamilyJudge.save`` wrote; a file that is missing or does not fit is named."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}/config.json: no judge there; run the stage train_judge")
    values = read_json(folder / "config.json")
    families = tuple(values.pop("families"))
    config = JudgeConfig(**{**values, "channels": tuple(values["channels"])})
    net = FamilyNet(config, len(families))
    try:
        net.load_state_dict(load_file(folder / "model.safetensors"))
    except RuntimeError as error:
        raise ValueError(
            f"{folder}/model.safetensors does not fit config.json ({error}); rerun train_judge"
        ) from error
    return FamilyJudge(net.eval(), families, config)


# --- how far to trust it ----------------------------------------------------------------------


def family_report(
    probabilities: np.ndarray,
    labels: np.ndarray,
    families: Sequence[str],
    groups: Sequence[str],
    bootstrap: int,
    seed: int,
) -> dict[str, object]:
    """AUROC of each family with a 95 % bootstrap interval over `groups` (compositions).

    `probabilities` and `labels` are [n, families], `groups` [n]. Rows of silent clips (NaN) are
    left out and counted under ``silent``; a family whose clips are all with or all without it gets
    None. ``mean_auroc`` is over the families that could be scored.
    """
    probabilities, labels = np.asarray(probabilities), np.asarray(labels).astype(bool)
    kept = ~np.isnan(probabilities).any(axis=1)
    groups = np.asarray(groups)[kept]
    report: dict[str, object] = {"clips": int(kept.sum()), "silent": int((~kept).sum())}
    scores = []
    for family, score, truth in zip(families, probabilities.T, labels.T, strict=True):
        score, truth = score[kept], truth[kept]
        entry: dict[str, object] = {"positives": int(truth.sum())}
        if 0 < truth.sum() < len(truth):
            low, high = bootstrap_groups(
                auroc_of(score, truth), groups, bootstrap, seed_for(seed, "family_report", family)
            )
            entry |= {"auroc": auroc(score, truth), "ci_low": low, "ci_high": high}
            scores.append(entry["auroc"])
        else:
            entry |= {"auroc": None, "ci_low": None, "ci_high": None}
        report[family] = entry
    report["mean_auroc"] = float(np.mean(scores)) if scores else None
    return report
