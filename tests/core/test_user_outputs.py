"""No command replaces, changes or removes a file that was there, whatever its output is called."""

from __future__ import annotations

import ast
import contextlib
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.records import Record
from musicscope.commands import cli, generate
from musicscope.commands import find_concept as concept_command
from musicscope.core import command_line, user_outputs
from musicscope.core.io import read_json, write_json
from musicscope.core.user_outputs import OutputError, add_files, new_folder
from musicscope.dictionaries.core import TopKSAE
from musicscope.finder.confounding import Confounding
from musicscope.finder.recordings import Plan
from musicscope.finder.run import ConceptReport
from musicscope.models.audiocraft import convert as audiocraft_convert
from musicscope.steering.session import Sound
from tools.import_closure import ROOT

THESIS = b"four years of work"
FIND = ("find-concept", "--model", "m", "--with", "guitars", "--without", "others")
DRAW = ("generate", "--model", "m", "--prompt", "calm", "--on", "guitar", "--seed", "3")


# --- commands without models ------------------------------------------------------------------


def report() -> ConceptReport:
    table = pd.DataFrame({"feature": [4], "q": [0.01], "auroc": [0.9]})
    excerpts = {"sae-4-1.wav": np.zeros(80, np.float32)}
    return ConceptReport(
        {"sae": table}, table, {"with": 2, "without": 2}, (), Plan((), 1.0, 1), {},
        Confounding({}, {}, 0.9), 0.05, 0.01, excerpts, 8000,
        {"sae": np.zeros(5)},
    )  # fmt: skip


def piece() -> Sound:
    return Sound(np.linspace(-1, 1, 80, dtype=np.float32), 8000, None)


def job(args: Namespace, wishes: dict, edit: object):
    yield {"seed": 3, "seconds": 0.01, "concepts": wishes}, "calm", (piece(), piece())


def write_model(source: Path, folder: Path, *rest: object) -> None:
    (folder / "sub").mkdir()
    (folder / "sub/weights").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")


@contextlib.contextmanager
def no_models(load=lambda name, device: None):
    """The commands with their own reading and writing, but no model behind them."""
    with (
        mock.patch("musicscope.models.registry.load_model", load),
        mock.patch.object(concept_command, "find_concept", side_effect=lambda *a, **k: report()),
        mock.patch.object(generate, "_from_prompts", job),
        mock.patch.object(generate, "_judges", return_value=None),
        mock.patch.object(audiocraft_convert, "_to_audiocraft", write_model),
        mock.patch.object(audiocraft_convert, "_to_transformers", write_model),
    ):
        yield


def make_world(root: Path) -> None:
    """Recordings, a model and an SAE in a folder."""
    for name in ("guitars/sub/1.wav", "others/1.wav", "data/models/m/config.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"{}")
    eye = torch.eye(4)
    sae = TopKSAE(eye, torch.zeros(4), eye, torch.zeros(4), k=2)
    sae.save(root / "data/sae/m/top1/seed-0", {"layer": "layers.1"})


@pytest.fixture
def world(tmp_path, monkeypatch):
    make_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    with no_models():
        yield tmp_path


def everything(root: Path) -> dict[str, object]:
    """What is below a folder: files with their bytes, links with their targets, folders."""
    found: dict[str, object] = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder) / name
            key = path.relative_to(root).as_posix()
            if path.is_symlink():
                found[key] = ("link", os.readlink(path))
            else:
                found[key] = "folder" if path.is_dir() else path.read_bytes()
    return found


def refused(*words: str) -> str:
    """The one line with which a command that must not begin its work ends."""
    with (
        no_models(load=mock.Mock(side_effect=AssertionError("a model was loaded"))),
        mock.patch.object(generate, "_from_prompts", side_effect=AssertionError("drawn")),
        pytest.raises(SystemExit) as stop,
    ):
        cli.main([*words])
    message = str(stop.value)
    assert message.startswith(f"musicscope {words[0]}: --out ")
    assert "\n" not in message
    return message


