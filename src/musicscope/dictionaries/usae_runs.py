"""All universal SAEs (or crosscoders) of a stage: seeds and nulls in parallel, then their report.

Every job computes with one thread, in a process of its own or not, so the numbers do not depend
on how many processes there are. `Plan` is what the stages' sections of params.yaml come to.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from musicscope.activations.alignment import common_frames
from musicscope.activations.store import ActivationStore
from musicscope.core.distributed import ALONE, Ranks
from musicscope.core.io import sha256
from musicscope.core.parallel import workers
from musicscope.core.seeding import seed_for
from musicscope.dictionaries import evaluation as sae_metrics
from musicscope.dictionaries import usae_metrics as metrics
from musicscope.dictionaries.core import TopKSAE
from musicscope.dictionaries.runs import TEST, TRAIN
from musicscope.dictionaries.training import SAEConfig
from musicscope.dictionaries.usae import UniversalSAE
from musicscope.dictionaries.usae_data import Paired, batches, mispair, pair
from musicscope.dictionaries.usae_training import CROSSCODER, Trained, train

CONTROL_FRAMES = 32 * 2048
MISPAIRED = "mispaired"
SHARES = np.linspace(0, 1, 21)
"""Edges of the histograms of firing entropy and of relative decoder norms."""


@dataclass(frozen=True)
class Plan:
    """What a stage trains; everything is plain so that it can go to another process."""

    names: tuple[str, ...]
    """Models, in order."""
    slot: str
    stores: tuple[str, ...]
    """Folder of each model's activation store, all with the same frames."""
    independent: tuple[str, ...]
    """Folder of each model's own SAE, for comparison."""
    config: SAEConfig
    method: str
    """paper, all_decoders or crosscoder"""
    seed: int
    seeds: int
    null_seeds: int
    fire_threshold: float
    bootstrap: int
    device: str


@dataclass(frozen=True)
class Job:
    """One dictionary to train and evaluate."""

    plan: Plan
    name: str
    """seed-<i> or mispaired-<i>: the folder, and the name of its generators"""
    scratch: str

    @property
    def folder(self) -> Path:
        return Path(self.scratch) / "out" / self.name


@dataclass(frozen=True)
class Outcome:
    """What a job found."""

    name: str
    history: list[dict[str, Any]]
    dead_fraction: float
    test: metrics.Evaluation
    controls: dict[str, metrics.Evaluation]
    """Of the first seed: shuffled (the same dictionary on mispaired clips) and random."""
    random_norms: np.ndarray | None
    """[M, F] row norms of the random control, drawn with those of the decoders"""
    independent: dict[str, float]
    """Of the first seed: explained variance of each model's own SAE on the same clips."""


def plan_of(
    section: Any, method: str, models: Sequence[str], slot: str, seed: int, device: str
) -> Plan:
    """The plan of a section of params.yaml (config.TrainUsae or TrainCrosscoder).

    Stores of different frame rates are aligned by time first (`alignment.common_frames`).
    ValueError with fewer than two models. Paths are relative to the repository root.
    """
    if len(models) < 2:
        raise ValueError(
            f"a shared code compares models, but params.yaml has models: {list(models)}; add one"
        )
    stores = common_frames([f"data/activations/{model}/{slot}" for model in models])
    widest = max(ActivationStore.open(folder).width for folder in stores)
    same = ("k", "samples", "batch_size", "learning_rate", "warmup_fraction", "decay_fraction",
            "aux_k_fraction", "aux_weight", "dead_after_samples")  # fmt: skip
    config = SAEConfig(section.expansion * widest, **{n: getattr(section, n) for n in same})
    if config.k > config.n_latents:
        raise ValueError(f"k = {config.k} is out of range: there are {config.n_latents} latents")
    return Plan(
        tuple(models), slot, stores, tuple(f"data/sae/{m}/{slot}/seed-0" for m in models),
        config, method, seed, section.seeds, section.null_seeds, section.fire_threshold,
        section.bootstrap, device,
    )  # fmt: skip


