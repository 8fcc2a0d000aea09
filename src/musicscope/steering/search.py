"""Search on validation data, then test: the evaluation of one model, whatever its subject.

The search sees validation samples only. Every method with settings gets the same search: of its
settings within the budgets of cost, the one that changes the judges most. So methods are compared
at equal cost. Controls take the settings of the latents.

The budgets are the rise of cross-entropy (of a model that generates) and the Frechet distance from
plain, in multiples of the distance by chance: that of other noise or, for an audio model, of the
codec if it is larger. Requests with too few samples are skipped and counted.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from musicscope.config.concepts import Steer
from musicscope.core.io import Metrics
from musicscope.core.seeding import seed_for
from musicscope.core.stats import columns
from musicscope.steering.conditions import Measurement, Open, run_conditions
from musicscope.steering.evaluation import Scorer, advantage, all_fulfilled, fix_thresholds, outcome
from musicscope.steering.methods import (
    COMPARED,
    JOINT_METHODS,
    METHODS,
    Condition,
    Request,
    Selection,
    parse_pair,
    searched_methods,
)
from musicscope.steering.recipes import DIRECTIONS, Settings, input_parts
from musicscope.steering.subjects import Subject

SEARCH_KEYS = (
    "change", "success", "success_low", "success_high", "others_change", "ce_cost", "frechet",
    "silent",
)  # fmt: skip
Choices = Mapping[tuple[str, Request], Settings]
"""(method, request) -> settings chosen on validation data."""
Conditions = Mapping[str, Condition]
"""By method; in a pair also "alone <concept>"."""


# --- plan -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Samples for each request and pair."""

    validation: Mapping[Request, Selection]
    """Both requests of every concept that can be learnt and searched."""
    tests: Mapping[Request, Selection]
    joints: Mapping[str, Selection]
    """By the name of the pair in params."""
    skipped: Mapping[str, str]
    """Request ("guitar off") or pair -> reason."""

    @property
    def concepts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(concept for concept, _ in self.tests))


def make_plan(subject: Subject, section: Steer) -> Plan:
    """Choose samples for all requests and pairs of a section, and note what must be skipped."""
    validation, tests, joints, skipped = {}, {}, {}, {}
    for concept in section.concepts:
        requests = [(concept, direction) for direction in DIRECTIONS]
        try:
            subject.check_concept(concept)
            chosen = [subject.select("validation", section.validation_prompts, [r])
                      for r in requests]  # fmt: skip
        except ValueError as error:
            skipped |= {" ".join(request): str(error) for request in requests}
            continue
        for request in requests:
            try:
                tests[request] = subject.select("test", section.n_prompts, [request])
            except ValueError as error:
                skipped[" ".join(request)] = str(error)
        if any(request in tests for request in requests):
            validation |= dict(zip(requests, chosen, strict=True))
    for pair in section.pairs:
        requests = parse_pair(pair)
        try:
            if unknown := [" ".join(r) for r in requests if r not in validation]:
                raise ValueError(f"nothing is learnt for {', '.join(unknown)}")
            joints[pair] = subject.select("test", section.n_prompts, requests)
        except ValueError as error:
            skipped[pair] = str(error)
    return Plan(validation, tests, joints, skipped)


def grid(section: Steer, method: str, guided: bool = True) -> list[Settings]:
    """List all settings to search for a method.

    With words, which ask already, only the first number of latents and the first branch are tried.
    Without guidance all branches are the same, and there are no logits for output scores.
    """
    numbers, branches = section.n_features, section.branches if guided else ("both",)
    if METHODS[method].words:
        numbers, branches = numbers[:1], branches[:1]
    if METHODS[method].edit == "latents":
        scores = section.scores if guided else input_parts(section.scores)
        each = (section.strengths, numbers, scores, branches, section.loops)
        return [Settings(*values) for values in itertools.product(*each)]
    pairs = itertools.product(section.direction_strengths, branches)
    return [Settings(strength, 0, branch=branch) for strength, branch in pairs]


def search_conditions(
    section: Steer, subject: Subject, request: Request, selection: Selection
) -> dict[str, list[Condition]]:
    """Make the validation conditions: plain, measures of chance, and one per setting."""
    conditions = {name: [Condition(selection, name)] for name in ("plain", *subject.chance)}
    for method in searched_methods(subject.methods):
        conditions[method] = [
            Condition(selection, method, (request,), (settings,))
            for settings in grid(section, method, subject.guided)
        ]
    return conditions