# --- find-concept -----------------------------------------------------------------------------


def test_a_folder_with_contents_is_refused_by_name_and_left_as_it_is(world):
    (world / "mine").mkdir()
    (world / "mine/thesis.txt").write_bytes(THESIS)
    (world / "link").symlink_to("mine")
    before = everything(world)
    for out in ("mine", "mine/", "./mine", "guitars/../mine", str(world / "mine"), "link", "link/"):
        message = refused(*FIND, "--out", out)
        assert "is not empty (it holds thesis.txt): give --out the name of a new folder" in message
        assert (str(world / "mine") if ".." in out else str(Path(out))) in message
    assert everything(world) == before


@pytest.mark.parametrize(
    ("out", "wanted"),
    [
        ("guitars", "--out guitars is the folder of --with, which is read"),
        ("guitars/", "is the folder of --with"),
        ("guitars/sub", "lies in the folder of --with (guitars)"),
        (
            "guitars/new",
            "lies in the folder of --with (guitars), which is read: give --out a place",
        ),
        ("others/a/b", "lies in the folder of --without"),
        (".", "holds the folder of --with (guitars)"),
        ("guitars/..", "holds the folder of --with"),
        ("/", "holds the folder of --with"),
        ("to-guitars", "is the folder of --with"),
        ("to-guitars/new", "lies in the folder of --with"),
        ("data", "holds the model"),
        ("data/models/m/new", "lies in the model"),
        ("data/sae/m/top1", "is the SAE"),
        ("file.txt", "file.txt is a file: give --out the name of a new folder"),
        ("file.txt/new", "file.txt is no folder): name another path"),
        ("/proc/new", "cannot be written"),
        ("dangling", "is a link to nothing"),
        ("dangling/", "is a link to nothing"),
        ("loop", "is a link to nothing"),
        ("", "is no path"),
        ("data/steering/m", "data/steering/m is an output of a stage in dvc.yaml"),
        ("data/steering/m/new", "which dvc repro removes: give --out another place"),
        ("metrics/a.json", "is an output of a stage"),
    ],
)
def test_what_cannot_be_an_output_of_the_finder(world, out, wanted):
    (world / "file.txt").write_bytes(THESIS)
    (world / "to-guitars").symlink_to("guitars")
    (world / "dangling").symlink_to("nowhere")
    (world / "loop").symlink_to("loop")
    (world / "dvc.yaml").write_text(
        "stages: {steer: {foreach: [m], do: {outs: [{'data/steering/${item}': {cache: false}}], "
        "metrics: ['metrics/${item}.json']}}}"
    )
    before = everything(world)
    assert wanted in refused(*FIND, "--out", out)
    assert everything(world) == before


def test_usual_places_are_no_outputs_of_the_pipeline(monkeypatch):
    """data/${item.kind} of a matrix is its listed kinds, not every folder in data/."""
    monkeypatch.chdir(ROOT)
    for place in ("data/generated", "data/found", "data/pretraining", "gpu-check"):
        user_outputs.check_no_stage(ROOT / place)
    for place in ("data/usae", "data/crosscoder/mine", "data/sae/nano-small/top1", "data/clips"):
        with pytest.raises(OutputError, match="is an output of a stage"):
            user_outputs.check_no_stage(ROOT / place)


def test_a_new_and_an_empty_folder_take_the_result(world, capsys):
    (world / "empty").mkdir()
    (world / "to-empty").symlink_to("empty")
    inode = (world / "empty").stat().st_ino
    for out, real in (("new", "new"), ("a/b/c/", "a/b/c"), ("to-empty", "empty")):
        cli.main([*FIND, "--out", out])
        assert f"1 excerpts are in {Path(out)}\n" in capsys.readouterr().out
        names = {"features.csv", "moments.csv", "report.json", "sae-4-1.wav", "steering.json"}
        assert set(os.listdir(world / real)) == names
        assert "not empty" in refused(*FIND, "--out", out)  # an earlier result is no less kept
    assert (world / "empty").stat().st_ino == inode
    assert not [name for name in everything(world) if user_outputs.SCRATCH in name]


