"""Generated pieces on captions drawn at random, beside the clips that have these captions."""

from __future__ import annotations

from musicscope.core.io import read_json
from musicscope.report.elements import Moment, Players, Section
from musicscope.report.metrics import Sources
from musicscope.report.snippets import file_moment

FOLDER = "data/gallery"
LONGEST = 10.0
"""Seconds that are played of each piece."""


def section(sources: Sources) -> Section | None:
    """Players per model; None without any gallery."""
    models, absent = [], []
    for model in sources.models:
        folder = sources.root / FOLDER / model
        if not (folder / "index.json").is_file():
            absent.append(f"Left out: {FOLDER}/{model} is not there (stage gallery).")
            continue
        rows: list[tuple[str, tuple[Moment, ...]]] = []
        for piece in read_json(folder / "index.json")["pieces"]:
            made = [
                file_moment(folder, piece[key], kind, "", f"{kind}: {piece['caption']}", LONGEST)
                for key, kind in (("file", model), ("real", "clip"))
            ]
            if None in made:
                absent.append(f"A piece of {model} could not be read: {piece['file']}.")
            rows.append((piece["caption"], tuple(m for m in made if m is not None)))
        models.append({"name": model, "players": Players(tuple(rows)) if rows else None})
    if not models:
        return None
    return Section("gallery", "What the models play", {"models": models}, tuple(absent))
