"""Each data set's layout on disk: a test a trap, on small copies with invented rows."""

from __future__ import annotations

import csv
import json
import math
import os
import unicodedata
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from musicscope.config import RecordingLimits
from musicscope.core.io import read_text
from musicscope.data.sources import folder, musicbench
from musicscope.data.sources.build import prepare
from musicscope.data.sources.jamendo import read_tags, scan_mtg_jamendo, scan_song_describer
from musicscope.data.sources.recordings import (
    Recording,
    assign_splits,
    last_two,
    limit,
    read_csv,
    unsafe,
)
from musicscope.data.taxonomy import FAMILIES
from tests.support.source_archives import (
    DESCRIBER_ROWS,
    JAMENDO_HEADER,
    bench_row,
    configured,
    encoded,
    jamendo_line,
    make_describer_csv,
    make_describer_parquet,
    make_jamendo,
    make_musicbench,
    tone,
    write_lines,
)


def by_name(scan) -> dict[str, Recording]:
    return {r.name: r for r in scan.recordings}


# MusicBench


@pytest.mark.parametrize("release", ["new", "old"])
def test_musicbench_rows_of_both_releases(tmp_path, release):
    make_musicbench(tmp_path, clips=2, release=release)
    scan = musicbench.scan(configured("musicbench", tmp_path), seed=0)
    rows = by_name(scan)
    first = rows["data_aug2/00_ABCDE_00_1.wav"]
    assert len(rows) == 5
    assert (first.group, first.split) == ("musicbench-00_ABCDE_00", "train")
    assert (first.tempo_bpm, first.music_key) == (100.0, "A minor")
    assert rows["data/ZZZZZZZZZZZ.wav"].split == "test"
    # test B repeats test A's clips with control sentences: the captions of A stay.
    assert rows["data/ZZZZZZZZZZZ.wav"].captions == ("A guitar.",)
    assert scan.facts["rows"]["rows_repeated"] == 1
    lacking = scan.facts["rows"]["rows_without_is_audioset_eval_mcaps"]
    assert lacking == (4 if release == "old" else 0)
    assert scan.facts["rows"]["rows_with_other_keys"] == 0
    assert [p.name for p in scan.audio.paths] == ["MusicBench.tar.gz"]


def test_musicbench_groups_by_eleven_characters_not_by_a_suffix(tmp_path):
    make_musicbench(tmp_path, clips=1)
    # An id that ends in _7, its copy, and another id that a regex would take for a copy of it.
    names = ["data/abcdefghi_7.wav", "data_aug2/abcdefghi_7_2.wav", "data/abcdefghi_8.wav"]
    write_lines(tmp_path / "MusicBench_train.json", [bench_row(n) for n in names])
    groups = [r.group for r in musicbench.scan(configured("musicbench", tmp_path), 0).recordings]
    assert groups[1:] == ["musicbench-abcdefghi_7", "musicbench-abcdefghi_7",
                          "musicbench-abcdefghi_8"]  # fmt: skip


def test_musicbench_train_copies_of_test_clips_are_left_out(tmp_path):
    make_musicbench(tmp_path, clips=1)
    rows = [bench_row("data_aug2/ZZZZZZZZZZZ_3.wav"), bench_row("data/abcdefghijk.wav")]
    write_lines(tmp_path / "MusicBench_train.json", rows)
    scan = musicbench.scan(configured("musicbench", tmp_path), seed=0)
    assert [r.name for r in scan.recordings] == ["data/ZZZZZZZZZZZ.wav", "data/abcdefghijk.wav"]
    assert [(p.name, p.reason) for p in scan.problems] == [
        ("data_aug2/ZZZZZZZZZZZ_3.wav", "train copy of a test clip")
    ]


