"""Every command ends wrong input in one line and a status other than 0."""

from __future__ import annotations

import argparse
import sys
from types import ModuleType

import pytest
import torch

from musicscope.commands import cli

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
    assert cli.device("auto") == "cuda"
    assert cli.device("cuda:1") == "cuda:1"
    with pytest.raises(argparse.ArgumentTypeError, match="GPUs: 2"):
        cli.device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.device("auto") == "cpu"


@pytest.fixture
def command(monkeypatch):
    """A command that raises `command.error`."""
    module = ModuleType("failing")
    module.add_arguments = lambda parser: None

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
