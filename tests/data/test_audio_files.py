"""One audio file to clips: rates, windows, formats, and all that can be wrong with a file."""

from __future__ import annotations

import io
import os
import struct
import sys
import types

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from musicscope.core.audio import resample
from musicscope.data.audio_files import AudioFile, Decoded, Spec, decode, list_files, window_starts
from musicscope.data.sources import stems
from tests.support.source_archives import RATE, encoded, tone

SPEC = Spec(seconds=0.5, sample_rate=RATE, windows=1, min_share=0.9)


def reason(decoded: Decoded) -> str:
    assert decoded.clips == ()
    ((why, _),) = decoded.problems
    return why


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000])
def test_resampling_keeps_tones_below_the_limit_and_removes_those_above(rate):
    target = 16000
    kept = 0.4 * min(rate, target)  # 80 % of the lower Nyquist rate
    out = resample(tone(kept, 1.0, rate), rate, target)
    middle = slice(target // 4, 3 * target // 4)
    np.testing.assert_allclose(out[middle], tone(kept, 1.0, target)[middle], atol=2e-3)
    if rate > 2 * 8200:
        gone = resample(tone(8200, 1.0, rate), rate, target)
        assert np.abs(gone[middle]).max() < 1e-4


def test_windows_are_middles_of_equal_parts():
    assert window_starts(30.0, 10.0, 1) == [10.0]
    assert window_starts(60.0, 10.0, 3) == [5.0, 25.0, 45.0]
    assert window_starts(25.0, 10.0, 5) == [1.25, 13.75]  # five would overlap
    assert window_starts(10.0, 10.0, 3) == [0.0]
    assert window_starts(9.0, 10.0, 1) == [0.0]


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3"])
def test_the_window_is_cut_where_the_rule_says_in_every_format(form, tmp_path):
    silence, beep = np.zeros(RATE, np.float32), tone(1000, 0.5)
    data = encoded(np.concatenate([silence, beep, silence]), form=form)
    path = tmp_path / "x.any"
    path.write_bytes(data)
    for payload in (data, path):
        ((start, audio),) = decode(payload, SPEC).clips
        # An mp3 may begin up to two frames late.
        assert start == pytest.approx(1.0, abs=0.08 if form == "MP3" else 1e-6)
        inside = audio[800:3200].astype(float)
        power = np.abs(np.fft.rfft(inside * np.hanning(2400)))
        assert np.argmax(power) * RATE / 2400 == pytest.approx(1000, abs=4)


def test_stereo_is_averaged_and_rates_are_reported():
    left, right = tone(440, 0.5, 16000), tone(440, 0.5, 16000) * 0
    decoded = decode(encoded(np.stack([left, right], 1), 16000), SPEC)
    ((_, audio),) = decoded.clips
    np.testing.assert_allclose(audio[200:-200], tone(440)[200:-200] / 2, atol=1e-3)
    assert (decoded.rate, decoded.padded, decoded.limited) == (16000, False, 0)


def test_a_slightly_short_file_is_filled_up_and_a_shorter_one_is_not():
    decoded = decode(encoded(tone(440, 0.46)), SPEC)
    ((start, audio),) = decoded.clips
    assert (start, decoded.padded, len(audio)) == (0.0, True, 4000)
    assert not audio[3680:].any()
    assert reason(decode(encoded(tone(440, 0.44)), SPEC)) == "too short"


def test_what_is_over_full_scale_is_turned_down():
    out = io.BytesIO()
    soundfile.write(out, tone(440, level=3.0), RATE, format="WAV", subtype="FLOAT")
    decoded = decode(out.getvalue(), SPEC)
    assert np.abs(decoded.clips[0][1]).max() == pytest.approx(1.0)
    assert decoded.limited == 1


def float_wav(audio: np.ndarray) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, audio, RATE, format="WAV", subtype="FLOAT")
    return out.getvalue()


