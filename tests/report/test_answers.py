"""The first screens: numbers beside their nulls, and what counts as above one."""

from __future__ import annotations

import json

import pytest
import soundfile

from musicscope.config import load_params
from musicscope.core.stats import Estimate
from musicscope.report.answers import _answer, answers
from musicscope.report.build import page
from musicscope.report.elements import Players, Table
from musicscope.report.metrics import Sources
from tests.support.report import (
    HOSTILE,
    RATE,
    Tags,
    cells,
    decoded,
    estimate,
    similarity,
    sources,
    tone,
    write_metrics,
)
from tools.import_closure import ROOT


@pytest.mark.parametrize(
    ("result", "null", "verdict"),
    [
        (Estimate(0.7, 0.6, 0.8), Estimate(0.5), "yes"),
        (Estimate(0.7, 0.4, 0.8), Estimate(0.5), "no"),  # the interval reaches the null
        (Estimate(0.7, 0.6, 0.8), Estimate(0.5, 0.4, 0.65), "no"),  # the intervals overlap
        (Estimate(0.7), Estimate(0.5), "yes"),
        (Estimate(0.3), Estimate(0.5), "no"),
        (Estimate(0.7), Estimate.read(None), "–"),
    ],
)
def test_a_number_is_above_its_null_only_with_the_whole_interval(result, null, verdict):
    found = _answer("probes", "AUROC", ("result", "null"), [("a", result, null)])
    assert found.table is not None
    assert found.table.body[0][3].text == verdict
    assert found.above == (verdict == "yes")
    assert _answer("probes", "", ("", ""), [("a", Estimate.read(None), null)]).table is None


def test_nothing_measured_is_nothing_claimed(tmp_path):
    assert answers(sources(tmp_path)) == []


def test_an_answer_has_the_numbers_of_its_files(tmp_path):
    guitar = {"sae": {"test": {"auroc": estimate(0.75, 0.7, 0.8)}},
              "shuffled": {"test": {"auroc": estimate(0.5, 0.45, 0.55)}},
              "logmel": {"test": {"auroc": estimate(0.74, 0.7, 0.8)}}}  # fmt: skip
    write_metrics(tmp_path, "probe/tiny-top1", {"concepts": {"guitar": guitar}})
    (found,) = answers(sources(tmp_path))
    assert (found.key, found.above, found.total) == ("probes", 1, 2)
    assert isinstance(found.table, Table)
    assert cells(found.table)["tiny: guitar"] == ["0.75 [0.70, 0.80]", "0.50 [0.45, 0.55]", "yes"]
    text = " ".join(Tags(page("t", [], [found])).text.split())
    assert "1 of 2 numbers above the null or control." in text


def test_the_pair_is_the_first_whose_sounds_are_both_judged(tmp_path):
    folder = tmp_path / "data/steering_full/tiny/examples"
    folder.mkdir(parents=True)
    examples = []
    for i, judged in enumerate((None, 0.9)):
        names = {kind: f"{i}-{kind}.flac" for kind in ("plain", "steered")}
        for place, name in enumerate(names.values()):
            soundfile.write(folder / name, tone(300 + 100 * i + 50 * place), RATE)
        examples.append({"wishes": ["guitar on"], "prompt": HOSTILE, **names,
                         "judges": {"musicnn": {"guitar": [0.1, judged]}}})  # fmt: skip
    (folder / "index.json").write_text(json.dumps({"examples": examples}))
    write_metrics(tmp_path, "steer_full/tiny", {"concepts": {}})
    (found,) = answers(sources(tmp_path))
    assert isinstance(found.shown, Players)
    ((title, (plain, steered)),) = found.shown.rows
    assert title == f"tiny, guitar on: {HOSTILE}"
    assert similarity(decoded(plain.audio), tone(400)) > 0.95
    assert similarity(decoded(steered.audio), tone(450)) > 0.95
    text = page("t", [], [found])
    assert HOSTILE not in text
    assert HOSTILE in Tags(text).text


def test_committed_metrics_answer_every_question():
    params = load_params(ROOT / "params.yaml")
    found = {one.key: one for one in answers(Sources(ROOT, params.models, params.slots))}
    tables = {key for key, one in found.items() if one.table}
    assert tables == {
        "steering", "layers", "dictionaries", "probes", "sharing", "matching", "maximisation",
        "finder", "judges",
    }  # fmt: skip
    assert found["steering"].total == 2 * len(params.models)
    assert isinstance(found["steering"].shown, Players)  # examples are in Git
    text = Tags(page("t", [], list(found.values()))).text
    for question in ("switched off or on?", "Which layers matter?", "Can the judges be trusted?"):
        assert question in text
