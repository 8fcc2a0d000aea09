"""Concepts switched off and on: success and cost by method, doses, cross-talk, and music to hear.

Reads what the stage `steer_full` wrote (metrics, plots, data/steering_full/<model>/examples), or,
for models that have only that, the stage `steer`.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from musicscope.report.charts import Series, line_chart
from musicscope.report.metrics import Sources, get
from musicscope.report.parts import (
    Cell,
    Details,
    Figure,
    Group,
    Note,
    Section,
    Table,
    number,
    plain,
)
from musicscope.report.steering_players import players
from musicscope.report.steering_text import (
    CLIPS,
    CROSS_ENTROPY,
    INTRO,
    METHODS,
    ORIGINAL,
    SPECTRAL,
    Cost,
)

DOSES = ("sae", "diff_means")
LEVELS = ("prompt_edit", "reseed")  # no strength: lines beside the doses


def steering_section(sources: Sources) -> Section | None:
    """Every model's numbers and examples; None where nothing was steered."""
    runs = {model: _run(sources, model) for model in sources.models}
    if not any(found for _, found in runs.values()):
        return None
    parts: list[Any] = [Note(text) for text in INTRO]
    for model, (stage, found) in runs.items():
        if found is None:
            parts.append(sources.missing(f"steer/{model}", "steer"))
            continue
        layer = str(get(found, "layer") or "unknown").removeprefix("layers.")
        clips = _cost_of(found) is SPECTRAL
        if clips:
            parts.append(Note(CLIPS.format(model=model)))
        for edit, why in (get(found, "skipped_because") or {}).items():
            parts.append(Note(f"{model}, {edit}: left out, {why}.", "missing"))
        if clips and not _entries(found):
            continue
        what = "or more test clips" if clips else "test prompts"
        parts.append(Note(
            f"{model}: {plain(get(found, 'prompts'))} {what} for each row, pieces of "
            f"{plain(get(found, 'seconds'), 1)} s, edited at layer {layer}."
        ))  # fmt: skip
        parts += [_success(model, found), _cost(model, found)]
        if get(found, "joint"):
            parts.append(_joint(model, found["joint"], _cost_of(found)))
        parts += players(sources, stage, model)
        parts += _folded(sources, stage, model, found)
    return Section("steering", "Concepts off and on", tuple(parts))


def _run(sources: Sources, model: str) -> tuple[str, dict[str, Any] | None]:
    """The stage whose numbers to show, and these; None where there are none."""
    whole = sources.metrics(f"steer_full/{model}")
    return ("steer_full", whole) if whole else ("steer", sources.metrics(f"steer/{model}"))


