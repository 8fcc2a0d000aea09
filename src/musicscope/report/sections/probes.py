"""Instrument probes on SAE codes and on every other representation."""

from __future__ import annotations

from musicscope.report.elements import Figure, Section, Table
from musicscope.report.metrics import Sources, Tree, cell, get, missing, plain, read

REPRESENTATIONS = (
    ("SAE", "sae"), ("activations", "dense"), ("log-mel", "logmel"), ("codec", "codec"),
    ("trivial cues", "trivial"), ("shuffled labels", "shuffled"),
)  # fmt: skip
DRAWN = "guitar"
"""The concept of plots/probe/."""


def section(sources: Sources) -> Section:
    """Concepts in SAE space."""
    figures, tables, absent = [], [], []
    for model in sources.models:
        for slot in sources.slots:
            if (found := sources.metrics(f"probe/{model}-{slot}")) is None:
                absent.append(missing(f"probe/{model}-{slot}", "probe"))
                continue
            tables.append(_table(f"{model} {slot}", found))
            if slot == sources.slots[0]:
                figures.append(_figure(sources, model, slot, found))
    content = {"figures": figures, "tables": tables}
    return Section("probes", "Concepts in SAE space", content, tuple(absent))


def _figure(sources: Sources, model: str, slot: str, found: Tree) -> Figure | str:
    numbers = (
        (label, read(found, f"concepts.{DRAWN}.{key}.test.auroc")) for label, key in REPRESENTATIONS
    )
    words = ", ".join(f"{label} {plain(number.value)}" for label, number in numbers)
    return sources.figure(
        f"probe/{model}-{slot}",
        f"{model} {slot}, {DRAWN}. AUROC on test compositions: {words}",
        f"{model} {slot}, {DRAWN}: 95 % bootstrap over compositions. Dashed: chance.",
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
    columns += ("SAE, held-out soundfont", "SAE, matched pairs (accuracy)")
    return Table(f"{name}: AUROC by representation", columns, tuple(rows))
