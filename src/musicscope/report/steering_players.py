"""Steered music to hear: data/steering_full/<model>/examples, or those of the stage `steer`."""

from __future__ import annotations

from typing import Any

from musicscope.core.io import read_json
from musicscope.report.metrics import Sources
from musicscope.report.parts import Moment, Note, Players, plain
from musicscope.report.snippets import file_moment

FOLDERS = {"steer": "data/steering", "steer_full": "data/steering_full"}
EXAMPLES = 2
"""Pairs of pieces to hear for each wish."""


def _verdicts(judges: dict[str, Any], side: int) -> str:
    """`guitar: family judge 0.81, musicnn 0.44` of plain (side 0) or steered (1) pieces."""
    by_concept: dict[str, list[str]] = {}
    for judge, concepts in judges.items():
        for concept, values in concepts.items():
            if values[side] is not None:
                text = f"{judge.replace('_', ' ')} {plain(values[side], 2)}"
                by_concept.setdefault(concept, []).append(text)
    return "; ".join(f"{concept}: {', '.join(texts)}" for concept, texts in by_concept.items())


def players(sources: Sources, stage: str, model: str) -> list[Players | Note]:
    """Plain and steered beside each other, the first `EXAMPLES` of each wish; a note where lost."""
    folder = sources.root / FOLDERS[stage] / model / "examples"
    if not (folder / "index.json").is_file():
        text = f"No music to hear: {FOLDERS[stage]}/{model}/examples is not there (stage {stage})."
        return [Note(text, "missing")]
    rows, seen, lost = [], {}, 0
    for example in read_json(folder / "index.json")["examples"]:
        wishes = ", ".join(example["wishes"])
        if seen.get(wishes, 0) >= EXAMPLES:
            continue
        made: list[Moment | None] = [
            file_moment(folder, example[kind], kind, _verdicts(example["judges"], side))
            for side, kind in enumerate(("plain", "steered"))
        ]
        if None in made:
            lost += 1
            continue
        seen[wishes] = seen.get(wishes, 0) + 1
        rows.append((f"{wishes}: {example['prompt']}", tuple(m for m in made if m is not None)))
    caption = (
        f"{model}: the first pieces of the test, not the best ones. Numbers are the judges' "
        "probabilities of this one piece."
    )
    parts: list[Players | Note] = [Players(tuple(rows), caption)] if rows else []
    if lost:
        parts.append(Note(f"{lost} examples of {model} could not be read.", "missing"))
    return parts
