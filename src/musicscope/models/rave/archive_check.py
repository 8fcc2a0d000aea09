"""Check the contents of TorchScript files from strangers before they are loaded.

Limits of the check. A TorchScript archive is a zip of weights, of program text in a
subset of Python, and of two pickles that describe the objects. `torch.jit.load` does not unpickle
with Python: its own reader knows tensors, plain containers and the classes defined in the archive,
so no function of Python's is ever called. It does run the *program*, though: methods such as
``__setstate__`` at once, ``encode`` and ``decode`` when asked. Nearly all operators a program can
call compute on tensors, but a few reach outside: ``torch.save`` writes any file that the user may
write, ``torch.from_file`` maps files for reading and writing, ``ops.<library>`` calls whatever
extension is loaded. `check_archive` refuses programs that name these. A program may still compute
for ever or fill the memory, and torch's own reader may have bugs: load files from people you trust,
or in a container. Never give such a file to ``torch.load(weights_only=False)``,
which would unpickle it with Python.
"""

from __future__ import annotations

import io
import pickletools
import re
import tokenize
import warnings
import zipfile
import zlib
from pathlib import Path

import torch

from musicscope.models.checkpoint import check_file

# The layout that torch writes, below one top folder whose name is free.
LAYOUT = re.compile(
    r"(data\.pkl|constants\.pkl|version|byteorder|\.data/\w+|\.format_version|\.storage_alignment"
    r"|(data|constants)/\d+|code/[\w./]+\.py|code/[\w./]+\.py\.debug_pkl|extra/[\w./-]+)"
)
REQUIRED = ("data.pkl", "constants.pkl", "version")
# What torch's own pickler names: tensors, the archive's classes, typed containers.
GLOBALS = re.compile(r"(torch|torch\._utils|torch\.jit\._pickle|__torch__[\w.]*|collections) \w+")
# Operators that reach outside the tensors, in program text with one space around each token.
# `ops.prim` and `ops.aten` are torch's own; any other namespace is an extension or a back end.
OUTSIDE = re.compile(
    r"\btorch \. (save|from_file|rpc\w*|remote) \("
    r"|\bops \. (?!prim |aten )\w+ \. \w+|\bops \. (aten|prim) \. (save|from_file|rpc\w*)\b"
)


def check_archive(path: str | Path) -> None:
    """Refuse a file that is no TorchScript archive, or holds more than torch writes.

    Reads the zip without running or unpickling anything.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a zip; a checkpoint of `torch.save`; files outside the layout; a pickle
            that names anything but tensors and the archive's classes; a program that calls an
            operator which reads or writes files. The message names the entry.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    check_file(path)
    try:
        if not zipfile.is_zipfile(path):  # raises BadZipFile for a zip over several disks
            raise ValueError(
                f"{path} is not a TorchScript archive (no zip file); give the .ts file that "
                "RAVE's export writes, whole: a download that broke off looks like this too"
            )
        with zipfile.ZipFile(path) as archive:
            _check_entries(path, archive)
            if torn := archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum of {torn}")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again") from error


def _check_entries(path: Path, archive: zipfile.ZipFile) -> None:
    names = [name for name in archive.namelist() if not name.endswith("/")]
    tops = {name.partition("/")[0] for name in names}
    inner = {name: name.partition("/")[2] for name in names}
    if not any(entry.startswith("code/") for entry in inner.values()):
        kind = "a checkpoint of torch.save" if "data.pkl" in inner.values() else "another zip file"
        raise ValueError(
            f"{path} is {kind}, not a TorchScript archive (it holds no program); export the model "
            "first (RAVE: rave export) and give the .ts file"
        )
    if len(tops) != 1 or (absent := set(REQUIRED) - set(inner.values())):
        what = f"several top folders {sorted(tops)}" if len(tops) != 1 else f"no {sorted(absent)}"
        raise ValueError(f"{path} is not a whole TorchScript archive: {what}; export it again")
    for name, entry in inner.items():
        if not LAYOUT.fullmatch(entry) or ".." in entry.split("/"):
            raise ValueError(
                f"{path}: {name!r} does not belong in a TorchScript archive; it is refused, since "
                "torch never wrote it. Export the model again"
            )
        if entry.endswith(("pkl", "_pkl")):
            _check_pickle(path, name, archive.read(name))
        elif entry.endswith(".py"):
            _check_program(path, name, archive.read(name).decode("utf-8", errors="replace"))


def _check_program(path: Path, name: str, text: str) -> None:
    """Refuse operators of OUTSIDE, however the text is spaced, broken or commented."""
    try:
        tokens = [token.string for token in tokenize.generate_tokens(io.StringIO(text).readline)]
    except (tokenize.TokenError, SyntaxError) as error:
        raise ValueError(f"{path}: {name} is no program text ({error}); export again") from error
    spaced = " ".join(t for t in tokens if t.strip() and not t.startswith("#"))
    if found := OUTSIDE.search(spaced):
        raise ValueError(
            f"{path}: {name} calls {found.group(0).replace(' ', '')!r}, which reaches outside the "
            "model (files, other libraries); it is refused"
        )


def _check_pickle(path: Path, name: str, content: bytes) -> None:
    """Refuse a pickle that names anything but torch's own; it is read, not run."""
    try:
        for opcode, argument, _ in pickletools.genops(content):
            # torch writes protocol 2, whose names are literal; other opcodes could hide one.
            hidden = opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4")
            if hidden or (opcode.name == "GLOBAL" and not GLOBALS.fullmatch(str(argument))):
                raise ValueError(
                    f"{path}: the pickle {name} names {argument or opcode.name!r}, which no "
                    "TorchScript export does; it is refused"
                )
    except ValueError as error:
        if "it is refused" in str(error):
            raise
        raise ValueError(f"{path}: {name} is no pickle ({error}); export it again") from error


def load_archive(path: str | Path, device: torch.device) -> torch.jit.ScriptModule:
    """Load a checked TorchScript module on `device`, in evaluation mode.

    ValueError as in `check_archive`, and for an archive that torch itself cannot read.
    """
    check_archive(path)
    try:
        with warnings.catch_warnings():
            # 2.13 announces the end of TorchScript; exports exist in no other form.
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(str(path), map_location=device)
    except RuntimeError as error:
        raise ValueError(f"{path}: torch cannot read this archive: {error}") from error
    return module.eval()
