"""Accompaniment styles as tables of steps.

One character is one step; spaces separate beats and mean nothing. A beat has four steps, or three
in styles with triplets. A pattern is one or more bars long.

- Loudness: ``X`` accent, ``x`` normal, ``o`` soft, ``g`` ghost, ``?`` soft and only sometimes.
- ``.`` is silence, ``_`` holds the note before.
- Basses name tones of the chord: ``1 3 5 7 8``, ``4`` (the fifth below), ``w`` (a walking tone),
  ``a`` (a step below or above the next root), ``p`` (the tonic, whatever the chord).
- Comping is ``kind pattern``; kinds: ``block`` (all tones), ``strum`` (tones one after another,
  like strings), ``stab`` (short block), ``arp`` (digits name tones, 0 the lowest), ``pad`` (held to
  the next chord), ``tremolo`` (fast repeats), ``drone`` (tonic and fifth, whatever the chord).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

WEIGHTS = {"X": 1.2, "o": 0.78, "g": 0.5, "?": 0.7}
"""Loudness of a step relative to a normal one; other characters count 1."""
DRUM_KEYS = {
    "K": 36, "S": 38, "R": 37, "L": 39, "H": 42, "P": 44, "O": 46, "C": 49, "r": 51, "B": 53,
    "T": 54, "W": 56, "M": 70, "V": 75, "G": 63, "g": 64, "b": 60, "d": 61, "t": 45, "f": 41,
    "A": 81, "h": 50, "E": 40,
}  # fmt: skip
"""Line of a drum pattern -> General MIDI drum key."""


@dataclass(frozen=True)
class Pattern:
    """One line of steps."""

    text: str
    beats: int
    """Beats per bar."""
    division: int
    """Steps per beat."""

    @cached_property
    def bars(self) -> int:
        """Length in bars."""
        return len(self.text.replace(" ", "")) // (self.beats * self.division)

    @cached_property
    def _events(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        steps = self.text.replace(" ", "")
        if not steps or len(steps) % (self.beats * self.division):
            raise ValueError(f"{self.text!r} is no whole number of bars of {self.beats} beats")
        on = [i for i, c in enumerate(steps) if c not in "._"]
        length = [len(steps[i:]) - len(steps[i + 1 :].lstrip("_")) for i in on]
        symbols = [steps[i] for i in on]
        return (
            np.array(on, np.float64) / self.division,
            np.array(length, np.float64) / self.division,
            np.array(symbols, "U1"),
            np.array([WEIGHTS.get(c, 1.0) for c in symbols]),
        )

    def over(self, bars: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Repeat the pattern over `bars` bars.

        Returns:
            time: onsets [events], beats from the start.
            length: beats [events].
            symbol: characters [events].
            weight: relative loudness [events].
        """
        time, length, symbol, weight = self._events
        repeats = -(-bars // self.bars)
        shift = np.arange(repeats)[:, None] * (self.bars * self.beats)
        times = (time + shift).ravel()
        keep = times < bars * self.beats
        many = (np.tile(x, repeats)[keep] for x in (length, symbol, weight))
        return times[keep], *many


@dataclass(frozen=True)
class Style:
    """What drums, bass and comping play. One of each list is drawn per piece."""

    name: str
    beats: int
    division: int
    tempo: tuple[float, float]
    """Range of beats per minute."""
    drums: tuple[tuple[tuple[int, Pattern], ...], ...]
    """Grooves; a groove is pairs of drum key and line. Empty: no drums."""
    bass: tuple[Pattern, ...]
    comping: tuple[tuple[str, Pattern], ...]
    swing: float
    """Where the second of two short steps falls, as a share of both; 0.5 is even."""
    held_out: bool


def _style(
    name: str, meter: str, tempo: tuple[float, float], drums: list[str], bass: list[str],
    comping: list[str], swing: float = 0.5, held_out: bool = False,
) -> Style:  # fmt: skip
    """Parse the tables of one style; `meter` is beats per bar x steps per beat."""
    beats, division = (int(n) for n in meter.split("x"))

    def line(text: str) -> Pattern:
        pattern = Pattern(text, beats, division)
        pattern.over(1)  # raises for a pattern of the wrong length
        return pattern

    grooves = tuple(
        tuple((DRUM_KEYS[row[0]], line(row[1:])) for row in map(str.strip, groove.split("|")))
        for groove in drums
    )
    chords = tuple((kind, line(rest)) for kind, rest in (c.split(" ", 1) for c in comping))
    return Style(
        name, beats, division, tempo, grooves, tuple(line(b) for b in bass), chords, swing, held_out
    )


_ALL = (
    _style("rock", "4x4", (92, 150),
        ["K x... ..x. x... .... |S .... x... .... x... |H x.x. x.x. x.x. x.x.",
         "K x... ..x. ..x. .... |S .... X... .... X..g |H X.o. X.o. X.o. X.o."],
        ["1_1_ 1_1_ 1_1_ 1_1_", "1___ __1_ 1___ 5_a_", "1_.1 __1_ 1_.1 __8_"],
        ["strum X_x_ x_x_ x_x_ x_x_", "block X___ ____ x___ __x_", "strum X___ __x_ ..x_ x_x_"]),
    _style("hard rock", "4x4", (84, 132),
        ["K x..x ..x. x.x. .... |S .... X... .... X... |H x... x... x... x..."
         " |C ?... .... .... ....",
         "K x.xx .... x.x. ..x. |S .... X... .... X... |O x... x... x... x..."],
        ["1_11 1_1_ 1_11 1_1_", "1_1_ 1_1_ 1_1_ 8_5_"],
        ["stab X.xx ..x. x.xx ..x.", "block X_.x _.x_ X_.x _.x_", "strum X_xx x_xx X_xx x_xx"]),
    _style("ballad", "4x4", (60, 84),
        ["K x... .... ..x. .... |R .... x... .... x... |H x.o. x.o. x.o. x.o.",
         "K x... ..o. x... .... |S .... o... .... o... |H oooo oooo oooo oooo"],
        ["1___ ____ 5___ ____", "1___ __5_ 8___ ____"],
        ["arp 0_1_ 2_1_ 3_2_ 1_2_", "pad x___ ____ ____ ____", "arp 0_1_ 2_3_ 2_1_ 2_1_",
         "block x___ o___ x___ o___"]),
    _style("hip-hop", "4x4", (72, 100),
        ["K x..x .... ..x. .... |S .... X... .... X..g |H x.x. x.xx x.x. x.x?",
         "K x... ..x. .xx. .... |L .... X... .... X... |H xxox xxox xxox xxox"
         " |M ..o. ..o. ..o. ..o."],
        ["1__1 ____ ..1_ ..5_", "1___ __8_ .._1 __a_"],
        ["block X__x ____ .... ....", "stab .... ..x. .... ..x.", "pad x___ ____ ____ ____",
         "arp 0.2. 1.3. 0.2. 1.2."], swing=0.57),
    _style("trap", "4x4", (66, 84),
        ["K x... ..x. ..x. .... |L .... .... X... .... |H xxox xxxx xoxo x?xx",
         "K x..x .... ...x ..x. |S .... .... X... .... |H x.xx x.xx xxxx x.x?"],
        ["1___ ____ ..1_ ____", "1___ __1_ ____ 8_5_"],
        ["arp 3_._ 2_._ 1_._ 2_._", "pad x___ ____ ____ ____", "stab x..x ..x. .... ...."]),
    _style("funk", "4x4", (88, 116),
        ["K x.x. ...x ..x. .x.. |S .g.. X..g .g.g X..g |H xxox xxox xxox xxox",
         "K x..x ..x. .x.. x... |S .... X.g. .g.. X.gg |H x.xx x.xx x.xx x.xO"],
        ["1.1. ..81 ..1. .5a.", "1..1 ..8. .1.5 ..8a", "1.8. 1.8. 1.81 .87."],
        ["stab ..xx ..x. ..xx ..x.", "stab x..x ..x. .x.. x...", "strum xgxx gxgx xgxx gxgx"]),
    _style("reggae", "4x4", (66, 92),
        ["K .... .... X... .... |R .... .... X... .... |H x.x. x.x. x.x. x.x.",
         "K x... x... x... x... |R .... x... .... x..? |H o.x. o.x. o.x. o.x."],
        ["1_._ 1_5_ ..1_ 3_._", ".._1 __3_ 5___ ....", "1__1 __5_ ..8_ 5_.."],
        ["stab .... x... .... x...", "stab .... x.o. .... x.o.", "block ..x_ ..x_ ..x_ ..x_"],
        held_out=True),
    _style("march", "4x4", (96, 132),
        ["K x... .... x... .... |S x.xx x.x. x.xx xxxx",
         "K x... x... x... x... |S ..x. ..x. ..xx ..x. |C ?... .... .... ...."],
        ["1_.. 5_.. 1_.. 5_..", "1_.. 4_.. 1_.. 4_.."],
        ["stab .... x... .... x...", "stab ..x. ..x. ..x. ..x.", "block X_.. x_.. X_.. x_.."]),
    _style("reel", "4x4", (92, 126),
        ["f X..x ..x. X..x ..x. |T o.o. o.o. o.o. o.o.",
         "g x.xx x.xx x.xx x.xx |f X... .... x... ....",
         "K x... x... x... x... |H ..x. ..x. ..x. ..x."],
        ["1___ 5___ 1___ 5___", "1_1_ 5_1_ 1_1_ 5_a_"],
        ["strum X_ox o_ox X_ox o_ox", "strum X__x __x_ X__x __x_", "block X_x_ X_x_ X_x_ X_x_",
         "drone x___ ____ ____ ____"]),
    _style("folk", "4x4", (76, 126),
        ["f X... .... x... .... |T .... x... .... x...", "g x... o.x. x... o.x."],
        ["1___ ____ 5___ ____", "1___ 5___ 1___ 5___"],
        ["strum X___ x_x_ ..x_ x_x_", "arp 0_2_ 1_3_ 0_2_ 1_3_", "arp 0_23 1_23 0_23 1_23",
         "strum X___ o___ x_x_ o_x_"]),
    _style("country", "4x4", (96, 144),
        ["K x... .... x... .... |R .... x... .... x... |H x.x. x.x. x.x. x.x.",
         "E oooo Xooo oooo Xooo |K x... .... x... ...."],
        ["1___ .... 5___ ....", "1___ .... 4___ ..a_"],
        ["strum .... x_o_ .... x_o_", "arp 0_21 3_21 0_21 3_21", "stab .... x... .... x..."]),
    _style("polka", "4x4", (104, 144),
        ["K x... x... x... x... |S ..x. ..x. ..x. ..x.",
         "K x... x... x... x... |H ..x. ..x. ..x. ..xx"],
        ["1_.. 5_.. 1_.. 5_..", "1_.. 4_.. 1_.. 4_.."],
        ["stab ..x. ..x. ..x. ..x.", "stab ..xx ..x. ..xx ..x.", "block ..x_ ..x_ ..x_ ..x_"]),
    _style("habanera", "4x4", (84, 126),
        ["K x... x... x... x... |R x..x ..x. x..x ..x. |T o.o. o.o. o.o. o.o.",
         "g x..x x.x. x..x x.x. |M x.o. x.o. x.o. x.o."],
        ["1__1 __5_ 8__5 __1_", "1__5 __8_ 1__5 __8_"],
        ["block X__x __x_ X__x __x_", "arp 0__1 2_3_ 0__1 2_3_", "stab x..x ..x. x..x ..x."]),
    _style("samba", "4x4", (84, 118),
        ["K x..x x..x x..x x..x |R x.x. .x.x .x.x .x.x |M xoxx xoxx xoxx xoxx",
         "K x..x x..x x..x x..x |T x.xx x.xx x.xx x.xx |A x.x. x.x. x.x. x.x."],
        ["1__1 5__5 1__1 5__5", "1___ 5__4 1___ 5__a"],
        ["stab x.x. .x.x .x.x .x..", "strum X_x_ .x_x .x_x _x_.", "arp 0.21 .3.2 .1.2 .3.1"]),
    _style("cha-cha", "4x4", (100, 128),
        ["W x... x... x... x... |G .... x... .... x.x. |M x.x. x.x. x.x. x.x.",
         "K x... .... x... .... |R .... x... .... x.x. |W x... x... x... x..."],
        ["1___ ..5_ 1___ 5_8_", "1_.. ..1_ 3_.. 5_.."],
        ["stab x... ..x. ..x. x...", "arp 0_2_ 1_3_ .2_3 _2_1", "stab ..x. x... ..x. x.x."]),
    _style("motown", "4x4", (96, 138),
        ["S X... X... X... X... |K x... ..x. x... ..x. |T x.x. x.x. x.x. x.x.",
         "K x... .x.. x.x. .... |S .... X... .... X... |H xoxo xoxo xoxo xoxo"
         " |T .... x... .... x..."],
        ["1__1 __5_ 1__8 5_a_", "1_.1 .13_ 5_.5 .83_", "1_1_ 3_5_ 8_5_ 3_a_"],
        ["stab .... x... .... x...", "block x___ x___ x___ x___", "stab x..x ..x. x..x ..x."]),
    _style("house", "4x4", (108, 134),
        ["K X... X... X... X... |L .... x... .... x... |O ..x. ..x. ..x. ..x.",
         "K X... X... X... X... |H xxOx xxOx xxOx xxOx |R ...x ..x. .x.. x..."],
        ["..1. ..1. ..1. ..1.", "1..1 ..1. .1.. 8.5."],
        ["stab x..x ..x. x..x ..x.", "pad x___ ____ ____ ____", "arp 0.1. 2.3. 0.1. 2.3.",
         "stab ..x. ..x. ..x. ..x."]),
    _style("halftime", "4x4", (100, 150),
        ["K x... .... ..x. .... |S .... .... X... .... |H x... x... x... x...",
         "K x... ..x. .... ..x. |S .... .... X... .... |r x.o. x.o. x.o. x.o."],
        ["1___ ____ ____ __a_", "1___ __1_ 5___ ____"],
        ["pad x___ ____ ____ ____", "arp 0_1_ 2_3_ 2_1_ 2_3_", "block X___ ____ o___ ____"]),
    _style("punk", "4x4", (132, 180),
        ["K x... ..x. x... ..x. |S .... X... .... X... |H x.x. x.x. x.x. x.x.",
         "K x... x... x... x... |S ..X. ..X. ..X. ..X. |O x... x... x... x..."],
        ["1_1_ 1_1_ 1_1_ 1_1_", "1_1_ 1_1_ 8_8_ 5_5_"],
        ["strum X_x_ X_x_ X_x_ X_x_", "block X_x_ x_x_ X_x_ x_x_"]),
    _style("minimal", "4x4", (76, 126),
        ["K x... .... .... ....", "R .... .... x... ....", "M x.o. x.o. x.o. x.o.",
         "H .... x... .... x..."],
        ["1___ ____ ____ ____", "1___ .... .... ...."],
        ["block x___ ____ ____ ____", "arp 0___ 1___ 2___ 1___", "stab x... .... .... ...."]),
    _style("drone", "4x4", (66, 116),
        ["f X... .... ..o. ....", "A .... x... .... x... |f x... .... .... ...."],
        ["p___ ____ ____ ____", "p_p_ p_p_ p_p_ p_p_", "p___ ____ p___ ...."],
        ["drone x___ ____ ____ ____", "drone x_x_ x_x_ x_x_ x_x_", "tremolo x___ ____ ____ ____"]),
    _style("cinematic", "4x4", (66, 110),
        ["f X... ..o. x... ..oo |C ?... .... .... ....",
         "f X..x ..x. x.x. xxxx |t .... ..x. .... ..x."],
        ["1___ ____ ____ ____", "1_1_ 1_1_ 1_1_ 1_1_", "1111 1111 1111 1111"],
        ["tremolo x___ ____ ____ ____", "arp 0123 2121 0123 2121", "stab X.oo x.oo X.oo x.oo",
         "pad x___ ____ ____ ____"]),
    _style("afrobeat", "4x4", (96, 124),
        ["K x... ..x. x... ..x. |S ...x ..g. .x.. ..g. |H x.xx x.xx x.xx x.xx"
         " |W x..x ..x. .x.x ..x.",
         "K x..x ..x. ..x. x... |V x..x ..x. ..x. x... |M x.x. x.x. x.x. x.x."],
        ["1..1 ..5. .8.. 5.1.", "1.5. .8.. 1.5. .7.8"],
        ["stab ..x. .x.. ..x. .x..", "arp 0.2. 3.2. 1.2. 3.2.", "strum ..x_ ..x_ ..x_ x.x_"]),
    _style("bossa", "4x4", (100, 144),
        ["K x..x x..x x..x x..x |R x..x ..x. ..x. .x.. |H xxxx xxxx xxxx xxxx",
         "K x..x x..x x..x x..x |V x..x ..x. ..x. x... |M x.xx x.xx x.xx x.xx"],
        ["1___ __5_ 5___ __1_", "1__1 __5_ 5__5 __a_"],
        ["block x_.x _.x_ .x_. x_._", "strum x__x __x_ ..x_ _x__", "arp 0.12 .1.2 0.12 .1.2"],
        held_out=True),
    _style("disco", "4x4", (108, 130),
        ["K X... X... X... X... |S .... X... .... X... |H x.O. x.O. x.O. x.O.",
         "K X... X... X... X... |L .... X... .... X... |H xxOx xxOx xxOx xxOx"
         " |T x.xx x.xx x.xx x.xx"],
        ["1_8_ 1_8_ 1_8_ 1_8_", "1.8. 1.8. 5.8. a.8."],
        ["stab ..x. ..xx ..x. ..xx", "strum xgxg xgxx xgxg xgxx", "pad x___ ____ ____ ____"],
        held_out=True),
    _style("ska", "4x4", (116, 160),
        ["K .... x... .... x... |R .... x... .... x... |H ..x. ..x. ..x. ..x.",
         "K x... x... x... x... |S .... x... .... x... |H x.x. x.x. x.x. x.x."],
        ["1_.. 3_.. 5_.. 3_..", "1_3_ 5_8_ 5_3_ 1_a_"],
        ["stab ..X. ..X. ..X. ..X.", "stab ..xx ..xx ..xx ..xx", "strum ..x. ..x. ..x. ..x."]),
    _style("swing", "4x3", (96, 180),
        ["r x.. x.x x.. x.x |P ... x.. ... x.. |K o.. o.. o.. o.. |S ... ..? ... ..?",
         "H x.. x.x x.. x.x |K x.. ... x.. ... |R ... x.. ... x.."],
        ["w__ w__ w__ a__", "1__ w__ 5__ a__", "1__ 3__ 5__ a__"],
        ["stab x.. ..x ... ...", "block x__ ... ..x __.", "stab ... x.. ... x..",
         "strum X__ o__ X__ o__"]),
    _style("shuffle", "4x3", (84, 140),
        ["K x.. ... x.. ... |S ... X.. ... X.. |H x.x x.x x.x x.x",
         "K x.x ..x x.x ..x |S ..g X.g ..g X.g |r x.x x.x x.x x.x"],
        ["1_1 3_3 5_5 7_7", "1_1 5_5 8_8 5_a", "1__ 3__ 5__ 3__"],
        ["block X_x x_x X_x x_x", "stab ..x ..x ..x ..x", "strum X_o X_o X_o X_o"]),
    _style("jig", "4x3", (84, 130),
        ["f X.o x.o X.o x.o", "g xox xox xox xox |f X.. ... x.. ...",
         "K x.. x.. x.. x.. |T x.x x.x x.x x.x"],
        ["1__ 5__ 1__ 5__", "1_. 1_. 5_. a_.", "1__ ___ 5__ ___"],
        ["strum X_o x_o X_o x_o", "strum X_x o_x X_x o_x", "block X_. x_. X_. x_.",
         "drone x__ ___ ___ ___", "arp 012 321 012 321"]),
    _style("slow blues", "4x3", (60, 88),
        ["K x.. ... x.. ..x |S ... X.. ... X.. |H xxx xxx xxx xxx",
         "K x.. ..x x.. ... |R ... X.. ... X.. |r xox xox xox xox"],
        ["1__ ..1 3__ 5__", "1__ 3__ 5__ 7_a", "1_1 1_1 5_5 5_a"],
        ["block xxx xxx xxx xxx", "arp 012 321 012 321", "pad x__ ___ ___ ___",
         "stab ..x ... ..x ..."]),
    _style("six-eight pop", "4x3", (66, 104),
        ["K x.. ... x.. ..x |S ... X.. ... X.. |H x.x x.x x.x x.x",
         "K x.. ..x x.. ... |L ... X.. ... X.. |M xox xox xox xox"],
        ["1__ ___ 5__ ___", "1__ ..1 5__ ..a"],
        ["arp 012 321 012 321", "strum X_x x_x X_x x_x", "pad x__ ___ ___ ___"]),
    _style("tarantella", "4x3", (100, 160),
        ["T xox xox xox xox |K x.. ... x.. ...", "T X.x x.x X.x x.x |f X.. x.. X.. x.."],
        ["1_. 5_. 1_. 5_.", "1__ 1_. 5__ 5_."],
        ["stab .xx .xx .xx .xx", "stab ..x ..x ..x ..x", "strum Xxx Xxx Xxx Xxx"], held_out=True),
    _style("waltz", "3x4", (84, 180),
        ["K x... .... .... |H .... x... x...",
         "K x... .... .... |R .... x... x... |r x... x.o. x.o.",
         "T .... x... x..."],
        ["1___ ____ ____", "1___ .... ....", "1___ ____ 5___"],
        ["stab .... x... x...", "block .... x_.. x_..", "arp 0_1_ 2_1_ 2_1_",
         "strum X___ o___ o___"]),
    _style("slow waltz", "3x4", (60, 108),
        ["K x... .... ..x. |R .... .... x... |H x.o. x.o. x.o.",
         "f X... .... o... |A .... x... ...."],
        ["1___ ____ ____", "1___ __5_ 8___"],
        ["pad x___ ____ ____", "arp 0_1_ 2_3_ 2_1_", "tremolo x___ ____ ____",
         "block x___ o___ o___"]),
    _style("rock waltz", "3x4", (88, 150),
        ["K x... ..x. .... |S .... .... X... |H x.x. x.x. x.x.",
         "K x... .... ..x. |S .... X... .... |r x.x. x.x. x.x."],
        ["1_1_ 1_1_ 1_1_", "1___ __1_ 5_a_"],
        ["strum X_x_ x_x_ x_x_", "block X___ ____ x___", "arp 0_1_ 2_3_ 1_2_"]),
    _style("mazurka", "3x4", (108, 168),
        ["K x... .... .... |S .... X... o...", "K x... .... .... |T .... x.x. X..."],
        ["1_.. 5_.. 5_..", "1___ .... 5_.."],
        ["stab .... X... x...", "block x_.. X_.. x_..", "strum ..o_ X___ x___"], held_out=True),
    _style("jazz waltz", "3x3", (92, 170),
        ["r x.. x.x x.. |P ... x.. x.. |K o.. ... ...",
         "r x.. x.x x.x |K x.. ..x ... |R ... ..x ..."],
        ["w__ w__ a__", "1__ ___ 5__", "1__ 3__ a__"],
        ["stab x.. ..x ...", "block x__ ___ x__", "stab ... x.. x.."]),
    _style("slip jig", "3x3", (84, 140),
        ["f X.o x.o x.o", "g xox xox xox |f X.. ... x..", "T x.x x.x x.x |K x.. ... ..."],
        ["1__ 5__ 5__", "1__ ___ 5__", "1_. 1_. a_."],
        ["strum X_o x_o x_o", "block X_. x_. x_.", "arp 012 321 321", "drone x__ ___ ___"]),
    _style("slow nine-eight", "3x3", (60, 96),
        ["K x.. ... ... |R ... ... x.. |H xox xox xox", "f X.. ... o.. |M x.o x.o x.o"],
        ["1__ ___ ___", "1__ ___ 5__"],
        ["arp 012 321 232", "pad x__ ___ ___", "tremolo x__ ___ ___"]),
    _style("nine-eight stomp", "3x3", (84, 132),
        ["K X.. X.. X.. |S ..x ..x ..x |H xxx xxx xxx",
         "K X.. ... X.. |L ... X.. ... |T x.x x.x x.x"],
        ["1_1 1_1 5_5", "1_8 1_8 1_a"],
        ["stab x.x x.x x.x", "strum X_x X_x X_x", "stab ..x ..x ..x"], held_out=True),
)  # fmt: skip
STYLES = {style.name: style for style in _ALL}
HELD_OUT_STYLES = tuple(s.name for s in _ALL if s.held_out)
"""For test only; every meter has one."""
TRAIN_STYLES = tuple(s.name for s in _ALL if not s.held_out)
