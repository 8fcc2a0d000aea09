"""An audio model whose latents are known: each is the level of one tone, and tones can be planted.

Frames of 64 samples are their coefficients on four cosines of a DCT, and back. So an SAE with one
latent a tone is known exactly, and what an edit must do to the sound can be computed by hand.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musicscope.activations import extraction
from musicscope.core.io import atomic_dir
from musicscope.data.clips import ClipStore, at_rate, write_clips
from musicscope.data.taxonomy import FAMILIES
from musicscope.dictionaries import stability
from musicscope.dictionaries.core import TopKSAE
from musicscope.models.registry import load_model
from musicscope.steering.conditions import Context
from musicscope.steering.edit import Gate
from musicscope.steering.recipes import SCORES, Recipe
from musicscope.steering.subjects import Clips
from tests.support import rave_export

SR, RATIO, STORED = 6400, 64, 8000
BINS = (8, 14, 20, 26)  # even, so that a tone goes on from frame to frame
HERTZ = tuple(k * SR / (2 * RATIO) for k in BINS)  # 400, 700, 1000, 1300
TONES = {"guitar": 0, "drums": 1, "bass": 2}
"""Family -> the tone that is there in clips with it; the last tone is in all clips."""
NOISE = 0.02
SECONDS = 0.5


class ToneRave(nn.Module):
    """The export: z [B, 4, T] are coefficients, with a noise draw as RAVE's."""

    def __init__(self, noise: float = NOISE) -> None:
        super().__init__()
        self.sr, self.noise, self.ratio = SR, noise, RATIO
        at = torch.arange(RATIO, dtype=torch.float64) + 0.5
        basis = torch.stack([torch.cos(torch.pi * k * at / RATIO) for k in BINS])
        self.register_buffer("basis", (basis * (2 / RATIO) ** 0.5).float()[:, None])
        self.register_buffer("encode_params", torch.tensor([1, 1, len(BINS), RATIO]))

    @torch.jit.export
    def encode(self, x: Tensor) -> Tensor:
        z = F.conv1d(x, self.basis, stride=self.ratio)
        return z + self.noise * torch.randn_like(z)

    @torch.jit.export
    def decode(self, z: Tensor) -> Tensor:
        return F.conv_transpose1d(z, self.basis, stride=self.ratio)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


def tone_sae() -> TopKSAE:
    """Latent i is coefficient i, exactly; the last four stand for nothing and never fire."""
    W = torch.zeros(8, len(BINS))
    W[: len(BINS)] = torch.eye(len(BINS))
    b_enc = torch.zeros(8)
    b_enc[len(BINS) :] = -1.0
    return TopKSAE(W, b_enc, W, torch.zeros(len(BINS)), len(BINS))


def tones(levels: np.ndarray, rate: int, seconds: float) -> np.ndarray:
    """Audio [n, samples] whose coefficients are positive: cosines in step with the frames."""
    t = np.arange(round(seconds * rate)) / rate + 0.5 / SR
    cosines = np.cos(2 * np.pi * np.array(HERTZ)[:, None] * t)
    return (levels @ cosines).astype(np.float32)


def level_of(audio: np.ndarray, rate: int) -> np.ndarray:
    """Amplitude of every tone in audio [n, samples]: [n, 4], by projection on both phases."""
    t = np.arange(audio.shape[1]) / rate
    waves = np.exp(-2j * np.pi * np.array(HERTZ)[:, None] * t)
    return 2 * np.abs(audio @ waves.T) / audio.shape[1]


class ToneJudges:
    """A family is there as far as its tone is; musicnn knows one."""

    families = FAMILIES
    reliability = {"musicnn": {"guitar": 0.9}, "other_font_judge": dict.fromkeys(FAMILIES, 0.9)}

    def predict_all(self, audio):
        found = self.predict(audio)
        return found | {"other_font_judge": found["family_judge"]}

    def predict(self, audio):
        levels = level_of(audio, 16_000)
        found = np.full((len(audio), len(FAMILIES)), 0.1)
        for family, tone in TONES.items():
            found[:, FAMILIES.index(family)] = 1 / (1 + np.exp(-30 * (levels[:, tone] - 0.15)))
        found[~audio.any(1)] = np.nan
        tags = np.full_like(found, np.nan)
        guitar = FAMILIES.index("guitar")
        tags[:, guitar] = found[:, guitar]
        return {"family_judge": found, "musicnn": tags}

    def embed(self, audio):
        return np.where(audio.any(1, keepdims=True), level_of(audio, 16_000), np.nan)


