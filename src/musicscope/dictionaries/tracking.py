"""Curves of training in Weights & Biases or TensorBoard, beside the files that DVCLive writes.

`compute.trackers` names them. They see what DVCLive sees, step by step, and change no result. Both
write below `FOLDER`; Weights & Biases also uploads unless WANDB_MODE is offline.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
Log = Callable[[Row], None]
FOLDER = Path("runs")
PROJECT = "musicscope"


def check(trackers: Sequence[str]) -> None:
    """Raise ValueError, with the remedy, for a tracker that is not installed.

    Its module and its extra have its name.
    """
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"params.yaml: compute.trackers has {name}, which is an extra: pip install "
                f"'.[{name}]', or take it out"
            )


@contextlib.contextmanager
def track(trackers: Sequence[str], group: str, name: str) -> Generator[Log]:
    """Open a run `name` of `group` in all trackers; yields the function that logs a row to them.

    A row has `step` and numbers; other values are left out.
    """
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(OPEN[tracker](group, name)) for tracker in trackers]

        def log(row: Row) -> None:
            numbers = {
                key: float(value) for key, value in row.items()
                if key != "step" and isinstance(value, int | float)
            }  # fmt: skip
            for write in logs:
                write(row["step"], numbers)

        yield log


Write = Callable[[int, dict[str, float]], None]


@contextlib.contextmanager
def _wandb(group: str, name: str) -> Generator[Write]:
    import wandb

    folder = FOLDER / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=PROJECT, group=group, name=f"{group}/{name}", dir=str(folder),
        reinit="create_new", settings=wandb.Settings(silent=True, disable_git=True),
    )  # fmt: skip
    try:
        yield lambda step, numbers: run.log(numbers, step=step)
    finally:
        run.finish()


@contextlib.contextmanager
def _tensorboard(group: str, name: str) -> Generator[Write]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(FOLDER / "tensorboard" / group / name))

    def write(step: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)
        writer.flush()  # the curve appears while the stage runs

    try:
        yield write
    finally:
        writer.close()


OPEN = {"wandb": _wandb, "tensorboard": _tensorboard}
