"""The stage `steer` on an audio model: all outs, the report's section, and `generate --audio`."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from musicscope.commands import cli, generate
from musicscope.config import load_params
from musicscope.core.io import read_json
from musicscope.core.stats import Estimate
from musicscope.models.registry import load_model
from musicscope.report.elements import Players
from musicscope.report.sections.steering import section as steering_section
from musicscope.steering import conditions
from musicscope.steering import run as steering_run
from musicscope.steering.recipes import load_recipe, load_steering
from musicscope.steering.report import Outs
from musicscope.steering.session import AudioInput, Session, known_concepts, read_audio
from musicscope.steering.subjects import Clips
from tests.support import tone_rave as tone
from tests.support.locks import python
from tests.support.report import cells, inside, sources, tables, text_of
from tools.import_closure import ROOT

OUTS = Outs("data/steering/tone", "metrics/steer/tone.json", "plots/steer/tone")
COUNTS = {"train": 24, "validation": 16, "test": 16}


def section():
    """params.steer of the repository, made small."""
    own = load_params(ROOT / "params.yaml").steer
    return replace(
        own, concepts=("guitar", "drums", "piano"), seconds=0.4, n_prompts=100, bootstrap=20,
        pairs=("guitar-off+drums-on", "guitar-off+piano-on"), scores=("effect",),
        strengths=(0.5, 1.0), n_features=(1,), direction_strengths=(0.25, 1.0),
        validation_prompts=4, gate_features=2, gate_seconds=0.1, examples=1, distance_budget=1e6,
    )  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project after `steer`."""
    root = tmp_path_factory.mktemp("stage")
    tone.write_world(root, tone.labelled_rows(COUNTS))
    evaluate(root, section())
    return root


