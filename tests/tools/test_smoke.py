"""The disks that the smoke run makes refuse do refuse, also for root."""

from __future__ import annotations

import os
import random
import sys

import pytest

from tools import smoke

DVC = f"""#!{sys.executable}
import sys
try:
    open("data/file", "wb").write(bytes(10**7))
    for top in ("metrics", "plots", "data", ".dvc/tmp/partial"):
        open(top + "/file", "w").write("x")
except OSError as error:
    sys.exit(error.strerror)
"""


@pytest.fixture
def env(tmp_path):
    for top in ("metrics", "plots", "data", ".dvc/tmp/partial"):
        (tmp_path / top).mkdir(parents=True)
    (tmp_path / "dvc").write_text(DVC)
    (tmp_path / "dvc").chmod(0o755)
    return {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("refusal", "said"),
    [(smoke.disk_full, "File too large"), (smoke.read_only, "Permission denied")],
)
def test_a_refusing_disk_ends_the_run(tmp_path, env, refusal, said, capsys):
    with refusal(tmp_path, random.Random(0)) as before:
        smoke.repro_failing(tmp_path, env, before, 30)
    printed = capsys.readouterr().out
    assert said in printed
    assert "nothing was refused" not in printed
    (tmp_path / "data/new").touch()  # the folder is as it was


def test_a_traceback_is_a_failure_and_a_run_with_nothing_to_do_is_none(tmp_path, env, capsys):
    (tmp_path / "dvc").write_text(f"#!{sys.executable}\nraise OSError('disk')\n")
    with pytest.raises(SystemExit, match="a refusing disk gave status 1"):
        smoke.repro_failing(tmp_path, env, lambda: None, 30)
    (tmp_path / "dvc").write_text(f"#!{sys.executable}\n")
    smoke.repro_failing(tmp_path, env, lambda: None, 30)
    assert "nothing was refused" in capsys.readouterr().out
