"""Files and folders are whole or absent; scratch folders have one user at a time."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from musicscope.core.io import atomic_dir, atomic_file, publish_dir, scratch_dir, scratch_path
from tests.conftest import ROOT
from tests.support.locks import holder, python

KEY = {"stage": "test"}

WORK = """
import sys, time
from pathlib import Path
from musicscope.core.io import publish_dir, scratch_dir
with scratch_dir({"stage": "test"}) as folder:
    steps = folder / "out" / "steps"
    steps.parent.mkdir(exist_ok=True)
    done = len(steps.read_text()) if steps.exists() else 0
    print("from", done, flush=True)
    for step in range(done, 5):
        with open(steps, "a") as stream:
            stream.write("x")
        print(step, flush=True)
        time.sleep(float(sys.argv[1]))
    while len(sys.argv) > 2 and not Path(sys.argv[2]).exists():
        time.sleep(0.01)
    publish_dir(folder / "out", "made")
"""


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))


def test_the_second_of_two_processes_waits_and_says_for_what_and_both_end_well():
    first = python(WORK, "0", "may-end")
    assert first.stdout.readline() == "from 0\n"
    second = python(WORK, "0")
    said = second.stderr.readline()
    Path("may-end").touch()
    folder = scratch_path(KEY)
    assert said == f"waiting for process {first.pid}: it works in {folder} ({folder}.lock)\n"
    for process in (first, second):
        _, error = process.communicate()
        assert (process.returncode, error) == (0, "")
    assert Path("made/steps").read_text() == "xxxxx"


def test_a_killed_holder_frees_the_lock_and_its_work_goes_on():
    first = python(WORK, "60")
    assert [first.stdout.readline() for _ in range(2)] == ["from 0\n", "0\n"]
    second = python(WORK, "0")
    assert "waiting for process" in second.stderr.readline()
    first.kill()
    first.wait()
    out, error = second.communicate(timeout=20)
    assert (second.returncode, error) == (0, "")
    assert out.startswith("from 1\n")
    assert Path("made/steps").read_text() == "xxxxx"


def test_a_folder_that_its_holder_removed_is_made_again():
    with holder(KEY) as first:
        second = python(WORK, "0")
        assert "waiting for" in second.stderr.readline()
        first.communicate("finish\n")
        out, _ = second.communicate(timeout=20)
    assert out.startswith("from 0\n")
    assert second.returncode == 0


def test_forked_children_that_outlive_the_holder_do_not_keep_the_lock():
    code = """
import os, time
from musicscope.core.io import scratch_dir
with scratch_dir({"stage": "test"}):
    if child := os.fork():
        print(child, flush=True)
    time.sleep(60)
"""
    first = python(code)
    child = int(first.stdout.readline())
    first.kill()
    first.wait()
    second = python(WORK, "0")
    second.communicate(timeout=20)
    assert second.returncode == 0
    os.kill(child, signal.SIGKILL)


def test_one_process_may_take_its_lock_again_and_keeps_it():
    with scratch_dir(KEY) as folder:
        with scratch_dir(KEY) as same:
            assert same == folder
        second = python(WORK, "0")
        assert "waiting for" in second.stderr.readline()
    second.communicate(timeout=20)
    assert second.returncode == 0


STAGE = """
import sys, time
from pathlib import Path
sys.argv = ["steer", *sys.argv[1:]]
from stages import run_stage
def main():
    print("begins", flush=True)
    seconds = float(sys.argv[2])
    time.sleep(seconds)
run_stage(main)
"""


def test_a_stage_runs_once_at_a_time_and_other_models_meanwhile():
    first = python(STAGE, "small", "60")
    assert first.stdout.readline() == "begins\n"
    other = python(STAGE, "medium", "0")
    assert other.communicate(timeout=20)[0] == "begins\n"
    second = python(STAGE, "small", "60")
    assert "it runs steer small 60" in second.stderr.readline()
    first.kill()
    first.wait()
    assert second.stdout.readline() == "begins\n"
    second.send_signal(signal.SIGINT)
    assert second.communicate(timeout=20)[1] == "\nsteer: stopped\n"
    assert second.returncode == 130


WRITES = """
import sys
from musicscope.core import io
sys.argv = ["probe", "small"]
from stages import run_stage
def main():
    with io.atomic_dir("data/codes") as folder:
        io.write_json(folder / "a.json", 1)
        (folder / "b").write_bytes(bytes(1_200_000))
    io.write_json("metrics/probe.json", 2)
    io.write_json("elsewhere.json", 3)
