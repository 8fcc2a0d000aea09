"""Instruments whose notes decay by themselves: plucked and struck strings, bars, tines.

Plucked strings are extended Karplus-Strong loops (Jaffe and Smith 1983) in modal form. A loop of
delay, damping filter, and stiffness allpass is linear, so it equals a sum of damped partials: the
delay and the allpass set the frequency of each, and the loop filter's gain its decay. The modal
form renders a note in well under a millisecond; the recursion costs one product per delay sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.signal import butter, sosfilt

from musicscope.embedded.rendering.tones import (
    T60,
    Instrument,
    Stem,
    burst,
    cents,
    delayed,
    drawn_peaks,
    faded_in,
    hertz,
    loudest,
    lowpass,
    modal,
    onset,
    peaks,
    phase,
    resonant,
    saturate,
    seconds_axis,
    sine,
)

STRING_PARTIALS = 120


# --- plucked strings --------------------------------------------------------------------------


@dataclass(frozen=True)
class String:
    """Parameters of one plucked instrument."""

    position: float
    """Where the string is plucked, as a share of its length."""
    sustain: float
    """Seconds in which the fundamental of a 200 Hz string falls by 60 dB."""
    damping: float
    """Loop filter: 1 is the two-point mean of Karplus and Strong on a 200 Hz string."""
    soft: float
    """Low-pass of the finger or pick, Hz, for the softest pluck."""
    hard: float
    """The same for the hardest pluck."""
    body: np.ndarray
    """Resonances [n, 3]: Hz, quality, gain."""
    slope: float = 1.0
    """Partial k starts at k ** -slope."""
    stiffness: float = 3e-5
    """Inharmonicity B: partial k is sharp by sqrt(1 + B k^2)."""
    pickup: float = 0.0
    """Position of a magnetic pickup as a share of the length; 0 for none."""
    coil: tuple[float, float] = (0.0, 1.0)
    """Resonance of the pickup: Hz (0 for none) and quality."""
    scratch: float = 0.1
    """Level of the pick's noise."""
    scratch_band: tuple[float, float] = (1200.0, 6000.0)
    knock: float = 0.0
    """Level of the body's own modes at the onset."""
    mute: float = 0.0
    """Extra decay from a palm on the bridge, nepers per second."""
    beating: float = 0.6
    """Cents between the two polarisations of the vibration."""
    buzz: float = 0.0
    """Share of partials that a curved bridge (sitar) feeds late, as the note decays."""
    uneven: float = 0.5
    """Random deviation of the partials' amplitudes, nepers."""


