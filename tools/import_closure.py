"""Write, or check, the digest of the code that each DVC stage runs: code.lock.yaml.

    python -m tools.import_closure            say which digests are stale, exit 1 if any is
    python -m tools.import_closure --write    rewrite code.lock.yaml (`just deps`)

DVC does not follow imports. A stage depends on its code through one param, its digest in
code.lock.yaml: the hash of the syntax trees, docstrings left out, of all files that its script
imports from this repository. An edit of a comment or a docstring therefore reruns nothing.

Loaders of models are named as strings (`musicscope.models.registry.SYSTEMS`) and followed only from
`loader_files`: a stage that runs a model depends on data/model_code/<model>.json, the digests of
its own family's loader, so that an edit of one family reruns no other.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from musicscope.core.command_line import run_program

ROOT = Path(__file__).resolve().parents[1]
LOCK = "code.lock.yaml"
HEADER = "# Written by `just deps`: a digest of all code that each stage's script imports.\n"
PACKAGES = {"musicscope": "src/musicscope", "stages": "stages", "tools": "tools"}
EXEMPT = {
    "src/musicscope/config/": "reads and checks values that DVC tracks as params",
    "stages/__init__.py": "only puts src on sys.path and quiets libraries",
    "tools/": "hashes code",
}
"""Imported, yet no part of a digest: editing them cannot change what a stage makes."""
EVERY_LOADER = ("model_code", "train_judge")
"""Stages that depend on all loaders: one tells which of them a model needs, and the model of the
other may be none of params.yaml: models."""


# --- imports ----------------------------------------------------------------------------------


def module_file(module: str, root: Path) -> Path | None:
    """File of a module of this repository; None for any other name."""
    top, *rest = module.split(".")
    if top not in PACKAGES:
        return None
    path = (root / PACKAGES[top]).joinpath(*rest)
    for candidate in (path / "__init__.py", path.with_suffix(".py")):
        if candidate.is_file():
            return candidate
    return None


def module_name(path: Path, root: Path) -> str:
    """Dotted name of a file of this repository."""
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


def code_of(entry: Path, root: Path) -> list[str]:
    """`entry` and all it imports from this repository, sorted, relative to `root`."""
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
            todo += [file for file in ahead if file]
    names = [str(p.relative_to(root)) for p in seen if plain_tree(p) != EMPTY]
    return sorted(n for n in names if not n.startswith(tuple(EXEMPT)))


def loader_files(root: Path, system: str | None = None) -> list[str]:
    """Files of the loader of a family (None: of all families), sorted, relative to `root`.

    Raises:
        ValueError: the registry names no loader.
    """
    text = (root / "src/musicscope/models/registry.py").read_text(encoding="utf-8")
    modules = re.findall(r'"(\w+)": System\(\s*"(musicscope\.[\w.]+):', text)
    if not modules:
        raise ValueError('models/registry.py names no loader as System("module:class", ...)')
    entries = [module_file(module, root) for name, module in modules if system in (None, name)]
    return sorted({file for entry in entries if entry for file in code_of(entry, root)})


# --- digests ----------------------------------------------------------------------------------


def canonical(node: object) -> str:
    """Syntax tree as text, the same under every Python that parses the file.

    `ast.dump` is not: its fields, and how it shows empty ones, change between versions.
    """
    if isinstance(node, ast.JoinedStr):  # Python 3.12 leaves empty strings in some f-strings
        node.values = [v for v in node.values if not (isinstance(v, ast.Constant) and not v.value)]
    if isinstance(node, ast.AST):
        fields = ",".join(
            f"{name}={canonical(value)}"
            for name, value in ast.iter_fields(node)
            if value is not None and value != []
        )
        return f"{type(node).__name__}({fields})"
    if isinstance(node, list):
        return f"[{','.join(map(canonical, node))}]"
    return repr(node)


def plain_tree(path: Path) -> str:
    """Syntax tree of a file as text, without docstrings (any string that stands alone)."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            vars(node)["body"] = [
                n for n in body
                if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)
                        and isinstance(n.value.value, str))
            ]  # fmt: skip
    return canonical(tree)


EMPTY = canonical(ast.parse(""))


def digest(files: Iterable[str], root: Path) -> str:
    """SHA-256 over names and syntax trees of files, given relative to `root`."""
    total = hashlib.sha256()
    for file in sorted(files):
        total.update(f"{file}\0{plain_tree(root / file)}\0".encode())
    return total.hexdigest()[:32]


def current(root: Path = ROOT) -> dict[str, str]:
    """Digest per script in stages/."""
    loaders = set(loader_files(root))
    digests = {}
    for script in sorted((root / "stages").glob("[!_]*.py")):
        files = set(code_of(script, root))
        if script.stem in EVERY_LOADER:
            files |= loaders
        digests[script.stem] = digest(files, root)
    return digests


def written(root: Path = ROOT) -> dict[str, str]:
    """Digests in code.lock.yaml; empty if there is no such file."""
    path = root / LOCK
    return (yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None) or {}


def stage_script(cmd: str) -> str:
    """`prepare_data` in `python -m stages.prepare_data ...`; "" if there is none."""
    match = re.search(r"-m stages\.(\w+)", cmd)
    return match[1] if match else ""


def stages_of(text: str) -> dict[str, dict]:
    """Stages of a dvc.yaml; of a foreach, the body of its `do`."""
    return {name: body.get("do", body) for name, body in yaml.safe_load(text)["stages"].items()}


def faults(root: Path = ROOT) -> list[str]:
    """What is wrong with code.lock.yaml, and with the stages of dvc.yaml that should name it."""
    now, lock = current(root), written(root)
    lines = [f"{LOCK}: {name} is stale" for name in now if lock.get(name) != now[name]]
    lines += [f"{LOCK}: there is no stages/{name}.py" for name in lock if name not in now]
    for name, stage in stages_of((root / "dvc.yaml").read_text(encoding="utf-8")).items():
        script = stage_script(stage["cmd"])
        named = [p[LOCK] for p in stage.get("params", []) if isinstance(p, dict) and LOCK in p]
        if named != [[script]]:
            lines.append(f"dvc.yaml: {name} needs `{LOCK}: [{script}]` under params")
    return lines


def main(argv: list[str]) -> None:
    """Check, or with --write rewrite, code.lock.yaml."""
    if argv == ["--write"]:
        text = HEADER + yaml.safe_dump(current(), sort_keys=True)
        (ROOT / LOCK).write_text(text, encoding="utf-8")
    elif argv:
        sys.exit(__doc__)
    if lines := faults():
        sys.exit("\n".join([*lines, "`just deps` writes the digests"]))


if __name__ == "__main__":
    run_program(lambda: main(sys.argv[1:]))
