"""What anyone may clone: no machine's paths or hosts, exact pins, scripts that say what they do."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import tomllib

import pytest
import yaml

from musicscope.config import load_params
from tools.import_closure import ROOT, stage_script, stages_of

STAGES = stages_of((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
MACHINE_PATH = re.compile(r"(?<![\w.$}/:])/(home|root|work|farm|opt|mnt|Users|tmp/\w)[\w.-]*/")
REGISTRY = re.compile(
    r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|deb\.debian\.org|npmjs\.org"
)


def texts():
    """(name, text) of the files that Git tracks or would track, binaries left out."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        path = ROOT / name
        if not path.is_file():
            continue
        with path.open("rb") as stream:
            if b"\0" in stream.read(4096):
                continue
        yield name, path.read_text(encoding="utf-8", errors="replace")


def test_no_machine_path_and_no_registry_host():
    files = dict(texts())
    assert {"Makefile", "requirements.lock"} <= set(files)
    found = [
        f"{name}:{number}: {line.strip()[:120]}"
        for name, text in files.items()
        for number, line in enumerate(text.splitlines(), 1)
        if MACHINE_PATH.search(line) or REGISTRY.search(line)
    ]
    assert not found, "\n".join(found)


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_pins_are_exact_and_name_no_build_of_torch():
    locked, nodeps = pins("requirements.lock"), pins("requirements-nodeps.txt")
    for name, version in (locked | nodeps).items():
        assert re.fullmatch(r"[A-Za-z0-9._-]+", name), name
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), (name, version)
    assert locked["torch"] == "2.13.0"
    assert not set(locked) & set(nodeps)
    # Their wheels stop transformers from importing on a CPU build of torch.
    assert not {"torchvision", "torchaudio"} & (set(locked) | set(nodeps))


def test_every_dependency_is_locked_within_its_range():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    locked = {canonicalize_name(n): v for n, v in pins("requirements.lock").items()}
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), text


@pytest.mark.parametrize("name", STAGES)
def test_stage_explains_itself(name, monkeypatch, capsys):
    script = stage_script(STAGES[name]["cmd"])
    monkeypatch.setattr(sys, "argv", [f"stages.{script}", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"stages.{script}", run_name="__main__")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    placed = re.findall(
        r"\$\{item\.(\w+)\}", STAGES[name]["cmd"].replace("${key}", "${item.model}")
    )
    assert all(re.search(rf"\b{argument}\b", text) for argument in placed), text
    assert len(text.split("\n\n", 1)[1].strip()) > 40, "say what the stage reads and makes"


def test_smoke_params_shrink_the_committed_ones(tmp_path):
    from tools.smoke import merged

    whole = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    small = yaml.safe_load((ROOT / "tools/smoke_params.yaml").read_text(encoding="utf-8"))
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(merged(whole, small)), encoding="utf-8")
    params = load_params(path)  # no unknown key, nothing out of range
    committed = load_params(ROOT / "params.yaml")
    assert params.models == committed.models  # a shared code needs two
    assert set(params.slots) < set(committed.slots)
    assert params.train_sae.samples * 10 < committed.train_sae.samples
    assert merged({"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 3}, "d": [2]}) == {
        "a": {"b": 3, "c": 2},
        "d": [2],
    }


def test_curves_name_columns_that_their_tables_have():
    """Top-level plots of dvc.yaml: axes and titles of `dvc plots diff`."""
    params = load_params(ROOT / "params.yaml")
    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    assert len(text.encode()) <= 16_384
    for key in ("models", "slots"):
        text = text.replace(f"${{{key}[0]}}", getattr(params, key)[0])
    entries = yaml.safe_load(text)["plots"]
    assert len(entries) >= 6
    for entry in entries:
        ((name, curve),) = entry.items()
        files = sorted((ROOT / name).glob("*.csv")) or [ROOT / name]
        for file in files:
            head = set(re.split(r"[,\t]", file.read_text(encoding="utf-8").split("\n")[0]))
            wanted = {curve["x"], *([curve["y"]] if isinstance(curve["y"], str) else curve["y"])}
            assert wanted <= head, (name, wanted - head)
        assert curve["title"]
