"""The search for a recipe of the SAEs: reconstruction against agreement between seeds.

python -m experiments.dictionary_search --run [NAME ...]   train on data/activations, add rows to
                                                           experiments/dictionary_search.csv
python -m experiments.dictionary_search --queue            queue them as experiments of train_sae;
                                                           then: dvc exp run --run-all

Explained variance, dead latents, L0 and the guitar AUROC are of validation clips; test clips are
not read. The AUROC is of one latent, chosen on half of the compositions, scored on the other half.
A row that is there stays; delete it to train it again. Seeds are those of the stage.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from musicscope.activations.store import ActivationStore
from musicscope.config import load_params
from musicscope.config.dictionaries import TrainSae
from musicscope.core.command_line import Parser, run_program
from musicscope.core.io import write_text
from musicscope.core.parallel import workers
from musicscope.core.seeding import seed_for
from musicscope.core.stats import auroc, auroc_columns
from musicscope.data.clips import ClipStore, known_labels, main_clips
from musicscope.dictionaries import evaluation, stability
from musicscope.dictionaries.codes import encode_clips, pool_clips
from musicscope.dictionaries.core import TopKSAE
from musicscope.dictionaries.data import pair
from musicscope.dictionaries.runs import SaePlan
from musicscope.dictionaries.training import SAE, train

RESULT = Path("experiments/dictionary_search.csv")
BASE: dict[str, Any] = {
    "k": 16, "expansion": 4, "samples": 1_000_000, "activation": "topk", "matryoshka": (),
    "learning_rate": 0.003, "batch_size": 1024, "decay_fraction": 0.4, "resample_every": 0,
    "seeds": 2,
}  # fmt: skip
NESTED = (40, 80, 160, 320)
CONCEPT = "guitar"
FIRST = ("nano-small", "top1")
RECIPES = {k: {"k": k, "samples": 2_000_000, "learning_rate": 0.006} for k in (20, 24)}
"""Recipes by k that the other slots and models confirm."""
OTHERS = (("nano-small", "top2"), ("nano-medium", "top1"), ("nano-medium", "top2"))


def cells() -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Experiment -> model, slot and what it changes of `BASE`."""
    changes: dict[str, dict[str, Any]] = {f"k{k}": {"k": k} for k in (4, 8, 16, 24, 32, 48)}
    changes |= {f"expansion{x}": {"expansion": x} for x in (8, 16, 32)}
    changes |= {
        "former": {"k": 48, "expansion": 8},
        "batchtopk": {"activation": "batchtopk"},
        "matryoshka": {"matryoshka": NESTED},
        "batchtopk-matryoshka": {"activation": "batchtopk", "matryoshka": NESTED},
        "slow": {"learning_rate": 0.001},
        "fast": {"learning_rate": 0.006},
        "faster": {"learning_rate": 0.012},
        "fast-matryoshka": {"learning_rate": 0.006, "matryoshka": NESTED},
        "batch512": {"batch_size": 512},
        "batch256": {"batch_size": 256},
        "resample": {"resample_every": 250},
    }
    changes |= {f"{n}M": {"samples": n * 1_000_000} for n in (2, 4, 8)}
    changes["expansion2"] = RECIPES[20] | {"expansion": 2}
    changes["recipe24-4M"] = RECIPES[24] | {"samples": 4_000_000}
    changes |= {f"recipe{k}": recipe for k, recipe in RECIPES.items()}
    found = {name: (*FIRST, of) for name, of in changes.items()}
    for model, slot in OTHERS:
        for k, recipe in RECIPES.items():
            found[f"{model}-{slot}-recipe{k}"] = (model, slot, recipe)
    return found


CELLS = cells()


def queue() -> None:
    """Queue all experiments of `CELLS`."""
    for name, (model, slot, changed) in CELLS.items():
        values = {
            key: list(v) if isinstance(v, tuple) else v for key, v in (BASE | changed).items()
        }
        sets = [
            word for key, value in values.items() for word in ("-S", f"train_sae.{key}={value}")
        ]
        target = f"train_sae@{model}-{slot}"
        subprocess.run(
            ["dvc", "exp", "run", "--queue", "-s", "-n", f"dictionary-{name}", *sets, target],
            check=True,
        )


