"""Processes that hold the lock of a scratch folder."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

CODE = """
import json, shutil, sys
from musicscope.core.io import scratch_dir
with scratch_dir(json.loads(sys.argv[1])) as folder:
    (folder / "begun").touch()
    print(folder, flush=True)
    if sys.stdin.readline() == "finish\\n":
        shutil.rmtree(folder)
"""


def python(code: str, *arguments: str, cwd: Path | None = None, **more: Any) -> subprocess.Popen:
    """Start Python on `code` with this checkout's sources and pipes to it."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=cwd, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path, **more},
    )  # fmt: skip


@contextlib.contextmanager
def holder(key: object) -> Iterator[subprocess.Popen]:
    """Run a process that works in the scratch folder of `key`.

    It ends, and removes the folder, once it reads "finish".
    """
    with python(CODE, json.dumps(key)) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()
