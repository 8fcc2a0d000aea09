"""Training a universal SAE or a crosscoder on paired activations, resumable to the bit.

Random are the first weights, the order of the frames and, for a USAE, which model each step draws:
all named by the seed, and the learning rate and the draws by the number of the *global* step, so
that the schedule does not stretch with the number of models and a resumed run equals an unbroken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musicscope.core.distributed import ALONE, Ranks
from musicscope.core.seeding import seed_for
from musicscope.dictionaries import step as sae_step
from musicscope.dictionaries import usae_step
from musicscope.dictionaries.training import SAEConfig, _load_checkpoint, _save_checkpoint
from musicscope.dictionaries.usae import ModelWeights, UniversalSAE
from musicscope.dictionaries.usae_data import Paired, batches

CROSSCODER = "crosscoder"
METHODS = (*usae_step.RULES, CROSSCODER)
LOG_ROWS = 100


@dataclass(frozen=True)
class Trained:
    """The outcome of `train`."""

    usae: UniversalSAE
    history: list[dict[str, Any]]
    """About LOG_ROWS rows: step, samples, learning_rate, drawn (model; None for a crosscoder),
    self_loss and cross_loss (unexplained share of a batch, of the drawn model and averaged over
    the others; for a crosscoder self_loss is over all), aux_loss, dead_fraction."""
    dead_fraction: float
    """Share of latents that fired for none of the last dead_after_samples training frames."""


def normalisation(paired: Paired) -> tuple[list[np.ndarray], list[float]]:
    """Per model the mean [d] and the scale, exact over its store's train rows (see usae.py)."""
    width = sum(paired.widths) / len(paired.widths)
    scales = [float(np.sqrt(np.square(s.std).sum() / width)) for s in paired.stores]
    for store, scale in zip(paired.stores, scales, strict=True):
        if scale == 0:
            raise ValueError(f"{store.folder}: all train activations are equal, nothing to learn")
    return [s.mean for s in paired.stores], scales


def train(
    paired: Paired,
    config: SAEConfig,
    method: str,
    seed: int,
    names: Sequence[str],
    slot: str,
    device: str | torch.device = "cpu",
    checkpoint: Path | None = None,
    checkpoint_every: int = 200,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    ranks: Ranks = ALONE,
) -> Trained:
    """Train on all frames of `paired`; `method` is one of METHODS, `config.activation` topk.

    With `checkpoint` (a file) the state is saved there every so many steps and taken up again.
    Several `ranks` share every batch, as in sae_training.train. FloatingPointError when the loss is
    not finite.
    """
    if method not in METHODS or config.activation != "topk":
        raise ValueError(f"{method!r} with {config.activation!r}: known {METHODS} with 'topk'")
    joint, widths = method == CROSSCODER, paired.widths
    means, scales = normalisation(paired)
    shifts = [torch.tensor(m, dtype=torch.float32, device=device) for m in means]

    def normalise(batch: Sequence[np.ndarray]) -> list[Tensor]:
        parts = zip(batch, shifts, scales, strict=True)
        return [(torch.from_numpy(x).to(device) - m) / s for x, m, s in parts]

    make = sae_step.initial_state if joint else usae_step.initial_state
    state = make(
        config.n_latents, sum(widths) if joint else widths, seed_for(seed, "initial"), device
    )
    draws = np.random.default_rng(seed_for(seed, "draws")).integers(len(widths), size=config.steps)
    aux_k = round(config.aux_k_fraction * sum(widths) / len(widths))
    settings = {
        "k": config.k,
        "aux_k": aux_k,
        "aux_weight": config.aux_weight,
        "dead_after": config.dead_after_samples,
        "ranks": ranks,
    }
    start, history = 0, []
    if checkpoint is not None and checkpoint.exists():
        start, history = _load_checkpoint(checkpoint, _flat(state))
    ranks.wait()  # none may write a newer one while another still reads
    if not ranks.leads:
        checkpoint = None
    for row in history if on_log else []:
        on_log(row)
    log_every = max(1, config.steps // LOG_ROWS)
    stream = batches(
        paired, config.batch_size, seed_for(seed, "order"), config.samples, start_step=start,
        rows=ranks.rows(config.batch_size),
    )  # fmt: skip
    for number, batch in enumerate(stream, start):
        xs, rate, drawn = normalise(batch), config.rate(number), int(draws[number])
        if joint:
            found = sae_step.step(state, usae_step.join(xs), lr=rate, **settings)
        else:
            found = usae_step.step(state, xs, drawn, method, lr=rate, **settings)
        if number % log_every == 0 or number == config.steps - 1:
            losses = found.loss.reshape(1) if joint else found.losses
            if not torch.isfinite(losses).all():
                raise FloatingPointError(
                    f"loss is {losses.tolist()} at step {number} on "
                    f"{', '.join(str(s.folder) for s in paired.stores)}: activations hold NaN or "
                    "infinity (ActivationStore.verify() checks the shards), or the section's "
                    "learning_rate is too high"
                )
            history.append(_row(losses, found.aux_loss, None if joint else drawn))
            done = (number + 1) * config.batch_size
            dead = _dead(state, config)
            history[-1] |= {
                "step": number,
                "samples": done,
                "learning_rate": rate,
                "dead_fraction": dead,
            }
            if on_log:
                on_log(history[-1])
        if checkpoint is not None and (number + 1) % checkpoint_every == 0:
            _save_checkpoint(checkpoint, _flat(state), number + 1, history)
    if checkpoint is not None:
        _save_checkpoint(checkpoint, _flat(state), config.steps, history)

    sides = usae_step.split(state.weights, widths) if joint else state.weights
    weights = tuple(
        ModelWeights(*side, mean, torch.tensor(scale, device=device))
        for side, mean, scale in zip(sides, shifts, scales, strict=True)
    )
    kind = CROSSCODER if joint else "usae"
    usae = UniversalSAE(tuple(names), slot, kind, config.k, weights)
    return Trained(usae, history, _dead(state, config))


def _flat(state: sae_step.State | usae_step.State) -> Any:
    """The same state with its weights in one list: the form in which checkpoints hold them."""
    if isinstance(state.weights, sae_step.Weights):
        return state
    return replace(state, weights=[weight for model in state.weights for weight in model])


def _dead(state: sae_step.State | usae_step.State, config: SAEConfig) -> float:
    return float((state.unfired >= config.dead_after_samples).double().mean())


def _row(losses: Tensor, aux_loss: Tensor, drawn: int | None) -> dict[str, Any]:
    """Losses of one batch."""
    values, own = losses.tolist(), drawn or 0
    others = [value for j, value in enumerate(values) if j != own]
    return {
        "drawn": drawn,
        "self_loss": values[own],
        "cross_loss": sum(others) / len(others) if others else None,
        "aux_loss": float(aux_loss),
    }
