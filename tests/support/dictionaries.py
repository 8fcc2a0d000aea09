"""Sections of params.yaml, planted activations and small workspaces for tests of dictionaries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml

from musicscope.activations.store import ActivationStore, StoreWriter
from musicscope.config.dictionaries import TrainSae, TrainUsae
from musicscope.data.clips import ClipStore, write_clips
from musicscope.models.registry import load_model

ROOT = Path(__file__).resolve().parents[2]
FONTS = ("mixed", "fluidr3mono")
WIDTH, FEATURES = 24, 40
PAIRED_WIDTHS, PAIRED_FRAMES, SHARED_FACTORS, OWN_FACTORS = (24, 16, 32), 120, 12, 6
TRAINING = {
    "k": 3, "expansion": 3, "batch_size": 128, "samples": 40 * 128, "learning_rate": 5e-3,
    "warmup_fraction": 0.05, "decay_fraction": 0.2, "aux_k_fraction": 0.5, "aux_weight": 1 / 32,
    "dead_after_samples": 200_000, "seeds": 1,
}  # fmt: skip
OPTIONS = {
    "activation": "topk", "ce_clips": 1, "matryoshka": (), "resample_every": 0, "bandwidth": 0.5,
    "sparsity_weight": 0.01,
}  # fmt: skip
SHARED = {"slot": "top1", "null_seeds": 1, "fire_threshold": 0.1, "bootstrap": 20, "rule": "paper"}


def sae_section(**changes) -> TrainSae:
    """A small section train_sae: 72 latents over WIDTH."""
    return TrainSae(**{**TRAINING, **OPTIONS, **changes})


def usae_section(**changes) -> TrainUsae:
    """A small section train_usae, also for crosscoders."""
    return TrainUsae(**{**TRAINING, **SHARED, **changes})


def sae_weights(sae) -> list[torch.Tensor]:
    return [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]


def planted_frames(n: int, seed: int, active: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Frames [n, d] made of `active` of the rows of a dictionary [FEATURES, d], far from 0."""
    dictionary = np.random.default_rng(99).standard_normal((FEATURES, WIDTH))
    dictionary /= np.linalg.norm(dictionary, axis=1, keepdims=True)
    rng = np.random.default_rng(seed)
    chosen = rng.random((n, FEATURES)).argsort(1)[:, :active]
    codes = np.zeros((n, FEATURES))
    np.put_along_axis(codes, chosen, rng.uniform(1, 2, chosen.shape), 1)
    return 3 * codes @ dictionary + np.linspace(-20, 20, WIDTH), dictionary


