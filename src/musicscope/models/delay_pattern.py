"""What all MusicGen implementations share: the delay pattern, hooks, teacher forcing.

`MusicgenModel` (transformers) and `AudiocraftModel` differ only in whose modules run; here is
`MusicModel` in terms of four things that each of them offers: a layerwise
`decoder`, `encode_signal`, `encode_text` and `decode`. Conventions of the sequence are in
`musicscope.models.musicgen.decoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from musicscope.models.interface import Batch, Hook, HookPoint
from musicscope.models.musicgen.decoder import Context, delayed
from musicscope.models.musicgen.generation import generate

Hooks = dict[str, Hook] | None


def text_states(
    tokenizer: Any, encoder: Any, captions: Sequence[str | None], device: torch.device
) -> tuple[Tensor, Tensor]:
    """T5 states [B, L, d_text] and mask [B, L]; zero states and zero mask for None.

    That is what both implementations use for the unconditional half of guidance.
    """
    known = [i for i, caption in enumerate(captions) if caption is not None]
    if not known:
        text = torch.zeros(len(captions), 1, encoder.config.hidden_size, device=device)
        return text, torch.zeros(len(captions), 1, device=device, dtype=torch.int64)
    tokens = tokenizer([captions[i] for i in known], padding=True, return_tensors="pt").to(device)
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    text = states.new_zeros(len(captions), *states.shape[1:])
    text_mask = mask.new_zeros(len(captions), mask.shape[1])
    text[known], text_mask[known] = states, mask
    return text, text_mask


class DelayPatternModel:
    """`MusicModel` over a layerwise decoder. All methods run without autograd.

    `special` is the id that fills the start column and the corners of the pattern, `device` where
    batches live (with a device map, layers may live elsewhere).
    """

    num_position_groups = 2

    def __init__(
        self,
        name: str,
        decoder: Any,
        *,
        device: torch.device,
        sample_rate: int,
        frame_rate: float,
        num_codebooks: int,
        width: int,
        card: int,
        special: int,
        guidance_scale: float = 3.0,
    ) -> None:
        self.name, self.decoder, self.device = name, decoder, device
        self.sample_rate, self.frame_rate = sample_rate, frame_rate
        self.num_codebooks, self.num_layers = num_codebooks, decoder.num_layers
        self.width, self.card, self.special = width, card, special
        self.hook_points = tuple(HookPoint(f"layers.{i}", width) for i in range(self.num_layers))
        self.guidance_scale = guidance_scale
        self.conditional_rows = slice(None)
        self._index = {point.name: i for i, point in enumerate(self.hook_points)}

    @property
    def layer_calls(self) -> int:
        """Layer evaluations since loading."""
        return self.decoder.calls

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters and buffers."""
        held = {}
        for module in self.modules:
            for tensor in (*module.parameters(), *module.buffers()):
                held[id(tensor)] = tensor.nbytes
        return sum(held.values())

    # ---- what an implementation offers

    @property
    def modules(self) -> tuple[torch.nn.Module, ...]:
        """All that holds weights: decoder, codec, text encoder."""
        raise NotImplementedError

    def encode_signal(self, signal: Tensor) -> Tensor:
        """Codes [B, K, T] of a float32 signal [B, 1, n]."""
        raise NotImplementedError

    def encode_text(self, captions: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """Text states [B, L, d_text] and mask [B, L]; zeros for None."""
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, K, T] to audio [B, n] through EnCodec."""
        raise NotImplementedError

    def codec_latents(self, codes: Tensor) -> Tensor:
        """EnCodec's quantised latents [B, T, D] of codes [B, K, T]: sums of code embeddings."""
        raise NotImplementedError

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
        signal = audio.to(self.device, torch.float32)[:, None]
        # One clip at a time on a CPU: its waveform-sized activations then stay in cache (1.4 times
        # as fast as 8 together), and a clip's codes do not depend on what else is in the batch.
        parts = signal.split(1 if self.device.type == "cpu" else len(signal))
        codes = torch.cat([self.encode_signal(part) for part in parts])
        return self.with_captions(codes, captions)

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

    def sequence(self, batch: Batch) -> Tensor:
        """Decoder input ids [B, K, S]: start column and delay pattern, S = T + K - 1.

        The last column is predicted, never fed. (With one codebook it is fed too: frame T - 1 has
        its position there.)
        """
        sequence = delayed(batch.codes, self.special)
        return sequence[..., : max(batch.frames + self.num_codebooks - 1, batch.frames + 1)]

    def position_groups(self, batch: Batch) -> Tensor:
        """[B, S]: 0 the start column, 1 frames, -1 the tail of the delay pattern."""
        groups = torch.full((len(batch), self.sequence(batch).shape[-1]), -1, device=self.device)
        groups[:, 0], groups[:, 1 : batch.frames + 1] = 0, 1
        return groups

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

    # ---- generation

    def generate(
        self,
        captions: Sequence[str | None],
        seconds: float,
        seed: int,
        hooks: Hooks = None,
        guidance_scale: float | None = None,
        temperature: float = 1.0,
        top_k: int = 250,
    ) -> tuple[Tensor, Tensor]:
        """Audio [B, n] and codes [B, K, T]; see `musicscope.models.musicgen.generation`."""
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        return generate(self, captions, seconds, seed, hooks, scale, temperature, top_k)
