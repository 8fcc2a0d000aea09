"""The studio's logic on the tiny model, without Gradio."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
import torch

from musicscope.commands.studio import logic
from musicscope.core.io import write_json
from musicscope.steering.recipes import load_recipe, load_sae, load_steering, save_recipe
from musicscope.steering.session import Session, Sound, TextInput
from tests.support.steered import StubJudges, make_steerable

HOSTILE = "</table><img src=x onerror='boom()'>\"&"
SOURCE = TextInput("calm guitar", 0.3, 3)
REQUEST = {"guitar": ("on", 1.0)}


@pytest.fixture
def folder(tmp_path, tiny_musicgen, monkeypatch):
    make_steerable(tmp_path, tiny_musicgen)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logic, "open_judges", lambda path: StubJudges())
    logic.open_session.cache_clear()
    return tmp_path


def ignore(share: float) -> None:
    pass


def play(requests=REQUEST, features=(), source=SOURCE, tick=ignore) -> logic.Outcome:
    layer, steering = logic.plan("tiny", requests, features)
    asked = {concept: direction for concept, (direction, _) in requests.items()}
    *_, outcome = logic.perform("tiny", source, layer, steering, asked, tick)
    return outcome


def test_what_there_is(folder):
    assert logic.models_with_sae() == ["tiny"]
    assert logic.all_concepts(["tiny", "nothing"]) == ["guitar", "organ"]
    layer, sae = load_sae("tiny", logic.SLOT)
    assert (layer, sae.width) == ("layers.3", 48)
    with pytest.raises(FileNotFoundError, match="run the stage train_sae"):
        load_sae("other", logic.SLOT)


def test_a_slider_is_in_units_of_what_was_chosen(folder):
    two = {"guitar": ("off", 0.5), "organ": ("on", 2.0)}
    layer, steering = logic.plan("tiny", two)
    _, chosen = load_steering("tiny", {"guitar": "off", "organ": "on"})
    assert layer == "layers.3"
    assert [c.strength for c in steering.concepts] == [2.0, 8.0]
    assert [c.edits for c in steering.concepts] == [c.edits for c in chosen.concepts]
    assert steering.branch == chosen.branch
    assert logic.plan("tiny", two, branch="both")[1].branch == "both"


def test_the_page_doubts_a_concept_that_the_model_hardly_plays(folder):
    assert not [note for note in play().notes if "hardly plays" in note]
    recipes = folder / "data/steering/tiny"
    save_recipe(replace(load_recipe(recipes, "guitar"), grounding=0.5), recipes)
    (note,) = (note for note in play().notes if "hardly plays" in note)
    assert "grounding 0.50" in note


def test_a_slider_goes_from_off_over_0_to_on(folder):
    assert logic.request_of(-0.5) == ("off", 0.5)
    assert logic.request_of(1.5) == ("on", 1.5)
    assert logic.request_of(0.0) is logic.request_of(None) is None
    assert logic.slider_range(("off", "on")) == (-2.0, 2.0)
    assert logic.slider_range(("on",)) == (0.0, 2.0)


def test_grounding_and_monotone_prompts_stand_beside_the_slider(folder):
    assert logic.standing("tiny") == {"guitar": "", "organ": ""}
    recipes = folder / "data/steering/tiny"
    for concept, grounding in (("guitar", 0.55), ("organ", 0.9)):
        save_recipe(replace(load_recipe(recipes, concept), grounding=grounding), recipes)
    curves = {d: {"curves": {"sae": {"monotone_share": s}}} for d, s in (("off", 0.25), ("on", 1))}
    metrics = {"concepts": {"guitar": curves, "organ": {"on": {"curves": {}}}}}
    write_json(folder / "metrics/steer/tiny.json", metrics)
    texts = logic.standing("tiny")
    assert texts["organ"] == "grounding 0.90"
    assert texts["guitar"] == (
        "⚠ grounding 0.55, the model hardly plays it on request · monotone prompts: off 25 %, "
        "on 100 %"
    )


def test_the_prompt_contains_what_is_switched_off():
    prompt = "A slow piece with guitars."
    assert logic.with_named(prompt, ["guitar"]) == prompt
    added = logic.with_named(prompt, ["guitar", "electric_piano"])
    assert added == "A slow piece with guitars with electric piano."
    assert logic.with_named(added, ["electric_piano"]) == added
    assert logic.with_named("", ["guitar"]) == ""
    assert not logic.names("no guitar", "guitar")
    (note,) = logic.prompt_notes("flute", {"guitar": "off", "organ": "on"})
    assert "does not name guitar" in note
    assert logic.prompt_notes("", {"guitar": "off"}) == [logic.EMPTY_PROMPT]


def test_the_plain_sound_comes_first_and_the_scores_last(folder):
    layer, steering = logic.plan("tiny", REQUEST)
    shares = []
    steps = logic.perform("tiny", SOURCE, layer, steering, {}, shares.append)
    first = next(steps)
    assert first.steered is None
    assert max(shares) <= 0.45
    second, last = steps
    assert (first.plain, second.scores) == (last.plain, None)
    assert second.steered is last.steered
    assert last.scores
    assert logic.time_left(1.0, 0.0) == "working"
    assert logic.time_left(10.0, 0.25) == "30 s left"
    assert logic.time_left(60.0, 0.2) == "4 min left"


def test_single_features_are_edited_in_units_of_their_usual_value(folder):
    usual = logic.usual_values("tiny")
    assert usual.shape == (96,)
    settings = ((5, "set", 2.0), (6, "scale", 0.5), (7, "ablate", 3.0), (8, "clamp_min", 1.0))
    features = [logic.FeatureEdit(*values) for values in settings]
    _, steering = logic.plan("tiny", {}, features)
    edits = [c.edits[0] for c in steering.concepts]
    assert [(e.features, e.op) for e in edits] == [
        ((5,), "set"), ((6,), "scale"), ((7,), "ablate"), ((8,), "clamp_min")
    ]  # fmt: skip
    assert [e.values[0] for e in edits] == pytest.approx([2 * usual[5], 0.5, 0.0, usual[8]])
    both = logic.plan("tiny", REQUEST, features[:1])[1].concepts
    assert [c.name for c in both] == ["guitar on", "feature 5"]
    assert logic.feature_of(None, "set", 1) is None
    assert logic.feature_of(4.0, "set", 1) == logic.FeatureEdit(4, "set", 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: logic.plan("tiny", {}), "switch a concept off or on"),
        (lambda: logic.plan("tiny", {"kazoo": ("on", 1.0)}), "known: guitar, organ"),
        (lambda: logic.plan("tiny", {"organ": ("off", 1.0)}), "cannot be switched 'off'"),
        (lambda: logic.plan("other", REQUEST), "dvc repro steer"),
        (lambda: logic.plan("tiny", {"guitar": ("on", float("nan"))}), "must be finite"),
        (lambda: logic.plan("tiny", {}, [logic.FeatureEdit(96, "set", 1.0)]), "has 0 to 95"),
        (
            lambda: logic.plan("tiny", {}, [logic.FeatureEdit(3, "explode", 1.0)]),
            "operation 'explode'",
        ),
        (lambda: logic.feature_of(1.5, "set", 1), "whole number"),
        (lambda: logic.feature_of(-1, "set", 1), "whole number"),
        (lambda: logic.feature_of(1, "set", None), "value of feature 1: give a number"),
        (lambda: logic.input_of("x", 31, 1, None), "up to 30"),
        (lambda: logic.input_of("x", None, 1, None), "seconds: give a number"),
        (lambda: logic.input_of("x", 2, None, None), "seed: give a number"),
        (lambda: logic.input_of("x", 2, 1.5, None), "whole number"),
        (lambda: logic.input_of("x", 2, -1, None), "seed -1"),
        (lambda: logic.input_of("x" * 3000, 2, 1, None), "3000 letters"),
        (lambda: logic.plan_found(None, "on", 4, 1.0), "find a concept first"),
    ],
)
def test_bad_input_has_a_message(folder, call, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call()


def test_both_pieces_are_those_of_the_command(folder):
    found = play()
    session = Session.open("data/models/tiny")
    layer, steering = load_steering("tiny", {"guitar": "on"})
    assert np.array_equal(found.plain.audio, session.draw(SOURCE, layer).audio)
    assert np.array_equal(found.steered.audio, session.draw(SOURCE, layer, steering).audio)
    assert not np.array_equal(found.plain.audio, found.steered.audio)
    assert found.notes == ()
    assert set(found.scores) == {"family_judge", "musicnn"}
    zero = play({"guitar": ("on", 0.0)})
    assert np.array_equal(zero.plain.audio, zero.steered.audio)
    assert "both sounds are the same" in zero.notes[0]


def test_the_plain_piece_is_drawn_once_for_one_order(folder, monkeypatch):
    drawn = []
    draw = Session.draw

    def counted(self, source, layer, steering=None, tick=None):
        drawn.append("plain" if steering is None else "steered")
        return draw(self, source, layer, steering, tick)

    monkeypatch.setattr(Session, "draw", counted)
    first, again = play(), play({"organ": ("on", 1.0)})
    assert drawn == ["plain", "steered", "steered"]
    assert first.plain is again.plain
    other = play(source=TextInput("calm guitar", 0.3, 4))
    assert drawn == ["plain", "steered", "steered", "plain", "steered"]
    assert not np.array_equal(other.plain.audio, first.plain.audio)


def test_cancelling_stops_within_a_step_and_the_next_press_is_whole(folder):
    shares = []

    def stop() -> bool:
        return bool(shares) and shares[-1] > 0.6  # in the steered half

    with pytest.raises(logic.Cancelled):
        play(tick=logic.ticking(shares.append, stop))
    assert shares == sorted(shares)
    assert 0.6 < shares[-1] < 0.7
    whole = []
    found = play(tick=whole.append)
    assert whole[-1] == 1.0
    logic.open_session.cache_clear()
    assert np.array_equal(play().steered.audio, found.steered.audio)


def test_missing_judges_are_a_note(folder, monkeypatch):
    monkeypatch.setattr(logic, "open_judges", logic.load_judges)
    found = play()
    assert found.scores is None
    text = logic.scores_html(found)
    assert "run dvc repro train_judge" in text
    assert "<table" not in text


class Rows(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags, self.rows = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data):
        if self.tags and self.tags[-1] in ("th", "td") and self.rows:
            self.rows[-1].append(data)


def test_scores_are_a_table_of_what_was_asked_and_hostile_names_stay_text():
    piece = Sound(np.zeros(10, np.float32), 3200, torch.zeros(1, 1))
    scores = {
        "family_judge": {"guitar": (0.75, 0.25), HOSTILE: (0.5, 0.625), "drums": (0.1, 0.1),
                         "flute": (0.2, 0.2), "brass": (0.0, 0.05)},
        HOSTILE: {"guitar": (0.5, None), HOSTILE: (None, None), "drums": (None, None),
                  "flute": (None, None), "brass": (None, None)},
    }  # fmt: skip
    outcome = logic.Outcome(piece, piece, scores, {"guitar": "off"}, (HOSTILE,))
    text = logic.scores_html(outcome)
    found = Rows(text)
    assert "img" not in found.tags
    assert found.rows[0][:3] == ["family", "plain, family judge", "steered, family judge"]
    assert found.rows[1] == ["guitar off", "0.75", "0.25", "0.50", "–"]
    assert [row[0] for row in found.rows[2:]] == [HOSTILE.replace("_", " "), "flute", "drums"]


def test_sound_and_picture_are_of_the_piece():
    time = np.arange(16_000) / 16_000
    low, high = (
        Sound((0.5 * np.sin(2 * np.pi * f * time)).astype(np.float32), 16_000, torch.zeros(1, 1))
        for f in (200, 4000)
    )
    rate, sound = logic.int16(low)
    assert (rate, sound.dtype) == (16_000, np.int16)
    np.testing.assert_allclose(sound / 32767, low.audio, atol=1e-4)
    pictures = [logic.picture(p) for p in (low, high)]
    assert pictures[0].shape == (288, 640, 3)
    darkest = [p[..., 0].mean(1).argmin() for p in pictures]
    assert darkest[0] > darkest[1] + 40  # low sounds are at the bottom


# --- the command ------------------------------------------------------------------------------


def test_the_command_says_what_is_missing(tmp_path, monkeypatch):
    from musicscope.commands import cli
    from musicscope.commands.studio import app as studio

    monkeypatch.chdir(tmp_path)
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR", "no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "proxy.example" if name == "no_proxy" else "")
    monkeypatch.setattr(studio.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install -c requirements.lock -e '\.\[studio\]'"):
        cli.main(["studio"])
    monkeypatch.setattr(studio.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(SystemExit, match="run dvc repro train_sae steer"):
        cli.main(["studio"])
    assert studio.os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert studio.os.environ["no_proxy"] == "proxy.example,127.0.0.1,localhost"


# --- recordings -------------------------------------------------------------------------------


@pytest.fixture
def recordings(tmp_path):
    """Noise with a tone and without it, and two files that are no audio."""
    rng, sides = np.random.default_rng(0), {}
    for side in ("with", "without"):
        sides[side] = []
        for i in range(6):
            sound = 0.05 * rng.standard_normal(8000 * 2)
            if side == "with":
                sound += 0.4 * np.sin(2 * np.pi * 440 * np.arange(len(sound)) / 8000)
            path = tmp_path / f"{side} {i}.wav"
            soundfile.write(path, sound, 8000)
            sides[side].append(str(path))
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"no audio at all")
    sides["with"].append(str(broken))
    return sides


def test_what_is_found_in_recordings_can_be_steered(folder, recordings):
    shares = []
    found = logic.find("tiny", recordings["with"], recordings["without"], shares.append, 1.0)
    assert shares == [i / 12 for i in range(12)]  # one file is no audio
    assert "6 recordings with and 6 without" in found.text
    assert "006-broken.wav: not audio" in found.text
    assert "/tmp" not in found.text
    latents = found.concept.latents
    assert latents[0].auroc > 0.9
    layer, on = logic.plan_found(found, "on", 4, 0.5)
    (concept,) = on.concepts
    assert (layer, concept.strength, concept.edits[0].op) == ("layers.3", 0.5, "clamp_min")
    assert concept.edits[0].features == tuple(x.feature for x in latents[:4])
    assert concept.edits[0].values == tuple(x.usual for x in latents[:4])
    assert min(concept.edits[0].values) > 0
    off = logic.plan_found(found, "off", 4, 1.0)[1].concepts[0].edits[0]
    assert (off.op, off.features) == ("ablate", concept.edits[0].features)
    *_, outcome = logic.perform("tiny", SOURCE, layer, on, {}, ignore)
    assert not np.array_equal(outcome.plain.audio, outcome.steered.audio)


def test_the_best_features_can_be_heard(folder, recordings):
    page = logic.find("tiny", recordings["with"], recordings["without"], ignore, 1.0).page
    sources = re.findall(r'src="data:audio/mpeg;base64,([^"]+)"', page)
    assert len(sources) == logic.PLAYED * logic.MOMENTS
    sound, _ = soundfile.read(io.BytesIO(base64.b64decode(sources[0])))
    assert len(sound) > 0
    assert np.abs(sound).max() > 0.01


def test_one_sound_alone_is_ranked_against_the_training_clips(folder, recordings):
    found = logic.find("tiny", recordings["with"][:1], None, ignore, 1.0)
    assert "This is no test" in found.text
    latents = found.concept.latents
    assert found.concept.discoveries == 0
    assert 0 < len(latents) <= logic.AUDIBLE
    assert all(x.usual > 0 for x in latents)
    _, on = logic.plan_found(found, "on", 3, 1.0)
    assert len(on.concepts[0].edits[0].features) == 3


def test_unusable_recordings_are_told_without_our_paths(folder, recordings):
    with pytest.raises(ValueError, match=r"1 recordings with the concept: 2 to 200"):
        logic.find("tiny", recordings["with"][:1], recordings["without"], ignore)
    with pytest.raises(ValueError, match=r"1 recordings without it"):
        logic.find("tiny", recordings["with"], recordings["without"][:1], ignore)
    with pytest.raises(ValueError, match=r"0 recordings with the concept: 1 to"):
        logic.find("tiny", None, None, ignore)
    bad = [recordings["with"][-1]] * 2
    with pytest.raises(ValueError, match=r"000-broken.wav: not audio") as caught:
        logic.find("tiny", bad, recordings["without"], ignore)
    assert "/tmp" not in str(caught.value)

    def stop(share: float) -> None:
        if share > 0.3:
            raise logic.Cancelled

    with pytest.raises(logic.Cancelled):
        logic.find("tiny", recordings["with"], recordings["without"], stop)


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ({}, (None, None)),
        ({"model": "b", "feature": "12"}, ("b", 12)),
        ({"model": "c", "feature": "12"}, (None, None)),  # another model's feature 12 is no use
        ({"model": "b", "feature": "-1"}, ("b", None)),
        ({"feature": "<b>"}, (None, None)),
    ],
)
def test_an_address_names_model_and_feature(query, found):
    assert logic.asked(query, ["a", "b"]) == found
