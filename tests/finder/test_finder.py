"""The finder finds what was planted, and nothing where nothing is, whatever the files are like."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
import yaml

from musicscope.commands import cli
from musicscope.config import ParamsError, load_params
from musicscope.core.io import read_json
from musicscope.data.taxonomy import FAMILIES
from musicscope.dictionaries.core import ModelWeights, TopKSAE, UniversalSAE
from musicscope.finder.evaluation import concept_sets, examine, select_query
from musicscope.finder.recordings import plan_recordings, read_windows
from musicscope.finder.run import Subject, find_all, find_concept, rank_sound
from tests.support.planted import Store, clip_rows, find_concept_section
from tools.import_closure import ROOT

RATE, HOP, BANDS = 16_000, 320, 40
WIDTH_HZ = 50.0 * 2  # two bins of a 20-ms spectrum a band
CONCEPT = 17
OFFER = [b for b in range(2, 30) if b != CONCEPT]


class BandModel:
    """A model whose activation is the loudness of each 100-Hz band: gain shows if not made even."""

    name, sample_rate = "planted", RATE

    def encode(self, audio, captions):
        assert len(captions) == len(audio)
        return torch.as_tensor(audio)

    def capture(self, batch, names):
        frames = batch[:, : batch.shape[1] // HOP * HOP].unflatten(1, (-1, HOP))
        bins = torch.fft.rfft(frames * torch.hann_window(HOP)).abs()[..., 1 : 2 * BANDS + 1]
        return {names[0]: bins.unflatten(2, (BANDS, 2)).sum(3)}


def dictionary():
    eye = torch.eye(BANDS)
    return TopKSAE(eye, torch.zeros(BANDS), eye, torch.zeros(BANDS), k=8)


def tone(band, seconds, rate):
    """A tone in the middle of a band, so that resampling does not move it out."""
    return np.sin(2 * np.pi * (band + 0.75) * WIDTH_HZ * np.arange(int(seconds * rate)) / rate)


def recording(rng, concept, seconds, rate, gain=1.0):
    """Three random tones that come and go; the concept in the second half of the first 2 s."""
    out = 0.01 * rng.standard_normal(int(seconds * rate))
    for band in rng.choice(OFFER, 3, replace=False):
        wave = tone(band, seconds, rate)
        turns = rng.uniform(0.2, 1) * np.arange(len(wave)) / rate + rng.random()
        out += wave * (np.sin(2 * np.pi * turns) > 0)
    if concept:
        out[int(rate) : int(2 * rate)] += tone(CONCEPT, 1.0, rate)
    return (0.1 * gain * out).astype(np.float32)


FORMATS = [("wav", 44100), ("flac", 22050), ("ogg", 48000), ("wav", 16000), ("mp3", 32000)]


def folder(path, seed, concept, n=10, seconds=(4.0, 7.0), gain=1.0, formats=FORMATS, **writing):
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True)
    for i in range(n):
        ending, rate = formats[i % len(formats)]
        audio = recording(rng, concept, rng.uniform(*seconds), rate, gain)
        if i % 3 == 0:
            audio = np.stack([audio, 0.5 * audio], 1)
        soundfile.write(path / f"{i:02d}.{ending}", audio, rate, **writing)
    return path


def find(with_, without, **options):
    options = {"seconds": 2.0, "windows": 2, "permutations": 499, "draws": 20, **options}
    features = options.pop("features", dictionary())
    return find_concept(BandModel(), features, with_, without, "bands", **options)


def test_the_usual_value_of_a_feature_is_its_mean_where_it_fires(found):
    with_, without, report = found
    usual = report.usual["sae"]
    row = report.table.set_index("feature").loc[CONCEPT]
    # The concept sounds for one second of up to four that are heard: it is higher where it fires.
    assert usual[CONCEPT] > 1.5 * row["mean_with"]
    assert (usual >= 0).all()


def test_a_single_sound_is_ranked_by_what_is_above_the_training_clips(tmp_path):
    alone = folder(tmp_path / "alone", 1, True, n=1, formats=[("wav", RATE)])
    flat, ones = np.zeros(BANDS), np.ones(BANDS)
    options = {"seconds": 2.0, "windows": 2, "audible": 2, "moments": 1}
    report = rank_sound(BandModel(), dictionary(), alone, "bands", flat, ones, **options)
    mean = dict(zip(report.table["feature"], report.table["mean"], strict=True))
    assert report.table["excess"].tolist() == sorted(report.table["mean"], reverse=True)
    assert CONCEPT in mean
    assert len(report.excerpts) == 2
    # What the training clips have as much of is not of this sound; the concept is left.
    typical = np.array([0.0 if b == CONCEPT else mean.get(b, 0.0) for b in range(BANDS)])
    report = rank_sound(BandModel(), dictionary(), alone, "bands", typical, ones, **options)
    assert report.table["feature"].tolist() == [CONCEPT]
    (alone / "00.wav").write_bytes(b"no audio")
    with pytest.raises(ValueError, match="no usable recording"):
        rank_sound(BandModel(), dictionary(), alone, "bands", flat, ones)


# --- folders ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    with_ = folder(root / "with", 1, True)
    (with_ / "broken.wav").write_bytes((with_ / "00.wav").read_bytes()[:5000])
    (with_ / "noise.flac").write_bytes(bytes(range(256)) * 40)
    (with_ / "notes.txt").write_text("not audio")
    (with_ / "empty.wav").write_bytes(b"")
    (with_ / ".hidden").write_text("never looked at")
    (with_ / "sub").mkdir()
    soundfile.write(with_ / "sub/silent.wav", np.zeros(5 * RATE), RATE)
    soundfile.write(with_ / "sub/click.wav", np.ones(100), RATE)
    without = folder(root / "without", 2, False)
    return with_, without, find(with_, without, moments=2, audible=1)


def test_the_planted_feature_is_found_in_any_format(found):
    report = found[2]
    best = report.table.iloc[0]
    assert best["feature"] == CONCEPT
    assert (best["auroc"], best["stability"]) == (1.0, 1.0)
    assert best["q"] <= 0.05
    assert best["p"] <= best["q"]
    assert best["mean_with"] > 10 * best["mean_without"]
    # A tone that begins is heard in the bands beside it too, and in no others.
    assert set(report.discoveries()["feature"]) <= {CONCEPT - 1, CONCEPT, CONCEPT + 1}
    assert report.recordings == {"with": 10, "without": 10}
    assert f"{len(report.discoveries())} of {len(report.table)} features found" in report.text()
    assert not report.confounding.warns
    assert "as well as the best feature" not in report.text()


def test_files_of_no_use_are_named_with_the_reason(found):
    with_, _, report = found
    left = {p.name.removeprefix(f"{with_}/"): p.reason for p in report.problems}
    assert left == {
        "broken.wav": "truncated", "noise.flac": "not audio", "notes.txt": "not audio",
        "empty.wav": "zero bytes", "sub/silent.wav": "silent", "sub/click.wav": "too short",
    }  # fmt: skip
    for name in left:
        assert f"left out: {with_}/{name}" in report.text()


def test_moments_are_where_the_concept_sounds(found):
    report = found[2]
    assert report.moments["feature"].tolist() == [CONCEPT, CONCEPT]
    assert report.moments["recording"].nunique() == 2
    assert report.moments["seconds"].between(0.98, 2.0).all()
    assert (np.diff(report.moments["value"]) <= 0).all()
    for name in report.moments["file"]:
        audio = report.excerpts[name]
        frames = BandModel().capture(torch.as_tensor(audio[None]), ["x"])["x"][0]
        assert int(frames.amax(0).argmax()) == CONCEPT or float(frames[:, CONCEPT].max()) > 10


def test_loudness_of_a_folder_changes_nothing(found, tmp_path):
    with_, without, _ = found
    # In floating point, or the level would change what is left of the samples too.
    a, b = (
        folder(tmp_path / name, 5, True, formats=[("wav", 16000)], gain=gain, subtype="FLOAT")
        for name, gain in (("a", 1.0), ("b", 0.02))
    )
    first, second = find(a, without), find(b, without)
    assert len(first.discoveries())
    # The other folder is as loud as the first, so that only the second is confounded.
    assert not first.confounding.warns
    assert second.confounding.warns
    assert "warning: loudness separates the two sides as well as" in second.text()
    pd.testing.assert_frame_equal(first.table, second.table, rtol=1e-3)
    # And where nothing is to be found, a quiet folder is no finding.
    quiet = folder(tmp_path / "quiet", 6, False, gain=0.02)
    assert len(find(quiet, without).discoveries()) == 0


def test_length_of_recordings_is_no_finding(tmp_path):
    """Long recordings have steadier means and later frames: both are kept out of the comparison."""
    long = folder(tmp_path / "long", 7, False, n=12, seconds=(14.0, 20.0), formats=[("wav", 16000)])
    short = folder(tmp_path / "short", 8, False, n=12, seconds=(0.9, 1.4), formats=[("wav", 16000)])
    report = find(long, short, windows=8)
    assert report.plan.windows == 1
    assert 0.9 <= report.plan.seconds <= 1.4
    assert len(report.discoveries()) == 0
    assert "nothing to find" in report.text()
    # The same lengths with something to find.
    plan, _ = plan_recordings((long, short), 10.0, 8)
    shapes = {read_windows(r, plan, RATE)[0].shape for r in plan.recordings}
    assert shapes == {(1, round(plan.seconds * RATE))}


def test_windows_are_equal_in_number_and_spread(tmp_path):
    a = folder(tmp_path / "a", 9, False, n=4, seconds=(9.0, 9.1), formats=[("wav", 8000)])
    b = folder(tmp_path / "b", 10, False, n=4, seconds=(6.2, 6.3), formats=[("wav", 8000)])
    plan, problems = plan_recordings((a, b), 2.0, 8)
    assert (plan.windows, plan.seconds, problems) == (3, 2.0, [])
    audio, starts, _ = read_windows(plan.recordings[0], plan, RATE)
    assert audio.shape == (3, 2 * RATE)
    np.testing.assert_allclose(starts, [0.5, 3.5, 6.5], atol=0.1)
    np.testing.assert_allclose([np.sqrt((w**2).mean()) for w in audio], 0.1, rtol=0.1)


def test_copies_count_once_and_not_at_all_in_both_folders(tmp_path):
    a = folder(tmp_path / "a", 9, False, n=4, formats=[("wav", 8000)])
    b = folder(tmp_path / "b", 10, False, n=4, formats=[("wav", 8000)])
    soundfile.write(a / "again.flac", *soundfile.read(a / "01.wav"))
    shutil.copy(b / "02.wav", a / "shared.wav")
    shutil.copy(b / "02.wav", b / "zz.wav")
    plan, problems = plan_recordings((a, b), 2.0, 8)
    names = [f"{r.path.parent.name}/{r.path.name}" for r in plan.recordings]
    assert names == ["a/00.wav", "a/01.wav", "a/02.wav", "a/03.wav", "b/00.wav", "b/01.wav",
                     "b/03.wav"]  # fmt: skip
    assert [p.reason for p in problems] == ["copy"] * 4
    assert problems[0].detail == f"of {a / '01.wav'}"
    assert {p.detail for p in problems[1:]} == {"in both folders"}


def test_odd_files_and_links_are_used_or_named(tmp_path):
    """What macOS, pipes and interrupted downloads leave behind."""
    a = folder(tmp_path / "a", 9, False, n=4, formats=[("wav", 8000)], seconds=(4.0, 4.1))
    b = folder(tmp_path / "b", 10, False, n=4, formats=[("wav", 8000)], seconds=(4.0, 4.1))
    (a / "._00.wav").write_bytes(b"x")
    (a / os.fsdecode(b"caf\xe9.wav")).write_bytes(b"x")
    piped = bytearray((a / "00.wav").read_bytes())
    piped[4:8], piped[40:44] = b"\x24\xf0\xff\x7f", b"\x00\xf0\xff\x7f"  # sox, to a pipe
    (a / "00.wav").write_bytes(piped)
    (a / "01.wav").write_bytes((a / "01.wav").read_bytes()[:50_000])
    (b / "linked").symlink_to(folder(tmp_path / "c", 11, False, n=1, formats=[("wav", 8000)]))
    plan, problems = plan_recordings((a, b), 2.0, 8)
    lengths = {f"{r.path.relative_to(tmp_path)}": r.seconds for r in plan.recordings}
    assert len(lengths) == 9
    assert lengths["a/00.wav"] == pytest.approx(4.05, abs=0.06)
    assert lengths["a/01.wav"] == pytest.approx(49_956 / 16_000, abs=0.01)
    assert "b/linked/00.wav" in lengths
    assert [(p.name, p.reason) for p in problems] == [(f"{a}/caf\\udce9.wav", "unsafe path")]
    cut = next(r for r in plan.recordings if r.path.name == "01.wav" and r.path.parent == a)
    audio, _, problems = read_windows(cut, plan, RATE)
    assert len(audio) == 1
    assert [(p.reason, p.detail[-11:]) for p in problems] == [("truncated", "used so far")]


def test_cues_that_differ_between_folders_are_reported(tmp_path):
    rng = np.random.default_rng(0)
    for name, top in (("dull", 1), ("bright", 30)):
        (tmp_path / name).mkdir()
        for i in range(10):
            audio = tone(top, 2.0, RATE) + 0.1 * rng.standard_normal(2 * RATE)
            soundfile.write(tmp_path / name / f"{i}.wav", 0.1 * audio, RATE)
    report = find(tmp_path / "bright", tmp_path / "dull")
    assert report.cues["centroid"] == 1.0
    assert "rms" not in report.cues
    assert "also differ in centroid" in report.text()


def test_too_few_recordings_are_reported(tmp_path, found):
    three = folder(tmp_path / "three", 3, True, n=3)
    other = folder(tmp_path / "other", 4, False, n=3)
    report = find(three, other)
    assert report.smallest_p == pytest.approx(1 / 20)
    assert len(report.discoveries()) == 0
    assert "nothing can be found at q = 0.01" in find(three, other, q=0.01).text()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.wav").write_text("x")
    with pytest.raises(ValueError, match=r"0 usable recordings .*a\.wav: not audio"):
        find(tmp_path / "bad", other)
    with pytest.raises(FileNotFoundError, match="no folder"):
        find(tmp_path / "absent", other)


def test_a_universal_sae_is_searched_with_its_own_encoder(found):
    with_, without, report = found
    eye, zero = torch.eye(BANDS), torch.zeros(BANDS)
    order = torch.randperm(BANDS, generator=torch.Generator().manual_seed(0))
    side = ModelWeights(eye[order], zero, eye[order], zero, zero, torch.tensor(2.0))
    other = ModelWeights(eye, zero, eye, zero, zero, torch.tensor(1.0))
    usae = UniversalSAE(("other", "planted"), "top1", "usae", 8, (other, side))
    own = find(with_, without, features={"sae": dictionary(), "usae": usae})
    assert int(order[own.discoveries("usae")["feature"].iloc[0]]) == CONCEPT
    pd.testing.assert_frame_equal(own.tables["sae"].drop(columns=["p", "q"]),
                                  report.table.drop(columns=["p", "q"]))  # fmt: skip
    with pytest.raises(ValueError, match="cannot encode planted"):
        find(with_, without, features=UniversalSAE(("x",), "top1", "usae", 8, (other,)))


def test_the_command_prints_and_saves(found, tmp_path, monkeypatch, capsys):
    with_, without, report = found
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("musicscope.models.registry.load_model", lambda name, device: BandModel())
    dictionary().save("data/sae/planted/top1/seed-0", {"layer": "bands"})
    words = ["find-concept", "--model", "planted", "--with", str(with_)]
    words += ["--without", str(without), "--seconds", "2", "--windows", "2"]
    words += ["--permutations", "499", "--out", "out"]
    cli.main(words)
    printed = capsys.readouterr().out
    assert f"sae: {len(report.discoveries())} of {len(report.table)} features found" in printed
    assert read_json("out/report.json")["confounding"]["warns"] is False
    table = pd.read_csv("out/features.csv")
    assert table["feature"].iloc[0] == CONCEPT
    for name in pd.read_csv("out/moments.csv")["file"]:
        audio, rate = soundfile.read(tmp_path / "out" / name)
        assert rate == RATE
        assert len(audio) <= 3 * RATE
    Path("data/sae/planted/top1/seed-0").rename("mine")
    cli.main([*words[:-1], "other", "--sae", "mine", "--json"])
    given = json.loads(capsys.readouterr().out)
    assert pd.read_csv("other/features.csv").equals(table)
    assert [row["feature"] for row in given["found"]["sae"]] == list(
        report.discoveries()["feature"]
    )
    words[4] = str(tmp_path / "nowhere")
    with pytest.raises(SystemExit, match="nowhere is no folder"):
        cli.main(words)


# --- clips ------------------------------------------------------------------------------------


def test_queries_select_what_they_say():
    rows = clip_rows()
    rows["has_bass"] = rows["has_bass"].astype("boolean")
    rows.loc[::5, "has_bass"] = pd.NA
    main = rows["font"] == "mixed"
    test = main & (rows["split"] == "test")
    query = select_query(rows, "clips:has_guitar and not has_drums", "test")
    wanted = test & rows["has_guitar"] & ~rows["has_drums"]
    assert query.tolist() == np.flatnonzero(wanted).tolist()
    both = [select_query(rows, f"clips:{no}has_bass", "test") for no in ("", "not ")]
    assert sum(map(len, both)) == int((test & rows["has_bass"].notna()).sum())
    held = select_query(rows, "clips:has_guitar and font=fluidr3mono", "test")
    assert (rows["font"].iloc[held] == "fluidr3mono").all()
    assert len(held)
    for bad in ("clips:has_gitar", "clips:guitar", "clips:has_guitar and colour=red"):
        with pytest.raises(ValueError, match=r"no term|no column"):
            select_query(rows, bad, "test")


def test_clips_are_found_on_train_and_confirmed_on_test():
    rows = pd.concat(
        [clip_rows(24, 4, seed=s).assign(split=split)[lambda r: r["font"] == "mixed"]
         for s, split in ((0, "train"), (1, "test"))], ignore_index=True,
    )  # fmt: skip
    rows["group"] = rows["split"] + rows["group"]
    rng = np.random.default_rng(0)
    means = rng.exponential(size=(len(rows), 60))
    means[:, 7] += 3 * rows["has_guitar"].to_numpy()
    cues = pd.DataFrame({"rms": rng.random(len(rows)), "centroid": rng.random(len(rows))})
    rows["source"] = np.where(rows["group"] < "test4", "old", rows["split"])
    sets = concept_sets(rows, "clips:has_guitar", "clips:not has_guitar")
    section = find_concept_section()
    groups = rows["group"].to_numpy(str)
    table, found = examine(means, groups, sets, section, 0, "m", cues=cues)
    assert table["feature"].iloc[0] == 7
    assert found["discoveries"] == 1
    best = found["test"]["best_auroc"]
    assert best["value"] == table["test_auroc"].iloc[0] > 0.9
    assert 0.8 < best["low"] <= best["value"] <= best["high"]
    assert best["n"] == rows.loc[rows["split"] == "test", "group"].nunique()
    assert 0.4 < found["test"]["tested_auroc"] < 0.6
    assert found["few"]["any_discovery"] > 0.5
    assert found["few"]["agree"] > 0.8
    assert found["null"]["any_discovery"] <= 0.3
    assert found["null"]["discoveries"] == 0
    new = rows["source"].iloc[sets.tests["heldout_source"][0]]
    assert set(new) == {"test"}
    assert found["heldout_source"]["best_auroc"]["value"] > 0.9
    assert not found["confounding"]["warns"]
    loud = cues.assign(rms=cues["rms"] + 5 * rows["has_guitar"])
    _, found = examine(means, groups, sets, section, 0, "m", cues=loud)
    assert found["confounding"]["warns"]
    assert found["confounding"]["worst"] == "rms"
    assert found["few"]["warned"] > 0.8
    with pytest.raises(ValueError, match="share"):
        concept_sets(rows, "clips:has_guitar", "clips:has_guitar")
    assert "guitar" in FAMILIES


def test_baselines_are_examined_for_the_metrics_and_are_in_no_table(tmp_path):
    """One that lacks the concept's direction finds nothing where the SAE finds its feature."""
    rows = pd.concat(
        [clip_rows(seed=s).assign(split=split)[lambda r: r["font"] == "mixed"]
         for s, split in ((0, "train"), (1, "test"))], ignore_index=True,
    )  # fmt: skip
    rows["group"] = rows["split"] + rows["group"]
    rng = np.random.default_rng(0)
    frames = rng.exponential(size=(len(rows), 30, BANDS)).astype(np.float32)
    frames[:, :, 7] += 3 * rows["has_guitar"].to_numpy(np.float32)[:, None]

    class Clips(SimpleNamespace):
        def __len__(self) -> int:
            return len(self.rows)

    clips = Clips(
        rows=rows, samples=RATE, sample_rate=RATE, audio=lambda at: np.ones((len(at), RATE))
    )
    store = Store(frames, rows["id"].tolist())
    blind = torch.eye(BANDS)
    blind[7] = blind[8]
    lacking = TopKSAE(blind, torch.zeros(BANDS), blind, torch.zeros(BANDS), k=8)
    subject = Subject("m", clips, store, {"sae": dictionary()}, baselines={"soft": lacking})
    section = find_concept_section(few_draws=3)
    tables, metrics = find_all(subject, section, 0, tmp_path)
    ours, other = (metrics[name]["guitar"] for name in ("sae", "soft"))
    assert ours["best"]["feature"] == 7
    assert ours["discoveries"] >= 1 > other["discoveries"]
    assert ours["test"]["best_auroc"]["value"] > 0.9 > other["test"]["best_auroc"]["value"]
    assert (ours["few"]["draws"], other["few"]["any_discovery"]) == (3, None)
    assert (other["null"]["discoveries"], other["null"]["any_discovery"]) == (0, None)
    assert [set(t["dictionary"]) for t in tables] == [{"sae"}]
    for name in ("features", "moments"):
        assert set(pd.read_parquet(tmp_path / f"{name}.parquet")["dictionary"]) == {"sae"}
    alone, _ = find_all(replace(subject, baselines={}), section, 0, tmp_path)
    pd.testing.assert_frame_equal(alone[0], tables[0])


