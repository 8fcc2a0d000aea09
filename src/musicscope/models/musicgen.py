"""MusicGen in transformers behind `musicscope.models.MusicModel`.

Conventions of the sequence are in `musicscope.models.musicgen_decoder`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, MusicgenForConditionalGeneration

from musicscope.models import Batch, Hook, HookPoint
from musicscope.models.musicgen_decoder import Context, LayerwiseDecoder, delayed
from musicscope.models.musicgen_generation import generate

Hooks = dict[str, Hook] | None


class MusicgenModel:
    """`MusicModel` over `MusicgenForConditionalGeneration`; `.hf` is the model itself.

    Mono models only. All methods run without autograd and return ordinary tensors.
    """

    def __init__(self, hf: MusicgenForConditionalGeneration, tokenizer: Any, name: str) -> None:
        self.hf, self.tokenizer, self.name = hf.eval(), tokenizer, name
        decoder, codec = hf.config.decoder, hf.config.audio_encoder
        if decoder.audio_channels != 1 or codec.audio_channels != 1:
            raise ValueError(f"{name} is a stereo MusicGen; only mono models are supported")
        self.sample_rate: int = codec.sampling_rate
        self.frame_rate: float = codec.sampling_rate / math.prod(codec.upsampling_ratios)
        self.num_codebooks: int = decoder.num_codebooks
        self.num_layers: int = decoder.num_hidden_layers
        self.width: int = decoder.hidden_size
        self.card: int = decoder.vocab_size
        self.hook_points = tuple(
            HookPoint(f"layers.{i}", decoder.hidden_size) for i in range(self.num_layers)
        )
        start = hf.generation_config.decoder_start_token_id
        self.special: int = decoder.bos_token_id if start is None else start
        self.conditional_rows = slice(None)
        self.decoder = LayerwiseDecoder(hf)
        self._index = {point.name: i for i, point in enumerate(self.hook_points)}

    @classmethod
    def load(
        cls, source: str | Path, device: torch.device, dtype: torch.dtype, revision: str | None
    ) -> MusicgenModel:
        """From a save_pretrained folder or a hub id; see `musicscope.models.load_model`."""
        # A folder must not be looked up on the hub when one of its files is missing.
        where = {"local_files_only": True} if isinstance(source, Path) else {"revision": revision}
        hf = MusicgenForConditionalGeneration.from_pretrained(source, dtype=torch.float32, **where)
        # The codec stays in float32: rounding it would change the codes, that is the data.
        for name, part in hf.named_children():
            if name != "audio_encoder":
                part.to(dtype)
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
        return cls(hf.to(device).requires_grad_(False), tokenizer, Path(source).name)

    @property
    def layer_calls(self) -> int:
        """Layer evaluations since loading."""
        return self.decoder.calls

    @property
    def device(self) -> torch.device:
        return self.hf.device

    # ---- inputs

    @torch.no_grad()
    def encode(self, audio: Tensor | np.ndarray, captions: Sequence[str | None]) -> Batch:
        """Audio [B, n] float at `sample_rate` through EnCodec, captions through T5, once.

        ValueError for another shape, for NaN or infinity, and for a caption count other than B.
        """
        audio = torch.as_tensor(audio)
        if audio.ndim != 2 or 0 in audio.shape:
            raise ValueError(f"audio must be [clips, samples], got {list(audio.shape)}")
        if not audio.is_floating_point():
            raise ValueError(f"audio must be floating point in -1..1, got {audio.dtype}")
        finite = torch.isfinite(audio).all(1)
        if not finite.all():
            bad = torch.nonzero(~finite).flatten().tolist()
            raise ValueError(f"audio holds NaN or infinity in rows {bad}")
        signal = audio.to(self.device, self.hf.audio_encoder.dtype)[:, None]
        # One clip at a time on a CPU: its waveform-sized activations then stay in cache (1.4 times
        # as fast as 8 together), and a clip's codes do not depend on what else is in the batch.
        parts = signal.split(1 if self.device.type == "cpu" else len(signal))
        encoder = self.hf.audio_encoder
        codes = torch.cat([encoder.encode(part).audio_codes for part in parts], dim=1)
        if codes.shape[0] != 1 or codes.shape[2] != self.num_codebooks:
            raise ValueError(
                f"{self.name}: the codec gave codes {list(codes.shape)}, need one chunk of "
                f"{self.num_codebooks} codebooks; check chunk_length_s and target_bandwidths[0] "
                "in the audio_encoder section of its config.json"
            )
        return self.with_captions(codes[0], captions)

    @torch.no_grad()
    def with_captions(self, codes: Tensor, captions: Sequence[str | None]) -> Batch:
        """A batch from codes [B, K, T] that are there already (generated, edited, stored)."""
        codes = codes.to(self.device, torch.int64)
        if codes.ndim != 3 or codes.shape[1] != self.num_codebooks or codes.shape[2] == 0:
            raise ValueError(
                f"codes must be [clips, {self.num_codebooks}, frames], got {list(codes.shape)}"
            )
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= self.card):
            raise ValueError(f"codes must lie in 0..{self.card - 1}")
        if isinstance(captions, str) or len(captions) != len(codes):
            raise ValueError(f"need one caption (or None) for each of {len(codes)} clips")
        return Batch(codes, *self.encode_text(captions), tuple(captions))

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """T5 states [B, L, d_text] and mask [B, L]; zero states and zero mask for None.

        That is what generate() uses for the unconditional half of guidance.
        """
        known = [i for i, caption in enumerate(captions) if caption is not None]
        if not known:
            width = self.hf.config.text_encoder.hidden_size
            text = torch.zeros(
                len(captions), 1, width, device=self.device, dtype=self.hf.text_encoder.dtype
            )
            return text, torch.zeros(len(captions), 1, device=self.device, dtype=torch.int64)
        tokens = self.tokenizer([captions[i] for i in known], padding=True, return_tensors="pt").to(
            self.device
        )
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        states = self.hf.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        text = states.new_zeros(len(captions), *states.shape[1:])
        text_mask = mask.new_zeros(len(captions), mask.shape[1])
        text[known], text_mask[known] = states, mask
        return text, text_mask

    def sequence(self, batch: Batch) -> Tensor:
        """Decoder input ids [B, K, S]: start column and delay pattern, S = T + K - 1.

        The last column is predicted, never fed. (With one codebook it is fed too: frame T - 1 has
        its position there.)
        """
        sequence = delayed(batch.codes, self.special)
        return sequence[..., : max(batch.frames + self.num_codebooks - 1, batch.frames + 1)]

    def _layer(self, name: str) -> int:
        if name not in self._index:
            raise ValueError(f"{self.name} has no hook point {name!r}; known: {list(self._index)}")
        return self._index[name]

    def by_layer(self, hooks: Hooks) -> dict[int, Hook]:
        return {self._layer(name): hook for name, hook in (hooks or {}).items()}

    def _begin(self, batch: Batch) -> tuple[Tensor, Context]:
        hidden = self.decoder.embed(self.sequence(batch))
        return hidden, self.decoder.context(hidden, batch.text, batch.text_mask)

    # ---- teacher forcing

    @torch.no_grad()
    def forward(
        self, batch: Batch, hooks: Hooks = None, stop_after: str | None = None
    ) -> Tensor | None:
        """Logits [B, K, T, card], [b, k, t] predicting codes[b, k, t].

        With `stop_after` the layers behind that hook point do not run and None comes back.
        """
        last = None if stop_after is None else self._layer(stop_after)
        wanted = self.by_layer(hooks)
        hidden, context = self._begin(batch)
        hidden = self.decoder.run(hidden, context, wanted, last=last)
        return self.decoder.logits(hidden, batch.frames) if stop_after is None else None

    def capture(self, batch: Batch, names: Sequence[str], hooks: Hooks = None) -> dict[str, Tensor]:
        """Activations {name: [B, T, d]} from one pass that ends after the deepest layer named.

        Frame t is sequence position t + 1. With `hooks`, activations are read after them.
        """
        if not names:
            raise ValueError("capture needs at least one hook point")
        wanted, found = self.by_layer(hooks), {}

        def reader(name: str) -> Hook:
            edit = wanted.get(self._layer(name))

            def read(activations: Tensor, positions: Tensor) -> Tensor:
                if edit is not None:
                    activations = edit(activations, positions)
                found[name] = activations[:, 1 : batch.frames + 1]
                return activations

            return read

        deepest = max(names, key=self._layer)
        self.forward(batch, {**(hooks or {}), **{n: reader(n) for n in names}}, deepest)
        return {name: found[name] for name in names}

    @torch.no_grad()
    def layer_inputs(self, batch: Batch) -> list[Tensor]:
        """L + 1 tensors [B, S, d]: the input of every layer and the last layer's output."""
        hidden, context = self._begin(batch)
        inputs: list[Tensor] = []
        output = self.decoder.run(hidden, context, {}, inputs=inputs)
        return [*inputs, output]

    @torch.no_grad()
    def forward_from(self, batch: Batch, layer: int, hidden: Tensor, hooks: Hooks = None) -> Tensor:
        """Logits [B, K, T, card] from the input `hidden` [B, S, d] of layer `layer`.

        `layer` may be L: then only the final norm and the heads run. Hooks of earlier layers are
        an error, since they could not act.
        """
        if not 0 <= layer <= self.num_layers:
            raise ValueError(f"{self.name} has layers 0..{self.num_layers - 1}, got {layer}")
        wanted = self.by_layer(hooks)
        if wanted and min(wanted) < layer:
            raise ValueError(f"a hook at layers.{min(wanted)} cannot act: starting at {layer}")
        context = self.decoder.context(hidden, batch.text, batch.text_mask)
        return self.decoder.logits(
            self.decoder.run(hidden, context, wanted, first=layer), batch.frames
        )

    @torch.no_grad()
    def cross_entropy(self, batch: Batch, hooks: Hooks = None) -> Tensor:
        """-log p(codes) [B, K, T] in nats, float32."""
        logits = self.forward(batch, hooks).float()
        return F.cross_entropy(logits.flatten(0, 2), batch.codes.flatten(), reduction="none").view(
            batch.codes.shape
        )

    # ---- generation and tracing

    def generate(
        self,
        captions: Sequence[str | None],
        seconds: float,
        seed: int,
        hooks: Hooks = None,
        guidance_scale: float = 3.0,
        temperature: float = 1.0,
        top_k: int = 250,
    ) -> tuple[Tensor, Tensor]:
        """Audio [B, n] and codes [B, K, T]; see `musicscope.models.musicgen_generation`."""
        return generate(self, captions, seconds, seed, hooks, guidance_scale, temperature, top_k)

    @torch.no_grad()
    def codec_latents(self, codes: Tensor) -> Tensor:
        """EnCodec's quantised latents [B, T, D] of codes [B, K, T]: sums of code embeddings."""
        codes = codes.to(self.device).transpose(0, 1)
        return self.hf.audio_encoder.quantizer.decode(codes).transpose(1, 2)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, K, T] to audio [B, n] through EnCodec."""
        codes = codes.to(self.device)
        return self.hf.audio_encoder.decode(codes[None], [None]).audio_values[:, 0]

    def trace(self, batch: Batch) -> tuple[Any, dict[str, Any]]:
        """An nnsight view of the model and the inputs that make it see `batch` as `forward` does.

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
