"""SAE against SAE of another model, SAE against universal SAE, sets of features, concepts."""

from __future__ import annotations

from itertools import combinations

from musicscope.report.elements import Cell, Figure, Section, Table
from musicscope.report.metrics import DASH, Sources, Tree, cell, get, in_words, missing, plain

MEASURES = (
    ("share matched, but not by position in the clip", "musical_{}", "musical"),
    ("share matched at all", "matched_{}", "matched"),
    ("the same in the held-out soundfont", "heldout_font_matched_{}", ""),
)
SETS = {
    "positional": "matched in every model, but also with clips re-paired",
    "own": "matched in no other model, similar to none there, found by a second seed",
    "unstable": "common or own but for this: it does not return in the other seeds",
    "unmatched": "the rest",
    "silent": "silent on validation or test",
}


def section(sources: Sources) -> Section:
    """Which features match."""
    title, found = "Which features match", sources.metrics("match_features")
    if found is None:
        absent = missing("match_features", "match_features")
        return Section("matching", title, {}, (absent,))
    content = {
        "threshold": plain(get(found, "threshold"), 2),
        "between": _between(sources.models, found),
        "correlations": _correlations(sources),
        "decoders": _decoders(sources.models, found),
        "sets": _sets(sources.models, found),
        "concepts": _concepts(found),
    }
    return Section("matching", title, content)


def _between(models: tuple[str, ...], found: Tree) -> Table:
    seeds, rows = get(found, "seeds") or {}, []
    for a, b in combinations(models, 2):
        pair = (get(found, "sae_sae") or {}).get(f"{a}_{b}")
        for model, other in ((a, b), (b, a)):
            for label, key, ceiling in MEASURES:
                key = key.format(model)
                rows.append((
                    f"{model} in {other}: {label}",
                    cell(pair, key), cell(pair, f"null_{key}"),
                    cell(seeds.get(model), ceiling), cell(seeds.get(model), f"null_{ceiling}"),
                ))  # fmt: skip
        rows.append((f"{a} and {b}: mean correlation of pairs", cell(pair, "mean"),
                     cell(pair, "null_mean"), "", ""))  # fmt: skip
    rows += [
        (f"two seeds of {model}: mean correlation of pairs", "", "",
         cell(seeds.get(model), "mean"), cell(seeds.get(model), "null_mean"))
        for model in models
    ]  # fmt: skip
    columns = ("", "between models", "null", "ceiling: another seed", "null of the ceiling")
    return Table("SAE against SAE of another model, by correlation", columns, tuple(rows))


def _correlations(sources: Sources) -> Figure | str:
    name = "match_features/correlations"
    if (table := sources.plot(name)) is None:
        return f"Left out: plots/{name}.csv is not there."
    words = [
        in_words(
            comparison.replace("_", " ", 1) if comparison.startswith("seeds_") else comparison,
            "share of pairs", "correlation on test, from", rows["low"].round(6).tolist(),
            {"pairs": rows["share"].tolist(), "null": rows["null_share"].tolist()},
        )
        for comparison in table["comparison"].unique().tolist()
        for rows in [table[table["comparison"] == comparison]]
    ]  # fmt: skip
    caption = "Pairs of SAE features beside their null and the ceiling of two seeds."
    return sources.figure(name, ". ".join(words), caption)


def _decoders(models: tuple[str, ...], found: Tree) -> Table:
    rows = []
    for model in models:
        one = (get(found, "sae_usae") or {}).get(model)
        low, high = (plain(get(one, f"matched_seeds_{end}")) for end in ("lowest", "highest"))
        rows.append((
            model, cell(one, "matched"), cell(one, "null_matched"), f"{low} to {high}",
            cell(one, "mean"), cell(one, "null_mean"),
        ))  # fmt: skip
    columns = ("share of features matched", "null", "over SAE seeds", "mean cosine", "null mean")
    caption = "SAE against universal SAE of the same model, by decoder cosine"
    return Table(caption, ("model", *columns), tuple(rows))


def _sets(models: tuple[str, ...], found: Tree) -> Table:
    sets = get(found, "sets") or {}
    common, null = cell(sets, "common", 0), Cell(plain(sets.get("null_common"), 1))
    rows = [
        ("common: matched in every model, not by position", *(common,) * len(models)),
        ("the same in the null", *(null,) * len(models)),
    ]
    rows += [
        (f"{name}: {label}", *(cell(sets, f"{name}_{m}") for m in models))
        for name, label in SETS.items()
    ]
    return Table("SAE features by set", ("set", *models), tuple(rows))


def _concepts(found: Tree) -> Table | None:
    concepts = get(found, "concepts")
    if not isinstance(concepts, dict):
        return None
    rows = tuple(
        (
            name.replace("_", " ", 1),
            *(plain(one.get(key)) for key in ("latents", "tested", "aligned")),
            ", ".join(f"{c.replace('_', ' ')} {n}" for c, n in one["by_concept"].items()) or DASH,
        )
        for name, one in concepts.items()
        if "by_concept" in one
    )
    columns = ("dictionary", "features", "tested", "aligned", "by concept")
    return Table("Features that detect a concept at corrected p of at most .05", columns, rows)
