"""Sizes of the published models and data sets, known before anything is downloaded.

MusicGen: from audiocraft's model cards and code (small, medium, large), with T5-base as text
encoder and EnCodec at 32 kHz. YuE stage 1: 32 Llama layers of 4,096; other sizes are Llama 7B's, an
upper bound (grouped key heads weigh less). A folder's own config.json takes precedence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from musicscope.core.io import read_json

if TYPE_CHECKING:
    from transformers import LlamaConfig, MusicgenConfig, PretrainedConfig, T5Config

MUSICGEN = {
    "musicgen-small": {"hidden_size": 1024, "heads": 16, "layers": 24},
    "musicgen-medium": {"hidden_size": 1536, "heads": 24, "layers": 48},
    "musicgen-large": {"hidden_size": 2048, "heads": 32, "layers": 48},
}
YUE_S1 = "YuE-s1-7B"
RAVE_WIDTH, RAVE_RATE = 128, 44_100 / 2048
"""Dimensions and frame rate of the posterior mean of a v2 export."""


class DataSet(NamedTuple):
    """Recordings of a published data set, before filtering."""

    train: int
    validation: int
    test: int
    seconds: float
    """Length of a recording, or the shortest common length."""


DATA_SETS = {
    "musicbench": DataSet(52_768, 0, 400, 10.0),
    "song_describer": DataSet(706, 0, 0, 120.0),
    "mtg_jamendo": DataSet(14_395, 5_466, 5_115, 30.0),
}
"""`prepare_data.source` -> rows of MusicBench; tracks of Song Describer; of Jamendo's split 0."""


@dataclass(frozen=True)
class Shape:
    """Size of a model, as planning uses it."""

    name: str
    layers: int
    """Layers of a full pass (0: not a stack of equal layers)."""
    width: int
    """Dimensions of a hook point."""
    sample_rate: int
    frame_rate: float
    decoder_parameters: int
    """Parameters of the language model; RAVE: of everything."""
    other_parameters: int
    """Parameters of codec and text encoder, which stay in float32."""
    origin: str
    """Source: a path, or "published sizes"."""
    positions_per_frame: int = 1
    """Sequence positions per frame; the cost of a pass is proportional."""

    def weight_bytes(self, decoder_bytes: int = 4) -> int:
        """Bytes of all weights, with `decoder_bytes` per parameter of the decoder."""
        return self.decoder_parameters * decoder_bytes + self.other_parameters * 4


def text_config() -> T5Config:
    """Build transformers' configuration of T5-base's encoder, which every MusicGen has."""
    from transformers import T5Config

    return T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128)


def musicgen_config(name: str) -> MusicgenConfig:
    """Build transformers' configuration of a published mono MusicGen (a key of MUSICGEN)."""
    from transformers import EncodecConfig, MusicgenConfig, MusicgenDecoderConfig

    size = MUSICGEN[name]
    codec = EncodecConfig(
        target_bandwidths=[2.2], sampling_rate=32_000, audio_channels=1, normalize=False,
        chunk_length_s=None, overlap=None, hidden_size=128, num_filters=64, num_residual_layers=1,
        upsampling_ratios=[8, 5, 4, 4], num_lstm_layers=2, codebook_size=2048, codebook_dim=128,
        use_causal_conv=False, use_conv_shortcut=False,
    )  # fmt: skip
    decoder = MusicgenDecoderConfig(
        vocab_size=2048, max_position_embeddings=2048, num_hidden_layers=size["layers"],
        hidden_size=size["hidden_size"], ffn_dim=4 * size["hidden_size"],
        num_attention_heads=size["heads"], num_codebooks=4, audio_channels=1, pad_token_id=2048,
        bos_token_id=2048, eos_token_id=None,
    )  # fmt: skip
    # transformers 5 dropped this field from the class, but forward(labels=...) reads it.
    decoder.decoder_start_token_id = 2048
    return MusicgenConfig(text_encoder=text_config(), audio_encoder=codec, decoder=decoder)


