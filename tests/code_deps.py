"""The code that each DVC stage imports, compared with, or written into, dvc.yaml.

DVC does not follow imports: a stage reruns only for the files listed under `deps`.

    python tests/code_deps.py            say what differs, exit 1 if anything does
    python tests/code_deps.py --write    rewrite the code deps in dvc.yaml (`just deps`)
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]

# Imported, yet no dep: editing them cannot change what a stage makes.
EXEMPT = {
    "src/musicscope/config/": "reads and checks values that DVC tracks as params",
    "src/musicscope/typed_yaml.py": "the same",
    "stages/__init__.py": "only puts src on sys.path",
}


def module_file(module: str, root: Path) -> Path | None:
    """The file of `musicscope.x` or `stages.x`; None for what is not ours or not a module."""
    top, *rest = module.split(".")
    base = {"musicscope": root / "src" / "musicscope", "stages": root / "stages"}.get(top)
    if base is None:
        return None
    path = base.joinpath(*rest)
    for candidate in (path / "__init__.py", path.with_suffix(".py")):
        if candidate.is_file():
            return candidate
    return None


def module_name(path: Path, root: Path) -> str:
    relative = path.relative_to(root).with_suffix("")
    parts = relative.parts[1:] if relative.parts[0] == "src" else relative.parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path, root: Path) -> Iterator[str]:
    """Names that `path` imports, also inside functions; `from a import b` gives a and a.b."""
    name = module_name(path, root)
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def holds_code(path: Path) -> bool:
    """False for a package file with at most a docstring: every stage would depend on it."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return any(not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)) for n in body)


def code_of(entry: Path, root: Path = ROOT) -> list[str]:
    """`entry` and all it imports out of this repository, sorted, relative to `root`."""
    seen: set[Path] = set()
    todo = [entry]
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for module in imported_modules(path, root):
            parts = module.split(".")
            # Importing a.b.c runs a and a.b as well.
            ahead = (module_file(".".join(parts[:n]), root) for n in range(1, len(parts) + 1))
            todo += [found for found in ahead if found]
    names = [str(p.relative_to(root)) for p in seen if holds_code(p)]
    return sorted(n for n in names if not n.startswith(tuple(EXEMPT)))


def is_code(dep: str) -> bool:
    return dep.endswith(".py") and dep.startswith(("src/", "stages/"))


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
        wanted = set(code_of(entry, root))
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
        entries = {n: ROOT / "stages" / f"{stage_module(stages[n]['cmd'])}.py" for n in found}
        path.write_text(rewrite(text, {n: code_of(e) for n, e in entries.items()}), "utf-8")
        print("dvc.yaml is rewritten")
    return int(differs and not write)


if __name__ == "__main__":
    sys.exit(main(write="--write" in sys.argv[1:]))
