"""Squared maximum mean discrepancy (MMD; Gretton et al. 2012) of sets of clips, without bias.

The kernel is Gaussian, as in the Kernel Audio Distance (Chung et al. 2025, 2502.15602). Only pairs
of clips from different groups (compositions, prompts) count. So equal distributions have distance
0 on average, whatever the number of clips.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist

SIGNAL_SHARE = 1e-3
"""Dimensions that vary less than this share of the median dimension are not scaled up further."""


@dataclass(frozen=True)
class Embedded:
    """Embeddings of clips and the composition of each clip. Silent clips are left out."""

    values: np.ndarray
    """[clips, dimensions] float64."""
    groups: np.ndarray
    """[clips] names of compositions."""
    silent: int
    """Clips that were left out, because their embedding is NaN."""

    @classmethod
    def of(cls, values: np.ndarray, groups: np.ndarray) -> Embedded:
        """Leave out clips whose embedding is NaN.

        Raises:
            ValueError: shapes that do not fit, or fewer than two compositions.
        """
        values, groups = np.asarray(values, np.float64), np.asarray(groups)
        if values.ndim != 2 or groups.shape != values.shape[:1]:
            raise ValueError(f"embeddings {values.shape} and groups {groups.shape} do not fit")
        sounds = np.isfinite(values).all(1)
        if len(np.unique(groups[sounds])) < 2:
            raise ValueError(f"need clips of 2 compositions that sound, got {sounds.sum()} clips")
        return cls(values[sounds], groups[sounds], int((~sounds).sum()))


# --- kernel -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class GaussianKernel:
    """k(x, y) = exp(-|x - y|^2 / (2 bandwidth^2)) of embeddings divided by `scale`."""

    scale: np.ndarray
    """[dimensions]."""
    bandwidth: float

    @classmethod
    def fit(cls, reference: Embedded) -> GaussianKernel:
        """Scale each dimension to unit variance; bandwidth = median distance of two compositions.

        Fit it once, on real clips: values under two kernels do not compare.

        Raises:
            ValueError: most dimensions are constant over clips.
        """
        deviation = reference.values.std(0)
        if not np.median(deviation) > 0:
            raise ValueError(f"{len(reference.values)} reference clips have the same embedding")
        scale = np.maximum(deviation, SIGNAL_SHARE * np.median(deviation))
        distance = cdist(reference.values / scale, reference.values / scale)
        different = reference.groups[:, None] != reference.groups
        return cls(scale, float(np.median(distance[different])))

    def __call__(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Kernel [n, m] of embeddings [n, d] and [m, d]."""
        squared = cdist(a / self.scale, b / self.scale, "sqeuclidean")
        return np.exp(-squared / (2 * self.bandwidth**2))


MeanKernel = Callable[[np.ndarray], np.ndarray]
"""Weights of compositions [resamples, G] -> mean kernel of two clips [resamples]."""


def mean_kernel(kernel: GaussianKernel, a: Embedded, b: Embedded, names: np.ndarray) -> MeanKernel:
    """Mean kernel of a clip of `a` and a clip of `b` from two different compositions.

    `names` [G] are all compositions. Without pairs of one composition no clip meets itself, and a
    composition that is drawn twice does not either.
    """
    first, second = ((x.groups[:, None] == names).astype(float) for x in (a, b))
    apart = 1.0 - np.eye(len(names))
    sums = first.T @ kernel(a.values, b.values) @ second * apart
    counts = np.outer(first.sum(0), second.sum(0)) * apart

    def mean(weights: np.ndarray) -> np.ndarray:
        total, pairs = (((weights @ m) * weights).sum(1) for m in (sums, counts))
        with np.errstate(invalid="ignore", divide="ignore"):
            return total / pairs

    return mean


def paired_mmd(
    kernel: GaussianKernel, a: np.ndarray, b: np.ndarray, groups: np.ndarray
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Compare two sets [n, d] whose rows i belong together, such as a piece before and after.

    Returns a function of weights [resamples, n] that gives the unbiased MMD^2 and the similarity
    2 k_ab / (k_aa + k_bb) of mean kernels, each [resamples]. The similarity is 1 on average for
    equal distributions, and 0 if no clip of one is near a clip of the other. Rows of one group
    [n] are never compared, so that what two clips of one prompt share does not count.

    Both are NaN where all weight is on one group.
    """
    apart = (groups[:, None] != groups).astype(float)
    products = [kernel(x, y) * apart for x, y in ((a, a), (b, b), (a, b))]

    def values(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        total, *sums = (((weights @ m) * weights).sum(1) for m in (apart, *products))
        with np.errstate(invalid="ignore", divide="ignore"):
            aa, bb, ab = (s / total for s in sums)
            return aa + bb - 2 * ab, 2 * ab / (aa + bb)

    return values
