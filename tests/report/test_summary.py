"""The summary: the selected keys with their controls, and errors that name the stage."""

import re

import numpy as np
import pytest

from musicscope.core.io import read_json, write_json
from musicscope.report import summary
from tests.conftest import ROOT
from tests.support.report import estimate

MODELS, SLOTS = ("nano-small", "nano-medium"), ("top1", "top2")
# As specified, not as implemented: value -> its controls.
PER_MODEL = {
    "sae.explained_variance": ["pca"],
    "sae.ce_recovered": [],
    "sae.stability": ["null"],
    "probe.guitar_auroc": ["activations", "logmel", "shuffled"],
    "finder.guitar_features": ["null"],
    "finder.guitar_best_auroc": ["all_features"],
    "maximise.sound": ["random_direction"],
    "steer.guitar_off": ["diff_means", "prompt_edit", "random_feature"],
    "steer.guitar_on": ["diff_means", "prompt_edit", "random_feature"],
}
GLOBAL = {
    "usae.r2_first_to_second": ["mispaired"],
    "usae.r2_second_to_first": ["mispaired"],
    "usae.cofire_proportion_mean": ["mispaired"],
    "crosscoder.r2": ["mispaired"],
    "match.common": ["null"],
    "judge.classifier_guitar_auroc": ["shuffled"],
    "judge.musicnn_guitar_auroc": ["shuffled"],
}


def class_numbers(value):
    return {"auroc": estimate(value, value - 0.1, value + 0.1)}


def probe_metrics(value):
    names = ("sae", "dense", "logmel", "codec", "trivial", "shuffled")
    guitar = {n: {"test": class_numbers(value - 0.01 * i)} for i, n in enumerate(names)}
    return {"concepts": {"guitar": guitar}}


def ablation_metrics():
    entry = {"mean": {"kl": estimate(0.2, 0.1, 0.3)}}
    return {"layers": {str(i): entry for i in range(12)}}


def steer_metrics(value):
    methods = ("sae", "diff_means", "prompt_edit", "random_feature")
    entry = {
        name: {"success": estimate(value - 0.1 * i, 0.1, 0.9)} for i, name in enumerate(methods)
    }
    both = {"methods": entry}
    return {"concepts": {"guitar": {"off": both, "on": both}}}


@pytest.fixture
def metrics(tmp_path):
    """The metrics folder of a finished run, and files of a model that is no longer studied."""
    for i, model in enumerate((*MODELS, "dropped")):
        for j, slot in enumerate(SLOTS):
            explained = estimate(0.5 + 0.1 * j, 0.4, 0.6)
            sae = {"explained_variance": explained, "explained_variance_pca": 0.4}
            sae |= {"ce_recovered": None, "stability": 0.3, "stability_null": 0.2}
            write_json(tmp_path / f"train_sae/{model}-{slot}.json", sae)
            write_json(tmp_path / f"probe/{model}-{slot}.json", probe_metrics(0.8 + 0.01 * i))
        ratio = {"heard_reached": estimate(1.5 + i, 1.2 + i, 1.8 + i)}
        ratio |= {"heard_null_reached": estimate(0.9)}  # one null: no interval
        write_json(tmp_path / f"maximize_activation/{model}.json", {"headline": ratio})
        guitar = {"discoveries": 44, "null": {"discoveries": 0}}
        guitar |= {"test": {"best_auroc": estimate(0.7, 0.6, 0.8), "tested_auroc": 0.5}}
        write_json(tmp_path / f"find_concept/{model}.json", {"sae": {"guitar": guitar}})
        write_json(tmp_path / f"steer/{model}.json", steer_metrics(0.4))
    write_json(tmp_path / "steer_full/nano-small.json", steer_metrics(0.6))
    entry = estimate(0.6, 0.5, 0.7)
    for name, keys in (("usae", ("r2_0_1", "r2_1_0", "cofire_proportion_mean_0")),
                       ("crosscoder", ("r2_0",))):  # fmt: skip
        numbers = {"headline": dict.fromkeys(keys, entry)}
        numbers["null"] = {"mispaired": dict.fromkeys(keys, 0.1)}
        write_json(tmp_path / f"train_{name}.json", numbers)
    judged = {"codec": {"guitar": class_numbers(0.9)}, "shuffled": {"guitar": class_numbers(0.5)}}
    write_json(tmp_path / "train_judge.json", {"family_judge": judged, "musicnn": judged})
    sets = {"common": estimate(7, 5.0, 9.0), "null_common": 0.0}
    write_json(tmp_path / "match_features.json", {"sets": sets})
    return tmp_path


def specified(models):
    per_model = {f"{m}.{key}": controls for m in models for key, controls in PER_MODEL.items()}
    rows = per_model | GLOBAL
    return {key for k, controls in rows.items() for key in (k, *(f"{k}_{c}" for c in controls))}


def test_keys_are_those_of_the_specification(metrics):
    found = summary.summarize(MODELS, SLOTS, metrics)
    assert set(found) == specified(MODELS)
    assert len(found) <= 60
    assert all(not isinstance(value, dict | list) for value in found.values())


def test_values_come_from_their_files(metrics):
    found = summary.summarize(MODELS, SLOTS, metrics)
    assert found["nano-small.sae.explained_variance"] == 0.5  # the first slot
    assert found["nano-small.sae.explained_variance_pca"] == 0.4
    assert np.isnan(found["nano-small.sae.ce_recovered"])  # null in the file
    assert found["nano-medium.probe.guitar_auroc"] == pytest.approx(0.81)
    assert found["nano-medium.probe.guitar_auroc_activations"] == pytest.approx(0.80)
    assert found["nano-medium.probe.guitar_auroc_shuffled"] == pytest.approx(0.76)
    assert found["usae.r2_first_to_second"] == 0.6
    assert found["usae.cofire_proportion_mean_mispaired"] == 0.1
    assert found["match.common"] == 7
    assert found["nano-medium.maximise.sound"] == 2.5
    assert found["nano-medium.maximise.sound_random_direction"] == 0.9
    assert found["judge.classifier_guitar_auroc"] == 0.9
    assert found["nano-small.finder.guitar_features"] == 44


