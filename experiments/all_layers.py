"""One SAE per layer of a model: reconstruction, concepts, stability and steering, by layer.

python -m experiments.all_layers --run [LAYER ...]   measure all layers, or these
python -m experiments.all_layers --draw              draw docs/images/all_layers.png

Writes experiments/all_layers.csv. A row that is there stays; delete it to measure the layer again.
Reads data/clips, data/models, data/judge and metrics/ablate; activations and SAEs go to `--work`.

A layer that a slot of the pipeline holds keeps its SAEs and numbers (data/sae, metrics/train_sae,
metrics/probe). For other layers functions and settings are those of the stages, reduced:

* `SEEDS` seeds per layer and no baselines. Fewer seeds make `returning` easier to reach.
* `NULLS` permutations of the labels.

Steering is reduced for all layers: one strength and number of latents, test prompts, and random
latents as control. Nothing is searched, so a layer that needs another strength looks worse than it
is.

change: rise of the judges' probability in the wanted direction, mean over reliable judges, then
over prompts; intervals are over requests (concept and direction), whose prompts share latents.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from musicscope.activations import extraction
from musicscope.activations.store import ActivationStore
from musicscope.config import Params, load_params
from musicscope.core import plots
from musicscope.core.command_line import Parser, run_program, whole
from musicscope.core.io import (
    Metrics,
    cache_dir,
    folder_sha256,
    publish_dir,
    read_json,
    scratch_dir,
    write_text,
)
from musicscope.core.seeding import seed_for
from musicscope.core.stats import Estimate, columns, estimate, mean_of
from musicscope.data.clips import ClipStore, main_clips
from musicscope.data.splits import clip_sets
from musicscope.data.taxonomy import FAMILIES
from musicscope.dictionaries import runs, stability
from musicscope.dictionaries.codes import pool_store
from musicscope.dictionaries.core import TopKSAE
from musicscope.dictionaries.data import TEST
from musicscope.dictionaries.fidelity import ce_recovered, measure_losses
from musicscope.dictionaries.training import SAE
from musicscope.features.probes import run_probes
from musicscope.judges.pair import FIT, load_judges
from musicscope.models.interface import language_model
from musicscope.models.registry import load_model, open_sources
from musicscope.steering.conditions import Context, Measurement, run_condition
from musicscope.steering.evaluation import change_of
from musicscope.steering.learning import learn_recipe, read_clips
from musicscope.steering.methods import Condition, Request
from musicscope.steering.recipes import DIRECTIONS, Settings
from musicscope.steering.subjects import make_subject

RESULT, PICTURE = Path("experiments/all_layers.csv"), Path("docs/images/all_layers.png")
SEEDS, NULLS = 2, 2
STRENGTH, LATENTS = 1.0, 8
CONCEPT = "guitar"
STAGES = ("train_sae", "probe")
METHODS = {"sae": "steering", "random_feature": "steering_random"}
"""Methods of steering, and the columns of their changes."""


@dataclass(frozen=True)
class Inputs:
    """Folders, settings and sizes that all layers share."""

    model: str
    data: Path
    work: Path
    params: Params
    prompts: int
    concepts: tuple[str, ...]
    """Concepts that are steered."""

    @property
    def sources(self) -> functools.partial:
        """Open the model and the clips; cached and picklable."""
        return functools.partial(
            open_sources, f"{self.data}/models/{self.model}", f"{self.data}/clips", "cpu"
        )

    def store(self, layer: int) -> Path:
        return self.work / "activations" / self.model / f"layer{layer}"


def extract(inputs: Inputs) -> int:
    """Extract the activations of every layer in one pass, if they lack; return how many layers."""
    model, clips = inputs.sources()
    layers = {f"layer{i}": point.name for i, point in enumerate(language_model(model).hook_points)}
    section = inputs.params.extract_activations
    plans = extraction.plan(
        model, clips, layers, captions=section.captions, dtype=section.dtype,
        shard_mb=section.shard_mb, batch_clips=section.batch_clips,
        model_sha256=folder_sha256(f"{inputs.data}/models/{inputs.model}"),
        clips_sha256=folder_sha256(f"{inputs.data}/clips"),
    )  # fmt: skip
    (plan,) = plans

    def current(layer: int) -> bool:
        if not (folder := inputs.store(layer)).is_dir():
            return False
        config = ActivationStore.open(folder).config
        wanted = {**plan.config, "captions": plan.captions, "layer": layers[f"layer{layer}"]}
        return all(config.get(key) == value for key, value in wanted.items())

    if not all(current(layer) for layer in range(len(layers))):
        print(plan.describe(), file=sys.stderr, flush=True)
        folders = {f"layer{i}": inputs.store(i) for i in range(len(layers))}
        extraction.extract(plans, inputs.sources, folders, inputs.params.compute.processes)
    return len(layers)


def slot_of(inputs: Inputs, layer: int) -> str | None:
    """Return the slot of the pipeline that holds a layer, with its SAEs and metrics, if any."""
    name = ActivationStore.open(inputs.store(layer)).config["layer"]
    for slot in inputs.params.slots:
        metrics = [Path(f"metrics/{s}/{inputs.model}-{slot}.json") for s in STAGES]
        folders = [inputs.data / part / inputs.model / slot for part in ("activations", "sae")]
        there = all(path.exists() for path in (*metrics, *folders))
        if there and read_json(metrics[0])["layer"] == name:
            return slot
    return None


def places(inputs: Inputs, layer: int) -> tuple[Path, Path]:
    """Return the folders of a layer's activations and of the first seed of its SAEs."""
    if slot := slot_of(inputs, layer):
        above = (inputs.data / part / inputs.model / slot for part in ("activations", "sae"))
        store, saes = above
    else:
        store, saes = inputs.store(layer), inputs.work / "sae" / inputs.model / f"layer{layer}"
    return store, saes / runs.FIRST


