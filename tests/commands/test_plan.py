"""`musicscope plan`: sizes are those of what is made, hours follow from rates, pages hold."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from musicscope.activations import extraction
from musicscope.commands import cli
from musicscope.commands.plan import estimate as plan
from musicscope.commands.plan import rates as plan_rates
from musicscope.commands.plan.published_sizes import MUSICGEN, Shape, shape_of
from musicscope.commands.plan.rates import Footprint, measure, peak_bytes, seconds
from musicscope.config import load_params
from musicscope.dictionaries.training import count_latents
from musicscope.models.registry import load_model
from tests.activations.test_extraction import FakeClips

ROOT = Path(__file__).resolve().parents[2]
MUSICBENCH = ["prepare_data.source=musicbench", "prepare_data.recordings.sample_rate=32000"]


@pytest.fixture
def params():
    return load_params(ROOT / "params.yaml")


def overridden(*sets: str):
    return plan.overridden(ROOT / "params.yaml", sets)


@pytest.mark.parametrize("name", MUSICGEN)
def test_published_sizes_are_those_of_the_architecture(name):
    """Pre-norm layers without biases: self and cross attention, feed-forward, three norms."""
    d, layers = MUSICGEN[name]["hidden_size"], MUSICGEN[name]["layers"]
    layer = 4 * d * d + 4 * d * d + 2 * d * 4 * d + 3 * 2 * d
    embeddings, heads, norm = 4 * 2049 * d, 4 * 2048 * d, 2 * d
    shape = shape_of(f"facebook/{name}")
    assert shape.decoder_parameters == layers * layer + embeddings + heads + norm
    # T5-base's encoder has 110 million, EnCodec at 32 kHz 57; enc_to_dec_proj d x 768.
    assert shape.other_parameters == pytest.approx(110e6 + 57e6 + 768 * d, rel=0.01)
    assert (shape.width, shape.layers, shape.frame_rate) == (d, layers, 50.0)


def test_a_name_that_says_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no folder .*unknown-model.*musicgen-small, .*YuE-s1-7B"):
        shape_of("unknown-model", tmp_path)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="config.json is of type 'bert'"):
        shape_of("odd", tmp_path)


def test_the_embedded_clips_are_as_many_as_were_made(params):
    made = json.loads((ROOT / "metrics/prepare_data.json").read_text())["clips"]
    clips = plan.count_clips(params)
    assert clips.number == sum(made.values())
    assert clips.train == made["clip-mixed-train"]


def test_all_of_musicbench():
    params = overridden("models=[musicgen-medium]", "slots=[top1]", *MUSICBENCH)
    clips = plan.count_clips(params)
    assert clips.number == 52_768 + 400
    assert clips.train == 52_768 - round(0.1 * 52_768)
    clips = plan.count_clips(params, 52_768)
    shape = shape_of("musicgen-medium")
    assert plan.frames_of(clips, shape) == 500
    rows = {row.stage: row for row in plan.rows_of(params, clips, [shape], NONE(shape))}
    assert rows["extract_activations"].disk == 52_768 * 500 * 1536 * 2  # 81 GB a layer
    assert rows["prepare_data"].disk == 52_768 * 320_000 * 2
    limits = [f"prepare_data.recordings.limits.{s}={n}" for s, n in (("train", 80), ("test", 500))]
    some = plan.count_clips(overridden(*MUSICBENCH, *limits))
    assert (some.train, some.number) == (80, 80 + round(0.1 * 52_768) + 400)
    cut = overridden(
        *MUSICBENCH, *limits, "prepare_data.seconds=3", "prepare_data.recordings.windows=5"
    )
    assert plan.count_clips(cut).train == 3 * 80  # ten seconds hold three windows of three


def NONE(*shapes: Shape) -> dict[str, None]:
    return {shape.name: None for shape in shapes}


def test_a_folder_is_counted_and_a_missing_one_asks_for_clips(tmp_path):
    sets = ["prepare_data.source=folder", f"prepare_data.recordings.folder={tmp_path}"]
    with pytest.raises(ValueError, match="holds no audio files to count; .* --clips"):
        plan.count_clips(overridden(*sets))
    assert plan.count_clips(overridden(*sets), 7).number == 7
    (tmp_path / "sub").mkdir()
    for name in ("a.wav", "sub/b.MP3", "labels.csv"):
        (tmp_path / name).touch()
    clips = plan.count_clips(overridden(*sets, "prepare_data.recordings.windows=3"))
    assert clips.number == 6


def test_planned_sizes_are_those_of_extraction(tiny_musicgen: Path, params):
    model, fake = load_model(tiny_musicgen), FakeClips()
    (todo,) = extraction.plan(
        model, fake, {"top1": "layers.1", "top2": "layers.2"}, dtype="float16", shard_mb=1,
        batch_clips=2, captions=False, model_sha256="", clips_sha256="",
    )  # fmt: skip
    shape = shape_of(tiny_musicgen.name, tiny_musicgen.parent)
    clips = plan.Clips(len(fake.rows), 6, 1280 / 3200, 3200, "")
    rows = plan.rows_of(params, clips, [shape], NONE(shape))
    (row,) = (row for row in rows if row.stage == "extract_activations")
    assert row.disk == todo.nbytes("top1") + todo.nbytes("top2")
    assert "220 frames of 48 x 2 slots" in row.what
    assert row.hours is None
    assert shape.weight_bytes() == sum(p.nbytes for p in model.hf.parameters())
    assert shape.weight_bytes(2) == shape.weight_bytes() - 2 * shape.decoder_parameters


def test_a_checkpoint_of_audiocraft_has_the_shape_of_the_same_model(tiny_musicgen, tmp_path):
    from musicscope.models.audiocraft.convert import to_audiocraft

    to_audiocraft(tiny_musicgen, tmp_path / "mine")
    expected = shape_of(tiny_musicgen.name, tiny_musicgen.parent)
    found = shape_of("mine", tmp_path)
    assert found == replace(expected, name="mine", origin=str(tmp_path / "mine"))


def test_measurements_are_reported_one_by_one(tiny_musicgen: Path):
    said: list[str] = []
    measure(load_model(tiny_musicgen), 0.4, 1, 1, ("mean",), say=said.append)
    assert [text.split(":")[0].split()[0] for text in said] == [
        "codec",
        "a",
        "peak",
        "peak",
        "ablating",
    ]


def test_what_is_measured_is_this_model(tiny_musicgen: Path):
    model = load_model(tiny_musicgen)
    shape = shape_of(tiny_musicgen.name, tiny_musicgen.parent)
    calls = model.layer_calls
    rate = measure(model, 0.4, batch_clips=2, rounds=1, ablations=("skip", "mean"))
    assert rate.decoder_parameters == shape.decoder_parameters
    assert rate.weight_bytes == model.weight_bytes
    assert min(rate.codec_seconds, rate.pass_seconds, rate.ablate_seconds) > 0
    assert rate.extract_fixed_bytes >= rate.weight_bytes
    # Every position of every clip holds at least its hidden state.
    assert rate.extract_clip_bytes >= 20 * 48 * 4
    assert rate.ablate_clip_bytes >= 4 * 20 * 64 * 4
    # One clip at a time: its widest layer; more clips cost their signals and codes.
    assert rate.codec_fixed_bytes >= 1280 * 4 * 4
    assert 20 * 4 * 8 <= rate.codec_clip_bytes < rate.codec_fixed_bytes
    # A pass of 4 layers, two for its peak, one for the means; then the inputs and 3 + 2 + 1 layers
    # behind each ablated one, for two kinds.
    assert model.layer_calls - calls == 4 + 2 * 4 + 4 + (4 + 2 * 6)


def results(folder: Path, **by_model: dict) -> Path:
    whole = {"dtype": "float32", "clip_seconds": 10.0, "batch_clips": 2, "weight_bytes": 0}
    entries = {
        name.replace("_", "-"): {f"{entry['device']}, float32": whole | entry}
        for name, entry in by_model.items()
    }
    (folder / "full_size.json").write_text(json.dumps(entries))
    return folder


SMALL = {
    "device": "cpu, 1 threads", "codec_seconds": 1.0, "pass_seconds": 3.0, "ablate_seconds": 50.0,
    "ablate_kinds": 1, "decoder_parameters": 400, "extract_fixed_bytes": 1000,
    "extract_clip_bytes": 10,
}  # fmt: skip


def test_hours_follow_from_measured_rates(params, tmp_path):
    params = replace(params, compute=replace(params.compute, device="cpu", processes=2))
    small = Shape("musicgen-small", 24, 8, 32_000, 50.0, 400, 100, "")
    large = replace(small, name="musicgen-large", decoder_parameters=1200, layers=47)
    rates = plan_rates.load(results(tmp_path, musicgen_small=SMALL), [small, large], "cpu")
    clips = plan.Clips(3600, 3000, 5.0, 32_000, "")
    rows = plan.rows_of(params, clips, [small, large], rates)
    extract = [row for row in rows if row.stage == "extract_activations"]
    assert extract[0].hours == pytest.approx(4.0 / 2 / 2)  # half of ten seconds, two processes
    assert extract[0].memory == 1000 + 5 * params.extract_activations.batch_clips
    assert extract[1].hours == pytest.approx((1.0 + 9.0) / 2 / 2)  # three times the parameters
    assert extract[1].memory is None
    assert extract[1].note == "cpu, 1 threads, scaled from musicgen-small"
    ablate = [row for row in rows if row.stage == "ablate"]
    n, kinds = params.ablate.clips, len(params.ablate.kinds)
    assert ablate[0].hours == pytest.approx((2 * n * 4 + n * 50 * kinds) / 2 / 3600 / 2)
    assert ablate[1].hours == pytest.approx((2 * n * 10 + n * 9 * kinds * 24) / 2 / 3600 / 2)
    text = plan.table(rows)
    assert "?" in text.splitlines()[-6]  # no rate of training is known
    total = sum(row.hours for row in rows if row.hours is not None)
    assert text.splitlines()[-1].split()[-1] == f"{total:.3g}"


def test_a_gpus_rate_is_for_one_process_and_goes_first_where_asked_for(params, tmp_path):
    small = Shape("musicgen-small", 24, 8, 32_000, 50.0, 400, 100, "")
    folder = results(tmp_path, musicgen_small=SMALL)
    both = json.loads((folder / "full_size.json").read_text())
    gpu = SMALL | {"device": "GPU", "codec_seconds": 0.1, "pass_seconds": 0.1, "dtype": "float32"}
    both["musicgen-small"]["GPU, float32"] = gpu | {"clip_seconds": 10.0, "batch_clips": 2}
    (folder / "full_size.json").write_text(json.dumps(both))
    clips = plan.Clips(3600, 3000, 10.0, 32_000, "")
    for device, hours in (("cpu", 4.0 / 2), ("cuda", 0.2)):
        rates = plan_rates.load(folder, [small], device)
        rows = plan.rows_of(params, clips, [small], rates)
        (row,) = (row for row in rows if row.stage == "extract_activations")
        assert row.hours == pytest.approx(hours)


def test_memory_counts_the_codec_and_the_length_of_clips(tmp_path):
    codec = {"codec_fixed_bytes": 300, "codec_clip_bytes": 500, "weight_bytes": 900}
    codec |= {"ablate_fixed_bytes": 900, "ablate_clip_bytes": 70, "extract_clip_bytes": 100}
    small = Shape("musicgen-small", 24, 8, 32_000, 50.0, 400, 100, "")
    rates = plan_rates.load(results(tmp_path, musicgen_small=SMALL | codec), [small], "cpu")
    rate = rates["musicgen-small"]
    assert rate.memory("extract", 2, 10.0) == 900 + 300 + 8 * 500  # more than a pass of two clips
    assert rate.memory("extract", 1000, 10.0) == 1000 + 1000 * 100
    assert rate.memory("extract", 1000, 30.0) == 1000 + 1000 * 300
    assert rate.memory("ablate", 100, 20.0) == 900 + 100 * 140
    # A tenth of 10,000 bytes is left to the allocator: (9,000 - 1,000) / 100.
    assert plan_rates.batches(rates, 10.0, 1e-5) == (
        "musicgen-small: extract_activations.batch_clips up to 80"
    )
    assert "its codec alone needs" in plan_rates.batches(rates, 30.0, 1e-5)
    assert "its codec alone needs" in plan_rates.batches(rates, 10.0, 1e-9)
    assert (
        plan_rates.batches(NONE(small), 10.0, 1.0) == "musicgen-small: its memory was not measured"
    )


@given(
    fixed=st.integers(0, 10**10),
    per_clip=st.integers(1, 10**9),
    most=st.integers(1, 500),
    limit=st.integers(1, 10**12),
)
def test_the_largest_batch_fits_and_one_more_does_not(fixed, per_clip, most, limit):
    cost = Footprint(fixed, per_clip)
    usable = int(limit * 0.9)
    if fixed + per_clip > usable:
        with pytest.raises(ValueError, match="one clip needs"):
            cost.largest_batch(limit, most)
        return
    clips = cost.largest_batch(limit, most)
    assert 1 <= clips <= most
    assert fixed + clips * per_clip <= usable
    assert clips == most or fixed + (clips + 1) * per_clip > usable


@given(fixed=st.integers(0, 10**9), per_clip=st.integers(0, 10**9))
def test_two_measurements_give_the_line(fixed, per_clip):
    one, three = fixed + per_clip, fixed + 3 * per_clip
    assert Footprint.through(one, three, 5) == Footprint(fixed + 5, per_clip)
    assert Footprint.through(one, one - fixed, 0) == Footprint(one, 0)  # measured with noise


def test_the_peak_is_that_of_the_tensors_alive_at_once():
    kept = torch.zeros(1000)

    def work():
        first = torch.zeros(1_000_000)  # 4 MB
        second = first + 1  # 8 MB alive
        del first
        third = torch.cat([second, second])  # 12 MB alive
        del second
        return third.sum() + kept.sum()

    assert 12_000_000 <= peak_bytes(work, torch.device("cpu")) < 12_100_000


def test_float32_in_one_thread_goes_before_other_measurements(tmp_path):
    folder = results(tmp_path, musicgen_small=SMALL)
    known = json.loads((folder / "full_size.json").read_text())
    (one,) = known["musicgen-small"].values()
    for device, dtype in (("cpu, 1 threads", "bfloat16"), ("cpu, 16 threads", "float32")):
        other = one | {"device": device, "dtype": dtype, "pass_seconds": 0.5}
        known["musicgen-small"][f"{device}, {dtype}"] = other
    (folder / "full_size.json").write_text(json.dumps(known))
    small = Shape("musicgen-small", 24, 8, 32_000, 50.0, 400, 100, "")
    assert plan_rates.load(folder, [small], "cpu")["musicgen-small"].pass_seconds == 3.0


def test_a_frame_of_yue_takes_two_positions(tmp_path):
    yue = shape_of("YuE-s1-7B-anneal-en-cot", tmp_path)
    rates = plan_rates.load(results(tmp_path, musicgen_small=SMALL), [yue], "cpu")[yue.name]
    assert rates.pass_seconds == pytest.approx(3.0 * 2 * yue.decoder_parameters / 400)


def test_a_busy_machine_does_not_slow_what_one_thread_measures():
    cpu = torch.device("cpu")
    assert seconds(lambda: time.sleep(0.2), cpu, 1) < 0.1
    torch.set_num_threads(2)
    try:
        assert seconds(lambda: time.sleep(0.2), cpu, 1) >= 0.2
    finally:
        torch.set_num_threads(1)


def test_training_hours_come_from_the_nearest_step_that_was_timed(params, tmp_path):
    timed = {"steps": {"ours_auxk": {"ms": 100.0}}}, {"steps": {"ours_auxk": {"ms": 1000.0}}}
    steps = {"batch": 100, "k": 32, "d10_F100": timed[0], "d100_F1000": timed[1]}
    (tmp_path / "sae_step.json").write_text(json.dumps(steps))
    shape = Shape("m", 4, 100, 32_000, 50.0, 400, 100, "")
    rates = plan_rates.load(tmp_path, [shape], "cpu")
    step = plan_rates.step_rate(tmp_path)
    assert step.seconds(200, 2000, 100) == pytest.approx(2 * 2 * 1.0)
    assert step.seconds(100, 50, 10) == pytest.approx(0.5 * 0.1)
    section = replace(params.train_sae, expansion=10, seeds=3, samples=7_200, batch_size=100)
    params = replace(params, train_sae=section, compute=replace(params.compute, processes=2))
    rows = plan.rows_of(params, plan.Clips(1, 1, 10.0, 32_000, ""), [shape], rates, step)
    trained = [row for row in rows if row.stage == "train_sae"]
    assert len(trained) == len(params.slots)
    assert trained[0].hours == pytest.approx(72 * 3 / 2 / 3600)
    assert trained[0].disk == 2 * 3 * 4 * (2 * 1000 * 100 + 1000 + 100)


def test_a_gpu_check_gives_rates_of_its_card(params, tmp_path):
    """A model that the card did not run is scaled from one that it ran, with its own memory."""
    medium = SMALL | {"decoder_parameters": 1200, "extract_fixed_bytes": 5000}
    folder = results(tmp_path, musicgen_small=SMALL, musicgen_medium=medium)
    whole = {"dtype": "float32", "clip_seconds": 10.0, "batch_clips": 16, "weight_bytes": 0}
    rate = whole | SMALL | {"device": "GPU", "codec_seconds": 0.1, "pass_seconds": 0.2}
    steps = {
        "sae d10 F100 k4 B64": {"ours tf32": {"ms": 3.0}, "ours_auxk tf32": {"ms": 6.4}},
        "sae goal d5 F100 k4 B64": {"ours tf32": {"ms": 2.0}, "dense tf32": {"ms": 0.1}},
        "usae 2 models d1 F1 k1 B1": {"ours tf32": {"ms": 1.0}},
    }
    models = {
        "musicgen-small float32": {"extraction": {"rate": rate}},
        "musicgen-medium float32": {"build": {"skipped": "no time"}},
    }
    parts = {"c": {"model": models}, "d": {"steps": steps}}
    (folder / "gpu-x.json").write_text(json.dumps({"device": "GPU", "parts": parts}))
    shapes = [
        Shape(f"musicgen-{name}", 24, 8, 32_000, 50.0, n, 100, "")
        for name, n in (("small", 400), ("medium", 1200))
    ]
    small, medium = plan_rates.load(folder, shapes, "cuda").values()
    assert (small.device, small.pass_seconds) == ("GPU", 0.2)
    assert (medium.device, medium.pass_seconds) == (
        "GPU, scaled from musicgen-small", pytest.approx(0.6),
    )  # fmt: skip
    assert medium.extract_fixed_bytes == 5000
    assert plan_rates.load(folder, shapes, "cpu")["musicgen-medium"].pass_seconds == 3.0
    step = plan_rates.step_rate(folder, "cuda")
    assert step.note == "GPU, TF32"
    assert step.seconds(640, 100, 10) == pytest.approx(0.064)
    assert step.seconds(1, 100, 10) == 0.002  # launches
    assert plan_rates.step_rate(folder, "cpu") is None
    (trained,) = (
        row for row in plan.rows_of(
            replace(params, slots=("top1",), compute=replace(params.compute, processes=4)),
            plan.Clips(1, 1, 10.0, 32_000, ""), shapes[:1], NONE(*shapes), step,
        ) if row.stage == "train_sae"
    )  # fmt: skip
    section = params.train_sae
    each = step.seconds(section.batch_size, 8 * section.expansion, 8)
    steps_taken = section.samples // section.batch_size * section.seeds
    assert trained.hours == pytest.approx(each * steps_taken / 3600)


def test_overrides_are_those_of_dvc_and_are_checked(params):
    changed = overridden("models=[musicgen-small,musicgen-medium]", "train_sae.k=64")
    assert changed.models == ("musicgen-small", "musicgen-medium")
    assert changed.train_sae == replace(params.train_sae, k=64)
    assert changed.probe == params.probe
    for wrong in ("train_sae.kk=3", "train_sae.k=many", "prepare_data.source=nowhere"):
        with pytest.raises(ValueError, match=wrong.split("=")[0].split(".")[1]):
            overridden(wrong)


def test_the_command_prints_a_plan_and_ends_in_one_line_when_it_cannot(
    monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(ROOT)
    cli.main(["plan", "-S", "models=[musicgen-small]", "--clips", "10", "--results", str(tmp_path),
              "-S", MUSICBENCH[0], "-S", MUSICBENCH[1]])  # fmt: skip
    found = capsys.readouterr()
    assert "musicbench: 10 clips of 10 s at 32000 Hz" in found.out
    assert "5,000 frames of 1024 x 2 slots" in found.out
    assert "No rate is known for musicgen-small: run with --measure" in found.err
    with pytest.raises(SystemExit, match="musicscope plan: .*train_sae.kk"):
        cli.main(["plan", "-S", "train_sae.kk=3"])
    with pytest.raises(SystemExit, match="no folder data/models/nothing"):
        cli.main(["plan", "-S", "models=[nothing]"])


def test_commands_are_imported_when_asked_for():
    code = "import sys; from musicscope.commands import cli\ntry: cli.main(['--help'])\n"
    code += "except SystemExit: print('torch' in sys.modules, 'omegaconf' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT / "src", capture_output=True, text=True, check=True, timeout=60
    )
    assert "plan" in done.stdout
    assert done.stdout.splitlines()[-1] == "False False"


def test_the_benchmark_writes_what_a_plan_reads(monkeypatch, tmp_path, capsys):
    from benchmarks import full_size

    out = tmp_path / "full_size.json"
    monkeypatch.setattr(sys, "argv", ["full_size", "--models", "tiny", "--seconds", "0.5", "--out",
                                      str(out), "--rounds", "1", "--device", "cpu"])  # fmt: skip
    threads = torch.get_num_threads()
    full_size.main()
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "MusicBench (52,768 clips of 10 s)" in printed
    assert printed.index("tiny: codec: ") < printed.index("tiny: ablating every layer: ")
    shape = Shape("tiny", 2, 32, 32_000, 50.0, 0, 0, "")
    rates = plan_rates.load(tmp_path, [shape], "cpu")["tiny"]
    assert rates.clip_seconds == 0.5
    assert rates.extract_seconds > 0
    assert rates.seconds_to_ablate(2, 2) == pytest.approx(2 * rates.ablate_seconds)
    monkeypatch.setattr(full_size, "free_bytes", lambda device: 10**9)
    monkeypatch.setattr(sys, "argv", ["full_size", "--models", "musicgen-small"])
    full_size.main()
    assert "musicgen-small: left out, its weights take 2.3 GB" in capsys.readouterr().err


README = (ROOT / "experiments/README.md").read_text(encoding="utf-8")


def test_every_line_of_the_experiments_is_a_valid_configuration():
    from experiments.preset import presets

    found = presets()
    assert len(found) >= 5
    for name in found:
        assert f"just experiment {name}" in README
    systems = set()
    for sets in found.values():
        params = overridden(*sets)
        systems |= set(params.models)
        assert params.prepare_data.source != "embedded"
        widest = max(shape_of(model).width for model in params.models)
        assert count_latents(params.train_sae, [widest]) >= params.train_sae.k
    assert {"musicgen-small", "musicgen-medium", "rave"} < systems
    assert any(name.startswith("YuE") for name in systems)


def test_the_table_of_the_experiments_is_what_the_plan_says(monkeypatch):
    from experiments import table

    monkeypatch.chdir(ROOT)
    expected = table.table(README)
    for page in table.PAGES:
        stated = page.read_text(encoding="utf-8").split(table.BEGIN)[1].split(table.END)[0]
        assert stated == expected, f"{page}: run python -m experiments.table --write"


def test_the_engines_of_the_page_are_those_of_the_params():
    import re
    from typing import get_args, get_type_hints

    from musicscope.config import Compute

    rows = re.findall(r"^\| `(\w+)` \|", README.split("| `compute.engine` |")[1], re.MULTILINE)
    assert get_args(get_type_hints(Compute)["engine"]) == tuple(rows)
