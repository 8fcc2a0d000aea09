"""Mixes: exact labels, crops that agree with whole clips, levels, captions."""

import numpy as np
import pytest
import torch

from musicscope.embedded.rendering import mixing
from musicscope.embedded.rendering.captions import CONCEPTS, facts, random_description, tempo_word
from musicscope.embedded.rendering.scenes import SAMPLE_RATE, STEM_RMS, Scene, Stem

SECONDS = 2.0
SAMPLES = round(SECONDS * SAMPLE_RATE)


def scene(group: str, *concepts: str) -> Scene:
    """A scene whose stem j plays part j."""
    programs = {"guitar": 25, "piano": 0, "bass": 33}
    stems = tuple(
        Stem(c, programs.get(c, 0), "timgm6mb", j, 0, j, "male" if c == "vocals" else "", 20)
        for j, c in enumerate(concepts)
    )
    return Scene(group, 0.0, 1.0, stems, 100.0, "C major", "waltz")


@pytest.fixture(scope="module")
def table():
    scenes = [scene("a", "guitar", "piano", "drums"), scene("b", "piano", "bass", "vocals")]
    return mixing.SceneTable.of(scenes[:1]) + mixing.SceneTable.of(scenes[1:], first_row=3)


@pytest.fixture(scope="module")
def bank():
    """Stem r is a sine of 200 (r + 1) Hz."""
    time = np.arange(SAMPLES) / SAMPLE_RATE
    sines = np.sin(2 * np.pi * 200 * np.arange(1, 7)[:, None] * time) * STEM_RMS * np.sqrt(2)
    return torch.from_numpy(sines.astype(np.float16))


def plain(mixes: mixing.Mixes) -> mixing.Mixes:
    """Without room, tone and noise."""
    n = len(mixes)
    return mixing.Mixes(
        mixes.scene, mixes.rows, mixes.gain_db, mixes.enters, mixes.leaves, mixes.room,
        np.zeros(n), np.zeros((n, mixing.TONE_POINTS)), mixes.level_db, np.full(n, -200.0),
        mixes.seed,
    )  # fmt: skip


def test_labels_are_the_stems_in_the_mix(table, bank):
    mixes = plain(mixing.draw_mixes(table, 64, np.random.default_rng(0), SECONDS))
    audio = mixing.mix_audio(bank, mixes, mixing.Rooms("cpu"), np.zeros(64, int), SAMPLES)
    labels = mixing.labels(table, mixes, SECONDS)
    power = np.abs(np.fft.rfft(audio.numpy())) ** 2
    for i in range(64):
        concepts = [s.concept for s in table.scenes[mixes.scene[i]].stems]
        first = table.rows[mixes.scene[i], 0]
        for j, concept in enumerate(concepts):
            share = power[i, round(200 * (first + j + 1) * SECONDS)] / power[i].sum()
            assert (share > 1e-3) == labels[i, CONCEPTS.index(concept)], (i, concept)
        assert labels[i].sum() == (mixes.rows[i] >= 0).sum()
    assert 0.2 < labels[:, CONCEPTS.index("guitar")].mean() < 0.6


def test_every_clip_has_a_stem_from_start_to_end(table):
    mixes = mixing.draw_mixes(table, 300, np.random.default_rng(1), SECONDS)
    steady = (mixes.rows >= 0) & (mixes.enters == 0) & np.isinf(mixes.leaves)
    assert steady.any(1).all()
    assert ((mixes.enters > 0) & (mixes.rows >= 0)).any()


def test_a_crop_is_part_of_the_clip_up_to_level_and_room(table, bank):
    mixes = plain(mixing.draw_mixes(table, 8, np.random.default_rng(2), SECONDS))
    rooms, start = mixing.Rooms("cpu"), np.full(8, 7000)
    whole = mixing.mix_audio(bank, mixes, rooms, np.zeros(8, int), SAMPLES)[:, 7000:11000]
    crop = mixing.mix_audio(bank, mixes, rooms, start, 4000)
    scale = (crop * whole).sum(1) / whole.square().sum(1)
    np.testing.assert_allclose(crop, whole * scale[:, None], atol=2e-4)


def test_a_crop_beyond_the_end_is_an_error(table, bank):
    mixes = mixing.draw_mixes(table, 1, np.random.default_rng(3), SECONDS)
    with pytest.raises(IndexError):
        mixing.mix_audio(bank, mixes, mixing.Rooms("cpu"), np.ones(1, int), SAMPLES)


def test_late_stem_is_silent_before_it_enters(table, bank):
    mixes = plain(mixing.draw_mixes(table, 1, np.random.default_rng(3), SECONDS, np.array([0])))
    mixes.rows[0], mixes.leaves[0] = [0, 1, -1, -1, -1, -1, -1], np.inf
    mixes.enters[0], mixes.gain_db[0] = [0, 1.0, 0, 0, 0, 0, 0], 0.0
    audio = mixing.mix_audio(bank, mixes, mixing.Rooms("cpu"), np.zeros(1, int), SAMPLES)[0].numpy()
    power = np.abs(np.fft.rfft(audio.reshape(4, -1))) ** 2
    at = round(400 * SECONDS / 4)  # the second stem's 400 Hz
    assert power[:2, at].max() < 1e-4 * power[2:, at].min()


def test_level_is_the_drawn_level(table, bank):
    mixes = mixing.draw_mixes(table, 16, np.random.default_rng(4), SECONDS)
    audio = mixing.mix_audio(bank, mixes, mixing.Rooms("cpu"), np.zeros(16, int), SAMPLES)
    level = 10 * np.log10(audio.square().mean(1).numpy())
    assert np.abs(level - mixes.level_db).max() < 0.5
    assert audio.abs().max() <= 1.0


def test_captions_name_the_loudest_and_repeat(table):
    mixes = mixing.draw_mixes(table, 200, np.random.default_rng(5), SECONDS)
    texts = mixing.captions(table, mixes, SECONDS)
    assert texts == mixing.captions(table, mixes, SECONDS)
    assert len(set(texts)) > 120
    about = mixing.describe(table, mixes, SECONDS)
    for text, description in zip(texts, about, strict=True):
        player = description.players[0]
        words = {"guitar": "guitar", "piano": "piano", "bass": "bass", "drums": "",
                 "vocals": ""}[player.concept]  # fmt: skip
        assert words in text.lower()


def test_facts_tell_descriptions_apart():
    rng = np.random.default_rng(6)
    styles = ("waltz", "rock")
    seen = [random_description(rng, styles) for _ in range(50)]
    rows = np.stack([facts(a, styles) for a in seen])
    assert len({r.tobytes() for r in rows}) > 45
    assert [tempo_word(x) for x in (60, 120, 160)] == ["slow", "mid-tempo", "fast"]
    for row, about in zip(rows, seen, strict=True):
        assert [c for c, on in zip(CONCEPTS, row, strict=False) if on] == list(about.concepts)