def scratch_key(plan: Plan) -> dict[str, Any]:
    """What a killed run must share with the next for it to go on: data, settings, code."""
    folder = Path(__file__).parent
    sources = sorted([*folder.glob("sae*.py"), *folder.glob("usae*.py")])
    stores = [ActivationStore.open(store).manifest["sha256"] for store in plan.stores]
    code = {path.name: sha256(path) for path in sources}
    settings = {**asdict(plan), "device": plan.device.split(":")[0]}  # ranks have GPUs of their own
    return {**settings, "manifests": stores, "code": code}


def jobs_of(plan: Plan, scratch: Path) -> list[Job]:
    """The seeds, then the nulls; the first seed has the controls, so it goes first."""
    names = [f"seed-{i}" for i in range(plan.seeds)]
    names += [f"{MISPAIRED}-{i}" for i in range(plan.null_seeds)]
    return [Job(plan, name, str(scratch)) for name in names]


def run_all(
    jobs: Sequence[Job],
    processes: int,
    ranks: Ranks = ALONE,
    open_workers: Callable[[int], Any] = workers,
) -> list[Outcome]:
    """Every job in order, with the size of the work and a progress bar on stderr.

    Several ranks take each job together, one after the other; the first has the outcomes.
    """
    plan = jobs[0].plan
    if ranks.size > 1:
        return [outcome for job in jobs if (outcome := run(job, ranks))]
    print(
        f"{len(jobs)} x {plan.config.samples:,} frames, {plan.config.n_latents} latents, models "
        f"{', '.join(plan.names)} ({plan.method})",
        file=sys.stderr,
    )
    if plan.device != "cpu" and open_workers is workers:
        processes = 1
    with open_workers(min(processes, len(jobs))) as run_in:
        return list(tqdm(run_in(run, jobs), total=len(jobs), unit="dictionary", mininterval=1))


def run(job: Job, ranks: Ranks = ALONE) -> Outcome | None:
    """Train on (mis)paired train clips, save, evaluate on paired clips of held-out compositions.

    Several ranks train together; only the first goes on from there, the others have None.
    """
    plan = job.plan
    stores = [ActivationStore.open(folder) for folder in plan.stores]
    paired, test = pair(stores, TRAIN), pair(stores, TEST)
    if job.name.startswith(MISPAIRED):
        paired = mispair(paired, seed_for(plan.seed, plan.method, job.name, "pairs"))
    # One bar stands for all that run at the same time: they are equally long.
    bar = tqdm(
        total=plan.config.steps, desc=job.name, unit="step", mininterval=5, leave=False,
        disable=job.name != "seed-0" or not ranks.leads,
    )  # fmt: skip
    with bar:
        trained = train(
            paired, plan.config, plan.method, seed_for(plan.seed, plan.method, job.name),
            plan.names, plan.slot, plan.device, Path(job.scratch) / f"{job.name}.pt",
            on_log=lambda row: bar.update(row["step"] + 1 - bar.n), ranks=ranks,
        )  # fmt: skip
    if not ranks.leads:
        return None
    trainer = {**asdict(plan.config), "method": plan.method, "name": job.name}
    trainer["layers"] = [store.config["layer"] for store in stores]
    trained.usae.save(job.folder, trainer)
    usae = UniversalSAE.load(job.folder, plan.device)
    return _evaluate(job, trained, usae, paired, test)


