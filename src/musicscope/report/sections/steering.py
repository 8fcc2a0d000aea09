"""Concepts switched off and on: success and cost by method, dose curves, cross-talk, examples.

Reads the results of the stage `steer_full` (metrics, plots, data/steering_full/<model>/examples)
or, for models without them, of the stage `steer`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from musicscope.core.io import read_json
from musicscope.report.elements import Cell, Content, Figure, Moment, Players, Section, Table
from musicscope.report.metrics import DASH, Sources, Tree, cell, get, missing, plain
from musicscope.report.snippets import file_moment

METHODS = {
    "sae": "features", "sae_words": "features and words",
    "frozen_decoder": "features of the frozen decoder", "diff_means": "difference of means",
    "diff_means_words": "difference of means and words", "probe_direction": "probe direction",
    "prompt_edit": "prompt edit", "random_feature": "random features",
    "random_direction": "random direction", "passthrough": "passthrough", "reseed": "other noise",
}  # fmt: skip
ORIGINAL = {"original": "the clip itself"}
"""Methods of audio models alone."""
FOLDERS = {"steer": "data/steering", "steer_full": "data/steering_full"}
EXAMPLES = 2
"""Pairs of examples per request."""


@dataclass(frozen=True)
class Cost:
    """The measure of quality in a model's tables."""

    key: str
    of_features: str
    title: str


CROSS_ENTROPY = Cost("ce_cost", "quality cost of features", "rise of cross-entropy")
SPECTRAL = Cost("spectral_cost", "spectral distance of features", "spectral distance")


def section(sources: Sources) -> Section | None:
    """Concepts off and on, for every model; None where nothing was steered."""
    runs = {model: run_of(sources, model) for model in sources.models}
    if not any(found for _, found in runs.values()):
        return None
    models, absent = [], []
    for model, (stage, found) in runs.items():
        if found is None:
            absent.append(missing(f"steer/{model}", "steer"))
            continue
        skipped = get(found, "skipped_because") or {}
        absent += [f"{model}, {edit}: left out, {why}." for edit, why in skipped.items()]
        clips = _cost_of(found) is SPECTRAL
        content: dict[str, Content] = {"name": model, "clips": clips, "success": None}
        if _entries(found) or not clips:
            pairs, lost = players(sources, stage, model)
            absent += lost
            content |= _numbers(sources, stage, model, found) | {"players": pairs}
        models.append(content)
    return Section("steering", "Concepts off and on", {"models": models}, tuple(absent))


def run_of(sources: Sources, model: str) -> tuple[str, Tree | None]:
    """The stage whose results to show, and its metrics if there are any."""
    whole = sources.metrics(f"steer_full/{model}")
    return ("steer_full", whole) if whole else ("steer", sources.metrics(f"steer/{model}"))


def _numbers(sources: Sources, stage: str, model: str, found: Tree) -> dict[str, Content]:
    doses = sources.plot(f"{stage}/{model}-dose")
    talk = sources.plot(f"{stage}/{model}-crosstalk")
    return {
        "prompts": plain(get(found, "prompts")),
        "seconds": plain(get(found, "seconds"), 1),
        "layer": str(get(found, "layer") or "unknown").removeprefix("layers."),
        "success": _success(model, found),
        "curves": _curves(model, found),
        "costs": _costs(model, found),
        "joint": _joint(model, found["joint"], _cost_of(found)) if get(found, "joint") else None,
        "doses": None if doses is None else _doses(sources, stage, model, doses, found),
        "cross_talk": None if talk is None else _cross_talk(model, talk),
        "advantages": _advantages(model, found),
    }


def _entries(found: Tree) -> list[tuple[str, Tree]]:
    """("guitar off", its numbers) of every concept and direction."""
    return [
        (f"{concept} {direction}", one)
        for concept, directions in (get(found, "concepts") or {}).items()
        for direction, one in directions.items()
    ]


def _methods(found: Tree) -> list[str]:
    """Methods that have numbers, in the order of `METHODS`; unknown ones last."""
    there = dict.fromkeys(m for _, one in _entries(found) for m in one.get("methods", {}))
    return [*(m for m in METHODS if m in there), *(m for m in there if m not in METHODS)]


