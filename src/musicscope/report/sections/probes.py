"""Instrument probes on SAE codes and on every other representation."""

from __future__ import annotations

import math

from musicscope.core.stats import Estimate
from musicscope.data.splits import MAIN as DRAWN
from musicscope.data.splits import main_concept
from musicscope.report.elements import Figure, Section, Table
from musicscope.report.metrics import Sources, Tree, cell, get, missing, plain, read

REPRESENTATIONS = (
    ("SAE", "sae"), ("activations", "dense"), ("log-mel", "logmel"), ("codec", "codec"),
    ("trivial cues", "trivial"), ("shuffled labels", "shuffled"),
)  # fmt: skip
TESTS = (
    ("test", "test.auroc"), ("held-out source", "heldout_source.auroc"),
    ("held-out soundfont", "heldout_font.auroc"),
    ("matched pairs (accuracy)", "pairs_mixed.accuracy"),
    ("matched pairs, held-out soundfont", "pairs_fluidr3mono.accuracy"),
)  # fmt: skip
"""Sets that no probe is fitted or chosen on -> key of a representation's number."""
LEFT_OUT = (
    ("SAE", "sae"), ("activations", "dense"), ("log-mel", "logmel"),
    ("SAE minus activations", "sae_minus_dense"), ("SAE minus log-mel", "sae_minus_logmel"),
)  # fmt: skip
GOALS = (
    ("guitar AUROC of SAE codes, test", f"concepts.{DRAWN}.sae.test.auroc", 0.85),
    ("the same, mean over families of sounds left out in turn",
     f"transfer.concepts.{DRAWN}.mean.sae", 0.75),
    ("the same minus log-mel: whole interval", f"transfer.concepts.{DRAWN}.mean.sae_minus_logmel",
     0.0),
)  # fmt: skip
"""What is measured, its key, and the value it should reach; a difference must exclude 0."""


def section(sources: Sources) -> Section:
    """Concepts in SAE space."""
    figures, tables, details, absent = [], [], [], []
    for model in sources.models:
        for slot in sources.slots:
            if (found := sources.metrics(f"probe/{model}-{slot}")) is None:
                absent.append(missing(f"probe/{model}-{slot}", "probe"))
                continue
            tables.append(_table(f"{model} {slot}", found))
            details += [_controls(f"{model} {slot}", found), *_left_out(f"{model} {slot}", found)]
            if slot == sources.slots[0]:
                figures.append(_figure(sources, model, slot, found))
    content = {"figures": figures, "tables": tables, "details": details}
    return Section("probes", "Concepts in SAE space", content, tuple(absent))


def _figure(sources: Sources, model: str, slot: str, found: Tree) -> Figure | str:
    drawn = main_concept(list(found["concepts"]))
    numbers = (
        (label, read(found, f"concepts.{drawn}.{key}.test.auroc")) for label, key in REPRESENTATIONS
    )
    words = ", ".join(f"{label} {plain(number.value)}" for label, number in numbers)
    return sources.figure(
        f"probe/{model}-{slot}",
        f"{model} {slot}, {drawn}. AUROC on test compositions: {words}",
        f"{model} {slot}, {drawn}: 95 % bootstrap over compositions. Dashed: chance.",
    )


def _table(name: str, found: Tree) -> Table:
    keys = [f"{key}.test.auroc" for _, key in REPRESENTATIONS]
    keys += ["sae.heldout_font.auroc", "sae.pairs_mixed.accuracy"]
    rows = (
        (
            concept.replace("_", " "),
            plain(get(entry, "positives.test")),
            *(cell(entry, key) for key in keys),
        )
        for concept, entry in sorted(found["concepts"].items())
    )
    columns = ("concept", "test clips with it", *(label for label, _ in REPRESENTATIONS))
    columns += ("SAE, held-out soundfont", "SAE, held-out source", "SAE, matched pairs (accuracy)")
    return Table(f"{name}: AUROC by representation", columns, tuple(rows))


def _controls(name: str, found: Tree) -> Table:
    """All representations on all test sets: the main concept, and the means over concepts."""
    drawn = main_concept(list(found["concepts"]))
    own = found["concepts"][drawn]
    rows = [
        (f"{drawn}: {label}", *(cell(own, f"{key}.{test}") for _, test in TESTS))
        for label, key in REPRESENTATIONS
    ] + [
        (f"mean over concepts: {label}",
         *(cell(found, f"mean.{test.partition('.')[0]}.{key}") for _, test in TESTS))
        for label, key in REPRESENTATIONS
        if get(found, f"mean.test.{key}") is not None
    ]  # fmt: skip
    return Table(f"{name}: test sets", ("AUROC", *(label for label, _ in TESTS)), tuple(rows))


def _left_out(name: str, found: Tree) -> list[Table]:
    """AUROC on each family of sounds that probes had not been trained on; verdicts on the goals."""
    if get(found, "transfer.concepts") is None:
        return []
    entries = sorted(get(found, "transfer.concepts").items())
    named = [("mean over concepts", get(found, "transfer.mean") or {})]
    named += [(f"{concept}: mean".replace("_", " "), entry["mean"]) for concept, entry in entries]
    guitar = get(found, f"transfer.concepts.{DRAWN}.families") or {}
    named += [(f"{DRAWN}: {family} left out", entry) for family, entry in guitar.items()]
    rows = ((label, *(cell(entry, key) for _, key in LEFT_OUT)) for label, entry in named)
    columns = ("AUROC on a family of sounds left out", *(label for label, _ in LEFT_OUT))
    judged = ((label, number.text(), target, met) for label, number, target, met in goals(found))
    return [
        Table(f"{name}: one family of sounds left out", columns, tuple(rows)),
        Table(f"{name}: goals", ("", "value", "goal", "verdict"), tuple(judged)),
    ]


def goals(found: Tree) -> list[tuple[str, Estimate, str, str]]:
    """Each of `GOALS` with its value, target and verdict."""
    rows = []
    for label, key, target in GOALS:
        number = read(found, key)
        reached = number.value >= target if target else number.low > 0
        verdict = "met" if reached else "missed" if math.isfinite(number.value) else "not measured"
        rows.append((label, number, f"≥ {target}" if target else "> 0", verdict))
    return rows