def test_musicbench_rows_that_fail_in_test_still_keep_their_copies_out_of_train(tmp_path):
    make_musicbench(tmp_path, clips=1)
    copies = [bench_row(f"data_aug2/{base}_3.wav") for base in ("YYYYYYYYYYY", "XXXXXXXXXXX")]
    write_lines(tmp_path / "MusicBench_train.json", [*copies, bench_row("data/abcdefghijk.wav")])
    with (tmp_path / "MusicBench_test_B.json").open("a") as file:
        file.write('{"location": "data/YYYYYYYYYYY.wav", "main_caption": 3}\n')
        file.write('{"location": "data/XXXXXXXXXXX.wav", "main_caption": "cut sho\n')
        file.write('{"location": "data/a.wav", "location": "data/b.wav", "main_caption": "x"}\n')
    scan = musicbench.scan(configured("musicbench", tmp_path), seed=0)
    assert [r.name for r in scan.recordings] == ["data/ZZZZZZZZZZZ.wav", "data/abcdefghijk.wav"]
    assert [p.reason for p in scan.problems] == ["bad metadata row"] * 3 + [
        "train copy of a test clip"] * 2  # fmt: skip
    assert "twice" in scan.problems[2].detail


def test_musicbench_bad_rows_are_named_with_their_line(tmp_path):
    make_musicbench(tmp_path, clips=1)
    good = json.dumps(bench_row("data/abcdefghijk.wav", bpm=None, key=None, alt_caption=None))
    bad = json.dumps(bench_row("../../etc/passwd.wav"))
    text = f'{good}\n{{"location": 3}}\n\n{{"broken\n{bad}\n[1]\n'
    (tmp_path / "MusicBench_train.json").write_text(text)
    scan = musicbench.scan(configured("musicbench", tmp_path), seed=0)
    assert [(p.name, p.reason) for p in scan.problems] == [
        ("MusicBench_train.json:2", "bad metadata row"),
        ("MusicBench_train.json:4", "bad metadata row"),
        ("../../etc/passwd.wav", "unsafe path"),
        ("MusicBench_train.json:6", "bad metadata row"),
    ]
    kept = by_name(scan)["data/abcdefghijk.wav"]
    assert math.isnan(kept.tempo_bpm)
    assert kept.labels["piano"] is True
    (tmp_path / "MusicBench_train.json").write_text(f"[{good}]")
    with pytest.raises(ValueError, match="JSON lines"):
        musicbench.scan(configured("musicbench", tmp_path), seed=0)


def test_musicbench_takes_a_label_from_either_caption_and_counts_agreement(tmp_path):
    make_musicbench(tmp_path, clips=1)
    rows = [
        bench_row("data/aaaaaaaaaaa.wav", "Drums.", alt_caption="Guitar and drums."),
        bench_row("data/bbbbbbbbbbb.wav", "No guitar.", alt_caption="A guitar."),
        bench_row("data/ccccccccccc.wav", "Happy.", alt_caption="Sad."),
    ]
    write_lines(tmp_path / "MusicBench_train.json", rows)
    scan = musicbench.scan(configured("musicbench", tmp_path), seed=0)
    labels = [by_name(scan)[r["location"]].labels["guitar"] for r in rows]
    assert labels == [True, None, None]
    assert scan.facts["guitar_alternative_against_main_caption"] == {
        "agree": 1, "only_first": 2, "only_second": 0, "unknown_in_either": 1,
    }  # fmt: skip


def test_two_files_for_one_split_of_musicbench_are_an_error(tmp_path):
    make_musicbench(tmp_path, clips=1)
    (tmp_path / "train.json").write_text("")
    with pytest.raises(
        ValueError, match=r"MusicBench_train\.json and train\.json are of one split"
    ):
        musicbench.scan(configured("musicbench", tmp_path), seed=0)


def test_musicbench_that_is_not_there_names_the_key(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"prepare_data\.recordings\.folder"):
        musicbench.scan(configured("musicbench", tmp_path), seed=0)


# Song Describer


@pytest.mark.parametrize("layout", ["parquet", "csv"])
def test_song_describer_layouts_agree(tmp_path, layout):
    {"parquet": make_describer_parquet, "csv": make_describer_csv}[layout](tmp_path)
    scan = scan_song_describer(configured("song_describer", tmp_path), seed=0)
    assert scan.audio.kind == {"parquet": "parquet", "csv": "folder"}[layout]
    first, second, third, fourth, fifth = scan.recordings
    # Two captions of one track are one recording; the valid one comes first.
    assert first.captions == ("Piano with a nylon guitar.", "A slow piano ballad.")
    assert first.key == {"parquet": "11", "csv": "11/11.2min.mp3"}[layout]
    assert first.group == second.group == "jamendo-artist-101"
    assert [r.labels["guitar"] for r in scan.recordings] == [True, False, None, False, False]
    assert (fourth.labels["strings"], fifth.labels["bass"]) == (True, True)
    assert scan.facts["rows"] == {"captions": 6, "tracks": 5, "tracks_with_tags": 0}


