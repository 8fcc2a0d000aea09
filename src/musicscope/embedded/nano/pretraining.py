"""Pretraining of the nano models, step by step; each step goes on where a killed run stopped."""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import (
    EncodecFeatureExtractor,
    EncodecModel,
    MusicgenForConditionalGeneration,
    MusicgenProcessor,
    T5EncoderModel,
    T5Tokenizer,
)

from musicscope.config import Pretrain
from musicscope.core.io import atomic_dir, read_json, write_json, write_text
from musicscope.core.parallel import follow_parent
from musicscope.data.taxonomy import FAMILIES
from musicscope.embedded.midi_set.corpus import make_clip
from musicscope.embedded.midi_set.embedded import FONTS, load_splits, load_synths
from musicscope.embedded.midi_set.render import SAMPLE_RATE
from musicscope.embedded.nano.codec_training import CodecConfig, train_codec
from musicscope.embedded.nano.decoder_training import DecoderConfig, build_musicgen, train_decoder
from musicscope.embedded.nano.text_training import TextConfig, draw_captions, train_text_encoder
from musicscope.judges.instrument_classifier import (
    FamilyJudge,
    load_family_judge,
    train_family_judge,
)

SECONDS = 10.0
CHUNK = 100


def _render_chunk(args: tuple[int, int, int]) -> tuple[int, np.ndarray, list[dict[str, object]]]:
    """Training clips first..last, alternating between the two soundfonts."""
    first, last, seed = args
    pieces, synths = load_splits(seed)["train"], load_synths()
    clips = [
        make_clip(pieces, synths, FONTS[i % 2], seed, "pretrain", "train", i)
        for i in range(first, last)
    ]
    audio = np.stack([clip.audio for clip in clips]).astype(np.float16)
    return first, audio, [clip.labels() for clip in clips]


def render_corpus(folder: Path, clips: int, seed: int, processes: int) -> np.ndarray:
    """Training audio float16 [clips, samples], memory-mapped; rows.json holds what is known."""
    path = folder / "corpus.npy"
    if not (folder / "rows.json").exists():
        audio = np.lib.format.open_memmap(
            path, "w+", np.float16, (clips, round(SECONDS * SAMPLE_RATE))
        )
        rows: list[dict[str, object]] = []
        chunks = [(i, min(i + CHUNK, clips), seed) for i in range(0, clips, CHUNK)]
        with ProcessPoolExecutor(processes, initializer=follow_parent) as pool:
            for first, part, labels in tqdm(
                pool.map(_render_chunk, chunks),
                total=len(chunks),
                desc="rendering",
                unit="00 clips",
            ):
                audio[first : first + len(part)] = part
                rows += labels
        audio.flush()
        write_json(folder / "rows.json", rows)
    return np.load(path, mmap_mode="r")


def progress(name: str, steps: int):
    """A callback (step, losses) that draws a bar with the time left and the running losses."""
    bar = tqdm(total=steps, desc=name, unit="step", mininterval=10)

    def report(step: int, losses: dict[str, float]) -> None:
        if bar.n == 0:
            bar.initial = step - 1
        bar.update(step - bar.n)
        if step % 50 == 0:
            bar.set_postfix({k: f"{v:.3f}" for k, v in losses.items()})

    return report


def get_codec(folder: Path, corpus: np.ndarray, config: Pretrain, seed: int) -> EncodecModel:
    """The trained codec, kept in `folder`/codec."""
    path = folder / "codec"
    if not path.exists():
        settings = CodecConfig(steps=config.codec_steps, codebooks=config.codebooks)
        report = progress("codec", settings.steps)
        heard = corpus[: config.codec_clips]
        codec = train_codec(heard, settings, seed, folder / "codec.pt", report)
        with atomic_dir(path) as saved:
            codec.save_pretrained(saved)
    return EncodecModel.from_pretrained(path)


def get_text_encoder(
    folder: Path, config: Pretrain, seed: int
) -> tuple[T5EncoderModel, T5Tokenizer]:
    """The trained text encoder and its tokenizer."""
    path = folder / "text"
    if not (path / "done.json").exists():
        settings = TextConfig(steps=config.text_steps)
        captions, facts = draw_captions(load_splits(seed)["train"], settings.captions, seed)
        encoder, tokenizer, loss = train_text_encoder(captions, facts, settings, seed)
        encoder.save_pretrained(path)
        tokenizer.save_pretrained(path)
        write_json(path / "done.json", {"loss": loss})
    return T5EncoderModel.from_pretrained(path), T5Tokenizer.from_pretrained(path)


