"""Quality of a codec: spectral distance, signal-to-distortion ratio and use of its codebooks."""

from __future__ import annotations

import numpy as np

from musicscope.core.audio import mel_filterbank, power_spectrogram


def log_mel_distance(x: np.ndarray, y: np.ndarray, rate: int, floor_db: float = 60.0) -> np.ndarray:
    """RMS difference of 80-band log-mel power in dB, per clip [n].

    Both are floored `floor_db` below the loudest band of the reference `x`, so that silence far
    below what is heard does not count.
    """
    basis = mel_filterbank(rate, 1024, 80)
    out = []
    for reference, other in zip(x, y, strict=True):
        a = (power_spectrogram(reference)[0].T @ basis).astype(np.float64)
        b = (power_spectrogram(other)[0].T @ basis).astype(np.float64)
        floor = a.max() * 10 ** (-floor_db / 10) + 1e-12
        difference = 10 * np.log10(np.maximum(a, floor) / np.maximum(b, floor))
        out.append(np.sqrt(np.mean(difference**2)))
    return np.array(out)


def si_sdr(reference: np.ndarray, estimate: np.ndarray) -> np.ndarray:
    """Scale-invariant signal-to-distortion ratio, dB per clip (Le Roux et al., 1811.02508)."""
    x, y = reference.astype(np.float64), estimate.astype(np.float64)
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    scale = (x * y).sum(-1, keepdims=True) / ((x * x).sum(-1, keepdims=True) + 1e-12)
    signal, noise = (scale * x) ** 2, (y - scale * x) ** 2
    return 10 * np.log10((signal.sum(-1) + 1e-12) / (noise.sum(-1) + 1e-12))


def code_use(codes: np.ndarray, card: int) -> list[dict[str, float]]:
    """Share of codes used and perplexity of each codebook; codes are [clips, K, T]."""
    out = []
    for k in range(codes.shape[1]):
        share = np.bincount(codes[:, k].ravel(), minlength=card) / codes[:, k].size
        seen = share[share > 0]
        out.append(
            {"used": len(seen) / card, "perplexity": float(np.exp(-(seen * np.log(seen)).sum()))}
        )
    return out
