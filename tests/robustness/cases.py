"""Bad and odd inputs, and what each must give: one row per input.

A row is (kind, name, input, expected). `KINDS` in test_cases.py says what is done with the input of
a kind. A text as expected value is a pattern of the error message; any other value is the result.
`POINTS` names the rows of which the code was known to be wrong when they were written.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.source_archives import (
    JAMENDO_HEADER,
    bench_row,
    encoded,
    jamendo_line,
    tone,
)


@dataclass(frozen=True)
class Case:
    """One input and what it must give."""

    kind: str
    name: str
    input: Any
    expected: Any

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"


# --- options: words of a command line -> exit status 2 and the message ------------------------

FIND = ("find-concept", "--model", "m", "--with", "a", "--without", "b")
DRAW = ("generate", "--model", "m", "--prompt", "music")
ABOVE_0, WHOLE = "is not a number above 0", "is not a whole number at least"


def options() -> Iterator[Case]:
    rows = [
        (FIND, "--seconds", ("0", "-1", "nan", "inf", "-inf", "ten", "", "1e400", "1,5"), ABOVE_0),
        (FIND, "--windows", ("0", "-3", "1.5", "nan", "²"), WHOLE),
        (FIND, "--q", ("0", "1.5", "nan", "-0.1"), ABOVE_0 + " and at most 1"),
        (FIND, "--permutations", ("0", "many"), WHOLE),
        (FIND, "--seed", ("-1", "1e3"), WHOLE),
        (DRAW, "--seconds", ("0", "nan"), ABOVE_0),
        (DRAW, "--strength", ("nan", "inf", "much"), "is not a finite number"),
        (DRAW, "--guidance", ("nan", "-inf"), "is not a finite number"),
        (DRAW, "--features", ("0", "2.5"), WHOLE),
        (("studio",), "--port", ("0", "65536", "http"), WHOLE),
        (("plan",), "--clips", ("0", "-5"), WHOLE),
        (("plan",), "--memory", ("0", "nan", "16GB"), ABOVE_0),
        (FIND, "--device", ("gpu", "cuda:", "cuda:x", "CPU"), "is not auto, cpu, cuda or cuda"),
        (FIND, "--device", ("cuda:99", "cuda:99999999999999999999"), "is not on this machine"),
    ]  # fmt: skip
    for words, option, values, message in rows:
        for value in values:
            name = f"{words[0]} {option}={value}"
            yield Case("option", name, (*words, f"{option}={value}"), message)
    yield Case("option", "no command", (), "arguments are required: command")
    yield Case("option", "unknown command", ("dance",), "invalid choice: 'dance'")
    yield Case("option", "unknown option", (*DRAW, "--loud"), "unrecognized arguments: --loud")
    yield Case("option", "a value is missing", (*DRAW, "--seed"), "--seed: expected one argument")
    yield Case("option", "one second of a schedule", (*DRAW, "--schedule", "1"), "expected 2")


# --- keys of params.yaml: key and value -> the message, or the value --------------------------


def params() -> Iterator[Case]:
    rows = [
        ("seed", -1, "seed"), ("seed", "nan", "seed"), ("seed", 1.5, "seed"),
        ("seed", float("inf"), "seed"), ("seed", True, "seed"), ("seed", None, "seed"),
        ("train_sae.k", 0, "train_sae.k"), ("train_sae.k", -3, "train_sae.k"),
        ("train_sae.learning_rate", float("nan"), "train_sae.learning_rate"),
        ("train_sae.learning_rate", "fast", "train_sae.learning_rate"),
        ("train_sae.samples", 0, "train_sae.samples"), ("train_sae.kk", 3, "unknown key"),
        ("prepare_data.seconds", 0, "prepare_data.seconds"),
        ("prepare_data.seconds", float("inf"), "prepare_data.seconds"),
        ("prepare_data.source", "radio", "prepare_data.source"),
        ("models", [], "models"), ("models", ["a", "a"], "entry twice"),
        ("models", ["../etc"], "folder name"), ("slots", "top1", "slots"),
        ("probe.k_sparse", [4, 1], "must rise"), ("find_concept.q", 0, "find_concept.q"),
        ("compute.device", "gpu", "compute.device"), ("compute.processes", 0, "compute.processes"),
        ("compute.threads", 10**9, "compute.threads"), ("steer.bootstrap", -1, "steer.bootstrap"),
        ("steer.strengths", [], "steer.strengths"), ("ablate.kinds", ["melt"], "ablate.kinds"),
        ("train_usae", 7, "train_usae"), ("seed", "${models}", "refers to another key"),
        ("seed", 7, 7), ("models", ["nano-small"], ("nano-small",)),
    ]  # fmt: skip
    for key, value, expected in rows:
        yield Case("params", f"{key} = {value!r}", (key, value), expected)
    for name, data, message in (
        ("empty file", b"", "section of keys|is missing"),
        ("a list", b"- 1\n- 2\n", "section of keys|not readable YAML"),
        ("no YAML", b"seed: [1\n", "not readable YAML"),
        ("not UTF-8", b"seed: 1 # \xe9\n", "not readable YAML|UTF-8"),
        ("a tab", b"seed:\n\t- 1\n", "not readable YAML"),
        ("a tag that makes an object", b"seed: !!python/object/apply:os.getcwd []\n", "YAML"),
        ("a zero byte", b"seed: 1\0\n", "not readable YAML|UTF-8"),
    ):
        yield Case("params file", name, data, message)


# --- labels.csv beside a.wav and b.wav -> guitar labels, or the message -----------------------


def labels() -> Iterator[Case]:
    rows: list[tuple[str, bytes | str, Any]] = [
        ("plain", "path,guitar\na.wav,1\nb.wav,0\n", (True, False)),
        ("CRLF", "path,guitar\r\na.wav,1\r\nb.wav,0\r\n", (True, False)),
        ("old Mac line ends", "path,guitar\ra.wav,1\rb.wav,0\r", (True, False)),
        ("byte order mark", b"\xef\xbb\xbfpath,guitar\na.wav,1\n", (True, None)),
        ("UTF-16", "path,guitar\na.wav,1\n".encode("utf-16"), "UTF-8"),
        ("UTF-16 without a mark", "path,guitar\na.wav,1\n".encode("utf-16-le"), "UTF-8"),
        ("cp1252", b"path,caption\na.wav,caf\xe9\n", r"labels.csv.*UTF-8"),
        ("quoted fields", '"path","guitar"\n"a.wav","1"\n', (True, None)),
        ("unbalanced quote", 'path,caption,guitar\na.wav,"5"" tape,1\nb.wav,"x",0\n',
         r"labels.csv, lines? \d"),
        ("quote that is never closed", 'path,guitar\na.wav,"1\nb.wav,0\n', r"labels.csv"),
        ("text behind a quote", 'path,caption,guitar\na.wav,"x"y,1\n', r"labels.csv"),
        ("no header", "a.wav,1\nb.wav,0\n", "no column path"),
        ("empty", "", "no column path"),
        ("semicolons", "path;guitar\na.wav;1\n", "no column path"),
        ("tabs", "path\tguitar\na.wav\t1\n", "no column path"),
        ("misspelt column", "path,guitr\na.wav,1\n", "did you mean guitar"),
        ("column twice", "path,guitar,guitar\na.wav,1,0\n", r"guitar"),
        ("has_ column", "Path,has_guitar\na.wav,1\n", (True, None)),
        ("a label that is none", "path,guitar\na.wav,maybe\n", "guitar = 'maybe'"),
        ("a number as label", "path,guitar\na.wav,2\n", "guitar = '2'"),
        ("YES", "path,guitar\na.wav,YES\n", (True, None)),
        ("empty label", "path,guitar\na.wav,\n", (None, None)),
        ("a path twice", "path,guitar\na.wav,1\na.wav,0\n", "again"),
        ("a path twice, spelt otherwise", "path,guitar\na.wav,1\n./a.wav,0\n", "again"),
        ("unknown split", "path,split\na.wav,dev\n", "split = 'dev'"),
        ("a path outside", "path,guitar\n../a.wav,1\nb.wav,0\n", (None, False)),
        ("an absolute path", "path,guitar\n/etc/a.wav,1\nb.wav,0\n", (None, False)),
        ("backslashes", "path,guitar\n.\\a.wav,1\n", (True, None)),
        ("blanks around", "path , guitar\n a.wav , 1 \n", (True, None)),
        ("a row that is too short", "path,caption,guitar\na.wav\nb.wav,x,0\n", "labels.csv"),
        ("a row that is too long", "path,guitar\na.wav,1,0\n", "labels.csv"),
        ("no row fits a file", "path,guitar\nc.wav,1\n", "labels.csv"),
        ("zero bytes", "path,guitar\na.wav,1\0\n", "labels.csv|NUL|UTF-8"),
        ("a field of a megabyte", f"path,caption,guitar\na.wav,{'x' * 2**20},1\n",
         "labels.csv"),
    ]  # fmt: skip
    for name, text, expected in rows:
        data = text if isinstance(text, bytes) else text.encode()
        yield Case("labels", name, data, expected)


# --- MusicBench_train.json -> names of the clips, or the message ------------------------------

A, B = (json.dumps(bench_row(f"data/{c * 11}.wav")) for c in "ab")
NAMES = ("data/aaaaaaaaaaa.wav", "data/bbbbbbbbbbb.wav")


def json_lines() -> Iterator[Case]:
    rows: list[tuple[str, bytes, Any]] = [
        ("plain", f"{A}\n{B}\n".encode(), NAMES),
        ("CRLF", f"{A}\r\n{B}\r\n".encode(), NAMES),
        ("byte order mark", f"\ufeff{A}\n{B}\n".encode(), NAMES),
        ("UTF-16", f"{A}\n{B}\n".encode("utf-16"), "UTF-8"),
        ("cp1252", f"{A}\n{B}\n".replace("calm", "caf\xe9").encode("cp1252"), "UTF-8"),
        ("no line end", f"{A}\n{B}".encode(), NAMES),
        ("blank lines", f"\n\n{A}\n   \n{B}\n".encode(), NAMES),
        ("an array", f"[{A},{B}]".encode(), "JSON lines"),
        ("a row that is cut", f"{A}\n{B[:40]}".encode(), NAMES[:1]),
        ("a row that is a number", f"{A}\n7\n{B}\n".encode(), NAMES),
        ("NaN for a tempo", f"{A}\n{B}\n".replace("100.0", "NaN").encode(), NAMES),
        ("a path outside", f"{A}\n{B}\n".replace("data/b", "../b").encode(), NAMES[:1]),
        ("deep brackets", f"{A}\n{'[' * 10**5}\n{B}\n".encode(), NAMES),
        ("an integer of 5,000 digits", f"{A}\n{'9' * 5000}\n{B}\n".encode(), NAMES),
        ("U+2028 inside a caption", f"{A}\n{B}\n".replace("calm", "a\u2028b").encode(), NAMES),
        ("a lone surrogate", f"{A}\n{B}\n".replace("calm", "\\ud800").encode(), NAMES),
    ]
    for name, data, expected in rows:
        yield Case("json lines", name, data, expected)


# --- MTG-Jamendo's tag table -> numbers of the tracks, or the message -------------------------


def tsv() -> Iterator[Case]:
    one, two = jamendo_line(1, 1, "guitar"), jamendo_line(2, 2, "piano")
    rows: list[tuple[str, str | bytes, Any]] = [
        ("plain", JAMENDO_HEADER + one + two, (1, 2)),
        ("LF", (JAMENDO_HEADER + one + two).replace("\r\n", "\n"), (1, 2)),
        ("byte order mark", "\ufeff" + JAMENDO_HEADER + one + two, (1, 2)),
        ("UTF-16", (JAMENDO_HEADER + one).encode("utf-16"), "UTF-8"),
        ("not UTF-8", (JAMENDO_HEADER + one).encode() + b"\xff\xfe\n", "UTF-8"),
        ("another header", "id\tname\n" + one, "first line"),
        ("empty", "", "first line"),
        ("a row that is cut", JAMENDO_HEADER + one + two[:9], (1,)),
        ("a path outside", JAMENDO_HEADER + one + two.replace("02/2.mp3", "../2.mp3"), (1,)),
        ("no number", JAMENDO_HEADER + one + two.replace("track_0000002", "track_x"), None),
    ]
    for name, text, expected in rows:
        data = text if isinstance(text, bytes) else text.encode()
        expected = (1,) if expected is None else expected
        yield Case("tsv", name, data, expected)


# --- a file of sound -> its seconds, or the reason why it is left out -------------------------


def patched(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


def sounds() -> Iterator[Case]:
    wav, mp3 = encoded(tone(440, 1.0)), encoded(tone(440, 1.0, 16_000), 16_000, "MP3")
    flac, ogg = (encoded(tone(440, 1.0), form=f) for f in ("FLAC", "OGG"))
    data_size = wav.index(b"data") + 4
    word = lambda n: struct.pack("<I", n)  # noqa: E731
    bad = "corrupt|truncated|not audio|unusable|too short|no audio"
    rows: list[tuple[str, bytes, Any]] = [
        ("wav", wav, 1.0), ("flac", flac, 1.0), ("ogg", ogg, 1.0),
        ("empty", b"", "zero bytes"), ("one byte", b"R", "not audio|corrupt"),
        ("text", b"this is no sound\n" * 9, "not audio|corrupt"),
        ("HTML of an error page", b"<!DOCTYPE html><html>404</html>", "not audio|corrupt"),
        ("git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
         "not audio|corrupt|git-lfs"),
        ("a zip", b"PK\x03\x04" + bytes(60), "not audio|corrupt"),
        ("header alone", wav[:44], bad), ("half a header", wav[:20], bad),
        ("cut in the middle", wav[: len(wav) // 2], "truncated"),
        ("one byte is missing", wav[:-1], None),
        ("bytes behind the end", wav + bytes(100), 1.0),
        ("size fields of a pipe", patched(patched(wav, 4, word(2**32 - 1)), data_size,
                                          word(2**32 - 1)), 1.0),
        ("size fields of sox", patched(patched(wav, 4, word(0x7FFFF024)), data_size,
                                       word(0x7FFFF000)), 1.0),
        ("size fields 0", patched(patched(wav, 4, word(0)), data_size, word(0)), None),
        ("rate 0", patched(wav, 24, word(0)), bad),
        ("rate 1", patched(wav, 24, word(1)), bad),
        ("rate 4 GHz", patched(wav, 24, word(2**32 - 1)), bad),
        ("no channels", patched(wav, 22, b"\0\0"), bad),
        ("65,535 channels", patched(wav, 22, b"\xff\xff"), bad),
        ("0 bits", patched(wav, 34, b"\0\0"), bad),
        ("unknown coding", patched(wav, 20, b"\x99\x99"), bad),
        ("silence", encoded(np.zeros(8000, np.float32)), 1.0),
        ("8 samples", encoded(tone(440, 0.001)), "too short"),
        ("mp3", mp3, None), ("mp3 cut in the middle", mp3[: len(mp3) // 2], "truncated"),
        ("mp3 behind 100 zeros", bytes(100) + mp3, "not audio"),
        ("flac cut in the middle", flac[: len(flac) // 2], "truncated"),
        ("ogg cut in the middle", ogg[: len(ogg) // 2], "truncated"),
    ]  # fmt: skip
    for name, data, expected in rows:
        yield Case("sound", name, data, expected)


# --- manifest.json of an activation store -> the message --------------------------------------


def manifests() -> Iterator[Case]:
    changes: list[tuple[str, Any, str]] = [
        ("absent", None, "manifest.json is missing"),
        ("empty", b"", "not valid JSON"),
        ("cut", lambda m: json.dumps(m)[:-9].encode(), "not valid JSON"),
        ("a list", b"[]", "format"),
        ("a number", b"7", "format"),
        ("null", b"null", "format"),
        ("not UTF-8", b'{"a": "\xff"}', "manifest.json.*UTF-8"),
        ("another format", lambda m: m | {"format": "zarr"}, "format"),
        ("a later version", lambda m: m | {"format_version": 99}, "format"),
        ("another width", lambda m: m | {"width": 7}, "sha256 does not fit"),
        ("a key is missing", lambda m: {k: v for k, v in m.items() if k != "clips"}, "sha256"),
        ("other clips", lambda m: m | {"clips": {}}, "sha256 does not fit"),
        ("deep brackets", b"[" * 10**5, "not valid JSON|recursion|deep"),
        ("NaN", lambda m: json.dumps(m | {"width": float("nan")}).encode(), "JSON compliant"),
    ]
    for name, change, message in changes:
        yield Case("manifest", name, change, message)
    yield Case("shard", "absent", None, "is missing")
    yield Case("shard", "cut", lambda data: data[:-1], "bytes, expected")
    yield Case("shard", "longer", lambda data: data + b"\0", "bytes, expected")


# --- a file that is named as a TorchScript archive -> the message -----------------------------


def archives() -> Iterator[Case]:
    empty = b"\x80\x02)."  # a pickle of an empty tuple
    whole = {"m/data.pkl": empty, "m/constants.pkl": empty, "m/version": b"3", "m/code/a.py": b""}
    system = b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00id\x85R."
    rows: list[tuple[str, Any, str]] = [
        ("absent", None, "missing|no model"), ("empty", b"", "not a TorchScript archive"),
        ("text", b"no archive", "not a TorchScript archive"),
        ("git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
         "not a TorchScript archive|git-lfs"),
        ("a zip without entries", {}, "no program|not a TorchScript|not a whole"),
        ("another zip", {"readme.txt": b"hi"}, "another zip file"),
        ("a checkpoint of torch.save", {"m/data.pkl": empty, "m/version": b"3"},
         "checkpoint of torch.save"),
        ("no version", {k: v for k, v in whole.items() if "version" not in k},
         "not a whole TorchScript"),
        ("two folders", whole | {"n/data.pkl": empty}, "several top folders"),
        ("a path outside", whole | {"m/code/../../../evil.py": b""}, "does not belong"),
        ("an absolute path", whole | {"/etc/evil.py": b""}, "does not belong|several top folders"),
        ("a strange file", whole | {"m/run.sh": b"rm"}, "does not belong"),
        ("a pickle that calls os.system", whole | {"m/data.pkl": system}, "names 'os system'"),
        ("a pickle that is none", whole | {"m/data.pkl": b"\xff\xff"}, "no pickle"),
        ("an empty pickle", whole | {"m/data.pkl": b""}, "no pickle"),
        ("a program that writes files",
         whole | {"m/code/a.py": b"def f(x):\n  torch . save(x, 'y')\n"}, "reaches outside"),
        ("a program that is none", whole | {"m/code/a.py": b"def f(:\n  '"},
         "program text|cannot read"),
        ("no module", whole, "cannot read"),
    ]  # fmt: skip
    for name, content, message in rows:
        yield Case("archive", name, content, message)


# --- files put into a model's folder (None: removed) -> the message ---------------------------


def checkpoints() -> Iterator[Case]:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n"
    weights = "model.safetensors"
    header = struct.pack("<Q", 2**40) + b"{}"
    rows: list[tuple[str, dict[str, bytes | None], str]] = [
        ("no config", {"config.json": None}, "config"),
        ("config is no JSON", {"config.json": b"{"}, "config.json"),
        ("config is a list", {"config.json": b"[]"}, "config.json|model"),
        ("another model", {"config.json": b'{"model_type": "bert"}'}, "bert|MusicGen"),
        ("no weights", {weights: None}, "safetensors|weights|no file named"),
        ("weights are a git-lfs pointer", {weights: pointer}, r"model\.safetensors.*git-lfs"),
        ("weights are empty", {weights: b""}, r"model\.safetensors"),
        ("weights are text", {weights: b"404 not found\n" * 9}, r"model\.safetensors"),
        ("a header of a terabyte", {weights: header}, r"model\.safetensors"),
        ("no tokenizer", {"tokenizer.json": None, "spiece.model": None,
                          "tokenizer_config.json": None}, "tokenizer"),
    ]  # fmt: skip
    for name, files, message in rows:
        yield Case("checkpoint", name, files, message)


# --- outputs that a user names -> the message, or the name of the new folder ------------------


def outputs() -> Iterator[Case]:
    rows: list[tuple[str, str, Any]] = [
        ("a new folder", "new", "new"), ("an empty folder", "empty", "empty"),
        ("a folder with files", "full", r"full is not empty \(it holds thesis.txt\)"),
        ("a file", "file", "file is a file: give --out the name of a new folder"),
        ("below a file", "file/out", "cannot be written"),
        ("a link to nothing", "broken", "is a link to nothing"),
        ("links in a circle", "circle", "link|cannot be written"),
        ("an input", "input", "is the model, which is read"),
        ("inside an input", "input/out", "lies in the model"),
        ("above an input", ".", "holds the model|is not empty"), ("no name", "", "is no path"),
        ("a zero byte", "a\0b", "is no path"), ("300 letters", "x" * 300, "cannot be written"),
        ("a line end", "a\nb", "a\nb"),
    ]  # fmt: skip
    for name, path, expected in rows:
        yield Case("output", name, path, expected)


CASES = [
    case
    for rows in (options, params, labels, json_lines, tsv, sounds, manifests, archives,
                 checkpoints, outputs)
    for case in rows()
]  # fmt: skip


def put(folder: Path, files: dict[str, bytes | None]) -> None:
    """Write files below a folder; remove those of None."""
    for name, data in files.items():
        if data is None:
            (folder / name).unlink(missing_ok=True)
        else:
            (folder / name).write_bytes(data)
