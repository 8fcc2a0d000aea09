"""Training a sparse autoencoder from an activation store, resumable to the bit.

The only random numbers are the first weights and the order of the rows, both named by the seed
(the order by (seed, epoch)), so that a run that was killed and resumed from its last checkpoint
equals one that was not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from musicscope.activations.store import ActivationStore
from musicscope.core.distributed import ALONE, Ranks
from musicscope.core.seeding import seed_for
from musicscope.dictionaries.core import TopKSAE
from musicscope.dictionaries.step import State, initial_state, step

LOG_ROWS = 50  # in a run's history
LOG_COLUMNS = ("samples", "learning_rate", "loss", "aux_loss", "dead_fraction")
CALIBRATION_BATCHES = 32


@dataclass(frozen=True)
class SAEConfig:
    """Everything but the seed that decides what is trained."""

    n_latents: int
    k: int
    samples: int
    """Frames seen in all; steps = samples // batch_size."""
    activation: str = "topk"
    batch_size: int = 2048
    learning_rate: float = 1e-3
    warmup_fraction: float = 0.05
    """Share of the steps in which the learning rate rises linearly."""
    decay_fraction: float = 0.2
    """Share of the steps, the last ones, in which it falls linearly to 0."""
    aux_k_fraction: float = 0.5
    """AuxK uses this many dead latents a frame, as a share of the width (1/2 in Gao et al.)."""
    aux_weight: float = 1 / 32
    dead_after_samples: int = 200_000
    """A latent that fired for none of this many frames counts as dead."""

    @property
    def steps(self) -> int:
        return self.samples // self.batch_size

    def rate(self, number: int) -> float:
        """Learning rate of step `number`: linear warmup, constant, linear decay."""
        warmup = max(1.0, self.warmup_fraction * self.steps)
        decay = max(1.0, self.decay_fraction * self.steps)
        part = min(1.0, (number + 1) / warmup, (self.steps - number) / decay)
        return self.learning_rate * part


@dataclass(frozen=True)
class Trained:
    """The outcome of `train`."""

    sae: TopKSAE
    """Folded: acts on raw activations."""
    history: list[dict[str, float]]
    """LOG_COLUMNS and "step", about LOG_ROWS rows; loss is the unexplained share of a batch."""
    dead_fraction: float
    """Share of latents that fired for none of the last dead_after_samples training frames."""