def write_store(
    folder: Path, clips: list[np.ndarray], ids: list[str], shards: int = 1, **columns
) -> ActivationStore:
    """A store of clips [frames, d]; `columns` of its table are by default those of train clips."""
    table = {"id": ids, "split": "train", "font": FONTS[0], "kind": "clip", **columns}
    table = pd.DataFrame({**table, "frames": [len(c) for c in clips]})
    ends = [len(clips) * i // shards for i in range(shards + 1)]
    spans = list(zip(ends, ends[1:], strict=False))
    writer = StoreWriter(
        folder, width=clips[0].shape[1], dtype="float16", clips=table, spans=spans,
        config={"layer": "layers.1", "captions": False},
    )  # fmt: skip
    for shard, (first, stop) in enumerate(spans):
        writer.write(shard, clips[first:stop])
    return writer.finish()


def write_planted(folder: Path) -> ActivationStore:
    """40 train and 10 test clips of 250 planted frames, two of each composition."""
    clips = [planted_frames(250, seed=i)[0].astype(np.float32) for i in range(50)]
    split = ["train"] * 40 + ["test"] * 10
    groups = [f"g{i // 2}" for i in range(50)]
    ids = [f"c{i}" for i in range(50)]
    return write_store(folder, clips, ids, shards=2, split=split, group=groups)


def paired_frames(n_clips: int, model: int, seed: int) -> list[np.ndarray]:
    """Clips [PAIRED_FRAMES, d] of one model, of 2 factors that all models share and 1 of its own.

    The factors' strengths come from (seed, clip), each model's directions from (99, model).
    """
    d, every = PAIRED_WIDTHS[model], SHARED_FACTORS + OWN_FACTORS
    directions = np.random.default_rng([99, model]).standard_normal((every, d))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    clips = []
    for clip in range(n_clips):
        codes = np.zeros((PAIRED_FRAMES, every))
        for rng, low, high, active in (
            (np.random.default_rng([seed, clip]), 0, SHARED_FACTORS, 2),
            (np.random.default_rng([seed, clip, model]), SHARED_FACTORS, every, 1),
        ):
            chosen = low + rng.random((PAIRED_FRAMES, high - low)).argsort(1)[:, :active]
            np.put_along_axis(codes, chosen, rng.uniform(1, 2, chosen.shape), 1)
        clips.append((5 * codes @ directions + np.linspace(-9, 9, d)).astype(np.float32))
    return clips


def write_paired(root: Path) -> tuple[ActivationStore, ...]:
    """Three models of different widths over 48 clips, 40 of them train; the last in other order."""
    n, found = 48, []
    columns = {
        "id": [f"c{i}" for i in range(n)],
        "split": ["train"] * 40 + ["test"] * 8,
        "group": [f"g{i // 2}" for i in range(n)],
    }
    for model in range(3):
        order = list(range(n)) if model < 2 else list(range(n))[::-1]
        clips = paired_frames(n, model, seed=0)
        table = {key: [column[i] for i in order] for key, column in columns.items()}
        ids = table.pop("id")
        found.append(write_store(root / f"m{model}", [clips[i] for i in order], ids, **table))
    return tuple(found)


def write_embedded(folder: Path) -> None:
    """Noise as in the embedded set: two soundfonts, no unknown label."""
    rng = np.random.default_rng(0)
    places = [("train", FONTS[0])] * 10 + [("test", FONTS[0])] * 4 + [("test", FONTS[1])] * 2
    rows = [
        {"id": f"c{i}", "group": f"g{i // 2}", "split": split, "font": font, "kind": "clip",
         "caption": "flute"}
        for i, (split, font) in enumerate(places)
    ]  # fmt: skip
    folder.mkdir(parents=True)
    write_clips(folder, ((0.3 * rng.standard_normal(3200), r) for r in rows), 3200, 3200)


def make_workspace(root: Path, tiny_musicgen: Path, write: Callable[[Path], None]) -> Path:
    """A checkout with clips, a tiny model, its activations and a small params.yaml."""
    (root / "data/models").mkdir(parents=True)
    (root / "data/models/tiny").symlink_to(tiny_musicgen)
    write(root / "data/clips")
    clips, model = ClipStore.open(root / "data/clips"), load_model(tiny_musicgen)
    with torch.no_grad():
        batch = model.encode(clips.audio(range(len(clips))), [None] * len(clips))
        activations = model.capture(batch, ["layers.1"])["layers.1"].numpy()
    writer = StoreWriter(
        root / "data/activations/tiny/top1", width=48, dtype="float16", spans=[(0, len(clips))],
        clips=clips.rows.assign(frames=activations.shape[1]),
        config={"layer": "layers.1", "captions": False},
    )  # fmt: skip
    writer.write(0, list(activations))
    writer.finish()
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["models"] = ["tiny"]
    params["compute"] |= {"device": "cpu", "threads": 1, "processes": 1}
    params["train_sae"] |= {
        "k": 4, "expansion": 2, "batch_size": 64, "samples": 64 * 60, "seeds": 2, "ce_clips": 4
    }  # fmt: skip
    params["probe"] |= {
        "k_sparse": [1, 4], "c_grid": [0.01], "min_positive": 3, "null_seeds": 1, "bootstrap": 40
    }  # fmt: skip
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    return root
