"""Train, evaluate and report all dictionaries of a stage: seeds and nulls, in parallel.

Every job computes with one thread, in a process of its own or not, so the numbers do not depend
on the number of processes. A `Plan` says what is trained; its subclasses evaluate and report.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import pandas as pd

from musicscope.activations.alignment import common_frames
from musicscope.activations.store import ActivationStore
from musicscope.config.dictionaries import (
    TrainCrosscoder,
    Training,
    TrainSae,
    TrainShared,
    TrainUsae,
)
from musicscope.core import io
from musicscope.core.distributed import ALONE, Engine, Ranks, Workers, scratch_of
from musicscope.core.io import Metrics
from musicscope.core.parallel import workers
from musicscope.core.progress import Bar
from musicscope.core.seeding import seed_for
from musicscope.dictionaries import evaluation, linear_maps, sharing, stability, tracking
from musicscope.dictionaries.core import JUMPRELU, TopKSAE, UniversalSAE
from musicscope.dictionaries.data import (
    HELDOUT_FONT,
    TEST,
    TRAIN,
    VALIDATION,
    Paired,
    clip_rows,
    mispair,
    pair,
)
from musicscope.dictionaries.fidelity import (
    CE,
    VARIANTS,
    Losses,
    ce_recovered,
    measure_losses,
)
from musicscope.dictionaries.training import (
    DEDICATED,
    SAE,
    Config,
    LogRow,
    Trained,
    count_latents,
    count_steps,
    live_logger,
    selection,
    train,
)

BOOTSTRAP = 1000
CONTROL_BATCH, CONTROL_FRAMES = 2048, 32 * 2048
"""Training frames to which the controls are fitted."""
FIRST = "seed-0"
"""The run that has the controls and is used downstream."""
MISPAIRED = "mispaired"
DEDICATED_MISPAIRED = f"{DEDICATED}-{MISPAIRED}"


@dataclass(frozen=True)
class Outcome:
    """One dictionary trained and evaluated."""

    name: str
    history: list[LogRow]
    dead_fraction: float
    """Share of latents that are dead at the end of training."""


Out = TypeVar("Out", bound=Outcome)


@dataclass(frozen=True)
class SaeOutcome(Outcome):
    """An SAE of one model."""

    sae: TopKSAE
    """On the CPU."""
    test: evaluation.Evaluation
    heldout_font: evaluation.Evaluation | None
    losses: Losses | None
    """Losses of the model with the SAE in its stream (`fidelity`): FIRST; baselines have "sae"."""
    measure: str
    """CE, or SPECTRAL for an audio model."""


@dataclass(frozen=True)
class SharedOutcome(Outcome):
    """A dictionary of several models."""

    test: evaluation.SharedEvaluation
    controls: dict[str, evaluation.SharedEvaluation]
    """FIRST only: shuffled (the same dictionary on mispaired clips) and random."""
    random_norms: np.ndarray | None
    """FIRST only: [M, F] row norms of the random control, drawn with those of the decoders."""
    independent: dict[str, float]
    """FIRST only: explained variance of each model's own SAE on the same clips."""
    linear: Metrics
    """FIRST of universal SAEs only: R2 of ridge regressions, see `sharing.linear_metrics`."""
    scaling: Metrics
    """FIRST and DEDICATED only: set of latents -> its `latent_scaling`."""
    owners: np.ndarray
    """[F] model to which a latent is dedicated, or -1"""


