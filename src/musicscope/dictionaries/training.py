"""Train sparse dictionaries from activation stores, resumable to the bit.

The random numbers are the first weights, the order of the frames and, for a universal SAE, the
model that each step encodes. All are named by the seed; the order depends on (seed, epoch), the
draws and the learning rate on the number of the global step. So the schedule does not stretch with
the number of models, and a resumed run equals an unbroken one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from musicscope.activations.store import ActivationStore
from musicscope.config import ParamsError
from musicscope.config.dictionaries import TrainCrosscoder, TrainSae
from musicscope.core.distributed import ALONE, Ranks
from musicscope.core.io import atomic_file
from musicscope.core.precision import tf32
from musicscope.core.seeding import seed_for
from musicscope.dictionaries.core import CROSSCODER, JUMPRELU, ModelWeights, TopKSAE, UniversalSAE
from musicscope.dictionaries.data import Paired
from musicscope.dictionaries.step import (
    RULES,
    Result,
    State,
    initial_state,
    join,
    resample,
    split,
    step,
)

SAE = "sae"
METHODS = (SAE, *RULES, CROSSCODER)
"""An SAE of one model; a universal SAE by the name of its update rule; a crosscoder."""
LOG_ROWS = {SAE: 50}
"""Rows in a run's history; SHARED_LOG_ROWS for every other method."""
SHARED_LOG_ROWS = 100
LOG_COLUMNS = ("samples", "learning_rate", "loss", "aux_loss", "dead_fraction")
CALIBRATION_BATCHES = 32
RESAMPLE_UNTIL = 0.8
"""Share of the steps after which no dead latent restarts: it would not be learnt in time."""

Config = TrainSae | TrainCrosscoder


class LogRow(TypedDict):
    """One row of a history."""

    step: int
    samples: int
    """Frames seen so far."""
    learning_rate: float
    drawn: int | None
    """The encoded model; None for an SAE and a crosscoder."""
    loss: float
    """Unexplained share of the batch: of the drawn model, or for a crosscoder of all together."""
    cross_loss: float | None
    """Unexplained share averaged over the other models, if there are any."""
    aux_loss: float
    dead_fraction: float


@dataclass(frozen=True)
class Trained:
    """The outcome of `train`."""

    dictionary: TopKSAE | UniversalSAE
    """Acts on raw activations."""
    history: list[LogRow]
    dead_fraction: float
    """Share of latents that fired for none of the last dead_after_samples training frames."""


def count_steps(config: Config) -> int:
    """Return the number of whole batches in a run."""
    return config.samples // config.batch_size


def learning_rate(config: Config, number: int) -> float:
    """Compute the learning rate of step `number`: linear warmup, constant, linear decay."""
    steps = count_steps(config)
    warmup = max(1.0, config.warmup_fraction * steps)
    decay = max(1.0, config.decay_fraction * steps)
    return config.learning_rate * min(1.0, (number + 1) / warmup, (steps - number) / decay)


def count_latents(config: Config, widths: Sequence[int]) -> int:
    """Return the number of latents over activations of `widths`; ParamsError if below k."""
    latents = config.expansion * max(widths)
    if config.k > latents:
        raise ParamsError(
            f"k = {config.k} is out of range: allowed is at most {latents}, the latents that "
            f"expansion = {config.expansion} gives over width {max(widths)}"
        )
    if isinstance(config, TrainSae) and config.matryoshka and config.matryoshka[-1] >= latents:
        raise ParamsError(
            f"matryoshka = {list(config.matryoshka)} is out of range: allowed is below {latents}, "
            f"the latents that expansion = {config.expansion} gives over width {max(widths)}"
        )
    return latents


def selection(config: Config) -> str:
    """Return the sparsity rule: topk, or for an SAE also batchtopk or jumprelu."""
    return config.activation if isinstance(config, TrainSae) else "topk"


def sae_options(config: Config) -> dict[str, Any]:
    """Return the arguments of `step` that only an SAE has."""
    if not isinstance(config, TrainSae):
        return {}
    return {
        "prefixes": config.matryoshka,
        "bandwidth": config.bandwidth,
        "sparsity_weight": config.sparsity_weight,
    }


def normalisation(stores: Sequence[ActivationStore]) -> tuple[list[np.ndarray], list[float]]:
    """Compute mean [d] and scale per model, exact over its store's train rows (see UniversalSAE).

    For one model the scale is the root mean square of the standard deviations.
    """
    width = sum(store.width for store in stores) / len(stores)
    scales = [float(np.sqrt(np.square(store.std).sum() / width)) for store in stores]
    for store, scale in zip(stores, scales, strict=True):
        if scale == 0:
            raise ValueError(f"{store.folder}: all train activations are equal, nothing to learn")
    return [store.mean for store in stores], scales


