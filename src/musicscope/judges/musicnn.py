"""musicnn, a tagger of real recordings, as an independent judge of instruments in generated music.

The weights (MTT_musicnn, 792,079 numbers, 50 tags of MagnaTagATune, ISC licence, Jordi Pons 2019)
are read from the TensorFlow-1 checkpoint inside the PyPI wheel; TensorFlow is not needed. The
network shares nothing with the models under study. Its tags choose nothing; distances between sets
of its embeddings bound the damage that an edit may do.

Differences from the original package: float32 throughout (its float16 mel overflows on loud
audio); one loudness (a plucked string scores .31 to .67 for guitar by level alone); silence gated
(silence scores .31 for guitar); patches spread evenly over the clip, not packed at its start.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from musicscope.config.concepts import MUSICNN_TAGS
from musicscope.core.audio import mel_filterbank

SAMPLE_RATE = 16_000
N_FFT, HOP, N_MELS = 512, 256, 96
EMBEDDING = 200
PATCH_FRAMES = 187
"""Three seconds, the length the network was trained on."""
TARGET_RMS = 0.1
"""Every clip is judged at -20 dBFS."""
SILENCE_RMS = 1e-3
"""-60 dBFS: a clip below it is silent."""

TAGS = MUSICNN_TAGS
CHECKPOINT = "musicnn/MTT_musicnn/"
PARAMETERS = 792_079
"""Of the network, 4,920 running statistics among them."""
_BN_EPSILON = 1e-3


# --- front end --------------------------------------------------------------------------------


def mel_power(audio: torch.Tensor, n_fft: int, hop: int, n_mels: int) -> torch.Tensor:
    """Compute mel power [n, 1 + samples // hop, n_mels] of 16 kHz audio [n, samples].

    Centred frames, periodic Hann window, mirrored ends, Slaney's filters: librosa's
    ``melspectrogram`` of the version that musicnn was trained with.
    """
    spectrum = torch.stft(
        audio,
        n_fft,
        hop,
        window=torch.hann_window(n_fft),
        center=True,
        pad_mode="reflect",
        return_complex=True,
    )
    power = spectrum.real.square() + spectrum.imag.square()
    return power.transpose(1, 2) @ torch.from_numpy(mel_filterbank(SAMPLE_RATE, n_fft, n_mels))


def log_mel(audio: torch.Tensor) -> torch.Tensor:
    """Compute the network's input [n, frames, 96]: log10(10000 * mel power + 1)."""
    return torch.log10(10_000.0 * mel_power(audio, N_FFT, HOP, N_MELS) + 1.0)


def check_audio(audio: np.ndarray) -> np.ndarray:
    """Return `audio` as float32 [n, samples]; ValueError: other rank, no samples, NaN or inf."""
    audio = np.asarray(audio, dtype=np.float32)
    if audio.ndim != 2 or audio.shape[1] == 0:
        raise ValueError(f"audio must be [clips, samples] and not empty, not {audio.shape}")
    if not np.isfinite(audio).all():
        bad = np.flatnonzero(~np.isfinite(audio).all(axis=1))
        raise ValueError(f"audio holds NaN or infinity in clips {bad[:8].tolist()}")
    return audio


def level(audio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Remove the offset of clips [n, samples] and scale them to TARGET_RMS; also returns bool [n].

    The RMS is gated as in loudness meters, so that silence around the music has no effect: blocks
    of 0.1 s that are 40 dB under the loudest do not count. A clip whose gated RMS is below
    SILENCE_RMS is silent: False, and its samples are zeros.
    """
    block = min(SAMPLE_RATE // 10, audio.shape[1])
    blocks = audio[:, : audio.shape[1] // block * block].reshape(len(audio), -1, block)
    power = blocks.var(axis=2, dtype=np.float64)
    counts = power >= 1e-4 * power.max(axis=1, keepdims=True)
    rms = np.sqrt((power * counts).sum(axis=1) / counts.sum(axis=1))
    offset = (blocks.mean(axis=2, dtype=np.float64) * counts).sum(axis=1) / counts.sum(axis=1)
    sounds = rms > SILENCE_RMS
    gain = np.divide(TARGET_RMS, rms, out=np.zeros_like(rms), where=sounds)
    return ((audio - offset[:, None]) * gain[:, None]).astype(np.float32), sounds


def spread(total: int, length: int, count: int) -> list[int]:
    """Return starts of `count` windows of `length`, spread evenly from 0 to the end of `total`."""
    return [i * (total - length) // max(1, count - 1) for i in range(count)]


def loud_windows(audio: np.ndarray, starts: list[int], length: int) -> np.ndarray:
    """Test which windows of levelled clips [n, samples] are within 40 dB of it: [n, windows]."""
    loudness = np.stack([audio[:, s : s + length].std(axis=1) for s in starts], axis=1)
    return loudness > 0.01 * TARGET_RMS


def repeat_to(audio: np.ndarray, samples: int) -> np.ndarray:
    """Repeat clips [n, m] that are shorter than `samples` up to that length."""
    if audio.shape[1] >= samples:
        return audio
    return np.tile(audio, (1, -(-samples // audio.shape[1])))[:, :samples]


# --- the network ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Musicnn:
    """The tagger with frozen weights, on the CPU in float32."""

    weights: dict[str, torch.Tensor]
    tags: tuple[str, ...] = TAGS
    sample_rate: int = SAMPLE_RATE

    def _norm(self, x: torch.Tensor, number: int) -> torch.Tensor:
        """Batch normalisation with running statistics over axis 1 of [n, channels, ...]."""
        name = f"batch_normalization_{number}" if number else "batch_normalization"
        mean, variance, beta, gamma = (
            self.weights[f"{name}/{part}"]
            for part in ("moving_mean", "moving_variance", "beta", "gamma")
        )
        return F.batch_norm(x, mean, variance, gamma, beta, eps=_BN_EPSILON)

    def _conv(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.conv2d(x, self.weights[f"{name}/kernel"], self.weights[f"{name}/bias"]).relu_()

    @torch.inference_mode()
    def forward(self, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map patches [n, frames, 96] to tag probabilities [n, 50] and embeddings [n, 200]."""
        x = self._norm(patches[:, None], 0)
        columns = []
        # Timbral filters span 38 or 67 mels, temporal ones a single mel; each keeps, per frame, its
        # largest output over frequency. TensorFlow's "same" puts the odd zero frame after the end.
        for number, (name, before, after) in enumerate(
            [
                ("conv2d", 3, 3),
                ("conv2d_1", 3, 3),
                ("conv2d_2", 63, 64),
                ("conv2d_3", 31, 32),
                ("conv2d_4", 15, 16),
            ]
        ):
            output = self._norm(self._conv(F.pad(x, (0, 0, before, after)), name), number + 1)
            columns.append(output.amax(dim=3))
        stack = [torch.cat(columns, dim=1)]  # [n, 561, frames]
        for number, name in enumerate(["conv2d_5", "conv2d_6", "conv2d_7"]):
            padded = F.pad(stack[-1], (3, 3)).transpose(1, 2)[:, None]  # [n, 1, frames + 6, width]
            output = self._norm(self._conv(padded, name)[..., 0], number + 6)
            stack.append(output if number == 0 else output + stack[-1])
        features = torch.cat(stack, dim=1)  # [n, 753, frames]
        pooled = torch.stack([features.amax(dim=2), features.mean(dim=2)], dim=2)
        x = self._norm(pooled.flatten(1), 9)  # (max, mean) interleaved per channel
        x = (x @ self.weights["dense/kernel"] + self.weights["dense/bias"]).relu_()
        embedding = self._norm(x, 10)
        logits = embedding @ self.weights["dense_1/kernel"] + self.weights["dense_1/bias"]
        return logits.sigmoid(), embedding

    @torch.inference_mode()
    def predict(self, audio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Predict tag probabilities [n, 50] and embeddings [n, 200] of 16 kHz mono [n, samples].

        Each clip is scaled to TARGET_RMS and cut into as many 3-s patches as fit, spread evenly
        (a shorter clip is repeated up to 3 s). Results are means over the patches that are not
        silent. A silent clip gets NaN in both: count it with ``silent(probabilities)``.

        Raises:
            ValueError: audio of another rank, empty, or with NaN or infinity.
        """
        audio, _ = level(repeat_to(check_audio(audio), (PATCH_FRAMES - 1) * HOP))
        frames = 1 + audio.shape[1] // HOP
        starts = spread(frames, PATCH_FRAMES, frames // PATCH_FRAMES)
        loud = loud_windows(audio, [start * HOP for start in starts], PATCH_FRAMES * HOP)
        means = np.full((len(audio), len(self.tags) + EMBEDDING), np.nan, dtype=np.float32)
        for clip in np.flatnonzero(loud.any(axis=1)):
            spectrogram = log_mel(torch.from_numpy(audio[clip : clip + 1]))
            # Patch by patch: one fits the CPU's cache and runs twice as fast as a batch of eight.
            outputs = [
                torch.cat(self.forward(spectrogram[:, start : start + PATCH_FRAMES]), dim=1)
                for start, counts in zip(starts, loud[clip], strict=True)
                if counts
            ]
            means[clip] = torch.cat(outputs).mean(dim=0).numpy()
        return means[:, : len(self.tags)], means[:, len(self.tags) :]


def silent(predictions: np.ndarray) -> np.ndarray:
    """Test which rows of predictions [n, ...] belong to silent clips: bool [n]."""
    return np.isnan(predictions[:, 0])


def load_musicnn(source: str | Path) -> Musicnn:
    """Load MTT_musicnn from its wheel (``wheel_assets.fetch``) or a folder it was unpacked in.

    Raises:
        FileNotFoundError: the checkpoint is not there.
        ValueError: it is broken, or lacks a tensor of the network.
    """
    source = Path(source)
    names = [CHECKPOINT + ".index", CHECKPOINT + ".data-00000-of-00001"]
    try:
        if source.is_dir():
            index, data = ((source / name).read_bytes() for name in names)
        else:
            with zipfile.ZipFile(source) as wheel:
                index, data = (wheel.read(name) for name in names)
    except (FileNotFoundError, KeyError, zipfile.BadZipFile) as error:
        raise FileNotFoundError(
            f"{source} is not the musicnn 0.1.0 wheel or its folder ({error}); get it with "
            "musicscope.data.wheel_assets.fetch"
        ) from error
    weights = {}
    for name, value in read_checkpoint(index, data).items():
        tensor = torch.from_numpy(value)
        # TensorFlow keeps kernels as [height, width, in, out].
        weights[name] = tensor.permute(3, 2, 0, 1).contiguous() if tensor.ndim == 4 else tensor
    return whole(weights, f"{source}", "fetch the wheel again")


def whole(weights: dict[str, torch.Tensor], place: str, remedy: str) -> Musicnn:
    """Make the tagger. ValueError unless `weights` of `place` are all of musicnn's, and finite.

    NaN in a weight would make every clip look silent.
    """
    judge, silence = Musicnn(weights), torch.zeros(1, PATCH_FRAMES, N_MELS)
    fault = "lacks some" if sum(v.numel() for v in weights.values()) != PARAMETERS else ""
    try:
        if not fault and not torch.isfinite(judge.forward(silence)[0]).all():
            fault = "holds NaN or infinity"
    except (KeyError, RuntimeError) as error:
        fault = f"has others ({str(error).splitlines()[0]})"
    if fault:
        raise ValueError(f"{place} does not hold the weights of musicnn: it {fault}; {remedy}")
    return judge


# --- the published checkpoint -------------------------------------------------------------------

_TABLE_MAGIC = 0xDB4775248B80FB57


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """One base-128 integer of `data` and the position after it."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def _block(table: bytes, handle: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) pairs of one LevelDB block; keys are stored as a shared prefix and a rest."""
    offset, at = _varint(handle, 0)
    size, _ = _varint(handle, at)
    if table[offset + size] != 0:
        raise ValueError("checkpoint index holds a compressed block; only plain ones are read")
    block = table[offset : offset + size]
    restarts = struct.unpack_from("<I", block, size - 4)[0]
    at, end, key = 0, size - 4 - 4 * restarts, b""
    while at < end:
        shared, at = _varint(block, at)
        rest, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at : at + rest]
        yield key, block[at + rest : at + rest + length]
        at += rest + length


def _message(data: bytes) -> dict[int, list]:
    """Fields of one protocol-buffer message: number -> values (integers, or bytes)."""
    fields: dict[int, list] = {}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in (2, 5):
            length, at = (4, at) if kind == 5 else _varint(data, at)
            value, at = data[at : at + length], at + length
        else:
            raise ValueError(f"checkpoint index holds protocol-buffer wire type {kind}")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def read_checkpoint(index: bytes, data: bytes) -> dict[str, np.ndarray]:
    """Float32 tensors of a TensorFlow V2 checkpoint of one shard, optimiser slots left out.

    `index` is the ``.index`` file, a LevelDB table from name to BundleEntryProto (dtype 1, shape 2,
    offset 4, size 5; tensorflow/core/protobuf/tensor_bundle.proto); `data` is the
    ``.data-00000-of-00001`` file.
    """
    footer = index[-48:]
    if len(footer) < 48 or struct.unpack("<Q", footer[-8:])[0] != _TABLE_MAGIC:
        raise ValueError("not a TensorFlow checkpoint index (wrong table magic); fetch it again")
    _, at = _varint(footer, 0)
    _, at = _varint(footer, at)
    tensors = {}
    for _, handle in _block(index, footer[at:]):
        for key, value in _block(index, handle):
            name, entry = key.decode(), _message(value)
            if "/" not in name or "Adam" in name or entry.get(1) != [1]:
                continue
            shape = [_message(dim)[1][0] for dim in _message(entry[2][0]).get(2, [])]
            offset, size = entry.get(4, [0])[0], entry[5][0]
            if offset + size > len(data) or size != 4 * int(np.prod(shape)):
                raise ValueError(f"checkpoint tensor {name} runs past its file; fetch it again")
            tensor = np.frombuffer(data, "<f4", size // 4, offset)
            tensors[name] = tensor.reshape(shape).astype(np.float32)
    return tensors
