"""Text-to-music models behind one interface; one file for each family.

Everything after this package (ablation, activations, SAEs, steering) knows only `MusicModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

Hook = Callable[[Tensor, Tensor], Tensor]
"""(activations [rows, S, d], positions [S]) -> activations of the same shape.

Called with the output of one hook point; what it returns goes on to the next layer. `positions`
are sequence positions (frame t is position t + 1, the start column position 0): in teacher
forcing 0..S-1, in generation the one position of the step. A hook must not write into its
argument. See `MusicModel.conditional_rows` for guided generation.
"""


@dataclass(frozen=True)
class HookPoint:
    """A place whose activations can be read and replaced."""

    name: str
    """Such as "layers.3": the output of decoder layer 3, before the final norm."""
    width: int
    """Dimensions d of the activation."""


@dataclass(frozen=True)
class Batch:
    """Clips as the decoder sees them; made by `encode`, text and codec run once."""

    codes: Tensor
    """[B, K, T] int64, frame by frame (no delay, no start column)."""
    text: Tensor
    """[B, L, d_text] text states; all zero for a clip without a caption."""
    text_mask: Tensor
    """[B, L] int64, 1 where `text` counts; all zero for a clip without a caption."""
    captions: tuple[str | None, ...]
    """As given to `encode`."""

    def __len__(self) -> int:
        return self.codes.shape[0]

    @property
    def frames(self) -> int:
        return self.codes.shape[-1]


class MusicModel(Protocol):
    """What a model must offer. Frame t <-> the position whose newest input is codebook 0 of t."""

    name: str
    sample_rate: int
    frame_rate: float
    num_codebooks: int
    hook_points: tuple[HookPoint, ...]
    layer_calls: int
    """Layer evaluations since loading: what an experiment cost, counted rather than assumed."""
    conditional_rows: slice
    """Rows conditioned on the caption in what hooks are being given: the first half of
    [conditional; unconditional] during guided generation, else all."""

    def encode(self, audio: Tensor | np.ndarray, captions: Sequence[str | None]) -> Batch:
        """Audio [B, n] at `sample_rate` and captions (None: unconditional) to a batch."""

    def forward(
        self, batch: Batch, hooks: dict[str, Hook] | None = None, stop_after: str | None = None
    ) -> Tensor | None:
        """Logits [B, K, T, card]; [b, k, t] predicts codes[b, k, t]. None if stopped early."""

    def capture(
        self, batch: Batch, names: Sequence[str], hooks: dict[str, Hook] | None = None
    ) -> dict[str, Tensor]:
        """Activations [B, T, d] of the named hook points from one pass, deepest one last run."""

    def layer_inputs(self, batch: Batch) -> list[Tensor]:
        """Input of each layer [B, S, d] over all positions, then the last layer's output."""

    def forward_from(
        self, batch: Batch, layer: int, hidden: Tensor, hooks: dict[str, Hook] | None = None
    ) -> Tensor:
        """Logits as in `forward`, from the input `hidden` [B, S, d] of layer number `layer`."""

    def cross_entropy(self, batch: Batch, hooks: dict[str, Hook] | None = None) -> Tensor:
        """-log p(codes) in nats, [B, K, T]."""

    def generate(
        self,
        captions: Sequence[str | None],
        seconds: float,
        seed: int,
        hooks: dict[str, Hook] | None = None,
        guidance_scale: float = 3.0,
        temperature: float = 1.0,
        top_k: int = 250,
    ) -> tuple[Tensor, Tensor]:
        """Audio [B, n] and codes [B, K, T]."""


def load_model(
    name: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> MusicModel:
    """Load a model by folder, by name under data/models, or by hub id ("owner/model").

    `dtype` is that of text encoder and decoder; the codec stays in float32. `revision` pins a hub
    id to a commit or tag. FileNotFoundError says what was looked for.
    """
    folder = next((p for p in (Path(name), Path("data/models") / name) if p.is_dir()), None)
    if folder is None and str(name).count("/") != 1:
        raise FileNotFoundError(
            f"no model folder {name} or data/models/{name}; run from the repository's root, fetch "
            "the weights (git checkout data/models, or dvc pull) or give a hub id owner/model"
        )
    if folder is not None and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: not a save_pretrained folder")
    from musicscope.models.musicgen import MusicgenModel

    return MusicgenModel.load(folder or str(name), torch.device(device), dtype, revision)
