"""A tiny random YuE stage 1 in the true on-disk layout, with the true vocabulary."""

from __future__ import annotations

import struct
from pathlib import Path

import torch

PIECES = {
    "re": 276, "▁the": 278, "end": 355, "ate": 403, "▁by": 491, "▁from": 515, "▁[": 518, "of": 974,
    "ics": 1199, "▁given": 2183, "start": 2962, "▁Gener": 3251, "verse": 3901, "▁music": 4696,
    "reference": 5679, "▁segment": 10768, "▁guitar": 11210, "Gen": 15462, "▁lyr": 26627,
    "segment": 28192, "▁": 29871, ".": 29889, "_": 29918, "[": 29961, "]": 29962,
}  # fmt: skip
"""Pieces of YuE's tokenizer that its template needs; what they do not cover becomes bytes."""


def _varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])


def _field(number: int, value: int | float | bytes) -> bytes:
    """One field of a protocol buffer: an int as varint, a float in 4 bytes, bytes with length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def write_tokenizer(path: Path, pieces: int = 83_734) -> None:
    """A sentencepiece unigram model with as many pieces as YuE's and those of `PIECES`.

    Ids 3..258 are the bytes, as in Llama; the rest is unused. Fields: sentencepiece_model.proto.
    """
    normal, unknown, control, unused, byte = 1, 2, 3, 5, 6
    known = {0: ("<unk>", unknown), 1: ("<s>", control), 2: ("</s>", control)}
    known |= {3 + value: (f"<0x{value:02X}>", byte) for value in range(256)}
    known |= {number: (piece, normal) for piece, number in PIECES.items()}
    written = []
    for number in range(pieces):
        piece, kind = known.get(number, (f"<unused {number}>", unused))
        # Equal scores: the cut with the fewest pieces wins.
        fields = _field(1, piece.encode()) + _field(2, -1.0) + _field(3, kind)
        written.append(_field(1, fields))
    unigram = _field(3, 1) + _field(35, 1)  # model_type, byte_fallback
    keep_spaces = _field(1, b"identity") + _field(3, 1) + _field(4, 0) + _field(5, 1)
    path.write_bytes(b"".join([*written, _field(2, unigram), _field(3, keep_spaces)]))


def build_codec(folder: Path) -> None:
    """A random xcodec: 16 kHz, 50 Hz, 8 codebooks of 1,024, a few thousand weights."""
    from transformers import DacConfig, HubertConfig, XcodecConfig, XcodecModel

    acoustic = DacConfig(
        encoder_hidden_size=2, downsampling_ratios=[8, 5, 4, 2], decoder_hidden_size=32,
        upsampling_ratios=[8, 5, 4, 2], hidden_size=8,
    )  # fmt: skip
    semantic = HubertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=[4] * 7, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    codec = XcodecModel(
        XcodecConfig(acoustic_model_config=acoustic, semantic_model_config=semantic)
    ).eval()
    with torch.no_grad():
        for name, weight in codec.named_parameters():
            if name.startswith("acoustic_decoder"):
                continue  # larger weights there make rounding audible
            if weight.ndim == 3:
                weight.normal_(std=(weight.shape[1] * weight.shape[2]) ** -0.5)
            elif weight.ndim == 2:
                weight.normal_(std=weight.shape[1] ** -0.5)
        # A fresh xcodec has all-zero codebooks, so every code would be 0: fill them with what is
        # there to code, the latents of noise and then what each codebook leaves over.
        seen: list[torch.Tensor] = []
        handle = codec.fc.register_forward_hook(lambda module, inputs, output: seen.append(output))
        codec.encode(torch.randn(1, 1, 320 * 1100), bandwidth=0.5)
        handle.remove()
        left = seen[0].transpose(1, 2)
        for layer in codec.quantizer.quantizers:
            layer.codebook.embed.copy_(left[0].T[torch.randperm(left.shape[-1])[:1024]])
            left = left - layer.decode(layer.encode(left))
    codec.save_pretrained(folder)


def build_tiny_yue(folder: Path, layers: int = 3, width: int = 16, seed: int = 0) -> None:
    """Save a random Llama with YuE's 83,968 logits in shards, its tokenizer and its codec."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=83_968,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16_384,
            bos_token_id=1,
            eos_token_id=2,
        )  # fmt: skip
    )
    with torch.no_grad():
        # Fresh weights of std 0.02 leave a stream in which layers hardly matter.
        for weight in llama.parameters():
            if weight.ndim == 2:
                weight.normal_(std=weight.shape[1] ** -0.5)
    llama.save_pretrained(folder, max_shard_size="6MB")
    write_tokenizer(folder / "tokenizer.model")
    build_codec(folder / "xcodec")
