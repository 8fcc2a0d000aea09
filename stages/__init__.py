"""One thin script per stage. This checkout's sources come first, so that an experiment in a
temporary directory runs the code that was committed with it, not an editable install elsewhere."""

import argparse
import os
import sys
from pathlib import Path

# Worker processes keep memory that they free: half of the codec's time went into page faults.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**30))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**32))

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))


def stage_args(description: str | None, *names: str) -> list[str]:
    """Parse the positional arguments `names` of a stage, such as model and slot.

    Usage: ``model, slot = stage_args(__doc__, "model", "slot")``; --help prints the description.
    """
    parser = argparse.ArgumentParser(description=description)
    for name in names:
        parser.add_argument(name, help=f"a name in params.yaml: {name}s")
    return list(vars(parser.parse_args()).values())
