"""The code that each DVC stage imports, compared with, or written into, dvc.yaml.

DVC does not follow imports: a stage reruns only for the files listed under `deps`.

    python tests/code_deps.py            say what differs, exit 1 if anything does
    python tests/code_deps.py --write    rewrite the code deps in dvc.yaml (`just deps`)
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from musicscope.code_files import code_of, loader_files  # noqa: E402

EVERY_LOADER = ("model_code", "train_judge")
"""Stages that depend on all loaders themselves: the one that says which of them a model needs, and
one whose model may be none of params.yaml: models."""


def is_code(dep: str) -> bool:
    return dep.startswith("data/model_code") or (
        dep.endswith(".py") and dep.startswith(("src/", "stages/"))
    )


def wanted_by(name: str, stage: dict, root: Path) -> list[str]:
    """The code deps of a stage: its own code and, where it reads models, that of their loaders."""
    code = set(code_of(root / "stages" / f"{stage_module(stage['cmd'])}.py", root))
    if name in EVERY_LOADER:
        return sorted(code | set(loader_files(root)))
    read = [dep for dep in stage.get("deps", []) if dep.startswith("data/models")]
    code |= {f"{dep.replace('data/models/', 'data/model_code/')}.json" for dep in read
             if "/models/" in dep}  # fmt: skip
    return sorted(code | {"data/model_code" for dep in read if dep == "data/models"})


def stage_module(cmd: str) -> str | None:
    """`prepare_data` in `python -m stages.prepare_data ...`."""
    match = re.search(r"-m stages\.(\w+)", cmd)
    return match[1] if match else None


def stages_of(text: str) -> dict[str, dict]:
    """Stages of a dvc.yaml, those of a foreach by what they do."""
    return {name: body.get("do", body) for name, body in yaml.safe_load(text)["stages"].items()}


def compare(root: Path = ROOT) -> dict[str, tuple[list[str], list[str]]]:
    """(missing, superfluous) code deps of each stage in dvc.yaml whose script exists."""
    found = {}
    stages = stages_of((root / "dvc.yaml").read_text(encoding="utf-8"))
    for name, stage in stages.items():
        entry = root / "stages" / f"{stage_module(stage['cmd'])}.py"
        if not entry.is_file():
            continue
        wanted = set(wanted_by(name, stage, root))
        listed = {dep for dep in stage.get("deps", []) if is_code(dep)}
        found[name] = (sorted(wanted - listed), sorted(listed - wanted))
    return found


def rewrite(text: str, wanted: dict[str, list[str]]) -> str:
    """dvc.yaml with each stage's code deps replaced, first under `deps:`; the rest untouched."""
    lines, stage, inside, bullet = [], "", False, ""
    for line in text.splitlines():
        if match := re.fullmatch(r"  (\w+):", line):
            stage, inside = match[1], False
        elif match := re.match(r"(    |      )\w", line):  # the deeper ones: of a foreach
            inside, bullet = line == f"{match[1]}deps:", f"{match[1]}  - "
            if inside and stage in wanted:
                lines.append(line)
                lines += [f"{bullet}{dep}" for dep in wanted[stage]]
                continue
        if inside and stage in wanted and is_code(line.removeprefix(bullet)):
            continue
        lines.append(line)
    return "\n".join(lines) + "\n"


def main(write: bool) -> int:
    found = compare()
    for name, (missing, superfluous) in found.items():
        for dep in missing:
            print(f"dvc.yaml: {name}: add dep {dep}")
        for dep in superfluous:
            print(f"dvc.yaml: {name}: remove dep {dep}")
    differs = any(missing or superfluous for missing, superfluous in found.values())
    if write and differs:
        path = ROOT / "dvc.yaml"
        text = path.read_text(encoding="utf-8")
        stages = stages_of(text)
        path.write_text(rewrite(text, {n: wanted_by(n, stages[n], ROOT) for n in found}), "utf-8")
        print("dvc.yaml is rewritten")
    return int(differs and not write)


if __name__ == "__main__":
    sys.exit(main(write="--write" in sys.argv[1:]))
