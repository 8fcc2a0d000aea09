"""Text-to-music models behind one interface; one file for each family.

Everything after this package (ablation, activations, SAEs, steering) knows only `MusicModel`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from musicscope.artifacts import read_json
from musicscope.models import audiocraft_compat  # noqa: F401 (its guard: before transformers)

Hook = Callable[[Tensor, Tensor], Tensor]
"""(activations [rows, S, d], positions [S]) -> activations of the same shape.

Called with the output of one hook point; what it returns goes on to the next layer. `positions`
are frame labels: frame t is t + 1, anything that is no frame is 0 or less, or beyond T. In teacher
forcing they are of all S positions, in generation of the one position of the step. A hook must not
write into its argument. See `MusicModel.conditional_rows` for guided generation.
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
    """[B, L, d_text] text states; all zero for a clip without a caption. YuE keeps prompt ids
    [B, L] here, padded on the left."""
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
    num_position_groups: int
    """G: kinds of positions that have a mean of their own in mean ablation."""

    def position_groups(self, batch: Batch) -> Tensor:
        """[B, S] int64 in 0..G-1: the kind of each position (1: a frame); -1: in no mean."""

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
        guidance_scale: float | None = None,
        temperature: float = 1.0,
        top_k: int = 250,
    ) -> tuple[Tensor, Tensor]:
        """Audio [B, n] and codes [B, K, T]."""


def _model_type(config: dict[str, Any]) -> str:
    return str(config.get("model_type", ""))


@dataclass(frozen=True)
class System:
    """A model family."""

    loader: str
    """module:class, imported when needed; its `load(folder or file, device=, dtype=, **options)`
    gives the model. A string, so that stages depend on the loaders of their own models alone
    (`musicscope.code_files`)."""
    detect: Callable[[Path, dict[str, Any]], bool]
    """(folder or file, its config.json, {} if there is none) -> whether it is one of this system"""

    def load(self, path: Path, **options: Any) -> Any:
        """The model in a folder or file."""
        module, name = self.loader.split(":")
        return getattr(importlib.import_module(module), name).load(path, **options)


SYSTEMS: dict[str, System] = {
    "musicgen": System(
        "musicscope.models.musicgen:MusicgenModel",
        lambda path, config: _model_type(config).startswith("musicgen"),
    ),
    "audiocraft": System(
        "musicscope.models.audiocraft:AudiocraftModel",
        lambda path, config: (path / "state_dict.bin").is_file(),
    ),
    "rave": System(
        "musicscope.models.rave:RaveModel",
        lambda path, config: path.suffix == ".ts" or any(path.glob("*.ts")),
    ),
    "yue": System(
        "musicscope.models.yue:YueModel", lambda path, config: _model_type(config) == "llama"
    ),
}
"""Model families in the order in which a folder is asked; the first that knows it loads it."""


def load_model(
    name: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    system: str | None = None,
    **options: Any,
) -> MusicModel:
    """Load a model by path, by name under data/models, or by hub id ("owner/model").

    What the folder holds decides the family (`SYSTEMS`); `system` names one where it holds two (the
    MusicGen hub pages hold transformers' files and audiocraft's). `dtype` is that of the decoder;
    codec and text encoder stay in float32. `revision` pins a hub id to a commit or tag and is
    needed there. `options` go to the family's loader, such as `device_map` of MusicGen.

    FileNotFoundError says what was looked for, ValueError what is not supported.
    """
    path = next((p for p in (Path(name), Path("data/models") / name) if p.exists()), None)
    on_hub = path is None
    if on_hub:
        if str(name).count("/") != 1:
            raise FileNotFoundError(
                f"no model folder {name} or data/models/{name}; run from the repository's root, "
                "fetch the weights (git checkout data/models, or dvc pull) or give a hub id "
                "owner/model"
            )
        path = fetch_model(str(name), revision, system)
    system = system or detect_system(path)
    if system not in SYSTEMS:
        raise ValueError(f"no system {system!r}; known: {', '.join(SYSTEMS)}")
    model = SYSTEMS[system].load(path, device=torch.device(device), dtype=dtype, **options)
    if on_hub:
        model.name = Path(name).name  # a folder in the hub's cache is called after its commit
    return model


def fetch_model(name: str, revision: str | None, system: str | None = None) -> Path:
    """Folder in the hub's local cache with what a model's family needs of hub id `name`.

    Errors as of `musicscope.models.hub.fetch`.
    """
    from musicscope.models import hub

    system = system or detect_system(hub.fetch(name, revision, ("config.json",)))
    return hub.fetch_model(name, revision, system)


def detect_system(path: Path) -> str:
    """The family of the model in a folder or file: a key of SYSTEMS. FileNotFoundError if none."""
    file = path / "config.json"
    config = read_json(file) if file.is_file() else {}
    for name, system in SYSTEMS.items():
        if system.detect(path, config):
            return name
    raise FileNotFoundError(
        f"{path} holds no model of {', '.join(SYSTEMS)}: config.json is "
        f"{'of type ' + repr(_model_type(config)) if config else 'missing'}; give a "
        "save_pretrained folder or a checkpoint folder, or name one of these as `system`"
    )
