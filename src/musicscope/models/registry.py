"""Model families, and loading a model of any of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from musicscope.core.io import read_json
from musicscope.models.audiocraft import compat  # noqa: F401 (its guard: before transformers)
from musicscope.models.interface import MusicModel


def _model_type(config: dict[str, Any]) -> str:
    return str(config.get("model_type", ""))


@dataclass(frozen=True)
class System:
    """A model family."""

    loader: str
    """module:class, imported when needed; its `load(folder or file, device=, dtype=, **options)`
    gives the model. A string, so that stages depend on the loaders of their own models alone
    (`tools.import_closure`)."""
    detect: Callable[[Path, dict[str, Any]], bool]
    """(folder or file, its config.json, {} if there is none) -> whether it is one of this system"""

    def load(self, path: Path, **options: Any) -> Any:
        """The model in a folder or file."""
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
