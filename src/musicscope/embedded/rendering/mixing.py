"""Mix clips from stems: which stems play, how loud, from when; room, tone, level and noise.

Drawing is vectorised NumPy and a function of the generator alone; audio is made by torch on the
device that trains. One scene gives many clips, each with exact labels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from musicscope.embedded.rendering.captions import CONCEPTS, Description, Player, write_caption
from musicscope.embedded.rendering.scenes import SAMPLE_RATE, Scene

MOST_STEMS = 7
"""Four pitched parts, a voice, bass and drums."""
ROOMS = 64
ROOM_SECONDS = 0.6
FADE_SECONDS = 0.02
SPARSE = 0.5
"""Share of the clips with about two instruments; at .25, few captions name the audible ones."""
TONE_POINTS = 6
"""Control points of the tone curve, evenly spaced in log frequency from 60 Hz to 8 kHz."""
_BASE_DB = {"bass": -2.0, "drums": -2.0, "vocals": 1.0}
_PLAYS = {"bass": 0.75, "drums": 0.7, "vocals": 0.6}
_PITCHED_PLAYS = 0.75


@dataclass(frozen=True)
class SceneTable:
    """Stems of scenes as arrays, so that clips are drawn without a loop over scenes."""

    scenes: tuple[Scene, ...]
    rows: np.ndarray
    """Row of each stem in the bank, int64 [scenes, MOST_STEMS]; -1 where there is none."""
    base_db: np.ndarray
    plays: np.ndarray
    """Probability that the stem plays in a clip, [scenes, MOST_STEMS]."""
    part: np.ndarray
    """Part of the piece, so that a voice and an instrument on one part can be told."""

    @classmethod
    def of(cls, scenes: list[Scene], first_row: int = 0) -> SceneTable:
        """Table of scenes whose stems lie in the bank in order from `first_row`."""
        shape = (len(scenes), MOST_STEMS)
        rows, part = np.full(shape, -1, np.int64), np.full(shape, -1, np.int64)
        base, plays = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        for i, scene in enumerate(scenes):
            for j, stem in enumerate(scene.stems):
                rows[i, j], part[i, j] = first_row, stem.part
                base[i, j] = _BASE_DB.get(stem.concept, 0.0)
                plays[i, j] = _PLAYS.get(stem.concept, _PITCHED_PLAYS)
                first_row += 1
        return cls(tuple(scenes), rows, base, plays, part)

    def __add__(self, other: SceneTable) -> SceneTable:
        arrays = [
            np.concatenate([getattr(self, f.name), getattr(other, f.name)])
            for f in fields(self) if f.name != "scenes"
        ]  # fmt: skip
        return SceneTable(self.scenes + other.scenes, *arrays)


@dataclass(frozen=True)
class Mixes:
    """What makes clips out of stems; all arrays have one row per clip."""

    scene: np.ndarray
    rows: np.ndarray
    """Bank rows [n, MOST_STEMS]; -1 is silent."""
    gain_db: np.ndarray
    enters: np.ndarray
    """Seconds [n, MOST_STEMS]."""
    leaves: np.ndarray
    room: np.ndarray
    """Index of the room, [n]."""
    wet: np.ndarray
    tone_db: np.ndarray
    """Tone curve [n, TONE_POINTS]."""
    level_db: np.ndarray
    """RMS of the clip, dB of full scale."""
    noise_db: np.ndarray
    """RMS of the noise floor, dB of full scale."""
    seed: np.ndarray
    """Of the noise and the caption, int64 [n]."""

    def __len__(self) -> int:
        return len(self.scene)

    def __getitem__(self, which) -> Mixes:
        return Mixes(*(getattr(self, f.name)[which] for f in fields(self)))


def draw_mixes(
    table: SceneTable, count: int, rng: np.random.Generator, seconds: float,
    scenes: np.ndarray | None = None,
) -> Mixes:  # fmt: skip
    """Draw `count` clips, each from a random scene or from the given `scenes` [count].

    In a third of the clips some stems enter later, in a sixth some leave earlier. At least one stem
    plays from the start to the end.
    """
    scene = rng.integers(len(table.scenes), size=count) if scenes is None else scenes
    rows, there = table.rows[scene], table.rows[scene] >= 0
    # The stem that surely plays, drawn evenly among all; sparse clips keep little else.
    first = (rng.random(rows.shape) * there).argmax(1)
    sparse = np.where(rng.random((count, 1)) < SPARSE, 0.35, 1.0)
    on = there & (rng.random(rows.shape) < table.plays[scene] * sparse)
    on[np.arange(count), first] = True
    gain = table.base_db[scene] + rng.normal(0.0, 3.0, rows.shape).clip(-7, 7)
    staged = (rng.random((count, 1)) < 0.33) & (rng.random(rows.shape) < 0.5)
    enters = np.where(staged, rng.uniform(0.1, 0.7, rows.shape) * seconds, 0.0)
    ending = (rng.random((count, 1)) < 0.16) & (rng.random(rows.shape) < 0.4)
    leaves = np.where(ending, rng.uniform(0.75, 0.95, rows.shape) * seconds, np.inf)
    enters[np.arange(count), first], leaves[np.arange(count), first] = 0.0, np.inf
    return Mixes(
        scene,
        np.where(on, rows, -1),
        gain,
        enters,
        leaves,
        room=rng.integers(ROOMS, size=count),
        wet=np.where(rng.random(count) < 0.8, rng.uniform(0.02, 0.3, count), 0.0),
        tone_db=rng.normal(0.0, 2.0, (count, TONE_POINTS)).clip(-6, 6),
        level_db=rng.uniform(-25.0, -15.0, count),
        noise_db=np.where(rng.random(count) < 0.3, rng.uniform(-80.0, -55.0, count), -120.0),
        seed=rng.integers(2**62, size=count),
    )


def describe(table: SceneTable, mixes: Mixes, seconds: float) -> list[Description]:
    """What is true of each clip, loudest player first."""
    found = []
    for i, at in enumerate(mixes.scene):
        scene = table.scenes[at]
        on = np.flatnonzero(mixes.rows[i] >= 0)
        loudest = on[np.argsort(-mixes.gain_db[i, on], kind="stable")]
        players = tuple(
            Player(s.concept, s.program, s.singer, float(mixes.enters[i, j]))
            for j, s in ((j, scene.stems[j]) for j in loudest)
        )
        notes = sum(scene.stems[j].notes * (1 - mixes.enters[i, j] / seconds) for j in on)
        found.append(
            Description(players, scene.tempo_bpm, float(notes / seconds), scene.key, scene.style)
        )
    return found


def captions(table: SceneTable, mixes: Mixes, seconds: float) -> list[str]:
    """One caption per clip, drawn with the clip's seed."""
    about = describe(table, mixes, seconds)
    return [
        write_caption(d, np.random.default_rng(seed))
        for d, seed in zip(about, mixes.seed, strict=True)
    ]


