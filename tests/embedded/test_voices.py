"""The synthetic singers: the notes they sing, their joins, their silence, their files."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from musicscope.embedded.rendering import voices
from musicscope.embedded.rendering.voices import (
    BREATH,
    LEVEL,
    LONGEST_ONSET,
    RATE,
    RELEASE,
    VOICES,
    Bank,
    Melody,
    fold,
    load_bank,
    phrase,
    save_bank_arrays,
    sing,
    top_line,
)

BANK = load_bank()
NAMES = [singer.name for singer in BANK.singers]


@dataclass(frozen=True)
class Notes:
    start: np.ndarray
    end: np.ndarray
    pitch: np.ndarray
    velocity: np.ndarray


def notes(*rows: tuple[float, float, int], velocity: int = 100) -> Notes:
    """Notes of (start, end, pitch)."""
    start, end, pitch = np.array(rows).T
    return Notes(start, end, pitch, np.full(len(rows), velocity))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def hertz(pitch: float) -> float:
    return 440.0 * 2 ** ((pitch - 69) / 12)


def heard_pitch(audio: np.ndarray, near: float) -> float:
    """MIDI number of the strongest periodicity within a fifth of `near`, by autocorrelation."""
    spectrum = np.abs(np.fft.rfft(audio, 4 * len(audio))) ** 2
    correlation = np.fft.irfft(spectrum)
    lags = np.arange(int(RATE / hertz(near + 7)), int(RATE / hertz(near - 7)) + 2)
    k = lags[np.argmax(correlation[lags])]
    a, b, c = correlation[k - 1 : k + 2]
    lag = k + 0.5 * (a - c) / (a - 2 * b + c)
    return 69 + 12 * np.log2(RATE / lag / 440)


melodies = st.lists(
    st.tuples(st.integers(-100, 480), st.integers(1, 200), st.integers(0, 127)),
    min_size=1,
    max_size=30,
).map(lambda rows: notes(*sorted((s / 100, (s + d) / 100, p) for s, d, p in rows)))


@pytest.mark.parametrize("name", NAMES)
def test_pitch_follows_the_notes(name):
    who = BANK.singer(name)
    pitches = np.linspace(who.low + 1, who.high - 1, 12).round()
    line = notes(*((0.2 + 0.8 * i, 0.9 + 0.8 * i, p) for i, p in enumerate(pitches)))
    audio = sing(BANK, name, line, rng(), 10.0, RATE)
    off = []
    for start, pitch in zip(line.start, line.pitch, strict=True):
        middle = audio[int((start + 0.15) * RATE) : int((start + 0.5) * RATE)]
        off.append(abs(heard_pitch(middle, pitch) - pitch))
    assert np.median(off) < 0.15
    assert np.mean(np.array(off) < 0.3) >= 11 / 12


def test_same_seed_same_bits_and_another_seed_other_words():
    line = notes((0, 1, 60), (1, 2, 62), (2, 4, 64))
    audio = sing(BANK, "kal", line, rng(1), 5.0, RATE)
    assert np.array_equal(audio, sing(BANK, "kal", line, rng(1), 5.0, RATE))
    assert not np.array_equal(audio, sing(BANK, "kal", line, rng(2), 5.0, RATE))
    assert audio.dtype == np.float32
    assert np.isfinite(audio).all()


def only_vowels(name: str) -> Bank:
    """The bank with a singer's syllables of one bare vowel: whatever is abrupt is a click."""
    syllables = BANK.syllables[name]
    begin, vowel, coda, finish = syllables.marks.T
    marks = syllables.marks[(begin == vowel) & (finish - coda <= RELEASE)]
    assert len(marks)
    return replace(BANK, syllables={name: replace(syllables, marks=marks)})


