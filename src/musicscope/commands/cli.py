"""`musicscope <command>`: what is done beside the pipeline. Imported when asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "find-concept": (
        "musicscope.commands.find_concept",
        "features of a model that tell two folders of recordings apart",
    ),
    "generate": (
        "musicscope.commands.generate",
        "music with concepts switched off and on, beside the same music without",
    ),
    "plan": (
        "musicscope.commands.plan.estimate",
        "what a configuration will take, before anything runs",
    ),
    "studio": (
        "musicscope.commands.studio.app",
        "a page on this machine: switch concepts off and on, and hear it",
    ),
}
"""Command -> module with `add_arguments(parser)` and `run(args)`, and a line of help."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; bad input ends in one line that says what to do instead of a traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="musicscope", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, text) in COMMANDS.items():
        own = commands.add_parser(name, help=text)
        if argv[:1] == [name]:
            chosen = importlib.import_module(module)
            own.description = (chosen.__doc__ or text).strip()
            own.formatter_class = argparse.RawDescriptionHelpFormatter
            chosen.add_arguments(own)
            own.set_defaults(run=chosen.run)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"musicscope {args.command}: {error}")


if __name__ == "__main__":
    main()
