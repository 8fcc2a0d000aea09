"""All SAEs of one model and slot: several seeds in parallel, their evaluation, their report.

Every job computes with one thread, in a process of its own or not, so the numbers do not depend
on how many processes there are.
"""

from __future__ import annotations

import contextlib
import fcntl
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from musicscope.activations.store import ActivationStore
from musicscope.core import plots
from musicscope.core.distributed import ALONE, Ranks
from musicscope.core.io import sha256, write_text
from musicscope.core.parallel import workers
from musicscope.core.seeding import seed_for
from musicscope.data.clips import HELD_OUT_FONT, main_clips
from musicscope.dictionaries import evaluation as metrics
from musicscope.dictionaries.core import TopKSAE
from musicscope.dictionaries.fidelity import LossJob, run_losses
from musicscope.dictionaries.training import (
    CALIBRATION_BATCHES,
    SAEConfig,
    Trained,
    live_logger,
    train,
)

TRAIN, TEST = "train", "test"
HELDOUT_FONT = "heldout_font"
BOOTSTRAP = 1000


@dataclass(frozen=True)
class Job:
    """One SAE to train and evaluate; everything is plain so that it can go to another process."""

    store: str
    """Folder of the activation store."""
    config: SAEConfig
    seed: int
    index: int
    """0, 1, 2 ...: the folder seed-<index>."""
    out: str
    """Where seed-<index> is saved."""
    checkpoint: str
    live: str
    """Folder for DVCLive."""
    device: str
    trainer: dict[str, Any]
    """Further entries of config.json's trainer section."""
    losses: LossJob | None = None
    """What to run once this SAE is saved; one SAE of a model and slot is enough."""


@dataclass(frozen=True)
class Outcome:
    """What a job found."""

    trained: Trained
    test: metrics.Evaluation
    heldout_font: metrics.Evaluation | None
    losses: dict[str, np.ndarray] | None
    """What the model loses, see sae_losses.run_losses; of seed 0 only."""
    measure: str = metrics.CE
    """What these are: metrics.CE, or metrics.SPECTRAL of an audio model."""


def seed_jobs(
    store: str,
    config: SAEConfig,
    seeds: list[int],
    scratch: Path,
    live: str,
    device: str,
    name: str,
) -> list[Job]:
    """A job for each seed, working in `scratch`; `name` says in config.json which model it is."""
    trainer = {"lm_name": name, "layer": ActivationStore.open(store).config["layer"]}
    trainer |= {**asdict(config), "lr": config.learning_rate, "steps": config.steps}
    return [
        Job(
            store, config, seed, i, str(scratch / "sae"), str(scratch / f"seed-{i}.pt"),
            f"{live}/seed-{i}", device, trainer,
        )
        for i, seed in enumerate(seeds)
    ]  # fmt: skip


