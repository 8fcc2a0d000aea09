"""Captions in many phrasings, from what is known exactly about a clip."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from musicscope.data.taxonomy import BASS_NAMES, FAMILIES, KEYS, PITCHED_FAMILIES, PROGRAM_NAMES

VOCALS = "vocals"
SINGERS = ("male", "female")
CONCEPTS = (*FAMILIES, VOCALS)
"""Everything that can play in a clip; labels are exact for each."""
TEMPOS = ("slow", "mid-tempo", "fast")
DENSITIES = ("sparse", "steady", "busy")
# Krumhansl & Kessler (1982) probe-tone profiles.
MAJOR = np.array([6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88])
MINOR = np.array([6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17])
MODES = tuple(f"{key} {mode}" for key in KEYS for mode in ("major", "minor"))

_FAMILY_WORDS = {
    "guitar": ("guitar", "guitars", "a guitar"), "piano": ("piano", "a piano"),
    "electric_piano": ("electric piano", "keys"), "mallets": ("mallets", "mallet percussion"),
    "organ": ("organ", "an organ"), "strings": ("strings", "bowed strings"),
    "choir": ("choir", "a choir"), "brass": ("brass", "brass instruments"),
    "reed": ("reeds", "woodwind reeds"), "flute": ("flute", "flutes"),
    "synth": ("synth", "synthesizer"), "plucked": ("plucked strings", "plucked instruments"),
    "bass": ("bass", "a bass line"), "drums": ("drums", "a drum kit", "percussion"),
}  # fmt: skip
_SINGER_WORDS = {
    "male": ("male vocal", "a male singer", "male voice", "a man singing"),
    "female": ("female vocal", "a female singer", "female voice", "a woman singing"),
}
_VOCAL_WORDS = ("vocals", "a singer", "singing")
_TEMPO_WORDS = {
    "slow": ("slow", "slow-paced", "unhurried"),
    "mid-tempo": ("mid-tempo", "medium-tempo", "moderate"),
    "fast": ("fast", "up-tempo", "quick"),
}
_DENSITY_WORDS = {
    "sparse": ("sparse", "minimal", "spacious"),
    "steady": ("steady", "even"),
    "busy": ("busy", "dense", "full"),
}


@dataclass(frozen=True)
class Player:
    """One stem of a clip as a caption can name it."""

    concept: str
    """One of CONCEPTS."""
    program: int
    """General MIDI program; unused for drums and vocals."""
    singer: str = ""
    """`male` or `female` for vocals."""
    enters: float = 0.0
    """Seconds into the clip."""

    @property
    def program_name(self) -> str:
        """Name of the instrument or singer, without a choice of words."""
        if self.concept == "drums":
            return "drums"
        if self.concept == VOCALS:
            return f"{self.singer} vocal"
        names = BASS_NAMES if self.concept == "bass" else PROGRAM_NAMES[self.concept]
        return names[self.program]


@dataclass(frozen=True)
class Description:
    """What is true of a clip."""

    players: tuple[Player, ...]
    """Loudest first."""
    tempo_bpm: float
    density: float
    """Notes per second, drums included."""
    key: str
    """One of MODES, or empty where no pitched part plays."""
    style: str = ""
    """Style of the accompaniment; empty where there is none."""

    @property
    def concepts(self) -> tuple[str, ...]:
        """What plays, in the order of CONCEPTS."""
        playing = {player.concept for player in self.players}
        return tuple(c for c in CONCEPTS if c in playing)


def tempo_word(bpm: float) -> str:
    """One of TEMPOS: slow below 90, fast above 135 beats per minute."""
    return "slow" if bpm < 90 else "fast" if bpm > 135 else "mid-tempo"


def density_word(notes_per_second: float) -> str:
    """One of DENSITIES: sparse below 5, busy above 14 notes per second."""
    return "sparse" if notes_per_second < 5 else "busy" if notes_per_second > 14 else "steady"


def estimate_key(pitch_class_seconds: np.ndarray) -> str:
    """Key whose profile correlates best with the durations of the twelve pitch classes.

    Profiles of Krumhansl & Kessler (1982); empty where the durations are all equal.
    """
    if not np.ptp(pitch_class_seconds):
        return ""
    rotated = np.stack([np.roll(pitch_class_seconds, -tonic) for tonic in range(12)])
    scores = np.stack([np.corrcoef(rotated, p)[-1, :-1] for p in (MAJOR, MINOR)], 1)
    return MODES[int(scores.argmax())]


def _pick(words: tuple[str, ...], rng: np.random.Generator) -> str:
    return words[rng.integers(len(words))]


def _name(player: Player, rng: np.random.Generator) -> str:
    if player.concept == VOCALS:
        words = _SINGER_WORDS[player.singer] if rng.random() < 0.7 else _VOCAL_WORDS
        return _pick(words, rng)
    if player.concept == "drums" or rng.random() < 0.55:
        return _pick(_FAMILY_WORDS[player.concept], rng)
    return player.program_name


def join(names: list[str]) -> str:
    """Comma-separated list with "and"; repeated names once."""
    names = list(dict.fromkeys(names))
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def write_caption(about: Description, rng: np.random.Generator) -> str:
    """Write one caption; the loudest player is always named.

    Half of the captions that name everything also say what is absent or how the clip begins.
    """
    names = [_name(player, rng) for player in about.players]
    lead, rest = names[0], names[1:]
    every = join(names)
    tempo = _pick(_TEMPO_WORDS[tempo_word(about.tempo_bpm)], rng)
    dense = _pick(_DENSITY_WORDS[density_word(about.density)], rng)
    bpm = f"{round(about.tempo_bpm / 5) * 5} BPM"
    key = f" in {about.key}" if about.key else ""
    style = f"{about.style} " if about.style and rng.random() < 0.7 else ""
    backed = f" with {join(rest)}" if rest else ""
    forms = [
        lead, f"{lead} music", f"{style}{lead}",
        every, every, f"{style}music with {every}",
        f"{every}, {tempo}, {dense}", f"{tempo} {style}music, {every}",
        f"A {tempo}, {dense} {style}piece{key} with {every}.",
        f"{every} play a {dense} {style}piece{key} at about {bpm}.",
        f"{lead} leads a {tempo} {style}tune{backed}.",
        f"{dense} {tempo} {style}music featuring {lead}{backed}",
        f"{style}{every}{key}, {bpm}",
        f"The sound of {lead}{backed}, {tempo} and {dense}.",
    ]  # fmt: skip
    form = int(rng.integers(len(forms)))
    text = forms[form]
    if form >= 3 and rng.random() < 0.5:
        extra = _staging(about, names, rng) or _absence(about, rng)
        text = f"{text.rstrip('.')}. {extra[0].upper()}{extra[1:]}." if extra else text
    case = rng.random()
    return text.lower() if case < 0.4 else text[0].upper() + text[1:]


def _staging(about: Description, names: list[str], rng: np.random.Generator) -> str:
    """Who begins and who enters later; empty where all begin together."""
    late = [n for n, player in zip(names, about.players, strict=True) if player.enters > 0.5]
    if not late:
        return ""
    early = [n for n, player in zip(names, about.players, strict=True) if player.enters <= 0.5]
    forms = (
        f"it begins with {join(early)}, then {join(late)} come in",
        f"{join(late)} enter later",
        f"an intro of {join(early)} alone",
    )
    return _pick(forms, rng)


def _absence(about: Description, rng: np.random.Generator) -> str:
    absent = [c for c in ("drums", "bass", "guitar", VOCALS) if c not in about.concepts]
    if not absent:
        return ""
    word = absent[rng.integers(len(absent))]
    return _pick((f"no {word}", f"without {word}"), rng)


def random_description(rng: np.random.Generator, styles: tuple[str, ...]) -> Description:
    """Draw a description with no music behind it, to train the text encoder on."""
    count = int(rng.integers(1, 5))
    chosen = list(rng.permutation(PITCHED_FAMILIES)[:count])
    if rng.random() < 0.3 and "guitar" not in chosen:
        chosen[0] = "guitar"
    players = [Player(str(f), int(rng.choice(list(PROGRAM_NAMES[str(f)])))) for f in chosen]
    if rng.random() < 0.4:
        players[rng.integers(len(players))] = Player(VOCALS, 0, SINGERS[rng.integers(2)])
    if rng.random() < 0.6:
        players.append(Player("bass", int(rng.choice(list(BASS_NAMES)))))
    if rng.random() < 0.6:
        players.append(Player("drums", 0))
    rng.shuffle(players)
    if rng.random() < 0.3 and len(players) > 1:
        cut = int(rng.integers(1, len(players)))
        players[cut:] = [replace(p, enters=float(rng.uniform(1, 8))) for p in players[cut:]]
    return Description(
        tuple(players), float(np.exp(rng.uniform(np.log(55), np.log(190)))),
        float(np.exp(rng.uniform(np.log(1.5), np.log(40)))), MODES[rng.integers(len(MODES))],
        styles[rng.integers(len(styles))] if styles and rng.random() < 0.8 else "",
    )  # fmt: skip


def facts(about: Description, styles: tuple[str, ...]) -> np.ndarray:
    """What a text encoder should read off a caption, bool [attributes].

    Attributes: concepts, the loudest concept, programs, singers, concepts that enter later, tempo,
    density, key, style.
    """
    programs = {(p.concept, p.program) for p in about.players}
    late = {p.concept for p in about.players if p.enters > 0.5}
    singers = {p.singer for p in about.players}
    every = [(f, p) for f, names in PROGRAM_NAMES.items() for p in names]
    every += [("bass", p) for p in BASS_NAMES]
    return np.array(
        [c in about.concepts for c in CONCEPTS]
        + [c == about.players[0].concept for c in CONCEPTS]
        + [p in programs for p in every]
        + [s in singers for s in SINGERS]
        + [c in late for c in CONCEPTS]
        + [t == tempo_word(about.tempo_bpm) for t in TEMPOS]
        + [d == density_word(about.density) for d in DENSITIES]
        + [m == about.key for m in MODES]
        + [s == about.style for s in styles]
    )
