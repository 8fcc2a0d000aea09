"""Every command ends wrong input in one line and a status other than 0."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from musicscope.commands import arguments, cli
from musicscope.core import command_line
from tests.support.dictionaries import ROOT

FIND = ("find-concept", "--model", "m", "--with", "a", "--without", "b")
DRAW = ("generate", "--model", "m", "--prompt", "music")
NO_NUMBER = ("0", "-1", "nan", "inf", "two", "")


@pytest.mark.parametrize(
    ("words", "values", "text"),
    [
        ((*FIND, "--seconds"), NO_NUMBER, "a number above 0"),
        ((*FIND, "--windows"), ("0", "-3", "1.5", "nan"), "a whole number at least 1"),
        ((*FIND, "--q"), ("0", "1.5", "nan"), "a number above 0 and at most 1"),
        ((*FIND, "--permutations"), ("0", "many"), "a whole number at least 1"),
        ((*FIND, "--seed"), ("-1", "x"), "a whole number at least 0"),
        ((*DRAW, "--seconds"), NO_NUMBER, "a number above 0"),
        ((*DRAW, "--strength"), ("nan", "inf", "x"), "a finite number"),
        ((*DRAW, "--guidance"), ("nan", "x"), "a finite number"),
        ((*DRAW, "--features"), ("0", "-1", "2.5"), "a whole number at least 1"),
        (("studio", "--port"), ("0", "70000", "x"), "a whole number at least 1 and at most 65535"),
        (("plan", "--clips"), ("0", "-1"), "a whole number at least 1"),
        (("plan", "--memory"), NO_NUMBER, "a number above 0"),
    ],
)
def test_wrong_numbers_name_the_option_and_what_is_allowed(words, values, text, capsys):
    for value in values:
        with pytest.raises(SystemExit) as ended:
            cli.main([*words[:-1], f"{words[-1]}={value}"])
        assert ended.value.code == 2
        message = capsys.readouterr().err
        assert f"argument {words[-1]}: {value!r} is not {text}" in message
        assert message.count("\n") == 1


@pytest.mark.parametrize("words", [FIND, DRAW, ("studio",)])
def test_a_device_that_is_not_there_is_named_before_any_work(words, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for value, text in (
        ("cuda", "torch finds no GPU"), ("cuda:1", "torch finds no GPU"), ("gpu", "is not auto"),
        ("cuda:x", "is not auto"), ("cuda:", "is not auto"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            cli.main([*words, "--device", value])
        assert ended.value.code == 2
        assert text in capsys.readouterr().err


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert command_line.device("auto") == "cuda"
    assert command_line.device("cuda:1") == "cuda:1"
    with pytest.raises(argparse.ArgumentTypeError, match="GPUs: 2"):
        command_line.device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command_line.device("auto") == "cpu"


@pytest.fixture
def command(monkeypatch):
    """A command that raises `command.error`."""
    module = ModuleType("failing")

    def run(args):
        raise module.error

    module.run = run
    monkeypatch.setitem(sys.modules, "failing", module)
    monkeypatch.setitem(cli.COMMANDS, "fail", ("failing", "fails"))
    return module


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("no such layer\nuse layers.0"), "no such layer use layers.0"),
        (FileNotFoundError("no model m"), "no model m"),
        (PermissionError(13, "Permission denied", "out/a.wav"), "out/a.wav: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (
            UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
            "save the file as UTF-8",
        ),
        (RuntimeError("shapes"), "RuntimeError: shapes (--debug shows where)"),
        (KeyError("layer"), "KeyError: 'layer' (--debug shows where)"),
    ],
)
def test_any_error_is_one_line_and_debug_keeps_the_traceback(command, error, text):
    command.error = error
    with pytest.raises(SystemExit) as ended:
        cli.main(["fail"])
    assert text in ended.value.code
    assert "\n" not in ended.value.code
    with pytest.raises(type(error)):
        cli.main(["fail", "--debug"])


def test_ctrl_c_ends_with_130_and_one_line(command, capsys):
    command.error = KeyboardInterrupt()
    with pytest.raises(SystemExit) as ended:
        cli.main(["fail"])
    assert ended.value.code == 130
    assert capsys.readouterr().err.strip() == "musicscope fail: stopped"


# --- help, logs, results ----------------------------------------------------------------------


def test_help_of_every_command_imports_nothing_heavy():
    code = (
        "import sys, time; begin = time.process_time()\n"
        "from musicscope.commands import cli\n"
        "cli.build()\n"
        "heavy = {'torch', 'numpy', 'pandas', 'pydantic', 'yaml'} & set(sys.modules)\n"
        "print(heavy or '{}', time.process_time() - begin)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, seconds = done.stdout.split()
    assert heavy == "{}"
    assert float(seconds) < 0.5


def test_options_are_those_of_the_code():
    from musicscope.steering import edit

    assert arguments.BRANCHES == edit.BRANCHES
    assert set(arguments.ARGUMENTS) == set(cli.COMMANDS)


def test_version_names_the_package_and_what_results_depend_on(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert re.match(
        r"musicscope \d+\.\d+\.\d+ \(torch \d.*, transformers \d", capsys.readouterr().out
    )


@pytest.fixture
def talkative(monkeypatch):
    """A command that prints a text, a notice and the log level, and returns a result."""
    module = ModuleType("talking")

    def run(args):
        print("text")
        print("notice", file=sys.stderr)
        print(os.environ["TRANSFORMERS_VERBOSITY"], os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"))
        return {"value": 1.5}

    module.run = run
    for name in cli.QUIET:
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    monkeypatch.setitem(sys.modules, "talking", module)
    monkeypatch.setitem(cli.COMMANDS, "talk", ("talking", "talks"))


def test_results_are_json_and_nothing_else(talkative, capsys):
    cli.main(["talk", "--json"])
    found = capsys.readouterr()
    assert json.loads(found.out) == {"value": 1.5}
    assert found.err.splitlines() == ["text", "notice", "error 1"]
    cli.main(["talk", "--json", "-q"])
    found = capsys.readouterr()
    assert (json.loads(found.out), found.err) == ({"value": 1.5}, "")


def test_loudness(talkative, capsys):
    cli.main(["talk"])
    assert capsys.readouterr().out.splitlines() == ["text", "error 1"]
    cli.main(["talk", "-q"])
    found = capsys.readouterr()
    assert (found.out.splitlines(), found.err) == (["text", "error 1"], "")
    for name in cli.QUIET:
        os.environ.pop(name)
    cli.main(["talk", "--verbose"])
    assert capsys.readouterr().out.splitlines() == ["text", "info None"]
    with pytest.raises(SystemExit):
        cli.main(["talk", "-v", "-q"])


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_commands_options_and_models(shell, tmp_path, capsys):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    cli.main(["completion", shell])
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "data/models/my-model").mkdir(parents=True)
    (tmp_path / "data/steering/my-model").mkdir(parents=True)
    (tmp_path / "data/steering/my-model/flute.json").touch()
    assert subprocess.run([shell, "-n", script]).returncode == 0
    if shell == "zsh":
        return
    for words, expected in (
        ("f", {"find-concept"}), ("generate --mo", {"--model"}),
        ("generate --model ", {"my-model"}),
        ("generate --off f", {"flute"}), ("export --to sae", {"sae-lens"}),
        ("completion z", {"zsh"}),
    ):  # fmt: skip
        given = ["musicscope", *words.split(" ")]
        line = f"COMP_WORDS=({shlex.join(given)}) COMP_CWORD={len(given) - 1}"
        code = f"source {script}; {line}; _musicscope; echo ${{COMPREPLY[@]}}"
        done = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert set(done.stdout.split()) == expected, done.stderr


def test_a_mistyped_key_is_answered_with_the_nearest(monkeypatch):
    monkeypatch.chdir(ROOT)
    for text, near in (("train_sae.kk=3", "train_sae.k"), ("trainsae.k=3", "train_sae.k")):
        with pytest.raises(SystemExit) as ended:
            cli.main(["plan", "-S", text])
        assert f"has no key {text[:-2]}; did you mean {near}?" in ended.value.code
