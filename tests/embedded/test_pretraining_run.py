"""The whole run on tiny settings: phases, checkpoints, saved models, refinement of the codec."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from musicscope.core.user_outputs import OutputError
from musicscope.embedded.pretraining import corpus as corpora
from musicscope.embedded.pretraining import phases, run, saved_models
from musicscope.embedded.rendering import scenes
from musicscope.models.registry import load_model

SECONDS = 1.2


class Inline:
    """Stands in for `Renderers`: chunks of sine stems, made on the spot."""

    def __init__(self, folder, material, seed, processes):
        self.folder, self.names = folder, []
        folder.mkdir(parents=True, exist_ok=True)

    def submit(self, split, chunks):
        for number in chunks:
            name = f"{split}-{number:05d}"
            rng = np.random.default_rng([number, len(split)])
            table, stems = [], []
            for _ in range(run.SCENES_PER_CHUNK):
                concepts = [str(c) for c in rng.choice(["guitar", "piano", "drums"], 2, False)]
                parts = [
                    scenes.Stem(c, 24 if c == "guitar" else 0, "timgm6mb", j, 0, j, notes=9)
                    for j, c in enumerate(concepts)
                ]
                table.append(scenes.Scene("g", 0.0, 1.0, tuple(parts), 100.0, "C major", ""))
                time = np.arange(run.SAMPLES) / scenes.SAMPLE_RATE
                hertz = rng.uniform(100, 900, (2, 1))
                stems.append(0.14 * np.sin(2 * np.pi * hertz * time))
            np.save(self.folder / f"{name}.npy", np.concatenate(stems).astype(np.float16))
            text = json.dumps([s.to_json() for s in table])
            (self.folder / f"{name}.json").write_text(text)
            self.names.append(name)

    def finished(self):
        names, self.names = self.names, []
        return names

    def close(self):
        pass


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    threads = torch.get_num_threads()
    for module in (run, corpora):
        monkeypatch.setattr(module, "SECONDS", SECONDS)
        monkeypatch.setattr(module, "SAMPLES", round(SECONDS * scenes.SAMPLE_RATE))
        monkeypatch.setattr(module, "SCENES_PER_CHUNK", 4)
    monkeypatch.setattr(run, "START_SAMPLES", 6400)
    monkeypatch.setattr(run, "START_CLIPS", 16)
    monkeypatch.setattr(run, "HELD_OUT_CHUNKS", 1)
    monkeypatch.setattr(phases, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(run, "Renderers", Inline)
    monkeypatch.setattr(run, "TEXT", replace(run.TEXT, captions=200, steps=2))
    monkeypatch.setattr(run, "SIZES", {"nano-small": replace(run.SIZES["nano-small"], layers=1)})
    scores = tmp_path / "scores.npz"
    scores.touch()
    yield ["--work", str(tmp_path / "work"), "--scores", str(scores), "--font", "a=b",
           "--scenes", "8", "--first-scenes", "4", "--clips", "6", "--codec-batch", "2",
           "--codec", '{"codebook_size": 32, "crop": 3200}', "--decoder-batch", "1"]  # fmt: skip
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_run_trains_saves_and_goes_on_where_it_stopped(tiny, tmp_path):
    out = tmp_path / "out"
    run.main([*tiny, "--out", str(tmp_path / "part"), "--minutes", "0.08", "--until", "codec"])
    assert not (tmp_path / "work" / "tokens-train.pt").exists()
    codec = (tmp_path / "work" / "codec" / "model.safetensors").read_bytes()
    run.main([*tiny, "--out", str(out), "--minutes", "0.08"])
    assert (tmp_path / "work" / "codec" / "model.safetensors").read_bytes() == codec
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {"text", "codec held out", "tokens", "nano-small"} <= {line["phase"] for line in lines}
    model = load_model(out / "nano-small")
    assert str(tmp_path) not in (out / "nano-small" / "config.json").read_text()
    audio, _ = model.generate(["guitar"], 0.4, 1)
    assert torch.isfinite(audio).all()
    before = model.encode(np.zeros((1, 3200), np.float32) + 0.01, [None]).codes

    better = tmp_path / "better"
    work = ["--work", str(tmp_path / "more")]  # the last option counts
    arguments = [*tiny, *work, "--refine", str(out), "--minutes", "0.03", "--out"]
    with pytest.raises(OutputError, match="--refine"):
        run.main([*arguments, str(out / "inside")])
    run.main([*arguments, str(better)])
    again = load_model(better / "nano-small")
    assert torch.equal(again.encode(np.zeros((1, 3200), np.float32) + 0.01, [None]).codes, before)
    decoder = [m.hf.audio_encoder.decoder.state_dict() for m in (model, again)]
    assert any(not torch.equal(decoder[0][k], decoder[1][k]) for k in decoder[0])
    for name, value in model.hf.decoder.state_dict().items():
        assert torch.equal(value, again.hf.decoder.state_dict()[name]), name


@pytest.mark.slow
def test_a_run_goes_on_from_saved_models(tiny, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    run.main([*tiny, "--out", str(first), "--minutes", "0.05"])
    # Without time to train, the decoder that comes out is the one that went in.
    more = ["--work", str(tmp_path / "more"), "--start", str(first), "--minutes", "0.05"]
    shares = ["--shares", '{"codec": 0, "nano-small": 0}']
    run.main([*tiny, *more, *shares, "--out", str(second)])
    one, two = (load_model(folder / "nano-small").hf.state_dict() for folder in (first, second))
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(FileNotFoundError, match="holds none of nano-small"):
        saved_models.start_from(tmp_path, tmp_path / "other")


@pytest.mark.slow
def test_a_codec_trains_on_with_its_own_architecture(tiny, tmp_path):
    first, second = tmp_path / "one", tmp_path / "two"
    run.main([*tiny, "--out", str(first), "--minutes", "0.05"])
    more = ["--work", str(tmp_path / "again"), "--codec-start", str(first), "--until", "codec"]
    run.main([*tiny, *more, "--minutes", "0.03", "--out", str(second)])
    codecs = [saved_models.load_codec(folder) for folder in (first, second / "codec")]
    assert codecs[0].config.num_filters == codecs[1].config.num_filters
    weights = [codec.state_dict()["encoder.layers.0.conv.bias"] for codec in codecs]
    assert not torch.equal(*weights)
    lines = [json.loads(line) for line in (second / "log.jsonl").read_text().splitlines()]
    assert "codec before" in [line["phase"] for line in lines]


@pytest.mark.parametrize("option", ["--out", "--work"])
def test_a_folder_with_other_files_is_refused_before_any_work(tiny, tmp_path, option):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    other = ["--out", str(tmp_path / "new")] if option == "--work" else []
    with pytest.raises(OutputError, match="mine"):
        run.main([*tiny, *other, option, str(mine)])
    assert [p.name for p in mine.iterdir()] == ["thesis.txt"]


def test_a_killed_run_leaves_nothing_that_stops_the_next(tiny, tmp_path, monkeypatch):
    def train(args, log):
        assert not args.out.exists()  # so that a kill at this moment leaves no claim

    monkeypatch.setattr(run, "train", train)
    run.main([*tiny, "--out", str(tmp_path / "out")])
    assert (tmp_path / "out/log.jsonl").is_file()


def test_work_of_another_run_is_refused_and_stems_fit_every_run(tmp_path):
    work = tmp_path / "work"
    corpora.claim_work(work)
    corpora.claim_work(work, {"seed": 1})
    corpora.claim_work(work)
    corpora.claim_work(work, {"seed": 1})
    with pytest.raises(OutputError, match="'seed': 1"):
        corpora.claim_work(work, {"seed": 2})


def test_progress_counts_earlier_runs_and_bad_losses_end_a_run(tmp_path):
    phase = phases.Phase("x", tmp_path, minutes=1.0)
    phase.before = 30.0
    assert 0.5 <= phase.progress < 0.6
    phase.save({"a": torch.ones(2)}, force=True)
    assert phases.Phase("x", tmp_path, minutes=1.0).before >= 30.0
    for _ in range(phases.MOST_BAD - 1):
        assert not phase.check([1.0, float("nan")], 5)
    with pytest.raises(FloatingPointError, match="lower its rate"):
        phase.check([float("inf")], 6)
    phase.bad = 0
    assert phase.check([1.0], 7)
