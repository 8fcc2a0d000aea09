"""The search for a recipe of the SAEs: its cells, and one of them from end to end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments import dictionary_search as search
from tests.dictionaries.test_runs import write_folder
from tests.support.dictionaries import ROOT, make_workspace

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


def test_the_committed_table_has_the_cells_with_their_settings():
    table = pd.read_csv(ROOT / search.RESULT, keep_default_na=False)
    assert set(table["experiment"]) <= set(search.CELLS)
    for row in table.to_dict("records"):
        model, slot, changed = search.CELLS[row["experiment"]]
        assert (row["model"], row["slot"]) == (model, slot)
        for key, value in (search.BASE | changed).items():
            wanted = "+".join(map(str, value)) if isinstance(value, tuple) else value
            assert str(row[key]) == str(wanted), (row["experiment"], key)


def test_every_cell_is_queued_as_an_experiment_of_the_stage(monkeypatch):
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    search.queue()
    assert len(commands) == len(search.CELLS)
    assert len({command[command.index("-n") + 1] for command in commands}) == len(commands)
    nested = next(c for c in commands if "dictionary-matryoshka" in c)
    assert "train_sae.matryoshka=[40, 80, 160, 320]" in nested
    assert nested[-1] == "train_sae@nano-small-top1"


def test_the_latent_is_chosen_and_scored_on_different_compositions():
    """Latent 0 follows guitar in every clip; latents of noise would look good where chosen."""
    rng = np.random.default_rng(0)
    labels = rng.random(80) < 0.5
    means = rng.random((80, 300))
    groups = np.array([f"g{i // 4}" for i in range(80)])
    assert abs(search.single_latent_auroc(means, labels, groups) - 0.5) < 0.15
    means[:, 0] = ~labels  # fires less with guitar
    assert search.single_latent_auroc(means, labels, groups) == 1


def test_a_cell_is_trained_scored_and_kept(tiny_musicgen: Path, tmp_path, monkeypatch):
    root = make_workspace(tmp_path, tiny_musicgen, write_folder)
    monkeypatch.setenv("DVC_ROOT", str(root))
    small = {"k": 3, "expansion": 2, "samples": 640, "batch_size": 64}
    cells = {name: ("tiny", "top1", small | {"k": k}) for name, k in (("a", 3), ("b", 4))}
    monkeypatch.setattr(search, "CELLS", cells)
    monkeypatch.chdir(root)
    (root / "experiments").mkdir()
    monkeypatch.setattr(sys, "argv", ["dictionary_search", "--run", "b"])
    search.main()
    first = (root / search.RESULT).read_bytes()
    monkeypatch.setattr(sys, "argv", ["dictionary_search", "--run"])
    search.main()
    table = pd.DataFrame(search.read())
    assert table["samples"].tolist() == [640, 640]
    assert table["experiment"].tolist() == ["a", "b"]
    assert table["l0"].tolist() == pytest.approx([3, 4])
    assert (table["stability"] > table["stability_null"]).all()
    assert table["explained_variance"].between(0, 1).all()
    (root / search.RESULT).unlink()
    monkeypatch.setattr(sys, "argv", ["dictionary_search", "--run", "b"])
    search.main()
    assert (root / search.RESULT).read_bytes() == first
    monkeypatch.setattr(sys, "argv", ["dictionary_search", "--run", "c"])
    with pytest.raises(SystemExit):
        search.main()
