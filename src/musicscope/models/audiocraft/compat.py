"""Lets audiocraft 1.3.0 run on a torch it was not pinned to, beside transformers.

Imported by `musicscope.models` before anything imports transformers; costs nothing until needed.

1. Guard. The torchaudio wheels are linked to CUDA. Where one is installed beside a CPU build of
   torch, ``import torchaudio`` raises OSError in its extension, and so do transformers' audio
   models, which import it. The guard puts a stub in place of that extension (and of nothing else);
   torchaudio's pure torch parts then work. torchaudio is not one of our dependencies.
2. Stand-ins. audiocraft imports packages that loading and running MusicGen never calls: torchaudio,
   librosa (melody), av (reading files), spacy and num2words (text normalisation), xformers
   (attention kernels; its default backend is torch's). Where one is absent, a module takes its
   place while audiocraft is imported, whose functions raise ImportError with the package's name
   when called. Afterwards they are taken away again, so that no other library takes them for the
   packages; only xformers stays, which audiocraft imports again when it runs.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

ABSENT = {
    "torchaudio": ("torchaudio.transforms", "torchaudio.functional"),
    "librosa": ("librosa.filters",),
    "av": (),
    "spacy": (),
    "num2words": (),
    "xformers": ("xformers.ops",),
}
"""Packages that audiocraft imports and MusicGen does not use, with the submodules it names."""
KEPT = "xformers"


class TorchaudioGuard(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a stub for ``torchaudio._extension`` where torch is a CPU build, nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torchaudio._extension":
            return None
        import torch

        if torch.version.cuda is not None:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        module._IS_TORCHAUDIO_EXT_AVAILABLE = module._IS_ALIGN_AVAILABLE = False
        module._check_cuda_version = lambda: None
        # Decorates what needs the extension: that then raises when called.
        module.fail_if_no_align = lambda function: _missing("torchaudio", function.__name__)


def install_guard() -> None:
    """Put the guard first among the finders; a second call changes nothing."""
    if not any(isinstance(finder, TorchaudioGuard) for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchaudioGuard())


def _missing(package: str, name: str) -> Any:
    def missing(*args: Any, **kwargs: Any) -> Any:
        raise ImportError(
            f"{name} needs {package}, which is not installed (audiocraft uses it for nothing that "
            f"MusicGen's text-to-music models do): pip install --no-deps {package}"
        )

    return missing


class _StandIn(ModuleType):
    """A module whose every public name is a function that raises when called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _missing(self.__name__.partition(".")[0], f"{self.__name__}.{name}")


def _stand_in(package: str) -> list[str]:
    """Put stand-ins for an absent package and its submodules in sys.modules; their names."""
    if sys.modules.get(package) is not None or importlib.util.find_spec(package) is not None:
        return []
    names = [package, *ABSENT[package]]
    for name in names:
        module = _StandIn(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=name == package)
        if name == package:
            module.__path__ = []
        sys.modules[name] = module
        if name != package:
            setattr(sys.modules[package], name.rpartition(".")[2], module)
    if package == "xformers":
        import torch

        # The one thing that audiocraft calls on torch's attention backend, and the mask whose mere
        # presence it asks for.
        sys.modules["xformers.ops"].unbind = torch.unbind
        sys.modules["xformers.ops"].LowerTriangularMask = type("LowerTriangularMask", (), {})
    return names


def _settle_transformers() -> None:
    """Have transformers look which packages there are, and remember, before stand-ins exist."""
    utils = importlib.import_module("transformers.utils")
    for package in ABSENT:
        getattr(utils, f"is_{package}_available", bool)()


def import_audiocraft() -> ModuleType:
    """The package `audiocraft`, imported once with stand-ins for what is absent.

    ImportError with the remedy if audiocraft, or a small package that it does need, is missing.
    """
    if "audiocraft" in sys.modules:
        return sys.modules["audiocraft"]
    if importlib.util.find_spec("audiocraft") is None:
        raise ImportError(
            "audiocraft is not installed; pip install --no-deps -r requirements-nodeps.txt (its "
            "own pins would replace torch)"
        )
    install_guard()
    _settle_transformers()
    added = [name for package in ABSENT for name in _stand_in(package)]
    try:
        return importlib.import_module("audiocraft")
    except BaseException:
        # A half imported package would look whole to the next caller.
        for name in [n for n in sys.modules if n.partition(".")[0] == "audiocraft"]:
            del sys.modules[name]
        added = [name for name in added if name in sys.modules]
        raise
    finally:
        for name in added:
            if name.partition(".")[0] != KEPT:
                sys.modules.pop(name, None)


install_guard()
