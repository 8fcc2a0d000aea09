"""Load a model of any family; the table of families."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from musicscope.core.io import read_json
from musicscope.data.clips import Clips, ClipStore, at_rate
from musicscope.models import hub
from musicscope.models.interface import Model

Sources = Callable[[], tuple[Model, Clips]]
"""Opens a model and the clips at its rate. Picklable and cached, for every task calls it."""


def _model_type(config: dict[str, Any]) -> str:
    return str(config.get("model_type", ""))


@dataclass(frozen=True)
class System:
    """A model family."""

    loader: str
    """module:class, imported when needed, with `load(folder or file, device=, dtype=, **options)`.
    A string, so that a stage depends on the loaders of its own models alone
    (`tools.import_closure`)."""
    detect: Callable[[Path, dict[str, Any]], bool]
    """(folder or file, its config.json or {}) -> whether it holds a model of this family."""

    def load(self, path: Path, **options: Any) -> Model:
        """Load the model in a folder or file."""
        module, name = self.loader.split(":")
        return getattr(importlib.import_module(module), name).load(path, **options)


SYSTEMS: dict[str, System] = {
    "musicgen": System(
        "musicscope.models.musicgen.model:MusicgenModel",
        lambda path, config: _model_type(config).startswith("musicgen"),
    ),
    "audiocraft": System(
        "musicscope.models.audiocraft.model:AudiocraftModel",
        lambda path, config: (path / "state_dict.bin").is_file(),
    ),
    "rave": System(
        "musicscope.models.rave.model:RaveModel",
        lambda path, config: path.suffix == ".ts" or any(path.glob("*.ts")),
    ),
    "yue": System(
        "musicscope.models.yue.model:YueModel", lambda path, config: _model_type(config) == "llama"
    ),
}
"""Model families; the first that detects a folder as its own loads it."""


def load_model(
    name: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    system: str | None = None,
    **options: Any,
) -> Model:
    """Load a model by path, by name under data/models, or by hub id ("owner/model").

    The folder's files decide the family (`SYSTEMS`); `system` names one where there are two (the
    MusicGen hub pages hold transformers' files and audiocraft's). The decoder is loaded in `dtype`;
    codec and text encoder stay in float32. A hub id needs a `revision`: a commit or tag. `options`
    go to the family's loader, such as `device_map` of MusicGen.

    FileNotFoundError names the missing files, ValueError the property that is not supported.
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


@functools.cache
def open_sources(model: str, clips: str, device: str = "cpu") -> tuple[Model, Clips]:
    """Load a model and open the clips at its sample rate, once per process.

    Give it to workers through functools.partial.
    """
    loaded = load_model(model, device=device)
    return loaded, at_rate(ClipStore.open(clips), loaded.sample_rate)


def fetch_model(name: str, revision: str | None, system: str | None = None) -> Path:
    """Fetch the files of hub id `name` that its family needs; the folder in the hub's local cache.

    Errors as in `musicscope.models.hub.fetch`.
    """
    system = system or detect_system(hub.fetch(name, revision, ("config.json",)))
    return hub.fetch_model(name, revision, system)


def detect_system(path: Path) -> str:
    """Tell the family (key of SYSTEMS) of a folder or file. FileNotFoundError if it is of none."""
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