def test_params_name_concepts_as_a_list_of_sections(tmp_path):
    whole = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))

    def load(**change):
        concepts = [{"name": "a", "positive": "clips:has_bass", "negative": "b", **change}]
        tree = {**whole, "find_concept": {**whole["find_concept"], "concepts": concepts}}
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
        return load_params(tmp_path / "params.yaml").find_concept.concepts

    assert [(c.name, c.positive) for c in load()] == [("a", "clips:has_bass")]
    for change, message in (
        ({"extra": 1}, r"unknown key find_concept\.concepts\[0\]\.extra"),
        ({"name": "a b"}, r"find_concept\.concepts\[0\]\.name = 'a b' is out of range"),
        ({"positive": ["x"]}, r"find_concept\.concepts\[0\]\.positive .* wrong type"),
    ):
        with pytest.raises(ParamsError, match=message):
            load(**change)


def test_found_features_say_whether_they_return_in_other_seeds():
    seeds = pd.DataFrame(
        {"feature": [0, 1, 2], "seed_cosine": [0.9, 0.2, 0.8], "returns": [True, False, True]}
    )
    subject = Subject("m", None, None, {}, stability=seeds)
    ranked = pd.DataFrame({"feature": [2, 1, 0], "q": [0.01, 0.02, 0.5]})
    table, numbers = subject.describe(ranked, "sae", "guitar", 0.05)
    assert table["seed_cosine"].tolist() == [0.8, 0.2, 0.9]
    assert numbers == {"discoveries_returning": 1}
    table, numbers = subject.describe(ranked, "usae", "guitar", 0.05)
    assert "returns" not in table
    assert numbers == {}
