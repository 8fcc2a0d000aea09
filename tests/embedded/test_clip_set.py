"""The embedded data set: clips are functions of their job, labels are exact, pairs are matched."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from musicscope.config import load_params
from musicscope.core.audio import TRIVIAL_CUES
from musicscope.data.splits import clip_sets
from musicscope.data.taxonomy import FAMILIES, PITCHED_FAMILIES, PROGRAM_NAMES
from musicscope.embedded import clip_set
from musicscope.embedded.clip_set import CLIPS_PER_SCENE, Job
from musicscope.embedded.rendering.compositions import Composition, Part
from musicscope.embedded.rendering.scenes import Sounds, soundfonts
from musicscope.embedded.rendering.soundfonts import SAMPLE_RATE, Synth, rms, soundfont
from musicscope.embedded.rendering.voices import load_bank
from tools.import_closure import ROOT

SECONDS = 2.0


def scale(program: int, pitch: int, notes: int = 60, is_drum: bool = False) -> Part:
    """A part that plays a note every quarter of a second."""
    start = np.arange(notes) * 0.25
    return Part(
        program, is_drum, start, start + 0.2, pitch + np.arange(notes) % 7, np.full(notes, 90)
    )


class OnePiece:
    """Stands for `Pieces` where no score can be downloaded."""

    piece = Composition(
        "book/tune", 15.0, (scale(30, 52), scale(0, 76), scale(33, 33), scale(0, 36, is_drum=True)),
        np.array([0.0]), np.array([120.0]),
    )  # fmt: skip

    def draw(self, rng: np.random.Generator) -> Composition:
        return self.piece


@pytest.fixture(scope="module")
def sounds() -> Sounds:
    bank = load_bank(None)
    fonts = soundfonts({"fluidr3mono": soundfont("fluidr3mono")})
    return Sounds(fonts, bank, bank.names("train"), True)


@pytest.fixture(autouse=True)
def _no_download(sounds, monkeypatch):
    monkeypatch.setattr(clip_set, "load_pieces", lambda split, seed: OnePiece())
    monkeypatch.setattr(clip_set, "load_sounds", lambda font, split: sounds)


def job(kind: str = "clip", count: int = 4, first: int = 0, **more) -> Job:
    return Job(kind, "mixed", "train", first, count, 1, SECONDS, **more)


def test_a_clip_is_a_function_of_its_number_and_not_of_the_job():
    both = clip_set.make_clips(job(count=8))
    second = clip_set.make_clips(job(count=4, first=4))
    for one, other in zip(both[4:], second, strict=True):
        np.testing.assert_array_equal(one.audio, other.audio)
        assert one.row == other.row
    assert not np.array_equal(both[0].audio, both[4].audio)
    judged = clip_set.make_clips(job(name="train_judge"))
    assert not np.array_equal(both[0].audio, judged[0].audio)


def test_labels_are_what_plays_and_energy_is_shared_among_it():
    for clip in clip_set.make_clips(job(count=24)):
        row = clip.row
        assert clip.audio.shape == (SAMPLE_RATE * SECONDS,)
        assert clip.audio.dtype == np.float32
        assert 0 < np.abs(clip.audio).max() <= 1
        assert [f for f in FAMILIES if row[f"has_{f}"]] == row["families"]
        assert row["has_vocals"] == (row["has_male_vocal"] or row["has_female_vocal"])
        shares = {c: row[f"energy_{c}"] for c in (*FAMILIES, "vocals")}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
        assert all((share > 0) == row[f"has_{c}"] for c, share in shares.items())
        assert row[f"has_{row['target_family']}"]
        sounds = {c: row[f"sound_{c}"] for c in FAMILIES}
        assert all((sounds[c] != "") == row[f"has_{c}"] for c in FAMILIES)
        assert set(sounds.values()) <= {"", "timgm6mb", "fluidr3mono", "synthesis"}
        assert (row["group"], row["source"]) == ("book/tune", "book")


def test_guitar_is_independent_of_drums_bass_and_vocals():
    rows = [c.row for c in clip_set.make_clips(job(count=160))]
    guitar = np.array([row["has_guitar"] for row in rows])
    assert 0.15 < guitar.mean() < 0.6
    for other in ("drums", "bass", "vocals"):
        has = np.array([row[f"has_{other}"] for row in rows])
        assert abs(has[guitar].mean() - has[~guitar].mean()) < 0.3, other  # 40 scenes


def test_pairs_differ_in_the_guitar_alone():
    pairs = list(clip_set.make_pairs(job("pair", count=6)))
    assert len(pairs) == 6
    for guitar, other in pairs:
        assert guitar.row["has_guitar"]
        assert guitar.row["target_family"] == "guitar"
        assert not other.row["has_guitar"]
        changed = other.row["target_family"]
        assert changed in PITCHED_FAMILIES
        assert set(other.row["programs"]) & set(PROGRAM_NAMES[changed])
        for key in (
            "group",
            "tempo_bpm",
            "density",
            "has_drums",
            "has_bass",
            "has_vocals",
            "style",
        ):
            assert guitar.row[key] == other.row[key], key
        assert rms(guitar.audio) == pytest.approx(rms(other.audio), rel=0.05)
        assert not np.array_equal(guitar.audio, other.audio)


def test_the_candidate_least_separable_by_cues_is_taken():
    rng = np.random.default_rng(0)
    guitar = rng.standard_normal((12, len(TRIVIAL_CUES)))
    far, near = guitar + 2.0, guitar + 0.05 * rng.standard_normal(guitar.shape)
    assert clip_set.imbalance(guitar, near) < clip_set.imbalance(guitar, far)
    assert clip_set.imbalance(guitar, guitar) == pytest.approx(0)


def test_rows_make_disjoint_sets(monkeypatch):
    splits = {"train": 8, "validation": 4, "test": 4}

    def piece_of(split, seed):
        pieces = OnePiece()
        pieces.piece = Composition(f"{split}/tune", *list(vars(OnePiece.piece).values())[1:])
        return pieces

    monkeypatch.setattr(clip_set, "load_pieces", piece_of)
    jobs = [Job("clip", "mixed", split, 0, n, 1, SECONDS) for split, n in splits.items()]
    jobs += [Job("clip", "fluidr3mono", "test", 0, 4, 1, SECONDS)]
    jobs += [Job("pair", "mixed", "test", 0, 2, 1, SECONDS)]
    rows = pd.DataFrame([row for one in jobs for _, row in clip_set.run_job(one)])
    assert rows["id"].is_unique
    sets = {name: len(at) for name, at in clip_sets(rows).items()}
    held_out = {"heldout_font": 4, "heldout_source": 4}
    assert sets == {**splits, **held_out, "pairs_mixed": 4, "pairs_fluidr3mono": 0}


def test_rendering_does_not_depend_on_what_came_before():
    synth, piece = Synth(soundfont("fluidr3mono")), OnePiece.piece
    scenes = [
        clip_set.draw_rendered(OnePiece(), clip_set.load_sounds("", ""), rng, SECONDS)[1]
        for rng in map(np.random.default_rng, range(3))
    ]
    stems = [(scene, stem) for scene in scenes for stem in scene.stems if stem.concept != "vocals"]
    first = [synth.stem(piece, scene, stem, SECONDS) for scene, stem in stems]
    again = [synth.stem(piece, scene, stem, SECONDS) for scene, stem in reversed(stems)][::-1]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_jobs_cover_the_counts_in_whole_scenes():
    config = load_params(ROOT / "params.yaml").prepare_data
    jobs = clip_set.plan_jobs(config, 20)
    assert all(j.first % CLIPS_PER_SCENE == 0 for j in jobs)
    train = [j for j in jobs if j.split == "train"]
    assert sum(j.count for j in train) == config.clips.train
    assert sum(j.count for j in jobs if j.kind == "pair") == (
        config.pairs + config.heldout_font_pairs
    )
