"""Measures of audio on planted signals: clicks, tones, loops, noise, and their controls."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from musicscope.embedded.pretraining import music_statistics as music

RATE = music.SAMPLE_RATE
SECONDS = 10


def clicks(bpm: float, seconds: int = SECONDS) -> np.ndarray:
    """A burst of decaying noise on every beat."""
    out = np.zeros(seconds * RATE, np.float32)
    burst = np.random.default_rng(1).standard_normal(800) * np.exp(-np.arange(800) / 150)
    for time in np.arange(0.1, seconds - 0.1, 60 / bpm):
        start = int(time * RATE)
        out[start : start + 800] += 0.3 * burst
    return out


def noise(clips: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal((clips, SECONDS * RATE))).astype(np.float32)


def tone(*hertz: float) -> np.ndarray:
    time = np.arange(SECONDS * RATE) / RATE
    return sum(0.2 * np.sin(2 * np.pi * f * time) for f in hertz).astype(np.float32)


@pytest.mark.parametrize("bpm", [60, 77, 113, 150, 181, 220])
def test_clicks_have_their_tempo_and_rate(bpm):
    onsets = music.onset_strength(music.spectra(clicks(bpm)[None]).mel)
    periodicity, period = music.beat(onsets)
    assert periodicity[0] > 0.98
    assert 60 / period[0] == pytest.approx(bpm, rel=0.02)
    assert len(music.onset_times(onsets)[0]) == pytest.approx(bpm / 60 * SECONDS, abs=1)


def test_noise_has_no_beat_no_onsets_no_tone_and_no_repetition():
    found = music.music_measures(noise(4))
    assert (np.abs(found["beat_periodicity"]) < 0.25).all()
    assert (found["onset_rate"] == 0).all()
    assert (found["tonal_clarity"] < 0.03).all()
    assert (found["repetition"] < 0.15).all()
    assert (found["dynamic_range"] < 1).all()


def test_steady_tones_have_no_beat_but_clear_pitch():
    found = music.music_measures(np.stack([tone(440), tone(261.63, 329.63, 392.0)]))
    assert found["beat_periodicity"].tolist() == [0, 0]
    assert found["tonal_clarity"][0] > 0.99
    assert found["tonal_clarity"][1] == pytest.approx(1 - np.log(3) / np.log(12), abs=0.02)


def test_a_loop_repeats_and_its_shuffled_grains_do_not():
    rng = np.random.default_rng(3)
    notes = [tone(f)[: RATE // 4] for f in 220 * 2 ** (rng.permutation(12)[:8] / 12)]
    loop = np.tile(np.concatenate(notes), 5)[None]
    assert music.music_measures(loop)["repetition"][0] > 0.95
    shuffled = music.shuffle_frames(loop, rng)
    assert music.music_measures(shuffled)["repetition"][0] < 0.4


def test_shuffling_keeps_spectrum_and_level_and_loses_the_beat():
    audio = np.stack([clicks(120), clicks(90)]) + 0.01 * noise(2)
    shuffled = music.shuffle_frames(audio, np.random.default_rng(0))
    assert shuffled.std() == pytest.approx(audio.std(), rel=0.25)
    before, after = (music.music_measures(a)["beat_periodicity"] for a in (audio, shuffled))
    assert (before > 0.9).all()
    assert (after < 0.6).all()


def test_silence_share_and_dynamic_range_of_known_levels():
    audio = noise(2)
    audio[0, : 3 * RATE] = 0
    audio[1, : 5 * RATE] *= 0.1
    found = music.music_measures(audio)
    assert found["silence_share"] == pytest.approx([0.3, 0.0], abs=0.01)
    assert found["dynamic_range"] == pytest.approx([60.0, 20.0], abs=1)


def test_a_silent_clip_has_numbers_but_no_embedding():
    audio = np.zeros((1, SECONDS * RATE), np.float32)
    for name, value in music.music_measures(audio).items():
        assert value[0] == (1.0 if name == "silence_share" else 0.0)
    assert np.isfinite(music.modulation_statistics(audio)).all()
    assert np.isnan(music.scattering_embedding(audio)).all()


@settings(max_examples=8, deadline=None)
@given(st.floats(-30, 10))
def test_gain_changes_no_measure(decibels):
    audio = np.stack([clicks(100) + 0.5 * tone(330), tone(200, 500) * 0.5 + 0.2 * clicks(140)])
    louder = (audio * 10 ** (decibels / 20)).astype(np.float32)
    for name, value in music.music_measures(audio).items():
        assert music.music_measures(louder)[name] == pytest.approx(value, abs=1e-3), name
    for features in (music.modulation_statistics, music.scattering_embedding):
        np.testing.assert_allclose(features(louder), features(audio), atol=5e-3)


@pytest.mark.parametrize("rate", [2.0, 8.0])
def test_scattering_finds_the_rate_of_a_modulation(rate):
    time = np.arange(SECONDS * RATE) / RATE
    audio = noise(1) * (1 + 0.9 * np.sin(2 * np.pi * rate * time)).astype(np.float32)
    plain = music.scattering(music.spectra(noise(1)).mel)[1]
    gain = (music.scattering(music.spectra(audio).mel)[1] - plain)[0].mean(0)
    assert music.RATES[int(gain.argmax())] == rate


def test_lagged_correlation_equals_counting():
    x = np.random.default_rng(0).standard_normal((2, 3, 50))
    found = music.lagged_correlation(x, 4, 20)
    for lag in range(4, 21):
        a, b = x[..., :-lag], x[..., lag:]
        expected = (a * b).sum((1, 2)) / np.sqrt((a**2).sum((1, 2)) * (b**2).sum((1, 2)))
        np.testing.assert_allclose(found[:, lag - 4], expected, atol=1e-9)


def test_short_or_broken_audio_is_refused():
    with pytest.raises(ValueError, match="2 s"):
        music.spectra(np.ones((1, RATE), np.float32))
    with pytest.raises(ValueError, match="NaN"):
        music.music_measures(np.full((1, 3 * RATE), np.nan, np.float32))
