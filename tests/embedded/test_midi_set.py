"""Compositions, orchestration, rendering and the clip store."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest

from musicscope.core import audio
from musicscope.data.clips import ClipStore, write_clips
from musicscope.data.taxonomy import KEYS, PROGRAM_NAMES
from musicscope.embedded.midi_set.captions import MAJOR, MINOR, estimate_key, write_caption
from musicscope.embedded.midi_set.compositions import (
    Composition,
    Part,
    midi_lumps,
    playable_windows,
    split_compositions,
)
from musicscope.embedded.midi_set.corpus import make_clip
from musicscope.embedded.midi_set.embedded import soundfont
from musicscope.embedded.midi_set.orchestration import draw_plan, with_target
from musicscope.embedded.midi_set.pairs import make_pairs
from musicscope.embedded.midi_set.render import SAMPLE_RATE, Synth, mix, render, rms


def scale(program: int, pitch: int, notes: int = 60, is_drum: bool = False) -> Part:
    """A part that plays a note every quarter of a second."""
    start = np.arange(notes) * 0.25
    return Part(
        program, is_drum, start, start + 0.2, pitch + np.arange(notes) % 7, np.full(notes, 90)
    )


@pytest.fixture(scope="module")
def piece() -> Composition:
    parts = (scale(30, 52), scale(0, 76), scale(33, 33), scale(0, 36, is_drum=True))
    return Composition("test/piece", 15.0, parts, np.array([0.0]), np.array([120.0]))


@pytest.fixture(scope="module")
def synth() -> Synth:
    return Synth(soundfont("fluidr3mono"))


def wad(lumps: dict[str, bytes]) -> bytes:
    body, directory = b"", b""
    for name, data in lumps.items():
        directory += struct.pack("<ii8s", 12 + len(body), len(data), name.encode())
        body += data
    return b"IWAD" + struct.pack("<ii", len(lumps), 12 + len(body)) + body + directory


def test_wad_gives_only_midi_lumps():
    data = wad({"D_E1M1": b"MThd-a", "D_MUS": b"MUS\x1a", "PLAYPAL": b"MThd-no"})
    assert midi_lumps(data) == {"D_E1M1": b"MThd-a"}


@pytest.mark.parametrize("data", [b"RIFF" + bytes(20), wad({"D_A": b"MThd"})[:-4]])
def test_wad_that_is_none_or_cut_is_an_error(data):
    with pytest.raises(ValueError, match="WAD"):
        midi_lumps(data)


def test_windows_need_two_pitched_parts(piece):
    assert playable_windows(piece, 10.0) == [0.0, 1.0, 2.0, 3.0, 4.0]
    alone = replace(piece, parts=(piece.parts[0], piece.parts[3]))
    assert playable_windows(alone, 10.0) == []


def test_splits_share_no_composition(piece):
    pieces = [replace(piece, group=f"p{i}") for i in range(40)]
    splits = split_compositions(pieces, seed=1, seconds=10.0)
    names = [{p.group for p in part} for part in splits.values()]
    assert sum(map(len, names)) == len(set.union(*names)) == 40
    assert all(names)
    assert splits == split_compositions(pieces, seed=1, seconds=10.0)


def test_key_of_a_profile_is_its_own():
    for tonic in range(12):
        assert estimate_key(np.roll(MAJOR, tonic)) == f"{KEYS[tonic]} major"
        assert estimate_key(np.roll(MINOR, tonic)) == f"{KEYS[tonic]} minor"
    assert estimate_key(np.zeros(12)) == "unknown"


def test_guitar_is_independent_of_drums_and_bass(piece):
    rng = np.random.default_rng(0)
    plans = [draw_plan(piece, "f", rng) for _ in range(600)]
    guitar = np.array(["guitar" in p.families for p in plans])
    for other in ("drums", "bass"):
        has = np.array([other in p.families for p in plans])
        assert abs(has[guitar].mean() - has[~guitar].mean()) < 0.12
    assert all(len(p.families) == len(p.voices) for p in plans)


def test_caption_names_the_target(piece):
    rng = np.random.default_rng(0)
    for _ in range(200):
        plan = draw_plan(piece, "f", rng)
        caption = write_caption(plan, 100.0, 8.0, "C major", rng).lower()
        family = plan.target.family
        names = {family.replace("_", " "), PROGRAM_NAMES[family][plan.target.program].lower()}
        assert any(n in caption for n in names)


def test_rendering_does_not_depend_on_what_came_before(piece, synth):
    rng = np.random.default_rng(3)
    plans = [draw_plan(piece, "f", rng, 2.0) for _ in range(3)]
    first = [render(synth, piece, p, 2.0)[0] for p in plans]
    again = [render(synth, piece, p, 2.0)[0] for p in reversed(plans)][::-1]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.shape == (2 * SAMPLE_RATE,)
        assert np.abs(a).max() < 1.0


def test_mix_has_the_planned_level_and_shares(piece):
    plan = draw_plan(piece, "f", np.random.default_rng(5), 2.0)
    plan = replace(plan, voices=tuple(replace(v, gain_db=-6.0 * i) for i, v in
                                      enumerate(plan.voices[:2])))  # fmt: skip
    noise = np.random.default_rng(0).standard_normal((2, 64_000)).astype(np.float32)
    audio_, energy = mix(list(noise[: len(plan.voices)]), plan)
    assert 20 * np.log10(rms(audio_)) == pytest.approx(plan.level_db, abs=0.01)
    if len(plan.voices) == 2:
        assert energy[1] / energy[0] == pytest.approx(10**-0.6, rel=1e-3)


def test_silent_target_is_an_error(piece):
    plan = draw_plan(piece, "f", np.random.default_rng(5), 2.0)
    with pytest.raises(ValueError, match="silent"):
        mix([np.zeros(64_000, np.float32)] * len(plan.voices), plan)


def test_pairs_differ_only_in_the_target(piece, synth):
    ((guitar, other),) = make_pairs([piece], synth, "f", [0], seed=1, seconds=2.0)
    assert guitar.plan.target.family == "guitar" != other.plan.target.family
    target = other.plan.target
    assert with_target(guitar.plan, target.family, target.program) == other.plan
    assert rms(guitar.audio) == pytest.approx(rms(other.audio), rel=0.02)


def test_clip_is_a_function_of_its_name(piece, synth):
    clip = make_clip([piece], {"f": synth}, "f", 1, "train", 0, seconds=2.0)
    same = make_clip([piece], {"f": synth}, "f", 1, "train", 0, seconds=2.0)
    next_ = make_clip([piece], {"f": synth}, "f", 1, "train", 1, seconds=2.0)
    np.testing.assert_array_equal(clip.audio, same.audio)
    assert clip.labels() == same.labels()
    assert not np.array_equal(clip.audio, next_.audio)


def row(name: str) -> dict[str, object]:
    return {"id": name, "split": "train", "families": ["guitar"]}


def test_clip_store_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    sounds = rng.uniform(-1, 1, (5, 800)).astype(np.float32)
    write_clips(tmp_path, ((a, row(f"c{i}")) for i, a in enumerate(sounds)), 16_000, 800)
    store = ClipStore.open(tmp_path)
    np.testing.assert_allclose(store.audio([4, 0]), sounds[[4, 0]], atol=1 / 32767)
    assert list(store.select(id="c3")) == [3]
    store.verify()


def test_clip_store_names_what_is_broken(tmp_path):
    with pytest.raises(FileNotFoundError, match="prepare_data"):
        ClipStore.open(tmp_path)
    with pytest.raises(ValueError, match="c0"):
        write_clips(tmp_path, [(np.full(8, np.nan, np.float32), row("c0"))], 16_000, 8)
    good = [(np.zeros(8, np.float32), row("c0"))]
    with pytest.raises(ValueError, match="twice"):
        write_clips(tmp_path, good * 2, 16_000, 8)
    write_clips(tmp_path, good, 16_000, 8)
    shard = tmp_path / "audio-00000.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + b"\x01")
    with pytest.raises(ValueError, match="audio-00000.npy is corrupt"):
        ClipStore.open(tmp_path).verify()
    shard.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match="audio-00000.npy"):
        ClipStore.open(tmp_path)


def test_trivial_cues_of_a_sine():
    t = np.arange(16_000) / 16_000
    cues = dict(
        zip(audio.TRIVIAL_CUES, audio.trivial_cues(0.5 * np.sin(2 * np.pi * 1000 * t), 16_000)[0],
            strict=True)
    )  # fmt: skip
    assert cues["rms"] == pytest.approx(0.5 / np.sqrt(2), rel=1e-3)
    assert cues["centroid"] == pytest.approx(1000, rel=0.01)
    assert cues["zero_crossings"] == pytest.approx(2000 / 16_000, rel=0.01)
    assert cues["crest"] == pytest.approx(np.sqrt(2), rel=1e-2)
    assert cues["flatness"] < 1e-3


def test_mel_filters_have_unit_area():
    bank = audio.mel_filterbank(16_000, 2048, 40)
    np.testing.assert_allclose(bank.sum(0) * 16_000 / 2048, 1.0, atol=0.05)