def _entries(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """("guitar off", its numbers) of every concept and direction."""
    return [
        (f"{concept} {direction}", entry)
        for concept, directions in (get(found, "concepts") or {}).items()
        for direction, entry in directions.items()
    ]


def _methods(found: dict[str, Any]) -> list[str]:
    """Methods that have numbers, ours first; one that this page does not know comes last."""
    there = dict.fromkeys(m for _, entry in _entries(found) for m in entry.get("methods", {}))
    return [*(m for m in METHODS if m in there), *(m for m in there if m not in METHODS)]


def _name(method: str) -> str:
    return (METHODS | ORIGINAL).get(method, method.replace("_", " "))


def _cost_of(found: dict[str, Any]) -> Cost:
    """An audio model was steered on clips, and has no cross-entropy."""
    return SPECTRAL if get(found, "pieces") == "clips" else CROSS_ENTROPY


def _interval(entry: Any, key: str, digits: int = 2) -> Cell:
    return number(
        get(entry, key), get(entry, f"{key}_ci_low"), get(entry, f"{key}_ci_high"), digits
    )


def _success(model: str, found: dict[str, Any]) -> Table:
    methods, cost = _methods(found), _cost_of(found)
    rows = []
    for label, entry in _entries(found):
        cells = []
        for method in methods:
            numbers = entry["methods"].get(method)
            shown, value = _interval(numbers, "success"), get(numbers, "success")
            shade = None if value is None else round(9 * min(max(value, 0.0), 1.0))
            cells.append(Cell(shown.text, shown.detail, shade))
        rows.append((label, *cells, _interval(get(entry, "methods.sae"), cost.key)))
    columns = ("wish", *map(_name, methods), cost.of_features)
    return Table(
        f"{model}: success", columns, tuple(rows),
        f"{cost.note} A dash: no piece had the unwanted verdict, so there was nothing to change.",
    )  # fmt: skip


def _cost(model: str, found: dict[str, Any]) -> Details:
    cost = _cost_of(found)
    columns = {"success": "success", "change": "change of the judges",
               "others_change": "change of other families", cost.key: cost.title,
               "frechet": "Fréchet distance"}  # fmt: skip
    rows = []
    for label, entry in _entries(found):
        for method in _methods(found):
            numbers = entry["methods"].get(method)
            cells = [_interval(numbers, key, 3) for key in columns if key != "frechet"]
            cells.append(number(get(numbers, "frechet"), digits=1))
            rows.append((f"{label}: {_name(method)}", *cells))
    table = Table(
        f"{model}: what it does and what it costs", ("", *columns.values()), tuple(rows),
        "Change: of the judges' mean probability, towards the wish. Other families: mean size of "
        f"their mean changes. {cost.explained} Fréchet distance: of musicnn's embeddings from "
        "those of the plain pieces; other noise is what so few pieces give by chance.",
    )  # fmt: skip
    return Details(f"{model}: specificity and quality of every method", (table,))


def _joint(model: str, joint: dict[str, Any], cost: Cost) -> Table:
    rows = []
    for pair, entry in joint.items():
        methods = [m for m in entry if not m.startswith("alone_")]
        for method in sorted(methods, key=lambda m: [*METHODS, m].index(m)):
            numbers = entry[method]
            alone = [
                f"{concept} {plain(get(own, 'success'), 2)} "
                f"({plain(get(entry, f'alone_{concept}.success'), 2)})"
                for concept, own in numbers.items()
                if isinstance(own, dict)
            ]
            rows.append((
                f"{pair.replace('+', ', ').replace('-', ' ')}: {_name(method)}",
                _interval(numbers, "all_wanted_plain"),
                _interval(numbers, "all_wanted"),
                ", ".join(alone),
                _interval(numbers, cost.key),
                number(get(numbers, "frechet"), digits=1),
            ))  # fmt: skip
    return Table(
        f"{model}: several concepts at once",
        ("", "all wishes hold before", "and after", "success of each (features, alone)",
         cost.title, "Fréchet distance"),
        tuple(rows),
        "All wishes hold: by the families' judge, at once, on the same piece.",
    )  # fmt: skip


def _folded(sources: Sources, stage: str, model: str, found: dict[str, Any]) -> list[Details]:
    parts = []
    doses = sources.plot(f"{stage}/{model}-dose")
    if doses is not None and (charts := _doses(model, doses, found)):
        parts.append(Details(f"{model}: dose curves", (Group(charts),)))
    talk = sources.plot(f"{stage}/{model}-crosstalk")
    if talk is not None and len(talk):
        parts.append(Details(f"{model}: cross-talk", (_cross_talk(model, talk),)))
    if (gaps := _advantages(model, found)) is not None:
        parts.append(Details(f"{model}: features less every other method", (gaps,)))
    return parts


def _doses(model: str, table: pd.DataFrame, found: dict[str, Any]) -> tuple[Figure, ...]:
    """Success over strength, with the levels of test prompts; one chart a wish."""

    def values(rows: pd.DataFrame, column: str) -> list[float | None]:
        return [float(v) if math.isfinite(v) else None for v in rows[column]]

    charts = []
    for (concept, direction), rows in table.groupby(["concept", "direction"], sort=False):
        series = []
        for method in DOSES:
            own = rows[(rows["method"] == method) & (rows["strength"] > 0)]
            own = own.sort_values("strength").drop_duplicates("strength")
            series.append(Series(
                _name(method), own["strength"].tolist(), values(own, "success"),
                values(own, "success_ci_low"), values(own, "success_ci_high"),
            ))  # fmt: skip
        ends = [x for one in series for x in one.x]
        if not ends:
            continue
        for method in LEVELS:
            level = get(found, f"concepts.{concept}.{direction}.methods.{method}.success")
            if level is not None:
                span = sorted({min(ends), max(ends)})
                series.append(Series(_name(method), span, [level] * len(span)))
        chart = line_chart(
            f"{concept} {direction}", "strength", "success", series, log_x=min(ends) < max(ends)
        )
        caption = f"{model}, {concept} {direction}: success by strength, validation prompts."
        charts.append(Figure(chart, caption))
    return tuple(charts)


def _cross_talk(model: str, table: pd.DataFrame) -> Table:
    families = [c for c in table.columns if c != "edit"]
    largest = float(table[families].abs().max().max()) or 1.0
    rows = []
    for record in table.to_dict("records"):
        cells = []
        for family in families:
            value = float(record[family])
            shade = round(9 * abs(value) / largest) if math.isfinite(value) else None
            text = plain(None) if shade is None else f"{value:+.2f}".replace("-", "−")
            cells.append(Cell(text, "", shade))
        rows.append((str(record["edit"]).replace("+", ", "), *cells))
    return Table(
        f"{model}: change of every family's probability under every edit",
        ("edit", *(f.replace("_", " ") for f in families)), tuple(rows),
        "By the families' judge, mean over test prompts, features only; the deeper the shade the "
        "larger the change, up or down. Away from the wish itself these should be near 0.",
    )  # fmt: skip


def _advantages(model: str, found: dict[str, Any]) -> Table | None:
    rivals = dict.fromkeys(m for _, e in _entries(found) for m in get(e, "sae_minus") or {})
    if not rivals:
        return None
    rows = tuple(
        (label, *(_interval(get(entry, f"sae_minus.{m}"), "difference") for m in rivals))
        for label, entry in _entries(found)
    )
    return Table(
        f"{model}: success of features less that of other methods",
        ("wish", *map(_name, rivals)), rows,
        "Paired over prompts. An interval that holds 0 settles nothing.",
    )  # fmt: skip
