"""Convert MusicGen between the layouts of transformers and audiocraft, without audiocraft.

The two hold the same tensors under other names, except that audiocraft stacks the three input
projections of an attention into one. Mono text-to-music models with the plain delay pattern.

    python -m musicscope.models.audiocraft.convert to-audiocraft FOLDER OUT
    python -m musicscope.models.audiocraft.convert to-transformers FOLDER OUT

OUT must be a new or an empty folder.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from musicscope.core.command_line import Parser, run_program
from musicscope.core.user_outputs import NewFolder, new_folder
from musicscope.models.audiocraft.loading import (
    CODEC_FILE,
    MODEL_FILE,
    TEXT_FOLDER,
    check_supported,
    load_text_encoder,
    read_checkpoint,
    settle_guidance,
    text_encoder_folder,
)
from musicscope.models.checkpoint import load_tokenizer
from musicscope.models.musicgen.decoder import part_configs
from musicscope.models.musicgen.model import load_parts

if TYPE_CHECKING:
    from transformers import MusicgenConfig, MusicgenForConditionalGeneration, T5Config

State = dict[str, Tensor]
CORE, LAYERS = "decoder.model.decoder.", "transformer.layers."
# Parts of a layer: transformers, audiocraft.
PARTS = (
    ("self_attn.", "self_attn."),
    ("encoder_attn.", "cross_attention."),
    ("fc1.", "linear1."),
    ("fc2.", "linear2."),
    ("self_attn_layer_norm.", "norm1."),
    ("encoder_attn_layer_norm.", "norm_cross."),
    ("final_layer_norm.", "norm2."),
)
# The rest of the decoder, as prefixes.
WHOLE = (
    (f"{CORE}embed_tokens.", "emb."),
    (f"{CORE}layer_norm.", "out_norm."),
    ("decoder.lm_heads.", "linears."),
    ("enc_to_dec_proj.", "condition_provider.conditioners.description.output_proj."),
)
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def _renamed(name: str, pairs: tuple[tuple[str, str], ...], forward: bool) -> str | None:
    for theirs, ours in pairs:
        old, new = (theirs, ours) if forward else (ours, theirs)
        if name.startswith(old):
            return new + name.removeprefix(old)
    return None


def decoder_to_audiocraft(state: State) -> State:
    """Turn a whole transformers state dict into audiocraft's language-model weights.

    KeyError for a decoder weight without a counterpart; codec and T5 are passed over.
    """
    found: State = {}
    for name, value in state.items():
        if name.startswith(("audio_encoder.", "text_encoder.")) or "embed_positions" in name:
            continue
        if layer := re.fullmatch(rf"{re.escape(CORE)}layers\.(\d+)\.(.+)", name):
            new = _renamed(layer[2], PARTS, True)
            new = new and f"{LAYERS}{layer[1]}.{new}"
        else:
            new = _renamed(name, WHOLE, True)
        if new is None:
            raise KeyError(f"{name} has no counterpart in audiocraft")
        found[new] = value
    for name in [n for n in found if n.endswith(".q_proj.weight")]:
        stem = name.removesuffix("q_proj.weight")
        parts = [found.pop(f"{stem}{part}.weight") for part in PROJECTIONS]
        found[f"{stem}in_proj_weight"] = torch.cat(parts)
    return found


def decoder_to_transformers(state: State) -> State:
    """Invert `decoder_to_audiocraft`. KeyError for weights without a counterpart (biases)."""
    found: State = {}
    for name, value in state.items():
        if ".conditioners.description.t5." in name:  # a T5 that was trained along: see `_text`
            continue
        if layer := re.fullmatch(rf"{re.escape(LAYERS)}(\d+)\.(.+)", name):
            new = _renamed(layer[2].replace(".mha.", "."), PARTS, False)
            new = new and f"{CORE}layers.{layer[1]}.{new}"
        else:
            new = _renamed(name, WHOLE, False)
        if new is None or new.endswith("in_proj_bias"):
            raise KeyError(f"{name} has no counterpart in transformers' MusicGen")
        if new.endswith("in_proj_weight"):
            stem = new.removesuffix("in_proj_weight")
            for part, rows in zip(PROJECTIONS, value.chunk(3), strict=True):
                found[f"{stem}{part}.weight"] = rows.clone()
        else:
            found[new] = value
    return found


def _upsamplers(ratios: list[int], residual: int) -> set[int]:
    """Positions of the transposed convolutions among the decoder's modules."""
    # A convolution and an LSTM, then for each ratio: activation, upsampler, residual blocks.
    return {3 + i * (2 + residual) for i in range(len(ratios))}