def test_conditions(
    section: Steer, subject: Subject, request: Request, selection: Selection, choices: Choices
) -> dict[str, Condition]:
    """Make one test condition per method; controls take the settings of the latents."""
    conditions = {}
    for name in subject.methods:
        keep = section.examples if name in ("plain", "sae") else 0
        method = METHODS[name]
        if method.has_settings:
            settings = choices.get((name, request), choices["sae", request])
            conditions[name] = Condition(selection, name, (request,), (settings,), keep)
        else:
            requests = (request,) if method.words else ()
            conditions[name] = Condition(selection, name, requests, keep=keep)
    return conditions


def joint_conditions(
    section: Steer, subject: Subject, pair: str, selection: Selection, choices: Choices
) -> dict[str, Condition]:
    """Make the conditions of a pair: plain, every request alone (by concept), all at once."""
    requests = parse_pair(pair)

    def settings_of(method: str, these: Sequence[Request]) -> tuple[Settings, ...]:
        # Only one branch can be edited: that of the first request.
        branch = choices[method, requests[0]].branch
        return tuple(replace(choices[method, request], branch=branch) for request in these)

    conditions = {"plain": Condition(selection, keep=section.examples)}
    for request in requests:
        settings = settings_of("sae", (request,))
        conditions[f"alone {request[0]}"] = Condition(selection, "sae", (request,), settings)
    for method in joint_methods(subject):
        settings = settings_of(method, requests) if METHODS[method].has_settings else ()
        keep = section.examples if method == "sae" else 0
        conditions[method] = Condition(selection, method, requests, settings, keep)
    return conditions


def joint_methods(subject: Subject) -> list[str]:
    """Methods that pairs of requests are tested with."""
    return [method for method in JOINT_METHODS if method in subject.methods]


# --- search -----------------------------------------------------------------------------------


def within_budget(rows: pd.DataFrame, section: Steer) -> pd.Series:
    """Return the row that changes the judges most within both budgets; the cheapest if none is.

    Costs, in budgets: |ce_cost| (a cost below 0 counts too: music that a model predicts too easily
    has lost something), and the Frechet distance from plain over the distance by chance.
    """
    naturalness = rows["ce_cost"].abs() / section.quality_budget
    cost = np.maximum(naturalness, rows["frechet_ratio"] / section.frechet_budget)
    allowed = rows[cost <= 1]
    if not len(allowed):
        return rows.loc[cost.fillna(np.inf).idxmin()]
    return allowed.loc[allowed["change"].fillna(-1.0).idxmax()]


def choose(table: pd.DataFrame, section: Steer) -> dict[tuple[str, Request], Settings]:
    """Choose settings for every method and request from the table of the search.

    A method has one branch for all requests, so that concepts can be edited together: the branch
    with the highest mean change at the best settings per request. Ties go to the first.
    """
    if "spectral_cost" in table:  # an audio model: there is no cross-entropy to keep within budget
        table = table.assign(ce_cost=0.0)
    chosen: Choices = {}
    for method, rows in table.groupby("method", sort=False):
        best = {}
        for branch, part in rows.groupby("branch", sort=False):
            each = part.groupby(["concept", "direction"], sort=False)
            best[branch] = [within_budget(own, section) for _, own in each]
        means = {
            branch: pd.DataFrame(p)["change"].fillna(-1.0).mean() for branch, p in best.items()
        }
        for row in best[max(means, key=means.__getitem__)]:
            chosen[str(method), (row["concept"], row["direction"])] = _settings(row)
    return chosen


def _settings(row: Mapping | pd.Series) -> Settings:
    """Read the settings in a row of the search table."""
    values = {field.name: row[field.name] for field in fields(Settings)}
    values |= {"strength": float(row["strength"]), "n_features": int(row["n_features"])}
    return Settings(**values)


