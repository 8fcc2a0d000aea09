"""Build a clip store from recordings, resuming a killed run, and measure it."""

from __future__ import annotations

import csv
import functools
import io
import itertools
import shutil
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from musicscope.config import PrepareData, RecordingLimits
from musicscope.core.audio import TRIVIAL_CUES, trivial_cues
from musicscope.core.io import publish_dir, read_json, scratch_dir, write_json, write_text
from musicscope.core.parallel import Run, workers
from musicscope.core.progress import Bar
from musicscope.core.seeding import seed_for
from musicscope.core.stats import auroc
from musicscope.data.audio_files import Decoded, Problem, Separator, Spec, decode_job, plain
from musicscope.data.clips import ClipStore, forget_progress, known_labels, write_clips, written
from musicscope.data.concepts import Concepts, completed, labelled
from musicscope.data.copies import find_copies, joined_groups
from musicscope.data.sources import jamendo, labels, musicbench, stems
from musicscope.data.sources.archives import Item, extent, stream
from musicscope.data.sources.folder import scan as scan_folder
from musicscope.data.sources.recordings import (
    SPLITS,
    Recording,
    Scan,
    assign_splits,
    describe_inputs,
    limit,
)
from musicscope.data.taxonomy import FAMILIES

VERSION = 2
"""Part of the scratch folder's name: raise it when the same input gives other clips."""
FONT = "recording"
"""In the column `font`, which names the soundfont of rendered clips."""
REPORT = "recordings.json"
KEPT = "kept"
"""Folder in the scratch folder, for the store without copies."""
COPY = "copy of a clip in another split"
NAMED = 20
"""Names per reason in the metrics; skipped.csv has all."""
CUE_CLIPS = 1000
"""Clips that the trivial cues are measured on, drawn by seed."""
SOURCES: dict[str, Callable[[PrepareData, int, Concepts], Scan]] = {
    "musicbench": musicbench.scan,
    "song_describer": jamendo.scan_song_describer,
    "mtg_jamendo": jamendo.scan_mtg_jamendo,
    "folder": scan_folder,
}


@dataclass
class Progress:
    """State of a run that a killed run resumes from: whole numbers and strings."""

    items: int = 0
    """Finished items of the stream."""
    clips: int = 0
    """Clips written of the next item."""
    problems: list[list[str]] = field(default_factory=list)
    rates: dict[str, int] = field(default_factory=dict)
    padded: int = 0
    limited: int = 0
    cut: list[list[str]] = field(default_factory=list)
    """Name of each file whose end is absent but that gave clips, and how much is there."""

    def count(self, name: str, decoded: Decoded, problems: Iterable[Problem]) -> None:
        """Add the counts of one item."""
        self.problems += [p.texts() for p in problems]
        if decoded.clips and decoded.cut:
            self.cut.append([name, decoded.cut])
        if decoded.rate:
            self.rates[str(decoded.rate)] = self.rates.get(str(decoded.rate), 0) + 1
        self.padded += decoded.padded
        self.limited += decoded.limited


def prepare(config: PrepareData, seed: int, concepts: Concepts | None = None) -> Scan:
    """Scan the data set, assign splits, apply limits, and use stems as audio if configured.

    ValueError for a concept that no recording is labelled with, and no recording without.
    """
    settings, concepts = config.recordings, completed(concepts or {})
    if config.source != "folder":
        for name, concept in concepts.items():
            if concept.folder_with:
                raise ValueError(
                    f"concepts.{name}.folder_with: folders are labels with prepare_data.source = "
                    f"folder only, not with {config.source}; give tags"
                )
    scan = SOURCES[config.source](config, seed, concepts)
    if not scan.recordings:
        raise ValueError(
            f"prepare_data.recordings.folder: {settings.folder} lists no recording"
            + _first_problems([p.texts() for p in scan.problems])
        )
    if concepts:
        scan = with_concepts(scan, concepts)
    recordings = assign_splits(
        scan.recordings, seed, settings.validation_share, settings.test_share
    )
    scan = replace(scan, recordings=tuple(limit(recordings, settings.limits, seed)))
    return stems.from_folder(scan, settings.stems_folder) if settings.stems == "folder" else scan