def test_song_describer_with_tags_reports_agreement(tmp_path):
    make_describer_csv(tmp_path)
    lines = [
        jamendo_line(11, 101, "piano", "drums"),  # the caption names a guitar: present
        jamendo_line(12, 101, "guitar", "drums"),  # the caption denies it: unknown
        jamendo_line(13, 103, "electricguitar"),  # the caption names nothing: present
        jamendo_line(14, 104, "strings", "viola"),
    ]
    table = tmp_path / "song_describer.mtg-jamendo.tsv"
    table.write_bytes((JAMENDO_HEADER + "".join(lines)).encode())
    scan = scan_song_describer(configured("song_describer", tmp_path), seed=0)
    assert [r.labels["guitar"] for r in scan.recordings] == [True, None, True, False, False]
    assert scan.facts["guitar_captions_against_tags"] == {
        "agree": 1, "only_first": 1, "only_second": 1, "unknown_in_either": 1,
    }  # fmt: skip
    moved = table.rename(tmp_path / "elsewhere.tsv")
    again = scan_song_describer(configured("song_describer", tmp_path, tags=str(moved)), seed=0)
    assert again.recordings == scan.recordings


def test_song_describer_bad_rows_and_columns(tmp_path):
    make_describer_csv(tmp_path)
    table = tmp_path / "song_describer.csv"
    text = table.read_text()
    table.write_text(text + 'x,,"c",,0,1,1,00/1.mp3,1\n9,99,"c",,0,1,1,../../9.mp3,1\n')
    scan = scan_song_describer(configured("song_describer", tmp_path), seed=0)
    assert [(p.name, p.reason) for p in scan.problems] == [
        ("song_describer.csv:8", "bad metadata row"), ("../../9.mp3", "unsafe path"),
    ]  # fmt: skip
    assert len(scan.recordings) == 5
    table.write_text(text.replace("artist_id", "artist", 1))
    with pytest.raises(ValueError, match=r"lacks the columns \['artist_id'\]"):
        scan_song_describer(configured("song_describer", tmp_path), seed=0)


def test_song_describer_tracks_have_one_artist_and_tags_that_agree(tmp_path):
    make_describer_csv(tmp_path)
    lines = [jamendo_line(11, 101, "piano"), jamendo_line(11, 101, "guitar"), "bad\r\n"]
    table = tmp_path / "song_describer.mtg-jamendo.tsv"
    table.write_bytes((JAMENDO_HEADER + "".join(lines)).encode())
    scan = scan_song_describer(configured("song_describer", tmp_path), seed=0)
    assert [(p.name, p.detail) for p in scan.problems] == [
        ("song_describer.mtg-jamendo.tsv:4", "bad"),
        ("11/11.mp3", "other tags earlier in song_describer.mtg-jamendo.tsv"),
    ]
    captions = tmp_path / "song_describer.csv"
    captions.write_text(captions.read_text() + '9,11,"Piano.",True,1,999,201,11/11.mp3,120\n')
    with pytest.raises(ValueError, match="track 11 has the artists 101 and 999"):
        scan_song_describer(configured("song_describer", tmp_path), seed=0)


# MTG-Jamendo


def test_jamendo_rows_have_a_column_a_tag_and_end_in_crlf(tmp_path):
    path = tmp_path / "tags.tsv"
    bad = "track_x\tartist_1\talbum_1\t00/1.mp3\t1.0\r\ntrack_9\r\n"
    outside = jamendo_line(7, 7, "piano").replace("07/7.mp3", "../../7.mp3")
    line = jamendo_line(1, 1, "guitar", "voice").replace("\r\n", "\tgenre---rock\r\n")
    path.write_bytes((JAMENDO_HEADER + line + bad + outside).encode())
    tracks, problems = read_tags(path)
    assert [(t.track, t.artist, t.path) for t in tracks] == [(1, 1, "01/1.mp3")]
    assert tracks[0].tags == {"guitar", "voice"}  # the last tag without \r, other categories out
    assert [(p.name, p.reason) for p in problems] == [
        ("tags.tsv:3", "bad metadata row"), ("tags.tsv:4", "bad metadata row"),
        ("../../7.mp3", "unsafe path"),
    ]  # fmt: skip
    path.write_text("id\tartist\n")
    with pytest.raises(ValueError, match="first line"):
        read_tags(path)


