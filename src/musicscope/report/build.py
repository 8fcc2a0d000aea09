"""The report: one self-contained page out of everything that the line has made so far.

`SECTIONS` is the order of the page. A new part of the line adds one builder, which takes the
`Sources` and returns a `Section`, in a module of its own; None for a part that the page does well
without.
"""

from __future__ import annotations

from musicscope.report.cards import SORT_KEYS, cards
from musicscope.report.found import found_section
from musicscope.report.html import page
from musicscope.report.judges import judges_section
from musicscope.report.metrics import Sources
from musicscope.report.parts import Note, Section
from musicscope.report.results import concepts_section, data_section, layers_section, sae_section
from musicscope.report.shared import matches_section, maximised_section
from musicscope.report.steering import steering_section
from musicscope.report.usae import usae_section

SECTIONS = (
    data_section, layers_section, sae_section, concepts_section, usae_section, matches_section,
    maximised_section, judges_section, found_section, steering_section,
)  # fmt: skip
MAX_BYTES = 15_000_000

LEAD = (
    "What text-to-music models hold inside: which layers matter, which features they have, which "
    "of those the models share, and what each feature sounds like.",
    "Numbers are on test compositions unless they say otherwise. Intervals in brackets are 95 % "
    "bootstraps, over compositions where nothing else is named. Headline numbers stand beside a "
    "control: what the same procedure gives where there is nothing to find. Where an interval "
    "reaches its control, nothing is claimed.",
)
READING = (
    "Each strip is a mel spectrogram, 0 to 8 kHz from bottom to top, darker (in the dark theme "
    "lighter) where louder. The lines drawn on it are activations over the same time, each scaled "
    "to its own highest value. Top moments are of test clips, which no dictionary learned from; "
    "they are the best out of many and show a feature at its clearest, not as it usually is.",
    "Searched inputs: of each run, the one is shown whose sound activates the feature most (over "
    "several models: most in the model where it does so least). Being the best of several flatters "
    "it. The upper edge is the best real clip or more. Tokens are what was searched; sound is what "
    "a model makes of the audio that they decode to. The other searches are folded below.",
    "These features were picked for their numbers, not looked through by ear. Names of concepts "
    "are the best match among labelled instruments, and only where the corrected p says so.",
)


def features_section(sources: Sources, count: int, moments: int, seconds: float) -> Section:
    """Feature cards, or a note where match_features has not run."""
    title = "Features, to search and to hear"
    for name in ("data/features/features.parquet", "data/features/top_clips.parquet"):
        if not (sources.root / name).is_file():
            text = f"Left out: {name} is not there (stage match_features)."
            return Section("features", title, (Note(text, "missing"),))
    made = cards(sources.root, sources.models, count, moments, seconds)
    notes = [Note(text) for text in READING]
    for name in (*(f"maximize_activation/{m}" for m in sources.models), "maximize_shared"):
        if not (sources.root / "data" / name / "index.json").is_file():
            text = f"No searched inputs: data/{name} is not there (stage {name.split('/')[0]})."
            notes.append(Note(text, "missing"))
    if not made:
        notes.append(Note("No feature is live enough for a card.", "missing"))
    return Section("features", title, tuple(notes), tuple(made), SORT_KEYS)


def build(sources: Sources, count: int, moments: int, seconds: float) -> str:
    """The whole page.

    Args:
        count: most cards of each set of features.
        moments: top moments on each card.
        seconds: length of each excerpt.

    Raises:
        ValueError: the page would be over 15 MB.
    """
    sections = [made for builder in SECTIONS if (made := builder(sources)) is not None]
    sections.append(features_section(sources, count, moments, seconds))
    text = page(f"musicscope: {' and '.join(sources.models)}", LEAD, sections)
    if (size := len(text.encode())) > MAX_BYTES:
        raise ValueError(
            f"the report would have {size / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:.0f}: lower "
            "report.cards, report.moments or report.seconds in params.yaml"
        )
    return text
