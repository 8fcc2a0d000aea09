"""Instruments that sound as long as a note lasts: bowed, blown, and sung, and their engine.

Each is a source with a harmonic spectrum, read from wavetables. The rows of a table go from dark to
bright, and an envelope moves between them, because loud notes of these instruments are brighter.
Vibrato, drift, and the scoop into a note move the phase; breath and bow add noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from musicscope.embedded.rendering.tones import (
    MAX_HARMONICS,
    Finish,
    Instrument,
    Stem,
    band_noise,
    burst,
    cents,
    drawn_peaks,
    harmonics,
    hertz,
    lowpass,
    onset,
    peaks,
    phase,
    resonant,
    scan,
    seconds_axis,
    tables,
    wander,
)

Spectrum = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(harmonic numbers [n], their Hz [n], brightness 0..1 [rows, 1]) -> amplitudes [rows, n]."""
ROWS = 5


@dataclass(frozen=True)
class Voice:
    """Parameters of one sustained instrument."""

    spectrum: Spectrum
    attack: float
    """Seconds."""
    release: float
    voices: int = 1
    spread: float = 0.0
    """Cents of detune between voices (standard deviation)."""
    vibrato: float = 0.0
    """Cents, each way."""
    speed: float = 5.5
    """Vibrato cycles per second."""
    delay: float = 0.25
    """Seconds until the vibrato is at its full depth."""
    tremolo: float = 0.0
    """Share by which the vibrato moves the level."""
    drift: float = 3.0
    """Cents of slow random deviation."""
    scoop: float = 0.0
    """Cents by which a note begins flat."""
    dull: float = 0.3
    """Brightness of the softest note."""
    swell: float = 0.0
    """How much of the brightness the attack still lacks."""
    settle: float = 1.0
    """Level after the attack, as a share of the peak."""
    fall: float = 0.2
    """Seconds from the peak to that level."""
    filter_fall: float = 0.0
    """Seconds in which brightness falls to `filter_rest` after the attack; 0 for none."""
    filter_rest: float = 1.0
    sweep: float = 0.0
    """Share of the brightness that a slow oscillator takes away."""
    breath: float = 0.0
    """Level of steady noise."""
    breath_gain: Callable[[np.ndarray], np.ndarray] | None = None
    """Spectrum of that noise (of Hz)."""
    rough: float = 0.0
    """Random modulation of the level, which puts noise around each harmonic."""
    chiff: float = 0.0
    """Level of the noise burst at the onset."""
    chiff_band: tuple[float, float] = (800.0, 5000.0)
    uneven: float = 0.0
    """Random deviation of the harmonics' amplitudes per pitch, nepers."""
    dynamic: bool = True
    """Whether the spectrum depends on the brightness."""
    apart: bool = False
    """Whether each voice reads a table row of its own (singers) instead of the brightness."""
    scattered: bool = False
    """Whether harmonics start at random phases instead of as one pulse."""