def codec_to_audiocraft(state: State, ratios: list[int], residual: int) -> State:
    """Turn weights of transformers' EncodecModel into audiocraft's."""
    found: State = {}
    for name, value in state.items():
        if name.startswith("quantizer."):
            new = name.replace("quantizer.layers.", "quantizer.vq.layers.")
            found[new.replace(".codebook.", "._codebook.")] = value
            continue
        side, _, index, rest = name.split(".", 3)
        rest = rest.replace("parametrizations.weight.original0", "weight_g")
        rest = rest.replace("parametrizations.weight.original1", "weight_v")
        if side == "decoder" and int(index) in _upsamplers(ratios, residual):
            rest = rest.replace("conv.", "convtr.convtr.", 1)
        elif not rest.startswith("lstm."):
            rest = re.sub(r"(^|\.)conv\.", r"\1conv.conv.", rest, count=1)
        found[f"{side}.model.{index}.{rest}"] = value
    return found


def codec_to_transformers(state: State) -> State:
    """Invert `codec_to_audiocraft`."""
    found: State = {}
    for name, value in state.items():
        new = re.sub(r"^(encoder|decoder)\.model\.", r"\1.layers.", name)
        new = new.replace("quantizer.vq.layers.", "quantizer.layers.")
        new = new.replace("._codebook.", ".codebook.").replace(".convtr.convtr.", ".conv.")
        new = new.replace(".conv.conv.", ".conv.")
        new = new.replace(".weight_g", ".parametrizations.weight.original0")
        found[new.replace(".weight_v", ".parametrizations.weight.original1")] = value
    return found


# ---- settings


def audiocraft_configs(
    hf: MusicgenForConditionalGeneration, text_name: str
) -> tuple[dict[str, object], dict[str, object]]:
    """Make (config of the language model, config of the codec) for a transformers MusicGen."""
    decoder, codec = part_configs(hf.config)
    if codec.norm_type != "weight_norm" or codec.codebook_dim != codec.hidden_size:
        raise ValueError("only an EnCodec with weight norm and full-width codebooks can be written")
    width, inner = decoder.hidden_size, decoder.ffn_dim
    books = decoder.num_codebooks
    transformer = {
        "dim": width, "num_heads": decoder.num_attention_heads,
        "num_layers": decoder.num_hidden_layers, "n_q": books, "card": decoder.vocab_size,
        # Read back as int(hidden_scale * dim): the half keeps rounding from losing one.
        "hidden_scale": inner // width if inner % width == 0 else (inner + 0.5) / width,
        "dropout": 0.0, "emb_lr": None, "activation": decoder.activation_function,
        "norm_first": True, "norm": "layer_norm", "bias_ff": False, "bias_attn": False,
        "bias_proj": False, "past_context": None, "causal": True, "custom": False,
        "memory_efficient": True, "attention_as_float32": False, "layer_scale": None,
        "positional_embedding": "sin", "xpos": False, "checkpointing": "none",
        "weight_init": "gaussian", "depthwise_init": "current", "zero_bias_init": True,
        "cross_attention": False, "qk_layer_norm": False, "qk_layer_norm_cross": False,
        "attention_dropout": None, "kv_repeat": 1, "two_step_cfg": False,
    }  # fmt: skip
    language = {
        "sample_rate": codec.sampling_rate, "channels": 1, "device": "cpu", "dtype": "float32",
        "lm_model": "transformer_lm", "transformer_lm": transformer,
        "compression_model_n_q": books,
        "codebooks_pattern": {
            "modeling": "delay",
            "delay": {"delays": list(range(books)), "flatten_first": 0, "empty_initial": 0},
        },
        "classifier_free_guidance": {"training_dropout": 0.3, "inference_coef": 3.0},
        "attribute_dropout": {},
        "fuser": {"cross_attention_pos_emb": False, "cross_attention_pos_emb_scale": 1, "sum": [],
                  "prepend": [], "cross": ["description"], "input_interpolate": []},
        "conditioners": {"description": {"model": "t5", "t5": {
            "name": text_name, "finetune": False, "word_dropout": 0.3, "normalize_text": False}}},
        "dataset": {"segment_duration": 30},
    }  # fmt: skip
    compression = {
        "sample_rate": codec.sampling_rate, "channels": 1, "device": "cpu", "dtype": "float32",
        "compression_model": "encodec",
        "encodec": {"autoencoder": "seanet", "quantizer": "rvq", "sample_rate": "${sample_rate}",
                    "channels": "${channels}", "causal": codec.use_causal_conv,
                    "renormalize": codec.normalize},
        "seanet": {
            "dimension": codec.hidden_size, "channels": "${channels}",
            "causal": "${encodec.causal}", "n_filters": codec.num_filters,
            "n_residual_layers": codec.num_residual_layers,
            "ratios": list(codec.upsampling_ratios), "activation": "ELU",
            "activation_params": {"alpha": 1.0}, "norm": "weight_norm", "norm_params": {},
            "kernel_size": codec.kernel_size, "residual_kernel_size": codec.residual_kernel_size,
            "last_kernel_size": codec.last_kernel_size, "dilation_base": codec.dilation_growth_rate,
            "pad_mode": codec.pad_mode, "true_skip": not codec.use_conv_shortcut,
            "compress": codec.compress, "lstm": codec.num_lstm_layers,
            "disable_norm_outer_blocks": 0, "encoder": {},
            "decoder": {"trim_right_ratio": codec.trim_right_ratio, "final_activation": None,
                        "final_activation_params": None},
        },
        "rvq": {"n_q": codec.num_quantizers, "q_dropout": False, "bins": codec.codebook_size,
                "decay": 0.99, "kmeans_init": True, "kmeans_iters": 50,
                "threshold_ema_dead_code": 2, "orthogonal_reg_weight": 0.0,
                "orthogonal_reg_active_codes_only": False},
    }  # fmt: skip
    return language, compression


