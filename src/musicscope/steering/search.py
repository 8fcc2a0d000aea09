"""The evaluation of one model: search on validation prompts, then numbers on test prompts.

The search sees validation prompts only, other phrasings than the test's. Every method that has a
strength (latents, difference of means, probe; the first two also on top of the edited prompt) gets
the same search: of its settings within the budget of quality, the one that moves the judges most.
So methods meet at equal quality cost; the controls take the latents' settings.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from musicscope.core.seeding import seed_for
from musicscope.steering.conditions import (
    DIRECTIONS,
    METHODS,
    WITH_WORDS,
    Bench,
    Cell,
    Measured,
    Open,
    estimate,
    run_cells,
)
from musicscope.steering.evaluation import Scorer, fix_thresholds, outcome
from musicscope.steering.prompts import PromptSet
from musicscope.steering.recipes import Settings

Wish = tuple[str, str]
SEARCH_KEYS = (
    "change", "success", "success_ci_low", "success_ci_high", "others_change", "ce_cost", "frechet",
    "silent",
)  # fmt: skip
Choices = Mapping[tuple[str, Wish], Settings]
"""(method, wish) -> what was chosen for it."""


def parse_pair(text: str) -> tuple[Wish, ...]:
    """(("guitar", "off"), ("organ", "on")) of guitar-off+organ-on."""
    return tuple(tuple(part.rsplit("-", 1)) for part in text.split("+"))  # type: ignore[misc]


def wishes_of(section: Any) -> list[Wish]:
    return [(c, direction) for c in section.concepts for direction in ("off", "on")]


def searched(section: Any) -> tuple[str, ...]:
    """Methods with a strength."""
    return ("sae", *DIRECTIONS, *(WITH_WORDS if section.words else ()))


def joint_methods(section: Any) -> tuple[str, ...]:
    """Methods that a pair of wishes is tried with."""
    return ("sae", "diff_means", "prompt_edit", *(("sae_words",) if section.words else ()))


def prompt_set(split: str, n: int, wishes: Sequence[Wish], concepts: Sequence[str]) -> PromptSet:
    """Prompts that name what is to go; where something is to come, clear of all other concepts.

    So all wishes to switch one concept on have the same prompts, and share their plain pieces.
    """
    named = tuple(concept for concept, direction in wishes if direction == "off")
    comes = any(direction == "on" for _, direction in wishes)
    return PromptSet(split, n, named, tuple(c for c in concepts if comes and c not in named))


def grid(section: Any, method: str) -> list[Settings]:
    """All settings that are tried for a method of `searched`; beside words, which ask already,
    the first number of latents and the first branch alone."""
    numbers, branches = section.n_features, section.branches
    if method in WITH_WORDS:
        numbers, branches = numbers[:1], branches[:1]
    if WITH_WORDS.get(method, method) == "sae":
        each = (section.strengths, numbers, section.scores, branches, section.loops)
        return [Settings(*values) for values in itertools.product(*each)]
    pairs = itertools.product(section.direction_strengths, branches)
    return [Settings(strength, 0, branch=branch) for strength, branch in pairs]


def search_cells(section: Any, wish: Wish) -> dict[str, list[Cell]]:
    """Plain, plain with other noise and, by method, one cell for each of its settings, on
    validation prompts."""
    prompts = prompt_set("validation", section.validation_prompts, [wish], section.concepts)
    cells = {
        method: [Cell(prompts, method, (wish,), (s,)) for s in grid(section, method)]
        for method in searched(section)
    }
    return {"plain": [Cell(prompts)], "reseed": [Cell(prompts, "reseed")], **cells}


def test_cells(section: Any, wish: Wish, choices: Choices) -> dict[str, Cell]:
    """One cell a method on test prompts."""
    prompts = prompt_set("test", section.n_prompts, [wish], section.concepts)
    cells = {}
    for method in METHODS:
        if method in WITH_WORDS and not section.words:
            continue
        keep = section.examples if method in ("plain", "sae") else 0
        if method in ("plain", "reseed", "passthrough"):
            cells[method] = Cell(prompts, method, keep=keep)
        elif method == "prompt_edit":
            cells[method] = Cell(prompts, method, (wish,))
        else:
            settings = choices[method if (method, wish) in choices else "sae", wish]
            cells[method] = Cell(prompts, method, (wish,), (settings,), keep)
    return cells


def joint_cells(section: Any, pair: Sequence[Wish], choices: Choices) -> dict[str, Cell]:
    """Plain, every wish alone (by its concept) and all at once, on the prompts of the pair."""
    prompts = prompt_set("test", section.n_prompts, pair, section.concepts)
    # One branch at a time acts on a generation: that of the first wish.
    methods = joint_methods(section)
    branch = {m: choices[m, pair[0]].branch for m in methods if (m, pair[0]) in choices}
    cells = {"plain": Cell(prompts, keep=section.examples)}
    for wish in pair:
        settings = replace(choices["sae", wish], branch=branch["sae"])
        cells[f"alone {wish[0]}"] = Cell(prompts, "sae", (wish,), (settings,))
    for method in methods:
        settings = ()
        if method in branch:
            settings = tuple(replace(choices[method, w], branch=branch[method]) for w in pair)
        keep = section.examples if method == "sae" else 0
        cells[method] = Cell(prompts, method, tuple(pair), settings, keep)
    return cells


def within_budget(rows: pd.DataFrame, section: Any) -> pd.Series:
    """The row that moves the judges most at a cost within both budgets; the cheapest if none is.

    Costs, in budgets: |ce_cost| (a cost below 0 counts as well: music that a model finds too easy
    has lost something), and the Frechet distance from plain pieces over that of plain pieces with
    other noise.
    """
    naturalness = rows["ce_cost"].abs() / section.quality_budget
    cost = np.maximum(naturalness, rows["frechet_ratio"] / section.frechet_budget)
    allowed = rows[cost <= 1]
    if not len(allowed):
        return rows.loc[cost.fillna(np.inf).idxmin()]
    return allowed.loc[allowed["change"].fillna(-1.0).idxmax()]


def choose(table: pd.DataFrame, section: Any) -> dict[tuple[str, Wish], Settings]:
    """The settings of every method and wish from the search's table.

    The branch is one for all wishes of a method, so that concepts can be edited together: that
    with the highest mean change of the wishes' best settings. Ties go to the first.
    """
    chosen = {}
    for method, rows in table.groupby("method", sort=False):
        best = {}
        for branch, part in rows.groupby("branch", sort=False):
            picks = [
                within_budget(p, section)
                for _, p in part.groupby(["concept", "direction"], sort=False)
            ]
            best[branch] = picks
        means = {
            branch: pd.DataFrame(p)["change"].fillna(-1.0).mean() for branch, p in best.items()
        }
        for pick in best[max(means, key=means.__getitem__)]:
            chosen[method, (pick["concept"], pick["direction"])] = _settings(pick)
    return chosen


def _settings(row: Any) -> Settings:
    """The settings in a row of the search's table."""
    names = [f.name for f in fields(Settings)]
    found = {name: row[name] for name in names}
    found |= {"strength": float(row["strength"]), "n_features": int(row["n_features"])}
    return Settings(**found)


