"""Ray, where it is installed (the extra `ray`): same bytes, and a killed worker loses nothing."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path

import pytest

from musicscope.activations.extraction import extract
from tests.activations.test_extraction import BatchModel, FakeClips, contents, make_plan, out

pytest.importorskip("ray", reason="Ray is an extra: pip install '.[ray]' runs these tests")
pytestmark = pytest.mark.slow


def sources(folder: str):
    """The clips, and a model whose first pass over a third clip kills its worker, twice in all."""

    class Mortal(BatchModel):
        def capture(self, batch, names):
            Path(folder, f"pid-{os.getpid()}").touch()
            deaths = sorted(Path(folder).glob("died-*"))
            if len(batch) == 1 and len(deaths) < 2:
                Path(folder, f"died-{os.getpid()}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().capture(batch, names)

    return Mortal() if Path(folder, "mortal").exists() else BatchModel(), FakeClips()


def square(job: int) -> int:
    if job == 13:
        raise ValueError("unlucky")
    return job * job


def test_killed_workers_lose_nothing_and_errors_come_through(tmp_path, monkeypatch):
    from musicscope.core import distributed as ray_engine

    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    opened = functools.partial(ray_engine.ray_workers, device="cpu")
    todo = make_plan(BatchModel())
    extract(todo, lambda: (BatchModel(), FakeClips()), out(tmp_path / "alone"))
    mine = functools.partial(sources, str(tmp_path))
    (tmp_path / "mortal").touch()
    extract(todo, mine, out(tmp_path / "ray"), processes=2, workers=opened)
    assert contents(out(tmp_path / "ray")) == contents(out(tmp_path / "alone"))
    assert len(list(tmp_path.glob("died-*"))) == 2
    assert os.getpid() not in {int(p.name.split("-")[1]) for p in tmp_path.glob("pid-*")}
    with opened(2) as run:
        assert list(run(square, range(5))) == [0, 1, 4, 9, 16]
        with pytest.raises(ValueError, match="unlucky"):
            list(run(square, [1, 13]))