def labels(table: SceneTable, mixes: Mixes, seconds: float) -> np.ndarray:
    """Which concepts play, bool [clips, concepts] in the order of CONCEPTS."""
    about = describe(table, mixes, seconds)
    return np.array([[c in d.concepts for c in CONCEPTS] for d in about])


class Rooms:
    """Room responses in the frequency domain: decaying noise of ROOMS lengths, fixed by seed."""

    def __init__(self, device: str | torch.device):
        rng = np.random.default_rng(0)
        samples = round(ROOM_SECONDS * SAMPLE_RATE)
        noise = rng.standard_normal((ROOMS, samples))
        decay = rng.uniform(0.03, 0.2, (ROOMS, 1)) * SAMPLE_RATE
        noise *= np.exp(-np.arange(samples) / decay)
        noise /= np.sqrt((noise**2).sum(1, keepdims=True))
        self.responses = torch.from_numpy(noise.astype(np.float32)).to(device)


def mix_audio(
    bank: Tensor, mixes: Mixes, rooms: Rooms, start: np.ndarray, samples: int,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Mix `samples` of each clip from sample `start` [n] on; float32 [n, samples] on the device.

    The level is the clip's where the crop is the whole clip, and the crop's otherwise.

    Args:
        bank: stems float16 [stems, clip samples] on the device.
        generator: of the noise floor; torch's own by default.
    """
    device = bank.device
    rows = torch.from_numpy(mixes.rows).to(device)
    if samples == bank.shape[1] and not start.any():
        stems = bank[rows.clamp_min(0)]
    else:
        at = torch.from_numpy(start).to(device)[:, None, None]
        stems = bank[rows.clamp_min(0)[..., None], at + torch.arange(samples, device=device)]
    stems = stems.float().nan_to_num_(0.0, 0.0, 0.0)
    gain = torch.from_numpy(np.where(mixes.rows >= 0, 10 ** (mixes.gain_db / 20), 0.0)).to(device)
    # Few stems enter late or leave early: curves for all would take most of the time.
    clip, stem = np.nonzero((mixes.rows >= 0) & ((mixes.enters > 0) | np.isfinite(mixes.leaves)))
    faded = stems[clip, stem] * _fades(mixes, start, samples, clip, stem, gain)
    stems *= gain.float()[..., None]
    stems[clip, stem] = faded
    dry = stems.sum(1)
    # Room and tone are applied together, zero-padded so that nothing wraps around.
    size = samples + rooms.responses.shape[1]
    spectrum = torch.fft.rfft(dry, size)
    wet = torch.from_numpy(mixes.wet.astype(np.float32)).to(device)[:, None]
    room = torch.fft.rfft(rooms.responses[torch.from_numpy(mixes.room).to(device)], size)
    spectrum = spectrum * (1 + wet * room) * _tone(mixes, spectrum.shape[1], device)
    audio = torch.fft.irfft(spectrum, size)[:, :samples]
    rms = audio.square().mean(1, keepdim=True).sqrt().clamp_min(1e-4)
    level = torch.from_numpy(10 ** (mixes.level_db / 20)).float().to(device)[:, None]
    audio = audio * level / rms
    noise = torch.from_numpy(10 ** (mixes.noise_db / 20)).float().to(device)[:, None]
    audio = audio + noise * torch.randn(audio.shape, generator=generator, device=device)
    return (audio / audio.abs().amax(1, keepdim=True).clamp_min(1.0)).nan_to_num(0.0, 0.0, 0.0)


def _fades(
    mixes: Mixes, start: np.ndarray, samples: int, clip: np.ndarray, stem: np.ndarray, gain: Tensor
) -> Tensor:
    """Gain [pairs, samples] of the stems (`clip`, `stem`) that enter late or leave early."""
    device = gain.device
    at = torch.from_numpy(start[clip]).to(device)[:, None]
    time = (at + torch.arange(samples, device=device)) / SAMPLE_RATE
    enters = torch.from_numpy(mixes.enters[clip, stem]).float().to(device)[:, None]
    leaves = torch.from_numpy(mixes.leaves[clip, stem]).float().to(device)[:, None]
    fade_in = ((time - enters) / FADE_SECONDS).clamp(0, 1)
    fade_in = fade_in.where(enters > 0, torch.ones((), device=device))
    fade_out = ((leaves - time) / FADE_SECONDS).clamp(0, 1)
    return (gain[clip, stem][:, None] * fade_in * fade_out).float()


def _tone(mixes: Mixes, bins: int, device: torch.device) -> Tensor:
    """Gain per frequency bin [n, bins]: straight lines in dB between the control points."""
    hertz = np.linspace(0, SAMPLE_RATE / 2, bins).clip(60, 8000)
    place = np.log(hertz / 60) / np.log(8000 / 60) * (TONE_POINTS - 1)
    low = np.minimum(place.astype(np.int64), TONE_POINTS - 2)
    share = torch.from_numpy((place - low).astype(np.float32)).to(device)
    curve = torch.from_numpy(mixes.tone_db.astype(np.float32)).to(device)
    low = torch.from_numpy(low).to(device)
    decibels = curve[:, low] * (1 - share) + curve[:, low + 1] * share
    return 10 ** (decibels / 20)
