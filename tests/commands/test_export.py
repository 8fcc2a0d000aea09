"""`musicscope export` and `import`: files for other tools, a model card, a push to a hub."""

from __future__ import annotations

import base64
import http.server
import json
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from musicscope.activations.store import ActivationStore, StoreWriter
from musicscope.commands import cli
from musicscope.commands.export import features
from musicscope.core.io import write_json
from musicscope.dictionaries.core import TopKSAE
from musicscope.dictionaries.formats import About, load_sae_folder
from tests.support.dictionaries import WIDTH, planted_frames

F, K, FRAMES = 48, 3, 40


def make_sae() -> TopKSAE:
    g = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(F, WIDTH, generator=g), dim=1)
    b_dec = torch.linspace(-20, 20, WIDTH)
    return TopKSAE(W_dec.clone(), torch.zeros(F), W_dec, b_dec, K)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with an SAE, its activations and metrics, as the pipeline leaves them."""
    monkeypatch.chdir(tmp_path)
    sae = make_sae()
    sae.save("data/sae/tiny/top1/seed-0", {"layer": "layers.1", "lm_name": "tiny", "lr": 0.1})
    clips = [planted_frames(FRAMES, seed)[0].astype(np.float32) for seed in range(6)]
    rows = pd.DataFrame({"id": [f"c{i}" for i in range(6)], "split": ["train"] * 2 + ["test"] * 4})
    rows = rows.assign(group=rows["id"], font="mixed", kind="clip", frames=FRAMES)
    config = {"layer": "layers.1", "frame_rate": 50.0, "clips_sha256": "0123456789abcdef"}
    writer = StoreWriter(
        "data/activations/tiny/top1", width=WIDTH, dtype="float16", clips=rows, spans=[(0, 6)],
        config=config,
    )  # fmt: skip
    writer.write(0, clips)
    writer.finish()
    Path("data/models/tiny").mkdir(parents=True)
    Path("data/models/tiny/README.md").write_text("---\nlicense: mit\n---\n# tiny\n")
    number = {"value": 0.9, "low": 0.8, "high": 0.95, "n": 4, "unit": "share"}
    write_json("metrics/train_sae/tiny-top1.json", {"explained_variance": number, "l0": 3.0})
    write_json("metrics/prepare_data.json", {"clips": {"clip-mixed-test": 4}})
    return tmp_path


def test_every_format_is_a_new_folder_that_loads_here(place: Path, capsys):
    x = torch.from_numpy(planted_frames(20, 9)[0]).float()
    expected = make_sae().reconstruct(x)
    for name in ("sae-lens", "dictionary-learning", "hugging-face"):
        for folder in (f"data/exported/tiny-top1-{name}", f"data/exported/tiny-top1-{name}-2"):
            cli.main(["export", "--model", "tiny", "--to", name])
            assert folder in capsys.readouterr().out
            sae, about = load_sae_folder(folder)
            torch.testing.assert_close(sae.reconstruct(x), expected, rtol=1e-5, atol=1e-5)
            assert (about.model, about.layer, about.frames) == ("tiny", "layers.1", FRAMES)
    with pytest.raises(SystemExit, match="is not empty"):
        cli.main(["export", "--model", "tiny", "--to", "sae-lens", "--out", folder])


def test_the_model_card_has_metrics_data_licence_and_use(place: Path):
    cli.main(["export", "--model", "tiny", "--to", "hugging-face", "--out", "card"])
    text = Path("card/README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert (front["license"], front["library_name"]) == ("mit", "saelens")
    for part in ("| explained variance | 0.900 [0.800, 0.950] |", "4 clip-mixed-test", "## Use",
                 "SAE.load_from_disk", "musicscope find-concept", "mit. The model"):  # fmt: skip
        assert part in text
    assert json.loads(Path("card/metrics.json").read_text())["train_sae"]["l0"] == 3.0
    Path("data/models/tiny/README.md").unlink()
    with pytest.raises(SystemExit, match="names no licence: give --license"):
        cli.main(["export", "--model", "tiny", "--to", "hugging-face", "--out", "other"])
    assert not Path("other").exists()
    cli.main(
        ["export", "--model", "tiny", "--to", "hugging-face", "--out", "b", "--license", "cc0"]
    )


def test_features_are_a_table_and_a_file_each(place: Path, capsys):
    cli.main(["export", "--model", "tiny", "--to", "features", "--out", "found", "--json"])
    assert json.loads(capsys.readouterr().out) == {"format": "features", "folder": "found"}
    table = pd.read_parquet("found/features.parquet")
    described = json.loads(Path("found/columns.json").read_text())
    assert list(table) == list(features.COLUMNS)
    assert described["columns"] == features.COLUMNS
    store = ActivationStore.open("data/activations/tiny/top1")
    dense = torch.zeros(4, FRAMES, F)  # the same, counted in full
    for row, clip in enumerate(range(2, 6)):
        values, indices = make_sae().encode(torch.from_numpy(store.clip(clip)))
        dense[row].scatter_add_(1, indices, values)
    rate = float(store.config["frame_rate"])
    assert np.allclose(table["firing_rate"], (dense > 0).float().mean((0, 1)))
    assert np.allclose(table["max_value"], dense.amax((0, 1)), rtol=1e-6)
    cosines = make_sae().W_dec @ make_sae().W_dec.T - 2 * torch.eye(F)
    for feature in range(F):
        found = json.loads(Path(f"found/features/{feature}.json").read_text())
        curves, best = dense[:, :, feature], int(dense[:, :, feature].argmax())
        assert found["index"] == str(feature)
        assert found["layer"] == "1-top1"
        assert sum(found["freq_hist_data_bar_heights"]) == int((curves > 0).sum())
        assert len(found["freq_hist_data_bar_values"]) == len(found["freq_hist_data_bar_heights"])
        assert found["topkCosSimIndices"][0] == int(cosines[feature].argmax())
        assert len(found["activations"]) == int((curves.amax(1) > 0).sum())
        for moment in found["activations"]:
            assert moment["maxValue"] == moment["values"][moment["maxValueTokenIndex"]]
            start = round(moment["audio"]["start_seconds"] * rate)
            curve = curves[store.ids.index(moment["dataIndex"]) - 2]
            shown = curve[start : start + len(moment["values"])]
            assert np.allclose(shown, moment["values"])
            assert len(moment["tokens"]) == len(moment["values"])
        if found["activations"]:
            assert found["activations"][0]["dataIndex"] == f"c{2 + best // FRAMES}"


def test_features_of_another_layer_are_refused(place: Path):
    about = About("tiny", "layers.7")
    store = Path("data/activations/tiny/top1")
    with pytest.raises(ValueError, match=r"layers\.\d of width 24, the SAE of layers.7"):
        features.write(place / "x", make_sae(), about, "tiny", "top1", store, 4)


def test_an_exported_sae_is_imported_again(place: Path, capsys):
    cli.main(["export", "--model", "tiny", "--to", "sae-lens", "--out", "lens"])
    cli.main(["import", "lens", "--model", "tiny"])
    assert "topk, k = 3, 48 latents of width 24, layers.1 of tiny: data/imported/lens" in (
        capsys.readouterr().out
    )
    x = torch.from_numpy(planted_frames(20, 9)[0]).float()
    found = TopKSAE.load("data/imported/lens")
    torch.testing.assert_close(found.reconstruct(x), make_sae().reconstruct(x))
    config = json.loads(Path("lens/cfg.json").read_text())
    del config["metadata"]["hook_name"]
    write_json("lens/cfg.json", config)
    with pytest.raises(SystemExit, match="names no hook point: give --layer"):
        cli.main(["import", "lens", "--model", "tiny"])
    with pytest.raises(SystemExit, match="holds no SAE"):
        cli.main(["import", "data/models/tiny", "--model", "tiny"])


class Hub(http.server.BaseHTTPRequestHandler):
    """What the hub answers to an upload: a repository, how files go up, a commit."""

    made: list[dict]
    files: dict[str, bytes]
    refuse = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        assert self.headers["Authorization"] == "Bearer hf_test"
        address = f"http://127.0.0.1:{self.server.server_port}/someone/sae"
        if self.refuse:
            return self.answer({"error": "no right to write"}, 403)
        if self.path.startswith("/api/repos/create"):
            self.made.append(json.loads(body))
            return self.answer({"url": address, "id": "someone/sae"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.path.startswith("/api/models/someone/sae/preupload/"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if self.path.startswith("/api/models/someone/sae/commit/"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[line["value"]["path"]] = content
            commit = {"commitUrl": f"{address}/commit/{'0' * 40}", "commitOid": "0" * 40}
            return self.answer({**commit, "success": True, "hookOutput": ""})
        return self.answer({"error": self.path}, 404)

    def do_GET(self) -> None:
        self.answer({"error": self.path}, 404)

    def answer(self, value: dict, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


def test_a_push_uploads_the_folder(place: Path, monkeypatch, capsys):
    hub = pytest.importorskip("huggingface_hub")
    Hub.made, Hub.files = [], {}
    words = ["export", "--model", "tiny", "--to", "hugging-face", "--push", "someone/sae"]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(hub.constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
        for name, value in (("HF_TOKEN", "hf_test"), ("NO_PROXY", "127.0.0.1")):
            monkeypatch.setenv(name, value)
        hub.close_session()  # an earlier client would keep its proxies
        cli.main([*words, "--private"])
        monkeypatch.setattr(Hub, "refuse", True)
        with pytest.raises(SystemExit, match="someone/sae: .*no right to write.*hf auth login"):
            cli.main(words)
        server.shutdown()
        hub.close_session()
    assert f"uploaded: {endpoint}/someone/sae" in capsys.readouterr().out
    assert "private" in (
        Hub.made[0].get("visibility"),
        *(k for k, v in Hub.made[0].items() if v is True),
    )
    folder = Path("data/exported/tiny-top1-hugging-face")
    assert Hub.files == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert set(Hub.files) == {"README.md", "cfg.json", "sae_weights.safetensors", "metrics.json"}
    assert Path("data/exported/tiny-top1-hugging-face-2/README.md").is_file()


def test_only_a_folder_with_a_card_is_pushed(place: Path):
    with pytest.raises(SystemExit, match="give --to hugging-face"):
        cli.main(["export", "--model", "tiny", "--to", "sae-lens", "--push", "someone/sae"])
