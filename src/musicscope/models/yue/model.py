"""YuE stage 1 (Yuan et al. 2025, arXiv 2503.08638) as a `LanguageModel`.

A Llama writes two tracks of xcodec codes in turn, vocal and instrumental, 50 frames per second
each. "Codebook" 0 of the interface is the vocal track, 1 the instrumental one; both use the first
xcodec codebook only. Frames are the instrumental positions.

Stage 2 (codebooks 1..7) and the upsampler are out of scope: they add sound quality, not content.
Audio is decoded from the one codebook of stage 1, good enough to listen to.

A caption takes the place of YuE's genre tags, in a song of one segment without words. None means no
text at all: the sequence begins with `<xcodec>`, as in the unconditional half of guidance.

Folder layout (as on the hub, and two additions)::

    config.json, generation_config.json, model-0000i-of-0000n.safetensors, ...
    tokenizer.model         if the hub page has none: from the authors' code, see yue.tokens
    xcodec/                 the codec for transformers' XcodecModel, such as hub id Manel/YuE-XCodec

Sequence layout: a prompt of P ids, the last of them `<xcodec>`, then v0 i0 v1 i1 ... (vocal and
instrumental codes). Each id is predicted at the position before it, so v_t at P + 2t - 1 and i_t
at P + 2t. The position whose newest input is the instrumental code of frame t is P + 2t + 1: an
odd one counted from the first code, and that one is called frame t. It has seen both tracks of
frames up to t.

Hooks get a position's frame rather than its place in the sequence, for prompts differ in length:
t + 1 at frame t (as in every other model), -(t + 1) where the newest input is the vocal code of
frame t, 0 in the prompt. So tools that act on frames leave vocal positions and prompt alone.

Prompts of different lengths are padded on the left; every row's RoPE counts from its own start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM, XcodecModel
from transformers.cache_utils import Cache, DynamicCache

from musicscope.core.precision import tf32
from musicscope.models import checkpoint
from musicscope.models.checkpoint import DeviceMap
from musicscope.models.interface import Batch, Hooks, check_audio
from musicscope.models.language_model import LayerwiseModel, by_clip, run_layers
from musicscope.models.yue import tokens

GUIDANCE = 1.5
"""Scale of the released script in the first segment of a song (later ones: 1.2)."""
TOP_K, TOP_P, REPETITION_PENALTY = 50, 0.93, 1.1


@dataclass(frozen=True)
class Context:
    """Inputs of every layer besides the stream; the same for all layers."""

    positions: Tensor
    """[S] labels for hooks, see `frame_labels`."""
    places: Tensor
    """[rows, S] place in its own row, for RoPE."""
    rotary: tuple[Tensor, Tensor]
    mask: Tensor | None
    """[rows, 1, S, past + S] bool, true where attention may look; None without padding."""
    cache: Cache | None = None


def frame_labels(prompt: int, codes: int) -> Tensor:
    """Labels [prompt + codes] of the positions: 0 in the prompt, then -1, 1, -2, 2, ..."""
    steps = torch.arange(codes)
    labels = (steps // 2 + 1) * torch.where(steps % 2 == 1, 1, -1)
    return torch.cat([torch.zeros(prompt, dtype=torch.int64), labels])


class LayerwiseLlama:
    """Embedding, layers and head as separate steps; counts layer evaluations."""

    def __init__(self, hf: LlamaForCausalLM) -> None:
        self.hf = hf
        self.num_layers: int = hf.config.num_hidden_layers
        self.layers = hf.model.layers
        self.calls = 0

    def check_length(self, prompt: int, frames: int) -> None:
        """ValueError if prompt and codes exceed the positions the model was trained on."""
        limit = self.hf.config.max_position_embeddings
        if prompt + 2 * frames > limit:
            raise ValueError(
                f"the model has {limit} positions, {prompt} of them for the prompt: that leaves "
                f"{(limit - prompt) // 2} frames of 2 codes, {frames} were asked for"
            )

    def embed(self, ids: Tensor) -> Tensor:
        """Turn ids [rows, S] into the input of layer 0 [rows, S, d]."""
        return self.hf.model.embed_tokens(ids)

    def context(
        self, hidden: Tensor, positions: Tensor, valid: Tensor, cache: Cache | None = None
    ) -> Context:
        """Inputs of every layer besides hidden [rows, S, d].

        `positions` [S] are labels for hooks. `valid` [rows, past + S] is 1 where an id is, 0 on
        padding, the cached positions first.
        """
        count, total = hidden.shape[1], valid.shape[1]
        valid = valid.to(hidden.device)
        places = (valid.cumsum(1) - 1).clamp(min=0)[:, total - count :]
        mask = None
        # Padding, if there is any, stands first.
        if not valid[:, 0].all():
            mask = valid.bool()[:, None, None, :]
            if count > 1:
                square = torch.ones(count, total, dtype=torch.bool, device=valid.device)
                mask = mask & square.tril(total - count)
                # Padding looks at itself: a row of attention without any key is not a number.
                mask = mask | square.tril(total - count).triu(total - count)
        return Context(positions, places, self.hf.model.rotary_emb(hidden, places), mask, cache)

    def layer(self, index: int, hidden: Tensor, context: Context) -> Tensor:
        """Run layer `index` on hidden [rows, S, d]."""
        return self.hf.model.layers[index](
            hidden,
            attention_mask=context.mask,
            position_ids=context.places,
            past_key_values=context.cache,
            use_cache=context.cache is not None,
            position_embeddings=context.rotary,
        )

    def logits(self, hidden: Tensor, frames: int) -> Tensor:
        """Run final norm and head: [rows, P + 2 frames, d] to [rows, 2, frames, 1024].

        Only the head's rows of stage-1 codes (of 83,968) are used, and only at positions that
        predict a code: [b, k, t] predicts code t of track k.
        """
        hidden = self.hf.model.norm(hidden[:, -2 * frames - 1 : -1])
        head = self.hf.lm_head
        if head.weight.is_meta:  # offloaded: the weights are there only while the module runs
            logits = head(hidden)[..., tokens.CODE_IDS]
        else:
            logits = F.linear(hidden.to(head.weight.device), head.weight[tokens.CODE_IDS])
        return logits.unflatten(1, (frames, 2)).transpose(1, 2)

    def next_scores(self, hidden: Tensor) -> Tensor:
        """Logits [rows, 83,968] float32 over the whole vocabulary, from the last position."""
        return self.hf.lm_head(self.hf.model.norm(hidden[:, -1])).float()


class YueModel(LayerwiseModel[LayerwiseLlama]):
    """`LanguageModel` over `LlamaForCausalLM`; `.hf` is the Llama, `.codec` the XcodecModel.

    `segment` is the lyric text of the one segment, with its section head.

    Both tracks can be searched, as the model writes both. Audio fills one of them only: `encode`
    takes a mix for the instrumental track and silence for the vocal one (`first_encoded`).
    """

    num_position_groups = 4
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
            LayerwiseLlama(hf),
            device=codec.device,
            sample_rate=tokens.SAMPLE_RATE,
            frame_rate=tokens.SAMPLE_RATE / tokens.HOP,
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
        device_map: DeviceMap = None,
        **options: object,
    ) -> YueModel:
        """Load a folder laid out as above; see `musicscope.models.registry.load_model`.

        `codec` and `tokenizer` name them elsewhere. `device_map` ("auto", or modules to devices)
        spreads the Llama through accelerate; codec, inputs and results stay on `device`, the codec
        in float32 whatever `dtype`. `options` go to from_pretrained, such as `offload_folder`.
        """
        source = Path(source)
        audio = tokens.load_codec(codec or source / "xcodec", device)
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

    @torch.no_grad()
    @tf32(False, False)  # rounding would change the codes
    def _track(self, audio: Tensor | np.ndarray) -> Tensor:
        """Encode one track [B, n] into codes [B, T] int64, T = ceil(n / 320)."""
        signal = check_audio(audio).to(self.device)
        # xcodec would drop a last frame of less than a quarter; padded, each started frame counts,
        # as in the other models.
        padded = F.pad(signal[:, None], (0, -signal.shape[-1] % tokens.HOP))
        parts = [self.codec.encode(p, bandwidth=tokens.BANDWIDTH) for p in by_clip(padded)]
        return torch.cat([part.audio_codes[:, 0] for part in parts])

    def silence(self, frames: int) -> Tensor:
        """The codec's codes [T] of silence (not always one code throughout), kept per length."""
        if frames not in self._silence:
            self._silence[frames] = self._track(torch.zeros(1, frames * tokens.HOP))[0]
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
        return frame_labels(batch.text.shape[1], 2 * batch.frames).to(self.device)

    def position_groups(self, batch: Batch) -> Tensor:
        """Group alike positions, for means over them: [B, P + 2T].

        0 the first of a row (the same in all clips, and where attention rests), 1 frames, 2 vocal
        codes, 3 the rest of the prompt, -1 padding.
        """
        mask, labels = batch.text_mask, self.positions(batch)
        kinds = torch.where(labels > 0, 1, torch.where(labels < 0, 2, 3)).repeat(len(mask), 1)
        kinds[:, : mask.shape[1]].masked_fill_(mask == 0, -1)
        return kinds.scatter(1, mask.argmax(1, keepdim=True), 0)

    def context(self, hidden: Tensor, batch: Batch) -> Context:
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
        labels = frame_labels(prompt, 2 * frames).to(ids.device)
        generator = torch.Generator(self.device).manual_seed(seed)
        decoder, wanted = self.decoder, self.known(hooks)
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

    @torch.no_grad()
    @tf32(False, False)
    def codec_latents(self, codes: Tensor) -> Tensor:
        """Look up xcodec's latents [B, T, D] of the instrumental track of codes [B, 2, T]."""
        return self.codec.quantizer.decode(codes[:, 1].to(self.device)[None]).transpose(1, 2)

    @torch.no_grad()
    @tf32(False, False)
    def decode_tracks(self, codes: Tensor) -> Tensor:
        """Turn codes [B, 2, T] into the audio [B, 2, n] of vocal and instrumental track."""
        parts = by_clip(codes.to(self.device).flatten(0, 1)[:, None])
        audio = torch.cat([self.codec.decode(part).audio_values[:, 0] for part in parts])
        return audio.unflatten(0, codes.shape[:2])

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
