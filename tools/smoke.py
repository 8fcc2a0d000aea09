"""The whole line on a few clips: `dvc repro` with tools/smoke_params.yaml, in a temporary copy.

The copy holds what Git tracks or would track here, so uncommitted work is tried too, and this
checkout stays as it is. Checked: every stage runs, a second `dvc repro` has nothing to do, and
metrics/summary.json has the keys of the committed one. With --kills N the line then runs again in
a fresh copy, is killed N times on its way, meets a full and a read-only disk, and must end in the
same bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import yaml

from musicscope.config import Params, load_params
from musicscope.core.command_line import Parser, run_program, whole
from musicscope.core.io import read_json
from tools.dvc_repair import RWLOCK, repair

ROOT = Path(__file__).resolve().parents[1]
FROZEN = ("pretrain", "steer_full")
"""Stages whose committed results, and entries in dvc.lock, are inputs here."""
GIT = ["git", "-c", "user.name=smoke", "-c", "user.email=smoke@localhost"]


def environment() -> dict[str, str]:
    """This Python's folder first on PATH; nothing of an outer Git or DVC run."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("GIT_DIR", "GIT_IND", "DVC_"))}
    # Not resolved: a virtual environment's python is a link to one without its packages.
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return env


def merged(base: Any, over: Any) -> Any:
    """`over` laid over `base`: sections key by key, everything else replaced."""
    if isinstance(base, dict) and isinstance(over, dict):
        return {**base, **{k: merged(base.get(k), v) for k, v in over.items()}}
    return over


def make_copy(
    folder: Path, env: dict[str, str], over: dict[str, Any] | None = None, skip: str = ""
) -> None:
    """A Git repository in `folder` with this work tree's files, the small params and no results.

    `over` is laid over the small params. Files whose name begins with `skip` are left out.
    """
    folder.mkdir()
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, env=env, check=True, capture_output=True, text=True)
    for name in filter(None, names.stdout.split("\0")):
        if skip and name.startswith(skip):
            continue
        if (ROOT / name).is_file():  # a deleted file is still listed until that is committed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for result in [*folder.glob("metrics/*"), *folder.glob("plots/*")]:
        if result.name not in FROZEN:
            shutil.rmtree(result) if result.is_dir() else result.unlink()
    lock = yaml.safe_load((ROOT / "dvc.lock").read_text(encoding="utf-8"))
    stages = {k: v for k, v in lock["stages"].items() if k.split("@")[0] in FROZEN}
    (folder / "dvc.lock").write_text(yaml.safe_dump({**lock, "stages": stages}), encoding="utf-8")
    params = folder / "params.yaml"
    small = yaml.safe_load((ROOT / "tools/smoke_params.yaml").read_text(encoding="utf-8"))
    whole = merged(yaml.safe_load(params.read_text(encoding="utf-8")), small)
    whole = merged(whole, over or {})
    params.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
    load_params(params)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "smoke"]):
        subprocess.run([*GIT, *command], cwd=folder, env=env, check=True)


