"""Verdicts, the tables on planted data, and the whole table on a tiny model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from musicscope.embedded.pretraining import evidence, music_statistics
from musicscope.embedded.pretraining.evidence import Clips, Coded
from musicscope.embedded.pretraining.evidence_rows import (
    TARGETS,
    Bootstrap,
    Row,
    Table,
    median_of,
    perplexity_row,
)
from musicscope.embedded.pretraining.generated_evidence import (
    classifier_rows,
    distance_rows,
    family_prompts,
    judge_loss_rows,
    music_rows,
    musicnn_families,
    prompt_rows,
)
from musicscope.judges.musicnn import TAGS
from musicscope.models.musicgen.model import MusicgenModel

BOOT = Bootstrap(200, 1)
GROUPS = np.repeat([f"piece{i}" for i in range(8)], 3)


def by_name(rows: list[Row]) -> dict[str, Row]:
    found = {row.name: row for row in rows}
    assert len(found) == len(rows)
    return found


# --- verdicts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("direction", "target", "interval", "verdict", "estimate"),
    [
        ("at_least", 1.0, (1.5, 1.1, 2.0), True, True),
        ("at_least", 1.0, (1.5, 0.9, 2.0), False, True),
        ("at_least", 1.0, (0.5, 0.1, 2.0), False, False),
        ("at_most", 1.0, (0.5, 0.1, 0.9), True, True),
        ("at_most", 1.0, (0.5, -9.0, 1.1), False, True),
        ("at_most", 1.0, (1.0, 1.0, 1.0), True, True),
        ("within", (0.0, 1.0), (0.5, 0.1, 0.9), True, True),
        ("within", (0.0, 1.0), (0.5, -0.1, 0.9), False, True),
        ("within", (0.0, 1.0), (0.5, 0.1, 1.1), False, True),
        ("within", (0.0, 1.0), (2.0, 1.1, 3.0), False, False),
        ("at_most", 1.0, (np.nan, np.nan, np.nan), False, False),
        ("at_least", 1.0, (2.0, np.nan, 3.0), False, True),
        (None, None, (0.5, 0.1, 0.9), None, None),
    ],
)
def test_verdict_needs_the_whole_interval(direction, target, interval, verdict, estimate):
    row = Row("x", *interval, 8, "nats", target, direction)
    assert row.verdict is verdict
    assert row.estimate_meets is estimate


def test_a_target_needs_a_direction_that_fits():
    for target, direction in (
        (1.0, None),
        (None, "at_least"),
        (1.0, "within"),
        ((0, 1), "at_most"),
    ):
        with pytest.raises(ValueError, match="x:"):
            Row("x", 0, 0, 0, 1, "nats", target, direction)


def test_table_is_json_with_verdicts_and_without_nan(tmp_path):
    row = Row("a.b", np.nan, np.nan, np.nan, 8, "x", 1.3, "at_most", {"null": 0.5}, "refused")
    Table([row], {"codec": 1.0}).save(tmp_path / "table.json")
    found = json.loads((tmp_path / "table.json").read_text())["rows"]["a.b"]
    assert found["estimate"]["value"] is None
    assert found["verdict"] is False
    assert found["control"] == {"null": 0.5}
    assert set(found["estimate"]) == {"value", "low", "high", "n", "unit"}
    assert set(found) >= {"name", "target", "direction"}


def test_weighted_median_equals_repeating_items():
    values, weights = np.array([3.0, 1.0, 2.0, 9.0]), np.array([[1, 2, 0, 3], [1, 1, 1, 2]])
    repeated = [np.sort(np.repeat(values, w)) for w in weights]
    expected = [r[(len(r) - 1) // 2] for r in repeated]
    assert median_of(values)(weights.astype(float)).tolist() == expected


# --- parts of the table -----------------------------------------------------------------------


def test_perplexity_of_planted_codes():
    rng = np.random.default_rng(0)
    flat = rng.integers(0, 16, (24, 500))
    row = perplexity_row("x", flat, GROUPS, 16)
    assert row.value == pytest.approx(1.0, abs=0.01)
    narrow = perplexity_row("x", flat // 4, GROUPS, 16)
    assert narrow.value == pytest.approx(0.25, abs=0.01)
    assert narrow.low < narrow.value < narrow.high
    # Compositions with codes of their own: the interval is as wide as they are few.
    own = np.repeat(np.arange(8), 3)[:, None] + np.zeros((24, 500), int)
    assert perplexity_row("x", own, GROUPS, 16).high - narrow.high > 0.2


def scores_of(labels: np.ndarray, strength: float, seed: int = 0) -> np.ndarray:
    return strength * labels + np.random.default_rng(seed).standard_normal(len(labels))


def test_judges_lose_what_the_codec_destroys():
    targets = np.array(["guitar", "piano", "flute"] * 8)
    audio = np.zeros((24, 10), np.float32)
    odd = np.arange(24) % 2 == 1
    truth = Clips(audio, GROUPS, ["x"] * 24, targets, {"vocals": odd}).truth
    assert set(truth) == {"guitar", "piano", "flute", "vocals"}
    before = {"judge": {f: scores_of(targets == f, 6) for f in ("guitar", "piano", "choir")}}
    after = {"judge": {"guitar": scores_of(targets == "guitar", 0, 1), **{
        f: before["judge"][f] for f in ("piano", "choir")}}}  # fmt: skip
    rows = by_name(judge_loss_rows(truth, GROUPS, before, after, BOOT))
    assert rows["codec.auroc_loss.judge.guitar"].value > 0.25
    assert rows["codec.auroc_loss.judge.guitar"].verdict is False
    assert rows["codec.auroc_loss.judge.piano"].value == 0
    assert rows["codec.auroc_loss.judge.piano"].verdict is None
    half = rows["codec.auroc_loss.judge.guitar"].value / 2
    assert rows["codec.auroc_loss.judge.mean"].value == pytest.approx(half)
    assert "codec.auroc_loss.judge.choir" not in rows  # no clip of it
    kept = by_name(judge_loss_rows(truth, GROUPS, before, before, BOOT))
    assert kept["codec.auroc_loss.judge.mean"].verdict is True
    voices = {"singing": {"vocals": scores_of(odd, 9)}, "deaf": {"tuba": scores_of(odd, 9)}}
    sung = by_name(judge_loss_rows(truth, GROUPS, voices, voices, BOOT))
    assert list(sung) == ["codec.auroc_loss.singing.vocals", "codec.auroc_loss.singing.mean"]
    assert sung["codec.auroc_loss.singing.vocals"].control["auroc_original"] > 0.95


def test_prompted_families_are_detected_or_not():
    texts, families = family_prompts({"guitar": 12, "electric_piano": 8, "choir": 2})
    assert len(texts) == 22
    assert all(("guitar" in t) == (f == "guitar") for t, f in zip(texts, families, strict=True))
    assert "electric piano music" in texts
    score = scores_of(families == "guitar", 8)
    score[-1] = np.nan
    truth = {"guitar": np.arange(24) % 2 == 0}
    real = {"judge": {"guitar": scores_of(truth["guitar"], 0)}}
    for strength_score, met in ((score, True), (scores_of(families == "guitar", 0), False)):
        row = by_name(
            prompt_rows({"judge": {"guitar": strength_score}}, families, real, truth, BOOT)
        )["prompts.judge.guitar"]
        assert row.verdict is met
        assert abs(row.control["shuffled"] - 0.5) < 0.3
        assert "real_clips" in row.control
    assert row.n == 22


def test_voice_tags_of_musicnn_are_scores_of_families():
    tags = np.zeros((2, len(TAGS)))
    tags[1, TAGS.index("male voice")] = 0.7
    found = musicnn_families(tags, TAGS)
    assert found["male_vocal"].tolist() == [0, 0.7]
    assert found["female_vocal"].tolist() == [0, 0]
    assert set(found) >= {"guitar", "vocals"}


def test_distance_rows_judge_a_near_and_a_far_set():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(24), 4)
    centres = np.repeat(rng.standard_normal((24, 5)), 4, 0)
    real = centres + 0.5 * rng.standard_normal((96, 5))
    others = {"codec": real + 0.02, "generated": real + 2.0, "noise": 3 + real[::-1]}
    rows = by_name(distance_rows("e", real, groups, others, BOOT))
    assert rows["distance.e.codec_ratio"].value == pytest.approx(1.0, abs=0.1)
    assert rows["distance.e.codec_ratio"].verdict is True
    assert rows["distance.e.codec_population"].value == pytest.approx(0, abs=0.01)
    assert rows["distance.e.generated_ratio"].value > 2
    assert rows["distance.e.generated_ratio"].verdict is False
    assert rows["distance.e.noise_ratio"].verdict is None
    assert rows["distance.e.generated_population"].low > 0
    with pytest.raises(ValueError, match="same embedding"):
        distance_rows("e", np.ones((96, 5)), groups, others, BOOT)


def test_classifier_rows_tell_generated_clips_and_not_equal_ones():
    rng = np.random.default_rng(0)
    real = rng.standard_normal((24, 6))
    rows = by_name(classifier_rows(real, real + 0.01, real + 5 * np.eye(6)[1], GROUPS, BOOT))
    assert rows["classifier.generated_against_codec"].value > 0.95
    assert abs(rows["classifier.codec_against_real"].value - 0.5) < 0.1
    assert abs(rows["classifier.codec_against_real"].control["real_against_real"] - 0.5) < 0.15


def test_music_rows_place_clips_inside_the_band_of_real_clips():
    rng = np.random.default_rng(0)
    names = music_statistics.UNITS
    real = {name: rng.standard_normal(24) for name in names}
    outside = {name: 5 + rng.standard_normal(24) for name in names}
    for made, met in ((real, True), (outside, False)):
        rows = by_name(music_rows(real, made, {"noise": outside}, GROUPS, BOOT))
        assert len(rows) == 2 * len(names) + 1
        assert rows["music.repetition"].verdict is met
        share = rows["music.repetition.share_inside"]
        assert share.value == pytest.approx(20 / 24 if met else 0)
        assert share.control["noise"] == 0
        assert 0.5 < share.control["real"] <= 1
    assert rows["music.beat_periodicity.mean"].target == TARGETS["beat_periodicity"]


# --- a tiny model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_musicgen) -> MusicgenModel:
    return MusicgenModel.load(tiny_musicgen, torch.device("cpu"), torch.float32)


CAPTIONS = ["a calm acoustic guitar", "flute", "fast electric piano"] * 8
TARGET = np.array(["guitar", "flute", "electric_piano"] * 8)


def coded(model: MusicgenModel, frames: int = 30, seed: int = 0) -> Coded:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, model.card, (24, model.num_codebooks, frames))
    return Coded(codes, CAPTIONS, GROUPS, TARGET)


def test_codec_rows_of_a_tiny_model(model):
    audio = 0.1 * np.random.default_rng(0).standard_normal((24, 6400)).astype(np.float32)
    clips = Clips(audio, GROUPS, CAPTIONS, TARGET)
    codes = model.encode(audio, [None] * 24).codes.numpy()
    decoded = evidence.reconstruct(model, codes, 6400)
    rows = by_name(evidence.codec_rows(model, clips, codes, decoded, BOOT))
    whole, last = (rows[f"codec.{x}si_sdr"] for x in ("", "first_4_codebooks."))
    assert whole.value == last.value
    # Fewer codebooks give another signal.
    assert rows["codec.first_1_codebooks.si_sdr"].value != whole.value
    assert 0 < rows["codec.codebook_3.perplexity"].value <= 1
    perfect = by_name(evidence.codec_rows(model, clips, codes, audio, BOOT))
    assert perfect["codec.si_sdr"].verdict is True
    assert perfect["codec.si_sdr"].control["another_clip"] < -20
    assert perfect["codec.log_mel_distance"].value == 0


def test_decoder_rows_of_a_tiny_model(model):
    held, train, validation = (coded(model, seed=seed) for seed in range(3))
    rows = by_name(evidence.decoder_rows(model, held, train, validation.codes, train.codes, BOOT))
    control = rows["decoder.cross_entropy"].control
    assert control["unigram"] == pytest.approx(np.log(model.card), abs=0.1)
    gain = rows["decoder.gain_over_counts"]
    mean = control["trigram_and_coarser"] - rows["decoder.cross_entropy"].value
    assert gain.value == pytest.approx(mean, abs=1e-6)
    assert gain.verdict is False  # a random model is worse than counting
    assert rows["decoder.caption_gain"].verdict is False
    # The same clips as held-out and as training clips: no gap.
    same = by_name(evidence.decoder_rows(model, held, held, validation.codes, train.codes, BOOT))
    assert same["decoder.generalisation_gap"].value == 0
    assert len([r for r in rows if r.endswith("gain_over_counts")]) == model.num_codebooks + 1


def test_wrong_captions_are_of_another_family_and_composition():
    found = evidence.wrong_captions(CAPTIONS, TARGET, GROUPS, np.random.default_rng(0))
    assert all(a != b for a, b in zip(found, CAPTIONS, strict=True))
    with pytest.raises(ValueError, match="another family"):
        evidence.wrong_captions(["x"] * 24, np.array(["guitar"] * 24), GROUPS,
                                np.random.default_rng(0))  # fmt: skip


def test_layer_rows_bound_inner_layers_only(model):
    held, train = coded(model), coded(model, seed=1)
    rows = by_name(evidence.layer_rows(model, train, held, BOOT))
    assert len(rows) == model.num_layers
    targets = [rows[f"layers.{i}.mean_ablation_kl"].target for i in range(model.num_layers)]
    assert targets == [None, 0.05, 0.05, None]
    assert all(row.low > 0 and row.control["skip"] > 0 for row in rows.values())


def test_generation_is_seeded_and_follows_the_captions(model):
    first, again, other = (
        evidence.generate_clips(model, CAPTIONS[:3], 0.2, seed) for seed in (0, 0, 1)
    )
    assert first.shape == (3, 640)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


class Listener:
    """A judge that answers from the mean spectrum, in place of musicnn and the family judge."""

    tags, families = TAGS, ("guitar", "flute")

    def predict(self, audio: np.ndarray):
        spectrum = np.abs(np.fft.rfft(audio[:, :16000]))[:, : 200 * 40].reshape(-1, 200, 40)
        embedding = np.log(spectrum.mean(2) + 1e-6)
        return embedding[:, :50], embedding


class FamilyListener(Listener):
    def predict(self, audio: np.ndarray) -> np.ndarray:
        return super().predict(audio)[0][:, :2]


def test_the_whole_table_of_a_tiny_model(model, monkeypatch, tmp_path):
    """The model plays at 3,200 Hz; its ten seconds stand for two seconds at 16 kHz.

    Generation has a test of its own: 500 steps of it would take most of this test's time.
    """

    def generate(model, captions, seconds, seed, guidance):
        audio = np.full((len(captions), 32_000), 0.1)
        return music_statistics.white_noise(audio, np.random.default_rng(seed))

    monkeypatch.setattr(evidence, "generate_clips", generate)
    held, train, validation = (
        Clips(
            music_statistics.white_noise(np.full((12, 32_000), 0.1), np.random.default_rng(seed)),
            np.repeat([f"{name}{i}" for i in range(6)], 2), CAPTIONS[:12], TARGET[:12],
        )
        for seed, name in enumerate(("held", "train", "validation"))
    )  # fmt: skip
    arguments = (
        train, validation, Listener(), {"family_judge": FamilyListener()},
        {"guitar": 4, "flute": 4}, Bootstrap(20),
    )  # fmt: skip
    with pytest.raises(ValueError, match="3200 Hz"):
        evidence.evidence_table(model, held, *arguments)
    monkeypatch.setattr(model, "sample_rate", 16_000)
    with pytest.raises(ValueError, match="held-out compositions are in train"):
        evidence.evidence_table(model, train, *arguments)
    table = evidence.evidence_table(model, held, *arguments)
    rows = by_name(table.rows)
    assert {name.split(".")[0] for name in rows} == {
        "codec", "decoder", "layers", "prompts", "distance", "classifier", "music",
    }  # fmt: skip
    assert "distance.scattering.codec_ratio" in rows
    assert "prompts.family_judge.guitar" in rows
    missing = [r.name for r in table.rows if not np.isfinite([r.value, r.low, r.high]).all()]
    assert missing == []
    table.save(tmp_path / "table.json")
    assert len(json.loads((tmp_path / "table.json").read_text())["rows"]) == len(rows)


def test_clips_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="differ in length"):
        Clips(np.zeros((2, 4)), GROUPS[:2], CAPTIONS[:3], TARGET[:2])
