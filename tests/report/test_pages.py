"""Feature pages: the data of each feature, the files, and what the viewer's policy allows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from musicscope.data.clips import ClipStore
from musicscope.report import pages, snippets
from tests.support.report import (
    ACTIVITY,
    CLIPS,
    HOSTILE,
    LATENTS,
    MODELS,
    RATE,
    SECONDS,
    Tags,
    make_activity,
    make_inputs,
    similarity,
    tone,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pages")
    make_activity(root, make_inputs(root))
    tables = pages.read(root, "top1", "top1", "top1")
    clips = ClipStore.open(root / "data/clips")
    pages.write(root / "data/feature_pages", tables, clips)
    return root


def call(root: Path, name: str) -> list:
    """Arguments of the call that a script makes."""
    text = (root / "data/feature_pages" / name).read_text("ascii")
    return json.loads(re.fullmatch(r"musicscope\.\w+\((.*)\);\n", text, re.S)[1].join("[]"))


def record(root: Path, dictionary: str, feature: int) -> dict:
    place = call(root, f"index/{dictionary}.js")[1]["n"].index(feature)
    name, number, records = call(root, f"shards/{dictionary}-{place // pages.SHARD}.js")
    assert (name, number) == (dictionary, place // pages.SHARD)
    return records[place % pages.SHARD]


def test_every_live_feature_has_a_record_and_an_entry(root):
    table = pd.read_parquet(root / "data/feature_activity/features.parquet")
    (manifest,) = call(root, "manifest.js")
    assert [one["name"] for one in manifest["dictionaries"]] == [
        "sae-tiny-top1", "sae-wide-top1", "usae-top1",
    ]  # fmt: skip
    for one in manifest["dictionaries"]:
        live = sorted(set(table["feature"][table["dictionary"] == one["name"]]))
        name, columns = call(root, f"index/{one['name']}.js")
        assert (name, columns["n"], one["live"]) == (one["name"], live, len(live))
        assert all(len(values) == len(live) for values in columns.values())
        assert [record(root, one["name"], n)["n"] for n in live] == live


def test_a_feature_names_its_concept_matches_effect_and_finder_results(root):
    found = record(root, "sae-tiny-top1", 19)  # concept_p .01; see make_inputs
    assert found["concept"].startswith("electric piano, AUROC 0.817 (held-out soundfont 0.550)")
    columns = call(root, "index/sae-tiny-top1.js")[1]
    at = columns["n"].index(19)
    assert (columns["concept"][at], columns["auroc"][at]) == ("electric_piano", 0.817)
    assert columns["concept"][columns["n"].index(18)] == ""  # p .6: not to be found by it
    assert found["matches"][0][1:] == ["sae-wide-top1", LATENTS - 1 - 19]
    assert found["matches"][-1][1:] == ["usae-top1", 19]
    facts = dict(found["facts"])
    assert facts["in other seeds"] == "decoder cosine 0.75, random rows 0.25: does not return"
    assert found["effect"]["toward"] == [3.8, -0.5]  # per unit of activation, times its value
    assert "more than 79 % of features" in found["effect"]["text"][0][1]
    assert found["steer"] == f"{pages.STUDIO}?model=tiny&feature=19"
    assert found["finder"] == []
    assert record(root, "sae-tiny-top1", 7)["finder"] == [
        [HOSTILE, "0.01", "0.800", "0.700", "0.600", "–"]
    ]
    shared = record(root, "usae-top1", 3)
    assert [stream[0] for stream in shared["streams"]] == list(MODELS)
    assert all(len(curves) == 2 for *_, curves in shared["samples"])
    assert shared["steer"] == ""
    assert shared["effect"] is None


def test_curves_are_those_of_the_table(root):
    samples = pd.read_parquet(root / "data/feature_activity/samples.parquet")
    rows = samples[(samples["dictionary"] == "sae-tiny-top1") & (samples["feature"] == 5)]
    rows = rows.sort_values(["band", "rank"])
    (manifest,) = call(root, "manifest.js")
    found = record(root, "sae-tiny-top1", 5)["samples"]
    assert len(found) == len(rows) <= ACTIVITY.moments + ACTIVITY.bands * ACTIVITY.per_band
    letters = pages.ALPHABET.tobytes().decode()
    for (band, clip, first, values, curves), row in zip(
        found, rows.to_dict("records"), strict=True
    ):
        assert (band, first) == (row["band"], row["first"])
        assert manifest["clips"][clip][0] == row["clip"]
        assert values[0] == pytest.approx(row["value"], rel=0.01)
        assert [letters.index(letter) for letter in curves[0]] == [v // 4 for v in row["curve"]]


def test_each_clip_is_written_once_whole_and_at_a_constant_rate(root):
    folder = root / "data/feature_pages/clips"
    assert len(list(folder.iterdir())) == 2 * CLIPS
    clips = ClipStore.open(root / "data/clips")
    for i in (0, 3):
        audio, rate = soundfile.read(folder / f"{i}.mp3", dtype="float32")
        assert (rate, len(audio)) == (RATE, SECONDS * RATE)
        assert similarity(audio, clips.audio([i])[0]) > 0.95
        size = (folder / f"{i}.mp3").stat().st_size
        assert size == pytest.approx(SECONDS * snippets.KBITS * 125, rel=0.15)
    assert snippets.constant_mp3(tone(300), RATE) == snippets.constant_mp3(tone(300), RATE)


def test_the_same_tables_give_the_same_bytes(root, tmp_path, capsys):
    tables = pages.read(root, "top1", "top1", "top1")
    pages.write(tmp_path / "again", tables, ClipStore.open(root / "data/clips"))
    assert "features: about" in capsys.readouterr().err.splitlines()[0]
    first = root / "data/feature_pages"
    names = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (first / name).read_bytes(), name


def test_the_viewer_asks_no_network_and_hostile_text_stays_text(root):
    text = (root / "data/feature_pages/index.html").read_text("utf-8")
    page = Tags(text)
    scripts = [a for tag, a in page.tags if tag == "script"]
    assert [a.get("src") for a in scripts] == [None, "manifest.js"]
    assert not re.search(r"(src|href)=.(https?:)?//", text)
    assert "Features of tiny and wide" in page.text
    assert HOSTILE in Tags(pages.viewer(HOSTILE)).text
    (policy,) = (
        a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_missing_tables_name_the_stage_and_optional_ones_are_left_out(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="dvc repro feature_activity"):
        pages.read(tmp_path, "top1", "top1", "top1")
    for name in ("feature_activity", "features"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).symlink_to(root / "data" / name)
    tables = pages.read(tmp_path, "top1", "top1", "top1")
    found, _ = next(pages.records(tables, tables.dictionaries[0]))
    assert found["effect"] is None
    assert not any("seeds" in name for name, _ in found["facts"])
    assert np.isfinite(found["streams"][0][1])