def shape_of(name: str, models: str | Path = "data/models") -> Shape:
    """Return the shape of the folder `models`/`name`, or of the published model of that name.

    A hub id counts by its part after the slash. ValueError for an unknown name.
    """
    from transformers import LlamaConfig, MusicgenConfig

    folder, plain = Path(models) / name, name.rsplit("/", 1)[-1]
    if (folder / "config.json").is_file():
        kind = read_json(folder / "config.json").get("model_type")
        if kind == "musicgen":
            return _of_musicgen(name, MusicgenConfig.from_pretrained(folder), str(folder))
        if kind == "llama":
            return _of_llama(name, LlamaConfig.from_pretrained(folder), str(folder))
        raise ValueError(
            f"{folder}/config.json is of type {kind!r}; planned are musicgen and llama"
        )
    if (folder / "state_dict.bin").is_file():
        return _of_musicgen(name, _audiocraft_config(folder), str(folder))
    if plain in MUSICGEN:
        return replace(_published_musicgen(plain), name=name)
    if plain.startswith(YUE_S1):
        config = LlamaConfig(
            vocab_size=83_968, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32,
            num_attention_heads=32, max_position_embeddings=16_384,
        )  # fmt: skip
        return _of_llama(name, config, "published sizes")
    exports = sorted(folder.glob("*.ts"))
    if exports or "rave" in plain.lower():
        origin = str(exports[0]) if exports else "published sizes"
        size = exports[0].stat().st_size // 4 if exports else 0
        return Shape(name, 0, RAVE_WIDTH, 44_100, RAVE_RATE, size, 0, origin)
    raise ValueError(
        f"no folder {folder}, and {name!r} is none of {', '.join(MUSICGEN)}, {YUE_S1}..., rave...: "
        "fetch the model, or call it by its published name"
    )


def _audiocraft_config(folder: Path) -> MusicgenConfig:
    from transformers import T5Config

    from musicscope.models.audiocraft.convert import transformers_config
    from musicscope.models.audiocraft.loading import (
        CODEC_FILE,
        MODEL_FILE,
        TEXT_FOLDER,
        read_checkpoint,
    )

    files = (MODEL_FILE, CODEC_FILE)
    configs = (read_checkpoint(folder / file)[1] for file in files)
    text = folder / TEXT_FOLDER
    t5 = T5Config.from_pretrained(text) if text.is_dir() else text_config()
    return transformers_config(*configs, t5)


@cache
def _published_musicgen(name: str) -> Shape:
    return _of_musicgen(name, musicgen_config(name), "published sizes")


def _of_musicgen(name: str, config: MusicgenConfig, origin: str) -> Shape:
    from musicscope.models.musicgen.decoder import part_configs

    decoder, codec = part_configs(config)
    rate = codec.sampling_rate / math.prod(codec.upsampling_ratios)
    whole, core = _parameters("MusicgenForConditionalGeneration", config, "decoder")
    return Shape(
        name, decoder.num_hidden_layers, decoder.hidden_size, codec.sampling_rate, rate, core,
        whole - core, origin,
    )  # fmt: skip


def _of_llama(name: str, config: LlamaConfig, origin: str) -> Shape:
    whole, _ = _parameters("LlamaForCausalLM", config, "model")
    return Shape(
        name, config.num_hidden_layers, config.hidden_size, 16_000, 50.0, whole, 0, origin,
        positions_per_frame=2,  # vocals and instruments in turn
    )  # fmt: skip


def _parameters(class_name: str, config: PretrainedConfig, part: str) -> tuple[int, int]:
    """Count parameters of a transformers model and of one of its parts, without allocating them."""
    import torch
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, class_name)(config)
    whole, core = (sum(p.numel() for p in m.parameters()) for m in (model, getattr(model, part)))
    return whole, core