def train(
    data: Paired,
    config: Config,
    method: str,
    seed: int,
    names: Sequence[str] = (),
    slot: str = "",
    device: str | torch.device = "cpu",
    checkpoint: Path | None = None,
    checkpoint_every: int = 200,
    on_log: Callable[[LogRow], None] | None = None,
    ranks: Ranks = ALONE,
) -> Trained:
    """Train one dictionary on `data` by one of METHODS.

    Activations are centred and divided by one number per model (`normalisation`). With `checkpoint`
    (a file) the state is saved there every so many steps and taken up again; `on_log` also gets the
    rows before a resume. Several `ranks` share every batch evenly and find the same dictionary, to
    the tolerance of floating point (see `step`); the first of them keeps the checkpoint, which all
    read. `names` and `slot` describe the models of a shared code; an SAE needs neither.
    FloatingPointError when the loss is not finite.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}: known {', '.join(METHODS)}")
    joint, widths = method == CROSSCODER, data.widths
    means, scales = normalisation(data.stores)
    shifts = [torch.tensor(mean, dtype=torch.float32, device=device) for mean in means]

    def normalise(batch: Sequence[np.ndarray]) -> list[Tensor]:
        parts = zip(map(torch.from_numpy, batch), shifts, scales, strict=True)
        if torch.device(device).type == "cuda":  # a copy from pinned memory does not wait
            parts = ((x.pin_memory(), mean, scale) for x, mean, scale in parts)
        xs = [(x.to(device, non_blocking=True) - mean) / scale for x, mean, scale in parts]
        return [join(xs)] if joint else xs

    threshold = None
    if isinstance(config, TrainSae) and config.activation == JUMPRELU:
        threshold = config.bandwidth
    state = initial_state(
        count_latents(config, widths), [sum(widths)] if joint else widths,
        seed_for(seed, "initial"), device,
        threshold,
    )  # fmt: skip
    steps, models = count_steps(config), len(state.weights)
    draws = np.random.default_rng(seed_for(seed, "draws")).integers(models, size=steps)
    aux_k = round(config.aux_k_fraction * sum(widths) / len(widths))
    start, history = 0, []
    if checkpoint is not None and checkpoint.exists():
        start, history = load_checkpoint(checkpoint, state)
    ranks.wait()  # none may write a newer one while another still reads
    if not ranks.leads:
        checkpoint = None
    if on_log:
        for row in history:
            on_log(row)
    restart = config.resample_every if isinstance(config, TrainSae) else 0
    log_every = max(1, steps // LOG_ROWS.get(method, SHARED_LOG_ROWS))
    stream = data.batches(
        config.batch_size, seed_for(seed, "order"), config.samples, start_step=start,
        rows=ranks.rows(config.batch_size),
    )  # fmt: skip
    for number, batch in enumerate(stream, start):
        drawn = int(draws[number])
        xs = normalise(batch)
        # On an H200 a step takes 12 ms with TF32 and 23 without (d 1536, F 24576); gradients keep
        # within 1e-4 of float64.
        with tf32(True, False):
            result = step(
                state,
                xs,
                lr=learning_rate(config, number),
                k=config.k,
                activation=selection(config),
                drawn=drawn,
                rule=method if method in RULES else "paper",
                aux_k=aux_k,
                aux_weight=config.aux_weight,
                dead_after=config.dead_after_samples,
                ranks=ranks,
                **sae_options(config),
            )
        if restart and (number + 1) % restart == 0 and number < RESAMPLE_UNTIL * steps:
            resample(
                state, xs[0], config.k, selection(config), config.dead_after_samples,
                seed_for(seed, "resample", number), ranks,
            )  # fmt: skip
        if number % log_every == 0 or number == steps - 1:
            if not torch.isfinite(result.losses).all():
                raise FloatingPointError(
                    f"loss is {result.losses.tolist()} at step {number} on "
                    f"{', '.join(str(s.folder) for s in data.stores)}: activations hold NaN or "
                    "infinity (ActivationStore.verify() checks the shards), or the section's "
                    "learning_rate is too high"
                )
            history.append(_row(state, result, number, drawn, config))
            if on_log:
                on_log(history[-1])
        if checkpoint is not None and (number + 1) % checkpoint_every == 0:
            save_checkpoint(checkpoint, state, number + 1, history)
    if checkpoint is not None:
        save_checkpoint(checkpoint, state, steps, history)

    if method == SAE:
        limit = -1.0 if state.threshold is None else state.threshold
        sae = TopKSAE(*state.weights[0], config.k, selection(config), limit)
        if sae.activation == "batchtopk":
            frames = CALIBRATION_BATCHES * config.batch_size
            sample = data.batches(config.batch_size, seed_for(seed, "threshold"), frames)
            sae = calibrate_threshold(sae, (normalise(batch)[0] for batch in sample))
        return Trained(sae.fold(shifts[0], scales[0]), history, _dead(state, config))
    sides = split(state.weights[0], widths) if joint else state.weights
    weights = tuple(
        ModelWeights(*side, mean, torch.tensor(scale, device=device))
        for side, mean, scale in zip(sides, shifts, scales, strict=True)
    )
    kind = CROSSCODER if joint else "usae"
    usae = UniversalSAE(tuple(names), slot, kind, config.k, weights)
    return Trained(usae, history, _dead(state, config))


@torch.no_grad()
def calibrate_threshold(sae: TopKSAE, batches: Iterable[Tensor]) -> TopKSAE:
    """Set the threshold that keeps k latents per frame on average over `batches` [B, d].

    Mean over batches of the (k B)-th largest pre-activation. Bussmann et al. average the least
    positive activation while weights still move, which lags behind; the weights here are final.
    """
    cuts = []
    for x in batches:
        flat = sae.pre_activations(x).flatten()
        cuts.append(flat.kthvalue(flat.numel() - sae.k * len(x) + 1).values)
    return replace(sae, threshold=max(0.0, float(torch.stack(cuts).mean())))


def _dead(state: State, config: Config) -> float:
    return float((state.unfired >= config.dead_after_samples).double().mean())


def _row(state: State, result: Result, number: int, drawn: int, config: Config) -> LogRow:
    losses = result.losses.tolist()
    others = [loss for j, loss in enumerate(losses) if j != drawn]
    return {
        "step": number,
        "samples": (number + 1) * config.batch_size,
        "learning_rate": learning_rate(config, number),
        "drawn": drawn if others else None,
        "loss": losses[drawn],
        "cross_loss": sum(others) / len(others) if others else None,
        "aux_loss": float(result.aux_loss),
        "dead_fraction": _dead(state, config),
    }


def save_checkpoint(path: Path, state: State, done: int, history: list[LogRow]) -> None:
    """Write all that the next step depends on, atomically; `done` is the number of steps taken."""
    content = {
        "weights": [weight for model in state.weights for weight in model],
        "optimizer": state.optimizer.state_dict(),
        "unfired": state.unfired,
        "threshold": state.threshold,
        "dead": state.dead,
        "dead_age": state.dead_age,
        "done": done,
        "history": history,
    }
    with atomic_file(path) as temporary:
        torch.save(content, temporary)


def load_checkpoint(path: Path, state: State) -> tuple[int, list[LogRow]]:
    """Fill `state` from a checkpoint; return the number of steps taken and the history."""
    content = torch.load(path, map_location=state.unfired.device, weights_only=True)
    weights = [weight for model in state.weights for weight in model]
    for ours, saved in zip(weights, content["weights"], strict=True):
        if ours.shape != saved.shape:
            raise ValueError(f"{path} is of another dictionary ({tuple(saved.shape)}); delete it")
        ours.copy_(saved)
    state.optimizer.load_state_dict(content["optimizer"])
    state.unfired.copy_(content["unfired"])
    if state.threshold is not None:
        state.threshold.copy_(content["threshold"])
    state.dead, state.dead_age = content["dead"], content["dead_age"]
    return content["done"], content["history"]


def six_digits(value: float) -> float:
    """Round to six significant digits, for text."""
    return value if isinstance(value, int) else float(f"{value:.6g}")


def live_logger(folder: str | Path) -> Callable[[LogRow], None]:
    """Return an `on_log` that writes with DVCLive: a TSV per metric and metrics.json, no times.

    `Live` is kept from looking for a repository: inside one it would name an experiment, track
    the folder with Git or, without a commit yet, fail.
    """
    from dvclive import Live

    with mock.patch("dvclive.live.get_dvc_repo", return_value=None):
        live = Live(str(folder), save_dvc_exp=False, dvcyaml=False, report=None)

    def log(row: LogRow) -> None:
        live.step = row["step"]
        for name in LOG_COLUMNS:
            live.log_metric(name, six_digits(row[name]), timestamp=False)
        live.make_summary()

    return log
