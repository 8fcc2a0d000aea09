"""Randomised timbre: level and length are kept, settings are plain, each effect does its work."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from musicscope.data.taxonomy import FAMILIES
from musicscope.embedded.rendering.timbre import (
    Timbre,
    apply_timbre,
    draw_timbre,
)

RATE = 32_000


def rms(audio: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(audio, dtype=float))))


def tones(seconds: float = 2.0) -> np.ndarray:
    """Decaying notes of a saw with 30 harmonics, two per second."""
    time = np.arange(int(seconds * RATE)) / RATE
    wave = sum(np.sin(2 * np.pi * 220 * k * time) / k for k in range(1, 31))
    return (0.1 * wave * np.exp(-6 * (time % 0.5))).astype(np.float32)


def db(ratio: float) -> float:
    return 20 * np.log10(ratio)


def band(audio: np.ndarray, low: float, high: float, rate: int = RATE) -> float:
    spectrum = np.abs(np.fft.rfft(audio))
    frequency = np.fft.rfftfreq(len(audio), 1 / rate)
    return float(np.sqrt((spectrum[(frequency >= low) & (frequency < high)] ** 2).sum()))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.sampled_from(FAMILIES), st.integers(1, 20_000))
def test_timbre_keeps_length_and_level_for_any_drawn_settings(seed, family, samples):
    rng = np.random.default_rng(seed)
    timbre = draw_timbre(rng, family)
    stem = (0.1 * rng.standard_normal(samples)).astype(np.float32)
    out = apply_timbre(stem, timbre, RATE)
    assert out.shape == stem.shape
    assert out.dtype == np.float32
    assert np.isfinite(out).all()
    if samples > 2000:  # of fewer samples, removing the offset may leave nothing
        assert abs(db(rms(out) / rms(stem))) < 0.01


def test_settings_without_effects_change_nothing():
    stem = tones()
    stem -= stem.mean()
    np.testing.assert_allclose(apply_timbre(stem, Timbre(), RATE), stem, atol=1e-4)


def test_same_settings_give_the_same_samples_and_the_draw_follows_the_seed():
    stem = tones()
    drawn = [draw_timbre(np.random.default_rng(s), "guitar") for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    np.testing.assert_array_equal(*(apply_timbre(stem, t, RATE) for t in drawn[:2]))


def test_settings_are_plain_numbers():
    for seed in range(20):
        for value in astuple(draw_timbre(np.random.default_rng(seed), "flute")):
            assert type(value) in (int, float, tuple)


def test_drums_and_bass_are_not_doubled_or_softened():
    for seed in range(200):
        drums = draw_timbre(np.random.default_rng(seed), "drums")
        assert drums.chorus == 0.0
        assert drums.tremolo_db == 0.0
        assert drums.punch > -0.2
        for shape, hertz, _, gain in draw_timbre(np.random.default_rng(seed), "bass").eq:
            assert abs(gain) < (3.7 if hertz < 400 else 7.3), shape


def test_most_stems_change_but_none_loses_its_spectrum():
    stem = tones()
    changes = []
    for seed in range(40):
        out = apply_timbre(stem, draw_timbre(np.random.default_rng(seed), "piano"), RATE)
        bands = [(150, 600), (600, 2000), (2000, 6000)]
        changes.append([db(band(out, *b) / band(stem, *b)) for b in bands])
    changes = np.array(changes)
    assert (np.abs(changes).max(1) > 1.0).mean() > 0.5
    assert np.abs(changes).max() < 16.0


def test_equaliser_moves_the_band_that_it_names():
    stem = tones()
    out = apply_timbre(stem, Timbre(eq=(("highshelf", 2000.0, 0.7, 6.0),)), RATE)
    tilt = db(band(out, 4000, 6600) / band(out, 200, 700))
    assert 5.0 < tilt - db(band(stem, 4000, 6600) / band(stem, 200, 700)) < 7.0


def test_formant_shift_moves_the_envelope_and_keeps_the_pitch():
    time = np.arange(2 * RATE) / RATE
    k = np.arange(1, 60)
    peak = np.exp(-(((k * 110 - 1500) / 400) ** 2)) + 0.01
    stem = (0.1 * peak @ np.sin(2 * np.pi * 110 * k[:, None] * time)).astype(np.float32)
    out = apply_timbre(stem, Timbre(formant=1.14), RATE)
    spectra = [np.abs(np.fft.rfft(x))[220 * k] for x in (stem, out)]  # 0.5 Hz per bin
    centre = [float((s**2 @ (k * 110)) / (s**2).sum()) for s in spectra]
    assert 1.05 < centre[1] / centre[0] < 1.2
    assert (spectra[1] ** 2).sum() > 0.95 * (np.abs(np.fft.rfft(out)) ** 2).sum()


def test_compressor_lowers_the_crest_and_punch_raises_it():
    stem = tones()
    crest = [
        np.abs(apply_timbre(stem, t, RATE)).max()
        for t in (
            Timbre(ratio=6.0, threshold_db=-24.0, reaction=1e-3), Timbre(), Timbre(punch=0.6)
        )
    ]  # fmt: skip
    assert crest[0] < 0.95 * crest[1]
    assert crest[2] > 1.1 * crest[1]


def test_room_and_echo_come_after_the_sound():
    click = np.zeros(RATE, np.float32)
    click[1000] = 1.0
    echo = apply_timbre(click, Timbre(slap=0.3, slap_ms=100.0), RATE)
    assert abs(int(np.argmax(np.abs(echo[2000:]))) + 2000 - 1000 - 3200) < 16
    room = apply_timbre(click, Timbre(room=0.3, room_seconds=0.4), RATE)
    assert rms(room[:990]) < 1e-4
    assert rms(room[2000:6000]) > 3 * rms(room[10_000:14_000]) > 0.0


def test_drive_adds_harmonics_to_a_sine():
    sine = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE).astype(np.float32)
    out = apply_timbre(sine, Timbre(drive=0.9, bias=0.3), RATE)
    assert -60 < db(band(out, 870, 890) / band(out, 430, 450)) < -15
    assert -60 < db(band(out, 1310, 1330) / band(out, 430, 450)) < -15


@pytest.mark.parametrize("samples", [0, 100])
def test_silence_stays_silent(samples: int):
    zeros = np.zeros(samples, np.float32)
    timbre = draw_timbre(np.random.default_rng(0), "guitar")
    assert not apply_timbre(zeros, timbre, RATE).any()