def test_everything_that_can_be_wrong_has_a_name(tmp_path):
    whole = encoded(tone(440))
    noise = np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes()
    absurd = whole[:24] + struct.pack("<I", 7) + whole[28:]
    bad = tone(440)
    bad[100] = np.nan
    flac = encoded(np.random.default_rng(0).standard_normal(4000) * 0.1, form="FLAC")
    cases = {
        "zero bytes": b"",
        "truncated": whole[: len(whole) // 2],
        "not audio": noise,
        "too short": encoded(tone(440, 0.1)),
        "silent": encoded(tone(440, level=1e-4)),
        "unusable rate": absurd,
        "corrupt": float_wav(bad),
        "no audio": None,
    }
    for expected, data in cases.items():
        assert reason(decode(data, SPEC)) == expected
        if data is not None:
            path = tmp_path / "file.wav"
            path.write_bytes(data)
            assert reason(decode(path, SPEC)) == expected
    assert reason(decode(b"<html>not found</html>" * 50, SPEC)) == "not audio"
    assert reason(decode(flac[: len(flac) // 2], SPEC)) in ("corrupt", "truncated")
    assert reason(decode(whole[:30], SPEC)) == "truncated"


def cut_after(seconds: float, form: str) -> bytes:
    """The first part of an 8-second file of noise with a beep at 1 s."""
    sound = np.random.default_rng(0).standard_normal(8 * RATE).astype(np.float32) * 0.05
    sound[RATE : 2 * RATE] += tone(1000, 1.0)
    data = encoded(sound, form=form)
    return data[: round(len(data) * seconds / 8)]


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3", "AIFF", "AU"])
def test_a_cut_file_gives_what_it_holds_and_is_said_to_be_cut(form, tmp_path):
    data = cut_after(4.0, form)
    path = tmp_path / "x.any"
    path.write_bytes(data)
    for payload in (data, path):
        sound = AudioFile(payload)
        assert sound.frames / RATE == pytest.approx(4.0, abs=1.5)
        decoded = decode(payload, SPEC)
        assert decoded.cut == sound.cut != ""
        ((start, audio),) = decoded.clips
        assert start == pytest.approx((sound.frames / RATE - 0.5) / 2, abs=1e-3)
        expected = sound.read(round(start * RATE), 4000)[0]
        np.testing.assert_allclose(audio, expected, atol=1e-6)
    beep = AudioFile(data).read(RATE + 2000, 4000)[0]
    assert np.abs(np.fft.rfft(beep)).argmax() * 2 == pytest.approx(1000, abs=2)
    whole = AudioFile(cut_after(8.0, form))
    assert (whole.cut, whole.seekable) == ("", True)
    assert whole.frames == pytest.approx(8 * RATE, abs=2500)


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "AIFF"])
def test_a_file_cut_before_the_clip_is_truncated(form):
    assert reason(decode(cut_after(0.2, form), SPEC)) == "truncated"


@pytest.mark.parametrize("riff", [0, 0x7FFFF024, 0x7FFFFFFF, 0x80000024, 0xFFFFFFFF, None])
@pytest.mark.parametrize("data", [0, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, None])
def test_a_wav_from_a_pipe_has_the_length_of_its_samples(riff, data):
    whole = encoded(tone(440))
    header = bytearray(whole)
    header[4:8] = struct.pack("<I", len(whole) - 8 if riff is None else riff)
    header[40:44] = struct.pack("<I", 8000 if data is None else data)
    decoded = decode(bytes(header), SPEC)
    np.testing.assert_array_equal(decoded.clips[0][1], decode(whole, SPEC).clips[0][1])
    assert (decoded.cut, decoded.problems) == ("", ())


def test_a_flac_that_states_no_length_is_read_to_its_end():
    data = bytearray(encoded(tone(440, 2.0), form="FLAC"))
    data[21] &= 0xF0  # the lower 36 bits of byte 21 on are the number of samples
    data[22:26] = bytes(4)
    sound = AudioFile(bytes(data))
    assert sound.cut == ""
    assert sound.frames == pytest.approx(2 * RATE, abs=600)


@pytest.mark.parametrize("id3", [b"", b"ID3\x04\0\0\0\0\x02\0" + bytes(256)])
def test_an_mp3_is_read_to_its_end_whatever_its_header_states(id3):
    """The quiet half takes fewer bytes: an estimate from the first bit rate is wrong."""
    noise = np.random.default_rng(0).standard_normal(3 * RATE).astype(np.float32) * 0.1
    sound = np.concatenate([tone(1000, 3.0), noise])
    whole = encoded(sound, form="MP3")
    at = whole.index(b"Xing")
    first = whole.index(whole[:2], 2)
    for data, seconds in ((whole, 6.0), (whole[first:], 6.0), (whole + whole, 12.0)):
        file = AudioFile(id3 + data)
        assert file.frames / RATE == pytest.approx(seconds, abs=0.4)
        assert file.cut == ""
        beep = file.read(RATE, RATE)[0]
        assert np.abs(np.fft.rfft(beep)).argmax() == 1000
    cut = AudioFile(id3 + whole[: len(whole) // 2])
    assert cut.frames < 4 * RATE
    assert cut.cut
    assert at < first


def test_an_unreadable_window_does_not_cost_the_others():
    noise = np.random.default_rng(0).standard_normal(8 * RATE).astype(np.float32) * 0.1
    data = bytearray(encoded(noise, form="FLAC"))
    data[len(data) // 2 - 2000 : len(data) // 2 + 2000] = bytes(4000)
    decoded = decode(bytes(data), Spec(0.5, RATE, 5, 0.9))
    assert 3 <= len(decoded.clips) <= 4
    assert {why for why, _ in decoded.problems} <= {"corrupt", "truncated"}


@given(st.binary(max_size=400), st.sampled_from(["WAV", "FLAC", "OGG", "MP3", "AIFF"]), st.data())
@settings(max_examples=150, deadline=None)
def test_no_bytes_raise_an_error(junk, form, data):
    whole = encoded(tone(440), form=form)
    at = data.draw(st.integers(0, min(len(whole), 600)))
    for payload in (junk, whole[:at] + junk, whole[:at] + junk + whole[at + len(junk) :]):
        decoded = decode(payload, SPEC)
        assert decoded.clips or decoded.problems


def test_listing_leaves_out_hidden_names_and_follows_links(tmp_path):
    root, other = tmp_path / "mine", tmp_path / "other"
    for name in ("b/x.wav", "b.wav", "._a.wav", ".DS_Store", ".git/y.wav", "a/.hidden/z.wav"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    (other / "deep").mkdir(parents=True)
    (other / "deep/o.wav").write_bytes(b"x")
    (other / "back").symlink_to(root)
    (root / "linked").symlink_to(other)
    (root / "again").symlink_to(root / "b")
    (root / "gone.wav").symlink_to(root / "nowhere")
    os.mkfifo(root / "pipe.wav")
    (root / os.fsdecode(b"caf\xe9.wav")).write_bytes(b"x")
    names, problems = list_files(root)
    assert names == ["b/x.wav", "b.wav", "linked/deep/o.wav"]
    assert [(p.name, p.reason) for p in problems] == [
        ("again", "link"), ("caf\\udce9.wav", "unsafe path"), ("gone.wav", "link"),
        ("linked/back", "link"), ("pipe.wav", "not a regular file"),
    ]  # fmt: skip
    for problem in problems:
        "".join(problem.texts()).encode()
    with pytest.raises(FileNotFoundError):
        list_files(tmp_path / "nowhere")


def test_one_silent_window_does_not_cost_the_others():
    sound = np.concatenate([tone(440, 0.5), np.zeros(4000, np.float32), tone(440, 0.5)])
    decoded = decode(encoded(sound), Spec(0.5, RATE, 3, 0.9))
    assert [start for start, _ in decoded.clips] == [0.0, 1.0]
    assert decoded.problems == (("silent", "0.50 s"),)


def test_a_separator_sees_the_channels_and_rate_of_the_file():
    seen = []

    def keep_left(audio: np.ndarray, rate: int) -> np.ndarray:
        seen.append((audio.shape, rate))
        return audio[:1]

    both = np.stack([tone(300, 0.5, 16000), tone(900, 0.5, 16000)], 1)
    ((_, audio),) = decode(encoded(both, 16000), SPEC, keep_left).clips
    assert seen == [((2, 8000), 16000)]
    np.testing.assert_allclose(audio[200:-200], tone(300)[200:-200], atol=1e-3)


def test_demucs_is_asked_for_everything_but_the_voice(monkeypatch):
    class Model:
        sources = ("drums", "bass", "other", "vocals")
        samplerate = 16000

        def eval(self):
            return self

    def apply_model(model, mix, device, shifts, split):
        assert (mix.shape, mix.dtype, shifts, split) == ((1, 2, 16000), torch.float32, 0, True)
        voice = 0.5 * mix
        return torch.stack([mix * 0.2, mix * 0.2, mix * 0.1, voice], 1)  # [1, 4, 2, n]

    apply, pretrained = types.ModuleType("demucs.apply"), types.ModuleType("demucs.pretrained")
    apply.apply_model, pretrained.get_model = apply_model, {"htdemucs": Model()}.__getitem__
    monkeypatch.setitem(sys.modules, "demucs", types.ModuleType("demucs"))
    monkeypatch.setitem(sys.modules, "demucs.apply", apply)
    monkeypatch.setitem(sys.modules, "demucs.pretrained", pretrained)
    separate = stems.demucs_separator()
    mono = tone(400, 1.0, 8000)[None]
    rest = separate(mono, 8000)
    assert rest.shape == (2, 8000)
    np.testing.assert_allclose(rest[0, 200:-200], mono[0, 200:-200] / 2, atol=1e-3)


def test_demucs_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "demucs.apply", None)
    with pytest.raises(RuntimeError, match="needs the package demucs"):
        stems.demucs_separator()
