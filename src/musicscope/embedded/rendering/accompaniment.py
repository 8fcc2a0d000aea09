"""Tunes to band pieces: form, melody, second voice, comping, bass and drums, all drawn from a seed.

Instruments stay open: pitched parts have program 0, to be replaced by whoever renders them. Only
basses have a bass program (32 to 39), and only drums `is_drum`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from musicscope.embedded.rendering.harmony import (
    Chords,
    close_voicing,
    harmonise,
    strummed_voicing,
)
from musicscope.embedded.rendering.leads import Lead, fits, lead_of, styles_for
from musicscope.embedded.rendering.notes import SHORTEST, Notes, join, make_part, notes_of, swung
from musicscope.embedded.rendering.scores import Arrangement, Part
from musicscope.embedded.rendering.styles import STYLES, Style
from musicscope.embedded.rendering.tunes import MODES, Tune

SECONDS = (30.0, 60.0)
"""Range of the lengths of pieces, before the last bar."""
MODE_CHANGE = 0.25
"""Share of major tunes that are played in another mode, because the books have few minor tunes."""
NOTES_PER_SECOND = (1.0, 6.5)
"""Tempo is drawn so that the melody has so many notes per second, where the style allows it."""
CHORALE_TEMPO = (60.0, 112.0)
TREMOLO_SECONDS = 0.085
TOMS = (50, 48, 45, 41)
ROLES = ("melody", "second", "comping", "comping 2", "bass", "drums")
STRENGTHS = {
    "intro": 0.85, "verse": 0.9, "chorus": 1.08, "break": 0.82, "end": 1.0,
}  # fmt: skip
"""Loudness of sections."""


@dataclass(frozen=True)
class Form:
    """The sections of a piece, in bars."""

    kinds: tuple[str, ...]
    """Keys of STRENGTHS."""
    first: np.ndarray
    """First bar of each section and, last, the number of bars [sections + 1]."""
    playing: np.ndarray
    """Which roles play, bool [roles, sections]."""

    def section(self, bars: np.ndarray) -> np.ndarray:
        """Index of the section of each bar."""
        last = len(self.kinds) - 1
        return np.clip(np.searchsorted(self.first, bars, side="right") - 1, 0, last)


def arrange(tune: Tune, rng: np.random.Generator, style: str | None = None) -> Arrangement:
    """Arrange a tune as a band piece of half a minute to a minute.

    Args:
        tune: a melody, or a chorale, which keeps its own four voices and has no style.
        rng: draws everything.
        style: a name in STYLES; drawn from the fitting TRAIN_STYLES by default.

    Raises:
        ValueError: the style does not fit the meter.
    """
    if tune.harmonised:
        return _arrange_chorale(tune, rng)
    lead = lead_of(tune)
    if style is None:
        names = styles_for(tune)
        style = names[rng.integers(len(names))]
    if not fits(STYLES[style], lead):
        raise ValueError(f"{tune.group}: a {tune.meter[0]}/{tune.meter[1]} tune in style {style!r}")
    return _Band(tune, lead, STYLES[style], rng).piece()


class _Band:
    """The choices for one piece, and the parts made from them."""

    def __init__(self, tune: Tune, lead: Lead, style: Style, rng: np.random.Generator):
        self.tune, self.style, self.rng = tune, style, rng
        shift = int(rng.integers(-5, 7))
        self.tonic = (tune.tonic + shift) % 12
        self.mode = tune.mode
        if tune.mode == "major" and rng.random() < MODE_CHANGE:
            self.mode = str(rng.choice(("minor", "dorian", "mixolydian"), p=(0.6, 0.2, 0.2)))
        # A change of mode keeps degrees; notes outside the scale stay.
        moved = np.zeros(12, int)
        moved[list(MODES[tune.mode])] = np.subtract(MODES[self.mode], MODES[tune.mode])
        lead = replace(lead, pitch=lead.pitch + shift + moved[(lead.pitch - tune.tonic) % 12])
        self.scale = np.zeros(12, bool)
        self.scale[(self.tonic + np.array(MODES[self.mode])) % 12] = True
        self.bpm = self._tempo(lead)
        self.beat = 60.0 / self.bpm
        self.beats = style.beats
        self.density = float(rng.random())
        self.form, self.intro, self.offset = self._form(lead)
        self.bars = int(self.form.first[-1])
        self.lead, self.chords, self.slot = self._lead_and_chords(lead)
        # Where chords change, in beats, and the end: notes that would be wrong after stop there.
        changed = np.any(np.diff(self.chords.tones, axis=0), axis=1) | (
            np.diff(self.chords.root) != 0
        )
        self.changes = np.append((np.flatnonzero(changed) + 1) * self.slot, self.bars * self.beats)
        self.triad = 4 if rng.random() < 0.25 else 3

    def _tempo(self, lead: Lead) -> float:
        density = len(lead.start) / max(float(lead.start[-1] - lead.start[0]), 1.0)
        low, high = self.style.tempo
        slowest, fastest = (60.0 * n / density for n in NOTES_PER_SECOND)
        low, high = min(max(low, slowest), high), max(min(high, fastest), low)
        return float(np.exp(self.rng.uniform(np.log(low), np.log(high))))

    def _form(self, lead: Lead) -> tuple[Form, int, int]:
        """Draw the sections; also the bars of the intro and the first bar of the tune."""
        rng, bar = self.rng, self.beats * self.beat
        phrase = 8 if bar < 1.6 else 4
        wanted = rng.uniform(*SECONDS)
        intro = int(rng.choice((0, 2, 4), p=(0.35, 0.4, 0.25))) if bar < 2.6 else 0
        phrases = max(round((wanted / bar - intro) / phrase), 2)
        kinds, lengths = (["intro"], [intro]) if intro else ([], [])
        for i in range(phrases):
            odds = (0.45, 0.35, 0.2) if i and "break" not in kinds[-2:] else (0.55, 0.45, 0.0)
            kind = str(rng.choice(("verse", "chorus", "break"), p=odds))
            # The band returns in the middle of the phrase that a break begins.
            kinds += ["break", "verse"] if kind == "break" else [kind]
            lengths += [phrase // 2] * 2 if kind == "break" else [phrase]
        kinds.append("end")
        lengths.append(1)
        offset = 8 * int(rng.integers(max(lead.bars // 8, 1))) if rng.random() < 0.4 else 0
        first = np.concatenate([[0], np.cumsum(lengths)])
        return Form(tuple(kinds), first, self._playing(kinds)), intro, offset

    def _playing(self, kinds: list[str]) -> np.ndarray:
        """Draw who is in the band and who plays in which section, bool [roles, sections]."""
        rng = self.rng
        extra = 0.2 + 0.5 * self.density
        drums = bool(self.style.drums) and rng.random() < 0.85
        band = np.array([True, rng.random() < extra, True, rng.random() < extra,
                         rng.random() < 0.9, drums])  # fmt: skip
        playing = np.zeros((len(ROLES), len(kinds)), bool)
        for i, kind in enumerate(kinds):
            if kind == "intro":
                playing[rng.choice(np.flatnonzero(band[2:])) + 2, i] = True
            elif kind == "break":
                # Few parts: the melody with one other, or accompaniment alone.
                order = rng.permutation(np.flatnonzero(band[1:])) + 1
                playing[order[: 1 + (rng.random() < 0.4)], i] = True
                playing[0, i] = rng.random() < 0.7
                playing[2, i] |= not playing[0, i]
            elif kind == "verse":
                playing[:, i] = band & (rng.random(len(ROLES)) < (1.0, 0.35, 0.95, 0.5, 0.95, 0.9))
            else:
                playing[:, i] = band
        return playing

    def _lead_and_chords(self, lead: Lead) -> tuple[Notes, Chords, float]:
        """Place the melody after the intro, repeat it, and find the chords of every bar."""
        rng, beats = self.rng, self.beats
        body = self.bars - 1 - self.intro
        # Two chords per bar only where they leave each at least 0.8 s.
        half = beats == 4 and 2.0 * self.beat > 0.8 and rng.random() < 0.5
        per_bar = 2 if half else 1
        chords = harmonise(
            lead.start, lead.duration, lead.pitch, self.tonic, self.mode, beats, per_bar,
            lead.bars, rng,
        )  # fmt: skip
        source = (self.offset + np.arange(body)) % lead.bars
        intro = self.offset + np.arange(self.intro) if rng.random() < 0.7 else [0] * self.intro
        final = np.flatnonzero(chords.root == self.tonic)
        order = np.concatenate([np.asarray(intro, int) % lead.bars, source])
        slots = (order[:, None] * per_bar + np.arange(per_bar)).ravel()
        slots = np.append(slots, [final[-1] if len(final) else slots[-1]] * per_bar)
        total = lead.bars * beats
        repeats = -(-(body + self.offset) // lead.bars)
        shift = np.arange(repeats)[:, None] * total
        # A last note that runs past the tune would cover the pickup of its repeat.
        duration = np.minimum(lead.duration, total + min(lead.start[0], 0.0) - lead.start)
        start = (lead.start + shift).ravel() - self.offset * beats
        pickup = max(0.0, -lead.start[0]) + 1e-6
        lengths = np.tile(duration, repeats)
        pitches = np.tile(lead.pitch, repeats)
        keep = (start > -pickup) & (start < body * beats - 1e-6) & (lengths > 0)
        start, lengths, pitches = start[keep], lengths[keep], pitches[keep]
        end = np.minimum(start + lengths, body * beats)
        start, end = start + self.intro * beats, end + self.intro * beats
        if self.style.division == 3 and not lead.triplets:
            start, end = (swung(x, 1.0, 2.0 / 3.0) for x in (start, end))
        notes = notes_of(start, end, pitches)
        return notes.where(notes.start > -1e-6), chords.take(slots), beats / per_bar

    def _slots(self, times: np.ndarray) -> np.ndarray:
        """Index of the chord at each time."""
        last = len(self.chords.root) - 1
        return np.clip(np.floor(times / self.slot + 1e-6).astype(int), 0, last)

    def _clip(self, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        """Ends of notes that stop where the chord changes."""
        change = self.changes[np.searchsorted(self.changes, start + 1e-6, side="right")
                              .clip(max=len(self.changes) - 1)]  # fmt: skip
        return np.minimum(start + length, change)

    def _melody(self) -> Notes:
        """The tune, ornamented, with a last note, at an octave drawn for it."""
        rng, notes = self.rng, self.lead
        low = np.median(notes.pitch)
        octave = 12 * round((66.0 + 12.0 * (rng.random() < 0.35) - low) / 12.0)
        notes = replace(notes, pitch=notes.pitch + octave)
        final = (self.bars - 1) * self.beats
        nearest = notes.pitch[-1] + (self.tonic - notes.pitch[-1] + 6) % 12 - 6
        last = notes_of(np.array([final]), np.array([final + self.beats]), np.array([nearest]))
        return self._ornamented(join(notes, last))

    def _ornamented(self, notes: Notes) -> Notes:
        """Add grace notes, trills or neither, as one player would."""
        rng = self.rng
        kind = rng.choice(("none", "grace", "turn"), p=(0.55, 0.25, 0.2))
        length = (notes.end - notes.start) * self.beat
        chosen = (length > 0.22) & (rng.random(len(length)) < 0.22)
        if kind == "none" or not chosen.any():
            return notes
        main = notes.where(chosen)
        above = main.pitch + np.where(self.scale[(main.pitch + 2) % 12], 2, 1)
        step = 0.07 / self.beat
        if kind == "grace":
            extra = notes_of(main.start, main.start + step, above, 0.8)
            start = notes.start + np.where(chosen, step, 0.0)
            return join(replace(notes, start=start), extra)
        extra = join(
            notes_of(main.start, main.start + step, main.pitch),
            notes_of(main.start + step, main.start + 2 * step, above, 0.85),
        )
        start = notes.start + np.where(chosen, 2 * step, 0.0)
        return join(replace(notes, start=start), extra)

    def _second(self, melody: Notes) -> Notes:
        """A second voice: parallel to the melody, a slow line of chord tones, or a riff."""
        rng = self.rng
        kind = rng.choice(
            ("below", "above", "octave", "guide", "riff"), p=(0.3, 0.1, 0.1, 0.25, 0.25)
        )
        if kind == "octave":
            return replace(melody, pitch=melody.pitch - 12, weight=melody.weight * 0.85)
        if kind in ("below", "above"):
            steps = (
                np.array((3, 4, 5, 7, 8, 9)) if kind == "above" else -np.array((3, 4, 5, 7, 8, 9))
            )
            slots = self._slots(melody.start)
            classes = (melody.pitch[:, None] + steps) % 12
            tones = (self.chords.root[slots, None] + self.chords.tones[slots][:, :3]) % 12
            in_chord = (classes[:, :, None] == tones[:, None, :]).any(-1)
            score = in_chord + 1.5 * self.scale[classes] - 0.1 * np.abs(np.abs(steps) - 4)
            pitch = melody.pitch + steps[score.argmax(1)]
            long = melody.end - melody.start > 0.2 / self.beat
            return replace(melody, pitch=pitch, weight=melody.weight * 0.85).where(long)
        if kind == "guide":
            length = self.beats / (2.0 if self.beats == 4 else 1.0)
            start = np.arange(0.0, self.bars * self.beats, length)
            slots = self._slots(start)
            tone = self.chords.tones[slots, rng.integers(1, 3, len(slots))]
            low = 60 + 12 * int(rng.integers(0, 2))
            pitch = low + (self.chords.root[slots] + tone - low) % 12
            return self._tied(notes_of(start, start + length, pitch, 0.85))
        division = self.style.division
        cells = self.beats * division * int(rng.integers(1, 3))
        on = np.flatnonzero(rng.random(cells) < rng.uniform(0.2, 0.45))
        on = on if len(on) > 1 else np.array([0, cells // 2])
        repeats = np.arange(-(-self.bars * self.beats * division // cells))
        start = ((repeats[:, None] * cells + on) / division).ravel()
        tones = np.tile(rng.integers(0, 3, len(on)), len(repeats))
        length = np.tile(np.minimum(np.diff(on, append=cells + on[0]), division) / division,
                         len(repeats))  # fmt: skip
        slots = self._slots(start)
        low = 62 + 5 * int(rng.integers(0, 3))
        pitch = low + (self.chords.root[slots] + self.chords.tones[slots, tones] - low) % 12
        return notes_of(start, self._clip(start, length), pitch, 0.9)

    @staticmethod
    def _tied(notes: Notes) -> Notes:
        """Join successive notes of the same pitch."""
        new = np.append(True, np.diff(notes.pitch) != 0)
        last = np.append(np.flatnonzero(new)[1:] - 1, len(new) - 1)
        return replace(notes.where(new), end=notes.end[last])

    def _comping(self, role: int) -> Notes:
        """Chords in one pattern of the style; sparse pieces leave out soft steps."""
        rng = self.rng
        kind, pattern = self.style.comping[rng.integers(len(self.style.comping))]
        if kind == "pad":
            start = np.append(0.0, self.changes[:-1])
            length, weight = np.diff(np.append(start, self.bars * self.beats)), np.ones(len(start))
            symbol = np.full(len(start), "x")
        else:
            start, length, symbol, weight = pattern.over(self.bars)
        if self.density < 0.25 and kind != "arp":
            keep = (weight >= 1.0) | (rng.random(len(weight)) < 0.3)
            start, length, symbol, weight = (x[keep] for x in (start, length, symbol, weight))
        slots = self._slots(start)
        center = (55.0, 62.0, 67.0)[rng.integers(3)] + (5.0 if role == 3 else 0.0)
        if kind == "drone":
            low = 48 + (self.tonic - 48) % 12
            pitch = low + np.array((0, 7, 12))[None, :]
            return notes_of(
                start[:, None], (start + length)[:, None], pitch, weight[:, None] * 0.85
            )
        if kind == "arp":
            voicing = close_voicing(self.chords, center, 3)
            voicing = np.concatenate([voicing, voicing[:, :1] + 12], axis=1)
            pitch = voicing[slots, symbol.astype(np.int64)]
            return notes_of(start, self._clip(start, length * rng.uniform(1.0, 2.5)), pitch, weight)
        size = 2 if self.style.name == "hard rock" else self.triad
        strum = kind == "strum"
        voicing = strummed_voicing(self.chords, size) if strum else close_voicing(
            self.chords, center, size
        )  # fmt: skip
        if kind == "stab":
            length = np.minimum(length, 0.6 / self.style.division * rng.uniform(0.7, 1.4))
        end = self._clip(start, length)
        if kind == "tremolo":
            return self._tremolo(start, end, voicing[slots], weight)
        delay = 0.0
        if strum:
            # Down on beats, up between them; the hand takes 8 to 30 ms over all strings.
            strings = np.arange(voicing.shape[1])
            up = np.abs(start % 1.0) > 1e-6
            order = np.where(up[:, None], strings[::-1], strings)
            delay = order * rng.uniform(0.003, 0.011)
        return notes_of(start[:, None], end[:, None], voicing[slots], weight[:, None], delay)

    def _tremolo(
        self, start: np.ndarray, end: np.ndarray, pitch: np.ndarray, weight: np.ndarray
    ) -> Notes:
        """Repeat chords as fast as a bow or a plectrum, on a division of the beat."""
        step = 1.0 / max(2 ** round(np.log2(self.beat / TREMOLO_SECONDS)), 2)
        if self.style.division == 3:
            step = 1.0 / (3 * max(round(self.beat / TREMOLO_SECONDS / 3), 1))
        count = np.maximum(np.floor((end - start) / step + 1e-6).astype(int), 1)
        row = np.repeat(np.arange(len(start)), count)
        inside = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        time = start[row] + inside * step
        swell = 0.8 + 0.2 * inside / count[row]
        return notes_of(
            time[:, None], (time + 0.9 * step)[:, None], pitch[row], (swell * weight[row])[:, None]
        )

    def _bass(self) -> Notes:
        """The bass line: tones named by the pattern, in the octave from E1 on."""
        rng, pattern = self.rng, self.style.bass[self.rng.integers(len(self.style.bass))]
        start, length, symbol, weight = pattern.over(self.bars)
        slots = self._slots(start)
        following = np.minimum(slots + 1, len(self.chords.root) - 1)
        root = 28 + (self.chords.root - 28) % 12
        tones = self.chords.tones[slots]
        pitch = root[slots].copy()
        for char, tone in (("3", 1), ("5", 2), ("7", 3)):
            pitch = np.where(symbol == char, root[slots] + tones[:, tone], pitch)
        pitch = np.where(symbol == "8", pitch + 12, pitch)
        pitch = np.where(symbol == "4", root[slots] + tones[:, 2] - 12 * (root[slots] > 33), pitch)
        walk = rng.integers(0, 3, len(start))
        pitch = np.where(symbol == "w", root[slots] + tones[np.arange(len(start)), walk], pitch)
        side = rng.choice((-1, -2, 1, 2), len(start), p=(0.4, 0.15, 0.25, 0.2))
        pitch = np.where(symbol == "a", root[following] + side, pitch)
        pitch = np.where(symbol == "p", 28 + (self.tonic - 28) % 12, pitch)
        held = symbol == "p"
        end = np.where(held, start + length, self._clip(start, length))
        return notes_of(start, end, pitch, weight * np.where(symbol == "a", 0.9, 1.0))

    def _drums(self) -> Notes:
        """One groove with dropped or changed lines per section, fills, and cymbals at sections."""
        rng, form = self.rng, self.form
        groove = self.style.drums[rng.integers(len(self.style.drums))]
        lines = []
        for key, pattern in groove:
            start, _, symbol, weight = pattern.over(self.bars)
            keep = (symbol != "?") | (rng.random(len(start)) < 0.35)
            if self.density < 0.25:
                keep &= weight >= 1.0
            section = form.section(np.floor(start / self.beats + 1e-6).astype(int))
            here = np.full(len(form.kinds), key)
            if key == 42 and rng.random() < 0.5:  # the chorus takes the ride
                here[[kind == "chorus" for kind in form.kinds]] = 51
            silent = (rng.random(len(form.kinds)) < 0.1) & (len(groove) > 1)
            keep &= ~silent[section]
            keys = np.where(symbol == "O", 46, here[section])
            lines.append(notes_of(start, start + 0.2, keys, weight).where(keep))
        notes = join(*lines)
        end = (self.bars - 1) * self.beats
        keep = notes.start < end - 1e-6
        added = [notes_of(np.array([end, end]), end + 0.5, np.array((36, 49)), 1.1)]
        for first, last in zip(form.first[:-2], form.first[1:-1], strict=True):
            if rng.random() < 0.65:
                fill, begins = self._fill(float(last) * self.beats)
                keep &= (notes.start < begins - 1e-6) | (notes.start > last * self.beats - 1e-6)
                added.append(fill)
            if first > 0 and rng.random() < 0.5:
                crash = float(first) * self.beats
                added.append(notes_of(np.array([crash]), crash + 0.5, 49, 1.1))
        return join(notes.where(keep), *added)

    def _fill(self, end: float) -> tuple[Notes, float]:
        """Draw a fill that grows louder until `end`; also the beat at which it begins."""
        rng, division = self.rng, self.style.division
        beats = int(rng.choice((1, 2), p=(0.6, 0.4)))
        steps = np.flatnonzero(rng.random(beats * division) < 0.75)
        place = steps / (beats * division)
        toms = np.array(TOMS)[(place * len(TOMS)).astype(int)]
        pitch = toms if rng.random() < 0.6 else np.full(len(steps), 38)
        start = end - beats + steps / division
        return notes_of(start, start + 0.2, pitch, 0.75 + 0.4 * place), end - beats

    def _part(self, role: int, notes: Notes, program: int = 0) -> Part | None:
        """Humanise the notes of the sections in which the role plays; None if none are left."""
        rng, form, drums = self.rng, self.form, ROLES[role] == "drums"
        # A pickup belongs to the section that it leads to.
        ahead = 0.5 if role == 0 else 0.0
        section = form.section(np.floor((notes.start + ahead) / self.beats + 1e-6).astype(int))
        notes = notes.where(form.playing[role][section])
        if len(notes.start) < 2:
            return None
        section = form.section(np.floor(notes.start / self.beats + 1e-6).astype(int))
        strength = np.array([STRENGTHS[kind] for kind in form.kinds])[section]
        accent = 1.0 + (0.06 if drums else 0.1) * (np.abs(notes.start % self.beats) < 1e-3)
        level = rng.uniform(62.0, 98.0) + (6.0 if role == 0 else 0.0)
        # Phrases of one bar swell and fade.
        swell = 0.05 * np.sin(
            2.0 * np.pi * notes.start / (2.0 * self.beats) + rng.uniform(0.0, 6.3)
        )
        velocity = level * notes.weight * strength * (accent + swell)
        velocity += rng.normal(0.0, 4.0, len(velocity))
        end = notes.end
        if role < 2:
            share = rng.choice((0.97, 0.85, 0.5), p=(0.5, 0.3, 0.2))
            end = notes.start + (notes.end - notes.start) * share
        spread = rng.uniform(0.001, 0.004) if drums else rng.uniform(0.003, 0.009)
        jitter = np.clip(rng.normal(0.0, spread, len(end)), -0.02, 0.02)
        jitter += 0.0 if drums else rng.uniform(-0.006, 0.01)
        lag = notes.delay + jitter
        start = self._warped(notes.start) * self.beat + lag
        end = np.maximum(self._warped(end) * self.beat + jitter, start + SHORTEST)
        return make_part(program, drums, start, end, notes.pitch, velocity)

    def _warped(self, beats: np.ndarray) -> np.ndarray:
        """Apply the swing of the style's short steps."""
        return swung(beats, 0.5, self.style.swing) if self.style.swing != 0.5 else beats

    def piece(self) -> Arrangement:
        """Make all parts."""
        melody = self._melody()
        program = int(self.rng.integers(32, 40))
        wanted = (
            (0, lambda: melody, 0), (1, lambda: self._second(melody), 0),
            (2, lambda: self._comping(2), 0), (3, lambda: self._comping(3), 0),
            (4, self._bass, program), (5, self._drums, 0),
        )  # fmt: skip
        made = [
            self._part(role, make(), number)
            for role, make, number in wanted
            if self.form.playing[role].any()
        ]
        parts = tuple(part for part in made if part is not None)
        seconds = max(self.bars * self.beats * self.beat, *(float(p.end.max()) for p in parts))
        return Arrangement(
            self.tune.group, seconds, parts, np.array([0.0]), np.array([self.bpm]),
            self.style.name,
        )  # fmt: skip


