"""Tunes of three books and the Bach chorales, read from the corpus in music21's wheel.

O'Neill (1850 tunes, in several transcriptions), Aird and Ryan are ABC files. abc2midi, which
symusic carries, expands repeats and endings and gives the first note of each bar a velocity of its
own. Bars are found by that velocity. The chorales are MusicXML in four parts. The Essen collection
is left out, because its licence allows non-commercial use only.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import xml.etree.ElementTree as ElementTree
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import sparse

from musicscope.data.wheel_assets import Wheel

MUSIC21 = Wheel(
    "music21==10.5.1", "dc3309498c4c95cebdf8d4f20c868deb6b63bce1d929cad4f51a7ccc982987b1"
)
CORPUS = "music21/corpus/"
BOOKS = {"oneill": "oneills1850/", "ryan": "ryansMammoth/", "aird": "airdsAirs/"}
CHORALES = "bach"
BOOK_SPLITS = {"oneill": "train", "ryan": "validation", "aird": "test", CHORALES: "test"}
"""The chorales are a held-out style: only test has them."""
KEPT_FIRST = ("test", "validation", "train")  # the largest book loses the melodies in several
MODES = {
    "major": (0, 2, 4, 5, 7, 9, 11),
    "minor": (0, 2, 3, 5, 7, 8, 10),
    "dorian": (0, 2, 3, 5, 7, 9, 10),
    "mixolydian": (0, 2, 4, 5, 7, 9, 10),
    "lydian": (0, 2, 4, 6, 7, 9, 11),
    "phrygian": (0, 1, 3, 5, 7, 8, 10),
}
"""Mode -> pitch classes above the tonic."""
_MODE_PREFIXES = {
    "": "major", "maj": "major", "ion": "major", "m": "minor", "min": "minor", "aeo": "minor",
    "dor": "dorian", "mix": "mixolydian", "lyd": "lydian", "phr": "phrygian",
}  # fmt: skip
LETTERS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
METERS = {(2, 2), (2, 4), (4, 4), (3, 4), (3, 8), (6, 4), (6, 8), (9, 8), (12, 8)}
GRID = 48
"""Onsets and durations are whole multiples of 1 / GRID of a quarter note."""
MIN_BARS = 8
MIN_NOTES = 24
BAR_VELOCITY = 105  # abc2midi's velocity of the first note in a bar
SHINGLE = 8  # successive intervals in one fingerprint
SAME_SHARE = 0.15
"""Two tunes are the same if they share this part of the fingerprints of the shorter one."""


@dataclass(frozen=True)
class Tune:
    """One melody, or one chorale in four voices. Times are in quarter notes."""

    group: str
    """Book and number, such as ``aird/book1-0001``; the same for all settings of one melody."""
    book: str
    title: str
    meter: tuple[int, int]
    tonic: int
    """Pitch class, C = 0."""
    mode: str
    """A key of MODES."""
    start: np.ndarray
    """Onsets [notes], float64, sorted; 0 is the first downbeat, so that a pickup is negative."""
    duration: np.ndarray
    pitch: np.ndarray
    """MIDI numbers [notes], int64."""
    voice: np.ndarray
    """Index of the voice [notes], int64: 0 for a melody, 0 (soprano) to 3 (bass) in a chorale."""

    @property
    def bar(self) -> float:
        """Quarter notes per bar."""
        return 4.0 * self.meter[0] / self.meter[1]

    @property
    def bars(self) -> int:
        """Whole bars from the first downbeat to the last onset."""
        return int(np.floor(self.start[-1] / self.bar + 1e-6)) + 1

    @property
    def harmonised(self) -> bool:
        """Whether the tune comes in several voices."""
        return bool(self.voice.any())


class MalformedTune(ValueError):
    """A tune that cannot be used, with the reason as its message."""


def parse_key(text: str) -> tuple[int, str]:
    """Parse an ABC key such as ``F#m`` or ``A Mixolydian`` into (tonic, mode).

    Raises:
        MalformedTune: no key of a known mode.
    """
    if text.strip().lower() == "hp":  # Highland pipes
        return 9, "mixolydian"
    found = re.match(r"\s*([A-G])([#b]?)\s*([A-Za-z]*)", text)
    word = "" if not found or found[3] == "M" else found[3].lower()[:3]
    if not found or word not in _MODE_PREFIXES:
        raise MalformedTune("unknown key")
    accidental = {"#": 1, "b": -1, "": 0}[found[2]]
    return (LETTERS[found[1]] + accidental) % 12, _MODE_PREFIXES[word]


def _clean_abc(text: str) -> tuple[dict[str, str], str]:
    """Take the fields T, M, L and K and the bare notes of one tune.

    Ornaments, bowings, fingerings and words are dropped, because `arrange` adds its own ornaments.
    """
    fields: dict[str, str] = {}
    body: list[str] = []
    for raw in text.splitlines():
        line = raw.split("%")[0].strip()
        field = re.match(r"([A-Za-z]):(.*)", line)
        if field and "K" not in fields:
            fields.setdefault(field[1], field[2].strip())
        elif field and field[1] in "MLK":
            body.append(line)
        elif field and field[1] == "V":
            raise MalformedTune("several voices")
        elif line and not field and "K" in fields:
            bare = re.sub(r'"[^"]*"|\{[^}]*\}|![^!]*!|\+[^+]*\+|`', "", line)
            # Decorations are single letters; inline fields such as [M:3/4] keep theirs.
            body.append(re.sub(r"(\[[A-Za-z]:[^\]]*\])|[~uvTHLMOPSRJ.]", r"\1", bare))
    if not {"M", "K"} <= set(fields) or not body:
        raise MalformedTune("no meter, key or notes")
    head = f"X:1\nM:{fields['M']}\nL:{fields.get('L') or '1/8'}\nK:{fields['K']}\n"
    return fields, head + "\n".join(body) + "\n"


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Send the output of child processes to the null device: abc2midi reports every odd bar."""
    saved = os.dup(1), os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        for handle in (*saved, null):
            os.close(handle)


