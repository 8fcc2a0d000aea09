"""Excerpts for feature cards: a piece of audio with its spectrogram and the activation drawn on it.

Activations over time are computed here from the stored activations: each clip is encoded once a
dictionary, whatever the number of features that are drawn on it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from musicscope.activations.alignment import common_frames, frame_rate
from musicscope.activations.store import ActivationStore
from musicscope.data.clips import ClipStore
from musicscope.dictionaries.core import TopKSAE, UniversalSAE
from musicscope.report import snippets as media
from musicscope.report.parts import Moment, plain, short

Feature = tuple[str, str, int]
"""kind ("sae" or "usae"), model, number"""


@dataclass(frozen=True)
class Bench:
    """What activations over time are computed from."""

    clips: ClipStore
    stores: dict[str, ActivationStore]
    """With the same frames in all models."""
    saes: dict[str, TopKSAE]
    usae: UniversalSAE

    @classmethod
    def open(cls, root: Path, models: Sequence[str]) -> Bench:
        """From data/ below `root`; SAE and USAE of seed 0, at the USAE's slot."""
        usae = UniversalSAE.load(root / "data/usae/seed-0")
        folders = common_frames([root / f"data/activations/{m}/{usae.slot}" for m in models])
        stores = {m: ActivationStore.open(f) for m, f in zip(models, folders, strict=True)}
        saes = {m: TopKSAE.load(root / f"data/sae/{m}/{usae.slot}/seed-0") for m in models}
        return cls(ClipStore.open(root / "data/clips"), stores, saes, usae)

    def row(self, clip: str) -> int:
        """Row of a clip id in the clip table."""
        found = np.flatnonzero((self.clips.rows["id"] == clip).to_numpy())
        if len(found) != 1:
            raise ValueError(f"data/clips has {len(found)} clips {clip}: run dvc repro")
        return int(found[0])

    def frame_rate(self, model: str) -> float:
        """Frames a second of a model's activations."""
        return frame_rate(self.stores[model])


@torch.no_grad()
def feature_curves(
    bench: Bench, wanted: Iterable[tuple[Feature, str]]
) -> dict[tuple[Feature, str], np.ndarray]:
    """Activation over time [frames] of each (feature, clip id), 0 where the code leaves it out."""
    by_clip: dict[tuple[str, str, str], set[int]] = defaultdict(set)
    for (kind, model, number), clip in wanted:
        by_clip[kind, model, clip].add(number)
    curves = {}
    jobs = tqdm(sorted(by_clip.items()), "curves", unit="clip", mininterval=1)
    for (kind, model, clip), numbers in jobs:
        store = bench.stores[model]
        x = torch.from_numpy(store.clip(store.ids.index(clip)))
        if kind == "sae":
            values, indices = bench.saes[model].encode(x)
        else:
            values, indices = bench.usae.encode(x, bench.usae.names.index(model))
        for number in sorted(numbers):
            found = (values * (indices == number)).sum(1)
            curves[(kind, model, number), clip] = found.numpy()
    return curves


@dataclass(frozen=True)
class Line:
    """One curve to draw."""

    name: str
    values: np.ndarray
    """[frames] of the whole clip or file"""
    top: float
    """Activation at the upper edge."""
    colour: int


def moment(
    audio: np.ndarray, rate: int, frame_rate: float, centre: int, seconds: float,
    lines: Sequence[Line], caption: str, detail: str, label: str,
) -> Moment:  # fmt: skip
    """Cut `seconds` around frame `centre` out of mono audio [samples]; all lines share the frames.

    `detail` may hold {start} and {end}, which become seconds.
    """
    total = max((len(line.values) for line in lines), default=0)
    total = total or round(len(audio) / rate * frame_rate)
    first, end = media.window(centre, max(2, round(seconds * frame_rate)), total)
    sound = audio[round(first / frame_rate * rate) : round(end / frame_rate * rate)]
    return Moment(
        caption=caption,
        detail=detail.format(start=f"{first / frame_rate:.2f}", end=f"{end / frame_rate:.2f}"),
        audio=media.data_uri("audio/mpeg", media.mp3(sound, rate)),
        picture=media.data_uri("image/png", media.png(media.spectrogram_levels(sound, rate))),
        curves=tuple(
            (line.name, media.curve(line.values[first:end], line.top), line.colour)
            for line in lines
        ),
        frames=end - first,
        label=label,
    )


