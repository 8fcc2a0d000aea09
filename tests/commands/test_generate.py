"""`musicscope generate` on the tiny model: files, determinism, scores, and errors of one line."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import soundfile

from musicscope.commands import cli, generate
from musicscope.config import load_params
from musicscope.models.registry import load_model
from musicscope.steering import session
from musicscope.steering.edit import ConceptEdit, Edit, Steering
from musicscope.steering.found import load_found
from musicscope.steering.recipes import load_recipe, load_sae, load_steering, save_recipe
from musicscope.steering.session import Session, Sound, TextInput
from musicscope.steering.subjects import edit_prompt
from tests.support.steered import SLOT, StubJudges, make_steerable, other_sae

PROMPT = "A calm guitar/piano piece: no. 1!"
BASE = ("generate", "--model", "tiny", "--prompt", PROMPT, "--seconds", "0.3", "--seed", "7")


@pytest.fixture
def folder(tmp_path, tiny_musicgen, monkeypatch):
    make_steerable(tmp_path, tiny_musicgen)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "load_judges", lambda path: StubJudges())
    return tmp_path


def made(folder, out: str = "out") -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (folder / out).iterdir()}


def only(files: dict[str, bytes], kind: str) -> bytes:
    (found,) = (content for name, content in files.items() if name.endswith(kind))
    return found


def refused(*arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments])
    message = str(stop.value)
    assert "\n" not in message
    return message


def test_strength_0_gives_the_same_bytes_and_the_usual_strength_does_not(folder, capsys):
    cli.main([*BASE, "--on", "guitar", "--strength", "0", "--out", "zero"])
    assert "changed no token" in capsys.readouterr().out
    zero = made(folder, "zero")
    assert only(zero, "-plain.wav") == only(zero, "-steered.wav")
    cli.main([*BASE, "--on", "guitar", "--out", "one"])
    assert "changed no token" not in capsys.readouterr().out
    one = made(folder, "one")
    assert only(one, "-plain.wav") == only(zero, "-plain.wav") != only(one, "-steered.wav")
    cli.main([*BASE, "--on", "guitar", "--out", "again"])
    assert made(folder, "again") == one
    sound, rate = soundfile.read(folder / "one" / next(n for n in one if n.endswith("-plain.wav")))
    assert (rate, sound.shape) == (3200, (960,))
    # What was written is what the model draws.
    model = load_model(folder / "data/models/tiny")
    audio, _ = model.generate([PROMPT], 0.3, 7)
    np.testing.assert_allclose(sound, np.clip(audio[0].numpy(), -1, 1), atol=1e-4)
    layer, steering = load_steering("tiny", {"guitar": "on"})
    sound = Session(model).draw(TextInput(PROMPT, 0.3, 7), layer, steering)
    assert generate.wav_bytes(sound) == only(one, "-steered.wav")


def test_other_settings_make_other_files_and_nothing_is_overwritten(folder, capsys):
    cli.main([*BASE, "--on", "guitar", "--out", "out"])
    first = made(folder)
    assert len(first) == 3
    names = sorted(first)
    assert all(n.startswith("a-calm-guitar-piano-piece-no-1-seed7-") for n in names), names
    for more in (("--off", "guitar"), ("--on", "guitar", "--on", "organ"),
                 ("--on", "guitar", "--features", "2"), ("--on", "guitar", "--strength", "0.5"),
                 ("--on", "guitar", "--branch", "both"), ("--on", "guitar", "--loop", "closed"),
                 ("--on", "guitar", "--schedule", "0.1", "0.2"),
                 ("--on", "guitar", "--guidance", "1")):  # fmt: skip
        before = len(made(folder))
        cli.main([*BASE, *more, "--out", "out"])
        assert len(made(folder)) == before + 3, more
    after = made(folder)
    assert {name: after[name] for name in names} == first
    # A file of the same name that is not ours stays as it is.
    plain = next(folder / "out" / n for n in names if n.endswith("-plain.wav"))
    plain.write_bytes(b"mine")
    cli.main([*BASE, "--on", "guitar", "--out", "out"])
    assert plain.read_bytes() == b"mine"
    assert plain.with_name(f"{plain.stem}-2.wav").is_file()
    assert not [n for n in made(folder) if n.endswith(".tmp")]


def test_the_settings_are_written_down(folder):
    cli.main([*BASE, "--off", "guitar", "--on", "organ", "--strength", "0.5", "--schedule", "0.1",
              "0.2", "--guidance", "2", "--out", "out"])  # fmt: skip
    about = json.loads(only(made(folder), ".json"))
    assert about["wishes"] == {"guitar": "off", "organ": "on"}
    assert (about["prompt"], about["seed"], about["guidance"]) == (PROMPT, 7, 2.0)
    assert about["schedule"] == [0.1, 0.2]
    guitar, organ = about["concepts"]["guitar off"], about["concepts"]["organ on"]
    assert (guitar["strength"], organ["strength"]) == (2.0, 2.0)  # half of what was chosen
    assert (guitar["edits"][0]["op"], organ["edits"][0]["op"]) == ("ablate", "clamp_min")
    assert set(about["files"]) == {"plain", "steered"}
    assert set(made(folder)) == {*about["files"].values(),
                                 about["files"]["steered"].replace(".wav", ".json")}  # fmt: skip
    assert set(about["scores"]) == {"family_judge", "musicnn"}


def test_words_may_ask_for_the_same(folder):
    cli.main([*BASE, "--on", "guitar", "--out", "one"])
    cli.main([*BASE, "--on", "guitar", "--words", "--out", "two"])
    one, two = made(folder, "one"), made(folder, "two")
    assert only(one, "-plain.wav") == only(two, "-plain.wav")
    assert only(one, "-steered.wav") != only(two, "-steered.wav")
    about = json.loads(only(two, ".json"))
    assert (about["prompt"], about["prompt_steered"]) == (
        PROMPT,
        edit_prompt(PROMPT, {"guitar": "on"}),
    )
    # At strength 0 the words alone are left.
    cli.main([*BASE, "--on", "guitar", "--words", "--strength", "0", "--out", "zero"])
    model = load_model(folder / "data/models/tiny")
    audio, codes = model.generate([about["prompt_steered"]], 0.3, 7)
    sound = Sound(audio[0].numpy(), model.sample_rate, codes[0])
    assert generate.wav_bytes(sound) == only(made(folder, "zero"), "-steered.wav")


def test_both_judges_are_printed_for_what_was_asked_and_the_likeliest_others(folder, capsys):
    cli.main([*BASE, "--on", "guitar", "--on", "organ", "--out", "out"])
    text = capsys.readouterr().out
    about = json.loads(only(made(folder), ".json"))
    head, *rows = [line for line in text.splitlines() if re.match(r"family |\S+.*\d\.\d{3}", line)]
    assert head.split("  ")[-4:] == ["plain, family judge", "steered, family judge",
                                     "plain, musicnn", "steered, musicnn"]  # fmt: skip
    assert [row.split("  ")[0] for row in rows[:2]] == ["guitar on", "organ on"]
    assert len(rows) == 2 + 3
    family = about["scores"]["family_judge"]
    assert rows[0].split()[2:4] == [f"{v:.3f}" for v in family["guitar"]]
    # The stub of musicnn knows three families.
    known = [f for f, v in about["scores"]["musicnn"].items() if v[0] is not None]
    assert len(known) == 3
    others = [row.split("  ")[0] for row in rows[2:]]
    most = sorted(
        (f for f in family if f not in ("guitar", "organ")), key=lambda f: -max(family[f])
    )
    assert others == most[:3]


def test_a_concept_that_the_model_hardly_plays_comes_with_a_warning(folder, capsys):
    recipes = folder / "data/steering/tiny"
    held = load_recipe(recipes, "guitar")
    for grounding, warned in ((None, False), (0.9, False), (0.55, True)):
        save_recipe(replace(held, grounding=grounding), recipes)
        capsys.readouterr()
        cli.main([*BASE, "--on", "guitar", "--out", "out"])
        assert ("hardly plays guitar on request" in capsys.readouterr().err) == warned, grounding
    assert made(folder)  # the music is there all the same


def test_several_prompts_are_each_what_they_are_alone(folder):
    cli.main([*BASE, "--prompt", "flute", "--on", "guitar", "--out", "two"])
    cli.main([*BASE, "--on", "guitar", "--out", "one"])
    two, one = made(folder, "two"), made(folder, "one")
    assert len(two) == 6
    assert {name: two[name] for name in one} == one


def test_without_judges_the_music_is_there_and_the_stage_is_named(folder, capsys, monkeypatch):
    from musicscope.judges.pair import load_judges

    monkeypatch.setattr(generate, "load_judges", load_judges)
    cli.main([*BASE, "--on", "guitar", "--out", "out"])
    said = capsys.readouterr()
    assert "run dvc repro train_judge" in said.err
    assert "dvc pull data/judge" in said.err
    assert "musicnn" not in said.out
    assert len(made(folder)) == 3


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("--on", "kazoo"), r"no concept 'kazoo' of tiny; known: guitar, organ"),
        (("--off", "organ"), r"organ cannot be switched 'off' in tiny; .*: on"),
        (("--off", "guitar", "--on", "guitar"), r"guitar: off or on, not both"),
        ((), r"name a concept: --off CONCEPT"),
        (("--on", "guitar", "--seconds", "1e9"), r"up to 120"),
        (("--on", "guitar", "--guidance", "0.5"), r"guidance 0.5: 1 to 20"),
        (("--on", "guitar", "--schedule", "2", "1"), r"0 <= START < END"),
        (("--on", "guitar", "--branch", "guidance", "--guidance", "1"), r"needs guided generation"),
        (("--on", "guitar", "--prompt", "x" * 3000), r"3000 letters"),
    ],
)
def test_bad_input_is_one_line(folder, arguments, wanted):
    assert re.search(wanted, refused(*BASE, *arguments))


def test_missing_models_and_recipes_are_named(folder, monkeypatch):
    (folder / "data/models/other").mkdir()
    message = refused("generate", "--model", "nano", "--prompt", "x", "--on", "guitar")
    assert "no model 'nano'; known: other, tiny" in message
    message = refused("generate", "--model", "other", "--prompt", "x", "--on", "guitar")
    assert "data/steering/other has no recipes: run dvc repro steer" in message
    assert "dvc pull data/steering/other" in message
    monkeypatch.setattr(session, "load_model", lambda name, device: SimpleNamespace())
    monkeypatch.setattr(session, "AudioModel", SimpleNamespace)
    assert "generates nothing from a prompt" in refused(*BASE, "--on", "guitar")
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    other_sae().save(folder / SLOT)
    assert "recipes of another SAE" in refused(*BASE, "--on", "guitar")


def test_guidance_is_that_of_the_choice_where_params_say_so(folder):
    from tools.import_closure import ROOT

    assert generate.usual_guidance() is None
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text("utf-8"), "utf-8")
    assert generate.usual_guidance() == load_params().steer.guidance


def test_a_tick_sees_the_piece_grow_changes_nothing_and_can_stop_it(folder):
    model = load_model(folder / "data/models/tiny")
    drawing, source, shares = Session(model), TextInput("flute", 0.3, 1), []
    plain = drawing.draw(source, "layers.3")
    watched = drawing.draw(source, "layers.3", tick=shares.append)
    assert np.array_equal(plain.audio, watched.audio)
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)

    class Stop(Exception):
        pass

    def stop(share: float) -> None:
        if share > 0.5:
            raise Stop

    with pytest.raises(Stop):
        drawing.draw(source, "layers.3", tick=stop)
    assert np.array_equal(drawing.draw(source, "layers.3").audio, plain.audio)
    with pytest.raises(ValueError, match=r"has no layers\.9"):
        drawing.draw(source, "layers.9")


def test_recipes_and_sae_by_path_give_the_same_music(folder, tmp_path_factory, monkeypatch, capsys):
    cli.main([*BASE, "--on", "guitar", "--out", "out"])
    expected = made(folder)
    elsewhere = tmp_path_factory.mktemp("elsewhere")  # no data/, no params.yaml
    monkeypatch.chdir(elsewhere)
    capsys.readouterr()
    given = ["--model", str(folder / "data/models/tiny"), "--recipes", str(recipes(folder))]
    given += ["--sae", str(folder / SLOT)]
    cli.main([*BASE, *given, "--on", "guitar", "--out", "out", "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    assert only(made(elsewhere), "-steered.wav") == only(expected, "-steered.wav")
    assert found["requests"] == {"guitar": "on"}
    assert (elsewhere / found["files"]["steered"]).is_file()
    assert set(found["scores"]) == set(json.loads(only(expected, ".json"))["scores"])
    assert "has no recipe for 'flute'" in refused(*BASE, *given, "--on", "flute")


def recipes(folder):
    (found,) = {path.parent for path in (folder / "data").glob("steering*/tiny/guitar.json")}
    return found


# --- found concepts ---------------------------------------------------------------------------


@pytest.fixture
def found(folder, capsys):
    """A result of find-concept: recordings with a tone against noise."""
    rng = np.random.default_rng(0)
    for side in ("voice", "others"):
        (folder / side).mkdir()
        for i in range(6):
            sound = 0.05 * rng.standard_normal(8000)
            if side == "voice":
                sound += 0.4 * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
            soundfile.write(folder / side / f"{i}.wav", sound, 8000)
    cli.main(["find-concept", "--model", "tiny", "--with", "voice", "--without", "others",
              "--seconds", "1", "--permutations", "400"])  # fmt: skip
    assert "musicscope generate --concept data/found/voice --off" in capsys.readouterr().out
    return folder / "data/found/voice"


FOUND = ("generate", "--seconds", "0.3", "--seed", "7")


def test_what_was_found_is_steered_by_its_folder(folder, found, capsys):
    concept = load_found(found)
    table = pd.read_csv(found / "features.csv")
    assert [x.feature for x in concept.latents] == table["feature"][: len(concept.latents)].tolist()
    assert 0 < concept.discoveries == (table["q"] <= 0.05).sum()
    cli.main([*FOUND, "--concept", "data/found/voice", "--off", "--out", "off"])
    said = capsys.readouterr()
    assert "voice: not judged" in said.out
    assert "music without a caption" in said.err
    assert "not chosen on generated music" in said.err
    off = json.loads(only(made(folder, "off"), ".json"))
    assert (off["model"], off["layer"], off["prompt"]) == ("tiny", "layers.3", "")
    (edit,) = off["concepts"]["voice off"]["edits"]
    used = min(8, concept.discoveries)
    assert edit["features"] == table["feature"][:used].tolist()
    assert edit["op"] == "ablate"
    # The bytes are those of the model with these latents ablated.
    session, (layer, sae) = Session.open("tiny"), load_sae("tiny", "top1")
    own = Steering(sae, (ConceptEdit("x", (Edit(tuple(edit["features"]), "ablate"),)),))
    wanted = generate.wav_bytes(session.draw(TextInput("", 0.3, 7), layer, own))
    files = made(folder, "off")
    assert only(files, "-steered.wav") == wanted != only(files, "-plain.wav")
    cli.main([*FOUND, "--concept", "data/found/voice", "--on", "--prompt", "flute", "--features",
              "2", "--out", "on"])  # fmt: skip
    on = json.loads(only(made(folder, "on"), ".json"))
    (edit,) = on["concepts"]["voice on"]["edits"]
    assert (edit["op"], on["prompt"]) == ("clamp_min", "flute")
    assert edit["values"] == [x.usual for x in concept.latents[:2]]
    assert min(edit["values"]) > 0


def test_found_concepts_and_learnt_ones_go_together(folder, found):
    cli.main([*FOUND, "--prompt", "flute", "--off", "guitar", "--concept", "data/found/voice",
              "--on", "--out", "out"])  # fmt: skip
    about = json.loads(only(made(folder), ".json"))
    assert about["wishes"] == {"guitar": "off", "voice": "on"}
    assert list(about["concepts"]) == ["guitar off", "voice on"]
    # The folder may also be the value of the option.
    cli.main([*FOUND, "--prompt", "flute", "--off", "guitar", "--on", "data/found/voice",
              "--out", "same"])  # fmt: skip
    assert made(folder, "same") == made(folder)


def test_what_cannot_be_steered_says_why(folder, found):
    assert "add --off or --on after it" in refused(*FOUND, "--concept", "data/found/voice")
    with pytest.raises(SystemExit) as stop:
        cli.main([*FOUND, "--off", "--concept", "data/found/voice"])
    assert stop.value.code == 2
    assert "no steering.json" in refused(*FOUND, "--concept", "data/found/other", "--off")
    closed = refused(*FOUND, "--concept", "data/found/voice", "--off", "--loop", "closed")
    assert "learns no probe" in closed
    assert "was found in tiny, not in other" in refused(
        *FOUND, "--model", str(other_model(folder)), "--concept", "data/found/voice", "--off"
    )
    content = json.loads((found / "steering.json").read_text())
    (found / "steering.json").write_text(json.dumps({**content, "discoveries": 0}))
    assert "no feature was found" in refused(*FOUND, "--concept", "data/found/voice", "--off")
    cli.main([*FOUND, "--concept", "data/found/voice", "--off", "--features", "1", "--out", "o"])
    (found / "steering.json").write_text(json.dumps({**content, "latents": [{"feature": 1}]}))
    assert "is damaged" in refused(*FOUND, "--concept", "data/found/voice", "--off")
    (found / "steering.json").write_text(json.dumps({**content, "sae_sha256": "0"}))
    assert "another SAE" in refused(*FOUND, "--concept", "data/found/voice", "--off")
    both = ("--off", "guitar", "--concept", "data/found/voice", "--on")
    assert "switch them one at a time" in refused(*FOUND, *both)


def other_model(folder):
    (folder / "other").symlink_to((folder / "data/models/tiny").resolve())
    return folder / "other"
