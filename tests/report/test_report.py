"""The report in Python: sound and pictures, charts, escaping, cards from small made-up inputs."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import io
import json
import re
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import image

from musicscope.activations.writer import StoreWriter
from musicscope.data.clips import ClipStore, write_clips
from musicscope.dictionaries.codes import encode_clips, pool_clips
from musicscope.dictionaries.core import ModelWeights, TopKSAE, UniversalSAE
from musicscope.features import table as feature_table
from musicscope.report import build as report
from musicscope.report import cards as report_cards
from musicscope.report import charts as report_charts
from musicscope.report import html as report_html
from musicscope.report import moments as moments
from musicscope.report import snippets as report_media
from musicscope.report.metrics import Sources
from musicscope.report.parts import (
    Card,
    Details,
    Figure,
    Group,
    Moment,
    Note,
    Section,
    Table,
    plain,
    short,
)
from musicscope.report.shared import matches_section, maximised_section
from tools.import_closure import ROOT

HOSTILE = "</script><img src=x onerror='boom()'>\"&"
MODELS = ("tiny", "wide")
WIDTHS = {"tiny": 6, "wide": 8}
RATE, SECONDS, FRAMES, CLIPS, LATENTS = 16_000, 2, 100, 8, 24


# Sound and pictures


def tone(pitch: float, seconds: float = 1.0, rate: int = RATE) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    return (0.4 * np.sin(2 * np.pi * pitch * time)).astype(np.float32)


def decoded(uri: str) -> np.ndarray:
    kind, content = uri.split(",", 1)
    assert kind == "data:audio/mpeg;base64"
    audio, rate = soundfile.read(io.BytesIO(base64.b64decode(content)), dtype="float32")
    assert rate == RATE
    return audio


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    n = min(len(a), len(b))
    return float(a[:n] @ b[:n] / (np.linalg.norm(a[:n]) * np.linalg.norm(b[:n])))


def test_mp3_is_the_same_sound_and_the_same_bytes():
    audio = tone(440) + tone(1330) / 2
    content = report_media.mp3(audio, RATE)
    assert content == report_media.mp3(audio, RATE)
    assert len(content) < len(audio) * 2 / 2.5
    back = decoded(report_media.data_uri("audio/mpeg", content))
    assert len(back) == len(audio)
    assert similarity(back, audio) > 0.98
    other = report_media.mp3(tone(440, rate=32_000), 32_000)
    assert similarity(decoded(report_media.data_uri("audio/mpeg", other)), tone(440)) > 0.97
    for bad in (np.zeros(0), np.array([0.0, np.nan])):
        with pytest.raises(ValueError, match="empty or not finite"):
            report_media.mp3(bad, RATE)


def test_png_holds_the_levels_with_low_bands_at_the_bottom():
    levels = np.random.default_rng(0).integers(0, 16, (5, 7)).astype(np.uint8)
    picture = image.imread(io.BytesIO(report_media.png(levels)), "png")
    assert picture.shape == (5, 7, 4)
    assert np.array_equal(np.round(picture[::-1, :, 3] * 255), np.round(levels * (200 / 15)))
    assert not picture[..., :3].any()


def test_spectrogram_follows_pitch_and_silence_is_blank():
    low, high = (
        report_media.spectrogram_levels(tone(p), RATE).mean(1).argmax() for p in (300, 3e3)
    )
    assert high > low + 10
    assert not report_media.spectrogram_levels(np.zeros(RATE, np.float32), RATE).any()
    assert report_media.spectrogram_levels(tone(300), RATE).shape == (48, 51)


@given(st.lists(st.floats(0, 3), min_size=2, max_size=60))
def test_a_thinned_curve_is_the_whole_curve(values):
    path = report_media.curve(np.array(values), 2.0)
    points = np.array(path.removeprefix("M").split(), float).reshape(-1, 2)
    every = np.interp(np.arange(len(values)), points[:, 0], points[:, 1])
    # Heights are whole numbers of a hundred.
    wanted = np.round(98 - 94 * np.clip(np.array(values) / 2, 0, 1))
    assert np.allclose(every, wanted)


@given(st.integers(0, 99), st.integers(1, 120), st.integers(1, 100))
def test_a_window_lies_inside_and_holds_its_centre(centre, length, total):
    centre = min(centre, total - 1)
    first, end = report_media.window(centre, length, total)
    assert 0 <= first <= centre < end <= total
    assert end - first == min(length, total)


# Numbers and charts


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


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_inside_and_neither_few_nor_many(low, span):
    marks = report_charts.ticks(low, low + span)
    assert 2 <= len(marks) <= 7
    slack = 1e-6 * max(abs(low), span)
    assert all(low - slack <= mark <= low + span + slack for mark in marks)


def svg(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)


def test_line_chart_places_points_and_leaves_out_what_has_no_logarithm():
    series = report_charts.Series("kl", [0, 1, 2, 3], [1.0, 0.1, 0.0, None])
    chart = svg(report_charts.line_chart(HOSTILE, "layer", "KL", [series], log_y=True))
    dots = [(float(e.get("cx")), float(e.get("cy"))) for e in chart.iter("circle")]
    assert len(dots) == 2
    assert dots[0][1] < dots[1][1]  # larger is higher
    many = report_charts.Series("all", list(range(40)), [0.5] * 40)
    assert not list(svg(report_charts.line_chart("t", "x", "y", [many])).iter("circle"))
    assert "kl: 0 1.000, 1 0.100, 2 0.000, 3 –" in chart.get("aria-label")


def test_histogram_bars_are_as_high_as_their_counts():
    chart = svg(report_charts.histogram("t", "x", "n", [0, 0.5, 1], [("a", [2, 4]), ("b", [0, 1])]))
    bar, outline = (
        [tuple(map(float, p.split())) for p in e.get("d")[1:].split("L")]
        for e in chart.iter("path")
        if e.get("class").split()[0] in ("bar", "outline") and "L" in e.get("d")
    )
    base = bar[0][1]
    assert base - bar[1][1] == pytest.approx((base - bar[3][1]) / 2, abs=0.2)
    assert outline[1][1] == pytest.approx(base)


# Escaping


class Tags(html.parser.HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def hostile_page() -> str:
    table = Table(HOSTILE, (HOSTILE, HOSTILE), ((HOSTILE, HOSTILE),), HOSTILE)
    chart = report_charts.line_chart(
        HOSTILE, HOSTILE, HOSTILE, [report_charts.Series(HOSTILE, [0, 1], [1.0, 2.0])] * 2
    )
    dots = report_charts.dot_chart(
        HOSTILE, HOSTILE, [HOSTILE], [(HOSTILE, [(0.5, 0.4, 0.6)])] * 2, 0.5
    )
    moment = Moment(HOSTILE, HOSTILE, "data:,", "data:,", ((HOSTILE, "M0 1", 0),), 2, HOSTILE)
    one = Card(
        "a", HOSTILE, (("k", HOSTILE), ("l", HOSTILE)), {"energy": 1.5, "none": None},
        ((HOSTILE, HOSTILE),), table, ((HOSTILE, "a"), (HOSTILE, "elsewhere")), (moment,),
        (moment,), (moment,), (HOSTILE,),
    )  # fmt: skip
    parts = (Note(HOSTILE), table, Group((Figure(chart, HOSTILE), Figure(dots, HOSTILE))))
    section = Section(
        "s", HOSTILE, (*parts, Details(HOSTILE, (table,))), (one,), (("energy", HOSTILE, True),)
    )
    return report_html.page(HOSTILE, [HOSTILE], [section])


def test_hostile_text_is_text_everywhere():
    page = Tags(hostile_page())
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert {a["src"] for tag, a in page.tags if tag == "img"} == {"data:,"}
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert page.text.count(HOSTILE) > 20
    links = [a["href"] for tag, a in page.tags if tag == "a"]
    assert "#a" in links  # a match that has a card
    assert "#elsewhere" not in links
    (card,) = (a for _, a in page.tags if a.get("class") == "card")
    assert (card["data-energy"], card["data-kinds"]) == ("1.5", "k l")
    assert "data-none" not in card


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
        report_html.page("t", [], [Section("a", "A"), Section("a", "B")])


# Tables from metrics


def test_an_empty_checkout_gives_a_page_that_says_what_is_missing(tmp_path):
    page = Tags(report.build(Sources(tmp_path, MODELS, ("top1",)), 2, 2, 1.0))
    left_out = re.findall(r"Left out: (\S+)", page.text)
    for name in ("prepare_data", "train_usae", "train_crosscoder", "match_features"):
        assert f"metrics/{name}.json" in left_out
    for model in MODELS:
        assert f"metrics/ablate/{model}.json" in left_out
    assert not [1 for tag, _ in page.tags if tag == "audio"]


def write_metrics(root: Path, name: str, value: dict) -> None:
    path = root / "metrics" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def test_numbers_stand_beside_their_controls(tmp_path):
    write_metrics(tmp_path, "train_sae/tiny-top1", {
        "layer": "layers.3", "explained_variance": 0.81234, "explained_variance_low": 0.8,
        "explained_variance_high": 0.82, "explained_variance_pca": 0.7777, "stability": 0.4,
        "stability_null": 0.39,
    })  # fmt: skip
    keys = [f"r2_{i}_{j}" for i in (0, 1) for j in (0, 1)]
    write_metrics(tmp_path, "train_usae", {
        "models": {"0": "tiny", "1": "wide"}, "k": 4, "slot": "top1", "method": "paper",
        "headline": {
            key: {"value": 0.1 * n, "low": 0.05, "high": 0.95, "mean": 0.2, "sd": 0.011}
            for n, key in enumerate(keys, start=6)
        },
        "null": {"mispaired": dict.fromkeys(keys, 0.0125), "shuffled": dict.fromkeys(keys, -0.377),
                 "random": dict.fromkeys(keys, -0.688)}, "independent_r2": {"0": 0.987},
    })  # fmt: skip
    write_metrics(tmp_path, "match_features", {
        "threshold": 0.5, "sets": {"common": 12, "common_low": 10.0, "common_high": 15.0,
                                   "null_common": 1.3, "own_tiny": 3, "positional_wide": 47},
        "sae_sae": {"tiny_wide": {"matched_tiny": 0.333, "matched_tiny_low": 0.3,
                                  "matched_tiny_high": 0.366, "null_matched_tiny": 0.021,
                                  "musical_tiny": 0.287, "null_musical_tiny": 0.0186,
                                  "heldout_font_matched_tiny": 0.268}},
        "seeds": {"tiny": {"musical": 0.777, "null_musical": 0.0234}},
    })  # fmt: skip
    sources = Sources(tmp_path, MODELS, ("top1",))
    text = Tags(report.build(sources, 2, 2, 1.0)).text
    for needed in ("0.8123[0.8000, 0.8200]", "0.7777", "tiny top1 (layer 3)", "0.390",
                   "0.900[0.050, 0.950]", "0.013", "0.987", "12[10, 15]", "1.3",
                   "0.333[0.300, 0.366]", "0.021", "−0.377", "−0.688"):  # fmt: skip
        assert needed in text, needed
    between = next(p for p in matches_section(sources).parts if isinstance(p, Table))
    rows = {row[0]: [c if isinstance(c, str) else c.text for c in row[1:]] for row in between.rows}
    label = "tiny in wide: share matched, but not by the place in the clip"
    assert rows[label] == ["0.287", "0.019", "0.777", "0.023"]
    assert rows["tiny in wide: the same in the held-out soundfont"][0] == "0.268"
    assert "but also with clips re-paired–47" in text


def test_searches_stand_beside_their_nulls_with_the_keys_that_the_stages_write(tmp_path):
    head = {"heard_reached": 1.125, "heard_reached_low": 0.8, "heard_reached_high": 1.6,
            "heard_null_reached": 0.375, "heard_null_reached_low": 0.3,
            "heard_null_reached_high": 0.4, "heard_start": 0.22, "heard_other_features": 0.125,
            "heard_reached_weakest_model": 0.99, "heard_beats_best_clip": 0.67,
            "heard_log_prob": -4.5, "free_reached": 2.75, "free_sound": 0.52,
            "clips_q95": 0.43, "features": 9.0, "skipped": 1.0}  # fmt: skip
    features = {f"f{i}": {"role": "direction" if i > 8 else "concept"} for i in range(12)}
    metrics = {"headline": head, "features": features}
    write_metrics(tmp_path, "maximize_activation/tiny", metrics)
    write_metrics(tmp_path, "maximize_shared", {
        "headline": {"heard_reached": 0.7, "heard_reached_low": 0.5,
                     "heard_null_reached_high": 0.5, "alone_reached": 0.9, "transfer": 0.4,
                     "transfer_low": 0.2, "transfer_high": 0.6, "transfer_other_features": 0.31}
    })  # fmt: skip
    section = maximised_section(Sources(tmp_path, MODELS, ("top1",)))
    searches, controls = (part for part in section.parts if isinstance(part, Table))
    rows = {
        row[0]: [c if isinstance(c, str) else f"{c.text} {c.detail}".strip() for c in row[1:]]
        for table in (searches, controls)
        for row in table.rows
    }
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
    assert rows["random real excerpts: 95 %"] == ["0.43", "–"]
    assert rows["features"] == ["9", "–"]
    assert rows["directions or pairs searched as null"] == ["3", "–"]
    assert all(len(row) == len(table.columns) for table in (searches, controls)
               for row in table.rows)  # fmt: skip


def test_committed_metrics_make_sections_without_gaps():
    from musicscope.config import load_params

    params = load_params(ROOT / "params.yaml")
    sources = Sources(ROOT, params.models, params.slots)
    from musicscope.report.results import concepts_section, layers_section

    for builder in (layers_section, concepts_section):
        section = builder(sources)
        assert not [p for p in section.parts if isinstance(p, Note) and p.kind == "missing"]
        groups = [p for p in section.parts if isinstance(p, Group)]
        assert len(groups[0].parts) == len(params.models)


# Cards


def make_inputs(root: Path) -> None:
    """Eight clips of 2 s, random SAEs and a random USAE over two models, and their tables."""
    rng = np.random.default_rng(0)
    (root / "data/clips").mkdir(parents=True)
    table = [
        {"id": f"clip-{i}", "group": f"g{i}", "split": "test", "kind": "clip", "font": "timgm6mb",
         "caption": HOSTILE if i == 0 else f"caption {i}"}
        for i in range(CLIPS)
    ]  # fmt: skip
    audio = (tone(220 * (i + 1), SECONDS) * (1 + np.arange(SECONDS * RATE) / 32_000) / 2
             for i in range(CLIPS))  # fmt: skip
    write_clips(root / "data/clips", zip(audio, table, strict=True), RATE, SECONDS * RATE)
    rows = pd.DataFrame(table).assign(frames=FRAMES)
    generator = torch.Generator().manual_seed(0)

    def unit(F: int, d: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn((F, d), generator=generator), dim=1)

    stores, saes = {}, {}
    for model, d in WIDTHS.items():
        writer = StoreWriter(
            root / f"data/activations/{model}/top1", width=d, dtype="float16", clips=rows,
            spans=[(0, CLIPS)], config={"layer": "layers.0", "frame_rate": FRAMES / SECONDS},
        )  # fmt: skip
        writer.write(0, [rng.standard_normal((FRAMES, d)).astype(np.float32) for _ in range(CLIPS)])
        stores[model] = writer.finish()
        W = unit(LATENTS, d)
        saes[model] = TopKSAE(W, torch.zeros(LATENTS), W, torch.zeros(d), 3)
        saes[model].save(root / f"data/sae/{model}/top1/seed-0")
    sides = []
    for d in WIDTHS.values():
        W, bias, one = unit(LATENTS, d), torch.zeros(LATENTS), torch.tensor(1.0)
        # Each tensor its own memory, as safetensors wants it.
        sides.append(ModelWeights(W, bias, W.clone(), torch.zeros(d), torch.zeros(d), one))
    usae = UniversalSAE(MODELS, "top1", "usae", 3, tuple(sides))
    usae.save(root / "data/usae/seed-0")

    parts, tops = [], []
    for kind in ("sae", "usae"):
        for i, model in enumerate(MODELS):
            encode = saes[model].encode if kind == "sae" else lambda x, i=i: usae.encode(x, i)
            codes = encode_clips(stores[model], range(CLIPS), encode, LATENTS, 1, "cpu")
            top = feature_table.top_clips(pool_clips(codes), [r["id"] for r in table], 50.0, 5)
            n = np.arange(LATENTS)
            columns = {
                "feature": n, "energy": codes.mean, "firing_rate": codes.fired / (CLIPS * FRAMES),
                "concept": np.where(n < 3, "guitar", "electric_piano"),
                "concept_auroc": 0.5 + n / 60, "concept_p": np.where(n % 5 == 4, 0.01, 0.6),
                "concept_heldout_auroc": 0.55 + 0 * n,
            }  # fmt: skip
            if kind == "sae":
                columns |= {
                    "set": np.array(["common", "own", "unmatched"], object)[n % 3],
                    "partner_model": MODELS[1 - i], "partner": n[::-1],
                    "partner_correlation": n / LATENTS, "best_model": MODELS[1 - i], "best": n,
                    "best_correlation": 0.9 + 0 * n, "counterpart": n,
                    "counterpart_cosine": 0.3 + 0 * n, "seed_correlation": 0.6 + 0 * n,
                }  # fmt: skip
            else:
                columns |= {
                    "firing_entropy": n / LATENTS, "cofires": n, "cofire_proportion": n / 100,
                    "counterpart": n, "counterpart_cosine": 0.4 + 0 * n,
                }  # fmt: skip
            parts.append((kind, model, columns))
            tops.append(top.assign(kind=kind, model=model))
    feature_table.write(
        root / "data/features", feature_table.table(parts), pd.concat(tops, ignore_index=True)
    )


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
    head = {"heard_reached": 1.25, "heard_null_reached": 0.1875 if several else 0.3125}
    write_metrics(root, name, {"headline": head, "features": features})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    make_inputs(root)
    return root


@pytest.fixture(scope="module")
def table(inputs) -> pd.DataFrame:
    return pd.read_parquet(inputs / "data/features/features.parquet")


def test_no_feature_gets_two_cards_and_sets_hold_what_they_say(table):
    picks = report_cards.pick(table, MODELS, 4)
    assert len({one.key for one in picks}) == len(picks)
    by_set: dict[str, list] = {}
    for one in picks:
        for key, _ in one.sets:
            by_set.setdefault(key, []).append(one)
    assert max(map(len, by_set.values())) == 4
    sae = table[table["kind"] == "sae"].set_index(["model", "feature"])
    for model in MODELS:
        for name in ("common", "own"):
            assert all(sae.loc[(model, o.number), "set"] == name for o in by_set[f"{name}-{model}"])
        best = [o.number for o in by_set[f"common-{model}"]]
        assert best == [21, 18, 15, 12]  # the largest correlations with a partner
        (concept,) = by_set[f"concept-{model}"]  # one card a concept that stands up
        assert concept.number == 19
    entropy = table[table["kind"] == "usae"].set_index("feature")["firing_entropy"]
    shared = entropy[[one.number for one in by_set["shared"]]].mean()
    assert shared > entropy[[o.number for m in MODELS for o in by_set[f"specific-{m}"]]].mean()


def test_curves_equal_the_dense_code(inputs):
    bench = moments.Bench.open(inputs, MODELS)
    wanted = [(("sae", "wide", 5), "clip-3"), (("usae", "wide", 7), "clip-3"),
              (("sae", "wide", 6), "clip-3"), (("usae", "tiny", 7), "clip-0")]  # fmt: skip
    curves = moments.feature_curves(bench, wanted)
    assert set(curves) == set(wanted)
    for ((kind, model, number), clip), found in curves.items():
        x = torch.from_numpy(bench.stores[model].clip(int(clip[-1])))
        i = MODELS.index(model)
        code = bench.saes[model].encode(x) if kind == "sae" else bench.usae.encode(x, i)
        dense = torch.zeros(FRAMES, LATENTS).scatter_(1, code[1], code[0])
        assert np.array_equal(found, dense[:, number].numpy())
        assert found.any()


def test_best_clips_are_ranked_over_models_by_share_of_the_highest_value():
    rows = [("tiny", "a", 10, 8.0), ("tiny", "b", 20, 4.0), ("wide", "b", 30, 1.0),
            ("wide", "c", 40, 0.9)]  # fmt: skip
    top = pd.DataFrame(rows, columns=["model", "clip", "frame", "value"])
    top = top.assign(kind="usae", feature=3, rank=[1, 2, 1, 2])
    features = [("usae", model, 3) for model in MODELS]
    # a: 1 + 0; b: .5 + 1; c: 0 + .9
    assert report_cards.best_clips(top, features, 2) == [("b", "wide", 30), ("a", "tiny", 10)]


@pytest.fixture(scope="module")
def made(inputs) -> list[Card]:
    return report_cards.cards(inputs, MODELS, 3, 2, 0.5)


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
    assert [row[0] for row in shared.numbers_table.rows] == list(MODELS)


def test_searched_inputs_and_their_controls_reach_their_card(tmp_path, inputs, made):
    number = int(next(card.key for card in made if card.key.startswith("usae"))[5:])
    shutil.copytree(inputs, tmp_path / "run")
    add_maximised(tmp_path / "run", "maximize_activation/wide", ("wide",), number)
    add_maximised(tmp_path / "run", "maximize_shared", MODELS, number)
    section = report.features_section(Sources(tmp_path / "run", MODELS, ("top1",)), 3, 2, 0.5)
    (card,) = (card for card in section.cards if card.key == f"usae-{number}")
    # The best of each run by what its weakest model makes of the sound; the others folded.
    assert [m.caption for m in card.maximised] == [
        "wide, searched for the tokens, from a real moment",
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
        "wide: sound 1.12 of its best real clip (log p a code −5.25), tokens 1.38 (log p −3.75)"
    )
    assert similarity(decoded(card.maximised[0].audio), tone(900, 0.5)) > 0.9
    # One control a model, though two runs give it, and one null a run.
    assert [text.split(":")[0] for text in card.remarks] == [
        "Control, wide", "Null, wide", "Control, tiny", "Null, tiny and wide",
    ]  # fmt: skip
    assert "0.06" in card.remarks[0]
    assert "0.44" in card.remarks[0]
    assert "random directions reach 0.31 by sound" in card.remarks[1]
    assert "unrelated features reach 0.19 by sound" in card.remarks[3]
    page = Tags(report_html.page("t", [], [section]))
    assert "Other searches (5)" in page.text
    notes = [part.text for part in section.parts if part.kind == "missing"]
    assert len(notes) == 1
    assert "data/maximize_activation/tiny" in notes[0]


def test_the_stage_writes_the_same_page_twice_and_bounds_its_size(tmp_path, inputs, monkeypatch):
    import yaml

    from stages import report as stage

    root = tmp_path / "run"
    shutil.copytree(inputs, root)
    params = yaml.safe_load((ROOT / "params.yaml").read_text("utf-8"))
    params |= {"models": list(MODELS), "slots": ["top1"]}
    params["report"] = {"cards": 2, "moments": 1, "seconds": 0.5}
    params["match_features"]["slot"] = "top1"
    (root / "params.yaml").write_text(yaml.safe_dump(params), "utf-8")
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", ["stages.report"])
    threads = torch.get_num_threads()
    try:
        stage.main()
        first = (root / stage.OUT).read_bytes()
        stage.main()
    finally:
        torch.set_num_threads(threads)
    assert (root / stage.OUT).read_bytes() == first
    assert str(tmp_path).encode() not in first
    page = Tags(first.decode())
    assert sum(tag == "article" for tag, _ in page.tags) >= 8
    monkeypatch.setattr(report, "MAX_BYTES", 10_000)
    with pytest.raises(ValueError, match=r"report\.cards, report\.moments or report\.seconds"):
        stage.main()