def with_concepts(scan: Scan, concepts: Concepts) -> Scan:
    """Give every recording a label of every concept, None where it is unknown, and the rule."""
    unknown = dict.fromkeys(concepts)
    recordings = tuple(
        replace(r, labels={**r.labels, **{n: r.labels.get(n) for n in unknown}})
        for r in scan.recordings
    )
    for name in concepts:
        counts = Counter(r.labels[name] for r in recordings)
        if not counts[True] or not counts[False]:
            raise ValueError(
                f"concepts.{name}: of {len(recordings)} recordings {counts[True]} have it, "
                f"{counts[False]} lack it and {counts[None]} are unknown; some of both are needed: "
                f"give concepts.{name}.column (of labels.csv), tags, or folder_with and "
                "folder_without"
            )
    rule = {"concept_rule": labels.CONCEPT_RULE}
    return replace(scan, recordings=recordings, facts={**scan.facts, **rule})


def describe(scan: Scan, config: PrepareData) -> str:
    """Describe the data that a run reads and writes, to be printed before it starts."""
    spec = spec_of(config)
    files, most = len(scan.recordings), len(scan.recordings) * spec.windows
    read = f"{scan.audio.bytes / 1e9:.1f} GB in {len(scan.audio.paths)} archives"
    return (
        f"{config.source}: {files} recordings out of "
        f"{read if scan.audio.kind != 'folder' else 'a folder'}; at most {most} clips of "
        f"{spec.seconds:g} s at {spec.sample_rate} Hz, {most * spec.samples * 2 / 1e9:.2f} GB"
    )


def spec_of(config: PrepareData) -> Spec:
    """Length, rate and number of clips per recording in `config`."""
    settings = config.recordings
    return Spec(config.seconds, settings.sample_rate, settings.windows, settings.min_share)


