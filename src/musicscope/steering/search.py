"""Search on validation data, then test: the evaluation of one model, whatever its subject.

The search sees validation samples only. Every method with settings tries the same number of them:
of those within the budgets of cost, the one that changes the choosing judge most is taken. Where
none is, the cheapest is, and the cell says so. Controls take the settings of the latents.

The budgets are the rise of cross-entropy (of a model that generates) and the distance from plain,
an unbiased MMD^2 of musicnn's embeddings with as many pieces on both sides. Methods are compared
along their whole curves of gain against distance (`curves`), not at the chosen settings alone.
Requests with too few samples are skipped and counted.
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
from scipy.spatial.distance import pdist

from musicscope.config.concepts import Steer
from musicscope.core.io import Metrics
from musicscope.core.mmd import GaussianKernel
from musicscope.core.progress import Bar
from musicscope.core.seeding import seed_for
from musicscope.core.stats import columns
from musicscope.steering.conditions import Measurement, Open, run_conditions
from musicscope.steering.curves import curves
from musicscope.steering.evaluation import (
    Scorer,
    advantage,
    all_fulfilled,
    fix_scales,
    fix_thresholds,
    outcome,
)
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
    "change", "gain", "success", "success_low", "success_high", "success_choosing",
    "others_change", "ce_cost", "distance", "silent", "spectral_cost",
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
    """List all settings to search for a method: per branch as many for every method.

    Directions have no other setting than strength, so they try as many strengths, at equal ratios
    from the smallest to the largest of `direction_strengths`. With words, which ask already, only
    the first number of latents and branch and every second strength are tried. Without guidance
    all branches are the same, and there are no logits for output scores.
    """
    numbers, branches = section.n_features, section.branches if guided else ("both",)
    strengths = section.strengths
    if METHODS[method].words:
        numbers, branches, strengths = numbers[:1], branches[:1], strengths[1::2] or strengths
    scores = section.scores if guided else input_parts(section.scores)
    each = (strengths, numbers, scores, branches, section.loops)
    latents = [Settings(*values) for values in itertools.product(*each)]
    if METHODS[method].edit == "latents":
        return latents
    low, high = min(section.direction_strengths), max(section.direction_strengths)
    number = len(latents) // len(branches)
    doses = np.geomspace(low, high, number).tolist() if number > 1 else [(low * high) ** 0.5]
    pairs = itertools.product(dict.fromkeys(float(f"{dose:.4g}") for dose in doses), branches)
    return [Settings(strength, 0, branch=branch) for strength, branch in pairs]


def search_conditions(
    section: Steer, subject: Subject, request: Request, selection: Selection
) -> dict[str, list[Condition]]:
    """Make the validation conditions: plain, other noise, and one per setting."""
    conditions = {name: [Condition(selection, name)] for name in ("plain", "reseed")}
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


def costs_in_budgets(rows: pd.DataFrame, section: Steer) -> pd.Series:
    """Return the larger of both costs, in budgets: above 1 is over budget; unknown is infinite.

    |ce_cost| (a cost below 0 counts too: music that a model predicts too easily has lost
    something), and the distance from plain. An audio model has no cross-entropy to keep.
    """
    ce = rows["ce_cost"].abs() / section.quality_budget
    if "spectral_cost" in rows:
        ce = ce * 0.0
        ce = ce.fillna(0.0)
    return np.maximum(ce, rows["distance"] / section.distance_budget).fillna(np.inf)


def within_budget(rows: pd.DataFrame, section: Steer) -> pd.Series:
    """Return the row within both budgets that moves the choosing judge most; else the cheapest.

    Without a judge to choose by, the strongest edit within both budgets.
    """
    cost = costs_in_budgets(rows, section)
    allowed = rows[cost <= 1]
    if not len(allowed):
        return rows.loc[cost.idxmin()]
    if allowed["change"].isna().all():
        return allowed.loc[allowed["strength"].idxmax()]
    return allowed.loc[allowed["change"].fillna(-1.0).idxmax()]


def choose(table: pd.DataFrame, section: Steer) -> dict[tuple[str, Request], Settings]:
    """Choose settings for every method and request from the table of the search.

    A method has one branch for all requests, so that concepts can be edited together: the branch
    with the highest mean change at the best settings per request. Ties go to the first.
    """
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


def fit_kernel(plains: Iterable[Measurement]) -> GaussianKernel | None:
    """Fit the kernel of the distance: bandwidth = median distance of two plain validation pieces.

    Dimensions are not scaled, as in the Kernel Audio Distance: those that are almost silent in so
    few plain pieces would outweigh all others in edited ones. None if all pieces sound the same.
    """
    values = np.concatenate([m.embeddings for m in plains]).astype(float)
    values = np.unique(values[np.isfinite(values).all(1)], axis=0)
    if len(values) < 2:
        return None
    return GaussianKernel(np.ones(values.shape[1]), float(np.median(pdist(values))))


def search(
    section: Steer, plan: Plan, open_context: Open, scratch: Path, processes: int, seed: int
) -> tuple[Scorer, pd.DataFrame, Choices, dict[Request, Metrics]]:
    """Fix thresholds, score all settings and choose, on validation data alone.

    The last value has `curves` per request.
    """
    context = open_context()
    subject, families = context.subject, tuple(context.judges.families)
    conditions = {
        request: search_conditions(section, subject, request, selection)
        for request, selection in plan.validation.items()
    }
    flat = [c for own in conditions.values() for part in own.values() for c in part]
    title = f"validation {subject.noun}"
    measured = run_conditions(open_context, scratch, flat, processes, _progress(title))
    plain, again = (
        {request: measured[own[name][0]] for request, own in conditions.items()}
        for name in ("plain", "reseed")
    )
    pairs = {c: (plain[c, "off"], plain[c, "on"]) for c in plan.concepts}
    scorer = Scorer(
        families, fix_thresholds(families, pairs), context.judges.reliability,
        fit_kernel(plain.values()), section.bootstrap, seed_for(seed, "steer", "bootstrap"),
        fix_scales(families, pairs),
    )  # fmt: skip
    rows, methods = [], searched_methods(subject.methods)
    for request, own in conditions.items():
        for method in methods:
            for condition in own[method]:
                scores = columns(
                    outcome(scorer, plain[request], measured[condition], *request, again[request])
                )
                at = {"concept": request[0], "direction": request[1], "method": method}
                kept = {k: scores[k] for k in SEARCH_KEYS if k in scores}
                rows.append({**at, **asdict(condition.settings[0]), **kept})
    table = pd.DataFrame(rows)
    choices = choose(table, section)
    table["within_budget"] = costs_in_budgets(table, section) <= 1
    table["chosen"] = [
        choices[row["method"], (row["concept"], row["direction"])] == _settings(row) for row in rows
    ]
    whole = {
        request: curves(
            scorer, plain[request],
            {m: [(c.settings[0], measured[c]) for c in own[m]] for m in methods},
            {m: choices[m, request] for m in methods}, request, section.distance_budget,
        )
        for request, own in conditions.items()
    }  # fmt: skip
    return scorer, table, choices, whole


def _progress(title: str) -> Callable[[Iterator[Measurement], int], Iterable[Measurement]]:
    return lambda done, total: Bar(done, title, total, unit="conditions")


# --- test -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """Everything that the report needs. Outcomes are computed once, when first read."""

    plan: Plan
    scorer: Scorer
    search: pd.DataFrame
    """One row per setting on validation data: concept, direction, method, the settings,
    `SEARCH_KEYS`, within_budget, chosen. Also the dose response."""
    choices: Choices
    curves: Mapping[Request, Metrics]
    """`curves.curves` on validation data"""
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
                    again = self.of(edit, "reseed") if "reseed" in conditions else None
                    table[edit, method, request] = outcome(
                        self.scorer, self.of(edit, "plain"), self.of(edit, method), *request, again
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


def run(section: Steer, open_context: Open, scratch: Path, processes: int, seed: int) -> Result:
    """Run the whole evaluation; conditions that a killed run finished are read from `scratch`."""
    context = open_context()
    subject, name = context.subject, context.model.name
    plan = make_plan(subject, section)
    for edit, reason in plan.skipped.items():
        print(f"{name}: {edit} is left out: {reason}", file=sys.stderr, flush=True)
    scorer, table, choices, whole = search(section, plan, open_context, scratch, processes, seed)
    tests = {r: test_conditions(section, subject, r, s, choices) for r, s in plan.tests.items()}
    joints = {p: joint_conditions(section, subject, p, s, choices) for p, s in plan.joints.items()}
    flat = [c for own in (*tests.values(), *joints.values()) for c in own.values()]
    title = f"test {subject.noun}"
    measured = run_conditions(open_context, scratch, flat, processes, _progress(title))
    return Result(plan, scorer, table, choices, whole, tests, joints, measured)
