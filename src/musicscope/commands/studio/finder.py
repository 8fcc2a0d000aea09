"""Find a concept in uploaded recordings, and steer with its features."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pandas as pd

from musicscope.commands.studio.logic import SLOT, open_session, sae_of
from musicscope.finder.run import ConceptReport, find_concept
from musicscope.models.interface import AudioBatch, Batch
from musicscope.steering.edit import ConceptEdit, Edit, Steering
from musicscope.steering.session import Tick
from musicscope.steering.subjects import Model

MOST_FILES = 200
"""Most recordings per side."""
LEAST_FILES = 2
AUDIBLE, MOMENTS = 16, 3
"""Number of best features that can be steered; moments per feature that give its peak."""


@dataclass(frozen=True)
class FoundConcept:
    """Features of a concept in recordings, ready to steer with."""

    model: str
    slot: str
    table: pd.DataFrame
    """`association.COLUMNS`, best first"""
    peaks: Mapping[int, float]
    """Feature -> mean of its highest values in recordings with the concept"""
    text: str
    discoveries: int


def gather(paths: Sequence[str] | None, folder: Path, what: str) -> None:
    """Copy uploaded files under numbered names; ValueError for too few or too many."""
    paths = list(paths or ())
    if not LEAST_FILES <= len(paths) <= MOST_FILES:
        raise ValueError(
            f"{len(paths)} recordings {what}: {LEAST_FILES} to {MOST_FILES} are needed, ten to "
            "find anything"
        )
    folder.mkdir()
    for i, path in enumerate(paths):
        shutil.copyfile(path, folder / f"{i:03d}-{Path(path).name}")


def _with_progress(model: Model, tick: Tick, total: int) -> SimpleNamespace:
    """Wrap a model for `find_concept`; `tick` gets the share of recordings that are encoded."""
    count = itertools.count(1)

    def encode(audio: np.ndarray, captions: Sequence[str | None]) -> Batch | AudioBatch:
        tick(min(1.0, next(count) / total))
        return model.encode(audio, captions)

    return SimpleNamespace(
        name=model.name, sample_rate=model.sample_rate, encode=encode, capture=model.capture
    )


def find(
    model: str, with_: Sequence[str] | None, without: Sequence[str] | None, tick: Tick,
    seconds: float = 10.0, device: str = "cpu", slot: str = SLOT,
) -> FoundConcept:  # fmt: skip
    """Find features that separate two lists of recordings; see `finder.run.find_concept`."""
    layer, sae = sae_of(model, slot, device)
    with TemporaryDirectory(prefix="musicscope-") as root:
        sides = [Path(root) / "with", Path(root) / "without"]
        for paths, side, what in zip(
            (with_, without), sides, ("with the concept", "without it"), strict=True
        ):
            gather(paths, side, what)
        total = len(with_ or ()) + len(without or ())
        of = _with_progress(open_session(model, device).model, tick, total)
        tick(0.0)
        try:
            report = find_concept(
                of, sae, *sides, layer, seconds=seconds, audible=AUDIBLE, moments=MOMENTS
            )
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(str(error).replace(f"{root}/", "")) from error
        return _found(report, model, slot, root)


def _found(report: ConceptReport, model: str, slot: str, root: str) -> FoundConcept:
    moments = report.moments[report.moments["dictionary"] == "sae"]
    peaks = {int(f): float(rows["value"].mean()) for f, rows in moments.groupby("feature")}
    text = report.text(rows=10).replace(f"{root}/", "")
    return FoundConcept(model, slot, report.table, peaks, text, len(report.discoveries()))


def plan_found(
    found: FoundConcept | None, direction: str, n: float, strength: float,
    branch: str = "conditional", device: str = "cpu",
) -> tuple[str, Steering]:  # fmt: skip
    """Make hook point and edit: the best `n` features ablated (off), or raised to their peaks (on).

    Strength 1 reaches these values, 0 changes nothing.
    """
    if found is None:
        raise ValueError("find a concept first")
    if direction not in ("off", "on"):
        raise ValueError(f"direction {direction!r}: off or on")
    chosen = [int(f) for f in found.table["feature"].head(int(n)) if int(f) in found.peaks]
    if not chosen:
        raise ValueError("no feature fires in these recordings: nothing to steer with")
    layer, sae = sae_of(found.model, found.slot, device)
    if direction == "off":
        edit = Edit(tuple(chosen), "ablate")
    else:
        edit = Edit(tuple(chosen), "clamp_min", tuple(found.peaks[f] for f in chosen))
    concept = ConceptEdit(f"found {direction}", (edit,), float(strength))
    return layer, Steering(sae, (concept,), branch)
