"""The GPU's measurements on a CPU, at sizes that say nothing about speed."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import (
    gpu_check,
    gpu_dictionaries,
    gpu_models,
    gpu_parts,
    gpu_steps,
    gpu_tests,
    gpu_training,
)
from musicscope.core.io import read_json, write_json
from musicscope.dictionaries import step
from musicscope.embedded.pretraining import run
from tests.conftest import ROOT

CPU = torch.device("cpu")
ABSENT = ("dvc", "dvclive", "soundfile", "symusic", "tinysoundfont", "nnsight", "audiocraft",
          "hypothesis", "pytest_timeout", "xdist", "sklearn")  # fmt: skip
SIZE = gpu_steps.Size(width=16, latents=128, k=4, batch=64)


@pytest.fixture
def record(tmp_path):
    return gpu_parts.Record(tmp_path / "part.json", time.monotonic() + 600)


@pytest.mark.slow
def test_parts_in_processes_without_packages_that_a_bare_gpu_machine_lacks(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nfor name in {ABSENT}: sys.modules[name] = None\n", encoding="utf-8"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    parts = ["tests", "a", "b", "d"]
    path = gpu_check.run_parts(parts, tmp_path / "out", 400, "cpu", tiny=True)
    found = read_json(path)
    assert path.name == "gpu-cpu.json"
    assert {part: status["end"] for part, status in found["status"].items()} == dict.fromkeys(
        parts, "whole"
    ), found["status"]
    assert {p.stem for p in (tmp_path / "out/parts").iterdir()} == set(parts)
    outcomes = found["parts"]["tests"]["tests"]
    assert found["parts"]["tests"]["exit"] == 0, outcomes
    assert {name.split("::")[0] for name in outcomes} == {
        Path(name).name for name in gpu_tests.FILES
    }
    assert set(outcomes.values()) == {"passed", "skipped"}
    assert found["parts"]["b"]["codec"]["nano random"]["batch 4, TF32 on"]["equal_codes"] == 1.0
    checks = found["parts"]["d"]["check"]
    for name in ("sae small float32", "sae full tf32", "usae small float32"):
        assert max(checks[name]["gradient_errors"].values()) < 1e-6, name
        assert checks[name]["z_error"] < 1e-6
    steps = found["parts"]["d"]["steps"]["sae d16 F128 k4 B64"]
    for name in ("ours float32", "ours_auxk tf32", "dense bfloat16", "product bfloat16"):
        entry = steps[name]
        assert entry["per_s"] == pytest.approx(1e3 / entry["ms"], rel=1e-4)
        rate = found["parts"]["a"]["product"][entry["precision"]]["tflops"]
        assert entry["share_of_ceiling"] == pytest.approx(entry["tflops"] / rate, rel=1e-4)
    text = "\n".join(gpu_check.table(found))
    assert "ours float32" in text
    assert "part d: whole" in text


def test_a_part_that_hangs_or_dies_leaves_the_others_and_its_own_results(tmp_path, monkeypatch):
    begin = (
        "import json, pathlib, sys, time; print('ready', flush=True); input(); "
        "file = pathlib.Path(sys.argv[1]); "
    )
    programs = {
        "a": begin
        + 'file.write_text(\'{"device": "x", "copy": {"gb_per_s": 5}}\'); time.sleep(60)',
        "b": "raise SystemExit('no such card')",
        # Its context is lost at first; the second process finds what the first one wrote.
        "c": begin + "again = file.exists(); file.write_text(json.dumps({'again': again})); "
        "sys.exit(0 if again else 3)",
    }
    monkeypatch.setitem(gpu_check.WEIGHTS, "a", 0.3)
    monkeypatch.setattr(
        gpu_check,
        "command_of",
        lambda part, file, device, tiny: [sys.executable, "-c", programs[part], str(file)],
    )
    start = time.monotonic()
    found = read_json(gpu_check.run_parts(["a", "b", "c"], tmp_path, 40, "cpu", tiny=True))
    assert time.monotonic() - start < 30
    assert found["device"] == "x"
    assert found["status"]["a"]["end"] == "killed: time was up"
    assert found["parts"]["a"]["copy"] == {"gb_per_s": 5}
    assert "no such card" in found["status"]["b"]["stderr"]
    assert found["status"]["c"]["end"] == "whole"
    assert found["parts"]["c"] == {"again": True}
    assert any("no such card" in line for line in gpu_check.table(found))


def test_errors_are_results_and_nothing_is_measured_twice(record):
    def broken():
        raise RuntimeError("int32 is not supported")

    record.attempt("steps/sae/ours", broken)
    assert "int32 is not supported" in record.found["steps/sae/ours"]["error"]
    record.attempt("steps/sae/dense", lambda: {"ms": 2.0}, needs=1e6)
    assert "needed" in record.found["steps/sae/dense"]["skipped"]
    again = gpu_parts.Record(record.path, record.deadline)
    assert again.guard("steps/sae/ours", lambda: pytest.fail("measured again")) is None
    assert gpu_check.nested(again.found)["steps"]["sae"].keys() == {"ours", "dense"}


def test_a_step_that_fails_does_not_stop_the_race(record, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no kernel for int32")

    monkeypatch.setattr(step, "gradients", broken)
    methods = gpu_steps.sae_methods(SIZE, CPU)
    gpu_dictionaries.race(record, "sae", methods, SIZE, CPU, 0.002)
    assert "no kernel" in record.found["steps/sae/ours float32"]["error"]
    assert record.found["steps/sae/dense float32"]["rounds"] >= 1
    write_json(record.path, gpu_check.merge({"d": record.path}, {}))
    assert any("no kernel" in line for line in gpu_check.table(read_json(record.path)))


@pytest.mark.parametrize("field", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_check_sees_a_wrong_gradient(field, monkeypatch):
    right = step.gradients

    def wrong(*arguments, **options):
        found = right(*arguments, **options)
        getattr(found.gradients[0], field).mul_(1.01)
        return found

    monkeypatch.setattr(step, "gradients", wrong)
    errors = gpu_dictionaries.check_sae(SIZE, CPU, "float32")["gradient_errors"]
    assert {name for name, error in errors.items() if error > 1e-4} == {field}


def test_check_sees_unwritten_pre_activations_and_other_codes(monkeypatch):
    def elsewhere(z, k, activation, jump):
        codes = step.Codes(*right(z, k, activation, jump))
        z[0, 0] = torch.nan
        return codes._replace(columns=(codes.columns + 1) % z.shape[1])

    right = step.select
    monkeypatch.setattr(step, "select", elsewhere)
    found = gpu_dictionaries.check_sae(SIZE, CPU, "float32")
    assert found["z_error"] != found["z_error"]
    assert found["equal_codes"] < 0.5


def test_precision_is_put_back_and_autocast_keeps_no_weights():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    weight = torch.randn(8, 8, requires_grad=True)
    with gpu_parts.precision("bfloat16", CPU):
        first = torch.nn.functional.linear(torch.ones(1, 8), weight)
        with torch.no_grad():
            weight.mul_(2)
        second = torch.nn.functional.linear(torch.ones(1, 8), weight)
    assert first.dtype == torch.bfloat16
    torch.testing.assert_close(second, 2 * first)
    with gpu_parts.precision("tf32", CPU):
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32
        assert not torch.is_autocast_enabled("cpu")
    assert before == (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)


def test_codes_of_a_codec_and_of_one_with_other_weights(record):
    gpu_models.codes(CPU, tiny=True)(record)
    found = record.found["codec/nano random/batch 1, TF32 off"]
    assert found["equal_codes"] == found["equal_frames"] == 1.0
    assert found["latent_error"] < 1e-5
    assert min(record.found["codec/nano random/cpu batch 4"]["codes_in_use"]) > 8
    config = gpu_models.EncodecConfig(
        **gpu_models.NANO_CODEC | {"num_filters": 2, "codebook_size": 64}
    )
    codec = gpu_models.CodecOnCpu(gpu_models.random_codec(config, 1), 2, 0.5)
    codec.codec.encoder.layers[0].conv.parametrizations.weight.original0.mul_(1.05)
    assert codec.on(CPU, 1)["equal_codes"] < 0.99


def test_full_size_models_can_be_tried(record):
    model = gpu_models.build("tiny", torch.bfloat16, CPU)
    assert model.decoder.dtype == torch.bfloat16
    assert model.hf.audio_encoder.quantizer.layers[0].codebook.embed.std() > 0
    found = gpu_models.extraction(model, torch.bfloat16, 2, 0.2)
    assert found["clips_per_s"] > 0
    text, mask = model.encode_text(["a", "b"])
    assert mask.all()  # cross-attention has something to read
    assert text.std() > 0
    found = gpu_models.ablation(model, 2, 0.2)
    assert found["s_per_clip"] == found["rate"]["ablate_seconds"] > 0
    assert found["rate"]["ablate_kinds"] == 3
    found = gpu_models.generation(model, 2, 4)
    assert (found["rows"], found["frames"]) == (4, 4)


def test_rates_of_a_training_are_between_its_first_and_last_row():
    rows = [
        {"phase": "codec", "second": 30, "step": 10},
        {"phase": "codec", "second": 40, "step": 510},
        {"phase": "tokens", "second": 41, "split": "validation", "clips": 320, "took": 9.0},
        {"phase": "tokens", "second": 50, "split": "train", "clips": 4000, "took": 8.0},
        {"phase": "nano-small", "second": 60, "step": 100},
        {"phase": "nano-small", "second": 65, "step": 150, "held_out_ce": 5.0},
        {"phase": "nano-small", "second": 80, "step": 500, "held_out_ce": 4.0},
    ]
    assert gpu_training.summary(rows) == {
        "codec": {"steps": 510, "steps_per_s": 50.0},
        "tokens": {"clips": 4000, "clips_per_s": 500.0},
        "nano-small": {"steps": 500, "steps_per_s": 20.0, "held_out_ce": 4.0},
    }


def test_all_files_with_device_tests_are_run():
    with_device = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"def test_\w+\([^)]*\bdevice\b", path.read_text(encoding="utf-8"))
    }
    assert with_device == set(gpu_tests.FILES)


def test_a_training_is_read_as_it_goes_and_ends_with_its_time(record, monkeypatch):
    program = (
        "import json, pathlib, sys, time; folder = pathlib.Path(sys.argv[1]) / 'work/models'; "
        "folder.mkdir(parents=True); "
        "rows = [{'phase': 'codec', 'second': i, 'step': 50 * i} for i in range(3)]; "
        "(folder / 'log.jsonl').write_text(''.join(json.dumps(row) + '\\n' for row in rows)); "
        "time.sleep(60)"
    )
    monkeypatch.setattr(
        gpu_training,
        "command",
        lambda minutes, device, tiny, folder: [sys.executable, "-c", program, str(folder)],
    )
    record.deadline = time.monotonic() + 4
    gpu_training.training(CPU, tiny=True)(record)
    assert time.monotonic() < record.deadline + 5
    assert record.found["training"] == {"codec": {"steps": 100, "steps_per_s": 50.0}}
    assert record.found["exit"] == -9


@pytest.mark.parametrize("tiny", [True, False])
def test_the_command_of_a_training_is_one(tmp_path, tiny):
    _, option, module, *arguments = gpu_training.command(2.5, CPU, tiny, tmp_path)
    assert (option, module) == ("-m", run.__name__)
    parsed = run.parse_arguments(arguments)
    assert (parsed.minutes, parsed.device, parsed.work) == (2.5, "cpu", tmp_path / "work")
    assert parsed.codec_batch == (1 if tiny else 64)


def test_a_training_that_fails_says_why(record, monkeypatch):
    monkeypatch.setattr(
        gpu_training, "command", lambda *_: [sys.executable, "-c", "raise SystemExit('no fonts')"]
    )
    gpu_training.training(CPU, tiny=True)(record)
    assert record.found["exit"] == 1
    assert "no fonts" in record.found["stderr"]


def test_minutes_come_on_top_of_the_seconds(tmp_path, monkeypatch):
    program = (
        "import sys, time; print('ready', flush=True); left = float(input()) - time.monotonic(); "
    )
    program += "open(sys.argv[1], 'w').write('{\"left\": %f}' % left)"
    monkeypatch.setattr(
        gpu_check,
        "command_of",
        lambda part, file, device, tiny: [sys.executable, "-c", program, str(file)],
    )
    path = gpu_check.run_parts(["a", "c", "e"], tmp_path, 30, "cpu", tiny=True, minutes=2)
    left = {part: found["left"] for part, found in read_json(path)["parts"].items()}
    assert left["a"] < 30 * 15 / 185 < 20 < left["c"] < 30
    assert 115 < left["e"] < 120
