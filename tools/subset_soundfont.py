"""Make assets/soundfonts/FluidR3Mono_GM.sf3: the presets that the data set plays, and no others.

The source is the file of Debian's package fluidr3mono-gm-soundfont. Samples stay compressed as they
are; what is rendered differs by the rounding of the player's interpolation alone, 1e-7.

    python -m tools.subset_soundfont /usr/share/sounds/sf3/FluidR3Mono_GM.sf3 out.sf3
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from musicscope.core.command_line import Parser, run_program
from musicscope.core.io import atomic_file
from musicscope.data.taxonomy import BASS_NAMES, PROGRAM_NAMES
from musicscope.embedded.rendering.soundfonts import DRUM_BANK

KEPT = {(DRUM_BANK, 0)} | {
    (0, program) for names in (*PROGRAM_NAMES.values(), BASS_NAMES) for program in names
}
"""(bank, program) of every instrument that is played"""
FORMATS = {
    "phdr": "<20sHHHIII", "pbag": "<HH", "pmod": "<HHhHH", "pgen": "<HH", "inst": "<20sH",
    "ibag": "<HH", "imod": "<HHhHH", "igen": "<HH", "shdr": "<20sIIIIIBbHH",
}  # fmt: skip
"""Records of a SoundFont 2 file; the last of each list only marks its end"""
INSTRUMENT, SAMPLE = 41, 53  # generators that name what a zone plays

Record = tuple[Any, ...]
"""The fields that FORMATS gives"""
Zone = tuple[list[Record], list[Record]]
"""Generators, modulators"""


def chunks(content: bytes, start: int, end: int) -> dict[str, bytes]:
    """Read the chunks between two offsets by name; of a LIST, by the name of its form."""
    found = {}
    while start + 8 <= end:
        name, size = struct.unpack_from("<4sI", content, start)
        body = content[start + 8 : start + 8 + size]
        if name == b"LIST":
            name, body = body[:4], body[4:]
        found[name.decode()] = body
        start += 8 + size
        # A chunk of odd size has a zero behind it; the encoder of this file left some out.
        if size % 2 and content[start : start + 1] == b"\0":
            start += 1
    return found


def zones(tables: dict[str, list[Record]], of: str, first: int, end: int) -> list[Zone]:
    """Read the zones `first` to `end` of the presets ("p") or of the instruments ("i")."""
    bags, generators, modulators = (tables[of + name] for name in ("bag", "gen", "mod"))
    return [
        (generators[a[0] : b[0]], modulators[a[1] : b[1]])
        for a, b in itertools.pairwise(bags[first : end + 1])
    ]


def named(found: Sequence[Zone], generator: int) -> list[int]:
    """List what the zones name with a generator."""
    return [value for records, _ in found for code, value in records if code == generator]


def subset(content: bytes) -> bytes:
    """Return a soundfont with the presets `KEPT`; ValueError if one is missing."""
    if content[:4] != b"RIFF" or content[8:12] != b"sfbk":
        raise ValueError("not a soundfont: no RIFF header of form sfbk")
    parts = chunks(content, 12, len(content))
    pool = chunks(parts["sdta"], 0, len(parts["sdta"]))["smpl"]
    raw = chunks(parts["pdta"], 0, len(parts["pdta"]))
    tables = {name: list(struct.iter_unpack(form, raw[name])) for name, form in FORMATS.items()}

    presets = [
        (head, zones(tables, "p", head[3], after[3]))
        for head, after in itertools.pairwise(tables["phdr"])
        if (head[2], head[1]) in KEPT
    ]
    if missing := KEPT - {(head[2], head[1]) for head, _ in presets}:
        raise ValueError(f"the soundfont has no preset (bank, program) {sorted(missing)}")
    used = sorted({i for _, found in presets for i in named(found, INSTRUMENT)})
    heads = tables["inst"]
    instruments = [(heads[i], zones(tables, "i", heads[i][1], heads[i + 1][1])) for i in used]
    samples = sorted({i for _, found in instruments for i in named(found, SAMPLE)})

    out: dict[str, list[Record]] = {name: [] for name in FORMATS}

    def write(of: str, found: list[Zone], generator: int, order: list[int]) -> int:
        first = len(out[of + "bag"])
        for generators, modulators in found:
            out[of + "bag"].append((len(out[of + "gen"]), len(out[of + "mod"])))
            out[of + "gen"] += [
                (code, order.index(value) if code == generator else value)
                for code, value in generators
            ]
            out[of + "mod"] += modulators
        return first

    for head, found in presets:
        first = write("p", found, INSTRUMENT, used)
        out["phdr"].append((*head[:3], first, *head[4:]))
    for head, found in instruments:
        out["inst"].append((head[0], write("i", found, SAMPLE, samples)))
    sound = b""
    for i in samples:
        name, start, end, *rest = tables["shdr"][i]
        out["shdr"].append((name, len(sound), len(sound) + end - start, *rest))
        sound += pool[start:end]
    ends = {"phdr": {3: "pbag"}, "inst": {1: "ibag"},
            "pbag": {0: "pgen", 1: "pmod"}, "ibag": {0: "igen", 1: "imod"}}  # fmt: skip
    for name, form in FORMATS.items():
        last = list(struct.unpack(form, bytes(struct.calcsize(form))))
        for field, table in ends.get(name, {}).items():
            last[field] = len(out[table])
        out[name].append(tuple(last))

    def chunk(name: bytes, body: bytes) -> bytes:
        return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)

    lists = {
        b"INFO": parts["INFO"],
        b"sdta": chunk(b"smpl", sound),
        b"pdta": b"".join(
            chunk(name.encode(), b"".join(struct.pack(form, *record) for record in out[name]))
            for name, form in FORMATS.items()
        ),
    }
    body = b"sfbk" + b"".join(chunk(b"LIST", name + content) for name, content in lists.items())
    return chunk(b"RIFF", body)


def main() -> None:
    """Command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    with atomic_file(options.out) as path:
        path.write_bytes(subset(options.source.read_bytes()))


if __name__ == "__main__":
    run_program(main)
