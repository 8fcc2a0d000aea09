"""YuE stage 1 (Yuan et al. 2025, arXiv 2503.08638) behind `musicscope.models.interface.MusicModel`.

A Llama writes two tracks of xcodec codes in turn, vocal and instrumental, 50 frames a second each.
"Codebook" 0 of the interface is the vocal track, 1 the instrumental one; both use the first xcodec
codebook only. Frames are the instrumental positions; sequence layout, and what hooks are told about
positions, are in `musicscope.models.yue.decoder`, ids and template in `yue_tokens`.

Stage 2 (codebooks 1..7) and the upsampler are out of scope: they add sound quality, not content.
Audio is decoded from the one codebook of stage 1, good enough to listen to.

A caption stands where YuE has its genre tags, in a piece of one segment without words. None means
no text at all: the sequence begins with `<xcodec>`, as in the unconditional half of guidance.

Folder layout (as on the hub, and two additions)::

    config.json, generation_config.json, model-0000i-of-0000n.safetensors, ...
    tokenizer.model         if the hub page has none: from the authors' code, see yue_tokens
    xcodec/                 the codec for transformers' XcodecModel, such as hub id Manel/YuE-XCodec
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM, XcodecModel

from musicscope.models.interface import Batch, Hook, HookPoint
from musicscope.models.yue import codec as yue_codec
from musicscope.models.yue import decoder as yue_decoder
from musicscope.models.yue import generation, tokens
from musicscope.models.yue import gradient as yue_gradient

Hooks = dict[str, Hook] | None


class YueModel:
    """`MusicModel` over `LlamaForCausalLM`; `.hf` is the Llama, `.codec` the XcodecModel.

    All methods run without autograd and return ordinary tensors. `segment` is the lyric text of
    the one segment, with its section head.
    """

    gradient = yue_gradient  # what a search over tokens needs

    def __init__(
        self,
        hf: LlamaForCausalLM,
        codec: XcodecModel,
        tokenize: tokens.Tokenize,
        name: str,
        segment: str = tokens.INSTRUMENTAL,
    ) -> None:
        if hf.config.vocab_size < tokens.PIECES or "-s2-" in name.lower():
            raise ValueError(
                f"{name} with {hf.config.vocab_size} logits is not YuE stage 1, which has at least "
                f"{tokens.PIECES} (m-a-p/YuE-s1-7B-anneal-en-cot); stage 2 is not supported"
            )
        # The mask of padded prompts needs an attention that takes one.
        hf.set_attn_implementation("sdpa")
        self.hf, self.codec, self.tokenize = hf.eval(), codec.eval(), tokenize
        self.name, self.segment, self.conditional_rows = name, segment, slice(None)
        self.sample_rate: int = yue_codec.SAMPLE_RATE
        self.frame_rate: float = yue_codec.SAMPLE_RATE / yue_codec.HOP
        self.num_codebooks, self.card = len(tokens.TRACKS), tokens.CARD
        self.num_position_groups = yue_decoder.NUM_POSITION_GROUPS
        self.num_layers, self.width = hf.config.num_hidden_layers, hf.config.hidden_size
        self.decoder = yue_decoder.LayerwiseLlama(hf)
        self._index = {f"layers.{i}": i for i in range(self.num_layers)}
        self.hook_points = tuple(HookPoint(name, self.width) for name in self._index)
        self._silence: dict[int, Tensor] = {}

    @classmethod
    def load(
        cls,
        source: str | Path,
        device: torch.device,
        dtype: torch.dtype,
        codec: str | Path | None = None,
        tokenizer: str | Path | None = None,
        device_map: str | dict[str, Any] | None = None,
        **options: Any,
    ) -> YueModel:
        """From a folder laid out as above; see `musicscope.models.registry.load_model`.

        `codec` and `tokenizer` name them elsewhere. `device_map` ("auto", or modules to devices)
        spreads the Llama through accelerate; codec, inputs and results stay on `device`, the codec
        in float32 whatever `dtype`. `options` go to from_pretrained, such as `offload_folder`.
        """
        source = Path(source)
        audio = yue_codec.load_codec(codec or source / "xcodec", device)
        tokenize = tokens.load_tokenizer(tokenizer or source / "tokenizer.model")
        if device_map is None and device.type != "cpu":
            device_map = {"": device}  # never whole in main memory
        hf = LlamaForCausalLM.from_pretrained(
            source, dtype=dtype, device_map=device_map, local_files_only=True, **options
        )
        return cls(hf.requires_grad_(False), audio, tokenize, source.name)

    @property
    def layer_calls(self) -> int:
        return self.decoder.calls

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters and buffers, the codec's included."""
        parts = (*self.hf.parameters(), *self.hf.buffers(), *self.codec.state_dict().values())
        return sum(part.nbytes for part in parts)

    @property
    def device(self) -> torch.device:
        """Where inputs and results are; layers may be elsewhere (`device_map`)."""
        return self.codec.device

    # ---- inputs

    @torch.no_grad()
    def encode(
        self,
        audio: Tensor | np.ndarray,
        captions: Sequence[str | None],
        vocals: Tensor | np.ndarray | None = None,
    ) -> Batch:
        """Audio [B, n] float at 16 kHz through xcodec, captions through the tokenizer.

        With `vocals` [B, n], `audio` is the instrumental stem. Without, `audio` is a whole mix: it
        is given as the instrumental track, with the codec's own codes for silence as the vocal
        one. YuE was trained on separated stems, so a mix with singing is off its distribution.
        ValueError for another shape, for NaN or infinity, and for a caption count other than B.
        """
        instrumental = yue_codec.encode_track(self.codec, audio)
        if vocals is None:
            vocal = self.silence(instrumental.shape[1]).expand_as(instrumental)
        else:
            vocal = yue_codec.encode_track(self.codec, vocals)
            if vocal.shape != instrumental.shape:
                raise ValueError("vocals and audio must have the same number of clips and samples")
        return self.with_captions(torch.stack([vocal, instrumental], 1), captions)

    def silence(self, frames: int) -> Tensor:
        """The codec's codes [T] of silence, computed once for each length."""
        if frames not in self._silence:
            self._silence[frames] = yue_codec.silence(self.codec, frames)
        return self._silence[frames]

    @torch.no_grad()
    def with_captions(self, codes: Tensor, captions: Sequence[str | None]) -> Batch:
        """A batch from codes [B, 2, T] (vocal, instrumental) that are there already.

        `text` of the batch holds the prompts' ids [B, L], `text_mask` 0 where padded on the left.
        """
        codes = codes.to(self.device, torch.int64)
        tokens.interleave(codes)  # refuses other shapes and values
        if isinstance(captions, str) or len(captions) != len(codes):
            raise ValueError(f"need one caption (or None) for each of {len(codes)} clips")
        text, mask = self.encode_text(captions)
        self.decoder.check_length(text.shape[1], codes.shape[2])
        return Batch(codes, text, mask, tuple(captions))

    def encode_text(self, captions: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """Prompts: ids [B, L] and mask [B, L], padded on the left; `<xcodec>` alone for None."""
        none = [tokens.XCODEC]
        ids, mask = tokens.left_padded(
            none if text is None else tokens.prompt_ids(self.tokenize, text, self.segment)
            for text in captions
        )
        return ids.to(self.device), mask.to(self.device)

    def sequence(self, batch: Batch) -> Tensor:
        """Llama input ids [B, P + 2T]: prompt (padding is id 0), then v0 i0 v1 i1 ..."""
        return torch.cat([batch.text, tokens.interleave(batch.codes)], 1)

    def positions(self, batch: Batch) -> Tensor:
        """What hooks are told [P + 2T]: 0 in the prompt, -(t + 1) at v_t, t + 1 at frame t."""
        return yue_decoder.frame_labels(batch.text.shape[1], 2 * batch.frames).to(self.device)

    def position_groups(self, batch: Batch) -> Tensor:
        """[B, P + 2T]: which positions share a mean, see `yue_decoder.position_groups`."""
        return yue_decoder.position_groups(batch.text_mask, 2 * batch.frames)

    def _layer(self, name: str) -> int:
        if name not in self._index:
            raise ValueError(f"{self.name} has no hook point {name!r}; known: {list(self._index)}")
        return self._index[name]

    def by_layer(self, hooks: Hooks) -> dict[int, Hook]:
        return {self._layer(name): hook for name, hook in (hooks or {}).items()}

    def context(self, hidden: Tensor, batch: Batch) -> yue_decoder.Context:
        """What every layer needs besides the stream `hidden` [B, P + 2T, d]."""
        codes = batch.text_mask.new_ones(len(batch), 2 * batch.frames)
        valid = torch.cat([batch.text_mask, codes], 1)
        return self.decoder.context(hidden, self.positions(batch), valid)

    # ---- teacher forcing

    @torch.no_grad()
    def forward(
        self, batch: Batch, hooks: Hooks = None, stop_after: str | None = None
    ) -> Tensor | None:
        """Logits [B, 2, T, 1024], [b, k, t] predicting codes[b, k, t], among codes of stage 1.

        With `stop_after` the layers behind that hook point do not run and None comes back.
        """
        last = None if stop_after is None else self._layer(stop_after)
        wanted, hidden = self.by_layer(hooks), self.decoder.embed(self.sequence(batch))
        hidden = self.decoder.run(hidden, self.context(hidden, batch), wanted, last=last)
        if stop_after is not None:
            return None
        return self.decoder.logits(hidden, batch.frames).to(self.device)

    def capture(self, batch: Batch, names: Sequence[str], hooks: Hooks = None) -> dict[str, Tensor]:
        """Activations {name: [B, T, d]} from one pass that ends after the deepest layer named.

        Frame t is the position of its instrumental code. With `hooks`, read after them.
        """
        if not names:
            raise ValueError("capture needs at least one hook point")
        wanted, found = self.by_layer(hooks), {}

        def reader(name: str) -> Hook:
            edit = wanted.get(self._layer(name))

            def read(activations: Tensor, positions: Tensor) -> Tensor:
                if edit is not None:
                    activations = edit(activations, positions)
                found[name] = activations[:, positions > 0].to(self.device)
                return activations

            return read

        deepest = max(names, key=self._layer)
        self.forward(batch, {**(hooks or {}), **{n: reader(n) for n in names}}, deepest)
        return {name: found[name] for name in names}

    @torch.no_grad()
    def layer_inputs(self, batch: Batch) -> list[Tensor]:
        """L + 1 tensors [B, P + 2T, d]: the input of every layer and the last layer's output."""
        hidden = self.decoder.embed(self.sequence(batch))
        inputs: list[Tensor] = []
        output = self.decoder.run(hidden, self.context(hidden, batch), {}, inputs=inputs)
        return [stream.to(self.device) for stream in [*inputs, output]]

    @torch.no_grad()
    def forward_from(self, batch: Batch, layer: int, hidden: Tensor, hooks: Hooks = None) -> Tensor:
        """Logits [B, 2, T, 1024] from the input `hidden` [B, P + 2T, d] of layer `layer`.

        `layer` may be L: then only the final norm and the head run. Hooks of earlier layers are
        an error, since they could not act.
        """
        if not 0 <= layer <= self.num_layers:
            raise ValueError(f"{self.name} has layers 0..{self.num_layers - 1}, got {layer}")
        wanted = self.by_layer(hooks)
        if wanted and min(wanted) < layer:
            raise ValueError(f"a hook at layers.{min(wanted)} cannot act: starting at {layer}")
        hidden = self.decoder.run(hidden, self.context(hidden, batch), wanted, first=layer)
        return self.decoder.logits(hidden, batch.frames).to(self.device)

    @torch.no_grad()
    def cross_entropy(self, batch: Batch, hooks: Hooks = None) -> Tensor:
        """-log p(codes) [B, 2, T] in nats, float32, p among the 1,024 codes of stage 1.

        Ids that are no codes, which generation forbids, have no share in p.
        """
        logits = self.forward(batch, hooks).float().movedim(-1, 1)
        return F.cross_entropy(logits, batch.codes, reduction="none")

    # ---- generation and listening

    def generate(
        self,
        captions: Sequence[str | None],
        seconds: float,
        seed: int,
        hooks: Hooks = None,
        guidance_scale: float = generation.GUIDANCE[0],
        temperature: float = 1.0,
        top_k: int = generation.TOP_K,
        top_p: float = generation.TOP_P,
        repetition_penalty: float = generation.REPETITION_PENALTY,
    ) -> tuple[Tensor, Tensor]:
        """Audio [B, n] and codes [B, 2, T]; see `musicscope.models.yue.generation`."""
        sampling = (guidance_scale, temperature, top_k, top_p, repetition_penalty)
        return generation.generate(self, captions, seconds, seed, hooks, *sampling)

    def codec_latents(self, codes: Tensor) -> Tensor:
        """xcodec's quantised latents [B, T, D] of the instrumental track of codes [B, 2, T]."""
        return yue_codec.latents(self.codec, codes[:, 1])

    def decode_tracks(self, codes: Tensor) -> Tensor:
        """Codes [B, 2, T] to the audio [B, 2, n] of vocal and instrumental track."""
        return yue_codec.decode_tracks(self.codec, codes)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, 2, T] to audio [B, n], the sum of the tracks (which may exceed -1..1)."""
        return self.decode_tracks(codes).sum(1)