@dataclass(frozen=True)
class Result:
    """All that the report needs."""

    scorer: Scorer
    search: pd.DataFrame
    """One row a setting tried on validation prompts: concept, direction, method, the settings,
    `SEARCH_KEYS`, frechet_ratio (over reseed's), chosen. Also the response to the dose."""
    choices: Choices
    tests: Mapping[Wish, Mapping[str, Cell]]
    joints: Mapping[str, Mapping[str, Cell]]
    measured: Mapping[Cell, Measured]


def count_cells(section: Any) -> tuple[int, int]:
    """Cells of the whole evaluation, at most, and their mean number of prompts."""
    wishes, pairs = wishes_of(section), [parse_pair(p) for p in section.pairs]
    search = len(wishes) * (2 + sum(len(grid(section, m)) for m in searched(section)))
    tests = len(wishes) * (len(METHODS) - (0 if section.words else len(WITH_WORDS)))
    tests += sum(1 + len(pair) + len(joint_methods(section)) for pair in pairs)
    prompts = search * section.validation_prompts + tests * section.n_prompts
    return search + tests, round(prompts / (search + tests))


def _bar(name: str) -> Callable:
    return lambda finished, total: tqdm(finished, name, total, unit="cell", mininterval=1)


def search(
    section: Any, open_bench: Open, scratch: Path, frechet: Callable, processes: int, seed: int
) -> tuple[Scorer, pd.DataFrame, Choices]:
    """Thresholds, the table of all settings, and the choice; on validation prompts alone."""
    plans = {wish: search_cells(section, wish) for wish in wishes_of(section)}
    cells = [cell for plan in plans.values() for part in plan.values() for cell in part]
    measured = run_cells(open_bench, scratch, cells, processes, _bar("validation prompts"))
    families = tuple(open_bench().judges.families)
    plain = {wish: measured[plan["plain"][0]] for wish, plan in plans.items()}
    thresholds = fix_thresholds(
        families, {c: (plain[c, "off"], plain[c, "on"]) for c in section.concepts}
    )
    bootstrap_seed = seed_for(seed, "steer", "bootstrap")
    scorer = Scorer(families, thresholds, frechet, section.bootstrap, bootstrap_seed)
    records = []
    for wish, plan in plans.items():
        chance = outcome(scorer, plain[wish], measured[plan["reseed"][0]], *wish)["frechet"]
        for method in searched(section):
            for cell in plan[method]:
                found = outcome(scorer, plain[wish], measured[cell], *wish)
                values = {k: found[k] for k in SEARCH_KEYS}
                values["frechet_ratio"] = found["frechet"] / max(chance, 1e-12)
                at = {"concept": wish[0], "direction": wish[1], "method": method}
                records.append({**at, **asdict(cell.settings[0]), **values})
    table = pd.DataFrame(records)
    choices = choose(table, section)
    table["chosen"] = [
        choices[row["method"], (row["concept"], row["direction"])] == _settings(row)
        for _, row in table.iterrows()
    ]
    return scorer, table, choices


def run(
    section: Any, open_bench: Open, scratch: Path, frechet: Callable, processes: int, seed: int
) -> Result:
    """The whole evaluation. Cells that an earlier, killed run finished are taken from `scratch`."""
    bench: Bench = open_bench()
    ahead = estimate(bench, *count_cells(section), processes)
    print(f"{bench.model.name}: {ahead}", file=sys.stderr, flush=True)
    scorer, table, choices = search(section, open_bench, scratch, frechet, processes, seed)
    wishes = wishes_of(section)
    tests = {wish: test_cells(section, wish, choices) for wish in wishes}
    joints = {p: joint_cells(section, parse_pair(p), choices) for p in section.pairs}
    groups = (*tests.values(), *joints.values())
    cells = [cell for group in groups for cell in group.values()]
    measured = run_cells(open_bench, scratch, cells, processes, _bar("test prompts"))
    return Result(scorer, table, choices, tests, joints, measured)
