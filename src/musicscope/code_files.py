"""The files of this repository that a script imports, found in its source: DVC follows no imports.

Loaders of models are named as strings (`musicscope.models.SYSTEMS`) and followed only from
`loader_files`: a stage that runs a model depends on data/model_code/<model>.json, which says what
its own family's loader consists of, so that an edit of one family reruns no other.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

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


def code_of(entry: Path, root: Path) -> list[str]:
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


def loader_files(root: Path, system: str | None = None) -> list[str]:
    """What the loader of a family (of all: None) consists of, sorted, relative to `root`."""
    text = (root / "src/musicscope/models/__init__.py").read_text(encoding="utf-8")
    modules = re.findall(r'"(\w+)": System\(\s*"(musicscope\.[\w.]+):', text)
    if not modules:
        raise ValueError('models/__init__.py names no loader as System("module:class", ...)')
    entries = [module_file(module, root) for name, module in modules if system in (None, name)]
    return sorted({file for entry in entries if entry for file in code_of(entry, root)})