def single_latent_auroc(means: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> float:
    """AUROC of the best latent by its clip averages [clips, F], chosen on other compositions."""
    halves = np.unique(groups, return_inverse=True)[1] % 2 == 0
    scores = []
    for chosen in (halves, ~halves):
        each = np.nan_to_num(auroc_columns(means[chosen], labels[chosen]), nan=0.5)
        best = int(np.abs(each - 0.5).argmax())
        sign = np.sign(each[best] - 0.5)
        scores.append(auroc(sign * means[~chosen, best], labels[~chosen]))
    return float(np.mean(scores))


def scores(
    saes: Sequence[TopKSAE], store: ActivationStore, rows: pd.DataFrame, section: TrainSae
) -> dict[str, float]:
    """Score the seeds of one cell; all but the agreement is of the first."""
    clips: Iterator[np.ndarray] = (x for (x,) in pair([store], "validation").clips())
    found = evaluation.evaluate(saes[0], clips)
    at, labels = known_labels(rows, CONCEPT, main_clips(rows, "validation"))
    codes = encode_clips(store, at, saes[0].encode, saes[0].n_latents, 1, "cpu")
    groups = rows["group"].to_numpy(str)[at]
    decoders = [sae.W_dec.numpy() for sae in saes]
    agreement, _ = stability.metrics(
        decoders, [found.fired] * len(saes), section.stable_cosine, seed_for(0, "search")
    )
    return {
        "explained_variance": found.explained_variance,
        **evaluation.stability(decoders, seed_for(0, "search")),
        "returning": agreement["returning"]["share"],
        "share_of_firings": agreement["returning"]["share_of_firings"],
        "decoder_cosine": agreement["decoder_cosine"],
        "dead_fraction": found.dead_fraction,
        "l0": found.l0,
        "guitar_auroc": single_latent_auroc(pool_clips(codes).mean, labels, groups),
    }


def train_one(plan: SaePlan, name: str) -> TopKSAE:
    """Train one seed of a plan."""
    trained = train(plan.data(name), plan.config, SAE, plan.seed_of(name)).dictionary
    assert isinstance(trained, TopKSAE)
    return trained


def run_cell(name: str, data: str) -> dict[str, Any]:
    """Train and score one experiment."""
    model, slot, changed = CELLS[name]
    params = load_params()
    section = replace(params.train_sae, **(BASE | changed))
    folder = f"{data}/activations/{model}/{slot}"
    plan = SaePlan((model,), slot, (folder,), section, SAE, params.seed, "cpu", live="")
    runs = plan.runs()
    with workers(min(params.compute.processes, len(runs))) as each:
        saes = list(each(partial(train_one, plan), runs))
    settings = {key: getattr(section, key) for key in BASE}
    settings["matryoshka"] = "+".join(map(str, section.matryoshka))
    store, rows = plan.open_stores()[0], ClipStore.open(f"{data}/clips").rows
    if store.ids != rows["id"].tolist():
        sys.exit(f"{store.folder} holds other clips than {data}/clips: run dvc repro")
    found = scores(saes, store, rows, section)
    return {"experiment": name, "model": model, "slot": slot, **settings, **found}


def read() -> list[dict[str, Any]]:
    """Read the rows that are there."""
    if not RESULT.is_file():
        return []
    return pd.read_csv(RESULT, keep_default_na=False).to_dict("records")


def add(row: Mapping[str, Any]) -> None:
    """Add one experiment to the table, in the order of `CELLS`."""
    order = list(CELLS)
    table = pd.DataFrame(sorted([*read(), row], key=lambda r: order.index(r["experiment"])))
    whole = [key for key, value in BASE.items() if isinstance(value, int)]
    table[whole] = table[whole].astype(int)
    write_text(RESULT, table.to_csv(index=False, float_format="%.4g"))


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queue", action="store_true", help="queue the experiments")
    parser.add_argument("--run", metavar="NAME", nargs="*", help="train these, or all that lack")
    parser.add_argument("--data", default="data", help="folder with activations/ and clips/")
    args = parser.parse_args()
    if args.queue == (args.run is not None):
        parser.error("give --queue or --run")
    if args.queue:
        queue()
        return
    if unknown := set(args.run) - set(CELLS):
        parser.error(f"unknown {', '.join(sorted(unknown))}; known {', '.join(CELLS)}")
    torch.set_num_threads(1)
    for name in tqdm(args.run or list(CELLS), unit="experiment"):
        if name not in {row["experiment"] for row in read()}:
            add(run_cell(name, args.data))


if __name__ == "__main__":
    run_program(main)