def transformers_config(
    language: DictConfig, compression: DictConfig, text: T5Config
) -> MusicgenConfig:
    """Make the MusicgenConfig of audiocraft's two configs and a T5 config."""
    from transformers import EncodecConfig, MusicgenConfig, MusicgenDecoderConfig

    lm, sea = language.transformer_lm, compression.seanet
    if lm.bias_ff or lm.bias_attn or lm.bias_proj or lm.get("layer_scale") is not None:
        raise ValueError("transformers' MusicGen has neither biases nor layer scale")
    if sea.norm != "weight_norm" or not sea.lstm or sea.disable_norm_outer_blocks:
        raise ValueError("transformers' EnCodec has weight norm everywhere and an LSTM")
    rate, special = int(compression.encodec.sample_rate), int(lm.card)
    ratios = [int(r) for r in sea.ratios]
    codec = EncodecConfig(
        sampling_rate=rate, audio_channels=1, normalize=bool(compression.encodec.renormalize),
        chunk_length_s=None, overlap=None, hidden_size=sea.dimension, num_filters=sea.n_filters,
        num_residual_layers=sea.n_residual_layers, upsampling_ratios=ratios,
        norm_type="weight_norm", kernel_size=sea.kernel_size,
        last_kernel_size=sea.last_kernel_size, residual_kernel_size=sea.residual_kernel_size,
        dilation_growth_rate=sea.dilation_base, use_causal_conv=bool(sea.causal),
        pad_mode=sea.pad_mode, compress=sea.compress, num_lstm_layers=sea.lstm,
        trim_right_ratio=sea.decoder.trim_right_ratio, use_conv_shortcut=not sea.true_skip,
        codebook_size=compression.rvq.bins, codebook_dim=sea.dimension,
    )  # fmt: skip
    # transformers derives the number of codebooks from a bandwidth in kbit/s, rounding down.
    codec.target_bandwidths = [(lm.n_q + 0.5) * codec.frame_rate * codec.codebook_nbits / 1000]
    decoder = MusicgenDecoderConfig(
        vocab_size=special, num_hidden_layers=lm.num_layers, ffn_dim=int(lm.hidden_scale * lm.dim),
        num_attention_heads=lm.num_heads, hidden_size=lm.dim, num_codebooks=lm.n_q,
        activation_function=lm.activation, audio_channels=1, pad_token_id=special,
        bos_token_id=special, eos_token_id=None,
    )  # fmt: skip
    decoder.decoder_start_token_id = special
    return MusicgenConfig(text_encoder=text, audio_encoder=codec, decoder=decoder)


# ---- folders


def to_audiocraft(source: str | Path, out: str | Path) -> None:
    """Write the transformers folder `source` as audiocraft's two checkpoints, with its T5 beside.

    The config names ``t5-base``; load the folder with `AudiocraftModel`, which takes the T5 there.

    Raises:
        OutputError: `out` has contents, or is, holds or lies in `source`.
    """
    with _new(source, out) as made:
        _to_audiocraft(source, made.scratch)
        made.publish()