@pytest.mark.parametrize(("split", "suffix"), [(0, ""), (3, ".low.mp3")])
def test_jamendo_splits_labels_and_small_files(tmp_path, split, suffix):
    make_jamendo(tmp_path / "jamendo", split, suffix or ".mp3")
    make_describer_parquet(tmp_path / "describer")
    config = configured(
        "mtg_jamendo", tmp_path / "jamendo", jamendo_split=split, audio_suffix=suffix,
        song_describer=str(tmp_path / "describer"),
    )  # fmt: skip
    scan = scan_mtg_jamendo(config, seed=0)
    assert [(r.split, r.labels["guitar"]) for r in scan.recordings] == [
        ("train", True), ("train", False), ("validation", True), ("validation", None),
        ("test", True), ("test", False),
    ]  # fmt: skip
    assert scan.recordings[1].labels["bass"] is True
    assert scan.recordings[1].name == "02/1002" + (suffix or ".mp3")
    assert scan.recordings[1].group == "jamendo-artist-2"
    assert scan.facts["song_describer_tracks"] == 1  # track 15, in test
    with pytest.raises(FileNotFoundError, match="split-4"):
        scan_mtg_jamendo(configured("mtg_jamendo", tmp_path / "jamendo", jamendo_split=4), 0)


def test_jamendo_overlap_with_song_describer_is_refused_or_removed(tmp_path):
    make_jamendo(tmp_path / "jamendo", split=2)
    make_describer_csv(tmp_path / "describer")
    train = tmp_path / "jamendo/data/splits/split-2/autotagging_instrument-train.tsv"
    with train.open("ab") as file:  # a track of theirs, and another one by an artist of theirs
        file.write((jamendo_line(14, 104, "viola") + jamendo_line(500, 103, "piano")).encode())
    config = configured("mtg_jamendo", tmp_path / "jamendo", jamendo_split=2)
    with pytest.raises(ValueError, match=r"prepare_data\.recordings\.song_describer"):
        scan_mtg_jamendo(config, seed=0)

    def compared(overlap: str):
        settings = replace(
            config.recordings, song_describer=str(tmp_path / "describer"), overlap=overlap
        )
        return scan_mtg_jamendo(replace(config, recordings=settings), seed=0)

    with pytest.raises(ValueError, match=r"2 tracks .*14/14\.mp3"):
        compared("refuse")
    scan = compared("remove")
    assert [(p.name, p.reason) for p in scan.problems] == [
        ("14/14.mp3", "overlap with Song Describer"), ("00/500.mp3", "overlap with Song Describer"),
    ]  # fmt: skip
    assert len(scan.recordings) == 6
    assert scan.facts["song_describer_removed"] == 2
    table = tmp_path / "describer/song_describer.csv"
    table.write_text(table.read_text() + "x,y,z\n")  # it could be any track
    with pytest.raises(ValueError, match=r"song_describer\.csv:8 cannot be read \(3 fields"):
        compared("remove")


# a user's folder


