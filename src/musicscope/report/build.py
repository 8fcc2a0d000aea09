"""The report: one self-contained page of all pipeline outputs.

`SECTIONS` is the order of the page. A new section is a module in sections/, whose `section` takes
the `Sources` and returns a `Section` (None: left out), and a template of the same name.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import jinja2

from musicscope.report.answers import Answer, answers
from musicscope.report.cards import PAGES
from musicscope.report.elements import Section
from musicscope.report.metrics import Sources
from musicscope.report.sections import (
    data,
    dictionaries,
    features,
    finder,
    gallery,
    judges,
    layers,
    matching,
    maximisation,
    probes,
    sharing,
    steering,
)

SECTIONS = (data, gallery, layers, dictionaries, probes, sharing, matching, maximisation, judges,
            finder, steering)  # fmt: skip
"""All but `features`, the last one."""
DOCS = {
    "data": "data", "gallery": "models", "layers": "pipeline", "dictionaries": "dictionaries",
    "probes": "dictionaries", "sharing": "dictionaries", "matching": "matching",
    "maximisation": "maximisation", "judges": "judges", "finder": "finder", "steering": "steering",
    "features": "matching",
}  # fmt: skip
"""Section -> page of docs/ that explains it."""
MAX_BYTES = 15_000_000
HERE = Path(__file__).parent


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def hash_of(text: str) -> str:
    """The source of an inline script or style as the page's policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def environment() -> jinja2.Environment:
    """Templates in which everything is escaped that is not markup of a template."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    found.tests["finite"] = _finite
    return found


def page(title: str, sections: Sequence[Section], first: Sequence[Answer] = ()) -> str:
    """The whole page as text: the answers `first`, then the sections, folded.

    Its policy (CSP) allows no request at all, one script and one style sheet by hash, and data:
    images and audio.

    Raises:
        ValueError: two cards or sections share an anchor.
    """
    names = [s.key for s in sections] + [card.key for s in sections for card in s.cards]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"report: these anchors appear twice: {', '.join(twice)}")
    style, script = ((HERE / f"assets/report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    policy = (
        f"default-src 'none'; img-src data:; media-src data:; style-src {hash_of(style)}; "
        f"script-src {hash_of(script)}; base-uri 'none'; form-action 'none'"
    )
    return environment().get_template("page.jinja").render(
        title=title, sections=sections, keys=set(names), policy=policy, style=style,
        script=script, answers=first, docs=DOCS, pages=PAGES,
    )  # fmt: skip


def build(sources: Sources, count: int, moments: int, seconds: float) -> str:
    """The report of all that `sources` has.

    Args:
        sources: where to read from.
        count: most cards per set of features.
        moments: real clips per card.
        seconds: length of each excerpt.

    Raises:
        ValueError: the page would be over 15 MB.
    """
    sections = [made for one in SECTIONS if (made := one.section(sources)) is not None]
    sections.append(features.section(sources, count, moments, seconds))
    text = page(f"musicscope: {' and '.join(sources.models)}", sections, answers(sources))
    if (size := len(text.encode())) > MAX_BYTES:
        raise ValueError(
            f"the report would have {size / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:.0f}: lower "
            "report.cards, report.moments or report.seconds in params.yaml"
        )
    return text