def _new(source: str | Path, out: str | Path) -> AbstractContextManager[NewFolder]:
    # Models are put into data/models by hand: not refused as the output of a stage.
    return new_folder(out, inputs={"the source": source}, option="OUT", stages=False)


def _to_audiocraft(source: str | Path, folder: Path) -> None:
    hf, tokenizer = load_parts(Path(source), torch.device("cpu"), torch.float32)
    decoder, codec = part_configs(hf.config)
    language, compression = audiocraft_configs(hf, "t5-base")
    weights = decoder_to_audiocraft(hf.state_dict())
    projection = WHOLE[-1][1]
    if f"{projection}weight" not in weights:  # equal widths: transformers leaves it out
        width = decoder.hidden_size
        weights[f"{projection}weight"], weights[f"{projection}bias"] = (
            torch.eye(width),
            torch.zeros(width),
        )
    codec_weights = codec_to_audiocraft(
        hf.audio_encoder.state_dict(), list(codec.upsampling_ratios), codec.num_residual_layers
    )
    for file, state, config in (
        (MODEL_FILE, weights, language),
        (CODEC_FILE, codec_weights, compression),
    ):
        text = OmegaConf.to_yaml(OmegaConf.create(config))
        package = {"best_state": state, "xp.cfg": text, "version": "1.3.0", "exported": True}
        torch.save(package, folder / file)
    hf.text_encoder.save_pretrained(folder / TEXT_FOLDER)
    tokenizer.save_pretrained(folder / TEXT_FOLDER)


def to_transformers(source: str | Path, out: str | Path, text_revision: str | None = None) -> None:
    """Write the audiocraft folder `source` as transformers' save_pretrained does.

    Raises:
        OutputError: `out` has contents, or is, holds or lies in `source`.
        ValueError, KeyError: transformers' MusicGen cannot express the model.
    """
    with _new(source, out) as made:
        _to_transformers(source, made.scratch, text_revision)
        made.publish()


def _to_transformers(source: str | Path, folder: Path, text_revision: str | None) -> None:
    from transformers import MusicgenForConditionalGeneration

    source = Path(source)
    weights, language = read_checkpoint(source / MODEL_FILE)
    codec_weights, compression = read_checkpoint(source / CODEC_FILE)
    check_supported(language, source / MODEL_FILE)
    settle_guidance(language, source / MODEL_FILE)
    place = text_encoder_folder(source, language, text_revision)
    text = load_text_encoder(place)
    config = transformers_config(language, compression, text.config)
    decoder, _ = part_configs(config)
    state = decoder_to_transformers(weights)
    t5 = {k.partition(".t5.")[2]: v for k, v in weights.items() if ".description.t5." in k}
    if t5:
        text.load_state_dict(t5)
    for name, value in text.state_dict().items():
        state[f"text_encoder.{name}"] = value
    for name, value in codec_to_transformers(codec_weights).items():
        # Codebooks beyond those that the language model uses have no place there.
        book = re.match(r"quantizer\.layers\.(\d+)\.", name)
        if not book or int(book[1]) < decoder.num_codebooks:
            state[f"audio_encoder.{name}"] = value
    hf = MusicgenForConditionalGeneration(config).eval()
    if not hasattr(hf, "enc_to_dec_proj"):
        raise ValueError(
            f"{source}: T5 and decoder are both {decoder.hidden_size} wide; transformers "
            "then has no projection between them, audiocraft's always does"
        )
    hf.load_state_dict(state)
    special = decoder.bos_token_id
    generation = hf.generation_config
    generation.decoder_start_token_id = generation.bos_token_id = special
    generation.pad_token_id = special
    generation.do_sample = True
    generation.guidance_scale = float(language.classifier_free_guidance.inference_coef)
    hf.save_pretrained(folder)
    load_tokenizer(place, text.config).save_pretrained(folder)


def main() -> None:
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("direction", choices=["to-audiocraft", "to-transformers"])
    parser.add_argument("source", type=Path, help="folder to read")
    parser.add_argument("out", type=Path, help="folder to write: new, or empty")
    parser.add_argument("--text-revision", help="commit of the T5's hub page (to-transformers)")
    given = parser.parse_args()
    if given.direction == "to-audiocraft":
        to_audiocraft(given.source, given.out)
    else:
        to_transformers(given.source, given.out, given.text_revision)


if __name__ == "__main__":
    run_program(main)
