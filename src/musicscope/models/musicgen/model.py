"""MusicGen in transformers as a `musicscope.models.interface.LanguageModel`.

Two layouts are in use on the hub: ``*.safetensors`` and ``pytorch_model*.bin``, each whole or in
shards with an index. The second is a pickle, read with ``weights_only``, so that a file can name no
object but tensors. Both may spell EnCodec's weight norm the old way (``weight_g``, ``weight_v``)
and hold the table of positions, which newer versions compute.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import MusicgenForConditionalGeneration, PreTrainedTokenizerBase
from transformers.models.encodec.modeling_encodec import EncodecResidualVectorQuantizer

from musicscope.core.precision import tf32
from musicscope.models import checkpoint
from musicscope.models.checkpoint import DeviceMap
from musicscope.models.interface import Batch
from musicscope.models.language_model import by_clip
from musicscope.models.musicgen.decoder import LayerwiseDecoder, part_configs
from musicscope.models.musicgen.delay_pattern import GUIDANCE, DelayPatternModel, modules_of

if TYPE_CHECKING:
    from nnsight import NNsight

# Rounding the codec would change the codes, that is the data; T5 overflows in float16, and its
# states are the same for all precisions of the decoder when it keeps its own.
FLOAT32_PARTS = ("audio_encoder", "text_encoder")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# transformers has no argument for this, only a class attribute; its loader, and what it writes on
# save_pretrained, go by the class name.
_Musicgen = type(
    "MusicgenForConditionalGeneration",
    (MusicgenForConditionalGeneration,),
    {
        "_keep_in_fp32_modules_strict": list(FLOAT32_PARTS),
        "__module__": MusicgenForConditionalGeneration.__module__,
    },
)


def check_folder(folder: Path) -> None:
    """Refuse all but a whole mono text-to-music MusicGen, naming the file and the remedy.

    FileNotFoundError for a missing file, ValueError for melody, stereo and other models.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: not a save_pretrained folder")
    config = checkpoint.read_config(folder)
    kind = config.get("model_type")
    if kind != "musicgen":
        why = (
            "melody conditioning is not supported; take facebook/musicgen-small, -medium or -large"
            if kind == "musicgen_melody"
            else "need musicgen"
        )
        raise ValueError(f"{folder}/config.json is of type {kind!r}: {why}")
    channels = {part: config.get(part, {}).get("audio_channels", 1) for part in
                ("decoder", "audio_encoder")}  # fmt: skip
    if set(channels.values()) != {1}:
        raise ValueError(
            f"{folder} is a stereo MusicGen ({channels} audio channels); only mono models are "
            "supported: take facebook/musicgen-small, -medium or -large"
        )


def load_parts(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    device_map: DeviceMap = None,
    **options: object,
) -> tuple[MusicgenForConditionalGeneration, PreTrainedTokenizerBase]:
    """Load (model, tokenizer) of a save_pretrained folder, frozen.

    The decoder is read in `dtype` (float32, bfloat16 or float16) without a float32 copy of the
    whole; codec and text encoder stay in float32. With a `device_map` ("auto", or module name to
    device, "cpu" or "disk", as accelerate takes it) `device` is not used; `options` such as
    `max_memory` and `offload_folder` go with it.

    Raises:
        FileNotFoundError, ValueError: see `check_folder`; weights that do not fit config.json.
    """
    check_folder(folder)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {[str(d) for d in DTYPES]}, got {dtype}")
    if options and device_map is None:
        raise ValueError(f"{sorted(options)} need a device_map")
    hf = checkpoint.load_pretrained(
        _Musicgen, folder, dtype=dtype, device_map=device_map, **options
    )
    decoder, codec = part_configs(hf.config)
    (quantizer,) = modules_of(
        EncodecResidualVectorQuantizer, [hf.get_submodule("audio_encoder.quantizer")]
    )
    used = quantizer.get_num_quantizers_for_bandwidth(codec.target_bandwidths[0])
    checkpoint.check_codec(
        hf.audio_encoder,
        folder / "config.json",
        (min(used, len(quantizer.layers)), codec.codebook_size),
        (decoder.num_codebooks, decoder.vocab_size),
    )
    tokenizer = checkpoint.load_tokenizer(folder, hf.text_encoder.config)
    check_generation(folder, hf)
    if device_map is None:
        hf.to(device)
    return hf.requires_grad_(False), tokenizer