def measure(inputs: Inputs, layer: int) -> tuple[Metrics, Metrics]:
    """Train and probe a layer as the stages `STAGES` do, reduced; return metrics like theirs."""
    params, slot, store = inputs.params, f"layer{layer}", ActivationStore.open(inputs.store(layer))
    section = replace(params.train_sae, seeds=SEEDS, baselines=())
    plan = runs.SaePlan(
        (inputs.model,), slot, (str(inputs.store(layer)),), section, SAE, params.seed, "cpu",
        live=str(inputs.work / "live" / slot),
    )  # fmt: skip
    folder = places(inputs, layer)[1]
    with scratch_dir(runs.scratch_key(plan)) as scratch:
        outcomes = runs.run_all(plan, scratch, params.compute.processes)
        plan.write(outcomes, scratch / "out")
        publish_dir(scratch / "out", folder.parent)
        shutil.rmtree(scratch)
    sae = TopKSAE.load(folder)
    trained = plan.report(outcomes) | fidelity(inputs, store, sae)
    return trained, probe(inputs, store, sae)


def fidelity(inputs: Inputs, store: ActivationStore, sae: TopKSAE) -> Metrics:
    """Measure the cross-entropy recovered, on the clips that the stage train_sae takes."""
    params, clips = inputs.params, ClipStore.open(inputs.data / "clips").rows
    rng = np.random.default_rng(seed_for(params.seed, "train_sae", "ce clips"))
    test = main_clips(clips, TEST)
    rows = np.sort(rng.choice(test, min(params.train_sae.ce_clips, len(test)), replace=False))
    losses, _ = measure_losses(
        f"{inputs.data}/models/{inputs.model}", f"{inputs.data}/clips", rows.tolist(), store, sae,
        "cpu",
    )  # fmt: skip
    groups = clips["group"].iloc[rows].tolist()
    return ce_recovered(losses, groups, runs.BOOTSTRAP, seed_for(params.seed, "bootstrap"))


