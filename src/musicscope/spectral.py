"""How far two waveforms are apart: stands for cross-entropy in models that predict no codes."""

from __future__ import annotations

import numpy as np

from musicscope.audio import power_spectrogram

SCALES = (2048, 512, 128)
FLOOR = 1e-2  # of magnitudes: 94 dB below a full-scale sine at n_fft 2048


def spectra(audio: np.ndarray) -> list[np.ndarray]:
    """STFT magnitudes of a waveform [n] at every scale (hop n_fft / 4), floored at FLOOR."""
    return [
        np.maximum(np.sqrt(power_spectrogram(audio, n_fft, n_fft // 4)[0]), FLOOR)
        for n_fft in SCALES
    ]


def spectral_distance(reference: list[np.ndarray], other: list[np.ndarray]) -> float:
    """Multi-resolution STFT distance between `spectra` of two waveforms; 0 for equal ones.

    Mean over SCALES of the spectral convergence ||A - B||_F / ||A||_F plus the mean |ln A - ln B|
    (Yamamoto et al. 2020, Parallel WaveGAN; RAVE itself is trained with the like).
    """
    terms = [
        np.linalg.norm(a - b) / np.linalg.norm(a) + np.abs(np.log(a / b)).mean()
        for a, b in zip(reference, other, strict=True)
    ]
    return float(np.mean(terms))
