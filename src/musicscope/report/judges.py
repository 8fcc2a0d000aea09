"""How far to trust the judges of generated audio: their AUROC on clips that they never heard."""

from __future__ import annotations

from typing import Any

from musicscope.report.metrics import Sources, get, scored
from musicscope.report.parts import Cell, Details, Note, Section, Table, plain

JUDGES = {"family_judge": "family judge", "musicnn": "musicnn"}
SETS = {
    "timgm6mb": "clips, TimGM6mb", "fluidr3mono": "clips, FluidR3Mono", "codec": "behind the codec",
    "shuffled": "shuffled labels",
}  # fmt: skip
INTRO = (
    "Generated music is judged by two networks that share nothing with the models nor with each "
    "other: musicnn, trained on recordings with listeners' tags, and a family judge, trained on "
    "clips of both soundfonts and their codec reconstructions. Neither chooses features. Here they "
    "are tested on compositions that neither has heard. A mean over many pieces says which way "
    "music moved; one piece's verdict is rough."
)


def judges_section(sources: Sources) -> Section | None:
    """Both judges by family and set; None where they were never trained."""
    found = sources.metrics("train_judge")
    if found is None:
        return None
    shown = [(j, s) for j in JUDGES for s in SETS if get(found, f"{j}.{s}") is not None]
    means = tuple(
        (SETS[name], *(_mean(found, judge, name) for judge in JUDGES))
        for name in dict.fromkeys(name for _, name in shown)
    )
    parts: list[Any] = [
        Note(INTRO),
        Table(
            "Judges on unheard compositions (AUROC, mean over families)",
            ("set", *JUDGES.values()),
            (*means, *_pairs(found)),
            "Shuffled labels are the null: .5. Behind the codec is where generated music is. Pairs "
            "are two renderings of one piece that differ by the guitar alone: how often the one "
            "with it gets the higher score.",
        ),
        Details("By family, and across soundfonts", (_families(found, shown),)),
    ]
    return Section("judges", "How far to trust the judges", tuple(parts))


def _mean(found: dict[str, Any], judge: str, name: str) -> Cell:
    return Cell(plain(get(found, f"{judge}.{name}.mean_auroc")))


def _pairs(found: dict[str, Any]) -> tuple[tuple[Cell | str, ...], ...]:
    cells = [scored(found, f"{judge}.pairs", "accuracy") for judge in JUDGES]
    if all(get(found, f"{judge}.pairs") is None for judge in JUDGES):
        return ()
    return (("matched pairs, guitar: share right", *cells),)


def _families(found: dict[str, Any], shown: list[tuple[str, str]]) -> Table:
    """One row a family, one column a judge and set, then the judges of one soundfont alone."""
    across = sorted(get(found, "cross_font") or {})
    reports = [get(found, f"{judge}.{name}") for judge, name in shown]
    reports += [found["cross_font"][name] for name in across]
    families = dict.fromkeys(
        name for r in reports for name, entry in r.items() if isinstance(entry, dict)
    )
    columns = [f"{JUDGES[judge]}, {SETS[name]}" for judge, name in shown]
    columns += [f"trained on {name.replace('_to_', ', tested on ')}" for name in across]
    rows = (
        (family.replace("_", " "), *(scored(report, family) for report in reports))
        for family in families
    )
    return Table("Judges by family (AUROC)", ("family", *columns), tuple(rows))
