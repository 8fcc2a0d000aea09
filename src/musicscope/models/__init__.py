"""Text-to-music models behind one interface, with a package per family.

torchaudio's wheels are linked to CUDA. Beside a CPU build of torch, ``import torchaudio`` raises
OSError in its extension, and so do transformers' audio models, which import it. The guard below is
installed before any module of this package imports transformers. It puts a stub in place of that
extension alone; torchaudio's pure torch parts then work. torchaudio is not one of our dependencies.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NoReturn


class TorchaudioGuard(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Find a stub for ``torchaudio._extension`` where torch is a CPU build, nothing else."""

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
        vars(module).update(
            _IS_TORCHAUDIO_EXT_AVAILABLE=False,
            _IS_ALIGN_AVAILABLE=False,
            _check_cuda_version=lambda: None,
            # Decorates functions that need the extension: they then raise when called.
            fail_if_no_align=lambda function: missing("torchaudio", function.__name__),
        )


def install_guard() -> None:
    """Put the guard first among the finders; a second call changes nothing."""
    if not any(isinstance(finder, TorchaudioGuard) for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchaudioGuard())


def missing(package: str, name: str) -> Callable[..., NoReturn]:
    """A function that takes the place of `name` and raises ImportError with the remedy."""

    def raising(*args: object, **kwargs: object) -> NoReturn:
        raise ImportError(
            f"{name} needs {package}, which is not installed (audiocraft uses it for nothing that "
            f"MusicGen's text-to-music models do): pip install --no-deps {package}"
        )

    return raising


install_guard()
