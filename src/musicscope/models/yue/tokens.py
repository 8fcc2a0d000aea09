"""Text and audio of YuE stage 1 as tokens: ids, prompt template, tokenizer, codec.

Facts: Yuan et al. 2025 (arXiv 2503.08638) and the code of `multimodal-art-projection/YuE`, branch
YuE-v1, commit 6d4f0b1f. One sequence holds text and audio: 32,000 Llama pieces, 22 marks, then the
codes of several codecs. Stage 1 writes the first xcodec codebook only, two tracks in turn: vocal,
instrumental, vocal, ... Frame t of the first track is the 2t-th code, of the second the 2t+1-th.

The codec is xcodec (Ye et al. 2024, arXiv 2408.17175): 16 kHz, 50 Hz, one codebook. `XcodecModel`
of transformers does the work; here are the checks and YuE's conventions. Stage 2 (codebooks 1..7)
is out of scope, so audio is decoded from the first codebook only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import XcodecConfig, XcodecModel

from musicscope.core.io import sha256
from musicscope.models import checkpoint

TEXT_IDS = 32_000
"""Ids 0..31,999 are text."""
SOA, EOA = 32_001, 32_002
"""Start of audio, end of audio."""
XCODEC = 32_016
"""Names the codec of the codes that follow. The text "<xcodec>" becomes five other ids."""
FIRST_CODE = 45_334
"""Id of code 0 of the first xcodec codebook; codebook k (of 12) starts 1,024 k later."""
CARD = 1024
CODE_IDS = slice(FIRST_CODE, FIRST_CODE + CARD)
"""45,334..46,357: the ids that stage 1 writes between SOA and EOA."""
PIECES = 83_734
"""Ids of tokenizer.model. YuE's wrapper counts 83,738, the logits are padded to 83,968."""
TRACKS = ("vocal", "instrumental")

TOKENIZER_SHA256 = "ee5c7cbf32da93989f14d9ba635e3e1d1ab2cc88a92908a5ed0f149375f6ee49"
TOKENIZER_SOURCE = (
    "inference/mm_tokenizer_v0.2_hf/tokenizer.model of github.com/multimodal-art-projection/YuE, "
    "branch YuE-v1"
)
MARKS = {
    "[start_of_segment]": (518, 2962, 29918, 974, 29918, 28192, 29962),
    "[end_of_segment]": (518, 355, 29918, 974, 29918, 28192, 29962),
    "[start_of_reference]": (518, 2962, 29918, 974, 29918, 5679, 29962),
    "[end_of_reference]": (518, 355, 29918, 974, 29918, 5679, 29962),
}
"""Marks of the template that are plain text, and the pieces they must become."""
INSTRUCTION = "Generate music from the given lyrics segment by segment."
INSTRUMENTAL = "[verse]\n\n\n"
"""A segment without words, the authors' request for music without singing (YuE issue 18)."""

Tokenize = Callable[[str], Sequence[int]]
"""Text to ids, without marks at either end."""


