"""The summary: exact keys, only the models of params.yaml, and errors that name the stage."""

import copy
import re

import pytest

from musicscope.core import plots
from musicscope.core.io import write_json, write_text
from musicscope.report import summary

MODELS, SLOTS = ("nano-small", "nano-medium"), ("top1", "top2")
# As specified, not as implemented.
SAE_KEYS = ("explained_variance", "dead_fraction", "ce_recovered", "l0", "stability")
GUITAR_KEYS = (
    "sae_auroc", "sae_k16_auroc", "dense_auroc", "logmel_auroc", "trivial_auroc", "shuffled_auroc",
    "heldout_font_sae_auroc", "sae_auroc_ci_low", "sae_auroc_ci_high", "pair_accuracy",
)  # fmt: skip


def class_numbers(value):
    return {"auroc": value, "ci_low": value - 0.1, "ci_high": value + 0.1}


def probe_metrics(value):
    names = ("dense", "logmel", "codec", "trivial", "shuffled")
    guitar = {
        name: {"test": class_numbers(value - 0.01 * i), "heldout_font": class_numbers(value - 0.2)}
        for i, name in enumerate(("sae", *names))
    }
    guitar["sae"] |= {f"pairs_{font}": {"accuracy": 0.9} for font in ("timgm6mb", "fluidr3mono")}
    guitar["k_sparse"] = {"016": {"test": class_numbers(0.6)}}
    guitar["sae_minus_dense"] = {"test": {"difference": 0.01, "ci_low": -0.1, "ci_high": 0.1}}
    return {"concepts": {"guitar": guitar}}


def ablation_metrics():
    entry = {"mean": {"kl": 0.2, "kl_low": 0.1, "kl_high": 0.3}}
    return {"layers": {str(i): entry for i in range(12)}}


def steer_metrics(value):
    success = {"success": value, "success_ci_low": value - 0.1, "success_ci_high": value + 0.1}
    methods = ("sae", "prompt_edit", "diff_means", "random_feature", "passthrough", "reseed")
    entry = {name: {**success, "ce_cost": 0.02, "others_change": 0.1} for name in methods}
    gap = {"difference": 0.1, "difference_ci_low": 0.0, "difference_ci_high": 0.2}
    both = {"methods": entry, "sae_minus": {"diff_means": gap}}
    joint = ("all_wanted_plain", "all_wanted", "all_wanted_ci_low", "all_wanted_ci_high", "ce_cost")
    together = dict.fromkeys(("sae", "prompt_edit", "diff_means"), dict.fromkeys(joint, value))
    concepts = {"guitar": {"off": both, "on": both}}
    return {"prompts": 9, "concepts": concepts, "joint": {"guitar-off+organ-on": together}}


@pytest.fixture
def metrics(tmp_path):
    """The metrics folder of a finished run, and files of a model that is no longer studied."""
    for i, model in enumerate((*MODELS, "dropped")):
        write_text(tmp_path / f"layers/{model}.yaml", f"top1: {i + 2}\ntop2: 5\n")
        write_json(tmp_path / f"pretrain/{model}.json", {"cross_entropy": {"all": 3.0}, "l": [1]})
        for slot in SLOTS:
            sae = dict.fromkeys(summary.SAE_KEYS, 0.5) | {"seeds": {"seed-0": {"l0": 1.0}}}
            write_json(tmp_path / f"train_sae/{model}-{slot}.json", sae)
            write_json(tmp_path / f"probe/{model}-{slot}.json", probe_metrics(0.8 + 0.01 * i))
        write_json(tmp_path / f"maximize_activation/{model}.json", {"headline": {"ratio": 2 + i}})
    write_json(tmp_path / "maximize_shared.json", {"headline": {"ratio": 1.5}})
    entry = {"value": 0.6, "low": 0.5, "high": 0.7, "mean": 0.55, "sd": 0.01}
    usae = {"headline": {"r2_0_1": entry}, "null": {"mispaired": {"r2_0_1": 0.1}}}
    write_json(tmp_path / "train_usae.json", usae | {"independent_r2": {"0": 0.9}})
    write_json(tmp_path / "train_crosscoder.json", usae | {"independent_r2": {}})
    matched = {"matched": 0.3, "null_matched": 0.01}
    shared = {"sae_usae": {"nano-small": matched}, "seeds": {"nano-small": {"musical": 0.2}}}
    judged = {"mean_auroc": 0.8, "guitar": class_numbers(0.9)}
    judges = {"family_judge": {"codec": judged, "pairs": {"accuracy": 0.7}}, "musicnn": {}}
    write_json(tmp_path / "train_judge.json", judges | {"cross_font": {"a_to_b": judged}})
    finder = {"sae": {"guitar": {"discoveries": 5, "test": {"best_auroc": 0.7}}}}
    for model in (*MODELS, "dropped"):
        write_json(tmp_path / f"find_concept/{model}.json", finder)
        write_json(tmp_path / f"steer/{model}.json", steer_metrics(0.4))
    write_json(tmp_path / "steer_full/nano-small.json", steer_metrics(0.6))
    shared |= {"sae_sae": {}, "sets": {"common": 7, "own_nano-small": 3}}
    write_json(tmp_path / "match_features.json", shared)
    write_json(tmp_path / "pretrain/codec.json", {"si_sdr": 7.0})
    write_json(tmp_path / "prepare_data.json", {"trivial_cue_auroc": {"clips": {"rms": 0.51}}})
    return tmp_path