def probe(inputs: Inputs, store: ActivationStore, sae: TopKSAE) -> Metrics:
    """Probe all concepts in the codes and in the activations, with permuted labels as the null."""
    params, clips = inputs.params, ClipStore.open(inputs.data / "clips").rows
    workers = params.compute.processes
    section = replace(params.probe, null_seeds=NULLS, k_sparse=(1,))
    used = np.unique(np.concatenate(list(clip_sets(clips).values())))
    pools = pool_store(store, used, {"sae": sae}, workers, "cpu")
    rows = clips.iloc[used].reset_index(drop=True)
    return run_probes(rows, pools, FAMILIES, section, params.seed, workers)


def numbers(trained: Metrics, probed: Metrics) -> dict[str, float]:
    """Take the columns of the table from metrics like those of train_sae and probe."""
    kept = ("explained_variance", "explained_variance_pca", "explained_variance_random",
            "dead_fraction", "stability", "stability_null", "ce_recovered")  # fmt: skip
    row = columns({key: trained[key] for key in kept})
    row |= {"returning": trained["returning"]["share"],
            "returning_null": trained["returning"]["null_share"],
            "ce_ablated_rise": trained["ce_ablated"] - trained["ce_clean"]}  # fmt: skip
    concept = probed["concepts"][CONCEPT]
    each = {"": concept["sae"], "_latent": concept["k_sparse"]["001"], "_dense": concept["dense"],
            "_null": concept["shuffled"]}  # fmt: skip
    for suffix, of in each.items():
        row |= columns({f"{CONCEPT}{suffix}": of["test"]["auroc"]})
    mean = probed["mean"]["test"]
    for suffix, name in {"": "sae", "_latent": "sae_k001", "_dense": "dense"}.items():
        row |= columns({f"mean{suffix}": mean[name]})
    nulls = [of["shuffled"]["test"]["auroc"] for of in probed["concepts"].values()]
    return row | {"mean_null": float(np.mean([Estimate.read(null).value for null in nulls]))}


def steer(inputs: Inputs, layer: int) -> dict[str, float]:
    """Steer every request with the latents of a layer, and with random latents."""
    folder, dictionary = places(inputs, layer)
    params, store, sae = inputs.params, ActivationStore.open(folder), TopKSAE.load(dictionary)
    section = replace(params.steer, pairs=(), words=False, frozen_decoder=False)
    clips = ClipStore.open(inputs.data / "clips")
    model = load_model(f"{inputs.data}/models/{inputs.model}", "cpu")
    learnt = read_clips(store, sae, clips.rows, params.compute.processes)
    options = {k: getattr(section, k) for k in ("target", "both_sides", "gate_features",
                                                "gate_seconds")}  # fmt: skip
    name, sha256 = store.config["layer"], folder_sha256(dictionary)
    returns = stability.read(dictionary.parent)["returns"].to_numpy(bool)
    recipes = {
        concept: learn_recipe(
            learnt, concept, model=inputs.model, slot=name, layer=name,
            sae=sha256, frame_rate=model.frame_rates[name], n_features=LATENTS,
            returning=returns if section.stable_only else None, **options,
        )[0]
        for concept in inputs.concepts
    }  # fmt: skip
    subject, judges = make_subject(model, section, params.seed), load_judges(f"{inputs.data}/judge")
    context = Context(model, sae, recipes, judges, subject, params.seed)
    settings = Settings(STRENGTH, LATENTS, section.scores[0])
    hashes = [folder_sha256(inputs.data / f) for f in (f"models/{inputs.model}", "judge")]
    key = {"experiment": "all_layers", "seed": params.seed, **asdict(section), "inputs": hashes}
    unedited, edited = (cache_dir(k) for k in (key, {**key, "sae": sha256}))

    def measured(request: Request, method: str) -> Measurement:
        selection = subject.select("test", inputs.prompts, [request])
        if method == "plain":
            return run_condition(lambda: context, unedited, Condition(selection))
        condition = Condition(selection, method, (request,), (settings,))
        return run_condition(lambda: context, edited, condition)

    parts: dict[str, list[np.ndarray]] = {key: [] for key in METHODS.values()}
    costs: dict[str, list[np.ndarray]] = {key: [] for key in METHODS.values()}
    requests = [(c, d) for c in inputs.concepts for d in DIRECTIONS]
    for request in requests:
        plain = measured(request, "plain")
        named = [j for j in plain.probabilities
                 if judges.reliability.get(j, {}).get(request[0], 0.0) >= FIT]  # fmt: skip
        at, sign = list(judges.families).index(request[0]), 1 if request[1] == "on" else -1
        for method, key in METHODS.items():
            steered = measured(request, method)
            parts[key].append(change_of(plain, steered, at, named, sign))
            costs[key].append(steered.costs(plain)["ce_cost"])
    return summarise(requests, parts, costs, params.steer.bootstrap, params.seed)


