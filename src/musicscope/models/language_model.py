"""`LanguageModel` over any decoder whose layers can be called one after another.

Stopping early, restarting at a layer and replacing activations are plain loops over layers here,
without exceptions or registered state. A family gives a `Decoder`, its sequence layout and its
codec; teacher forcing, capture and gradients are the same for all.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from musicscope.models.interface import Batch, Hook, HookPoint, Hooks, apply_hook, check_audio


class Context(Protocol):
    """Inputs of every layer besides the stream; the same for all layers."""

    @property
    def positions(self) -> Tensor:
        """[S] labels for hooks, see `interface.Hook`."""


C = TypeVar("C", bound=Context, contravariant=True)


class Decoder(Protocol[C]):
    """Embedding, layers and heads of a decoder as separate steps."""

    num_layers: int
    calls: int
    """Layer evaluations since loading."""

    @property
    def layers(self) -> Sequence[torch.nn.Module] | torch.nn.ModuleList:
        """The modules with the weights of each layer."""

    def embed(self, ids: Tensor) -> Tensor:
        """Turn input ids into the input of layer 0 [rows, S, d]."""

    def layer(self, index: int, hidden: Tensor, context: C) -> Tensor:
        """Run layer `index` on hidden [rows, S, d].

        Where `LayerwiseModel.cross_points` are named, a fourth argument `cross` replaces the output
        of cross-attention [rows, S, d] before it is added to the stream.
        """

    def logits(self, hidden: Tensor, frames: int) -> Tensor:
        """Run final norm and heads: [rows, S, d] to [rows, K, frames, card], aligned to codes."""


D = TypeVar("D", bound=Decoder)
CROSS = ".cross_attention"
"""Hook point "layers.3.cross_attention": what the cross-attention of layer 3 adds to the stream."""


def bound(
    hooks: Mapping[str, Hook], name: str, positions: Tensor
) -> Callable[[Tensor], Tensor] | None:
    """Make the function of activations that the hook at `name` is, if there is one."""
    if (hook := hooks.get(name)) is None:
        return None
    return lambda activations: apply_hook(name, hook, activations, positions.to(activations.device))


def run_layers(
    decoder: Decoder,
    hidden: Tensor,
    context: Context,
    hooks: Mapping[str, Hook],
    first: int = 0,
    last: int | None = None,
    inputs: list[Tensor] | None = None,
) -> Tensor:
    """Run layers `first` to `last` (inclusive) on hidden [rows, S, d]; append to `inputs` if given.

    Hooks are by hook point. Each layer counts in `decoder.calls`.
    """
    for i in range(first, decoder.num_layers if last is None else last + 1):
        if inputs is not None:
            inputs.append(hidden)
        point = f"layers.{i}"
        cross = bound(hooks, point + CROSS, context.positions)
        hidden = decoder.layer(i, hidden, context, *([] if cross is None else [cross]))
        decoder.calls += 1
        if (edit := bound(hooks, point, context.positions)) is not None:
            hidden = edit(hidden)
    return hidden


GPU_CODEC_CLIPS = 8
"""Clips that a codec takes at once on a GPU: 0.4 GB each for 10 s at 32 kHz."""


def by_clip(signal: Tensor) -> tuple[Tensor, ...]:
    """Split [B, ...] into the parts that a codec takes at once: single clips on a CPU, else some.

    On a CPU waveform-sized activations of one clip stay in cache (1.4 times as fast as 8 together),
    and a clip's codes do not depend on the rest of its batch. On a GPU memory stays bounded.
    """
    return signal.split(1 if signal.device.type == "cpu" else GPU_CODEC_CLIPS)


class LayerwiseModel(Generic[D]):
    """`interface.LanguageModel` over a `Decoder`. Methods run without autograd, but for `traced`.

    `device` is where batches and results are; with a device map, layers may be elsewhere.
    """

    loss_name = "ce"
    first_encoded = 0
    has_cross_attention = False
    num_position_groups: int
    plain_sampling: Mapping[str, float]

    def __init__(
        self,
        name: str,
        decoder: D,
        *,
        device: torch.device,
        sample_rate: int,
        frame_rate: float,
        num_codebooks: int,
        width: int,
        card: int,
    ) -> None:
        self.name, self.decoder, self.device = name, decoder, device
        self.sample_rate, self.frame_rate = sample_rate, frame_rate
        self.num_codebooks, self.card, self.width = num_codebooks, card, width
        self.num_layers: int = decoder.num_layers
        self.hook_points = tuple(
            HookPoint(f"layers.{i}", width, frame_rate) for i in range(self.num_layers)
        )
        self.cross_points = tuple(
            HookPoint(f"layers.{i}{CROSS}", width, frame_rate)
            for i in range(self.num_layers if self.has_cross_attention else 0)
        )
        self._index = {
            point.name: i
            for points in (self.hook_points, self.cross_points) for i, point in enumerate(points)
        }  # fmt: skip
        self.frame_rates = dict.fromkeys(self._index, frame_rate)
        self.conditional_rows = slice(None)

    # ---- parts that a family gives, beside the methods of `interface.LanguageModel`

    @property
    def modules(self) -> tuple[torch.nn.Module, ...]:
        """All modules with weights: decoder, codec, text encoder."""
        raise NotImplementedError

    def encode_signal(self, signal: Tensor) -> Tensor:
        """Encode a float32 signal [B, n] into codes [B, K, T]."""
        raise NotImplementedError

    def encode_text(self, captions: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """Encode captions into `text` and `text_mask` of a `Batch`."""
        raise NotImplementedError

    def sequence(self, batch: Batch) -> Tensor:
        """Decoder input ids of all S positions."""
        raise NotImplementedError

    def context(self, hidden: Tensor, batch: Batch) -> Context:
        """Inputs of every layer besides the stream `hidden` [B, S, d]."""
        raise NotImplementedError

    def at_frames(self, stream: Tensor, frames: int) -> Tensor:
        """Select the positions of frames: [B, S, d] to [B, T, d]."""
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        """Turn codes [B, K, T] into audio [B, n]."""
        raise NotImplementedError

    def places(self, book: int, frames: int) -> slice:
        """Positions at which codes 0..frames-1 of codebook `book` are fed, without a caption."""
        raise NotImplementedError

    def table(self, book: int) -> Tensor:
        """Embeddings [card, d] of the codes of codebook `book`."""
        raise NotImplementedError

    # ---- inputs

    @property
    def layer_calls(self) -> int:
        return self.decoder.calls

    @property
    def weight_bytes(self) -> int:
        held: dict[int, int] = {}
        for module in self.modules:
            for tensor in (*module.parameters(), *module.buffers()):
                held[id(tensor)] = tensor.nbytes
        return sum(held.values())

    @torch.no_grad()
    def encode(self, audio: Tensor | np.ndarray, captions: Sequence[str | None]) -> Batch:
        """Run audio [B, n] through the codec, captions through the text encoder.

        ValueError for another shape, for NaN or infinity, and for a caption count other than B.
        """
        signal = check_audio(audio).to(self.device)
        codes = torch.cat([self.encode_signal(part) for part in by_clip(signal)])
        return self.with_captions(codes, captions)

    @torch.no_grad()
    def with_captions(self, codes: Tensor, captions: Sequence[str | None]) -> Batch:
        """Make a batch of existing codes [B, K, T] (generated, edited, stored).

        ValueError for another shape, for codes outside 0..card-1, and for a caption count other
        than B.
        """
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

    def _layer(self, name: str) -> int:
        if name not in self._index:
            raise ValueError(f"{self.name} has no hook point {name!r}; known: {list(self._index)}")
        return self._index[name]

    def known(self, hooks: Hooks) -> dict[str, Hook]:
        """Give the hooks by hook point. ValueError for an unknown one."""
        for name in hooks or {}:
            self._layer(name)
        return dict(hooks or {})

    # ---- teacher forcing

    def _run(self, batch: Batch, hooks: Mapping[str, Hook], last: int | None = None,
             inputs: list[Tensor] | None = None) -> Tensor:  # fmt: skip
        hidden = self.decoder.embed(self.sequence(batch))
        context = self.context(hidden, batch)
        return run_layers(self.decoder, hidden, context, hooks, last=last, inputs=inputs)

    def _logits(self, hidden: Tensor, batch: Batch) -> Tensor:
        return self.decoder.logits(hidden, batch.frames).to(self.device)

    @torch.no_grad()
    def forward(
        self, batch: Batch, hooks: Hooks = None, stop_after: str | None = None
    ) -> Tensor | None:
        last = None if stop_after is None else self._layer(stop_after)
        hidden = self._run(batch, self.known(hooks), last)
        return self._logits(hidden, batch) if stop_after is None else None

    def differentiable(self, batch: Batch, hooks: Hooks) -> Tensor:
        return self._logits(self._run(batch, self.known(hooks)), batch)

    def capture(self, batch: Batch, names: Sequence[str], hooks: Hooks = None) -> dict[str, Tensor]:
        """Read activations {name: [B, T, d]} in one pass that ends after the deepest layer named.

        With `hooks`, activations are read after them. ValueError without names.
        """
        if not names:
            raise ValueError("capture needs at least one hook point")
        wanted = self.known(hooks)
        found: dict[str, Tensor] = {}

        def reader(name: str) -> Hook:
            edit = wanted.get(name)

            def read(activations: Tensor, positions: Tensor) -> Tensor:
                if edit is not None:
                    activations = edit(activations, positions)
                found[name] = self.at_frames(activations, batch.frames).to(self.device)
                return activations

            return read

        deepest = max(names, key=self._layer)
        self.forward(batch, {**(hooks or {}), **{n: reader(n) for n in names}}, deepest)
        return {name: found[name] for name in names}

    @torch.no_grad()
    def layer_inputs(self, batch: Batch, last: int | None = None) -> list[Tensor]:
        inputs: list[Tensor] = []
        output = self._run(batch, {}, last, inputs)
        return [stream.to(self.device) for stream in [*inputs, output]]

    @contextlib.contextmanager
    def redrawn(self, seed: int, last: int) -> Generator[None]:
        layers = list(self.decoder.layers)[: last + 1]
        matrices = [p.data for layer in layers for p in layer.parameters() if p.ndim > 1]
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(m.numel(), generator=generator).to(m.device) for m in matrices]
        kept = [matrix.clone() for matrix in matrices]
        try:
            for matrix, order in zip(matrices, orders, strict=True):
                matrix.copy_(matrix.reshape(-1)[order].view_as(matrix))
            yield
        finally:
            for matrix, before in zip(matrices, kept, strict=True):
                matrix.copy_(before)

    @torch.no_grad()
    def forward_from(self, batch: Batch, layer: int, hidden: Tensor, hooks: Hooks = None) -> Tensor:
        """Logits [B, K, T, card] from the input `hidden` [B, S, d] of layer `layer`.

        `layer` may be L: then only the final norm and the heads run. ValueError for hooks of
        earlier layers, which could not act.
        """
        if not 0 <= layer <= self.num_layers:
            raise ValueError(f"{self.name} has layers 0..{self.num_layers - 1}, got {layer}")
        wanted = self.known(hooks)
        if early := [name for name in wanted if self._layer(name) < layer]:
            raise ValueError(f"a hook at {early[0]} cannot act: starting at {layer}")
        context = self.context(hidden, batch)
        hidden = run_layers(self.decoder, hidden, context, wanted, first=layer)
        return self._logits(hidden, batch)

    @torch.no_grad()
    def cross_entropy(self, batch: Batch, hooks: Hooks = None) -> Tensor:
        logits = self._logits(self._run(batch, self.known(hooks)), batch).float()
        return F.cross_entropy(logits.flatten(0, 2), batch.codes.flatten(), reduction="none").view(
            batch.codes.shape
        )

    def loss(self, batch: Batch, hooks: Hooks = None) -> Tensor:
        """Mean cross-entropy per clip in nats per code, [B] float64 on the CPU."""
        return self.cross_entropy(batch, hooks).double().mean((1, 2)).cpu()

    # ---- gradients with respect to the embedded inputs

    def traced(
        self, batch: Batch, layer: str, logits: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        index = self._layer(layer)
        with torch.enable_grad():
            inputs = self.decoder.embed(self.sequence(batch)).detach().requires_grad_()
            context = self.context(inputs, batch)
            stream = run_layers(self.decoder, inputs, context, {}, last=index)
            found = None
            if logits:
                output = run_layers(self.decoder, stream, context, {}, first=index + 1)
                found = self._logits(output, batch)
            return inputs, stream.to(self.device), found

    @torch.no_grad()
    def substitution_gains(self, codes: Tensor, gradient: Tensor) -> Tensor:
        # The input at a position is a sum of code embeddings E, so a new code v at (k, t) changes J
        # by g . (E[v] - E[code t]), g being the gradient where (k, t) is fed; 0 if it never is.
        frames = codes.shape[1]
        gains = []
        for book, own in enumerate(codes):
            here, table = gradient[self.places(book, frames)].to(codes.device), self.table(book)
            here = F.pad(here, (0, 0, 0, frames - len(here)))
            products = here @ table.to(codes.device).T
            gains.append(products - products.gather(1, own[:, None]))
        return torch.stack(gains)

    # ---- generation

    def _frames(
        self, captions: Sequence[str | None], seconds: float, temperature: float, top_k: int,
        guidance_scale: float,
    ) -> int:  # fmt: skip
        """Check a request to `generate`; the number of its frames."""
        frames = round(seconds * self.frame_rate)
        if frames < 1 or not captions or isinstance(captions, str):
            raise ValueError(f"need a list of captions and at least one frame, got {seconds} s")
        if temperature < 0 or top_k < 0 or not math.isfinite(guidance_scale):
            raise ValueError("temperature and top_k must be at least 0, guidance_scale finite")
        return frames

    @contextlib.contextmanager
    def _conditional(self, rows: slice) -> Generator[None]:
        """Set `conditional_rows` for the time of a generation."""
        self.conditional_rows = rows
        try:
            yield
        finally:
            self.conditional_rows = slice(None)
