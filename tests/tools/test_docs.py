"""README and docs: tables and figure from metrics, links to files, commands that exist."""

import re
import subprocess
import sys

import pytest
import yaml

from musicscope.commands.cli import COMMANDS, build
from musicscope.core.stats import Estimate
from tests.conftest import ROOT
from tools import docs_tables

PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")],
    key=lambda path: path.as_posix(),
)
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}


def code(text):
    """All code of a page, inline and in blocks, with continued lines joined."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    joined = [re.sub(r"\\\n", " ", block) for block in blocks]
    lines = [line.split("#")[0] for block in joined for line in block.split("\n")]
    return [line.strip() for line in [*lines, *inline] if line.strip()]


CODE = [(page, line) for page, text in TEXTS.items() for line in code(text)]


def matches(pattern):
    """(page, group 1) of a pattern in all code; each once."""
    return sorted({(page, m[1]) for page, line in CODE for m in re.finditer(pattern, line)})


@pytest.mark.parametrize("page", docs_tables.PAGES)
def test_tables_are_those_of_the_metrics(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert docs_tables.BLOCK.search(text)
    assert docs_tables.filled(text) == text, "run `just tables`"


def test_every_table_is_used_once():
    used = [m[2] for page in docs_tables.PAGES for m in docs_tables.BLOCK.finditer(TEXTS[page])]
    assert sorted(used) == sorted(docs_tables.TABLES)


def test_an_estimate_is_written_with_its_interval_and_a_plain_number_without():
    tree = {"a": {"x": Estimate(0.5, 0.4, 0.6, 9, "share").as_dict(), "y": 1.0}}
    assert docs_tables.estimate(tree, "a.x", 1) == "0.5 [0.4, 0.6]"
    assert docs_tables.number(tree["a"]["x"], 1) == "0.5"
    assert docs_tables.estimate(tree, "a.y", 1) == docs_tables.number(1.0, 1) == "1.0"
    assert docs_tables.estimate({"x": None}, "x") == docs_tables.number(None) == "n/a"


def test_readme_is_an_overview():
    text = TEXTS["README.md"]
    assert len(text.splitlines()) <= 200
    assert "make test" in text


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", TEXTS[page]):
        if not target.startswith(("http://", "https://")):
            assert ((ROOT / page).parent / target).exists(), target


def test_every_page_is_in_the_navigation():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = set(re.findall(r"[\w/-]+\.md", str(config["nav"])))
    assert listed == {p.relative_to(ROOT / "docs").as_posix() for p in PAGES if p.parent != ROOT}


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "api.html").is_file()


def test_targets_and_recipes_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^#: (\S+)", makefile, re.MULTILINE)) | {"help"}
    justfile = (ROOT / "justfile").read_text(encoding="utf-8")
    recipes = set(re.findall(r"^([a-z-]+)[^:\n]*:(?!=)", justfile, re.MULTILINE))
    made = matches(r"^make ([a-z-]+)")
    assert made
    assert not [(page, name) for page, name in made if name not in targets]
    assert not [(page, name) for page, name in matches(r"\bjust ([a-z-]+)") if name not in recipes]


def test_stages_exist():
    stages = set(yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"])
    named = matches(r"dvc (?:repro|unfreeze)((?: [^-\s][\w@.-]*| -\w)+)")
    names = [(p, n.split("@")[0]) for p, found in named for n in found.split() if n[0] != "-"]
    assert names
    assert not [pair for pair in names if pair[1] not in stages]


def test_modules_and_scripts_exist():
    for _, name in matches(r"python -m ([\w.]+)"):
        path = name.replace(".", "/")
        files = [path + ".py", path + "/__main__.py"]
        assert any((ROOT / root / file).is_file() for root in ("", "src") for file in files), name
    for page, name in matches(r"python ([\w/]+\.py)"):
        assert (ROOT / name).is_file(), (page, name)


def test_commands_and_their_options_exist():
    named = matches(r"^(musicscope [a-z].*)$")
    assert {line.split()[1] for _, line in named} == set(COMMANDS)
    _, parsers = build()
    for page, line in named:
        parser = parsers[line.split()[1]]
        for option in re.findall(r"(?<=\s)(--?[a-zA-Z][\w-]*)", line):
            assert option in parser._option_string_actions, (page, line)


def test_params_that_are_set_exist():
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for page, key in matches(r"(?:-S '?|S=)([a-z_.]+)="):
        tree = params
        for part in key.split("."):
            assert part in tree, (page, key)
            tree = tree[part]
