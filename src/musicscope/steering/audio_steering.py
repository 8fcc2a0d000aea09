"""The evaluation of one audio model: search on validation clips, then numbers on test clips.

As `steering_run`, with clips for prompts. Clips are split by group, so no composition is in both.
Cost has one budget, that of the Frechet distance, in multiples of the larger of two: what other
noise gives, and what the codec gives (the clips themselves from their reconstructions). An export
without noise has only the second. What has too few clips is left out, counted and named.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from musicscope.core.seeding import seed_for
from musicscope.data.clips import known_labels, main_clips
from musicscope.steering.audio_cells import METHODS, candidates, estimate, measure
from musicscope.steering.conditions import DIRECTIONS, Cell, Open, run_cells
from musicscope.steering.evaluation import Scorer, fix_thresholds, outcome
from musicscope.steering.prompts import PromptSet
from musicscope.steering.recipes import Settings
from musicscope.steering.search import SEARCH_KEYS, Choices, Result, Wish, choose, grid, parse_pair

SEARCHED = ("sae", *DIRECTIONS)
JOINT_METHODS = ("sae", "diff_means")
LEAST = 2
"""Groups of clips that an interval needs."""


@dataclass(frozen=True)
class Plan:
    """Which clips there are for what params.steer wants."""

    validation: Mapping[Wish, PromptSet]
    """Both wishes of every concept that can be learnt and chosen for."""
    tests: Mapping[Wish, PromptSet]
    joints: Mapping[str, PromptSet]
    """By the pair as params name it."""
    skipped: Mapping[str, str]
    """Wish ("guitar off") or pair -> why it is left out."""

    @property
    def concepts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(concept for concept, _ in self.tests))


def clip_set(rows: pd.DataFrame, split: str, n: int, wishes: Sequence[Wish]) -> PromptSet:
    """Clips with all that is to go and without all that is to come: `n`, or as many as there are.

    ValueError: they are of fewer groups than an interval needs.
    """
    named, without = (
        tuple(c for c, direction in wishes if direction == side) for side in ("off", "on")
    )
    at = candidates(rows, PromptSet(split, n, named, without))
    groups = rows["group"].iloc[at].nunique()
    if groups < LEAST:
        wanted = [f"with {c}" for c in named] + [f"without {c}" for c in without]
        raise ValueError(f"{len(at)} {split} clips {' and '.join(wanted)}, of {groups} groups")
    return PromptSet(split, min(n, len(at)), named, without)


def make_plan(section: Any, rows: pd.DataFrame) -> Plan:
    """Look at the labels of `rows` (of a ClipStore) and decide what can be done."""
    validation, tests, joints, skipped = {}, {}, {}, {}
    for concept in section.concepts:
        wishes = [(concept, "off"), (concept, "on")]
        try:
            _, labels = known_labels(rows, concept, main_clips(rows, "train"))
            if not 0 < labels.sum() < len(labels):
                raise ValueError(f"{labels.sum()} of {len(labels)} train clips have {concept}")
            found = [
                clip_set(rows, "validation", section.validation_prompts, [wish]) for wish in wishes
            ]
        except ValueError as error:
            skipped |= {f"{concept} {direction}": str(error) for _, direction in wishes}
            continue
        for wish in wishes:
            try:
                tests[wish] = clip_set(rows, "test", section.n_prompts, [wish])
            except ValueError as error:
                skipped[" ".join(wish)] = str(error)
        if any(wish in tests for wish in wishes):
            validation |= dict(zip(wishes, found, strict=True))
    for pair in section.pairs:
        wishes = parse_pair(pair)
        try:
            if unknown := [" ".join(wish) for wish in wishes if wish not in validation]:
                raise ValueError(f"nothing is learnt for {', '.join(unknown)}")
            joints[pair] = clip_set(rows, "test", section.n_prompts, wishes)
        except ValueError as error:
            skipped[pair] = str(error)
    return Plan(validation, tests, joints, skipped)


# --- cells ------------------------------------------------------------------------------------


def settings_of(section: Any, method: str) -> list[Settings]:
    """All settings that are tried. Nothing is guided, so branches are all the same."""
    return list(dict.fromkeys(replace(s, branch="both") for s in grid(section, method)))


def search_cells(section: Any, plan: Plan, wish: Wish) -> dict[str, list[Cell]]:
    """Plain, its two measures of chance, and by method one cell for each of its settings."""
    clips = plan.validation[wish]
    cells = {
        method: [Cell(clips, method, (wish,), (s,)) for s in settings_of(section, method)]
        for method in SEARCHED
    }
    return {name: [Cell(clips, name)] for name in ("plain", "reseed", "original")} | cells


def test_cells(section: Any, plan: Plan, wish: Wish, choices: Choices) -> dict[str, Cell]:
    """One cell a method on test clips; random edits take the latents' settings."""
    clips, cells = plan.tests[wish], {}
    for method in METHODS:
        keep = section.examples if method in ("plain", "sae") else 0
        if method in ("plain", "original", "reseed", "passthrough"):
            cells[method] = Cell(clips, method, keep=keep)
        else:
            settings = choices[method if method in SEARCHED else "sae", wish]
            cells[method] = Cell(clips, method, (wish,), (settings,), keep)
    return cells


