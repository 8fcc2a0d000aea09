"""Small data sets of invented rows in the on-disk layouts of the real ones."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from musicscope.config import PrepareData, load_params

RATE = 8000
PARAMS = Path(__file__).parents[2] / "params.yaml"


def configured(source: str, folder: Path, **recordings: object) -> PrepareData:
    """The committed section with another source, half-second clips at 8 kHz."""
    config = load_params(PARAMS).prepare_data
    settings = replace(
        config.recordings, folder=str(folder), sample_rate=RATE, **recordings
    )  # fmt: skip
    return replace(config, source=source, seconds=0.5, recordings=settings)


def tone(hertz: float, seconds: float = 0.5, rate: int = RATE, level: float = 0.3) -> np.ndarray:
    """A sine, float32 [samples]."""
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(
        np.float32
    )


def encoded(audio: np.ndarray, rate: int = RATE, form: str = "WAV") -> bytes:
    """A whole file; wav as 16-bit PCM."""
    out = io.BytesIO()
    soundfile.write(out, audio, rate, format=form, subtype="PCM_16" if form == "WAV" else None)
    return out.getvalue()


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data), kind
    return info


def write_tar(path: Path, files: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            tar.addfile(member(name, data), io.BytesIO(data))


def bench_row(location: str, caption: str = "A calm piano piece.", **other: object) -> dict:
    """One row of MusicBench with its sixteen keys."""
    return {
        "dataset": "MusicBench", "location": location, "main_caption": caption,
        "alt_caption": caption, "prompt_aug": "", "prompt_ch": "The chord sequence is Am, F.",
        "prompt_bt": "The beat counts to 4.", "prompt_bpm": "The tempo is Andante.",
        "prompt_key": "The key is A minor.", "beats": [[0.5, 1.1], [1.0, 2.0]], "bpm": 100.0,
        "chords": ["Am", "F"], "chords_time": [0.46, 2.3], "key": ["A", "minor"],
        "keyprob": [0.82], "is_audioset_eval_mcaps": False, **other,
    }  # fmt: skip


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_musicbench(folder: Path, clips: int = 8, release: str = "new") -> dict[str, bytes]:
    """`clips` train clips, each with one augmented copy, and one test clip; returns the tar's
    files in order."""
    folder.mkdir(parents=True, exist_ok=True)
    train = []
    files = {}
    for i in range(clips):
        base = f"{i:02d}_ABCDE_{i:02d}"[:11]  # ids have underscores too
        caption = "An acoustic guitar plays." if i % 2 else "A calm piano piece."
        for name, hertz in ((f"data/{base}.wav", 200 + 10 * i), (f"data_aug2/{base}_1.wav", 700)):
            train.append(bench_row(name, caption))
            files[f"datashare/{name}"] = encoded(tone(hertz + i))
    test = [bench_row("data/ZZZZZZZZZZZ.wav", "A guitar.")]
    files["datashare/data/ZZZZZZZZZZZ.wav"] = encoded(tone(900))
    names = {"new": ("test_A", "test_B"), "old": ("testA", "testB")}[release]
    if release == "old":
        train = [{k: v for k, v in r.items() if k != "is_audioset_eval_mcaps"} for r in train]
    write_lines(folder / "MusicBench_train.json", train)
    for name in names:
        controlled = name == names[1]
        rows = [r | {"main_caption": r["main_caption"] + " In A minor."} for r in test]
        write_lines(folder / f"MusicBench_{name}.json", rows if controlled else test)
    write_tar(folder / "MusicBench.tar.gz", files)
    return files


DESCRIBER_ROWS = [
    # caption_id, track_id, caption, valid, familiarity, artist_id, album_id
    (1, 11, "A slow piano ballad.", False, 1, 101, 201),
    (2, 11, "Piano with a nylon guitar.", True, 2, 101, 201),
    (3, 12, "Drums and synthesizer, no guitar.", True, 0, 101, 202),
    (4, 13, "Heavy metal.", True, 5, 103, 203),
    (5, 14, "A string quartet.", True, 3, 104, 204),
    (6, 15, "A bass guitar and drums.", True, 3, 105, 205),
]


def make_describer_parquet(folder: Path) -> None:
    """renumics' layout: the audio is embedded in the column called path."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    columns = {
        "caption_id": pa.int64(), "track_id": pa.int64(), "caption": pa.string(),
        "is_valid_subset": pa.bool_(), "familiarity": pa.int64(), "artist_id": pa.int64(),
        "album_id": pa.int64(), "path": pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        "duration": pa.float64(), "__index_level_0__": pa.int64(),
    }  # fmt: skip
    rows = [
        (*row, {"bytes": encoded(tone(200 + 50 * row[1]), form="MP3"), "path": "../../x.mp3"},
         0.5, i)
        for i, row in enumerate(DESCRIBER_ROWS)
    ]  # fmt: skip
    table = pa.table(
        {n: pa.array([r[i] for r in rows], t) for i, (n, t) in enumerate(columns.items())}
    )
    pq.write_table(table.slice(0, 4), folder / "data/train-00000-of-00002-aa.parquet")
    pq.write_table(table.slice(4), folder / "data/train-00001-of-00002-bb.parquet")


def make_describer_csv(folder: Path) -> None:
    """Zenodo's layout: 00/<id>.mp3 in the CSV is audio/00/<id>.2min.mp3 on disk."""
    lines = [
        "caption_id,track_id,caption,is_valid_subset,familiarity,artist_id,album_id,path,duration"
    ]
    for i, track, caption, valid, familiarity, artist, album in DESCRIBER_ROWS:
        path = f"{track % 100:02d}/{track}"
        target = folder / "audio" / f"{path}.2min.mp3"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(encoded(tone(200 + 50 * track), form="MP3"))
        flag = "True" if valid else ""
        lines.append(
            f'{i},{track},"{caption}",{flag},{familiarity},{artist},{album},{path}.mp3,120.0'
        )
    (folder / "song_describer.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def jamendo_line(track: int, artist: int, *tags: str) -> str:
    """One row as it stands on disk: tab columns, one a tag, CRLF."""
    path = f"{track % 100:02d}/{track}.mp3"
    columns = [f"track_{track:07d}", f"artist_{artist:06d}", "album_000001", path, "211.1"]
    return "\t".join([*columns, *(f"instrument---{t}" for t in tags)]) + "\r\n"


JAMENDO_HEADER = "TRACK_ID\tARTIST_ID\tALBUM_ID\tPATH\tDURATION\tTAGS\r\n"


def make_jamendo(folder: Path, split: int = 0, suffix: str = ".mp3") -> None:
    """Two tracks per part of one split, in a clone of the repository with audio beside it."""
    tables = {
        "train": [(1, 1, "guitar", "voice"), (1002, 2, "acousticbassguitar", "drums")],
        "validation": [(3, 3, "electricguitar"), (4, 4, "piano")],
        "test": [(15, 105, "classicalguitar", "flute"), (16, 106, "orchestra", "harp")],
    }
    for part, rows in tables.items():
        path = folder / f"data/splits/split-{split}/autotagging_instrument-{part}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((JAMENDO_HEADER + "".join(jamendo_line(*r) for r in rows)).encode())
        for track, *_ in rows:
            target = folder / f"audio/{track % 100:02d}/{track}{suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(encoded(tone(100 + 7 * track, 2.0), form="MP3"))