def load_tokenizer(path: str | Path) -> Tokenize:
    """Load and check YuE's `tokenizer.model`.

    Another file than the released one gives a warning, and is refused (ValueError) unless it has
    the same number of pieces and encodes the template's marks as the released one does.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: copy it there from {TOKENIZER_SOURCE}")
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ImportError("YuE needs sentencepiece: pip install sentencepiece") from error
    try:
        processor = SentencePieceProcessor(model_file=str(checkpoint.check_file(path)))
    except RuntimeError as error:
        raise checkpoint.damaged(path, error) from error
    found = sha256(path)
    if found != TOKENIZER_SHA256:
        wrong = [mark for mark, ids in MARKS.items() if tuple(processor.encode(mark)) != ids]
        if len(processor) != PIECES or wrong:
            raise ValueError(
                f"{path} is not YuE's tokenizer: {len(processor)} pieces for {PIECES}, other ids "
                f"for {wrong or 'no mark'}; take {TOKENIZER_SOURCE}"
            )
        warnings.warn(
            f"{path} has sha256 {found[:16]}..., YuE's own {TOKENIZER_SHA256[:16]}...: texts may "
            f"get other ids than the model was trained with; take {TOKENIZER_SOURCE}",
            stacklevel=2,
        )
    return processor.encode


# ---- codes


def interleave(codes: Tensor) -> Tensor:
    """Codes [B, 2, T] in 0..1023, (vocal, instrumental), to ids [B, 2T]: v0 i0 v1 i1 ..."""
    if codes.ndim != 3 or codes.shape[1] != 2 or codes.shape[2] == 0:
        raise ValueError(
            f"codes must be [clips, 2 (vocal, instrumental), frames], got {list(codes.shape)}; "
            "codebooks of stage 2 are not supported"
        )
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < CARD:
        raise ValueError(f"codes must lie in 0..{CARD - 1}")
    return codes.transpose(1, 2).flatten(1) + FIRST_CODE


def deinterleave(ids: Tensor) -> Tensor:
    """Invert `interleave`: ids [B, 2T] to codes [B, 2, T].

    ValueError for an odd number of ids and for ids outside the first xcodec codebook.
    """
    if ids.ndim != 2 or ids.shape[1] % 2:
        raise ValueError(f"ids must be [clips, 2T], got {list(ids.shape)}")
    codes = ids - FIRST_CODE
    outside = (codes < 0) | (codes >= CARD)
    if outside.any():
        raise ValueError(
            f"ids {ids[outside].unique().tolist()[:8]} are no codes of stage 1 "
            f"({CODE_IDS.start}..{CODE_IDS.stop - 1})"
        )
    return codes.unflatten(1, (-1, 2)).transpose(1, 2)


# ---- template


def prompt_ids(tokenize: Tokenize, genres: str, segment: str = INSTRUMENTAL) -> list[int]:
    """Everything before the first code of a song that is a single segment.

    Layout of finetune/core/preprocess_data_conditional_xcodec_segment.py: a head of instruction,
    genre tags and lyrics, then the opening of the segment.
    """
    head = tokenize(f"{INSTRUCTION}\n[Genre] {' '.join(genres.split())}\n{segment}")
    return [*head, *tokenize("[start_of_segment]"), *tokenize(segment), SOA, XCODEC]


def left_padded(rows: Iterable[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Pad rows of ids to ids [B, L] and mask [B, L], int64; padding (id 0, mask 0) stands first.

    In every row the codes then begin at the same position.
    """
    rows = list(rows)
    length = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (length - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


# ---- codec

HUB_ID = "Manel/YuE-XCodec"
"""The codec's weights in transformers' layout."""
BANDWIDTH = 0.5
"""Kilobits per second of one codebook, which stage 1 reads and writes."""
HOP, SAMPLE_RATE = 320, 16_000


def load_codec(folder: str | Path, device: torch.device) -> XcodecModel:
    """Load a save_pretrained folder, in float32: rounding would change the codes, that is the data.

    FileNotFoundError without a config.json, ValueError for a codec with other rates than YuE's.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no config.json: save YuE's codec there in transformers' layout "
            f"(hub id {HUB_ID}), or name its folder with codec="
        )
    checkpoint.read_config(folder)
    config = XcodecConfig.from_pretrained(folder, local_files_only=True)
    found = (config.sample_rate, config.hop_length, config.codebook_size)
    if found != (SAMPLE_RATE, HOP, CARD) or BANDWIDTH not in config.target_bandwidths:
        raise ValueError(
            f"{folder}/config.json: YuE's codec has {SAMPLE_RATE} Hz, {HOP} samples a frame and "
            f"{CARD} codes, and {BANDWIDTH} among target_bandwidths; this one has {found} and "
            f"{list(config.target_bandwidths)}: put {HUB_ID} there"
        )
    codec = checkpoint.load_pretrained(XcodecModel, folder, dtype=torch.float32)
    # Stage 1 uses the first codebook for both tracks.
    checkpoint.check_codec(codec, folder, (1, CARD), (1, CARD))
    return codec.eval().to(device).requires_grad_(False)
