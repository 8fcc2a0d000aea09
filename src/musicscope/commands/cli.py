"""`musicscope <command>`: tools beside the pipeline, each imported only when it runs."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn


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


# --- checks of options: types for argparse ------------------------------------------------------

COMMANDS = {
    "find-concept": (
        "musicscope.commands.find_concept",
        "find features of a model that distinguish two folders of recordings",
    ),
    "generate": (
        "musicscope.commands.generate",
        "generate music with concepts switched off or on, beside an unedited control",
    ),
    "plan": (
        "musicscope.commands.plan.estimate",
        "estimate disk, memory and hours of a configuration before it runs",
    ),
    "studio": (
        "musicscope.commands.studio.app",
        "open a local web page to switch concepts off or on and listen",
    ),
}
"""Command -> module with `add_arguments(parser)` and `run(args)`, and its help text."""


class Parser(argparse.ArgumentParser):
    """Reports a wrong option in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: {message} (options: {self.prog} --help)\n")


def one_line(error: BaseException) -> str:
    """Say in one line what went wrong; errors that no code of ours raises are named."""
    if isinstance(error, OSError) and error.strerror:
        file = f"{error.filename}: " if error.filename else ""
        return f"{file}{error.strerror}"
    text = " ".join(str(error).split())
    if isinstance(error, UnicodeError):
        return f"text is not UTF-8 ({text}): save the file as UTF-8"
    if isinstance(error, (ValueError, FileNotFoundError, ImportError)):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command.

    An error ends in one line and status 1, a wrong option in one line and status 2, Ctrl-C in
    status 130. With --debug an error keeps its traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog="musicscope", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, (module, text) in COMMANDS.items():
        own = commands.add_parser(name, help=text)
        if argv[:1] == [name]:
            chosen = importlib.import_module(module)
            own.description = (chosen.__doc__ or text).strip()
            own.formatter_class = argparse.RawDescriptionHelpFormatter
            chosen.add_arguments(own)
            own.add_argument("--debug", action="store_true", help="show the traceback of an error")
            own.set_defaults(run=chosen.run)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        print(f"\nmusicscope {args.command}: stopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if args.debug:
            raise
        sys.exit(f"musicscope {args.command}: {one_line(error)}")


if __name__ == "__main__":
    main()