def _name(method: str) -> str:
    return (METHODS | ORIGINAL).get(method, method.replace("_", " "))


def _cost_of(found: Tree) -> Cost:
    """An audio model was steered on clips, and has no cross-entropy."""
    return SPECTRAL if get(found, "pieces") == "clips" else CROSS_ENTROPY


def _success(model: str, found: Tree) -> Table:
    methods, cost = _methods(found), _cost_of(found)
    rows = (
        (
            label,
            *(cell(one, f"methods.{m}.success", 2, shaded=True) for m in methods),
            cell(one, f"methods.sae.{cost.key}", 2),
        )
        for label, one in _entries(found)
    )
    columns = ("request", *map(_name, methods), cost.of_features)
    return Table(f"{model}: success", columns, tuple(rows))


def _curves(model: str, found: Tree) -> Table | None:
    """Whole curves of the searched methods, and latents against draws of random controls."""
    rows = []
    for label, one in _entries(found):
        for method, of in (get(one, "curves") or {}).items():
            if method != "area_minus":
                null = get(one, f"null.{method}")
                rows.append((
                    f"{label}: {_name(method)}", cell(of, "area", 2), cell(of, "slope", 2),
                    plain(of["smoothness"], 2), plain(of["monotone_share"], 2),
                    cell(null, "slope", 2),
                ))  # fmt: skip
        for method in ("random_feature", "random_direction"):
            if (null := get(one, f"null.{method}")) is not None:
                rows.append((f"{label}: {_name(method)}", *[DASH] * 4, cell(null, "slope", 2)))
    columns = ("", "area of gain", "dose slope", "deviation of steps", "monotone prompts",
               "slope on test prompts")  # fmt: skip
    return Table(f"{model}: whole curves", columns, tuple(rows)) if rows else None


def _costs(model: str, found: Tree) -> Table:
    cost = _cost_of(found)
    columns = {"success": "success", "success_choosing": "success by the choosing judge",
               "headline": "headline", "kept": "prompt kept", "quality": "quality",
               "others_change": "change of other families", cost.key: cost.title}  # fmt: skip
    rows = []
    for label, one in _entries(found):
        for method in _methods(found):
            numbers = one["methods"].get(method)
            cells = [cell(numbers, key) for key in columns]
            rows.append((f"{label}: {_name(method)}", *cells, cell(numbers, "distance", 2)))
    caption = f"{model}: effect and cost"
    return Table(caption, ("", *columns.values(), "distance"), tuple(rows))


def _joint(model: str, joint: Tree, cost: Cost) -> Table:
    rows = []
    for pair, of in joint.items():
        methods = [m for m in of if not m.startswith("alone_")]
        for method in sorted(methods, key=lambda m: [*METHODS, m].index(m)):
            numbers = of[method]
            single = [
                f"{concept} {plain(get(own, 'success'), 2)} "
                f"({plain(get(of, f'alone_{concept}.success'), 2)})"
                for concept, own in numbers.items()
                if isinstance(own, dict) and "success" in own
            ]
            rows.append((
                f"{pair.replace('+', ', ').replace('-', ' ')}: {_name(method)}",
                cell(numbers, "all_wanted_plain", 2), cell(numbers, "all_wanted", 2),
                ", ".join(single), cell(numbers, cost.key, 2), cell(numbers, "distance", 2),
            ))  # fmt: skip
    columns = ("", "all requests hold before", "and after", "success of each (features, alone)",
               cost.title, "distance")  # fmt: skip
    return Table(f"{model}: several concepts at once", columns, tuple(rows))


