"""Searched inputs on feature cards, from data/maximize_activation/<model> and data/maximize_shared.

Columns of their index.json: maximisation/audio.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from musicscope.core.io import read_json
from musicscope.report.elements import Moment
from musicscope.report.metrics import Sources, Tree, get, plain, read
from musicscope.report.snippets import Line, excerpt

VARIANTS = {
    "heard": "for the sound, under the prior",
    "prior": "for the tokens, under the prior",
    "clip": "for the tokens, under the prior, from a real moment",
    "free": "for the tokens, without the prior",
}
"""What each variant searches for."""


class Searched(NamedTuple):
    """Searched inputs of one feature."""

    best: list[Moment]
    """The best of each run."""
    others: list[Moment]
    remarks: list[str]
    """Controls and nulls."""


def runs(models: Sequence[str]) -> list[str]:
    """Names of the runs below data/ and metrics/."""
    return [*(f"maximize_activation/{model}" for model in models), "maximize_shared"]


def searched(
    sources: Sources, anchor: dict[tuple[str, str, int], str], seconds: float
) -> dict[str, Searched]:
    """Searched inputs by card; only runs that are there.

    `anchor`: the card of each (kind, model, number); the model is "" for the USAE.
    """
    found: dict[str, Searched] = {}
    for name in runs(sources.models):
        folder = sources.root / "data" / name
        if not (folder / "index.json").is_file():
            continue
        index, metrics = read_json(folder / "index.json"), sources.metrics(name) or {}
        for entry in index["features"]:
            model, number = next(iter(entry["numbers"].items()))
            owner = "" if entry["kind"] == "usae" else model
            if (key := anchor.get((entry["kind"], owner, number))) is None:
                continue
            card = found.setdefault(key, Searched([], [], []))
            moments = _moments(folder, index, entry, sources.models, seconds)
            card.best.extend(moments[:1])
            card.others.extend(moments[1:])
            numbers = (metrics.get("features") or {}).get(entry["name"], {})
            texts = _remarks(index["models"], numbers, metrics.get("headline", {}))
            card.remarks.extend(text for text in texts if text not in card.remarks)
    return found


def variant_text(variant: str) -> str:
    """A search in words; the name of a variant that is not known."""
    kind, _, model = variant.partition("-")
    if kind == "alone":
        return f"searched for the sound, in {model} alone"
    return f"searched {VARIANTS[kind]}" if kind in VARIANTS else f"variant {variant}"


def _moments(
    folder: Path, index: Tree, entry: Tree, models: Sequence[str], seconds: float
) -> list[Moment]:
    """The searched inputs of one feature.

    The first one has the sound with the highest activation, of several models in the model where
    it is lowest. The others keep the order of the file.
    """
    names = index["models"]
    pieces = sorted(entry["maximised"], key=lambda one: -min(one["sound"][m] for m in names))[:1]
    pieces += [one for one in entry["maximised"] if one is not pieces[0]]
    found = []
    for piece in pieces:
        audio, rate = soundfile.read(folder / piece["file"], dtype="float32", always_2d=True)
        lines = [
            Line(
                name if entry["kind"] == "usae" else f"{name} {entry['numbers'][name]}",
                values := np.asarray(piece["curves"][name], np.float32),
                max(float(values.max()), float(entry["best_clip"][name])),
                models.index(name) if name in models else 0,
            )
            for name in names
        ]
        reached = "; ".join(
            f"{name}: sound {plain(piece['sound'][name], 2)} of its best real clip (log p per code "
            f"{plain(piece['log_prob_sound'][name], 2)}), tokens {plain(piece['tokens'][name], 2)} "
            f"(log p {plain(piece['log_prob_tokens'][name], 2)})"
            for name in names
        )
        caption = f"{' and '.join(names)}, {variant_text(piece['variant'])}"
        found.append(
            excerpt(
                audio.mean(1), rate, index["frame_rate"], piece["frame"] + index["window"] // 2,
                seconds, lines, caption, lambda *_, text=reached: text, caption,
            )
        )  # fmt: skip
    return found


def _remarks(names: Sequence[str], numbers: Tree, head: Tree) -> list[str]:
    """The feature's activation on real excerpts, and what the same search reaches for the nulls.

    `names`: models of the run; `numbers`, `head`: of metrics/maximize_*.json, for the feature and
    the headline.
    """
    texts = []
    for name in names:
        controls = get(numbers, f"{name}.controls") or {}
        if "clips_q50" in controls:
            middle, high = (plain(controls[f"clips_{q}"], 2) for q in ("q50", "q95"))
            texts.append(
                f"Control, {name}: random real excerpts reach {middle} of its best clip (median; "
                f"95 % are below {high})."
            )
    what = "random directions" if len(names) == 1 else "pairs of unrelated features"
    nulls = [
        f"{plain(value, 2)} by {medium}"
        for key, medium in (("heard_null_reached", "sound"), ("prior_null_reached", "tokens"))
        if math.isfinite(value := read(head, key).value)
    ]
    if nulls:
        texts.append(
            f"Null, {' and '.join(names)}: searches for {what} reach {' and '.join(nulls)} of "
            "their best clip (mean)."
        )
    return texts
