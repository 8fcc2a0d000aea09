"""Recordings to a clip store: read, decode, cut and write, going on where a killed run stopped."""

from __future__ import annotations

import functools
import itertools
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from musicscope.config import PrepareData
from musicscope.core.io import partial_dir, publish_dir
from musicscope.core.parallel import workers
from musicscope.data.clips import forget_progress, write_clips, written
from musicscope.data.sources import SOURCES, stems
from musicscope.data.sources.archives import Item, extent, stream
from musicscope.data.sources.decoding import Decoded, Separator, Spec, decode_job
from musicscope.data.sources.recordings import (
    SPLITS,
    Problem,
    Recording,
    Scan,
    assign_splits,
    limit,
    plain,
)
from musicscope.data.sources.report import REPORT, write_report
from musicscope.data.taxonomy import FAMILIES

VERSION = 1
"""Part of the scratch folder's name: raise it when the same input gives other clips."""
FONT = "recording"
"""In the column `font`, which names the soundfont of rendered clips."""


@dataclass
class Progress:
    """How far a run has come, and what it has met on the way: all whole numbers and strings."""

    items: int = 0
    """Items of the stream that are done."""
    clips: int = 0
    """Clips written of the item after them."""
    problems: list[list[str]] = field(default_factory=list)
    rates: dict[str, int] = field(default_factory=dict)
    padded: int = 0
    limited: int = 0

    def count(self, decoded: Decoded, problems: Iterable[Problem]) -> None:
        """Add what one item brought."""
        self.problems += [p.texts() for p in problems]
        if decoded.rate:
            self.rates[str(decoded.rate)] = self.rates.get(str(decoded.rate), 0) + 1
        self.padded += decoded.padded
        self.limited += decoded.limited


def prepare(config: PrepareData, seed: int) -> Scan:
    """The data set's recordings with their splits, limited, and with stems for audio if wanted."""
    settings = config.recordings
    scan = SOURCES[config.source](config, seed)
    if not scan.recordings:
        raise ValueError(
            f"prepare_data.recordings.folder: {settings.folder} lists no recording"
            + _first_problems([p.texts() for p in scan.problems])
        )
    recordings = assign_splits(
        scan.recordings, seed, settings.validation_share, settings.test_share
    )
    scan = replace(scan, recordings=tuple(limit(recordings, settings.limits, seed)))
    return stems.from_folder(scan, settings.stems_folder) if settings.stems == "folder" else scan


def describe(scan: Scan, config: PrepareData) -> str:
    """What a run will read and write, to be printed before it starts."""
    spec = spec_of(config)
    files, most = len(scan.recordings), len(scan.recordings) * spec.windows
    read = f"{scan.audio.bytes / 1e9:.1f} GB in {len(scan.audio.paths)} archives"
    return (
        f"{config.source}: {files} recordings out of "
        f"{read if scan.audio.kind != 'folder' else 'a folder'}; at most {most} clips of "
        f"{spec.seconds:g} s at {spec.sample_rate} Hz, {most * spec.samples * 2 / 1e9:.2f} GB"
    )


def spec_of(config: PrepareData) -> Spec:
    """The clips that `config` asks for."""
    settings = config.recordings
    return Spec(config.seconds, settings.sample_rate, settings.windows, settings.min_share)


