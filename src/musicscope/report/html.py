"""The report's page: tables, charts, notes and feature cards as one HTML text without a network.

Everything that is not markup made here goes through `escape`. The page's own policy (CSP) allows
no request at all, one script and one style sheet by hash, and data: images and audio.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from musicscope.report.parts import (
    Card,
    Cell,
    Details,
    Figure,
    Group,
    Moment,
    Part,
    Players,
    Section,
    Table,
)

ASSETS = Path(__file__).with_name("assets")


def _cell(cell: Cell | str, tag: str = "td") -> str:
    cell = Cell(cell) if isinstance(cell, str) else cell
    classes = "" if cell.shade is None else f' class="shade-{cell.shade}"'
    scope = ' scope="row"' if tag == "th" else ""
    detail = f"<small>{escape(cell.detail)}</small>" if cell.detail else ""
    return f"<{tag}{scope}{classes}>{escape(cell.text)}{detail}</{tag}>"


def _grid(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    body = "".join(
        f"<tr>{_cell(row[0], 'th')}{''.join(map(_cell, row[1:]))}</tr>\n" for row in table.rows
    )
    return (
        f"<table><caption>{escape(table.caption)}</caption><thead><tr>{head}</tr></thead>\n"
        f"<tbody>{body}</tbody></table>"
    )


def _table(table: Table) -> str:
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    # The frame scrolls sideways on a narrow page, so the keyboard must be able to reach it.
    return (
        f'<div class="table"><div class="scroll" role="region" tabindex="0" '
        f'aria-label="{escape(table.caption)}">{_grid(table)}</div>{note}</div>'
    )


def _part(part: Part) -> str:
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Figure):
        return f"<figure>{part.svg}<figcaption>{escape(part.caption)}</figcaption></figure>"
    if isinstance(part, Group):
        return f'<div class="group">{"".join(map(_part, part.parts))}</div>'
    if isinstance(part, Details):
        inside = "".join(map(_part, part.parts))
        return f"<details><summary>{escape(part.summary)}</summary>{inside}</details>"
    if isinstance(part, Players):
        return _players(part)
    return f'<p class="{escape(part.kind)}">{escape(part.text)}</p>'


def _moment(moment: Moment, title: str) -> str:
    paths = "".join(
        f'<path class="halo" d="{escape(path)}"/><path class="curve s{i % 4}" d="{escape(path)}"/>'
        for _, path, i in moment.curves
    )
    label = f"{moment.label or moment.caption}, {title}"
    return (
        f'<li class="moment"><button type="button" class="play" aria-label="Play: {escape(label)}">'
        f'</button><div class="strip"><img alt="" src="{escape(moment.picture)}">'
        f'<svg viewBox="0 0 {max(1, moment.frames - 1)} 100" preserveAspectRatio="none" '
        f'aria-hidden="true">{paths}</svg><i class="playhead"></i></div>'
        f'<audio controls preload="none" src="{escape(moment.audio)}"></audio>'
        f'<p><span class="what">{escape(moment.caption)}</span> '
        f'<span class="where">{escape(moment.detail)}</span></p></li>\n'
    )


def _players(part: Players) -> str:
    rows = "".join(
        f'<h3>{escape(title)}</h3><ul class="moments">\n'
        f"{''.join(_moment(moment, title) for moment in moments)}</ul>"
        for title, moments in part.rows
    )
    note = f'<p class="note">{escape(part.caption)}</p>' if part.caption else ""
    return f'<div class="players">{note}{rows}</div>'


def _moments(heading: str, moments: Sequence[Moment], title: str, folded: bool = False) -> str:
    if not moments:
        return ""
    items = "".join(_moment(moment, title) for moment in moments)
    items = f'<ul class="moments">\n{items}</ul>'
    if folded:
        return f"<details><summary>{escape(heading)}</summary>{items}</details>"
    return f"<h4>{escape(heading)}</h4>{items}"


def _legend(card: Card) -> str:
    """Names of the curves, where the card has more than one."""
    shown = [*card.moments, *card.maximised, *card.others]
    names = {name: i for moment in shown for name, _, i in moment.curves}
    if len(names) < 2:
        return ""
    items = "".join(
        f'<li><svg viewBox="0 0 24 8" aria-hidden="true"><path class="curve s{i % 4}" d="M0 4H24"/>'
        f"</svg>{escape(name)}</li>"
        for name, i in names.items()
    )
    return f'<ul class="legend" aria-label="Curves">{items}</ul>'


def _card(card: Card, keys: set[str]) -> str:
    # Sort values in full, not as they are shown.
    data = "".join(
        f' data-{name}="{value!r}"'
        for name, value in card.numbers.items()
        if value is not None and math.isfinite(value)
    )
    facts = "".join(
        f"<div{' class=wide' if len(v) > 20 else ''}><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>"
        for k, v in card.facts
    )
    links = "".join(
        f'<li><a href="#{escape(key)}">{escape(text)}</a></li>'
        if key in keys
        else f"<li>{escape(text)}</li>"
        for text, key in card.matches
    )
    matches = f'<h4>Matches</h4><ul class="matches">{links}</ul>' if links else ""
    kinds, labels = " ".join(k for k, _ in card.kinds), "; ".join(v for _, v in card.kinds)
    by_model = _grid(card.numbers_table) if card.numbers_table else ""
    remarks = "".join(f'<p class="note">{escape(text)}</p>' for text in card.remarks)
    others = f"Other searches ({len(card.others)})"
    return (
        f'<article class="card" id="{escape(card.key)}" data-kinds="{escape(kinds)}"{data} '
        f'aria-labelledby="{escape(card.key)}-title" tabindex="-1">'
        f'<header><h3 id="{escape(card.key)}-title">{escape(card.title)}</h3>'
        f'<span class="kind">{escape(labels)}</span></header>{by_model}'
        f"<dl>{facts}</dl>{matches}"
        f"{_legend(card)}"
        f"{_moments('Top moments in real clips', card.moments, card.title)}"
        f"{_moments('Maximised input', card.maximised, card.title)}"
        f"{_moments(others, card.others, card.title, folded=True)}{remarks}</article>\n"
    )


def _toolbar(section: Section) -> str:
    kinds = dict(kind for card in section.cards for kind in card.kinds)
    options = "".join(f'<option value="{escape(k)}">{escape(v)}</option>' for k, v in kinds.items())
    sorts = "".join(
        f'<option value="{escape(k)}" data-down="{int(down)}">{escape(label)}</option>'
        for k, label, down in section.sort_keys
    )
    return (
        '<form class="toolbar" role="search" aria-label="Features">'
        '<label class="find"><span>Search <kbd>/</kbd></span><input type="search" id="search" '
        'autocomplete="off" spellcheck="false" placeholder="concept, caption, feature"></label>'
        f'<label>Show<select id="kind"><option value="">all</option>{options}</select></label>'
        f'<label>Sort by<select id="sort">{sorts}</select></label>'
        '<label>Order<select id="order"><option value="down">largest first</option>'
        '<option value="up">smallest first</option></select></label>'
        '<output id="count" for="search kind" aria-live="polite"></output></form>'
    )


def _section(section: Section, keys: set[str]) -> str:
    parts = "\n".join(map(_part, section.parts))
    cards = ""
    if section.cards:
        inside = "".join(_card(card, keys) for card in section.cards)
        cards = f'{_toolbar(section)}<div class="cards">\n{inside}</div>'
    name = escape(section.key)
    return (
        f'<section id="{name}" aria-labelledby="{name}-title">'
        f'<h2 id="{name}-title">{escape(section.title)}</h2>\n{parts}\n{cards}</section>\n'
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def page(title: str, lead: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole page as text; `lead` are the paragraphs below the title.

    Raises:
        ValueError: two cards or sections share an anchor.
    """
    names = [s.key for s in sections] + [card.key for s in sections for card in s.cards]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"report: these anchors appear twice: {', '.join(twice)}")
    style, script = ((ASSETS / f"report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    policy = (
        f"default-src 'none'; img-src data:; media-src data:; style-src {_hash(style)}; "
        f"script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    links = "".join(f'<li><a href="#{escape(s.key)}">{escape(s.title)}</a></li>' for s in sections)
    body = "".join(_section(section, set(names)) for section in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        '<a class="skip" href="#main">Skip to the content</a>\n'
        f'<header class="top"><h1>{escape(title)}</h1>\n'
        f"{''.join(f'<p>{escape(text)}</p>' for text in lead)}\n"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n'
        f'<main id="main" tabindex="-1">\n{body}</main>\n<script>{script}</script>\n'
        "</body>\n</html>\n"
    )