@pytest.mark.parametrize("name", NAMES)
def test_notes_join_without_clicks(name):
    """Samples differ hardly more at joins than within notes; a cut would show."""
    pitches = [60, 64, 62, 67, 65] * 4
    line = notes(*((0.5 * i, 0.5 * i + 0.5, p) for i, p in enumerate(pitches)))
    audio = sing(only_vowels(name), name, line, rng(3), 10.0, RATE)

    def excess(audio: np.ndarray) -> float:
        step = np.abs(np.diff(audio))[: 19 * RATE // 2].reshape(19, -1)
        near = RATE * 6 // 100
        return max(step[1:, :near].max(), step[:, -near:].max()) / step[:, near:-near].max()

    assert excess(audio) < 1.25
    joins = audio[: 19 * RATE // 2].reshape(19, -1)[1:, : RATE * 6 // 100]
    loudest = np.unravel_index(np.abs(joins).argmax(), joins.shape)
    cut = (loudest[0] + 1) * RATE // 2 + loudest[1]
    assert excess(np.concatenate([audio[:cut], -audio[cut:]])) > 1.2 * excess(audio)
    assert np.abs(np.diff(audio)).max() < 6 * LEVEL


def test_held_notes_have_the_stated_level_and_no_offset():
    for name in NAMES:
        who = BANK.singer(name)
        middle = (who.low + who.high) // 2
        line = notes(*((2 * i, 2 * i + 1.9, middle) for i in range(5)))
        audio = sing(BANK, name, line, rng(5), 10.0, RATE)
        held = np.stack([audio[int((2 * i + 0.5) * RATE) : int((2 * i + 1.3) * RATE)]
                         for i in range(5)])  # fmt: skip
        assert 0.5 * LEVEL < np.sqrt(np.mean(held**2)) < 1.5 * LEVEL
        assert np.abs(held.mean(axis=1)).max() < 0.02 * LEVEL


def test_stem_begins_within_a_held_note_without_a_step():
    audio = sing(BANK, "slt", notes((-1.0, 2.0, 66)), rng(), 3.0, RATE)
    assert np.sqrt(np.mean(audio[: RATE // 10] ** 2)) > 0.3 * LEVEL
    assert np.abs(audio[int(2.2 * RATE) :]).max() < 1e-4


def test_silence_where_there_are_no_notes():
    line = notes((1.0, 2.0, 60), (4.0, 5.0, 62))
    audio = sing(BANK, "ked", line, rng(), 6.0, RATE)
    quiet = np.ones(len(audio), bool)
    for start, end in zip(line.start, line.end, strict=True):
        quiet[int((start - LONGEST_ONSET - 0.05) * RATE) : int((end + 0.1) * RATE)] = False
    assert quiet.sum() > 3 * RATE
    assert np.abs(audio[quiet]).max() < 1e-6
    assert np.abs(audio[int(1.1 * RATE) : int(1.9 * RATE)]).max() > 0.05
    empty = Notes(*np.zeros((4, 0)))
    assert np.array_equal(sing(BANK, "ked", empty, rng(), 1.0, RATE), np.zeros(RATE, np.float32))


@settings(max_examples=60, deadline=None)
@given(melodies, st.integers(36, 60), st.integers(12, 30))
def test_folding_stays_in_range_and_keeps_pitch_classes(line, low, width):
    melody = top_line(line, 5.0)
    if len(melody.start):
        folded = fold(melody, low, low + width)
        assert folded.pitch.min() >= low
        assert folded.pitch.max() <= low + width
        assert np.array_equal(folded.pitch % 12, melody.pitch % 12)


def test_a_melody_that_fits_moves_as_a_whole():
    melody = top_line(notes((0, 1, 72), (1, 2, 84), (2, 3, 79)), 5.0)
    assert fold(melody, 43, 67).pitch.tolist() == [48, 60, 55]


@settings(max_examples=60, deadline=None)
@given(melodies)
def test_one_voice_and_the_top_note_wins(line):
    melody = top_line(line, 5.0)
    assert (melody.start[1:] >= melody.end[:-1]).all()
    for start, end, pitch in zip(melody.start, melody.end, melody.pitch, strict=True):
        middle = (start + end) / 2
        assert pitch == line.pitch[(line.start <= middle) & (line.end > middle)].max()


def test_monophony_of_a_chord():
    chord = notes((0, 2, 52), (0, 2, 56), (0, 2, 59))
    alone = sing(BANK, "rms", notes((0, 2, 59)), rng(), 3.0, RATE)
    assert np.array_equal(sing(BANK, "rms", chord, rng(), 3.0, RATE), alone)


@settings(max_examples=30, deadline=None)
@given(melodies, st.integers(0, 99))
def test_phrasing_neither_overlaps_nor_lengthens_beyond_the_next_note(line, seed):
    melody = top_line(line, 5.0)
    if len(melody.start):
        phrased = phrase(melody, rng(seed))
        assert (phrased.melody.end > phrased.melody.start).all()
        assert (phrased.melody.start[1:] >= phrased.melody.end[:-1]).all()
        assert not (phrased.slurred & ~phrased.joined).any()


def test_long_lines_are_broken_by_breaths():
    count = 40
    starts = 0.25 * np.arange(count)
    flat = Melody(starts, starts + 0.25, np.full(count, 60.0), np.full(count, 90.0))
    phrased = phrase(flat, rng())
    breaths = np.flatnonzero(~phrased.joined)[1:]
    assert 1 <= len(breaths) <= 4
    gaps = phrased.melody.start[breaths] - phrased.melody.end[breaths - 1]
    assert (gaps > 0.05).all()
    assert (gaps <= BREATH).all()


@settings(max_examples=25, deadline=None)
@given(melodies, st.sampled_from(NAMES), st.integers(0, 9))
def test_any_notes_give_a_finite_bounded_stem(line, name, seed):
    audio = sing(BANK, name, line, rng(seed), 2.0, RATE)
    assert audio.shape == (2 * RATE,)
    assert np.isfinite(audio).all()
    assert np.abs(audio).max() < 12 * LEVEL


@pytest.mark.parametrize("rate", [8_000, 22_050, 32_000])
def test_other_rates_have_the_length_and_the_pitch(rate):
    line = notes((0.2, 1.8, 57))
    audio = sing(BANK, "kal", line, rng(), 2.0, rate)
    assert audio.shape == (2 * rate,)
    spectrum = np.abs(np.fft.rfft(audio[rate // 2 : 3 * rate // 2]))
    harmonics = [spectrum[round(220 * k) - 8 : round(220 * k) + 9].max() for k in (1, 2, 3)]
    between = [spectrum[round(220 * (k + 0.5)) - 8 : round(220 * (k + 0.5)) + 9].max()
               for k in (1, 2, 3)]  # fmt: skip
    assert min(harmonics) > 3 * max(between)


def test_louder_notes_are_louder():
    levels = [
        np.std(sing(BANK, "lj", notes((0, 2, 65), velocity=v), rng(), 2.0, RATE))
        for v in (40, 80, 120)
    ]
    assert levels[0] < 0.6 * levels[1] < 0.5 * levels[2]


def test_each_sex_has_singers_to_train_on_and_one_held_out():
    for sex in voices.SEXES:
        assert BANK.names("train", sex)
        assert BANK.names("test", sex)
    assert not set(BANK.names("train")) & set(BANK.names("test"))
    assert {s.split for s in BANK.singers} == {"train", "test"}
    assert len(set(NAMES)) == len(NAMES)


def test_labels_name_the_sex():
    for singer in BANK.singers:
        labels = singer.labels()
        assert tuple(labels) == voices.CONCEPTS
        assert labels["vocals"]
        assert labels["male vocal"] != labels["female vocal"]
        assert labels[f"{singer.sex} vocal"]


def test_every_singer_has_its_licence_and_little_weight():
    index = json.loads((VOICES / "index.json").read_text(encoding="utf-8"))["singers"]
    assert [entry["name"] for entry in index] == NAMES
    for entry in index:
        text = (VOICES / entry["licence_file"]).read_text(encoding="utf-8")
        assert "opyright" in text
        assert "Changed:" in text
        assert entry["source"] in text
    assert sum(path.stat().st_size for path in VOICES.iterdir()) < 3_000_000


def test_bank_is_well_formed():
    for name in NAMES:
        syllables = BANK.syllables[name]
        begin, vowel, coda, finish = syllables.marks.T
        assert len(syllables.marks) >= 60
        assert (begin <= vowel).all()
        assert (vowel + 10 < coda).all()
        assert (coda < finish).all()
        assert (begin[1:] == finish[:-1]).all()
        assert finish[-1] == len(syllables.cepstra) == len(syllables.aperiodicity)


def test_one_file_of_arrays_equals_the_folder(tmp_path):
    path = tmp_path / "bank.npz"
    save_bank_arrays(BANK, path)
    with np.load(path, allow_pickle=False) as file:
        assert all(file[key].dtype != object for key in file.files)
    again = load_bank(path)
    assert again.singers == BANK.singers
    for name in NAMES:
        for field in ("cepstra", "bounds", "aperiodicity", "marks"):
            one, other = (getattr(b.syllables[name], field) for b in (BANK, again))
            assert one.dtype == other.dtype
            assert np.array_equal(one, other)
    line = notes((0, 1, 60))
    assert np.array_equal(
        sing(BANK, "mei", line, rng(), 1.0, RATE), sing(again, "mei", line, rng(), 1.0, RATE)
    )


def test_unknown_singers_and_banks_are_named():
    with pytest.raises(KeyError, match="no singer 'nobody'"):
        sing(BANK, "nobody", notes((0, 1, 60)), rng(), 1.0, RATE)
    with pytest.raises(FileNotFoundError):
        load_bank(VOICES / "absent.npz")


def test_ranges_are_respected_when_replaced():
    narrow = replace(BANK, singers=tuple(replace(s, low=54, high=66) for s in BANK.singers))
    audio = sing(narrow, "slt", notes((0.0, 2.0, 81)), rng(), 2.0, RATE)
    assert abs(heard_pitch(audio[RATE // 2 : RATE], 57) - 57) < 0.3
