"""`musicscope <command>`: tools beside the pipeline, each imported only when it runs."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from musicscope.core.command_line import Parser, run_program

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


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; `core.command_line.run_program` says how errors end."""
    argv = list(sys.argv[1:] if argv is None else argv)
    run_program(lambda: _command(argv), " ".join(["musicscope", *argv[:1]]), argv)


def _command(argv: Sequence[str]) -> None:
    parser = Parser(prog="musicscope", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, (module, text) in COMMANDS.items():
        own = commands.add_parser(name, help=text)
        if argv[:1] == [name]:
            chosen = importlib.import_module(module)
            own.description = (chosen.__doc__ or text).strip()
            own.formatter_class = argparse.RawDescriptionHelpFormatter
            chosen.add_arguments(own)
            own.set_defaults(run=chosen.run)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
