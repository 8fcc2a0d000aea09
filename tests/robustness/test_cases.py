"""Every row of the table in cases.py gives what the row says."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from musicscope.activations.store import ActivationStore
from musicscope.commands import cli
from musicscope.config import load_params
from musicscope.core.user_outputs import new_folder
from musicscope.data.sources.build import SOURCES
from musicscope.data.sources.jamendo import read_tags
from musicscope.finder.recordings import plan_recordings
from musicscope.models.registry import load_model
from tests.conftest import ROOT
from tests.robustness.cases import CASES, put
from tests.support.dictionaries import write_planted
from tests.support.source_archives import configured, encoded, make_musicbench, tone

ERRORS = (ValueError, OSError)
"""What code may raise on bad input: `run_program` shows the message as it is."""


def option(words: tuple[str, ...], folder: Path) -> None:
    cli.main(words)


def params(change: tuple[str, Any], folder: Path) -> Any:
    key, value = change
    tree = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    *sections, last = key.split(".")
    inner = tree
    for name in sections:
        inner = inner[name]
    inner[last] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    found = load_params(folder / "params.yaml")
    for name in key.split("."):
        found = getattr(found, name)
    return found


def params_file(data: bytes, folder: Path) -> Any:
    (folder / "params.yaml").write_bytes(data)
    return load_params(folder / "params.yaml")


def labels(data: bytes, folder: Path) -> tuple[bool | None, ...]:
    for name in ("a.wav", "b.wav"):
        (folder / name).write_bytes(encoded(tone(440)))
    (folder / "labels.csv").write_bytes(data)
    scan = SOURCES["folder"](configured("folder", folder), 0)
    return tuple(r.labels["guitar"] for r in sorted(scan.recordings, key=lambda r: r.name))


def json_lines(data: bytes, folder: Path) -> tuple[str, ...]:
    make_musicbench(folder, clips=1)
    (folder / "MusicBench_train.json").write_bytes(data)
    scan = SOURCES["musicbench"](configured("musicbench", folder), 0)
    return tuple(r.name for r in scan.recordings if "ZZZ" not in r.name)


def tsv(data: bytes, folder: Path) -> tuple[int, ...]:
    (folder / "tags.tsv").write_bytes(data)
    return tuple(track.track for track in read_tags(folder / "tags.tsv")[0])


def sound(data: bytes, folder: Path) -> float:
    for name, content in (("with", data), ("without", encoded(tone(440, 2.0)))):
        (folder / name).mkdir()
        (folder / name / "x.wav").write_bytes(content)
    plan, problems = plan_recordings([folder / "with", folder / "without"], 10.0, 1)
    if problems:
        raise ValueError("; ".join(" ".join(p.texts()) for p in problems))
    return plan.recordings[0].seconds


def manifest(change: Callable | bytes | None, folder: Path) -> None:
    path = write_planted(folder / "store").folder / "manifest.json"
    if change is None:
        path.unlink()
    else:
        content = change(json.loads(path.read_text())) if callable(change) else change
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    ActivationStore.open(path.parent)


def shard(change: Callable[[bytes], bytes] | None, folder: Path) -> None:
    store = write_planted(folder / "store").folder
    path = sorted(store.glob("shard-*.bin"))[-1]
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    ActivationStore.open(store)


def archive(content: dict[str, bytes] | bytes | None, folder: Path) -> None:
    path = folder / "model.ts"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        with zipfile.ZipFile(path, "w") as file:
            for name, data in content.items():
                file.writestr(name, data)
    load_model(path)


def output(path: str, folder: Path) -> str:
    for name in ("empty", "full", "input"):
        (folder / name).mkdir()
    put(folder, {"full/thesis.txt": b"mine", "file": b"mine", "input/a": b"mine"})
    (folder / "broken").symlink_to("nothing")
    (folder / "circle").symlink_to("circle")
    with new_folder(path, inputs={"the model": "input"}) as out:
        (out.scratch / "result").touch()
        return str(out.publish())


KINDS: dict[str, Callable[[Any, Path], Any]] = {
    "option": option, "params": params, "params file": params_file, "labels": labels,
    "json lines": json_lines, "tsv": tsv, "sound": sound, "manifest": manifest, "shard": shard,
    "archive": archive, "output": output,
}  # fmt: skip


@pytest.fixture
def checkpoint(tiny_musicgen) -> Callable[[dict[str, bytes | None], Path], None]:
    def load(files: dict[str, bytes | None], folder: Path) -> None:
        shutil.copytree(tiny_musicgen, folder / "model")
        put(folder / "model", files)
        load_model(folder / "model")

    return load


def test_the_table_is_large_and_names_no_row_twice():
    assert len(CASES) >= 120
    assert max(Counter(map(str, CASES)).values()) == 1


@pytest.mark.parametrize("case", CASES, ids=lambda case: re.sub(r"[^ -~]", "?", str(case))[:80])
def test_bad_and_odd_inputs(case, tmp_path, monkeypatch, capsys, request):
    monkeypatch.chdir(tmp_path)
    act = KINDS.get(case.kind) or request.getfixturevalue(case.kind)
    before = everything(tmp_path.parent)
    found, said, status = None, None, 0
    try:
        found = act(case.input, tmp_path)
    except SystemExit as stop:
        said, status = capsys.readouterr().err, stop.code
    except ERRORS as error:
        said = str(error)
    assert status == (2 if case.kind == "option" else 0)
    assert status == 0 or said.count("\n") == 1
    assert everything(tmp_path.parent) == before  # nothing outside
    if isinstance(case.expected, str) and case.kind != "output" or said is not None:
        assert said is not None, f"no error, but {found!r}"
        assert re.search(str(case.expected), said), said
    elif case.expected is not None:
        assert found == case.expected


def everything(folder: Path) -> set[str]:
    """Names beside the folder of the test."""
    return {p.name for p in folder.iterdir()}