@dataclass(frozen=True)
class Plan(Generic[Out]):
    """Dictionaries to train; everything is plain so that it can go to another process."""

    names: tuple[str, ...]
    """Models, in order."""
    slot: str
    stores: tuple[str, ...]
    """Folder of each model's activation store, all with the same frames."""
    config: Config
    method: str
    """One of training.METHODS."""
    seed: int
    device: str

    def runs(self) -> list[str]:
        """Names of the dictionaries; FIRST comes first, since it takes longest to evaluate."""
        return [f"seed-{i}" for i in range(self.config.seeds)]

    def open_stores(self) -> list[ActivationStore]:
        """Open each model's activation store."""
        return [ActivationStore.open(folder) for folder in self.stores]

    def latents(self) -> int:
        """Return the number of latents of each dictionary."""
        return count_latents(self.config, [store.width for store in self.open_stores()])

    def trainer(self, name: str) -> dict[str, object]:
        """Return the settings that are kept in a dictionary's config.json."""
        keys = {f.name for f in fields(Training)} - {"expansion", "seeds"}
        settings = {key: getattr(self.config, key) for key in keys}
        return settings | {"n_latents": self.latents(), "activation": selection(self.config)}

    def seed_of(self, name: str) -> int:
        """Return the seed of one run."""
        raise NotImplementedError

    def baseline(self, name: str) -> str:
        """Return which of step.FREEZES one run is, "" if it is none."""
        return ""

    def data(self, name: str) -> Paired:
        """Return the training clips of one run."""
        return pair(self.open_stores(), TRAIN)

    def method_of(self, name: str) -> str:
        """Return how one run is trained, one of training.METHODS."""
        return self.method

    def on_log(self, name: str) -> Callable[[LogRow], None] | None:
        """Return a further consumer of one run's history."""
        return None

    def evaluate(self, name: str, trained: Trained, folder: Path, data: Paired) -> Out:
        """Evaluate the dictionary saved in `folder`, which was trained on `data`."""
        raise NotImplementedError

    def report(self, outcomes: Sequence[Out]) -> Metrics:
        """Return the stage's metrics."""
        raise NotImplementedError

    def write(self, outcomes: Sequence[Out], folder: Path) -> None:
        """Write what all dictionaries together give into the stage's output folder."""


@dataclass(frozen=True)
class Job(Generic[Out]):
    """One run of a plan."""

    plan: Plan[Out]
    name: str
    scratch: str
    trackers: tuple[str, ...] = ()


def run(job: Job[Out], ranks: Ranks = ALONE) -> Out | None:
    """Train, save and evaluate one dictionary.

    Several ranks train together; only the first evaluates, the others return None.
    """
    plan, name, scratch = job.plan, job.name, Path(job.scratch)
    data, log = plan.data(name), plan.on_log(name) if ranks.leads else None
    # One bar stands for all that run at the same time: they are equally long.
    bar = Bar(
        total=count_steps(plan.config), desc=name, unit="steps", leave=False,
        disable=name != FIRST or not ranks.leads,
    )  # fmt: skip

    def on_log(row: LogRow) -> None:
        bar.update(row["step"] + 1 - bar.n)
        if log:
            log(row)
        track(row)

    trackers = job.trackers if ranks.leads else ()
    group = f"{plan.method}/{'-'.join([*plan.names, plan.slot])}"
    with bar, tracking.track(trackers, group, name) as track:
        trained = train(
            data, plan.config, plan.method_of(name), plan.seed_of(name), plan.names, plan.slot,
            plan.device, scratch / f"{name}.pt", on_log=on_log, ranks=ranks,
            baseline=plan.baseline(name),
        )  # fmt: skip
    if not ranks.leads:
        return None
    folder = scratch / "out" / name
    trained.dictionary.save(folder, plan.trainer(name))
    return plan.evaluate(name, trained, folder, data)


def run_all(
    plan: Plan[Out],
    scratch: Path,
    processes: int,
    ranks: Ranks = ALONE,
    open_workers: Workers = workers,
    trackers: tuple[str, ...] = (),
) -> list[Out]:
    """Run every job, in processes of one thread each (on a GPU: one after the other).

    Several ranks take each job together, one after the other; only the first has the outcomes.
    """
    jobs = [Job(plan, name, str(scratch), trackers) for name in plan.runs()]
    if ranks.size > 1:
        return [outcome for job in jobs if (outcome := run(job, ranks))]
    print(
        f"{len(jobs)} x {plan.config.samples:,} frames, {plan.latents()} latents, "
        f"{', '.join(plan.names)} ({plan.method})",
        file=sys.stderr,
    )
    if plan.device != "cpu" and open_workers is workers:
        processes = 1
    with open_workers(min(processes, len(jobs))) as run_each:
        outcomes = run_each(run, jobs)
        return list(Bar(outcomes, total=len(jobs), unit="dictionaries"))


def scratch_key(plan: Plan) -> dict[str, object]:
    """Return what a killed run must share with the next to go on: data, settings, code."""
    manifests = [store.manifest["sha256"] for store in plan.open_stores()]
    code = {path.name: io.sha256(path) for path in sorted(Path(__file__).parent.glob("*.py"))}
    device = plan.device.split(":")[0]  # each rank has a GPU of its own
    return {**asdict(plan), "device": device, "manifests": manifests, "code": code}