def test_keys_are_those_of_the_specification(metrics):
    found = summary.summarize(MODELS, SLOTS, metrics)
    assert all(not isinstance(value, dict | list) for value in found.values())
    for model in MODELS:
        assert f"{model}.ablate.top_layer" in found
        for slot in SLOTS:
            for key in SAE_KEYS:
                assert found[f"{model}.sae.{slot}.{key}"] == 0.5
            for key in GUITAR_KEYS:
                assert found[f"{model}.probe.{slot}.guitar.{key}"] is not None
    assert found["nano-small.ablate.top_layer"] == 2
    assert found["nano-medium.probe.top2.guitar.sae_auroc"] == pytest.approx(0.81)
    assert found["nano-medium.probe.top2.guitar.dense_auroc"] == pytest.approx(0.80)
    assert found["nano-medium.probe.top2.guitar.heldout_font_sae_auroc"] == pytest.approx(0.61)
    assert found["pretrain.codec.si_sdr"] == 7.0
    assert found["pretrain.nano-small.cross_entropy.all"] == 3.0
    assert found["data.trivial_cue_auroc.clips.rms"] == 0.51
    assert found["usae.r2_0_1"] == 0.6
    assert found["usae.r2_0_1_ci_low"] == 0.5
    assert found["usae.null_mispaired_r2_0_1"] == 0.1
    assert found["usae.independent_r2_0"] == 0.9
    assert found["crosscoder.r2_0_1_mean_of_seeds"] == 0.55
    assert found["match.sae_usae_matched_nano-small"] == 0.3
    assert found["match.null_matched_nano-small"] == 0.01
    assert found["match.common"] == 7
    assert found["maximize.nano-medium.ratio"] == 3
    assert found["maximize.shared.ratio"] == 1.5
    assert found["judge.family_judge.codec.guitar_auroc"] == 0.9
    assert found["judge.family_judge.pairs_accuracy"] == 0.7
    assert found["judge.cross_font.a_to_b.mean_auroc"] == 0.8
    assert found["find_concept.nano-small.sae.guitar.discoveries"] == 5


def test_steering_is_of_the_whole_evaluation_where_there_is_one(metrics):
    found = summary.summarize(MODELS, SLOTS, metrics)
    for direction in ("off", "on"):
        for key in ("success", "success_ci_low", "success_ci_high", "prompt_edit", "diff_means",
                    "random_feature", "passthrough", "quality_cost"):  # fmt: skip
            assert f"nano-small.steer.guitar.{direction}.{key}" in found
    assert found["nano-small.steer.guitar.on.success"] == 0.6
    assert found["nano-small.steer_quick.guitar.on.success"] == 0.4
    assert found["nano-small.steer.joint.guitar_off_organ_on.all_wanted"] == 0.6
    assert found["nano-medium.steer.guitar.off.success_ci_low"] == pytest.approx(0.3)
    assert "nano-medium.steer_quick.prompts" not in found


def test_files_of_a_dropped_model_do_not_count(metrics):
    assert not [key for key in summary.summarize(MODELS, SLOTS, metrics) if "dropped" in key]
    one = summary.summarize(MODELS[:1], SLOTS[1:], metrics)
    assert one["nano-small.ablate.top_layer"] == 5  # the first slot that is studied
    assert not [key for key in one if "medium" in key or "top1" in key]
    assert "maximize.nano-small.ratio" in one


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("layers/nano-medium.yaml", "select_layers"),
        ("train_sae/nano-small-top2.json", "train_sae@nano-small-top2"),
        ("probe/nano-medium-top1.json", "probe@nano-medium-top1"),
        ("prepare_data.json", "prepare_data"),
        ("train_usae.json", "train_usae"),
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


def test_a_missing_number_is_an_error_unless_a_small_run_cannot_have_it(metrics):
    path = metrics / "probe/nano-small-top1.json"
    whole = probe_metrics(0.8)
    lacking = copy.deepcopy(whole)
    guitar = lacking["concepts"]["guitar"]
    del guitar["sae"]["heldout_font"], guitar["sae"]["pairs_fluidr3mono"], guitar["k_sparse"]["016"]
    write_json(path, lacking)
    found = summary.summarize(MODELS, SLOTS, metrics)
    for key in ("heldout_font_sae_auroc", "heldout_font_pair_accuracy", "sae_k16_auroc"):
        assert found[f"nano-small.probe.top1.guitar.{key}"] is None
    table = summary.summary_table(found, MODELS, SLOTS)
    assert table.loc["guitar sae_k16_auroc", "nano-small top1"] == "n/a"
    assert table.loc["guitar sae_auroc", "nano-small top1"] == "0.800 [0.700, 0.900]"
    del whole["concepts"]["guitar"]["dense"]
    write_json(path, whole)
    with pytest.raises(summary.MissingMetric, match=r"no concepts\.guitar\.dense\.test\.auroc"):
        summary.summarize(MODELS, SLOTS, metrics)


def test_flatten_drops_lists_and_joins_keys():
    tree = {"a": {"b": {"c": 1}, "d": None}, "e": [1, 2], "f": "x"}
    assert summary.flatten(tree) == {"a.b.c": 1, "a.d": None, "f": "x"}


def test_picture_has_a_bar_for_every_probe_and_repeats(tmp_path):
    probes = {f"{m} {s}": probe_metrics(0.8) for m in MODELS for s in SLOTS}
    for name in ("a", "b"):
        figure = summary.plot_summary({m: ablation_metrics() for m in MODELS}, probes, "mean")
        plots.save_figure(figure, tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    curves, bars = figure.axes
    assert list(curves.lines[0].get_xdata()) == list(range(12))  # layer 10 after layer 9
    assert len(bars.patches) == 6 * len(probes)
