"""The report in Python: sound and pictures, escaping, cards from small made-up inputs."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import yaml
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import image

from musicscope.config import load_params
from musicscope.core.io import read_json
from musicscope.data.clips import ClipStore
from musicscope.embedded.pretraining.evidence_rows import Row
from musicscope.embedded.pretraining.evidence_rows import Table as Evidence
from musicscope.report import build as report
from musicscope.report import snippets
from musicscope.report.cards import cards
from musicscope.report.elements import Card, Cell, Figure, Moment, Players, Section, Table
from musicscope.report.metrics import Sources, cell, in_words, plain, read, short
from musicscope.report.sections import data, features, layers, matching, maximisation, probes
from stages import report as stage
from tests.support.report import (
    HOSTILE,
    MODELS,
    PIXEL,
    RATE,
    Tags,
    decoded,
    estimate,
    html_of,
    inside,
    make_inputs,
    similarity,
    tables,
    text_of,
    tone,
    write_metrics,
)
from tests.support.report import cells as cells_of
from tools.import_closure import ROOT

# Sound and pictures


def test_mp3_is_the_same_sound_and_the_same_bytes():
    audio = tone(440) + tone(1330) / 2
    content = snippets.mp3(audio, RATE)
    assert content == snippets.mp3(audio, RATE)
    assert len(content) < len(audio) * 2 / 2.5
    back = decoded(snippets.data_uri("audio/mpeg", content))
    assert len(back) == len(audio)
    assert similarity(back, audio) > 0.98
    other = snippets.mp3(tone(440, rate=32_000), 32_000)
    assert similarity(decoded(snippets.data_uri("audio/mpeg", other)), tone(440)) > 0.97
    for bad in (np.zeros(0), np.array([0.0, np.nan])):
        with pytest.raises(ValueError, match="empty or not finite"):
            snippets.mp3(bad, RATE)


def test_png_holds_the_levels_with_low_bands_at_the_bottom():
    levels = np.random.default_rng(0).integers(0, 16, (5, 7)).astype(np.uint8)
    picture = image.imread(io.BytesIO(snippets.png(levels)), "png")
    assert picture.shape == (5, 7, 4)
    assert np.array_equal(np.round(picture[::-1, :, 3] * 255), np.round(levels * (200 / 15)))
    assert not picture[..., :3].any()


def test_spectrogram_follows_pitch_and_silence_is_blank():
    low, high = (snippets.spectrogram_levels(tone(p), RATE).mean(1).argmax() for p in (300, 3e3))
    assert high > low + 10
    assert not snippets.spectrogram_levels(np.zeros(RATE, np.float32), RATE).any()
    assert snippets.spectrogram_levels(tone(300), RATE).shape == (48, 51)


@given(st.lists(st.floats(0, 3), min_size=2, max_size=60))
def test_a_thinned_curve_is_the_whole_curve(values):
    path = snippets.curve(np.array(values), 2.0)
    points = np.array(path.removeprefix("M").split(), float).reshape(-1, 2)
    every = np.interp(np.arange(len(values)), points[:, 0], points[:, 1])
    # Heights are whole numbers of a hundred.
    wanted = np.round(98 - 94 * np.clip(np.array(values) / 2, 0, 1))
    assert np.allclose(every, wanted)


@given(st.integers(0, 99), st.integers(1, 120), st.integers(1, 100))
def test_a_window_lies_inside_and_holds_its_centre(centre, length, total):
    centre = min(centre, total - 1)
    first, end = snippets.window(centre, length, total)
    assert 0 <= first <= centre < end <= total
    assert end - first == min(length, total)


# Numbers and figures


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (1234, "1,234"),
        (-0.5, "−0.500"),
        (2e-5, "2.0e−5"),
        (0.0, "0.000"),
    ],
)
def test_numbers_as_text(value, text):
    assert plain(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.000281, "2.8e−4"), (0.0513, "0.051"), (12345.6, "12,346"), (0.0, "0"), (None, "–")],
)
def test_short_numbers_keep_significant_digits(value, text):
    assert short(value) == text


@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(-2, 2), st.sampled_from(["x", "a.b", HOSTILE]))
def test_every_estimate_is_shown_with_its_interval_and_a_plain_number_without(
    value, low, high, key
):
    tree = {"a.b": {key: estimate(value, low, high), "plain": value}}
    found = read(tree, f"a.b.{key}")
    assert (found.value, found.low, found.high, found.n) == (value, low, high, 9)
    shown = cell(tree, f"a.b.{key}", 2, shaded=True)
    assert shown.detail == f"[{plain(low, 2)}, {plain(high, 2)}]"
    assert shown.shade == round(9 * min(max(value, 0), 1))
    assert replace(shown, detail="") == cell(tree, "a.b.plain", 2, shaded=True)
    assert shown.text == plain(value, 2)


def test_a_missing_number_is_a_dash_and_an_incomplete_interval_is_not_shown():
    for tree in (None, {}, {"a": None}, {"a": 1.0}, {"a": {"x": estimate(None)}}):
        assert cell(tree, "a.x", shaded=True) == Cell("–")
    assert cell({"x": estimate(0.5, None, 0.6)}, "x") == Cell("0.500")
    assert cell({"x": estimate(130, 119.0, 139.0)}, "x", 0) == Cell("130", "[119, 139]")
    with pytest.raises(ValueError, match="rerun the stage"):
        cell({"x": {"auroc": 0.5}}, "x")


def estimates(tree: object, path: str = "") -> Iterator[tuple[str, dict]]:
    """Estimates of a metrics file by path; no other key may look like a limit."""
    if isinstance(tree, dict):
        if set(tree) == {"value", "low", "high", "n", "unit"}:
            yield path, tree
            return
        for key, entry in tree.items():
            assert not re.search(r"(^|_)(ci|low|high)$|(^|_)ci_", key), f"{path}.{key}"
            yield from estimates(entry, f"{path}.{key}".lstrip("."))


COMMITTED = sorted(
    p.relative_to(ROOT / "metrics").as_posix() for p in (ROOT / "metrics").rglob("*.json")
)


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_intervals_are_estimates_and_read_as_such(name):
    tree = read_json(ROOT / "metrics" / name)
    for path, entry in estimates(tree):
        found = read(tree, path)
        if entry["value"] is None:  # undefined, as where no judge has a say
            assert {entry["low"], entry["high"]} == {None}, path
            continue
        assert found.low <= found.value <= found.high, path
        assert found.n > 1, path
        assert found.unit, path
        assert cell(tree, path).detail == f"[{plain(entry['low'])}, {plain(entry['high'])}]"


def test_committed_tables_name_limits_after_their_number():
    for path in (ROOT / "plots").rglob("*.csv"):
        columns = list(pd.read_csv(path, nrows=0))
        assert not [c for c in columns if "ci_" in c], path
        for column in columns:
            stem, _, end = column.rpartition("_")
            if end in ("low", "high") and stem not in ("", "log10"):  # these are edges of bins
                assert {stem, f"{stem}_low", f"{stem}_high"} <= set(columns), (path, column)


def test_a_figure_is_the_file_of_the_stage_and_its_numbers_are_in_words(tmp_path):
    words = in_words(HOSTILE, "KL", "layer", [0, 1, 2], {"kl": [1.0, 0.1, None]})
    assert words == f"{HOSTILE}. KL by layer. kl: 0 1.000, 1 0.100, 2 –"
    sources = Sources(tmp_path, MODELS, ("top1",))
    assert sources.figure("a/b", "", "") == "Left out: plots/figures/a/b.png is not there."
    (tmp_path / "plots/figures/a").mkdir(parents=True)
    (tmp_path / "plots/figures/a/b.png").write_bytes(PIXEL)
    figure = sources.figure("a/b", words, "caption")
    assert base64.b64decode(figure.image.removeprefix("data:image/png;base64,")) == PIXEL
    assert (figure.size, figure.alt) == ((1, 1), words)


# Escaping


def hostile_sections() -> list[Section]:
    """Every template, with hostile text in all of its content."""
    table = Table(HOSTILE, (HOSTILE, HOSTILE), ((HOSTILE, HOSTILE),))
    figure = Figure("data:,", (1, 1), HOSTILE, HOSTILE)
    moment = Moment(HOSTILE, HOSTILE, "data:,", "data:,", ((HOSTILE, "M0 1", 0),), 2, HOSTILE)
    players = Players(((HOSTILE, (moment, moment)),))
    second = Moment(HOSTILE, HOSTILE, "data:,", "data:,", (("other", "M0 1", 1),))
    one = Card(
        "a", HOSTILE, (("k", HOSTILE), ("l", HOSTILE)), {"energy": 1.5, "none": None},
        ((HOSTILE, HOSTILE),), table, ((HOSTILE, "a"), (HOSTILE, "elsewhere")), (moment,),
        (moment,), (second,), (HOSTILE,),
    )  # fmt: skip
    names = ("n_latents", "k", "method", "slot", "frames", "compositions")
    found = {"name": HOSTILE, "numbers": [table], "best": table, "players": players}
    steered = {
        "name": HOSTILE, "clips": True, "prompts": HOSTILE, "seconds": HOSTILE, "layer": HOSTILE,
        "doses": figure, "players": players,
        **dict.fromkeys(("success", "costs", "curves", "joint", "cross_talk", "advantages"), table),
    }  # fmt: skip
    contents = {
        "data": {
            "rendered": False, "cues": table, "clips": table,
            "models": [{"judged": table, "rest": table}],
        },
        "gallery": {"models": [{"name": HOSTILE, "players": some} for some in (players, None)]},
        "layers": {"figures": [figure, HOSTILE], "tables": [table]},
        "dictionaries": {"table": table},
        "probes": {"figures": [figure], "tables": [table, table], "details": [table]},
        "sharing": {
            **dict.fromkeys(names, HOSTILE), **dict.fromkeys(("r2", "measures", "joint"), table),
            "entropy": figure, "norms": [figure],
        },
        "matching": {
            "threshold": HOSTILE, "correlations": figure,
            **dict.fromkeys(("between", "decoders", "sets", "concepts"), table),
        },
        "maximisation": {"reached": table, "controls": table},
        "judges": {"means": table, "families": table, "own": None},
        "finder": {"models": [found]},
        "steering": {"models": [steered, {**steered, "clips": False}]},
        "features": {
            "cards": (one,), "kinds": {"k": HOSTILE}, "sort_keys": (("energy", HOSTILE, True),)
        },
    }  # fmt: skip
    assert set(contents) == {one.__name__.split(".")[-1] for one in (*report.SECTIONS, features)}
    return [Section(key, HOSTILE, content, (HOSTILE,)) for key, content in contents.items()]


def hostile_page() -> str:
    return report.page(HOSTILE, hostile_sections())


def test_hostile_text_is_text_everywhere():
    page = Tags(hostile_page())
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert {a["src"] for tag, a in page.tags if tag == "img"} == {"data:,"}
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert page.text.count(HOSTILE) > 150
    links = [a["href"] for tag, a in page.tags if tag == "a"]
    assert "#a" in links  # a match that has a card
    assert "#elsewhere" not in links
    (card,) = (a for _, a in page.tags if a.get("class") == "card")
    assert (card["data-energy"], card["data-kinds"]) == ("1.5", "k l")
    assert "data-none" not in card


def test_every_hostile_text_is_on_the_page():
    """No template drops or changes content."""
    for section in hostile_sections():
        text = html_of(section).text
        shown_ = sum(part == HOSTILE for part in inside(section.content))
        assert text.count(HOSTILE) >= 2 + shown_ + 4 * len(list(inside(section.content, Table)))


def test_the_policy_allows_this_script_and_style_and_no_request():
    text = hostile_page()
    (policy,) = (
        a["content"] for _, a in Tags(text).tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    for kind, tag in (("style", "style"), ("script", "script")):
        inside = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.S)[1]
        found = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{found}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy.replace("http-equiv", "")
    assert not re.search(r"\b(src|href)=.(https?:)?//", text)


def test_an_anchor_used_twice_is_an_error():
    with pytest.raises(ValueError, match="appear twice: a"):
        report.page("t", [Section("a", "A"), Section("a", "B")])


def test_the_report_loads_no_model_library():
    code = (
        "import sys; import musicscope.report.build; "
        "print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


# Tables from metrics


def test_an_empty_checkout_gives_a_page_that_says_what_is_missing(tmp_path):
    page = Tags(report.build(Sources(tmp_path, MODELS, ("top1",)), 2, 2, 1.0))
    left_out = re.findall(r"Left out: (\S+)", page.text)
    for name in ("prepare_data", "train_usae", "train_crosscoder", "match_features"):
        assert f"metrics/{name}.json" in left_out
    for model in MODELS:
        assert f"metrics/ablate/{model}.json" in left_out
    assert not [1 for tag, _ in page.tags if tag == "audio"]


def test_evidence_of_the_models_stands_beside_target_verdict_and_control(tmp_path):
    rows = [
        Row("codec.si_sdr", 9.0, 7.5, 10.5, 48, "dB", 8.0, "at_least", {"another_clip": -47.34}),
        Row("codec.log_mel_distance", 3.0, 2.5, 3.5, 48, "dB", 4.0, "at_most"),
        Row(
            "music.onset_rate", 4.5, 4.3, 4.7, 48, "per second", (1.4, 7.23), "within", {}, "median"
        ),
        Row("decoder.cross_entropy", 4.0, float("nan"), float("nan"), 48, "nats per code"),
    ]
    Evidence(rows, {"codec": 1.0}).save(tmp_path / "metrics/pretrain/tiny.json")
    section = data.section(Sources(tmp_path, MODELS, ("top1",)))
    found = tables(section)
    assert cells_of(found["tiny: measured against its targets"]) == {
        "codec: SI-SDR": ["9.000 [7.500, 10.500] dB", "≥ 8", "not met", "another clip −47.3"],
        "codec: log-mel distance": ["3.000 [2.500, 3.500] dB", "≤ 4", "met", ""],
        "music: onset rate": ["4.500 [4.300, 4.700] per second", "1.4 to 7.23", "met", "median"],
    }
    assert cells_of(found["tiny: measures without a target"]) == {
        "decoder: cross entropy": ["4.000 nats per code", ""]
    }
    assert "not met" in text_of(section)
    assert not any("pretrain" in note for note in section.missing)
    write_metrics(tmp_path, "pretrain/tiny", {"codec": {}})  # of an older form
    assert any("pretrain" in n for n in data.section(Sources(tmp_path, ("tiny",), ())).missing)


def test_numbers_stand_beside_their_controls(tmp_path):
    write_metrics(tmp_path, "train_sae/tiny-top1", {
        "layer": "layers.3", "explained_variance": estimate(0.81234, 0.8, 0.82),
        "explained_variance_pca": 0.7777, "stability": 0.4, "stability_null": 0.39,
    })  # fmt: skip
    keys = [f"r2_{i}_{j}" for i in (0, 1) for j in (0, 1)]
    write_metrics(tmp_path, "train_usae", {
        "models": {"0": "tiny", "1": "wide"}, "k": 4, "slot": "top1", "method": "paper",
        "headline": {key: estimate(0.1 * n, 0.05, 0.95) for n, key in enumerate(keys, start=6)},
        "over_seeds": dict.fromkeys(keys, {"mean": 0.2, "sd": 0.011}),
        "null": {"mispaired": dict.fromkeys(keys, 0.0125), "shuffled": dict.fromkeys(keys, -0.377),
                 "random": dict.fromkeys(keys, -0.688)}, "independent_r2": {"0": 0.987},
    })  # fmt: skip
    write_metrics(tmp_path, "match_features", {
        "threshold": 0.5, "sets": {"common": estimate(12, 10.0, 15.0), "null_common": 1.3,
                                   "own_tiny": 3, "positional_wide": 47},
        "sae_sae": {"tiny_wide": {"matched_tiny": estimate(0.333, 0.3, 0.366),
                                  "null_matched_tiny": 0.021, "musical_tiny": 0.287,
                                  "null_musical_tiny": 0.0186,
                                  "heldout_font_matched_tiny": 0.268}},
        "seeds": {"tiny": {"musical": 0.777, "null_musical": 0.0234}},
    })  # fmt: skip
    sources = Sources(tmp_path, MODELS, ("top1",))
    text = Tags(report.build(sources, 2, 2, 1.0)).text
    for needed in ("0.8123[0.8000, 0.8200]", "0.7777", "tiny top1 (layer 3)", "0.390",
                   "0.900[0.050, 0.950]", "0.200sd 0.011", "0.013", "0.987", "12[10, 15]", "1.3",
                   "0.333[0.300, 0.366]", "0.021", "−0.377", "−0.688"):  # fmt: skip
        assert needed in text, needed
    between = matching.section(sources).content["between"]
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in between.body}
    label = "tiny in wide: share matched, but not by position in the clip"
    assert rows[label] == ["0.287", "0.019", "0.777", "0.023"]
    assert rows["tiny in wide: the same in the held-out soundfont"][0] == "0.268"
    assert "but also with clips re-paired–47" in text


def test_searches_stand_beside_their_nulls_with_the_keys_that_the_stages_write(tmp_path):
    head = {"heard_reached": estimate(1.125, 0.8, 1.6),
            "heard_null_reached": estimate(0.375, 0.3, 0.4),
            "heard_start": 0.22, "heard_other_features": 0.125,
            "heard_reached_weakest_model": 0.99, "heard_beats_best_clip": 0.67,
            "heard_log_prob": -4.5, "free_reached": estimate(2.75), "free_sound": 0.52,
            "clips_q95": 0.43, "features": 9.0, "skipped": 1.0}  # fmt: skip
    features = {f"f{i}": {"role": "direction" if i > 8 else "concept"} for i in range(12)}
    metrics = {"headline": head, "features": features}
    write_metrics(tmp_path, "maximize_activation/tiny", metrics)
    write_metrics(tmp_path, "maximize_shared", {
        "headline": {"heard_reached": estimate(0.7, 0.5, 0.9),
                     "heard_null_reached": estimate(0.4, 0.3, 0.5), "alone_reached": 0.9,
                     "transfer": estimate(0.4, 0.2, 0.6), "transfer_other_features": 0.31}
    })  # fmt: skip
    section = maximisation.section(Sources(tmp_path, MODELS, ("top1",)))
    searches, controls = tables(section).values()
    rows = cells_of(searches) | cells_of(controls)
    assert rows["tiny: for the sound, under the prior"] == [
        "1.12 [0.80, 1.60]", "0.38 [0.30, 0.40]", "yes", "0.22", "0.12", "0.99", "0.67", "–",
        "−4.50",
    ]  # fmt: skip
    free = rows["tiny: for the tokens, without the prior"]
    assert (free[0], free[1], free[2], free[7]) == ("2.75", "–", "–", "0.52")
    assert "tiny: for the tokens, under the prior" not in rows
    moved = rows["all models at once: for the sound in one model alone, in the other models"]
    assert (moved[0], moved[4]) == ("0.40 [0.20, 0.60]", "0.31")
    assert rows["all models at once: for the sound, under the prior"][2] == "no"
    assert [name for name in rows if name.startswith("all models at once")] == [
        "all models at once: for the sound, under the prior",
        "all models at once: for the sound in one model alone, in that model",
        "all models at once: for the sound in one model alone, in the other models",
    ]
    assert rows["random real excerpts: 95 %"] == ["0.43", "–"]
    assert rows["features"] == ["9", "–"]
    assert rows["directions or pairs searched as null"] == ["3", "–"]
    assert all(len(row) == len(table.columns) for table in (searches, controls)
               for row in table.rows)  # fmt: skip


def test_committed_metrics_make_sections_without_gaps():
    params = load_params(ROOT / "params.yaml")
    sources = Sources(ROOT, params.models, params.slots)
    for one in (layers, probes):
        section = one.section(sources)
        assert not section.missing
        assert len(list(inside(section.content, Figure))) == len(params.models)


# Cards


# Cards


SINGLE = {"prior": 0.75, "clip": 1.125, "free": 0.5, "heard": 0.875}
"""Variants of a run over one model and what the sound of each reaches."""


def add_maximised(root: Path, name: str, models: tuple[str, ...], number: int) -> None:
    folder = root / "data" / name
    folder.mkdir(parents=True)
    pieces = []
    several = models[1:] != ()
    variants = ["heard", *(f"alone-{m}" for m in models)] if several else list(SINGLE)
    for place, variant in enumerate(variants):
        pitch = 500 + 400 * place
        soundfile.write(folder / f"{variant}.wav", tone(pitch, 1.5), RATE, subtype="PCM_16")
        curve = np.linspace(0, 4, 75).tolist()
        # Alone, one model's sound is loud and the other's is not: the weaker one counts.
        sound = {m: SINGLE.get(variant, 2.5) if f"alone-{m}" != variant else 0.125 for m in models}
        pieces.append({
            "variant": variant, "file": f"{variant}.wav", "frame": 40,
            "tokens": dict.fromkeys(models, 1.375), "sound": sound,
            "log_prob_tokens": dict.fromkeys(models, -3.75),
            "log_prob_sound": dict.fromkeys(models, -5.25), "curves": dict.fromkeys(models, curve),
        })  # fmt: skip
    entry = {
        "name": f"usae-{number:05d}", "kind": "usae", "role": "universal", "concept": None,
        "numbers": dict.fromkeys(models, number), "best_clip": dict.fromkeys(models, 2.0),
        "maximised": pieces, "moments": [],
    }  # fmt: skip
    index = {"format": 1, "models": list(models), "sample_rate": RATE, "frame_rate": 50.0,
             "window": 10, "naturalness": 0.5, "features": [entry]}  # fmt: skip
    (folder / "index.json").write_text(json.dumps(index))
    controls = {"clips_q50": 0.0625, "clips_q95": 0.4375}
    features = {entry["name"]: {model: {"controls": controls} for model in models}}
    head = {"heard_reached": estimate(1.25)}
    head |= {"heard_null_reached": estimate(0.1875 if several else 0.3125)}
    write_metrics(root, name, {"headline": head, "features": features})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    make_inputs(root)
    return root


@pytest.fixture(scope="module")
def made(inputs) -> list[Card]:
    return cards(Sources(inputs, MODELS, ("top1",)), 3, 2, 0.5)


def test_a_moment_is_the_sound_and_the_activation_around_the_peak(inputs, made):
    clips = ClipStore.open(inputs / "data/clips")
    for card in made:
        assert 1 <= len(card.moments) <= 2
        first = card.moments[0]
        match = re.match(r"(clip-\d), ([\d.]+) to ([\d.]+) s", first.detail)
        start, end = round(float(match[2]) * RATE), round(float(match[3]) * RATE)
        assert end - start == RATE // 2
        sound = clips.audio([int(match[1][-1])])[0, start:end]
        assert similarity(decoded(first.audio), sound) > 0.9
        assert first.frames == 25
        assert first.caption == (HOSTILE if match[1] == "clip-0" else f"caption {match[1][-1]}")
        heights = [
            min(map(float, path.removeprefix("M").split()[1::2])) for _, path, _ in first.curves
        ]
        if card.key.startswith("sae"):
            assert heights[0] == 4  # the feature's highest value of all is in its first moment
        else:
            assert len(heights) == len(MODELS)
            assert [name for name, _, _ in first.curves] == list(MODELS)


def test_facts_and_matches_are_those_of_the_table(made):
    keys = {card.key: card for card in made}
    common = keys["sae-tiny-21"]
    assert common.kinds == (("common-tiny", "common, tiny"),)
    assert [anchor for _, anchor in common.matches] == ["sae-wide-2", "sae-wide-21", "usae-21"]
    assert "correlation 0.88, paired" in common.matches[0][0]
    assert [name for name, _, _ in common.moments[0].curves] == ["tiny 21", "wide 2"]
    assert dict(common.facts)["concept"].startswith("none; closest is electric piano, AUROC 0.850")
    concept = dict(keys["sae-tiny-19"].facts)["concept"]
    assert concept.startswith("electric piano, AUROC 0.817 (held-out soundfont 0.550)")
    shared = next(card for card in made if card.key.startswith("usae"))
    assert [row[0] for row in shared.by_model.rows] == list(MODELS)


def test_searched_inputs_and_their_controls_reach_their_card(tmp_path, inputs, made):
    number = int(next(card.key for card in made if card.key.startswith("usae"))[5:])
    shutil.copytree(inputs, tmp_path / "run")
    add_maximised(tmp_path / "run", "maximize_activation/wide", ("wide",), number)
    add_maximised(tmp_path / "run", "maximize_shared", MODELS, number)
    section = features.section(Sources(tmp_path / "run", MODELS, ("top1",)), 3, 2, 0.5)
    (card,) = (card for card in section.cards if card.key == f"usae-{number}")
    # The best of each run by the sound in its weakest model; the others folded.
    assert [m.caption for m in card.maximised] == [
        "wide, searched for the tokens, under the prior, from a real moment",
        "tiny and wide, searched for the sound, under the prior",
    ]
    assert [m.caption.split(", ", 1)[1] for m in card.others] == [
        "searched for the tokens, under the prior", "searched for the tokens, without the prior",
        "searched for the sound, under the prior", "searched for the sound, in tiny alone",
        "searched for the sound, in wide alone",
    ]  # fmt: skip
    assert [len(m.curves) for m in (*card.maximised, *card.others)] == [1, 2, 1, 1, 1, 2, 2]
    assert card.maximised[0].curves[0][2] == 1  # the second model's colour
    assert card.maximised[0].detail == (
        "wide: sound 1.12 of its best real clip (log p per code −5.25), tokens 1.38 (log p −3.75)"
    )
    assert similarity(decoded(card.maximised[0].audio), tone(900, 0.5)) > 0.9
    # One control per model, though two runs give it, and one null per run.
    assert [text.split(":")[0] for text in card.remarks] == [
        "Control, wide", "Null, wide", "Control, tiny", "Null, tiny and wide",
    ]  # fmt: skip
    assert "0.06" in card.remarks[0]
    assert "0.44" in card.remarks[0]
    assert "random directions reach 0.31 by sound" in card.remarks[1]
    assert "unrelated features reach 0.19 by sound" in card.remarks[3]
    assert "Other searches (5)" in text_of(section)
    (note,) = section.missing
    assert "data/maximize_activation/tiny" in note


def test_more_cards_than_curves_is_an_error_that_names_the_params(tmp_path, inputs):
    shutil.copytree(inputs, tmp_path / "run")
    path = tmp_path / "run/data/features/moments.parquet"
    pd.read_parquet(path).iloc[-1:].to_parquet(path)
    with pytest.raises(ValueError, match=r"has no usae feature .*report\.cards to at most 64"):
        cards(Sources(tmp_path / "run", MODELS, ("top1",)), 24, 2, 0.5)


def test_the_stage_writes_the_same_page_twice_and_bounds_its_size(tmp_path, inputs, monkeypatch):
    root = tmp_path / "run"
    shutil.copytree(inputs, root)
    params = yaml.safe_load((ROOT / "params.yaml").read_text("utf-8"))
    params |= {"models": list(MODELS), "slots": ["top1"]}
    params["report"] = {"cards": 2, "moments": 1, "seconds": 0.5}
    params["match_features"]["slot"] = "top1"
    (root / "params.yaml").write_text(yaml.safe_dump(params), "utf-8")
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", ["stages.report"])
    stage.main()
    first = (root / stage.OUT).read_bytes()
    stage.main()
    assert (root / stage.OUT).read_bytes() == first
    assert str(tmp_path).encode() not in first
    page = Tags(first.decode())
    assert sum(tag == "article" for tag, _ in page.tags) >= 8
    monkeypatch.setattr(report, "MAX_BYTES", 10_000)
    with pytest.raises(ValueError, match=r"report\.cards, report\.moments or report\.seconds"):
        stage.main()