def joint_cells(section: Any, plan: Plan, pair: str, choices: Choices) -> dict[str, Cell]:
    """Plain, every wish alone (by its concept) and all at once, on the clips of the pair."""
    clips, wishes = plan.joints[pair], parse_pair(pair)
    cells = {"plain": Cell(clips, keep=section.examples)}
    for wish in wishes:
        cells[f"alone {wish[0]}"] = Cell(clips, "sae", (wish,), (choices["sae", wish],))
    for method in JOINT_METHODS:
        settings = tuple(choices[method, wish] for wish in wishes)
        cells[method] = Cell(
            clips, method, wishes, settings, section.examples if method == "sae" else 0
        )
    return cells


# --- running ----------------------------------------------------------------------------------


def _bar(name: str) -> Callable:
    return lambda finished, total: tqdm(finished, name, total, unit="cell", mininterval=1)


def search(
    section: Any, plan: Plan, open_bench: Open, scratch: Path, frechet: Callable, processes: int,
    seed: int,
) -> tuple[Scorer, pd.DataFrame, Choices]:  # fmt: skip
    """Thresholds, the table of all settings, and the choice; on validation clips alone."""
    plans = {wish: search_cells(section, plan, wish) for wish in plan.validation}
    cells = [cell for own in plans.values() for part in own.values() for cell in part]
    measured = run_cells(open_bench, scratch, cells, processes, _bar("validation clips"), measure)
    families = tuple(open_bench().judges.families)
    plain = {wish: measured[own["plain"][0]] for wish, own in plans.items()}
    thresholds = fix_thresholds(
        families, {c: (plain[c, "off"], plain[c, "on"]) for c in plan.concepts}
    )
    scorer = Scorer(
        families, thresholds, frechet, section.bootstrap, seed_for(seed, "steer", "bootstrap")
    )
    records = []
    for wish, own in plans.items():
        chance = np.fmax.reduce([
            outcome(scorer, plain[wish], measured[own[name][0]], *wish)["frechet"]
            for name in ("reseed", "original")
        ])  # fmt: skip
        for method in SEARCHED:
            for cell in own[method]:
                found = outcome(scorer, plain[wish], measured[cell], *wish)
                values = {k: found[k] for k in (*SEARCH_KEYS, "spectral_cost")}
                values["frechet_ratio"] = found["frechet"] / np.maximum(chance, 1e-12)
                at = {"concept": wish[0], "direction": wish[1], "method": method}
                records.append({**at, **asdict(cell.settings[0]), **values})
    table = pd.DataFrame(records)
    # There is no cross-entropy, so it is within its budget: the Frechet distance decides.
    choices = choose(table.assign(ce_cost=0.0), section)
    keys = list(asdict(next(iter(choices.values()))))
    table["chosen"] = [
        asdict(choices[row["method"], (row["concept"], row["direction"])])
        == {key: row[key] for key in keys}
        for row in records
    ]
    return scorer, table, choices


def run(
    section: Any, plan: Plan, open_bench: Open, scratch: Path, frechet: Callable, processes: int,
    seed: int,
) -> Result:  # fmt: skip
    """The whole evaluation of a plan with tests. Cells that an earlier, killed run finished are
    taken from `scratch`; numbers do not depend on `processes`."""
    bench = open_bench()
    each = 3 + sum(len(settings_of(section, m)) for m in SEARCHED)
    clips = [s.n for s in plan.validation.values()] * each
    clips += [s.n for s in plan.tests.values()] * len(METHODS)
    for pair, found in plan.joints.items():
        clips += [found.n] * (1 + len(parse_pair(pair)) + len(JOINT_METHODS))
    ahead = estimate(bench, len(clips), round(sum(clips) / len(clips)), processes)
    print(f"{bench.model.name}: {ahead}", file=sys.stderr, flush=True)
    for name, why in plan.skipped.items():
        print(f"{bench.model.name}: {name} is left out: {why}", file=sys.stderr, flush=True)
    scorer, table, choices = search(section, plan, open_bench, scratch, frechet, processes, seed)
    tests = {wish: test_cells(section, plan, wish, choices) for wish in plan.tests}
    joints = {pair: joint_cells(section, plan, pair, choices) for pair in plan.joints}
    cells = [cell for group in (*tests.values(), *joints.values()) for cell in group.values()]
    measured = run_cells(open_bench, scratch, cells, processes, _bar("test clips"), measure)
    return Result(scorer, table, choices, tests, joints, measured)
