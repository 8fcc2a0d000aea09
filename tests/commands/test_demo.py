"""`musicscope demo` on the tiny model, from committed recipes and their SAE alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from musicscope.commands import cli
from musicscope.core.io import write_json
from musicscope.core.stats import Estimate
from musicscope.steering.recipes import FULL_FOLDER, load_steering, save_dictionary
from tests.support.steered import LAYER, make_steerable, random_sae

PROMPT = "A <script>alert(1)</script> piece"


def entry(headline: float) -> dict[str, object]:
    def numbers(value: float) -> dict[str, object]:
        return {key: Estimate(value, 0.1, 0.9, 16).as_dict() for key in ("headline", "success")}

    return {"methods": {"sae": numbers(headline), "random_feature": numbers(0.05)}}


@pytest.fixture
def checkout(tmp_path, tiny_musicgen, monkeypatch):
    """What Git holds: the model, recipes with their SAE, results; no judge and no data/sae."""
    make_steerable(tmp_path, tiny_musicgen)
    monkeypatch.chdir(tmp_path)
    full = Path(FULL_FOLDER) / "tiny"
    shutil.copytree("data/steering/tiny", full)
    shutil.rmtree("data/steering")
    save_dictionary(random_sae(), "top1", LAYER, full)
    example = {"wishes": ["guitar on"], "prompt": PROMPT}
    write_json(full / "examples/index.json", {"examples": [example]})
    found = {"guitar": {"off": entry(0.9), "on": entry(0.7)}, "organ": {"on": entry(float("nan"))}}
    write_json("metrics/steer_full/tiny.json", {"concepts": found})
    return tmp_path


def test_a_pair_and_a_page_without_data_sae(checkout, capsys):
    """The best edit that has an example and a judge, with float16 copies of the SAE's weights."""
    whole = load_steering("tiny", {"guitar": "on"})[1].sae
    shutil.rmtree("data/sae")
    copy = load_steering("tiny", {"guitar": "on"})[1].sae
    assert (copy.W_dec - whole.W_dec).abs().max() < 1e-3
    assert copy.W_dec.dtype == whole.W_dec.dtype
    cli.main(["demo"])
    out = capsys.readouterr().out
    page = (checkout / "data/demo/index.html").read_text()
    assert "listen: data/demo/index.html" in out
    assert "guitar on" in page
    assert "<script>" not in page
    sounds = sorted(path.name for path in (checkout / "data/demo").glob("*.wav"))
    assert len(sounds) == 2
    assert all(name in page for name in sounds)
    cli.main(["demo"])
    assert len(list((checkout / "data/demo").iterdir())) == 4  # the same files


def test_recipes_of_another_sae_in_data_sae_are_not_taken(checkout):
    shutil.rmtree("data/sae")
    random_sae(5).save("data/sae/tiny/top1/seed-0", {"layer": LAYER})
    with pytest.raises(SystemExit, match="data/steering/tiny has no recipes"):
        cli.main(["demo"])


def test_no_results_and_nothing_that_a_judge_can_tell_end_in_one_line(checkout):
    write_json(
        "metrics/steer_full/tiny.json", {"concepts": {"guitar": {"on": entry(float("nan"))}}}
    )
    with pytest.raises(SystemExit, match="no judge can tell"):
        cli.main(["demo"])
    shutil.rmtree("metrics")
    with pytest.raises(SystemExit, match="in a checkout of musicscope"):
        cli.main(["demo"])
