"""Measure the code base against its own limits: python -m tools.house

Prints files, lines, circular and upward imports, uses of `Any`, and sizes of the files that readers
meet first. Exit status 1 if an import breaks a layer or closes a circle; sizes are only reported,
with the goal beside each.

    python -m tools.house              everything
    python -m tools.house --imports    the import rules alone (part of `just lint`)
    python -m tools.house --repro      also the seconds of a `dvc repro` with nothing to do
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import time
from pathlib import Path

from musicscope.core.command_line import Parser, run_program
from tools.import_closure import ROOT, imported_modules, module_file, module_name

SOURCE = "src/musicscope"
LAYERS = (
    ("core", "config"),
    ("data", "models"),
    ("activations", "ablation"),
    ("dictionaries",),
    ("features", "judges"),
    ("finder", "maximisation", "steering"),
    ("report",),
    ("commands",),
)
"""From the ground up. A package imports from its own layer and those before it."""
WINGS = ("embedded", "data.sources", "commands")
"""Imported by stages, tools and themselves only."""
Edges = dict[str, set[str]]


def package_files(root: Path = ROOT) -> list[Path]:
    """All Python files of the package, sorted."""
    return sorted((root / SOURCE).rglob("*.py"))


def import_graph(root: Path = ROOT) -> Edges:
    """Module -> modules of the package that it imports, also inside functions."""
    edges: Edges = {}
    for path in package_files(root):
        name = module_name(path, root)
        targets = (module_file(module, root) for module in imported_modules(path, root))
        names = {module_name(target, root) for target in targets if target}
        edges[name] = {n for n in names if n.startswith("musicscope.")} - {name}
    return edges


def part_of(module: str) -> str:
    """`models.rave.model` of `musicscope.models.rave.model`."""
    return module.partition(".")[2]


def wing_of(module: str) -> str | None:
    """The side wing that a module belongs to."""
    part = part_of(module)
    return next((w for w in WINGS if part == w or part.startswith(f"{w}.")), None)


def layer_of(module: str) -> int | None:
    """Number of the layer of a module; None for what stands outside of them."""
    top = part_of(module).split(".")[0]
    return next((n for n, names in enumerate(LAYERS) if top in names), None)


def upward_imports(edges: Edges) -> list[str]:
    """Imports from a higher layer, or from a side wing, as `a -> b`."""
    found = []
    for module, targets in edges.items():
        for target in sorted(targets):
            own, other = layer_of(module), layer_of(target)
            into_wing = wing_of(target) not in (None, wing_of(module))
            upward = own is not None and other is not None and other > own
            if into_wing or upward:
                found.append(f"{module} -> {target}")
    return found


def circles(edges: Edges) -> list[list[str]]:
    """Groups of modules that import one another (strongly connected components, Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in sorted(edges.get(module, ())):
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            at = stack.index(module)
            group = stack[at:]
            del stack[at:]
            if len(group) > 1:
                found.append(sorted(group))

    for module in sorted(edges):
        if module not in index:
            visit(module)
    return found


def uses_of_any(root: Path = ROOT) -> int:
    """Uses of `typing.Any` as a name, imports left out."""
    return sum(
        isinstance(node, ast.Name) and node.id == "Any"
        for path in package_files(root)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    )


def repeated_names(root: Path = ROOT) -> list[str]:
    """Files whose name repeats the name of their folder."""
    return [
        str(path.relative_to(root / SOURCE))
        for path in package_files(root)
        if path.stem != "__init__" and path.parent.name in path.stem.split("_")
    ]


def summary_keys(root: Path = ROOT) -> int:
    """Numbers in metrics/summary.json."""

    def count(value: object) -> int:
        return sum(map(count, value.values())) if isinstance(value, dict) else 1

    return count(json.loads((root / "metrics/summary.json").read_text(encoding="utf-8")))


def size(root: Path, pattern: str) -> tuple[int, int]:
    """(files with more than one line, lines) of the files that match."""
    counts = [len(p.read_text(encoding="utf-8").splitlines()) for p in root.glob(pattern)]
    return sum(n > 1 for n in counts), sum(counts)


def seconds_of_repro(root: Path = ROOT) -> float:
    """Seconds in which `dvc repro --dry` finds nothing to do; RuntimeError if it finds work."""
    begin = time.monotonic()
    done = subprocess.run(["dvc", "repro", "--dry"], cwd=root, capture_output=True, text=True)
    if "up to date" not in done.stdout:
        raise RuntimeError(f"dvc repro has something to do:\n{done.stdout}{done.stderr}")
    return time.monotonic() - begin


def main(argv: list[str] | None = None) -> None:
    """Print the measures; exit with 1 if an import rule is broken."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imports", action="store_true", help="only the import rules")
    parser.add_argument("--repro", action="store_true", help="also time a dvc repro")
    args = parser.parse_args(argv)
    edges = import_graph()
    upward, rings = upward_imports(edges), circles(edges)
    if not args.imports:
        files, lines = size(ROOT, f"{SOURCE}/**/*.py")
        wing_files, wing_lines = size(ROOT, f"{SOURCE}/embedded/**/*.py")
        rows = [
            ("files in src, embedded/ left out", files - wing_files, "105"),
            ("lines in src, embedded/ left out", lines - wing_lines, "22,000"),
            ("files in src/musicscope/embedded", wing_files, ""),
            ("lines in src/musicscope/embedded", wing_lines, ""),
            ("uses of Any", uses_of_any(), "60"),
            ("file names that repeat their folder's", len(repeated_names()), "0"),
            ("circles of imports", len(rings), "0"),
            ("upward imports", len(upward), "0"),
            ("keys in metrics/summary.json", summary_keys(), "60"),
            ("bytes of dvc.yaml", (ROOT / "dvc.yaml").stat().st_size, "16,384"),
            ("bytes of dvc.lock", (ROOT / "dvc.lock").stat().st_size, "71,680"),
            ("lines of README.md", size(ROOT, "README.md")[1], "200"),
        ]
        if args.repro:
            rows.append(("seconds of a repro with nothing to do", seconds_of_repro(), "3"))
        for name, value, goal in rows:
            shown = f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"
            print(f"{name:42} {shown:>10}" + (f"   at most {goal}" if goal else ""))
    for line in upward:
        print(f"upward import: {line}", file=sys.stderr)
    for ring in rings:
        print(f"circle of imports: {', '.join(ring)}", file=sys.stderr)
    sys.exit(bool(upward or rings))


if __name__ == "__main__":
    run_program(main)
