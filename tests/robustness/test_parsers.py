"""Parsers of foreign bytes raise documented errors only, write nothing else, and bound memory.

Every run tries the same inputs, as many as it can in five seconds per parser.
MUSICSCOPE_FUZZ_SECONDS sets another time, and draws other inputs in each run.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
import resource
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from musicscope.activations.store import ActivationStore
from musicscope.data.sources.build import SOURCES
from musicscope.data.sources.jamendo import read_tags
from musicscope.finder.recordings import plan_recordings, read_windows
from musicscope.models.registry import load_model
from tests.robustness.cases import A, B
from tests.support.dictionaries import write_planted
from tests.support.source_archives import (
    JAMENDO_HEADER,
    configured,
    encoded,
    jamendo_line,
    make_musicbench,
    tone,
)

SECONDS = float(os.environ.get("MUSICSCOPE_FUZZ_SECONDS", "5"))
START = random.SystemRandom().randrange(2**32) if "MUSICSCOPE_FUZZ_SECONDS" in os.environ else 0
"""Seed of the first inputs."""
DOCUMENTED = (ValueError, OSError)
"""UnicodeError, StoreError, JSONDecodeError and the like are ValueErrors."""
MEMORY = 3 * 2**30
"""Bytes of address space that one parser may add."""


# --- seeds, and what is made of them ----------------------------------------------------------


def mutated(seeds: list[bytes], words: list[bytes]) -> st.SearchStrategy[bytes]:
    """Draw a seed with parts overwritten, removed, repeated or swapped for `words`."""

    @st.composite
    def build(draw: st.DrawFn) -> bytes:
        data = bytearray(draw(st.sampled_from(seeds)))
        for _ in range(draw(st.integers(0, 6))):
            at = draw(st.integers(0, len(data)))
            length = draw(st.sampled_from([0, 1, 2, 4, 8, 64, len(data)]))
            part = draw(
                st.one_of(
                    st.sampled_from([b"", *words]),
                    st.binary(max_size=16),
                    st.sampled_from([0, 1, 2**7, 2**15, 2**31 - 1, 2**32 - 1]).map(
                        lambda n: struct.pack("<I", n)
                    ),
                    st.integers(0, 2**64 - 1).map(lambda n: struct.pack("<Q", n)),
                    st.just(bytes(data[at : at + length]) * 2),
                )
            )
            data[at : at + length] = part
        return bytes(data)

    return st.one_of(build(), st.binary(max_size=200))


def csv_bytes(tmp: Path) -> list[bytes]:
    return [
        b"path,caption,group,split,guitar\na.wav,a calm guitar,g,train,1\nb.wav,,h,test,0\n",
        b'"path","guitar"\r\n"a.wav","yes"\r\n',
    ]


def json_bytes(tmp: Path) -> list[bytes]:
    return [f"{A}\n{B}\n".encode()]


def tsv_bytes(tmp: Path) -> list[bytes]:
    return [(JAMENDO_HEADER + jamendo_line(1, 1, "guitar") + jamendo_line(2, 2, "piano")).encode()]


def sound_bytes(tmp: Path) -> list[bytes]:
    rows = [("WAV", 8000), ("FLAC", 8000), ("OGG", 8000), ("MP3", 16_000), ("AIFF", 8000)]
    return [encoded(tone(440, 0.6, rate), rate, form) for form, rate in rows]


def archive_bytes(tmp: Path) -> list[bytes]:
    import torch

    from tests.support.rave_export import save

    class Tiny(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    whole = save(Tiny(), tmp / "tiny.ts").read_bytes()
    plain = BytesIO()
    with zipfile.ZipFile(BytesIO(whole)) as old, zipfile.ZipFile(plain, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return [whole, plain.getvalue()]


def pickle_bytes(tmp: Path) -> list[bytes]:
    import torch

    out = BytesIO()
    torch.save({"xp.cfg": "device: cpu\n", "best_state": {"w": torch.zeros(3)}}, out)
    return [out.getvalue(), b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00id\x85R."]


def safetensors_bytes(tmp: Path) -> list[bytes]:
    import torch
    from safetensors.torch import save

    return [save({"a.weight": torch.zeros(3, 4), "b": torch.ones(2)})]


def manifest_bytes(tmp: Path) -> list[bytes]:
    return [(write_planted(tmp / "seed").folder / "manifest.json").read_bytes()]


# --- parsers ----------------------------------------------------------------------------------


settings_of = functools.cache(configured)  # reading params.yaml takes longer than parsing


def parse_labels(folder: Path, data: bytes) -> None:
    (folder / "labels.csv").write_bytes(data)
    SOURCES["folder"](settings_of("folder", folder), 0)


def parse_lines(folder: Path, data: bytes) -> None:
    (folder / "MusicBench_train.json").write_bytes(data)
    SOURCES["musicbench"](settings_of("musicbench", folder), 0)


def parse_tags(folder: Path, data: bytes) -> None:
    (folder / "tags.tsv").write_bytes(data)
    read_tags(folder / "tags.tsv")


def parse_sound(folder: Path, data: bytes) -> None:
    (folder / "with" / "x.wav").write_bytes(data)
    plan, _ = plan_recordings([folder / "with", folder / "without"], 0.5, 1)
    for recording in plan.recordings:
        if recording.side == "with":
            read_windows(recording, plan, 8000)


def parse_archive(folder: Path, data: bytes) -> None:
    (folder / "model.ts").write_bytes(data)
    load_model(folder / "model.ts")


def parse_audiocraft(folder: Path, data: bytes) -> None:
    for name in ("state_dict.bin", "compression_state_dict.bin"):
        (folder / name).write_bytes(data)
    load_model(folder)


def parse_safetensors(folder: Path, data: bytes) -> None:
    (folder / "model.safetensors").write_bytes(data)
    load_model(folder)


def parse_manifest(folder: Path, data: bytes) -> None:
    (folder / "store" / "manifest.json").write_bytes(data)
    ActivationStore.open(folder / "store")


def prepared(name: str, folder: Path, model: Path) -> None:
    """Put beside the fuzzed file what its parser needs."""
    if name == "labels.csv":
        for file in ("a.wav", "b.wav"):
            (folder / file).write_bytes(encoded(tone(440)))
    elif name == "JSON lines":
        make_musicbench(folder, clips=1)
    elif name == "WAV and MP3":
        for side in ("with", "without"):
            (folder / side).mkdir()
        (folder / "without" / "y.wav").write_bytes(encoded(tone(440, 2.0)))
    elif name == "safetensors":
        shutil.copytree(model, folder, dirs_exist_ok=True)
    elif name == "manifest":
        write_planted(folder / "store")


PARSERS: dict[str, tuple[Callable, Callable, list[bytes]]] = {
    "labels.csv": (parse_labels, csv_bytes, [b'"', b'""', b",", b"\r", b"\xff\xfe"]),
    "JSON lines": (parse_lines, json_bytes, [b'"', b"{", b"[" * 5000, b"NaN", b"\n"]),
    "TSV": (parse_tags, tsv_bytes, [b"\t", b"\n", b"track_", b"\xff\xfe"]),
    "WAV and MP3": (parse_sound, sound_bytes, [b"RIFF", b"data", b"fmt ", b"LIST", b"ID3"]),
    "TorchScript archive": (parse_archive, archive_bytes, [b"PK\x01\x02", b"../", b"code/"]),
    "audiocraft": (parse_audiocraft, pickle_bytes, [b"PK\x03\x04", b"cos\nsystem\n"]),
    "safetensors": (parse_safetensors, safetensors_bytes, [b"F32", b"[0,99]", b'"']),
    "manifest": (parse_manifest, manifest_bytes, [b'"', b"[" * 5000, b"NaN", b"null"]),
}
"""Name: parser, seeds, words."""


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times of all files below a folder."""
    return {
        str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.mark.slow
@pytest.mark.timeout(60 * 60)
@pytest.mark.parametrize("name", PARSERS)
def test_foreign_bytes_give_documented_errors_only(name, tmp_path, tiny_musicgen, monkeypatch):
    parse, seeds, words = PARSERS[name]
    (tmp_path / "seeds").mkdir()
    given_seeds = seeds(tmp_path / "seeds")
    folder, beside = tmp_path / "target", tmp_path / "beside"
    folder.mkdir()
    beside.mkdir()
    (beside / "thesis.txt").write_text("mine")
    monkeypatch.chdir(beside)
    prepared(name, folder, tiny_musicgen)
    target = set(contents(folder))
    end, tried = time.monotonic() + SECONDS, 0
    before = contents(beside)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))

    @settings(max_examples=100, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(mutated(given_seeds, words))
    def fuzz(data: bytes) -> None:
        nonlocal tried
        if time.monotonic() > end:
            return
        tried += 1
        with contextlib.suppress(*DOCUMENTED):
            parse(folder, data)

    try:
        for number in itertools.count(START):
            if time.monotonic() > end:
                break
            seed(number)(fuzz)()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        print(f"{name}: {tried} inputs in {SECONDS:.0f} s, last seed {number}")
    assert contents(beside) == before
    extra = set(contents(folder)) - target
    assert len(extra) <= 2, extra  # the fuzzed file itself
    assert tried