def _fingerprint(scan: Scan) -> list[list[object]]:
    """Name, size and time of every input: after a change of a file a run does not resume."""
    files = [*scan.inputs]
    if scan.audio.kind == "folder":
        found = (next((p / r.key for p in scan.audio.paths if (p / r.key).is_file()), None)
                 for r in scan.recordings)  # fmt: skip
        files += [f for f in found if f]
    else:
        files += scan.audio.paths
    return [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def _row(source: str, r: Recording, start: float, number: int, windows: int) -> dict[str, object]:
    names = (*FAMILIES, *(name for name in r.labels if name not in FAMILIES))
    has = {f"has_{name}": r.labels[name] for name in names}
    captions = [plain(c) for c in r.captions]
    return {
        "id": r.id + (f"-{number:03d}" if windows > 1 else ""), "group": r.group,
        "split": r.split, "kind": "clip", "pair_id": "", "source": source, "font": FONT,
        "caption": captions[0] if captions else "", "captions": captions,
        "target_family": "", "families": [f for f in FAMILIES if r.labels[f]],
        "tempo_bpm": r.tempo_bpm, "key": r.music_key, "artist": r.artist, "recording": r.name,
        "start": start, **has,
    }  # fmt: skip


def _read(item: Item) -> bytes | Path | Problem | None:
    """Read one item, or say why it cannot be read; an archive that is cut short is an error."""
    if item.problem is not None:
        return item.problem
    try:
        return item.read()  # ty: ignore[not-callable]  set where there is no problem
    except (zipfile.BadZipFile, zlib.error, OSError, NotImplementedError, RuntimeError) as error:
        return Problem(_name(item), "corrupt", str(error))


def _name(item: Item) -> str:
    return item.recording.name if item.recording else ""


def decoded_clips(
    items: Iterable[Item], progress: Progress, spec: Spec, source: str,
    run: Run, decode: Callable[[tuple[bytes | Path | None, Spec]], Decoded], batch: int,
    bar: Callable[[int], object],
) -> Iterator[tuple[np.ndarray, dict[str, object]]]:  # fmt: skip
    """Yield (audio, row) of every clip from `progress` on, and advance it."""
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
                problems = [Problem(_name(item), *p) for p in decoded.problems]
            done = ahead if i == first else 0
            if not done:  # else counted before its first clip was written
                progress.count(_name(item), decoded, problems)
            for number, (start, audio) in enumerate(decoded.clips):
                if number >= done:
                    progress.items, progress.clips = i, number + 1
                    recording = item.recording  # there is one: it has clips
                    row = _row(source, recording, start, number, spec.windows)  # ty: ignore[invalid-argument-type]
                    yield audio, row
            progress.items, progress.clips = i + 1, 0
            bar(item.done)


def write_recordings(
    out: str | Path, config: PrepareData, seed: int, processes: int = 1,
    separate: Separator | None = None, concepts: Concepts | None = None,
) -> None:  # fmt: skip
    """Make the clip store `out` from the data set of `config`.

    A killed run resumes at its last whole shard (an archive is read again, not decoded again) and
    gives the same bytes, with any number of `processes`. `separate` removes the vocals of each
    clip, in this process.

    Raises:
        FileNotFoundError, ValueError: the data set is absent, or its layout is another.
    """
    scan = prepare(config, seed, concepts)
    if config.recordings.stems == "demucs" and separate is None:
        separate = stems.demucs_separator()
    print(describe(scan, config), file=sys.stderr)
    key = {"recordings": VERSION, "config": asdict(config), "seed": seed,
           "separate": separate is not None, "inputs": _fingerprint(scan)}  # fmt: skip
    if concepts:
        key["concepts"] = {name: asdict(concept) for name, concept in concepts.items()}
    with scratch_dir(key) as folder:
        publish_dir(_collect(folder, scan, config, processes, separate), out)
        shutil.rmtree(folder, ignore_errors=True)


def _collect(
    folder: Path, scan: Scan, config: PrepareData, processes: int, separate: Separator | None
) -> Path:
    """Make the clip store in the scratch folder, or go on with it, and give its own folder."""
    settings, spec = config.recordings, spec_of(config)
    for made in (folder, folder / KEPT):
        if (made / REPORT).is_file():
            return made
    progress = Progress(**(written(folder) or {}))
    limited = any(asdict(settings.limits).values())
    items = stream(scan.audio, scan.recordings, scan.listed, whole=not limited)
    decode = functools.partial(decode_job, separate=separate) if separate else decode_job
    processes = 1 if separate else max(processes, 1)
    total, unit = extent(scan.audio, scan.recordings)
    with (
        workers(processes) as run,
        Bar(total=total, desc=config.source, unit=unit, unit_scale=unit == "B") as bar,
    ):
        clips = decoded_clips(
            items, progress, spec, config.source, run, decode, 4 * processes,
            lambda done: bar.update(done - bar.n),
        )  # fmt: skip
        # Skipped items are counted to the end of the stream before the table is written.
        frame = write_clips(folder, clips, spec.sample_rate, spec.samples, lambda: asdict(progress))
    problems = [*(p.texts() for p in scan.problems), *progress.problems]
    _check_splits(frame, problems)
    kept, copies, left_out = keep_apart(folder, scan.recordings, settings.limits)
    problems += [p.texts() for p in left_out]
    _check_splits(ClipStore.open(kept).rows, problems)
    counts = {
        "source_rates": progress.rates, "padded": progress.padded,
        "turned_down": progress.limited, "copies": copies,
        "truncated_but_used": {"count": len(progress.cut), "names": progress.cut[:NAMED]},
    }  # fmt: skip
    forget_progress(folder)
    write_report(kept, scan, problems, counts)
    return kept


def _check_splits(frame: pd.DataFrame, problems: list[list[str]]) -> None:
    for split in SPLITS:
        if not len(frame) or split not in set(frame["split"]):
            raise ValueError(f"no clip came out for split {split}" + _first_problems(problems))


def keep_apart(
    folder: Path, recordings: Sequence[Recording], limits: RecordingLimits
) -> tuple[Path, dict[str, int], list[Problem]]:
    """Join the groups of clips with the same sound, and give each joined group one split.

    It is the first of test, validation and train that one of its clips has. Clips of other splits
    move there, or are left out if their data set fixes another split or that split has a limit.

    Returns:
        The folder of the store, which is another if it changed; counts for the stage's metrics;
        recordings left out.
    """
    store = ClipStore.open(folder)
    rows, groups = store.rows, store.rows["group"].tolist()
    copies = find_copies(store, groups)
    joined = joined_groups(copies, groups)
    strictest = {split: i for i, split in enumerate(reversed(SPLITS))}
    of_group: dict[str, str] = {}
    for group, split in zip(joined, rows["split"], strict=True):
        of_group[group] = min(of_group.get(group, split), split, key=strictest.__getitem__)
    fixed = {r.name: r.fixed for r in recordings}
    table, keep, left_out, moved = [], [], {}, 0
    for i, row in enumerate(rows.to_dict("records")):
        split = of_group[joined[i]]
        if row["split"] != split:
            if fixed[row["recording"]] or getattr(limits, split):
                left_out[row["recording"]] = Problem(row["recording"], COPY, f"in {split}")
                continue
            moved += 1
        table.append(row | {"group": joined[i], "split": split})
        keep.append(i)
    counts = {
        "identical": sum(c.identical for c in copies),
        "near_identical": sum(not c.identical for c in copies),
        "groups_joined": len(set(groups)) - len(of_group),
        "clips_moved": moved, "clips_left_out": len(rows) - len(keep),
        "leaks": len({(r["group"], r["split"]) for r in table} - set(of_group.items())),
    }  # fmt: skip
    if copies:
        shutil.rmtree(folder / KEPT, ignore_errors=True)
        (folder / KEPT).mkdir()
        clips = ((store.audio([i])[0], row) for i, row in zip(keep, table, strict=True))
        write_clips(folder / KEPT, clips, store.sample_rate, store.samples)
        folder = folder / KEPT
    return folder, counts, list(left_out.values())


def _first_problems(problems: list[list[str]]) -> str:
    """Summarise problems for the end of an error message."""
    if not problems:
        return ""
    counts = ", ".join(f"{r} {n}" for r, n in Counter(p[1] for p in problems).most_common(5))
    return f"; left out: {counts}; first: {' '.join(problems[0])}"


def write_report(
    folder: Path, scan: Scan, problems: Sequence[Sequence[str]], counts: Mapping[str, object]
) -> None:
    """Write skipped.csv with every [name, reason, detail], and recordings.json for `measure`."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("name", "reason", "detail"))
    table.writerows(problems)
    write_text(folder / "skipped.csv", text.getvalue())
    named: dict[str, list[str]] = {}
    for name, reason, _ in problems:
        named.setdefault(reason, []).append(name)
    audio = {p.name: {"bytes": p.stat().st_size} for p in scan.audio.paths if p.is_file()}
    report = {
        "facts": dict(scan.facts),
        "inputs": describe_inputs(scan.inputs) | audio,
        "skipped": {r: {"count": len(n), "names": n[:NAMED]} for r, n in named.items()},
        "counts": dict(counts),
    }
    write_json(folder / REPORT, report)


def measure(store: ClipStore, seed: int) -> dict[str, object]:
    """Compute the stage's metrics for recordings: counts, labels and their rule, skipped items.

    `skipped` counts all skipped items, `skipped_by_reason` names the first NAMED per reason.
    """
    rows, report = store.rows, read_json(store.folder / REPORT)
    counts = rows.groupby(["kind", "font", "split"]).size()
    counted, shares = {}, {}
    for name in labelled(rows):
        known, has = known_labels(rows, name)
        split = rows["split"].to_numpy()[known]
        counted[name] = {
            "with": int(has.sum()), "without": int((~has).sum()), "unknown": len(rows) - len(has),
            **{f"with_{s}": int(has[split == s].sum()) for s in SPLITS},
        }  # fmt: skip
        shares[name] = float(has.mean()) if len(has) else float("nan")
    at, guitar = known_labels(rows, "guitar")
    rng = np.random.default_rng(seed_for(seed, "recordings", "cues"))
    picked = np.sort(rng.permutation(len(at))[:CUE_CLIPS])
    return {
        "clips": {"-".join(key): n for key, n in zip(counts.index, counts.tolist(), strict=True)},
        "groups": rows.groupby("split")["group"].nunique().to_dict(),
        "labels": counted,
        "share_with": shares,
        "trivial_cue_auroc": {"clips": _cue_aurocs(store, at[picked], guitar[picked])},
        "skipped": sum(entry["count"] for entry in report["skipped"].values()),
        "skipped_by_reason": report["skipped"],
        "inputs": report["inputs"],
        **report["counts"],
        **report["facts"],
    }


def _cue_aurocs(store: ClipStore, at: np.ndarray, guitar: np.ndarray) -> dict[str, float]:
    """Compute each trivial cue's AUROC for guitar against known absence."""
    if not 0 < guitar.sum() < len(guitar):
        return dict.fromkeys(TRIVIAL_CUES, float("nan"))
    cues = np.concatenate([trivial_cues(store.audio([r]), store.sample_rate) for r in at])
    return {name: auroc(cues[:, i], guitar) for i, name in enumerate(TRIVIAL_CUES)}
