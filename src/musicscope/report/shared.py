"""The report's second half: what models share, matched features, maximised inputs.

Builders as in report_sections.py; every part is optional.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

from musicscope.report.charts import Series, line_chart
from musicscope.report.metrics import Sources, cell, get
from musicscope.report.parts import Cell, Details, Figure, Group, Note, Section, Table, plain


def matches_section(sources: Sources) -> Section:
    """SAE against SAE of another model, SAE against USAE, named sets, aligned concepts."""
    found = sources.metrics("match_features")
    title = "Which features match"
    if found is None:
        return Section("matches", title, (sources.missing("match_features", "match_features"),))
    limit = plain(get(found, "threshold"), 2)
    parts: list[Any] = [
        Note(
            "Features of one model's SAE are paired one to one with those of the other by the "
            "correlation of their activations on the same frames: pairs are chosen on validation "
            f"and scored on test. A pair counts as a match above {limit}, for cosines as well."
        ),
        _between(sources, found),
    ]
    if charts := _correlation_charts(sources, found):
        parts.append(Group(charts))
    parts += [_decoders(sources, found), _sets(sources, found)]
    if (concepts := _aligned(found)) is not None:
        parts.append(Details("Features aligned with a concept", (concepts,)))
    return Section("matches", title, tuple(parts))


def _between(sources: Sources, found: dict[str, Any]) -> Table:
    measures = (
        ("share matched, but not by the place in the clip", "musical_{}", "musical"),
        ("share matched at all", "matched_{}", "matched"),
        ("the same in the held-out soundfont", "heldout_font_matched_{}", ""),
    )
    rows = []
    for a, b in combinations(sources.models, 2):
        entry = (get(found, "sae_sae") or {}).get(f"{a}_{b}")
        for model, other in ((a, b), (b, a)):
            seeds = (get(found, "seeds") or {}).get(model)
            for label, key, ceiling in measures:
                key = key.format(model)
                rows.append((
                    f"{model} in {other}: {label}", cell(entry, key), cell(entry, f"null_{key}"),
                    cell(seeds, ceiling), cell(seeds, f"null_{ceiling}"),
                ))  # fmt: skip
        rows.append((f"{a} and {b}: mean correlation of pairs", cell(entry, "mean"),
                     cell(entry, "null_mean"), "", ""))  # fmt: skip
    for model in sources.models:
        seeds = (get(found, "seeds") or {}).get(model)
        rows.append((f"two seeds of {model}: mean correlation of pairs", "", "",
                     cell(seeds, "mean"), cell(seeds, "null_mean")))  # fmt: skip
    return Table(
        "SAE against SAE of another model, by correlation",
        ("", "between models", "null", "ceiling: another seed", "null of the ceiling"),
        tuple(rows),
        "Null: the same procedure with one model's clips re-paired to other compositions, frame t "
        "staying frame t. A pair that stays matched when its own clips are re-paired so follows "
        "the place in the clip; the first share leaves such pairs out. Ceiling: two seeds of the "
        "same model's SAE; a share can exceed it where the other model has more features to pair "
        "with. Shares are of all features, dead ones included; intervals resample test "
        "compositions. Not shown: that matched features are used alike, only that they are active "
        "at the same moments.",
    )


def _correlation_charts(sources: Sources, found: dict[str, Any]) -> tuple[Figure, ...]:
    table = sources.plot("match_features/correlations")
    if table is None:
        return ()
    charts = []
    for a, b in combinations(sources.models, 2):
        part = table[table["comparison"] == f"{a}_{b}"]
        if not len(part):
            continue
        names = [("pairs", f"{a}_{b}", "share"), ("null", f"{a}_{b}", "null_share")]
        names += [(f"seeds of {model}", f"seeds_{model}", "share") for model in (a, b)]
        series = []
        for label, comparison, column in names:
            rows = table[table["comparison"] == comparison]
            if len(rows):
                above = rows[column][::-1].cumsum()[::-1]  # of the bins from here on
                series.append(Series(label, rows["low"].tolist(), above.tolist()))
        chart = line_chart(f"{a} and {b}", "correlation on test", "share of pairs above", series)
        caption = f"Pairs of {a} and {b} beside their null and the ceiling of two seeds."
        charts.append(Figure(chart, caption))
    return tuple(charts)


def _decoders(sources: Sources, found: dict[str, Any]) -> Table:
    usae = get(found, "sae_usae") or {}
    rows = tuple(
        (
            model,
            cell(usae.get(model), "matched"),
            cell(usae.get(model), "null_matched"),
            f"{plain(get(usae.get(model), 'matched_seeds_lowest'))} to "
            f"{plain(get(usae.get(model), 'matched_seeds_highest'))}",
            cell(usae.get(model), "mean"),
            cell(usae.get(model), "null_mean"),
        )
        for model in sources.models
    )
    columns = ("share of features matched", "null", "over SAE seeds", "mean cosine", "null mean")
    return Table(
        "SAE against universal SAE of the same model, by decoder cosine",
        ("model", *columns),
        rows,
        "Null: random dictionaries with the mean and covariance of the universal SAE's decoder.",
    )


def _sets(sources: Sources, found: dict[str, Any]) -> Table:
    sets = get(found, "sets") or {}
    whole = {key: Cell(plain(value)) for key, value in sets.items()}
    low, high = sets.get("common_low"), sets.get("common_high")
    if low is not None and high is not None:
        interval = f"[{plain(float(low), 0)}, {plain(float(high), 0)}]"
        whole["common"] = Cell(plain(sets.get("common")), interval)
    null = sets.get("null_common")
    meanings = (
        ("matched in every model, but also with clips re-paired", "positional"),
        ("matched in no other model, similar to none there, found by a second seed", "own"),
        ("the rest", "unmatched"),
        ("silent on validation or test", "silent"),
    )  # fmt: skip
    dash = Cell(plain(None))
    rows = [
        (
            "common: matched in every model, not by place",
            *(whole.get("common", dash),) * len(sources.models),
        )
    ]
    rows.append(("the same in the null", *(Cell(plain(null, 1)),) * len(sources.models)))
    for label, name in meanings:
        cells = (whole.get(f"{name}_{model}", dash) for model in sources.models)
        rows.append((f"{name}: {label}", *cells))
    return Table(
        "SAE features by set",
        ("set", *sources.models),
        tuple(rows),
        "A feature counts as a model's own only if a second SAE of that model finds it too; "
        "without that every accident of training would count. The threshold is one number for "
        "all, set beforehand.",
    )


def _aligned(found: dict[str, Any]) -> Table | None:
    concepts = get(found, "concepts")
    if not isinstance(concepts, dict):
        return None
    rows = tuple(
        (
            name.replace("_", " ", 1),
            plain(entry.get("latents")),
            plain(entry.get("tested")),
            plain(entry.get("aligned")),
            ", ".join(f"{c.replace('_', ' ')} {n}" for c, n in entry["by_concept"].items()) or "–",
        )
        for name, entry in concepts.items()
        if "by_concept" in entry
    )
    return Table(
        "Features that tell a concept at corrected p of at most .05",
        ("dictionary", "features", "tested", "aligned", "by concept"),
        rows,
        "p is corrected over all features, concepts and poolings by the permutation distribution "
        "of their maximum, labels dealt to other compositions.",
    )


VARIANTS = {
    "heard": "for the sound, under the prior",
    "prior": "for the tokens, under the prior",
    "clip": "for the tokens, under the prior, from real moments",
    "free": "for the tokens, without the prior",
}
ANCHORS = (
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
    ("log p a code: real excerpts", "log_prob_clips"),
    ("log p a code: own samples", "log_prob_samples"),
    ("log p a code: random tokens", "log_prob_random_tokens"),
)  # fmt: skip
COUNTS = ("features", "nulls", "skipped", "not_searched")


def maximised_section(sources: Sources) -> Section:
    """What searched inputs reach beside their nulls, real clips, samples and random tokens."""
    title = "What features answer to"
    runs = {model: f"maximize_activation/{model}" for model in sources.models}
    runs["all models at once"] = "maximize_shared"
    heads, missing = {}, []
    for label, name in runs.items():
        if (found := sources.metrics(name)) is None:
            missing.append(sources.missing(name, name.split("/")[0]))
        else:
            heads[label] = found.get("headline", {}) | {"nulls": _nulls(found)}
    parts = (_reached(heads), _anchors(heads)) if heads else ()
    return Section("maximised", title, (*parts, *missing))


def _nulls(found: dict[str, Any]) -> int | None:
    """How many of a run's features are nulls, which its `headline.features` leaves out."""
    features = found.get("features")
    total = get(found, "headline.features")
    return None if features is None or total is None else len(features) - round(total)