def sustained(
    voice: Voice, stem: Stem, touch: float = 1.6, finish: Finish | None = None
) -> Instrument:
    """An instrument from the parameters of one voice; curves over time are shared by its notes."""
    rng, rate = stem.rng, stem.rate
    time = seconds_axis(stem.longest, rate)
    rise = onset(time, voice.attack)
    after = np.maximum(time - np.float32(voice.attack), 0.0)
    curve = rise
    if voice.settle != 1.0:
        decay = np.exp(after * np.float32(-3.0 / voice.fall))
        curve = rise * (np.float32(voice.settle) + np.float32(1.0 - voice.settle) * decay)
    bright = np.float32(1.0 - voice.swell) + np.float32(voice.swell) * rise
    if voice.filter_fall:
        decay = np.exp(after * np.float32(-3.0 / voice.filter_fall))
        rest = np.float32(voice.filter_rest)
        bright = bright * (rest + (np.float32(1.0) - rest) * decay)
    if voice.sweep:
        turn = np.float32(2 * np.pi * rng.uniform(0.1, 1.0)) * time + np.float32(
            rng.uniform(0, 6.28)
        )
        bright = bright * (np.float32(1.0) - np.float32(voice.sweep) * (0.5 + 0.5 * np.sin(turn)))
    moving = bool(voice.swell or voice.filter_fall or voice.sweep)
    detune = voice.spread * rng.standard_normal(voice.voices) if voice.voices > 1 else np.zeros(1)
    detune = detune - detune.mean()
    warps, vibrations = zip(*(_pitch(voice, stem, time) for _ in detune), strict=True)
    if voice.tremolo:
        curve = curve * (np.float32(1.0) + np.float32(voice.tremolo) * vibrations[0])
    if voice.rough:
        noise = band_noise(rng, stem.longest, lambda f: lowpass(f, 120.0), rate)
        curve = curve * (np.float32(1.0) + np.float32(voice.rough) * noise)
    breath = None
    if voice.breath:
        gain = voice.breath_gain or (lambda f: lowpass(f, 4000.0))
        breath = np.float32(voice.breath) * band_noise(rng, stem.longest, gain, rate)
    scatter = rng.uniform(0, 2 * np.pi, MAX_HARMONICS) if voice.scattered else None
    known: dict[float, np.ndarray] = {}
    rows = ROWS if voice.dynamic else 1

    def tone(pitch: float, loudness: float, samples: int) -> np.ndarray:
        f0 = hertz(pitch)
        if pitch not in known:
            k = harmonics(f0, rate)
            spectra = voice.spectrum(k, k * f0, np.linspace(0.0, 1.0, rows)[:, None])
            spectra = spectra * np.exp(voice.uneven * rng.standard_normal(len(k)))
            known[pitch] = tables(spectra, None if scatter is None else scatter[: len(k)])
        table = known[pitch]
        shine = voice.dull + (1.0 - voice.dull) * loudness
        row = (shine * (rows - 1)) * bright[:samples] if moving else shine * (rows - 1)
        tuned = f0 * cents(detune)
        phases = [phase(f, samples, rate, w) for f, w in zip(tuned, warps, strict=True)]
        if voice.voices > 1:
            starts = rng.integers(0, 2**32, voice.voices, dtype=np.uint32)
            phases = [p + start for p, start in zip(phases, starts, strict=True)]
        if voice.apart:
            out = sum(scan(table, [p], n % ROWS) for n, p in enumerate(phases))
        else:
            out = scan(table, phases, row)
        out *= np.float32(voice.voices**-0.5)
        if breath is not None:
            at = int(rng.integers(0, max(1, stem.longest - samples)))
            out += breath[at : at + samples]
        out *= curve[:samples]
        if voice.chiff:
            length = 2.0 * voice.attack + 0.02
            noise = burst(rng, samples, *voice.chiff_band, length, rate)
            out += np.float32(voice.chiff * (0.3 + loudness)) * noise
        return out

    return Instrument(tone, voice.release, touch=touch, finish=finish)