def pluck(string: String, f0: float, loudness: float, samples: int, stem: Stem) -> np.ndarray:
    """One plucked note, float32 [samples]."""
    rng, rate = stem.rng, stem.rate
    k = np.arange(1.0, 1.0 + min(STRING_PARTIALS, max(1, int(0.44 * rate / f0))))
    f = k * f0 * np.sqrt((1.0 + string.stiffness * k**2) / (1.0 + string.stiffness))
    loss = -0.5 * np.log1p(-0.5 * (1.0 - np.cos(2 * np.pi * np.minimum(f / rate, 0.45))))
    base = T60 / (string.sustain * np.sqrt(200.0 / max(f0, 20.0)))
    # Higher strings are thinner, so that their loss per period is less.
    decay = base + string.damping * np.sqrt(200.0 * f0) * loss + string.mute * (1.0 + f / 800.0)
    decay = decay * np.exp(0.2 * rng.standard_normal(len(k)))
    cutoff = string.soft * (string.hard / string.soft) ** loudness
    amplitude = np.sin(np.pi * k * string.position) * k**-string.slope * lowpass(f, cutoff, 1.4)
    if string.pickup:
        amplitude = amplitude * np.sin(np.pi * k * string.pickup)
    if string.coil[0]:
        amplitude = amplitude * resonant(f, *string.coil)
    amplitude = amplitude * peaks(f, string.body)
    amplitude = amplitude * np.exp(string.uneven * rng.standard_normal(len(k)))
    low = slice(0, 24)  # beats of higher partials are lost in their decay
    apart = cents(string.beating * rng.uniform(0.5, 1.5))
    parts = [(f, decay, amplitude), (f[low] * apart, decay[low] * 1.8, 0.5 * amplitude[low])]
    if string.buzz:
        # The bridge moves energy up: bright partials rise while the others decay.
        share = string.buzz * np.abs(amplitude[0]) * k**-0.35 * lowpass(f, 4200.0, 3.0)
        share = share * np.exp(0.3 * rng.standard_normal(len(k)))
        parts += [(f, base * (1.0 + 0.03 * k), share), (f, base + 6.0 + 0.8 * k, -share)]
    if string.knock:
        centre, quality, gain = string.body.T
        reference = np.abs(amplitude).max()
        parts.append((centre, np.pi * centre / quality + 12.0, string.knock * reference * gain))
    frequency, decays, amplitudes = (np.concatenate(x) for x in zip(*parts, strict=True))
    out = modal(frequency, decays, amplitudes, samples, rate)
    level = loudest(out[: rate // 5], rate)
    if string.scratch and level > 0.0:
        length = rng.uniform(0.008, 0.03)
        click = burst(rng, samples, *string.scratch_band, length, rate)
        out += np.float32(level * string.scratch * (0.4 + loudness)) * click
    return faded_in(out, 0.0008, rate)


def _string_instrument(
    string: String,
    stem: Stem,
    release: float,
    strum: float = 0.0,
    finish=None,
    wound: float = 200.0,
) -> Instrument:
    def tone(pitch: float, loudness: float, samples: int) -> np.ndarray:
        f0 = hertz(pitch)
        if f0 < wound:  # wound strings are duller and stiffer than plain ones
            played = replace(string, damping=string.damping * 1.3, stiffness=string.stiffness * 2.0)
        else:
            played = string
        return pluck(played, f0, loudness, samples, stem)

    return Instrument(tone, release, strum=strum, finish=finish)


GUITAR_BODY = ((102.0, 14.0, 2.2), (204.0, 16.0, 2.6), (390.0, 14.0, 1.3), (560.0, 12.0, 0.8),
               (1150.0, 5.0, 0.5), (2400.0, 3.0, 0.5))  # fmt: skip
ELECTRIC_BODY = ((190.0, 3.0, 0.15), (420.0, 3.0, 0.15))


def guitar(program: int, stem: Stem) -> Instrument:
    """Nylon, steel, jazz, clean, muted, overdriven, or distorted guitar (programs 24 to 30)."""
    u, rng = stem.rng.uniform, stem.rng
    strum, release = u(0.002, 0.016), u(0.05, 0.16)
    if program in (24, 25):
        nylon = program == 24
        string = String(
            position=u(0.14, 0.32) if nylon else u(0.08, 0.26),
            sustain=u(2.2, 4.5) if nylon else u(3.5, 8.0),
            damping=u(0.25, 0.8) if nylon else u(0.06, 0.3),
            soft=u(700, 1200) if nylon else u(1100, 2000),
            hard=u(2200, 4200) if nylon else u(4000, 8500),
            body=drawn_peaks(rng, GUITAR_BODY),
            slope=u(0.7, 1.1) if nylon else u(0.5, 0.9),
            stiffness=u(0.5e-5, 3e-5) if nylon else u(2e-5, 9e-5),
            scratch=u(0.02, 0.12) if nylon else u(0.08, 0.35),
            scratch_band=(700.0, 3500.0) if nylon else (1500.0, 7000.0),
            knock=u(0.05, 0.3),
        )  # fmt: skip
        return _string_instrument(string, stem, release, strum)
    electric = String(
        position=u(0.1, 0.3),
        sustain=u(3.0, 7.0),
        damping=u(0.08, 0.35),
        soft=u(1000, 1800),
        hard=u(3000, 6000),
        body=drawn_peaks(rng, ELECTRIC_BODY),
        slope=u(0.4, 0.9),
        stiffness=u(2e-5, 8e-5),
        pickup=u(0.06, 0.28),
        coil=(u(2300, 4500), u(0.9, 2.2)),
        scratch=u(0.05, 0.2),
    )
    if program == 26:
        jazz = replace(electric, pickup=u(0.22, 0.3), damping=u(0.2, 0.6), sustain=u(3.0, 5.5),
                       soft=u(700, 1100), hard=u(2000, 3600), coil=(u(2000, 3400), u(0.7, 1.2)),
                       body=drawn_peaks(rng, GUITAR_BODY[:4]) * (1.0, 1.0, 0.4))  # fmt: skip
        return _string_instrument(jazz, stem, release, strum)
    if program == 28:
        muted = replace(electric, mute=u(7.0, 18.0), damping=u(0.5, 1.2), scratch=u(0.15, 0.4))
        return _string_instrument(muted, stem, u(0.04, 0.08), strum)
    if program == 27:
        depth, speed = u(0.3, 1.0) * (rng.random() < 0.5), u(0.3, 1.2)
        return _string_instrument(electric, stem, release, strum, _chorus(depth, speed, stem))
    drive = u(3.0, 9.0) if program == 29 else u(15.0, 60.0)
    lead = replace(electric, sustain=u(5.0, 9.0), position=u(0.08, 0.2), scratch=u(0.1, 0.3))
    return _string_instrument(lead, stem, release, strum * 0.5, amplifier(drive, stem))


def _chorus(depth: float, speed: float, stem: Stem) -> Callable[[np.ndarray], np.ndarray] | None:
    """Mix with a copy that is delayed by 6 to 10 ms, as the chorus of a clean guitar."""
    if not depth:
        return None
    start = stem.rng.uniform(0, 2 * np.pi)

    def finish(audio: np.ndarray) -> np.ndarray:
        time = seconds_axis(len(audio), stem.rate)
        swing = np.sin(np.float32(2 * np.pi * speed) * time + np.float32(start))
        lag = np.float32(stem.rate) * (np.float32(0.008) + np.float32(0.002) * swing)
        return audio + np.float32(depth) * delayed(audio, lag)

    return finish


def amplifier(drive: float, stem: Stem) -> Callable[[np.ndarray], np.ndarray]:
    """Preamplifier, tanh at twice the rate, and the loudspeaker of a guitar amplifier."""
    u, rate = stem.rng.uniform, stem.rate
    tight = butter(1, (u(80, 200), u(3500, 6500)), "bandpass", fs=rate, output="sos")
    speaker = np.concatenate([
        butter(2, u(70, 110), "highpass", fs=rate, output="sos"),
        butter(4, u(3600, 5200), fs=rate, output="sos"),
    ])  # fmt: skip
    presence = butter(1, (u(1400, 2000), u(2600, 3600)), "bandpass", fs=rate, output="sos")
    lift, bias = np.float32(u(0.6, 2.0)), u(0.0, 0.35)
    tight, speaker, presence = (x.astype(np.float32) for x in (tight, speaker, presence))

    def finish(audio: np.ndarray) -> np.ndarray:
        level = loudest(audio, rate)
        if level == 0.0:
            return audio
        hot = saturate(sosfilt(tight, audio / np.float32(level)), drive, bias)
        return sosfilt(speaker, hot + lift * sosfilt(presence, hot)) * np.float32(level)

    return finish


BANJO_BODY = ((310.0, 4.0, 1.4), (620.0, 5.0, 2.2), (930.0, 5.0, 1.6), (1900.0, 4.0, 1.0),
              (3100.0, 3.0, 0.8))  # fmt: skip
HARP_BODY = ((150.0, 5.0, 0.7), (260.0, 6.0, 0.8), (520.0, 6.0, 0.4))
GOURD_BODY = ((140.0, 6.0, 0.9), (330.0, 7.0, 1.1), (700.0, 6.0, 0.9), (1900.0, 3.0, 0.7))
KOTO_BODY = ((180.0, 8.0, 1.2), (400.0, 8.0, 1.2), (780.0, 7.0, 1.0), (1500.0, 5.0, 0.9))


def plucked(program: int, stem: Stem) -> Instrument:
    """Harp, sitar, banjo, or koto (programs 46, 104, 105, 107)."""
    u, rng = stem.rng.uniform, stem.rng
    if program == 104:
        string = String(u(0.05, 0.12), u(3.0, 6.0), u(0.03, 0.12), u(2000, 3000), u(4500, 7500),
                        drawn_peaks(rng, GOURD_BODY), u(0.3, 0.6), u(0.5e-5, 2e-5),
                        scratch=u(0.1, 0.3), buzz=u(0.5, 1.3), beating=u(1.0, 2.5))  # fmt: skip
        return _with_drone(_string_instrument(string, stem, u(0.3, 0.8)), string, stem)
    if program == 105:
        string = String(u(0.06, 0.14), u(0.7, 1.4), u(0.1, 0.35), u(2200, 3200), u(5000, 8500),
                        drawn_peaks(rng, BANJO_BODY), u(0.3, 0.7), u(1e-5, 5e-5),
                        scratch=u(0.15, 0.4), knock=u(0.15, 0.5))  # fmt: skip
        return _string_instrument(string, stem, u(0.08, 0.2), u(0.002, 0.012), wound=0.0)
    if program == 107:
        string = String(u(0.07, 0.16), u(1.6, 3.2), u(0.12, 0.4), u(1500, 2200), u(3800, 6500),
                        drawn_peaks(rng, KOTO_BODY), u(0.5, 0.9), u(1e-5, 5e-5),
                        scratch=u(0.1, 0.3), knock=u(0.1, 0.35), beating=u(1.0, 3.0))  # fmt: skip
        return _string_instrument(string, stem, u(0.4, 1.0), u(0.004, 0.03), wound=0.0)
    string = String(u(0.35, 0.5), u(2.0, 4.5), u(0.25, 0.7), u(600, 1000), u(1800, 3200),
                    drawn_peaks(rng, HARP_BODY), u(0.9, 1.4), u(0.2e-5, 2e-5),
                    scratch=u(0.0, 0.06), scratch_band=(500.0, 2500.0), knock=u(0.03, 0.15),
                    uneven=0.25)  # fmt: skip
    return _string_instrument(string, stem, u(0.8, 1.8), u(0.01, 0.04), wound=0.0)


def _with_drone(instrument: Instrument, string: String, stem: Stem) -> Instrument:
    """Let sympathetic strings answer each note, an octave and a fifth up, quietly and late."""
    level = np.float32(stem.rng.uniform(0.03, 0.12))
    sympathetic = replace(string, scratch=0.0, position=0.13)

    def tone(pitch: float, loudness: float, samples: int) -> np.ndarray:
        out = instrument.tone(pitch, loudness, samples)
        time = seconds_axis(samples, stem.rate)
        answer = sum(pluck(sympathetic, hertz(pitch) * ratio, loudness, samples, stem)
                     for ratio in (2.0, 3.0))  # fmt: skip
        return out + level * onset(time, 0.25) * answer

    return replace(instrument, tone=tone)


UPRIGHT_BODY = ((62.0, 8.0, 0.8), (105.0, 8.0, 1.2), (220.0, 7.0, 0.8), (480.0, 5.0, 0.4))
SOLID_BODY = ((80.0, 2.0, 0.2), (300.0, 2.0, 0.1))


def bass_guitar(program: int, stem: Stem) -> Instrument:
    """Acoustic, fingered, or picked bass (programs 32 to 34)."""
    u, rng = stem.rng.uniform, stem.rng
    if program == 32:
        string = String(u(0.15, 0.3), u(0.8, 1.8), u(0.6, 2.0), u(350, 600), u(900, 1800),
                        drawn_peaks(rng, UPRIGHT_BODY), u(0.8, 1.2), u(2e-5, 1e-4),
                        scratch=u(0.03, 0.15), scratch_band=(300.0, 1800.0),
                        knock=u(0.05, 0.3))  # fmt: skip
        return _string_instrument(string, stem, u(0.06, 0.15), wound=0.0)
    pick = program == 34
    string = String(u(0.08, 0.25), u(1.8, 4.0), u(0.2, 1.0), u(500, 900),
                    u(2200, 4500) if pick else u(1100, 2200), drawn_peaks(rng, SOLID_BODY),
                    u(0.4, 0.8) if pick else u(0.7, 1.1), u(3e-5, 1.5e-4), pickup=u(0.1, 0.3),
                    coil=(u(1800, 3500), u(0.7, 1.3)),
                    scratch=u(0.2, 0.5) if pick else u(0.02, 0.1),
                    scratch_band=(800.0, 4000.0))  # fmt: skip
    return _string_instrument(string, stem, u(0.05, 0.12), wound=0.0)


# --- struck strings ---------------------------------------------------------------------------

SOUNDBOARD = ((90.0, 3.0, 0.5), (180.0, 4.0, 0.5), (340.0, 4.0, 0.4), (900.0, 2.0, 0.2))


def piano(program: int, stem: Stem) -> Instrument:
    """Grand, bright, or honky-tonk piano (programs 0, 1, 3).

    Stiff strings in two or three detuned unisons, a felt hammer that hardens with the blow, prompt
    sound and aftersound (Weinreich 1977), and the knock of hammer and key on the soundboard.
    """
    u, rng, rate = stem.rng.uniform, stem.rng, stem.rate
    bright, honky = program == 1, program == 3
    soft, hard = u(350, 650), u(2500, 5000) if bright else u(1000, 2800)
    detune = u(4.0, 11.0) if honky else u(0.15, 1.0)
    sustain, after, stiff = u(6.0, 18.0), u(0.0, 0.1), u(0.4, 1.4)
    # The hammer is wide, so that its nodes are shallower than a point's at 1/8.
    strike, slope, damping = u(0.045, 0.1), u(1.1, 1.8), u(0.05, 0.3)
    uneven, attack, rumble, steep = u(0.1, 0.4), u(0.0015, 0.008), u(25.0, 60.0), u(1.2, 2.0)
    knock, board = u(0.04, 0.2), drawn_peaks(rng, SOUNDBOARD)

    def tone(pitch: float, loudness: float, samples: int) -> np.ndarray:
        f0 = hertz(pitch)
        b = stiff * min(1.5e-4 * np.exp(0.085 * max(pitch - 48.0, -10.0)), 0.02)
        k = np.arange(1.0, 1.0 + min(64, max(1, int(0.44 * rate / f0))))
        f = k * f0 * np.sqrt((1.0 + b * k**2) / (1.0 + b))
        cutoff = soft * (hard / soft) ** loudness * (0.6 + 0.4 * (f0 / 262.0) ** 0.6)
        amplitude = (
            np.sin(np.pi * k * strike) * k**-slope * lowpass(f, max(cutoff, 0.9 * f0), steep)
        )
        amplitude = amplitude * peaks(f, board) * (f**2 / (f**2 + rumble**2))
        amplitude = amplitude * np.exp(uneven * rng.standard_normal(len(k)))
        base = T60 / (sustain * 2.0 ** (-(pitch - 45.0) / 17.0))
        prompt = 1.1 * base * (1.0 + damping * (f / 1000.0) + 0.02 * k)
        prompt = prompt * np.exp(0.25 * rng.standard_normal(len(k)))
        apart = detune * rng.uniform(0.4, 1.6)
        unison = rng.uniform(0.4, 0.9) * amplitude
        parts = [(f, prompt, amplitude), (f * cents(apart), 0.9 * prompt, unison)]
        parts.append((f * cents(0.4 * apart), 0.35 * prompt, after * amplitude))
        centre, quality, gain = board.T
        reference = knock * np.abs(amplitude).max()
        parts.append((centre, np.pi * centre / quality + 25.0, reference * gain))
        out = modal(*(np.concatenate(x) for x in zip(*parts, strict=True)), samples, rate)
        thump = burst(rng, samples, 200.0, 2500.0, 0.04, rate)
        out += np.float32(knock * (0.3 + loudness) * loudest(out[: rate // 5], rate)) * thump
        return faded_in(out, attack, rate)

    return Instrument(tone, u(0.12, 0.5))


def electric_piano(program: int, stem: Stem) -> Instrument:
    """Tine piano with a magnetic pickup (4), or two FM pairs as in the 1980s (5)."""
    u, rate = stem.rng.uniform, stem.rate
    sustain, release = u(3.0, 6.0), u(0.08, 0.25)
    speed, depth = u(3.5, 6.5), u(0.15, 0.5) * (stem.rng.random() < 0.45)
    start = u(0, 2 * np.pi)

    def tremolo(audio: np.ndarray) -> np.ndarray:
        time = seconds_axis(len(audio), rate)
        wave = np.sin(np.float32(2 * np.pi * speed) * time + np.float32(start))
        return audio * (np.float32(1.0) + np.float32(depth) * wave)

    if program == 4:
        offset, bell, ratio, tight = u(0.15, 0.6), u(0.05, 0.25), u(6.2, 7.2), u(0.7, 2.0)

        def tone(pitch: float, loudness: float, samples: int) -> np.ndarray:
            f0 = hertz(pitch)
            base = T60 / (sustain * 2.0 ** (-(pitch - 60.0) / 24.0))
            swing = (0.25 + 0.9 * loudness) * tight * min(1.0, 1.5 * (262.0 / f0) ** 0.5)
            f = np.array([f0, f0 * ratio, f0 * ratio * 2.7])
            high = np.array([1.0, bell * (0.3 + loudness), 0.3 * bell * loudness])
            x = modal(f, np.array([base, base + 9.0, base + 25.0]), high * swing, samples, rate)
            # The pickup's field is strongest on its axis, so its output is not linear in the swing.
            y = x + np.float32(offset)
            out = y / (np.float32(1.0) + y * y)
            out -= np.float32(offset / (1.0 + offset**2))
            return faded_in(out, 0.002, rate)
    else:
        index, tine, apart, bark = u(0.7, 1.6), u(0.3, 0.9), u(1.0, 5.0), u(0.6, 1.2)

        def tone(pitch: float, loudness: float, samples: int) -> np.ndarray:
            f0 = hertz(pitch)
            time = seconds_axis(samples, rate)
            base = T60 / (sustain * 2.0 ** (-(pitch - 60.0) / 24.0))
            ratio = max(1, min(14, int(0.4 * rate / f0) - 1))
            body = np.exp(np.float32(-base) * time)
            quick = np.exp(np.float32(-base - 8.0) * time)
            strength = np.float32(loudness)
            first = _fm(f0, 1, index * (0.2 + bark * loudness), body, samples, rate)
            second = _fm(f0 * float(cents(apart)), ratio, tine * loudness, quick, samples, rate)
            return faded_in(first * body + (0.15 + 0.55 * strength) * second * quick, 0.002, rate)

    return Instrument(tone, release, finish=tremolo if depth else None)


def _fm(
    f0: float, ratio: int, index: float, curve: np.ndarray, samples: int, rate: int
) -> np.ndarray:
    """Sine carrier at `f0`, its phase moved by a sine at ratio * f0 of `index` radians * curve."""
    index = min(index, max(0.0, 0.45 * rate / (f0 * ratio) - 1.5))
    turn = np.float32(index * 2**32 / (2 * np.pi))
    shift = (sine(phase(f0 * ratio, samples, rate)) * curve * turn).astype(np.int64)
    return sine(phase(f0, samples, rate) + shift.astype(np.uint32))


def fm_bass(stem: Stem) -> Instrument:
    """FM bass: one pair whose index falls after the onset."""
    u, rate = stem.rng.uniform, stem.rate
    index, fall, sustain, release = u(1.5, 5.0), u(4.0, 14.0), u(1.5, 6.0), u(0.04, 0.12)
    ratio, rest = int(stem.rng.integers(1, 3)), u(0.1, 0.4)

    def tone(pitch: float, loudness: float, samples: int) -> np.ndarray:
        time = seconds_axis(samples, rate)
        curve = np.float32(rest) + np.float32(1 - rest) * np.exp(np.float32(-fall) * time)
        out = _fm(hertz(pitch), ratio, index * (0.3 + 0.7 * loudness), curve, samples, rate)
        return faded_in(out * np.exp(np.float32(-T60 / sustain) * time), 0.004, rate)

    return Instrument(tone, release)


# --- bars -------------------------------------------------------------------------------------

BARS = {
    # Partials, seconds of the fundamental at C5, decay exponent over partials, mallet low-pass Hz.
    9: ((1.0, 2.756, 5.404, 8.933), (2.0, 4.0), 0.5, (5000.0, 11000.0)),
    11: ((1.0, 3.98, 10.2, 18.1), (2.5, 6.0), 0.9, (1500.0, 4500.0)),
    12: ((1.0, 3.93, 9.24, 16.3), (0.35, 1.0), 0.9, (900.0, 2800.0)),
    13: ((1.0, 3.0, 6.08, 10.1), (0.25, 0.6), 0.7, (3000.0, 8000.0)),
}


def mallets(program: int, stem: Stem) -> Instrument:
    """Glockenspiel, vibraphone, marimba, or xylophone (programs 9, 11, 12, 13)."""
    u, rng, rate = stem.rng.uniform, stem.rng, stem.rate
    partials, times, steep, hardness = BARS[program]
    ratios = np.array(partials) * np.exp(0.01 * rng.standard_normal(len(partials)))
    ratios[0] = 1.0
    sustain, hard, place = u(*times), u(*hardness), u(0.3, 1.0, len(partials))
    place[0] = 1.0
    contact, attack = u(0.05, 0.3), u(0.0005, 0.002)
    speed, depth = u(3.5, 7.5), u(0.2, 0.7) * (program == 11 and rng.random() < 0.7)
    beat = u(0.2, 1.5)

    def tone(pitch: float, loudness: float, samples: int) -> np.ndarray:
        f0 = hertz(pitch)
        f = f0 * ratios
        amplitude = place * lowpass(f, max(hard * (0.25 + 0.75 * loudness), f0), 1.2)
        decay = T60 / (sustain * (523.0 / f0) ** 0.6) * ratios**steep
        pair = np.array([f0 + beat])
        out = modal(np.concatenate([f, pair]), np.concatenate([decay, decay[:1]]),
                    np.concatenate([amplitude, 0.3 * amplitude[:1]]), samples, rate)  # fmt: skip
        if depth:
            time = seconds_axis(samples, rate)
            wave = np.cos(np.float32(2 * np.pi * speed) * time)
            out *= np.float32(1.0) - np.float32(depth / 2) * (np.float32(1.0) - wave)
        level = np.float32(contact * loudness * loudest(out[: rate // 5], rate))
        out += level * burst(rng, samples, 400.0, hard, 0.015, rate)
        return faded_in(out, attack, rate)

    release = {9: u(0.8, 1.8), 11: u(0.2, 1.2), 12: u(0.2, 0.5), 13: u(0.2, 0.4)}[program]
    return Instrument(tone, release)