def clip_moment(
    bench: Bench, clip: str, frame: int, model: str, lines: Sequence[Line], seconds: float,
    number: int,
) -> Moment:  # fmt: skip
    """The excerpt of a clip around a frame of `model`; `number` counts a card's moments from 1."""
    row = bench.row(clip)
    caption = str(bench.clips.rows["caption"].iloc[row] or clip)
    peaks = [(line.name, short(float(line.values.max()))) for line in lines]
    peak = ", ".join(f"{value} ({name})" for name, value in peaks) if peaks[1:] else peaks[0][1]
    return moment(
        bench.clips.audio([row])[0], bench.clips.sample_rate, bench.frame_rate(model), frame,
        seconds, lines, caption, f"{_literal(clip)}, {{start}} to {{end}} s, peak {_literal(peak)}",
        f"moment {number}",
    )  # fmt: skip


def _literal(text: str) -> str:
    """Text that `str.format` leaves as it is."""
    return text.replace("{", "{{").replace("}", "}}")


VARIANTS = {
    "heard": "searched for the sound, under the prior",
    "prior": "searched for the tokens, under the prior",
    "clip": "searched for the tokens, from a real moment",
    "free": "searched for the tokens, without the prior",
    "alone": "searched for the sound, in {} alone",
}
"""Variants of a search; alone-<model> is one of those, with the model for {}."""


def variant_text(variant: str) -> str:
    """What a search was, in words; a variant that is not known stays a name."""
    kind, _, model = variant.partition("-")
    return VARIANTS.get(kind, f"variant {variant}").format(model or "one model")


def maximised_moments(
    folder: Path, index: dict[str, Any], entry: dict[str, Any], models: Sequence[str],
    seconds: float,
) -> list[Moment]:  # fmt: skip
    """The searched inputs of one feature of data/maximize_*: `entry` is from its index.json.

    First the one whose sound, which is what one hears, activates the feature most in the model of
    the run where it does so least; the others in the order of the file.
    """
    names = index["models"]
    pieces = list(entry["maximised"])
    if pieces:
        best = max(pieces, key=lambda piece: min(piece["sound"][name] for name in names))
        pieces = [best, *(piece for piece in pieces if piece is not best)]
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
            f"{name}: sound {plain(piece['sound'][name], 2)} of its best real clip (log p a code "
            f"{plain(piece['log_prob_sound'][name], 2)}), tokens {plain(piece['tokens'][name], 2)} "
            f"(log p {plain(piece['log_prob_tokens'][name], 2)})"
            for name in names
        )
        caption = f"{' and '.join(names)}, {variant_text(piece['variant'])}"
        found.append(
            moment(
                audio.mean(1), rate, index["frame_rate"], piece["frame"] + index["window"] // 2,
                seconds, lines, caption, _literal(reached), caption,
            )
        )  # fmt: skip
    return found


def control_remarks(
    names: Sequence[str], numbers: dict[str, Any], head: dict[str, Any]
) -> list[str]:
    """What real excerpts do to a feature, and what the same search reaches for the run's nulls.

    `names`: the models of the run; `numbers` and `head`: of metrics/maximize_*.json, those of the
    feature and the headline.
    """
    texts = []
    for name in names:
        controls = numbers.get(name, {}).get("controls", {})
        if "clips_q50" in controls:
            middle, high = (plain(controls[f"clips_{q}"], 2) for q in ("q50", "q95"))
            texts.append(
                f"Control, {name}: random real excerpts reach {middle} of its best clip (median; "
                f"95 % are below {high})."
            )
    what = "random directions" if len(names) == 1 else "pairs of unrelated features"
    nulls = [
        f"{plain(head[key], 2)} by {medium}"
        for key, medium in (("heard_null_reached", "sound"), ("prior_null_reached", "tokens"))
        if head.get(key) is not None
    ]
    if nulls:
        texts.append(
            f"Null, {' and '.join(names)}: searches for {what} reach {' and '.join(nulls)} of "
            "their best clip (mean)."
        )
    return texts
