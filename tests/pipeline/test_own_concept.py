"""A concept of one's own from a folder to steered music: clips, probe, finder, judges, steering."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from musicscope.activations import extraction
from musicscope.config import load_params
from musicscope.core.io import write_json
from musicscope.data.clips import ClipStore, at_rate
from musicscope.data.concepts import completed
from musicscope.data.taxonomy import FAMILIES
from musicscope.dictionaries import stability
from musicscope.judges import concept_training, dataset
from musicscope.judges import report as judge_report
from musicscope.judges.concepts import load_concept_judges
from musicscope.judges.instrument_classifier import FamilyJudge, FamilyNet, JudgeConfig
from musicscope.judges.musicnn import TAGS
from musicscope.judges.pair import Judges
from musicscope.models.registry import load_model
from musicscope.report.sections.judges import section as judges_section
from musicscope.report.sections.probes import section as probes_section
from musicscope.report.sections.steering import section as steering_section
from musicscope.steering import conditions
from musicscope.steering.recipes import load_recipe, load_steering
from musicscope.steering.session import Session, TextInput, known_concepts
from stages import find_concept, measure_effects, prepare_data, probe, steer
from tests.support.report import sources, tables, text_of
from tests.support.source_archives import PARAMS, encoded, tone
from tests.support.steered import random_sae
from tools import smoke

SMALL = JudgeConfig(channels=(8, 8, 8, 8), n_mels=32, crop_frames=25, epochs=8, batch=8)
COUNTS = {"train": 24, "validation": 12, "test": 16}
RATE = 8000
VOICE, GUITAR = 700.0, 1200.0


class Ears:
    """In musicnn's place: embeddings are levels of bands; the tag is how much of the voice."""

    tags = TAGS

    def predict(self, audio):
        power = np.abs(np.fft.rfft(audio, axis=1)) ** 2
        bands = np.stack([b.sum(1) for b in np.array_split(power[:, : len(power[0]) // 4], 40, 1)])
        levels = np.log(bands.T + 1e-6)
        found = np.full((len(audio), len(TAGS)), 0.5, np.float32)
        found[:, TAGS.index("male vocal")] = 1 / (1 + np.exp(-levels[:, 14] / 10))
        return found, np.repeat(levels, 5, 1).astype(np.float32)


class Codec:
    """A codec that takes half of the level."""

    sample_rate = RATE

    def encode(self, audio, captions):
        return type("Batch", (), {"codes": torch.as_tensor(audio) / 2})

    def decode(self, codes):
        return codes


def write_recordings(folder: Path) -> None:
    """Songs with and without the voice, a third of them of unknown label; guitar by chance."""
    folder.mkdir()
    rng, lines = np.random.default_rng(0), []
    for split, count in COUNTS.items():
        for i in range(count):
            sung, plucked = i % 2 == 0, bool(rng.random() < 0.5)
            audio = 0.2 * tone(rng.uniform(150, 300), 1.0)
            audio = audio + 0.15 * rng.standard_normal(RATE).astype(np.float32)  # no copies
            audio = audio + sung * tone(VOICE, 1.0) + plucked * 0.5 * tone(GUITAR, 1.0)
            name = f"{split}-{i}.wav"
            (folder / name).write_bytes(encoded(0.5 * audio))
            label = "" if i % 6 == 5 else int(sung)
            words = "a song of a male singer" if sung else "a tune for flute"
            words = words if label != "" else "some music"
            lines.append(f"{name},{split},{label},{int(plucked)},{words} no {i} of {split}\n")
    (folder / "labels.csv").write_text("path,split,Male_Vocal,guitar,caption\n" + "".join(lines))


def write_params(root: Path) -> None:
    params = yaml.safe_load(PARAMS.read_text(encoding="utf-8"))
    smoke_values = {
        "models": ["tiny"], "slots": ["top1"],
        "concepts": {"jangle": {"column": "guitar"}, "male_vocal": {"musicnn": ["male vocal"]}},
        "prepare_data": {"source": "folder", "seconds": 1.0,
                         "recordings": {"folder": "mine", "sample_rate": RATE}},
        "maximize_activation": {"seconds": 0.5, "window_seconds": 0.1},
        "measure_effects": {"clips": 2, "train_clips": 8, "seconds": 0.4, "draws": 2, "checked": 4},
        "train_sae": {"baselines": [], "k": 8},
        "probe": {"k_sparse": [1, 4], "c_grid": [0.1], "min_positive": 6, "null_seeds": 1,
                  "bootstrap": 20},
        "train_judge": {"clips": 40, "codec_clips": 40, "test_clips": 20, "codec_test_clips": 20,
                        "epochs": 8, "bootstrap": 20},
        "find_concept": {
            "universal": False, "permutations": 19, "stability_draws": 5, "few": 4, "few_draws": 2,
            "bootstrap": 20, "features": 1,
            "concepts": [{"name": "him", "positive": "clips:has_male_vocal",
                          "negative": "clips:not has_male_vocal"}]},
        "steer": {
            "concepts": ["male_vocal", "guitar"], "pairs": ["male_vocal-off+guitar-on"],
            "strengths": [1.0, 2.0], "n_features": [2], "direction_strengths": [0.25, 1.0],
            "gate_features": 2, "seconds": 0.5, "validation_prompts": 3, "n_prompts": 3,
            "bootstrap": 20, "distance_budget": 1e6, "quality_budget": 1e6, "stable_only": False},
        "steer_full": {"strengths": [1.0], "words": True, "frozen_decoder": False},
        "ablate": {"concepts": []},
        "compute": {"processes": 1, "threads": 1},
    }  # fmt: skip
    (root / "params.yaml").write_text(yaml.safe_dump(smoke.merged(params, smoke_values)))


def run(monkeypatch: pytest.MonkeyPatch, module, *words: str) -> None:
    """A stage as `python -m stages.<name>` runs it."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *words])
    module.main()


def extract(root: Path) -> None:
    """Activations of one layer, and a dictionary with its facts."""
    clips, model = ClipStore.open(root / "data/clips"), load_model(root / "data/models/tiny")
    view = at_rate(clips, model.sample_rate)
    plans = extraction.plan(
        model, view, {"top1": "layers.1"}, dtype="float16", shard_mb=1.0, batch_clips=8,
        model_sha256="m", clips_sha256="c",
    )  # fmt: skip
    extraction.extract(plans, lambda: (model, view), {"top1": root / "data/activations/tiny/top1"})
    sae = random_sae()
    sae.save(root / "data/sae/tiny/top1/seed-0", {"layer": "layers.1"})
    facts = pd.DataFrame({"feature": np.arange(sae.n_latents), "seed_cosine": 1.0, "returns": True})
    stability.write(root / "data/sae/tiny/top1", facts)


def judges_of(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Judges, dict]:
    """Judges as train_judge makes them, with stand-ins for musicnn and for the codec."""
    params = load_params()
    monkeypatch.setattr(dataset, "open_codec", lambda *_: Codec())
    monkeypatch.setattr(concept_training, "open_musicnn", lambda wheel: Ears())
    monkeypatch.setattr(concept_training, "JudgeConfig", lambda: SMALL)
    torch.manual_seed(0)
    families = FamilyJudge(FamilyNet(SMALL, len(FAMILIES)).eval(), FAMILIES, SMALL)
    (root / "scratch").mkdir()
    inputs = dataset.Inputs(root / "scratch", "data/clips", "codec", root / "wheel", None)
    own, metrics = concept_training.run(
        map, ClipStore.open("data/clips"), inputs, Judges(families, Ears()),
        completed(params.concepts), params.train_judge, params.seed,
    )  # fmt: skip
    heard = dict.fromkeys(("guitar",), {"auroc": {"value": 0.9}})
    whole = {"family_judge": {"mixed": heard}, "musicnn": {"mixed": {}}, "concepts": metrics}
    known = judge_report.reliability(whole)
    return Judges(families, Ears(), reliability=known, own=own), metrics


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_musicgen: Path):
    """A project after every stage from clips to steering; its judges, and their metrics."""
    root = tmp_path_factory.mktemp("own")
    (root / "data/models").mkdir(parents=True)
    (root / "data/models/tiny").symlink_to(tiny_musicgen, target_is_directory=True)
    write_recordings(root / "mine")
    write_params(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("DVC_ROOT", str(root))
        run(patch, prepare_data)
        extract(root)
        run(patch, measure_effects, "tiny", "top1")
        run(patch, probe, "tiny", "top1")
        run(patch, find_concept, "tiny")
        (root / "data/judge").mkdir()
        (root / "data/judge/none").write_text("the judges are the tests'")
        judges, metrics = judges_of(root, patch)
        patch.setattr(conditions, "load_judges", lambda folder: judges)
        conditions.open_context.cache_clear()
        run(patch, steer, "tiny")
        conditions.open_context.cache_clear()
    return root, judges, metrics


def read(root: Path, name: str) -> dict:
    return json.loads((root / f"metrics/{name}.json").read_text())


def test_clips_have_the_column_with_its_unknowns(world):
    root, _, _ = world
    has = ClipStore.open(root / "data/clips").rows["has_male_vocal"]
    assert has.isna().sum() == 8
    labels = read(root, "prepare_data")["labels"]["male_vocal"]
    assert (labels["with"], labels["without"], labels["unknown"]) == (26, 18, 8)


def test_probe_effects_and_finder_read_it(world):
    root, _, _ = world
    found = read(root, "probe/tiny-top1")
    assert set(found["concepts"]) >= {"male_vocal", "guitar"}
    own = found["concepts"]["male_vocal"]
    assert own["positives"]["test"] == 8
    assert own["dense"]["test"]["auroc"]["value"] > 0.6
    assert found["unknown"]["male_vocal"] == {"train": 4, "validation": 2, "test": 2}
    table = pd.read_parquet(root / "data/effects/tiny/top1.parquet")
    assert "toward_male_vocal" in table
    him = read(root, "find_concept/tiny")["sae"]["him"]
    assert (him["with"], him["without"]) == (12, 8)
    assert him["test"]["clips"] == 14


def test_its_judges_learn_from_the_labels_and_are_trusted_by_their_auroc(world, tmp_path):
    root, judges, metrics = world
    own = metrics["male_vocal"]
    assert own["clips"]["train"] == {"with": 12, "without": 8}
    assert own["family_judge"]["codec"]["auroc"]["value"] > 0.9
    assert own["musicnn"]["codec"]["auroc"]["value"] > 0.9
    assert own["musicnn"]["codec"]["positives"] == 8
    assert own["trusted"] == "family_judge, musicnn, embedding_judge"
    assert judges.families == (*FAMILIES, "jangle", "male_vocal")
    assert "musicnn" not in metrics["jangle"]  # none of its tags means it
    clips = ClipStore.open(root / "data/clips")
    at = clips.select(split="test", has_male_vocal=True)[:3]
    found = judges.predict(np.repeat(clips.audio(at), 2, 1))
    assert all(p.shape == (3, 16) and (p[:, -1] > 0.5).all() for p in found.values())
    # A judge below the limit refuses.
    poor = {judge: {"male_vocal": 0.64} for judge in found}
    refused = replace(judges, reliability=poor).predict(clips.audio(at))
    assert all(np.isnan(p[:, -1]).all() for p in refused.values())
    np.testing.assert_array_equal(
        refused["family_judge"][:, :14], judges.family_judge.predict(clips.audio(at))
    )
    judges.own.save(tmp_path / "concepts")
    loaded = load_concept_judges(tmp_path / "concepts")
    assert (loaded.names, loaded.tags) == (
        ("jangle", "male_vocal"), {"male_vocal": ("male vocal",)},
    )  # fmt: skip

    again = replace(judges, own=loaded).predict_own(clips.audio(at))
    for judge, values in judges.predict_own(clips.audio(at)).items():
        np.testing.assert_array_equal(again[judge], values)
    assert load_concept_judges(tmp_path / "nothing") is None


def test_steering_has_rows_for_it_alone_and_beside_a_family(world):
    root, _, _ = world
    found = read(root, "steer/tiny")
    assert set(found["concepts"]) == {"male_vocal", "guitar"}
    for direction in ("off", "on"):
        one = found["concepts"]["male_vocal"][direction]
        assert one["methods"]["sae"]["not_judged"] is False
        assert np.isfinite(one["methods"]["sae"]["success"]["value"])
        assert one["methods"]["sae"]["musicnn"]["to_change"] >= 0
        # No judge but the one that chooses knows guitar here.
        assert found["concepts"]["guitar"][direction]["methods"]["sae"]["not_judged"] is True
    assert found["reliability"]["musicnn"]["male_vocal"] > 0.9
    assert set(found["joint"]) == {"male_vocal-off+guitar-on"}
    table = pd.read_csv(root / "plots/steer/tiny.csv")
    assert set(table["concept"]) == {"male_vocal", "guitar"}
    talk = pd.read_csv(root / "plots/steer/tiny-crosstalk.csv")
    assert list(talk.columns) == ["edit", *FAMILIES, "jangle", "male_vocal"]
    examples = json.loads((root / "data/steering/tiny/examples/index.json").read_text())["examples"]
    prompts = {e["wishes"][0]: e["prompt"] for e in examples if len(e["wishes"]) == 1}
    assert prompts["male_vocal off"].startswith("a song of a male singer")
    assert prompts["male_vocal on"].startswith("a tune for flute")
    assert "guitar" in prompts["guitar off"]


def test_the_report_shows_it(world, monkeypatch):
    root, _, metrics = world
    monkeypatch.chdir(root)
    write_json("metrics/train_judge.json", {"concepts": metrics})
    of = sources(root, ("tiny",))
    assert "male_vocal" in str(steering_section(of).content).replace(" ", "_")
    assert "male vocal" in text_of(probes_section(of))
    judged = tables(judges_section(of))["Judges of defined concepts (AUROC)"]
    own = [row for row in judged.rows if row[0] == "male vocal"]
    assert [row[:2] + row[-1:] for row in own] == [
        ("male vocal", "family judge", "yes"), ("male vocal", "musicnn", "yes"),
        ("male vocal", "embedding distance", "yes"),
    ]  # fmt: skip
    assert "Judges of defined concepts" in text_of(judges_section(of))


def test_it_is_switched_with_a_family_in_one_piece(world, monkeypatch):
    root, _, _ = world
    monkeypatch.chdir(root)
    assert known_concepts("tiny") == {"guitar": ("off", "on"), "male_vocal": ("off", "on")}
    assert load_recipe("data/steering/tiny", "male_vocal").grounding is not None
    layer, steering = load_steering("tiny", {"guitar": "on", "male_vocal": "on"}, 3.0)
    assert [c.name for c in steering.concepts] == ["guitar on", "male_vocal on"]
    session = Session.open("data/models/tiny")
    plain, steered = session.draw_pair(TextInput("a song", 0.5, 1), layer, steering)
    assert not plain.same_as(steered)
