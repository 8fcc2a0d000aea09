"""YuE stage 1 (Yuan et al. 2025, arXiv 2503.08638) as a `LanguageModel`.

A Llama writes two tracks of xcodec codes in turn, vocal and instrumental, 50 frames per second
each. "Codebook" 0 of the interface is the vocal track, 1 the instrumental one; both use the first
xcodec codebook only. Frames are the instrumental positions. The sequence layout and the labels that
hooks get are in `musicscope.models.yue.decoder`, ids and template in `yue.tokens`.

Stage 2 (codebooks 1..7) and the upsampler are out of scope: they add sound quality, not content.
Audio is decoded from the one codebook of stage 1, good enough to listen to.

A caption takes the place of YuE's genre tags, in a song of one segment without words. None means no
text at all: the sequence begins with `<xcodec>`, as in the unconditional half of guidance.

Folder layout (as on the hub, and two additions)::

    config.json, generation_config.json, model-0000i-of-0000n.safetensors, ...
    tokenizer.model         if the hub page has none: from the authors' code, see yue.tokens
    xcodec/                 the codec for transformers' XcodecModel, such as hub id Manel/YuE-XCodec
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, XcodecModel
from transformers.cache_utils import DynamicCache

from musicscope.models import checkpoint
from musicscope.models.interface import Batch, Hooks, check_audio
from musicscope.models.language_model import LayerwiseModel, by_clip, run_layers
from musicscope.models.yue import codec as yue_codec
from musicscope.models.yue import decoder as yue_decoder
from musicscope.models.yue import tokens

GUIDANCE = 1.5
"""Scale of the released script in the first segment of a song (later ones: 1.2)."""
TOP_K, TOP_P, REPETITION_PENALTY = 50, 0.93, 1.1


class YueModel(LayerwiseModel):
    """`LanguageModel` over `LlamaForCausalLM`; `.hf` is the Llama, `.codec` the XcodecModel.

    `segment` is the lyric text of the one segment, with its section head.

    Both tracks can be searched, as the model writes both. Audio fills one of them only: `encode`
    takes a mix for the instrumental track and silence for the vocal one (`first_encoded`).
    """

    num_position_groups = yue_decoder.NUM_POSITION_GROUPS
    plain_sampling = {"guidance_scale": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    first_encoded = 1

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
        self.segment = segment
        self._silence: dict[int, Tensor] = {}
        super().__init__(
            name,
            yue_decoder.LayerwiseLlama(hf),
            device=codec.device,
            sample_rate=yue_codec.SAMPLE_RATE,
            frame_rate=yue_codec.SAMPLE_RATE / yue_codec.HOP,
            num_codebooks=len(tokens.TRACKS),
            width=hf.config.hidden_size,
            card=tokens.CARD,
        )

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
        """Load a folder laid out as above; see `musicscope.models.registry.load_model`.

        `codec` and `tokenizer` name them elsewhere. `device_map` ("auto", or modules to devices)
        spreads the Llama through accelerate; codec, inputs and results stay on `device`, the codec
        in float32 whatever `dtype`. `options` go to from_pretrained, such as `offload_folder`.
        """
        source = Path(source)
        audio = yue_codec.load_codec(codec or source / "xcodec", device)
        tokenize = tokens.load_tokenizer(tokenizer or source / "tokenizer.model")
        if device_map is None and device.type != "cpu":
            device_map = {"": device}  # never whole in main memory
        hf = checkpoint.load_pretrained(
            LlamaForCausalLM, source, dtype=dtype, device_map=device_map, **options
        )
        return cls(hf.requires_grad_(False), audio, tokenize, source.name)

    @property
    def modules(self) -> tuple[torch.nn.Module, ...]:
        return self.hf, self.codec

    # ---- inputs

    @torch.no_grad()
    def encode(
        self,
        audio: Tensor | np.ndarray,
        captions: Sequence[str | None],
        vocals: Tensor | np.ndarray | None = None,
    ) -> Batch:
        """Run audio [B, n] float at 16 kHz through xcodec, captions through the tokenizer.

        With `vocals` [B, n], `audio` is the instrumental stem. Without, `audio` is a whole mix: it
        becomes the instrumental track, with the codec's own codes for silence as the vocal one.
        YuE was trained on separated stems, so a mix with singing is off its distribution.
        ValueError for another shape, for NaN or infinity, and for a caption count other than B.
        """
        instrumental = self._track(audio)
        if vocals is None:
            vocal = self.silence(instrumental.shape[1]).expand_as(instrumental)
        else:
            vocal = self._track(vocals)
            if vocal.shape != instrumental.shape:
                raise ValueError("vocals and audio must have the same number of clips and samples")
        return self.with_captions(torch.stack([vocal, instrumental], 1), captions)

    def _track(self, audio: Tensor | np.ndarray) -> Tensor:
        parts = by_clip(check_audio(audio).to(self.device))
        return torch.cat([yue_codec.encode_track(self.codec, part) for part in parts])

    def silence(self, frames: int) -> Tensor:
        """The codec's codes [T] of silence (not always one code throughout), kept per length."""
        if frames not in self._silence:
            self._silence[frames] = self._track(torch.zeros(1, frames * yue_codec.HOP))[0]
        return self._silence[frames]

    @torch.no_grad()
    def with_captions(self, codes: Tensor, captions: Sequence[str | None]) -> Batch:
        """Make a batch of existing codes [B, 2, T] (vocal, instrumental).

        `text` of the batch holds the prompts' ids [B, L], `text_mask` 0 where padded on the left.
        ValueError as in `LayerwiseModel`, and for more positions than the model has.
        """
        tokens.interleave(codes)  # names the tracks for another shape
        batch = super().with_captions(codes, captions)
        self.decoder.check_length(batch.text.shape[1], batch.frames)
        return batch

    def encode_text(self, captions: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """Prompts: ids [B, L] and mask [B, L], padded on the left; `<xcodec>` alone for None."""
        none = [tokens.XCODEC]
        ids, mask = tokens.left_padded(
            none if text is None else tokens.prompt_ids(self.tokenize, text, self.segment)
            for text in captions
        )
        return ids.to(self.device), mask.to(self.device)

    # ---- sequence

    def sequence(self, batch: Batch) -> Tensor:
        """Llama input ids [B, P + 2T]: prompt (padding is id 0), then v0 i0 v1 i1 ..."""
        return torch.cat([batch.text, tokens.interleave(batch.codes)], 1)

    def positions(self, batch: Batch) -> Tensor:
        """Labels for hooks [P + 2T]: 0 in the prompt, -(t + 1) at v_t, t + 1 at frame t."""
        return yue_decoder.frame_labels(batch.text.shape[1], 2 * batch.frames).to(self.device)

    def position_groups(self, batch: Batch) -> Tensor:
        """[B, P + 2T]: the positions that share a mean, see `yue.decoder.position_groups`."""
        return yue_decoder.position_groups(batch.text_mask, 2 * batch.frames)

    def context(self, hidden: Tensor, batch: Batch) -> yue_decoder.Context:
        codes = batch.text_mask.new_ones(len(batch), 2 * batch.frames)
        valid = torch.cat([batch.text_mask, codes], 1)
        return self.decoder.context(hidden, self.positions(batch), valid)

    def at_frames(self, stream: Tensor, frames: int) -> Tensor:
        """Frame t is the position of its instrumental code, P + 2t + 1."""
        return stream[:, 1 - 2 * frames :: 2]

    def places(self, book: int, frames: int) -> slice:
        """Code (k, t) is fed at P + 2t + k; the last predicts nothing, but its frame is read."""
        return slice(book - 2 * frames, None, 2)

    def table(self, book: int) -> Tensor:
        """Embeddings [1024, d], the same for both tracks."""
        # Through the module: with a device map its weights may be there only while it runs.
        ids = torch.arange(tokens.CODE_IDS.start, tokens.CODE_IDS.stop, device=self.device)
        return self.decoder.embed(ids)

    # ---- generation

    @torch.no_grad()
    def generate(
        self,
        captions: Sequence[str | None],
        seconds: float,
        seed: int,
        hooks: Hooks = None,
        guidance_scale: float | None = None,
        temperature: float = 1.0,
        top_k: int = TOP_K,
        top_p: float = TOP_P,
        repetition_penalty: float = REPETITION_PENALTY,
    ) -> tuple[Tensor, Tensor]:
        """Draw audio [B, n] at 16 kHz and codes [B, 2, T] for B captions, T = round(seconds * 50).

        With guidance the model runs 2B rows, [conditional; unconditional]; hooks get both, and
        `conditional_rows` (slice(0, B)) tells them apart. The unconditional rows know nothing
        before `<xcodec>`, as in the script. With guidance_scale 1 only the B conditional rows run.

        Hooks get the whole prompt once, [rows, P, d] with labels 0, then [rows, 1, d] with the
        label of the code just written: -1, 1, -2, 2, ..., T, the last included.

        Sampling follows the released script (branch YuE-v1, inference/infer.py), in the order in
        which transformers applies it: guidance on log-probabilities, repetition penalty, forbidden
        ids, temperature, top-k 50 (transformers' own default, which the script leaves in place),
        top-p .93. A test holds the tokens equal to those of transformers' `generate()` for the
        same seed. Two differences, both because the number of frames is given here: every id but
        the codes of stage 1 is forbidden (the script forbids text ids only, and discards ids that
        are no codes), among them EOA, with which the script's segments end; and there is a single
        segment.

        The repetition penalty reads the codes written so far, so a steered run may drift for that
        reason alone: give a run and its control the same `repetition_penalty`. ValueError for a
        bad request.
        """
        scale = GUIDANCE if guidance_scale is None else guidance_scale
        frames = self._frames(captions, seconds, temperature, top_k, scale)
        if not 0 < top_p <= 1 or repetition_penalty <= 0:
            raise ValueError("top_p must be above 0 and at most 1, repetition_penalty above 0")
        count, guide = len(captions), scale != 1
        ids, valid = self.encode_text([*captions, *[None] * (count if guide else 0)])
        prompt = ids.shape[1]
        self.decoder.check_length(prompt, frames)
        valid = torch.cat([valid, valid.new_ones(len(valid), 2 * frames)], 1)
        labels = yue_decoder.frame_labels(prompt, 2 * frames).to(ids.device)
        generator = torch.Generator(self.device).manual_seed(seed)
        decoder, wanted = self.decoder, self.by_layer(hooks)
        cache = DynamicCache(config=self.hf.config)
        seen = torch.zeros(count, tokens.CARD, dtype=torch.bool, device=ids.device)
        written: list[Tensor] = []
        with self._conditional(slice(0, count) if guide else slice(None)):
            for step in range(2 * frames + 1):
                end = prompt + step
                hidden = decoder.embed(ids)
                now = labels[end - ids.shape[1] : end]
                context = decoder.context(hidden, now, valid[:, :end], cache)
                hidden = run_layers(decoder, hidden, context, wanted)
                if step == 2 * frames:
                    break  # the last code predicts nothing, it ran for the hooks
                scores = decoder.next_scores(hidden).to(seen.device)
                scores = guided(scores, scale) if guide else scores
                codes = penalised(scores[:, tokens.CODE_IDS], seen, repetition_penalty)
                if temperature == 0:
                    drawn = codes.argmax(-1, keepdim=True)
                else:
                    # Over all ids, so that the draws are those of transformers' generate().
                    probabilities = torch.zeros_like(scores)
                    probabilities[:, tokens.CODE_IDS] = nucleus(codes, temperature, top_k, top_p)
                    drawn = torch.multinomial(probabilities, 1, generator=generator)
                    drawn = drawn - tokens.FIRST_CODE
                seen.scatter_(1, drawn, True)
                written.append(drawn + tokens.FIRST_CODE)
                ids = written[-1].repeat(2, 1) if guide else written[-1]
        codes = tokens.deinterleave(torch.cat(written, 1))
        return self.decode(codes), codes

    # ---- codec

    def codec_latents(self, codes: Tensor) -> Tensor:
        """Look up xcodec's latents [B, T, D] of the instrumental track of codes [B, 2, T]."""
        return yue_codec.latents(self.codec, codes[:, 1])

    def decode_tracks(self, codes: Tensor) -> Tensor:
        """Turn codes [B, 2, T] into the audio [B, 2, n] of vocal and instrumental track."""
        return yue_codec.decode_tracks(self.codec, codes)

    def decode(self, codes: Tensor) -> Tensor:
        """Turn codes [B, 2, T] into audio [B, n], the sum of the tracks (may exceed -1..1)."""
        return self.decode_tracks(codes).sum(1)


def guided(scores: Tensor, scale: float) -> Tensor:
    """Scores [2B, V], rows [conditional; unconditional], to [B, V]: u + scale (c - u) in logs."""
    conditional, unconditional = scores.log_softmax(-1).chunk(2)
    return scale * (conditional - unconditional) + unconditional


def penalised(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Lower scores [B, V] where `seen` [B, V] (Keskar et al. 2019, arXiv 1909.05858)."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def nucleus(scores: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Probabilities [B, V] after temperature, top-k (0: all) and top-p (1: all)."""
    scores = scores / temperature
    if 0 < top_k < scores.shape[-1]:
        floor = scores.topk(top_k).values[..., -1:]
        scores = scores.masked_fill(scores < floor, -torch.inf)
    if top_p < 1:
        ascending, order = scores.sort(-1)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[..., -1] = False
        scores = scores.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return scores.softmax(-1)