def check_generation(folder: Path, hf: MusicgenForConditionalGeneration) -> None:
    """Warn of generation settings that the folder lacks; ValueError for another model's."""
    held, (own, _) = hf.generation_config, part_configs(hf.config)
    path, absent = folder / "generation_config.json", []
    if held.decoder_start_token_id not in (None, own.vocab_size):
        raise ValueError(
            f"{path}: decoder_start_token_id is {held.decoder_start_token_id}, the decoder's "
            f"special id is {own.vocab_size}; the file is another model's: {checkpoint.AGAIN}"
        )
    if not held.guidance_scale:
        absent.append(f"guidance_scale ({GUIDANCE} is used)")
    if held.decoder_start_token_id is None:
        absent.append(f"decoder_start_token_id (the decoder's bos_token_id {own.bos_token_id} is)")
    if absent:
        state = "lacks" if path.is_file() else "is missing, and with it"
        warnings.warn(f"{path} {state} {', '.join(absent)}", stacklevel=3)


class MusicgenModel(DelayPatternModel):
    """`LanguageModel` over `MusicgenForConditionalGeneration`; `.hf` is the model itself.

    Mono text-to-music models only (small, medium, large).
    """

    def __init__(
        self, hf: MusicgenForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, name: str
    ) -> None:
        self.hf, self.codec = hf.eval(), hf.audio_encoder
        self.text_encoder, self.tokenizer = hf.text_encoder, tokenizer
        decoder, codec = part_configs(hf.config)
        start = hf.generation_config.decoder_start_token_id
        super().__init__(
            name,
            LayerwiseDecoder(hf),
            sample_rate=codec.sampling_rate,
            frame_rate=codec.sampling_rate / math.prod(codec.upsampling_ratios),
            width=decoder.hidden_size,
            card=decoder.vocab_size,
            # Every MusicGen's decoder has a bos_token_id; only its class allows None.
            special=decoder.bos_token_id if start is None else start,  # ty: ignore[invalid-argument-type]
            guidance_scale=float(hf.generation_config.guidance_scale or GUIDANCE),
        )

    @classmethod
    def load(
        cls,
        source: Path,
        device: torch.device,
        dtype: torch.dtype,
        device_map: DeviceMap = None,
        **options: object,
    ) -> MusicgenModel:
        """Load a save_pretrained folder; see `load_parts`."""
        hf, tokenizer = load_parts(source, device, dtype, device_map, **options)
        return cls(hf, tokenizer, source.name)

    @property
    def modules(self) -> tuple[torch.nn.Module, ...]:
        return (self.hf,)

    @torch.no_grad()
    @tf32(False, False)  # rounding would change the codes
    def encode_signal(self, signal: Tensor) -> Tensor:
        codes = self.hf.audio_encoder.encode(signal[:, None]).audio_codes
        if codes.shape[0] != 1:
            raise ValueError(
                f"{self.name}: the codec gave {codes.shape[0]} chunks, need one; check "
                "chunk_length_s in the audio_encoder section of its config.json"
            )
        return codes[0]

    @torch.no_grad()
    def codec_latents(self, codes: Tensor) -> Tensor:
        codes = codes.to(self.device).transpose(0, 1)
        return self.hf.audio_encoder.quantizer.decode(codes).transpose(1, 2)

    @torch.no_grad()
    @tf32(False, False)
    def decode(self, codes: Tensor) -> Tensor:
        decode, parts = self.hf.audio_encoder.decode, by_clip(codes.to(self.device))
        return torch.cat([decode(part[None], [None]).audio_values[:, 0] for part in parts])

    def trace(self, batch: Batch) -> tuple[NNsight, dict[str, object]]:
        """Give an nnsight view of the model, and the inputs with which it repeats `forward`.

        For interactive work, see docs/models.md; the stages use hooks.
        Importing nnsight puts `.save` on every Python object; hence the late import.
        """
        try:
            from nnsight import NNsight
        except ImportError as error:
            raise ImportError("trace needs nnsight: pip install nnsight==0.8.1") from error
        ids = self.sequence(batch)
        inputs = {
            "encoder_outputs": (batch.text,),
            "attention_mask": batch.text_mask,
            "decoder_input_ids": ids.reshape(-1, ids.shape[-1]),
        }
        return NNsight(self.hf), inputs
