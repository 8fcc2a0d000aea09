"""Universal SAEs and whole training stages under torchrun: what one process makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from musicscope.activations.store import ActivationStore
from musicscope.core.distributed import ALONE, Ranks
from musicscope.core.stats import Estimate
from musicscope.dictionaries.core import CROSSCODER
from musicscope.dictionaries.data import pair
from musicscope.dictionaries.training import train
from tests.core.test_ranks import ROOT, torchrun
from tests.support.dictionaries import make_workspace, usae_section, write_embedded, write_store

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
WIDTHS, CLIPS, FRAMES = (16, 24), 12, 60
METHODS = ("paper", "all_decoders", CROSSCODER)
SETTINGS = {"expansion": 3, "k": 4, "samples": 40 * 96, "batch_size": 96, "aux_weight": 0.25}


def open_pair(root: Path):
    return pair([ActivationStore.open(root / f"m{d}") for d in WIDTHS], "train")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stores of the same sparse factors, in directions of their own."""
    root, rng = tmp_path_factory.mktemp("stores"), np.random.default_rng(0)
    factors = rng.exponential(size=(CLIPS, FRAMES, 20)) * (rng.random((CLIPS, FRAMES, 20)) < 0.15)
    ids, groups = [f"c{i}" for i in range(CLIPS)], [f"g{i}" for i in range(CLIPS)]
    for d in WIDTHS:
        clips = list((factors @ rng.standard_normal((20, d)) + 3).astype(np.float32))
        write_store(root / f"m{d}", clips, ids, group=groups)
    return root


def train_all(ranks: Ranks, folder: Path, out: Path) -> None:
    """One dictionary of each method; the second rank dies once, in the middle of the second."""
    paired = open_pair(folder)
    for method in METHODS:

        def mortal(row, method=method):
            mark = out / "died"
            middle = method == METHODS[1] and row["step"] > 20
            if ranks.rank == 1 and middle and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), 9)

        trained = train(
            paired, usae_section(**SETTINGS, dead_after_samples=400), method, 3, ("a", "b"), "top1",
            checkpoint=out / f"{method}.pt", checkpoint_every=8, on_log=mortal, ranks=ranks,
        )  # fmt: skip
        sides = [list(vars(side).values())[:4] for side in trained.dictionary.weights]
        torch.save([sides, trained.history], out / f"{method}-of-{ranks.size}-{ranks.rank}")


@pytest.mark.slow
def test_two_ranks_train_the_dictionaries_of_one_also_after_one_died(stores, tmp_path):
    train_all(ALONE, stores, tmp_path)
    for checkpoint in tmp_path.glob("*.pt"):
        checkpoint.unlink()
    body = "from tests.dictionaries import test_ranks as u\n"
    body += f"u.train_all(ranks, Path({str(stores)!r}), Path('.'))"
    torchrun(tmp_path, body, restarts=1)
    assert (tmp_path / "died").exists()
    for method in METHODS:
        alone, first, second = (
            torch.load(tmp_path / f"{method}-of-{name}", weights_only=True)
            for name in ("1-0", "2-0", "2-1")
        )
        assert first[1] == second[1]
        for ours, other, theirs in zip(first[0], second[0], alone[0], strict=True):
            assert all(map(torch.equal, ours, other))
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
        assert max(row["aux_loss"] for row in alone[1]) > 0
        for ours, theirs in zip(first[1], alone[1], strict=True):
            assert ours["drawn"] == theirs["drawn"]
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
            assert ours["aux_loss"] == pytest.approx(theirs["aux_loss"], rel=5e-3, abs=1e-5)


@pytest.mark.slow
def test_the_stage_launches_itself_under_torchrun(tiny_musicgen, tmp_path):
    """`python -m stages.train_sae` with compute.engine: torchrun, against processes."""
    found = {}
    for engine in ("processes", "torchrun"):
        (tmp_path / engine).mkdir()
        root = make_workspace(tmp_path / engine, tiny_musicgen, write_embedded)
        params = yaml.safe_load((root / "params.yaml").read_text())
        params["compute"] |= {"engine": engine, "processes": 2}
        (root / "params.yaml").write_text(yaml.safe_dump(params))
        path = os.pathsep.join([str(ROOT), str(ROOT / "src")])
        env = os.environ | {"DVC_ROOT": str(root), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        command = [sys.executable, "-m", "stages.train_sae", "tiny", "top1"]
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found[engine] = json.loads((root / "metrics/train_sae/tiny-top1.json").read_text())
        assert (root / "data/sae/tiny/top1/seed-1/ae.pt").is_file()
        assert (root / "plots/train_sae/tiny-top1-loss.csv").is_file()
    ours, theirs = found["torchrun"], found["processes"]
    assert ours.keys() == theirs.keys()
    for key in ("explained_variance", "l0", "train_frames", "ce_sae"):
        one, other = (Estimate.read(found[key]).value for found in (ours, theirs))
        assert one == pytest.approx(other, rel=0.02), key
