"""Drum kits with random parameters: membranes with falling pitch, metal plates, and noise bursts.

Keys follow General MIDI percussion. Any other key plays a small drum or block whose pitch follows
the key.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from musicscope.embedded.rendering.tones import (
    T60,
    Instrument,
    Stem,
    burst,
    faded_in,
    modal,
    onset,
    phase,
    saturate,
    seconds_axis,
    sine,
)

KICKS, SNARES, HATS = (35, 36), (38, 40), frozenset({42, 44, 46})
TOMS = {41: 0.62, 43: 0.75, 45: 0.9, 47: 1.05, 48: 1.25, 50: 1.5}
CRASHES = {49: 1.0, 57: 1.1, 55: 1.5, 52: 0.8}
RIDES = {51: 1.0, 59: 1.08, 53: 1.0}
HAND_DRUMS = {60: 420.0, 61: 300.0, 62: 390.0, 63: 330.0, 64: 230.0, 65: 350.0, 66: 260.0}
BLOCKS = {37: 1150.0, 75: 2500.0, 76: 1250.0, 77: 850.0, 31: 1600.0, 78: 500.0, 79: 420.0}
BELLS = {56: (560.0, 0.25), 67: (1180.0, 0.4), 68: (840.0, 0.4), 80: (4100.0, 0.12),
         81: (4100.0, 1.4), 53: (780.0, 1.2)}  # fmt: skip
RATTLES = {54: (4500.0, 0.18), 58: (1800.0, 0.6), 69: (4000.0, 0.07), 70: (4500.0, 0.05),
           73: (1500.0, 0.09), 74: (1500.0, 0.3),
           82: (3500.0, 0.09), 83: (5000.0, 0.4)}  # fmt: skip
LEVELS_DB = {
    "kick": 1.0, "snare": 0.0, "tom": -1.0, "hat": -9.0, "crash": -3.0, "ride": -9.0,
    "clap": -3.0, "hand": -3.0, "block": -5.0, "bell": -9.0, "rattle": -8.0,
}  # fmt: skip


def kind(key: int) -> str:
    """Name of the drum that a General MIDI key plays, a key of LEVELS_DB."""
    for name, keys in (
        ("kick", KICKS), ("snare", SNARES), ("hat", HATS), ("tom", TOMS), ("crash", CRASHES),
        ("bell", BELLS), ("ride", RIDES), ("hand", HAND_DRUMS), ("block", BLOCKS),
        ("rattle", RATTLES), ("clap", (39,)),
    ):  # fmt: skip
        if key in keys:
            return name
    return ("hand", "block")[key % 2]


@dataclass(frozen=True)
class Kit:
    """Parameters of one kit; decays are seconds in which the sound falls by 60 dB."""

    electronic: bool
    kick_hertz: float
    kick_sweep: float
    kick_decay: float
    kick_click: float
    snare_hertz: float
    snare_decay: float
    snare_wires: float
    wires_low: float
    tom_hertz: float
    tom_decay: float
    tom_sweep: float
    hat_closed: float
    hat_open: float
    hat_low: float
    metal: float
    crash_decay: float
    ride_decay: float
    drive: float


def draw_kit(rng: np.random.Generator) -> Kit:
    """A kit between dry acoustic and drum machine."""
    u = rng.uniform
    machine = bool(rng.random() < 0.35)
    return Kit(
        electronic=machine,
        kick_hertz=u(42, 62) if machine else u(48, 75),
        kick_sweep=u(2.0, 6.0) if machine else u(0.8, 2.5),
        kick_decay=u(0.3, 0.9) if machine else u(0.18, 0.4),
        kick_click=u(0.05, 0.4),
        snare_hertz=u(160, 240),
        snare_decay=u(0.12, 0.3),
        snare_wires=u(0.6, 1.6),
        wires_low=u(900, 2500),
        tom_hertz=u(95, 150),
        tom_decay=u(0.25, 0.7),
        tom_sweep=u(0.1, 0.8) if machine else u(0.05, 0.3),
        hat_closed=u(0.04, 0.13),
        hat_open=u(0.35, 0.9),
        hat_low=u(3500, 7000),
        metal=u(0.1, 0.7),
        crash_decay=u(1.2, 3.0),
        ride_decay=u(0.8, 2.0),
        drive=u(0.5, 2.0),
    )


def _membrane(
    f0: float, sweep: float, decay: float, overtones: float, samples: int, stem: Stem
) -> np.ndarray:
    """A drum head: a sine that falls from (1 + sweep) f0, with two modes of a circular membrane."""
    time = seconds_axis(samples, stem.rate)
    fall = np.float32(18.0 / decay)
    # Integral of f0 * sweep * exp(-fall * t), as seconds that the oscillator is ahead.
    warp = np.float32(sweep) / fall * (np.float32(1.0) - np.exp(-fall * time))
    curve = np.exp(np.float32(-T60 / decay) * time)
    head = sine(phase(f0, samples, stem.rate, warp)) * curve
    ratios = np.array([1.593, 2.136, 2.296])
    more = modal(f0 * (1.0 + 0.3 * sweep) * ratios, T60 / decay * (1.5 + ratios),
                 overtones * np.array([0.6, 0.35, 0.2]), samples, stem.rate)  # fmt: skip
    return faded_in(head + more, 0.0015, stem.rate)


def _metal(low: float, high: float, decay: float, count: int, samples: int, stem: Stem):
    """A plate: `count` random modes between `low` and `high` Hz, the higher ones shorter."""
    rng = stem.rng
    f = np.exp(rng.uniform(np.log(low), np.log(high), count))
    times = decay * np.exp(0.3 * rng.standard_normal(count)) * (low / f) ** 0.3
    strength = rng.standard_normal(count) * np.exp(1j * rng.uniform(0, 2 * np.pi, count))
    out = modal(f, T60 / times, strength / np.sqrt(count / 2), samples, stem.rate)
    return faded_in(out, 0.0005, stem.rate)


def drums(program: int, stem: Stem) -> Instrument:
    """A kit on the keys of General MIDI percussion; `program` is not used."""
    kit = draw_kit(stem.rng)
    rng, rate = stem.rng, stem.rate
    levels = {name: 10 ** ((db + rng.normal(0.0, 1.5)) / 20) for name, db in LEVELS_DB.items()}

    def length(seconds: float, samples: int) -> int:
        return min(samples, int(1.1 * seconds * rate))

    def kick(key: int, hard: float, samples: int) -> np.ndarray:
        n = length(kit.kick_decay, samples)
        head = _membrane(kit.kick_hertz * (1.0 if key == 36 else 0.92), kit.kick_sweep,
                         kit.kick_decay, 0.15, n, stem)  # fmt: skip
        click = burst(rng, n, 800.0, 5000.0, 0.012, rate)
        return saturate(head + np.float32(kit.kick_click * hard) * click, kit.drive)

    def snare(key: int, hard: float, samples: int) -> np.ndarray:
        n = length(max(0.3, 1.3 * kit.snare_decay), samples)
        tuned = kit.snare_hertz * (1.0 if key == 38 else 1.12)
        head = _membrane(tuned, 0.25, kit.snare_decay, 0.8, n, stem)
        top = 5000.0 + 8000.0 * hard
        wires = burst(rng, n, kit.wires_low, top, 1.3 * kit.snare_decay, rate)
        slap = burst(rng, n, 300.0, top, 0.03, rate)
        mixed = head + np.float32(0.35 * kit.snare_wires) * wires + np.float32(0.3 * hard) * slap
        return saturate(mixed, 0.7)

    def hat(key: int, hard: float, samples: int) -> np.ndarray:
        decay = kit.hat_open if key == 46 else kit.hat_closed * (0.7 if key == 44 else 1.0)
        n = length(decay, samples)
        low = kit.hat_low * (0.8 + 0.3 * hard)
        noise = burst(rng, n, low, 15000.0, decay, rate)
        return noise + np.float32(2.0 * kit.metal) * _metal(low, 14000.0, decay, 30, n, stem)

    def tom(key: int, hard: float, samples: int) -> np.ndarray:
        f0 = kit.tom_hertz * TOMS[key]
        decay = kit.tom_decay * (1.3 - 0.3 * TOMS[key])
        n = length(decay, samples)
        head = _membrane(f0, kit.tom_sweep * (0.5 + hard), decay, 0.6, n, stem)
        return head + np.float32(0.15 * hard) * burst(rng, n, 500.0, 4000.0, 0.03, rate)

    def crash(key: int, hard: float, samples: int) -> np.ndarray:
        decay = kit.crash_decay * (0.4 if key == 55 else 1.0)
        n = length(decay, samples)
        low = 380.0 * CRASHES[key]
        noise = burst(rng, n, 2500.0, 14000.0, 0.8 * decay, rate)
        swell = onset(seconds_axis(n, rate), 0.01)
        return (1.2 * _metal(low, 13000.0, decay, 120, n, stem) + np.float32(0.7) * noise) * swell

    def ride(key: int, hard: float, samples: int) -> np.ndarray:
        n = length(kit.ride_decay, samples)
        wash = _metal(500.0 * RIDES[key], 9000.0, kit.ride_decay, 60, n, stem)
        ping = _metal(2500.0, 6500.0, 0.25, 8, n, stem)
        stick = burst(rng, n, 3000.0, 12000.0, 0.02, rate)
        return np.float32(0.5) * wash + np.float32(0.5 + hard) * ping + np.float32(0.5) * stick

    def clap(key: int, hard: float, samples: int) -> np.ndarray:
        n = length(0.35, samples)
        out = np.zeros(n, np.float32)
        starts = np.cumsum([0.0, *rng.uniform(0.007, 0.014, 3)])
        for start, decay in zip(starts, (0.03, 0.03, 0.03, 0.22), strict=True):
            at = min(n, int(start * rate))
            out[at:] += burst(rng, n - at, 900.0, 3500.0 + 3000.0 * hard, decay, rate)
        return out

    def hand(key: int, hard: float, samples: int) -> np.ndarray:
        f0 = HAND_DRUMS.get(key, 110.0 * 2.0 ** ((key % 24) / 12.0))
        n = length(0.4, samples)
        head = _membrane(f0, 0.1, 0.12 if key == 62 else 0.3, 0.5, n, stem)
        return head + np.float32(0.3 * hard) * burst(rng, n, 800.0, 6000.0, 0.015, rate)

    def block(key: int, hard: float, samples: int) -> np.ndarray:
        f0 = BLOCKS.get(key, 300.0 * 2.0 ** ((key % 36) / 12.0))
        n = length(0.12, samples)
        body = modal(f0 * np.array([1.0, 1.52, 2.71, 4.1]), np.array([75.0, 95.0, 130.0, 200.0]),
                     np.array([1.0, 0.7, 0.4 * hard, 0.3 * hard]), n, rate)  # fmt: skip
        return body + np.float32(0.3) * burst(rng, n, 1500.0, 9000.0, 0.01, rate)

    def bell(key: int, hard: float, samples: int) -> np.ndarray:
        f0, decay = BELLS[key]
        n = length(decay, samples)
        ratios = np.array([1.0, 1.482, 2.01, 2.61, 3.37, 4.5])
        gains = np.array([1.0, 0.9, 0.4, 0.4, 0.35, 0.3]) * hard ** np.linspace(0, 1, 6)
        out = modal(f0 * ratios, T60 / decay * ratios**0.4, gains, n, rate)
        return faded_in(out, 0.0005, rate)

    def rattle(key: int, hard: float, samples: int) -> np.ndarray:
        low, decay = RATTLES[key]
        n = length(decay + 0.03, samples)
        swell = onset(seconds_axis(n, rate), 0.004 if key == 54 else 0.025)
        noise = burst(rng, n, low, low * 2.5, decay, rate) * swell
        if key in (73, 74, 58):  # guiro and vibraslap: regular strokes
            noise *= np.float32(0.2) + (np.sin(2 * np.pi * 35.0 * seconds_axis(n, rate)) > 0.0)
        if key in (54, 83):
            noise += np.float32(0.8) * _metal(low, 12000.0, decay, 20, n, stem)
        return noise

    makers = dict(kick=kick, snare=snare, hat=hat, tom=tom, crash=crash, ride=ride, clap=clap,
                  hand=hand, block=block, bell=bell, rattle=rattle)  # fmt: skip

    def tone(pitch: float, loudness: float, samples: int) -> np.ndarray:
        key = int(pitch)
        out = makers[kind(key)](key, loudness, samples)
        fade = min(len(out), rate // 100)
        out[len(out) - fade :] *= np.linspace(1.0, 0.0, fade, dtype=np.float32)
        return out

    return Instrument(tone, 0.01, rings=True, touch=rng.uniform(1.0, 1.8),
                      levels=lambda key: levels[kind(key)], choked=HATS)  # fmt: skip
