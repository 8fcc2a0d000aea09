"""The report on judges, found concepts and steering, from files as the stages write them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from musicscope.core.io import read_json, write_json
from musicscope.core.stats import Estimate
from musicscope.finder.evaluation import concept_sets, examine
from musicscope.finder.scores import MOMENTS
from musicscope.judges import report as judge_report
from musicscope.report import build as report
from musicscope.report import figures, snippets
from musicscope.report.elements import Figure, Players, Section
from musicscope.report.sections import finder, judges
from musicscope.report.sections import steering as section_of
from musicscope.report.sections.steering import METHODS
from musicscope.steering import methods as steering_methods
from musicscope.steering import report as steering_report
from musicscope.steering import search as steering_search
from tests.judges.test_pair import report as judged  # noqa: F401 (a fixture)
from tests.support.planted import clip_rows, find_concept_section
from tests.support.report import (
    HOSTILE,
    MODELS,
    PIXEL,
    RATE,
    Tags,
    cells,
    decoded,
    estimate,
    html_of,
    inside,
    similarity,
    sources,
    tables,
    text_of,
    tone,
    write_metrics,
)
from tests.support.steered import SECTION, tiny_context


def players_of(section: Section) -> Players:
    (found,) = inside(section.content, Players)
    return found


def test_without_these_stages_the_page_has_no_such_sections(tmp_path):
    page = Tags(report.build(sources(tmp_path), 2, 2, 1.0))
    names = {a["id"] for tag, a in page.tags if tag == "section"}
    assert not names & {"judges", "finder", "steering"}
    write_metrics(tmp_path, "steer/tiny", {"layer": "layers.1", "concepts": {}})
    text = Tags(report.build(sources(tmp_path, MODELS), 2, 2, 1.0)).text
    assert "metrics/steer/wide.json" in text
    assert "data/steering/tiny/examples is not there" in text


# --- steering ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tiny_musicgen, tmp_path_factory):
    """What the stage writes about the tiny model."""
    root, context = tmp_path_factory.mktemp("steered"), tiny_context(tiny_musicgen)
    (root / "scratch").mkdir()
    section = type(SECTION)(**{**vars(SECTION), "n_prompts": 2, "examples": 2})
    learnt = {c: (r, {"gate_auroc": 0.7, "probe_auroc": 0.8}) for c, r in context.recipes.items()}
    result = steering_search.run(section, lambda: context, root / "scratch", 1, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        names = ("data/steering/tiny", "metrics/steer/tiny.json", "plots/steer/tiny")
        steering_report.write(result, learnt, context, steering_report.Outs(*names))
    figures.draw_all(sources(root, ("tiny",)), "mean", root / "plots/figures")
    return root


def test_the_whole_evaluation_comes_before_the_quick_one(run, tmp_path):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    found = read_json(run / "metrics/steer/tiny.json") | {"prompts": 77}
    write_metrics(tmp_path, "steer_full/tiny", found)
    section = section_of.section(sources(tmp_path))
    assert "tiny: 77 test prompts for each row" in text_of(section)
    assert "data/steering_full/tiny/examples is not there" in section.missing[0]


def test_every_method_stands_beside_the_controls_with_its_interval(run):
    found = read_json(run / "metrics/steer/tiny.json")
    section = section_of.section(sources(run))
    assert set(METHODS) == set(steering_methods.METHODS) - {"plain", "original"}
    success = tables(section)["tiny: success"]
    assert success.columns[1:] == (*METHODS.values(), "quality cost of features")
    rows = cells(success)
    assert list(rows) == ["guitar off", "guitar on", "organ off", "organ on"]
    for request, row in rows.items():
        concept, direction = request.split()
        for method, cell in zip(METHODS, row[:-1], strict=True):
            success = found["concepts"][concept][direction]["methods"][method]["success"]
            assert cell == Estimate.read(success).text(2).replace("n/a", "–")
    cost = cells(tables(section)["tiny: effect and cost"])
    ours = Estimate.read(found["concepts"]["organ"]["on"]["methods"]["sae"]["ce_cost"])
    shown = f"{ours.value:.3f} [{ours.low:.3f}, {ours.high:.3f}]".replace("-", "−")
    assert shown in cost["organ on: features"]
    assert len(cost) == 4 * len(METHODS)
    gaps = cells(tables(section)["tiny: success of features minus success of other methods"])
    assert set(gaps) == set(rows)


def test_joint_edits_doses_and_cross_talk_are_those_of_the_stage(run):
    section = section_of.section(sources(run))
    found = read_json(run / "metrics/steer/tiny.json")
    joint = cells(tables(section)["tiny: several concepts at once"])
    ours = found["joint"]["guitar-off+organ-on"]["sae"]
    row = joint["guitar off, organ on: features"]
    assert row[1] == Estimate.read(ours["all_wanted"]).text(2).replace("n/a", "–")
    assert re.fullmatch(r"guitar \S+ \(\S+\), organ \S+ \(\S+\)", row[2])
    assert [row.split(": ")[1] for row in joint] == [
        METHODS[m] for m in ("sae", "sae_words", "diff_means", "prompt_edit")
    ]
    talk = pd.read_csv(run / "plots/steer/tiny-crosstalk.csv", index_col=0)
    shown = tables(section)["tiny: change of every family's probability under every edit"]
    assert shown.columns[1:] == tuple(c.replace("_", " ") for c in talk.columns)
    assert len(shown.rows) == len(talk)
    values = talk.iloc[1].to_numpy()
    cell = shown.rows[1][1 + int(np.abs(values).argmax())]
    assert float(cell.text.replace("−", "-")) == pytest.approx(
        values[np.abs(values).argmax()], abs=0.006
    )
    assert max(c.shade for row in shown.rows for c in row[1:]) == 9
    (figure,) = inside(section.content, Figure)
    assert "tiny: success by strength" in figure.caption
    panel = figure.alt.split("guitar on. success by strength. ")[1].split(". ")[0]
    assert re.match(r"features: 1 \S+, 3 \S+; difference of means: ", panel)
    assert "; prompt edit: " in panel
    file = (run / "plots/figures/steer/tiny-dose.png").read_bytes()
    assert figure.image == snippets.data_uri("image/png", file)


def test_players_hold_the_very_music_before_and_after(run):
    section = section_of.section(sources(run))
    players = players_of(section)
    index = read_json(run / "data/steering/tiny/examples/index.json")["examples"]
    assert len(players.rows) == len(index) == 5 * 2
    for (title, moments), example in zip(players.rows, index, strict=True):
        assert title == f"{', '.join(example['wishes'])}: {example['prompt']}"
        assert [m.caption for m in moments] == ["plain", "steered"]
        for side, moment in enumerate(moments):
            path = run / "data/steering/tiny/examples" / example[moment.caption]
            audio, rate = soundfile.read(path)
            assert len(decoded(moment.audio)) == pytest.approx(len(audio) * RATE / rate, abs=2)
            concept = example["wishes"][0].split()[0]
            value = example["judges"]["family_judge"][concept][side]
            assert f"{concept}: family judge {value:.2f}" in moment.detail
    page = html_of(section)
    assert sum(tag == "audio" for tag, _ in page.tags) == 20
    buttons = [a["aria-label"] for tag, a in page.tags if tag == "button"]
    assert any(b.startswith("Play: steered, guitar on: ") for b in buttons)


def test_a_sound_in_the_page_is_that_of_its_file_and_a_lost_one_is_told(tmp_path):
    write_metrics(tmp_path, "steer/tiny", {"concepts": {}})
    folder = tmp_path / "data/steering/tiny/examples"
    folder.mkdir(parents=True)
    soundfile.write(folder / "a.wav", tone(440, 8.0, 44_100), 44_100)
    soundfile.write(folder / "b.wav", tone(880), RATE)
    (folder / "c.wav").write_bytes(b"RIFF no music")
    examples = [
        {"wishes": [f"{HOSTILE} off"], "prompt": HOSTILE, "plain": "a.wav", "steered": b,
         "judges": {HOSTILE: {HOSTILE: [0.25, None]}}}
        for b in ("c.wav", "b.wav", "../b.wav", "b.wav", "b.wav")
    ]  # fmt: skip
    write_json(folder / "index.json", {"examples": examples})
    section = section_of.section(sources(tmp_path))
    players = players_of(section)
    assert len(players.rows) == 2  # per request
    first, second = (decoded(m.audio) for m in players.rows[0][1])
    assert len(first) == 6 * RATE  # a long one is cut
    assert similarity(first, tone(440, 6.0)) > 0.95
    assert similarity(second, tone(880)) > 0.95
    assert [m.detail for m in players.rows[0][1]] == [f"{HOSTILE}: {HOSTILE} 0.25", ""]
    assert section.missing == ("2 examples of tiny could not be read.",)


def hostile_run(root: Path) -> None:
    """Metrics of which every name is hostile."""
    numbers = {"success": estimate(0.5, 0.4, 0.6), "ce_cost": None}
    entry = {"methods": {"sae": numbers, HOSTILE: numbers}, "sae_minus": {HOSTILE: estimate(0.1)}}
    both = {"all_wanted": estimate(0.1), HOSTILE: {"success": 0.2}}
    joint = {HOSTILE: {"sae": both, HOSTILE: {}}}
    steer = {"layer": HOSTILE, "prompts": 2, "seconds": 3.0, "joint": joint}
    write_metrics(root, "steer/tiny", {**steer, "concepts": {HOSTILE: {"off": entry}}})
    (root / "plots/steer").mkdir(parents=True)
    dose = pd.DataFrame([
        {"concept": HOSTILE, "direction": "off", "method": m, "strength": s, "success": v,
         "success_low": v, "success_high": v}
        for m, s, v in (("sae", 1, 0.5), ("sae", 4, np.nan), ("reseed", np.nan, 0.1))
    ])  # fmt: skip
    dose.to_csv(root / "plots/steer/tiny-dose.csv", index=False)
    talk = pd.DataFrame({"edit": [HOSTILE], HOSTILE: [0.1], "drums": [np.nan]})
    talk.to_csv(root / "plots/steer/tiny-crosstalk.csv", index=False)
    (root / "plots/figures/steer").mkdir(parents=True)
    (root / "plots/figures/steer/tiny-dose.png").write_bytes(PIXEL)
    found = {HOSTILE: {HOSTILE: {"with": 2, "best": {"feature": 1234, "q": 0.01}}}}
    write_metrics(root, "find_concept/tiny", found)
    folder = root / "data/find_concept/tiny"
    folder.mkdir(parents=True)
    row = {"feature": 1234, "effect_size": 1.5, "auroc": 0.9, "q": 0.01, "stability": np.nan}
    features = pd.DataFrame([{**row, "dictionary": HOSTILE, "concept": HOSTILE}])
    features.to_parquet(folder / "features.parquet")
    soundfile.write(folder / "m.wav", tone(300), RATE)
    moment = (HOSTILE, HOSTILE, 1234, 1, HOSTILE, 2.5, 0.7, "m.wav")
    moments = pd.DataFrame([moment, (*moment[:-1], "gone.wav")], columns=["concept", *MOMENTS])
    moments.to_parquet(folder / "moments.parquet")
    report_ = {"mean_auroc": 0.7, HOSTILE: {"auroc": estimate(0.7, 0.6, 0.8)}}
    write_metrics(root, "train_judge", {"family_judge": {"codec": report_}, "musicnn": {},
                                        "cross_font": {f"{HOSTILE}_to_b": report_}})  # fmt: skip


def test_hostile_names_stay_text(tmp_path):
    hostile_run(tmp_path)
    found = [
        build(sources(tmp_path)) for build in (judges.section, finder.section, section_of.section)
    ]
    page = html_of(*found)
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert all(a["src"].startswith("data:") for tag, a in page.tags if tag in ("img", "audio"))
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert page.text.count(HOSTILE) > 15
    assert "1234" in page.text
    assert "1,234" not in page.text
    for section in found:
        for table in tables(section).values():
            assert {len(row) for row in table.rows} <= {len(table.columns)}
    whole = report.build(sources(tmp_path), 2, 2, 1.0)
    assert len([1 for tag, _ in Tags(whole).tags if tag == "audio"]) == 1


# --- judges and found concepts ----------------------------------------------------------------


def test_judges_stand_beside_shuffled_labels(judged, tmp_path):  # noqa: F811
    found = judge_report.measure(judged, 50, 0)
    write_json(tmp_path / "metrics/train_judge.json", found)
    section = judges.section(sources(tmp_path))
    means = cells(tables(section)["Judges on unseen compositions (AUROC, mean over families)"])
    assert means["after the codec"] == [
        f"{found[j]['codec']['mean_auroc']:.3f}" for j in ("family_judge", "musicnn")
    ]
    assert {"clips, TimGM6mb and synthesis", "clips, FluidR3Mono", "shuffled labels"} < set(means)
    right = Estimate.read(found["family_judge"]["pairs"]["accuracy"])
    assert means["matched pairs, guitar: share right"][0] == right.text()
    by_family = tables(section)["Judges by family (AUROC)"]
    column = by_family.columns.index("musicnn, after the codec")
    guitar = next(row for row in by_family.rows if row[0] == "guitar")
    auroc = Estimate.read(found["musicnn"]["codec"]["guitar"]["auroc"])
    assert f"{guitar[column].text} {guitar[column].detail}" == auroc.text()
    assert "trained on mixed, tested on fluidr3mono" in by_family.columns


def test_found_features_stand_beside_what_is_found_in_nothing(tmp_path):
    rows = pd.concat(
        [clip_rows(24, 4, seed=s).assign(split=split)[lambda r: r["font"] == "mixed"]
         for s, split in ((0, "train"), (1, "test"))], ignore_index=True,
    )  # fmt: skip
    rows["group"] = rows["split"] + rows["group"]
    rows["source"] = rows["split"]
    cues = pd.DataFrame({"rms": 1.0 + rows["has_guitar"]})
    rng = np.random.default_rng(0)
    means = rng.exponential(size=(len(rows), 30))
    means[:, 7] += 3 * rows["has_guitar"].to_numpy()
    sets = concept_sets(rows, "clips:has_guitar", "clips:not has_guitar")
    section = find_concept_section(
        permutations=99, stability_draws=5, few=5, few_draws=5, bootstrap=20
    )
    groups = rows["group"].to_numpy(str)
    table, numbers = examine(means, groups, sets, section, 0, "m", cues=cues)
    write_json(tmp_path / "metrics/find_concept/tiny.json", {"sae": {"guitar": numbers}})
    folder = tmp_path / "data/find_concept/tiny"
    folder.mkdir(parents=True)
    table.assign(dictionary="sae", concept="guitar").to_parquet(folder / "features.parquet")
    soundfile.write(folder / "one.wav", tone(500, 3.0), RATE)
    moments = [("guitar", "sae", f, r, f"clips/clip-{r}", 1.25, 3.0, "one.wav")
               for f in (7, 8) for r in (3, 2, 1)]  # fmt: skip
    moments = pd.DataFrame(moments, columns=["concept", *MOMENTS])
    moments.to_parquet(folder / "moments.parquet")

    section = finder.section(sources(tmp_path, MODELS))
    row = cells(tables(section)["tiny, sae: concepts"])["guitar"]
    assert row[1] == f"{numbers['discoveries']} of 30"
    assert row[2] == "7"
    assert row[7] == Estimate.read(numbers["test"]["best_auroc"]).text()
    columns = tables(section)["tiny, sae: concepts"].columns
    named = dict(zip(columns[1:], row, strict=True))
    for key, shown in (("few", "ten recordings"), ("null", "the null")):
        column = next(name for name in columns if shown in name)
        assert named[column] == f"{numbers[key]['any_discovery']:.2f}"
    assert named["best on the held-out source"] == (
        Estimate.read(numbers["heldout_source"]["best_auroc"]).text()
    )
    assert named["best simple cue"] == "rms 1.00: warning"
    best = cells(tables(section)["Best features"])
    assert list(best)[0] == "guitar: sae 7"
    assert len(best) == 3
    players = players_of(section)
    ((title, excerpts),) = players.rows  # of the best feature alone
    assert title == "guitar: sae 7"
    assert [m.detail for m in excerpts] == ["clip-1, at 1.2 s", "clip-2, at 1.2 s"]
    assert similarity(decoded(excerpts[0].audio), tone(500, 3.0)) > 0.95
    (note,) = section.missing
    assert "metrics/find_concept/wide.json" in note
