"""DVC follows no imports: code.lock.yaml holds a digest of each stage's code."""

from __future__ import annotations

import ast
from pathlib import Path

import yaml

from tools.import_closure import (
    EVERY_LOADER,
    LOCK,
    ROOT,
    canonical,
    code_of,
    current,
    digest,
    faults,
    loader_files,
    stage_script,
    stages_of,
)


def test_code_lock_holds_the_code_that_each_stage_imports():
    assert not faults(), "`just deps` writes them"


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


def test_docstrings_and_comments_change_no_digest_and_code_does(tmp_path):
    make_repository(tmp_path)
    files = ["src/musicscope/two.py"]
    path = tmp_path / files[0]
    before = digest(files, tmp_path)
    path.write_text(f'"""What it is."""\n# why\n{path.read_text()}')
    assert digest(files, tmp_path) == before
    path.write_text(path.read_text().replace("name = 1", "name = 2"))
    assert digest(files, tmp_path) != before


def test_the_text_of_a_tree_is_the_same_under_every_python():
    """Python 3.12 gives functions the field type_params, 3.13 leaves empty fields out of dumps."""
    tree = ast.parse('def f(x):\n    return f"{x}", ["", x]\n')
    assert canonical(tree) == (
        "Module(body=[FunctionDef(name='f',args=arguments(args=[arg(arg='x')]),body=[Return(value="
        "Tuple(elts=[JoinedStr(values=[FormattedValue(value=Name(id='x',ctx=Load()),conversion=-1)]"
        "),List(elts=[Constant(value=''),Name(id='x',ctx=Load())],ctx=Load())],ctx=Load()))])])"
    )


def test_stale_digests_and_stages_without_one_are_named(tmp_path):
    make_repository(tmp_path)
    registry = tmp_path / "src/musicscope/models/registry.py"
    registry.parent.mkdir()
    registry.write_text('SYSTEMS = {"x": System("musicscope.four:X", None)}\n')
    stages = {
        "a": {"cmd": "python -m stages.a", "params": ["seed", {LOCK: ["a"]}]},
        "b": {"foreach": ["x"], "do": {"cmd": "python -m stages.b x"}},
    }
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    (tmp_path / LOCK).write_text(yaml.safe_dump({**current(tmp_path), "b": "0", "gone": "1"}))
    assert faults(tmp_path) == [
        "code.lock.yaml: b is stale",
        "code.lock.yaml: there is no stages/gone.py",
        "dvc.yaml: b needs `code.lock.yaml: [b]` under params",
    ]


def test_a_loader_is_part_of_its_own_models_code_only():
    """No stage but those that tell models apart imports a loader's file."""
    own = {
        name: set(loader_files(ROOT, name)) for name in ("musicgen", "audiocraft", "rave", "yue")
    }
    assert "src/musicscope/models/yue/tokens.py" in own["yue"] - own["musicgen"]
    assert "src/musicscope/models/musicgen/decoder.py" in own["musicgen"]
    assert set(loader_files(ROOT)) == set().union(*own.values())
    stages = stages_of((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    for name, stage in stages.items():
        script = stage_script(stage["cmd"])
        if name not in (*EVERY_LOADER, "pretrain"):  # pretrain trains one family, and is frozen
            code = set(code_of(ROOT / "stages" / f"{script}.py", ROOT))
            assert "src/musicscope/models/yue/model.py" not in code, name
            assert "src/musicscope/models/audiocraft/model.py" not in code, name
        deps = set(stage.get("deps", []))
        models = "data/models/${item.model}" in deps and name != "model_code"
        assert ("data/model_code/${item.model}.json" in deps) == models, name


def test_what_a_model_runs_on_is_its_familys_code(tmp_path, monkeypatch):
    from stages import model_code as stage

    copied = {*loader_files(ROOT), "src/musicscope/models/registry.py"}
    for file in copied:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes((ROOT / file).read_bytes())
    for name, kind in (("tiny", "musicgen"), ("other", "llama")):
        (tmp_path / "data/models" / name).mkdir(parents=True)
        (tmp_path / "data/models" / name / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["models"] = ["tiny", "other"]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stage, "ROOT", tmp_path)

    def written(name: str) -> str:
        monkeypatch.setattr("sys.argv", ["model_code", name])
        stage.main()
        return (tmp_path / f"data/model_code/{name}.json").read_text()

    before = {name: written(name) for name in ("tiny", "other")}
    assert '"system": "yue"' in before["other"]
    with (tmp_path / "src/musicscope/models/yue/tokens.py").open("a") as file:
        file.write("EDITED = True\n")
    assert written("tiny") == before["tiny"]
    assert written("other") != before["other"]
