"""Results of the concept finder: the best features of each concept, and their moments."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from musicscope.report.elements import Players, Section, Table
from musicscope.report.metrics import DASH, Sources, Tree, cell, get, missing, plain, short
from musicscope.report.snippets import file_moment

TOP, MOMENTS = 3, 2
"""Features of each concept in the table, and moments of the best one."""
COLUMNS = {
    "effect_size": "effect size", "auroc": "AUROC", "q": "q", "stability": "stability",
    "test_auroc": "AUROC on test", "heldout_font_auroc": "on the held-out soundfont",
    "heldout_source_auroc": "on the held-out source",
    "fires": "fires in",
}  # fmt: skip
"""Columns of features.parquet."""


def section(sources: Sources) -> Section | None:
    """Concepts found from recordings, of every model; None where the finder never ran."""
    runs = {model: sources.metrics(f"find_concept/{model}") for model in sources.models}
    if not any(runs.values()):
        return None
    models, absent = [], []
    for model, found in runs.items():
        if found is None:
            absent.append(missing(f"find_concept/{model}", "find_concept"))
            continue
        folder = sources.root / "data/find_concept" / model
        best, players = None, None
        if (folder / "features.parquet").is_file():
            table = pd.read_parquet(folder / "features.parquet")
            rows = table.groupby(["concept", "dictionary"], sort=False).head(TOP)
            best, players = _features(rows), _players(folder, rows)
        else:
            absent.append(
                f"No features to play: data/find_concept/{model} is not there (stage find_concept)."
            )
        numbers = [_numbers(model, name, concepts) for name, concepts in found.items()]
        models.append({"name": model, "numbers": numbers, "best": best, "players": players})
    return Section("finder", "Concepts found from recordings", {"models": models}, tuple(absent))


def _numbers(model: str, dictionary: str, concepts: Tree) -> Table:
    rows = []
    for concept, entry in concepts.items():
        feature = get(entry, "best.feature")
        rows.append((
            concept,
            f"{plain(get(entry, 'with'))} / {plain(get(entry, 'without'))}",
            f"{plain(get(entry, 'discoveries'))} of {plain(get(entry, 'tested'))}",
            # The number of a feature is a name: no thousands separators.
            DASH if feature is None else str(feature),
            cell(entry, "best.effect_size"),
            cell(entry, "best.auroc"),
            short(get(entry, "best.q")),
            cell(entry, "best.stability", 2),
            cell(entry, "test.best_auroc"),
            cell(entry, "test.tested_auroc"),
            cell(entry, "heldout_font.best_auroc"),
            cell(entry, "heldout_source.best_auroc"),
            _confounding(entry),
            cell(entry, "few.any_discovery", 2),
            cell(entry, "null.any_discovery", 2),
            cell(entry, "null.confounded.rms.any_discovery", 2),
            cell(entry, "null.confounded.rms.warned", 2),
        ))  # fmt: skip
    return Table(
        f"{model}, {dictionary}: concepts",
        ("concept", "recordings with / without", "features found", "best feature", "effect size",
         "AUROC", "q", "stability", "AUROC on test", "all features on test",
         "best on the held-out soundfont", "best on the held-out source", "best simple cue",
         "any found from ten recordings", "any found in the null",
         "any found between loud and quiet", "warned there"),
        tuple(rows),
    )  # fmt: skip


def _confounding(entry: Tree) -> str:
    """The cue that separates best beyond chance, its AUROC, and whether that is a warning."""
    found = get(entry, "confounding")
    if not found or found["separation"] is None:
        return DASH
    text = f"{found['worst'].replace('_', ' ')} {plain(found['separation'], 2)}"
    return f"{text}: warning" if found["warns"] else text


def _features(best: pd.DataFrame) -> Table:
    there = [name for name in COLUMNS if name in best]
    rows = (
        (
            f"{row['concept']}: {row['dictionary']} {row['feature']}",
            *(short(float(row[name]), 3) for name in there),
        )
        for row in best.to_dict("records")
    )
    return Table("Best features", ("", *(COLUMNS[name] for name in there)), tuple(rows))


def _players(folder: Path, best: pd.DataFrame) -> Players | None:
    """Moments of the best feature of each concept; files that cannot be read are left out."""
    if not (folder / "moments.parquet").is_file():
        return None
    moments, rows = pd.read_parquet(folder / "moments.parquet"), []
    columns = ["concept", "dictionary", "feature"]
    firsts = best.drop_duplicates(["concept", "dictionary"])[columns]
    for concept, dictionary, feature in firsts.itertuples(index=False):
        here = (moments["concept"] == concept) & (moments["dictionary"] == dictionary)
        own = moments[here & (moments["feature"] == feature)].sort_values("rank").head(MOMENTS)
        found = (
            file_moment(
                folder, row.file, f"moment {row.rank}",
                f"{row.recording.rsplit('/', 1)[-1]}, at {plain(float(row.seconds), 1)} s",
            )
            for row in own.itertuples(index=False)
        )  # fmt: skip
        if kept := tuple(moment for moment in found if moment is not None):
            rows.append((f"{concept}: {dictionary} {feature}", kept))
    return Players(tuple(rows)) if rows else None
