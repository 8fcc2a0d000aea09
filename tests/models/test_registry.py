"""Models out of a hub and of local folders, by load_model and by the stage download_model."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch
import yaml
from dvc.utils.hydra import apply_overrides

from experiments.preset import presets
from musicscope.config import ParamsError, load_params
from musicscope.config.data import DownloadModel, Part
from musicscope.core.io import read_json
from musicscope.models import checkpoint, registry
from musicscope.models.audiocraft.convert import to_audiocraft
from musicscope.models.audiocraft.loading import CODEC_FILE, MODEL_FILE, TEXT_FOLDER
from musicscope.models.registry import SYSTEMS, load_model
from tests.conftest import CAPTIONS
from tests.support import rave_export
from tools import smoke
from tools.import_closure import ROOT, stages_of

REVISION = "4c8334b02c6ec4e8664a91979669a501ec497792"
LOCAL = DownloadModel(source="", revision="", system="auto", files=("*",), parts=())


def test_a_local_folder_becomes_a_model_that_loads(tiny_musicgen, tmp_path):
    (tmp_path / "hub").mkdir()
    for path in tiny_musicgen.iterdir():  # as the hub's cache: links to files elsewhere
        (tmp_path / "hub" / path.name).symlink_to(path)
    (tmp_path / "hub/.cache").mkdir()
    (tmp_path / "hub/.cache/lock").write_text("not a part of it")
    target = tmp_path / "data/models/tiny"
    found = registry.download(replace(LOCAL, source=str(tmp_path / "hub")), target)
    assert found["system"] == "musicgen"
    assert found["files"] == len(list(tiny_musicgen.iterdir()))
    assert found["bytes"] == sum(p.stat().st_size for p in tiny_musicgen.iterdir())
    assert not any(p.is_symlink() for p in target.iterdir())
    assert not (target / ".cache").exists()
    assert load_model(target).num_layers == load_model(tiny_musicgen).num_layers


def test_a_page_in_two_formats_is_taken_in_the_one_that_was_asked_for(tiny_musicgen, tmp_path):
    page, made = tmp_path / "page", tmp_path / "made"
    shutil.copytree(tiny_musicgen, page)
    to_audiocraft(tiny_musicgen, made)
    for file in (MODEL_FILE, CODEC_FILE):
        (made / file).rename(page / file)
    text = Part(TEXT_FOLDER, str(made / TEXT_FOLDER), "", ("*",))
    entry = replace(LOCAL, source=str(page), system="audiocraft", parts=(text,))
    with pytest.raises(ValueError, match="taken for musicgen, not audiocraft: let files name"):
        registry.download(entry, tmp_path / "both")
    assert not (tmp_path / "both").exists()
    found = registry.download(replace(entry, files=(MODEL_FILE, CODEC_FILE)), tmp_path / "one")
    assert found["system"] == "audiocraft"
    assert type(load_model(tmp_path / "one")).__name__ == "AudiocraftModel"
    assert registry.download(replace(LOCAL, source=str(page)), tmp_path / "two")["system"] == (
        "musicgen"
    )


def test_parts_come_from_elsewhere(tmp_path):
    for name in ("llama/config.json", "llama/README.md", "code/deep/tokenizer.model",
                 "codec/config.json", "codec/model.safetensors"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"model_type": "llama"}')
    entry = replace(
        LOCAL, source=str(tmp_path / "llama"), files=("*.json",),
        parts=(
            Part("xcodec", str(tmp_path / "codec"), "", ("*",)),
            Part("", str(tmp_path / "code/deep"), "", ("tokenizer.model",)),
        ),
    )  # fmt: skip
    assert registry.download(entry, tmp_path / "yue")["system"] == "yue"
    names = sorted(
        p.relative_to(tmp_path / "yue").as_posix() for p in (tmp_path / "yue").rglob("*")
    )
    assert names == ["config.json", "tokenizer.model", "xcodec", "xcodec/config.json",
                     "xcodec/model.safetensors"]  # fmt: skip


def test_nothing_is_left_of_what_is_no_model_or_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text/readme.md").write_text("no model")
    target = tmp_path / "out/model"
    cases = {
        "empty": "has no file",
        "text": "holds no model of musicgen",
        "absent": "is no folder here; a hub id needs a revision",
    }
    for name, message in cases.items():
        with pytest.raises(FileNotFoundError, match=message):
            registry.download(replace(LOCAL, source=str(tmp_path / name)), target)
        assert not target.exists()
        assert not list(target.parent.iterdir())
    rave_export.save(rave_export.TinyRave(), tmp_path / "empty/a.ts")
    (tmp_path / "text/config.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"text/config\.json is a git-lfs pointer"):
        registry.download(replace(LOCAL, source=str(tmp_path / "text")), target)
    assert not target.exists()
    outside = replace(
        LOCAL, source=str(tmp_path / "empty"), parts=(Part("../x", str(tmp_path), "", ("*",)),)
    )
    with pytest.raises(ValueError, match="leaves the folder"):
        registry.download(outside, target)


def test_a_hub_id_is_fetched_at_its_revision_by_what_its_family_needs(
    tiny_musicgen, tmp_path, monkeypatch
):
    asked = []

    def snapshot(name, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(tiny_musicgen)

    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot)
    entry = replace(LOCAL, source="facebook/musicgen-small", revision="4c8334b")
    assert registry.download(entry, tmp_path / "small")["system"] == "musicgen"
    assert asked == [
        ("facebook/musicgen-small", "4c8334b", ["config.json"]),
        ("facebook/musicgen-small", "4c8334b", [*checkpoint.TEXTS, "model*.safetensors"]),
    ]
    asked.clear()
    registry.download(replace(entry, files=("*.json", "*.safetensors")), tmp_path / "again")
    assert asked == [("facebook/musicgen-small", "4c8334b", ["*.json", "*.safetensors"])]
    with pytest.raises(ValueError, match="needs revision="):
        registry.download(replace(entry, revision="main"), tmp_path / "moving")
    assert not (tmp_path / "moving").exists()


def test_systems_that_params_know_are_those_there_are():
    known = get_args(get_type_hints(DownloadModel)["system"])
    assert known == ("auto", *SYSTEMS)


OVERRIDE = (
    "+download_model.musicgen-small={source: facebook/musicgen-small, revision: '4c8334b', "
    "system: auto, files: ['*'], parts: []}"
)


def test_an_override_adds_a_model(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    apply_overrides(path, [OVERRIDE])
    params = load_params(path)
    assert params.download_model["musicgen-small"].revision == "4c8334b"
    hash(params)
    for wrong, message in (
        (OVERRIDE.replace("auto", "mp3"), r"musicgen-small.system = 'mp3' .*'auto'"),
        (OVERRIDE.replace("files: ['*'], ", ""), "musicgen-small.files is missing"),
        (OVERRIDE.replace("musicgen-small=", "nano-small="), "nano-small: this name is of a model"),
        (OVERRIDE.replace("{source: facebook/musicgen-small,", "{"), "small.source is missing"),
        ("+download_model.musicgen-small=a", "musicgen-small .*'a' is not a section"),
    ):
        path.write_text((ROOT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
        apply_overrides(path, [wrong])
        with pytest.raises(ParamsError, match=message):
            load_params(path)


def test_a_source_that_overlaps_the_models_folder_is_refused(tmp_path):
    (tmp_path / "mine/sub").mkdir(parents=True)
    (tmp_path / "mine/config.json").write_text('{"model_type": "musicgen"}')
    (tmp_path / "link").symlink_to("mine")
    source = str(tmp_path / "mine")
    for entry, target in (
        (replace(LOCAL, source=source), "mine"),
        (replace(LOCAL, source=source), "mine/sub"),
        (replace(LOCAL, source=f"{source}/sub"), "mine"),
        (replace(LOCAL, source=str(tmp_path / "link")), "mine"),
        (replace(LOCAL, source=str(tmp_path), parts=(Part("", source, "", ("*",)),)), "mine"),
    ):
        with pytest.raises(ValueError, match="which is replaced, overlap: move the files"):
            registry.download(entry, tmp_path / target)
    assert (tmp_path / "mine/config.json").read_text() == '{"model_type": "musicgen"}'
    assert (tmp_path / "mine/sub").is_dir()


def test_a_models_folder_that_was_put_there_by_hand_is_never_replaced(
    tiny_musicgen, tmp_path, monkeypatch
):
    from stages import download_model as stage

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["download_model", "mine"])
    entry = replace(LOCAL, source=str(tiny_musicgen))
    params = SimpleNamespace(download_model={"mine": entry})
    monkeypatch.setattr(stage, "load_params", lambda: params)
    target = tmp_path / "data/models/mine"
    target.mkdir(parents=True)
    (target / "weights.bin").write_bytes(b"by hand")

    def refused() -> None:
        with pytest.raises(SystemExit, match="data/models/mine is there and no run of download_mo"):
            stage.main()
        assert (target / "weights.bin").read_bytes() == b"by hand"

    refused()
    refused()  # the first refusal left no note that would let the second pass
    (target / "weights.bin").rename(tmp_path / "weights.bin")
    with monkeypatch.context() as patch:  # a run that fails leaves none either
        patch.setattr(stage, "download", lambda entry, target: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stage.main()
    (tmp_path / "weights.bin").rename(target / "weights.bin")
    refused()
    (target / "weights.bin").rename(tmp_path / "weights.bin")
    stage.main()  # an empty folder is nobody's work
    assert (target / "config.json").is_file()
    stage.main()  # killed before DVC wrote dvc.lock: the note says whose it is
    shutil.rmtree(tmp_path / ".dvc")
    with pytest.raises(SystemExit, match="no run of download_model made it"):
        stage.main()
    (tmp_path / "dvc.lock").write_text("stages: {download_model@mine: {}}")
    stage.main()


def test_dvc_removes_no_out_of_a_stage_that_reads_what_a_user_names():
    stages = stages_of((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    for name in ("prepare_data", "download_model", "find_concept"):
        for out in stages[name]["outs"]:
            (path, options), *_ = out.items()
            assert options.get("persist") or path.startswith("metrics/"), name


@pytest.mark.slow
def test_dvc_leaves_a_models_folder_that_was_put_there_by_hand(tiny_musicgen, tmp_path):
    folder, env = tmp_path / "repo", smoke.environment()
    own = folder / "data/models/mine"
    entry = {"revision": "", "system": "auto", "files": ["*"], "parts": []}
    models = {"mine": {**entry, "source": str(tiny_musicgen)},
              "same": {**entry, "source": "data/models/same"}}  # fmt: skip
    smoke.make_copy(folder, env, {"models": ["mine", "same"], "download_model": models})
    shutil.copytree(tiny_musicgen, own.with_name("same"))
    own.mkdir()
    (own / "weights.bin").write_bytes(b"by hand")
    for name, wanted in (("mine", "no run of download_model made it"), ("same", "made it")):
        done = subprocess.run(["dvc", "repro", f"download_model@{name}"], cwd=folder, env=env,
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode
        assert wanted in done.stderr
    assert (own / "weights.bin").read_bytes() == b"by hand"
    assert (own.with_name("same") / "config.json").is_file()


@pytest.mark.slow
def test_dvc_fetches_a_model_before_its_first_use_and_again_only_when_asked(
    tiny_musicgen, tmp_path
):
    folder, env = tmp_path / "repo", smoke.environment()
    entry = {"source": str(tiny_musicgen), "revision": "", "system": "auto", "files": ["*"],
             "parts": []}  # fmt: skip
    smoke.make_copy(folder, env, {"models": ["tiny", "other"], "download_model": {"tiny": entry}})

    def dvc(*words: str) -> str:
        done = subprocess.run(["dvc", *words], cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    graph = dvc("dag", "--dot", "ablate@tiny")
    assert '"download_model@tiny" -> "ablate@tiny"' in graph
    assert "download_model@other" not in graph
    dvc("repro", "download_model@tiny")
    assert read_json(folder / "metrics/download_model/tiny.json")["system"] == "musicgen"
    assert (folder / "data/models/tiny/config.json").is_file()
    params = folder / "params.yaml"
    text = params.read_text(encoding="utf-8")
    more = yaml.safe_load(text)
    more["download_model"]["other"] = entry
    params.write_text(yaml.safe_dump(more, sort_keys=False), encoding="utf-8")
    out = dvc("repro", "download_model@tiny", "download_model@other")
    assert "Stage 'download_model@tiny' didn't change, skipping" in out
    assert "Running stage 'download_model@other'" in out
    assert Path(folder / "data/models/other/config.json").is_file()


def test_the_page_of_experiments_says_how_to_fetch_each_model_that_it_names(tmp_path):
    page = (ROOT / "experiments/README.md").read_text(encoding="utf-8")
    (block,) = (b for b in page.split("```yaml\n")[1:] if b.startswith("download_model:"))
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    path = tmp_path / "params.yaml"
    merged = smoke.merged(params, yaml.safe_load(block.split("```")[0]))
    path.write_text(yaml.safe_dump(merged), encoding="utf-8")
    fetched = load_params(path).download_model
    named = {m for sets in presets().values() for s in sets if s.startswith("models=")
             for m in s.removeprefix("models=[").removesuffix("]").split(",")}  # fmt: skip
    assert named == set(fetched)
    (other,) = (b for b in page.split("```yaml\n")[1:] if b.startswith("musicgen-medium:"))
    merged["download_model"] = yaml.safe_load(other.split("```")[0])
    path.write_text(yaml.safe_dump(merged), encoding="utf-8")
    assert load_params(path).download_model["musicgen-medium"].system == "audiocraft"
    for entry in fetched.values():  # a revision says that it is a hub id
        assert entry.source.startswith("downloads/") == (entry.revision == "")


# ---- the hub


def test_a_hub_id_is_read_from_the_cache_at_its_revision(tiny_musicgen, tmp_path, monkeypatch):
    codes = torch.arange(40).reshape(1, 4, 10)
    model = load_model(tiny_musicgen)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshots = tmp_path / "models--someone--musicgen-tiny/snapshots"
    shutil.copytree(tiny_musicgen, snapshots / REVISION)
    shutil.copytree(tiny_musicgen, snapshots / ("0" * 40))
    (snapshots / ("0" * 40) / "config.json").write_text("{}")  # another commit, never looked at
    found = load_model("someone/musicgen-tiny", revision=REVISION)
    assert found.name == "musicgen-tiny"
    one, other = (m.forward(m.with_captions(codes, [CAPTIONS[0]])) for m in (found, model))
    assert torch.equal(one, other)
    for revision in (None, "main"):
        with pytest.raises(ValueError, match="someone/musicgen-tiny needs revision="):
            load_model("someone/musicgen-tiny", revision=revision)
    with pytest.raises(FileNotFoundError, match=r"could not fetch someone/other at revision 4c83"):
        load_model("someone/other", revision=REVISION)


class FakeHub(http.server.BaseHTTPRequestHandler):
    """The hub's answers for a few model pages: which files there are, and the files."""

    pages: dict[str, dict[str, bytes]]
    asked: set[tuple[str, str]]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        for page, files in self.pages.items():
            if self.path.startswith(f"/api/models/{page}/revision/{REVISION}"):
                names = [{"rfilename": name} for name in files]
                info = {"id": page, "sha": REVISION, "siblings": names}
                return self.answer(json.dumps(info).encode())
            if self.path.startswith(f"/api/models/{page}/tree/{REVISION}"):
                tree = [
                    {"type": "file", "path": n, "size": len(c), "oid": "0" * 40}
                    for n, c in files.items()
                ]
                return self.answer(json.dumps(tree).encode())
            _, found, name = self.path.partition(f"/{page}/resolve/{REVISION}/")
            if found and name in files:
                if self.command == "GET":
                    self.asked.add((page, name))
                return self.answer(files[name])
        self.send_response(404)
        self.send_header("Content-Length", "0")
        return self.end_headers()

    def answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


