"""Synthetic singers from recorded speech: a bank of syllables, and stems that sing a melody.

A syllable is stored as WORLD parameters (Morise et al., IEICE Trans. 2016), one frame per 5 ms:
a mel-cepstrum (spectral envelope) and six band aperiodicities. `sing` draws syllables, stretches
their vowels to the notes, and synthesises pulses and noise through the minimum-phase envelope.
`tools/render_voices.py` made the bank from speech synthesisers; nobody sang any of it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from scipy.fft import irfft, rfft
from scipy.signal import butter, resample_poly, sosfilt

VOICES = Path(__file__).parents[4] / "assets" / "voices"
SEXES = ("male", "female")
CONCEPTS = ("vocals", "male vocal", "female vocal")

RATE = 16_000
"""Samples per second of the bank and of the synthesis: nothing above 8 kHz is sung."""
HOP = 80
"""Samples per frame."""
FPS = RATE // HOP
ORDER = 35
ALPHA = 0.42
"""Warping constant of the mel-cepstrum at 16 kHz."""
NODES = (500.0, 1500.0, 3000.0, 4500.0, 6000.0, 7500.0)
"""Hertz at which the aperiodicity of a frame is stored."""
RELEASE = 6
"""Frames of a syllable after its last sound."""
EFFORT = 0.7
"""Nepers by which song at full voice is brighter than speech: c1 falls by this, times the gain."""
LEVEL = 0.1
"""RMS of a held vowel at velocity REFERENCE_VELOCITY, within a few dB."""

_FFT = 512
_BLOCKS = -(-_FFT // HOP)
_TAPS, _PHASES = 16, 64
_RUMBLE = butter(2, 70.0, "highpass", fs=RATE, output="sos").astype(np.float32)
_CHUNK = 128
"""Frames synthesised at once: their spectra stay in the cache."""

REFERENCE_VELOCITY, VELOCITY_EXPONENT = 100, 1.2
SHORTEST, LEGATO_GAP = 0.05, 0.09
"""Seconds: a shorter piece of a note is not sung; notes that are closer are joined."""
SLUR_SHARE, SLUR_SEMITONES = 0.2, 5
"""How often, and over how many semitones at most, a joined note keeps the syllable before."""
SHORTEST_SYLLABLE = 0.2
"""Seconds; a joined note that comes earlier keeps the syllable before."""
LONGEST_ONSET = 0.16
"""Seconds that the consonants before a vowel may take."""
BREATH_EVERY = (2.5, 5.0)
BREATH = 0.2
"""Seconds of legato after which the singer breathes, and how long at most."""
MOST_CARRIED = 0.1
"""Least share of a frame's power above its pitch that is made up for: 10 dB."""
GLIDE = 0.08
"""Seconds of the pitch transition between joined notes."""
VIBRATO_HZ, VIBRATO_CENTS = (4.8, 6.0), (25.0, 60.0)
JITTER_CENTS = 5.0


class Notes(Protocol):
    """The notes of one part, sorted by onset (`rendering.compositions.Part` fits)."""

    start: np.ndarray
    """Onsets [notes], seconds; a note that sounds before the stem may start at -1."""
    end: np.ndarray
    pitch: np.ndarray
    velocity: np.ndarray


@dataclass(frozen=True)
class Singer:
    """What is known of one singer. `low` and `high` bound the range (MIDI numbers)."""

    name: str
    sex: str
    split: str
    low: int
    high: int

    def labels(self) -> dict[str, bool]:
        """Exact labels of a mix in which this singer sounds."""
        truth = (True, self.sex == "male", self.sex == "female")
        return dict(zip(CONCEPTS, truth, strict=True))


