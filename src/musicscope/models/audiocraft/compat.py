"""Import audiocraft 1.3.0 beside a torch it was not pinned to, without the packages it never calls.

audiocraft imports packages that loading and running MusicGen never calls: torchaudio, librosa
(melody), av (reading files), spacy and num2words (text normalisation), xformers (attention kernels;
its default backend is torch's). Where one is absent, a module stands in for it while audiocraft is
imported; its functions raise ImportError with the package's name when called. Afterwards the
stand-ins are removed, so that no other library takes them for the packages; only xformers stays,
which audiocraft imports again when it runs.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

from musicscope.models.torchaudio_guard import install_guard, missing

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


class _StandIn(ModuleType):
    """A module in which every public name is a function that raises when called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return missing(self.__name__.partition(".")[0], f"{self.__name__}.{name}")


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

        # The one function that audiocraft calls with torch's attention backend, and a mask of which
        # it needs no more than the name.
        mask = type("LowerTriangularMask", (), {})
        vars(sys.modules["xformers.ops"]).update(unbind=torch.unbind, LowerTriangularMask=mask)
    return names


def _settle_transformers() -> None:
    """Have transformers record which packages are installed, before stand-ins exist."""
    utils = importlib.import_module("transformers.utils")
    for package in ABSENT:
        getattr(utils, f"is_{package}_available", bool)()


def import_audiocraft() -> ModuleType:
    """Import the package `audiocraft` once, with stand-ins for absent packages.

    ImportError with the remedy if audiocraft, or a small package that it needs, is missing.
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
