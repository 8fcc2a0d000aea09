"""One thin script per stage, started by `run_stage`. This checkout's sources come first, so that an
experiment in a temporary directory runs the code that was committed with it, not an editable
install elsewhere."""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

# Worker processes keep memory that they free: half of the codec's time went into page faults.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**30))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**32))

# Logs hold what a stage says: no bars and no advice of libraries.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from musicscope.core import command_line, io  # noqa: E402

command_line.report_in_one_line()  # before a stage's own imports, which take seconds


def stage_args(description: str | None, *names: str) -> list[str]:
    """Parse the positional arguments `names` of a stage, such as model and slot.

    Usage: ``model, slot = stage_args(__doc__, "model", "slot")``; --help prints the description.
    """
    parser = command_line.Parser(description=description)
    for name in names:
        kind = functools.partial(listed, f"{name}s")
        parser.add_argument(name, type=kind, help=f"a name in params.yaml: {name}s")
    given = vars(parser.parse_args())
    return [given[name] for name in names]


def listed(key: str, name: str) -> str:
    """Return a name that params.yaml lists under `key`; it is an option's type."""
    from musicscope.config import ParamsError, load_params

    try:
        names = getattr(load_params(), key)
    except ParamsError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if name not in names:
        raise argparse.ArgumentTypeError(
            f"{name!r} is not among {key} of params.yaml ({', '.join(names)})"
        )
    return name


model_name = functools.partial(listed, "models")


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage, alone among processes with the same arguments; errors end in one line.

    A killed `dvc` leaves its stage running. Were the next run not to wait, both would replace the
    same outputs, and the older could write last.
    """
    words = [command_line.program(), *(w for w in sys.argv[1:] if w != command_line.DEBUG)]
    asks = {"-h", "--help"} & set(words)
    follows = os.environ.get("RANK", "0") != "0"  # the first of several ranks holds the lock

    def alone() -> None:
        name = "+".join(words).replace("/", "_")[:200]
        with io.sole_user(Path(".dvc/tmp/stages") / name, f"runs {' '.join(words)}"):
            main()

    command_line.run_program(main if asks or follows else alone)
