"""Quality of a codec on signals of known distance."""

from __future__ import annotations

import numpy as np
import pytest

from musicscope.embedded.pretraining.codec_quality import code_use, log_mel_distance, si_sdr


def test_si_sdr_ignores_scale_and_measures_noise():
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((2, 1, 100_000))
    assert si_sdr(x, 0.3 * x)[0] > 100
    assert si_sdr(x, x + 0.1 * noise)[0] == pytest.approx(20, abs=0.2)


def test_log_mel_distance_of_a_gain_is_the_gain():
    x = np.random.default_rng(0).standard_normal((1, 16_000)).astype(np.float32) * 0.1
    assert log_mel_distance(x, x, 16_000)[0] == 0
    assert log_mel_distance(x, 0.5 * x, 16_000)[0] == pytest.approx(6.02, abs=0.01)


def test_code_use():
    use = code_use(np.array([[[0, 0, 1, 1]]]), 8)[0]
    assert use["used"] == 0.25
    assert use["perplexity"] == pytest.approx(2.0)
