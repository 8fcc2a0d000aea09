"""DVC follows no imports, so dvc.yaml must list the code of each stage file by file."""

from __future__ import annotations

from pathlib import Path

from code_deps import ROOT, code_of, compare, is_code, rewrite, stages_of


def test_dvc_yaml_lists_the_code_that_each_stage_imports():
    wrong = [
        f"{stage}: {verb} {dep}"
        for stage, (missing, superfluous) in compare().items()
        for verb, deps in (("add", missing), ("remove", superfluous))
        for dep in deps
    ]
    assert not wrong, "code deps in dvc.yaml; `just deps` writes them:\n" + "\n".join(wrong)


def make_repository(root: Path) -> None:
    files = {
        "stages/__init__.py": "import sys\n",
        "stages/a.py": "import os\nfrom musicscope import one\nfrom musicscope.config import x\n",
        "stages/b.py": "def main():\n    import musicscope.sub.three\n",
        "src/musicscope/__init__.py": '"""Only a docstring."""\n',
        "src/musicscope/config/__init__.py": "x = 1\n",
        "src/musicscope/one.py": "from .two import name\n",
        "src/musicscope/two.py": "from . import one  # a cycle ends\nname = 1\n",
        "src/musicscope/four.py": "",
        "src/musicscope/sub/__init__.py": "from ..two import name\n",
        "src/musicscope/sub/three.py": "from .. import four\nimport yaml\nv = 1\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_imports_are_followed_through_functions_packages_and_relative_names(tmp_path):
    make_repository(tmp_path)
    assert code_of(tmp_path / "stages/a.py", tmp_path) == [
        "src/musicscope/one.py",
        "src/musicscope/two.py",
        "stages/a.py",
    ]
    (tmp_path / "src/musicscope/four.py").write_text("w = 2\n")
    assert code_of(tmp_path / "stages/b.py", tmp_path) == [
        "src/musicscope/four.py",
        "src/musicscope/one.py",
        "src/musicscope/sub/__init__.py",
        "src/musicscope/sub/three.py",
        "src/musicscope/two.py",
        "stages/b.py",
    ]


def test_a_missing_and_a_superfluous_dep_are_found(tmp_path):
    make_repository(tmp_path)
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n  a:\n    cmd: python -m stages.a\n    deps:\n      - stages/a.py\n"
        "      - src/musicscope/one.py\n      - src/musicscope/four.py\n      - data/clips\n"
    )
    assert compare(tmp_path) == {"a": (["src/musicscope/two.py"], ["src/musicscope/four.py"])}


def test_rewriting_changes_code_deps_only():
    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    before = stages_of(text)
    wanted = {name: ["src/musicscope/x.py", f"stages/{name}.py"] for name in before}
    after = stages_of(rewrite(text, wanted))
    for name, stage in before.items():
        others = [dep for dep in stage["deps"] if not is_code(dep)]
        assert after[name]["deps"] == wanted[name] + others
        assert {k: v for k, v in after[name].items() if k != "deps"} == {
            k: v for k, v in stage.items() if k != "deps"
        }
    assert [line for line in rewrite(text, wanted).splitlines() if line.startswith("#")] == [
        line for line in text.splitlines() if line.startswith("#")
    ]