def summarise(
    requests: Sequence[Request], parts: Mapping[str, Sequence[np.ndarray]],
    costs: Mapping[str, Sequence[np.ndarray]], bootstrap: int, seed: int,
) -> dict[str, float]:  # fmt: skip
    """Average changes and costs [prompts] of each request, with intervals over requests.

    `parts` and `costs` have an array per request for every column of `METHODS`. Prompts that are
    silent or that no judge has a say on (NaN) are left out, and counted.
    """
    ours, control = (np.concatenate(parts[key]) for key in METHODS.values())
    groups = np.repeat(np.arange(len(requests)), [len(part) for part in parts["steering"]])
    known = np.isfinite(ours) & np.isfinite(control)
    row: dict[str, float] = {"steering_prompts": int(known.sum())}
    if not known.any():
        return row
    compared = {"steering": ours, "steering_random": control, "steering_minus": ours - control}
    for name, values in compared.items():
        seed_of = seed_for(seed, "all_layers", name)
        found = estimate(mean_of(values[known]), groups[known], bootstrap, seed_of, "probability")
        row |= columns({name: found.as_dict()})
    for direction in DIRECTIONS:
        of = np.isin(groups, [i for i, request in enumerate(requests) if request[1] == direction])
        row[f"steering_minus_{direction}"] = float((ours - control)[known & of].mean())
    costed = {key: float(np.concatenate(costs[key]).mean()) for key in METHODS.values()}
    return row | {f"{key}_ce_cost": value for key, value in costed.items()}


def run_layer(inputs: Inputs, layer: int) -> dict[str, Any]:
    """Measure one layer, as a row of the table without steering."""
    ablation = read_json(f"metrics/ablate/{inputs.model}.json")["layers"][str(layer)]
    kl = Estimate.read(ablation[inputs.params.select_layers.kind]["kl"]).value
    if slot := slot_of(inputs, layer):
        found = (read_json(f"metrics/{s}/{inputs.model}-{slot}.json") for s in STAGES)
    else:
        found = measure(inputs, layer)
    trained, probed = found
    row = {"model": inputs.model, "layer": layer, "seeds": len(trained["seeds"]),
           "ablation_kl": kl}  # fmt: skip
    return row | numbers(trained, probed)


def read() -> dict[tuple[str, int], dict[str, Any]]:
    """Read the rows that are there, by model and layer; a number that is not there is left out."""
    if not RESULT.is_file():
        return {}
    rows = (row.dropna().to_dict() for _, row in pd.read_csv(RESULT).iterrows())
    return {(row["model"], row["layer"]): row for row in rows}


def add(row: Mapping[str, Any]) -> None:
    """Put a layer's row into the table, in order."""
    rows = read() | {(row["model"], row["layer"]): dict(row)}
    table = pd.DataFrame([rows[key] for key in sorted(rows)])
    write_text(RESULT, table.to_csv(index=False, float_format="%.4g"))


