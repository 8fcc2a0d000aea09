"""Shared fixtures: a tiny random MusicGen, saved and loaded like a real one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before torch starts its pool: two threads on a busy machine are many times slower than one here.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "src"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

CAPTIONS = (
    "a calm acoustic guitar with drums at 90 bpm",
    "fast electric piano and strings, in A minor",
    "flute",
    "a dense piece for brass and bass, 140 bpm",
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "device: runs on MUSICSCOPE_TEST_DEVICE; `device` marks it")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker("device")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where tests run that can run on a GPU: MUSICSCOPE_TEST_DEVICE, else the CPU."""
    return torch.device(os.environ.get("MUSICSCOPE_TEST_DEVICE", "cpu"))


@pytest.fixture(autouse=True)
def own_clips():
    """Mapped shards are cached by path, and tests that change folder have a data/clips each."""
    from musicscope.data.clips import _shard

    _shard.cache_clear()


def build_tiny_musicgen(folder: Path, seed: int = 0) -> None:
    """Save a random 4-layer MusicGen with tokenizer and feature extractor (3,200 Hz, 50 Hz)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import (
        EncodecConfig,
        EncodecFeatureExtractor,
        MusicgenConfig,
        MusicgenDecoderConfig,
        MusicgenForConditionalGeneration,
        PreTrainedTokenizerFast,
        T5Config,
    )

    # T5's own kind of tokenizer: a unigram model, words marked by a leading underscore, </s> last.
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        CAPTIONS,
        trainers.UnigramTrainer(
            vocab_size=96, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    EncodecFeatureExtractor(feature_size=1, sampling_rate=3200).save_pretrained(folder)

    torch.manual_seed(seed)
    text = T5Config(
        vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    codec = EncodecConfig(
        target_bandwidths=[4 * 50 * 6 / 1000], sampling_rate=3200, audio_channels=1,
        normalize=False, chunk_length_s=None, overlap=None, hidden_size=16, num_filters=4,
        num_residual_layers=1, upsampling_ratios=[4, 4, 4], num_lstm_layers=1, codebook_size=64,
        codebook_dim=16, use_causal_conv=False,
    )  # fmt: skip
    decoder = MusicgenDecoderConfig(
        vocab_size=64, max_position_embeddings=512, num_hidden_layers=4, ffn_dim=128,
        num_attention_heads=4, hidden_size=48, num_codebooks=4, audio_channels=1,
        pad_token_id=64, bos_token_id=64, eos_token_id=None, initializer_factor=0.2,
    )  # fmt: skip
    # transformers 5 dropped this field from the class, but forward(labels=...) reads it.
    decoder.decoder_start_token_id = 64
    model = MusicgenForConditionalGeneration(
        MusicgenConfig(text_encoder=text, audio_encoder=codec, decoder=decoder)
    ).eval()
    with torch.no_grad():
        # A fresh EnCodec has all-zero codebooks, so every code would be 0: fill them with what
        # is there to code, the latents of noise and then what each codebook leaves over.
        left = model.audio_encoder.encoder(torch.randn(1, 1, 3200 * 10))
        for layer in model.audio_encoder.quantizer.layers:
            layer.codebook.embed.copy_(left[0].T[torch.randperm(left.shape[-1])[:64]])
            left = left - layer.decode(layer.encode(left))
        # And fresh linear maps of std 0.02 leave a stream in which layers hardly matter.
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and name.startswith(("decoder.", "enc_to_dec", "text_encoder")):
                weight.normal_(std=weight.shape[1] ** -0.5)
    generation = model.generation_config
    generation.decoder_start_token_id = generation.bos_token_id = generation.pad_token_id = 64
    generation.max_length, generation.do_sample, generation.guidance_scale = None, True, 3.0
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_musicgen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random MusicGen: 4 layers of width 48, 4 codebooks of 64, 3,200 Hz."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny_musicgen(folder)
    return folder
