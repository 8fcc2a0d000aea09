"""What searched inputs reach, beside nulls, real clips, samples and random tokens."""

from __future__ import annotations

from collections.abc import Mapping

from musicscope.report.elements import Section, Table
from musicscope.report.metrics import DASH, Sources, Tree, cell, get, missing, plain, read
from musicscope.report.searched import VARIANTS

REACHED = (
    ("reached", "{}_reached"), ("null", "{}_null_reached"), ("interval above that of the null", ""),
    ("start of the search", "{}_start"), ("other features, same input", "{}_other_features"),
    ("in the weakest model", "{}_reached_weakest_model"),
    ("share above the best clip", "{}_beats_best_clip"), ("sound of the result", "{}_sound"),
    ("log p per code", "{}_log_prob"),
)  # fmt: skip
CONTROLS = (
    ("features", "features"), ("directions or pairs searched as null", "nulls"),
    ("features left out: silent in real clips", "skipped"),
    ("features not searched for: no tokens to search over", "not_searched"),
    ("best clip of training", "best_train"), ("best clip of test", "best_test"),
    ("best moments cut out of their clips", "moments_max"),
    ("random real excerpts: median", "clips_q50"), ("random real excerpts: 95 %", "clips_q95"),
    ("random real excerpts: best", "clips_max"),
    ("whole test clips: median", "whole_clips_q50"), ("whole test clips: 95 %", "whole_clips_q95"),
    ("random directions on whole test clips: median", "null_whole_clips_q50"),
    ("the models' own samples: median", "samples_q50"),
    ("the models' own samples: best", "samples_max"),
    ("random tokens: median", "random_tokens_q50"),
    ("log p per code: real excerpts", "log_prob_clips"),
    ("log p per code: own samples", "log_prob_samples"),
    ("log p per code: random tokens", "log_prob_random_tokens"),
)  # fmt: skip
COUNTS = ("features", "nulls", "skipped", "not_searched")


def section(sources: Sources) -> Section:
    """Inputs that activate features most."""
    runs = {model: f"maximize_activation/{model}" for model in sources.models}
    runs["all models at once"] = "maximize_shared"
    heads, absent = {}, []
    for label, name in runs.items():
        if (found := sources.metrics(name)) is None:
            absent.append(missing(name, name.split("/")[0]))
        else:
            heads[label] = found.get("headline", {}) | {"nulls": _nulls(found)}
    tables = {"reached": _reached(heads), "controls": _controls(heads)} if heads else {}
    title = "Inputs that activate features most"
    return Section("maximisation", title, tables, tuple(absent))


def _nulls(found: Tree) -> int | None:
    """Number of nulls among a run's features; `headline.features` leaves them out."""
    features, total = found.get("features"), get(found, "headline.features")
    return None if features is None or total is None else len(features) - round(total)


def _above(head: Tree, variant: str) -> str:
    """Whether the whole interval lies above that of the null; a dash if one is not known."""
    ours, null = read(head, f"{variant}_reached"), read(head, f"{variant}_null_reached")
    return "yes" if ours.low > null.high else "no" if ours.low <= null.high else DASH


def _reached(heads: Mapping[str, Tree]) -> Table:
    """A row per run and search: the activation reached beside its null and its start."""
    rows = []
    for label, head in heads.items():
        for variant, text in VARIANTS.items():
            if f"{variant}_reached" in head:
                rows.append((f"{label}: {text}", *(
                    cell(head, key.format(variant), 2) if key else _above(head, variant)
                    for _, key in REACHED
                )))  # fmt: skip
        if "transfer" in head:
            dashes, what = (DASH,) * 4, "for the sound in one model alone"
            for where, key, others in (
                ("in that model", "alone_reached", ""),
                ("in the other models", "transfer", "transfer_other_features"),
            ):
                rows.append((f"{label}: {what}, {where}", cell(head, key, 2), *dashes[:3],
                             cell(head, others, 2), *dashes))  # fmt: skip
    return Table(
        "Searched token sequences, in units of each feature's best real clip",
        ("searched", *(name for name, _ in REACHED)),
        tuple(rows),
    )


def _controls(heads: Mapping[str, Tree]) -> Table:
    """Activations of the same features on inputs that were not searched for."""
    rows = tuple(
        (label, *(plain(head.get(key), 0) if key in COUNTS else cell(head, key, 2)
                  for head in heads.values()))
        for label, key in CONTROLS
        if any(key in head for head in heads.values())
    )  # fmt: skip
    caption = "Controls: the same features on inputs that were not searched for"
    return Table(caption, ("", *heads), rows)