def run(inputs: Inputs, layers: Sequence[int]) -> None:
    """Measure the layers that lack, then steer with those that were not steered."""
    for layer in layers:
        if (inputs.model, layer) not in read():
            print(f"{inputs.model}, layer {layer}", file=sys.stderr, flush=True)
            add(run_layer(inputs, layer))
    for layer in layers:
        row = read()[inputs.model, layer]
        if "steering_prompts" not in row:
            print(f"{inputs.model}, steering at layer {layer}", file=sys.stderr, flush=True)
            add(row | steer(inputs, layer))


def draw(table: pd.DataFrame, path: Path) -> None:
    """Draw the table of one model: a panel per number, with its control."""
    figure, axes = plots.new_figure(2, 3, (11.5, 7.0))
    x = table["layer"]
    panels = {
        "explained variance": {
            "SAE": "explained_variance",
            "k principal components": "explained_variance_pca",
            "random dictionary": "explained_variance_random",
        },
        "AUROC of probes, test compositions": {
            "guitar": "guitar", "mean over concepts": "mean",
            "mean, of activations": "mean_dense", "mean, labels permuted": "mean_null",
        },
        "agreement between seeds": {
            "cosine of matched latents": "stability", "cosine with random rows": "stability_null",
            "share that returns": "returning", "share of random rows": "returning_null",
        },
        "cross-entropy recovered (1: lossless)": {"SAE": "ce_recovered"},
        "change of judges' probability by steering": {
            "latents of the concept": "steering", "random latents": "steering_random",
        },
        "KL when the layer is ablated": {"update replaced by its mean": "ablation_kl"},
    }  # fmt: skip
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=True):
        for series, (name, column) in enumerate(lines.items()):
            if column not in table:
                continue
            interval = [table.get(f"{column}_{side}") for side in ("low", "high")]
            plots.interval_curve(axis, x, table[column], *interval, name=name, series=series)
        axis.set_title(title)
        axis.set_xticks(x)
        axis.set_xlabel("layer")
        if axis.lines:
            axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
    plots.save_figure(figure, path, dpi=90)


def main() -> None:
    params = load_params()
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", metavar="LAYER", type=whole(0), nargs="*",
                        help="measure these layers, or all that lack")  # fmt: skip
    parser.add_argument("--draw", action="store_true", help="draw the picture from the table")
    parser.add_argument("--model", default="nano-small", help="folder in DATA/models")
    parser.add_argument("--data", default="data", help="folder with clips/, models/ and judge/")
    parser.add_argument("--work", default="data/all_layers", help="for activations and SAEs")
    parser.add_argument("--processes", type=whole(1), default=params.compute.processes)
    parser.add_argument("--prompts", type=whole(2), default=8, help="per request")
    parser.add_argument("--concepts", nargs="+", default=list(params.steer.concepts),
                        choices=params.steer.concepts, help="that are steered")  # fmt: skip
    args = parser.parse_args()
    if args.run is None and not args.draw:
        parser.error("give --run or --draw")
    if args.run is not None:
        torch.set_num_threads(1)
        compute = replace(params.compute, processes=args.processes)
        params = replace(params, compute=compute)
        inputs = Inputs(args.model, Path(args.data), Path(args.work), params, args.prompts,
                        tuple(args.concepts))  # fmt: skip
        layers = extract(inputs)
        if unknown := [layer for layer in args.run if layer >= layers]:
            parser.error(f"{args.model} has layers 0 to {layers - 1}, not {unknown}")
        run(inputs, args.run or range(layers))
    if args.draw:
        rows = [row for (model, _), row in read().items() if model == args.model]
        if not rows:
            parser.error(f"{RESULT} has no row of {args.model}: give --run first")
        draw(pd.DataFrame(rows), PICTURE)


if __name__ == "__main__":
    run_program(main)