def test_steering_is_of_the_whole_evaluation_where_there_is_one(metrics):
    found = summary.summarize(MODELS, SLOTS, metrics)
    assert found["nano-small.steer.guitar_on"] == 0.6
    assert found["nano-medium.steer.guitar_on"] == 0.4
    assert found["nano-small.steer.guitar_off_prompt_edit"] == pytest.approx(0.4)


def test_files_of_a_dropped_model_do_not_count(metrics):
    assert not [key for key in summary.summarize(MODELS, SLOTS, metrics) if "dropped" in key]
    one = summary.summarize(MODELS[:1], SLOTS[1:], metrics)
    assert set(one) == specified(MODELS[:1])
    assert one["nano-small.sae.explained_variance"] == 0.6  # the first slot that is studied


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("train_sae/nano-small-top1.json", "train_sae@nano-small-top1"),
        ("probe/nano-medium-top1.json", "probe@nano-medium-top1"),
        ("train_usae.json", "train_usae"),
        ("train_crosscoder.json", "train_crosscoder"),
        ("match_features.json", "match_features"),
        ("find_concept/nano-small.json", "find_concept@nano-small"),
        ("maximize_activation/nano-small.json", "maximize_activation@nano-small"),
        ("train_judge.json", "train_judge"),
        ("steer/nano-medium.json", "steer@nano-medium"),
    ],
)
def test_a_missing_file_names_itself_and_its_stage(metrics, file, stage):
    (metrics / file).unlink()
    message = f"{re.escape(file)} is missing: run dvc repro {re.escape(stage)}$"
    with pytest.raises(summary.MissingMetric, match=message):
        summary.summarize(MODELS, SLOTS, metrics)


@pytest.mark.parametrize(
    ("file", "path", "message"),
    [
        ("probe/nano-small-top1.json", "concepts.guitar.dense", r"concepts\.guitar\.dense\.test"),
        ("train_sae/nano-small-top1.json", "stability_null", "stability_null"),
        ("train_usae.json", "null.mispaired", r"null\.mispaired\.r2_0_1"),
        ("train_judge.json", "musicnn.codec", r"musicnn\.codec\.guitar\.auroc"),
        # These may lack the concept, but not a number within it.
        ("steer/nano-medium.json", "concepts.guitar.off.methods.sae", r"concepts\.guitar\.off"),
        ("find_concept/nano-small.json", "sae.guitar.test.tested_auroc", r"sae\.guitar\.test"),
    ],
)
def test_a_missing_number_or_control_is_an_error(metrics, file, path, message):
    remove(metrics / file, path)
    with pytest.raises(summary.MissingMetric, match=f"no {message}.*: run dvc repro -f "):
        summary.summarize(MODELS, SLOTS, metrics)


@pytest.mark.parametrize(
    ("file", "path", "key"),
    [
        ("maximize_activation/nano-small.json", "headline.heard_reached", "maximise.sound"),
        ("find_concept/nano-small.json", "sae.guitar.test", "finder.guitar_best_auroc"),
        ("steer_full/nano-small.json", "concepts.guitar", "steer.guitar_off_prompt_edit"),
        (
            "steer_full/nano-small.json",
            "concepts.guitar.on.methods.prompt_edit",
            "steer.guitar_on_prompt_edit",
        ),
    ],
)
def test_a_number_that_a_run_cannot_have_is_null(metrics, file, path, key):
    remove(metrics / file, path)
    found = summary.summarize(MODELS, SLOTS, metrics)
    assert np.isnan(found[f"nano-small.{key}"])
    assert set(found) == specified(MODELS)
    assert "n/a" in summary.summary_table(MODELS, SLOTS, metrics).to_string()


def remove(path, dotted):
    """Remove one dotted key from a JSON file."""
    tree = inner = read_json(path)
    *parents, last = dotted.split(".")
    for part in parents:
        inner = inner[part]
    del inner[last]
    write_json(path, tree)


def test_table_shows_intervals_controls_and_units(metrics):
    table = summary.summary_table(MODELS, SLOTS, metrics)
    row = table.loc["nano-small.sae.explained_variance"]
    assert tuple(row) == ("0.500 [0.400, 0.600]", "pca 0.400", "share")
    assert tuple(table.loc["match.common"]) == ("7 [5, 9]", "null 0", "features")
    assert table.loc["nano-small.sae.ce_recovered", "value"] == "n/a"
    assert table.loc["nano-medium.maximise.sound", "value"] == "2.500 [2.200, 2.800]"
    assert table.loc["nano-medium.maximise.sound", "controls"] == "random_direction 0.900"
    assert len(table) == len(GLOBAL) + len(MODELS) * len(PER_MODEL)


def test_an_entry_with_other_keys_than_an_estimate_is_an_error(metrics):
    remove(metrics / "train_usae.json", "headline.r2_0_1.n")  # written by another version
    message = r"train_usae\.json has no headline\.r2_0_1: run dvc repro -f train_usae"
    with pytest.raises(summary.MissingMetric, match=message):
        summary.summarize(MODELS, SLOTS, metrics)


def test_every_path_exists_in_the_committed_metrics():
    found = summary.summarize(MODELS, SLOTS, ROOT / "metrics")
    assert not [key for key, value in found.items() if np.isnan(value)]
    assert found == read_json(ROOT / "metrics/summary.json")
