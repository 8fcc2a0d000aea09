"""musicnn read from its wheel: parser, front end, network and gating against fixed values."""

import struct
import zipfile

import numpy as np
import pytest
import torch

from musicscope.data import wheel_assets as assets
from musicscope.judges import musicnn
from musicscope.judges.musicnn import read_checkpoint

RATE = musicnn.SAMPLE_RATE


@pytest.fixture(scope="module")
def judge():
    try:
        wheel = assets.fetch(assets.MUSICNN)
    except assets.AssetError as error:
        pytest.skip(f"the musicnn wheel is neither cached nor to be had: {error}")
    torch.set_num_threads(1)
    return musicnn.load_musicnn(wheel)


def tune(note, seconds=3.0, gap=0.5):
    """Six notes half a second apart, each `note(hertz, samples)`, peak 0.5, as [1, samples]."""
    out = np.zeros(int(seconds * RATE))
    for i, start in enumerate(range(0, len(out), int(gap * RATE))):
        out[start:] += note([196.0, 246.9, 293.7, 392.0, 329.6, 246.9][i % 6], len(out) - start)
    return (0.5 * out / np.abs(out).max()).astype(np.float32)[None]


def pluck(hertz, samples):
    """Karplus-Strong string; its burst is a fixed chirp, so that no random generator is needed."""
    period = round(RATE / hertz)
    burst = np.sin(np.arange(period) ** 2 * 0.7)
    out = np.empty(samples)
    for i in range(0, samples, period):
        out[i : i + period] = burst[: samples - i]
        burst = 0.996 * 0.5 * (burst + np.roll(burst, -1))
    return out


def sine(hertz, samples):
    t = np.arange(samples) / RATE
    return np.sin(2 * np.pi * hertz * t) * np.exp(-2 * t)


def saw(hertz, samples):
    t = np.arange(samples) / RATE
    return (2 * (hertz * t % 1) - 1) * np.exp(-2 * t)


# --- the checkpoint ---------------------------------------------------------------------------


def varint(value):
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def block(entries):
    """A LevelDB block with shared prefixes, one restart point, no compression."""
    out, last = b"", b""
    for key, value in entries:
        shared = next(
            (i for i, (a, b) in enumerate(zip(key, last, strict=False)) if a != b),
            min(len(key), len(last)),
        )
        out += varint(shared) + varint(len(key) - shared) + varint(len(value))
        out += key[shared:] + value
        last = key
    return out + struct.pack("<II", 0, 1)


def bundle(tensors, compression=0):
    """Index and data of a TensorFlow checkpoint with `tensors`, two of them to a block."""
    entries, data = [(b"", b"\x08\x01")], b""
    for name, value in sorted(tensors.items()):
        dims = b"".join(
            b"\x12" + varint(len(d)) + d for d in (b"\x08" + varint(n) for n in value.shape)
        )
        entry = b"\x08\x01\x12" + varint(len(dims)) + dims
        # Proto3 leaves an offset of zero out.
        entry += (b"\x20" + varint(len(data)) if data else b"") + b"\x28" + varint(value.nbytes)
        entries.append((name.encode(), entry + b"\x35abcd"))
        data += value.astype("<f4").tobytes()
    index, handles = b"", []
    for i in range(0, len(entries), 2):
        content = block(entries[i : i + 2])
        handles.append((entries[min(i + 1, len(entries) - 1)][0], len(index), len(content)))
        index += content + bytes([compression]) + b"crc!"
    root = block([(key, varint(at) + varint(size)) for key, at, size in handles])
    footer = varint(0) + varint(0) + varint(len(index)) + varint(len(root))
    index += root + b"\x00crc!" + footer.ljust(40, b"\x00")
    return index + struct.pack("<Q", 0xDB4775248B80FB57), data


def test_checkpoint_written_by_hand_reads_back():
    rng = np.random.default_rng(0)
    shapes = {"conv/kernel": (7, 3, 1, 5), "conv/bias": (5,), "conv_1/bias": (300,), "d/one": ()}
    tensors = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    slots = {"conv/kernel/Adam": np.ones(3, np.float32), "beta1_power": np.float32(0.5).reshape(())}
    read = read_checkpoint(*bundle(tensors | slots))
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert read[name].shape == value.shape
        np.testing.assert_array_equal(read[name], value)


