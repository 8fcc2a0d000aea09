"""Every figure, drawn from the committed tables and from small ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from musicscope.config import load_params
from musicscope.report import figures
from musicscope.report.metrics import Sources
from tools.import_closure import ROOT


@pytest.fixture(scope="module")
def committed() -> Sources:
    params = load_params(ROOT / "params.yaml")
    return Sources(ROOT, params.models, params.slots)


def drawn(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.png")}


@pytest.mark.slow
def test_committed_figures_are_those_of_the_committed_tables(committed, tmp_path):
    assert figures.draw_all(committed, "mean", tmp_path) == []
    found = drawn(tmp_path)
    assert found.keys() == drawn(ROOT / "plots/figures").keys()
    overview = found["overview.png"]
    assert overview == (ROOT / "plots/figures/overview.png").read_bytes(), "run `dvc repro figures`"


def test_missing_and_empty_tables_are_named_and_nothing_is_drawn(committed, tmp_path):
    (tmp_path / "plots/steer").mkdir(parents=True)
    (tmp_path / "plots/steer/nano-small-dose.csv").write_text("concept,direction,method\n")
    nothing = replace(committed, root=tmp_path)
    left_out = figures.draw_all(nothing, "mean", tmp_path / "out")
    assert sorted(left_out) == sorted(name for name, _ in figures.all_figures(committed, "mean"))
    assert not drawn(tmp_path)


def test_hook_points_of_an_audio_model_are_named():
    rows = [
        {"layer": i, "hook_point": point, "kind": kind, **dict.fromkeys(
            [f"{score}{end}" for score in figures.AUDIO for end in ("", "_low", "_high")], 0.1 * i)}
        for i, point in enumerate(("encoder.a", "decoder.b"))
        for kind in ("zero", "mean")
    ]  # fmt: skip
    figure = figures.ablation(pd.DataFrame(rows), "rave")
    labels = [text.get_text() for text in figure.axes[1].get_xticklabels()]
    assert labels == ["encoder.a", "decoder.b"]
    assert figure.axes[0].get_title() == "rave: D(reconstruction, ablated)"


def test_density_says_how_many_latents_never_fire():
    table = pd.DataFrame(
        {"log10_low": [np.nan, -2, -1], "log10_high": [np.nan, -1, 0], "latents": [3, 4, 5]}
    )
    (axis,) = figures.density(table).axes
    assert axis.get_title() == "9 latents fire, 3 never do"
    assert [bar.get_height() for bar in axis.patches] == [4, 5]


def test_curves_and_bars_of_the_overview_are_the_numbers_of_the_tables(committed):
    figure = figures.overview(committed, "mean")
    kl = committed.plot(f"ablate/{committed.models[0]}").query("kind == 'mean'")["kl"]
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), kl)
    chosen = figure.axes[0].lines[1].get_xdata()
    assert sorted(chosen) == sorted(committed.chosen_layers(committed.models[0]))
    table = committed.plot(f"steer_full/{committed.models[0]}").set_index(
        ["concept", "direction", "method"]
    )
    heights = [bar.get_height() for bar in figure.axes[1].patches[: len(figures.OVERVIEW)]]
    assert heights == [table.loc[("guitar", "off", m), "success"] for m in figures.OVERVIEW]
