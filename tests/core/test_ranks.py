"""Several ranks under torchrun do the work of one process: the same bytes, the same SAE."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from musicscope.activations import token_cache as codes
from musicscope.activations.extraction import extract
from musicscope.activations.store import ActivationStore
from musicscope.core import distributed
from musicscope.core.distributed import ALONE, Ranks
from musicscope.dictionaries.data import TRAIN, pair
from musicscope.dictionaries.training import train
from tests.activations.test_extraction import BatchModel, FakeClips, contents, make_plan, out
from tests.support.dictionaries import sae_section, sae_weights, write_planted

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
HEAD = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "src")!r}]
import os, signal
from pathlib import Path
from tests.core import test_ranks as t
from musicscope.core.distributed import join
"""


def torchrun(folder: Path, body: str, ranks: int = 2, restarts: int = 0) -> str:
    """Run `body`, for which `ranks` stands for this process, under torchrun; its stderr."""
    script = folder / "run.py"
    script.write_text(f"{HEAD}with join() as ranks:\n    " + body.strip().replace("\n", "\n    "))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", str(script)]  # fmt: skip
    env = os.environ | {"DVC_ROOT": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


class CodecModel(BatchModel):
    """A BatchModel with a codec: tokens of a clip are needed by the shard, whoever made them."""

    device = "cpu"

    def __init__(self) -> None:
        super().__init__()
        self.codec = torch.nn.Linear(2, 2)
        torch.nn.init.ones_(self.codec.weight)
        torch.nn.init.zeros_(self.codec.bias)
        self.coded = 0

    def encode(self, audio, captions):
        self.coded += len(audio)
        return SimpleNamespace(codes=(100 * super().encode(audio, captions)).long())

    def with_captions(self, tokens, captions):
        return tokens.float()


def extract_codes(ranks: Ranks, root: Path) -> CodecModel:
    model = CodecModel()
    clips = FakeClips(3 * codes.CHUNK)
    folders = out(root / f"of-{ranks.size}")
    extract(make_plan(model, clips), lambda: (model, clips), folders, ranks=ranks)
    if ranks.size > 1:
        (root / f"rank-{ranks.rank}").write_text(f"{model.coded} {model.passes}")
    return model


def killed_once(ranks: Ranks, root: Path) -> None:
    """The second rank dies in its second shard, the first time."""
    mark = root / "died"

    class Mortal(BatchModel):
        def capture(self, batch, names):
            if ranks.rank == 1 and self.passes == 3 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), 9)
            return super().capture(batch, names)

    model, clips = Mortal(), FakeClips(16)
    extract(make_plan(model, clips), lambda: (model, clips), out(root / "killed"), ranks=ranks)
    (root / f"again-{ranks.rank}").write_text(str(model.passes))


@pytest.mark.slow
def test_two_ranks_write_the_bytes_of_one_also_after_one_was_killed(tmp_path, monkeypatch):
    body = "t.killed_once(ranks, Path('.'))\nt.extract_codes(ranks, Path('.'))"
    torchrun(tmp_path, body, restarts=1)
    scratch = tmp_path / ".dvc" / "tmp" / "partial"
    assert not list(scratch.glob("*/top*"))  # the scratch is gone
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "alone"))
    alone = extract_codes(ALONE, tmp_path)
    assert contents(out(tmp_path / "of-1")) == contents(out(tmp_path / "of-2"))
    shares = [(tmp_path / f"rank-{r}").read_text().split() for r in range(2)]
    coded, passes = np.array(shares, dtype=int).T
    assert coded.tolist() == [16, 8]  # chunks 0 and 2; 1
    assert passes.sum() == alone.passes
    assert passes.min() > 0

    assert (tmp_path / "died").exists()
    model, clips = BatchModel(), FakeClips(16)
    extract(make_plan(model, clips), lambda: (model, clips), out(tmp_path / "whole"))
    assert contents(out(tmp_path / "killed")) == contents(out(tmp_path / "whole"))
    # Six shards of 3, 3, 3, 3, 3 and 1 clips in batches of 2: the second rank's are 1, 3 and 5.
    assert int((tmp_path / "again-1").read_text()) == 5 - 2