def test_the_usual_folder_takes_a_number_and_says_so(world, capsys):
    for name in ("guitars", "guitars-2", "guitars-3"):
        before = everything(world)
        cli.main([*FIND])
        assert f"are in data/found/{name}\n" in capsys.readouterr().out
        after = everything(world)
        assert f"data/found/{name}/report.json" in after
        assert {k: after[k] for k in before} == before
    (world / "data/found/guitars-4").write_bytes(THESIS)
    (world / "data/found/guitars-5").symlink_to("nowhere")
    cli.main([*FIND])
    assert "are in data/found/guitars-6\n" in capsys.readouterr().out
    # Recordings that lie where results go.
    (world / "data/found/mine").mkdir()
    (world / "data/found/mine/1.wav").write_bytes(b"")
    cli.main(["find-concept", "--model", "m", "--with", "data/found/mine", "--without", "others"])
    assert "are in data/found/mine-2\n" in capsys.readouterr().out
    words = ["find-concept", "--model", "m", "--with", "data", "--without", "others"]
    assert "data/found/data lies in the folder of --with" in refused(*words)


def test_an_error_leaves_no_folder(world):
    before = everything(world)
    with mock.patch.object(concept_command, "find_concept", side_effect=ValueError("too few")):
        for out in (("--out", "a/b/c"), ()):
            with pytest.raises(SystemExit, match="too few"):
                cli.main([*FIND, *out])
    assert everything(world) == before
    with pytest.raises(SystemExit, match="nowhere is no folder"):
        cli.main([*FIND[:-1], "nowhere", "--out", "a/b"])
    assert everything(world) == before


@pytest.mark.parametrize("there", [False, True])
def test_files_that_appear_during_the_work_stay(world, there, capsys):
    if there:
        (world / "mine").mkdir()

    def slowly(*args, **kwargs):
        (world / "mine/thesis.txt").write_bytes(THESIS)
        return report()

    with mock.patch.object(concept_command, "find_concept", slowly):
        cli.main([*FIND, "--out", "mine"])
    out = "mine/mine" if there else "mine-2"
    assert f"are in {out}\n" in capsys.readouterr().out
    assert (world / "mine/thesis.txt").read_bytes() == THESIS
    assert (world / out / "report.json").is_file()


def test_a_link_that_takes_the_claimed_place_is_not_followed(world, capsys):
    (world / "other").mkdir()

    def slowly(*args, **kwargs):
        (world / "mine").rmdir()
        (world / "mine").symlink_to("other")
        return report()

    with mock.patch.object(concept_command, "find_concept", slowly):
        cli.main([*FIND, "--out", "mine"])
    assert "are in mine-2\n" in capsys.readouterr().out
    assert os.listdir(world / "other") == []


def test_two_at_once_take_two_folders(tmp_path):
    usual = tmp_path / "found/x"
    with new_folder(None, usual) as one, new_folder(None, usual) as two:
        assert {one.publish(), two.publish()} == {usual, tmp_path / "found/x-2"}


def test_an_empty_folder_where_the_disk_has_no_links(world):
    (world / "mine").mkdir()
    with mock.patch("os.link", side_effect=PermissionError("no links here")):
        cli.main([*FIND, "--out", "mine"])
        assert read_json("mine/report.json")["q"] == 0.05
        cli.main([*DRAW, "--out", "drawn"])
    assert len(os.listdir("drawn")) == 3


def test_a_folder_that_refuses_files_is_named(world):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (world / "kept").mkdir()
    (world / "kept").chmod(0o500)
    for out in ("kept", "kept/new"):
        for command in (FIND, DRAW):
            assert "cannot be written (Permission denied)" in refused(*command, "--out", out)


