"""Folders and hub pages in every layout that MusicGen comes in, and batches that fit a limit."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from musicscope.models import hub
from musicscope.models.registry import load_model
from tests.conftest import CAPTIONS, ROOT

PROMPTS = [CAPTIONS[0], None, CAPTIONS[2]]
REVISION = "4c8334b02c6ec4e8664a91979669a501ec497792"


@pytest.fixture(scope="module")
def model(tiny_musicgen: Path):
    return load_model(tiny_musicgen)


@pytest.fixture(scope="module")
def batch(model):
    audio = torch.randn(3, 3200, generator=torch.Generator().manual_seed(1))
    return model.encode(audio, PROMPTS)


def old_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As the hub's MusicGen pages spell them, with the table of positions that they hold."""
    renamed = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): value
        for name, value in weights.items()
    }
    assert sum(name.endswith("weight_g") for name in renamed) > 5
    renamed["decoder.model.decoder.embed_positions.weights"] = torch.zeros(512, 48)
    return renamed


def bin_layout(source: Path, out: Path, shards: int = 1) -> Path:
    """The folder with pytorch_model*.bin under the old names instead of safetensors."""
    shutil.copytree(source, out)
    weights = old_names(load_file(out / "model.safetensors"))
    (out / "model.safetensors").unlink()
    if shards == 1:
        torch.save(weights, out / "pytorch_model.bin")
        return out
    names, index = sorted(weights), {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = {name: weights[name] for name in names[i::shards]}
        torch.save(part, out / file)
        index.update(dict.fromkeys(part, file))
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    (out / "pytorch_model.bin.index.json").write_text(text)
    return out


@pytest.mark.parametrize("shards", [1, 3])
def test_the_bin_layout_is_the_same_model(tiny_musicgen, model, batch, tmp_path, shards):
    other = load_model(bin_layout(tiny_musicgen, tmp_path / "bin", shards))
    expected, found = model.hf.state_dict(), other.hf.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert torch.equal(other.forward(batch), model.forward(batch))
    assert torch.equal(other.decode(batch.codes), model.decode(batch.codes))


class Stranger:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_bin_with_other_objects_is_not_unpickled(tiny_musicgen, tmp_path):
    folder = bin_layout(tiny_musicgen, tmp_path / "bin")
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({**weights, "extra": Stranger(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match="weights_only|WeightsUnpickler|Unsupported global"):
        load_model(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_decoders_alone(tiny_musicgen, model, batch, dtype):
    half = load_model(tiny_musicgen, dtype=dtype)
    kinds = {name: {p.dtype for p in part.parameters()} for name, part in half.hf.named_children()}
    assert kinds == {
        "text_encoder": {torch.float32},
        "audio_encoder": {torch.float32},
        "decoder": {dtype},
        "enc_to_dec_proj": {dtype},
    }
    expected = model.hf.decoder.lm_heads[1].weight.to(dtype)
    assert torch.equal(half.hf.decoder.lm_heads[1].weight, expected)
    seen = half.with_captions(batch.codes, PROMPTS)
    logits = half.forward(seen)
    assert logits.dtype == seen.text.dtype == dtype
    assert 1e-5 < (logits.float() - model.forward(batch)).abs().max() < 0.2
    assert half.generate(["flute"], 0.1, seed=0)[1].shape == (1, 4, 5)
    assert half.weight_bytes < model.weight_bytes
    with pytest.raises(ValueError, match=r"dtype must be one of .*bfloat16"):
        load_model(tiny_musicgen, dtype=torch.int8)


def test_a_device_map_spreads_the_layers(tiny_musicgen, model, batch, tmp_path):
    parts = {"text_encoder": "cpu", "audio_encoder": "cpu", "enc_to_dec_proj": "cpu",
             "decoder.lm_heads": "cpu", "decoder.model.decoder.embed_tokens": "cpu",
             "decoder.model.decoder.embed_positions": "cpu",
             "decoder.model.decoder.layer_norm": "cpu"}  # fmt: skip
    # On a machine without accelerators the disk is another place: weights come when a layer runs.
    layers = {f"decoder.model.decoder.layers.{i}": "disk" if i in (1, 2) else "cpu"
              for i in range(4)}  # fmt: skip
    spread = load_model(
        tiny_musicgen, device_map={**parts, **layers}, offload_folder=str(tmp_path / "offload")
    )
    held = spread.hf.decoder.model.decoder.layers[1].fc1.weight
    assert held.device.type == "meta"
    assert spread.device.type == "cpu"
    assert torch.equal(spread.forward(batch), model.forward(batch))
    edit = {"layers.2": lambda x, _: x * 0.5}
    assert torch.equal(spread.forward(batch, edit), model.forward(batch, edit))
    _, codes = spread.generate(PROMPTS, 0.1, seed=0, hooks=edit, temperature=0.0)
    assert torch.equal(codes, model.generate(PROMPTS, 0.1, 0, edit, temperature=0.0)[1])
    with pytest.raises(ValueError, match=r"\['offload_folder'\] need a device_map"):
        load_model(tiny_musicgen, offload_folder="x")


def changed(source: Path, out: Path, change) -> Path:
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text())
    change(config)
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_what_is_not_supported_is_refused_by_name(tiny_musicgen, tmp_path):
    melody = changed(
        tiny_musicgen, tmp_path / "melody", lambda c: c.update(model_type="musicgen_melody")
    )
    with pytest.raises(ValueError, match=r"melody/config\.json.*melody conditioning is not supp"):
        load_model(melody)
    stereo = changed(
        tiny_musicgen, tmp_path / "stereo", lambda c: c["decoder"].update(audio_channels=2)
    )
    with pytest.raises(ValueError, match=r"stereo MusicGen.*only mono"):
        load_model(stereo)
    other = changed(tiny_musicgen, tmp_path / "other", lambda c: c.update(model_type="bert"))
    with pytest.raises(FileNotFoundError, match=r"other holds no model of musicgen.*'bert'"):
        load_model(other)
    with pytest.raises(ValueError, match=r"no system 'magnet'; known: musicgen, audiocraft"):
        load_model(tiny_musicgen, system="magnet")


def test_weights_that_do_not_fit_the_config_are_refused(tiny_musicgen, tmp_path):
    few = changed(
        tiny_musicgen, tmp_path / "few", lambda c: c["decoder"].update(num_hidden_layers=3)
    )
    with pytest.raises(ValueError, match=r"few are not those.*unknown.*layers\.3"):
        load_model(few)
    many = changed(
        tiny_musicgen, tmp_path / "many", lambda c: c["decoder"].update(num_hidden_layers=5)
    )
    with pytest.raises(ValueError, match=r"many are not those.*missing.*layers\.4"):
        load_model(many)
    (few / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"few holds no weights \(model\.safetensors"):
        load_model(few)


# ---- the hub


def test_a_hub_id_is_read_from_the_cache_at_its_revision(
    tiny_musicgen, model, batch, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshots = tmp_path / "models--someone--musicgen-tiny/snapshots"
    shutil.copytree(tiny_musicgen, snapshots / REVISION)
    shutil.copytree(tiny_musicgen, snapshots / ("0" * 40))
    (snapshots / ("0" * 40) / "config.json").write_text("{}")  # another commit, never looked at
    found = load_model("someone/musicgen-tiny", revision=REVISION)
    assert found.name == "musicgen-tiny"
    assert torch.equal(found.forward(batch), model.forward(batch))
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
        "from musicscope.models import hub\n"
        f"for page, system in {list(wanted)!r}:\n"
        f"    print(hub.fetch_model(page, {REVISION!r}, system))"
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
    for system, rows in hub.FILES.items():
        assert all(set(row) - set(hub.TEXTS) for row in rows), system
