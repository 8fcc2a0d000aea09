"""Every program ends in one line, checks its numbers and has --debug."""

from __future__ import annotations

import argparse
import ast
import errno
import os
import signal
from pathlib import Path

import pytest

from musicscope.commands import cli
from musicscope.core import command_line
from musicscope.core.command_line import Parser, json_object, one_line
from tests.conftest import ROOT
from tests.support.locks import python

FOLDERS = ("src", "stages", "tools", "benchmarks", "examples", "experiments")
FILES = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))]
CHECKED = {"number", "whole", "json_object"}


def is_main(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)


def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def test_every_program_runs_in_the_wrapper_and_parses_with_the_shared_parser():
    programs = 0
    for path, tree in trees().items():
        for node in filter(is_main, tree.body):
            programs += 1
            first = ast.unparse(node.body[0])
            assert len(node.body) == 1, path
            inside = path == ROOT / "src/musicscope/commands/cli.py"
            assert first.startswith(("run_program(", "run_stage(")) or inside, path
        if path.name != "command_line.py":
            calls = [n.func for n in ast.walk(tree) if isinstance(n, ast.Call)]
            names = {
                f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in calls
            }
            assert "ArgumentParser" not in names, path
    assert programs > 35


def test_every_numeric_option_has_limits():
    """Walks over all arguments of all parsers in the sources."""
    options = numeric = 0
    for path, tree in trees().items():
        if path.name == "command_line.py":
            continue
        for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
            if ast.unparse(call.func) not in ("parser.add_argument", "add", "which.add_argument"):
                continue
            options += 1
            given = {k.arg: k.value for k in call.keywords}
            kind = given.get("type")
            where = f"{path}:{call.lineno}"
            if isinstance(kind, ast.Call):
                assert ast.unparse(kind.func) in CHECKED, where
                numeric += 1
                continue
            assert kind is None or ast.unparse(kind) in ("Path", "model_name", "kind", "codec"), (
                where
            )
            default = given.get("default")
            number = isinstance(default, ast.Constant) and isinstance(default.value, int | float)
            assert not number, where  # text where a number is meant
            assert not call.args or ast.unparse(call.args[0]) != "'--device'", (
                f"{where}: add_device"
            )
    assert options > 100
    assert numeric > 40


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_numbers_of_commands_refuse_what_is_none(name):
    parser = cli.build(name)[1][name]
    for action in parser._actions:
        kind = getattr(action.type, "__qualname__", "")
        if not kind.startswith(("number.", "whole.")):
            continue
        for text in ("nan", "inf", "-inf", "1e999", "", "ten", "1,5", "0x10", "None", "--"):
            with pytest.raises(argparse.ArgumentTypeError, match="is not a"):
                action.type(text)


def test_a_bare_number_type_is_a_mistake_of_the_program():
    for kind in (int, float):
        with pytest.raises(TypeError, match="give the type number"):
            Parser().add_argument("--clips", type=kind)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"), ('{"a": NaN}', "a = nan is not a number at least 0"),
        ("[1]", "keys among a, b"), ('{"c": 1}', "keys among a, b"),
        ('{"a": -Infinity}', "a = -inf is not"), ("[" * 100_000, "is not JSON"),
        ('{"a": "1"}', "a = '1' is not a number"), ('{"a": true}', "a = True is not a number"),
        ('{"a": 1e999}', "a = inf is not"), ('{"a": -1}', "a = -1 is not"),
    ],
)  # fmt: skip
def test_json_options_name_their_keys(text, message):
    read = json_object({"a": 0.5, "b": "text"})
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        read(text)
    assert read('{"a": 1, "b": "x"}') == {"a": 1, "b": "x"}


def test_errors_of_the_system_say_what_to_do():
    for number in command_line.REMEDIES:
        said = one_line(OSError(number, os.strerror(number), "out/a.wav"))
        assert said == f"out/a.wav: {os.strerror(number)}: {command_line.REMEDIES[number]}"
    noted = ValueError("NaN")
    noted.add_note("while extracting the clips\n['a']")
    assert one_line(noted) == "NaN while extracting the clips ['a']"
    assert len(one_line(RuntimeError("x" * 9999))) < 700
    assert "lower batch sizes" in one_line(MemoryError())
    assert one_line(ValueError()) == "ValueError:  (--debug shows where)"


PROGRAM = """
import sys
from pathlib import Path
from musicscope.core.command_line import Parser, report_in_one_line, run_program
from musicscope.core.user_outputs import new_folder
report_in_one_line()
def main():
    args = Parser().parse_args()
    with new_folder("mine/result") as out:
        (out.scratch / "a.wav").write_text("half")
        print("begun", flush=True)
        {}
"""


def run(code: str, folder: Path, *arguments: str, wrapped: bool = True) -> tuple[int, str, str]:
    end = "run_program(main)" if wrapped else "main()"
    process = python(PROGRAM.format(code) + end, *arguments, cwd=folder)
    out, error = process.communicate(timeout=60)
    return process.returncode, out, error


@pytest.mark.parametrize("wrapped", [True, False], ids=["in main", "at import"])
def test_an_error_is_one_line_and_debug_keeps_the_traceback(tmp_path, wrapped):
    code, _, error = run("open('no/such')", tmp_path, wrapped=wrapped)
    assert code == 1
    assert error == "-c: no/such: No such file or directory: check the name, or make it first\n"
    code, _, error = run("open('no/such')", tmp_path, "--debug", wrapped=wrapped)
    assert code == 1
    assert error.startswith("Traceback")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrapped", [True, False], ids=["in main", "at import"])
def test_ctrl_c_is_130_and_leaves_nothing_half_written(tmp_path, wrapped):
    end = "run_program(main)" if wrapped else "main()"
    code = PROGRAM.format("import time; time.sleep(60)") + end
    process = python(code, cwd=tmp_path)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "\n-c: stopped\n")
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_workers_at_once_without_their_tracebacks(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        "import time\n"
        "from musicscope.core.command_line import run_program\n"
        "from musicscope.core.parallel import workers\n"
        "def job(i):\n    time.sleep(60 * i)\n    return i\n"
        "def main():\n"
        "    with workers(2) as run:\n"
        "        for i in run(job, [0, 1, 1]):\n            print('begun', flush=True)\n"
        "if __name__ == '__main__':\n    run_program(main)\n"
    )
    process = python(
        "import os, sys; os.setsid(); os.execv(sys.executable, [sys.executable, 'program.py'])",
        cwd=tmp_path,
    )
    assert process.stdout.readline() == "begun\n"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (130, "\nprogram.py: stopped\n")


def test_a_full_disk_below_stdout_is_an_error(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    code = "import sys; sys.stdout = open('/dev/full', 'w'); print('result')"
    status, _, error = run(code, tmp_path)
    assert status == 1
    assert error.startswith("-c: No space left on device: free disk space")


def test_a_closed_pipe_is_one_line(tmp_path):
    process = python(
        PROGRAM.format("input(); print('x' * 10**6)") + "run_program(main)", cwd=tmp_path
    )
    process.stdout.readline()
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.close()
    error = process.stderr.read()
    assert process.wait(30) == 1
    assert error == f"-c: {os.strerror(errno.EPIPE)}\n"