@dataclass(frozen=True)
class Syllables:
    """The syllables of one singer, quantised."""

    cepstra: np.ndarray
    """Mel-cepstra uint8 [frames, ORDER + 1] of the log amplitude, between `bounds`."""
    bounds: np.ndarray
    """float32 [2, ORDER + 1]: what 0 and 255 stand for."""
    aperiodicity: np.ndarray
    """uint8 [frames, nodes]: amplitude of noise over that of the whole, 255 = all noise."""
    marks: np.ndarray
    """int32 [syllables, 4], frames: onset, vowel and coda begin; the syllable ends."""

    def frames(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Interpolate at fractional frames [n]: cepstra [n, ORDER + 1], aperiodicity [n, nodes]."""
        low = np.floor(index).astype(np.int64)
        high = np.minimum(low + 1, len(self.cepstra) - 1)
        share = (index - low).astype(np.float32)[:, None]
        step = (self.bounds[1] - self.bounds[0]) / np.float32(255)
        cepstra, noisy = (
            (1 - share) * table[low] + share * table[high]
            for table in (self.cepstra, self.aperiodicity)
        )
        return cepstra * step + self.bounds[0], noisy / np.float32(255)


@dataclass(frozen=True)
class Bank:
    """Singers and their syllables."""

    singers: tuple[Singer, ...]
    syllables: dict[str, Syllables]

    def singer(self, name: str) -> Singer:
        """The singer called `name`.

        Raises:
            KeyError: there is none.
        """
        found = {singer.name: singer for singer in self.singers}
        if name not in found:
            raise KeyError(f"no singer {name!r}; the bank holds {list(found)}")
        return found[name]

    def names(self, split: str, sex: str | None = None) -> tuple[str, ...]:
        """Names of the singers of one split, and of one sex where it is given."""
        return tuple(s.name for s in self.singers if s.split == split and sex in (None, s.sex))


# --- files ------------------------------------------------------------------------------------

_ARRAYS = ("cepstra", "bounds", "aperiodicity", "marks")


@lru_cache
def load_bank(path: Path | None = None) -> Bank:
    """Read the bank: a folder with index.json and one npz per singer, or one npz of all.

    Args:
        path: a folder, or what `save_bank_arrays` wrote; by default this repository's bank.

    Raises:
        FileNotFoundError: there is no bank at `path`.
    """
    path = VOICES if path is None else Path(path)
    if path.is_dir():
        index = json.loads((path / "index.json").read_text(encoding="utf-8"))["singers"]
        files = [(np.load(path / f"{entry['name']}.npz"), "") for entry in index]
    else:
        file = np.load(path)
        index = json.loads(str(file["index"]))
        files = [(file, f"{entry['name']}/") for entry in index]
    singers = tuple(Singer(**{f.name: entry[f.name] for f in fields(Singer)}) for entry in index)
    syllables = {
        singer.name: Syllables(**{key: file[prefix + key] for key in _ARRAYS})
        for singer, (file, prefix) in zip(singers, files, strict=True)
    }
    return Bank(singers, syllables)


def save_bank_arrays(bank: Bank, path: str | Path) -> None:
    """Write the whole bank as one npz, without pickles, that `load_bank` reads."""
    arrays = {
        f"{name}/{key}": getattr(syllables, key)
        for name, syllables in bank.syllables.items()
        for key in _ARRAYS
    }
    index = json.dumps([asdict(singer) for singer in bank.singers])
    np.savez_compressed(path, index=np.array(index), **arrays)


# --- the melody -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Melody:
    """Notes that do not overlap, sorted. Seconds, MIDI numbers, all [notes] float64."""

    start: np.ndarray
    end: np.ndarray
    pitch: np.ndarray
    velocity: np.ndarray


def top_line(notes: Notes, seconds: float) -> Melody:
    """Reduce notes to one voice: at any time the highest that sounds; of equals the latest."""
    start = np.asarray(notes.start, np.float64)
    end = np.minimum(np.asarray(notes.end, np.float64), seconds)
    pitch = np.asarray(notes.pitch, np.float64)
    times = np.unique(np.concatenate([start, end]))
    sounding = (start <= times[:-1, None]) & (end > times[:-1, None])
    rank = np.where(sounding, pitch + np.arange(len(pitch)) / (len(pitch) + 1), -np.inf)
    owner = np.where(sounding.any(axis=1), rank.argmax(axis=1), -1) if len(rank) else np.zeros(0)
    edges = np.flatnonzero(np.diff(owner, prepend=-2, append=-2))
    first, last = edges[:-1], edges[1:]
    keep = (owner[first] >= 0) & (times[last] - times[first] >= SHORTEST)
    first, last = first[keep], last[keep]
    who = owner[first].astype(np.int64)
    velocity = np.asarray(notes.velocity, np.float64)[who]
    return Melody(times[first], times[last], pitch[who], velocity)


def fold(melody: Melody, low: float, high: float) -> Melody:
    """Move the melody by whole octaves into [low, high]; single notes follow if they must.

    Of the octaves that hold the longest time in range, the one nearest to the range's centre wins.
    """
    held = melody.end - melody.start
    octaves = 12.0 * np.arange(-10, 11)
    moved = melody.pitch + octaves[:, None]
    inside = (((moved >= low) & (moved <= high)) * held).sum(axis=1).round(6)
    away = np.abs((moved * held).sum(axis=1) / held.sum() - (low + high) / 2)
    pitch = moved[np.lexsort((away, -inside))[0]]
    pitch += 12.0 * np.ceil((low - pitch) / 12.0).clip(min=0)
    pitch -= 12.0 * np.ceil((pitch - high) / 12.0).clip(min=0)
    return Melody(melody.start, melody.end, pitch, melody.velocity)


@dataclass(frozen=True)
class Line:
    """A melody with its phrasing, all [notes]."""

    melody: Melody
    joined: np.ndarray
    """Whether a note follows the one before without a gap."""
    slurred: np.ndarray
    """Whether it goes on with the syllable of the note before."""


def phrase(melody: Melody, rng: np.random.Generator) -> Line:
    """Join close notes, take breaths, and draw which notes share a syllable."""
    start, end = melody.start, melody.end.copy()
    joined = np.zeros(len(start), bool)
    patience = rng.uniform(*BREATH_EVERY, len(start))
    since = start[0]
    for i in range(1, len(start)):
        if start[i] - end[i - 1] > LEGATO_GAP:
            since = start[i]
        elif end[i - 1] - since > patience[i]:
            end[i - 1] = start[i] - min(BREATH, 0.35 * (start[i] - start[i - 1]))
            since = start[i]
        else:
            joined[i] = True
            end[i - 1] = start[i]
    step = np.abs(np.diff(melody.pitch, prepend=melody.pitch[0]))
    slurred = joined & (step > 0) & (step <= SLUR_SEMITONES)
    slurred &= rng.random(len(start)) < SLUR_SHARE
    begun = start[0]
    for i in range(1, len(start)):
        slurred[i] |= joined[i] and start[i] - begun < SHORTEST_SYLLABLE
        begun = begun if slurred[i] else start[i]
    return Line(Melody(start, end, melody.pitch, melody.velocity), joined, slurred)


# --- tracks of frames -------------------------------------------------------------------------


@dataclass(frozen=True)
class Tracks:
    """What the synthesiser needs per frame of HOP samples, all [frames]."""

    index: np.ndarray
    """Fractional frame of the singer's syllables."""
    joins: np.ndarray
    """[events] frames at which another syllable begins."""
    pitch: np.ndarray
    """MIDI number, glides and vibrato included."""
    gain: np.ndarray


def smooth(track: np.ndarray, seconds: float) -> np.ndarray:
    """Average over a Hann window; the ends are repeated."""
    half = round(seconds * FPS / 2)
    window = np.hanning(2 * half + 3)[1:-1]
    return np.convolve(np.pad(track, half, mode="edge"), window / window.sum(), mode="valid")


def place(
    line: Line, marks: np.ndarray, chosen: np.ndarray, lead: np.ndarray, gap: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stretch syllables to their notes: seconds and frames of the bank [points], linear between.

    The third array holds the seconds [joins] at which syllables meet without a gap.
    """
    melody, count = line.melody, len(line.joined)
    firsts = np.flatnonzero(~line.slurred)
    lasts = np.append(firsts[1:], count) - 1
    clock, index = [], []
    for first, last in zip(firsts, lasts, strict=True):
        begin, vowel, coda, finish = marks[chosen[first]]
        start, end = melody.start[first], melody.end[last]
        # Inside a phrase the mouth does not close: no release, and vowels meet in full sound.
        if line.joined[first] and begin == vowel:
            begin = vowel = vowel + 0.15 * (coda - vowel)
        if last + 1 < count and line.joined[last + 1]:
            end -= lead[last + 1]
            finish -= RELEASE
            if finish <= coda + 1:
                coda = finish = coda - 0.1 * (coda - vowel)
        tail = min((finish - coda) / FPS, 0.3 * (end - start))
        spoken = min((coda - vowel) / FPS, end - tail - start)
        # The vowel's beginning and end keep their speed; what lies between is stretched. In a rest
        # the frames stand still at both sides, so that its faded edges hold nothing else.
        begun, still = start - lead[first], max(coda, finish - 1)
        clock += [begun - min(0.02, 0.1 * gap[first]), begun, start, start + 0.35 * spoken,
                  end - tail - 0.25 * spoken, end - tail, end,
                  end + min(0.02, 0.1 * gap[last + 1])]  # fmt: skip
        index += [begin, begin, vowel, vowel + 0.35 * (coda - vowel),
                  coda - 0.25 * (coda - vowel), coda, still, still]  # fmt: skip
    joins = firsts[line.joined[firsts]]
    return np.array(clock), np.array(index), (melody.start - lead)[joins]


def lay_out(
    line: Line, marks: np.ndarray, chosen: np.ndarray, rng: np.random.Generator, times: np.ndarray
) -> Tracks:
    """Place syllables, pitch and gain on frames at `times` [frames], seconds.

    Vowels begin at the notes; consonants before them take time from the note or rest before.
    `chosen` holds a syllable per note, of which slurred notes use none; `rng` draws the vibrato.
    """
    melody, count = line.melody, len(line.joined)
    gap = np.concatenate([[np.inf], melody.start[1:] - melody.end[:-1], [np.inf]])
    before = np.append(np.inf, np.diff(melody.start))
    onset = np.minimum((marks[chosen, 1] - marks[chosen, 0]) / FPS, LONGEST_ONSET)
    room = np.where(line.joined, 0.45 * before, 0.8 * gap[:-1])
    lead = np.where(line.slurred, 0.0, np.minimum(onset, room))
    clock, index, joins = place(line, marks, chosen, lead, gap)

    begun = melody.start - lead
    note = np.maximum(np.searchsorted(begun, times, side="right") - 1, 0)
    gain = (melody.velocity[note] / REFERENCE_VELOCITY) ** VELOCITY_EXPONENT
    gain *= (times >= begun[note]) & (times < melody.end[note])
    # The pitch arrives with the vowel, so that it turns while the consonants sound.
    turn = melody.start - np.maximum(lead / 2, 0.03)
    note = np.maximum(np.searchsorted(turn, times, side="right") - 1, 0)
    depth = rng.uniform(*VIBRATO_CENTS, count)[note]
    depth *= np.clip((times - melody.start[note] - 0.25) / 0.3, 0, 1)
    speed = smooth(rng.uniform(*VIBRATO_HZ, count)[note], 0.3)
    wobble = np.sin(2 * np.pi * np.cumsum(speed) / FPS + rng.uniform(0, 2 * np.pi))
    jitter = smooth(rng.standard_normal(len(times)), 0.06)
    cents = smooth(depth, 0.1) * wobble + JITTER_CENTS * jitter / max(jitter.std(), 1e-9)
    return Tracks(
        np.interp(times, clock, index),
        np.searchsorted(times, joins),
        smooth(melody.pitch[note], GLIDE) + cents / 100,
        smooth(gain, 0.03),
    )


# --- synthesis --------------------------------------------------------------------------------


def warp(omega: np.ndarray) -> np.ndarray:
    """Mel-like angular frequency of `omega` (radians per sample at RATE)."""
    return omega + 2 * np.arctan(ALPHA * np.sin(omega) / (1 - ALPHA * np.cos(omega)))


@lru_cache
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cosines and -sines [ORDER + 1, 2 bins], node basis [nodes, bins], pulses, Hann window."""
    omega = np.linspace(0, np.pi, _FFT // 2 + 1)
    angle = np.arange(ORDER + 1)[:, None] * warp(omega)
    basis = np.concatenate([np.cos(angle), -np.sin(angle)], axis=1)
    hertz = omega * RATE / (2 * np.pi)
    nodes = np.stack([np.interp(hertz, NODES, row) for row in np.eye(len(NODES))])
    taps = np.arange(_TAPS) - _TAPS // 2 + 1
    delays = taps - np.arange(_PHASES)[:, None] / _PHASES
    pulses = np.sinc(delays) * np.cos(np.pi * delays / (_TAPS + 2)) ** 2
    hann = 0.5 - 0.5 * np.cos(np.pi * np.arange(2 * HOP) / HOP)
    return tuple(table.astype(np.float32) for table in (basis, nodes, pulses, hann))


def pulse_train(pitch: np.ndarray) -> np.ndarray:
    """Band-limited pulses at `pitch` [frames], unit power, no offset: float32 [frames x HOP]."""
    samples = len(pitch) * HOP
    frequency = 440.0 * 2 ** ((pitch - 69) / 12)
    frequency = np.interp(np.arange(samples) / HOP, np.arange(len(pitch)), frequency)
    phase = np.cumsum(frequency / RATE)
    at = np.flatnonzero(np.diff(np.floor(phase), prepend=0.0))
    # The crossing lies a fraction of a sample before `at`.
    place = at - (phase[at] - np.floor(phase[at])) * RATE / frequency[at]
    whole = np.floor(place).astype(np.int64)
    shape = _tables()[2][((place - whole) * _PHASES).astype(np.int64)]
    shape = shape * np.sqrt(RATE / frequency[at]).astype(np.float32)[:, None]
    where = whole[:, None] + np.arange(_TAPS)  # shifted by _TAPS // 2 - 1, undone below
    out = np.bincount(where.ravel(), shape.ravel(), minlength=samples + 2 * _TAPS)
    out = out[_TAPS // 2 - 1 :][:samples] - np.sqrt(frequency / RATE)
    return out.astype(np.float32)


def blend(track: np.ndarray, joins: np.ndarray, width: int = 4) -> None:
    """Replace frames around each join by a straight line, in place."""
    share = np.linspace(0, 1, 2 * width + 1, dtype=np.float32)[:, None]
    for join in joins:
        if width <= join < len(track) - width:
            ends = track[join - width], track[join + width]
            track[join - width : join + width + 1] = (1 - share) * ends[0] + share * ends[1]


def carried(amplitude: np.ndarray, pitch: np.ndarray) -> np.ndarray:
    """Gain [frames, 1] that keeps the level where a vowel's resonance lies below the pitch."""
    hertz = 440.0 * 2 ** ((pitch[:, None] - 69) / 12)
    bins = np.arange(amplitude.shape[1]) * (RATE / _FFT)
    above = np.clip(4 * bins / hertz - 2, 0, 1).astype(np.float32)
    power = amplitude**2
    share = (power * above).sum(axis=1) / np.maximum(power.sum(axis=1), 1e-20)
    return 1 / np.sqrt(np.maximum(share, MOST_CARRIED))[:, None]


def synthesise(tracks: Tracks, syllables: Syllables, rng: np.random.Generator) -> np.ndarray:
    """Turn tracks [frames] into float32 [frames x HOP] samples at RATE."""
    basis, nodes, _, hann = _tables()
    frames = len(tracks.index)
    cepstra, noisy = syllables.frames(tracks.index)
    blend(cepstra, tracks.joins)
    blend(noisy, tracks.joins)
    noise = rng.standard_normal(frames * HOP, dtype=np.float32)
    sources = [
        np.lib.stride_tricks.sliding_window_view(np.pad(source, HOP), 2 * HOP)[::HOP]
        for source in (pulse_train(tracks.pitch), noise)
    ]
    gain = tracks.gain.astype(np.float32)[:, None]
    cepstra[:, 1] -= EFFORT * np.minimum(gain[:, 0], 1.3)
    pieces = np.zeros((frames, _BLOCKS * HOP), np.float32)
    sounding = np.flatnonzero(tracks.gain > 0)
    for first in range(0, len(sounding), _CHUNK):
        some = sounding[first : first + _CHUNK]
        log = cepstra[some] @ basis
        amplitude = np.exp(log[:, : nodes.shape[1]]) * gain[some]
        envelope = np.empty(amplitude.shape, np.complex64)
        np.cos(log[:, nodes.shape[1] :], out=envelope.real)
        np.sin(log[:, nodes.shape[1] :], out=envelope.imag)
        amplitude *= carried(amplitude, tracks.pitch[some]) ** (1 - noisy[some, :1])
        share = np.minimum(noisy[some] @ nodes, 1)
        spectrum = rfft(sources[0][some] * hann, _FFT) * np.sqrt(1 - share**2)
        spectrum += rfft(sources[1][some] * hann, _FFT) * share
        spectrum *= envelope
        spectrum *= amplitude
        pieces[some, :_FFT] = irfft(spectrum, _FFT)
    out = np.zeros((frames + _BLOCKS, HOP), np.float32)
    for block in range(_BLOCKS):
        out[block : block + frames] += pieces[:, block * HOP : (block + 1) * HOP]
    return sosfilt(_RUMBLE, out.reshape(-1)[HOP : (frames + 1) * HOP])


def sing(
    bank: Bank, singer: str, notes: Notes, rng: np.random.Generator, seconds: float, rate: int
) -> np.ndarray:
    """Sing a melody as one stem.

    One voice: where notes overlap, the top one is sung. The melody moves by octaves into the
    singer's range. Syllables are drawn from the bank, so that words do not identify anything.
    Consonants sound up to LONGEST_ONSET seconds before their note.

    Args:
        bank: the bank.
        singer: a name in it.
        notes: what to sing.
        rng: draws syllables, slurs, breaths, vibrato and noise.
        seconds: length of the stem; it begins at time 0.
        rate: samples per second of the stem; above RATE / 2 it holds nothing.

    Returns:
        float32 [seconds x rate] samples; zeros where there are no notes.

    Raises:
        KeyError: the bank does not hold the singer.
    """
    who, syllables = bank.singer(singer), bank.syllables[singer]
    total = round(seconds * rate)
    melody = top_line(notes, seconds)
    if len(melody.start) == 0:
        return np.zeros(total, np.float32)
    line = phrase(fold(melody, who.low, who.high), rng)
    # Time 0 falls on a frame, so that the stem can be cut exactly.
    early = int(np.ceil((LONGEST_ONSET + 0.05 - min(line.melody.start[0], 0.0)) * FPS))
    times = np.arange(-early, int(np.ceil(seconds * FPS)) + 1) / FPS
    chosen = rng.integers(len(syllables.marks), size=len(line.slurred))
    tracks = lay_out(line, syllables.marks, chosen, rng, times)
    audio = synthesise(tracks, syllables, rng)[early * HOP :]
    if rate != RATE:
        ratio = Fraction(rate, RATE)
        audio = resample_poly(audio, ratio.numerator, ratio.denominator)
    return audio[:total].astype(np.float32)