def make_folder(root, table: str = "") -> None:
    for name in ("a.wav", "b/one.flac", "b/two.ogg", "c.mp3", "a.flac"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        form = {".wav": "WAV", ".mp3": "MP3", ".ogg": "OGG", ".flac": "FLAC"}[path.suffix]
        path.write_bytes(encoded(tone(300), form=form))
    (root / "cover.jpg").write_bytes(b"\xff\xd8")
    if table:
        (root / "labels.csv").write_text(table, encoding="utf-8-sig")


def test_folder_without_a_table(tmp_path):
    make_folder(tmp_path)
    scan = folder.scan(configured("folder", tmp_path), seed=0)
    groups = {r.name: r.group for r in scan.recordings}
    assert groups == {
        "a.flac": "folder-a.flac", "a.wav": "folder-a.wav", "b/one.flac": "folder-b",
        "b/two.ogg": "folder-b", "c.mp3": "folder-c.mp3",
    }  # fmt: skip
    assert len({r.id for r in scan.recordings}) == 5
    assert {v for r in scan.recordings for v in r.labels.values()} == {None}
    assert [(p.name, p.reason) for p in scan.problems] == [("cover.jpg", "not audio")]


def test_folder_table_gives_captions_labels_groups_and_splits(tmp_path):
    make_folder(
        tmp_path,
        "path,caption,has_guitar,piano,split,artist,year\n"
        'a.wav,"A guitar, no drums",0,,train,Ann,1999\n'
        "b/one.flac,,yes,,test,Bob,\n"
        "c.mp3,Drums only,,True,,Ann,\n"
        "gone.wav,,1,,,,\n"
        "../../x.wav,,1,,,,\n",
    )
    scan = folder.scan(configured("folder", tmp_path), seed=0)
    rows = by_name(scan)
    assert rows["a.wav"].labels["guitar"] is False  # the table wins over the caption
    assert rows["a.wav"].labels["drums"] is False
    assert rows["b/one.flac"].labels["guitar"] is True
    assert rows["b/one.flac"].labels["piano"] is None
    assert rows["c.mp3"].labels == dict.fromkeys(FAMILIES, False) | {
        "piano": True, "drums": True, "choir": False,
    }  # fmt: skip
    assert (rows["a.wav"].group, rows["c.mp3"].split) == ("folder-Ann", "")
    assert [(p.name, p.reason) for p in scan.problems] == [
        ("cover.jpg", "not audio"), ("../../x.wav", "unsafe path"), ("gone.wav", "missing"),
    ]  # fmt: skip
    assert scan.facts["columns_not_used"] == "year"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("file\na.wav\n", "no column path"),
        ("path,guitr\na.wav,1\n", "did you mean guitar"),
        ("path,guitar\na.wav,maybe\n", "line 2, guitar = 'maybe'"),
        ("path,split\na.wav,dev\n", "line 2, split = 'dev'"),
        ("path\na.wav\na.wav\n", "line 3 names 'a.wav' again"),
    ],
)
def test_folder_table_with_a_mistake_names_it(tmp_path, table, message):
    make_folder(tmp_path, table)
    with pytest.raises(ValueError, match=message):
        folder.scan(configured("folder", tmp_path), seed=0)


AMBIGUOUS = {
    'path,caption,guitar\na.wav,"5"" tape,1\nc.mp3,"x",0\n': "lines? 2.*close every quote",
    'path,caption,guitar\na.wav,"5,1\nc.mp3,x",0\n': "line 2: a quoted field goes on to line 3",
    'path,caption\na.wav,"never closed\n': "close every quote",
    "path,guitar\na.wav,1,0\n": "line 2: 3 fields, but the header has 2",
    "path,caption,guitar\n\na.wav,1\n": "line 3: 2 fields, but the header has 3",
    "path,guitar,has_guitar\na.wav,1,0\n": "line 1: two columns are 'guitar'",
    "path;guitar\na.wav;1\n": "no column path.*separated by commas",
    "path\nsongs/a.wav\n": "no row fits a file, first 'songs/a.wav'",
    "path\na.wav\n./a.wav \n": "line 3 names 'a.wav' again",
}


@pytest.mark.parametrize("table", AMBIGUOUS)
def test_an_ambiguous_table_is_an_error_with_its_line(tmp_path, table):
    make_folder(tmp_path, table)
    with pytest.raises(ValueError, match=rf"labels\.csv.*{AMBIGUOUS[table]}"):
        folder.scan(configured("folder", tmp_path), seed=0)


