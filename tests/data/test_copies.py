"""Clips with the same sound are found under other names, levels and codecs; other music is not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from musicscope.config import RecordingLimits
from musicscope.core.audio import resample
from musicscope.data.clips import ClipStore, write_clips
from musicscope.data.copies import Groups, correlation, count_copies, find_copies
from musicscope.data.sources import build
from musicscope.data.sources.recordings import Recording
from tests.support.source_archives import (
    RATE,
    bench_row,
    configured,
    encoded,
    tone,
    write_lines,
    write_tar,
)

SECONDS = 2.0


@cache
def music(seed: int, seconds: float = 2 * SECONDS) -> np.ndarray:
    """Random notes with four harmonics and a beat of noise, float32 at RATE Hz."""
    rng = np.random.default_rng(seed)
    out = 0.002 * rng.standard_normal(round(seconds * RATE))
    for start in np.arange(0, seconds - 0.3, 0.2):
        pitch = 110 * 2 ** (rng.integers(0, 25) / 12)
        time = np.arange(round(0.3 * RATE)) / RATE
        note = sum(np.sin(2 * np.pi * pitch * k * time + rng.random()) / k for k in range(1, 5))
        at = round(start * RATE)
        out[at : at + len(time)] += 0.1 * note * np.exp(-6 * time)
        out[at : at + 200] += 0.05 * rng.standard_normal(200)
    return out.astype(np.float32)


@dataclass(frozen=True)
class Sounds:
    """Clips in memory."""

    sounds: np.ndarray
    rows: pd.DataFrame
    sample_rate: int = RATE

    @property
    def samples(self) -> int:
        return self.sounds.shape[1]

    def __len__(self) -> int:
        return len(self.sounds)

    def audio(self, rows):
        return self.sounds[list(rows)]


def clips_of(*sounds: np.ndarray) -> Sounds:
    names = [f"g{i:03d}" for i in range(len(sounds))]
    return Sounds(np.stack(sounds), pd.DataFrame({"group": names, "split": "train"}))


N = round(SECONDS * RATE)


def through(form: str, audio: np.ndarray, tmp_path) -> np.ndarray:
    (tmp_path / "x").write_bytes(encoded(audio, form=form))
    out = soundfile.read(tmp_path / "x", dtype="float32")[0]
    return np.pad(out, (0, len(audio)))[: len(audio)]


ALTERED = {
    "level": lambda x, _: 0.1 * x,
    "polarity": lambda x, _: -x,
    "mp3": lambda x, path: through("MP3", x, path),
    "ogg": lambda x, path: through("OGG", x, path),
    "rate": lambda x, _: resample(resample(x, RATE, 11025), 11025, RATE)[: len(x)],
    "noise": lambda x, _: x + 0.002 * np.random.default_rng(0).standard_normal(len(x)),
    "shift": None,
}


@pytest.mark.parametrize("change", ALTERED)
def test_altered_copies_are_found(change, tmp_path):
    for seed in range(5):
        sound = music(seed)
        if ALTERED[change] is None:
            one, other = sound[:N], sound[N // 8 : N // 8 + N]
        else:
            one, other = sound[:N], ALTERED[change](sound, tmp_path)[:N].astype(np.float32)
        (copy,) = find_copies(clips_of(one, music(99)[:N], other), ["a", "b", "c"])
        assert (copy.first, copy.second, copy.identical) == (0, 2, False)


def test_identical_samples_are_found_at_any_length():
    short = music(0)[:200]
    found = find_copies(clips_of(short, music(1)[:200], short), ["a", "b", "c"])
    assert [(c.first, c.second, c.identical) for c in found] == [(0, 2, True)]
    assert find_copies(clips_of(short, short), ["a", "a"]) == []  # one group already


def test_other_music_is_not_the_same():
    """No false positive in 11,175 pairs: at most 2.7 in 10,000 (95 %, rule of three)."""
    sounds = [music(1000 + seed)[:N] for seed in range(150)]
    assert count_copies(clips_of(*sounds)) == {"identical": 0, "near_identical": 0, "leaks": 0}


def test_the_correlation_has_a_wide_margin():
    best, rival = correlation(music(0)[:N], -3 * music(0)[:N])
    others = [correlation(music(i)[:N], music(i + 1)[:N])[0] for i in range(30)]
    assert best == pytest.approx(1.0, abs=1e-4)
    assert max(rival, *others) < 0.6
    assert correlation(np.zeros(N), music(0)[:N]) == (0.0, 0.0)


def test_two_takes_of_a_held_note_are_not_copies_but_one_in_two_files_is(tmp_path):
    def note(seed: int) -> np.ndarray:
        noise = np.random.default_rng(seed).standard_normal(N)
        return (tone(440, SECONDS) + 0.05 * noise).astype(np.float32)

    assert find_copies(clips_of(note(1), note(2)), ["a", "b"]) == []
    again = through("MP3", tone(440, SECONDS), tmp_path)
    assert len(find_copies(clips_of(tone(440, SECONDS), again), ["a", "b"])) == 1


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=20))
@settings(max_examples=100, deadline=None)
def test_joined_groups_do_not_depend_on_the_sequence(pairs):
    names = [f"g{i}" for i in range(10)]
    results = []
    for of in (pairs, pairs[::-1]):
        joined = Groups(names)
        for i, j in of:
            joined.join(names[i], names[j])
        results.append([joined.of(name) for name in names])
    assert results[0] == results[1]
    for i, j in pairs:
        assert results[0][i] == results[0][j]


# in a store


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "dvc"))


def made(tmp_path, config, seed=0):
    build.write_recordings(tmp_path / "clips", replace(config, seconds=SECONDS), seed)
    store = ClipStore.open(tmp_path / "clips")
    store.verify()
    assert (store.rows.groupby("group")["split"].nunique() == 1).all()
    metrics = build.measure(store, seed)
    assert metrics["copies"]["leaks"] == 0
    return store, metrics


@pytest.mark.parametrize("seed", range(3))
def test_renamed_recordings_of_a_folder_share_a_split(tmp_path, seed):
    (tmp_path / "mine").mkdir()
    for i in range(12):
        form = ("WAV", "FLAC", "OGG", "MP3")[i % 4]
        (tmp_path / f"mine/a{i:02d}.wav").write_bytes(encoded(music(i), form="WAV"))
        (tmp_path / f"mine/copy{i:02d}.{form.lower()}").write_bytes(encoded(music(i), form=form))
    store, metrics = made(tmp_path, configured("folder", tmp_path / "mine"), seed)
    rows = store.rows.set_index("recording")
    for i in range(12):
        a, copy = rows.loc[f"a{i:02d}.wav"], rows[rows.index.str.startswith(f"copy{i:02d}")].iloc[0]
        assert (a["group"], a["split"]) == (copy["group"], copy["split"])
    assert len(rows) == 24
    assert metrics["copies"] | {"clips_moved": 0} == {
        "identical": 3, "near_identical": 9, "groups_joined": 12, "clips_moved": 0,
        "clips_left_out": 0, "leaks": 0,
    }  # fmt: skip
    for name in ("a00.wav", "copy00.wav"):
        audio = store.audio([list(store.rows["recording"]).index(name)])[0]
        np.testing.assert_allclose(audio, music(0)[N // 2 : N // 2 + N], atol=2e-4)


def bench(folder, limits=RecordingLimits(train=0, validation=0, test=0)):  # noqa: B008
    folder.mkdir()
    names = [f"data/{i:02d}CDEFGHIJK.wav" for i in range(8)]
    files = {f"datashare/{n}": encoded(music(i)) for i, n in enumerate(names)}
    files["datashare/data/testclip001.wav"] = encoded(music(3) * 0.5)  # is train's number 3
    write_lines(folder / "MusicBench_train.json", [bench_row(n) for n in names])
    write_lines(folder / "MusicBench_test_A.json", [bench_row("data/testclip001.wav")])
    write_tar(folder / "MusicBench.tar.gz", files)
    return configured("musicbench", folder, limits=limits)


def test_a_copy_of_a_data_sets_own_test_clip_leaves_train(tmp_path):
    store, metrics = made(tmp_path, bench(tmp_path / "bench"))
    assert len(store) == 8
    assert "data/03CDEFGHIJK.wav" not in set(store.rows["recording"])
    assert metrics["skipped_by_reason"] == {
        "copy of a clip in another split": {"count": 1, "names": ["data/03CDEFGHIJK.wav"]}
    }
    assert (metrics["copies"]["near_identical"], metrics["copies"]["clips_left_out"]) == (1, 1)
    left = (tmp_path / "dvc/.dvc/tmp/partial").iterdir()
    assert [p.name for p in left if p.suffix != ".lock"] == []


GROUPS = st.lists(
    st.tuples(
        st.sampled_from(build.SPLITS), st.booleans(), st.lists(st.integers(0, 7), max_size=3)
    ),
    min_size=1,
    max_size=6,
)


@given(GROUPS, st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_sound_is_in_two_splits_whatever_the_copies(tmp_path_factory, groups, limited):
    folder = tmp_path_factory.mktemp("store")
    rows, sounds, recordings = [], [], []
    for number, (split, fixed, has) in enumerate(groups):
        for i, sound in enumerate(has):
            name = f"{number}-{i}"
            rows.append({"id": name, "group": f"g{number}", "split": split, "recording": name})
            sounds.append(music(sound, 0.5)[:50])
            recordings.append(Recording(name, name, name, "", split, {}, fixed=split * fixed))
    if not rows:
        return
    write_clips(folder, zip(sounds, rows, strict=True), RATE, 50)
    limits = RecordingLimits(train=0, validation=0, test=int(limited))
    kept, counts, problems = build.keep_apart(folder, recordings, limits)
    store = ClipStore.open(kept)
    after = store.rows.assign(sound=[x.tobytes() for x in store.audio(range(len(store)))])
    assert (after.groupby("group")["split"].nunique() == 1).all()
    assert (after.groupby("sound")["group"].nunique() == 1).all()
    before = {r["id"]: (r["split"], r["group"]) for r in rows}
    moved = [r for r in after.to_dict("records") if r["split"] != before[r["id"]][0]]
    assert len(moved) == counts["clips_moved"]
    assert not any(dict((r.name, r.fixed) for r in recordings)[m["id"]] for m in moved)
    assert not (limited and any(m["split"] == "test" for m in moved))
    assert len(after) + counts["clips_left_out"] == len(rows)
    assert len(problems) == counts["clips_left_out"]
    assert {r["id"] for r in rows if r["split"] == "test"} <= set(after["id"])


def test_a_run_killed_while_copies_are_taken_out_goes_on(tmp_path, monkeypatch):
    config = bench(tmp_path / "bench")
    made(tmp_path, config)
    whole = {p.name: p.read_bytes() for p in (tmp_path / "clips").iterdir()}

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "write_report", killed)
    with pytest.raises(KeyboardInterrupt):
        build.write_recordings(tmp_path / "clips", replace(config, seconds=SECONDS), 0)
    monkeypatch.undo()
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "dvc"))
    made(tmp_path, config)
    assert {p.name: p.read_bytes() for p in (tmp_path / "clips").iterdir()} == whole
