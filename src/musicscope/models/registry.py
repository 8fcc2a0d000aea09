"""Find, load and download models of any family; the table of families."""

from __future__ import annotations

import fnmatch
import functools
import importlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from musicscope.config.data import DownloadModel, Part
from musicscope.core.io import Metrics, atomic_dir
from musicscope.data.clips import Clips, ClipStore, at_rate
from musicscope.models.checkpoint import check_file, fetch, fetch_family, read_config
from musicscope.models.interface import Model

Sources = Callable[[], tuple[Model, Clips]]
"""Opens a model and the clips at its rate. Picklable and cached, for every task calls it."""


def _model_type(config: Mapping[str, object]) -> str:
    return str(config.get("model_type", ""))


@dataclass(frozen=True)
class System:
    """A model family."""

    loader: str
    """module:class, imported when needed, with `load(folder or file, device=, dtype=, **options)`.
    A string, so that a stage depends on the loaders of its own models alone
    (`tools.import_closure`)."""
    detect: Callable[[Path, Mapping[str, object]], bool]
    """(folder or file, its config.json or {}) -> whether it holds a model of this family."""

    def load(self, path: Path, **options: object) -> Model:
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
    **options: object,
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

    Errors as in `musicscope.models.checkpoint.fetch`.
    """
    system = system or detect_system(fetch(name, revision, ("config.json",)))
    return fetch_family(name, revision, system)


def detect_system(path: Path) -> str:
    """Tell the family (key of SYSTEMS) of a folder or file. FileNotFoundError if it is of none."""
    config = read_config(path)
    for name, system in SYSTEMS.items():
        if system.detect(path, config):
            return name
    raise FileNotFoundError(
        f"{path} holds no model of {', '.join(SYSTEMS)}: config.json is "
        f"{'of type ' + repr(_model_type(config)) if config else 'missing'}; give a "
        "save_pretrained folder or a checkpoint folder, or name one of these as `system`"
    )


# ---- download


def folder_of(
    source: str, revision: str, files: Sequence[str], system: str | None, family: bool
) -> Path:
    """Find the folder of a source: a hub id with a revision, a local folder without.

    `family`: where `files` is "*", fetch only the files of a hub id that its family needs.
    FileNotFoundError without such a folder.
    """
    if not revision:
        folder = Path(source).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(
                f"download_model: {source} is no folder here; a hub id needs a revision"
            )
        return folder
    if family and list(files) == ["*"]:
        return fetch_model(source, revision, system)
    return fetch(source, revision, files)


def copy_files(folder: Path, patterns: Sequence[str], target: Path) -> int:
    """Copy the files below `folder` whose name or path fits a pattern, except hidden ones.

    Links are followed: the hub's cache consists of them. Returns the number of files;
    FileNotFoundError if there is none, ValueError for a git-lfs pointer.
    """
    count = 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder)
        fits = any(fnmatch.fnmatch(n, p) for n in (name.name, name.as_posix()) for p in patterns)
        if not fits or any(part.startswith(".") for part in name.parts):
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(check_file(path), target / name)
        count += 1
    if not count:
        raise FileNotFoundError(f"download_model: {folder} has no file {' or '.join(patterns)}")
    return count


def _check_apart(parts: Sequence[DownloadModel | Part], target: Path) -> None:
    """Refuse (ValueError) a local folder that overlaps `target`, which is replaced."""
    real = target.resolve()
    for part in parts:
        folder = Path(part.source).expanduser().resolve()
        if not part.revision and (real.is_relative_to(folder) or folder.is_relative_to(real)):
            raise ValueError(
                f"download_model: {part.source} and {target}, which is replaced, overlap: move the "
                "files elsewhere, or name the model otherwise"
            )


def download(entry: DownloadModel, target: str | Path) -> Metrics:
    """Replace the folder `target` by the model of `entry`.

    Returns numbers for metrics/download_model/<name>.json. A hub id is fetched into the hub's own
    cache, which resumes after an interruption, and copied. The folder appears once it is complete
    and known to be a model. ValueError for a hub id without a revision that pins, for a folder of
    another family than `entry` names, and for a source that is, holds or lies in `target`.
    """
    for part in entry.parts:
        if ".." in Path(part.into).parts or Path(part.into).is_absolute():
            raise ValueError(f"download_model: parts.into = {part.into!r} leaves the folder")
    _check_apart([entry, *entry.parts], Path(target))
    system = None if entry.system == "auto" else entry.system
    with atomic_dir(target) as out:
        folder = folder_of(entry.source, entry.revision, entry.files, system, family=True)
        count = copy_files(folder, entry.files, out)
        for part in entry.parts:
            folder = folder_of(part.source, part.revision, part.files, None, family=False)
            count += copy_files(folder, part.files, out / part.into)
        found = detect_system(out)
        if system not in (None, found):  # every stage goes by what the folder holds
            raise ValueError(
                f"download_model: with files {list(entry.files)} of {entry.source} the folder is "
                f"taken for {found}, not {system}: let files name those of {system} alone"
            )
        size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    return {"source": entry.source, "revision": entry.revision, "system": found,
            "files": count, "bytes": size}  # fmt: skip