# --- generate ---------------------------------------------------------------------------------


def test_music_is_added_beside_other_files(world):
    (world / "mine").mkdir()
    (world / "mine/thesis.txt").write_bytes(THESIS)
    cli.main([*DRAW, "--out", "mine"])
    first = everything(world / "mine")
    assert len(first) == 4
    cli.main([*DRAW, "--out", "mine"])  # the same again is the same files
    assert everything(world / "mine") == first


@pytest.mark.parametrize("taken", ["-plain.wav", "-steered.wav", "-steered.json"])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_a_taken_name_gives_all_three_files_a_number(world, taken, kind):
    cli.main([*DRAW, "--out", "first"])
    (stem,) = (n.removesuffix("-plain.wav") for n in os.listdir("first") if "plain" in n)
    place = world / "mine" / f"{stem}{taken}"
    place.parent.mkdir()
    if kind == "file":
        place.write_bytes(THESIS)
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to("nowhere")
    before = everything(world)
    cli.main([*DRAW, "--out", "mine"])
    after = everything(world)
    assert {k: after[k] for k in before} == before
    new = {Path(k).name for k in set(after) - set(before)}
    assert new == {f"{stem}-plain-2.wav", f"{stem}-steered-2.wav", f"{stem}-steered-2.json"}
    about = read_json(f"mine/{stem}-steered-2.json")
    assert about["files"] == {"plain": f"{stem}-plain-2.wav", "steered": f"{stem}-steered-2.wav"}


@pytest.mark.parametrize(
    ("out", "wanted"),
    [
        ("file.txt", "file.txt is a file: give --out the name of a folder"),
        ("file.txt/new", "file.txt is no folder)"),
        ("/proc/new", "cannot be written"),
        ("dangling", "is a link to nothing"),
        ("", "is no path"),
        ("data/models/m", "is the model, which is read"),
        ("data/models/m/new", "lies in the model"),
        ("data/sae/m/new", "lies in the SAEs"),
        ("data/judge/new", "lies in the judges"),
        ("data/clips/new", "data/clips/new is an output of a stage in dvc.yaml"),
    ],
)
def test_where_music_cannot_go(world, out, wanted):
    (world / "file.txt").write_bytes(THESIS)
    (world / "dangling").symlink_to("nowhere")
    (world / "dvc.yaml").write_text("stages: {prepare_data: {outs: [data/clips]}}")
    before = everything(world)
    assert wanted in refused(*DRAW, "--out", out)
    assert everything(world) == before


def test_a_recording_is_no_output(world):
    (world / "song.flac").write_bytes(b"sound")
    words = ["generate", "--model", "m", "--audio", "song.flac", "--off", "guitar"]
    assert "song.flac is a file" in refused(*words, "--out", "song.flac")
    assert (world / "song.flac").read_bytes() == b"sound"


def test_files_that_appear_between_look_and_write_stay(tmp_path):
    own = os.link

    def late(source, place):
        if Path(place).name == "a":
            Path(place).write_bytes(THESIS)
        own(source, place)

    with mock.patch("os.link", late):
        made = add_files(tmp_path, lambda number: {f"a{number}": b"sound"})
    assert made == {"a-2": tmp_path / "a-2"}
    assert everything(tmp_path) == {"a": THESIS, "a-2": b"sound"}


# --- tools ------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["to-audiocraft", "to-transformers"])
def test_a_converted_model_never_replaces_a_folder(world, direction, monkeypatch):
    (world / "mine").mkdir()
    (world / "mine/thesis.txt").write_bytes(THESIS)
    before = everything(world)
    source = "data/models/m"

    def convert(out: str) -> None:
        monkeypatch.setattr(sys, "argv", ["convert", direction, source, out])
        command_line.run_program(audiocraft_convert.main)

    for out, wanted in (
        ("mine", r"OUT mine is not empty \(it holds thesis.txt\)"),
        (source, "is the source, which is read"),
        (f"{source}/new", "lies in the source"),
        ("data/models", "holds the source"),
    ):
        with pytest.raises(SystemExit, match=wanted):
            convert(out)
        assert everything(world) == before
    convert("data/models/new")
    assert (world / "data/models/new/sub/weights").read_bytes() == b"weights"
    (world / "empty").mkdir()
    convert("empty")
    assert (world / "empty/sub/weights").read_bytes() == b"weights"