def repro(folder: Path, env: dict[str, str]) -> str:
    """Run `dvc repro`, printing what it prints and the seconds each stage took."""
    process = subprocess.Popen(
        ["dvc", "repro"],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines, stage, begin = [], "", time.monotonic()

    def close() -> None:
        if stage:
            print(f"-- {stage}: {time.monotonic() - begin:.1f} s", flush=True)

    for line in process.stdout or ():
        lines.append(line)
        if line.startswith(("Running stage", "Verifying")):
            close()
            stage, begin = line.strip().removeprefix("Running stage ").rstrip(":"), time.monotonic()
        print(line, end="", flush=True)
    close()
    if process.wait():
        sys.exit(f"smoke: dvc repro failed with exit code {process.returncode}")
    return "".join(lines)


def studied(key: str, small: Params, whole: Params) -> bool:
    """Whether a key of the summary is of models that the small run has too."""
    return not ({*whole.models} - {*small.models}) & {*key.split(".")}


def check(folder: Path, env: dict[str, str]) -> None:
    """Exit with what is wrong with the results in `folder`."""
    listed = subprocess.run(
        ["dvc", "stage", "list", "--name-only"],
        cwd=folder,
        env=env,
        check=True,
        capture_output=True,
        text=True,
    )
    ran = yaml.safe_load((folder / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    if absent := set(listed.stdout.split()) - set(ran):
        sys.exit(f"smoke: these stages did not run: {sorted(absent)}")
    if "up to date" not in (again := repro(folder, env)):
        sys.exit(f"smoke: a second dvc repro ran something:\n{again}")
    committed = ROOT / "metrics/summary.json"
    if not committed.is_file():
        sys.exit("smoke: metrics/summary.json is not committed; run dvc repro")
    whole, small = (load_params(root / "params.yaml") for root in (ROOT, folder))
    keys, wanted = (
        {key for key in flat_keys(read_json(path)) if studied(key, small, whole)}
        for path in (folder / "metrics/summary.json", committed)
    )
    if keys != wanted:
        sys.exit(
            f"smoke: metrics/summary.json lacks {sorted(wanted - keys)} and has besides "
            f"{sorted(keys - wanted)}"
        )
    print(f"smoke: {len(ran)} stages ran, {len(keys)} numbers in metrics/summary.json")


@contextlib.contextmanager
def disk_full(folder: Path, draw: random.Random) -> Generator[Callable[[], None]]:
    """No file may grow beyond a random size, about that of the outputs of some stage."""
    most = round(math.exp(draw.uniform(math.log(2e4), math.log(4e6))))
    print(f"-- no file above {most} bytes", flush=True)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


@contextlib.contextmanager
def read_only(folder: Path, draw: random.Random) -> Generator[Callable[[], None]]:
    """Nothing may be added to one of the folders that stages write, nor to those below it."""
    top = draw.choice(["metrics", "plots", "data", ".dvc/tmp/partial"])
    print(f"-- {top} is read-only", flush=True)
    folders = [p for p in (folder / top, *(folder / top).rglob("*")) if p.is_dir()]
    for path in folders:
        path.chmod(0o555)
    try:
        yield obey_permissions
    finally:
        for path in folders:
            if path.exists():
                path.chmod(0o755)


def obey_permissions() -> None:
    """Take from root, and programs that this process starts, the right to write anywhere."""
    libc, drop_from_bounding_set, override = ctypes.CDLL(None), 24, 1
    if os.geteuid() == 0 and libc.prctl(drop_from_bounding_set, override, 0, 0, 0):
        raise OSError("root may write anywhere here: run this as another user")


def repro_failing(
    folder: Path, env: dict[str, str], before: Callable[[], None], seconds: float
) -> None:
    """Run `dvc repro` on a disk that refuses; exit if a stage ends in a traceback.

    It may succeed, where nothing is left to do or what is left fits.
    """
    process = subprocess.Popen(
        ["dvc", "repro"], cwd=folder, env=env, start_new_session=True, preexec_fn=before,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:  # the refusal concerns none of the stages that ran
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
    lines = [line for line in said.splitlines() if line.strip()]
    print("\n".join(["-- it ended:", *lines[-4:]]), flush=True)
    if process.returncode == 0:
        print("-- nothing was refused", flush=True)
    if "Traceback" in said:
        sys.exit(f"smoke: a refusing disk gave status {process.returncode} and:\n{said}")


def repro_killed(
    folder: Path, env: dict[str, str], kills: int, seconds: float, seed: int = 0
) -> None:
    """Run `dvc repro` in `folder`, killed `kills` times at random moments of about `seconds`.

    Every other time only dvc dies, as `kill -9` would have it: its stage then runs on, beside the
    one that the next dvc starts. In between the disk is full once, and read-only once.
    """
    draw = random.Random(seed)
    refusals = {kills // 3: disk_full, 2 * kills // 3: read_only}
    for kill in range(kills):
        process = subprocess.Popen(
            ["dvc", "repro", "-q"], cwd=folder, env=env, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait = draw.uniform(0.2, 1.8) * seconds / kills
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            alone = kill % 2 == 1
            print(f"-- after {wait:.0f} s: killing dvc{' alone' if alone else ''}", flush=True)
            (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
            process.wait()
        repair(folder / RWLOCK)  # as `make repro` does
        if refusal := refusals.get(kill):
            with refusal(folder, draw) as before:
                repro_failing(folder, env, before, seconds / 2)
            repair(folder / RWLOCK)
    repro(folder, env)


def results(folder: Path) -> dict[str, Any]:
    """Hashes of all outs, and dvc.lock's record of every stage."""
    return yaml.safe_load((folder / "dvc.lock").read_text(encoding="utf-8"))["stages"]


def check_equal(folder: Path, again: Path, when: str) -> None:
    """Exit with the stages whose hashes in dvc.lock differ."""
    first, second = results(folder), results(again)
    if differ := [name for name in first if first[name] != second.get(name)]:
        sys.exit(f"smoke: {when} these stages ended in other bytes: {differ}")
    print(f"smoke: {when} all {len(first)} stages ended in the same bytes")


def check_killed(folder: Path, again: Path, env: dict[str, str]) -> None:
    """Exit with the stages whose results in `again` differ from those in `folder`."""
    check_equal(folder, again, "after kills")
    # The lock could name hashes that the files no longer have.
    status = subprocess.run(
        ["dvc", "status", "-q"], cwd=again, env=env, capture_output=True, text=True
    )
    if status.returncode:
        sys.exit(f"smoke: after kills dvc status is not clean:\n{status.stdout}{status.stderr}")
    left = [p for top in ("data", "metrics", "plots") for p in (again / top).rglob(".*.tmp*")]
    if left:
        sys.exit(f"smoke: killed writers left {[str(p.relative_to(again)) for p in left]}")


def flat_keys(value: Any, prefix: str = "") -> set[str]:
    """Dotted keys of all leaves."""
    if isinstance(value, dict):
        return set().union(*(flat_keys(v, f"{prefix}{k}.") for k, v in value.items()))
    return {prefix.rstrip(".")}


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the copies there to look at")
    parser.add_argument("--kills", type=whole(0), default=0, help="also kill a second run so often")
    parser.add_argument("--seed", type=whole(0), help="of the kills (default: another each time)")
    parser.add_argument("--twice", action="store_true", help="also compare two whole runs")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    env = environment()
    root = Path(tempfile.mkdtemp(prefix="musicscope-smoke-"))
    folder, again, killed = root / "whole", root / "again", root / "killed"
    begin = time.monotonic()
    try:
        # All copies at once: the work tree may change meanwhile.
        for copy in (folder, *([again] if args.twice else []), *([killed] if args.kills else [])):
            make_copy(copy, env)
        start = time.monotonic()
        repro(folder, env)
        seconds = time.monotonic() - start
        check(folder, env)
        if args.twice:
            repro(again, env)
            check_equal(folder, again, "in a second run")
        if args.kills:
            print(f"smoke: {args.kills} kills over {seconds:.0f} s, --seed {seed}", flush=True)
            repro_killed(killed, env, args.kills, seconds, seed)
            check_killed(folder, killed, env)
    finally:
        if args.keep:
            print(f"smoke: kept {root}")
        else:
            shutil.rmtree(root, ignore_errors=True)
    print(f"smoke: {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    run_program(main)
