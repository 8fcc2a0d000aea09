"""Trivial cues and mel filters."""

from __future__ import annotations

import numpy as np
import pytest

from musicscope.core import audio


def test_trivial_cues_of_a_sine():
    t = np.arange(16_000) / 16_000
    cues = dict(
        zip(audio.TRIVIAL_CUES, audio.trivial_cues(0.5 * np.sin(2 * np.pi * 1000 * t), 16_000)[0],
            strict=True)
    )  # fmt: skip
    assert cues["rms"] == pytest.approx(0.5 / np.sqrt(2), rel=1e-3)
    assert cues["centroid"] == pytest.approx(1000, rel=0.01)
    assert cues["zero_crossings"] == pytest.approx(2000 / 16_000, rel=0.01)
    assert cues["crest"] == pytest.approx(np.sqrt(2), rel=1e-2)
    assert cues["flatness"] < 1e-3


def test_mel_filters_have_unit_area():
    bank = audio.mel_filterbank(16_000, 2048, 40)
    np.testing.assert_allclose(bank.sum(0) * 16_000 / 2048, 1.0, atol=0.05)
