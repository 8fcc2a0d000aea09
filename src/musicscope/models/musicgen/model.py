"""MusicGen in transformers as a `musicscope.models.interface.LanguageModel`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MusicgenForConditionalGeneration

from musicscope.models.interface import Batch
from musicscope.models.language_model import by_clip
from musicscope.models.musicgen.decoder import LayerwiseDecoder, part_configs
from musicscope.models.musicgen.delay_pattern import DelayPatternModel, text_states
from musicscope.models.musicgen.loading import load_parts, main_device


class MusicgenModel(DelayPatternModel):
    """`LanguageModel` over `MusicgenForConditionalGeneration`; `.hf` is the model itself.

    Mono text-to-music models only (small, medium, large).
    """

    def __init__(self, hf: MusicgenForConditionalGeneration, tokenizer: Any, name: str) -> None:
        self.hf, self.codec, self.tokenizer = hf.eval(), hf.audio_encoder, tokenizer
        decoder, codec = part_configs(hf.config)
        if decoder.audio_channels != 1 or codec.audio_channels != 1:
            raise ValueError(f"{name} is a stereo MusicGen; only mono models are supported")
        start = hf.generation_config.decoder_start_token_id
        super().__init__(
            name,
            LayerwiseDecoder(hf),
            device=main_device(hf),
            sample_rate=codec.sampling_rate,
            frame_rate=codec.sampling_rate / math.prod(codec.upsampling_ratios),
            num_codebooks=decoder.num_codebooks,
            width=decoder.hidden_size,
            card=decoder.vocab_size,
            special=decoder.bos_token_id if start is None else start,  # ty: ignore[invalid-argument-type]
            guidance_scale=float(hf.generation_config.guidance_scale or 3.0),
        )

    @classmethod
    def load(
        cls,
        source: Path,
        device: torch.device,
        dtype: torch.dtype,
        device_map: str | dict[str, Any] | None = None,
        **options: Any,
    ) -> MusicgenModel:
        """Load a save_pretrained folder; see `musicscope.models.musicgen.loading.load_parts`."""
        hf, tokenizer = load_parts(source, device, dtype, device_map, **options)
        return cls(hf, tokenizer, source.name)

    @property
    def modules(self) -> tuple[torch.nn.Module, ...]:
        return (self.hf,)

    @torch.no_grad()
    def encode_signal(self, signal: Tensor) -> Tensor:
        codes = self.hf.audio_encoder.encode(signal[:, None]).audio_codes
        if codes.shape[0] != 1 or codes.shape[2] != self.num_codebooks:
            raise ValueError(
                f"{self.name}: the codec gave codes {list(codes.shape)}, need one chunk of "
                f"{self.num_codebooks} codebooks; check chunk_length_s and target_bandwidths[0] "
                "in the audio_encoder section of its config.json"
            )
        return codes[0]

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """T5 states [B, L, d_text] in the decoder's dtype and mask [B, L]; zeros for None."""
        text, mask = text_states(self.tokenizer, self.hf.text_encoder, captions, self.device)
        return text.to(self.decoder.dtype), mask

    @torch.no_grad()
    def codec_latents(self, codes: Tensor) -> Tensor:
        codes = codes.to(self.device).transpose(0, 1)
        return self.hf.audio_encoder.quantizer.decode(codes).transpose(1, 2)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        decode, parts = self.hf.audio_encoder.decode, by_clip(codes.to(self.device))
        return torch.cat([decode(part[None], [None]).audio_values[:, 0] for part in parts])

    def trace(self, batch: Batch) -> tuple[Any, dict[str, Any]]:
        """Give an nnsight view of the model, and the inputs with which it repeats `forward`.

        For interactive work; the stages use hooks. Needs ``pip install nnsight``. Put it in a file
        or a notebook cell (nnsight reads the source of the block)::

            view, inputs = model.trace(batch)
            layers = view.decoder.model.decoder.layers
            with torch.no_grad(), view.trace(**inputs):
                seen = layers[3].output.save()          # ask for layers in forward order
                layers[4].output = layers[4].output * 0 # and change them
                logits = view.output.logits.save()      # [B * K, S, card], not aligned
            frames = seen[:, 1 : batch.frames + 1]      # == model.capture(batch, ["layers.3"])

        To follow generation, loop without a bound and take the result in a second invoke:
        transformers 5 runs the first decoder step twice, so `tracer.iter[:N]` misses the last::

            with view.trace(fn="generate") as tracer:
                with tracer.invoke(input_ids=ids, attention_mask=mask, max_new_tokens=100):
                    for step in tracer.iter[:]:
                        layers[3].output = layers[3].output + direction
                with tracer.invoke():
                    audio = tracer.result.save()

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
