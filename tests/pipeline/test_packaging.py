"""The package outside a checkout: its metadata, and a wheel in an environment of its own."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from musicscope.dictionaries.core import TopKSAE
from tools.import_closure import ROOT

EXTRAS = {"ray", "gradio", "starlette", "wandb"}
"""In an extra; starlette comes with gradio."""
BY_HAND = {"audiocraft", "demucs", "xformers", "tinysoundfont", "torchaudio"}
"""No wheel fits beside the others; an error says what to do."""

THROUGH = {"httpx": "huggingface-hub", "pydantic_core": "pydantic", "tokenizers": "transformers"}
"""Packages that a declared one requires and hands on in its own interface."""


def third_party(folder: Path) -> dict[str, Path]:
    """Name -> a file that imports it, of all packages that are not of Python or of this one."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            found |= {name.split(".")[0]: path for name in names}
    return {n: p for n, p in found.items() if n not in {*sys.stdlib_module_names, "musicscope"}}


def test_the_metadata_names_every_package_that_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.match(r"[\w.-]+", text)[0].lower() for text in project["dependencies"]}
    known = packages_distributions()
    missing = {
        name: str(path.relative_to(ROOT))
        for name, path in third_party(ROOT / "src/musicscope").items()
        if name not in EXTRAS | BY_HAND
        and not declared
        & {d.lower().replace("_", "-") for d in (THROUGH.get(name, ""), *known.get(name, [name]))}
    }
    assert not missing


@pytest.fixture(scope="module")
def outside(tmp_path_factory) -> tuple[Path, Path]:
    """An environment with the wheel of this commit, and an empty folder."""
    place = tmp_path_factory.mktemp("outside")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", place, ROOT]
    done = subprocess.run(build, capture_output=True, text=True)
    if done.returncode and "hatchling" in done.stderr:
        pytest.skip("hatchling cannot be fetched here")
    assert done.returncode == 0, done.stderr
    (wheel,) = place.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", place / "env"], check=True)
    (packages,) = (place / "env/lib").glob("python*/site-packages")
    # Dependencies come from the environment of the tests, whose own musicscope comes after.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [place / "env/bin/pip", "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True)
    (place / "work").mkdir()
    return place / "env/bin", place / "work"


@pytest.mark.slow
def test_a_wheel_finds_concepts_and_generates_outside_a_checkout(outside):
    binary, work = outside
    env = {"PATH": f"{binary}:/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env["HOME"] = str(work)

    def run(*words: str) -> str:
        command = [binary / words[0], *words[1:]]
        done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert words[0] == "python" or "Loading weights" not in done.stderr
        return done.stdout

    where = run("python", "-c", "import musicscope; print(musicscope.__file__)")
    assert str(binary.parent) in where
    g = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(256, 160, generator=g), dim=1)
    sae = TopKSAE(W_dec.clone(), torch.zeros(256), W_dec, torch.zeros(160), 8)
    sae.save(work / "sae", {"layer": "layers.1", "lm_name": "nano-small"})
    rng, times = np.random.default_rng(0), np.arange(16_000) / 16_000
    for side, hertz in (("with", 220), ("without", 1760)):
        (work / side).mkdir()
        for i in range(3):
            sound = 0.3 * np.sin(2 * np.pi * (hertz + i) * times)
            noise = 0.01 * rng.standard_normal(len(sound))
            soundfile.write(work / side / f"{i}.wav", sound + noise, 16_000)
    model = str(ROOT / "data/models/nano-small")
    given = ["--model", model, "--sae", "sae", "--with", "with", "--without", "without"]
    found = json.loads(run("musicscope", "find-concept", *given, "--permutations", "20", "--json"))
    assert found["recordings"] == {"with": 3, "without": 3}
    assert (work / found["folder"] / "features.csv").is_file()
    run("musicscope", "export", "--model", model, "--sae", "sae", "--to", "sae-lens", "--out", "x")
    run("musicscope", "import", "x", "--model", model, "--check")
    code = f"""
from musicscope.models.registry import load_model
model = load_model({model!r})
print(model.generate(["calm guitar"], 0.5, 0)[0].shape[-1])
"""
    assert int(run("python", "-c", code)) >= 8_000
