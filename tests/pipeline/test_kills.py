"""The whole pipeline of tiny models, killed at random moments, ends in the bytes of a whole run.

MUSICSCOPE_KILLS sets how often it is killed (default 4), MUSICSCOPE_SEED when.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import pytest

from tests.support import dag_inputs as inputs
from tools import smoke


def make_line(folder: Path, env: dict[str, str], hub: Path, entries: dict) -> None:
    """Copy the repository, with recordings and two models to fetch."""
    over = inputs.recordings("musicbench", "data/recordings/musicbench")
    over |= {
        "models": list(entries),
        "download_model": entries,
        "compute": inputs.PARAMS["compute"],
    }
    smoke.make_copy(folder, env, smoke.merged(inputs.PARAMS, over))
    shutil.copytree(hub, folder / "data/recordings/musicbench")


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_kills_and_refusing_disks_do_not_change_the_results(tmp_path):
    kills = int(os.environ.get("MUSICSCOPE_KILLS", "4"))
    seed = int(os.environ.get("MUSICSCOPE_SEED", random.SystemRandom().randrange(10**6)))
    print(f"{kills} kills, MUSICSCOPE_SEED={seed}")
    env = smoke.environment()
    entries = inputs.build_musicgens(tmp_path / "hub")
    inputs.write_musicbench(tmp_path / "recordings")
    for name in ("whole", "killed"):
        make_line(tmp_path / name, env, tmp_path / "recordings", entries)
    begin = time.monotonic()
    smoke.repro(tmp_path / "whole", env)
    seconds = time.monotonic() - begin
    smoke.repro_killed(tmp_path / "killed", env, kills, seconds, seed)
    smoke.check_killed(tmp_path / "whole", tmp_path / "killed", env)
    print(f"{seconds:.0f} s whole, {time.monotonic() - begin - seconds:.0f} s with {kills} kills")
