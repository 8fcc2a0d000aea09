"""A judge of another kind: is a clip's embedding nearer to clips with a family or without it?

It has no training beyond means: per family the centroids of musicnn's embeddings of train clips
with and without it. It never chooses anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from musicscope.core.io import atomic_file
from musicscope.models.checkpoint import read_safetensors


@dataclass(frozen=True)
class EmbeddingJudge:
    """The difference of squared distances to two centroids per family, as a logistic score."""

    weights: np.ndarray
    """float32 [F, d]; 0: no train clips with or without the family"""
    bias: np.ndarray
    """float32 [F]"""

    @classmethod
    def fit(cls, embeddings: np.ndarray, labels: np.ndarray) -> EmbeddingJudge:
        """Fit centroids of embeddings [n, d] by labels bool [n, F]; silent clips (NaN) stay out.

        Dimensions are scaled to unit variance, the difference of distances to unit deviation.

        Raises:
            ValueError: fewer than two clips sound.
        """
        sounds = np.isfinite(embeddings).all(1)
        if sounds.sum() < 2:
            raise ValueError(f"{sounds.sum()} of {len(embeddings)} clips sound: 2 are needed")
        values, labels = np.asarray(embeddings, np.float64)[sounds], labels[sounds]
        scale = values.std(0)
        live = scale > 1e-3 * np.median(scale)
        scaled = np.divide(values, scale, out=np.zeros_like(values), where=live)
        weights = np.zeros((labels.shape[1], values.shape[1]))
        bias = np.zeros(labels.shape[1])
        for family, has in enumerate(labels.T):
            if 0 < has.sum() < len(has):
                near, far = scaled[has].mean(0), scaled[~has].mean(0)
                spread = max(float((scaled @ (near - far)).std()), 1e-9)
                weights[family] = np.divide(
                    (near - far) / spread, scale, out=np.zeros_like(scale), where=live
                )
                bias[family] = (far @ far - near @ near) / 2 / spread
        return cls(weights.astype(np.float32), bias.astype(np.float32))

    def predict(self, embeddings: np.ndarray) -> np.ndarray:
        """Score embeddings [n, d] in 0..1, .5 halfway: float32 [n, F].

        NaN for silent clips, and for a family without centroids.
        """
        logits = embeddings @ self.weights.T + self.bias
        logits[:, ~self.weights.any(1)] = np.nan
        return (1 / (1 + np.exp(-logits))).astype(np.float32)

    def save(self, path: str | Path) -> None:
        """Write both arrays to a safetensors file."""
        arrays = {"weights": self.weights, "bias": self.bias}
        with atomic_file(Path(path)) as temporary:
            save_file({k: torch.from_numpy(v.copy()) for k, v in arrays.items()}, temporary)


def load_embedding_judge(path: str | Path, families: Sequence[str]) -> EmbeddingJudge:
    """Read what `EmbeddingJudge.save` wrote.

    FileNotFoundError or ValueError names the file and the stage to run.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run dvc repro train_judge")
    held = read_safetensors(path)
    if set(held) != {"weights", "bias"} or held["weights"].shape[:1] != (len(families),):
        raise ValueError(f"{path} is no judge of {len(families)} families: rerun train_judge")
    return EmbeddingJudge(held["weights"].numpy(), held["bias"].numpy())
