"""Real data sets as clip stores: one module a source, each with `scan(config, seed) -> Scan`."""

from __future__ import annotations

from collections.abc import Callable

from musicscope.config import PrepareData
from musicscope.data.sources import folder, mtg_jamendo, musicbench, song_describer
from musicscope.data.sources.recordings import Scan

SOURCES: dict[str, Callable[[PrepareData, int], Scan]] = {
    "musicbench": musicbench.scan,
    "song_describer": song_describer.scan,
    "mtg_jamendo": mtg_jamendo.scan,
    "folder": folder.scan,
}