def execute(
    plan: Plan[Out],
    engine: Engine,
    out: str,
    metrics: str,
    write_tables: Callable[[Sequence[Out], Metrics], None],
) -> None:
    """Run a stage: train, report, `write_tables(outcomes, metrics)`, publish the folder `out`.

    Every rank comes here; the first one writes.
    """
    ranks = engine.ranks
    tracking.check(engine.trackers)
    with scratch_of(scratch_key(plan), ranks) as scratch:
        outcomes = run_all(plan, scratch, engine.processes, ranks, engine.workers, engine.trackers)
        if not ranks.leads:
            return
        found = plan.report(outcomes)
        write_tables(outcomes, found)
        plan.write(outcomes, scratch / "out")
        io.publish_dir(scratch / "out", out)
        io.write_json(metrics, found)
        shutil.rmtree(scratch, ignore_errors=True)


def control_sample(data: Paired, seed: int) -> list[np.ndarray]:
    """Draw the training frames to which controls are fitted, [CONTROL_FRAMES, d_j] per model."""
    stream = data.batches(CONTROL_BATCH, seed_for(seed, "controls"), CONTROL_FRAMES)
    return [np.concatenate(parts) for parts in zip(*stream, strict=True)]


@dataclass(frozen=True)
class SaePlan(Plan[SaeOutcome]):
    """SAEs of one model and slot: seeds, and the baselines under their names."""

    live: str
    """Folder for DVCLive."""
    loss_rows: tuple[int, ...] = ()
    """Rows of data/clips on which the model's losses are measured; none: not measured."""
    loss_groups: tuple[str, ...] = ()
    """Composition of each."""

    def runs(self) -> list[str]:
        return super().runs() + self.baselines

    @property
    def baselines(self) -> list[str]:
        """Names of the baselines that are trained, too."""
        return list(self.config.baselines) if isinstance(self.config, TrainSae) else []

    def baseline(self, name: str) -> str:
        return name if name in self.baselines else ""

    def seed_of(self, name: str) -> int:
        own = self.baseline(name) or _index(name)
        return seed_for(self.seed, "train_sae", self.names[0], self.slot, own)

    def on_log(self, name: str) -> Callable[[LogRow], None]:
        return live_logger(f"{self.live}/{name}")

    def trainer(self, name: str) -> dict[str, object]:
        config = self.config
        assert isinstance(config, TrainSae)
        keys = [key for key in ("matryoshka", "resample_every") if getattr(config, key)]
        keys += ["bandwidth", "sparsity_weight"] if config.activation == JUMPRELU else []
        options = {key: getattr(config, key) for key in keys}
        return super().trainer(name) | options | {
            "lm_name": self.names[0], "layer": self.open_stores()[0].config["layer"],
            "lr": self.config.learning_rate, "steps": count_steps(self.config),
            **({"baseline": name} if self.baseline(name) else {"seed": _index(name)}),
        }  # fmt: skip

    def evaluate(self, name: str, trained: Trained, folder: Path, data: Paired) -> SaeOutcome:
        """Evaluate on held-out compositions and on the held-out soundfont, if there is one."""
        stores, sae = self.open_stores(), TopKSAE.load(folder)
        test, font = evaluation.evaluate(sae, _single(pair(stores, TEST))), None
        if len(clip_rows(stores[0].rows, HELDOUT_FONT)):
            font = evaluation.evaluate(sae, _single(pair(stores, HELDOUT_FONT)))
        print(
            f"{name}: explained variance {test.explained_variance:.4f}, dead "
            f"{test.dead_fraction:.4f}",
            file=sys.stderr,
        )
        losses, measure = None, CE
        if self.loss_rows and (name == FIRST or self.baseline(name)):
            losses, measure = measure_losses(
                f"data/models/{self.names[0]}", "data/clips", self.loss_rows, stores[0],
                sae.to(self.device), self.device,
                variants=VARIANTS if name == FIRST else VARIANTS[-1:],
            )  # fmt: skip
        return SaeOutcome(
            name, trained.history, trained.dead_fraction, sae, test, font, losses, measure
        )

    def report(self, outcomes: Sequence[SaeOutcome]) -> Metrics:
        """Return the metrics. Headline numbers are of FIRST, the one used downstream.

        A baseline's stability compares its decoder rows with those of each seed.
        """
        baselines = [o for o in outcomes if self.baseline(o.name)]
        outcomes = [o for o in outcomes if not self.baseline(o.name)]
        first, stores = outcomes[0], self.open_stores()
        store, learnt, test = stores[0], pair(stores, TRAIN), pair(stores, TEST)
        bootstrap = seed_for(self.seed, "bootstrap")
        (sample,) = control_sample(learnt, self.seed)
        components = evaluation.principal_components(sample, min(first.sae.k, store.width))
        random = evaluation.random_sae(first.sae, sample, seed_for(self.seed, "random dictionary"))

        def numbers(outcome: SaeOutcome) -> dict[str, float]:
            keys = ("explained_variance", "l0", "dead_fraction")
            own = {key: getattr(outcome.test, key) for key in keys}
            return own | {"dead_fraction_train": outcome.dead_fraction}

        result = {
            "layer": store.config["layer"],
            "width": store.width,
            "n_latents": first.sae.n_latents,
            "k": first.sae.k,
            "train_frames": int(learnt.frames.sum()),
            "test_frames": int(first.test.frames.sum()),
            **numbers(first),
            "explained_variance": first.test.estimate(test.groups, BOOTSTRAP, bootstrap).as_dict(),
            "explained_variance_pca": evaluation.explained_variance(components, _single(test)),
            "explained_variance_random": evaluation.evaluate(
                random, _single(test)
            ).explained_variance,
            **evaluation.stability(
                [o.sae.W_dec.numpy() for o in outcomes], seed_for(self.seed, "stability")
            ),
            **self.agreement(outcomes)[0],
            "seeds": {o.name: numbers(o) for o in outcomes},
        }
        if first.heldout_font is not None:
            result["explained_variance_heldout_font"] = first.heldout_font.explained_variance
        if first.losses is not None:
            result |= ce_recovered(
                first.losses, self.loss_groups, BOOTSTRAP, bootstrap, first.measure
            )
            result["ce_clips"] = len(self.loss_groups)
        rows = [o.sae.W_dec.numpy() for o in outcomes]

        def beside(o: SaeOutcome) -> Metrics:
            entry: Metrics = {**numbers(o)}
            estimate = o.test.estimate(test.groups, BOOTSTRAP, bootstrap)
            entry["explained_variance"] = estimate.as_dict()
            seed = seed_for(self.seed, "stability")
            entry |= evaluation.stability(rows, seed, o.sae.W_dec.numpy())
            if o.losses is not None and first.losses is not None:
                losses = first.losses | o.losses
                entry |= ce_recovered(losses, self.loss_groups, BOOTSTRAP, bootstrap, o.measure)
            return entry

        if baselines:
            result["baselines"] = {o.name: beside(o) for o in baselines}
        return result

    def agreement(self, outcomes: Sequence[SaeOutcome]) -> tuple[Metrics, pd.DataFrame]:
        """Compare the seeds by `stability.metrics`."""
        assert isinstance(self.config, TrainSae)
        return stability.metrics(
            [o.sae.W_dec.numpy() for o in outcomes], [o.test.fired for o in outcomes],
            self.config.stable_cosine, seed_for(self.seed, "stability"),
        )  # fmt: skip

    def write(self, outcomes: Sequence[SaeOutcome], folder: Path) -> None:
        """Write which latents of FIRST return in the other seeds."""
        seeds = [o for o in outcomes if not self.baseline(o.name)]
        stability.write(folder, self.agreement(seeds)[1])


