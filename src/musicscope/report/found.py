"""What the concept finder found: the best features of each concept, and moments to hear."""

from __future__ import annotations

from typing import Any

import pandas as pd

from musicscope.report import snippets as media
from musicscope.report.metrics import Sources, get
from musicscope.report.parts import (
    Cell,
    Details,
    Moment,
    Note,
    Players,
    Section,
    Table,
    number,
    plain,
    short,
)

TOP, MOMENTS = 3, 2
"""Features of each concept in the table, and moments of the best one."""
INTRO = (
    "From recordings with a concept and without it to features that tell them apart. q is "
    "corrected for all features tested: the probability that any feature at all would look as good "
    "if there were nothing to find. Stability: the share of bootstrap draws of the recordings in "
    "which the feature is among the best 20. The last columns hold features to clips that had no "
    "part in the search, beside the mean of all features tested, and say how often ten recordings "
    "a side find anything, where there is something and where there is nothing."
)


def found_section(sources: Sources) -> Section | None:
    """The finder's numbers of every model; None where it never ran."""
    runs = {model: sources.metrics(f"find_concept/{model}") for model in sources.models}
    if not any(runs.values()):
        return None
    parts: list[Any] = [Note(INTRO)]
    for model, found in runs.items():
        if found is None:
            parts.append(sources.missing(f"find_concept/{model}", "find_concept"))
            continue
        parts += [_numbers(model, name, concepts) for name, concepts in found.items()]
        parts += _from_disk(sources, model)
    return Section("found", "Concepts found from recordings", tuple(parts))


def _index(feature: int | None) -> str:
    """A feature's number is a name: without thousands separators."""
    return plain(None) if feature is None else str(feature)


def _numbers(model: str, dictionary: str, concepts: dict[str, Any]) -> Table:
    rows = []
    for concept, entry in concepts.items():
        test = get(entry, "test") or {}
        rows.append((
            concept,
            f"{plain(get(entry, 'with'))} / {plain(get(entry, 'without'))}",
            f"{plain(get(entry, 'discoveries'))} of {plain(get(entry, 'tested'))}",
            _index(get(entry, "best.feature")),
            *(number(get(entry, f"best.{key}")) for key in ("effect_size", "auroc")),
            short(get(entry, "best.q")),
            number(get(entry, "best.stability"), digits=2),
            number(test.get("best_auroc"), test.get("best_ci_low"), test.get("best_ci_high")),
            number(test.get("tested_auroc")),
            number(get(entry, "few.any_discovery"), digits=2),
            number(get(entry, "null.any_discovery"), digits=2),
        ))  # fmt: skip
    return Table(
        f"{model}, {dictionary}: concepts",
        ("concept", "recordings with / without", "features found", "best feature", "effect size",
         "AUROC", "q", "stability", "AUROC on test", "all features on test", "found from ten",
         "found in nothing"),
        tuple(rows),
    )  # fmt: skip


def _from_disk(sources: Sources, model: str) -> list[Any]:
    """The best features of each concept, and what the best one answers to."""
    folder = sources.root / "data/find_concept" / model
    if not (folder / "features.parquet").is_file():
        text = f"No features to hear: data/find_concept/{model} is not there (stage find_concept)."
        return [Note(text, "missing")]
    table = pd.read_parquet(folder / "features.parquet")
    best = table.groupby(["concept", "dictionary"], sort=False).head(TOP)
    parts: list[Any] = [Details(f"{model}: best features of each concept", (_features(best),))]
    moments = folder / "moments.parquet"
    if moments.is_file() and (rows := _moments(sources, folder, best, pd.read_parquet(moments))):
        caption = (
            "Where the best feature of each concept is highest, one moment a recording, all at "
            "one loudness. The best of many: a feature at its clearest, not as it usually is."
        )
        players = Players(tuple(rows), caption)
        parts.append(Details(f"{model}: moments of the best feature", (players,)))
    return parts


def _features(best: pd.DataFrame) -> Table:
    columns = {"effect_size": "effect size", "auroc": "AUROC", "q": "q", "stability": "stability",
               "test_auroc": "AUROC on test", "heldout_font_auroc": "on the held-out soundfont",
               "fires": "fires in"}  # fmt: skip
    there = [name for name in columns if name in best]
    rows = []
    for row in best.to_dict("records"):
        label = f"{row['concept']}: {row['dictionary']} {row['feature']}"
        rows.append((label, *(Cell(short(float(row[name]), 3)) for name in there)))
    return Table("Best features", ("", *(columns[name] for name in there)), tuple(rows))


def _moments(
    sources: Sources, folder: Any, best: pd.DataFrame, moments: pd.DataFrame
) -> list[tuple[str, tuple[Moment, ...]]]:
    rows = []
    first = best.drop_duplicates(["concept", "dictionary"])
    for of in first.itertuples(index=False):
        here = (moments["concept"] == of.concept) & (moments["dictionary"] == of.dictionary)
        own = moments[here & (moments["feature"] == of.feature)].sort_values("rank")
        excerpts = []
        for row in own.head(MOMENTS).itertuples(index=False):
            detail = f"{row.recording.rsplit('/', 1)[-1]}, at {plain(float(row.seconds), 1)} s"
            label = f"moment {row.rank}"
            excerpts.append(media.file_moment(folder, row.file, label, detail))
        title = f"{of.concept}: {of.dictionary} {of.feature}"
        if kept := tuple(e for e in excerpts if e is not None):
            rows.append((title, kept))
    return rows
