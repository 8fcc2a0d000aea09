"""Scenes and the corpus: exact stems, instruments tied to nothing, chunks that resume."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from musicscope.embedded.pretraining import corpus as corpora
from musicscope.embedded.rendering import scenes
from musicscope.embedded.rendering.captions import CONCEPTS
from musicscope.embedded.rendering.compositions import Composition, Part
from musicscope.embedded.rendering.voices import load_bank

SECONDS = 3.0


def part(pitch: int, step: float, drum: bool = False, program: int = 0) -> Part:
    start = np.arange(0.0, 30.0, step)
    ones = np.ones(len(start), int)
    pitches = (np.resize([36, 42, 38, 42], len(start)) if drum
               else pitch + np.resize([0, 4, 7, 5], len(start)))  # fmt: skip
    return Part(program, drum, start, start + 0.9 * step, pitches, 90 * ones)


@pytest.fixture(scope="module")
def piece():
    parts = (part(72, 0.4), part(55, 0.5), part(40, 0.45, program=33), part(0, 0.25, drum=True))
    return Composition("piece", 30.0, parts, np.array([0.0]), np.array([100.0]))


@pytest.fixture(scope="module")
def sounds():
    bank = load_bank()
    return scenes.Sounds({}, bank, bank.names("train"))


def test_scene_is_a_function_of_the_generator(piece, sounds):
    one, two = (
        scenes.render_scene(
            piece,
            scenes.draw_scene(piece, sounds, np.random.default_rng(7), SECONDS),
            sounds,
            SECONDS,
        )
        for _ in range(2)
    )
    assert one[0] == two[0]
    assert np.array_equal(one[1], two[1])
    assert scenes.Scene.from_json(json.loads(json.dumps(one[0].to_json()))) == one[0]


def test_every_stem_sounds_at_one_level(piece, sounds):
    scene = scenes.draw_scene(piece, sounds, np.random.default_rng(3), SECONDS)
    kept, audio = scenes.render_scene(piece, scene, sounds, SECONDS)
    assert audio.shape == (len(kept.stems), round(SECONDS * scenes.SAMPLE_RATE))
    assert np.isfinite(audio).all()
    level = np.sqrt((audio.astype(np.float64) ** 2).mean(1))
    np.testing.assert_allclose(level, scenes.STEM_RMS, rtol=0.02)
    assert {"bass", "drums"} <= {s.concept for s in kept.stems}


def test_instruments_are_tied_to_no_part_and_singers_to_the_split(piece, sounds):
    drawn = [
        scenes.draw_scene(piece, sounds, np.random.default_rng(i), SECONDS) for i in range(300)
    ]
    guitars = Counter(s.part for scene in drawn for s in scene.stems if s.concept == "guitar")
    assert sum(guitars.values()) / 300 == pytest.approx(scenes.GUITAR_SHARE, abs=0.1)
    assert abs(guitars[0] - guitars[1]) < 0.3 * sum(guitars.values())
    singers = {s.source for scene in drawn for s in scene.stems if s.concept == "vocals"}
    assert singers == set(sounds.bank.names("train"))
    assert not singers & set(sounds.bank.names("test"))
    assert {s.concept for scene in drawn for s in scene.stems} == set(CONCEPTS)
    for scene in drawn:
        pitched = [s.concept for s in scene.stems if s.concept not in ("bass", "drums", "vocals")]
        assert len(pitched) == len(set(pitched))


def test_a_window_without_notes_is_an_error(sounds):
    empty = Composition("rest", 20.0, (), np.array([0.0]), np.array([100.0]))
    with pytest.raises(ValueError, match="no window"):
        scenes.draw_scene(empty, sounds, np.random.default_rng(0), SECONDS)


class OnePiece:
    def __init__(self, piece):
        self.piece = piece

    def draw(self, rng):
        return self.piece


@pytest.fixture
def short(monkeypatch, piece, sounds):
    monkeypatch.setattr(corpora, "SECONDS", SECONDS)
    monkeypatch.setattr(corpora, "SAMPLES", round(SECONDS * scenes.SAMPLE_RATE))
    monkeypatch.setattr(corpora, "SCENES_PER_CHUNK", 2)
    monkeypatch.setattr(corpora, "_pieces", lambda *a: OnePiece(piece))
    monkeypatch.setattr(corpora, "_sounds", lambda *a: sounds)


def test_chunks_repeat_resume_and_load(short, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        names = [corpora.render_chunk(folder, None, "train", n, 20) for n in range(2)]
    for name in names:
        assert (one / f"{name}.npy").read_bytes() == (two / f"{name}.npy").read_bytes()
    # A chunk that is there is not made again; one without its table is.
    (one / f"{names[0]}.npy").write_bytes(b"kept")
    (two / f"{names[0]}.json").unlink()
    (two / f"{names[0]}.npy").write_bytes(b"broken")
    for folder in (one, two):
        corpora.render_chunk(folder, None, "train", 0, 20)
    assert (one / f"{names[0]}.npy").read_bytes() == b"kept"
    corpus = corpora.Corpus(two, 4, "cpu")
    for name in names:
        corpus.add(name)
    assert len(corpus) == 4
    stems = sum(len(s.stems) for s in corpus.table.scenes)
    assert corpus.stems == stems == (corpus.table.rows >= 0).sum()
    assert torch.equal(
        corpus.bank[:stems],
        torch.from_numpy(np.concatenate([np.load(two / f"{n}.npy") for n in names])),
    )


def test_a_scene_that_never_renders_is_an_error(short, tmp_path, monkeypatch):
    def broken(*arguments):
        raise ValueError("no such program")

    monkeypatch.setattr(scenes, "render_scene", broken)
    with pytest.raises(ValueError, match="no such program"):
        corpora.render_chunk(tmp_path, None, "train", 0, 20)
    assert not list(tmp_path.iterdir())


def test_a_full_corpus_takes_no_more(short, tmp_path):
    name = corpora.render_chunk(tmp_path, None, "train", 0, 20)
    corpus = corpora.Corpus(tmp_path, 1, "cpu")
    for _ in range(3):
        corpus.add(name)
    assert corpus.full
    assert len(corpus) < 4