BENCHMARKS = sorted(
    p.stem for p in (ROOT / "benchmarks").glob("*.py") if "\nRESULT = " in p.read_text("utf-8")
)
"""Those that have a record of their own, which is committed."""


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_refuses_a_file_that_is_there_before_it_measures(name, tmp_path, monkeypatch):
    module = __import__(f"benchmarks.{name}", fromlist=["main"])
    monkeypatch.setattr(module, "measure", mock.Mock(side_effect=AssertionError("measured")))
    (tmp_path / "thesis.json").write_bytes(THESIS)
    (tmp_path / "dangling").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    for out, wanted in (
        ("thesis.json", "--out thesis.json is there already: give --out the name of a new file"),
        (".", "is there already"),
        ("dangling", "is a link to nothing"),
        ("thesis.json/new.json", "cannot be written"),
    ):
        monkeypatch.setattr(sys, "argv", [name, "--out", out])
        with pytest.raises(SystemExit) as stop:
            module.main()
        assert wanted in str(stop.value)
    assert everything(tmp_path) == {"thesis.json": THESIS, "dangling": ("link", "nowhere")}


def git(*words: str) -> None:
    own = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", *own, *words], check=True, capture_output=True)


def test_a_record_is_replaced_only_where_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    usual = Path("results/speed.json")

    def kept(value: dict) -> str:
        return str(Record(None, usual).write(value))

    assert kept({"a": 1}) == "results/speed.json"
    assert kept({"a": 2}) == "results/speed-2.json"  # no Git holds the first
    assert kept({"a": 1, "b": {"c": 3}}) == "results/speed.json"  # says all that was there
    assert kept({"a": 1, "b": {"c": 4}}) == "results/speed-3.json"
    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "results")
    assert kept({"a": 5}) == "results/speed.json"
    assert kept({"a": 6}) == "results/speed-4.json"
    usual.write_bytes(THESIS)
    assert kept({"a": 7}) == "results/speed-5.json"
    usual.unlink()
    usual.symlink_to("elsewhere.json")
    Path("results/elsewhere.json").write_text("{}")
    assert kept({"a": 8}) == "results/speed-6.json"
    assert Path("results/elsewhere.json").read_text() == "{}"


