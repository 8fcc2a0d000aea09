"""Commands of docs/recipes.md: each is parsed by the program that it names, with real params."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys

import pytest
import yaml
from dvc.cli import DvcParserError
from dvc.cli.parser import get_main_parser

from experiments import preset
from musicscope.commands.cli import build
from musicscope.commands.plan.estimate import overridden
from tests.conftest import ROOT

PAGE = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line]
STAGES = set(yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"])


def check_dvc(words: list[str]) -> None:
    args = get_main_parser().parse_args(words)
    assert args.func
    if words[0] in ("repro", "exp"):
        assert set(args.targets or ()) <= STAGES
        overridden(ROOT / "params.yaml", getattr(args, "set_param", None) or [])


def check_just(words: list[str]) -> None:
    if words[0] == "experiment":
        command = preset.command(words[1], words[2:])
        if command[0] == "dvc":
            return check_dvc(command[1:])
        parser, _ = build("plan")
        args = parser.parse_args(command[3:])
        overridden(ROOT / "params.yaml", args.sets)
        return None
    justfile = (ROOT / "justfile").read_text(encoding="utf-8")
    assert re.search(rf"^{words[0]}\b[^:\n]*:(?!=)", justfile, re.MULTILINE)
    return None


def check(line: str) -> None:
    program, *words = shlex.split(line)
    if program == "just":
        check_just(words)
    elif program == "dvc":
        check_dvc(words)
    elif program == "musicscope":
        parser, _ = build(words[0])
        parser.parse_args(words)
    elif program == "sbatch":
        parser = argparse.ArgumentParser()
        for option in ("--gres", "--cpus-per-task", "--time", "--wrap"):
            parser.add_argument(option, required=True)
        check(parser.parse_args(words).wrap)
    else:
        raise AssertionError(f"no check for {program}")


@pytest.mark.parametrize("line", LINES)
def test_every_command_is_one(line):
    check(line)


@pytest.mark.parametrize(
    "line",
    [
        "just experiment nothing", "just experiment rave-musicgen no_stage", "just nothing",
        "just experiment rave-musicgen -S train_sae.kk=3", "dvc repro train",
        "musicscope export --model m --to nothing", "dvc plots dif a b",
    ],
)  # fmt: skip
def test_a_wrong_command_is_noticed(line):
    with pytest.raises((AssertionError, ValueError, SystemExit, DvcParserError)):
        check(line)


def test_every_preset_has_a_recipe_and_sets_keys_that_exist():
    for name, sets in preset.presets().items():
        assert f"just experiment {name}" in PAGE
        assert overridden(ROOT / "params.yaml", sets).models


def test_a_preset_runs_what_it_says():
    words = preset.command("rave-musicgen", ["train_sae", "-S", "seed=3"])
    assert words[:5] == ["dvc", "exp", "run", "-n", "rave-musicgen"]
    assert "models=[rave,musicgen-small]" in words
    assert words[-3:] == ["train_sae", "-S", "seed=3"]
    command = [sys.executable, "-m", "experiments.preset", "nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no experiments/nothing.yaml; there are: musicgen-folder" in done.stderr