def evaluate(root: Path, of) -> None:
    """The stage in a world, with the tests' judges."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("DVC_ROOT", str(root))
        patch.setattr(conditions, "load_judges", lambda folder: tone.ToneJudges())
        conditions.open_context.cache_clear()
        steering_run.evaluate("tone", of, 5, "cpu", 1, OUTS)
        conditions.open_context.cache_clear()


STEER = """
import sys
from pathlib import Path
from tests.steering import test_audio_steering_stage as t
t.evaluate(Path(sys.argv[1]), t.section())
"""


def outputs(root: Path) -> dict[str, bytes]:
    found = [p for top in ("data/steering", "metrics", "plots") for p in (root / top).rglob("*")]
    return {str(p.relative_to(root)): p.read_bytes() for p in found if p.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True], ids=["both run on", "the first is killed"])
def test_a_run_beside_another_waits_and_both_end_in_the_same_bytes(world, tmp_path, killed):
    """The first is what a killed dvc leaves running, beside the stage that the next dvc starts."""
    tone.write_world(tmp_path, tone.labelled_rows(COUNTS))
    first = python(STEER, str(tmp_path))
    while not [*tmp_path.glob(".dvc/tmp/partial/*/*.npz")]:  # it has begun with conditions
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # until the second has come to the lock
    second = python(STEER, str(tmp_path))
    while f"waiting for process {first.pid}: it works in" not in (line := second.stderr.readline()):
        assert line, "it did not wait"
    first.send_signal(signal.SIGCONT)
    if killed:
        first.kill()
        first.wait()
    else:
        _, error = first.communicate()
        assert first.returncode == 0, error
    _, error = second.communicate()
    assert second.returncode == 0, error
    assert outputs(tmp_path) == outputs(world)
    assert [p for p in (tmp_path / ".dvc/tmp/partial").iterdir() if p.suffix != ".lock"] == []


def test_a_cell_of_the_table_comes_from_the_verdicts_of_its_pieces(world):
    """The planted edit moves every piece; a table with shuffled pieces would not say so."""
    found = read_json(world / OUTS.metrics)
    path = world / OUTS.folder / "verdicts.parquet"
    assert path.stat().st_size < 300_000
    verdicts = pd.read_parquet(path)
    assert verdicts["other_font_judge"].dtype == np.float16
    own = verdicts[verdicts["edit"] == "drums off"]
    limit = found["thresholds"]["other_font_judge"]["drums"]
    wanted = own["other_font_judge"].astype(float) <= limit
    shares = wanted.groupby(own["method"], observed=True).mean()
    methods = found["concepts"]["drums"]["off"]["methods"]
    for method, one in methods.items():
        success = shares[method] - shares["reseed"]
        assert one["success"]["value"] == pytest.approx(success, abs=1e-5), method
    assert (shares["plain"], shares["sae"], shares["random_feature"]) == (0.0, 1.0, 0.0)


def test_the_stage_finds_the_planted_latents_and_switches_them(world):
    found = read_json(world / OUTS.metrics)
    assert found["layer"] == "latent"
    assert set(found["concepts"]) == {"guitar", "drums"}
    for concept, directions in found["concepts"].items():
        best = found["recipes"][concept]["effect"]
        assert next(iter(best)) == str(tone.TONES[concept])
        for direction in ("off", "on"):
            methods = directions[direction]["methods"]
            assert set(methods) == set(Clips.methods) - {"plain"}
            success = {name: Estimate.read(one["success"]) for name, one in methods.items()}
            assert success["sae"].value == success["sae"].low == 1.0
            for control in ("reseed", "original", "random_feature"):
                assert success[control].value == 0.0
            assert methods["sae"]["ce_cost"]["value"] is None
            costs = [methods[m]["spectral_cost"]["value"] for m in ("sae", "reseed")]
            assert costs[0] > costs[1] > 0
            assert methods["sae"]["distance"]["value"] > 0
            assert set(directions[direction]["chosen"]) == {"sae", "diff_means", "probe_direction"}
            validation = directions[direction]["chosen"]["sae"]["validation"]
            assert validation["ce_cost"] is None
            assert validation["spectral_cost"] > 0
            assert "prompt_edit" not in directions[direction]["sae_minus"]
            assert directions[direction]["sae_minus"]["random_feature"]["value"] == 1.0
    # What was used, and what was not and why.
    assert found["prompts"] == 4
    assert found["clips"]["guitar off"] == {"validation": 4, "test": 8}
    assert found["clips"]["guitar-off+drums-on"] == {"test": 4}
    assert found["skipped"] == 3
    assert set(found["skipped_because"]) == {"piano off", "piano on", "guitar-off+piano-on"}
    joint = found["joint"]["guitar-off+drums-on"]
    assert set(joint) == {"sae", "diff_means", "alone_guitar", "alone_drums"}
    assert joint["sae"]["all_wanted"]["value"] == 1.0
    assert joint["sae"]["spectral_cost"] > 0  # costs of pairs have no interval
    off = found["concepts"]["guitar"]["off"]["methods"]
    assert off["sae"]["success"]["value"] == 1.0
    assert off["sae"]["spectral_cost"]["value"] > 0
    assert "prompt_edit" not in off


def test_all_outs_are_there_and_are_the_music(world):
    stem = world / OUTS.plots
    for suffix in (".csv", "-search.csv", "-dose.csv", "-crosstalk.csv"):
        assert Path(f"{stem}{suffix}").stat().st_size > 100
    table = pd.read_csv(f"{stem}.csv")
    assert len(table) == 4 * (len(Clips.methods) - 1)
    assert table["ce_cost"].isna().all()
    assert table["spectral_cost"].notna().all()
    folder = world / OUTS.folder
    index = read_json(folder / "examples/index.json")
    assert [e["wishes"] for e in index["examples"]][-1] == ["guitar off", "drums on"]
    example = index["examples"][0]
    assert example["prompt"].startswith("clip test-")
    plain, steered = (soundfile.read(folder / "examples" / example[k])
                      for k in ("plain", "steered"))  # fmt: skip
    assert plain[1] == steered[1] == tone.SR
    before, after = (tone.level_of(sound[None], tone.SR)[0] for sound, _ in (plain, steered))
    assert before[0] > 0.2
    assert after[0] < 0.02
    np.testing.assert_allclose(after[1:], before[1:], atol=0.01)
    kept = load_recipe(folder, "guitar")
    assert kept.chosen["off"].strength == 1.0
    assert set(kept.chosen) == {"off", "on"}


def test_the_report_shows_clips_and_distances(world):
    page = steering_section(sources(world, ("tone",)))
    assert "tone: 4 or more test clips for each row" in text_of(page)
    assert sum("left out" in text for text in page.missing) == 3
    success = tables(page)["tone: success"]
    assert success.columns[-1] == "spectral distance of features"
    assert "the clip itself" in success.columns
    assert "prompt edit" not in success.columns
    assert cells(success)["guitar off"][0].startswith("1.00 [")
    costs = tables(page)["tone: effect and cost"]
    at = costs.columns.index("spectral distance")
    number = read_json(world / OUTS.metrics)["concepts"]["guitar"]["off"]["methods"]["sae"]
    shown = Estimate.read(number["spectral_cost"]).text()
    assert cells(costs)["guitar off: features"][at - 1] == shown
    assert "spectral distance" in tables(page)["tone: several concepts at once"].columns
    curves = tables(page)["tone: whole curves"]
    assert len(curves.rows) == 4 * 5  # three searched methods and two random controls per request
    assert list(inside(page.content, Players))


def test_without_labelled_clips_everything_is_written_and_says_why(tmp_path, monkeypatch):
    tone.write_world(tmp_path, tone.labelled_rows({"train": 4, "validation": 2, "test": 2}))
    monkeypatch.chdir(tmp_path)
    steering_run.evaluate("tone", section(), 5, "cpu", 1, OUTS)
    found = read_json(OUTS.metrics)
    assert (found["prompts"], found["concepts"], found["skipped"]) == (0, {}, 8)
    assert "2 validation clips with guitar, of 1 groups" in found["skipped_because"].values()
    assert read_json(f"{OUTS.folder}/examples/index.json")["examples"] == []
    for suffix in (".csv", "-search.csv", "-dose.csv", "-crosstalk.csv"):
        assert Path(f"{OUTS.plots}{suffix}").is_file()
    page = steering_section(sources(tmp_path, ("tone",)))
    assert sum("left out" in text for text in page.missing) == 8


def test_a_direction_without_test_clips_is_left_out_alone(tmp_path):
    rows = tone.labelled_rows({"train": 16, "validation": 8, "test": 8})
    for row in rows:
        row["has_drums"] |= row["split"] == "test"
    tone.write_world(tmp_path, rows)
    evaluate(tmp_path, replace(section(), concepts=("drums",), pairs=()))
    found = read_json(tmp_path / OUTS.metrics)
    assert list(found["concepts"]["drums"]) == ["off"]
    assert found["concepts"]["drums"]["off"]["methods"]["sae"]["success"]["value"] == 1.0
    assert found["skipped_because"] == {"drums on": "0 test clips without drums, of 0 groups"}
    # It can be switched on all the same: settings need validation clips alone.
    assert set(load_recipe(tmp_path / OUTS.folder, "drums").chosen) == {"off", "on"}
    page = steering_section(sources(tmp_path, ("tone",)))
    assert list(cells(tables(page)["tone: success"])) == ["drums off"]


# --- generate ---------------------------------------------------------------------------------


@pytest.fixture
def song(world, monkeypatch) -> Path:
    """A stereo file at another rate, in a folder after `steer`."""
    monkeypatch.chdir(world)
    monkeypatch.setattr(generate, "load_judges", lambda path: tone.ToneJudges())
    sound = tone.tones(np.array([[0.3, 0.0, 0.2, 0.2]]), 16_000, 0.6)[0]
    soundfile.write(world / "my song.flac", np.stack([sound, sound], 1), 16_000)
    return world / "my song.flac"


def made(folder: Path) -> dict[str, Path]:
    return {p.stem.rsplit("-", 1)[1] + p.suffix: p for p in folder.iterdir()}


def run(song: Path, *more: str, out: str) -> dict[str, Path]:
    cli.main(["generate", "--model", "tone", "--audio", str(song), *more, "--out", out])
    return made(Path(out))


def test_a_recording_loses_the_concept_and_keeps_the_rest(song, capsys):
    files = run(song, "--off", "guitar", out="one")
    said = capsys.readouterr().out
    assert "tone, seed 0, 0.6 s, guitar off: my song.flac" in said
    assert "changed no sample" not in said
    plain, steered = (soundfile.read(files[f"{k}.wav"]) for k in ("plain", "steered"))
    assert plain[1] == tone.SR
    assert len(plain[0]) == len(steered[0]) == round(0.6 * tone.SR)
    before, after = (tone.level_of(s[None, : 30 * 64], tone.SR)[0] for s, _ in (plain, steered))
    np.testing.assert_allclose(before, [0.3, 0.0, 0.2, 0.2], atol=0.02)
    np.testing.assert_allclose(after, [0.0, 0.0, 0.2, 0.2], atol=0.02)
    about = json.loads(files["steered.json"].read_text())
    assert (about["audio"], about["seed"], about["wishes"]) == ("my song.flac", 0,
                                                                {"guitar": "off"})  # fmt: skip
    assert about["scores"]["family_judge"]["guitar"][0] > 0.9
    assert about["scores"]["family_judge"]["guitar"][1] < 0.1
    # It is what the model makes of the file.
    model = load_model("data/models/tone")
    source = AudioInput(read_audio(song, tone.SR))
    layer, steering = load_steering("tone", {"guitar": "off"})
    sound = Session(model).draw(source, layer, steering)
    assert generate.wav_bytes(sound) == files["steered.wav"].read_bytes()
    again = run(song, "--off", "guitar", out="again")
    assert {k: p.read_bytes() for k, p in again.items()} == {
        k: p.read_bytes() for k, p in files.items()
    }


def test_strength_seed_length_and_schedule_of_a_recording(song, capsys):
    zero = run(song, "--off", "guitar", "--strength", "0", out="zero")
    assert "the edit changed no sample" in capsys.readouterr().out
    assert zero["plain.wav"].read_bytes() == zero["steered.wav"].read_bytes()
    other = run(song, "--off", "guitar", "--seed", "3", out="seed")
    assert other["plain.wav"].read_bytes() != zero["plain.wav"].read_bytes()
    short = run(song, "--off", "guitar", "--seconds", "0.3", out="short")
    assert soundfile.info(short["plain.wav"]).frames == round(0.3 * tone.SR)
    part = run(song, "--off", "guitar", "--schedule", "0.2", "0.4", out="part")
    plain, steered = (soundfile.read(part[f"{k}.wav"])[0] for k in ("plain", "steered"))
    apart = np.abs(plain - steered) > 1e-3
    assert not apart[: 20 * 64].any()
    assert apart[20 * 64 : 40 * 64].mean() > 0.5
    assert not apart[40 * 64 :].any()


def refused(*arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", *arguments])
    assert "\n" not in str(stop.value)
    return str(stop.value)


def test_bad_input_about_recordings_is_one_line(song, tmp_path):
    base = ("--model", "tone", "--off", "guitar")
    assert "generates nothing from a prompt" in refused(*base, "--prompt", "x")
    assert "--audio FILE edits" in refused(*base, "--prompt", "x")
    assert "give --prompt TEXT, or --audio FILE" in refused(*base)
    assert "give --prompt TEXT, or" in refused(*base, "--prompt", "x", "--audio", str(song))
    assert "is no file" in refused(*base, "--audio", "none.wav")
    (tmp_path / "x.wav").write_bytes(b"RIFF no music")
    assert "is no audio that libsndfile" in refused(*base, "--audio", str(tmp_path / "x.wav"))
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 8000)
    assert "no samples" in refused(*base, "--audio", str(tmp_path / "empty.wav"))
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan), 8000, subtype="FLOAT")
    assert "NaN" in refused(*base, "--audio", str(tmp_path / "nan.wav"))
    soundfile.write(tmp_path / "long.wav", np.zeros(130 * 8000), 8000)
    assert "lasts 130 s: give --seconds" in refused(*base, "--audio", str(tmp_path / "long.wav"))
    for option, value in (("--guidance", "3"), ("--branch", "both")):
        assert f"{option}: of prompts" in refused(*base, "--audio", str(song), option, value)
    assert "no concept 'piano'" in refused("--model", "tone", "--off", "piano",
                                           "--audio", str(song))  # fmt: skip
    assert known_concepts("tone") == {"drums": ("off", "on"), "guitar": ("off", "on")}


def test_a_generator_takes_no_recording(song, tiny_musicgen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused("--model", str(tiny_musicgen), "--off", "guitar", "--audio", str(song))
    assert "makes music from words: give --prompt TEXT" in message