TABLE = 'path,caption,has_guitar,artist\na.wav,"A piano, 5"" tape",1,Zoé\nb/one.flac,,no,ZOÉ\n'


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_and_byte_order_marks_change_nothing(tmp_path, end, mark):
    make_folder(tmp_path)
    text = (mark + TABLE).replace("\n", end) + ",,,\n"  # and blank rows, as Excel leaves them
    (tmp_path / "labels.csv").write_bytes(text.encode())
    rows = by_name(folder.scan(configured("folder", tmp_path), seed=0))
    assert rows["a.wav"].captions == ('A piano, 5" tape',)
    assert [rows[n].labels["guitar"] for n in ("a.wav", "b/one.flac", "c.mp3")] == [
        True, False, None,
    ]  # fmt: skip
    assert rows["a.wav"].group == rows["b/one.flac"].group == "folder-Zoé"  # one artist


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "cp1252"])
def test_text_of_another_encoding_is_an_error_with_its_line(tmp_path, encoding):
    make_folder(tmp_path)
    (tmp_path / "labels.csv").write_bytes(TABLE.encode(encoding))
    line = 2 if encoding == "cp1252" else 1
    with pytest.raises(ValueError, match=rf"labels\.csv, line {line}: .*save the file as UTF-8"):
        folder.scan(configured("folder", tmp_path), seed=0)


def test_marks_and_line_ends_lose_no_row_of_any_source(tmp_path):
    make_musicbench(tmp_path / "bench", clips=2)
    make_describer_csv(tmp_path / "describer")
    make_jamendo(tmp_path / "jamendo")
    scans = {"bench": musicbench.scan, "jamendo": scan_mtg_jamendo,
             "describer": scan_song_describer}  # fmt: skip
    for name, scan in scans.items():
        config = configured("", tmp_path / name)
        before = scan(config, 0)
        tables = [p for p in (tmp_path / name).rglob("*") if p.suffix in (".json", ".csv", ".tsv")]
        for path in tables:
            data = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
            path.write_bytes("\ufeff".encode() + data)
        after = scan(config, 0)
        assert (after.recordings, after.problems) == (before.recordings, before.problems)
        tables[0].write_bytes(tables[0].read_bytes().replace(b"a", b"\xe9", 1))
        with pytest.raises(
            ValueError, match=r", line \d: byte 0xe9 is not UTF-8.*save the file as"
        ):
            scan(config, 0)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"])), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_text_is_read_as_it_was_written(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("text") / "x.txt"
    lines = [line.strip("\ufeff") for line in lines]
    for end in ("\n", "\r\n"):
        path.write_bytes(("\ufeff" + end.join(lines)).encode())
        assert read_text(path) == "\n".join(lines)


FIELDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)


