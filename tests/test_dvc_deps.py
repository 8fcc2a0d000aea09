"""DVC follows no imports, so dvc.yaml must list the code of each stage file by file."""

from __future__ import annotations

from pathlib import Path

from code_deps import EVERY_LOADER, ROOT, compare, is_code, rewrite, stages_of

from musicscope.code_files import code_of, loader_files


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


def test_a_loader_is_a_dep_of_its_own_models_only():
    """In dvc.yaml no stage but those that tell models apart names a loader's file."""
    own = {
        name: set(loader_files(ROOT, name)) for name in ("musicgen", "audiocraft", "rave", "yue")
    }
    assert "src/musicscope/models/yue_codec.py" in own["yue"] - own["musicgen"]
    assert "src/musicscope/models/musicgen_decoder.py" in own["musicgen"]
    assert set(loader_files(ROOT)) == set().union(*own.values())
    stages = stages_of((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    for name, stage in stages.items():
        deps = set(stage["deps"])
        if name in EVERY_LOADER:
            assert set(loader_files(ROOT)) <= deps
        elif name != "pretrain":  # which trains one family, and is frozen
            assert "src/musicscope/models/yue.py" not in deps, name
            assert "src/musicscope/models/audiocraft.py" not in deps, name
        models = "data/models/${item.model}" in deps and name != "model_code"
        assert ("data/model_code/${item.model}.json" in deps) == models, name


def test_what_a_model_runs_on_is_its_familys_code(tmp_path, monkeypatch):
    from stages import model_code as stage

    copied = {*loader_files(ROOT), "src/musicscope/models/__init__.py"}
    for file in copied:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes((ROOT / file).read_bytes())
    for name, kind in (("tiny", "musicgen"), ("other", "llama")):
        (tmp_path / "data/models" / name).mkdir(parents=True)
        (tmp_path / "data/models" / name / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stage, "ROOT", tmp_path)

    def written(name: str) -> str:
        monkeypatch.setattr("sys.argv", ["model_code", name])
        stage.main()
        return (tmp_path / f"data/model_code/{name}.json").read_text()

    before = {name: written(name) for name in ("tiny", "other")}
    assert '"system": "yue"' in before["other"]
    with (tmp_path / "src/musicscope/models/yue_tokens.py").open("a") as file:
        file.write("# an edit\n")
    assert written("tiny") == before["tiny"]
    assert written("other") != before["other"]
