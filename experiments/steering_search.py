"""The search for a way to steer, as DVC experiments: one thing changed at a time.

python -m experiments.steering_search --queue            queue them; then: dvc exp run --run-all
python -m experiments.steering_search --write [REV ...]  write experiments/steering_search.csv,
                                                         if Git holds what it says now

Everything is judged on validation prompts, by the choice that the stage `steer` itself would make
within its budget of quality; test prompts are not looked at (two a cell, for the stage must run).
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import dvc.api
import pandas as pd

from benchmarks.records import held_by_git
from musicscope.core.command_line import Parser, run_program
from musicscope.core.io import write_text

RESULT = "experiments/steering_search.csv"
MODEL = "nano-small"
COMMON = (
    "steer.pairs=[]", "steer.validation_prompts=24", "steer.n_prompts=2", "steer.examples=0",
    "steer.direction_strengths=[0.25,1.0]", "steer.strengths=[0.5,1.0,2.0]",
    "steer.both_sides=never",
)  # fmt: skip
CHANGES = {
    "search-base": (),
    "search-32-latents": ("steer.n_features=[32]",),
    "search-both-rows": ("steer.branches=[both]",),
    "search-guidance": ("steer.branches=[guidance]",),
    "search-closed-loop": ("steer.loops=[closed]",),
    "search-mean-target": ("steer.target=mean",),
    "search-both-sides": ("steer.both_sides=always",),
    "search-second-layer": ("steer.slot=top2",),
}
"""Experiment -> what it changes; the base edits 8 latents of layer 1 on the captioned rows."""
KEPT = ("success_choosing", "change", "ce_cost", "distance")


def queue() -> None:
    """Queue all experiments of `CHANGES`."""
    for name, changed in CHANGES.items():
        sets = [word for key in (*COMMON, *changed) for word in ("-S", key)]
        target = f"steer@{MODEL}"
        subprocess.run(
            ["dvc", "exp", "run", "--queue", "-s", "-n", name, *sets, target], check=True
        )


def rows_of(name: str, record: Mapping[str, Any]) -> list[dict]:
    """One row a concept and direction of an experiment as `dvc.api.exp_show` gives it."""
    head, tail = f"metrics/steer/{MODEL}.json:concepts.", ".chosen.sae.validation.success_choosing"
    rows = []
    for key in record:
        if key.startswith(head) and key.endswith(tail):
            wish = key.removeprefix(head).removesuffix(tail)
            concept, direction = wish.rsplit(".", 1)
            chosen = f"{head}{wish}.chosen.sae"
            found = {k: _number(record[f"{chosen}.validation.{k}"]) for k in KEPT}
            within = str(record[f"{chosen}.within_budget"]).lower() == "true"
            at = {"experiment": name, "concept": concept, "direction": direction}
            success = {"success": found.pop("success_choosing")}
            rows.append({**at, **success, **found, "within_budget": within})
    return rows


def _number(value: Any) -> float:
    """DVC gives what a JSON file holds, or text."""
    return math.nan if value in (None, "", "-") else float(value)


def table(records: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The finished experiments of `CHANGES`; a queued one shows its parent's metrics, and stays out
    with a word to stderr."""
    rows: list[dict] = []
    for record in records:
        name = record.get("Experiment")
        if name not in CHANGES:
            continue
        if str(record.get("State", "")).lower() in ("queued", "running", "failed"):
            print(f"{name} is {record['State']}: left out", file=sys.stderr)
            continue
        rows += rows_of(name, record)
    found = pd.DataFrame(rows)
    if found.empty:
        sys.exit("no finished experiment: --queue, then dvc exp run --run-all")
    order = {name: i for i, name in enumerate(CHANGES)}
    return found.sort_values("experiment", key=lambda names: names.map(order), kind="stable")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queue", action="store_true", help="queue the experiments")
    parser.add_argument("--write", metavar="REV", nargs="*",
                        help=f"write {RESULT} from experiments on these commits; HEAD")  # fmt: skip
    args = parser.parse_args()
    if args.queue == (args.write is not None):
        parser.error("give --queue or --write")
    if args.queue:
        queue()
        return
    if os.path.lexists(RESULT) and not held_by_git(Path(RESULT), Path(RESULT).read_bytes()):
        sys.exit(f"{RESULT} says what Git does not hold: commit it, or move it away")
    found = table(dvc.api.exp_show(revs=args.write or ["HEAD"]))
    write_text(RESULT, found.to_csv(index=False, float_format="%.4g"))
    print(f"{RESULT}: {found['experiment'].nunique()} of {len(CHANGES)} experiments")


if __name__ == "__main__":
    run_program(main)
