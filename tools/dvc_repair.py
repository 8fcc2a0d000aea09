"""Remove the lock file that a killed dvc may leave half-written: python -m tools.dvc_repair.

DVC keeps who reads and writes what in .dvc/tmp/rwlock and writes it in place. Killed at that moment
it leaves a file that is no JSON, and every later dvc stops at it. The file holds nothing that a new
run needs: a readable one is left alone, since another dvc may be using it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from musicscope.core.command_line import run_program

RWLOCK = Path(".dvc/tmp/rwlock")
PATIENCE = 1.0
"""Seconds: a dvc that is alive finishes writing in far less."""


def repair(path: Path = RWLOCK, patience: float = PATIENCE) -> bool:
    """Remove `path` if it stays unreadable for `patience` seconds; True if it was removed."""
    until = time.monotonic() + patience
    while path.is_file():
        try:
            json.loads(path.read_text(encoding="utf-8"))
            return False
        except ValueError:
            if time.monotonic() >= until:
                path.unlink(missing_ok=True)
                print(f"removed {path}, which a killed dvc left half-written", file=sys.stderr)
                return True
            time.sleep(0.05)
    return False


if __name__ == "__main__":
    run_program(repair)