def test_only_what_is_needed_is_fetched_from_the_hub(tmp_path):
    texts = ["config.json", "tokenizer.json"]
    released = ["state_dict.bin", "compression_state_dict.bin"]
    others = ["README.md", "tf_model.h5", "pytorch_model.bin"]
    wanted = {
        ("someone/released", "audiocraft"): released,
        ("someone/new", "musicgen"): [*texts, "model.safetensors"],
        ("someone/old", "musicgen"): [*texts, "pytorch_model.bin"],
    }
    FakeHub.asked = set()
    FakeHub.pages = {
        page: {
            name: f"{page} {name}".encode()
            for name in {*texts, *released, *others, *wanted[page, system]}
        }
        for page, system in wanted
    }
    script = (
        "from musicscope.models import checkpoint\n"
        f"for page, system in {list(wanted)!r}:\n"
        f"    print(checkpoint.fetch_family(page, {REVISION!r}, system))"
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={
                **os.environ,
                "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                "HF_HUB_OFFLINE": "0",
                "HF_HOME": str(tmp_path),
                "HF_HUB_DISABLE_XET": "1",
                "NO_PROXY": "127.0.0.1",
                "PYTHONPATH": str(ROOT / "src"),
            },
            capture_output=True,
            text=True,
        )
        server.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    assert FakeHub.asked == {(page, name) for (page, _), names in wanted.items() for name in names}
    folders = [Path(line) for line in done.stdout.splitlines()[-3:]]
    for folder, ((page, _), names) in zip(folders, wanted.items(), strict=True):
        assert folder.name == REVISION
        assert {path.name: path.read_text() for path in folder.iterdir()} == {
            name: f"{page} {name}" for name in names
        }


def test_every_system_with_patterns_names_weights():
    for system, rows in checkpoint.FILES.items():
        assert all(set(row) - set(checkpoint.TEXTS) for row in rows), system
