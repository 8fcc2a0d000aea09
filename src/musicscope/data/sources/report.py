"""What became of a data set: what was left out and why, labels and their rule, in numbers."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from musicscope.core.audio import TRIVIAL_CUES, trivial_cues
from musicscope.core.io import read_json, write_json, write_text
from musicscope.core.seeding import seed_for
from musicscope.core.stats import auroc
from musicscope.data.clips import ClipStore, known_labels
from musicscope.data.sources.recordings import SPLITS, Scan, describe_inputs
from musicscope.data.taxonomy import FAMILIES

REPORT = "recordings.json"
NAMED = 20
"""Names per reason in the metrics; skipped.csv has all."""
CUE_CLIPS = 1000
"""Clips that the trivial cues are measured on, drawn by seed."""


def write_report(
    folder: Path, scan: Scan, problems: Sequence[Sequence[str]], counts: Mapping[str, object]
) -> None:
    """skipped.csv with every [name, reason, detail], and recordings.json for `measure`."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("name", "reason", "detail"))
    table.writerows(problems)
    write_text(folder / "skipped.csv", text.getvalue())
    named: dict[str, list[str]] = {}
    for name, reason, _ in problems:
        named.setdefault(reason, []).append(name)
    audio = {p.name: {"bytes": p.stat().st_size} for p in scan.audio.paths if p.is_file()}
    report = {
        "facts": dict(scan.facts),
        "inputs": describe_inputs(scan.inputs) | audio,
        "skipped": {r: {"count": len(n), "names": n[:NAMED]} for r, n in named.items()},
        "counts": dict(counts),
    }
    write_json(folder / REPORT, report)


def measure(store: ClipStore, seed: int) -> dict[str, Any]:
    """The stage's metrics for recordings: counts, labels and their rule, and what was left out.

    `skipped` counts everything left out, `skipped_by_reason` names the first of each kind.
    """
    rows, report = store.rows, read_json(store.folder / REPORT)
    counts = rows.groupby(["kind", "font", "split"]).size()
    labels, shares = {}, {}
    for family in FAMILIES:
        known, has = known_labels(rows, family)
        split = rows["split"].to_numpy()[known]
        labels[family] = {
            "with": int(has.sum()), "without": int((~has).sum()), "unknown": len(rows) - len(has),
            **{f"with_{s}": int(has[split == s].sum()) for s in SPLITS},
        }  # fmt: skip
        shares[family] = float(has.mean()) if len(has) else float("nan")
    at, guitar = known_labels(rows, "guitar")
    rng = np.random.default_rng(seed_for(seed, "recordings", "cues"))
    picked = np.sort(rng.permutation(len(at))[:CUE_CLIPS])
    return {
        "clips": {"-".join(key): int(n) for key, n in counts.items()},
        "groups": {s: int(n) for s, n in rows.groupby("split")["group"].nunique().items()},
        "labels": labels,
        "share_with": shares,
        "trivial_cue_auroc": {"clips": _cue_aurocs(store, at[picked], guitar[picked])},
        "skipped": sum(entry["count"] for entry in report["skipped"].values()),
        "skipped_by_reason": report["skipped"],
        "inputs": report["inputs"],
        **report["counts"],
        **report["facts"],
    }


def _cue_aurocs(store: ClipStore, at: np.ndarray, guitar: np.ndarray) -> dict[str, float]:
    """AUROC of every trivial cue for guitar against known absence."""
    if not 0 < guitar.sum() < len(guitar):
        return dict.fromkeys(TRIVIAL_CUES, float("nan"))
    cues = np.concatenate([trivial_cues(store.audio([r]), store.sample_rate) for r in at])
    return {name: auroc(cues[:, i], guitar) for i, name in enumerate(TRIVIAL_CUES)}