def _fingerprint(scan: Scan) -> list[list[object]]:
    """Name, size and time of every input: a changed file starts afresh."""
    files = [*scan.inputs]
    if scan.audio.kind == "folder":
        found = (next((p / r.key for p in scan.audio.paths if (p / r.key).is_file()), None)
                 for r in scan.recordings)  # fmt: skip
        files += [f for f in found if f]
    else:
        files += scan.audio.paths
    return [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def _row(source: str, r: Recording, start: float, number: int, windows: int) -> dict[str, object]:
    labels = {f"has_{f}": r.labels[f] for f in FAMILIES}
    captions = [plain(c) for c in r.captions]
    return {
        "id": r.id + (f"-{number:03d}" if windows > 1 else ""), "group": r.group,
        "split": r.split, "kind": "clip", "pair_id": "", "source": source, "font": FONT,
        "caption": captions[0] if captions else "", "captions": captions,
        "target_family": "", "families": [f for f in FAMILIES if r.labels[f]],
        "tempo_bpm": r.tempo_bpm, "key": r.music_key, "artist": r.artist, "recording": r.name,
        "start": start, **labels,
    }  # fmt: skip


def _read(item: Item) -> bytes | Path | Problem | None:
    """The payload of one item, or why it has none; an archive that ends is an error."""
    if item.problem is not None:
        return item.problem
    try:
        return item.read()
    except (zipfile.BadZipFile, zlib.error, OSError, NotImplementedError, RuntimeError) as error:
        return Problem(item.recording.name, "corrupt", str(error))


def decoded_clips(
    items: Iterable[Item], progress: Progress, spec: Spec, source: str,
    run: Callable[[Callable, Iterable], Iterable], decode: Callable, batch: int,
    bar: Callable[[int], object],
) -> Iterator[tuple[np.ndarray, dict[str, object]]]:  # fmt: skip
    """(audio, row) of every clip from where `progress` stands, which moves along."""
    first, ahead = progress.items, progress.clips
    todo = ((i, item) for i, item in enumerate(items) if i >= first)
    while chunk := [(i, item, _read(item)) for i, item in itertools.islice(todo, batch)]:
        jobs = [(payload, spec) for _, _, payload in chunk if not isinstance(payload, Problem)]
        results = iter(run(decode, jobs))
        for i, item, payload in chunk:
            if isinstance(payload, Problem):
                decoded, problems = Decoded(), [payload]
            else:
                decoded = next(results)
                problems = [Problem(item.recording.name, *p) for p in decoded.problems]
            done = ahead if i == first else 0
            if not done:  # else counted before its first clip was written
                progress.count(decoded, problems)
            for number, (start, audio) in enumerate(decoded.clips):
                if number >= done:
                    progress.items, progress.clips = i, number + 1
                    yield audio, _row(source, item.recording, start, number, spec.windows)
            progress.items, progress.clips = i + 1, 0
            bar(item.done)


def write_recordings(
    out: str | Path, config: PrepareData, seed: int, processes: int = 1,
    separate: Separator | None = None,
) -> None:  # fmt: skip
    """Make the clip store `out` from the data set that `config` names.

    A killed run goes on at its last whole shard (an archive is read over, not decoded again) and
    gives the same bytes, with any number of `processes`. `separate` takes the voice out of each
    clip, in this process.

    Raises:
        FileNotFoundError, ValueError: the data set is not there, or not as its layout says.
    """
    settings, spec = config.recordings, spec_of(config)
    scan = prepare(config, seed)
    if settings.stems == "demucs" and separate is None:
        separate = stems.demucs_separator()
    print(describe(scan, config), file=sys.stderr)
    folder = partial_dir(
        {"recordings": VERSION, "config": asdict(config), "seed": seed,
         "separate": separate is not None, "inputs": _fingerprint(scan)}
    )  # fmt: skip
    if not (folder / REPORT).is_file():
        progress = Progress(**(written(folder) or {}))
        limited = any(asdict(settings.limits).values())
        items = stream(scan.audio, scan.recordings, scan.listed, whole=not limited)
        decode = functools.partial(decode_job, separate=separate) if separate else decode_job
        processes = 1 if separate else max(processes, 1)
        total, unit = extent(scan.audio, scan.recordings)
        with (
            workers(processes) as run,
            tqdm(total=total, desc=config.source, unit=unit, unit_scale=unit == "B") as bar,
        ):
            clips = decoded_clips(
                items, progress, spec, config.source, run, decode, 4 * processes,
                lambda done: bar.update(done - bar.n),
            )  # fmt: skip
            # What was left out is counted to the end of the stream before the table is written.
            frame = write_clips(
                folder, clips, spec.sample_rate, spec.samples, lambda: asdict(progress)
            )
        problems = [*(p.texts() for p in scan.problems), *progress.problems]
        for split in SPLITS:
            if not len(frame) or split not in set(frame["split"]):
                raise ValueError(f"no clip came out for split {split}" + _first_problems(problems))
        counts = {"source_rates": progress.rates, "padded": progress.padded,
                  "turned_down": progress.limited}  # fmt: skip
        write_report(folder, scan, problems, counts)
        forget_progress(folder)
    publish_dir(folder, out)


def _first_problems(problems: list[list[str]]) -> str:
    """A few reasons to end an error with."""
    if not problems:
        return ""
    counts = ", ".join(f"{r} {n}" for r, n in Counter(p[1] for p in problems).most_common(5))
    return f"; left out: {counts}; first: {' '.join(problems[0])}"