def _above(head: dict[str, Any], variant: str) -> str:
    """Whether the whole interval lies above the null's; a dash where one of them is not known."""
    low, high = head.get(f"{variant}_reached_low"), head.get(f"{variant}_null_reached_high")
    return plain(None) if low is None or high is None else "yes" if low > high else "no"


def _reached(heads: dict[str, dict[str, Any]]) -> Table:
    """A row for each run and search: what it reached beside its null and its start."""
    columns = (
        "{}_reached", "{}_null_reached", "{}_start", "{}_other_features",
        "{}_reached_weakest_model", "{}_beats_best_clip", "{}_sound", "{}_log_prob",
    )  # fmt: skip
    rows = []
    for label, head in heads.items():
        for variant, text in VARIANTS.items():
            if f"{variant}_reached" in head:
                reached, null, *rest = (cell(head, key.format(variant), 2) for key in columns)
                rows.append((f"{label}: {text}", reached, null, _above(head, variant), *rest))
        if "transfer" in head:
            dashes = (plain(None),) * 4
            other = ("in the other models", "transfer", "transfer_other_features")
            for where, key, others in (("in that model", "alone_reached", ""), other):
                rows.append((
                    f"{label}: for the sound in one model alone, {where}", cell(head, key, 2),
                    *dashes[:3], cell(head, others, 2), *dashes,
                ))  # fmt: skip
    names = ("reached", "null", "interval above the null's", "where the search began",
             "other features, same input", "in the weakest model",
             "share above the best clip", "sound of what was found",
             "log p a code")  # fmt: skip
    return Table(
        "Searched token sequences, in units of each feature's best real clip",
        ("searched", *names),
        tuple(rows),
        "1 is what the best real clip reaches, with up to its whole past as context; searched "
        "pieces are short and have none. A search for the tokens is judged by the tokens, and the "
        "column sound tells what is left when a model hears them as audio; a search for the sound "
        "is judged by that. Means over features; intervals resample features, and are rough where "
        "there are few (numbers below). Null: "
        "the same search for random directions, or, over all models at once, for pairs of "
        "unrelated features; both can be raised as well, so only what exceeds them tells of a "
        "feature. Searches from real moments and without the prior have no null, and nothing is "
        "claimed of them. An input that moves the other features as much is not particular to the "
        "feature. A high value does not show that the input is music: compare log p with the "
        "table below, and listen.",
    )


def _anchors(heads: dict[str, dict[str, Any]]) -> Table:
    """What the same features do on inputs that nobody searched for."""
    rows = tuple(
        (label, *(plain(head.get(key), 0) if key in COUNTS else cell(head, key, 2)
                  for head in heads.values()))
        for label, key in ANCHORS
        if any(key in head for head in heads.values())
    )  # fmt: skip
    return Table(
        "Controls: the same features on inputs that were not searched for",
        ("", *heads),
        rows,
        "Means over features, in the same unit. Excerpts, samples and random tokens are as long as "
        "the searched pieces and without a past, so the best moments may fall short of 1 there.",
    )
