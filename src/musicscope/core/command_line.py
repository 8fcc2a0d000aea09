"""Entry points of programs: options with limits, and errors that end in one line.

Every program parses with `Parser` and starts its main through `run_program`.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

DEBUG = "--debug"
LONGEST = 600
"""Characters of an error message; messages of libraries may be pages."""
REMEDIES = {
    errno.ENOSPC: "free disk space, or write elsewhere",
    errno.EDQUOT: "free disk space, or write elsewhere",
    errno.EFBIG: "the system limits the size of files: raise the limit, or write elsewhere",
    errno.EROFS: "write elsewhere",
    errno.EACCES: "change its permissions, or name another path",
    errno.EPERM: "change its permissions, or name another path",
    errno.ENOENT: "check the name, or make it first",
    errno.ENOTDIR: "a folder is needed: name another path",
    errno.EISDIR: "a file is needed: name another path",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "the links form a circle: name another path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOMEM: "free memory, or lower compute.processes",
    errno.EIO: "check the disk",
    errno.ECONNREFUSED: "check the network",
    errno.ENETUNREACH: "check the network",
}
"""What to do about errors of the system."""


# --- programs ---------------------------------------------------------------------------------


def program() -> str:
    """Name this program as its user started it: ``stages.steer`` or ``musicscope``."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).name


class Parser(argparse.ArgumentParser):
    """Reports a wrong option in one line with status 2, has --debug, wants limits of numbers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("prog", program())
        super().__init__(*args, **kwargs)
        super().add_argument(DEBUG, action="store_true", help="show the traceback of an error")

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        """Add an argument; TypeError for a number without `number` or `whole`."""
        if kwargs.get("type") in (int, float, complex):
            raise TypeError(f"{args}: give the type number(...) or whole(...), with limits")
        return super().add_argument(*args, **kwargs)

    def add_device(self) -> None:
        """Add --device, by default a GPU if there is one."""
        help = "auto, cpu, cuda or cuda:<index>; default auto: a GPU if there is one"
        self.add_argument("--device", type=device, default="auto", help=help)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        text = " ".join(message.split())
        self.exit(2, f"{self.prog}: {text} (options: {self.prog} --help)\n")


def one_line(error: BaseException) -> str:
    """Say in one line what went wrong and what to do; errors of libraries are named."""
    text = " ".join(" ".join(map(str, (error, *getattr(error, "__notes__", ())))).split())
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}..."
    if isinstance(error, OSError) and error.strerror:
        file = f"{os.fsdecode(error.filename)!s}: " if error.filename is not None else ""
        remedy = REMEDIES.get(error.errno or 0)
        return f"{file}{error.strerror}" + (f": {remedy}" if remedy else "")
    if isinstance(error, UnicodeError):
        return f"text is not UTF-8 ({text}): save the file as UTF-8"
    if isinstance(error, MemoryError):
        return f"memory is full {f'({text})' if text else ''}: lower batch sizes or processes"
    if type(error).__name__ == "BrokenProcessPool":
        return f"a worker process was killed ({text}): lower compute.processes if memory is short"
    if isinstance(error, ValueError | OSError | ImportError) and text:
        return text
    return f"{type(error).__name__}: {text} ({DEBUG} shows where)"


def _end(error: BaseException, name: str) -> NoReturn:
    """Exit with one line: status 130 after Ctrl-C, else 1."""
    if isinstance(error, KeyboardInterrupt):
        print(f"\n{name}: stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    if isinstance(error, OSError) and sys.stdout:
        try:
            sys.stdout.flush()
        except OSError:  # python would complain again when it exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(f"{name}: {one_line(error)}")


def report_in_one_line() -> None:
    """Make errors that nothing catches, also those of imports, end in one line."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if DEBUG in sys.argv[1:] and not isinstance(error, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
        else:
            _end(error, program())

    sys.excepthook = hook


def run_program(
    main: Callable[[], object], name: str = "", argv: Sequence[str] | None = None
) -> None:
    """Run a program. An error ends in one line and status 1, Ctrl-C in status 130.

    With --debug an error keeps its traceback.

    Args:
        name: what messages begin with; by default `program`.
        argv: arguments that may hold --debug; by default those of the process.
    """
    try:
        main()
        if sys.stdout:
            sys.stdout.flush()  # a full disk is an error of the program, not of python's end
    except KeyboardInterrupt as stop:
        _end(stop, name or program())
    except Exception as error:
        if DEBUG in (sys.argv[1:] if argv is None else argv):
            raise
        _end(error, name or program())


# --- types of options -------------------------------------------------------------------------


def _limits(above: float | None, at_least: float | None, at_most: float | None) -> str:
    parts = [
        f"{word} {value:g}"
        for word, value in (("above", above), ("at least", at_least), ("at most", at_most))
        if value is not None
    ]
    return " and ".join(parts)


def number(
    above: float | None = None, at_least: float | None = None, at_most: float | None = None
) -> Callable[[str], float]:
    """Return a type for finite numbers within limits."""
    limits = _limits(above, at_least, at_most)

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        inside = (
            math.isfinite(value)
            and (above is None or value > above)
            and (at_least is None or value >= at_least)
            and (at_most is None or value <= at_most)
        )
        if not inside:
            wanted = f"a number {limits}" if limits else "a finite number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return read


def whole(at_least: int | None = None, at_most: int | None = None) -> Callable[[str], int]:
    """Return a type for whole numbers within limits."""
    limits = _limits(None, at_least, at_most)

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if (
            value is None
            or (at_least is not None and value < at_least)
            or (at_most is not None and value > at_most)
        ):
            wanted = f"a whole number {limits}".rstrip()
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return read


def device(text: str) -> str:
    """Resolve a device: auto, cpu, cuda or cuda:<index>; an absent GPU is an error."""
    import torch  # slow to import, and most mistakes are found before

    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if text == "cpu":
        return text
    kind, _, index = text.partition(":")
    if kind != "cuda" or (index and not index.isdigit()) or text.endswith(":"):
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, cpu, cuda or cuda:<index>")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        have = f"GPUs: {count}" if count else "torch finds no GPU"
        raise argparse.ArgumentTypeError(f"{text!r} is not on this machine ({have}); use cpu")
    return text


def json_object(defaults: Mapping[str, object]) -> Callable[[str], dict[str, Any]]:
    """Return a type for JSON objects with some of the keys of `defaults`.

    Where the default is a number, the value must be one, finite and at least 0.
    """

    def read(text: str) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise argparse.ArgumentTypeError(f"{text[:99]!r} is not JSON ({error})") from None
        if not isinstance(value, dict) or not set(value) <= set(defaults):
            raise argparse.ArgumentTypeError(
                f"{text[:99]!r} is not a JSON object with keys among {', '.join(defaults)}"
            )
        for key, given in value.items():
            if type(defaults[key]) in (int, float) and (
                type(given) not in (int, float) or not 0 <= given < math.inf
            ):
                raise argparse.ArgumentTypeError(f"{key} = {given!r} is not a number at least 0")
        return value

    return read