def _evaluate(
    job: Job, trained: Trained, usae: UniversalSAE, paired: Paired, test: Paired
) -> Outcome:
    plan = job.plan
    measure = partial(metrics.evaluate, tau=plan.fire_threshold)
    controls, norms, independent = {}, None, {}
    if job.name == "seed-0":
        stream = batches(paired, 2048, seed_for(plan.seed, "controls"), CONTROL_FRAMES)
        sample = [np.concatenate(parts) for parts in zip(*stream, strict=True)]
        random = metrics.random_dictionary(usae, sample, seed_for(plan.seed, "random"))
        norms = np.stack([side.W_enc.norm(dim=1).cpu().numpy() for side in random.weights])
        controls["random"] = measure(random, test.clips(), test.groups)
        if plan.method != CROSSCODER:
            crossed = mispair(test, seed_for(plan.seed, "shuffled"))
            controls["shuffled"] = measure(usae, crossed.clips(), crossed.groups)
        for j, folder in enumerate(plan.independent):
            own = (clip[j] for clip in test.clips())
            found = sae_metrics.evaluate(TopKSAE.load(folder, plan.device), own)
            independent[str(j)] = found.explained_variance
    return Outcome(
        job.name, trained.history, trained.dead_fraction,
        measure(usae, test.clips(), test.groups), controls, norms, independent,
    )  # fmt: skip


def all_numbers(found: metrics.Evaluation, norms: np.ndarray | None = None) -> dict[str, float]:
    """Headline numbers of an evaluation; for a crosscoder those of its decoder norms too."""
    out = metrics.numbers(found)
    if found.squared_error.shape[1] == 1:
        alive = found.fires.sum((0, 1)) > 0
        out |= metrics.norm_numbers(found.norms if norms is None else norms, alive)
    return out


def report(plan: Plan, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The stage's metrics. ``headline``: of seed 0, with intervals, and over the seeds.

    Keys are those of usae_metrics.headline; i and j index ``models``. ``null``: mispaired (mean
    over dictionaries trained on mispaired clips; what pairing adds), shuffled (seed 0 where the
    models hear different clips: what chance alone co-fires) and random (random dictionaries of
    equal statistics).
    """
    real = [o for o in outcomes if not o.name.startswith(MISPAIRED)]
    nulls = [o for o in outcomes if o.name.startswith(MISPAIRED)]
    first, per_seed = real[0], {o.name: all_numbers(o.test) for o in real}
    bounds = metrics.intervals(first.test, plan.bootstrap, seed_for(plan.seed, "bootstrap"))
    head: dict[str, dict[str, float]] = {}
    for key, value in per_seed[first.name].items():
        over = [found[key] for found in per_seed.values()]
        head[key] = {"value": value, "mean": float(np.mean(over))}
        if len(over) > 1:
            head[key]["sd"] = float(np.std(over, ddof=1))
        if key in bounds:
            head[key] |= dict(zip(("low", "high"), bounds[key], strict=True))
    per_null = {o.name: all_numbers(o.test) for o in nulls}
    null = {MISPAIRED: {k: float(np.mean([n[k] for n in per_null.values()])) for k in head}}
    for name, found in first.controls.items():
        null[name] = all_numbers(found, first.random_norms)
    stores = [ActivationStore.open(folder) for folder in plan.stores]
    return {
        "models": {str(i): name for i, name in enumerate(plan.names)},
        "layers": {str(i): store.config["layer"] for i, store in enumerate(stores)},
        "widths": {str(i): store.width for i, store in enumerate(stores)},
        "frame_rate": stores[0].config.get("frame_rate"),
        "slot": plan.slot,
        "method": plan.method,
        "n_latents": plan.config.n_latents,
        "k": plan.config.k,
        "train_frames": int(pair(stores, TRAIN).frames.sum()),
        "test_frames": int(first.test.frames.sum()),
        "test_compositions": len(first.test.groups),
        "headline": head,
        "null": null,
        "independent_r2": first.independent,
        "dead_fraction_train": first.dead_fraction,
        "seeds": per_seed,
        "null_seeds": per_null,
    }


def entropies(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, firing entropies [F]) of seed 0, of the first mispaired null and of the random one."""
    null = next(o for o in outcomes if o.name.startswith(MISPAIRED))
    found = {"paired": outcomes[0].test, "mispaired": null.test, **outcomes[0].controls}
    for name in ("paired", "mispaired", "random"):
        yield name, metrics.firing_entropy(found[name].fires.sum(0))
