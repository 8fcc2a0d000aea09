"""Clips by set, trivial cues, and how well the models learned."""

from __future__ import annotations

import re

from musicscope.core.stats import Estimate
from musicscope.report.elements import Cell, Section, Table
from musicscope.report.metrics import Sources, Tree, cell, get, missing, plain, short

SETS = {
    "clips": "clips, TimGM6mb and synthesis",
    "mixed_pairs": "matched pairs, TimGM6mb and synthesis",
    "fluidr3mono_pairs": "matched pairs, FluidR3Mono",
}
TERMS = {"si sdr": "SI-SDR", "log mel": "log-mel", "auroc": "AUROC", "kl": "KL"}
VERDICTS = {True: "met", False: "not met", None: ""}


def section(sources: Sources) -> Section:
    """Data and models."""
    found = sources.metrics("prepare_data")
    runs = {model: sources.metrics(f"pretrain/{model}") for model in sources.models}
    absent = [] if found else [missing("prepare_data", "prepare_data")]
    models = []
    for model, run in runs.items():
        if rows := get(run, "rows"):
            models.append(
                {
                    "judged": _evidence(f"{model}: measured against its targets", rows, True),
                    "rest": _evidence(f"{model}: measures without a target", rows, False),
                }
            )
    if not models:
        absent.append(missing("pretrain/<model>", "pretrain"))
    content = {
        "rendered": sources.rendered,
        "cues": _cues(found) if found else None,
        "clips": _clips(found) if found else None,
        "models": models,
    }
    return Section("data", "Data and models", content, tuple(absent))


def measure_name(row: Tree) -> str:
    """Return the name of a row of evidence as words."""
    words = row["name"].replace(".", ": ").replace("_", " ")
    for plain_word, term in TERMS.items():
        words = re.sub(rf"\b{plain_word}\b", term, words)
    return words


def row_estimate(row: Tree) -> Estimate:
    """Return the number of a row of evidence with its interval; NaN where unknown."""
    return Estimate.from_dict(row["estimate"])


def target_text(row: Tree) -> str:
    """Write the target of a row of evidence; empty without one."""
    if row["target"] is None:
        return ""
    if row["direction"] == "within":
        return " to ".join(short(end, 3) for end in row["target"])
    return f"{'≥' if row['direction'] == 'at_least' else '≤'} {short(row['target'], 3)}"


def _evidence(caption: str, rows: Tree, judged: bool) -> Table | None:
    """Rows with a target (`judged`) or without one: value, target, verdict, control."""
    cells = []
    for row in rows.values():
        if (row["target"] is not None) == judged:
            found = row_estimate(row)
            ends = f"[{plain(found.low)}, {plain(found.high)}] " if found.has_interval else ""
            controls = (f"{k.replace('_', ' ')} {short(v, 3)}" for k, v in row["control"].items())
            verdict = [target_text(row), VERDICTS[row["verdict"]]] if judged else []
            cells.append((
                measure_name(row), Cell(plain(found.value), ends + found.unit), *verdict,
                Cell(", ".join(controls), row["note"]),
            ))  # fmt: skip
    columns = ("measure", "value", *(("target", "verdict") if judged else ()), "control")
    return Table(caption, columns, tuple(cells)) if cells else None


def _cues(found: Tree) -> Table:
    sets = get(found, "trivial_cue_auroc") or {}
    cues = sorted({cue for one in sets.values() for cue in one})
    return Table(
        "AUROC of single trivial cues for guitar",
        ("set", *(cue.replace("_", " ") for cue in cues)),
        tuple((SETS.get(key, key), *(cell(one, cue) for cue in cues)) for key, one in sets.items()),
    )


def _clips(found: Tree) -> Table:
    counts = dict(get(found, "clips") or {})
    counts |= {f"compositions, {k}": v for k, v in (get(found, "compositions") or {}).items()}
    rows = tuple((name, plain(count)) for name, count in counts.items())
    return Table("Clips by set", ("set", "count"), rows)
