"""The scripts in examples/ run from a fresh clone, on the model in Git."""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SCRIPTS = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def run(script, *args):
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, f"examples/{script}", *map(str, args)],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_example_explains_itself(script):
    result = run(script, "--help")
    assert result.returncode == 0, result.stderr
    assert f"python examples/{script}" in result.stdout


@pytest.mark.slow
def test_look_inside_prints_a_rise_for_each_layer():
    result = run("1_look_inside.py")
    assert result.returncode == 0, result.stderr
    rises = {
        line.split()[0]: float(line.split()[-1])
        for line in result.stdout.splitlines()
        if line.startswith("layers.")
    }
    assert list(rises) == [f"layers.{i}" for i in range(6)]
    assert all(rise > 0 for rise in rises.values())


@pytest.mark.slow
def test_a_concept_is_found_above_its_null():
    result = run("2_find_a_concept.py", "--concept", "bass")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    found = [float(line.split()[-1]) for line in lines if line.startswith("  feature")]
    null = float(lines[-1].split(":")[1].split(",")[0])
    assert len(found) == 5
    assert sum(found) / 5 > null + 0.05


@pytest.mark.slow
def test_steering_writes_two_different_files(tmp_path):
    result = run("3_steer.py", "--concept", "drums", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    plain, steered = (tmp_path / f"nano-small-{name}.wav" for name in ("plain", "drums-off"))
    assert plain.read_bytes() != steered.read_bytes()
    assert plain.stat().st_size == steered.stat().st_size


def test_steering_names_the_concepts_that_it_knows():
    result = run("3_steer.py", "--concept", "cello")
    assert result.returncode != 0
    assert "bass, brass, drums, guitar" in result.stderr


@pytest.mark.slow
def test_the_notebook_runs_all_its_cells():
    text = (ROOT / "examples/4_notebook.py").read_text(encoding="utf-8")
    assert text.count("\n# %%") >= 5
    result = run("4_notebook.py", "-f", "kernel.json")
    assert result.returncode == 0, result.stderr
    share = float(re.search(r"explained variance (\S+)", result.stdout)[1])
    assert 0.2 < share <= 1
    assert "through the files of SAELens: equal, layers.1" in result.stdout