def scratch_key(store: ActivationStore, config: SAEConfig, seeds: list[int]) -> dict[str, Any]:
    """What a killed run must share with the next for it to go on: data, settings, seeds, code."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    code = {path.name: sha256(path) for path in sources}
    return {"store": store.manifest["sha256"], **asdict(config), "seeds": seeds, "code": code}


def mask(store: ActivationStore, wanted: str) -> np.ndarray:
    """Clips, bool [n], of TRAIN or TEST, or test clips of HELDOUT_FONT (recordings have none)."""
    rows = store.rows
    if wanted == HELDOUT_FONT:
        held_out = (rows["kind"] == "clip") & (rows["font"] == HELD_OUT_FONT)
        return (held_out & (rows["split"] == "test")).to_numpy()
    return np.isin(np.arange(len(rows)), main_clips(rows, wanted))


def _clips(store: ActivationStore, wanted: str) -> Iterator[np.ndarray]:
    return (store.clip(int(i)) for i in np.flatnonzero(mask(store, wanted)))


def run(job: Job, ranks: Ranks = ALONE) -> Outcome | None:
    """Train, save, evaluate on held-out compositions and on the held-out soundfont.

    Several ranks train together; only the first goes on from there, the others have None.
    """
    store = ActivationStore.open(job.store)
    trained = train(
        store, job.config, job.seed, mask(store, TRAIN), job.device, Path(job.checkpoint),
        on_log=live_logger(job.live) if ranks.leads else None, ranks=ranks,
    )  # fmt: skip
    if not ranks.leads:
        return None
    trained.sae.save(Path(job.out) / f"seed-{job.index}", {**job.trainer, "seed": job.index})
    sae = TopKSAE.load(Path(job.out) / f"seed-{job.index}")
    test = metrics.evaluate(sae, _clips(store, TEST))
    font = None
    if mask(store, HELDOUT_FONT).any():
        font = metrics.evaluate(sae, _clips(store, HELDOUT_FONT))
    last = trained.history[-1]
    print(
        f"seed {job.index}: {int(last['samples']):,} frames, explained variance "
        f"{test.explained_variance:.4f}, dead {test.dead_fraction:.4f}",
        file=sys.stderr,
    )
    if job.losses is None:
        return Outcome(trained, test, font, None)
    return Outcome(trained, test, font, *run_losses(job.losses))


def run_all(
    jobs: list[Job],
    processes: int,
    ranks: Ranks = ALONE,
    open_workers: Callable[[int], Any] = workers,
) -> list[Outcome]:
    """Every job, in processes of one thread each (on a GPU: one after the other).

    Several ranks take each job together, one after the other; the first has the outcomes.
    """
    if ranks.size > 1:
        return [outcome for job in jobs if (outcome := run(job, ranks))]
    alone = open_workers is workers and any(job.device != "cpu" for job in jobs)
    with open_workers(1 if alone else processes) as run_each:
        return list(run_each(run, jobs))


@contextlib.contextmanager
def sole_user(scratch: Path, ranks: Ranks = ALONE) -> Iterator[None]:
    """Wait while another run works in `scratch`: a killed `dvc` leaves its stage running."""
    if not ranks.leads:
        ranks.wait()
        yield
        ranks.wait()
        return
    with open(scratch.with_name(f"{scratch.name}.lock"), "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        ranks.wait()
        yield
        ranks.wait()


def report(
    store: ActivationStore,
    outcomes: list[Outcome],
    ce_groups: list[str],
    seed: int,
) -> dict[str, Any]:
    """The stage's metrics. Headline numbers are of seed 0, the one used downstream."""
    first, groups = outcomes[0], store.rows["group"].to_numpy()
    test = mask(store, TEST)
    low, high = first.test.interval(groups[test], BOOTSTRAP, seed_for(seed, "bootstrap"))
    k, sae = first.trained.sae.k, first.trained.sae.to("cpu")
    batches = store.train_batches(
        2048, seed_for(seed, "controls"), CALIBRATION_BATCHES * 2048, mask(store, TRAIN)
    )
    sample = np.concatenate(list(batches))
    random = metrics.random_dictionary(sae, sample, seed_for(seed, "random dictionary"))
    result = {
        "layer": store.config["layer"],
        "width": store.width,
        "n_latents": sae.n_latents,
        "k": k,
        "train_frames": int(store.frames[mask(store, TRAIN)].sum()),
        "test_frames": int(first.test.frames.sum()),
        "explained_variance": first.test.explained_variance,
        "explained_variance_low": low,
        "explained_variance_high": high,
        "l0": first.test.l0,
        "dead_fraction": first.test.dead_fraction,
        "dead_fraction_train": first.trained.dead_fraction,
        "explained_variance_pca": metrics.explained_variance(
            metrics.principal_components(sample, min(k, store.width)), _clips(store, TEST)
        ),
        "explained_variance_random": metrics.evaluate(
            random, _clips(store, TEST)
        ).explained_variance,
        **metrics.stability(
            [o.trained.sae.W_dec.cpu().numpy() for o in outcomes], seed_for(seed, "stability")
        ),
        "seeds": {
            f"seed-{i}": {
                "explained_variance": o.test.explained_variance,
                "l0": o.test.l0,
                "dead_fraction": o.test.dead_fraction,
                "dead_fraction_train": o.trained.dead_fraction,
            }
            for i, o in enumerate(outcomes)
        },
    }
    if first.heldout_font is not None:
        result["explained_variance_heldout_font"] = first.heldout_font.explained_variance
    if (losses := first.losses) is not None:
        result |= metrics.ce_recovered(
            losses, ce_groups, BOOTSTRAP, seed_for(seed, "bootstrap"), first.measure
        )
        result["ce_clips"] = len(ce_groups)
    return result


def write_plots(stem: str | Path, outcomes: list[Outcome]) -> None:
    """<stem>-loss.{csv,png}: training of every seed; <stem>-density.{csv,png}: held-out firing."""
    rows = [{"seed": i, **r} for i, o in enumerate(outcomes) for r in o.trained.history]
    write_text(f"{stem}-loss.csv", pd.DataFrame(rows).to_csv(index=False))
    figure, axes = plots.new_figure()
    for i, outcome in enumerate(outcomes):
        history = pd.DataFrame(outcome.trained.history)
        plots.interval_curve(
            axes[0, 0], history["samples"] / 1e6, history["loss"], name=f"seed {i}", series=i
        )
    axes[0, 0].set(xlabel="million frames", ylabel="unexplained variance (batch)", yscale="log")
    axes[0, 0].legend()
    plots.save_figure(figure, f"{stem}-loss.png")

    density = outcomes[0].test.density
    histogram = metrics.density_histogram(density)
    write_text(f"{stem}-density.csv", pd.DataFrame(histogram).to_csv(index=False))
    figure, axes = plots.new_figure()
    alive = pd.DataFrame(histogram[1:])
    axes[0, 0].bar(
        alive["log10_low"], alive["latents"], np.diff(metrics.DENSITY_EDGES), align="edge",
        color=plots.COLOURS[0],
    )  # fmt: skip
    axes[0, 0].set(
        xlabel="log10 share of held-out frames on which a latent fires",
        ylabel="latents",
        title=f"{(density > 0).sum()} latents fire, {(density == 0).sum()} never do",
    )
    plots.save_figure(figure, f"{stem}-density.png")