def _on_bars(start: np.ndarray, first: np.ndarray, bar: int) -> np.ndarray:
    """Move sections so that each written bar begins on the bar grid.

    Books often leave out that a section's last bar and the next pickup fill one bar. Such a
    pickup then overlaps the end of the bar before; a short bar without a pickup is filled up.

    Args:
        start: onsets [notes] in grid units.
        first: True for the first note of a written bar [notes]; full bars and parts of bars.
        bar: grid units per bar.

    Returns:
        Onsets [notes], 0 at the first downbeat.
    """
    marks = np.flatnonzero(first)
    lengths = np.diff(start[marks])
    near = np.abs((lengths + bar // 2) % bar - bar // 2) <= GRID // 16
    whole = np.maximum(np.round(lengths / bar), 1).astype(int) * bar
    moved = start.copy()
    position = 0
    i = 0
    if len(marks) > 1 and not near[0] and lengths[0] < bar:  # the tune's own pickup
        moved[marks[0] : marks[1]] += -lengths[0] - start[marks[0]]
        i = 1
    while i < len(marks):
        end = marks[i + 1] if i + 1 < len(marks) else len(start)
        moved[marks[i] : end] += position - start[marks[i]]
        if i == len(lengths) or near[i]:
            position += whole[i] if i < len(lengths) else 0
        elif (
            i + 1 < len(lengths)
            and not near[i + 1]
            and (abs(lengths[i] + lengths[i + 1] - bar) <= GRID // 16)
        ):
            after = marks[i + 2]
            moved[marks[i + 1] : after] += position + lengths[i] - start[marks[i + 1]]
            position += bar
            i += 1
        elif lengths[i] <= bar // 2:  # a pickup over the end of the bar before
            moved[marks[i] : end] -= lengths[i]
        else:
            position += int(np.ceil(lengths[i] / bar)) * bar
        i += 1
    return moved


def parse_abc(text: str, book: str, number: str) -> Tune:
    """Parse one ABC tune.

    Raises:
        MalformedTune: no notes, several voices or meters, a rare meter, or too short.
    """
    from symusic import Score  # absent where tunes are only loaded, see `scores`

    fields, abc = _clean_abc(text)
    tonic, mode = parse_key(fields["K"])
    with _silenced():
        try:
            score = Score.from_abc(abc)
        except RuntimeError as error:
            raise MalformedTune("abc2midi fails") from error
    meters = {(s.numerator, s.denominator) for s in score.time_signatures}
    if len(meters) != 1:
        raise MalformedTune("no meter or several meters")
    if meters - METERS:
        raise MalformedTune("rare meter")
    if not score.tracks or len(score.tracks[0].notes) < MIN_NOTES:
        raise MalformedTune("too few notes")
    meter = meters.pop()
    notes = score.tracks[0].notes.numpy()
    units = GRID / score.tpq
    start = np.round(notes["time"] * units).astype(np.int64)
    end = np.round((notes["time"] + notes["duration"]) * units).astype(np.int64)
    # Of a written chord only the top note is melody.
    order = np.lexsort((-notes["pitch"].astype(int), start))
    top = order[np.diff(start[order], prepend=-1) > 0]
    bar = GRID * 4 * meter[0] // meter[1]
    moved = _on_bars(start[top], notes["velocity"][top] == BAR_VELOCITY, bar)
    duration = end[top] - start[top]
    # A pickup moved onto the bar before cuts that bar's notes short.
    order = np.argsort(moved, kind="stable")
    moved, duration, top = moved[order], duration[order], top[order]
    gap = np.diff(moved, append=moved[-1] + duration[-1])
    keep = gap > 0
    duration = np.minimum(duration, gap)[keep]
    tune = Tune(
        f"{book}/{number}", book, fields.get("T", "").strip(), meter, tonic, mode,
        moved[keep] / GRID, duration / GRID,
        notes["pitch"][top][keep].astype(np.int64), np.zeros(int(keep.sum()), np.int64),
    )  # fmt: skip
    if tune.bars * tune.bar < MIN_BARS * 2 or len(tune.pitch) < MIN_NOTES:
        raise MalformedTune("too short")
    if tune.pitch.max() - tune.pitch.min() > 36:
        raise MalformedTune("range over three octaves")
    return tune


def parse_musicxml(data: bytes, number: str) -> Tune:
    """Parse one chorale in four parts; repeats are played once.

    Raises:
        MalformedTune: not four parts, or no key.
    """
    root = ElementTree.fromstring(data)
    parts = root.findall("part")
    if len(parts) != 4:
        raise MalformedTune("not four parts")
    notes: list[tuple[float, float, int, int]] = []
    meter, tonic, mode, pickup = (4, 4), None, "major", 0.0
    for voice, part in enumerate(parts):
        now, divisions = 0.0, 1.0
        held: dict[int, int] = {}  # pitch of an open tie -> index of its note
        for index, measure in enumerate(part.findall("measure")):
            for item in measure:
                if item.tag == "attributes":
                    divisions = float(item.findtext("divisions") or divisions)
                    if voice == 0 and index == 0:
                        beats, unit = item.findtext("time/beats"), item.findtext("time/beat-type")
                        meter = (int(beats), int(unit)) if beats and unit else meter
                        tonic, mode = _musicxml_key(item)
                elif item.tag in ("backup", "forward"):
                    sign = -1.0 if item.tag == "backup" else 1.0
                    now += sign * float(item.findtext("duration")) / divisions
                elif item.tag == "note" and item.find("grace") is None:
                    length = float(item.findtext("duration")) / divisions
                    chord = item.find("chord") is not None
                    step = item.findtext("pitch/step")
                    if step is not None and not chord:
                        alter = int(float(item.findtext("pitch/alter") or 0))
                        pitch = 12 + 12 * int(item.findtext("pitch/octave")) + LETTERS[step] + alter
                        ties = {tie.get("type") for tie in item.findall("tie")}
                        if "stop" in ties and pitch in held:
                            s, d, p, v = notes[held[pitch]]
                            notes[held[pitch]] = (s, d + length, p, v)
                        else:
                            held[pitch] = len(notes)
                            notes.append((now, length, pitch, voice))
                        if "start" not in ties:
                            held.pop(pitch, None)
                    if not chord:
                        now += length
            if voice == 0 and index == 0 and now < 4.0 * meter[0] / meter[1]:
                pickup = now
    if tonic is None or len(notes) < MIN_NOTES:
        raise MalformedTune("no key or no notes")
    start, duration, pitch, voices = np.array(sorted(notes, key=lambda n: (n[0], n[3]))).T
    start, duration = (np.round(GRID * x) / GRID for x in (start - pickup, duration))
    return Tune(
        f"{CHORALES}/{number}", CHORALES, number, meter, tonic, mode, start, duration,
        pitch.astype(np.int64), voices.astype(np.int64),
    )  # fmt: skip


def _musicxml_key(attributes: ElementTree.Element) -> tuple[int | None, str]:
    """(tonic, mode) of a MusicXML key; a missing mode counts as major."""
    fifths = attributes.findtext("key/fifths")
    if fifths is None:
        return None, "major"
    mode = attributes.findtext("key/mode") or "major"
    mode = mode if mode in MODES else "major"
    # The major scale with as many accidentals begins as many fifths above C.
    offset = {"major": 0, "minor": 9, "dorian": 2, "mixolydian": 7, "lydian": 5, "phrygian": 4}
    return (7 * int(fifths) + offset[mode]) % 12, mode


def _abc_texts(archive: zipfile.ZipFile, book: str) -> Iterator[tuple[str, str]]:
    """(number, text) of every tune of a book, in the order of the files."""
    folder = CORPUS + BOOKS[book]
    for name in sorted(archive.namelist()):
        if name.startswith(folder) and name.endswith(".abc"):
            text = archive.read(name).decode("latin-1")
            stem = Path(name).stem
            for tune in re.split(r"(?m)^(?=X:)", text)[1:]:
                number = re.match(r"X:\s*(\d+)", tune)
                yield (f"{stem}-{int(number[1]):04d}" if number else stem), tune


def _parse(source: tuple[str, str, str | bytes]) -> Tune | str:
    """Return the tune of (book, number, content), or the book and reason if it is malformed."""
    book, number, content = source
    try:
        if isinstance(content, bytes):
            return parse_musicxml(content, number)
        return parse_abc(content, book, number)
    except MalformedTune as error:
        return f"{book}: {error}"


def read_tunes(wheel: str | Path, processes: int = 1) -> tuple[list[Tune], Counter[str]]:
    """Read all books and chorales from the music21 wheel, settings of one melody not yet merged.

    Returns:
        tunes: in the order of the books.
        skipped: number of unusable tunes by book and reason.
    """
    sources: list[tuple[str, str, str | bytes]] = []
    with zipfile.ZipFile(wheel) as archive:
        for book in BOOKS:
            sources += [(book, number, text) for number, text in _abc_texts(archive, book)]
        for name in sorted(archive.namelist()):
            if name.startswith(f"{CORPUS}bach/") and name.endswith(".mxl"):
                with zipfile.ZipFile(io.BytesIO(archive.read(name))) as packed:
                    inner = next(n for n in packed.namelist() if re.match(r"[^/]*xml$", n))
                    sources.append((CHORALES, Path(name).stem, packed.read(inner)))
    if processes > 1:  # symusic takes 17 ms per tune, most of it to start abc2midi
        from musicscope.core.parallel import follow_parent  # loads torch

        with ProcessPoolExecutor(processes, initializer=follow_parent) as pool:
            found = list(pool.map(_parse, sources, chunksize=64))
    else:
        found = list(map(_parse, sources))
    tunes = [tune for tune in found if isinstance(tune, Tune)]
    return tunes, Counter(reason for reason in found if isinstance(reason, str))


def fingerprints(tune: Tune) -> set[int]:
    """Hash runs of SHINGLE intervals, so that transposed settings of one melody share them.

    Two kinds: intervals of successive different notes, which do not depend on rhythm, and intervals
    between the quarters of each bar, which do not depend on passing notes.
    """
    melody = tune.voice == 0
    start, pitch = tune.start[melody], tune.pitch[melody]
    steps = np.diff(pitch)
    beats = np.arange(0.0, tune.bars * tune.bar, tune.bar / (3 if tune.meter[0] % 3 == 0 else 4))
    sounding = pitch[np.maximum(np.searchsorted(start, beats + 1e-6, side="right") - 1, 0)]
    found: set[int] = set()
    for kind, intervals in enumerate((steps[steps != 0], np.diff(sounding))):
        if len(intervals) >= SHINGLE:
            runs = np.lib.stride_tricks.sliding_window_view(intervals, SHINGLE)
            runs = runs[np.count_nonzero(runs, axis=1) >= SHINGLE // 2]
            digits = (runs + 37) @ (75 ** np.arange(SHINGLE, dtype=np.int64))
            found.update((2 * digits + kind).tolist())
    return found


def same_tunes(tunes: list[Tune]) -> np.ndarray:
    """Label tunes so that settings of one melody share a label.

    Returns:
        labels: int [tunes], the index of the first tune of each melody.
    """
    sets = [fingerprints(t) for t in tunes]
    words = {word: i for i, word in enumerate(sorted(set().union(*sets)))}
    rows = np.repeat(np.arange(len(sets)), [len(s) for s in sets])
    columns = np.array([words[w] for s in sets for w in sorted(s)], np.int64)
    shape = (len(sets), max(len(words), 1))
    table = sparse.csr_matrix((np.ones(len(rows), np.int32), (rows, columns)), shape)
    shared = (table @ table.T).tocoo()
    size = np.array([len(s) for s in sets])
    same = shared.data >= SAME_SHARE * np.minimum(size[shared.row], size[shared.col])
    graph = sparse.coo_matrix(
        (np.ones(same.sum()), (shared.row[same], shared.col[same])), (len(sets),) * 2
    )
    _, component = sparse.csgraph.connected_components(graph, directed=False)
    _, first = np.unique(component, return_index=True)
    return first[component]


def merge_settings(tunes: list[Tune]) -> tuple[list[Tune], Counter[str]]:
    """Give settings of one melody one group, and keep each melody in one split only.

    A melody in several splits stays in the one that comes first in KEPT_FIRST.

    Returns:
        kept: tunes in their order, with groups renamed to that of the melody's first kept setting.
        dropped: number of tunes left out by book.
    """
    labels = same_tunes(tunes)
    rank = np.array([KEPT_FIRST.index(BOOK_SPLITS[t.book]) for t in tunes])
    best = np.full(len(tunes), len(KEPT_FIRST))
    np.minimum.at(best, labels, rank)
    kept: list[Tune] = []
    names: dict[int, str] = {}
    dropped: Counter[str] = Counter()
    for tune, label, place in zip(tunes, labels.tolist(), rank, strict=True):
        if place > best[label]:
            dropped[tune.book] += 1
        else:
            kept.append(replace(tune, group=names.setdefault(label, tune.group)))
    return kept, dropped
