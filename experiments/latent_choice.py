"""Which part of the choice of latents helps: input score, output score, or both.

python -m experiments.latent_choice [--models MODEL ...] [--concepts ...] [--rankings ...]
writes experiments/latent_choice.csv

Needs the outputs of `dvc repro steer measure_effects`. Every ranking of latents gets the same
edits: `--latents` latents per edit, each strength of `--strengths`, `both_sides` never. Of the
strengths the one with the largest change on validation prompts is taken, per ranking and request,
among those within `steer.quality_budget`; test prompts give the numbers. Rows with concept "all"
pool all prompts; minus_share is the change less that of the ranking by share, paired by prompt.

The committed file is a reduced run: --models nano-small --strengths 1.0.

change: rise of the judges' probability in the wanted direction, mean over judges and prompts;
ce_cost: rise of the unsteered model's cross-entropy, nats per code.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from musicscope.config import load_params
from musicscope.config.concepts import Steer
from musicscope.core.command_line import Parser, number, run_program, whole
from musicscope.core.io import folder_sha256, scratch_dir, write_text
from musicscope.core.seeding import seed_for
from musicscope.core.stats import estimate, mean_of
from musicscope.data.clips import ClipStore
from musicscope.dictionaries.core import TopKSAE
from musicscope.features import output_effects
from musicscope.judges.pair import load_judges
from musicscope.models.registry import load_model
from musicscope.steering.conditions import Context, Measurement, run_condition
from musicscope.steering.learning import output_scores
from musicscope.steering.methods import Condition, Request
from musicscope.steering.recipes import DIRECTIONS, FOLDER, Settings, load_recipe, sae_folder
from musicscope.steering.subjects import make_subject

RESULT = "experiments/latent_choice.csv"
RANKINGS = ("share", "output", "toward", "share+output", "share+toward")
"""Input score alone, output scores alone, and both."""
BASE = "share"
POOLED = "all"


def open_context(name: str, section: Steer, seed: int) -> Context:
    """Open a model with the recipes of the stage steer, to which output effects are added."""
    slot, model = section.slot, load_model(f"data/models/{name}", "cpu")
    sae, effects = TopKSAE.load(sae_folder(name, slot)), output_effects.read(name, slot)
    recipes = {}
    for concept in section.concepts:
        recipe = load_recipe(f"{FOLDER}/{name}", concept)
        scores = output_scores(effects, concept, sae.n_latents)
        if missing := {"output", "toward"} - set(scores):
            sys.exit(f"data/effects/{name}/{slot}.parquet has no {missing} for {concept}: raise "
                     "measure_effects.train_clips")  # fmt: skip
        added = {k: torch.from_numpy(v.astype(np.float32)) for k, v in scores.items()}
        recipes[concept] = dataclasses.replace(
            recipe, both_sides="never", statistics={**recipe.statistics, **added}
        )
    subject = make_subject(model, section, seed, ClipStore.open("data/clips"))
    return Context(model, sae, recipes, load_judges("data/judge"), subject, seed)


def changes(
    context: Context, plain: Measurement, steered: Measurement, request: Request
) -> np.ndarray:
    """Rise of probability in the wanted direction per prompt, mean over judges: [n]."""
    concept, direction = request
    at = list(context.judges.families).index(concept)
    sign = 1 if direction == "on" else -1
    each = [
        sign * (steered.probabilities[judge][:, at] - plain.probabilities[judge][:, at])
        for judge in plain.probabilities
    ]
    with np.errstate(invalid="ignore"):
        return np.nanmean(np.where(np.isfinite(each), each, np.nan), axis=0)


def rows_of(
    name: str, context: Context, section: Steer, concepts: list[str], rankings: list[str],
    strengths: list[float], latents: int, scratch: Path,
) -> list[dict]:  # fmt: skip
    """Make the rows of one model."""
    requests = [(c, d) for c in concepts for d in DIRECTIONS]

    def measured(split: str, n: int, request: Request, settings: Settings | None) -> Measurement:
        selection = context.subject.select(split, n, [request])
        condition = Condition(selection) if settings is None else Condition(
            selection, "sae", (request,), (settings,)
        )  # fmt: skip
        return run_condition(lambda: context, scratch, condition)

    splits = {"validation": section.validation_prompts, "test": section.n_prompts}
    pooled: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]] = {}
    rows = []
    for request in requests:
        plain = {s: measured(s, n, request, None) for s, n in splits.items()}
        for score in rankings:
            tried = {}
            for strength in strengths:
                found = measured("validation", splits["validation"], request,
                                 Settings(strength, latents, score))  # fmt: skip
                cost = float(np.mean(found.costs(plain["validation"])["ce_cost"]))
                change = float(np.nanmean(changes(context, plain["validation"], found, request)))
                tried[strength] = (abs(cost) <= section.quality_budget, change)
            best = max(tried, key=lambda strength: tried[strength])
            for split, n in splits.items():
                found = measured(split, n, request, Settings(best, latents, score))
                change = changes(context, plain[split], found, request)
                cost = found.costs(plain[split])["ce_cost"]
                pooled.setdefault((score, split), []).append((change, cost))
                rows.append({
                    "model": name, "split": split, "score": score, "concept": request[0],
                    "direction": request[1], "strength": best, "prompts": n,
                    "change": np.nanmean(change), "ce_cost": cost.mean(),
                })  # fmt: skip
            print(f"{name} {' '.join(request)} {score}: {rows[-1]['change']:.3f}", file=sys.stderr,
                  flush=True)  # fmt: skip
    for (score, split), parts in pooled.items():
        change, cost = (np.concatenate(column) for column in zip(*parts, strict=True))
        base = np.concatenate([c for c, _ in pooled[BASE, split]])
        row = {"model": name, "split": split, "score": score, "concept": POOLED, "direction": "",
               "prompts": len(change), "ce_cost": cost.mean()}  # fmt: skip
        # Prompts of one request share its latents, so intervals are over requests.
        groups = np.repeat(np.arange(len(parts)), [len(c) for c, _ in parts])
        seed = seed_for(context.seed, "latent_choice", score, split)
        for key, values in (("change", change), ("minus_share", change - base)):
            known = np.isfinite(values)
            found = estimate(mean_of(values[known]), groups[known], section.bootstrap, seed,
                             "probability")  # fmt: skip
            row |= {key: found.value, f"{key}_low": found.low, f"{key}_high": found.high}
        rows.append(row)
    return rows


def main() -> None:
    params = load_params()
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(params.models))
    parser.add_argument("--strengths", type=number(above=0), nargs="+", default=[0.5, 1.0, 2.0])
    parser.add_argument("--concepts", nargs="+", default=list(params.steer.concepts),
                        choices=params.steer.concepts)  # fmt: skip
    parser.add_argument("--rankings", nargs="+", default=list(RANKINGS), help="share first")
    parser.add_argument("--latents", type=whole(1), default=8, help="per edit")
    parser.add_argument("--prompts", type=whole(2), default=8, help="per request and split")
    args = parser.parse_args()
    section = dataclasses.replace(
        params.steer, validation_prompts=args.prompts, n_prompts=args.prompts
    )
    rows = []
    for name in args.models:
        folders = ("models", "effects", "steering")
        inputs = [f"data/{folder}/{name}" for folder in folders]
        inputs += [str(sae_folder(name, section.slot)), "data/judge"]
        key = {"experiment": "latent_choice", "seed": params.seed, "slot": section.slot,
               "seconds": section.seconds, "guidance": section.guidance,
               "inputs": [folder_sha256(folder) for folder in inputs]}  # fmt: skip
        with scratch_dir(key) as scratch:
            context = open_context(name, section, params.seed)
            rows += rows_of(name, context, section, args.concepts, args.rankings, args.strengths,
                            args.latents, scratch)  # fmt: skip
    write_text(RESULT, pd.DataFrame(rows).to_csv(index=False, float_format="%.4g"))


if __name__ == "__main__":
    run_program(main)