def test_broken_checkpoints_are_refused():
    index, data = bundle({"a/b": np.ones(4, np.float32)})
    with pytest.raises(ValueError, match="magic"):
        read_checkpoint(index[:-1] + b"\x00", data)
    with pytest.raises(ValueError, match="a/b runs past"):
        read_checkpoint(index, data[:-4])
    with pytest.raises(ValueError, match="compressed"):
        read_checkpoint(*bundle({"a/b": np.ones(4, np.float32)}, compression=1))


def test_wrong_source_names_the_remedy(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as wheel:
        wheel.writestr("other/file", "x")
    for source in (tmp_path / "other.whl", tmp_path, tmp_path / "absent.whl"):
        with pytest.raises(FileNotFoundError, match="wheel_assets.fetch"):
            musicnn.load_musicnn(source)


def test_folder_and_wheel_hold_the_same_weights(judge, tmp_path):
    wheel = assets.fetch(assets.MUSICNN)
    with zipfile.ZipFile(wheel) as archive:
        for end in (".index", ".data-00000-of-00001"):
            archive.extract(musicnn.CHECKPOINT + end, tmp_path)
    unpacked = musicnn.load_musicnn(tmp_path).weights
    assert unpacked.keys() == judge.weights.keys()
    assert all(torch.equal(unpacked[name], judge.weights[name]) for name in unpacked)


# --- front end --------------------------------------------------------------------------------


def test_mel_power_equals_a_direct_sum():
    audio = np.random.default_rng(1).standard_normal(4000).astype(np.float32)
    mine = musicnn.mel_power(torch.from_numpy(audio)[None], 512, 256, 96)[0].numpy()
    padded = np.pad(audio.astype(np.float64), 256, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 512)
    frames = np.stack([padded[i : i + 512] * window for i in range(0, len(audio) + 1, 256)])
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    # Slaney's filters, edge by edge: centres 200/3 Hz apart to 1 kHz, then a constant ratio.
    top = 15 + np.log(8.0) / (np.log(6.4) / 27)
    mels = np.linspace(0, top, 98)
    edges = [m * 200 / 3 if m < 15 else 1000 * 6.4 ** ((m - 15) / 27) for m in mels]
    bins = np.arange(257) * RATE / 512
    for m in (0, 3, 17, 60, 95):
        low, mid, high = edges[m : m + 3]
        weight = np.interp(bins, [low, mid, high], [0, 2 / (high - low), 0], left=0, right=0)
        np.testing.assert_allclose(mine[:, m], power @ weight, rtol=2e-4, atol=1e-6)


# --- network ----------------------------------------------------------------------------------

# guitar, slow, drums, piano, harp; then a tenth of the embedding's norm. From the first run of this
# port, whose answers to silence, plucks and sines agree with those known for these weights.
GOLDEN = {
    "pluck": [0.68759, 0.26005, 0.00585, 0.04538, 0.50136, 1.14304],
    "sine": [0.01528, 0.27528, 0.01134, 0.00611, 0.00532, 1.09284],
    "saw": [0.17173, 0.13921, 0.00743, 0.32679, 0.08272, 0.98234],
}


@pytest.mark.parametrize("note", [pluck, sine, saw])
def test_golden_values(judge, note):
    probabilities, embedding = judge.predict(tune(note))
    assert probabilities.shape == (1, 50)
    assert embedding.shape == (1, 200)
    values = [probabilities[0, judge.tags.index(t)] for t in ("guitar", "slow", "drums", "piano")]
    values = [*values, probabilities[0, judge.tags.index("harp")], np.linalg.norm(embedding) / 10]
    np.testing.assert_allclose(values, GOLDEN[note.__name__], atol=1e-4)


def test_reference_figures(judge):
    """A plucked string is a guitar, a sine is not; ungated silence scores .311."""
    guitar = judge.tags.index("guitar")
    plucked = judge.predict(tune(pluck))[0][0, guitar]
    assert 0.4 < plucked < 0.75
    assert judge.predict(tune(sine))[0][0, guitar] < 0.03
    silence, _ = judge.forward(torch.zeros(1, musicnn.PATCH_FRAMES, musicnn.N_MELS))
    assert float(silence[0, guitar]) == pytest.approx(0.311, abs=5e-4)


def test_gain_and_offset_change_nothing(judge):
    audio = tune(pluck)
    probabilities, embedding = judge.predict(np.concatenate([audio, 0.02 * audio, 2 * audio + 0.1]))
    np.testing.assert_allclose(probabilities[1:], probabilities[[0, 0]], atol=2e-5)
    np.testing.assert_allclose(embedding[1:], embedding[[0, 0]], atol=1e-3)


def test_silent_clips_are_nan_and_change_no_other(judge):
    audio = tune(pluck)
    noise = np.random.default_rng(2).standard_normal(audio.shape).astype(np.float32)
    clips = np.concatenate([np.zeros_like(audio), audio, 1e-4 * noise, np.full_like(audio, 0.3)])
    probabilities, embedding = judge.predict(clips)
    assert musicnn.silent(probabilities).tolist() == [True, False, True, True]
    assert np.isnan(probabilities[[0, 2, 3]]).all()
    assert np.isnan(embedding[[0, 2, 3]]).all()
    np.testing.assert_allclose(probabilities[1:2], judge.predict(audio)[0], atol=1e-6)


def test_quiet_patches_do_not_count(judge):
    """Sound, then silence: judged by the sound alone, not by silence's guitar of .31."""
    sound = tune(sine, seconds=3.2)
    quiet = np.zeros((1, 4 * RATE), np.float32)
    both = judge.predict(np.concatenate([sound, quiet], axis=1))[0][0]
    np.testing.assert_allclose(both, judge.predict(sound)[0][0], atol=1e-3)


def test_level_is_gated():
    """Level of the sounding part alone: -20 dBFS with and without silence around it."""
    noise = np.random.default_rng(3).standard_normal((1, RATE)).astype(np.float32)
    padded = np.pad(0.3 * noise, ((0, 0), (RATE, 3 * RATE)))
    levelled, sounds = musicnn.level(padded)
    assert sounds.all()
    assert np.sqrt(np.mean(levelled[0, RATE : 2 * RATE] ** 2)) == pytest.approx(0.1, rel=1e-3)
    assert not musicnn.level(5e-4 * noise)[1].any()
    assert not musicnn.level(5e-4 * noise)[0].any()


def test_long_clip_is_the_mean_of_patches_spread_over_it(judge):
    audio = np.concatenate([tune(pluck), tune(saw), tune(sine), tune(pluck)[:, :RATE]], axis=1)
    probabilities, embedding = judge.predict(audio)
    spectrogram = musicnn.log_mel(torch.from_numpy(musicnn.level(audio)[0]))
    assert spectrogram.shape == (1, 626, 96)
    patches = torch.cat([spectrogram[:, s : s + 187] for s in (0, 219, 439)])
    tags, features = judge.forward(patches)
    np.testing.assert_allclose(probabilities[0], tags.mean(0), atol=1e-5)
    np.testing.assert_allclose(embedding[0], features.mean(0), atol=1e-4)


def test_short_clip_is_repeated(judge):
    audio = tune(pluck)[:, :RATE]
    repeated = np.tile(audio, (1, 3))[:, : 186 * 256]
    np.testing.assert_allclose(judge.predict(audio)[0], judge.predict(repeated)[0], atol=1e-6)


def test_bad_audio_is_refused(judge):
    with pytest.raises(ValueError, match=r"\[clips, samples\]"):
        judge.predict(np.zeros(100, np.float32))
    bad = tune(sine)
    bad[0, 7] = np.nan
    with pytest.raises(ValueError, match=r"clips \[1\]"):
        judge.predict(np.concatenate([tune(sine), bad]))
