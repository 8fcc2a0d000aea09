"""MusicBench (amaai-lab/MusicBench, CC-BY-SA-3.0): JSON lines and one tar of 10-second clips."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from musicscope.config import PrepareData
from musicscope.data.audio_files import Problem
from musicscope.data.concepts import Concepts
from musicscope.data.sources import labels
from musicscope.data.sources.recordings import (
    BAD_ROW,
    Recording,
    Scan,
    find_audio,
    find_file,
    last_two,
    make_id,
    number,
    read_json_lines,
    unsafe,
)

LOCATION = re.compile(r'"location"\s*:\s*"([^"]+)"')
SPLIT_FILE = re.compile(r"(?:MusicBench_)?(train|test_?a|test_?b)\.jsonl?", re.IGNORECASE)
NEW_KEY = "is_audioset_eval_mcaps"
"""The old release lacks it."""
KEYS = frozenset({
    "dataset", "location", "main_caption", "alt_caption", "prompt_aug", "prompt_ch", "prompt_bt",
    "prompt_bpm", "prompt_key", "beats", "bpm", "chords", "chords_time", "key", "keyprob", NEW_KEY,
})  # fmt: skip
ID_LENGTH = 11
"""Characters of a YouTube id: a copy is named <id>_<n>, but an id may itself end in _7."""


@dataclass(frozen=True)
class Row:
    """One usable row."""

    location: str
    caption: str
    fields: Mapping[str, object]


def split_files(folder: Path) -> dict[str, Path]:
    """Find the files of train, test_a and test_b (old name: testA).

    Raises:
        FileNotFoundError: no train file, naming the folder.
        ValueError: two files for one split.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if match := SPLIT_FILE.fullmatch(path.name):
            name = match[1].lower().replace("testa", "test_a").replace("testb", "test_b")
            if files.setdefault(name, path) != path:
                raise ValueError(f"{files[name]} and {path.name} are of one split; remove one")
    if "train" not in files:
        raise FileNotFoundError(
            f"{folder} holds no MusicBench_train.json; set prepare_data.recordings.folder to a "
            "download of amaai-lab/MusicBench (three .json files and MusicBench.tar.gz)"
        )
    return files


def read_rows(path: Path, problems: list[Problem], bases: set[str]) -> Iterator[Row]:
    """Read the rows of one file; others are added to `problems`, and every source clip to `bases`.

    The source clip counts even if the rest of its row cannot be used: its copies are still copies.
    """
    for where, line, row in read_json_lines(path, problems):
        location, caption = row.get("location"), row.get("main_caption")
        found = [location] if isinstance(location, str) else LOCATION.findall(line)
        bases.update(map(base_id, found))
        if not isinstance(location, str) or not isinstance(caption, str):
            if row:
                problems.append(Problem(where, BAD_ROW, "no location or main_caption"))
        elif unsafe(location):
            problems.append(Problem(location, "unsafe path", where))
        else:
            yield Row(location, caption, row)


def base_id(location: str) -> str:
    """Name the source clip: copies of one clip share the first eleven characters."""
    return PurePosixPath(location).name[:ID_LENGTH]


def _key_name(key: object) -> str:
    """Write ["F#", "minor"] as `F sharp minor`."""
    if not isinstance(key, list) or len(key) != 2 or not all(isinstance(k, str) for k in key):
        return ""
    root = key[0][:1] + key[0][1:].replace("#", " sharp").replace("b", " flat")
    return f"{root} {key[1]}"


def scan(config: PrepareData, seed: int, concepts: Concepts | None = None) -> Scan:
    """Read the metadata: test A and B are the same clips with other captions; A comes first."""
    settings = config.recordings
    folder = Path(settings.folder)
    files = split_files(folder)
    problems: list[Problem] = []
    rows: dict[str, tuple[str, Row]] = {}  # by key
    bases: dict[str, set[str]] = {"train": set(), "test": set()}
    counts: Counter[str] = Counter()
    for name in sorted(files, key=("test_a", "test_b", "train").index):
        split = "train" if name == "train" else "test"
        for row in read_rows(files[name], problems, bases[split]):
            counts[f"rows_{name}"] += 1
            counts["rows_without_" + NEW_KEY] += NEW_KEY not in row.fields
            counts["rows_with_other_keys"] += not row.fields.keys() <= KEYS
            key = last_two(row.location)
            if key in rows:
                counts["rows_repeated"] += 1
                continue
            rows[key] = (split, row)
    tested = bases["test"]
    recordings, answers, taken = [], [], set()
    for key, (split, row) in rows.items():
        base = base_id(row.location)
        if split == "train" and base in tested:
            problems.append(Problem(row.location, "train copy of a test clip", base))
            continue
        # The alternative caption is nearer the original; the main one may drop words. Either
        # naming an instrument is enough.
        texts = [row.fields.get("alt_caption"), row.caption]
        texts = [t for t in texts if isinstance(t, str) and t.strip()]
        said = [labels.from_caption(t, concepts) for t in texts]
        answers.append(said)
        recordings.append(
            Recording(
                name=row.location, key=key, id=make_id("musicbench", row.location, taken),
                group=f"musicbench-{base}", split="" if not tested else split,
                labels=labels.merge(said), captions=(row.caption,),
                tempo_bpm=number(row.fields.get("bpm")),
                music_key=_key_name(row.fields.get("key")),
            )
        )  # fmt: skip
    pairs = [(a["guitar"], m["guitar"]) for a, m in (s for s in answers if len(s) == 2)]
    facts = {
        "rows": dict(sorted(counts.items())),
        "label_rule": "alternative and main caption, either is enough. " + labels.CAPTION_RULE,
        "guitar_alternative_against_main_caption": labels.agreement(pairs),
    }
    tar = find_file(folder, "MusicBench*.tar*", "MusicBench*.tgz")  # not FMACaps beside it
    audio = find_audio(settings.folder, settings.audio or str(tar or ""), "datashare")
    return Scan(
        tuple(recordings), audio, tuple(problems), facts, tuple(files.values()), frozenset(rows)
    )
