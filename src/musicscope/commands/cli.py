"""`musicscope <command>`: tools beside the pipeline, each imported only when it runs."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import io
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from musicscope.commands.arguments import ARGUMENTS
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
    "demo": (
        "musicscope.commands.demo",
        "play a piece, and the same piece with a concept switched off or on, in a minute",
    ),
    "plan": (
        "musicscope.commands.plan.estimate",
        "estimate disk, memory and hours of a configuration before it runs",
    ),
    "studio": (
        "musicscope.commands.studio.app",
        "open a local web page to switch concepts off or on and listen",
    ),
    "view": (
        "musicscope.commands.view",
        "serve the report and the feature pages on this machine",
    ),
    "export": (
        "musicscope.commands.export.command",
        "write an SAE or its features for SAELens, dictionary_learning or the Hugging Face hub",
    ),
    "import": (
        "musicscope.commands.import_sae",
        "read an SAE that SAELens or dictionary_learning saved",
    ),
    "completion": (
        "musicscope.commands.completion",
        "print a script that completes commands and options in a shell",
    ),
}
"""Command -> module with `run(args)`, which may return its results as JSON, and its help text."""
SOURCES = Path(__file__).resolve().parents[2]
NO_RESULTS = ("studio", "view", "completion")
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Environment in which libraries print neither warnings nor bars; what the user set stays."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; `core.command_line.run_program` says how errors end."""
    argv = list(sys.argv[1:] if argv is None else argv)
    run_program(lambda: _command(argv), " ".join(["musicscope", *argv[:1]]), argv)


class _Version(argparse.Action):
    """Prints the version of the package and of what results depend on."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        from importlib.metadata import version

        libraries = (f"{name} {version(name)}" for name in ("torch", "transformers"))
        print(f"musicscope {version('musicscope')} ({', '.join(libraries)})")
        parser.exit()


def build(command: str | None = None) -> tuple[Parser, dict[str, Parser]]:
    """Make the parser, and those of all commands by name; only `command` gets its options.

    None gives all commands their options.
    """
    parser = Parser(prog="musicscope", description=__doc__)
    parser.add_argument("--version", action=_Version, nargs=0, help="print versions and exit")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    parsers = {}
    for name, (module, text) in COMMANDS.items():
        own = parsers[name] = commands.add_parser(name, help=text)
        if command in (None, name) and name in ARGUMENTS:
            own.description = _docstring(module) or text
            own.formatter_class = argparse.RawDescriptionHelpFormatter
            ARGUMENTS[name](own)
        loudness = own.add_mutually_exclusive_group()
        loudness.add_argument("-v", "--verbose", action="store_true", help="show logs of libraries")
        loudness.add_argument(
            "-q", "--quiet", action="store_true", help="print results and errors alone"
        )
        if name not in NO_RESULTS:
            own.add_argument("--json", action="store_true", help="print results as JSON")
    return parser, parsers


def _docstring(module: str) -> str:
    """Read the docstring of a module without importing it."""
    path = SOURCES.joinpath(*module.split(".")).with_suffix(".py")
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return ast.get_docstring(ast.parse(text)) or ""


def _command(argv: Sequence[str]) -> None:
    parser, _ = build(argv[0] if argv else "")
    args = parser.parse_args(argv)
    if args.verbose:
        logging.basicConfig(level=logging.INFO)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info")
    else:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
    as_json = getattr(args, "json", False)
    with contextlib.ExitStack() as stack:
        if args.quiet:  # errors are printed by `run_program`, after this
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        if as_json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        result = importlib.import_module(COMMANDS[args.command][0]).run(args)
    if as_json:
        print(json.dumps(result, indent=2, default=str, allow_nan=False))


if __name__ == "__main__":
    main()