def _pitch(voice: Voice, stem: Stem, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Seconds that one voice's oscillator is ahead, and its vibrato in -1..1, both [longest]."""
    rng = stem.rng
    speed = voice.speed * rng.uniform(0.92, 1.08)
    depth = onset(time, 2.0 * voice.delay) if voice.delay else np.float32(1.0)
    wave = depth * np.sin(np.float32(2 * np.pi * speed) * time + np.float32(rng.uniform(0, 6.28)))
    deviation = np.float32(voice.vibrato) * wave
    if voice.drift:
        deviation = deviation + np.float32(voice.drift) * wander(rng, time, 0.3, 4.0)
    if voice.scoop:
        deviation = deviation - np.float32(voice.scoop) * np.exp(time * np.float32(-1 / 0.03))
    ratio = deviation * np.float32(np.log(2.0) / 1200.0)
    warp = np.cumsum(ratio, dtype=np.float64) / stem.rate
    return warp.astype(np.float32), wave


# --- strings and choir ------------------------------------------------------------------------

# Air modes, body modes, and bridge hill: Hz, quality, gain.
VIOLIN_BODY = ((275.0, 10.0, 1.0), (460.0, 12.0, 1.3), (550.0, 12.0, 1.2), (1000.0, 4.0, 0.5),
               (2500.0, 2.5, 1.3), (3800.0, 3.0, 0.5))  # fmt: skip
CELLO_BODY = ((105.0, 9.0, 1.0), (180.0, 10.0, 1.3), (230.0, 9.0, 1.0), (600.0, 4.0, 0.7),
              (1500.0, 2.5, 0.9), (2500.0, 3.0, 0.4))  # fmt: skip


def strings(program: int, stem: Stem) -> Instrument:
    """Violin, cello, string ensemble, or slow strings (programs 40, 42, 48, 49)."""
    u, rng = stem.rng.uniform, stem.rng
    body = drawn_peaks(rng, CELLO_BODY if program == 42 else VIOLIN_BODY, 0.15)
    solo, slow = program in (40, 42), program == 49
    bow, slope, dark, top = u(0.07, 0.13), u(0.95, 1.25), u(1300, 2200), u(4500, 8500)

    def spectrum(k: np.ndarray, f: np.ndarray, level: np.ndarray) -> np.ndarray:
        # A bow at 1/n of the string weakens harmonic n.
        dip = 1.0 - 0.7 * np.cos(np.pi * k * bow) ** 40
        return k**-slope * dip * peaks(f, body, 0.5) * lowpass(f, dark * (top / dark) ** level, 1.5)

    return sustained(
        Voice(
            spectrum,
            attack=u(0.25, 0.5) if slow else u(0.04, 0.12) if solo else u(0.08, 0.22),
            release=u(0.1, 0.3) if solo else u(0.25, 0.7),
            voices=1 if solo else int(rng.integers(4, 7)),
            spread=u(5.0, 11.0),
            vibrato=u(12.0, 35.0) if solo else u(8.0, 20.0),
            speed=u(4.8, 6.5),
            delay=u(0.1, 0.4),
            tremolo=u(0.03, 0.12) if solo else 0.0,
            drift=u(2.0, 6.0),
            scoop=u(0.0, 25.0),
            swell=u(0.2, 0.5),
            breath=u(0.02, 0.08),
            breath_gain=lambda f: lowpass(f, 5000.0) * np.minimum(f / 900.0, 1.0),
            rough=u(0.02, 0.08) if solo else 0.02,
            uneven=u(0.1, 0.3),
            scattered=not solo,
        ),
        stem,
    )


# Formants of sung vowels: Hz, bandwidth in Hz, gain in dB (means of men and women).
VOWELS = {
    52: ((760, 90, 0.0), (1180, 100, -5.0), (2750, 130, -20.0), (3400, 150, -24.0),
         (4500, 250, -34.0)),
    53: ((340, 60, 0.0), (720, 80, -13.0), (2650, 120, -30.0), (3300, 140, -33.0),
         (4300, 200, -42.0)),
}  # fmt: skip


def choir(program: int, stem: Stem) -> Instrument:
    """Choir singing "aah" or "ooh" (programs 52, 53): glottal pulses through moved formants."""
    u, rng = stem.rng.uniform, stem.rng
    formants = np.array(VOWELS[program], float)
    formants[:, 0] *= np.exp(0.06 * rng.standard_normal(len(formants)))
    sizes = u(0.88, 1.22, ROWS)
    tilt, wide, opening = u(1.5, 2.1), u(1.0, 1.8), u(0.0, 6.0)

    def spectrum(k: np.ndarray, f: np.ndarray, level: np.ndarray) -> np.ndarray:
        # Rows are singers: each has a vocal tract of another length.
        scaled = f / sizes[:, None]
        gains = 10 ** ((formants[:, 2] + opening * (formants[:, 2] < -10.0)) / 20)
        tract = np.full_like(scaled, 0.01)
        for centre, width, gain in zip(formants[:, 0], wide * formants[:, 1], gains, strict=True):
            tract += gain * width / centre * resonant(scaled, centre, centre / width)
        return k**-tilt * np.maximum(f, 80.0) ** 0.5 * tract

    def breath(f: np.ndarray) -> np.ndarray:
        table = np.stack([formants[:, 0], formants[:, 0] / formants[:, 1] / 1.5,
                          10 ** (formants[:, 2] / 40)], axis=1)  # fmt: skip
        return peaks(f, table, 0.05) * np.minimum(f / 300.0, 1.0) * lowpass(f, 6000.0)

    return sustained(
        Voice(
            spectrum,
            attack=u(0.07, 0.25),
            release=u(0.2, 0.6),
            voices=int(rng.integers(3, 6)),
            spread=u(5.0, 14.0),
            vibrato=u(15.0, 45.0),
            speed=u(4.6, 6.2),
            delay=u(0.1, 0.35),
            drift=u(4.0, 10.0),
            scoop=u(0.0, 40.0),
            breath=u(0.02, 0.1),
            breath_gain=breath,
            apart=True,
        ),
        stem,
    )


# --- brass, reeds, and flutes -----------------------------------------------------------------

BELL_FORMANTS = {56: (1300.0, 2800.0), 57: (650.0, 1500.0), 60: (420.0, 900.0), 61: (900.0, 2000.0)}
BRASS_TOP = {56: (1100, 7000), 57: (700, 4500), 60: (550, 2900), 61: (1000, 6000)}


def brass(program: int, stem: Stem) -> Instrument:
    """Trumpet, trombone, French horn, or brass section (programs 56, 57, 60, 61)."""
    u, rng = stem.rng.uniform, stem.rng
    first, second = BELL_FORMANTS[program]
    body = drawn_peaks(rng, ((first, 2.0, u(0.8, 2.0)), (second, 2.5, u(0.2, 0.9))))
    dark, top = (x * u(0.8, 1.25) for x in BRASS_TOP[program])
    slope, steep = u(0.35, 0.8), u(1.3, 2.2)

    def spectrum(k: np.ndarray, f: np.ndarray, level: np.ndarray) -> np.ndarray:
        # The nonlinear lips and bore move the cut-off up as a note gets louder.
        cutoff = np.maximum(dark * (top / dark) ** level, 1.2 * f[0])
        return k**-slope * peaks(f, body, 0.6) * lowpass(f, cutoff, steep)

    section = program == 61
    return sustained(
        Voice(
            spectrum,
            attack=u(0.03, 0.09) if program != 60 else u(0.05, 0.13),
            release=u(0.06, 0.18),
            voices=int(rng.integers(3, 5)) if section else 1,
            spread=u(4.0, 10.0),
            vibrato=u(0.0, 14.0) if program != 60 else u(0.0, 4.0),
            speed=u(4.5, 6.0),
            delay=u(0.3, 0.6),
            tremolo=u(0.0, 0.06),
            drift=u(2.0, 5.0),
            scoop=u(10.0, 60.0),
            dull=u(0.25, 0.5),
            swell=u(0.5, 0.8),
            settle=u(0.65, 0.95),
            fall=u(0.1, 0.4),
            filter_fall=u(0.2, 0.6),
            filter_rest=u(0.75, 0.95),
            breath=u(0.0, 0.02),
            rough=u(0.01, 0.03),
            uneven=u(0.1, 0.3),
            chiff=u(0.0, 0.08),
        ),
        stem,
    )


REED_BODY = {
    65: ((650.0, 2.5, 1.2), (1450.0, 3.0, 1.2), (2900.0, 3.0, 0.5)),
    66: ((450.0, 2.5, 1.4), (1050.0, 3.0, 1.1), (2300.0, 3.0, 0.5)),
    68: ((1150.0, 3.0, 2.5), (2900.0, 3.5, 1.5), (4600.0, 4.0, 0.4)),
    71: ((1500.0, 2.0, 0.4), (3200.0, 2.5, 0.4)),
}


def reed(program: int, stem: Stem) -> Instrument:
    """Alto or tenor saxophone, oboe, or clarinet (programs 65, 66, 68, 71)."""
    u, rng = stem.rng.uniform, stem.rng
    body = drawn_peaks(rng, REED_BODY[program])
    clarinet, oboe = program == 71, program == 68
    even, slope = u(0.02, 0.1), u(0.3, 0.8) if clarinet else u(0.2, 0.7)
    dark, top = (u(900, 1400), u(2000, 3500)) if clarinet else (u(1000, 1800), u(2400, 4500))
    weak, steep = u(0.3, 0.7) if oboe else 1.0, u(2.0, 3.5)

    def spectrum(k: np.ndarray, f: np.ndarray, level: np.ndarray) -> np.ndarray:
        cutoff = np.maximum(dark * (top / dark) ** level, f[0])
        gains = k**-slope * peaks(f, body, 0.5) * lowpass(f, cutoff, steep)
        if clarinet:  # a closed cylinder: even harmonics are weak up to its tone-hole cut-off
            gains = gains * np.where(k % 2 == 0, even + (1 - even) * f**3 / (f**3 + 2800.0**3), 1.0)
        gains[:, 0] *= weak
        return gains

    sax = not (clarinet or oboe)
    return sustained(
        Voice(
            spectrum,
            attack=u(0.01, 0.045),
            release=u(0.04, 0.11),
            vibrato=u(10.0, 35.0) if sax else u(0.0, 6.0) if clarinet else u(4.0, 16.0),
            speed=u(4.6, 6.0),
            delay=u(0.15, 0.45),
            tremolo=u(0.02, 0.1),
            drift=u(2.0, 5.0),
            scoop=u(10.0, 70.0) if sax else u(0.0, 20.0),
            dull=u(0.2, 0.5),
            swell=u(0.3, 0.6),
            settle=u(0.7, 0.95),
            breath=u(0.01, 0.06) if sax else u(0.0, 0.03),
            breath_gain=lambda f: lowpass(f, 4000.0) * np.minimum(f / 1500.0, 1.0),
            rough=u(0.03, 0.1) if sax else u(0.0, 0.03),
            uneven=u(0.4, 0.9),
            chiff=u(0.05, 0.2) if sax else u(0.0, 0.08),
        ),
        stem,
    )


def flute(program: int, stem: Stem) -> Instrument:
    """Flute, recorder, or pan flute (programs 73, 74, 75)."""
    u = stem.rng.uniform
    pan, recorder = program == 75, program == 74
    second = u(0.25, 0.8) if program == 73 else u(0.04, 0.2)
    third, rest = u(0.1, 0.35), u(1.6, 2.6)
    centre = u(1200, 3500)

    def spectrum(k: np.ndarray, f: np.ndarray, level: np.ndarray) -> np.ndarray:
        gains = third * (3.0 / k) ** rest * (0.3 + 0.7 * level)
        gains[:, 1:2] = second * (0.4 + 0.6 * level)
        gains[:, 0] = 1.0
        return gains * lowpass(f, 5000.0)

    return sustained(
        Voice(
            spectrum,
            attack=u(0.03, 0.09),
            release=u(0.06, 0.18),
            vibrato=u(0.0, 5.0) if recorder else u(4.0, 20.0),
            speed=u(4.5, 5.8),
            delay=u(0.1, 0.4),
            tremolo=u(0.0, 0.05) if recorder else u(0.06, 0.22),
            drift=u(2.0, 6.0),
            scoop=u(0.0, 25.0),
            swell=u(0.2, 0.5),
            settle=u(0.5, 0.8) if pan else u(0.8, 1.0),
            fall=u(0.2, 0.5),
            breath=u(0.1, 0.25) if pan else u(0.01, 0.04) if recorder else u(0.04, 0.14),
            breath_gain=lambda f: (
                peaks(f, np.array([[centre, 0.8, 1.0]]), 0.05) * lowpass(f, 5500.0)
            ),
            rough=u(0.03, 0.1) if pan else u(0.01, 0.05),
            uneven=u(0.1, 0.3),
            chiff=u(0.3, 0.9) if pan else u(0.05, 0.3),
            chiff_band=(600.0, 4000.0),
        ),
        stem,
    )
