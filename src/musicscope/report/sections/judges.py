"""How reliable the judges of generated audio are: their AUROC on clips outside their training."""

from __future__ import annotations

from musicscope.report.elements import Section, Table
from musicscope.report.metrics import Sources, Tree, cell, get

JUDGES = {
    "family_judge": "family judge", "musicnn": "musicnn",
    "other_font_judge": "classifier of the other sounds", "embedding_judge": "embedding distance",
}  # fmt: skip
SETS = {
    "mixed": "clips, TimGM6mb and synthesis", "fluidr3mono": "clips, FluidR3Mono",
    "codec_source": "before the codec", "codec": "after the codec", "shuffled": "shuffled labels",
}  # fmt: skip


def section(sources: Sources) -> Section | None:
    """All judges by family and set; None where they were never trained."""
    if (found := sources.metrics("train_judge")) is None:
        return None
    content = {"means": _means(found), "families": _families(found), "own": _own(found)}
    return Section("judges", "How reliable the judges are", content)


def _sets(found: Tree) -> list[tuple[str, str]]:
    """(judge, set) of each report."""
    return [(j, s) for j in JUDGES for s in SETS if get(found, f"{j}.{s}") is not None]


def _means(found: Tree) -> Table:
    there = [judge for judge in JUDGES if get(found, judge)]
    rows = [
        (SETS[name], *(cell(found, f"{judge}.{name}.mean_auroc") for judge in there))
        for name in dict.fromkeys(name for _, name in _sets(found))
    ]
    if any(get(found, f"{judge}.pairs") is not None for judge in there):
        cells = (cell(found, f"{judge}.pairs.accuracy") for judge in there)
        rows.append(("matched pairs, guitar: share right", *cells))
    caption = "Judges on unseen compositions (AUROC, mean over families)"
    return Table(caption, ("set", *(JUDGES[judge] for judge in there)), tuple(rows))


def _families(found: Tree) -> Table:
    """A row per family; a column per judge and set, then per pair of families of sounds."""
    named = {f"{JUDGES[j]}, {SETS[s]}": get(found, f"{j}.{s}") for j, s in _sets(found)}
    for name, report in sorted((get(found, "cross_font") or {}).items()):
        named[f"trained on {name.replace('_to_', ', tested on ')}"] = report
    families = dict.fromkeys(
        name for r in named.values() for name, entry in r.items() if isinstance(entry, dict)
    )
    rows = (
        (family.replace("_", " "), *(cell(report, f"{family}.auroc") for report in named.values()))
        for family in families
    )
    return Table("Judges by family (AUROC)", ("family", *named), tuple(rows))


def _own(found: Tree) -> Table | None:
    """A row per defined concept and judge; None without any."""
    named = {**SETS, "test": "test clips"}
    rows = [
        (
            concept.replace("_", " "), JUDGES[judge],
            *(cell(entry, f"{judge}.{name}.auroc") for name in ("test", "codec", "shuffled")),
            "yes" if judge in str(entry.get("trusted")).split(", ") else "no",
        )
        for concept, entry in (get(found, "concepts") or {}).items()
        for judge in JUDGES if judge in entry
    ]  # fmt: skip
    if not rows:
        return None
    heads = ("concept", "judge", *(named[n] for n in ("test", "codec", "shuffled")), "has a say")
    return Table("Judges of defined concepts (AUROC)", heads, tuple(rows))