SETTINGS = {"samples": 60 * 128, "dead_after_samples": 700, "aux_weight": 0.25, "expansion": 4}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ActivationStore:
    return write_planted(tmp_path_factory.mktemp("store"))


def train_together(ranks: Ranks, folder: str, root: Path, die_at: int | None = None) -> None:
    """Train on the store; the last rank dies once behind step `die_at`, if given."""

    def mortal(row: dict[str, float]) -> None:
        mark = root / "died"
        if die_at is not None and row["step"] >= die_at and not mark.exists() and not ranks.leads:
            mark.touch()
            os.kill(os.getpid(), 9)

    trained = train(
        pair([ActivationStore.open(folder)], TRAIN), sae_section(**SETTINGS), "sae", 5,
        checkpoint=root / "c.pt", checkpoint_every=16, on_log=mortal, ranks=ranks,
    )  # fmt: skip
    torch.save([sae_weights(trained.dictionary), trained.history], root / f"sae-{ranks.rank}.pt")


@pytest.mark.slow
def test_two_ranks_train_the_sae_of_one_also_after_one_died(store, tmp_path):
    call = f"t.train_together(ranks, {str(store.folder)!r}, Path({{!r}}), {{}})"
    for name in ("killed", "whole", "alone"):
        (tmp_path / name).mkdir()
    torchrun(tmp_path, f"{call.format('killed', 37)}\n{call.format('whole', None)}", restarts=1)
    train_together(ALONE, str(store.folder), tmp_path / "alone")
    killed, first, second, alone = (
        torch.load(tmp_path / name, weights_only=True)
        for name in ("killed/sae-0.pt", "whole/sae-0.pt", "whole/sae-1.pt", "alone/sae-0.pt")
    )
    assert (tmp_path / "killed" / "died").exists()
    for other in (killed, second):
        assert other[1] == first[1]
        assert all(map(torch.equal, other[0], first[0]))
    history = alone[1]
    assert max(row["aux_loss"] for row in history) > 0  # so that AuxK took part
    assert max(row["dead_fraction"] for row in history) > 0
    for ours, row in zip(first[1], history, strict=True):
        assert ours["loss"] == pytest.approx(row["loss"], rel=1e-3)
        assert ours["aux_loss"] == pytest.approx(row["aux_loss"], rel=1e-3, abs=1e-6)
        assert ours["dead_fraction"] == pytest.approx(row["dead_fraction"], abs=2 / 96)
    for ours, theirs in zip(first[0], alone[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_each_rank_reads_its_part_of_the_batches(store):
    whole = list(store.train_batches(96, 3, 96 * 110))  # over the end of an epoch of 10,000 rows
    for size in (2, 3):
        parts = [
            list(store.train_batches(96, 3, 96 * 110, rows=Ranks(rank, size).rows(96)))
            for rank in range(size)
        ]
        for step, batch in enumerate(whole):
            np.testing.assert_array_equal(np.concatenate([p[step] for p in parts]), batch)
    resumed = store.train_batches(96, 3, 96 * 110, rows=slice(48, 96), start_step=107)
    np.testing.assert_array_equal(next(resumed), whole[107][48:])
    with pytest.raises(ValueError, match="batch of 128 frames does not divide among 3 ranks"):
        Ranks(1, 3).rows(128)


def test_torchrun_is_started_with_the_stage_and_its_arguments(monkeypatch):
    started = []

    def become(program, arguments):
        started.append(arguments)
        raise SystemExit

    compute = SimpleNamespace(engine="torchrun", processes=3, device="cpu", threads=1, trackers=())
    monkeypatch.setattr(os, "execv", become)
    monkeypatch.setattr(sys, "argv", ["extract_activations.py", "nano-small"])
    main = SimpleNamespace(__spec__=SimpleNamespace(name="stages.extract_activations"))
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit), distributed.start(compute):
        pass
    assert started[0][1:3] == ["-m", "torch.distributed.run"]
    assert started[0][-3:] == ["-m", "stages.extract_activations", "nano-small"]
    assert "--nproc-per-node=3" in started[0]
    monkeypatch.setenv("RANK", "0")  # a rank already, here the only one
    with distributed.start(compute) as engine:
        assert (engine.ranks, engine.processes, engine.device) == (ALONE, 1, "cpu")
    assert len(started) == 1