def _doses(
    sources: Sources, stage: str, model: str, table: pd.DataFrame, found: Tree
) -> Figure | str:
    """Success over strength, with controls without a strength; numbers of all panels in words."""
    words = []
    for concept, direction in table[["concept", "direction"]].drop_duplicates().to_numpy():
        rows = table[(table["concept"] == concept) & (table["direction"] == direction)]
        said = []
        for method in ("sae", "diff_means"):
            own = rows[(rows["method"] == method) & (rows["strength"] > 0)]
            own = own.sort_values("strength").drop_duplicates("strength")
            values = zip(own["strength"], own["success"], strict=True)
            said.append(f"{_name(method)}: {', '.join(f'{x:g} {plain(y)}' for x, y in values)}")
        for method in ("prompt_edit", "reseed"):
            level = get(found, f"concepts.{concept}.{direction}.methods.{method}.success")
            said += [] if level is None else [f"{_name(method)}: {plain(level['value'])}"]
        words.append(f"{concept} {direction}. success by strength. {'; '.join(said)}")
    return sources.figure(
        f"{stage}/{model}-dose",
        f"{model}: {'. '.join(words)}",
        f"{model}: success by strength on validation prompts, with controls on test prompts.",
    )


def _cross_talk(model: str, table: pd.DataFrame) -> Table:
    families = [c for c in table.columns if c != "edit"]
    largest = float(table[families].abs().max().max()) or 1.0
    rows = []
    for record in table.to_dict("records"):
        cells = []
        for value in (float(record[family]) for family in families):
            known = math.isfinite(value)
            text = f"{value:+.2f}".replace("-", "−") if known else DASH
            cells.append(Cell(text, "", round(9 * abs(value) / largest) if known else None))
        rows.append((str(record["edit"]).replace("+", ", "), *cells))
    caption = f"{model}: change of every family's probability under every edit"
    return Table(caption, ("edit", *(f.replace("_", " ") for f in families)), tuple(rows))


def _advantages(model: str, found: Tree) -> Table | None:
    rivals = dict.fromkeys(m for _, one in _entries(found) for m in get(one, "sae_minus") or {})
    if not rivals:
        return None
    rows = tuple(
        (label, *(cell(one, f"sae_minus.{m}", 2) for m in rivals)) for label, one in _entries(found)
    )
    caption = f"{model}: success of features minus success of other methods"
    return Table(caption, ("request", *map(_name, rivals)), rows)


def _verdicts(judges: Tree, side: int) -> str:
    """`guitar: family judge 0.81, musicnn 0.44` of the plain (side 0) or steered (1) example."""
    by_concept: dict[str, list[str]] = {}
    for judge, concepts in judges.items():
        for concept, values in concepts.items():
            if values[side] is not None:
                text = f"{judge.replace('_', ' ')} {plain(values[side], 2)}"
                by_concept.setdefault(concept, []).append(text)
    return "; ".join(f"{concept}: {', '.join(texts)}" for concept, texts in by_concept.items())


def _both_judged(example: Tree) -> bool:
    """Whether some judge has a verdict on the plain and on the steered sound."""
    verdicts = (values for concepts in example["judges"].values() for values in concepts.values())
    return any(None not in values for values in verdicts)


def players(
    sources: Sources, stage: str, model: str, judged: bool = False
) -> tuple[Players | None, list[str]]:
    """Plain and steered beside each other, the first `EXAMPLES` per request; and notes.

    `judged`: only examples of which both sounds have a verdict, such as none with silence.
    """
    folder = sources.root / FOLDERS[stage] / model / "examples"
    if not (folder / "index.json").is_file():
        return None, [
            f"No examples to play: {FOLDERS[stage]}/{model}/examples is not there (stage {stage})."
        ]
    rows: list[tuple[str, tuple[Moment, ...]]] = []
    seen: dict[str, int] = {}
    lost = 0
    for example in read_json(folder / "index.json")["examples"]:
        requests = ", ".join(example["wishes"])
        if seen.get(requests, 0) >= EXAMPLES or (judged and not _both_judged(example)):
            continue
        made = [
            file_moment(folder, example[kind], kind, _verdicts(example["judges"], side))
            for side, kind in enumerate(("plain", "steered"))
        ]
        if None in made:
            lost += 1
            continue
        seen[requests] = seen.get(requests, 0) + 1
        rows.append((f"{requests}: {example['prompt']}", tuple(m for m in made if m is not None)))
    notes = [f"{lost} examples of {model} could not be read."] if lost else []
    return Players(tuple(rows)) if rows else None, notes