def _arrange_chorale(tune: Tune, rng: np.random.Generator) -> Arrangement:
    """Play a chorale as written, in another key and tempo, often enough for half a minute."""
    bpm = float(np.exp(rng.uniform(*np.log(CHORALE_TEMPO))))
    beat, shift = 60.0 / bpm, int(rng.integers(-5, 7))
    end = tune.start + tune.duration
    # One pass lasts whole bars from the pickup on, so that the next pickup fits.
    length = np.ceil((end.max() - tune.start[0]) / tune.bar) * tune.bar
    wanted = rng.uniform(*SECONDS)
    repeats = max(int(np.floor(wanted / (length * beat))), 1)
    many = np.arange(repeats)[:, None] * length - tune.start[0]
    parts = []
    doubled = (0,) if rng.random() < 0.3 else ()
    low_bass = rng.random() < 0.6
    for number, voice in enumerate((0, 1, 2, 3, *doubled)):
        mine = tune.voice == voice
        start, stop = ((x[mine] + many).ravel() * beat for x in (tune.start, end))
        pitch = np.tile(tune.pitch[mine] + shift + 12 * (number == 4), repeats)
        level = rng.uniform(68.0, 92.0) + (6.0 if number == 0 else 0.0)
        swell = 1.0 + 0.08 * np.sin(2.0 * np.pi * start / (8.0 * beat) + rng.uniform(0.0, 6.3))
        velocity = level * swell + rng.normal(0.0, 4.0, len(start))
        lag = np.clip(rng.normal(0.0, 0.008, len(start)), -0.02, 0.02)
        stop = start + (stop - start) * rng.uniform(0.88, 0.99)
        program = int(rng.integers(32, 40)) if voice == 3 and low_bass else 0
        parts.append(make_part(program, False, start + lag, stop + lag, pitch, velocity))
    seconds = max(float(p.end.max()) for p in parts)
    return Arrangement(
        tune.group, seconds, tuple(parts), np.array([0.0]), np.array([bpm]), "chorale"
    )
