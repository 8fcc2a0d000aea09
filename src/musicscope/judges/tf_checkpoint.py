"""Weights out of a TensorFlow checkpoint (V2, one shard) without TensorFlow."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

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
