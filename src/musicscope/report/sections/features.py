"""Feature cards with a search bar."""

from __future__ import annotations

from musicscope.report.cards import cards
from musicscope.report.elements import Section
from musicscope.report.metrics import Sources
from musicscope.report.searched import runs

SORT_KEYS = (
    ("energy", "energy", True), ("firing_rate", "firing rate", True),
    ("firing_entropy", "firing entropy", True), ("cofires", "co-fires", True),
    ("match", "best match", True), ("concept_auroc", "concept AUROC", True),
    ("number", "number", False),
)  # fmt: skip
"""(key of Card.numbers, label, largest first)"""
FILES = ("features", "top_clips", "moments")


def section(sources: Sources, count: int, moments: int, seconds: float) -> Section:
    """Feature cards, or a note where match_features has not run; arguments as in `cards`."""
    title = "Features, to search and to play"
    for name in (f"data/features/{name}.parquet" for name in FILES):
        if not (sources.root / name).is_file():
            absent = f"Left out: {name} is not there (stage match_features)."
            return Section("features", title, {"cards": []}, (absent,))
    made = cards(sources, count, moments, seconds)
    absent = [
        f"No searched inputs: data/{name} is not there (stage {name.split('/')[0]})."
        for name in runs(sources.models)
        if not (sources.root / "data" / name / "index.json").is_file()
    ]
    if not made:
        absent.append("No feature is active enough for a card.")
    kinds = dict(kind for card in made for kind in card.kinds)
    content = {"cards": made, "kinds": kinds, "sort_keys": SORT_KEYS}
    return Section("features", title, content, tuple(absent))
