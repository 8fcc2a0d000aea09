"""The table of steering experiments: what DVC tells of them, finished ones alone."""

from __future__ import annotations

import subprocess
import sys

import pandas as pd
import pytest

from experiments import steering_search as ss
from tools.import_closure import ROOT


def record(name: str, state: str = "Success", **values: float) -> dict:
    """A row of dvc.api.exp_show."""
    numbers = {"success_choosing": 0.5, "change": 0.1, "ce_cost": -0.2, "distance": 0.1, **values}
    within = f"metrics/steer/{ss.MODEL}.json:concepts.electric_piano.on.chosen.sae.within_budget"
    head = f"metrics/steer/{ss.MODEL}.json:concepts.electric_piano.on.chosen.sae.validation."
    other = f"metrics/steer/{ss.MODEL}.json:concepts.electric_piano.on.methods.sae.success"
    return {
        "Experiment": name, "State": state, other: 0.9, "seed": 20.0,
        within: "True" if numbers["distance"] <= 0.2 else False,
        **{head + k: v for k, v in numbers.items()},
    }  # fmt: skip


def test_finished_experiments_stand_in_order_with_what_they_cost(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    found = ss.table([
        {"Experiment": None, "State": None},
        record("search-guidance", distance=0.3),
        record("search-closed-loop", "Queued"),
        record("search-base", success_choosing=0.75),
        record("search-32-latents", distance=0.25, success_choosing=""),
        record("another"),
    ])  # fmt: skip
    assert found["experiment"].tolist() == ["search-base", "search-32-latents", "search-guidance"]
    assert found["concept"].unique().tolist() == ["electric_piano"]
    assert found["direction"].unique().tolist() == ["on"]
    assert found["within_budget"].tolist() == [True, False, False]
    assert found["success"].tolist()[0] == 0.75
    assert found["success"].isna().tolist() == [False, True, False]
    assert "search-closed-loop is Queued" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no finished experiment"):
        ss.table([])


def test_the_experiments_change_one_thing_each():
    changed = list(ss.CHANGES.values())
    assert len(set(changed)) == len(changed)
    assert [len(keys) for keys in changed] == [0] + [1] * (len(changed) - 1)


def test_a_table_that_git_does_not_hold_is_not_replaced(tmp_path, monkeypatch):
    path = tmp_path / ss.RESULT
    path.parent.mkdir()
    path.write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["steering_search", "--write"])
    monkeypatch.setattr(ss.dvc.api, "exp_show", lambda revs: [])
    monkeypatch.setattr(ss, "table", lambda records: pd.DataFrame({"experiment": ["a"]}))
    with pytest.raises(SystemExit, match="says what Git does not hold: commit it"):
        ss.main()
    assert path.read_text() == "mine"
    own = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "a table"]):
        subprocess.run(["git", *own, *command], check=True)
    ss.main()
    assert path.read_text() == "experiment\na\n"
