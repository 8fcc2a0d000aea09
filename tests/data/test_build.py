"""Data sets to clip stores: streaming, what is skipped, killed runs, several processes, stems."""

from __future__ import annotations

import io
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from musicscope.config import RecordingLimits
from musicscope.data import clips
from musicscope.data.clips import ClipStore, known_labels, main_clips
from musicscope.data.sources import archives, build, stems
from musicscope.data.sources.archives import ArchiveError
from musicscope.data.sources.build import measure
from musicscope.data.sources.recordings import Audio
from tests.support.source_archives import (
    PARAMS,
    bench_row,
    configured,
    encoded,
    make_describer_csv,
    make_describer_parquet,
    make_jamendo,
    make_musicbench,
    member,
    tone,
    write_lines,
)


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Partial runs and four clips a shard stay in the test's own folder."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "dvc"))
    monkeypatch.setattr(clips, "SHARD_BYTES", 4 * 2 * 4000)


def tree(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_musicbench_to_a_store(tmp_path, capsys):
    files = make_musicbench(tmp_path / "bench")
    config = configured("musicbench", tmp_path / "bench")
    build.write_recordings(tmp_path / "clips", config, seed=0)
    assert "17 recordings out of 0.0 GB in 1 archives; at most 17 clips" in capsys.readouterr().err
    store = ClipStore.open(tmp_path / "clips")
    store.verify()
    assert (len(store), store.sample_rate, store.samples) == (17, 8000, 4000)
    assert [f"datashare/{name}" for name in store.rows["recording"]] == list(files)
    for row in (0, 5, 16):  # audio i is that of row i
        pcm = np.frombuffer(files[f"datashare/{store.rows['recording'][row]}"][44:], "<i2")
        np.testing.assert_allclose(store.audio([row])[0], pcm / 32768, atol=2e-4)
    # Copies stay with their clip; three splits, one of them the data set's own test.
    assert (store.rows.groupby("group")["split"].nunique() == 1).all()
    assert list(store.rows["recording"][store.select(split="test")]) == ["data/ZZZZZZZZZZZ.wav"]
    assert len(main_clips(store.rows, "validation")) == 2
    assert store.rows["has_guitar"].dtype == bool  # all known: as in the embedded set
    assert store.rows["has_guitar"].tolist()[:4] == [False, False, True, True]
    metrics = measure(store, seed=0)
    assert metrics["labels"]["guitar"] | {"with_train": 0, "with_validation": 0} == {
        "with": 9, "without": 8, "unknown": 0, "with_train": 0, "with_validation": 0,
        "with_test": 1,
    }  # fmt: skip
    assert metrics["skipped"] == 0
    assert metrics["source_rates"] == {"8000": 17}
    assert set(metrics["inputs"]) == {
        "MusicBench_train.json", "MusicBench_test_A.json", "MusicBench_test_B.json",
        "MusicBench.tar.gz",
    }  # fmt: skip
    assert "Bass guitar is bass" in metrics["label_rule"]
    assert metrics["trivial_cue_auroc"]["clips"].keys() == {
        "rms", "centroid", "bandwidth", "rolloff", "flatness", "zero_crossings", "crest",
    }  # fmt: skip
    left = {p.name for p in (tmp_path / "clips").iterdir()}
    assert left == {"clips.parquet", "manifest.json", "recordings.json", "skipped.csv"} | {
        f"audio-{i:05d}.npy" for i in range(5)
    }


def hostile_bench(folder: Path) -> None:
    """A tar with every kind of bad entry between good ones, and rows that ask for them."""
    folder.mkdir(parents=True)
    good = [f"data/good{i:07d}.wav" for i in range(6)]
    bad = {
        "data/zerobytes01.wav": b"", "data/truncated01.wav": encoded(tone(400))[:3000],
        "data/webpage0001.wav": b"<html>gone</html>",
        "data/silent00001.wav": encoded(tone(1, level=0)),
        "data/short000001.wav": encoded(tone(400, 0.1)),
        "data/fast0000001.wav": encoded(tone(400, 0.5, 44100), 44100),
        "data/linked00001.wav": b"", "data/missing0001.wav": b"",
    }  # fmt: skip
    rows = [bench_row(n, "Guitar." if i % 2 else "Pop.") for i, n in enumerate([*good, *bad])]
    write_lines(folder / "MusicBench_train.json", rows)
    write_lines(folder / "MusicBench_test_A.json", [bench_row("data/testclip001.wav")])
    with tarfile.open(folder / "MusicBench.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as tar:

        def put(
            name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
        ) -> None:
            info = member(name, data, kind)
            info.linkname = link
            tar.addfile(info, io.BytesIO(data))

        put("datashare", kind=tarfile.DIRTYPE)
        put("datashare/._AppleDouble.wav", b"x")
        put("../../data/good0000000.wav", encoded(tone(999)))  # would match by its last two parts
        put("/data/good0000001.wav", encoded(tone(999)))
        put("datashare/data/linked00001.wav", kind=tarfile.SYMTYPE, link="/etc/passwd")
        put("datashare/data/fifo.wav", kind=tarfile.FIFOTYPE)
        for i, name in enumerate(good):
            put(f"datashare/{name}", encoded(tone(300 + i)))
        for name, data in bad.items():
            if "linked" not in name and "missing" not in name:
                put(f"datashare/{name}", data)
        put("datashare/data/good0000000.wav", encoded(tone(999)))  # a second copy
        put("datashare/data/testclip001.wav", encoded(tone(500)))
        put("..\\..\\evil.wav", b"x")


def test_bad_entries_are_counted_and_named_and_write_nothing_outside(tmp_path):
    hostile_bench(tmp_path / "in" / "bench")
    config = configured("musicbench", tmp_path / "in" / "bench", validation_share=0.4)
    build.write_recordings(tmp_path / "out" / "clips", config, seed=1)
    store = ClipStore.open(tmp_path / "out" / "clips")
    assert list(store.rows["recording"]) == [
        *(f"data/good{i:07d}.wav" for i in range(6)), "data/fast0000001.wav",
        "data/testclip001.wav",
    ]  # fmt: skip
    first = np.abs(np.fft.rfft(store.audio([0])[0])).argmax() * 2
    assert first == 300  # neither of the two false copies
    metrics = measure(store, seed=1)
    named = {reason: entry["names"] for reason, entry in metrics["skipped_by_reason"].items()}
    assert named == {
        "unsafe path": ["../../data/good0000000.wav", "/data/good0000001.wav", "..\\..\\evil.wav"],
        "not a regular file": ["datashare/data/linked00001.wav", "datashare/data/fifo.wav"],
        "not in the metadata": ["datashare/._AppleDouble.wav"],
        "twice in the archive": ["datashare/data/good0000000.wav"],
        "zero bytes": ["data/zerobytes01.wav"],
        "truncated": ["data/truncated01.wav"],
        "not audio": ["data/webpage0001.wav"],
        "silent": ["data/silent00001.wav"],
        "too short": ["data/short000001.wav"],
        "missing": ["data/linked00001.wav", "data/missing0001.wav"],
    }
    assert metrics["skipped"] == sum(map(len, named.values())) == 14
    assert metrics["source_rates"] == {"8000": 10, "44100": 1}
    lines = (tmp_path / "out/clips/skipped.csv").read_text().splitlines()
    assert len(lines) == 15
    assert not list(tmp_path.rglob("evil*"))
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out", "dvc"}
    assert {p.name for p in (tmp_path / "in").rglob("*.wav")} == set()
    # "Pop." lists no instrument: unknown, which is neither with nor without.
    has = store.rows["has_guitar"]
    assert has.isna().tolist() == [True, False] * 3 + [False, False]
    known, guitar = known_labels(store.rows, "guitar", np.arange(6))
    assert (known.tolist(), guitar.tolist()) == ([1, 3, 5], [True, True, True])
    assert not set(store.select(has_guitar=False)) & set(np.flatnonzero(has.isna()))
    assert not set(store.select(has_guitar=True)) & set(np.flatnonzero(has.isna()))
    with pytest.raises(ValueError, match="NA|missing"):
        has.to_numpy(bool)  # forgetting the unknown is loud


class Killed(Exception):
    pass


# 13 files, in this order: six good ones of 3 clips, four bad ones, one of 1 clip, two of 3; four
# clips a shard. A run that dies at a file decodes again from the one its last shard ended in.
@pytest.mark.parametrize(("after", "again"), [(1, 13), (3, 11), (9, 8), (12, 3)])
def test_a_killed_run_goes_on_and_gives_the_same_bytes(tmp_path, monkeypatch, after, again):
    monkeypatch.setattr(clips, "SHARD_BYTES", 4 * 2 * 800)
    hostile_bench(tmp_path / "bench")
    config = configured("musicbench", tmp_path / "bench", validation_share=0.4, windows=3)
    config = replace(config, seconds=0.1)
    build.write_recordings(tmp_path / "unbroken", config, seed=1)
    whole, left = build.decode_job, [after]

    def dying(job):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return whole(job)

    monkeypatch.setattr(build, "decode_job", dying)
    with pytest.raises(Killed):
        build.write_recordings(tmp_path / "broken", config, seed=1)
    assert not (tmp_path / "broken").exists()
    left[0] = again
    build.write_recordings(tmp_path / "broken", config, seed=1)
    assert left[0] == 0
    assert tree(tmp_path / "broken") == tree(tmp_path / "unbroken")
    assert not list((tmp_path / "dvc").rglob("*.npy"))


def test_limits_stop_reading_when_all_is_found(tmp_path, monkeypatch):
    make_musicbench(tmp_path / "bench")
    few = RecordingLimits(train=2, validation=1, test=1)
    config = configured("musicbench", tmp_path / "bench", limits=few)
    build.write_recordings(tmp_path / "clips", config, seed=0)
    store = ClipStore.open(tmp_path / "clips")
    assert store.rows["split"].value_counts().to_dict() == {"train": 2, "validation": 1, "test": 1}
    assert measure(store, 0)["skipped"] == 0  # not wanted is not skipped


def test_processes_do_not_change_the_bytes(tmp_path):
    make_musicbench(tmp_path / "bench", clips=4)
    config = configured("musicbench", tmp_path / "bench")
    for processes in (1, 2):
        build.write_recordings(tmp_path / f"clips{processes}", config, 0, processes)
    assert tree(tmp_path / "clips1") == tree(tmp_path / "clips2")


def test_a_tar_is_read_once_forward_and_held_a_file_at_a_time(tmp_path, monkeypatch):
    files = make_musicbench(tmp_path / "bench")
    config = configured("musicbench", tmp_path / "bench")
    scan = build.prepare(config, seed=0)
    opened = tarfile.open
    modes, tars = [], []

    def watched(*args, **kwargs):
        modes.append(kwargs["mode"])
        tars.append(opened(*args, **kwargs))
        return tars[-1]

    monkeypatch.setattr(tarfile, "open", watched)
    items = archives.stream(scan.audio, scan.recordings, scan.listed, whole=True)
    names = []
    for item in items:
        names.append(item.recording.name)
        assert len(tars[0].members) <= 1
        assert item.read() == files[f"datashare/{item.recording.name}"]
    assert modes == ["r|*"]
    assert [f"datashare/{n}" for n in names] == list(files)


def test_an_archive_that_was_cut_is_an_error_that_names_it(tmp_path):
    make_musicbench(tmp_path / "bench")
    tar = tmp_path / "bench" / "MusicBench.tar.gz"
    whole = tar.read_bytes()
    config = configured("musicbench", tmp_path / "bench")
    for data in (whole[: len(whole) // 2], b"no tar at all" * 99, b""):
        tar.write_bytes(data)
        with pytest.raises(ArchiveError, match=r"MusicBench\.tar\.gz.*download it again"):
            build.write_recordings(tmp_path / "clips", config, seed=0)


def test_extracted_musicbench_equals_the_tar(tmp_path):
    files = make_musicbench(tmp_path / "bench", clips=4)
    config = configured("musicbench", tmp_path / "bench")
    build.write_recordings(tmp_path / "tar", config, seed=0)
    (tmp_path / "bench" / "MusicBench.tar.gz").unlink()
    for name, data in files.items():
        path = tmp_path / "bench" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    build.write_recordings(tmp_path / "folder", config, seed=0)
    a, b = (ClipStore.open(tmp_path / name) for name in ("tar", "folder"))
    order = [list(b.rows["id"]).index(name) for name in a.rows["id"]]
    np.testing.assert_array_equal(a.audio(range(len(a))), b.audio(order))


def test_song_describer_from_parquet_folder_and_zip(tmp_path):
    make_describer_parquet(tmp_path / "parquet")
    make_describer_csv(tmp_path / "csv")
    make_describer_csv(tmp_path / "zip")
    with zipfile.ZipFile(tmp_path / "zip" / "audio.zip", "w") as archive:
        archive.writestr("audio/../../evil.mp3", b"x")
        for path in sorted((tmp_path / "zip/audio").rglob("*.mp3")):
            archive.writestr(path.relative_to(tmp_path / "zip").as_posix(), path.read_bytes())
            path.unlink()
    stores = []
    for name in ("parquet", "csv", "zip"):
        config = configured("song_describer", tmp_path / name, min_share=0.5)
        build.write_recordings(tmp_path / f"clips-{name}", config, seed=0)
        stores.append(ClipStore.open(tmp_path / f"clips-{name}"))
    one, two, three = stores
    assert sorted(one.rows["id"]) == [f"songdescriber-{n}" for n in range(11, 16)]
    for other in (two, three):
        np.testing.assert_array_equal(one.audio(range(5)), other.audio(range(5)))
        assert list(one.rows["caption"]) == list(other.rows["caption"])
    assert list(one.rows["captions"][0]) == ["Piano with a nylon guitar.", "A slow piano ballad."]
    assert measure(three, 0)["skipped_by_reason"]["unsafe path"]["names"] == [
        "audio/../../evil.mp3"
    ]
    assert not list(tmp_path.rglob("evil*"))


def test_jamendo_cuts_several_windows_a_track(tmp_path):
    make_jamendo(tmp_path, suffix=".low.mp3")
    config = configured("mtg_jamendo", tmp_path, windows=2, audio_suffix=".low.mp3")
    build.write_recordings(tmp_path / "clips", config, seed=0)
    store = ClipStore.open(tmp_path / "clips")
    assert len(store) == 12
    assert list(store.rows["id"][:3]) == [
        "jamendo-01_1-000", "jamendo-01_1-001", "jamendo-02_1002-000",
    ]  # fmt: skip
    assert store.rows["start"][1] - store.rows["start"][0] == pytest.approx(1.0, abs=0.05)
    assert store.rows["has_guitar"].isna().sum() == 2


def test_a_folder_of_stems_replaces_the_mixes(tmp_path):
    make_musicbench(tmp_path / "bench", clips=2)
    made = {
        "data/00_ABCDE_00.wav": "data/00_ABCDE_00.flac",
        "data_aug2/00_ABCDE_00_1.wav": "00_ABCDE_00_1/no_vocals.wav",
        "data/01_ABCDE_01.wav": "01_ABCDE_01.wav",
        "data/ZZZZZZZZZZZ.wav": "ZZZZZZZZZZZ/no_vocals.wav",
    }
    for i, name in enumerate(made.values()):
        path = tmp_path / "stems" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(tone(2000 + 100 * i), form="FLAC" if "flac" in name else "WAV"))
    config = configured(
        "musicbench", tmp_path / "bench", stems="folder", stems_folder=str(tmp_path / "stems")
    )
    build.write_recordings(tmp_path / "clips", config, seed=0)
    store = ClipStore.open(tmp_path / "clips")
    peaks = np.abs(np.fft.rfft(store.audio(range(len(store))))).argmax(1) * 2
    found = dict(zip(store.rows["recording"], peaks.tolist(), strict=True))
    assert found == {name: 2000 + 100 * i for i, name in enumerate(made)} | found
    assert set(found) == set(made)
    assert measure(store, 0)["skipped_by_reason"]["missing"]["names"] == [
        "data_aug2/01_ABCDE_01_1.wav"
    ]
    # A stem that fits two recordings is used for neither.
    scan = build.prepare(config, 0)
    first, second = scan.recordings[0], scan.recordings[2]
    twice = replace(second, name=f"other/{PurePosixPath(first.name).name}")
    (tmp_path / "empty").mkdir()
    found = stems.from_folder(replace(scan, recordings=(first, twice)), str(tmp_path / "empty"))
    assert found.recordings == ()
    assert [p.reason for p in found.problems[-2:]] == ["ambiguous stem"] * 2
    with pytest.raises(ValueError, match="same audio file by name"):
        list(archives.stream(scan.audio, (first, first), frozenset(), whole=True))
    with pytest.raises(FileNotFoundError, match="stems_folder"):
        stems.from_folder(build.prepare(replace(config, recordings=replace(
            config.recordings, stems="none")), 0), "")  # fmt: skip


def test_a_stub_separator_changes_the_audio_and_the_scratch(tmp_path):
    make_musicbench(tmp_path / "bench", clips=2)
    config = configured("musicbench", tmp_path / "bench", stems="demucs")
    build.write_recordings(tmp_path / "a", config, 0, 2, separate=lambda audio, rate: audio / 2)
    plain = replace(config, recordings=replace(config.recordings, stems="none"))
    build.write_recordings(tmp_path / "b", plain, 0)
    a, b = ClipStore.open(tmp_path / "a"), ClipStore.open(tmp_path / "b")
    np.testing.assert_allclose(2 * a.audio(range(5)), b.audio(range(5)), atol=1e-4)


def test_nothing_usable_is_an_error_that_says_why(tmp_path):
    make_musicbench(tmp_path / "bench", clips=3)
    config = configured("musicbench", tmp_path / "bench", audio=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"prepare_data\.recordings\.audio"):
        build.write_recordings(tmp_path / "clips", config, seed=0)
    (tmp_path / "empty").mkdir()
    config = configured("musicbench", tmp_path / "bench", audio=str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="no clip came out for split train; left out: missing 7"):
        build.write_recordings(tmp_path / "clips", config, seed=0)


def test_a_broken_parquet_names_itself(tmp_path):
    make_describer_parquet(tmp_path)
    path = tmp_path / "data/train-00000-of-00002-aa.parquet"
    items = archives.stream(Audio("parquet", (path,)), (), frozenset(), whole=True)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(ArchiveError, match="train-00000"):
        list(items)
    pq.write_table(pa.table({"track_id": [1], "path": ["x.mp3"]}), path)
    items = archives.stream(Audio("parquet", (path,)), (), frozenset(), whole=True)
    with pytest.raises(ArchiveError, match=r"train-00000.* no audio"):
        list(items)


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """The stage in a folder of six recordings, mine/."""
    from stages import prepare_data

    (tmp_path / "mine").mkdir()
    for i in range(6):
        (tmp_path / f"mine/{i}.wav").write_bytes(encoded(tone(300 + i)))
    rows = "".join(f"{i}.wav,{i % 2}\n" for i in range(6))
    (tmp_path / "mine/labels.csv").write_text("path,guitar\n" + rows)
    params = yaml.safe_load(PARAMS.read_text(encoding="utf-8"))
    section = params["prepare_data"]
    section["source"], section["seconds"] = "folder", 0.5
    section["recordings"] |= {"folder": "mine", "sample_rate": 8000}
    params["compute"]["processes"] = 1
    params["maximize_activation"] |= {"seconds": 0.4, "window_seconds": 0.1}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stages.prepare_data"])
    return prepare_data


def test_the_stage_makes_a_store_and_metrics_from_a_folder(stage):
    stage.main()
    store = ClipStore.open("data/clips")
    assert store.rows["has_guitar"].tolist() == [False, True] * 3
    metrics = yaml.safe_load(Path("metrics/prepare_data.json").read_text())
    assert metrics["labels"]["guitar"]["with"] == 3
    assert metrics["labels"]["piano"]["unknown"] == 6
    assert metrics["copies"] == {
        "identical": 0, "near_identical": 0, "groups_joined": 0, "clips_moved": 0,
        "clips_left_out": 0, "leaks": 0,
    }  # fmt: skip


def broken_table(root: Path) -> str:
    (root / "mine/labels.csv").write_bytes("path,caption\n0.wav,Z\xfcrich\n".encode("cp1252"))
    return r"mine/labels\.csv, line 2: byte 0xfc is not UTF-8 .*save the file as UTF-8"


def no_folder(root: Path) -> str:
    (root / "mine").rename(root / "moved")
    return r"prepare_data\.recordings\.folder: mine is no folder"


def table_is_a_folder(root: Path) -> str:
    (root / "mine/labels.csv").unlink()
    (root / "mine/labels.csv").mkdir()
    return r"mine/labels\.csv is no file"


@pytest.mark.parametrize("spoil", [broken_table, no_folder, table_is_a_folder])
def test_bad_inputs_of_the_stage_are_named(stage, tmp_path, spoil):
    message = spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        stage.main()
    assert "\n" not in str(caught.value)


def test_cut_files_are_used_and_named_in_the_metrics(stage, tmp_path):
    (tmp_path / "mine/0.wav").write_bytes(encoded(tone(300, 2.0))[:20_000])
    stage.main()
    metrics = yaml.safe_load(Path("metrics/prepare_data.json").read_text())
    assert metrics["truncated_but_used"] == {
        "count": 1, "names": [["0.wav", "20000 of 32044 bytes"]],
    }  # fmt: skip
    assert metrics["skipped"] == 0
