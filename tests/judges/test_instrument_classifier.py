"""The family judge learns timbres, ignores level, resumes exactly and reports honestly."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from musicscope.judges import instrument_classifier as fj
from musicscope.judges.musicnn import silent
from musicscope.judges.report import family_report

RATE = 16_000
FAMILIES = ("saw", "pluck", "noise")
SMALL = fj.JudgeConfig(channels=(8, 16, 16, 16), n_mels=32, crop_frames=100, epochs=10, batch=16)


def clip(rng, playing, seconds=2.2):
    """Notes of the families in `playing` (bool [3]) at random pitches, times and level."""
    t = np.arange(int(seconds * RATE)) / RATE
    out = 0.05 * rng.standard_normal(len(t))
    for start in np.arange(0, seconds, 0.4) + rng.uniform(0, 0.1):
        since, hertz = np.maximum(t - start, 0), 110 * 2 ** rng.uniform(0, 2)
        on = (t >= start) & (since < 0.35)
        if playing[0]:
            out += on * (2 * (hertz * since % 1) - 1) * 0.5
        if playing[1]:
            partials = range(1, 6)
            out += (
                on
                * np.exp(-12 * since)
                * sum(np.sin(2 * np.pi * k * hertz * since) / k for k in partials)
            )
        if playing[2]:
            out += on * np.exp(-20 * since) * rng.standard_normal(len(t)) * 0.7
    return (out * 10 ** rng.uniform(-1.5, -0.5)).astype(np.float32)


def dataset(seed, n):
    rng = np.random.default_rng(seed)
    labels = rng.random((n, 3)) < 0.5
    return np.stack([clip(rng, row) for row in labels]), labels


@pytest.fixture(scope="module")
def trained():
    torch.set_num_threads(1)
    audio, labels = dataset(0, 160)
    batches = ((audio[i : i + 40], labels[i : i + 40]) for i in range(0, 160, 40))
    return fj.train_family_judge(batches, FAMILIES, seed=3, config=SMALL)


def test_learns_synthetic_timbres(trained):
    audio, labels = dataset(1, 60)
    report = family_report(trained.predict(audio), labels, FAMILIES, np.arange(60) // 4, 100, 0)
    assert report["mean_auroc"] > 0.9
    for family in FAMILIES:
        auroc = report[family]["auroc"]
        assert auroc["low"] <= auroc["value"] <= auroc["high"]


def test_shuffled_labels_teach_nothing():
    """The control: with labels dealt at random, held-out clips are told apart by chance only."""
    audio, labels = dataset(0, 96)
    shuffled = np.random.default_rng(9).permutation(labels)
    config = replace(SMALL, epochs=4)
    judge = fj.train_family_judge([(audio, shuffled)], FAMILIES, 3, config)
    audio, labels = dataset(1, 60)
    report = family_report(judge.predict(audio), labels, FAMILIES, np.arange(60), 10, 0)
    assert 0.25 < report["mean_auroc"] < 0.75


def test_gain_changes_nothing(trained):
    audio, _ = dataset(2, 4)
    once = trained.predict(audio)
    np.testing.assert_allclose(trained.predict(0.4 * audio), once, atol=5e-3)
    np.testing.assert_allclose(trained.predict(0.01 + audio), once, atol=5e-3)


def test_silence_is_nan_and_a_quiet_half_does_not_count(trained):
    audio, _ = dataset(2, 2)
    audio = audio[:, : 2 * RATE]
    answers = trained.predict(np.concatenate([np.zeros_like(audio[:1]), audio]))
    assert silent(answers).tolist() == [True, False, False]
    padded = np.concatenate([audio, np.zeros((2, 2 * RATE), np.float32)], axis=1)
    np.testing.assert_allclose(trained.predict(padded), answers[1:], atol=0.02)


def test_batching_and_order_change_nothing(trained):
    audio, _ = dataset(4, 5)
    together = trained.predict(audio)
    np.testing.assert_allclose(trained.predict(audio[::-1], batch=2)[::-1], together, atol=1e-5)


def test_saved_judge_is_the_same_judge(trained, tmp_path):
    trained.save(tmp_path / "judge")
    loaded = fj.load_family_judge(tmp_path / "judge")
    assert loaded.families == FAMILIES
    assert loaded.config == SMALL
    audio, _ = dataset(5, 3)
    np.testing.assert_array_equal(loaded.predict(audio), trained.predict(audio))
    assert sorted(p.name for p in (tmp_path / "judge").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_missing_or_foreign_files_are_named(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="train_judge"):
        fj.load_family_judge(tmp_path)
    trained.save(tmp_path / "judge")
    wider = replace(trained, net=fj.FamilyNet(replace(SMALL, n_mels=48), 3))
    wider.save(tmp_path / "wider")
    (tmp_path / "wider/model.safetensors").replace(tmp_path / "judge/model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors are not those of its own config"):
        fj.load_family_judge(tmp_path / "judge")


def test_a_killed_run_ends_in_the_same_weights(tmp_path, monkeypatch):
    audio, labels = dataset(6, 48)
    config = replace(SMALL, epochs=4)

    def train(scratch=None, seed=3):
        torch.rand(3)  # the caller's generator must not matter
        return fj.train_family_judge([(audio, labels)], FAMILIES, seed, config, scratch)

    def weights(judge):
        return torch.cat([v.flatten().double() for v in judge.net.state_dict().values()])

    whole = weights(train())
    keep, calls = fj._keep, []

    def killed(*arguments):
        keep(*arguments)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(fj, "_keep", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    monkeypatch.setattr(fj, "_keep", keep)
    started = []
    epoch = fj._epoch
    monkeypatch.setattr(fj, "_epoch", lambda *a: (started.append(1), epoch(*a))[1])
    assert torch.equal(weights(train(tmp_path)), whole)
    assert len(started) == 2
    # Another seed in the same scratch folder is another run.
    assert not torch.equal(weights(train(tmp_path, seed=4)), whole)


def test_training_refuses_what_it_cannot_learn_from():
    audio, labels = dataset(7, 8)
    labels[:4], labels[4:] = False, True
    with pytest.raises(ValueError, match="labels"):
        fj.train_family_judge([(audio, labels[:, :2])], FAMILIES, 0, SMALL)
    quiet = audio.copy()
    quiet[2] = 0
    with pytest.raises(ValueError, match=r"clips \[2\] are silent"):
        fj.train_family_judge([(quiet, labels)], FAMILIES, 0, SMALL)
    labels[:, 2] = True
    with pytest.raises(ValueError, match="noise"):
        fj.train_family_judge([(audio, labels)], FAMILIES, 0, SMALL)


def test_augmentation_keeps_shape_masks_stripes_and_follows_the_seed():
    crops = torch.randn(6, 1, 64, 250) + 5
    config = fj.JudgeConfig()

    def run(seed):
        torch.manual_seed(seed)
        return fj.augment(crops, config)

    changed = run(0)
    assert changed.shape == crops.shape
    assert torch.equal(changed, run(0))
    assert not torch.equal(changed, run(1))
    hidden = changed == 0
    assert 0 < hidden.float().mean() < 0.5
    # Outside the stripes the change is one tone curve a crop: the same in every frame.
    tone = (changed - crops).masked_fill(hidden, torch.nan)
    assert float((tone - tone.nanmean(dim=3, keepdim=True)).nan_to_num().abs().max()) < 1e-5
    assert float(tone.nan_to_num().abs().max()) <= config.tilt * 1.7
    still = replace(config, tilt=0.0, mel_mask=0, time_mask=0)
    torch.testing.assert_close(fj.augment(crops, still), crops)


def test_report_counts_silent_clips_and_one_sided_families():
    rng = np.random.default_rng(0)
    labels = np.stack([rng.random(40) < 0.5, np.ones(40, bool)], axis=1)
    scores = labels + 0.8 * rng.standard_normal((40, 2))
    scores[:4] = np.nan
    report = family_report(scores, labels, ("a", "b"), np.arange(40) // 2, 200, 1)
    assert (report["clips"], report["silent"]) == (36, 4)
    assert np.isnan([report["b"]["auroc"][key] for key in ("value", "low", "high")]).all()
    kept, truth = scores[4:, 0], labels[4:, 0]
    wins = np.sign(kept[truth][:, None] - kept[~truth][None])
    auroc = report["a"]["auroc"]
    assert auroc["value"] == pytest.approx((1 + wins.mean()) / 2)
    assert auroc["low"] < auroc["value"] < auroc["high"]
    assert report["mean_auroc"] == auroc["value"]
    assert auroc["n"] == report["b"]["auroc"]["n"] == 18  # two of the 20 groups are silent