def train(
    store: ActivationStore,
    config: SAEConfig,
    seed: int,
    select: np.ndarray | None = None,
    device: str | torch.device = "cpu",
    checkpoint: Path | None = None,
    checkpoint_every: int = 200,
    on_log: Callable[[dict[str, float]], None] | None = None,
    ranks: Ranks = ALONE,
) -> Trained:
    """Train on the frames of the clips in mask `select` (default: split train).

    Inputs are centred by the store's exact per-dimension mean and divided by one number, the
    root mean square of its standard deviations. With `checkpoint` (a file) the state is saved
    there every so many steps and taken up again; `on_log` also gets the rows before a resume.
    Several `ranks` share every batch evenly and find the same SAE, to the tolerance of floating
    point (see sae_step.step); the first of them keeps the checkpoint, which all read.
    FloatingPointError when the loss is not finite.
    """
    mean = torch.tensor(store.mean, dtype=torch.float32, device=device)
    scale = float(np.sqrt(np.square(store.std).mean()))
    state = initial_state(config.n_latents, store.width, seed_for(seed, "initial"), device)
    history: list[dict[str, float]] = []
    start = 0
    if checkpoint is not None and checkpoint.exists():
        start, history = _load_checkpoint(checkpoint, state)
    ranks.wait()  # none may write a newer one while another still reads
    if not ranks.leads:
        checkpoint = None
    for row in history if on_log else []:
        on_log(row)

    def normalise(batch: np.ndarray) -> Tensor:
        return (torch.from_numpy(batch).to(device) - mean) / scale

    log_every = max(1, config.steps // LOG_ROWS)
    batches = store.train_batches(
        config.batch_size, seed_for(seed, "order"), config.samples, select, start_step=start,
        rows=ranks.rows(config.batch_size),
    )  # fmt: skip
    for number, batch in enumerate(batches, start):
        result = step(
            state,
            normalise(batch),
            lr=config.rate(number),
            k=config.k,
            activation=config.activation,
            aux_k=round(config.aux_k_fraction * store.width),
            aux_weight=config.aux_weight,
            dead_after=config.dead_after_samples,
            ranks=ranks,
        )
        if number % log_every == 0 or number == config.steps - 1:
            history.append(_row(state, result, number, config))
            if not np.isfinite(history[-1]["loss"]):
                raise FloatingPointError(
                    f"SAE loss is {history[-1]['loss']} at step {number} on {store.folder}: the "
                    "activations hold NaN or infinity (ActivationStore.verify() checks the "
                    "shards), or train_sae.learning_rate is too high"
                )
            if on_log:
                on_log(history[-1])
        if checkpoint is not None and (number + 1) % checkpoint_every == 0:
            _save_checkpoint(checkpoint, state, number + 1, history)
    if checkpoint is not None:
        _save_checkpoint(checkpoint, state, config.steps, history)

    W = state.weights
    sae = TopKSAE(W.W_enc, W.b_enc, W.W_dec, W.b_dec, config.k, config.activation)
    if config.activation == "batchtopk":
        sample = store.train_batches(
            config.batch_size,
            seed_for(seed, "threshold"),
            CALIBRATION_BATCHES * config.batch_size,
            select,
        )
        sae = calibrate_threshold(sae, (normalise(batch) for batch in sample))
    return Trained(sae.fold(mean, scale), history, _dead(state, config))


@torch.no_grad()
def calibrate_threshold(sae: TopKSAE, batches: Iterable[Tensor]) -> TopKSAE:
    """The SAE with the threshold that keeps k latents a frame on average over `batches` [B, d].

    Mean over batches of the (k B)-th largest pre-activation. Bussmann et al. average the least
    positive activation while weights still move, which lags behind; the weights here are final.
    """
    cuts = []
    for x in batches:
        flat = sae.pre_activations(x).flatten()
        cuts.append(flat.kthvalue(flat.numel() - sae.k * len(x) + 1).values)
    return replace(sae, threshold=max(0.0, float(torch.stack(cuts).mean())))


def _dead(state: State, config: SAEConfig) -> float:
    return float((state.unfired >= config.dead_after_samples).double().mean())


def _row(state: State, result, number: int, config: SAEConfig) -> dict[str, float]:
    """Six digits: the same text from a run that was resumed, and short files."""
    values = (
        (number + 1) * config.batch_size,
        config.rate(number),
        float(result.loss),
        float(result.aux_loss),
        _dead(state, config),
    )
    row = {name: float(f"{v:.6g}") for name, v in zip(LOG_COLUMNS, values, strict=True)}
    return {"step": number, **row, "samples": values[0]}


def _save_checkpoint(path: Path, state: State, done: int, history: list[dict]) -> None:
    """All that the next step depends on; to a temporary name, then renamed."""
    content = {
        "weights": list(state.weights),
        "optimizer": state.optimizer.state_dict(),
        "unfired": state.unfired,
        "done": done,
        "history": history,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _load_checkpoint(path: Path, state: State) -> tuple[int, list[dict]]:
    """Fill `state`; gives the number of steps done and the history."""
    device = state.unfired.device
    content = torch.load(path, map_location=device, weights_only=True)
    for ours, saved in zip(state.weights, content["weights"], strict=True):
        if ours.shape != saved.shape:
            raise ValueError(f"{path} is of another SAE ({saved.shape}); delete it")
        ours.copy_(saved)
    state.optimizer.load_state_dict(content["optimizer"])
    state.unfired.copy_(content["unfired"])
    return content["done"], content["history"]


def live_logger(folder: str | Path) -> Callable[[dict[str, float]], None]:
    """An `on_log` that writes with DVCLive: one TSV a metric and metrics.json, no timestamps.

    `Live` is kept from looking for a repository: inside one it would name an experiment, track
    the folder with Git or, without a commit yet, fail.
    """
    from dvclive import Live

    with mock.patch("dvclive.live.get_dvc_repo", return_value=None):
        live = Live(str(folder), save_dvc_exp=False, dvcyaml=False, report=None)

    def log(row: dict[str, float]) -> None:
        live.step = int(row["step"])
        for name in LOG_COLUMNS:
            live.log_metric(name, row[name], timestamp=False)
        live.make_summary()

    return log
