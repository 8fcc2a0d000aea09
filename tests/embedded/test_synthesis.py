"""Synthesised instruments: pitch, dynamics, decay, determinism, and any note without failure."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import sosfreqz

from musicscope.data.taxonomy import BASS_NAMES, FAMILIES, PITCHED_FAMILIES, PROGRAM_NAMES
from musicscope.embedded.rendering.synthesis import INSTRUMENTS, play
from musicscope.embedded.rendering.tones import biquad, hertz, modal, scan, tables

RATE = 32_000
PROGRAMS = {**{f: tuple(p) for f, p in PROGRAM_NAMES.items()}, "bass": tuple(BASS_NAMES)}
EVERY = [(f, p) for f in (*PITCHED_FAMILIES, "bass") for p in PROGRAMS[f]]
DECAYING = [("guitar", p) for p in (24, 25, 26, 27, 28)]
DECAYING += [(f, p) for f in ("piano", "electric_piano", "mallets", "plucked") for p in PROGRAMS[f]]


@dataclass(frozen=True)
class Notes:
    start: np.ndarray
    end: np.ndarray
    pitch: np.ndarray
    velocity: np.ndarray


def notes(*rows: tuple[float, float, int, int]) -> Notes:
    """Rows (start, end, pitch, velocity)."""
    start, end, pitch, velocity = np.array(rows, float).reshape(-1, 4).T
    return Notes(start, end, pitch.astype(int), velocity.astype(int))


def render(family: str, program: int, part: Notes, seed: int = 0, seconds: float = 1.5):
    return play(family, program, part, np.random.default_rng(seed), seconds, RATE)


def rms(audio: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(audio, dtype=float))))


def cents_off(audio: np.ndarray, f0: float) -> float:
    """Deviation of the sound from `f0`: mean over power near the first two harmonics."""
    power = np.abs(np.fft.rfft(audio * np.hanning(len(audio)), 1 << 18)) ** 2
    frequency = np.arange(len(power)) * RATE / (1 << 18)
    total, weight = 0.0, 0.0
    for number in (1, 2):
        ratio = 1200 * np.log2(np.maximum(frequency, 1.0) / (number * f0))
        near = np.abs(ratio) < 70
        total += float((power[near] * ratio[near]).sum())
        weight += float(power[near].sum())
    return total / weight


def test_instruments_cover_the_families_of_the_orchestration():
    assert set(INSTRUMENTS) == set(FAMILIES)


@pytest.mark.parametrize(("family", "program"), EVERY)
def test_pitch_is_that_of_the_note(family: str, program: int):
    pitches = (36, 43, 52) if family == "bass" else (55, 64, 76)
    for seed, pitch in enumerate(pitches):
        # Attacks bend and click, so that the pitch is measured after them.
        audio = render(family, program, notes((0.0, 1.3, pitch, 90)), seed)[RATE // 8 : RATE]
        assert abs(cents_off(audio, hertz(pitch))) < 15.0, (pitch, seed)


@pytest.mark.parametrize(("family", "program"), DECAYING)
def test_plucked_and_struck_notes_decay_while_they_are_held(family: str, program: int):
    audio = render(family, program, notes((0.0, 4.0, 62, 100)), seconds=3.0)
    thirds = [rms(part) for part in np.split(audio, 3)]
    assert thirds[0] > 1.3 * thirds[1] > 1.3 * 1.1 * thirds[2]


@pytest.mark.parametrize("family", ["organ", "strings", "choir", "reed", "flute", "synth"])
def test_sustained_notes_do_not_decay(family: str):
    audio = render(family, PROGRAMS[family][0], notes((0.0, 4.0, 62, 100)), seconds=3.0)
    assert rms(audio[2 * RATE :]) > 0.4 * rms(audio[RATE // 2 : RATE])


@pytest.mark.parametrize("family", FAMILIES)
def test_louder_velocities_have_more_power(family: str):
    pitch = 38 if family == "drums" else 60
    for program in PROGRAMS.get(family, (0,)):
        levels = [
            rms(render(family, program, notes((0.0, 1.0, pitch, v)))) for v in (1, 30, 60, 90, 127)
        ]
        assert np.all(np.diff(levels) > 0.0), (program, levels)


def brightness(audio: np.ndarray) -> float:
    """Spectral centroid of the first 0.2 s, in bins."""
    power = np.abs(np.fft.rfft(audio[: RATE // 5])) ** 2
    return float((power * np.arange(len(power))).sum() / power.sum())


@pytest.mark.parametrize(
    ("family", "program"), [("piano", 0), ("guitar", 25), ("brass", 56), ("electric_piano", 5)]
)
def test_louder_notes_are_brighter(family: str, program: int):
    soft, loud = (
        np.mean(
            [brightness(render(family, program, notes((0.0, 1.0, 55, v)), s)) for s in range(4)]
        )
        for v in (25, 120)
    )
    assert loud > 1.15 * soft


@pytest.mark.parametrize("family", FAMILIES)
def test_same_seed_gives_the_same_samples_and_another_seed_another_instrument(family: str):
    part = notes((0.0, 0.4, 40, 90), (0.3, 0.8, 47, 60), (0.3, 0.9, 52, 60))
    program = PROGRAMS.get(family, (0,))[0]
    first, again, other = (render(family, program, part, seed, 1.0) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert rms(first - other) > 0.05 * rms(first)


@pytest.mark.parametrize(("family", "program"), [*EVERY, ("drums", 0)])
def test_notes_end_without_a_click_and_before_the_longest_release(family: str, program: int):
    audio = render(family, program, notes((0.0, 0.3, 57, 100)), seconds=3.0)
    assert rms(audio[-RATE // 4 :]) < 1e-3 * np.abs(audio).max() or family == "drums"
    # A click is a jump between samples that the note itself does not make.
    jumps = np.abs(np.diff(audio))
    assert jumps[int(0.3 * RATE) :].max() <= 1.5 * jumps[: int(0.3 * RATE)].max()


@pytest.mark.parametrize("family", ["organ", "piano", "strings"])
def test_a_note_that_began_before_the_clip_sounds_from_the_first_sample(family: str):
    audio = render(family, PROGRAMS[family][0], notes((-1.0, 1.0, 60, 90)), seconds=1.0)
    assert rms(audio[: RATE // 50]) > 0.2 * rms(audio)


def test_the_open_hat_is_choked_by_the_closed_one():
    alone = render("drums", 0, notes((0.0, 0.1, 46, 100)), seconds=0.6)
    choked = render("drums", 0, notes((0.0, 0.1, 46, 100), (0.15, 0.2, 44, 1)), seconds=0.6)
    window = slice(int(0.3 * RATE), int(0.5 * RATE))
    assert rms(choked[window]) < 0.3 * rms(alone[window])


def test_no_more_than_numpy_and_scipy_is_imported():
    code = (
        "import sys\nfrom musicscope.embedded.rendering import synthesis, timbre\n"
        "print({'symusic', 'torch', 'pandas', 'tinysoundfont'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_unknown_names_are_refused():
    part = notes((0.0, 1.0, 60, 90))
    with pytest.raises(ValueError, match="unknown family"):
        render("kazoo", 0, part)
    with pytest.raises(ValueError, match="no program"):
        render("mallets", 99, part)


def test_a_part_without_sounding_notes_is_silent():
    for part in (notes(), notes((5.0, 6.0, 60, 90))):
        audio = render("piano", 0, part, seconds=1.0)
        assert audio.shape == (RATE,)
        assert not audio.any()


row = st.tuples(
    st.floats(-1.0, 1.2), st.floats(0.0, 30.0), st.integers(0, 127), st.integers(1, 127)
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    st.sampled_from([*EVERY, ("drums", 0)]),
    st.lists(row, min_size=1, max_size=6),
    st.integers(0, 9),
)
def test_any_notes_give_a_finite_bounded_stem(which, rows, seed):
    part = notes(*sorted((start, start + held, p, v) for start, held, p, v in rows))
    audio = render(*which, part, seed, seconds=1.0)
    assert audio.dtype == np.float32
    assert audio.shape == (RATE,)
    assert np.isfinite(audio).all()
    peak = np.abs(audio).max()
    assert peak == 0.0 or 0.99e-3 <= peak <= 4.001


def test_modal_equals_the_sum_of_damped_sines():
    frequency, decay = np.array([220.0, 1234.5, 9000.0]), np.array([1.0, 30.0, 4000.0])
    amplitude = np.array([1.0, -0.5, 0.3])
    time = np.arange(5001) / RATE
    wanted = amplitude @ (
        np.exp(-decay[:, None] * time) * np.sin(2 * np.pi * frequency[:, None] * time)
    )
    np.testing.assert_allclose(modal(frequency, decay, amplitude, 5001, RATE), wanted, atol=3e-4)


def test_tables_have_unit_power_and_no_offset():
    table = tables(np.array([[1.0, 0.5, 0.2], [0.0, 0.0, 3.0]]))
    np.testing.assert_allclose((table**2).mean(1), 1.0, rtol=1e-4)
    np.testing.assert_allclose(table.mean(1), 0.0, atol=1e-5)
    turned = (np.arange(64, dtype=np.uint64) * 2**26).astype(np.uint32)
    between = scan(table, [turned], np.full(64, 0.5, np.float32))
    np.testing.assert_allclose(
        between, (scan(table, [turned], 0) + scan(table, [turned], 1.0)) / 2, atol=1e-5
    )


@pytest.mark.parametrize(
    ("shape", "low", "high"),
    [
        ("lowpass", 0, -40),
        ("highpass", -40, 0),
        ("peak", 0, 0),
        ("lowshelf", 6, 0),
        ("highshelf", 0, 6),
    ],
)
def test_biquads_have_the_gains_of_their_shape(shape: str, low: float, high: float):
    section = biquad(shape, 1000.0, RATE, gain_db=6.0)[None].astype(float)
    _, response = sosfreqz(section, [50.0, 1000.0, 14_000.0], fs=RATE)
    gains = 20 * np.log10(np.abs(response))
    middle = {"lowpass": -3, "highpass": -3, "peak": 6, "lowshelf": 3, "highshelf": 3}[shape]
    np.testing.assert_allclose(gains[1], middle, atol=0.3)
    for got, wanted in ((gains[0], low), (gains[2], high)):
        assert got < wanted if wanted == -40 else abs(got - wanted) < 0.3