@given(st.lists(st.tuples(FIELDS, FIELDS), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_csv_is_read_as_it_was_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "x.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("one", "two"), *rows])
    expected = [tuple(f.strip() for f in row) for row in rows if any(f.strip() for f in row)]
    assert [tuple(row.values()) for _, row in read_csv(path)[1]] == expected


@given(st.text(st.sampled_from('ab,"\n\r; \t'), max_size=60))
@settings(max_examples=300, deadline=None)
def test_no_table_raises_anything_but_value_error(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("csv") / "labels.csv"
    path.write_text("path,caption\n" + text, encoding="utf-8", newline="")
    try:
        folder.read_labels(path)
    except ValueError as error:
        message = str(error)
    else:
        message = str(path)
    assert str(path) in message


def test_names_are_compared_as_a_reader_would(tmp_path):
    decomposed = unicodedata.normalize("NFD", "Café/naïve.wav")
    for name in (decomposed, "plain.wav", "Upper.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(tone(300)))
    table = "path,guitar\nCafé/naïve.wav ,1\n.\\plain.wav,0\nupper.wav,1\n"
    (tmp_path / "labels.csv").write_text(table, encoding="utf-8")
    scan = folder.scan(configured("folder", tmp_path), seed=0)
    rows = by_name(scan)
    assert (rows[decomposed].labels["guitar"], rows["plain.wav"].labels["guitar"]) == (True, False)
    ((name, reason, detail),) = [p.texts() for p in scan.problems]
    assert (name, reason) == ("upper.wav", "missing")
    assert detail == "labels.csv:4; Upper.wav has other letter case"
    (tmp_path / "Café").mkdir()
    (tmp_path / "Café/naïve.wav").write_bytes(b"x")
    assert by_name(folder.scan(configured("folder", tmp_path), seed=0))[
        "Café/naïve.wav"].labels["guitar"] is True  # fmt: skip
    (tmp_path / "labels.csv").write_text(table.replace("Café/naïve", "Café / naïve"))
    with pytest.raises(ValueError, match=r"line 2: .* could be .*rename"):
        folder.scan(configured("folder", tmp_path), seed=0)


def test_hidden_names_are_no_recordings_and_move_no_split(tmp_path):
    make_folder(tmp_path)
    before = prepare(configured("folder", tmp_path), 0)
    for name in ("._a.wav", ".DS_Store", "b/._one.flac", ".Trash/x.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / os.fsdecode(b"caf\xe9.wav")).write_bytes(b"x")
    after = prepare(configured("folder", tmp_path), 0)
    assert after.recordings == before.recordings
    assert [(p.name, p.reason) for p in after.problems if p not in before.problems] == [
        ("caf\\udce9.wav", "unsafe path")
    ]


# names, splits, limits


def test_names_that_could_lead_out():
    for name in (
        "../x",
        "a/../../x",
        "/etc/passwd",
        "..\\x",
        "C:\\x",
        "C:/x",
        "",
        "a\0b",
        "\ud800",
    ):
        assert unsafe(name), name
    for name in ("a/b.wav", "..a/b.wav", "a..wav", "12:30 song.wav", "Gruß.wav"):
        assert not unsafe(name), name
    assert last_two("datashare/data_aug2/x_1.wav") == "data_aug2/x_1.wav"


def recordings(groups: int, split: str = "", each: int = 2) -> list[Recording]:
    return [
        Recording(f"{g}/{i}", f"{g}/{i}", f"r-{g}-{i}", f"g{g}", split, {})
        for g in range(groups)
        for i in range(each)
    ]


def test_drawn_splits_keep_groups_whole_and_follow_the_seed():
    drawn = assign_splits(recordings(40), 1, 0.1, 0.2)
    sets = {s: {r.group for r in drawn if r.split == s} for s in ("train", "validation", "test")}
    # 20 % of 40 groups, then 10 % of the 32 left.
    assert {s: len(g) for s, g in sets.items()} == {"train": 29, "validation": 3, "test": 8}
    assert len(set.union(*sets.values())) == 40
    backwards = assign_splits(recordings(40)[::-1], 1, 0.1, 0.2)
    assert backwards[::-1] == drawn
    assert assign_splits(recordings(40), 2, 0.1, 0.2) != drawn


def test_given_splits_stay_and_train_gives_validation():
    given = recordings(20, "train") + [replace(r, group="t", split="test") for r in recordings(1)]
    drawn = assign_splits(given, 0, 0.1, 0.2)
    assert [r.split for r in drawn[-2:]] == ["test", "test"]
    assert len({r.group for r in drawn if r.split == "validation"}) == 2
    assert {r.split for r in drawn[:-2]} == {"train", "validation"}


def test_a_group_in_two_splits_and_too_few_groups_are_errors():
    both = [*recordings(3, "train"), *recordings(1, "test")]
    with pytest.raises(ValueError, match="group 'g0' is in splits"):
        assign_splits(both, 0, 0.1, 0.2)
    with pytest.raises(ValueError, match="no recording for split"):
        assign_splits(recordings(2), 0, 0.1, 0.2)
    assert {r.split for r in assign_splits(recordings(3), 0, 0.1, 0.2)} == {
        "train", "validation", "test",
    }  # fmt: skip


def test_limits_are_per_split_and_do_not_depend_on_order():
    drawn = assign_splits(recordings(40), 1, 0.1, 0.2)
    few = limit(drawn, RecordingLimits(train=5, validation=0, test=3), seed=1)
    count = {s: sum(r.split == s for r in few) for s in ("train", "validation", "test")}
    assert count == {"train": 5, "validation": 6, "test": 3}
    again = limit(drawn[::-1], RecordingLimits(train=5, validation=0, test=3), seed=1)
    assert {r.id for r in again} == {r.id for r in few}


def test_song_describer_splits_by_artist(tmp_path):
    make_describer_csv(tmp_path)
    scan = prepare(configured("song_describer", tmp_path), seed=3)
    assert {r.split for r in scan.recordings} == {"train", "validation", "test"}
    assert len({(r.group, r.split) for r in scan.recordings}) == 4  # artists
    assert len(DESCRIBER_ROWS) == 6