def labelled_rows(counts: dict[str, int], seed: int = 0) -> list[dict]:
    """Rows of a clip store, two clips a group; guitar in every second group, the others by chance,
    and no label for piano anywhere."""
    rng, rows = np.random.default_rng(seed), []
    for split, count in counts.items():
        for i in range(count):
            has = {f"has_{f}": False for f in FAMILIES}
            has["has_guitar"] = (i // 2) % 2 == 0
            has["has_drums"] = bool((i // 4) % 2)
            has["has_bass"] = bool(rng.random() < 0.5)
            has["has_piano"] = None
            rows.append(
                {"id": f"{split}-{i}", "group": f"{split}-{i // 2}", "split": split,
                 "kind": "clip", "font": "recording", "caption": "x", **has}
            )  # fmt: skip
    return rows


def write_world(root: Path, rows: list[dict], noise: float = NOISE) -> None:
    """data/ of a project with the model "tone": its clips, activations and SAE, a judge folder."""
    (root / "data/models/tone").mkdir(parents=True)
    rave_export.save(ToneRave(noise), root / "data/models/tone/tone.ts")
    rng, made = np.random.default_rng(1), []
    for row in rows:
        levels = np.array([0.0, 0.0, 0.0, 0.2])
        for family, tone in TONES.items():
            levels[tone] = (0.3 if row[f"has_{family}"] else 0.01) * rng.uniform(0.8, 1.2)
        made.append((tones(levels[None], STORED, SECONDS)[0], row))
    with atomic_dir(root / "data/clips") as folder:
        write_clips(folder, made, STORED, round(SECONDS * STORED))
    clips, model = ClipStore.open(root / "data/clips"), load_model(root / "data/models/tone")
    view = at_rate(clips, SR)
    plans = extraction.plan(
        model, view, {"top1": "latent"}, dtype="float16", shard_mb=1.0, batch_clips=4,
        model_sha256="m", clips_sha256="c",
    )  # fmt: skip
    folder = root / "data/activations/tone/top1"
    extraction.extract(plans, lambda: (model, view), {"top1": folder})
    tone_sae().save(root / "data/sae/tone/top1/seed-0", {"layer": "latent"})
    latents = np.arange(tone_sae().n_latents)
    every = pd.DataFrame({"feature": latents, "seed_cosine": 1.0, "returns": True})
    stability.write(root / "data/sae/tone/top1", every)
    (root / "data/judge").mkdir()
    (root / "data/judge/none").write_text("the tests' judges are in tone_rave.py")


def known_recipe(concept: str) -> Recipe:
    """A recipe that names the concept's own latent, by every score."""
    tone = TONES[concept]
    score, direction = torch.full((8,), -1.0), torch.zeros(len(BINS))
    score[tone] = direction[tone] = 1.0
    statistics = {name: score.clone() for name in SCORES}
    means = torch.tensor([1.0] * 4 + [0.0] * 4)
    statistics |= {f"{kind}_{side}": means.clone() for kind in ("mean", "active")
                   for side in ("with", "without")}  # fmt: skip
    gate = Gate((tone,), (1.0,), -0.5, 0.05)
    directions = {"difference": direction, "probe": 2 * direction}
    return Recipe(
        "tone", "top1", "latent", "s", concept, "active", "never", statistics, directions, gate
    )


def open_tone_context(root: str, batch: int = 3) -> Context:
    """The context of a world, as a process of its own opens it."""
    recipes = {concept: known_recipe(concept) for concept in TONES}
    subject = Clips(5, 0.4, batch, ClipStore.open(Path(root) / "data/clips"))
    model = load_model(Path(root) / "data/models/tone")
    return Context(model, tone_sae(), recipes, ToneJudges(), subject, 5)