def _index(name: str) -> int:
    return int(name.rsplit("-", 1)[1])


def _single(data: Paired) -> Iterator[np.ndarray]:
    """Yield the clips of one store."""
    return (x for (x,) in data.clips())


@dataclass(frozen=True)
class SharedPlan(Plan[SharedOutcome]):
    """Universal SAEs or crosscoders, and the same trained on mispaired clips."""

    config: TrainShared
    independent: tuple[str, ...]
    """Folder of each model's own SAE, for comparison."""

    def runs(self) -> list[str]:
        runs = super().runs() + [f"{MISPAIRED}-{i}" for i in range(self.config.null_seeds)]
        if isinstance(self.config, TrainCrosscoder) and self.config.own_share:
            runs += [DEDICATED, DEDICATED_MISPAIRED]
        return runs

    def method_of(self, name: str) -> str:
        return DEDICATED if name.startswith(DEDICATED) else self.method

    def seed_of(self, name: str) -> int:
        return seed_for(self.seed, self.method, name)

    def data(self, name: str) -> Paired:
        paired = super().data(name)
        if MISPAIRED in name:
            return mispair(paired, seed_for(self.seed, self.method, name, "pairs"))
        return paired

    def trainer(self, name: str) -> dict[str, object]:
        layers = [store.config["layer"] for store in self.open_stores()]
        method = self.method_of(name)
        return super().trainer(name) | {"method": method, "name": name, "layers": layers}

    def evaluate(self, name: str, trained: Trained, folder: Path, data: Paired) -> SharedOutcome:
        """Evaluate on paired clips of held-out compositions; for FIRST also the controls."""
        test, usae = pair(self.open_stores(), TEST), UniversalSAE.load(folder, self.device)
        measure = partial(evaluation.evaluate_shared, tau=self.config.fire_threshold)
        controls, norms, independent = {}, None, {}
        linear: Metrics = {}
        found = measure(usae, test.clips(), test.groups)
        if name in (DEDICATED, DEDICATED_MISPAIRED):
            shared = sharing.without_own(usae)
            controls[sharing.WITHOUT_OWN] = measure(shared, test.clips(), test.groups)
        if name in (FIRST, DEDICATED):
            sample = control_sample(data, self.seed)
            random = evaluation.random_shared(usae, sample, seed_for(self.seed, "random"))
            norms = np.stack([side.W_enc.norm(dim=1).cpu().numpy() for side in random.weights])
            controls["random"] = measure(random, test.clips(), test.groups)
            if not usae.joint:
                crossed = mispair(test, seed_for(self.seed, "shuffled"))
                controls["shuffled"] = measure(usae, crossed.clips(), crossed.groups)
            for j, own_folder in enumerate(self.independent if name == FIRST else ()):
                sae = TopKSAE.load(own_folder, self.device)
                own = evaluation.evaluate(sae, (clip[j] for clip in test.clips()))
                independent[str(j)] = own.explained_variance
        if name == FIRST and isinstance(self.config, TrainUsae) and self.config.control_clips:
            sets = self._control_sets(self.config.control_clips)
            linear = sharing.linear_metrics(
                linear_maps.control_errors(sets, self._streams()),
                measure(usae, sets.test.clips(), sets.test.groups),
                self.config.bootstrap, seed_for(self.seed, "bootstrap"),
            )  # fmt: skip
        scaling: Metrics = {}
        if name in (FIRST, DEDICATED):
            seed = seed_for(self.seed, "latent scaling")
            scaling = sharing.scale_sets(usae, test, found, self.config.bootstrap, seed)
        return SharedOutcome(
            name, trained.history, trained.dead_fraction, found, controls, norms, independent,
            linear, scaling, usae.owners,
        )  # fmt: skip

    def _control_sets(self, clips: int) -> linear_maps.Sets:
        """Draw clips for the ridge regressions: `clips` of train and test, half of validation."""
        stores = self.open_stores()
        numbers = {TRAIN: clips, VALIDATION: max(1, clips // 2), TEST: clips}
        drawn = (
            linear_maps.thinned(pair(stores, part), n, seed_for(self.seed, "controls", part))
            for part, n in numbers.items()
        )
        return linear_maps.Sets(*drawn)

    def _streams(self) -> linear_maps.ModelStreams:
        folders = tuple(f"data/models/{name}" for name in self.names)
        seed = seed_for(self.seed, "redrawn")
        return linear_maps.ModelStreams(folders, "data/clips", self.device, seed)

    def report(self, outcomes: Sequence[SharedOutcome]) -> Metrics:
        """Return the metrics. ``headline``: of FIRST, with intervals; ``over_seeds``: mean and sd.

        Keys are those of evaluation.headline; i and j index ``models``. ``null``: mispaired (mean
        over dictionaries trained on mispaired clips; what pairing adds), shuffled (FIRST where the
        models get different clips: what co-fires by chance) and random (random dictionaries of
        equal statistics).
        """
        real = [o for o in outcomes if o.name.startswith("seed-")]
        nulls = [o for o in outcomes if o.name.startswith(MISPAIRED)]
        first, per_seed = real[0], {o.name: _numbers(o.test) for o in real}
        estimates = evaluation.estimates(
            first.test, self.config.bootstrap, seed_for(self.seed, "bootstrap")
        )
        head = per_seed[first.name] | {key: one.as_dict() for key, one in estimates.items()}
        over_seeds: dict[str, dict[str, float]] = {}
        for key in head:
            over = [numbers[key] for numbers in per_seed.values()]
            over_seeds[key] = {"mean": float(np.mean(over))}
            if len(over) > 1:
                over_seeds[key]["sd"] = float(np.std(over, ddof=1))
        per_null = {o.name: _numbers(o.test) for o in nulls}
        null = {MISPAIRED: {k: float(np.mean([n[k] for n in per_null.values()])) for k in head}}
        for name, control in first.controls.items():
            null[name] = _numbers(control, first.random_norms)
        stores = self.open_stores()
        return {
            "models": {str(i): name for i, name in enumerate(self.names)},
            "layers": {str(i): store.config["layer"] for i, store in enumerate(stores)},
            "widths": {str(i): store.width for i, store in enumerate(stores)},
            "frame_rate": stores[0].config.get("frame_rate"),
            "slot": self.slot,
            "method": self.method,
            "n_latents": self.latents(),
            "k": self.config.k,
            "train_frames": int(pair(stores, TRAIN).frames.sum()),
            "test_frames": int(first.test.frames.sum()),
            "test_compositions": len(first.test.groups),
            "headline": head,
            "over_seeds": over_seeds,
            "null": null,
            "latent_scaling": first.scaling,
            **self._further({o.name: o for o in outcomes}),
            "independent_r2": first.independent,
            "dead_fraction_train": first.dead_fraction,
            "seeds": per_seed,
            "null_seeds": per_null,
        }

    def _further(self, outcomes: dict[str, SharedOutcome]) -> Metrics:
        """Return the ridge controls, and the crosscoder with dedicated latents, where there are."""
        n, seed = self.config.bootstrap, seed_for(self.seed, "bootstrap")
        out: Metrics = dict(outcomes[FIRST].linear)
        if DEDICATED in outcomes:
            real, null = outcomes[DEDICATED], outcomes[DEDICATED_MISPAIRED]
            tested = sharing.Dedicated(real.owners, real.test, real.controls[sharing.WITHOUT_OWN])
            mispaired = sharing.Dedicated(
                null.owners, null.test, null.controls[sharing.WITHOUT_OWN]
            )
            random = sharing.Dedicated(
                real.owners, real.controls["random"], None, real.random_norms
            )
            found = sharing.dedicated_metrics(tested, n, seed)
            found["null"] = {MISPAIRED: mispaired.numbers(), "random": random.numbers()}
            out["dedicated"] = found | {"latent_scaling": real.scaling}
        return out


def _numbers(
    found: evaluation.SharedEvaluation, norms: np.ndarray | None = None
) -> dict[str, float]:
    """Return the headline numbers; for a crosscoder also those of its decoder norms."""
    out = evaluation.numbers(found)
    if found.squared_error.shape[1] == 1:
        alive = found.fires.sum((0, 1)) > 0
        out |= evaluation.norm_numbers(found.norms if norms is None else norms, alive)
    return out


def sae_plan(
    section: TrainSae,
    model: str,
    slot: str,
    seed: int,
    device: str,
    live: str,
    loss_rows: Sequence[int] = (),
    loss_groups: Sequence[str] = (),
) -> SaePlan:
    """Plan the SAEs of a model and slot; paths are relative to the repository root."""
    return SaePlan(
        (model,), slot, (f"data/activations/{model}/{slot}",), section, SAE, seed, device, live,
        tuple(loss_rows), tuple(loss_groups),
    )  # fmt: skip


def shared_plan(
    section: TrainShared, method: str, models: Sequence[str], seed: int, device: str
) -> SharedPlan:
    """Plan the dictionaries of several models; paths are relative to the repository root.

    Stores of different frame rates are aligned by time first (`alignment.common_frames`).
    ValueError with fewer than two models.
    """
    if len(models) < 2:
        raise ValueError(
            f"a shared code compares models, but params.yaml has models: {list(models)}; add one"
        )
    slot = section.slot
    stores = common_frames([f"data/activations/{model}/{slot}" for model in models])
    independent = tuple(f"data/sae/{model}/{slot}/{FIRST}" for model in models)
    plan = SharedPlan(
        tuple(models), slot, stores, section, method, seed, device, independent=independent
    )
    plan.latents()  # fails at once where k is out of range
    return plan