def search(
    section: Steer, plan: Plan, open_context: Open, scratch: Path, frechet: Callable,
    processes: int, seed: int,
) -> tuple[Scorer, pd.DataFrame, Choices]:  # fmt: skip
    """Fix thresholds, score all settings and choose, on validation data alone."""
    context = open_context()
    subject, families = context.subject, tuple(context.judges.families)
    conditions = {
        request: search_conditions(section, subject, request, selection)
        for request, selection in plan.validation.items()
    }
    flat = [c for own in conditions.values() for part in own.values() for c in part]
    title = f"validation {subject.noun}"
    measured = run_conditions(open_context, scratch, flat, processes, _progress(title))
    plain = {request: measured[own["plain"][0]] for request, own in conditions.items()}
    thresholds = fix_thresholds(
        families, {c: (plain[c, "off"], plain[c, "on"]) for c in plan.concepts}
    )
    scorer = Scorer(
        families, thresholds, frechet, section.bootstrap, seed_for(seed, "steer", "bootstrap")
    )
    rows = []
    for request, own in conditions.items():
        chance = np.fmax.reduce([
            outcome(scorer, plain[request], measured[own[name][0]], *request)["frechet"]
            for name in subject.chance
        ])  # fmt: skip
        for method in searched_methods(subject.methods):
            for condition in own[method]:
                scores = columns(outcome(scorer, plain[request], measured[condition], *request))
                kept = (k for k in (*SEARCH_KEYS, "spectral_cost") if k in scores)
                at = {"concept": request[0], "direction": request[1], "method": method}
                rows.append({
                    **at, **asdict(condition.settings[0]), **{k: scores[k] for k in kept},
                    "frechet_ratio": scores["frechet"] / np.maximum(chance, 1e-12),
                })  # fmt: skip
    table = pd.DataFrame(rows)
    choices = choose(table, section)
    table["chosen"] = [
        choices[row["method"], (row["concept"], row["direction"])] == _settings(row) for row in rows
    ]
    return scorer, table, choices


def _progress(title: str) -> Callable[[Iterator[Measurement], int], Iterable[Measurement]]:
    return lambda done, total: tqdm(done, title, total, unit="condition", mininterval=1)


# --- test -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """Everything that the report needs. Outcomes are computed once, when first read."""

    plan: Plan
    scorer: Scorer
    search: pd.DataFrame
    """One row per setting on validation data: concept, direction, method, the settings,
    `SEARCH_KEYS`, frechet_ratio, chosen. Also the dose response."""
    choices: Choices
    tests: Mapping[Request, Conditions]
    joints: Mapping[str, Conditions]
    measured: Mapping[Condition, Measurement]

    @cached_property
    def outcomes(self) -> dict[tuple[str, str, Request], Metrics]:
        """`evaluation.outcome` on test data by edit ("guitar off" or the pair), method, request."""
        table = {}
        for edit, conditions in self.edits.items():
            for method, condition in conditions.items():
                if method == "plain":
                    continue  # against itself there is no change
                for request in condition.requests or self.requests_of(edit):
                    table[edit, method, request] = outcome(
                        self.scorer, self.of(edit, "plain"), self.of(edit, method), *request
                    )
        return table

    @property
    def edits(self) -> dict[str, Conditions]:
        """Conditions by edit: "guitar off", then pairs."""
        return {" ".join(request): c for request, c in self.tests.items()} | dict(self.joints)

    def requests_of(self, edit: str) -> tuple[Request, ...]:
        """Requests that an edit fulfils."""
        return parse_pair(edit if edit in self.joints else "-".join(edit.rsplit(" ", 1)))

    def of(self, edit: str, method: str) -> Measurement:
        """Measurement of a method on the samples of an edit."""
        return self.measured[self.edits[edit][method]]

    def advantages(self, request: Request) -> dict[str, dict[str, dict[str, object]]]:
        """{"sae_minus": {method: success of sae minus success of the method}} as in COMPARED."""
        edit = " ".join(request)
        return {
            f"{ours}_minus": {
                other: advantage(
                    self.scorer, self.of(edit, "plain"), self.of(edit, ours), self.of(edit, other),
                    *request,
                )
                for other in others if other in self.tests[request]
            }
            for ours, others in COMPARED.items() if ours in self.tests[request]
        }  # fmt: skip

    def all_fulfilled(self, pair: str, method: str) -> dict[str, object]:
        """Share of samples with all requests of a pair fulfilled, before and after."""
        plain, steered = self.of(pair, "plain"), self.of(pair, method)
        return all_fulfilled(self.scorer, plain, steered, self.requests_of(pair))


def run(
    section: Steer, open_context: Open, scratch: Path, frechet: Callable, processes: int, seed: int
) -> Result:
    """Run the whole evaluation; conditions that a killed run finished are read from `scratch`."""
    context = open_context()
    subject, name = context.subject, context.model.name
    plan = make_plan(subject, section)
    for edit, reason in plan.skipped.items():
        print(f"{name}: {edit} is left out: {reason}", file=sys.stderr, flush=True)
    scorer, table, choices = search(section, plan, open_context, scratch, frechet, processes, seed)
    tests = {r: test_conditions(section, subject, r, s, choices) for r, s in plan.tests.items()}
    joints = {p: joint_conditions(section, subject, p, s, choices) for p, s in plan.joints.items()}
    flat = [c for own in (*tests.values(), *joints.values()) for c in own.values()]
    title = f"test {subject.noun}"
    measured = run_conditions(open_context, scratch, flat, processes, _progress(title))
    return Result(plan, scorer, table, choices, tests, joints, measured)