run_stage(main)
"""


def test_a_stage_ends_with_one_line_of_what_it_wrote(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}")
    monkeypatch.chdir(tmp_path)
    text = python(WRITES).communicate(timeout=20)[1]
    assert text == "probe small: 0 s; data/codes (2 files, 1.2 MB), metrics/probe.json\n"


def sources() -> list[Path]:
    return [p for folder in ("src", "stages") for p in sorted((ROOT / folder).rglob("*.py"))]


def test_no_code_works_in_scratch_without_the_lock():
    caches = {"activations/token_cache", "features/baselines", "stages/download_model"}
    for path in sources():
        name = str(path.relative_to(ROOT).with_suffix("")).removeprefix("src/musicscope/")
        if name == "core/io":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        words = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        words |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        assert name == "core/distributed" or "scratch_path" not in words, path
        imported = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        if any(n.module == "musicscope.core.io" and a.name == "cache_dir"
               for n in imported for a in n.names):  # fmt: skip
            # Files are added whole, and nothing is removed under another process.
            assert name in caches, path
            assert "rmtree" not in words, path
        texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
        assert not [t for t in texts if isinstance(t, str) and t.startswith(".dvc/tmp/partial")]


@pytest.mark.parametrize("path", sorted((ROOT / "stages").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_every_stage_starts_under_its_lock(path):
    (last,) = [
        node.body for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.If)
    ]  # fmt: skip
    assert [ast.unparse(line) for line in last] == ["run_stage(main)"]


# --- files and folders ------------------------------------------------------------------------


def test_what_killed_writers_left_is_removed_and_live_ones_stay(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = os.uname().nodename
    (tmp_path / f".a.{host}-{dead.pid}.tmp.json").write_text("torn")
    (tmp_path / f".a.{host}-{os.getppid()}.tmp.json").write_text("alive")
    (tmp_path / ".a.elsewhere-1.tmp.json").write_text("another machine's")
    (tmp_path / f".a.{host}-mine.tmp.json").write_text("no process")
    with atomic_file(tmp_path / "a.json") as temporary:
        temporary.write_text("new")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["a.json", ".a.elsewhere-1.tmp.json", f".a.{host}-{os.getppid()}.tmp.json",
         f".a.{host}-mine.tmp.json"]
    )  # fmt: skip
    (tmp_path / ".made.tmp").mkdir()
    (tmp_path / ".made.tmp" / "torn").touch()
    with atomic_dir(tmp_path / "made") as folder:
        assert list(folder.iterdir()) == []
    assert not (tmp_path / ".made.tmp").exists()


@pytest.mark.parametrize("kind", ["a link", "a file"])
def test_a_link_or_a_file_is_not_replaced_by_a_folder(tmp_path, kind):
    elsewhere = tmp_path / "disk"
    elsewhere.mkdir()
    (elsewhere / "thesis.txt").write_text("mine")
    out = tmp_path / "out"
    if kind == "a link":
        out.symlink_to(elsewhere)
    else:
        out.write_text("mine")
    refusal = f"out is {kind}, but the stage writes a folder"
    with pytest.raises(ValueError, match=refusal), atomic_dir(out):
        raise AssertionError("the work began")
    made = tmp_path / "made"
    made.mkdir()
    with pytest.raises(ValueError, match=f"out is {kind}"):
        publish_dir(made, out)
    assert out.is_symlink() or out.read_text() == "mine"
    assert (elsewhere / "thesis.txt").read_text() == "mine"
    assert sorted(p.name for p in elsewhere.iterdir()) == ["thesis.txt"]


def test_scratch_of_other_inputs_is_another_folder():
    assert scratch_path(KEY) != scratch_path({"stage": "other"})
    begin = time.monotonic()
    with holder(KEY), scratch_dir({"stage": "other"}):
        assert time.monotonic() - begin < 20
