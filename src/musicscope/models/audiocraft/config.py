"""Convert the settings of a MusicGen between audiocraft and transformers, for `convert`."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig


def audiocraft_configs(hf: Any, text_name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make (config of the language model, config of the codec) for a transformers MusicGen."""
    decoder, codec = hf.config.decoder, hf.config.audio_encoder
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


def transformers_config(language: DictConfig, compression: DictConfig, text: Any) -> Any:
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