def test_a_run_goes_on_writing_its_own_record(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json("speed.json", {"small": {"cpu": 1}})
    record = Record(None, "speed.json")
    for model in ("small", "medium", "large", "small"):
        known = record.read()
        known.setdefault(model, {})["cpu"] = 2
        assert str(record.write(known)) == "speed-2.json"
    assert read_json("speed.json") == {"small": {"cpu": 1}}
    assert set(read_json("speed-2.json")) == {"small", "medium", "large"}
    named = Record("mine.json", "speed.json")
    assert named.read() == {}
    Path("mine.json").write_bytes(THESIS)  # meanwhile
    assert str(named.write({"a": 1})) == "mine-2.json"
    assert Path("mine.json").read_bytes() == THESIS
    assert str(named.write({"a": 2})) == "mine-2.json"


REMOVERS = {"atomic_dir", "publish_dir", "rmtree", "replace", "rename", "unlink", "move", "remove"}


def user_files() -> list[Path]:
    """Code of what a user runs by name."""
    modules = [module for module, _ in cli.COMMANDS.values()]
    files = [ROOT / "src" / f"{module.replace('.', '/')}.py" for module in modules]
    files += [Path(audiocraft_convert.__file__), *(ROOT / "src/musicscope/commands").rglob("*.py")]
    files += [ROOT / f"benchmarks/{name}.py" for name in BENCHMARKS]
    return sorted({*files, ROOT / "src/musicscope/commands/cli.py"})


@pytest.mark.parametrize("path", user_files(), ids=lambda path: path.name)
def test_what_a_user_runs_removes_and_replaces_nothing_itself(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {alias.asname or alias.name for node in ast.walk(tree)
             if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}  # fmt: skip
    assert not names & {"atomic_dir", "publish_dir"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            if owner in ("os", "shutil", "Path", "artifacts", "path"):
                assert node.func.attr not in REMOVERS, f"line {node.lineno}"


# --- any tree, any spelling -------------------------------------------------------------------

PARTS = ("mine", "mine-2", "guitars", "others", "data", "found", "sub", "thesis.txt", "generated")
PATHS = st.lists(st.sampled_from(PARTS), min_size=1, max_size=3).map("/".join)
STEM = "calm-seed3-"


@st.composite
def trees(draw) -> list[tuple[str, str]]:
    """(path, content) of files, (path, "") of folders, (path, "-> target") of links."""
    contents = st.one_of(st.just(""), st.just("text"), PATHS.map("-> {}".format))
    return draw(st.lists(st.tuples(PATHS, contents), max_size=6))


@st.composite
def spellings(draw) -> str:
    """A path with dots, doubled and trailing slashes, relative, or absolute as {root}/...

    None leaves the folder that is four above the root.
    """
    parts = st.sampled_from((*PARTS, ".", "..", "new", "Mine", "a b", "é", "-x"))
    text = draw(st.sampled_from(("/", "//", "/./"))).join(draw(st.lists(parts, max_size=4)))
    before, after = draw(st.sampled_from(("", "./", "{root}/"))), draw(st.sampled_from(("", "/")))
    return before + (text.lstrip("/") + after if before else (text + after).lstrip("/"))


def plant(root: Path, tree: list[tuple[str, str]]) -> None:
    for name, content in tree:
        path = root / name
        with contextlib.suppress(OSError):  # a file where a folder should be, a link in a circle
            path.parent.mkdir(parents=True, exist_ok=True)
            if content.startswith("-> "):
                path.symlink_to(root / content[3:])
            elif content:
                with open(path, "x") as file:
                    file.write(content)
            else:
                path.mkdir(exist_ok=True)


COMMANDS = {
    "find": lambda out: cli.main([*FIND, f"--out={out}"]),
    "find, usual": lambda out: cli.main([*FIND]),
    "generate": lambda out: cli.main([*DRAW, f"--out={out}"]),
    "generate, usual": lambda out: cli.main([*DRAW]),
    "convert": lambda out: audiocraft_convert.to_audiocraft("data/models/m", out),
    "record": lambda out: Record(out, "data/found/mine").write({"a": 1}),
    "record, usual": lambda out: Record(None, "data/found/mine").write({"a": 1}),
}


@pytest.mark.parametrize("command", COMMANDS)
@settings(max_examples=60, deadline=None)
@given(tree=trees(), out=spellings())
def test_no_command_removes_or_changes_what_was_there(command, tree, out):
    with (
        tempfile.TemporaryDirectory() as outer,
        no_models(),
        contextlib.redirect_stdout(None),
    ):
        root = Path(outer) / "x/y/z/root"  # for as many ".." as a spelling may have
        root.mkdir(parents=True)
        make_world(root)
        plant(root, tree)
        before = everything(Path(outer))
        with contextlib.chdir(root):
            try:
                COMMANDS[command](out.replace("{root}", str(root)))
                done, said = True, ""
            except (SystemExit, OutputError) as stop:
                done, said = False, str(stop)
        after = everything(Path(outer))
    assert {name: after.get(name) for name in before} == before
    new = set(after) - set(before)
    assert not [name for name in new if user_outputs.SCRATCH in name]
    assert bool(new) == done
    assert "\n" not in said
