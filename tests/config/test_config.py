"""params.yaml: what is right loads typed, what is wrong is refused with the full key named."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml
from dvc.utils.hydra import apply_overrides  # what `dvc exp run -S` edits params.yaml with

from musicscope.config import BASES, ParamsError, load_params
from tools import params_schema
from tools.import_closure import ROOT

PARAMS = Path(__file__).parents[2] / "params.yaml"


def write(folder: Path, *overrides: tuple[str, object], drop: str | None = None) -> Path:
    """The committed params with some full keys set, or one dropped."""
    params = yaml.safe_load(PARAMS.read_text(encoding="utf-8"))
    for full, value in [*overrides, (drop, None)] if drop else overrides:
        *sections, key = full.split(".")
        node = params
        for section in sections:
            node = node[section]
        if full == drop:
            del node[key]
        else:
            node[key] = value
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    return path


def test_committed_params_load_with_every_value_as_written():
    params = load_params(PARAMS)
    written = yaml.safe_load(PARAMS.read_text(encoding="utf-8"))
    for name, base in BASES.items():
        assert all(written[base].get(key) != value for key, value in written[name].items())
        written[name] = {**written[base], **written[name]}
    for key in ("rule", "control_clips"):  # which only the universal SAE has
        del written["train_crosscoder"][key]
    assert json.loads(json.dumps(dataclasses.asdict(params))) == written
    hash(params)  # frozen all the way down, lists included
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.train_sae.k = 1


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("train_sae.kk", 3, ["unknown key train_sae.kk", "3", "did you mean train_sae.k?"]),
        ("train_sea", 3, ["unknown key train_sea", "did you mean train_sae?"]),
        ("prepare_data.clips.tset", 3, ["did you mean prepare_data.clips.test?"]),
        ("learning_rate", 0.1, ["unknown key learning_rate", "train_sae.learning_rate"]),
        ("probe.zzzz", 1, ["unknown key probe.zzzz", "known here: k_sparse"]),
    ],
)
def test_unknown_key_names_the_nearest_known_one(tmp_path, key, value, parts):
    with pytest.raises(ParamsError) as caught:
        load_params(write(tmp_path, (key, value)))
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("train_sae.k", "many", "a valid integer"),
        ("train_sae.k", 2.5, "a valid integer"),
        ("train_sae.k", True, "a valid integer"),
        ("train_sae.k", None, "a valid integer"),
        ("train_sae.k", [32], "a valid integer"),
        ("train_sae.k", {"value": 32}, "a valid integer"),
        ("train_sae.learning_rate", "fast", "a valid number"),
        ("train_sae.learning_rate", False, "a valid number"),
        ("select_layers.skip_first", "maybe", "a valid boolean"),
        ("models", "nano-small", "a valid array"),
        ("probe.k_sparse", 4, "a valid array"),
    ],
)
def test_wrong_type_names_key_value_and_type(tmp_path, key, value, allowed):
    with pytest.raises(ParamsError, match="wrong type") as caught:
        load_params(write(tmp_path, (key, value)))
    assert f"{key} = {value!r}" in str(caught.value)
    assert allowed in str(caught.value)


def test_wrong_type_in_a_list_names_the_entry(tmp_path):
    with pytest.raises(ParamsError, match=re.escape("probe.c_grid[1] = 'x' has the wrong type")):
        load_params(write(tmp_path, ("probe.c_grid", [0.1, "x"])))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train_sae.k", 0, "train_sae.k = 0 is out of range: it should be greater than"),
        ("train_sae.learning_rate", 0.0, "train_sae.learning_rate = 0.0 is out of range"),
        ("train_sae.aux_weight", float("inf"), "train_sae.aux_weight = inf is out of range"),
        ("train_sae.warmup_fraction", float("nan"), "train_sae.warmup_fraction = nan"),
        (
            "train_sae.activation",
            "relu",
            "'relu' is out of range: it should be 'topk', 'batchtopk' or 'jumprelu'",
        ),
        ("extract_activations.dtype", "int8", "extract_activations.dtype = 'int8'"),
        ("prepare_data.clips.train", 0, "prepare_data.clips.train = 0"),
        ("ablate.kinds", ["mean", "swap"], "ablate.kinds[1] = 'swap' is out of range"),
        ("probe.c_grid", [0.1, 0.0], "probe.c_grid[1] = 0.0 is out of range"),
        ("probe.c_grid", [], "probe.c_grid is empty"),
        ("slots", [], "slots is empty"),
        ("slots", ["top1", "top1"], "slots = ['top1', 'top1'] has an entry twice"),
        ("slots", ["top1", "best"], "slots[1] = 'best' is out of range: allowed is top<n>"),
        ("slots", ["top0"], "slots[0] = 'top0'"),
        ("models", ["../elsewhere"], "models[0] = '../elsewhere'"),
        ("models", [".hidden"], "models[0] = '.hidden'"),
        ("models", ["a\n"], "models[0]"),
        ("compute.device", "cuda:x", "compute.device = 'cuda:x'"),
        ("seed", -1, "seed = -1"),
    ],
)
def test_out_of_range_names_key_value_and_range(tmp_path, key, value, message):
    with pytest.raises(ParamsError, match=re.escape(message)):
        load_params(write(tmp_path, (key, value)))


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        ([("ablate.kinds", ["skip"])], ["select_layers.kind", "ablate.kinds"]),
        ([("train_sae.samples", 8)], ["train_sae.samples", "train_sae.batch_size"]),
        ([("train_sae.decay_fraction", 1.0)], ["train_sae.decay_fraction", "warmup_fraction"]),
        ([("probe.k_sparse", [2, 1])], ["probe.k_sparse"]),
        ([("slots", ["top2"])], ["match_features.slot = 'top1'", "slots = ['top2']", "just slots"]),
        ([("match_features.slot", "top2")], ["match_features.slot = 'top2'", "train_usae.slot"]),
        ([("slots", ["top1", "cross3"])], ["cross3", "extract_activations.captions"]),
    ],
)
def test_values_that_do_not_fit_together(tmp_path, overrides, keys):
    with pytest.raises(ParamsError) as caught:
        load_params(write(tmp_path, *overrides))
    for key in keys:
        assert key in str(caught.value)


@pytest.mark.parametrize("key", ["train_sae.k", "train_sae", "seed"])
def test_missing_key_is_named(tmp_path, key):
    with pytest.raises(ParamsError, match=rf"{key} is missing"):
        load_params(write(tmp_path, drop=key))


def test_section_that_is_no_mapping(tmp_path):
    with pytest.raises(ParamsError, match="probe = None is not a section"):
        load_params(write(tmp_path, ("probe", None)))


def test_interpolation_is_refused_because_dvc_would_not_see_it(tmp_path):
    with pytest.raises(ParamsError, match=r"train_sae\.k = '\$\{seed\}' refers to another key"):
        load_params(write(tmp_path, ("train_sae.k", "${seed}")))


def test_broken_and_absent_files_are_named(tmp_path):
    broken = tmp_path / "params.yaml"
    broken.write_text("a: [1\n")
    with pytest.raises(ParamsError, match="not readable YAML"):
        load_params(broken)
    with pytest.raises(ParamsError, match="nowhere.yaml does not exist"):
        load_params(tmp_path / "nowhere.yaml")


def test_whole_number_for_a_float_is_a_float(tmp_path):
    value = load_params(write(tmp_path, ("train_sae.learning_rate", 1))).train_sae.learning_rate
    assert (value, type(value)) == (1.0, float)


def test_overrides_as_dvc_exp_run_writes_them(tmp_path):
    path = write(tmp_path)
    apply_overrides(
        path,
        [
            "train_sae.k=16",
            "train_sae.learning_rate=2e-4",
            "train_sae.activation=batchtopk",
            "models=[nano-small]",
            "select_layers.skip_first=false",
            "+train_crosscoder.k=8",  # a new key: the section holds only what differs
        ],
    )
    params = load_params(path)
    assert params.train_sae.k == 16
    assert params.train_sae.learning_rate == 2e-4
    assert params.train_sae.activation == "batchtopk"
    assert params.models == ("nano-small",)
    assert params.select_layers.skip_first is False
    assert (params.train_crosscoder.k, params.train_usae.k) == (8, 32)


def test_sections_hold_only_what_differs_and_are_complete_when_loaded(tmp_path):
    params = load_params(PARAMS)
    assert params.steer_full == dataclasses.replace(
        params.steer, words=True, frozen_decoder=True, n_prompts=16,
        strengths=(0.125, 0.5, 1.0, 2.0),
    )  # fmt: skip
    changed = write(tmp_path, ("train_usae.k", 7), ("train_crosscoder.seeds", 1))
    found = load_params(changed)
    assert (found.train_crosscoder.k, found.train_crosscoder.seeds) == (7, 1)
    assert found.train_usae.seeds == params.train_usae.seeds
    with pytest.raises(ParamsError) as caught:  # once, where the file has it
        load_params(write(tmp_path, ("train_usae.k", 0)))
    assert str(caught.value).count("\n") == 0
    assert "train_usae.k = 0" in str(caught.value)
    with pytest.raises(ParamsError, match=r"train_crosscoder\.samples = 8 gives no step"):
        load_params(write(tmp_path, ("train_crosscoder.samples", 8)))


def test_stages_of_such_sections_depend_on_both_sections():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    for name, base in BASES.items():
        stage = stages.get(name) or stages[base]  # the crosscoder is a kind of train_usae
        params = {p for p in stage["params"] if isinstance(p, str)}
        kinds = stage["matrix"].get("kind", [])
        params |= {p.replace("${item.kind}", kind) for p in params for kind in kinds}
        assert {name, base} <= params


def test_all_problems_are_reported_at_once(tmp_path):
    with pytest.raises(ParamsError) as caught:
        load_params(write(tmp_path, ("train_sae.k", 0), ("probe.c_grid", []), drop="seed"))
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    for line, key in zip(lines, ("seed", "train_sae.k", "probe.c_grid"), strict=True):
        assert line.startswith(f"{tmp_path}/params.yaml: {key}")


def test_schema_for_editors_is_current_and_describes_every_key():
    text = params_schema.PATH.read_text(encoding="utf-8")
    assert text == params_schema.schema(), "run python -m tools.params_schema"
    schema = json.loads(text)
    first = PARAMS.read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# yaml-language-server: $schema={params_schema.PATH.relative_to(ROOT)}"
    described = 0
    for section in (schema, *schema["$defs"].values()):
        assert section["description"]
        for name, value in section["properties"].items():
            assert "$ref" in value or value["description"], name
            described += 1
    assert described > 150


def test_what_a_stage_reads_is_not_what_it_replaces(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/clips/mine").mkdir(parents=True)
    (tmp_path / "music").symlink_to("data/clips/mine")
    tree = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    path = tmp_path / "changed.yaml"

    def load(source: str = "folder", concept: str = "guitars", **recordings: str):
        changed = {**tree["prepare_data"]["recordings"], "folder": "mine", **recordings}
        section = {**tree["prepare_data"], "source": source, "recordings": changed}
        concepts = [{"name": "a", "positive": concept, "negative": "clips:has_bass"}]
        find = {**tree["find_concept"], "concepts": concepts}
        whole = {**tree, "prepare_data": section, "find_concept": find}
        path.write_text(yaml.safe_dump(whole), encoding="utf-8")
        return load_params(path)

    load()
    load("embedded", folder="data/clips")  # not read
    for key in ("folder", "audio", "stems_folder", "tags", "song_describer"):
        for given in ("data/clips", "./data/x/../clips/new", "music", str(tmp_path / "data/clips")):
            with pytest.raises(ParamsError, match=rf"recordings\.{key} .* lies in data/clips"):
                load(**{key: given})
    with pytest.raises(ParamsError, match=r"positive of a .* lies in data/find_concept"):
        load(concept="data/find_concept/nano-small")


# --- concepts of one's own ---------------------------------------------------------------------


def test_a_concept_needs_no_key_and_is_known_wherever_concepts_are_named(tmp_path):
    pairs = ["male_vocal-off+guitar-on"]
    query = [{"name": "him", "positive": "clips:has_male_vocal and not has_drums",
              "negative": "clips:not has_male_vocal"}]  # fmt: skip
    params = load_params(
        write(
            tmp_path, ("concepts", {"male_vocal": {}}), ("steer.pairs", pairs),
            ("steer.concepts", ["guitar", "male_vocal"]), ("find_concept.concepts", query),
            ("ablate.concepts", ["male_vocal", "drums"]),
        )
    )  # fmt: skip
    assert params.concepts["male_vocal"].column == ""
    assert params.steer_full.concepts == ("guitar", "male_vocal")
    hash(params)


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        ({"steer.concepts": ["guitra"], "steer.pairs": []},
         "steer.concepts names 'guitra'.*did you mean 'guitar'"),
        ({"ablate.concepts": ["guitar", "male_vocl"], "concepts": {"male_vocal": {}}},
         "ablate.concepts names 'male_vocl'.*did you mean 'male_vocal'"),
        ({"find_concept.concepts": [{"name": "a", "positive": "clips:has_vocals",
                                     "negative": "clips:not has_vocals"}]},
         "find_concept.concepts: positive of a names 'vocals', .*not defined in `concepts`; known"),
        ({"concepts": {"Male": {}}}, "concepts.Male: allowed are names of small letters"),
        ({"concepts": {"guitar": {}}}, "concepts.guitar: allowed .* neither a family"),
        ({"concepts": {"artist": {}}}, "concepts.artist: allowed .* column of labels.csv"),
        ({"concepts": {"x": {"column": "Split"}}}, "concepts.x.column = 'Split': that column"),
        ({"concepts": {"x": {"folder_with": "a"}}}, "concepts.x: give both folder_with and"),
        ({"concepts": {"x": {"musicnn": ["male vocals"]}}},
         "concepts.x.musicnn = 'male vocals' is no tag of musicnn; did you mean 'male vocal'"),
        ({"concepts": {"x": {"prompts_with": ["one"]}}}, "concepts.x.prompts_with: one prompt"),
        ({"concepts": {"x": {"prompts_without": ["a {mood} song", "b"]}}},
         "concepts.x.prompts_without = 'a {mood} song': no blank {mood}; allowed are {lead}"),
        ({"concepts": {"x": {"prompts_with": ["a { song", "b"]}}}, "write {{ for a {"),
        ({"concepts": {"x": {"colum": "y"}}}, "unknown key concepts.x.colum.*did you mean"),
    ],
)  # fmt: skip
def test_a_wrong_concept_is_named_with_its_key_and_the_nearest(tmp_path, sets, said):
    with pytest.raises(ParamsError) as caught:
        load_params(write(tmp_path, *sets.items()))
    assert re.search(said.replace("{", r"\{"), str(caught.value)), str(caught.value)