@torch.inference_mode()
def _encode_chunk(args: tuple[Path, int, int]) -> np.ndarray:
    """Codes uint16 [n, K, frames] of the training clips first..last."""
    folder, first, last = args
    torch.set_num_threads(1)
    codec = EncodecModel.from_pretrained(folder / "codec")
    corpus = np.load(folder / "corpus.npy", mmap_mode="r")
    # One clip at a time: it fits the cache, and a clip's codes do not depend on its neighbours.
    codes = [
        codec.encode(torch.from_numpy(clip.astype(np.float32))[None, None]).audio_codes[0, 0]
        for clip in corpus[first:last]
    ]
    return torch.stack(codes).to(torch.int32).numpy().astype(np.uint16)


def get_codes(folder: Path, clips: int, processes: int) -> np.ndarray:
    """Codes of the training clips, uint16 [clips, K, frames]."""
    path = folder / "codes.npy"
    if not path.exists():
        chunks = [(folder, i, min(i + CHUNK, clips)) for i in range(0, clips, CHUNK)]
        # Spawned, because a forked process would inherit torch's threads in a broken state.
        with ProcessPoolExecutor(
            processes, multiprocessing.get_context("spawn"), follow_parent
        ) as pool:
            parts = list(tqdm(pool.map(_encode_chunk, chunks), total=len(chunks), desc="encoding"))
        np.save(path.with_suffix(".tmp.npy"), np.concatenate(parts))
        path.with_suffix(".tmp.npy").replace(path)
    return np.load(path)


@torch.inference_mode()
def encode_captions(
    encoder: T5EncoderModel, tokenizer: T5Tokenizer, captions: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """States [captions, L, d], zero at padding, and masks [captions, L]."""
    tokens = tokenizer(captions, return_tensors="pt", padding=True)
    states = []
    for i in range(0, len(captions), 256):
        ids, mask = tokens.input_ids[i : i + 256], tokens.attention_mask[i : i + 256]
        states.append(
            encoder(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
        )
    return torch.cat(states).clone(), tokens.attention_mask.clone()


def get_decoder(
    folder: Path, name: str, settings: Pretrain, codec: EncodecModel, text: T5EncoderModel,
    tokenizer: T5Tokenizer, corpus: np.ndarray, seed: int, processes: int,
) -> MusicgenForConditionalGeneration:  # fmt: skip
    """A whole MusicGen whose decoder is trained on the corpus."""
    size, steps = settings.size(name), settings.decoder_steps
    config = DecoderConfig(
        size.width, size.layers, size.heads, steps, guidance_scale=settings.guidance_scale
    )
    model = build_musicgen(codec, text, config, seed)
    codes = get_codes(folder, len(corpus), processes)
    captions = [row["caption"] for row in read_json(folder / "rows.json")]
    states, masks = encode_captions(text, tokenizer, captions)
    return train_decoder(
        model, codes, states, masks, config, seed, folder / f"{name}.pt", progress(name, steps)
    )


def save_model(
    folder: Path, model: MusicgenForConditionalGeneration, tokenizer: T5Tokenizer, card: str
) -> None:
    """Weights in float16 as `save_pretrained` writes them, with tokenizer, extractor and card."""
    model.half().save_pretrained(folder)
    extractor = EncodecFeatureExtractor(feature_size=1, sampling_rate=SAMPLE_RATE)
    MusicgenProcessor(extractor, tokenizer).save_pretrained(folder)
    write_text(folder / "README.md", card)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB", file=sys.stderr)


@torch.inference_mode()
def reconstruct(codec: EncodecModel, codes: np.ndarray) -> np.ndarray:
    """Audio [n, samples] from codes [n, K, frames], clip by clip: that fits the CPU's cache."""
    parts = [
        codec.decode(torch.from_numpy(c.astype(np.int64))[None, None], [None]).audio_values[0, 0]
        for c in codes
    ]
    return torch.stack(parts).numpy()


def get_judge(
    folder: Path,
    codec: EncodecModel,
    corpus: np.ndarray,
    codes: np.ndarray,
    config: Pretrain,
    seed: int,
) -> FamilyJudge:
    """The judge of generated audio: trained on rendered clips and their codec reconstructions.

    It hears train compositions in both soundfonts, and never anything that a model generated.
    """
    path = folder / "judge"
    if not (path / "config.json").exists():
        rows = read_json(folder / "rows.json")[: config.judge_clips]
        truth = np.array([[row[f"has_{f}"] for f in FAMILIES] for row in rows])

        def batches():
            for i in tqdm(range(0, len(rows), 50), desc="judge's clips", unit="50 clips"):
                audio = corpus[i : i + 50].astype(np.float32)
                yield audio, truth[i : i + 50]
                yield reconstruct(codec, codes[i : i + 50]), truth[i : i + 50]

        judge = train_family_judge(batches(), FAMILIES, seed, scratch=folder)
        judge.save(path)
    return load_family_judge(path)
